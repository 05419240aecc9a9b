//! One attempt to get something through, with a token that tells it from everything else.
//!
//! The target is a socket of ours on a port that only we know; the attempt is somebody's who should not reach it. What
//! reaches it by another way than straight from the attempt's own address was carried by the proxy, and has met its
//! policy.

use std::io::{self, ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

/// How long an attempt may take. No probe leaves this machine.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long a datagram, or its refusal, may take.
const DATAGRAM: Duration = Duration::from_millis(150);
/// A refusal of a datagram may be lost to a limit of the kernel on such messages.
const DATAGRAMS: usize = 2;
/// How often a port is drawn that is not to be one of some.
const DRAWS: usize = 64;

/// What became of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    /// The target got it.
    Arrived,
    /// It was refused on the way.
    Refused,
    /// Somebody else accepted it, and the target got nothing.
    Taken,
    /// Nobody said anything.
    Silent,
    /// It could not be made, in words.
    Failed(String),
}

impl From<io::Error> for Way {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // What netfilter refuses to a sender of this host is a lack of permission to it.
            ErrorKind::ConnectionRefused | ErrorKind::PermissionDenied => Self::Refused,
            // Accepted, and cut before we could say anything. The target does not do that.
            ErrorKind::ConnectionReset | ErrorKind::NotConnected => Self::Taken,
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Self::Silent,
            _ => Self::Failed(error.to_string()),
        }
    }
}

/// A socket that waits for attempts, at `port` or else at one that is not among `not`.
///
/// # Errors
/// The system's, or that there is no such port.
pub(super) fn target(kind: Type, at: IpAddr, port: Option<u16>, not: &[u16]) -> io::Result<Socket> {
    let at = SocketAddr::new(at, port.unwrap_or(0));
    for _ in 0..DRAWS {
        let socket = Socket::new(Domain::for_address(at), kind, None)?;
        socket.bind(&at.into())?;
        if kind == Type::STREAM {
            socket.listen(16)?;
        }
        if port.is_some() || !not.contains(&address(&socket)?.port()) {
            return Ok(socket);
        }
    }
    Err(io::Error::other("all ports that were drawn are among skip_ports"))
}

/// Where a socket is bound.
///
/// # Errors
/// The system's.
pub(super) fn address(socket: &Socket) -> io::Result<SocketAddr> {
    socket.local_addr()?.as_socket().ok_or_else(|| ErrorKind::InvalidData.into())
}

/// Connects to the target with a socket that is given its address.
pub(super) fn tcp(target: &Socket, dial: impl FnOnce(SocketAddr) -> Result<io::Result<Socket>, String>) -> Way {
    let attempt = || {
        let stream = match dial(address(target)?) {
            Ok(stream) => stream?,
            Err(why) => return Ok(Way::Failed(why)),
        };
        let token: [u8; 16] = fastrand::u128(..).to_ne_bytes();
        // Whoever has accepted it may be gone already.
        let _ = (&stream).write_all(&token);
        arrived(target, address(&stream)?, &token)
    };
    attempt().unwrap_or_else(Way::from)
}

/// How a stream is opened.
///
/// # Errors
/// The system's.
pub(super) fn connect(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    socket.connect_timeout(&to.into(), PATIENCE)
}

