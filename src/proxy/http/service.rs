//! What becomes of a request: checked, judged, sent on, answered.
//!
//! ```text
//! head ─ one host, one normal path ─ registered ─ policy: Admitted ─ pool: a leased connection ─ response
//! ```
//!
//! Inbound a rule must admit the request; outbound the upstream's connection has passed the gate (`expect`) before the
//! pool lends it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::{self, HeaderValue};
use http::{HeaderMap, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;

use super::answer::{answer, status_of};
use super::body::{Fault, ReplyBody, RequestBody};
use super::downstream::{Downstream, Spoken, Way};
use super::exchange::Exchange;
use super::headers;
use super::message::{self, Becomes, Head};
use super::pool::Pool;
use super::send::{Cleared, Judged, Sent, send};
use super::tunnel::Tunnel;
use crate::config::schema::{ForwardClientCert, Forwarded, PolicyMode};
use crate::policy::http::{HttpFacts, HttpTarget};
use crate::proxy::listener::Client;
use crate::proxy::record::{Event, HttpVersion, RequestCause};
use crate::tls::record::Direction;

/// A refusal before anything was sent.
struct Refused {
    status: StatusCode,
    cause: RequestCause,
    detail: String,
    close: bool,
}

impl Refused {
    fn bad(detail: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, cause: RequestCause::BadRequest, detail: detail.into(), close: true }
    }
}

/// Serves one request. There is always an answer.
pub(super) async fn handle(down: Arc<Downstream>, mut request: Request<Incoming>) -> Response<ReplyBody> {
    let becomes = becomes_of(&down, &request);
    let upgrade = (becomes != Becomes::Request).then(|| hyper::upgrade::on(&mut request));
    let (mut parts, body) = request.into_parts();
    let version = version(&down, &mut parts);
    let mut exchange = Exchange::begin(&down, &parts, version);
    exchange.trace = down.shared.tracing.incoming(&parts.headers);
    exchange.ticket = down.guard.as_ref().map(|guard| guard.next_request());
    if let Some(refusal) = exchange.ticket.as_ref().and_then(|ticket| ticket.refusal()) {
        let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::BAD_REQUEST);
        return answer(exchange, status, RequestCause::BadRequest, refusal.reason, true);
    }
    let prepared = prepare(&down, &mut exchange, parts, body, becomes);
    let (cleared, pool, patience) = match prepared {
        Ok(prepared) => prepared,
        Err(Refused { status, cause, detail, close }) => {
            return answer(exchange, status, cause, detail, close);
        }
    };
    let sent = send(&mut exchange, &pool, cleared, patience).await;
    match sent {
        Ok(sent) => reply(exchange, sent, upgrade),
        Err(failed) => {
            // A body that broke off explains the failure better than what came of it.
            let (status, cause, detail) = match exchange.fault() {
                Some(Fault::Framing) => {
                    (StatusCode::BAD_REQUEST, RequestCause::BadRequest, "the framing of the body was broken".into())
                }
                Some(Fault::Idle) => {
                    (StatusCode::REQUEST_TIMEOUT, RequestCause::BodyTimeout, "the body stood still for too long".into())
                }
                Some(Fault::Gone) => (StatusCode::BAD_REQUEST, RequestCause::ClientReset, failed.detail),
                None => (status_of(failed.cause), failed.cause, failed.detail),
            };
            let close = exchange.fault().is_some();
            answer(exchange, status, cause, detail, close)
        }
    }
}

fn becomes_of(down: &Downstream, request: &Request<Incoming>) -> Becomes {
    if request.method() == http::Method::CONNECT {
        return Becomes::Tunnel;
    }
    if down.spoken == Spoken::Http1 && request.headers().contains_key(header::UPGRADE) {
        return message::becomes(request);
    }
    Becomes::Request
}

