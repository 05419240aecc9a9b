//! The sockets that captured connections come in at, for as long as the proxy runs, and which listener takes what.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;

use super::{ApplyError, House, Proxy};
use crate::config::Config;
use crate::config::intercept;
use crate::config::schema::{CapturedPorts, Connections, InboundMode, Plaintext};
use crate::intercept::Arrivals;
use crate::policy::Passage;
use crate::proxy::capture::{InboundCapture, OutboundCapture, OwnPorts, Terms};
use crate::proxy::dialer::Dialer;
use crate::proxy::inherited::Inherited;
use crate::proxy::ledger;
use crate::proxy::listener::{Address, Listener, Shared};
use crate::proxy::passthrough::{Passed, Passing};
use crate::proxy::record::Cause;
use crate::proxy::registry::Entry;
use crate::tls::record::Direction;

/// How long the destination of a connection that no listener takes may take to accept.
const DIAL: Duration = Duration::from_secs(3);

/// What captures, in one direction or both.
#[derive(Debug, Default)]
pub(super) struct Captures {
    inbound: Option<Arc<InboundCapture>>,
    outbound: Option<Arc<OutboundCapture>>,
    arrivals: Arc<Arrivals>,
    sockets: Vec<(Listener, Way)>,
    stop: watch::Sender<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Inbound,
    Outbound,
}

impl Captures {
    /// Binds what the config declares, within a runtime. Nothing is accepted yet.
    pub(super) fn bind(config: &Config, inherited: &mut Inherited) -> Result<Self, ApplyError> {
        let Some(intercept) = &config.intercept else { return Ok(Self::default()) };
        let ports = [
            intercept.inbound.as_ref().map(|inbound| inbound.port),
            intercept.outbound.as_ref().map(|outbound| outbound.port),
        ];
        let own = OwnPorts(ports.into_iter().flatten().collect());
        let mut captures = Self::default();
        if let Some(inbound) = &intercept.inbound {
            let arrivals = Arc::clone(&captures.arrivals);
            captures.inbound = Some(Arc::new(InboundCapture::new(inbound.mode, own.clone(), arrivals)));
            let transparent = inbound.mode == InboundMode::Tproxy;
            let everywhere = [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()];
            captures.listen(everywhere, inbound.port, transparent, Way::Inbound, inherited)?;
        }
        if let Some(outbound) = &intercept.outbound {
            captures.outbound = Some(Arc::new(OutboundCapture::new(own)));
            let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
            captures.listen(loopback, outbound.port, false, Way::Outbound, inherited)?;
        }
        Ok(captures)
    }

    fn listen(
        &mut self,
        addresses: [IpAddr; 2],
        port: u16,
        transparent: bool,
        way: Way,
        inherited: &mut Inherited,
    ) -> Result<(), ApplyError> {
        for address in addresses {
            let at = SocketAddr::new(address, port);
            let explain = |error: io::Error| ApplyError(format!("intercept: {error}"));
            let listener = match inherited.claim(&Address::Tcp(at)).map_err(explain)? {
                Some(listener) => listener,
                None => match Listener::bind_captured(at, transparent) {
                    Ok(listener) => listener,
                    // A machine without IPv6 has no traffic of it.
                    Err(error) if at.is_ipv6() && is_absent(&error) => continue,
                    Err(error) => return Err(explain(error)),
                },
            };
            self.sockets.push((listener, way));
        }
        Ok(())
    }

    /// Begins to accept.
    pub(super) fn start(&mut self, shared: &Arc<Shared>, traffic: &Handle) {
        for (listener, way) in self.sockets.drain(..) {
            let (shared, stop) = (Arc::clone(shared), self.stop.subscribe());
            match (way, &self.inbound, &self.outbound) {
                (Way::Inbound, Some(capture), _) => {
                    traffic.spawn(Arc::clone(capture).run(listener, shared, stop));
                }
                (Way::Outbound, _, Some(capture)) => {
                    traffic.spawn(Arc::clone(capture).run(listener, shared, stop));
                }
                _ => {}
            }
        }
        if let Some(capture) = &self.outbound {
            traffic.spawn(Arc::clone(capture).follow_names(self.stop.subscribe()));
        }
    }

