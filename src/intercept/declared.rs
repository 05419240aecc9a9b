//! From what a config declares to a [`Plan`].

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use super::plan::{InboundCapture, InboundMode, OutboundCapture, Plan, ProxyOwner, Udp};
use crate::config::Config;
use crate::config::schema;

/// The proxy ends a half-closed connection before conntrack forgets it.
const SLACK: Duration = Duration::from_secs(60);
/// Where the resolvers are declared that the C library asks: resolv.conf(5).
pub const RESOLV_CONF: &str = "/etc/resolv.conf";
/// More than the C library ever asks (`MAXNS` is 3), and as much as is read of the file.
const MAX_RESOLVERS: usize = 16;
const MAX_RESOLV_CONF: u64 = 64 * 1024;

impl Plan {
    /// What `config` declares to be captured; none if nothing is. `resolvers` are where DNS may go if it does not say.
    pub fn declared(config: &Config, resolvers: &[IpAddr]) -> Option<Self> {
        let intercept = config.intercept.as_ref()?;
        let inbound = intercept.inbound.as_ref().map(|inbound| InboundCapture {
            port: inbound.port,
            mode: match inbound.mode {
                schema::InboundMode::Redirect => InboundMode::Redirect,
                schema::InboundMode::Tproxy => InboundMode::Tproxy {
                    mark: inbound.mark,
                    table: inbound.table,
                    preserve_source: inbound.preserve_source,
                },
            },
            skip_ports: {
                let mut ports = inbound.skip_ports.clone();
                // What listens on loopback cannot be reached from elsewhere, and its port at other addresses is not ours.
                let own = config.inbound.iter().filter_map(|listener| listener.listen).chain([config.admin.listen]);
                ports.extend(own.filter(|own| !own.ip().to_canonical().is_loopback()).map(|own| own.port()));
                ports.sort_unstable();
                ports.dedup();
                ports
            },
            skip_sources: inbound.skip_sources.iter().map(|network| network.0).collect(),
        });
        let outbound = intercept.outbound.as_ref().map(|outbound| OutboundCapture {
            port: outbound.port,
            skip_ports: outbound.skip_ports.clone(),
            skip_destinations: outbound.skip_destinations.iter().map(|network| network.0).collect(),
            skip_uids: outbound.skip_uids.clone(),
            skip_gids: outbound.skip_gids.clone(),
            by_cgroup: outbound.mode == schema::OutboundMode::Ebpf,
        });
        Some(Self {
            proxy: ProxyOwner { uid: intercept.proxy.uid, gid: intercept.proxy.gid, mark: intercept.proxy.mark },
            inbound,
            outbound,
            udp: match intercept.udp {
                schema::Udp::Dns => Udp::Dns,
                schema::Udp::Allow => Udp::Allow,
                schema::Udp::Refuse => Udp::Refuse,
            },
            dns_servers: intercept.dns_servers.clone().unwrap_or_else(|| resolvers.to_vec()),
            half_closed: half_closed(config) + SLACK,
        })
    }
}

/// The longest time that any listener gives a connection of which one side has finished.
fn half_closed(config: &Config) -> Duration {
    let inbound = config.inbound.iter().map(|listener| &listener.connections);
    let overrides = inbound.chain(config.outbound.iter().map(|listener| &listener.connections));
    let longest = overrides.filter_map(|over| over.half_closed_timeout).max();
    longest.map_or(config.connections.half_closed_timeout, |span| span.max(config.connections.half_closed_timeout)).0
}

/// The resolvers that a file names in the form of resolv.conf(5), at most 16; none if it cannot be read.
pub fn resolvers(path: &Path) -> Vec<IpAddr> {
    use std::io::Read;
    let mut text = Vec::new();
    if let Ok(file) = std::fs::File::open(path) {
        let _ = file.take(MAX_RESOLV_CONF).read_to_end(&mut text);
    }
    resolvers_in(&String::from_utf8_lossy(&text))
}

fn resolvers_in(text: &str) -> Vec<IpAddr> {
    let server = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let address = words.next().filter(|key| *key == "nameserver").and_then(|_| words.next())?;
        // A link-local address may name its interface.
        address.split('%').next()?.parse().ok()
    };
    text.lines().filter_map(server).take(MAX_RESOLVERS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_are_read_as_the_c_library_reads_them() {
        let text = "# nameserver 192.0.2.1\nsearch a.example\n nameserver 10.96.0.10\nnameserver fe80::1%eth0 # x\n\
                    nameserver\nnameserver nonsense\nnameservers 192.0.2.2\nnameserver\t::1\n";
        let found: Vec<String> = resolvers_in(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.96.0.10", "fe80::1", "::1"]);
        assert_eq!(resolvers_in(&"nameserver 192.0.2.1\n".repeat(100)).len(), MAX_RESOLVERS);
        assert!(resolvers(Path::new("/nonexistent/resolv.conf")).is_empty());
    }

    #[test]
    fn listeners_of_their_own_are_not_captured() {
        let text = "identity: unix:///a\nadmin: { listen: '0.0.0.0:9902' }\n\
                    intercept: { inbound: { skip_ports: [22, 8443] }, udp: refuse }\n\
                    inbound: [{ name: a, listen: '0.0.0.0:8443', to: '127.0.0.1:1', allow: ['spiffe://td'] },\n\
                              { name: b, capture: any, allow: ['spiffe://td'] },\
                              { name: c, listen: '127.0.0.1:8080', to: '127.0.0.1:1', allow: ['spiffe://td'] },\
                              { name: d, listen: '[::1]:8081', to: '127.0.0.1:1', allow: ['spiffe://td'] },\
                              { name: e, listen: '[::ffff:127.0.0.2]:8082', to: '127.0.0.1:1', \
                                allow: ['spiffe://td'] }]";
        let config = crate::config::parse(text, "f.yaml").unwrap().config;
        let plan = Plan::declared(&config, &["192.0.2.53".parse().unwrap()]).unwrap();
        assert_eq!(plan.inbound.unwrap().skip_ports, [22, 8443, 9902]);
        assert_eq!((plan.outbound, plan.udp, plan.dns_servers.len()), (None, Udp::Refuse, 1));
        assert_eq!(plan.proxy.uid, Some(1337));
    }
}
