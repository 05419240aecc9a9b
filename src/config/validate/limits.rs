//! Numbers, times and texts within bounds. 0 is never a way to say "no limit".

use std::time::Duration;

use super::Checker;
use crate::config::address::Target;
use crate::config::positions::{Step, at};
use crate::config::schema::{Config, ConnectionOverrides, Span, TraceProtocol, Traces};

/// Longer than any process lives, short enough that no sum of times overflows.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 86_400);
/// A registry of more would hurt the scraper long before it hurt us.
const MAX_PEERS: usize = 10_000;
const MAX_CONNECTIONS: usize = 1_000_000;
/// Spans that wait take about a kilobyte each, eight at the worst.
const MAX_SPANS: usize = 65_536;

pub(super) fn check(c: &mut Checker<'_>, config: &Config) {
    let Config { tls, connections, telemetry, labels, .. } = config;
    number(c, at!["tls", "max_handshakes"], Some(tls.max_handshakes), 65_536);
    number(c, at!["threads"], config.threads, 256);
    number(c, at!["connections", "max"], Some(connections.max), MAX_CONNECTIONS);
    number(c, at!["connections", "max_per_peer"], Some(connections.max_per_peer), MAX_CONNECTIONS);
    if telemetry.max_peers > MAX_PEERS {
        c.error(at!["telemetry", "max_peers"], format!("{} is too much; at most {MAX_PEERS}", telemetry.max_peers));
    }

    time(c, at!["tls", "handshake_timeout"], Some(tls.handshake_timeout));
    time(c, at!["connections", "idle_timeout"], Some(connections.idle_timeout));
    time(c, at!["connections", "half_closed_timeout"], Some(connections.half_closed_timeout));
    time(c, at!["connections", "max_age"], connections.max_age);
    for (index, listener) in config.inbound.iter().enumerate() {
        overrides(c, "inbound", index, &listener.connections);
    }
    for (index, listener) in config.outbound.iter().enumerate() {
        overrides(c, "outbound", index, &listener.connections);
        time(c, at!["outbound", index, "connect_timeout"], Some(listener.connect_timeout));
    }
    // For these two, zero has a meaning: at once.
    at_most(c, at!["drain_timeout"], config.drain_timeout);
    at_most(c, at!["identity", "withdraw_grace"], config.identity.withdraw_grace);
    if let Some(authority) = &config.identity.authority {
        let at = at!["identity", "authority", "svid_ttl"];
        time(c, at, Some(authority.svid_ttl));
        if !authority.svid_ttl.0.is_zero() && authority.svid_ttl < Span::seconds(2) {
            c.error(at, "an SVID of less than 2s could not be rotated in time; make it longer");
        }
    }

    for (key, value) in
        [("service_name", &labels.service_name), ("environment", &labels.environment), ("domain", &labels.domain)]
    {
        if value.len() > 128 || value.chars().any(char::is_control) {
            c.error(at!["labels", key], "a label is one line of at most 128 bytes; shorten it");
        }
    }
    if let Err(why) = tracing_subscriber::EnvFilter::builder().parse(&telemetry.log_level) {
        let what =
            format!("this is not a log level or filter ({why}); write such as info or portcullis::proxy=debug,info");
        c.error(at!["telemetry", "log_level"], what);
    }
    if let Some(traces) = &telemetry.traces {
        check_traces(c, traces);
    }
}

fn check_traces(c: &mut Checker<'_>, traces: &Traces) {
    if !(0.0..=1.0).contains(&traces.ratio) {
        c.error(at!["telemetry", "traces", "ratio"], format!("{} is not a share; write 0 to 1", traces.ratio));
    }
    time(c, at!["telemetry", "traces", "timeout"], Some(traces.timeout));
    number(c, at!["telemetry", "traces", "queue"], Some(traces.queue), MAX_SPANS);
    number(c, at!["telemetry", "traces", "max_batch"], Some(traces.max_batch), MAX_SPANS);
    let at = at!["telemetry", "traces", "endpoint"];
    match collector(traces) {
        Ok(target) if target.is_local() => {}
        Ok(_) => c.warn(
            at,
            "spans go to another machine in plaintext, and they tell who talks to whom; send them to a collector on this \
             machine or through an outbound listener",
        ),
        Err(why) => c.error(at, why),
    }
}

/// Where the collector is.
fn collector(traces: &Traces) -> Result<Target, String> {
    let example = match traces.protocol {
        TraceProtocol::Grpc => "http://127.0.0.1:4317",
        TraceProtocol::Http => "http://127.0.0.1:4318",
    };
    let Some(rest) = traces.endpoint.strip_prefix("http://") else {
        return Err(format!("this is not a plain URL of a collector; write such as {example}"));
    };
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    if traces.protocol == TraceProtocol::Grpc && !path.is_empty() {
        return Err(format!("a collector that speaks gRPC has no path; write such as {example}"));
    }
    if traces.endpoint.parse::<http::Uri>().is_err() || path.contains(['?', '#']) {
        return Err(format!("this is not a URL; write such as {example}"));
    }
    Target::parse(authority).map_err(|why| format!("{why}; write such as {example}"))
}

fn overrides(c: &mut Checker<'_>, section: &str, index: usize, over: &ConnectionOverrides) {
    time(c, at![section, index, "connections", "idle_timeout"], over.idle_timeout);
    time(c, at![section, index, "connections", "half_closed_timeout"], over.half_closed_timeout);
    time(c, at![section, index, "connections", "max_age"], over.max_age);
    number(c, at![section, index, "connections", "max_per_peer"], over.max_per_peer, MAX_CONNECTIONS);
}

pub(super) fn number(c: &mut Checker<'_>, at: &[Step<'_>], value: Option<usize>, most: usize) {
    match value {
        Some(0) => c.error(at, format!("0 is not a limit; write a number from 1 to {most}")),
        Some(value) if value > most => c.error(at, format!("{value} is too much; at most {most}")),
        _ => {}
    }
}

pub(super) fn time(c: &mut Checker<'_>, at: &[Step<'_>], value: Option<Span>) {
    let Some(value) = value else { return };
    if value.0.is_zero() {
        c.error(at, "a time of 0 would end everything at once; write a length such as 30s");
    }
    at_most(c, at, value);
}

fn at_most(c: &mut Checker<'_>, at: &[Step<'_>], value: Span) {
    if value.0 > LONGEST {
        c.error(at, "longer than ten years; write a shorter time");
    }
}
