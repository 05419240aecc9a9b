//! What the two sides of a TLS handshake say in the clear, read from outside: for connections that are only watched.
//!
//! In: the bytes of one side as they come. Out: whole handshake messages ([`Pieces`]), and what a server has picked
//! ([`ServerFlight`]). Pure and bounded: records and messages may be cut anywhere, each byte is looked at once, and what
//! is longer than allowed is no TLS.

use super::hello::Reader;
use super::iana;

/// The most that is read of a server until it is known what it has picked, in bytes: in TLS 1.2 its certificates come
/// before the group.
pub const MAX_FLIGHT_BYTES: usize = 64 * 1024;
/// RFC 8446, section 5.1.
const MAX_RECORD: usize = 16 * 1024;

/// RFC 8446, section 4.1.3: the "random" of a ServerHello that asks for another ClientHello.
const RETRY: [u8; 32] = [
    0xCF, 0x21, 0xAD, 0x74, 0xE5, 0x9A, 0x61, 0x11, 0xBE, 0x1D, 0x8C, 0x02, 0x1E, 0x65, 0xB8, 0x91, 0xC2, 0xA2, 0x11,
    0x16, 0x7A, 0xBB, 0x8C, 0x5E, 0x07, 0x9E, 0x09, 0xE2, 0xC8, 0xA8, 0x33, 0x9C,
];

/// Kinds of records.
mod record {
    pub(super) const CHANGE_CIPHER_SPEC: u8 = 20;
    pub(super) const ALERT: u8 = 21;
    pub(super) const HANDSHAKE: u8 = 22;
    pub(super) const APPLICATION_DATA: u8 = 23;
}

/// Kinds of handshake messages.
mod message {
    pub(super) const SERVER_HELLO: u8 = 2;
    pub(super) const NEW_SESSION_TICKET: u8 = 4;
    pub(super) const CERTIFICATE: u8 = 11;
    pub(super) const SERVER_KEY_EXCHANGE: u8 = 12;
    pub(super) const CERTIFICATE_REQUEST: u8 = 13;
    pub(super) const SERVER_HELLO_DONE: u8 = 14;
    pub(super) const CERTIFICATE_STATUS: u8 = 22;
    pub(super) const SUPPLEMENTAL_DATA: u8 = 23;
}

/// The kind of a ClientHello among handshake messages.
pub const CLIENT_HELLO: u8 = 1;

/// The next thing that one side has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Not whole yet.
    More,
    /// A handshake message.
    Message {
        /// Its kind.
        kind: u8,
        /// What stands behind its header.
        body: Vec<u8>,
    },
    /// An alert; the connection is over if it is fatal.
    Alert {
        /// Whether it is fatal.
        fatal: bool,
        /// What it says (RFC 8446, section 6).
        description: u8,
    },
    /// A change of cipher; in TLS 1.3 it means nothing.
    ChangeCipherSpec,
    /// Something encrypted.
    ApplicationData,
    /// No TLS, with the reason.
    Broken(&'static str),
}

/// Handshake messages, joined out of the records of one side.
#[derive(Clone, Debug, Default)]
pub struct Pieces {
    /// The bytes of whole records that were taken.
    taken: usize,
    joined: Vec<u8>,
    /// Of those, what was given out.
    given: usize,
}

