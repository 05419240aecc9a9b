//! From what is declared and what is current to what a listener serves with.
//!
//! In: the house (config, profile, policy, trust) and an identity. Out: one immutable state a listener, its TLS prebuilt and
//! its pool empty.

use std::sync::Arc;
use std::time::Duration;

use super::House;
use crate::config::address;
use crate::config::schema::{self, Passthrough, Protocol};
use crate::identity::Identity;
use crate::policy::{Expected, Passage, Plaintext};
use crate::proxy::dialer::Dialer;
use crate::proxy::http::{ByAddress, Mesh, Pool, Pools};
use crate::proxy::listener::Shared;
use crate::proxy::state::{InboundState, OutboundState};
use crate::proxy::upstream::{HostPort, Target};
use crate::tls::server::{Accepts, Serves};
use crate::tls::{ClientTls, ServerTls};

impl House {
    /// Whether one of these ports is declared as one on which the server speaks first.
    fn server_first(&self, ports: impl IntoIterator<Item = Option<u16>>) -> bool {
        ports.into_iter().flatten().any(|port| self.config.detect.opaque_ports.contains(&port))
    }

    /// How long connections may wait for an identity: those that are captured, because nobody there knows of readiness.
    fn hold(&self, captured: bool) -> Duration {
        let intercept = self.config.intercept.as_ref().filter(|_| captured);
        intercept.map_or(Duration::ZERO, |intercept| intercept.hold.0)
    }

    /// What this inbound listener's connections are served with under `identity`; none if it is not declared.
    pub(super) fn inbound_state(
        &self,
        name: &str,
        identity: Option<&Arc<Identity>>,
        shared: &Arc<Shared>,
    ) -> Option<InboundState> {
        let declared = self.config.inbound.iter().find(|inbound| inbound.name == name)?;
        let policy = self.policy.listener(name)?;
        let tls = identity.zip(self.trust.as_ref()).and_then(|(identity, trust)| {
            let accepts = Accepts { serves: serves(declared.protocol), legacy_tls12: declared.legacy_tls12 };
            ServerTls::new(&self.profile, identity, trust, &policy, &shared.clock, accepts, self.generation)
                .map(Arc::new)
                .map_err(|error| tracing::error!(listener = name, %error, "the TLS configuration cannot be built"))
                .ok()
        });
        let to = declared.to.as_deref().map(Target::parse).transpose().ok()?;
        let mut ports: Vec<Option<u16>> = declared.ports().into_iter().map(Some).collect();
        ports.push(declared.to.as_deref().and_then(port_of));
        let intercept = self.config.intercept.as_ref();
        let dialer = Dialer::declared(intercept, !declared.allow_remote_target, &shared.dials);
        Some(InboundState {
            to: to.clone(),
            policy,
            plaintext: Plaintext::declared(name, declared.plaintext),
            hold: self.hold(declared.listen.is_none()),
            limits: self.config.connections.with(&declared.connections),
            proxy_protocol: declared.proxy_protocol,
            protocol: declared.protocol,
            server_first: self.server_first(ports),
            detect: Arc::new(self.config.detect.clone()),
            http: declared.http.clone(),
            http_limits: Arc::new(self.config.http.clone()),
            pools: match (declared.protocol, to) {
                (Protocol::Tcp, _) => Pools::None,
                (Protocol::Http | Protocol::Detect, Some(to)) => {
                    Pools::One(Pool::workload(shared, name, to, dialer.clone()))
                }
                (Protocol::Http | Protocol::Detect, None) => {
                    let (shared, name, dialer) = (Arc::clone(shared), name.to_owned(), dialer.clone());
                    let pool = move |to| Pool::workload(&shared, &name, Target::Original(to), dialer.clone());
                    Pools::ByAddress(ByAddress::new(pool))
                }
            },
            dialer,
            profile: Arc::clone(&self.profile),
            slots: Arc::clone(&self.slots),
            trust: self.trust.clone(),
            tls,
        })
    }

