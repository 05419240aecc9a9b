//! Rules as text for iptables-restore and ip6tables-restore, with the meaning that they have in nf_tables.
//!
//! Three things differ. There is no `ct timeout` object without a program of its own (nfct): half-closed connections live
//! as long as `net.netfilter.nf_conntrack_tcp_timeout_close_wait` says. The target TPROXY drops what has no socket, so it
//! closes by itself, without a reset; connections older than the rules must pass before it. And each of the tables of one
//! family is replaced by itself.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::rules::{Action, Base, Chain, Family, Hook, ICMP, ICMPV6, Kind, Match, Rule, Ruleset, TCP, UDP, state};

/// What all chains of ours begin with.
pub(super) const PREFIX: &str = "PORTCULLIS_";
/// The tables, in the order in which they are restored.
pub(super) const TABLES: [&str; 3] = ["mangle", "nat", "filter"];

/// What a save shows of us: names with their table.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Present {
    /// Chains of ours.
    pub(super) chains: BTreeSet<(String, String)>,
    /// Built-in chains that jump to ours, and which, in the table.
    pub(super) jumps: BTreeSet<(String, String, String)>,
}

/// The table that a chain is in.
pub(super) fn table_of(chain: &Chain) -> &'static str {
    match chain.base {
        None | Some(Base { kind: Kind::Nat, .. }) => "nat",
        Some(Base { kind: Kind::Filter, hook: Hook::Input | Hook::Output, .. }) => "filter",
        Some(_) => "mangle",
    }
}

/// The built-in chain that jumps to a chain.
pub(super) fn built_in(chain: &Chain) -> Option<&'static str> {
    chain.base.map(|base| match base.hook {
        Hook::Prerouting => "PREROUTING",
        Hook::Input => "INPUT",
        Hook::Output => "OUTPUT",
        Hook::Postrouting => "POSTROUTING",
    })
}

/// The name of a chain. At most 28 bytes.
pub(super) fn name_of(chain: &Chain) -> String {
    built_in(chain).map_or_else(|| own(chain.name), own)
}

fn own(name: &str) -> String {
    format!("{PREFIX}{}", name.to_ascii_uppercase())
}

/// The rules, for a system on which this of ours is present already.
pub(super) fn text(ruleset: &Ruleset, family: Family, present: &Present) -> String {
    let mut text = String::from(
        "# For iptables-restore --noflush (ip6tables-restore). Half-closed connections live as long as\n\
         # net.netfilter.nf_conntrack_tcp_timeout_close_wait says: a timeout of their own takes nfct(8) here.\n",
    );
    for table in TABLES {
        let chains: Vec<&Chain> = ruleset.chains.iter().filter(|chain| table_of(chain) == table).collect();
        let stale = stale(table, &chains, present);
        if chains.is_empty() && stale.is_empty() {
            continue;
        }
        let _ = writeln!(text, "*{table}");
        for chain in &chains {
            let _ = writeln!(text, ":{} - [0:0]", name_of(chain));
        }
        for chain in &chains {
            for line in chain.rules.iter().filter_map(|rule| rule_text(rule, family, table)).flatten() {
                let _ = writeln!(text, "-A {} {line}", name_of(chain));
            }
        }
        for chain in &chains {
            let Some(from) = built_in(chain) else { continue };
            let jump = (table.to_owned(), from.to_owned(), name_of(chain));
            if !present.jumps.contains(&jump) {
                // In front: somebody's earlier ACCEPT would let traffic by.
                let _ = writeln!(text, "-I {from} 1 -j {}", jump.2);
            }
        }
        text.push_str(&stale);
        text.push_str("COMMIT\n");
    }
    text
}

/// Lines that remove what is not wanted any more in a table. All jumps go before the first chain does.
fn stale(table: &str, chains: &[&Chain], present: &Present) -> String {
    let wanted = |name: &str| chains.iter().any(|chain| name_of(chain) == name);
    let mut text = String::new();
    for (_, from, to) in present.jumps.iter().filter(|(of, _, to)| of == table && !wanted(to)) {
        let _ = writeln!(text, "-D {from} -j {to}");
    }
    let chains = || present.chains.iter().filter(|(of, name)| of == table && !wanted(name));
    for verb in ["-F", "-X"] {
        for (_, name) in chains() {
            let _ = writeln!(text, "{verb} {name}");
        }
    }
    text
}

/// The lines of a rule, without the chain; none where it is for the other family or cannot be said.
fn rule_text(rule: &Rule, family: Family, table: &str) -> Option<Vec<String>> {
    let mut matches = Vec::new();
    let mut protocol = None;
    for condition in &rule.matches {
        matches.extend(match_text(condition, family, &mut protocol)?);
    }
    let target = rule.actions.iter().find_map(|action| action_text(action, family, table))?;
    if !rule.comment.is_empty() {
        matches.push(format!("-m comment --comment \"{}\"", rule.comment));
    }
    let line = |between: &str, target: &str| {
        let parts = protocol.iter().chain(&matches).map(String::as_str).chain([between, target]);
        parts.filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
    };
    let mut lines = Vec::new();
    if target.starts_with("-j TPROXY") {
        let older = "-m tcp ! --tcp-flags SYN SYN -m conntrack --ctstate ESTABLISHED -m socket";
        lines.push(line(older, "-j RETURN"));
    }
    lines.push(line("", &target));
    Some(lines)
}

