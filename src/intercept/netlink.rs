//! Netlink messages: written, sent, and read back with bounds (netlink(7), RFC 3549).
//!
//! In: attributes as bytes. Out: acknowledgements, errors, dumps. It knows the envelope only; `nftables` and `routing`
//! know what is inside. Whatever comes from the socket is taken for any bytes: lengths are checked, a dump has a limit and
//! every wait a deadline.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{
    Timeout, set_socket_recv_buffer_size, set_socket_send_buffer_size_force, set_socket_timeout,
};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

/// How long the kernel may take for one request.
const PATIENCE: Duration = Duration::from_secs(5);
/// One answer at most: the kernel fills no more than 32 KiB of a dump at a time.
const ANSWER: usize = 64 * 1024;
/// A request at most: rules for lists as long as a config may have them take a few MiB.
const LONGEST: usize = 16 * 1024 * 1024;
/// A whole dump at most, in messages.
const DUMP: usize = 65_536;
/// An attribute at most, header included: its length is a u16.
const ATTRIBUTE: usize = u16::MAX as usize;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// NLM_F_REQUEST, for every message to the kernel.
pub(super) const REQUEST: u16 = 1;
/// NLM_F_ACK.
pub(super) const ACK: u16 = 4;
/// NLM_F_ROOT | NLM_F_MATCH.
pub(super) const DUMP_FLAG: u16 = 0x300;
/// NLM_F_DUMP_INTR: what is dumped was changed meanwhile.
const INTERRUPTED: u16 = 0x10;
/// NLM_F_REPLACE.
pub(super) const REPLACE: u16 = 0x100;
/// NLM_F_EXCL.
pub(super) const EXCLUSIVE: u16 = 0x200;
/// NLM_F_CREATE.
pub(super) const CREATE: u16 = 0x400;
/// NLM_F_APPEND.
pub(super) const APPEND: u16 = 0x800;

const NESTED: u16 = 0x8000;
/// The bits that say nothing of what an attribute is: nested, and network byte order.
const TYPE_MASK: u16 = 0x3fff;
const HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;

fn padded(length: usize) -> usize {
    length.div_ceil(4) * 4
}

/// Attributes in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    fn put(mut self, kind: u16, value: &[u8]) -> Self {
        // Names and comments of ours are far shorter. Should one not be, the kernel refuses what is cut.
        let value = value.get(..value.len().min(ATTRIBUTE - ATTRIBUTE_HEADER)).unwrap_or_default();
        let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(padded(self.0.len()), 0);
        self
    }

    /// One of plain bytes.
    pub(super) fn bytes(self, kind: u16, value: &[u8]) -> Self {
        self.put(kind, value)
    }

    /// One of a number in network byte order.
    pub(super) fn u32(self, kind: u16, value: u32) -> Self {
        self.put(kind, &value.to_be_bytes())
    }

    /// One of a number in the machine's byte order, as rtnetlink has it.
    pub(super) fn native(self, kind: u16, value: u32) -> Self {
        self.put(kind, &value.to_ne_bytes())
    }

    /// One of text, which the kernel wants to end with a zero.
    pub(super) fn text(self, kind: u16, value: &str) -> Self {
        self.put(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// One that holds others.
    pub(super) fn nested(self, kind: u16, inner: &Self) -> Self {
        self.put(kind | NESTED, &inner.0)
    }

    /// As they are sent.
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// An attribute that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attribute<'a> {
    /// Without the flags.
    pub(super) kind: u16,
    /// Whether it says that it holds others.
    pub(super) nested: bool,
    /// What it holds.
    pub(super) value: &'a [u8],
}

impl<'a> Attribute<'a> {
    /// A number in network byte order.
    pub(super) fn u32(&self) -> Option<u32> {
        self.value.try_into().ok().map(u32::from_be_bytes)
    }

    /// A number in the machine's byte order.
    pub(super) fn native(&self) -> Option<u32> {
        self.value.try_into().ok().map(u32::from_ne_bytes)
    }

    /// Text, up to its zero.
    pub(super) fn text(&self) -> Option<&'a str> {
        std::str::from_utf8(self.value.split(|byte| *byte == 0).next()?).ok()
    }
}

/// The attributes in some bytes, up to the first that is not whole.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = Attribute<'_>> {
    std::iter::from_fn(move || {
        let (header, _) = bytes.split_first_chunk::<ATTRIBUTE_HEADER>()?;
        let [l0, l1, k0, k1] = *header;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let kind = u16::from_ne_bytes([k0, k1]);
        let value = bytes.get(ATTRIBUTE_HEADER..length)?;
        bytes = bytes.get(padded(length)..).unwrap_or_default();
        Some(Attribute { kind: kind & TYPE_MASK, nested: kind & NESTED != 0, value })
    })
}

/// The first attribute of a kind.
pub(super) fn attribute(bytes: &[u8], kind: u16) -> Option<Attribute<'_>> {
    attributes(bytes).find(|attribute| attribute.kind == kind)
}

/// A message that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) sequence: u32,
    pub(super) body: &'a [u8],
}