    /// Why a live connection that was captured ends, if its listener is no longer the one that takes it.
    pub(super) fn moved(&self, entry: &Entry) -> Option<Cause> {
        match entry.direction {
            Direction::Inbound => self.inbound.as_ref().and_then(|capture| capture.moved(entry)),
            Direction::Outbound => self.outbound.as_ref().and_then(|capture| capture.moved(entry)),
        }
    }

    /// Whether a live connection that passes through would still do so; the cause if not.
    pub(super) fn rejudge(&self, entry: &Entry, passed: &Passed) -> Option<Cause> {
        self.outbound.as_ref().and_then(|capture| capture.rejudge(entry, passed))
    }

    /// The probes that come in at the inbound capture.
    pub(super) fn arrivals(&self) -> Arc<Arrivals> {
        Arc::clone(&self.arrivals)
    }

    #[cfg(test)]
    pub(super) fn inbound(&self) -> Option<Arc<InboundCapture>> {
        self.inbound.clone()
    }

    #[cfg(test)]
    pub(super) fn outbound(&self) -> Option<Arc<OutboundCapture>> {
        self.outbound.clone()
    }

    /// What tells the captures to stop.
    pub(super) fn stop(&self) -> watch::Sender<bool> {
        self.stop.clone()
    }
}

impl House {
    /// Tells the captures which listeners take what.
    pub(super) fn declare_captures(&self, shared: &Shared) {
        let captured = || self.config.inbound.iter().filter_map(|listener| listener.capture.as_ref());
        let named = captured().flat_map(CapturedPorts::named).copied().collect();
        shared.ledger.declare(&named, captured().any(|capture| *capture == CapturedPorts::Any));
        if let Some(capture) = &self.captures.inbound {
            capture.declare(self.config.inbound.iter().filter_map(|declared| {
                let running = self.inbound.get(&declared.name)?;
                Some((declared.capture.as_ref()?, Arc::clone(&running.listener)))
            }));
        }
        if let Some(capture) = &self.captures.outbound {
            let listeners = self.config.outbound.iter().filter_map(|declared| {
                let running = self.outbound.get(&declared.name)?;
                Some((declared.capture.clone()?, Arc::clone(&running.listener)))
            });
            let terms = Terms {
                unmatched: Arc::new(self.passing(
                    Passage::of_unmatched(self.outbound_capture().unmatched),
                    false,
                    self.config.connections.clone(),
                    (Dialer::declared(self.config.intercept.as_ref(), false, &shared.dials), DIAL),
                )),
                detect: Arc::new(self.config.detect.clone()),
                max_header_bytes: self.config.http.max_header_bytes,
            };
            capture.declare(listeners.collect(), terms);
        }
    }

    /// What is declared for outbound traffic as a whole.
    fn outbound_capture(&self) -> intercept::OutboundCapture {
        self.config.intercept.as_ref().and_then(|intercept| intercept.outbound.clone()).unwrap_or_default()
    }

    /// How something passes through.
    pub(super) fn passing(
        &self,
        passage: Passage,
        legacy_tls12: bool,
        limits: Connections,
        (dialer, connect_timeout): (Dialer, Duration),
    ) -> Passing {
        Passing {
            passage,
            watch: self.outbound_capture().watch,
            profile: Arc::clone(&self.profile),
            legacy_tls12,
            limits,
            detect: Arc::new(self.config.detect.clone()),
            dialer,
            connect_timeout,
        }
    }
}

impl Proxy {
    /// The probes that come in at the inbound capture.
    pub(super) fn arrivals(&self) -> Arc<Arrivals> {
        self.house().captures.arrivals()
    }

    /// Turns true when the captures stop. Who holds it keeps the drain waiting for a moment.
    pub(super) fn captures_stop(&self) -> watch::Receiver<bool> {
        self.house().captures.stop().subscribe()
    }

    /// Who speaks plaintext to captured ports, and where plaintext could be refused.
    pub fn plaintext(&self) -> Vec<ledger::Port> {
        let listeners = self.house().config.inbound.clone();
        let taking = |takes: &dyn Fn(&CapturedPorts) -> bool| {
            let found = listeners.iter().find(|listener| listener.capture.as_ref().is_some_and(takes));
            found.map(|listener| (listener.name.clone(), listener.plaintext))
        };
        self.shared.ledger.report(|port| -> Option<(String, Plaintext)> {
            let named = port.and_then(|port| taking(&|capture| capture.named().contains(&port)));
            named.or_else(|| taking(&|capture| *capture == CapturedPorts::Any))
        })
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported)
}
