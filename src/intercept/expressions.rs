//! A rule as nf_tables expressions (linux/netfilter/nf_tables.h): small programs over registers.
//!
//! The same ones that nft(8) makes of the text in `nft_text`, so that its listing shows ours as it shows its own.

use std::net::IpAddr;

use ipnet::IpNet;

use super::netlink::Attributes;
use super::rules::{Action, Family, Match, Rule, TCP};

const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_VERDICT_CHAIN: u16 = 2;

/// The verdict is written to register 0, everything else goes through register 1.
const VERDICT: u32 = 0;
const REGISTER: u32 = 1;

const META_MARK: u32 = 3;
const META_IIF: u32 = 4;
const META_OIF: u32 = 5;
const META_SKUID: u32 = 10;
const META_SKGID: u32 = 11;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const CT_STATE: u32 = 0;
const CT_DIRECTION: u32 = 1;
const CT_STATUS: u32 = 2;
const CT_MARK: u32 = 3;
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;
const FIB_DADDR: u32 = 1 << 1;
const FIB_ADDRTYPE: u32 = 3;
/// The loopback interface has this index in every network namespace.
const LOOPBACK: u32 = 1;
const RTN_LOCAL: u32 = 2;
const IP_CT_DIR_REPLY: u8 = 1;
/// IPS_DST_NAT, a bit of the status.
const IPS_DST_NAT: u32 = 1 << 5;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const NFT_REJECT_TCP_RST: u32 = 1;
const NFT_REJECT_ICMPX: u32 = 2;
const NFT_REJECT_ICMPX_PORT_UNREACH: u8 = 1;
pub(super) const NFT_OBJECT_CT_TIMEOUT: u32 = 7;
const TCP_SYN: u8 = 2;

const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
const NFT_GOTO: u32 = (-4_i32).cast_unsigned();
const NFT_RETURN: u32 = (-5_i32).cast_unsigned();

/// The number of a family in messages (NFPROTO_IPV4, NFPROTO_IPV6).
pub(super) fn nfproto(family: Family) -> u8 {
    match family {
        Family::V4 => NFPROTO_IPV4,
        Family::V6 => NFPROTO_IPV6,
    }
}

/// The list of expressions of a rule.
pub(super) fn expressions(rule: &Rule) -> Attributes {
    let mut program = Program::default();
    for condition in &rule.matches {
        program.condition(condition);
    }
    for action in &rule.actions {
        program.action(action);
    }
    program.0
}

#[derive(Clone, Copy)]
enum Is {
    Equal = 0,
    Other = 1,
}

#[derive(Default)]
struct Program(Attributes);

impl Program {
    fn push(&mut self, name: &str, data: &Attributes) {
        let expression = Attributes::default().text(NFTA_EXPR_NAME, name).nested(NFTA_EXPR_DATA, data);
        self.0 = std::mem::take(&mut self.0).nested(NFTA_LIST_ELEM, &expression);
    }

