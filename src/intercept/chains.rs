//! The rules of a [`Plan`].
//!
//! Each chain is one idea, and its function says why each rule is there. Lists become a rule an entry: the chains that
//! have many see only the first packet of a connection.
//!
//! The order at a hook: conntrack (-200), then `*_filter` at -150, NAT at -100, then filters at 0, which see the
//! destination as NAT has left it.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::plan::{InboundCapture, InboundMode, OutboundCapture, Plan, ProxyOwner, Udp, WORKLOAD_TOS};
use super::rules::{
    Action, Base, Chain, Family, Hook, ICMP, ICMPV6, Kind, Match, Routing, Rule, Ruleset, TCP, Timeout, UDP, state,
};

/// NF_IP_PRI_MANGLE: after conntrack, before NAT.
const MANGLE: i32 = -150;
/// NF_IP_PRI_NAT_DST.
const DSTNAT: i32 = -100;
/// NF_IP_PRI_FILTER.
const FILTER: i32 = 0;
const DNS: u16 = 53;
/// The chain for the proxy's own connections.
const FROM_PROXY: &str = "from_proxy";

/// The rules of a plan.
pub(super) fn ruleset(plan: &Plan) -> Ruleset {
    let chains = [
        from_proxy(plan),
        output_nat(plan),
        plan.inbound.as_ref().and_then(prerouting_nat),
        plan.inbound.as_ref().map(|inbound| prerouting(plan, inbound)),
        plan.inbound.as_ref().and_then(|inbound| output_mark(plan, inbound)),
        output(plan),
        plan.inbound.as_ref().map(|inbound| input(plan, inbound)),
        postrouting(plan),
    ];
    Ruleset {
        timeouts: Family::BOTH.map(|family| Timeout::new(family, plan.half_closed)).to_vec(),
        chains: chains.into_iter().flatten().collect(),
        routing: routing(plan),
    }
}

fn routing(plan: &Plan) -> Option<Routing> {
    match plan.inbound.as_ref()?.mode {
        InboundMode::Tproxy { mark, table, preserve_source: true } => Some(Routing { mark, table }),
        _ => None,
    }
}

/// The proxy's own connections pass, but for those to an address of this host: a service of ours called by its own
/// address meets the inbound policy like anybody's call. The leg to the workload itself is known by its DSCP.
fn from_proxy(plan: &Plan) -> Option<Chain> {
    let inbound = plan.inbound.as_ref()?;
    let mut rules = Vec::new();
    for family in Family::BOTH {
        rules.push(rule([Match::Dscp(family, WORKLOAD_TOS >> 2)], Action::Return, "the proxy calls its workload"));
    }
    rules.extend(loopback_passes());
    rules.extend(ports_pass(TCP, &inbound.skip_ports));
    rules.push(own_address(inbound));
    Some(Chain { name: FROM_PROXY, base: None, rules })
}

fn own_address(inbound: &InboundCapture) -> Rule {
    let matches = [Match::Protocol(TCP), Match::LocalDestination];
    rule(matches, Action::Redirect(inbound.port), "our own address meets the inbound policy")
}

/// Outbound connections go to the capture port. What a redirect rewrites it sends to 127.0.0.1 or ::1.
fn output_nat(plan: &Plan) -> Option<Chain> {
    let redirected = plan.outbound.as_ref().filter(|outbound| !outbound.by_cgroup);
    if plan.inbound.is_none() && redirected.is_none() {
        return None;
    }
    let mut rules = vec![only_tcp()];
    let proxy = || if plan.inbound.is_some() { Action::Goto(FROM_PROXY) } else { Action::Return };
    rules.extend(owners(plan).map(|owner| rule([owner], proxy(), "the proxy itself")));
    if let Some(outbound) = redirected {
        rules.extend(users_pass(outbound));
        rules.extend(loopback_passes());
        rules.extend(destinations_pass(outbound));
        rules.extend(ports_pass(TCP, &outbound.skip_ports));
        rules.extend(name_servers_pass(plan));
        rules.push(rule([Match::Protocol(TCP)], Action::Redirect(outbound.port), "outbound capture"));
    } else if let (Some(inbound), None) = (&plan.inbound, &plan.outbound) {
        // Who calls the workload by this host's address comes by its inbound policy, also where nothing that leaves is
        // captured.
        rules.extend(loopback_passes());
        rules.extend(ports_pass(TCP, &inbound.skip_ports));
        rules.push(own_address(inbound));
    }
    Some(Chain { name: "output_nat", base: base(Kind::Nat, Hook::Output, DSTNAT), rules })
}

