//! What a program may try in order to get round the gate, without any privilege: each way to send a text by TCP.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::mesh::CAPTURE_PORTS;
use crate::netns::{APPLICATION, CONNECT, Pod};

/// How long an answer may take that never comes in most cases.
const ANSWER: Duration = Duration::from_secs(2);
/// linux/socket.h.
const MSG_FASTOPEN: i32 = 0x2000_0000;

/// One way to do it. It ends with what came back.
pub type Way = fn(SocketAddr, &[u8]) -> io::Result<Vec<u8>>;

/// All of them. None for an address that they do not fit.
pub const ALL: [(&str, Way); 11] = [
    ("directly", directly),
    ("with TCP Fast Open", fast_open),
    ("with MPTCP", mptcp),
    ("bound to the device", bound_to_device),
    ("with TCP Fast Open, bound to the device", fast_open_bound_to_device),
    ("with MPTCP, bound to the device", mptcp_bound_to_device),
    ("by an IPv4 address in IPv6", mapped),
    ("from the proxy's outbound port", from_port::<{ CAPTURE_PORTS[0] }>),
    ("from the proxy's inbound port", from_port::<{ CAPTURE_PORTS[1] }>),
    ("from a port of its choice", from_port::<4242>),
    ("with the proxy's type of service", proxys_type_of_service),
];

/// Tries one way in a pod, as the application.
pub async fn attempt(pod: &Pod, way: Way, to: SocketAddr, text: &[u8]) -> io::Result<Vec<u8>> {
    let text = text.to_vec();
    pod.run(APPLICATION, move || way(to, &text)).await
}

fn tcp(to: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))
}

/// Waits for as many bytes to come back as were sent.
fn answer(mut socket: &Socket, length: usize) -> io::Result<Vec<u8>> {
    socket.set_read_timeout(Some(ANSWER))?;
    let mut back = vec![0; length];
    socket.read_exact(&mut back)?;
    Ok(back)
}

fn talk(socket: &Socket, to: SocketAddr, text: &[u8]) -> io::Result<Vec<u8>> {
    socket.connect_timeout(&SockAddr::from(to), CONNECT)?;
    let mut writer = socket;
    writer.write_all(text)?;
    answer(socket, text.len())
}

fn talk_at_once(socket: &Socket, to: SocketAddr, text: &[u8]) -> io::Result<Vec<u8>> {
    socket.set_write_timeout(Some(CONNECT))?;
    let sent = socket.send_to_with_flags(text, &SockAddr::from(to), MSG_FASTOPEN)?;
    let mut writer = socket;
    writer.write_all(&text[sent..])?;
    answer(socket, text.len())
}

fn directly(to: SocketAddr, text: &[u8]) -> io::Result<Vec<u8>> {
    talk(&tcp(to)?, to, text)
}

fn fast_open(to: SocketAddr, text: &[u8]) -> io::Result<Vec<u8>> {
    talk_at_once(&tcp(to)?, to, text)
}

fn mptcp(to: SocketAddr, text: &[u8]) -> io::Result<Vec<u8>> {
    talk(&Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::MPTCP))?, to, text)
}

fn bound_to_device(to: SocketAddr, text: &[u8]) -> io::Result<Vec<u8>> {
    let socket = tcp(to)?;
    socket.bind_device(Some(b"eth0"))?;
    talk(&socket, to, text)
}

fn fast_open_bound_to_device(to: SocketAddr, text: &[u8]) -> io::Result<Vec<u8>> {
    let socket = tcp(to)?;
    socket.bind_device(Some(b"eth0"))?;
    talk_at_once(&socket, to, text)
}

fn mptcp_bound_to_device(to: SocketAddr, text: &[u8]) -> io::Result<Vec<u8>> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::MPTCP))?;
    socket.bind_device(Some(b"eth0"))?;
    talk(&socket, to, text)
}

fn mapped(to: SocketAddr, text: &[u8]) -> io::Result<Vec<u8>> {
    let to = match to.ip() {
        IpAddr::V4(address) => SocketAddr::new(address.to_ipv6_mapped().into(), to.port()),
        IpAddr::V6(_) => to,
    };
    talk(&tcp(to)?, to, text)
}

fn unspecified(to: SocketAddr) -> IpAddr {
    if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

fn from_port<const PORT: u16>(to: SocketAddr, text: &[u8]) -> io::Result<Vec<u8>> {
    let socket = tcp(to)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::new(unspecified(to), PORT).into())?;
    talk(&socket, to, text)
}

/// DSCP 1: by this the rules know the proxy's leg to its own workload, if it is the proxy's.
fn proxys_type_of_service(to: SocketAddr, text: &[u8]) -> io::Result<Vec<u8>> {
    let socket = tcp(to)?;
    match to {
        SocketAddr::V4(_) => socket.set_tos_v4(4)?,
        SocketAddr::V6(_) => socket.set_tclass_v6(4)?,
    }
    talk(&socket, to, text)
}
