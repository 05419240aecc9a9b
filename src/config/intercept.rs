//! The part of the config that speaks of captured traffic: what is captured, whose traffic passes, and which listener
//! captured connections belong to.

use std::net::IpAddr;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::captured::Network;
use super::schema::PolicyMode;
use super::values::Span;
use crate::policy::http::pattern::HostPattern;

/// Transparent interception. `portcullis redirect apply` makes the rules of it, and the proxy serves what they capture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Intercept {
    /// Whose traffic is the proxy's own, and is not captured.
    #[serde(default)]
    pub proxy: ProxyOwner,
    /// Traffic towards the workload; not captured when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inbound: Option<InboundCapture>,
    /// Traffic from the workload; not captured when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outbound: Option<OutboundCapture>,
    /// What becomes of UDP and of everything else that is neither TCP nor ICMP.
    #[serde(default)]
    pub udp: Udp,
    /// The resolvers that DNS may go to; those of `/etc/resolv.conf` when absent. If that names none, no DNS passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns_servers: Option<Vec<IpAddr>>,
    /// How long a captured connection is held while there is no identity yet.
    #[serde(default = "hold")]
    pub hold: Span,
    /// How often it is looked at whether the rules stand.
    #[serde(default = "check_interval")]
    pub check_interval: Span,
    /// Not ready while the interception is not whole.
    #[serde(default)]
    pub require_interception: bool,
}

fn hold() -> Span {
    Span::seconds(10)
}

fn check_interval() -> Span {
    Span::seconds(5)
}

/// Whose traffic is the proxy's own: what has any of these.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProxyOwner {
    /// Its user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Its group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// The mark that its sockets carry (`SO_MARK`), for which it needs CAP_NET_ADMIN or CAP_NET_RAW.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<u32>,
}

impl Default for ProxyOwner {
    fn default() -> Self {
        Self { uid: Some(1337), gid: None, mark: None }
    }
}

/// Traffic towards the workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct InboundCapture {
    /// The port that captured connections come in at, on every address.
    #[schemars(range(min = 1))]
    pub port: u16,
    /// How they get there.
    pub mode: InboundMode,
    /// `tproxy` only: the workload sees the client's own address. Needs CAP_NET_ADMIN or CAP_NET_RAW in the proxy.
    pub preserve_source: bool,
    /// `tproxy` only: the mark of its packets.
    pub mark: u32,
    /// `tproxy` only: the routing table of its replies.
    pub table: u32,
    /// Ports that are not captured, beside those of declared listeners.
    pub skip_ports: Vec<u16>,
    /// Clients whose connections are not captured.
    pub skip_sources: Vec<Network>,
}

impl Default for InboundCapture {
    fn default() -> Self {
        Self {
            port: 15006,
            mode: InboundMode::Redirect,
            preserve_source: false,
            mark: 0x1506,
            table: 1506,
            skip_ports: Vec::new(),
            skip_sources: Vec::new(),
        }
    }
}

/// How captured inbound connections reach the proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum InboundMode {
    /// Their destination is translated; the proxy needs no capability.
    #[default]
    Redirect,
    /// They are handed over as they are. Needs CAP_NET_ADMIN or CAP_NET_RAW in the proxy.
    Tproxy,
}

/// Traffic from the workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OutboundCapture {
    /// The loopback port that captured connections come in at.
    #[schemars(range(min = 1))]
    pub port: u16,
    /// How they get there.
    pub mode: OutboundMode,
    /// `ebpf` only: the directory of the cgroup whose processes are captured; that of `redirect apply` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<PathBuf>,
    /// What becomes of connections that no outbound listener captures.
    pub unmatched: Unmatched,
    /// What becomes of TLS that the workload speaks itself when its server picks something below the profile.
    pub watch: PolicyMode,
    /// Destination ports that are not captured.
    pub skip_ports: Vec<u16>,
    /// Destinations that are not captured.
    pub skip_destinations: Vec<Network>,
    /// Users whose traffic is not captured.
    pub skip_uids: Vec<u32>,
    /// Groups whose traffic is not captured.
    pub skip_gids: Vec<u32>,
}