/// Name servers over TCP.
fn name_servers_pass(plan: &Plan) -> impl Iterator<Item = Rule> {
    plan.dns_servers.iter().filter(|_| plan.udp != Udp::Refuse).map(|server| {
        let matches = [Match::Destination(IpNet::from(*server)), Match::DestinationPort(TCP, DNS)];
        rule(matches, Action::Return, "a name server")
    })
}

/// Inbound connections to addresses of this host go to the capture port; what is only routed through is not ours.
fn prerouting_nat(inbound: &InboundCapture) -> Option<Chain> {
    if inbound.mode != InboundMode::Redirect {
        return None;
    }
    let mut rules = vec![only_tcp(), from_here()];
    rules.extend(to_us(inbound));
    rules.push(rule([Match::Protocol(TCP)], Action::Redirect(inbound.port), "inbound capture"));
    Some(Chain { name: "prerouting_nat", base: base(Kind::Nat, Hook::Prerouting, DSTNAT), rules })
}

/// What must not be captured, before NAT gets it. A segment that conntrack knows nothing of is not rewritten, so it would
/// hit a port without a socket and the kernel would reset the connection. And what is rewritten is routed by its new
/// destination, so the kernel would never see that it came from elsewhere for 127.0.0.1, whose ports are private.
/// Transparent capture is here too, because the destination must still be the original one.
fn prerouting(plan: &Plan, inbound: &InboundCapture) -> Chain {
    let mut rules = vec![only_tcp(), from_here()];
    rules.extend(
        loopback().map(|net| rule([Match::Destination(net)], Action::Drop, "loopback is for those who are here")),
    );
    if inbound.mode == InboundMode::Redirect {
        // Nearly all packets leave the chain here, before the lists.
        rules.push(rule([Match::State(state::ESTABLISHED | state::NEW)], Action::Return, "conntrack knows it"));
    }
    rules.extend(to_us(inbound));
    rules.push(rule([Match::State(state::INVALID | state::UNTRACKED)], Action::Drop, "cannot be captured"));
    if let InboundMode::Tproxy { .. } = inbound.mode {
        // Answers to connections that were opened from here.
        rules.push(rule([Match::Reply], Action::Return, "answers to our own connections"));
        // Captured by redirection before, and known to NAT only: the listener would take such a segment for its own.
        rules.push(rule([Match::Translated], Action::Return, "redirected before these rules"));
        // Looks for the connection's own socket first, for a listener then; so all its segments come by here, the last
        // one of a handshake by SYN cookie too, which no socket knows yet.
        for family in Family::BOTH {
            rules.push(Rule {
                matches: vec![Match::Family(family), Match::Protocol(TCP)],
                actions: vec![
                    Action::Tproxy(family, inbound.port),
                    Action::Timeout(Timeout::new(family, plan.half_closed).name),
                    Action::Accept,
                ],
                comment: "inbound capture",
            });
        }
        // Here are only packets for which the proxy has no socket. Connections older than these rules live on; what
        // could open one does not pass, or the gate would stand open whenever nobody listens.
        let older = [Match::NotSyn, Match::State(state::ESTABLISHED)];
        rules.push(rule(older, Action::Return, "older than these rules"));
        rules.push(rule([Match::Protocol(TCP)], Action::Reset, "nobody listens at the capture port"));
    }
    Chain { name: "prerouting_filter", base: base(Kind::Filter, Hook::Prerouting, MANGLE), rules }
}

/// The workload answers to the client's address when the proxy has dialled from there. The answers belong to the proxy:
/// they get the mark that policy routing delivers here.
fn output_mark(plan: &Plan, inbound: &InboundCapture) -> Option<Chain> {
    let InboundMode::Tproxy { mark, preserve_source: true, .. } = inbound.mode else { return None };
    let mut rules = Vec::new();
    for family in Family::BOTH {
        rules.push(Rule {
            matches: vec![Match::Family(family), Match::Protocol(TCP), Match::Mark(mark), Match::State(state::NEW)],
            actions: vec![Action::MarkConnection(mark), Action::Timeout(Timeout::new(family, plan.half_closed).name)],
            comment: "the proxy calls from the address of the client",
        });
    }
    let answers = [Match::Reply, Match::ConnectionMark(mark)];
    rules.push(rule(answers, Action::Mark(mark), "answers to the client come to the proxy"));
    Some(Chain { name: "output_mark", base: base(Kind::Route, Hook::Output, MANGLE), rules })
}