fn arrived(target: &Socket, from: SocketAddr, token: &[u8; 16]) -> io::Result<Way> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Way::Taken);
        }
        // For accept(2) as well.
        target.set_read_timeout(Some(left))?;
        match target.accept() {
            Ok((stream, client)) if client.as_socket() == Some(from) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                let mut got = [0; 16];
                let same = (&stream).read_exact(&mut got).is_ok() && got == *token;
                return Ok(if same {
                    Way::Arrived
                } else {
                    Way::Failed("something else than the token arrived".into())
                });
            }
            // From the proxy.
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Sends datagrams to the target from a socket that is given its address, and is connected to it.
pub(super) fn udp(target: &Socket, dial: impl FnOnce(SocketAddr) -> Result<io::Result<Socket>, String>) -> Way {
    let attempt = || {
        let socket = match dial(address(target)?) {
            Ok(socket) => socket?,
            Err(why) => return Ok(Way::Failed(why)),
        };
        let token: [u8; 16] = fastrand::u128(..).to_ne_bytes();
        socket.set_read_timeout(Some(DATAGRAM))?;
        target.set_read_timeout(Some(DATAGRAM))?;
        for _ in 0..DATAGRAMS {
            socket.send(&token)?;
            if received(target, &token)? {
                return Ok(Way::Arrived);
            }
            match socket.recv(&mut [MaybeUninit::uninit()]) {
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
        }
        Ok(Way::Silent)
    };
    attempt().unwrap_or_else(Way::from)
}

fn received(target: &Socket, token: &[u8; 16]) -> io::Result<bool> {
    let mut got = [0; 17];
    match (&*target).read(&mut got) {
        Ok(length) => Ok(got.get(..length) == Some(token.as_slice())),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn dial(kind: Type, to: SocketAddr) -> io::Result<Socket> {
        let socket = Socket::new(Domain::IPV4, kind, None)?;
        connect(&socket, to)?;
        Ok(socket)
    }

    #[test]
    fn what_nothing_captures_arrives() {
        let tcp_target = target(Type::STREAM, HERE, None, &[]).unwrap();
        assert_eq!(tcp(&tcp_target, |to| Ok(dial(Type::STREAM, to))), Way::Arrived);
        let udp_target = target(Type::DGRAM, HERE, None, &[]).unwrap();
        assert_eq!(udp(&udp_target, |to| Ok(dial(Type::DGRAM, to))), Way::Arrived);
    }

    #[test]
    fn what_somebody_else_accepts_or_refuses_does_not() {
        let tcp_target = target(Type::STREAM, HERE, None, &[]).unwrap();
        let other = target(Type::STREAM, HERE, None, &[]).unwrap();
        assert_eq!(tcp(&tcp_target, |_| Ok(dial(Type::STREAM, address(&other).unwrap()))), Way::Taken);
        let gone = address(&other).unwrap();
        drop(other);
        assert_eq!(tcp(&tcp_target, |_| Ok(dial(Type::STREAM, gone))), Way::Refused);
        let udp_target = target(Type::DGRAM, HERE, None, &[]).unwrap();
        assert_eq!(udp(&udp_target, |_| Ok(dial(Type::DGRAM, gone))), Way::Refused);
        let deaf = target(Type::DGRAM, HERE, None, &[]).unwrap();
        assert_eq!(udp(&udp_target, |_| Ok(dial(Type::DGRAM, address(&deaf).unwrap()))), Way::Silent);
        assert_eq!(tcp(&tcp_target, |_| Err("no such user".into())), Way::Failed("no such user".into()));
    }

    #[test]
    fn a_cut_and_a_refusal_by_netfilter_are_told_apart_from_silence() {
        for (kind, way) in [
            (ErrorKind::ConnectionReset, Way::Taken),
            (ErrorKind::PermissionDenied, Way::Refused),
            (ErrorKind::TimedOut, Way::Silent),
        ] {
            assert_eq!(Way::from(io::Error::from(kind)), way);
        }
        assert!(matches!(Way::from(io::Error::from(ErrorKind::NetworkUnreachable)), Way::Failed(_)));
    }

    #[test]
    fn what_comes_by_another_way_was_carried_by_the_proxy() {
        let tcp_target = target(Type::STREAM, HERE, None, &[]).unwrap();
        let other = target(Type::STREAM, HERE, None, &[]).unwrap();
        let mut leg = None;
        let mut carried = |to| {
            leg = Some(dial(Type::STREAM, to)?);
            dial(Type::STREAM, address(&other).unwrap())
        };
        assert_eq!(tcp(&tcp_target, |to| Ok(carried(to))), Way::Taken);
        assert!(leg.is_some());
    }
}
