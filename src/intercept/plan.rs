//! What is to be captured, as plain values: the one thing that rules are made of.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

/// The type of service (IPv4) or traffic class (IPv6) of sockets that the proxy opens towards its own workload, at the
/// workload's original address: DSCP 1, the lower-effort class (RFC 8622), ECN bits zero.
///
/// Such a connection stays on the loopback interface, so no router ever reads the value. In the rules it tells the
/// proxy's inbound leg, which must reach the workload, from an outbound leg that happens to lead to the pod's own
/// address, which must meet the inbound policy. Setting it needs no capability (`IP_TOS`, `IPV6_TCLASS`; ip(7)), and it
/// counts only on sockets of the proxy.
pub const WORKLOAD_TOS: u8 = 1 << 2;

/// What is captured in one network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Whose traffic is the proxy's own and is never captured.
    pub proxy: ProxyOwner,
    /// Connections towards the workload.
    pub inbound: Option<InboundCapture>,
    /// Connections of the workload.
    pub outbound: Option<OutboundCapture>,
    /// What becomes of traffic that is not TCP.
    pub udp: Udp,
    /// Name servers that the workload may ask in clear, over UDP and TCP, unless `udp` is `Refuse`. To any other host port
    /// 53 is like every port, so with an empty list no DNS passes.
    pub dns_servers: Vec<IpAddr>,
    /// How long a captured connection of which one side has finished may be silent before conntrack forgets it. Whole
    /// seconds, at least one.
    pub half_closed: Duration,
}

/// How the proxy's own traffic is known. Any of these is enough; at least one is set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProxyOwner {
    /// The user that the proxy runs as. No process of the workload may run as the same.
    pub uid: Option<u32>,
    /// The group that the proxy runs as. No process of the workload may be in it.
    pub gid: Option<u32>,
    /// The mark of the proxy's sockets (`SO_MARK`). Setting one takes CAP_NET_ADMIN or CAP_NET_RAW, which the workload
    /// must not have.
    pub mark: Option<u32>,
}

/// How inbound connections come to the capture port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InboundMode {
    /// The destination is rewritten. The proxy needs no capability.
    Redirect,
    /// The listener takes connections for foreign addresses (`IP_TRANSPARENT`, which takes CAP_NET_ADMIN).
    Tproxy {
        /// The mark of sockets towards the workload that carry the client's address. Not zero.
        mark: u32,
        /// The routing table that brings the workload's answers back to them. Not one of the kernel's own (253 to 255).
        table: u32,
        /// Whether the proxy dials the workload from the client's address. The source port must be another than the
        /// client's, or conntrack takes both for one connection.
        preserve_source: bool,
    },
}

/// The capture of connections towards the workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InboundCapture {
    /// The proxy's port, on the wildcard address.
    pub port: u16,
    /// How connections come to it.
    pub mode: InboundMode,
    /// Ports of this host (TCP and UDP) that stay as they are, the proxy's explicit listeners among them.
    pub skip_ports: Vec<u16>,
    /// Clients that reach the workload directly.
    pub skip_sources: Vec<IpNet>,
}

/// The capture of the workload's own connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboundCapture {
    /// The proxy's port, on `127.0.0.1` and `::1`.
    pub port: u16,
    /// Destination ports (TCP and UDP) that are reached directly.
    pub skip_ports: Vec<u16>,
    /// Destinations that are reached directly.
    pub skip_destinations: Vec<IpNet>,
    /// Users whose traffic is not captured.
    pub skip_uids: Vec<u32>,
    /// Groups whose traffic is not captured.
    pub skip_gids: Vec<u32>,
    /// Whether eBPF programs of the cgroup capture: there are no redirect rules for outbound connections then.
    pub by_cgroup: bool,
}

/// What becomes of the workload's traffic that is neither TCP nor ICMP, both ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Udp {
    /// Questions to the name servers pass, all else is refused.
    Dns,
    /// It passes.
    Allow,
    /// It is refused.
    Refuse,
}
