//! Listeners: what is bound, what it is prepared with, and the loop that accepts.
//!
//! A listener keeps its socket for as long as its name and address stay; what its connections are served with is in
//! [`super::state`].

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::connection::Connection;
use super::dialer::Dials;
use super::io::{Plain, tune};
use super::ledger::Ledger;
use super::record::{Cause, Observer};
use super::registry::Registry;
use super::state::{InboundState, OutboundState};
use super::trace::Sampler;
use crate::clock::Clock;
use crate::config::address;
use crate::config::schema::Protocol;
use crate::tls::record::Direction;

/// What all listeners of a proxy share.
pub struct Shared {
    /// Who hears what happens.
    pub observer: Arc<dyn Observer>,
    /// What is open.
    pub registry: Arc<Registry>,
    /// The wall clock.
    pub clock: Clock,
    /// Places for connections, those in a handshake included.
    pub places: Arc<Semaphore>,
    /// Which requests get a span.
    pub tracing: Sampler,
    /// What is being dialled, or open to the workload.
    pub dials: Arc<Dials>,
    /// Who speaks plaintext to captured ports.
    pub ledger: Ledger,
    /// Whether every listener has what it needs to serve. Changes with every swap of states, after them.
    pub published: watch::Sender<bool>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("open", &self.registry.len()).finish_non_exhaustive()
    }
}

/// An inbound listener.
#[derive(Debug)]
pub struct Inbound {
    /// Its name.
    pub name: Arc<str>,
    /// What it serves with now.
    pub state: ArcSwap<InboundState>,
}

/// An outbound listener.
#[derive(Debug)]
pub struct Outbound {
    /// Its name.
    pub name: Arc<str>,
    /// What it serves with now.
    pub state: ArcSwap<OutboundState>,
}

/// Who connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// Over TCP.
    Tcp(SocketAddr),
    /// Over TCP, captured on its way to somewhere else.
    Captured {
        /// Who connected.
        from: SocketAddr,
        /// Where to.
        to: SocketAddr,
    },
    /// Over a Unix socket.
    Unix,
    /// Nobody: a connection that we keep to send requests on.
    Pool,
}

impl Client {
    /// Its address, if it has one.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(from) | Self::Captured { from, .. } => Some(*from),
            Self::Unix | Self::Pool => None,
        }
    }

    /// Where it connected to before it was captured, if it was.
    pub fn original(&self) -> Option<SocketAddr> {
        match self {
            Self::Captured { to, .. } => Some(*to),
            Self::Tcp(_) | Self::Unix | Self::Pool => None,
        }
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(from) | Self::Captured { from, .. } => from.fmt(f),
            Self::Unix => f.write_str("unix"),
            Self::Pool => f.write_str("pool"),
        }
    }
}

/// A connection as it came in: a socket and who it is from. Only a listener makes one.
#[derive(Debug)]
pub struct Accepted {
    pub(super) io: Plain,
    pub(super) client: Client,
    pub(super) at: Instant,
    pub(super) _place: OwnedSemaphorePermit,
}

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// TCP.
    Tcp(SocketAddr),
    /// A Unix socket; the file is made and removed by us.
    Unix(PathBuf),
}

impl Address {
    /// Reads `IP:PORT` or `unix:///absolute/path`.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        let target = address::Target::parse(text)?;
        match target.socket_addr() {
            Some(at) => Ok(Self::Tcp(at)),
            None => match target {
                address::Target::Unix(path) => Ok(Self::Unix(path)),
                address::Target::Tcp { host, .. } => Err(format!("'{host}' is not an IP address")),
            },
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

/// A bound socket.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket; its file is removed when dropped if we made it.
    Unix(UnixListener, SocketFile),
}

/// The file of a Unix socket.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    ours: bool,
}

