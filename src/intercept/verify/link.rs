//! A pair of virtual interfaces, one end here and one in a network namespace of our own (veth(4), rtnetlink(7)).

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};

use super::super::netlink::{ACK, Attributes, CREATE, EXCLUSIVE, Netlink, Request};

const NEWLINK: u16 = 16;
const DELLINK: u16 = 17;
const NEWADDR: u16 = 20;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// IFA_F_NODAD: nobody else is on the link.
const NODAD: u8 = 2;
const IFF_UP: u32 = 1;
/// struct ifinfomsg.
const LINK_HEADER: usize = 16;

/// Makes the interface `name` here and its peer of the same name in that namespace. Both are down.
pub(super) fn create(name: &str, peer: &impl AsFd) -> Result<(), Errno> {
    let there =
        Attributes::default().text(IFLA_IFNAME, name).native(IFLA_NET_NS_FD, peer.as_fd().as_raw_fd().cast_unsigned());
    let there = [&[0; LINK_HEADER], there.as_bytes()].concat();
    let data = Attributes::default().bytes(VETH_INFO_PEER, &there);
    let info = Attributes::default().text(IFLA_INFO_KIND, "veth").nested(IFLA_INFO_DATA, &data);
    let link = Attributes::default().text(IFLA_IFNAME, name).nested(IFLA_LINKINFO, &info);
    transact(NEWLINK, CREATE | EXCLUSIVE, &[0; LINK_HEADER], &link)
}

/// Sets an interface of this thread's namespace up.
pub(super) fn up(name: &str) -> Result<(), Errno> {
    let [a, b, c, d] = IFF_UP.to_ne_bytes();
    // Its flags, and which of them are meant.
    let header = [0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d, a, b, c, d];
    transact(NEWLINK, 0, &header, &Attributes::default().text(IFLA_IFNAME, name))
}

/// Gives an interface of this thread's namespace an address, and a route to its neighbours.
pub(super) fn address(name: &str, address: IpAddr, prefix: u8) -> Result<(), Errno> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let [a, b, c, d] = rustix::net::netdevice::name_to_index(&socket, name)?.to_ne_bytes();
    let (family, bytes) = match address {
        IpAddr::V4(address) => (AddressFamily::INET, address.octets().to_vec()),
        IpAddr::V6(address) => (AddressFamily::INET6, address.octets().to_vec()),
    };
    // Both families have numbers below 256.
    let family = u8::try_from(family.as_raw()).unwrap_or_default();
    let attributes = Attributes::default().bytes(IFA_LOCAL, &bytes).bytes(IFA_ADDRESS, &bytes);
    transact(NEWADDR, CREATE | EXCLUSIVE, &[family, prefix, NODAD, 0, a, b, c, d], &attributes)
}

/// Removes an interface of this thread's namespace, and with it its peer.
pub(super) fn remove(name: &str) -> Result<(), Errno> {
    transact(DELLINK, 0, &[0; LINK_HEADER], &Attributes::default().text(IFLA_IFNAME, name))
}

fn transact(kind: u16, flags: u16, header: &[u8], attributes: &Attributes) -> Result<(), Errno> {
    let mut request = Request::default();
    request.message(kind, flags | ACK, header, attributes);
    Netlink::open(None)?.transact(&request).map_err(|failed| failed.errno)
}