impl Pieces {
    /// The next piece of `bytes`, which are all that this side has said so far.
    pub fn next(&mut self, bytes: &[u8]) -> Piece {
        loop {
            match self.message() {
                Ok(Some(message)) => return message,
                Ok(None) => {}
                Err(why) => return Piece::Broken(why),
            }
            let mut rest = Reader(bytes.get(self.taken..).unwrap_or_default());
            let Some(header) = rest.take(5) else { return Piece::More };
            let (Some(kind), Some(3), Some([high, low])) = (header.first(), header.get(1), header.get(3..)) else {
                return Piece::Broken("a record of no known version");
            };
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            // Those that are encrypted may be longer, and nothing of them is of interest.
            if length > MAX_RECORD && *kind != record::APPLICATION_DATA {
                return Piece::Broken("a record longer than allowed");
            }
            let Some(payload) = rest.take(length) else { return Piece::More };
            self.taken += 5 + length;
            if *kind != record::HANDSHAKE && self.is_inside() {
                return Piece::Broken("another record within a handshake message");
            }
            match (*kind, payload) {
                (record::HANDSHAKE, []) => return Piece::Broken("an empty record"),
                (record::HANDSHAKE, payload) => {
                    self.joined.drain(..self.given);
                    self.given = 0;
                    self.joined.extend_from_slice(payload);
                }
                (record::ALERT, [level, description]) => {
                    return Piece::Alert { fatal: *level != 1, description: *description };
                }
                (record::ALERT, _) => return Piece::Broken("an alert of another length"),
                (record::CHANGE_CIPHER_SPEC, _) => return Piece::ChangeCipherSpec,
                (record::APPLICATION_DATA, _) => return Piece::ApplicationData,
                _ => return Piece::Broken("a record of no known kind"),
            }
        }
    }

    /// How many bytes of this side were taken, in whole records.
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// Whether a message has begun in what was taken that is not whole, or was not given out.
    pub fn is_inside(&self) -> bool {
        self.given < self.joined.len()
    }

    fn message(&mut self) -> Result<Option<Piece>, &'static str> {
        let mut rest = Reader(self.joined.get(self.given..).unwrap_or_default());
        let (Some(kind), Some(length)) = (rest.u8(), rest.u24()) else { return Ok(None) };
        if length > MAX_FLIGHT_BYTES {
            return Err("a handshake message longer than allowed");
        }
        let Some(body) = rest.take(length) else { return Ok(None) };
        self.given += 4 + length;
        Ok(Some(Piece::Message { kind, body: body.to_vec() }))
    }
}

/// What a server has picked. All texts are of closed sets ([`iana`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Picked {
    /// The version.
    pub version: &'static str,
    /// The cipher suite.
    pub cipher_suite: &'static str,
    /// The group of the key exchange; `none` where no named one was used.
    pub group: &'static str,
}

impl Picked {
    /// It could not be read.
    pub const UNKNOWN: Self = Self { version: iana::UNKNOWN, cipher_suite: iana::UNKNOWN, group: iana::UNKNOWN };
}

impl std::fmt::Display for Picked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.version, self.cipher_suite, self.group)
    }
}

/// What is known of a server's answer to a ClientHello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// Not enough yet.
    More,
    /// It asks for another ClientHello.
    Retry,
    /// It has picked.
    Picked(Picked),
    /// It has ended the handshake with this alert.
    Refused(u8),
    /// It speaks no TLS, with the reason.
    Broken(&'static str),
}

/// The answer of a server, read until it is known what it has picked.
#[derive(Clone, Debug, Default)]
pub struct ServerFlight {
    pieces: Pieces,
    retried: bool,
    /// What a ServerHello before TLS 1.3 has picked, while the group is still to come.
    hello: Option<Picked>,
}

/// What one ServerHello says.
enum ServerHello {
    Retry,
    Picked(Picked),
    /// The group comes in the key exchange.
    GroupFollows(Picked),
}

