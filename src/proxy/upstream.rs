//! Reaching the other side: the workload, or an upstream's addresses, resolved and tried in order.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::{DnsName, ServerName};
use socket2::SockRef;
use tokio::net::{TcpSocket, TcpStream, UnixStream};

use super::io::{Plain, tune};
use crate::config::address;
use crate::intercept::WORKLOAD_TOS;

/// How long a resolved name is used before it is resolved again.
const RESOLVED_FOR: Duration = Duration::from_secs(10);
/// The most addresses of one name that are tried.
const MAX_ADDRESSES: usize = 16;

/// Where to connect: as declared.
#[derive(Clone, Debug)]
pub enum Target {
    /// `HOST:PORT`.
    Tcp(Arc<HostPort>),
    /// The workload's own address, where a captured connection was for.
    Original(SocketAddr),
    /// `unix:///path`.
    Unix(PathBuf),
}

/// A host with a port, its addresses remembered for a short while.
#[derive(Debug)]
pub struct HostPort {
    text: Arc<str>,
    literal: Option<SocketAddr>,
    name: ServerName<'static>,
    resolved: Mutex<Option<(Instant, Vec<SocketAddr>)>>,
}

impl Target {
    /// Reads `HOST:PORT` or `unix:///absolute/path`.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        match address::Target::parse(text)? {
            address::Target::Unix(path) => Ok(Self::Unix(path)),
            tcp @ address::Target::Tcp { .. } => HostPort::new(&tcp).map(Arc::new).map(Self::Tcp),
        }
    }

    /// Connects within `timeout`.
    ///
    /// # Errors
    /// The last address's error.
    pub async fn connect(&self, timeout: Duration) -> io::Result<Plain> {
        match self {
            Self::Unix(path) => {
                let connected = tokio::time::timeout(timeout, UnixStream::connect(path)).await;
                connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?.map(Plain::Unix)
            }
            Self::Original(address) => connect_workload(*address, timeout).await.map(Plain::Tcp),
            Self::Tcp(host) => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                for address in host.resolve(timeout).await? {
                    match connect(address, timeout).await {
                        Ok(stream) => return Ok(Plain::Tcp(stream)),
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(host) => f.write_str(&host.text),
            Self::Original(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

impl HostPort {
    /// Reads `HOST:PORT`; an IPv6 address stands in brackets.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        Self::new(&address::Target::parse(text)?)
    }

    fn new(target: &address::Target) -> Result<Self, String> {
        let address::Target::Tcp { host, port } = target else { return Err("it is not HOST:PORT".into()) };
        if *port == 0 {
            return Err("port 0 cannot be connected to".into());
        }
        let literal = target.socket_addr();
        let name = match literal {
            Some(address) => ServerName::IpAddress(address.ip().into()),
            None => DnsName::try_from(host.trim_end_matches('.').to_owned())
                .map(ServerName::DnsName)
                .map_err(|_| format!("'{host}' is not a DNS name"))?,
        };
        Ok(Self { text: target.to_string().into(), literal, name, resolved: Mutex::default() })
    }

    /// An address as it is.
    pub fn literal(address: SocketAddr) -> Self {
        Self {
            text: address.to_string().into(),
            literal: Some(address),
            name: ServerName::IpAddress(address.ip().into()),
            resolved: Mutex::default(),
        }
    }

    /// The name for SNI and for the store of tickets.
    pub fn server_name(&self) -> ServerName<'static> {
        self.name.clone()
    }

    /// As declared.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The addresses, at most 16, resolved anew when older than ten seconds. If the resolver fails, the
    /// addresses of before serve on: it is the identity that counts, not the address.
    ///
    /// # Errors
    /// The name cannot be resolved and never was.
    pub async fn resolve(&self, timeout: Duration) -> io::Result<Vec<SocketAddr>> {
        if let Some(literal) = self.literal {
            return Ok(vec![literal]);
        }
        let remembered = self.resolved.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((at, addresses)) = &remembered
            && at.elapsed() < RESOLVED_FOR
        {
            return Ok(addresses.clone());
        }
        let found = match tokio::time::timeout(timeout, tokio::net::lookup_host(&*self.text)).await {
            Ok(Ok(found)) => Ok(found.take(MAX_ADDRESSES).collect::<Vec<_>>()),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the name was not resolved in time")),
        };
        match (found, remembered) {
            (Ok(addresses), _) if !addresses.is_empty() => {
                *self.resolved.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some((Instant::now(), addresses.clone()));
                Ok(addresses)
            }
            (_, Some((_, addresses))) => Ok(addresses),
            (Ok(_), None) => Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address")),
            (Err(error), None) => Err(error),
        }
    }
}

/// Connects to the workload at the address that a captured connection was for. The socket carries a type of service by
/// which the rules let it through; without it the connection would be captured again.
async fn connect_workload(address: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    match address {
        SocketAddr::V4(_) => SockRef::from(&socket).set_tos_v4(WORKLOAD_TOS.into()),
        SocketAddr::V6(_) => SockRef::from(&socket).set_tclass_v6(WORKLOAD_TOS.into()),
    }?;
    connected(socket.connect(address), timeout).await
}

/// Connects to one address within `timeout` and tunes the socket.
///
/// # Errors
/// The system's error, or `TimedOut`.
pub async fn connect(address: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    connected(TcpStream::connect(address), timeout).await
}

async fn connected(
    connecting: impl Future<Output = io::Result<TcpStream>>,
    timeout: Duration,
) -> io::Result<TcpStream> {
    let connected = tokio::time::timeout(timeout, connecting).await;
    let stream = connected.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no answer in time"))??;
    tune(&stream);
    Ok(stream)
}
