//! What a request is checked and judged by, before any of it is sent.
//!
//! In: a head that the guard has passed. Out: a [`Cleared`] request, where it goes and how long its caller waits; or the
//! refusal.

use std::sync::Arc;
use std::time::Duration;

use http::header;
use http::request::Parts;
use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, Method, StatusCode};
use hyper::body::Incoming;

use super::body::RequestBody;
use super::downstream::{Downstream, Incoming as Asking, Way};
use super::exchange::Exchange;
use super::headers;
use super::message::{Becomes, Head};
use super::pool::Pool;
use super::send::{Cleared, Judged};
use crate::config::schema::{ForwardClientCert, Forwarded, PolicyMode};
use crate::policy::RequestDecision;
use crate::policy::http::{HttpFacts, HttpTarget};
use crate::policy::rego::ModuleReport;
use crate::proxy::listener::{Client, Outbound};
use crate::proxy::record::{Event, RequestCause};
use crate::tls::record::Direction;

/// A request that may be sent.
pub(super) struct Prepared {
    pub(super) cleared: Cleared,
    pub(super) pool: Arc<Pool>,
    /// How long its caller waits for the head of the response at most.
    pub(super) patience: Option<Duration>,
}

/// A refusal before anything was sent.
pub(super) struct Refused {
    pub(super) status: StatusCode,
    pub(super) cause: RequestCause,
    pub(super) detail: String,
    /// Whether an HTTP/1 connection ends with the answer.
    pub(super) close: bool,
}

impl Refused {
    fn bad(detail: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, cause: RequestCause::BadRequest, detail: detail.into(), close: true }
    }
}

/// Checks and judges a request, and makes it what goes on.
pub(super) fn prepare(
    down: &Arc<Downstream>,
    exchange: &mut Exchange,
    mut parts: Parts,
    body: Incoming,
    becomes: Becomes,
) -> Result<Prepared, Refused> {
    let authority = Head::authority(&parts).map_err(|why| Refused::bad(why.0))?;
    if let Some(authority) = &authority {
        exchange.host = authority.host().into();
    }
    headers::remove_hop_by_hop(&mut parts.headers);
    headers::join_cookies(&mut parts.headers);
    down.shared.tracing.outgoing(exchange.trace.as_ref(), &mut parts.headers);
    match &down.way {
        Way::Inbound(asking) => inbound(down, asking, exchange, parts, authority, body, becomes),
        Way::Outbound(listener) => outbound(down, listener, exchange, parts, authority, body, becomes),
    }
}

/// To the workload: a rule must admit it.
fn inbound(
    down: &Arc<Downstream>,
    asking: &Asking,
    exchange: &mut Exchange,
    mut parts: Parts,
    authority: Option<Authority>,
    body: Incoming,
    becomes: Becomes,
) -> Result<Prepared, Refused> {
    let state = asking.listener.state.load_full();
    let options = &state.http;
    headers::remove_claims(&mut parts.headers, options.forwarded, true);
    let target =
        HttpTarget::of(&parts.method, &parts.uri, options.escaped_slash).map_err(|why| Refused::bad(why.as_str()))?;
    let path = match &target {
        HttpTarget::Path(path) => {
            exchange.path = path.as_str().into();
            Some(path.path_and_query().clone())
        }
        HttpTarget::Server => {
            exchange.path = "*".into();
            Some(PathAndQuery::from_static("*"))
        }
        HttpTarget::Authority => None,
    };
    let facts = HttpFacts::new(&parts, authority.as_ref(), target, state.policy.header_names())
        .with_connection(Arc::clone(&asking.facts));
    exchange.register(Some(facts.clone()));
    // Whoever published since has walked past a request that did not stand there yet: the newest rules judge it. Headers
    // that only those look at were not kept, and are judged closed.
    let now = asking.listener.state.load_full();
    let rules = asking.rules(&now.policy);
    let body = take(down, exchange, body, options.forwarded);
    forwarded(&mut parts.headers, options.forwarded, down.entry.client, Direction::Inbound);
    if options.forward_client_cert == ForwardClientCert::Set
        && let Some(value) = &asking.client_cert
    {
        parts.headers.insert(headers::CLIENT_CERT, value.clone());
    }
    let patience = exchange.patience(&parts.headers, None);
    let head = head(exchange, parts, path, authority, becomes);
    let admitted = match rules.admit_request(Judged { facts, head, body }) {
        Ok(admitted) => admitted,
        Err((_, decision)) => {
            decided(exchange, &decision);
            return Err(Refused {
                status: StatusCode::FORBIDDEN,
                cause: RequestCause::Denied,
                detail: String::new(),
                // What follows may be meant for the tunnel that does not come about.
                close: becomes != Becomes::Request,
            });
        }
    };
    decided(exchange, admitted.decision());
    let pool = now.pools.of(down.entry.client.original()).ok_or_else(no_pool)?;
    exchange.upstream = Some(Arc::clone(&pool.name));
    Ok(Prepared { cleared: Cleared::by_rule(admitted), pool, patience })
}