impl ServerFlight {
    /// What the server has said, of which `bytes` are all so far.
    pub fn look(&mut self, bytes: &[u8]) -> Said {
        loop {
            match (self.pieces.next(bytes), self.hello) {
                (Piece::More, _) if bytes.len() > MAX_FLIGHT_BYTES => return Said::Broken("longer than allowed"),
                (Piece::More, _) => return Said::More,
                (Piece::Broken(why), _) => return Said::Broken(why),
                (Piece::Alert { fatal: false, .. }, _) => {}
                (Piece::Alert { description, .. }, _) => return Said::Refused(description),
                (Piece::ApplicationData, _) => return Said::Broken("something encrypted before the ServerHello"),
                // Compatibility of TLS 1.3, behind a retry.
                (Piece::ChangeCipherSpec, None) if self.retried => {}
                (Piece::ChangeCipherSpec, None) => return Said::Broken("a change of cipher before the ServerHello"),
                // A session of before is taken up, or there is no key exchange.
                (Piece::ChangeCipherSpec, Some(picked)) => return Said::Picked(picked),
                (Piece::Message { kind: message::SERVER_HELLO, body }, None) => match server_hello(&body) {
                    None => return Said::Broken("a ServerHello that cannot be read"),
                    Some(ServerHello::Retry) if self.retried => return Said::Broken("a second retry"),
                    Some(ServerHello::Retry) => {
                        self.retried = true;
                        return Said::Retry;
                    }
                    Some(ServerHello::Picked(picked)) => return Said::Picked(picked),
                    Some(ServerHello::GroupFollows(picked)) => self.hello = Some(picked),
                },
                (Piece::Message { kind: message::SERVER_KEY_EXCHANGE, body }, Some(picked)) => {
                    return match key_exchange_group(&body, picked.cipher_suite) {
                        Some(group) => Said::Picked(Picked { group, ..picked }),
                        None => Said::Broken("a key exchange that cannot be read"),
                    };
                }
                (
                    Piece::Message { kind: message::SERVER_HELLO_DONE | message::NEW_SESSION_TICKET, .. },
                    Some(picked),
                ) => {
                    return Said::Picked(picked);
                }
                (
                    Piece::Message {
                        kind:
                            message::CERTIFICATE
                            | message::CERTIFICATE_STATUS
                            | message::CERTIFICATE_REQUEST
                            | message::SUPPLEMENTAL_DATA,
                        ..
                    },
                    Some(_),
                ) => {}
                (Piece::Message { .. }, _) => return Said::Broken("a handshake message out of order"),
            }
        }
    }

    /// How many bytes of the server were taken, in whole records.
    pub fn taken(&self) -> usize {
        self.pieces.taken()
    }
}

/// RFC 8446, section 4.1.3; RFC 5246, section 7.4.1.3.
fn server_hello(body: &[u8]) -> Option<ServerHello> {
    let mut hello = Reader(body);
    let mut version = hello.u16()?;
    let retry = hello.take(32)? == RETRY;
    hello.vec8()?;
    let cipher_suite = iana::cipher_suite(hello.u16()?);
    hello.u8()?;
    let mut group = iana::NO_GROUP;
    // SSL 3.0 has none.
    if !hello.0.is_empty() {
        let mut extensions = Reader(hello.vec16()?);
        while !extensions.0.is_empty() {
            let (kind, mut data) = (extensions.u16()?, Reader(extensions.vec16()?));
            match kind {
                43 => version = data.u16()?,
                51 => group = iana::group(data.u16()?),
                _ => {}
            }
        }
    }
    let tls13 = version == 0x0304;
    let picked = Picked { version: iana::version(version), cipher_suite, group };
    Some(match (tls13, retry) {
        (true, true) => ServerHello::Retry,
        (true, false) => ServerHello::Picked(picked),
        // Elliptic curves whose key stands in the certificate name none here.
        (false, _) if cipher_suite.contains("ECDHE_") || cipher_suite.contains("ECDH_anon") => {
            ServerHello::GroupFollows(Picked { group: iana::NO_GROUP, ..picked })
        }
        (false, _) => ServerHello::Picked(Picked { group: iana::NO_GROUP, ..picked }),
    })
}

/// The group in a ServerKeyExchange (RFC 8422, section 5.4), behind the hint of a pre-shared key (RFC 5489, section 2).
fn key_exchange_group(body: &[u8], cipher_suite: &str) -> Option<&'static str> {
    let mut exchange = Reader(body);
    if cipher_suite.contains("_PSK_") {
        exchange.vec16()?;
    }
    Some(match exchange.u8()? {
        1 => iana::group(0xFF01),
        2 => iana::group(0xFF02),
        3 => iana::group(exchange.u16()?),
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
