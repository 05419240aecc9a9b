//! Captured traffic: what captures belong together, and which options have a meaning for it.

use std::collections::BTreeMap;

use super::Checker;
use super::limits::time;
use crate::config::address::Target;
use crate::config::positions::{Place, at};
use crate::config::schema::{
    CapturedPorts, Config, ForwardClientCert, Inbound, InboundMode, Intercept, Outbound, OutboundMode, Passthrough,
    Plaintext, Protocol, ProxyProtocol, Span, Unmatched,
};

/// Entries of any list here: each is a rule that packets or connections are held against.
const MAX_ENTRIES: usize = 256;

pub(super) fn check(c: &mut Checker<'_>, config: &Config) {
    if let Some(intercept) = &config.intercept {
        options(c, intercept);
    }
    let inbound = config.intercept.as_ref().and_then(|intercept| intercept.inbound.as_ref());
    let mut ports: BTreeMap<Option<u16>, Place> = BTreeMap::new();
    for (index, listener) in config.inbound.iter().enumerate() {
        inbound_listener(c, index, listener, inbound.is_some());
        let named = match &listener.capture {
            None => Vec::new(),
            Some(CapturedPorts::Any) => vec![None],
            Some(CapturedPorts::Ports(ports)) => ports.iter().copied().map(Some).collect(),
        };
        let at = at!["inbound", index, "capture"];
        for port in named {
            match ports.insert(port, c.places.at(at)) {
                None => {}
                Some(place) => {
                    let what = port.map_or("'any'".to_owned(), |port| format!("port {port}"));
                    c.error(
                        at,
                        format!("{what} is captured by the listener on line {} already; remove it", place.line),
                    );
                }
            }
        }
        if listener.capture.is_some() && inbound.is_some_and(|inbound| inbound.preserve_source) {
            preserves_source(c, index, listener);
        }
    }
    let outbound = config.intercept.as_ref().and_then(|intercept| intercept.outbound.as_ref());
    for (index, listener) in config.outbound.iter().enumerate() {
        outbound_listener(c, index, listener, outbound.is_some());
    }
}

fn preserves_source(c: &mut Checker<'_>, index: usize, listener: &Inbound) {
    if listener.protocol.carries_http() {
        let what = "requests of several clients share the connections to the workload, so there is no one source \
                    address to preserve; say `protocol: tcp`, or remove `preserve_source`";
        c.error(at!["inbound", index, "protocol"], what);
    }
    if listener.to.is_some() {
        let what = "the workload sees the client's address only where the connection was for; remove `to`, or \
                    `preserve_source`";
        c.error(at!["inbound", index, "to"], what);
    }
}

