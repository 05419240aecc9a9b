//! Addresses as a config writes them: `HOST:PORT`, `unix:///path`, and those of a Workload API.
//!
//! In: text. Out: a [`Target`] that is well-formed; nothing is resolved or opened here.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// The longest path of a Unix socket that Linux takes, in bytes (`sun_path` without its closing NUL).
pub const MAX_UNIX_PATH: usize = 107;

/// Where something listens or is to be reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// A host, by IP address (without brackets) or by name, and a port.
    Tcp {
        /// IP address or DNS name.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix socket, by absolute path.
    Unix(PathBuf),
}

impl Target {
    /// Reads `HOST:PORT`, `[IPv6]:PORT` or `unix:///absolute/path`. A port 0 is accepted here: it is for listening.
    ///
    /// # Errors
    /// What is wrong and what to write, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.starts_with("unix:") {
            return unix_path(text).map(Self::Unix);
        }
        let (host, port) = text.rsplit_once(':').ok_or("it has no port; write HOST:PORT or unix:///path")?;
        let number = |c: &str| !c.is_empty() && c.bytes().all(|b| b.is_ascii_digit());
        let port = Some(port).filter(|p| number(p)).and_then(|p| p.parse().ok()).ok_or_else(|| {
            format!("'{}' is not a port; write HOST:PORT with a port up to 65535", port.escape_debug())
        })?;
        let host = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(inner) => {
                inner.parse::<std::net::Ipv6Addr>().map_err(|_| "the brackets do not hold an IPv6 address")?;
                inner
            }
            None if host.contains(':') => return Err("an IPv6 address needs brackets: [::1]:PORT".into()),
            None if host.parse::<std::net::Ipv4Addr>().is_ok() => host,
            None => {
                check_name(host)?;
                host
            }
        };
        Ok(Self::Tcp { host: host.to_owned(), port })
    }

    /// The socket address, if the host is written as an IP address.
    pub fn socket_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp { host, port } => host.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, *port)),
            Self::Unix(_) => None,
        }
    }

    /// Whether it surely is on this machine: a Unix socket, a loopback address, or the name `localhost`.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp { host, .. } => match host.parse::<IpAddr>() {
                Ok(ip) => ip.to_canonical().is_loopback(),
                Err(_) => host.eq_ignore_ascii_case("localhost"),
            },
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

/// Reads the address of a Workload API: `unix:///path` or `tcp://IP:PORT` (SPIFFE Workload Endpoint, section 4).
///
/// # Errors
/// What is wrong and what to write, in words.
pub fn workload_api(text: &str) -> Result<Target, String> {
    if text.starts_with("unix:") {
        return unix_path(text).map(Target::Unix);
    }
    let rest = text.strip_prefix("tcp://").ok_or("it is neither unix:///path nor tcp://IP:PORT")?;
    let address: SocketAddr = rest
        .parse()
        .map_err(|_| "after tcp:// comes IP:PORT and nothing else; names are not resolved for a Workload API")?;
    if address.port() == 0 {
        return Err("it has no port; write tcp://IP:PORT".into());
    }
    Ok(Target::Tcp { host: address.ip().to_string(), port: address.port() })
}

fn unix_path(text: &str) -> Result<PathBuf, String> {
    let rest = text.strip_prefix("unix:").unwrap_or(text);
    let path = rest.strip_prefix("//").unwrap_or(rest);
    if !path.starts_with('/') {
        return Err("the path of a Unix socket is absolute; write unix:///path/to/socket (three slashes)".into());
    }
    if path.len() > MAX_UNIX_PATH {
        return Err(format!("the path of a Unix socket has at most {MAX_UNIX_PATH} bytes, this one {}", path.len()));
    }
    if path.contains(['\0', '?', '#', '\n']) || path.ends_with('/') {
        return Err("the path names no socket; write unix:///path/to/socket".into());
    }
    Ok(PathBuf::from(path))
}

/// Host names as the internet has them (RFC 1123), and underscores because service discovery uses them.
fn check_name(host: &str) -> Result<(), String> {
    let bare = host.strip_suffix('.').unwrap_or(host);
    let label = |l: &str| {
        !l.is_empty()
            && l.len() <= 63
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    // The last label of a name is never a number alone: 1.2.3 or 10.0.0.256 is a mistyped address.
    let numeric_end = bare.rsplit('.').next().is_some_and(|l| l.bytes().all(|b| b.is_ascii_digit()));
    if bare.len() > 253 || !bare.split('.').all(label) || numeric_end {
        return Err(format!("'{}' is neither an IP address nor a host name; write HOST:PORT", host.escape_debug()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_targets() {
        for (text, local) in [
            ("127.0.0.1:80", true),
            ("[::1]:80", true),
            ("[::ffff:127.0.0.1]:80", true),
            ("localhost:1", true),
            ("unix:///run/app.sock", true),
            ("unix:/run/app.sock", true),
            ("10.0.0.1:80", false),
            ("records.nhs.example:8443", false),
            ("a_b.c.:8443", false),
            ("0.0.0.0:80", false),
        ] {
            assert_eq!(Target::parse(text).unwrap().is_local(), local, "{text}");
        }
        assert_eq!(Target::parse("[::1]:80").unwrap().to_string(), "[::1]:80");
        assert_eq!(Target::parse("unix:/x").unwrap().to_string(), "unix:///x");
    }

    #[test]
    fn bad_targets() {
        for text in [
            "",
            ":80",
            "host",
            "host:",
            "host:x",
            "host:+1",
            "host:65536",
            "::1:80",
            "[::1]",
            "[host]:80",
            "10.0.0.256:80",
            "-a:1",
            "a..b:1",
            "a b:1",
            "http://a:80",
            "unix:",
            "unix:app.sock",
            "unix://app.sock",
            "unix:///",
            "a/b:1",
        ] {
            assert!(Target::parse(text).is_err(), "{text}");
        }
        assert!(Target::parse(&format!("unix:///{}", "x".repeat(107))).is_err());
    }

    #[test]
    fn workload_api_addresses() {
        assert!(workload_api("unix:///run/spire/sockets/agent.sock").is_ok());
        assert!(workload_api("tcp://127.0.0.1:8081").is_ok());
        for text in
            ["", "/run/agent.sock", "tcp://agent:8081", "tcp://1.2.3.4", "tcp://1.2.3.4:1/x", "http://1.2.3.4:1"]
        {
            assert!(workload_api(text).is_err(), "{text}");
        }
    }
}
