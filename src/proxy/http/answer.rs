//! Answers of our own: refusals and failures, in HTTP's words or in gRPC's.
//!
//! They name no rule and no address: what a caller may know is that it is refused; why stands in the log. Only the local
//! caller of an outbound listener is told the kind of failure, in `portcullis-reason`.

use http::header::{self, HeaderValue};
use http::{Response, StatusCode};
use hyper::body::Bytes;

use super::body::ReplyBody;
use super::exchange::Exchange;
use super::headers::REASON;
use crate::proxy::record::RequestCause;
use crate::tls::record::Direction;

/// The status for a request that ended like this without an answer from the upstream.
pub(super) fn status_of(cause: RequestCause) -> StatusCode {
    match cause {
        RequestCause::Denied | RequestCause::PolicyChanged => StatusCode::FORBIDDEN,
        RequestCause::BadRequest => StatusCode::BAD_REQUEST,
        RequestCause::Timeout => StatusCode::GATEWAY_TIMEOUT,
        RequestCause::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
        RequestCause::UpstreamReset => StatusCode::BAD_GATEWAY,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// By gRPC's "HTTP to gRPC Status Code Mapping", but that a timeout is DEADLINE_EXCEEDED.
fn grpc_status_of(status: StatusCode) -> u16 {
    match status.as_u16() {
        400 => 13,
        403 => 7,
        404 => 12,
        504 => 4,
        429 | 502 | 503 => 14,
        _ => 2,
    }
}

/// Answers in the upstream's place, and takes down how the request ended. `close` ends an HTTP/1 connection with it.
pub(super) fn answer(
    mut exchange: Box<Exchange>,
    status: StatusCode,
    cause: RequestCause,
    detail: impl Into<String>,
    close: bool,
) -> Response<ReplyBody> {
    exchange.end(cause, detail);
    exchange.settle(false);
    let text = status.canonical_reason().unwrap_or("error");
    let mut response = if exchange.grpc {
        let grpc = grpc_status_of(status);
        exchange.set_grpc_status(grpc);
        exchange.status = Some(200);
        let mut response = Response::new(None);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from(grpc));
        headers.insert("grpc-message", HeaderValue::from_static(text));
        response
    } else {
        exchange.status = Some(status.as_u16());
        let mut response = Response::new(Some(Bytes::from(format!("{text}\n"))));
        *response.status_mut() = status;
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        response
    };
    if exchange.down.direction() == Direction::Outbound {
        response.headers_mut().insert(REASON, HeaderValue::from_static(cause.as_str()));
    }
    if close || exchange.down.closes() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response.map(|text| ReplyBody::Own(text, Some(exchange)))
}