/// How a match is said. The outer `None`: the rule is for the other family.
fn match_text(condition: &Match, family: Family, protocol: &mut Option<String>) -> Option<Option<String>> {
    let ours = |of: Family| (of == family).then_some(());
    Some(match *condition {
        Match::Family(of) => {
            ours(of)?;
            None
        }
        Match::Protocol(number) => {
            match number {
                ICMP => ours(Family::V4)?,
                ICMPV6 => ours(Family::V6)?,
                _ => {}
            }
            *protocol = Some(format!("-p {}", protocol_name(number)));
            None
        }
        Match::NotProtocol(number) => {
            *protocol = Some(format!("! -p {}", protocol_name(number)));
            None
        }
        Match::Uid(uid) => Some(format!("-m owner --uid-owner {uid}")),
        Match::Gid(gid) => Some(format!("-m owner --gid-owner {gid}")),
        // Where no socket sends, such as with a reset, the user is another one to this match, unless it asks for a socket.
        Match::NotUid(uid) => Some(format!("-m owner --socket-exists ! --uid-owner {uid}")),
        Match::NotGid(gid) => Some(format!("-m owner --socket-exists ! --gid-owner {gid}")),
        Match::Mark(mark) => Some(format!("-m mark --mark {mark:#x}")),
        Match::FromLoopback => Some("-i lo".to_owned()),
        Match::ToLoopback => Some("-o lo".to_owned()),
        Match::NotToLoopback => Some("! -o lo".to_owned()),
        Match::LocalDestination => Some("-m addrtype --dst-type LOCAL".to_owned()),
        Match::ForeignDestination => Some("-m addrtype ! --dst-type LOCAL".to_owned()),
        Match::Source(net) => {
            ours(Family::of(net))?;
            Some(format!("-s {}", net.trunc()))
        }
        Match::Destination(net) => {
            ours(Family::of(net))?;
            Some(format!("-d {}", net.trunc()))
        }
        Match::SourcePort(number, port) => Some(port_text(number, "sport", port, protocol)),
        Match::DestinationPort(number, port) => Some(port_text(number, "dport", port, protocol)),
        Match::Dscp(of, dscp) => {
            ours(of)?;
            Some(format!("-m dscp --dscp {dscp:#04x}"))
        }
        Match::NotSyn => {
            *protocol = Some("-p tcp".to_owned());
            Some("-m tcp ! --tcp-flags SYN SYN".to_owned())
        }
        Match::State(states) => Some(format!("-m conntrack --ctstate {}", states_text(states))),
        Match::Translated => Some("-m conntrack --ctstate DNAT".to_owned()),
        Match::Reply => Some("-m conntrack --ctdir REPLY".to_owned()),
        Match::ConnectionMark(mark) => Some(format!("-m connmark --mark {mark:#x}")),
    })
}

fn port_text(number: u8, which: &str, port: u16, protocol: &mut Option<String>) -> String {
    let name = protocol_name(number);
    *protocol = Some(format!("-p {name}"));
    format!("-m {name} --{which} {port}")
}

fn protocol_name(number: u8) -> String {
    match number {
        TCP => "tcp".to_owned(),
        UDP => "udp".to_owned(),
        ICMP => "icmp".to_owned(),
        ICMPV6 => "ipv6-icmp".to_owned(),
        other => other.to_string(),
    }
}

fn states_text(states: u32) -> String {
    // In the order in which the save programs write them.
    let names = [
        (state::INVALID, "INVALID"),
        (state::NEW, "NEW"),
        (state::ESTABLISHED, "ESTABLISHED"),
        (state::UNTRACKED, "UNTRACKED"),
    ];
    let names: Vec<&str> = names.iter().filter(|(bit, _)| states & bit != 0).map(|(_, name)| *name).collect();
    names.join(",")
}

/// The target of an action; none where iptables has no word for it.
fn action_text(action: &Action, family: Family, table: &str) -> Option<String> {
    Some(match action {
        Action::Return => "-j RETURN".to_owned(),
        Action::Accept => "-j ACCEPT".to_owned(),
        // REJECT is of the table `filter` only.
        Action::Reset if table == "filter" => "-j REJECT --reject-with tcp-reset".to_owned(),
        Action::Drop | Action::Reset => "-j DROP".to_owned(),
        // What REJECT does by itself. The save programs write it out.
        Action::Unreachable if family == Family::V4 => "-j REJECT --reject-with icmp-port-unreachable".to_owned(),
        Action::Unreachable => "-j REJECT --reject-with icmp6-port-unreachable".to_owned(),
        Action::Redirect(port) => format!("-j REDIRECT --to-ports {port}"),
        Action::Tproxy(_, port) => format!("-j TPROXY --on-port {port} --tproxy-mark 0x0/0x0"),
        Action::Goto(chain) => format!("-g {}", own(chain)),
        Action::Mark(mark) => format!("-j MARK --set-mark {mark:#x}"),
        Action::MarkConnection(mark) => format!("-j CONNMARK --set-mark {mark:#x}"),
        Action::Timeout(_) => return None,
    })
}