/// What the request came in, at the first of our sidecars.
fn version(down: &Downstream, parts: &mut http::request::Parts) -> HttpVersion {
    match (down.spoken, parts.version) {
        (Spoken::Http1, http::Version::HTTP_10) => HttpVersion::Http10,
        (Spoken::Http1, _) => HttpVersion::Http11,
        (Spoken::Http2, _) => HttpVersion::Http2,
        (Spoken::Mesh, _) => match parts.headers.remove(headers::VERSION).as_ref().map(HeaderValue::as_bytes) {
            Some(b"1.1") => HttpVersion::Http11,
            Some(b"1.0") => HttpVersion::Http10,
            _ => HttpVersion::Http2,
        },
    }
}

type Prepared = (Cleared, Arc<Pool>, Option<Duration>);

/// Checks and judges a request, and makes it what goes on.
fn prepare(
    down: &Arc<Downstream>,
    exchange: &mut Exchange,
    parts: http::request::Parts,
    body: Incoming,
    becomes: Becomes,
) -> Result<Prepared, Refused> {
    let mut parts = parts;
    let authority = Head::authority(&parts).map_err(|why| Refused::bad(why.0))?;
    if let Some(authority) = &authority {
        exchange.host = authority.host().into();
    }
    headers::remove_hop_by_hop(&mut parts.headers);
    headers::join_cookies(&mut parts.headers);
    down.shared.tracing.outgoing(exchange.trace.as_ref(), &mut parts.headers);
    let inbound = matches!(down.way, Way::Inbound(_));
    let body_idle = if exchange.grpc { down.idle } else { down.limits.body_idle_timeout.0 };
    match &down.way {
        Way::Inbound(incoming) => {
            // The options that read the request; the rules are those in force once it is registered.
            let options = &incoming.listener.state.load_full().http;
            headers::remove_claims(&mut parts.headers, options.forwarded, true);
            let target = HttpTarget::of(&parts.method, &parts.uri, options.escaped_slash)
                .map_err(|why| Refused::bad(why.as_str()))?;
            let path = match &target {
                HttpTarget::Path(path) => {
                    exchange.path = path.as_str().into();
                    Some(path.path_and_query().clone())
                }
                HttpTarget::Server => {
                    exchange.path = "*".into();
                    Some(http::uri::PathAndQuery::from_static("*"))
                }
                HttpTarget::Authority => None,
            };
            let state = incoming.listener.state.load_full();
            let facts = HttpFacts::new(&parts, authority.as_ref(), target, state.policy.header_names())
                .with_connection(Arc::clone(&incoming.facts));
            exchange.register(Some(facts.clone()));
            // Whoever published since has walked past a request that did not stand there yet: judged by the newest.
            let state = incoming.listener.state.load_full();
            let rules = incoming.rules(&state.policy);
            let (request_body, meter) = RequestBody::new(body, body_idle, options.forwarded, inbound);
            exchange.meter = meter;
            forwarded(&mut parts.headers, options.forwarded, down.entry.client, Direction::Inbound);
            if options.forward_client_cert == ForwardClientCert::Set
                && let Some(value) = &incoming.client_cert
            {
                parts.headers.insert(headers::CLIENT_CERT, value.clone());
            }
            parts.headers.remove(header::HOST);
            let patience = exchange.patience(&parts.headers, None);
            let head = Head {
                method: parts.method,
                path,
                authority,
                headers: parts.headers,
                version: exchange.version,
                becomes,
            };
            let judged = Judged { facts, head, body: request_body };
            let admitted = match rules.admit_request(judged) {
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
            let pool = state.pool.clone().ok_or_else(no_pool)?;
            exchange.upstream = Some(Arc::clone(&pool.name));
            Ok((Cleared::by_rule(admitted), pool, patience))
        }
        Way::Outbound(listener) => {
            let state = listener.state.load_full();
            let pool = state.pool.clone().ok_or_else(no_pool)?;
            headers::remove_claims(&mut parts.headers, pool.options.forwarded, false);
            exchange.register(None);
            let path = match (&parts.method, parts.uri.path_and_query()) {
                (&http::Method::CONNECT, _) => None,
                (_, Some(path)) => Some(path.clone()),
                (_, None) => Some(http::uri::PathAndQuery::from_static("/")),
            };
            exchange.path = path.as_ref().map_or("", |path| path.path()).into();
            let (request_body, meter) = RequestBody::new(body, body_idle, pool.options.forwarded, inbound);
            exchange.meter = meter;
            forwarded(&mut parts.headers, pool.options.forwarded, down.entry.client, Direction::Outbound);
            parts.headers.remove(header::HOST);
            let patience = exchange.patience(&parts.headers, Some(pool.options.request_timeout.0));
            exchange.upstream = Some(Arc::clone(&pool.name));
            exchange.rule = Some((Arc::clone(state.expected.rule()), PolicyMode::Enforce));
            let head = Head {
                method: parts.method,
                path,
                authority,
                headers: parts.headers,
                version: exchange.version,
                becomes,
            };
            Ok((Cleared::for_expected(head, request_body), pool, patience))
        }
    }
}

fn no_pool() -> Refused {
    Refused {
        status: StatusCode::SERVICE_UNAVAILABLE,
        cause: RequestCause::Unreachable,
        detail: "the listener carries no HTTP any more".into(),
        close: true,
    }
}

fn decided(exchange: &mut Exchange, decision: &crate::policy::RequestDecision) {
    exchange.down.shared.observer.decision(exchange.down.direction(), &decision.decision);
    if let Some(report) = &decision.modules {
        modules(exchange, report);
    }
    exchange.rule = Some((Arc::clone(&decision.decision.rule), decision.decision.mode));
    exchange.route = Arc::clone(&decision.route);
}

/// Tells what the Rego modules said, where somebody should know.
fn modules(exchange: &Exchange, report: &crate::policy::rego::ModuleReport) {
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
        let client = match client {
            Client::Tcp(address) => Some(address.ip()),
            Client::Unix | Client::Pool => None,
        };
        headers::append_forwarded(headers, client, scheme);
    }
}

