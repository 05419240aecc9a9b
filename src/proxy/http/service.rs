//! What becomes of a request: checked, judged, sent on, answered.
//!
//! ```text
//! head ─ one host, one normal path ─ registered ─ policy: Admitted ─ pool: a leased connection ─ response
//! ```
//!
//! Inbound a rule must admit the request; outbound the upstream's connection has passed the gate (`expect`) before the
//! pool lends it.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;

use http::header::{self, HeaderValue};
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;

use super::answer::{answer, status_of};
use super::body::{Fault, ReplyBody};
use super::downstream::{Downstream, Spoken};
use super::exchange::Exchange;
use super::headers;
use super::message::{self, Becomes};
use super::pool::Failed;
use super::prepare::{Prepared, Refused, prepare};
use super::send::{Sent, send};
use super::tunnel::Tunnel;
use crate::config::schema::Forwarded;
use crate::proxy::record::{HttpVersion, RequestCause};

/// A request under way, as the library carries it about.
type Handling = Pin<Box<dyn Future<Output = Result<Response<ReplyBody>, Infallible>> + Send>>;

/// Serves one request. There is always an answer.
pub(super) fn handle(down: &Arc<Downstream>, mut request: Request<Incoming>) -> Handling {
    let becomes = becomes_of(down, &request);
    let upgrade = (becomes != Becomes::Request).then(|| hyper::upgrade::on(&mut request));
    let (mut exchange, prepared) = admit(down, request, becomes);
    match prepared {
        // In a box: the library moves what it carries several times.
        Ok(Prepared { cleared, pool, patience }) => Box::pin(async move {
            Ok(match send(&mut exchange, &pool, cleared, patience).await {
                Ok(sent) => reply(exchange, sent, upgrade),
                Err(failed) => fail(exchange, failed),
            })
        }),
        Err(Refused { status, cause, detail, close }) => {
            let refusal = answer(exchange, status, cause, detail, close);
            Box::pin(std::future::ready(Ok(refusal)))
        }
    }
}

/// Everything before the first wait.
fn admit(
    down: &Arc<Downstream>,
    request: Request<Incoming>,
    becomes: Becomes,
) -> (Box<Exchange>, Result<Prepared, Refused>) {
    let (mut parts, body) = request.into_parts();
    let version = version(down, &mut parts);
    let mut exchange = Exchange::begin(down, &parts, version);
    exchange.trace = down.shared.tracing.incoming(&parts.headers);
    exchange.ticket = down.guard.as_ref().map(|guard| guard.next_request());
    let prepared = match exchange.ticket.as_ref().and_then(|ticket| ticket.refusal()) {
        Some(refusal) => Err(Refused {
            status: StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::BAD_REQUEST),
            cause: RequestCause::BadRequest,
            detail: refusal.reason.into(),
            close: true,
        }),
        None => prepare(down, &mut exchange, parts, body, becomes),
    };
    (exchange, prepared)
}

/// Answers in the place of an upstream that did not.
fn fail(exchange: Box<Exchange>, failed: Failed) -> Response<ReplyBody> {
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