/// The messages in some bytes, up to the first that is not whole.
pub(super) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let (header, _) = bytes.split_first_chunk::<HEADER>()?;
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *header;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(padded(length)..).unwrap_or_default();
        Some(Message {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            body,
        })
    })
}

/// The error that an NLMSG_ERROR carries; an acknowledgement has none. What is no error number (errno(3): 1 to 4095) is a
/// broken answer.
fn error_of(body: &[u8]) -> Option<Errno> {
    match body.first_chunk::<4>().map_or(0, |code| i32::from_ne_bytes(*code)) {
        0 => None,
        code @ -4095..=-1 => Some(Errno::from_raw_os_error(-code)),
        _ => Some(Errno::PROTO),
    }
}

/// Messages to be sent in one piece.
#[derive(Debug, Default)]
pub(super) struct Request {
    bytes: Vec<u8>,
    sequence: u32,
    /// The last message that asks for an acknowledgement.
    asks: u32,
}

impl Request {
    /// Adds a message: its family's own header, then attributes.
    pub(super) fn message(&mut self, kind: u16, flags: u16, header: &[u8], attributes: &Attributes) {
        self.sequence += 1;
        if flags & ACK != 0 {
            self.asks = self.sequence;
        }
        let length = HEADER + padded(header.len()) + attributes.0.len();
        self.bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((flags | REQUEST).to_ne_bytes());
        self.bytes.extend(self.sequence.to_ne_bytes());
        self.bytes.extend([0; 4]);
        self.bytes.extend(header);
        self.bytes.resize(padded(self.bytes.len()), 0);
        self.bytes.extend(&attributes.0);
    }

    /// As it is sent.
    #[cfg(test)]
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Why a request came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Failed {
    /// What the kernel, or the socket, says.
    pub(super) errno: Errno,
    /// The message it says it of, counted from one; none where it concerns the socket.
    pub(super) message: Option<u32>,
}

impl From<Errno> for Failed {
    fn from(errno: Errno) -> Self {
        Self { errno, message: None }
    }
}

/// A netlink socket to the kernel.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens one in the network namespace of this thread. Without a protocol it is that of routing, whose number is 0.
    pub(super) fn open(protocol: Option<Protocol>) -> Result<Self, Errno> {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
        // Each message of a batch that fails has an answer of its own.
        set_socket_recv_buffer_size(&socket, 1024 * 1024)?;
        // Takes CAP_NET_ADMIN, without which nothing long is sent anyway.
        let _ = set_socket_send_buffer_size_force(&socket, LONGEST);
        Ok(Self { socket, buffer: vec![0; ANSWER] })
    }

    fn send(&self, request: &Request) -> Result<(), Errno> {
        let kernel = SocketAddrNetlink::new(0, 0);
        rustix::net::sendto(&self.socket, &request.bytes, SendFlags::empty(), &kernel).map(|_| ())
    }

    /// The next datagram of the kernel.
    fn receive(&mut self, deadline: Instant) -> Result<&[u8], Errno> {
        loop {
            let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero());
            set_socket_timeout(&self.socket, Timeout::Recv, Some(left.ok_or(Errno::TIMEDOUT)?))?;
            let (_, length, from) =
                match rustix::net::recvfrom(&self.socket, self.buffer.as_mut_slice(), RecvFlags::TRUNC) {
                    Err(Errno::INTR) => continue,
                    Err(Errno::AGAIN) => return Err(Errno::TIMEDOUT),
                    received => received?,
                };
            let from = from.and_then(|from| SocketAddrNetlink::try_from(from).ok());
            if from.is_some_and(|from| from.pid() == 0) {
                return self.buffer.get(..length).ok_or(Errno::MSGSIZE);
            }
        }
    }

    /// Sends messages of which one asks for an acknowledgement, and waits for that or the first error.
    pub(super) fn transact(&mut self, request: &Request) -> Result<(), Failed> {
        self.send(request)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            for message in messages(self.receive(deadline)?) {
                if message.kind != NLMSG_ERROR {
                    continue;
                }
                if let Some(errno) = error_of(message.body) {
                    return Err(Failed { errno, message: Some(message.sequence) });
                }
                if message.sequence == request.asks {
                    return Ok(());
                }
            }
        }
    }

    /// Asks for a list and hands each entry's body to `each`. `EINTR`: it was changed while it was read.
    pub(super) fn dump(&mut self, request: &Request, mut each: impl FnMut(&[u8])) -> Result<(), Errno> {
        self.send(request)?;
        let deadline = Instant::now() + PATIENCE;
        let (mut left, mut interrupted) = (DUMP, false);
        loop {
            for message in messages(self.receive(deadline)?) {
                interrupted |= message.flags & INTERRUPTED != 0;
                match message.kind {
                    NLMSG_DONE | NLMSG_ERROR => {
                        return match error_of(message.body) {
                            Some(errno) => Err(errno),
                            None if interrupted => Err(Errno::INTR),
                            None => Ok(()),
                        };
                    }
                    _ => each(message.body),
                }
                left = left.checked_sub(1).ok_or(Errno::MSGSIZE)?;
            }
        }
    }
}

impl From<Failed> for io::Error {
    fn from(failed: Failed) -> Self {
        failed.errno.into()
    }
}

#[cfg(test)]
mod tests;