fn options(c: &mut Checker<'_>, intercept: &Intercept) {
    if intercept.inbound.is_none() && intercept.outbound.is_none() {
        c.error(at!["intercept"], "nothing is captured; add `inbound: {}`, `outbound: {}` or both");
    }
    let owner = &intercept.proxy;
    if owner.uid.is_none() && owner.gid.is_none() && owner.mark.is_none() {
        let what = "the proxy's own traffic could not be told from the workload's; name its `uid`, `gid` or `mark`";
        c.error(at!["intercept", "proxy"], what);
    }
    if owner.uid == Some(0) || owner.gid == Some(0) {
        let what = "all that runs as root would pass uncaptured; give the proxy a user of its own";
        c.warn(at!["intercept", "proxy"], what);
    }
    if owner.mark == Some(0) {
        c.error(at!["intercept", "proxy", "mark"], "0 is the mark of every socket that has none; write another");
    }
    if let Some(inbound) = &intercept.inbound {
        if inbound.preserve_source && inbound.mode != InboundMode::Tproxy {
            c.error(at!["intercept", "inbound", "preserve_source"], "needs `mode: tproxy`");
        }
        if inbound.preserve_source && owner.uid.is_none() && owner.gid.is_none() {
            // A socket has one mark.
            let what = "what goes to the workload from the client's address carries the mark of `inbound` and not the \
                        proxy's, so it would be captured again; name the proxy's `uid` or `gid`, or remove \
                        `preserve_source`";
            c.error(at!["intercept", "proxy"], what);
        }
        if inbound.mark == 0 || Some(inbound.mark) == owner.mark {
            c.error(at!["intercept", "inbound", "mark"], "needs a mark of its own, and not 0");
        }
        // 253 to 255 are default, main and local: rt_tables(5).
        if inbound.table == 0 || (253..=255).contains(&inbound.table) {
            c.error(at!["intercept", "inbound", "table"], "that table is the system's; write another number");
        }
        port(c, "inbound", inbound.port);
        entries(c, "inbound", "skip_ports", inbound.skip_ports.len());
        entries(c, "inbound", "skip_sources", inbound.skip_sources.len());
    }
    if let Some(outbound) = &intercept.outbound {
        port(c, "outbound", outbound.port);
        if outbound.mode == OutboundMode::Ebpf && !cfg!(feature = "ebpf") {
            let what = "this build has no eBPF; write `mode: redirect`, or build with the feature `ebpf`";
            c.error(at!["intercept", "outbound", "mode"], what);
        }
        if outbound.cgroup.is_some() && outbound.mode != OutboundMode::Ebpf {
            c.error(at!["intercept", "outbound", "cgroup"], "needs `mode: ebpf`");
        }
        if outbound.unmatched == Unmatched::Passthrough {
            let what =
                "plaintext to wherever no listener captures leaves this machine without mTLS; write `tls` or `refuse`";
            c.warn(at!["intercept", "outbound", "unmatched"], what);
        }
        entries(c, "outbound", "skip_ports", outbound.skip_ports.len());
        entries(c, "outbound", "skip_destinations", outbound.skip_destinations.len());
        entries(c, "outbound", "skip_uids", outbound.skip_uids.len());
        entries(c, "outbound", "skip_gids", outbound.skip_gids.len());
    }
    if intercept.hold > Span::seconds(60) {
        c.error(at!["intercept", "hold"], "no client waits so long; write at most 60s");
    }
    time(c, at!["intercept", "check_interval"], Some(intercept.check_interval));
}

fn port(c: &mut Checker<'_>, section: &'static str, port: u16) {
    if port == 0 {
        c.error(at!["intercept", section, "port"], "the rules need to know the port; write its number");
    }
}

fn entries(c: &mut Checker<'_>, section: &'static str, key: &'static str, count: usize) {
    if count > MAX_ENTRIES {
        c.error(at!["intercept", section, key], format!("{count} are too many, at most {MAX_ENTRIES}; write networks"));
    }
}

fn inbound_listener(c: &mut Checker<'_>, index: usize, listener: &Inbound, captured: bool) {
    let here = at!["inbound", index, "capture"];
    match (&listener.listen, &listener.capture) {
        (None, None) => {
            let what = "no place to take connections from; add `listen: IP:PORT`, or `capture: [PORT]`";
            c.error(at!["inbound", index], what);
        }
        (Some(_), Some(_)) => c.error(here, "a listener has either `listen` or `capture`; make two of it"),
        (None, Some(_)) if !captured => {
            c.error(here, "nothing inbound is captured; add `intercept: { inbound: {} }`, or write `listen`");
        }
        (None, Some(CapturedPorts::Ports(ports))) if ports.is_empty() || ports.contains(&0) => {
            c.error(here, "write the workload's ports, from 1 to 65535, or `any`");
        }
        (None, Some(capture)) if capture.named().len() > MAX_ENTRIES => {
            c.error(here, format!("at most {MAX_ENTRIES} ports; write `any`"));
        }
        _ => {}
    }
    if listener.plaintext == Plaintext::Refuse {
        return;
    }
    let at = at!["inbound", index, "plaintext"];
    if listener.capture.is_none() {
        c.error(at, "only captured connections may be plaintext; write `capture` in place of `listen`, or remove it");
    }
    if listener.http.forward_client_cert == ForwardClientCert::Set {
        let what = "whoever speaks plaintext could claim any identity in x-forwarded-client-cert, which the workload \
                    trusts; say `forward_client_cert: off`, or refuse plaintext";
        c.error(at, what);
    }
    if listener.proxy_protocol != ProxyProtocol::Off {
        let what = "whoever speaks plaintext could claim any identity in a PROXY header, which the workload trusts; \
                    say `proxy_protocol: off`, or refuse plaintext";
        c.error(at, what);
    }
    if listener.plaintext == Plaintext::Allow {
        c.warn(at, format!("'{}' lets everybody in who speaks plaintext; no rule is asked", listener.name));
    }
}

