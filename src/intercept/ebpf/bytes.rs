//! What the programs read, as the bytes of `struct plan` in `ebpf/capture.c`.

use std::net::Ipv6Addr;

use ipnet::IpNet;

use crate::intercept::plan::{Plan, Udp};

const MAX_USERS: usize = 288;
const MAX_DESTINATIONS: usize = 544;
/// The size of `struct destination`.
const DESTINATION: usize = 40;
/// The size of `struct plan`.
pub(super) const SIZE: usize = 32 + 2 * 4 * MAX_USERS + MAX_DESTINATIONS * DESTINATION;

/// As the programs hold it: the same bytes for the same plan.
pub(super) type Bytes = [u8; SIZE];

const V4: u32 = 1;
const V6: u32 = 2;
const EVERY_PORT: (u16, u16) = (0, u16::MAX);
const DNS: (u16, u16) = (53, 53);

/// # Errors
/// If nothing outbound is to be captured, or if there are more exemptions than there is room for.
pub(super) fn encode(plan: &Plan, netns: u64) -> Result<Bytes, String> {
    let outbound =
        plan.outbound.as_ref().ok_or("no outbound capture is declared, so eBPF programs have nothing to do")?;
    let uids: Vec<u32> = plan.proxy.uid.into_iter().chain(outbound.skip_uids.iter().copied()).collect();
    let gids: Vec<u32> = plan.proxy.gid.into_iter().chain(outbound.skip_gids.iter().copied()).collect();
    let destinations = destinations(plan);

    let mut bytes = Vec::with_capacity(SIZE);
    bytes.extend(netns.to_ne_bytes());
    bytes.extend(u32::from(outbound.port.to_be()).to_ne_bytes());
    bytes.extend(u32::from(plan.proxy.mark.is_some()).to_ne_bytes());
    bytes.extend(plan.proxy.mark.unwrap_or(0).to_ne_bytes());
    bytes.extend(count(uids.len(), MAX_USERS, "users")?);
    bytes.extend(count(gids.len(), MAX_USERS, "groups")?);
    bytes.extend(count(destinations.len(), MAX_DESTINATIONS, "destinations and ports")?);
    table(&mut bytes, uids.into_iter().map(u32::to_ne_bytes), MAX_USERS);
    table(&mut bytes, gids.into_iter().map(u32::to_ne_bytes), MAX_USERS);
    table(&mut bytes, destinations.into_iter(), MAX_DESTINATIONS);
    bytes.try_into().map_err(|_| "the plan does not have the size that the eBPF programs know".to_owned())
}

fn count(is: usize, most: usize, of: &str) -> Result<[u8; 4], String> {
    match u32::try_from(is) {
        Ok(count) if is <= most => Ok(count.to_ne_bytes()),
        _ => {
            Err(format!("{is} {of} are exempt, and eBPF capture has room for {most}: declare fewer, or redirect rules"))
        }
    }
}

fn table<const N: usize>(bytes: &mut Vec<u8>, entries: impl Iterator<Item = [u8; N]>, most: usize) {
    let end = bytes.len() + most * N;
    bytes.extend(entries.flatten());
    bytes.resize(end, 0);
}

/// What is reached directly.
fn destinations(plan: &Plan) -> Vec<[u8; DESTINATION]> {
    let outbound = plan.outbound.iter();
    let networks = outbound.clone().flat_map(|outbound| &outbound.skip_destinations);
    let ports = outbound.flat_map(|outbound| &outbound.skip_ports);
    let resolvers = plan.dns_servers.iter().filter(|_| plan.udp != Udp::Refuse);
    let networks = networks.map(|network| in_network(*network, EVERY_PORT));
    let ports = ports.map(|port| destination(Ipv6Addr::UNSPECIFIED, 0, (*port, *port), V4 | V6));
    networks.chain(ports).chain(resolvers.map(|server| in_network(IpNet::from(*server), DNS))).collect()
}

/// IPv4 as v4-mapped, like the programs hold it (RFC 4291, section 2.5.5.2).
fn in_network(network: IpNet, ports: (u16, u16)) -> [u8; DESTINATION] {
    match network.trunc() {
        IpNet::V4(v4) => destination(v4.addr().to_ipv6_mapped(), 96 + u32::from(v4.prefix_len()), ports, V4),
        IpNet::V6(v6) => destination(v6.addr(), v6.prefix_len().into(), ports, V6),
    }
}

