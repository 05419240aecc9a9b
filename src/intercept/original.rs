//! Where a captured connection was for.

use std::io;
use std::net::SocketAddr;

use socket2::SockRef;
use tokio::net::TcpStream;

use crate::config::schema::InboundMode;

/// The destination that `stream` had before it was captured: what SO_ORIGINAL_DST or IP6T_SO_ORIGINAL_DST says of a
/// translated one, the local address of one that was handed over as it was. IPv4 in IPv6 form comes out as IPv4.
///
/// With `tproxy` only what comes from elsewhere is handed over as it was, never for loopback; a call of our own host to its
/// own address is translated to loopback in either mode.
///
/// # Errors
/// The system's: `ENOENT` or `ENOPROTOOPT` where nothing was translated.
pub fn original_destination(stream: &TcpStream, mode: InboundMode) -> io::Result<SocketAddr> {
    let local = stream.local_addr()?;
    if mode == InboundMode::Tproxy && !local.ip().to_canonical().is_loopback() {
        return Ok(canonical(local));
    }
    let socket = SockRef::from(stream);
    let original = match local.ip().to_canonical().is_ipv4() {
        true => socket.original_dst_v4(),
        false => socket.original_dst_v6(),
    }?;
    let original = original.as_socket();
    original.map(canonical).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it is no address of TCP"))
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
