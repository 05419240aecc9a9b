//! Rules as text for nft(8): for review, and to be loaded by hand.

use std::fmt::Write;

use ipnet::IpNet;

use super::rules::{
    Action, Base, Chain, Family, Hook, ICMP, ICMPV6, Kind, Match, Rule, Ruleset, TABLE, TCP, Timeout, UDP, state,
};

/// The table as `nft -f` takes it. It replaces what is there in one transaction.
pub(super) fn text(ruleset: &Ruleset) -> String {
    let mut text = format!("add table inet {TABLE}\nflush table inet {TABLE}\ntable inet {TABLE} {{\n");
    for timeout in &ruleset.timeouts {
        text.push_str(&timeout_text(timeout));
    }
    for chain in &ruleset.chains {
        text.push_str(&chain_text(chain));
    }
    text.push_str("}\n");
    if let Some(routing) = ruleset.routing {
        for family in ["", "-6 "] {
            let (mark, table) = (routing.mark, routing.table);
            let _ = writeln!(text, "# Beside it: ip {family}rule add fwmark {mark:#x} lookup {table}");
            let _ = writeln!(text, "# Beside it: ip {family}route add local default dev lo table {table}");
        }
    }
    text
}

fn timeout_text(timeout: &Timeout) -> String {
    let Timeout { name, half_closed, .. } = timeout;
    format!(
        "\tct timeout {name} {{\n\t\tprotocol tcp\n\t\tl3proto {}\n\t\tpolicy = {{ fin_wait : {half_closed}, close_wait : \
         {half_closed} }}\n\t}}\n",
        family(timeout.family)
    )
}

fn chain_text(chain: &Chain) -> String {
    let mut text = format!("\tchain {} {{\n", chain.name);
    if let Some(Base { kind, hook, priority }) = chain.base {
        let kind = match kind {
            Kind::Filter => "filter",
            Kind::Nat => "nat",
            Kind::Route => "route",
        };
        let hook = match hook {
            Hook::Prerouting => "prerouting",
            Hook::Input => "input",
            Hook::Output => "output",
            Hook::Postrouting => "postrouting",
        };
        let _ = writeln!(text, "\t\ttype {kind} hook {hook} priority {priority}; policy accept;");
    }
    for rule in &chain.rules {
        let _ = writeln!(text, "\t\t{}", rule_text(rule));
    }
    text.push_str("\t}\n");
    text
}

fn rule_text(rule: &Rule) -> String {
    let matches = rule.matches.iter().map(match_text);
    let mut words: Vec<String> = matches.chain(rule.actions.iter().map(action_text)).collect();
    if !rule.comment.is_empty() {
        words.push(format!("comment \"{}\"", rule.comment));
    }
    words.join(" ")
}

fn family(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

fn protocol(protocol: u8) -> String {
    match protocol {
        TCP => "tcp".to_owned(),
        UDP => "udp".to_owned(),
        ICMP => "icmp".to_owned(),
        ICMPV6 => "ipv6-icmp".to_owned(),
        other => other.to_string(),
    }
}

fn match_text(condition: &Match) -> String {
    match *condition {
        Match::Family(Family::V4) => "meta nfproto ipv4".to_owned(),
        Match::Family(Family::V6) => "meta nfproto ipv6".to_owned(),
        Match::Protocol(number) => format!("meta l4proto {}", protocol(number)),
        Match::NotProtocol(number) => format!("meta l4proto != {}", protocol(number)),
        Match::Uid(uid) => format!("meta skuid {uid}"),
        Match::Gid(gid) => format!("meta skgid {gid}"),
        Match::NotUid(uid) => format!("meta skuid != {uid}"),
        Match::NotGid(gid) => format!("meta skgid != {gid}"),
        Match::Mark(mark) => format!("meta mark {mark:#x}"),
        Match::FromLoopback => "meta iif lo".to_owned(),
        Match::ToLoopback => "meta oif lo".to_owned(),
        Match::NotToLoopback => "meta oif != lo".to_owned(),
        Match::LocalDestination => "fib daddr type local".to_owned(),
        Match::ForeignDestination => "fib daddr type != local".to_owned(),
        Match::Source(net) => address("saddr", net),
        Match::Destination(net) => address("daddr", net),
        Match::SourcePort(number, port) => format!("{} sport {port}", protocol(number)),
        Match::DestinationPort(number, port) => format!("{} dport {port}", protocol(number)),
        Match::Dscp(of, dscp) => format!("{} dscp {dscp:#04x}", family(of)),
        Match::NotSyn => "tcp flags & syn != syn".to_owned(),
        Match::State(states) => format!("ct state {}", states_text(states)),
        Match::Translated => "ct status dnat".to_owned(),
        Match::Reply => "ct direction reply".to_owned(),
        Match::ConnectionMark(mark) => format!("ct mark {mark:#x}"),
    }
}

fn address(which: &str, net: IpNet) -> String {
    if net.prefix_len() == 0 {
        return match_text(&Match::Family(Family::of(net)));
    }
    format!("{} {which} {}", family(Family::of(net)), net.trunc())
}

fn states_text(states: u32) -> String {
    let names = [
        (state::INVALID, "invalid"),
        (state::ESTABLISHED, "established"),
        (state::NEW, "new"),
        (state::UNTRACKED, "untracked"),
    ];
    let names: Vec<&str> = names.iter().filter(|(bit, _)| states & bit != 0).map(|(_, name)| *name).collect();
    names.join(",")
}

fn action_text(action: &Action) -> String {
    match action {
        Action::Return => "return".to_owned(),
        Action::Accept => "accept".to_owned(),
        Action::Drop => "drop".to_owned(),
        Action::Reset => "reject with tcp reset".to_owned(),
        Action::Unreachable => "reject with icmpx type port-unreachable".to_owned(),
        Action::Redirect(port) => format!("redirect to :{port}"),
        Action::Tproxy(of, port) => format!("tproxy {} to :{port}", family(*of)),
        Action::Goto(chain) => format!("goto {chain}"),
        Action::Mark(mark) => format!("meta mark set {mark:#x}"),
        Action::MarkConnection(mark) => format!("ct mark set {mark:#x}"),
        Action::Timeout(name) => format!("ct timeout set \"{name}\""),
    }
}