/// Passes the upstream's answer on.
fn reply(mut exchange: Box<Exchange>, sent: Sent, upgrade: Option<OnUpgrade>) -> Response<ReplyBody> {
    let Sent { mut response, lease, becomes } = sent;
    let status = response.status();
    exchange.answered(status.as_u16(), response.headers());
    let switched = status == StatusCode::SWITCHING_PROTOCOLS;
    let accepted = match becomes {
        Becomes::WebSocket => switched,
        Becomes::Tunnel => status.is_success(),
        Becomes::Request => false,
    };
    if switched && !accepted {
        return answer(
            exchange,
            StatusCode::BAD_GATEWAY,
            RequestCause::UpstreamReset,
            "the upstream switched protocols unasked",
            true,
        );
    }
    exchange.settle(accepted);
    let up = accepted.then(|| hyper::upgrade::on(&mut response));
    let (mut parts, body) = response.into_parts();
    headers::remove_hop_by_hop(&mut parts.headers);
    headers::remove_claims(&mut parts.headers, Forwarded::Keep, false);
    parts.version = http::Version::HTTP_11;
    let down = Arc::clone(&exchange.down);
    if let (Some(up), Some(own)) = (up, upgrade) {
        if switched {
            parts.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            parts.headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        }
        let tunnel = Tunnel { down: own, up, exchange, lease, idle: down.idle, half_closed: down.half_closed };
        if down.spoken == Spoken::Http1 {
            down.set_tunnel(tunnel);
        } else {
            tokio::spawn(async move {
                tunnel.run(None).await;
            });
        }
        return Response::from_parts(parts, ReplyBody::Own(None, None));
    }
    // What follows a tunnel that did not come about may have been meant for it.
    if down.closes() || (becomes == Becomes::Tunnel && down.spoken == Spoken::Http1) {
        parts.headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    let idle = down.idle;
    Response::from_parts(parts, ReplyBody::upstream(body, exchange, lease, idle))
}

/// The moment at which patience ends.
pub(super) fn deadline(patience: Option<Duration>) -> Option<Instant> {
    patience.and_then(|patience| Instant::now().checked_add(patience))
}