    fn condition(&mut self, condition: &Match) {
        match *condition {
            Match::Family(family) => self.meta_is(META_NFPROTO, Is::Equal, &[nfproto(family)]),
            Match::Protocol(protocol) => self.meta_is(META_L4PROTO, Is::Equal, &[protocol]),
            Match::NotProtocol(protocol) => self.meta_is(META_L4PROTO, Is::Other, &[protocol]),
            Match::Uid(uid) => self.meta_is(META_SKUID, Is::Equal, &uid.to_ne_bytes()),
            Match::Gid(gid) => self.meta_is(META_SKGID, Is::Equal, &gid.to_ne_bytes()),
            // Without a socket there is nothing to compare, and the rule ends.
            Match::NotUid(uid) => self.meta_is(META_SKUID, Is::Other, &uid.to_ne_bytes()),
            Match::NotGid(gid) => self.meta_is(META_SKGID, Is::Other, &gid.to_ne_bytes()),
            Match::Mark(mark) => self.meta_is(META_MARK, Is::Equal, &mark.to_ne_bytes()),
            Match::FromLoopback => self.meta_is(META_IIF, Is::Equal, &LOOPBACK.to_ne_bytes()),
            Match::ToLoopback => self.meta_is(META_OIF, Is::Equal, &LOOPBACK.to_ne_bytes()),
            Match::NotToLoopback => self.meta_is(META_OIF, Is::Other, &LOOPBACK.to_ne_bytes()),
            Match::LocalDestination => self.destination_type(Is::Equal),
            Match::ForeignDestination => self.destination_type(Is::Other),
            Match::Source(net) => self.address(net, 12, 8),
            Match::Destination(net) => self.address(net, 16, 24),
            Match::SourcePort(protocol, port) => self.port(protocol, 0, port),
            Match::DestinationPort(protocol, port) => self.port(protocol, 2, port),
            Match::Dscp(family, dscp) => self.dscp(family, dscp),
            Match::NotSyn => self.not_syn(),
            Match::State(states) => {
                self.ct(CT_STATE);
                self.mask(&states.to_ne_bytes());
                self.compare(Is::Other, &[0; 4]);
            }
            Match::Translated => {
                self.ct(CT_STATUS);
                self.mask(&IPS_DST_NAT.to_ne_bytes());
                self.compare(Is::Other, &[0; 4]);
            }
            Match::Reply => {
                self.ct(CT_DIRECTION);
                self.compare(Is::Equal, &[IP_CT_DIR_REPLY]);
            }
            Match::ConnectionMark(mark) => {
                self.ct(CT_MARK);
                self.compare(Is::Equal, &mark.to_ne_bytes());
            }
        }
    }

    fn action(&mut self, action: &Action) {
        match action {
            Action::Return => self.verdict(NFT_RETURN, None),
            Action::Accept => self.verdict(NF_ACCEPT, None),
            Action::Drop => self.verdict(NF_DROP, None),
            Action::Goto(chain) => self.verdict(NFT_GOTO, Some(chain)),
            Action::Reset => self.push("reject", &Attributes::default().u32(1, NFT_REJECT_TCP_RST)),
            Action::Unreachable => {
                let code = [NFT_REJECT_ICMPX_PORT_UNREACH];
                self.push("reject", &Attributes::default().u32(1, NFT_REJECT_ICMPX).bytes(2, &code));
            }
            Action::Redirect(port) => {
                self.load(&port.to_be_bytes());
                self.push("redir", &Attributes::default().u32(1, REGISTER));
            }
            Action::Tproxy(family, port) => {
                self.load(&port.to_be_bytes());
                let family = u32::from(nfproto(*family));
                self.push("tproxy", &Attributes::default().u32(1, family).u32(3, REGISTER));
            }
            Action::Mark(mark) => {
                self.load(&mark.to_ne_bytes());
                self.push("meta", &Attributes::default().u32(2, META_MARK).u32(3, REGISTER));
            }
            Action::MarkConnection(mark) => {
                self.load(&mark.to_ne_bytes());
                self.push("ct", &Attributes::default().u32(2, CT_MARK).u32(4, REGISTER));
            }
            Action::Timeout(name) => {
                self.push("objref", &Attributes::default().u32(1, NFT_OBJECT_CT_TIMEOUT).text(2, name));
            }
        }
    }

    fn meta_is(&mut self, key: u32, is: Is, value: &[u8]) {
        self.push("meta", &Attributes::default().u32(2, key).u32(1, REGISTER));
        self.compare(is, value);
    }

    fn ct(&mut self, key: u32) {
        self.push("ct", &Attributes::default().u32(2, key).u32(1, REGISTER));
    }

    fn destination_type(&mut self, is: Is) {
        self.push("fib", &Attributes::default().u32(3, FIB_DADDR).u32(2, FIB_ADDRTYPE).u32(1, REGISTER));
        self.compare(is, &RTN_LOCAL.to_ne_bytes());
    }

