//! Rules as plain values, between a [`super::Plan`] and the three writers: netlink, nft text, iptables text.
//!
//! The matches are those of nft(8), one field each. They know nothing of how they are written down; `chains` makes them.

use std::time::Duration;

use ipnet::IpNet;

/// The table of ours, in the family `inet`. Nothing outside it is ever touched.
pub(super) const TABLE: &str = "portcullis";

/// IPPROTO_TCP.
pub(super) const TCP: u8 = 6;
/// IPPROTO_UDP.
pub(super) const UDP: u8 = 17;
/// IPPROTO_ICMP.
pub(super) const ICMP: u8 = 1;
/// IPPROTO_ICMPV6.
pub(super) const ICMPV6: u8 = 58;

/// Everything that the table holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ruleset {
    /// Lives of half-closed connections.
    pub(super) timeouts: Vec<Timeout>,
    /// Chains that others jump to come before them.
    pub(super) chains: Vec<Chain>,
    /// How answers to foreign addresses come back to the proxy.
    pub(super) routing: Option<Routing>,
}

/// A `ct timeout` object: how long conntrack remembers a silent TCP connection of which one side has finished.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Timeout {
    /// Holds family and value, so that another value is another object and live connections keep theirs.
    pub(super) name: String,
    /// IPv4 or IPv6.
    pub(super) family: Family,
    /// The life in the states FIN_WAIT and CLOSE_WAIT, in seconds.
    pub(super) half_closed: u32,
}

/// Policy routing: marked packets are delivered here, whatever their destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Routing {
    /// The mark of such packets.
    pub(super) mark: u32,
    /// The routing table with the one local route.
    pub(super) table: u32,
}

/// The version of the Internet protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub(super) const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// That of a network.
    pub(super) fn of(net: IpNet) -> Self {
        match net {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }
}

/// Rules in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chain {
    /// Its name.
    pub(super) name: &'static str,
    /// Where packets enter it; none for one that others jump to.
    pub(super) base: Option<Base>,
    /// The first that ends it decides; a packet that none matches passes.
    pub(super) rules: Vec<Rule>,
}

/// Where packets enter a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Base {
    /// What the chain may do.
    pub(super) kind: Kind,
    /// Where in the packet's way.
    pub(super) hook: Hook,
    /// The order among chains of one hook.
    pub(super) priority: i32,
}

/// The kind of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Sees each packet.
    Filter,
    /// Sees the first packet of a connection.
    Nat,
    /// Sees each packet, and routes it anew if its mark was changed.
    Route,
}

/// A netfilter hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hook {
    /// What came in, before routing.
    Prerouting,
    /// What came in and is for this host.
    Input,
    /// What this host sends.
    Output,
    /// What goes out, after routing.
    Postrouting,
}

/// One rule: all matches hold, then the actions are done in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    /// What must hold.
    pub(super) matches: Vec<Match>,
    /// What is done.
    pub(super) actions: Vec<Action>,
    /// Why, for whoever lists the rules. At most 100 bytes, no quotes.
    pub(super) comment: &'static str,
}

/// A condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Match {
    /// The version of the Internet protocol.
    Family(Family),
    /// The transport protocol.
    Protocol(u8),
    /// Any other transport protocol.
    NotProtocol(u8),
    /// The user of the sending socket.
    Uid(u32),
    /// The group of the sending socket.
    Gid(u32),
    /// There is a sending socket, and it is another user's.
    NotUid(u32),
    /// The same of the group.
    NotGid(u32),
    /// The mark of the packet.
    Mark(u32),
    /// It came in by the loopback interface.
    FromLoopback,
    /// It goes out by the loopback interface.
    ToLoopback,
    /// It goes out by another.
    NotToLoopback,
    /// The destination is an address of this host.
    LocalDestination,
    /// The destination is none.
    ForeignDestination,
    /// The source is in the network.
    Source(IpNet),
    /// The destination is in the network.
    Destination(IpNet),
    /// The source port of a transport protocol that has ports.
    SourcePort(u8, u16),
    /// The destination port likewise.
    DestinationPort(u8, u16),
    /// The DSCP field, for the family.
    Dscp(Family, u8),
    /// TCP without the SYN flag.
    NotSyn,
    /// What conntrack says of the packet: any of these ([`state`]).
    State(u32),
    /// Its connection's destination was rewritten.
    Translated,
    /// It goes against the direction in which its connection was opened.
    Reply,
    /// The mark of the connection.
    ConnectionMark(u32),
}

/// Conntrack states as bits (NF_CT_STATE_BIT, linux/netfilter/nf_conntrack_common.h).
pub(super) mod state {
    /// Belongs to no connection and can open none.
    pub(in crate::intercept) const INVALID: u32 = 1;
    /// Of a connection that was answered.
    pub(in crate::intercept) const ESTABLISHED: u32 = 1 << 1;
    /// Of one that was not answered yet.
    pub(in crate::intercept) const NEW: u32 = 1 << 3;
    /// Somebody's rule keeps it from conntrack, and so from being redirected.
    pub(in crate::intercept) const UNTRACKED: u32 = 1 << 6;
}

/// What is done with a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// The chain is done with it; it passes.
    Return,
    /// It passes.
    Accept,
    /// It vanishes.
    Drop,
    /// It vanishes, the sender gets a TCP reset.
    Reset,
    /// It vanishes, the sender gets ICMP port unreachable.
    Unreachable,
    /// Its connection goes to a port of this host.
    Redirect(u16),
    /// It goes to the transparent socket that its connection has, or listens on this port. Where neither is, the rule ends
    /// here as if it had not matched.
    Tproxy(Family, u16),
    /// The chain goes on in another.
    Goto(&'static str),
    /// The packet gets a mark.
    Mark(u32),
    /// The connection gets a mark.
    MarkConnection(u32),
    /// The connection gets a [`Timeout`], by its name.
    Timeout(String),
}

impl Timeout {
    /// One of this value.
    pub(super) fn new(family: Family, half_closed: Duration) -> Self {
        let half_closed = u32::try_from(half_closed.as_secs()).unwrap_or(u32::MAX).max(1);
        let version = match family {
            Family::V4 => "v4",
            Family::V6 => "v6",
        };
        Self { name: format!("half_closed_{half_closed}s_{version}"), family, half_closed }
    }
}
