//! Reaching the other side: the workload, or an upstream's addresses, resolved and tried in order.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::{DnsName, ServerName};
use tokio::net::{TcpStream, UnixStream};

use super::io::{Plain, tune};

/// How long a resolved name is used before it is resolved again.
const RESOLVED_FOR: Duration = Duration::from_secs(10);
/// The most addresses of one name that are tried.
const MAX_ADDRESSES: usize = 16;

/// Where to connect: as declared.
#[derive(Debug)]
pub enum Target {
    /// `HOST:PORT`.
    Tcp(HostPort),
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
        if let Some(path) = text.strip_prefix("unix://") {
            let path = PathBuf::from(path);
            if !path.is_absolute() {
                return Err(format!("'{text}': a Unix socket is written unix:///absolute/path"));
            }
            return Ok(Self::Unix(path));
        }
        HostPort::parse(text).map(Self::Tcp)
    }

    /// Whether it surely lies on this machine.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp(host) => {
                host.literal.map_or_else(|| host.text.starts_with("localhost:"), |a| a.ip().is_loopback())
            }
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
        let wrong = |why: &str| format!("'{text}' is not HOST:PORT: {why}");
        if let Ok(literal) = text.parse::<SocketAddr>() {
            let name = ServerName::IpAddress(literal.ip().into());
            return Ok(Self { text: text.into(), literal: Some(literal), name, resolved: Mutex::default() });
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(|| wrong("the port is missing"))?;
        port.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(|| wrong("the port is not 1 to 65535"))?;
        let name =
            DnsName::try_from(host.to_owned()).map_err(|_| wrong("the host is neither an address nor a DNS name"))?;
        Ok(Self { text: text.into(), literal: None, name: ServerName::DnsName(name), resolved: Mutex::default() })
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

/// Connects to one address within `timeout` and tunes the socket.
///
/// # Errors
/// The system's error, or `TimedOut`.
pub async fn connect(address: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    let connected = tokio::time::timeout(timeout, TcpStream::connect(address)).await;
    let stream = connected.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no answer in time"))??;
    tune(&stream);
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_strictly() {
        assert!(Target::parse("127.0.0.1:80").unwrap().is_local());
        assert!(Target::parse("[::1]:80").unwrap().is_local());
        assert!(Target::parse("unix:///run/app.sock").unwrap().is_local());
        assert!(Target::parse("localhost:80").unwrap().is_local());
        assert!(!Target::parse("localhost.example:80").unwrap().is_local());
        assert!(!Target::parse("10.0.0.1:80").unwrap().is_local());
        for bad in ["", "host", "host:", "host:0", "host:99999", ":80", "ho st:80", "unix://relative", "::1:80"] {
            assert!(Target::parse(bad).is_err(), "{bad}");
        }
    }
}