/// What leaves without having been captured: segments that conntrack does not know are not rewritten and would leave in
/// clear, and what is not TCP passes by the gate altogether.
fn output(plan: &Plan) -> Option<Chain> {
    let mut rules = Vec::new();
    let captures_tcp = plan.outbound.as_ref().filter(|outbound| !outbound.by_cgroup);
    let ports = [captures_tcp.map(|outbound| outbound.port), plan.inbound.as_ref().map(|inbound| inbound.port)];
    for port in ports.into_iter().flatten() {
        let answer = [Match::SourcePort(TCP, port), Match::State(state::INVALID)];
        rules.push(rule(answer, Action::Drop, "would not come from the address that was called"));
    }
    for port in ports.into_iter().flatten() {
        rules.extend(impostor(plan, port));
        rules.extend(half_closed(plan, port));
    }
    // Its own legs are not rewritten. But the next segment of one that conntrack has forgotten is to it the first of a
    // new connection, which is captured: what the workload says on the inbound leg, or a server on the outbound one.
    for owner in owners(plan) {
        rules.extend(Family::BOTH.map(|family| Rule {
            matches: vec![Match::Family(family), Match::Protocol(TCP), owner, Match::State(state::NEW)],
            actions: vec![Action::Timeout(Timeout::new(family, plan.half_closed).name)],
            comment: "how long it may be half closed",
        }));
    }
    if let Some(outbound) = &plan.outbound {
        rules.extend(uncaptured(plan, outbound));
    }
    if rules.is_empty() {
        return None;
    }
    Some(Chain { name: "output_filter", base: base(Kind::Filter, Hook::Output, FILTER), rules })
}

/// While no proxy runs, anybody may listen on its port, and would be sent what was captured. Nobody else's answer leaves:
/// there is no connection. Root is none of them: what socket activation hands over is root's. A mark says nothing of who
/// listens, so there is no such rule where that is declared.
fn impostor(plan: &Plan, port: u16) -> Option<Rule> {
    let ProxyOwner { uid, gid, mark: None } = plan.proxy else { return None };
    let others = [uid.map(Match::NotUid), gid.map(Match::NotGid)];
    if others.iter().all(Option::is_none) {
        return None;
    }
    let always = [Match::SourcePort(TCP, port), Match::NotUid(0)];
    let matches = always.into_iter().chain(others.into_iter().flatten()).collect();
    Some(Rule { matches, actions: vec![Action::Drop], comment: "somebody else has the port of the proxy" })
}

fn uncaptured(plan: &Plan, outbound: &OutboundCapture) -> Vec<Rule> {
    // Most packets leave the chain here.
    let known = [Match::Protocol(TCP), Match::State(state::ESTABLISHED)];
    let mut rules = vec![rule(known, Action::Return, "captured already, or older than these rules")];
    rules.extend(owners(plan).map(|owner| rule([owner], Action::Return, "the proxy itself")));
    rules.extend(users_pass(outbound));
    rules.extend(loopback_passes());
    rules.extend(destinations_pass(outbound));
    rules.extend(ports_pass(TCP, &outbound.skip_ports));
    if outbound.by_cgroup {
        rules.extend(name_servers_pass(plan));
        // What the programs have captured goes to loopback. The rest comes from a process outside their cgroup.
        rules.push(rule([Match::NotSyn], Action::Return, "older than these rules"));
        rules.push(rule([Match::Protocol(TCP)], Action::Reset, "opened outside the cgroup that is captured"));
    } else {
        let lost = [Match::Protocol(TCP), Match::State(state::INVALID | state::UNTRACKED)];
        rules.push(rule(lost, Action::Drop, "would leave uncaptured"));
        rules.push(rule([Match::Protocol(TCP)], Action::Return, ""));
    }
    if plan.udp == Udp::Allow {
        return rules;
    }
    rules.push(rule([Match::ToLoopback], Action::Return, "stays here"));
    rules.extend(icmp_passes());
    rules.push(rule([Match::Reply], Action::Return, "answers"));
    rules.extend(ports_pass(UDP, &outbound.skip_ports));
    if plan.udp == Udp::Dns {
        for server in &plan.dns_servers {
            let matches = [Match::Destination(IpNet::from(*server)), Match::DestinationPort(UDP, DNS)];
            rules.push(rule(matches, Action::Return, "a name server"));
        }
    }
    rules.push(rule([], Action::Unreachable, "only TCP passes the gate"));
    rules
}