impl SocketFile {
    /// Of a socket that somebody else has made, and removes.
    pub(super) fn foreign(path: PathBuf) -> Self {
        Self { path, ours: false }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Listener {
    /// Binds, within a runtime.
    ///
    /// # Errors
    /// The address and the system's error; a Unix path that holds something else than a dead socket is left alone.
    pub fn bind(address: &Address) -> io::Result<Self> {
        let explain = |error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"));
        match address {
            Address::Tcp(at) => listen(*at, |_| Ok(())).map(Self::Tcp).map_err(explain),
            Address::Unix(path) => {
                let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
                if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
                    let _ = std::fs::remove_file(path);
                }
                let listener = UnixListener::bind(path).map_err(explain)?;
                Ok(Self::Unix(listener, SocketFile { path: path.clone(), ours: true }))
            }
        }
    }

    /// Binds for captured connections, within a runtime: of one family, and where `transparent`, for addresses that are not
    /// this machine's as well (IP_TRANSPARENT, ip(7)).
    ///
    /// # Errors
    /// The address, the system's error and what to do.
    pub fn bind_captured(at: SocketAddr, transparent: bool) -> io::Result<Self> {
        let bound = listen(at, |socket| {
            if at.is_ipv6() {
                socket.set_only_v6(true)?;
            }
            match (transparent, at) {
                (false, _) => Ok(()),
                (true, SocketAddr::V4(_)) => socket.set_ip_transparent_v4(true),
                (true, SocketAddr::V6(_)) => socket.set_ip_transparent_v6(true),
            }
        });
        let remedy = if transparent { "; `mode: tproxy` needs CAP_NET_ADMIN or CAP_NET_RAW" } else { "" };
        bound.map(Self::Tcp).map_err(|error| {
            io::Error::new(error.kind(), format!("cannot listen on {at} for captured connections: {error}{remedy}"))
        })
    }

    /// Where it listens; the real port where 0 was asked for.
    ///
    /// # Errors
    /// The system's error.
    pub fn local_address(&self) -> io::Result<Address> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(Address::Tcp),
            Self::Unix(_, file) => Ok(Address::Unix(file.path.clone())),
        }
    }

    async fn accept(&self) -> io::Result<(Plain, Client)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, client) = listener.accept().await?;
                tune(&stream);
                Ok((Plain::Tcp(stream), Client::Tcp(client)))
            }
            Self::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                Ok((Plain::Unix(stream), Client::Unix))
            }
        }
    }
}

fn listen(at: SocketAddr, prepare: impl FnOnce(&socket2::Socket) -> io::Result<()>) -> io::Result<TcpListener> {
    let domain = socket2::Domain::for_address(at);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, Some(socket2::Protocol::TCP))?;
    prepare(&socket)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&at.into())?;
    socket.listen(4096)?;
    TcpListener::from_std(socket.into())
}

/// Longest wait after a failed accept.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// Accepts until `stop` turns true (or its sender is gone), and starts `serve` as a task for each connection.
///
/// When descriptors or memory run out it waits, longer each time, instead of spinning; what waits in the kernel's queue
/// is served when there is room again. Past the cap on connections a connection is accepted, reset and recorded.
pub async fn accept_loop<S, F>(
    listener: Listener,
    name: Arc<str>,
    direction: Direction,
    protocol: impl Fn() -> Protocol + Send + 'static,
    shared: Arc<Shared>,
    mut stop: watch::Receiver<bool>,
    serve: S,
) where
    S: Fn(Accepted) -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let mut wait = Duration::ZERO;
    loop {
        let accepted = tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => {
                // Before `stop`, whose end tells that the socket is closed.
                drop(listener);
                return;
            }
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((io, client)) => {
                wait = Duration::ZERO;
                match Arc::clone(&shared.places).try_acquire_owned() {
                    Ok(place) => {
                        tokio::spawn(serve(Accepted { io, client, at: Instant::now(), _place: place }));
                    }
                    Err(_) => {
                        let mut connection = Connection::open(&shared, direction, protocol().into(), &name, client);
                        connection.end(Cause::Limit, "connections.max is reached");
                        io.abort();
                    }
                }
            }
            Err(error) if belongs_to_the_connection(&error) => {}
            Err(error) => {
                let kind = match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
                    Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE) => "descriptors",
                    Some(rustix::io::Errno::NOBUFS | rustix::io::Errno::NOMEM) => "memory",
                    _ => "other",
                };
                if wait.is_zero() {
                    tracing::warn!(listener = %name, %error, "cannot accept connections; waiting for room");
                }
                shared.observer.accept_failed(&name, kind);
                wait = (wait * 2).clamp(Duration::from_millis(5), LONGEST_WAIT);
                tokio::time::sleep(wait).await;
            }
        }
    }
}

/// Errors of accept(2) that concern only the connection that was about to be accepted.
fn belongs_to_the_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

impl Inbound {
    /// Serves until `stop`.
    pub async fn run(self: Arc<Self>, listener: Listener, shared: Arc<Shared>, stop: watch::Receiver<bool>) {
        let name = Arc::clone(&self.name);
        let serving = Arc::clone(&shared);
        let declared = Arc::clone(&self);
        let protocol = move || declared.state.load().protocol;
        accept_loop(listener, name, Direction::Inbound, protocol, shared, stop, move |accepted| {
            super::inbound::serve(accepted, Arc::clone(&self), Arc::clone(&serving))
        })
        .await;
    }
}

impl Outbound {
    /// Serves until `stop`.
    pub async fn run(self: Arc<Self>, listener: Listener, shared: Arc<Shared>, stop: watch::Receiver<bool>) {
        let name = Arc::clone(&self.name);
        let serving = Arc::clone(&shared);
        let declared = Arc::clone(&self);
        let protocol = move || declared.state.load().protocol;
        accept_loop(listener, name, Direction::Outbound, protocol, shared, stop, move |accepted| {
            super::outbound::serve(accepted, Arc::clone(&self), Arc::clone(&serving))
        })
        .await;
    }
}
