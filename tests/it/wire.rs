//! What passes between pods, packet by packet: the proof that a secret was, or never was, on the wire in clear.
#![allow(dead_code)]

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use socket2::{Domain, Protocol, Socket, Type};

use crate::harness::until;
use crate::netns::{Namespace, ROOT};

/// ETH_P_ALL of linux/if_ether.h, in network byte order as packet(7) wants it.
const ALL_PROTOCOLS: i32 = 0x0003_u16.to_be() as i32;
/// Room for what has not been read yet, in bytes: a packet that finds none is lost to the tap.
const ROOM: usize = 64 << 20;

/// One direction of a connection.
type Flow = (SocketAddr, SocketAddr);

#[derive(Default)]
struct Seen {
    frames: Vec<Vec<u8>>,
    flows: HashMap<Flow, Stream>,
}

/// What went in one direction of a connection.
#[derive(Default)]
struct Stream {
    /// The sequence number of the first byte.
    first: u32,
    /// Bytes by sequence number, counted from the first one seen.
    parts: BTreeMap<u32, Vec<u8>>,
    /// How many segments were resets.
    resets: usize,
}

/// A tap on the bridge. It sees each packet several times: as it comes in, and as it goes out to each pod.
pub struct Wire {
    host: Namespace,
    seen: Arc<Mutex<Seen>>,
    /// Ends the thread.
    _alive: Arc<()>,
}

impl Wire {
    pub async fn tap(host: Namespace) -> Self {
        let socket =
            host.run(ROOT, || Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(ALL_PROTOCOLS)))).await;
        let mut socket = socket.unwrap();
        set_socket_recv_buffer_size_force(socket.as_fd(), ROOM).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let (seen, alive) = (Arc::<Mutex<Seen>>::default(), Arc::new(()));
        let (into, owner) = (Arc::clone(&seen), Arc::downgrade(&alive));
        std::thread::spawn(move || {
            let mut frame = vec![0; 1 << 17];
            while owner.strong_count() > 0 {
                match socket.read(&mut frame) {
                    Ok(length) => into.lock().unwrap().take(&frame[..length]),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
                    // An interface that goes away is said once to each socket; the others stay.
                    Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NETDOWN.raw_os_error()) => (),
                    Err(error) => panic!("the tap: {error}"),
                }
            }
        });
        Self { host, seen, _alive: alive }
    }

    /// Whether these bytes have passed: in one packet of any kind, or along one direction of a TCP connection. Everything
    /// that passed before this was asked counts.
    pub async fn saw(&self, marker: &[u8]) -> bool {
        self.caught_up().await;
        self.seen.lock().unwrap().saw(marker)
    }

    /// Holds that these bytes have not passed in clear, though connections to `server` have carried something.
    pub async fn only_sealed(&self, server: IpAddr, marker: &[u8]) {
        assert!(!self.saw(marker).await, "on the wire in clear: {}", String::from_utf8_lossy(marker));
        let bytes = self.bytes_to(server).await;
        assert!(bytes > marker.len(), "{bytes} bytes went to {server}: that proves nothing");
    }

    /// Bytes of TCP that went to this address.
    pub async fn bytes_to(&self, address: IpAddr) -> usize {
        self.caught_up().await;
        let seen = self.seen.lock().unwrap();
        let flows = seen.flows.iter().filter(|((_, to), _)| to.ip() == address);
        flows.flat_map(|(_, stream)| stream.parts.values()).map(Vec::len).sum()
    }

    /// The sequence number that follows what went from here to there.
    pub async fn next_sequence(&self, from: SocketAddr, to: SocketAddr) -> u32 {
        self.caught_up().await;
        let seen = self.seen.lock().unwrap();
        let stream = seen.flows.get(&(from, to)).unwrap_or_else(|| panic!("nothing went from {from} to {to}"));
        let (at, part) = stream.parts.last_key_value().unwrap();
        stream.first.wrapping_add(*at).wrapping_add(u32::try_from(part.len()).unwrap())
    }

    /// Whether a reset went from here to there.
    pub async fn was_reset(&self, from: SocketAddr, to: SocketAddr) -> bool {
        self.caught_up().await;
        self.seen.lock().unwrap().flows.get(&(from, to)).is_some_and(|stream| stream.resets > 0)
    }

    /// Waits until the tap has taken in everything up to now: packets keep their order, so one of ours comes last.
    async fn caught_up(&self) {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let last = format!("the tap has seen all up to here: {}.", NUMBER.fetch_add(1, Ordering::Relaxed));
        let text = last.clone();
        let sent = self.host.run(ROOT, move || {
            let socket = UdpSocket::bind("10.77.0.254:0")?;
            socket.set_broadcast(true)?;
            socket.send_to(text.as_bytes(), "10.77.0.255:9")
        });
        sent.await.unwrap();
        until("the tap to be up to date", || async { self.seen.lock().unwrap().saw(last.as_bytes()).then_some(()) })
            .await;
    }
}

