//! Where an agent is found (SPIFFE Workload Endpoint specification, section 4).

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// The environment variable that names the agent when the config does not.
pub const ENDPOINT_VARIABLE: &str = "SPIFFE_ENDPOINT_SOCKET";

/// The longest path that a Unix socket can have on Linux, in bytes.
const MAX_SOCKET_PATH: usize = 107;

/// The address of a Workload API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// TCP, by IP address.
    Tcp(SocketAddr),
}

/// Why a text is not such an address: what was given, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressError {
    given: Option<String>,
    why: String,
}

impl std::fmt::Display for AddressError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.given {
            Some(given) => write!(f, "'{}' is not the address of a Workload API: {}", given.escape_debug(), self.why),
            None => f.write_str(&self.why),
        }
    }
}

impl std::error::Error for AddressError {}

impl Address {
    /// Reads `unix:///absolute/path` (also written `unix:/absolute/path`) or `tcp://IP:PORT`.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, AddressError> {
        let fail = |why: &str| AddressError { given: Some(text.to_owned()), why: why.to_owned() };
        let (scheme, rest) = text.split_once(':').ok_or_else(|| fail("it starts with neither unix: nor tcp:"))?;
        if rest.contains(['?', '#']) {
            return Err(fail("it has a query or fragment"));
        }
        match scheme {
            "unix" => {
                let path = match rest.strip_prefix("//") {
                    Some(path) if path.starts_with('/') => path,
                    Some("") => return Err(fail("the path is missing")),
                    Some(_) => return Err(fail("there is a host; write three slashes, unix:///path")),
                    None if rest.starts_with('/') => rest,
                    None => return Err(fail("the path is not absolute; write unix:///path")),
                };
                if path == "/" {
                    return Err(fail("the path is missing"));
                }
                let path = percent_decode(path).ok_or_else(|| fail("a % is not followed by two hexadecimal digits"))?;
                if path.contains(&0) {
                    return Err(fail("the path holds a NUL"));
                }
                if path.len() > MAX_SOCKET_PATH {
                    return Err(fail("the path is longer than the 107 bytes that a Unix socket's may have"));
                }
                Ok(Self::Unix(PathBuf::from(std::ffi::OsString::from(
                    String::from_utf8(path).map_err(|_| fail("the path is not UTF-8"))?,
                ))))
            }
            "tcp" => {
                let authority = rest.strip_prefix("//").ok_or_else(|| fail("write tcp://IP:PORT"))?;
                if authority.contains('@') {
                    return Err(fail("there is user information"));
                }
                if authority.contains('/') {
                    return Err(fail("there is a path"));
                }
                let address = authority.parse::<SocketAddr>().map_err(|_| {
                    if authority.parse::<IpAddr>().is_ok() || !authority.contains(':') {
                        fail("the port is missing")
                    } else {
                        fail("the host is not an IP address, or the port is no number")
                    }
                })?;
                if address.port() == 0 {
                    return Err(fail("the port is 0"));
                }
                Ok(Self::Tcp(address))
            }
            _ => Err(fail("it starts with neither unix: nor tcp:")),
        }
    }

    /// The address in [`ENDPOINT_VARIABLE`].
    ///
    /// # Errors
    /// The variable is missing or not an address.
    pub fn from_env() -> Result<Self, AddressError> {
        match std::env::var(ENDPOINT_VARIABLE) {
            Ok(text) => Self::parse(&text),
            Err(std::env::VarError::NotPresent) => Err(AddressError {
                given: None,
                why: format!(
                    "no Workload API is named: set `identity:` in the config or {ENDPOINT_VARIABLE} in the environment"
                ),
            }),
            Err(std::env::VarError::NotUnicode(_)) => {
                Err(AddressError { given: None, why: format!("{ENDPOINT_VARIABLE} is not UTF-8") })
            }
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
        }
    }
}

fn percent_decode(text: &str) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digit = |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16));
            let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
            decoded.push(u8::try_from(high * 16 + low).ok()?);
        } else {
            decoded.push(byte);
        }
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_addresses() {
        for (text, path) in [
            ("unix:///run/spire/agent.sock", "/run/spire/agent.sock"),
            ("unix:/run/agent.sock", "/run/agent.sock"),
            ("unix:///run/a%20b", "/run/a b"),
        ] {
            assert_eq!(Address::parse(text).unwrap(), Address::Unix(path.into()));
        }
        for text in ["tcp://127.0.0.1:8081", "tcp://[::1]:8081"] {
            assert_eq!(Address::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn bad_addresses_are_told_why() {
        for (text, word) in [
            ("", "neither"),
            ("/run/agent.sock", "neither"),
            ("http://127.0.0.1:80", "neither"),
            ("unix://run/agent.sock", "three slashes"),
            ("unix:run/agent.sock", "not absolute"),
            ("unix://", "missing"),
            ("unix:///", "missing"),
            ("unix:///a?b", "query"),
            ("unix:///a#b", "fragment"),
            ("unix:///a%2", "hexadecimal"),
            ("unix:///a%00", "NUL"),
            ("tcp://localhost:80", "not an IP"),
            ("tcp://127.0.0.1", "port is missing"),
            ("tcp://::1", "port is missing"),
            ("tcp://127.0.0.1:0", "port is 0"),
            ("tcp://127.0.0.1:80/x", "path"),
            ("tcp://u@127.0.0.1:80", "user"),
            ("tcp:127.0.0.1:80", "tcp://IP:PORT"),
        ] {
            let error = Address::parse(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        assert!(Address::parse(&format!("unix:///{}", "a".repeat(107))).unwrap_err().to_string().contains("107"));
    }
}