    /// What this outbound listener's connections are served with under `identity`; none if it is not declared.
    pub(super) fn outbound_state(
        &self,
        name: &str,
        identity: Option<&Arc<Identity>>,
        shared: &Arc<Shared>,
    ) -> Option<OutboundState> {
        let declared: &schema::Outbound = self.config.outbound.iter().find(|outbound| outbound.name == name)?;
        let expected = Arc::new(Expected::new(name, declared.expect.as_slice()));
        let tls = identity.zip(self.trust.as_ref()).and_then(|(identity, trust)| {
            ClientTls::new(&self.profile, identity, trust, &expected, &shared.clock, declared.legacy_tls12)
                .map(Arc::new)
                .map_err(|error| tracing::error!(listener = name, %error, "the TLS configuration cannot be built"))
                .ok()
        });
        let hosts = || declared.to.as_slice().iter().map(|to| HostPort::parse(to)).collect::<Result<Vec<_>, _>>().ok();
        let limits = self.config.connections.with(&declared.connections);
        let mut ports: Vec<Option<u16>> = declared.to.as_slice().iter().map(|to| port_of(to)).collect();
        ports.extend(declared.listen.iter().map(|listen| port_of(listen)));
        ports.extend(declared.capture.iter().flat_map(|capture| &capture.ports).map(|port| Some(*port)));
        let dialer = Dialer::declared(self.config.intercept.as_ref(), false, &shared.dials);
        let mesh = {
            let dialer = dialer.clone();
            let (tls, expected, limits) = (tls.clone(), Arc::clone(&expected), limits.clone());
            let (profile, slots) = (Arc::clone(&self.profile), Arc::clone(&self.slots));
            let connect_timeout = declared.connect_timeout.0;
            move |hosts| Mesh {
                hosts,
                tls: tls.clone(),
                expected: Arc::clone(&expected),
                profile: Arc::clone(&profile),
                slots: Arc::clone(&slots),
                limits: limits.clone(),
                dialer: dialer.clone(),
                connect_timeout,
            }
        };
        let pools = match declared.protocol {
            Protocol::Tcp => Pools::None,
            Protocol::Http | Protocol::Detect if declared.to.as_slice().is_empty() => {
                let (shared, name, options) = (Arc::clone(shared), name.to_owned(), declared.http.clone());
                let pool = move |to| Pool::mesh(&shared, &name, mesh(vec![HostPort::literal(to)]), options.clone());
                Pools::ByAddress(ByAddress::new(pool))
            }
            Protocol::Http | Protocol::Detect => {
                Pools::One(Pool::mesh(shared, name, mesh(hosts()?), declared.http.clone()))
            }
        };
        let passing = (declared.passthrough != Passthrough::Off).then(|| {
            let passage = Passage::of_listener(name, declared.passthrough);
            Arc::new(self.passing(
                passage,
                declared.legacy_tls12,
                limits.clone(),
                (dialer.clone(), declared.connect_timeout.0),
            ))
        });
        Some(OutboundState {
            to: hosts()?,
            expected,
            passing,
            hosts: declared.capture.iter().flat_map(|capture| &capture.http_hosts).cloned().collect(),
            limits,
            protocol: declared.protocol,
            server_first: self.server_first(ports),
            detect: Arc::new(self.config.detect.clone()),
            http_limits: Arc::new(self.config.http.clone()),
            pools,
            dialer,
            connect_timeout: declared.connect_timeout.0,
            hold: self.hold(declared.listen.is_none()),
            profile: Arc::clone(&self.profile),
            slots: Arc::clone(&self.slots),
            trust: self.trust.clone(),
            tls,
        })
    }
}

/// The port of an address as declared; none for a Unix socket.
fn port_of(text: &str) -> Option<u16> {
    match address::Target::parse(text).ok()? {
        address::Target::Tcp { port, .. } => Some(port),
        address::Target::Unix(_) => None,
    }
}

fn serves(protocol: Protocol) -> Serves {
    match protocol {
        Protocol::Tcp => Serves::Bytes,
        Protocol::Http => Serves::Http,
        Protocol::Detect => Serves::Any,
    }
}
