//! Limits of HTTP, detection, and options of requests: within bounds, and where they can have an effect.

use super::Checker;
use super::limits::{number, time};
use crate::config::positions::{Step, at};
use crate::config::schema::{Config, Outbound, OutboundHttp, Protocol, ProxyProtocol, Span};

/// More ports than that are no exceptions any more.
const MAX_PORTS: usize = 256;

pub(super) fn check(c: &mut Checker<'_>, config: &Config) {
    let http = &config.http;
    number(c, at!["http", "max_headers"], Some(http.max_headers), 1000);
    least(c, at!["http", "max_header_bytes"], http.max_header_bytes, 256, 1 << 20);
    least(c, at!["http", "max_request_line"], http.max_request_line, 64, 1 << 16);
    number(c, at!["http", "max_concurrent_streams"], usize::try_from(http.max_concurrent_streams).ok(), 10_000);
    time(c, at!["http", "header_timeout"], Some(http.header_timeout));
    time(c, at!["http", "body_idle_timeout"], Some(http.body_idle_timeout));
    time(c, at!["detect", "timeout"], Some(config.detect.timeout));
    if config.detect.timeout > Span::seconds(60) {
        c.error(at!["detect", "timeout"], "nobody waits so long for first bytes; write at most 60s");
    }
    if config.detect.opaque_ports.len() > MAX_PORTS {
        c.error(at!["detect", "opaque_ports"], format!("at most {MAX_PORTS} ports; use `protocol: tcp` on listeners"));
    }
    for (index, listener) in config.inbound.iter().enumerate() {
        if listener.protocol == Protocol::Http && listener.proxy_protocol != ProxyProtocol::Off {
            let what = "requests of several peers share the connections to the workload, so none has one peer to tell; \
                        say `http: { forward_client_cert: set }` instead";
            c.error(at!["inbound", index, "proxy_protocol"], what);
        }
    }
    for (index, listener) in config.outbound.iter().enumerate() {
        outbound(c, index, listener);
    }
}

fn outbound(c: &mut Checker<'_>, index: usize, listener: &Outbound) {
    let http = &listener.http;
    if !listener.protocol.carries_http() {
        if *http != OutboundHttp::default() {
            let what = "options of HTTP on a listener that carries bytes; add `protocol: http` or remove them";
            c.error(at!["outbound", index, "http"], what);
        }
        return;
    }
    let key = |name: &'static str| [Step::Key("outbound"), Step::Index(index), Step::Key("http"), Step::Key(name)];
    time(c, &key("request_timeout"), Some(http.request_timeout));
    time(c, &key("eject_for"), Some(http.eject_for));
    number(c, &key("max_http2_connections"), Some(http.max_http2_connections), 64);
    number(c, &key("max_http1_connections"), Some(http.max_http1_connections), 10_000);
    number(c, &key("eject_after"), usize::try_from(http.eject_after).ok(), 1000);
    let retries = &http.retries;
    let at = |name: &'static str| {
        [Step::Key("outbound"), Step::Index(index), Step::Key("http"), Step::Key("retries"), Step::Key(name)]
    };
    if retries.attempts > 10 {
        c.error(&at("attempts"), format!("{} is too much; at most 10", retries.attempts));
    }
    if !(0.0..=1.0).contains(&retries.budget) {
        c.error(&at("budget"), "the budget is a share of all requests; write a number from 0 to 1");
    }
    if let Some(status) = retries.statuses.iter().find(|status| !(400..600).contains(*status)) {
        c.error(&at("statuses"), format!("{status} says no failure; write statuses from 400 to 599, such as 503"));
    }
    time(c, &at("backoff"), Some(retries.backoff));
    time(c, &at("max_backoff"), Some(retries.max_backoff));
    if retries.max_backoff < retries.backoff {
        c.error(&at("max_backoff"), "shorter than `backoff`; make it longer");
    }
}

fn least(c: &mut Checker<'_>, at: &[Step<'_>], value: usize, least: usize, most: usize) {
    if !(least..=most).contains(&value) {
        c.error(at, format!("{value} is out of bounds; write a number from {least} to {most}"));
    }
}
