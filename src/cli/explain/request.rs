//! The request that `explain` is asked about: as it would have come over the wire, and what became of it.

use std::sync::Arc;

use http::uri::Authority;
use http::{HeaderName, HeaderValue, Method, Request};

use crate::cli::Failure;
use crate::config::schema::Inbound;
use crate::identity::SpiffeId;
use crate::policy::http::{ConnectionFacts, HttpTarget, NO_ROUTE};
use crate::policy::path::{NormalPath, PathError};
use crate::policy::rego::{Answer, ModuleReport};
use crate::policy::{Decision, HttpFacts, Policy, RequestDecision};

/// A request, where the listener carries HTTP.
#[derive(Debug, Default, clap::Args)]
pub struct RequestArgs {
    /// The request's method.
    #[arg(long, value_name = "METHOD")]
    pub method: Option<Method>,
    /// The request's path, as a client would write it.
    #[arg(long, value_name = "PATH")]
    pub path: Option<String>,
    /// The request's host.
    #[arg(long, value_name = "HOST")]
    pub host: Option<Authority>,
    /// A header of the request; may be repeated.
    #[arg(long = "header", value_name = "NAME:VALUE", value_parser = header)]
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// A gRPC call: POST to this path, with gRPC's content type.
    #[arg(long, value_name = "SERVICE/METHOD", conflicts_with_all = ["method", "path"])]
    pub grpc: Option<String>,
}

fn header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let (name, value) = text.split_once(':').ok_or("a header is written name:value")?;
    let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| "that is no name of a header")?;
    let value = HeaderValue::from_str(value.trim()).map_err(|_| "that is no value of a header")?;
    Ok((name, value))
}

/// A request that has been described.
pub(super) struct Asked {
    method: Method,
    path: Option<String>,
    host: Option<Authority>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl RequestArgs {
    /// The request; none if nothing of one is said.
    pub(super) fn asked(&self) -> Result<Option<Asked>, Failure> {
        let Self { method, path, host, headers, grpc } = self;
        if method.is_none() && path.is_none() && host.is_none() && headers.is_empty() && grpc.is_none() {
            return Ok(None);
        }
        let mut headers = headers.clone();
        let mut method = method.clone().unwrap_or(Method::GET);
        let mut path = path.clone();
        if let Some(call) = grpc {
            let call = call.strip_prefix('/').unwrap_or(call);
            if call.split('/').count() != 2 {
                return Err(Failure::usage(
                    "a gRPC call is written service/method, such as nhs.records.v1.Records/Get",
                ));
            }
            (method, path) = (Method::POST, Some(format!("/{call}")));
            headers.push((http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc")));
        }
        Ok(Some(Asked { method, path, host: host.clone(), headers }))
    }
}

/// A request and what became of it.
pub(super) struct Answered {
    method: Method,
    /// In normal form; none where it has none, or is refused for it.
    path: Option<NormalPath>,
    host: Option<String>,
    pub(super) decision: Decision,
    route: Arc<str>,
    modules: Option<ModuleReport>,
    /// Why it is refused before any rule is asked.
    pub(super) malformed: Option<PathError>,
}

impl Asked {
    /// Judges the request as the listener would.
    pub(super) fn judge(self, policy: &Policy, listener: &Inbound, from: &SpiffeId) -> Answered {
        let Self { method, path, host, headers } = self;
        // As where there is no rule at all.
        let nothing = |malformed| Answered {
            method: method.clone(),
            path: None,
            host: host.as_ref().map(Authority::to_string),
            decision: policy.decide("", from),
            route: NO_ROUTE.into(),
            modules: None,
            malformed,
        };
        let target = match (&method, path.as_deref()) {
            (&Method::CONNECT, None) => Ok(HttpTarget::Authority),
            (&Method::OPTIONS, Some("*")) => Ok(HttpTarget::Server),
            (_, path) => NormalPath::parse(path.unwrap_or("/"), listener.http.escaped_slash).map(HttpTarget::Path),
        };
        let target = match target {
            Ok(target) => target,
            Err(why) => return nothing(Some(why)),
        };
        let Some(rules) = policy.listener(&listener.name) else { return nothing(None) };
        let (mut parts, ()) = Request::new(()).into_parts();
        parts.method = method.clone();
        for (name, value) in headers {
            parts.headers.append(name, value);
        }
        // What only a running proxy knows is not shown to a module.
        let connection = ConnectionFacts { source: from.clone(), destination: None, tls: None };
        let path = target.path().cloned();
        let facts = HttpFacts::new(&parts, host.as_ref(), target, rules.header_names());
        let facts = facts.with_connection(Arc::new(connection));
        let host = facts.host().map(str::to_owned);
        let RequestDecision { decision, route, modules } = rules.for_peer(from).decide(&facts);
        Answered { method, path, host, decision, route, modules, malformed: None }
    }
}

impl Answered {
    pub(super) fn in_words(&self) -> String {
        let path = self.path.as_ref().map_or(String::new(), |path| format!(" {}", path.as_str()));
        let host = self.host.as_deref().map_or(String::new(), |host| format!(" on {host}"));
        format!("request as judged: {}{path}{host}", self.method)
    }

    /// What is to be said beyond the decision, a line each.
    pub(super) fn details(&self) -> Vec<String> {
        let mut lines = vec![format!("route in metrics: {}", self.route)];
        if let Some(report) = self.modules {
            let said = |answer: Answer| match (answer.failure, answer.allows) {
                (Some(failure), _) => format!("gave no answer ({})", failure.as_str()),
                (None, true) => "allows it".to_owned(),
                (None, false) => "does not allow it".to_owned(),
            };
            lines.push(format!("the Rego module, without facts of TLS and of ourselves, {}", said(report.module)));
            lines.extend(report.shadow.map(|shadow| format!("the shadow module {}", said(shadow))));
        }
        lines
    }

    pub(super) fn in_json(&self) -> serde_json::Value {
        let answer = |answer: Answer| serde_json::json!({ "allows": answer.allows, "failure": answer.failure.map(|failure| failure.as_str()) });
        serde_json::json!({
            "method": self.method.as_str(),
            "path": self.path.as_ref().map(NormalPath::as_str),
            "host": self.host,
            "route": &*self.route,
            "malformed": self.malformed.map(PathError::as_str),
            "module": self.modules.map(|report| answer(report.module)),
            "shadow": self.modules.and_then(|report| report.shadow).map(answer),
        })
    }
}
