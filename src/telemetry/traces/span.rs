//! A request's record as a span, by OpenTelemetry's semantic conventions for HTTP, RPC and TLS.
//!
//! What they have no name for stands under `portcullis.`: both SPIFFE IDs, the rule, the listener, the cause.

use std::borrow::Cow;
use std::sync::Arc;

use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue, Value};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use crate::config::schema::PolicyMode;
use crate::proxy::record::{RequestCause, RequestRecord};
use crate::tls::record::Direction;

/// The span of a request; none where it is part of no trace.
pub(super) fn of(record: &RequestRecord) -> Option<SpanData> {
    let trace = record.trace?;
    let inbound = record.direction == Direction::Inbound;
    let flags = if trace.sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
    let context = |span_id| {
        SpanContext::new(
            TraceId::from_bytes(trace.trace_id),
            SpanId::from_bytes(span_id),
            flags,
            false,
            TraceState::NONE,
        )
    };
    let method = method(&record.method);
    let known = method.unwrap_or("HTTP");
    let error = error(record);
    Some(SpanData {
        span_context: context(trace.span_id),
        parent_span_id: trace.parent.map_or(SpanId::INVALID, SpanId::from_bytes),
        parent_span_is_remote: trace.parent.is_some(),
        span_kind: if inbound { SpanKind::Server } else { SpanKind::Client },
        // A name must be one of few: without a route it is the method alone.
        name: match &*record.route {
            "*" => Cow::Borrowed(known),
            route => Cow::Owned(format!("{known} {route}")),
        },
        start_time: record.began,
        end_time: record.began.checked_add(record.duration).unwrap_or(record.began),
        attributes: attributes(record, method, error.as_ref()),
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: if error.is_some() { Status::error("") } else { Status::Unset },
        instrumentation_scope: InstrumentationScope::builder("portcullis")
            .with_version(env!("CARGO_PKG_VERSION"))
            .build(),
    })
}

fn attributes(record: &RequestRecord, method: Option<&'static str>, error: Option<&Value>) -> Vec<KeyValue> {
    let inbound = record.direction == Direction::Inbound;
    let mut all = Vec::with_capacity(32);
    let mut put = |key: &'static str, value: Value| all.push(KeyValue::new(key, value));
    let shared = |text: &Arc<str>| Value::from(Arc::clone(text));
    put("http.request.method", method.unwrap_or("_OTHER").into());
    if method.is_none() {
        put("http.request.method_original", record.method.as_str().to_owned().into());
    }
    if &*record.route != "*" {
        put(if inbound { "http.route" } else { "url.template" }, shared(&record.route));
    }
    if let Some(status) = record.status {
        put("http.response.status_code", i64::from(status).into());
    }
    put("url.path", record.path.to_string().into());
    put("url.scheme", if record.tls.is_some() { "https" } else { "http" }.into());
    if !record.host.is_empty() {
        put("server.address", record.host.to_string().into());
    }
    put("network.protocol.name", "http".into());
    put("network.protocol.version", record.version.as_str().into());
    if let Some(client) = record.client.address().filter(|_| inbound) {
        put("client.address", client.ip().to_string().into());
        put("client.port", i64::from(client.port()).into());
    }
    put("http.request.body.size", whole(record.bytes_sent));
    put("http.response.body.size", whole(record.bytes_received));
    if record.attempts > 1 {
        put("http.request.resend_count", i64::from(record.attempts - 1).into());
    }
    if let Some(status) = record.grpc_status {
        put("rpc.system", "grpc".into());
        put("rpc.grpc.status_code", i64::from(status).into());
    }
    if let Some(error) = error {
        put("error.type", error.clone());
    }
    if let Some(tls) = &record.tls {
        put("tls.protocol.name", "tls".into());
        put("tls.protocol.version", tls.version.trim_start_matches("TLSv").into());
        put("tls.cipher", tls.cipher_suite.into());
        put("tls.curve", tls.group.into());
    }
    for (key, id) in [("portcullis.peer.spiffe_id", &record.peer), ("portcullis.local.spiffe_id", &record.local)] {
        if let Some(id) = id {
            put(key, id.as_str().to_owned().into());
        }
    }
    if let Some((rule, mode)) = &record.rule {
        put("portcullis.rule", shared(rule));
        put("portcullis.rule.mode", if *mode == PolicyMode::Audit { "audit" } else { "enforce" }.into());
    }
    put("portcullis.listener", shared(&record.listener));
    if let Some(upstream) = &record.upstream {
        put("portcullis.upstream", shared(upstream));
    }
    put("portcullis.cause", record.cause.as_str().into());
    if !record.detail.is_empty() {
        put("portcullis.detail", record.detail.clone().into());
    }
    all
}

/// The method, if it is registered (RFC 9110, section 9.3, and PATCH).
fn method(method: &http::Method) -> Option<&'static str> {
    const METHODS: [&str; 9] = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "CONNECT", "TRACE"];
    METHODS.into_iter().find(|word| *word == method.as_str())
}

/// What went wrong, in the eyes of the conventions: a server's 4xx is its caller's fault, a client's is its own.
fn error(record: &RequestRecord) -> Option<Value> {
    let from = if record.direction == Direction::Inbound { 500 } else { 400 };
    match (record.cause, record.status) {
        (RequestCause::Done | RequestCause::Denied | RequestCause::BadRequest, Some(status)) => {
            (status >= from).then(|| status.to_string().into())
        }
        (cause, _) => Some(cause.as_str().into()),
    }
}

fn whole(bytes: u64) -> Value {
    i64::try_from(bytes).unwrap_or(i64::MAX).into()
}
