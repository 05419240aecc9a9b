//! From what a config declares to a [`Plan`].

use std::net::IpAddr;
use std::time::Duration;

use super::plan::{InboundCapture, InboundMode, OutboundCapture, Plan, ProxyOwner, Udp};
use crate::config::Config;
use crate::config::schema;

/// The proxy ends a half-closed connection before conntrack forgets it.
const SLACK: Duration = Duration::from_secs(60);

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

#[cfg(test)]
mod tests {
    use super::*;

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
