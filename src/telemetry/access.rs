//! The access log: one line for each connection, when it ends.
//!
//! Fields are flat and their names are stable. What a peer supplied is escaped by the log's own formatter; SPIFFE IDs
//! cannot hold anything that needs it.

use crate::config::schema::PolicyMode;
use crate::identity::SpiffeId;
use crate::proxy::record::{Cause, ConnectionRecord};

/// Writes the line of one connection under the target `portcullis::access`.
pub fn write(record: &ConnectionRecord) {
    let tls = record.tls.as_ref();
    let (rule, mode) = match &record.rule {
        Some((rule, mode)) => (Some(&**rule), Some(if *mode == PolicyMode::Audit { "audit" } else { "enforce" })),
        None => (None, None),
    };
    let message = match record.cause {
        Cause::Done => "connection done",
        Cause::Denied | Cause::Handshake | Cause::Limit => "connection refused",
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
        tls_version = tls.map(|tls| tls.version),
        cipher_suite = tls.map(|tls| tls.cipher_suite),
        group = tls.map(|tls| tls.group),
        signature = tls.map(|tls| tls.signature),
        key_type = tls.map(|tls| tls.peer_key.as_str()),
        resumed = tls.map(|tls| tls.resumed),
        compliant = tls.map(|tls| tls.compliant),
        bytes_sent = record.bytes_sent,
        bytes_received = record.bytes_received,
        duration_seconds = record.duration.as_secs_f64(),
        cause = record.cause.as_str(),
        reason = record.handshake_failure.map(|reason| reason.as_str()),
        detail = (!record.detail.is_empty()).then_some(record.detail.as_str()),
        "{message}"
    );
}
