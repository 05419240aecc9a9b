//! Listeners: names, addresses, targets.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{Checker, name_problem};
use crate::config::CAPTURED;
use crate::config::address::Target;
use crate::config::positions::{Step, at};
use crate::config::schema::{Config, Passthrough};

pub(super) fn check(c: &mut Checker<'_>, config: &Config) {
    if config.inbound.is_empty() && config.outbound.is_empty() {
        c.error(at![], "no listener; add at least one under `inbound:` or `outbound:`");
    }
    names(c, config);
    let mut taken = Taken::default();
    for (index, listener) in config.inbound.iter().enumerate() {
        if let Some(listen) = listener.listen {
            taken.tcp(c, at!["inbound", index, "listen"], listen, &listener.name);
        }
        inbound_target(c, index, listener);
    }
    for (index, listener) in config.outbound.iter().enumerate() {
        outbound_listen(c, &mut taken, index, listener);
        outbound_upstream(c, index, listener);
    }
    for (section, port) in captures(config) {
        taken.tcp(c, at!["intercept", section, "port"], (Ipv4Addr::UNSPECIFIED, port).into(), "intercept");
        taken.tcp(c, at!["intercept", section, "port"], (Ipv6Addr::UNSPECIFIED, port).into(), "intercept");
    }
    taken.tcp(c, at!["admin", "listen"], config.admin.listen, "admin");
    if !config.admin.listen.ip().to_canonical().is_loopback() {
        let what = format!(
            "the admin address {} can be reached from other machines; metrics and state tell who talks to whom",
            config.admin.listen
        );
        c.warn(at!["admin", "listen"], what);
    }
}

/// The ports that captured connections come in at.
fn captures(config: &Config) -> impl Iterator<Item = (&'static str, u16)> {
    let intercept = config.intercept.as_ref();
    let inbound = intercept.and_then(|intercept| intercept.inbound.as_ref()).map(|inbound| ("inbound", inbound.port));
    let outbound = intercept.and_then(|intercept| intercept.outbound.as_ref());
    inbound.into_iter().chain(outbound.map(|outbound| ("outbound", outbound.port)))
}

fn names(c: &mut Checker<'_>, config: &Config) {
    let inbound = config.inbound.iter().enumerate().map(|(i, l)| ("inbound", i, l.name.as_str()));
    let outbound = config.outbound.iter().enumerate().map(|(i, l)| ("outbound", i, l.name.as_str()));
    let mut seen = BTreeMap::new();
    for (section, index, name) in inbound.chain(outbound) {
        let at = at![section, index, "name"];
        if let Some(problem) = name_problem(name) {
            c.error(at, problem);
        } else if name == CAPTURED {
            let what =
                "the name 'captured' stands in records for captured connections that no listener takes; choose another";
            c.error(at, what);
        } else if let Some(place) = seen.get(name) {
            let crate::config::load::Place { line, .. } = place;
            c.error(at, format!("the name '{name}' is taken by the listener on line {line}; choose another"));
        } else {
            seen.insert(name, c.places.at(at));
        }
    }
}

/// Addresses that are listened on already.
#[derive(Default)]
struct Taken {
    tcp: Vec<(SocketAddr, String)>,
    unix: Vec<(std::path::PathBuf, String)>,
}

impl Taken {
    fn tcp(&mut self, c: &mut Checker<'_>, at: &[Step<'_>], address: SocketAddr, name: &str) {
        // Port 0 means any free one.
        let clash = self.tcp.iter().find(|(other, _)| {
            let same_host = address.ip() == other.ip()
                || (address.is_ipv4() == other.is_ipv4()
                    && (address.ip().is_unspecified() || other.ip().is_unspecified()));
            address.port() != 0 && address.port() == other.port() && same_host
        });
        match clash {
            Some((other, whose)) => {
                c.error(at, format!("{address} is taken: '{whose}' listens on {other}; choose another port"));
            }
            None => self.tcp.push((address, name.to_owned())),
        }
    }

    fn unix(&mut self, c: &mut Checker<'_>, at: &[Step<'_>], path: std::path::PathBuf, name: &str) {
        match self.unix.iter().find(|(other, _)| *other == path) {
            Some((_, whose)) => {
                c.error(at, format!("'{whose}' listens on {} already; choose another path", path.display()));
            }
            None => self.unix.push((path, name.to_owned())),
        }
    }
}