fn destination(address: Ipv6Addr, prefix: u32, (first, last): (u16, u16), families: u32) -> [u8; DESTINATION] {
    let mask = u128::MAX.checked_shl(128 - prefix).unwrap_or(0);
    let fields = address.octets().into_iter().chain(mask.to_be_bytes());
    let fields = fields.chain(first.to_ne_bytes()).chain(last.to_ne_bytes()).chain(families.to_ne_bytes());
    let mut bytes = [0; DESTINATION];
    for (to, from) in bytes.iter_mut().zip(fields) {
        *to = from;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::intercept::plan::{OutboundCapture, ProxyOwner};

    fn plan(outbound: OutboundCapture) -> Plan {
        Plan {
            proxy: ProxyOwner { uid: Some(1337), gid: None, mark: None },
            inbound: None,
            outbound: Some(outbound),
            udp: Udp::Dns,
            dns_servers: vec!["192.0.2.53".parse().unwrap()],
            half_closed: Duration::from_secs(60),
        }
    }

    fn outbound() -> OutboundCapture {
        OutboundCapture {
            port: 0x3a99,
            skip_ports: vec![0x0102],
            skip_destinations: vec!["10.1.2.3/8".parse().unwrap(), "2001:db8::/32".parse().unwrap()],
            skip_uids: vec![7],
            skip_gids: vec![8],
            by_cgroup: true,
        }
    }

    #[test]
    fn a_plan_is_laid_out_as_the_programs_read_it() {
        let bytes = encode(&plan(outbound()), 0x1122).unwrap();
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(&bytes[..8], &0x1122_u64.to_ne_bytes());
        assert_eq!(&bytes[8..12], &[0x3a, 0x99, 0, 0]);
        assert_eq!([12, 16, 20, 24, 28].map(word), [0, 0, 2, 1, 4]);
        assert_eq!([32, 36, 40, 1184, 1188].map(word), [1337, 7, 0, 8, 0]);
        let entry = |number: usize| &bytes[2336 + number * 40..][..40];
        let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
        assert_eq!(entry(0)[..16], [&mapped[..], &[10, 0, 0, 0]].concat());
        assert_eq!(entry(0)[16..32], [&[0xff; 12][..], &[0xff, 0, 0, 0]].concat());
        assert_eq!(entry(0)[32..], [0, 0, 0xff, 0xff, 1, 0, 0, 0]);
        assert_eq!(entry(1)[16..32], [&[0xff; 4][..], &[0; 12]].concat());
        assert_eq!(entry(1)[32..], [0, 0, 0xff, 0xff, 2, 0, 0, 0]);
        assert_eq!(entry(2)[..32], [0; 32]);
        assert_eq!(entry(2)[32..], [2, 1, 2, 1, 3, 0, 0, 0]);
        assert_eq!(entry(3)[..32], [&mapped[..], &[192, 0, 2, 53], &[0xff; 16]].concat());
        assert_eq!(entry(3)[32..], [53, 0, 53, 0, 1, 0, 0, 0]);
        assert_eq!(entry(4), [0; 40]);
    }

    #[test]
    fn name_servers_are_no_exemption_where_dns_is_refused() {
        let refused = Plan { udp: Udp::Refuse, ..plan(outbound()) };
        assert_eq!(destinations(&refused).len(), 3);
    }

    #[test]
    fn what_has_no_room_is_refused_and_not_left_out() {
        let full = OutboundCapture { skip_uids: (0..287).collect(), ..outbound() };
        assert!(encode(&plan(full), 1).is_ok());
        let users = OutboundCapture { skip_uids: (0..288).collect(), ..outbound() };
        assert!(encode(&plan(users), 1).unwrap_err().contains("289 users"));
        let ports = OutboundCapture { skip_ports: (0..542).collect(), ..outbound() };
        assert!(encode(&plan(ports), 1).unwrap_err().contains("545 destinations and ports"));
        assert!(encode(&Plan { outbound: None, ..plan(outbound()) }, 1).is_err());
    }
}