impl Seen {
    fn take(&mut self, frame: &[u8]) {
        if let Some(Segment { flow, sequence, reset, payload }) = segment(frame) {
            let stream = self.flows.entry(flow).or_insert_with(|| Stream { first: sequence, ..Stream::default() });
            stream.resets += usize::from(reset);
            let part = stream.parts.entry(sequence.wrapping_sub(stream.first)).or_default();
            if part.len() < payload.len() {
                *part = payload.to_vec();
            }
        }
        self.frames.push(frame.to_vec());
    }

    fn saw(&self, marker: &[u8]) -> bool {
        let holds = |bytes: &[u8]| memchr::memmem::find(bytes, marker).is_some();
        self.frames.iter().rev().any(|frame| holds(frame))
            || self.flows.values().any(|stream| holds(&joined(&stream.parts)))
    }
}

/// The bytes of one direction in order. Where some were never seen, what follows stands next to what came before.
fn joined(parts: &BTreeMap<u32, Vec<u8>>) -> Vec<u8> {
    let (mut bytes, mut next) = (Vec::new(), 0_u64);
    for (at, part) in parts {
        let at = u64::from(*at);
        let known = usize::try_from(next.saturating_sub(at)).unwrap();
        bytes.extend_from_slice(part.get(known..).unwrap_or_default());
        next = next.max(at + part.len() as u64);
    }
    bytes
}

/// A TCP segment.
struct Segment<'a> {
    flow: Flow,
    /// Of the first byte.
    sequence: u32,
    reset: bool,
    payload: &'a [u8],
}

/// The one in an Ethernet frame.
fn segment(frame: &[u8]) -> Option<Segment<'_>> {
    let packet = frame.get(14..)?;
    let number = |bytes: &[u8], at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let (from, to, tcp): (IpAddr, IpAddr, &[u8]) = match number(frame, 12)? {
        0x0800 if *packet.get(9)? == 6 => {
            let header = usize::from(packet.first()? & 0xf) * 4;
            let address = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
            (address(12)?, address(16)?, packet.get(header..usize::from(number(packet, 2)?))?)
        }
        0x86dd if *packet.get(6)? == 6 => {
            let address = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
            (address(8)?, address(24)?, packet.get(40..40 + usize::from(number(packet, 4)?))?)
        }
        _ => return None,
    };
    let (source, destination) = (number(tcp, 0)?, number(tcp, 2)?);
    let sequence = u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?);
    let (opens, reset) = (tcp.get(13)? & 2 != 0, tcp.get(13)? & 4 != 0);
    let payload = tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?;
    // A SYN takes a number of its own, before the bytes that it may carry (RFC 9293, section 3.4; RFC 7413).
    let sequence = sequence.wrapping_add(opens.into());
    Some(Segment { flow: ((from, source).into(), (to, destination).into()), sequence, reset, payload })
}
