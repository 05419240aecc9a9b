//! The access log: one line for each connection and one for each request, when it ends.
//!
//! Fields are flat and their names are stable. What a peer supplied is escaped by the log's own formatter; SPIFFE IDs
//! cannot hold anything that needs it.

use std::fmt;
use std::sync::Arc;

use crate::config::schema::PolicyMode;
use crate::identity::SpiffeId;
use crate::proxy::record::{Cause, ConnectionRecord, HttpVersion, RequestCause, RequestRecord};

/// Writes the line of one connection under the target `portcullis::access`.
pub fn connection(record: &ConnectionRecord) {
    let tls = record.tls.as_ref();
    let watched = record.watched.as_ref();
    let picked = watched.map(|watched| &watched.picked);
    let (rule, mode) = ruled(record.rule.as_ref());
    let message = match record.cause {
        Cause::Done => "connection done",
        Cause::Denied | Cause::Handshake | Cause::Limit | Cause::WeakTls => "connection refused",
        _ => "connection ended",
    };
    tracing::info!(
        target: "portcullis::access",
        listener = &*record.listener,
        direction = record.direction.as_str(),
        client = record.client,
        upstream = record.upstream,
        peer = record.peer.as_ref().map(SpiffeId::as_str),
        local = record.local.as_ref().map(SpiffeId::as_str),
        rule,
        mode,
        tls_version = tls.map(|tls| tls.version).or(picked.map(|picked| picked.version)),
        cipher_suite = tls.map(|tls| tls.cipher_suite).or(picked.map(|picked| picked.cipher_suite)),
        group = tls.map(|tls| tls.group).or(picked.map(|picked| picked.group)),
        signature = tls.map(|tls| tls.signature),
        key_type = tls.map(|tls| tls.peer_key.as_str()),
        resumed = tls.map(|tls| tls.resumed),
        compliant = tls.map(|tls| tls.compliant).or(watched.map(|watched| watched.compliant)),
        bytes_sent = record.bytes_sent,
        bytes_received = record.bytes_received,
        duration_seconds = record.duration.as_secs_f64(),
        cause = record.cause.as_str(),
        reason = record.handshake_failure.map(|reason| reason.as_str()),
        detail = (!record.detail.is_empty()).then_some(record.detail.as_str()),
        "{message}"
    );
}

/// Writes the line of one request under the target `portcullis::access`. The path is without its query, which may hold
/// secrets.
pub fn request(record: &RequestRecord) {
    let tls = record.tls.as_ref();
    let (rule, mode) = ruled(record.rule.as_ref());
    let message = match record.cause {
        RequestCause::Done => "request done",
        RequestCause::Denied | RequestCause::Misdirected | RequestCause::BadRequest | RequestCause::Overloaded => {
            "request refused"
        }
        _ => "request ended",
    };
    tracing::info!(
        target: "portcullis::access",
        listener = &*record.listener,
        direction = record.direction.as_str(),
        client = %record.client,
        upstream = record.upstream.as_deref(),
        peer = record.peer.as_ref().map(SpiffeId::as_str),
        local = record.local.as_ref().map(SpiffeId::as_str),
        rule,
        mode,
        route = &*record.route,
        method = record.method.as_str(),
        host = &*record.host,
        path = &*record.path,
        protocol = match record.version {
            HttpVersion::Http10 => "HTTP/1.0",
            HttpVersion::Http11 => "HTTP/1.1",
            HttpVersion::Http2 => "HTTP/2",
        },
        status = record.status,
        grpc_status = record.grpc_status,
        tls_version = tls.map(|tls| tls.version),
        cipher_suite = tls.map(|tls| tls.cipher_suite),
        group = tls.map(|tls| tls.group),
        bytes_sent = record.bytes_sent,
        bytes_received = record.bytes_received,
        duration_seconds = record.duration.as_secs_f64(),
        attempts = record.attempts,
        cause = record.cause.as_str(),
        detail = (!record.detail.is_empty()).then_some(record.detail.as_str()),
        trace_id = record.trace.map(|trace| tracing::field::display(Hex(trace.trace_id))),
        span_id = record.trace.map(|trace| tracing::field::display(Hex(trace.span_id))),
        "{message}"
    );
}

/// The rule that decided, and in which mode.
fn ruled(rule: Option<&(Arc<str>, PolicyMode)>) -> (Option<&str>, Option<&'static str>) {
    let Some((rule, mode)) = rule else { return (None, None) };
    (Some(rule), Some(if *mode == PolicyMode::Audit { "audit" } else { "enforce" }))
}

/// Ids of a trace as W3C Trace Context spells them.
struct Hex<const N: usize>([u8; N]);

impl<const N: usize> fmt::Display for Hex<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