fn inbound_target(c: &mut Checker<'_>, index: usize, listener: &crate::config::schema::Inbound) {
    let at = at!["inbound", index, "to"];
    let Some(to) = &listener.to else {
        if listener.capture.is_none() {
            c.error(at!["inbound", index], "no workload; add `to: HOST:PORT` or `to: unix:///path`");
        }
        return;
    };
    let target = match dialled(to) {
        Ok(target) => target,
        Err(why) => return c.error(at, format!("'{}' is not a target: {why}", to.escape_debug())),
    };
    if !target.is_local() && !listener.allow_remote_target {
        c.error(
            at,
            format!(
                "{target} may be on another machine, and the way there is plaintext; use a loopback address, or say \
                 `allow_remote_target: true`"
            ),
        );
    }
    if let (Some(address), Some(own)) = (target.socket_addr(), listener.listen)
        && address.port() == own.port()
        && (address.ip() == own.ip() || (own.ip().is_unspecified() && address.ip().is_loopback()))
    {
        c.error(at, "this listener would connect to itself; name the workload's own address");
    }
}

fn outbound_listen(c: &mut Checker<'_>, taken: &mut Taken, index: usize, listener: &crate::config::schema::Outbound) {
    let at = at!["outbound", index, "listen"];
    let Some(listen) = &listener.listen else { return };
    match Target::parse(listen) {
        Ok(Target::Unix(path)) => taken.unix(c, at, path, &listener.name),
        Ok(target) => match target.socket_addr() {
            Some(address) => {
                if !target.is_local() && !listener.allow_remote_clients {
                    c.error(
                        at,
                        format!(
                            "other machines could use {target}, in plaintext and under this workload's identity; use \
                             a loopback address or unix:///path, or say `allow_remote_clients: true`"
                        ),
                    );
                }
                taken.tcp(c, at, address, &listener.name);
            }
            None => c.error(at, format!("{target} is a name; to listen, write IP:PORT or unix:///path")),
        },
        Err(why) => {
            let what = format!("'{}' is not an address to listen on: {why}", listen.escape_debug());
            c.error(at, what);
        }
    }
}

fn outbound_upstream(c: &mut Checker<'_>, index: usize, listener: &crate::config::schema::Outbound) {
    let to = listener.to.as_slice();
    if to.is_empty() && listener.capture.is_none() {
        c.error(at!["outbound", index, "to"], "no upstream address; write HOST:PORT");
    }
    for (i, text) in to.iter().enumerate() {
        let at = at!["outbound", index, "to", i];
        match dialled(text) {
            Ok(Target::Tcp { .. }) => {}
            Ok(Target::Unix(_)) => c.error(at, "an upstream is reached over TCP; write HOST:PORT"),
            Err(why) => c.error(at, format!("'{}' is not an upstream address: {why}", text.escape_debug())),
        }
    }
    let expect = listener.expect.as_slice();
    if expect.is_empty() && listener.passthrough == Passthrough::Off {
        let what = "nobody is expected, so nobody could be talked to; name the SPIFFE ID of the upstream";
        c.error(at!["outbound", index, "expect"], what);
    }
    for (i, id) in expect.iter().enumerate() {
        if id.path().is_empty() {
            let what = format!("{id} is a trust domain, not a workload; name the upstream's whole SPIFFE ID");
            c.error(at!["outbound", index, "expect", i], what);
        }
    }
}

/// A target that something can connect to.
fn dialled(text: &str) -> Result<Target, String> {
    let target = Target::parse(text)?;
    if let Target::Tcp { port: 0, .. } = target {
        return Err("port 0 cannot be connected to; write the real port".into());
    }
    if target.socket_addr().is_some_and(|address| address.ip().is_unspecified()) {
        return Err("nothing can be reached at an unspecified address; write 127.0.0.1 or the real one".into());
    }
    Ok(target)
}
