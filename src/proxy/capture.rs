//! Captured connections: where each was for, and which listener takes it.
//!
//! All of them come in at one port for each direction. In: sockets whose destination the rules have changed, and which
//! listener takes what ([`InboundCapture::declare`], [`OutboundCapture::declare`]). Out: connections that are served by
//! their listener as if it had accepted them. What comes to the port itself, and what no listener takes, is reset.

mod first;
mod names;
mod outbound;

pub(super) use first::First;
pub use outbound::{OutboundCapture, Terms};

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::connection::Connection;
use super::dialer::Towards;
use super::io::Plain;
use super::listener::{Accepted, Client, Inbound, Listener, Shared, accept_loop};
use super::record::{Carries, Cause};
use super::registry::Entry;
use crate::config::schema::{CapturedPorts, InboundMode, Protocol};
use crate::intercept::{Arrivals, original_destination};
use crate::tls::record::Direction;

/// The name of a capture in records of connections that no listener takes.
const NAME: &str = crate::config::CAPTURED;

/// What is captured on its way to the workload.
#[derive(Debug)]
pub struct InboundCapture {
    mode: InboundMode,
    own: OwnPorts,
    probes: Arc<Arrivals>,
    takes: ArcSwap<Ports>,
}

/// The listeners by the ports they take.
#[derive(Debug, Default)]
struct Ports {
    named: HashMap<u16, Arc<Inbound>>,
    any: Option<Arc<Inbound>>,
}

/// The ports that captured connections come in at: nothing was ever for them.
#[derive(Clone, Debug)]
pub struct OwnPorts(pub Vec<u16>);

impl OwnPorts {
    /// Where the connection was for before it was captured.
    fn original(&self, accepted: &Accepted, mode: InboundMode) -> Result<SocketAddr, String> {
        let Plain::Tcp(stream) = &accepted.io else { return Err("it is not TCP".into()) };
        let original = original_destination(stream, mode).map_err(|error| format!("it was not captured: {error}"))?;
        if self.0.contains(&original.port()) {
            return Err(format!("it was for {original}, a port of the proxy itself"));
        }
        // The rules capture nothing of the kind. What comes all the same wants to reach what only this host may.
        if original.ip().is_loopback() {
            return Err(format!("it was for {original}, which only this host can call"));
        }
        Ok(original)
    }
}

impl InboundCapture {
    /// Nothing is taken yet. `probes` are those of the watch over the interception.
    pub fn new(mode: InboundMode, own: OwnPorts, probes: Arc<Arrivals>) -> Self {
        Self { mode, own, probes, takes: ArcSwap::default() }
    }

    /// Which listener takes which ports from now on.
    pub fn declare<'a>(&self, listeners: impl Iterator<Item = (&'a CapturedPorts, Arc<Inbound>)>) {
        let mut ports = Ports::default();
        for (capture, listener) in listeners {
            match capture {
                CapturedPorts::Any => ports.any = Some(listener),
                CapturedPorts::Ports(named) => {
                    ports.named.extend(named.iter().map(|port| (*port, Arc::clone(&listener))));
                }
            }
        }
        self.takes.store(Arc::new(ports));
    }

    fn listener(&self, port: u16) -> Option<Arc<Inbound>> {
        let ports = self.takes.load();
        ports.named.get(&port).or(ports.any.as_ref()).cloned()
    }

    /// Why a live connection ends, if its port is another listener's by now.
    pub fn moved(&self, entry: &Entry) -> Option<Cause> {
        let to = entry.client.original()?;
        let stays =
            *entry.listener == *NAME || self.listener(to.port()).is_some_and(|taking| taking.name == entry.listener);
        (!stays).then_some(Cause::PolicyChanged)
    }

    fn awaited(&self, accepted: &Accepted, original: SocketAddr) -> bool {
        accepted.client.address().is_some_and(|from| self.probes.arrived(from, original))
    }

    /// Serves until `stop`.
    pub async fn run(self: Arc<Self>, listener: Listener, shared: Arc<Shared>, stop: watch::Receiver<bool>) {
        accept(listener, Direction::Inbound, shared, stop, move |accepted, shared| {
            Arc::clone(&self).serve(accepted, shared)
        })
        .await;
    }

    async fn serve(self: Arc<Self>, accepted: Accepted, shared: Arc<Shared>) {
        match self.own.original(&accepted, self.mode) {
            Err(why) => refuse(accepted, Direction::Inbound, Cause::NotCaptured, why, &shared),
            // A probe has done its work by coming.
            Ok(original) if self.awaited(&accepted, original) => {}
            Ok(original) => self.take(accepted.captured(original), original, shared).await,
        }
    }

    /// Serves what was captured on its way to `original`.
    pub(crate) async fn take(&self, accepted: Accepted, original: SocketAddr, shared: Arc<Shared>) {
        if ours(&accepted, &shared) == Some(Towards::Workload) {
            return refuse(accepted, Direction::Inbound, Cause::Loop, LOOP.into(), &shared);
        }
        match self.listener(original.port()) {
            Some(listener) => super::inbound::serve_captured(accepted, listener, self, shared).await,
            None => {
                let why = format!("no listener captures port {}", original.port());
                refuse(accepted, Direction::Inbound, Cause::Undeclared, why, &shared);
            }
        }
    }
}

/// Accepts at a capture port until `stop`.
async fn accept<S, F>(
    listener: Listener,
    direction: Direction,
    shared: Arc<Shared>,
    stop: watch::Receiver<bool>,
    serve: S,
) where
    S: Fn(Accepted, Arc<Shared>) -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let serving = Arc::clone(&shared);
    let serve = move |accepted| serve(accepted, Arc::clone(&serving));
    accept_loop(listener, NAME.into(), direction, || Protocol::Tcp, shared, stop, serve).await;
}

impl Accepted {
    /// The same, of which it is known where it was for.
    fn captured(self, to: SocketAddr) -> Self {
        let client = match self.client {
            Client::Tcp(from) => Client::Captured { from, to },
            other => other,
        };
        Self { client, ..self }
    }
}

#[cfg(test)]
impl Accepted {
    /// As if it had been captured on its way to `to`.
    pub(crate) fn on_its_way(stream: tokio::net::TcpStream, from: SocketAddr, to: SocketAddr, shared: &Shared) -> Self {
        let place = Arc::clone(&shared.places).try_acquire_owned().unwrap();
        let client = Client::Captured { from, to };
        Self { io: Plain::Tcp(stream), client, at: std::time::Instant::now(), _place: place }
    }
}

/// Why a connection of our own is refused, and what to do.
const LOOP: &str = "the rules send our own connections back to us; apply them anew, and let `intercept.proxy` name the \
                    user, group or mark that the proxy has";

/// Where it leads, if it is one that we have opened ourselves.
fn ours(accepted: &Accepted, shared: &Shared) -> Option<Towards> {
    let Client::Captured { from, to } = accepted.client else { return None };
    shared.dials.ours(from, to)
}

/// Resets a connection, and leaves a record of it.
fn refuse(accepted: Accepted, direction: Direction, cause: Cause, why: String, shared: &Arc<Shared>) {
    let mut connection = Connection::open(shared, direction, Carries::Tcp, &NAME.into(), accepted.client);
    connection.upstream = accepted.client.original().map(|original| original.to_string());
    connection.end(cause, why);
    accepted.io.abort();
}