fn outbound_listener(c: &mut Checker<'_>, index: usize, listener: &Outbound, captured: bool) {
    let here = at!["outbound", index, "capture"];
    match (&listener.listen, &listener.capture) {
        (None, None) => {
            let what = "no place to take connections from; add `listen: IP:PORT`, or `capture: {…}`";
            c.error(at!["outbound", index], what);
        }
        (Some(_), Some(_)) => c.error(here, "a listener has either `listen` or `capture`; make two of it"),
        (None, Some(_)) if !captured => {
            c.error(here, "nothing outbound is captured; add `intercept: { outbound: {} }`, or write `listen`");
        }
        _ => {}
    }
    if let Some(capture) = &listener.capture {
        let (addresses, names, ports) = (capture.addresses.len(), capture.names.len(), capture.ports.len());
        let counts = [addresses, names, ports, capture.http_hosts.len(), capture.sni.len()];
        if counts.iter().all(|count| *count == 0) {
            c.error(here, "nothing is written, so it would match every connection; say what it shall match");
        }
        if counts.iter().any(|count| *count > MAX_ENTRIES) {
            c.error(here, format!("at most {MAX_ENTRIES} of each; make two listeners of it"));
        }
        for (item, name) in capture.names.iter().enumerate() {
            // A name is read as the host of an address.
            match Target::parse(&format!("{name}:1")) {
                Ok(target) if target.socket_addr().is_none() => {}
                _ => {
                    let what =
                        format!("'{}' is not a DNS name; write addresses under `addresses`", name.escape_debug());
                    c.error(at!["outbound", index, "capture", "names", item], what);
                }
            }
        }
        if !capture.http_hosts.is_empty() && !capture.sni.is_empty() {
            let what = "no connection has both a host of HTTP and a server name of TLS; make two listeners of it";
            c.error(at!["outbound", index, "capture", "sni"], what);
        }
        if !capture.http_hosts.is_empty()
            && listener.protocol == Protocol::Tcp
            && listener.passthrough == Passthrough::Off
        {
            let what = "hosts are seen only where HTTP is; add `protocol: http`, or match by addresses or names";
            c.error(at!["outbound", index, "capture", "http_hosts"], what);
        }
    }
    if let Some(capture) = &listener.capture
        && !capture.sni.is_empty()
        && listener.protocol == Protocol::Http
    {
        let what =
            "server names are seen only where the workload speaks TLS, which `protocol: http` refuses; remove one";
        c.error(at!["outbound", index, "capture", "sni"], what);
    }
    if listener.passthrough != Passthrough::Off {
        let at = at!["outbound", index, "passthrough"];
        if let Some(capture) = &listener.capture
            && capture.wants_bytes()
            && capture.addresses.is_empty()
            && capture.names.is_empty()
        {
            let what = format!(
                "'{}' lets the workload reach any address that it says such a name to; add `addresses` or `names`",
                listener.name
            );
            c.warn(here, what);
        }
        if listener.capture.is_none() {
            c.error(at, "only captured connections pass through; write `capture` in place of `listen`, or remove it");
        }
        if !listener.expect.as_slice().is_empty() {
            c.error(at, "what passes through proves no identity to us; remove it, or remove `expect`");
        }
        if !listener.to.as_slice().is_empty() {
            c.error(at, "what passes through goes to where it was for; remove `to`");
        }
        if listener.protocol != Protocol::Tcp {
            c.error(at, "what passes through is carried as bytes; remove `protocol`");
        }
        if listener.passthrough == Passthrough::Any {
            c.warn(at, format!("plaintext of '{}' leaves this machine without mTLS", listener.name));
        }
    }
}

#[cfg(test)]
mod tests;
