//! The addresses of this host (rtnetlink(7)). Reading them takes no capability.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rustix::io::Errno;

use super::netlink::{Attributes, DUMP_FLAG, Netlink, Request, attribute};

const GETADDR: u16 = 22;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
/// IFA_F_TENTATIVE and IFA_F_DADFAILED: such an address cannot be bound.
const UNUSABLE: u32 = 0x40 | 0x08;
const RT_SCOPE_LINK: u8 = 253;
/// struct ifaddrmsg.
const HEADER: usize = 8;

/// An address of each family by which this host can be called, other than loopback: IPv4 and IPv6.
///
/// # Errors
/// Why the list cannot be read.
pub(super) fn own() -> Result<(Option<IpAddr>, Option<IpAddr>), Errno> {
    let mut request = Request::default();
    request.message(GETADDR, DUMP_FLAG, &[0; HEADER], &Attributes::default());
    let mut found = Vec::new();
    Netlink::open(None)?.dump(&request, |body| found.extend(usable(body)))?;
    Ok((found.iter().copied().find(IpAddr::is_ipv4), found.iter().copied().find(IpAddr::is_ipv6)))
}

fn usable(body: &[u8]) -> Option<IpAddr> {
    let (header, rest) = body.split_first_chunk::<HEADER>()?;
    let [_, _, flags, scope, ..] = *header;
    // The attribute has more bits than the header.
    let flags = attribute(rest, IFA_FLAGS).and_then(|flags| flags.native()).unwrap_or(u32::from(flags));
    // On a link with two ends IFA_ADDRESS is the other end's.
    let address = attribute(rest, IFA_LOCAL).or_else(|| attribute(rest, IFA_ADDRESS))?.value;
    let address: IpAddr = match address.len() {
        4 => <[u8; 4]>::try_from(address).ok().map(Ipv4Addr::from)?.into(),
        16 => <[u8; 16]>::try_from(address).ok().map(Ipv6Addr::from)?.into(),
        _ => return None,
    };
    // Addresses of one link or of this host only: some are ambiguous, and nobody else can call them.
    (scope < RT_SCOPE_LINK && flags & UNUSABLE == 0 && !address.is_loopback()).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(flags: u8, scope: u8, attributes: &Attributes) -> Vec<u8> {
        [&[2, 24, flags, scope, 2, 0, 0, 0], attributes.as_bytes()].concat()
    }

    #[test]
    fn an_address_counts_if_others_can_call_it() {
        let v4 = Attributes::default().bytes(IFA_ADDRESS, &[192, 0, 2, 9]).bytes(IFA_LOCAL, &[192, 0, 2, 7]);
        assert_eq!(usable(&entry(0x80, 0, &v4)), Some("192.0.2.7".parse().unwrap()));
        assert_eq!(usable(&entry(0, 253, &v4)), None);
        let v6 = Attributes::default().bytes(IFA_ADDRESS, &Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1).octets());
        assert_eq!(usable(&entry(0, 0, &v6)), Some("fd00::1".parse().unwrap()));
        assert_eq!(usable(&entry(0x40, 0, &v6)), None);
        assert_eq!(usable(&entry(0, 0, &v6.native(IFA_FLAGS, 0x48))), None);
        let loopback = Attributes::default().bytes(IFA_LOCAL, &[127, 0, 0, 1]);
        assert_eq!(usable(&entry(0, 0, &loopback)), None);
        for cut in [&[][..], &[2, 24, 0], &entry(0, 0, &Attributes::default().bytes(IFA_LOCAL, &[1, 2, 3]))] {
            assert_eq!(usable(cut), None);
        }
    }

    #[test]
    fn the_list_can_be_read_here() {
        own().unwrap();
    }
}