/// What comes in and is not TCP passes by the gate as well.
fn input(plan: &Plan, inbound: &InboundCapture) -> Chain {
    let mut rules = Vec::new();
    if inbound.mode == InboundMode::Redirect {
        rules.extend(half_closed(plan, inbound.port));
    }
    rules.push(rule([Match::Protocol(TCP)], Action::Return, ""));
    if plan.udp != Udp::Allow {
        rules.push(from_here());
        rules.extend(icmp_passes());
        rules.push(rule([Match::State(state::ESTABLISHED)], Action::Return, "answers"));
        rules.extend(sources_pass(inbound));
        rules.extend(ports_pass(UDP, &inbound.skip_ports));
        rules.push(rule([], Action::Unreachable, "only TCP passes the gate"));
    }
    Chain { name: "input_filter", base: base(Kind::Filter, Hook::Input, FILTER), rules }
}

/// A socket that is bound to a device keeps to it although the redirect leads to loopback, and its first segment would be
/// seen on the wire.
fn postrouting(plan: &Plan) -> Option<Chain> {
    plan.outbound.as_ref().filter(|outbound| !outbound.by_cgroup)?;
    let rules = loopback().map(|net| {
        rule([Match::NotToLoopback, Match::Destination(net)], Action::Drop, "captured, but bound to a device")
    });
    Some(Chain {
        name: "postrouting_filter",
        base: base(Kind::Filter, Hook::Postrouting, FILTER),
        rules: rules.to_vec(),
    })
}

/// Connections to a capture port outlive a long silence of one side. Conntrack takes the object before it has confirmed
/// the connection only.
fn half_closed(plan: &Plan, port: u16) -> Vec<Rule> {
    Family::BOTH
        .into_iter()
        .map(|family| Rule {
            matches: vec![Match::Family(family), Match::DestinationPort(TCP, port), Match::State(state::NEW)],
            actions: vec![Action::Timeout(Timeout::new(family, plan.half_closed).name)],
            comment: "how long it may be half closed",
        })
        .collect()
}

/// Past these rules are connections to an address of this host that are to be captured.
fn to_us(inbound: &InboundCapture) -> Vec<Rule> {
    let mut rules = vec![rule([Match::ForeignDestination], Action::Return, "not for this host")];
    rules.extend(sources_pass(inbound));
    rules.extend(ports_pass(TCP, &inbound.skip_ports));
    rules
}

fn from_here() -> Rule {
    rule([Match::FromLoopback], Action::Return, "from here")
}

fn rule<const N: usize>(matches: [Match; N], action: Action, comment: &'static str) -> Rule {
    Rule { matches: matches.to_vec(), actions: vec![action], comment }
}

#[expect(clippy::unnecessary_wraps, reason = "a chain either has a base or not")]
fn base(kind: Kind, hook: Hook, priority: i32) -> Option<Base> {
    Some(Base { kind, hook, priority })
}

fn only_tcp() -> Rule {
    rule([Match::NotProtocol(TCP)], Action::Return, "")
}

fn owners(plan: &Plan) -> impl Iterator<Item = Match> {
    let owner = &plan.proxy;
    [owner.uid.map(Match::Uid), owner.gid.map(Match::Gid), owner.mark.map(Match::Mark)].into_iter().flatten()
}

fn users_pass(outbound: &OutboundCapture) -> impl Iterator<Item = Rule> {
    let users = outbound.skip_uids.iter().map(|uid| Match::Uid(*uid));
    let groups = outbound.skip_gids.iter().map(|gid| Match::Gid(*gid));
    users.chain(groups).map(|who| rule([who], Action::Return, "skipped user"))
}

fn loopback() -> [IpNet; 2] {
    [
        IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)),
        IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128)),
    ]
}

/// Other addresses of this host, such as an alias on the loopback interface, are not meant.
fn loopback_passes() -> impl Iterator<Item = Rule> {
    loopback().into_iter().map(|net| rule([Match::Destination(net)], Action::Return, "loopback"))
}

fn destinations_pass(outbound: &OutboundCapture) -> impl Iterator<Item = Rule> {
    outbound.skip_destinations.iter().map(|net| rule([Match::Destination(*net)], Action::Return, "skipped destination"))
}

fn sources_pass(inbound: &InboundCapture) -> impl Iterator<Item = Rule> {
    inbound.skip_sources.iter().map(|net| rule([Match::Source(*net)], Action::Return, "skipped source"))
}

fn ports_pass(protocol: u8, ports: &[u16]) -> impl Iterator<Item = Rule> {
    ports.iter().map(move |port| rule([Match::DestinationPort(protocol, *port)], Action::Return, "skipped port"))
}

fn icmp_passes() -> impl Iterator<Item = Rule> {
    [ICMP, ICMPV6].into_iter().map(|protocol| rule([Match::Protocol(protocol)], Action::Return, ""))
}