    fn payload(&mut self, base: u32, offset: u32, length: u32) {
        let data = Attributes::default().u32(1, REGISTER).u32(2, base).u32(3, offset).u32(4, length);
        self.push("payload", &data);
    }

    fn compare(&mut self, is: Is, value: &[u8]) {
        let data = Attributes::default().u32(1, REGISTER).u32(2, is as u32);
        self.push("cmp", &data.nested(3, &Attributes::default().bytes(NFTA_DATA_VALUE, value)));
    }

    fn mask(&mut self, mask: &[u8]) {
        let value = |bytes: &[u8]| Attributes::default().bytes(NFTA_DATA_VALUE, bytes);
        let length = u32::try_from(mask.len()).unwrap_or(u32::MAX);
        let data = Attributes::default().u32(1, REGISTER).u32(2, REGISTER).u32(3, length);
        self.push("bitwise", &data.nested(4, &value(mask)).nested(5, &value(&vec![0; mask.len()])));
    }

    fn load(&mut self, value: &[u8]) {
        let value = Attributes::default().bytes(NFTA_DATA_VALUE, value);
        self.push("immediate", &Attributes::default().u32(1, REGISTER).nested(2, &value));
    }

    fn verdict(&mut self, code: u32, chain: Option<&str>) {
        let mut verdict = Attributes::default().u32(NFTA_VERDICT_CODE, code);
        if let Some(chain) = chain {
            verdict = verdict.text(NFTA_VERDICT_CHAIN, chain);
        }
        let data = Attributes::default().nested(NFTA_DATA_VERDICT, &verdict);
        self.push("immediate", &Attributes::default().u32(1, VERDICT).nested(2, &data));
    }

    fn port(&mut self, protocol: u8, offset: u32, port: u16) {
        self.meta_is(META_L4PROTO, Is::Equal, &[protocol]);
        self.payload(TRANSPORT, offset, 2);
        self.compare(Is::Equal, &port.to_be_bytes());
    }

    /// Compares the whole bytes of a prefix, and masks only where a byte is divided.
    fn address(&mut self, net: IpNet, v4_offset: u32, v6_offset: u32) {
        self.meta_is(META_NFPROTO, Is::Equal, &[nfproto(Family::of(net))]);
        let (address, offset) = match net.network() {
            IpAddr::V4(address) => (address.octets().to_vec(), v4_offset),
            IpAddr::V6(address) => (address.octets().to_vec(), v6_offset),
        };
        let bits = usize::from(net.prefix_len());
        if bits == 0 {
            return;
        }
        let whole = if bits.is_multiple_of(8) { bits / 8 } else { address.len() };
        self.payload(NETWORK, offset, u32::try_from(whole).unwrap_or(u32::MAX));
        if !bits.is_multiple_of(8) {
            self.mask(&match net.netmask() {
                IpAddr::V4(mask) => mask.octets().to_vec(),
                IpAddr::V6(mask) => mask.octets().to_vec(),
            });
        }
        self.compare(Is::Equal, address.get(..whole).unwrap_or(&address));
    }

    /// The upper six bits of the second byte in IPv4, and the bits 4 to 9 of the header in IPv6.
    fn dscp(&mut self, family: Family, dscp: u8) {
        self.meta_is(META_NFPROTO, Is::Equal, &[nfproto(family)]);
        match family {
            Family::V4 => {
                self.payload(NETWORK, 1, 1);
                self.mask(&[0xfc]);
                self.compare(Is::Equal, &[dscp << 2]);
            }
            Family::V6 => {
                self.payload(NETWORK, 0, 2);
                self.mask(&[0x0f, 0xc0]);
                self.compare(Is::Equal, &(u16::from(dscp) << 6).to_be_bytes());
            }
        }
    }

    fn not_syn(&mut self) {
        self.meta_is(META_L4PROTO, Is::Equal, &[TCP]);
        self.payload(TRANSPORT, 13, 1);
        self.mask(&[TCP_SYN]);
        self.compare(Is::Other, &[TCP_SYN]);
    }
}