/// To an upstream: its connections have passed the gate.
fn outbound(
    down: &Arc<Downstream>,
    listener: &Outbound,
    exchange: &mut Exchange,
    mut parts: Parts,
    authority: Option<Authority>,
    body: Incoming,
    becomes: Becomes,
) -> Result<Prepared, Refused> {
    let state = listener.state.load_full();
    if !state.takes_host(authority.as_ref().map(|authority| authority.host())) {
        // RFC 9110, section 15.5.20: on another connection it is taken to where it belongs.
        return Err(Refused {
            status: StatusCode::MISDIRECTED_REQUEST,
            cause: RequestCause::Misdirected,
            detail: "the host is none of the listener's `http_hosts`".into(),
            close: true,
        });
    }
    let pool = state.pools.of(down.entry.client.original()).ok_or_else(no_pool)?;
    let options = &pool.options;
    headers::remove_claims(&mut parts.headers, options.forwarded, false);
    exchange.register(None);
    let path = match (&parts.method, parts.uri.path_and_query()) {
        (&Method::CONNECT, _) => None,
        (_, Some(path)) => Some(path.clone()),
        (_, None) => Some(PathAndQuery::from_static("/")),
    };
    exchange.path = path.as_ref().map_or("", |path| path.path()).into();
    let body = take(down, exchange, body, options.forwarded);
    forwarded(&mut parts.headers, options.forwarded, down.entry.client, Direction::Outbound);
    let patience = exchange.patience(&parts.headers, Some(options.request_timeout.0));
    exchange.upstream = Some(Arc::clone(&pool.name));
    exchange.rule = Some((Arc::clone(state.expected.rule()), PolicyMode::Enforce));
    let head = head(exchange, parts, path, authority, becomes);
    Ok(Prepared { cleared: Cleared::for_expected(head, body), pool, patience })
}

/// The body, whose numbers the exchange keeps.
fn take(down: &Arc<Downstream>, exchange: &mut Exchange, body: Incoming, forwarded: Forwarded) -> RequestBody {
    let idle = if exchange.grpc { down.idle } else { down.limits.body_idle_timeout.0 };
    let (body, meter) = RequestBody::new(body, down, idle, forwarded);
    exchange.meter = meter;
    body
}

fn head(
    exchange: &Exchange,
    mut parts: Parts,
    path: Option<PathAndQuery>,
    authority: Option<Authority>,
    becomes: Becomes,
) -> Head {
    parts.headers.remove(header::HOST);
    Head { method: parts.method, path, authority, headers: parts.headers, version: exchange.version, becomes }
}

fn no_pool() -> Refused {
    Refused {
        status: StatusCode::SERVICE_UNAVAILABLE,
        cause: RequestCause::Unreachable,
        detail: "the listener carries no HTTP any more".into(),
        close: true,
    }
}

fn decided(exchange: &mut Exchange, decision: &RequestDecision) {
    exchange.down.shared.observer.decision(exchange.down.direction(), &decision.decision);
    if let Some(report) = &decision.modules {
        modules(exchange, report);
    }
    exchange.rule = Some((Arc::clone(&decision.decision.rule), decision.decision.mode));
    exchange.route = Arc::clone(&decision.route);
}

/// Tells what the Rego modules said, where somebody should know.
fn modules(exchange: &Exchange, report: &ModuleReport) {
    let listener = &exchange.down.entry.listener;
    let tell = |event| exchange.down.shared.observer.event(exchange.down.direction(), listener, event);
    if let Some(failure) = report.module.failure {
        tell(Event::ModuleFailed(failure.as_str()));
        tracing::warn!(listener = &**listener, failure = failure.as_str(), "the Rego module gave no answer: refused");
    }
    if report.shadow_differs() {
        tell(Event::ShadowDiffered);
        let (now, then) = (report.module.allows, report.shadow.is_some_and(|shadow| shadow.allows));
        tracing::info!(
            listener = &**listener,
            method = exchange.method.as_str(),
            path = &*exchange.path,
            module_allows = now,
            shadow_allows = then,
            "the shadow Rego module would have decided otherwise"
        );
    }
}

fn forwarded(headers: &mut HeaderMap, policy: Forwarded, client: Client, direction: Direction) {
    if policy == Forwarded::Append {
        let scheme = if direction == Direction::Inbound { "https" } else { "http" };
        headers::append_forwarded(headers, client.address().map(|address| address.ip()), scheme);
    }
}
