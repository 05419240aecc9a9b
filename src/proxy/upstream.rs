//! What is to be reached: the workload, or an upstream's addresses, resolved and tried in order.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustls::pki_types::{DnsName, ServerName};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;

use super::dialer::{Dial, Dialer};
use super::io::Plain;
use crate::config::address;

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

    /// Connects within `timeout`, for this client.
    ///
    /// # Errors
    /// The last address's error.
    pub async fn connect(
        &self,
        dialer: &Dialer,
        client: Option<SocketAddr>,
        timeout: Duration,
    ) -> io::Result<ToWorkload> {
        match self {
            Self::Unix(path) => {
                let connected = tokio::time::timeout(timeout, UnixStream::connect(path)).await;
                let stream = connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
                Ok(ToWorkload { io: Plain::Unix(stream), _dial: None })
            }
            Self::Original(address) => {
                let dialled = dialer.workload(*address, client, timeout).await?;
                Ok(ToWorkload { io: Plain::Tcp(dialled.stream), _dial: dialled.dial })
            }
            Self::Tcp(host) => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                for address in host.resolve(timeout).await? {
                    match dialer.workload(address, None, timeout).await {
                        Ok(dialled) => {
                            return Ok(ToWorkload { io: Plain::Tcp(dialled.stream), _dial: dialled.dial });
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }
}

/// A connection to the workload, known as ours for as long as it is open.
#[derive(Debug)]
pub struct ToWorkload {
    io: Plain,
    _dial: Option<Dial>,
}

impl ToWorkload {
    /// Makes the coming drop a reset.
    pub fn abort(&self) {
        self.io.abort();
    }
}

impl AsyncRead for ToWorkload {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_read(cx, buf)
    }
}

impl AsyncWrite for ToWorkload {
    super::io::writes_pass!();

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
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