impl Default for OutboundCapture {
    fn default() -> Self {
        Self {
            port: 15001,
            mode: OutboundMode::Redirect,
            cgroup: None,
            unmatched: Unmatched::Refuse,
            watch: PolicyMode::Enforce,
            skip_ports: Vec::new(),
            skip_destinations: Vec::new(),
            skip_uids: Vec::new(),
            skip_gids: Vec::new(),
        }
    }
}

/// How captured outbound connections reach the proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OutboundMode {
    /// Their destination is translated.
    #[default]
    Redirect,
    /// eBPF programs of a cgroup send them there when they are opened. Needs a build with the feature `ebpf`.
    Ebpf,
}

/// What becomes of captured connections to somewhere undeclared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Unmatched {
    /// They are refused.
    #[default]
    Refuse,
    /// They pass if the workload speaks TLS itself, which is watched.
    Tls,
    /// They pass, in whatever is spoken.
    Passthrough,
}

/// What becomes of traffic that is neither TCP nor ICMP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Udp {
    /// DNS passes to the resolvers, the rest is refused.
    #[default]
    Dns,
    /// All of it passes.
    Allow,
    /// None of it passes.
    Refuse,
}

/// Which ports' captured connections an inbound listener serves: a list of ports, or `any`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CapturedPorts {
    /// Those that no other listener names.
    Any,
    /// These.
    Ports(Vec<u16>),
}

impl CapturedPorts {
    /// The ports that are named.
    pub fn named(&self) -> &[u16] {
        match self {
            Self::Any => &[],
            Self::Ports(ports) => ports,
        }
    }
}

impl std::fmt::Display for CapturedPorts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Any => f.write_str("any port"),
            Self::Ports(ports) => {
                f.write_str(if ports.len() == 1 { "port " } else { "ports " })?;
                for (index, port) in ports.iter().enumerate() {
                    write!(f, "{}{port}", if index == 0 { "" } else { ", " })?;
                }
                Ok(())
            }
        }
    }
}

/// Which captured connections of the workload belong to an outbound listener: those for which every key that is written
/// holds. The first listener in the file for which that is so takes them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CapturedDestinations {
    /// Addresses and networks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<Network>,
    /// DNS names, which the proxy resolves itself; their addresses count.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// Ports.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
    /// Hosts that the first HTTP request names; `*.nhs.example` stands for one label before the rest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub http_hosts: Vec<HostPattern>,
    /// Server names in the ClientHello of TLS that the workload speaks itself.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sni: Vec<HostPattern>,
}

impl std::fmt::Display for CapturedDestinations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let keys = [
            ("addresses", shown(&self.addresses)),
            ("names", shown(&self.names)),
            ("ports", shown(&self.ports)),
            ("http_hosts", shown(&self.http_hosts)),
            ("sni", shown(&self.sni)),
        ];
        let keys: Vec<String> =
            keys.into_iter().filter(|(_, of)| !of.is_empty()).map(|(key, of)| format!("{key} {of}")).collect();
        f.write_str(&keys.join("; "))
    }
}

/// The first few, and how many more.
fn shown<T: std::fmt::Display>(of: &[T]) -> String {
    const SHOWN: usize = 3;
    let first: Vec<String> = of.iter().take(SHOWN).map(ToString::to_string).collect();
    match of.len().saturating_sub(SHOWN) {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

impl CapturedDestinations {
    /// Whether only the first bytes tell if it matches.
    pub fn wants_bytes(&self) -> bool {
        !(self.http_hosts.is_empty() && self.sni.is_empty())
    }
}

/// What an outbound listener lets pass without mTLS of ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Passthrough {
    /// Nothing.
    #[default]
    Off,
    /// TLS that the workload speaks itself, which is watched.
    Tls,
    /// Anything, plaintext included.
    Any,
}

/// What becomes of a captured client that speaks no TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Plaintext {
    /// It is refused.
    #[default]
    Refuse,
    /// It is let through, counted and logged as what `refuse` would have refused.
    Audit,
    /// It is let through and counted.
    Allow,
}
