//! Virtual interfaces of the calling thread's network namespace: pairs of them, bridges and addresses (veth(4),
//! rtnetlink(7)).

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};

use super::netlink::{ACK, Attributes, CREATE, DUMP_FLAG, EXCLUSIVE, Netlink, Request, attribute};

const NEWLINK: u16 = 16;
const DELLINK: u16 = 17;
const GETLINK: u16 = 18;
const NEWADDR: u16 = 20;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_OPERSTATE: u16 = 16;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// IFA_F_NODAD: the address is used at once, without asking whether somebody else has it.
const NODAD: u8 = 2;
const IFF_UP: u32 = 1;
/// IF_OPER_UP (RFC 2863).
const OPERATIONAL: u8 = 6;
/// struct ifinfomsg.
const LINK_HEADER: usize = 16;

/// Makes the interface `name` here, and its peer in that namespace. Both are down.
pub(crate) fn pair(name: &str, peer: &str, there: &impl AsFd) -> Result<(), Errno> {
    let fd = there.as_fd().as_raw_fd().cast_unsigned();
    let there = Attributes::default().text(IFLA_IFNAME, peer).native(IFLA_NET_NS_FD, fd);
    let there = [&[0; LINK_HEADER], there.as_bytes()].concat();
    let data = Attributes::default().bytes(VETH_INFO_PEER, &there);
    let info = Attributes::default().text(IFLA_INFO_KIND, "veth").nested(IFLA_INFO_DATA, &data);
    make(name, &info)
}

/// Makes a bridge, which is down.
pub(crate) fn bridge(name: &str) -> Result<(), Errno> {
    make(name, &Attributes::default().text(IFLA_INFO_KIND, "bridge"))
}

fn make(name: &str, info: &Attributes) -> Result<(), Errno> {
    let link = Attributes::default().text(IFLA_IFNAME, name).nested(IFLA_LINKINFO, info);
    transact(NEWLINK, CREATE | EXCLUSIVE, &[0; LINK_HEADER], &link)
}

/// Sets an interface up.
pub(crate) fn up(name: &str) -> Result<(), Errno> {
    let [a, b, c, d] = IFF_UP.to_ne_bytes();
    // Its flags, and which of them are meant.
    let header = [0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d, a, b, c, d];
    transact(NEWLINK, 0, &header, &Attributes::default().text(IFLA_IFNAME, name))
}

/// Whether an interface of this thread's namespace carries packets. Until the kernel has seen that both ends are up, some time
/// after they are, it drops them.
pub(super) fn carries(name: &str) -> Result<bool, Errno> {
    let mut request = Request::default();
    request.message(GETLINK, DUMP_FLAG, &[0; LINK_HEADER], &Attributes::default());
    let mut carries = false;
    Netlink::open(None)?.dump(&request, |body| {
        let body = body.get(LINK_HEADER..).unwrap_or_default();
        let named = attribute(body, IFLA_IFNAME).is_some_and(|found| found.text() == Some(name));
        carries |= named && attribute(body, IFLA_OPERSTATE).is_some_and(|state| state.value == [OPERATIONAL]);
    })?;
    Ok(carries)
}

/// Joins an interface to a bridge.
pub(crate) fn join(name: &str, bridge: &str) -> Result<(), Errno> {
    let link = Attributes::default().text(IFLA_IFNAME, name).native(IFLA_MASTER, index(bridge)?);
    transact(NEWLINK, 0, &[0; LINK_HEADER], &link)
}

/// Gives an interface an address, and a route to its neighbours.
pub(crate) fn address(name: &str, address: IpAddr, prefix: u8) -> Result<(), Errno> {
    let [a, b, c, d] = index(name)?.to_ne_bytes();
    let (family, bytes) = match address {
        IpAddr::V4(address) => (AddressFamily::INET, address.octets().to_vec()),
        IpAddr::V6(address) => (AddressFamily::INET6, address.octets().to_vec()),
    };
    // Both families have numbers below 256.
    let family = u8::try_from(family.as_raw()).unwrap_or_default();
    let attributes = Attributes::default().bytes(IFA_LOCAL, &bytes).bytes(IFA_ADDRESS, &bytes);
    transact(NEWADDR, CREATE | EXCLUSIVE, &[family, prefix, NODAD, 0, a, b, c, d], &attributes)
}

/// Removes an interface, and with it its peer.
pub(super) fn remove(name: &str) -> Result<(), Errno> {
    transact(DELLINK, 0, &[0; LINK_HEADER], &Attributes::default().text(IFLA_IFNAME, name))
}

fn index(name: &str) -> Result<u32, Errno> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    rustix::net::netdevice::name_to_index(&socket, name)
}

fn transact(kind: u16, flags: u16, header: &[u8], attributes: &Attributes) -> Result<(), Errno> {
    let mut request = Request::default();
    request.message(kind, flags | ACK, header, attributes);
    Netlink::open(None)?.transact(&request).map_err(|failed| failed.errno)
}
