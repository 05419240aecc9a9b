//! A tap on the wire: what somebody could read who listens between the pods (packet(7)).
//!
//! It counts the segments from and to one port that carry something, by what that looks like. The bridge shows a packet
//! several times, as it comes in and as it goes out; only whether there are any, and roughly how many, has a meaning.

use std::io::{self, Read};
use std::net::UdpSocket;
use std::ops::Sub;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use socket2::{Domain, Protocol, Socket, Type};

use super::pods::Pod;

/// ETH_P_ALL of linux/if_ether.h, in network byte order as packet(7) wants it.
const ALL_PROTOCOLS: i32 = 0x0003_u16.to_be() as i32;
/// Room for what has not been read yet, in bytes: a packet that finds none is lost to the tap.
const ROOM: usize = 8 << 20;
/// How long the tap may lag behind.
const PATIENCE: Duration = Duration::from_secs(5);

/// What has passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Passed {
    /// Requests of HTTP in clear.
    pub(super) requests: u64,
    /// Answers of HTTP in clear.
    pub(super) answers: u64,
    /// Records of TLS.
    pub(super) sealed: u64,
}

impl Passed {
    /// HTTP in clear.
    pub(super) fn clear(self) -> u64 {
        self.requests + self.answers
    }
}

impl Sub for Passed {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            requests: self.requests - before.requests,
            answers: self.answers - before.answers,
            sealed: self.sealed - before.sealed,
        }
    }
}

#[derive(Debug, Default)]
struct Seen {
    passed: Passed,
    /// What was sent last to see how far the tap is.
    mark: [u8; 8],
    marked: bool,
}

/// A tap.
#[derive(Debug)]
pub(super) struct Tap {
    seen: Arc<Mutex<Seen>>,
}

impl Tap {
    /// Listens to all that passes at this host from now on, and counts what is from and to this port.
    pub(super) async fn start(host: &Pod, port: u16) -> io::Result<Self> {
        let seen = Arc::<Mutex<Seen>>::default();
        let into = Arc::clone(&seen);
        let open = move || {
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(ALL_PROTOCOLS)))?;
            set_socket_recv_buffer_size_force(socket.as_fd(), ROOM)?;
            std::thread::Builder::new().name("tap".into()).spawn(move || listen(socket, port, &into))?;
            Ok(())
        };
        host.run(open).await?;
        Ok(Self { seen })
    }

    /// What has passed up to now.
    pub(super) async fn passed(&self, host: &Pod) -> io::Result<Passed> {
        let mark = fastrand::u64(..).to_be_bytes();
        let lock = || self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut seen = lock();
            (seen.mark, seen.marked) = (mark, false);
        }
        let from = host.v4;
        // Packets keep their order, so a broadcast of ours comes last. Port 9 is for what nobody reads (RFC 863).
        let sent = host.run(move || {
            let socket = UdpSocket::bind((from, 0))?;
            socket.set_broadcast(true)?;
            let [a, b, c, _] = from.octets();
            socket.send_to(&mark, ((std::net::Ipv4Addr::new(a, b, c, 255)), 9))
        });
        sent.await?;
        let end = Instant::now() + PATIENCE;
        loop {
            {
                let seen = lock();
                if seen.marked {
                    return Ok(seen.passed);
                }
            }
            if Instant::now() >= end {
                return Err(io::Error::other("the tap on the wire does not keep up"));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// Ends with the process: the cell has one tap.
fn listen(mut socket: Socket, port: u16, into: &Mutex<Seen>) {
    let mut frame = vec![0; 1 << 17];
    loop {
        // An interface that goes away is said once; the others stay.
        let Ok(length) = socket.read(&mut frame) else { continue };
        let frame = frame.get(..length).unwrap_or_default();
        let mut seen = into.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(payload) = payload(frame, port) {
            match payload {
                [0x14..=0x17, 3, ..] => seen.passed.sealed += 1,
                _ if memchr::memmem::find(payload, b"HTTP/1.1\r\n").is_some() => seen.passed.requests += 1,
                _ if payload.starts_with(b"HTTP/1.") => seen.passed.answers += 1,
                _ => {}
            }
        } else if !seen.marked {
            seen.marked = memchr::memmem::find(frame, &seen.mark).is_some();
        }
    }
}

/// What a TCP segment from or to the port carries, if there is one in the frame (RFC 791, RFC 8200, RFC 9293).
fn payload(frame: &[u8], port: u16) -> Option<&[u8]> {
    let (ethernet, packet) = frame.split_at_checked(14)?;
    let segment = match ethernet.get(12..14)? {
        [0x08, 0x00] => {
            let head = usize::from(packet.first()? & 0x0f) * 4;
            let length = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
            (packet.get(9) == Some(&6)).then(|| packet.get(head..length))??
        }
        [0x86, 0xdd] => {
            let length = usize::from(u16::from_be_bytes([*packet.get(4)?, *packet.get(5)?]));
            (packet.get(6) == Some(&6)).then(|| packet.get(40..40 + length))??
        }
        _ => return None,
    };
    let [a, b, c, d, ..] = *segment else { return None };
    let ours = [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])].contains(&port);
    let head = usize::from(segment.get(12)? >> 4) * 4;
    ours.then(|| segment.get(head..))?.filter(|payload| !payload.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ipv4(port: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend(u16::try_from(40 + payload.len()).unwrap().to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 6]);
        frame.extend([0; 10]);
        frame.extend(tcp(port, payload));
        frame
    }

    fn ipv6(port: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(u16::try_from(20 + payload.len()).unwrap().to_be_bytes());
        frame.extend([6, 64]);
        frame.extend([0; 32]);
        frame.extend(tcp(port, payload));
        frame
    }

    fn tcp(port: u16, payload: &[u8]) -> Vec<u8> {
        let mut segment = vec![0xc0, 0];
        segment.extend(port.to_be_bytes());
        segment.extend([0; 8]);
        segment.extend([0x50, 0, 0, 0, 0, 0, 0, 0]);
        segment.extend(payload);
        segment
    }

    #[test]
    fn what_a_segment_carries_is_found_and_padding_is_not() {
        for frame in [ipv4, ipv6] {
            let mut bytes = frame(8080, b"GET / HTTP/1.1");
            assert_eq!(payload(&bytes, 8080), Some(&b"GET / HTTP/1.1"[..]));
            assert_eq!(payload(&bytes, 0xc000), Some(&b"GET / HTTP/1.1"[..]));
            assert_eq!(payload(&bytes, 9902), None);
            bytes.extend([0; 6]);
            assert_eq!(payload(&bytes, 8080), Some(&b"GET / HTTP/1.1"[..]));
            assert_eq!(payload(&frame(8080, b""), 8080), None);
        }
    }

    #[test]
    fn a_frame_that_is_cut_anywhere_is_no_segment() {
        for frame in [ipv4(8080, b"x"), ipv6(8080, b"x")] {
            for length in 0..frame.len() {
                assert_eq!(payload(&frame[..length], 8080), None, "{length}");
            }
        }
    }
}
