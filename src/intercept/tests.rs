use std::time::Duration;

use super::rules::{Family, Ruleset};
use super::*;

/// A plan with something in each list.
pub(super) fn everything() -> Plan {
    Plan {
        proxy: ProxyOwner { uid: Some(1337), gid: Some(1338), mark: Some(0x1337) },
        inbound: Some(InboundCapture {
            port: 15006,
            mode: InboundMode::Redirect,
            skip_ports: vec![22],
            skip_sources: vec!["198.51.100.0/25".parse().unwrap(), "2001:db8:1::/64".parse().unwrap()],
        }),
        outbound: Some(OutboundCapture {
            port: 15001,
            skip_ports: vec![25],
            skip_destinations: vec!["203.0.113.0/24".parse().unwrap(), "2001:db8:2::/61".parse().unwrap()],
            skip_uids: vec![42],
            skip_gids: vec![43],
            by_cgroup: false,
        }),
        udp: Udp::Dns,
        dns_servers: vec!["192.0.2.53".parse().unwrap(), "2001:db8::53".parse().unwrap()],
        half_closed: Duration::from_secs(3600),
    }
}

/// The same, with inbound connections handed over as they are.
pub(super) fn transparent() -> Plan {
    let mut plan = everything();
    let mode = InboundMode::Tproxy { mark: 0x1506, table: 1506, preserve_source: true };
    plan.inbound.as_mut().unwrap().mode = mode;
    plan
}

fn chain(text: &str, name: &str) -> Vec<String> {
    let from = text.split(&format!("\tchain {name} {{\n")).nth(1).unwrap_or_default();
    let lines = from.lines().take_while(|line| *line != "\t}");
    lines.map(|line| line.split(" comment ").next().unwrap().trim().to_owned()).collect()
}

#[test]
fn what_the_proxy_opens_passes_unless_it_leads_to_the_pod_itself() {
    assert_eq!(
        chain(&nft_text(&everything()), "from_proxy"),
        [
            "ip dscp 0x01 return",
            "ip6 dscp 0x01 return",
            "ip daddr 127.0.0.0/8 return",
            "ip6 daddr ::1/128 return",
            "tcp dport 22 return",
            "meta l4proto tcp fib daddr type local redirect to :15006",
        ]
    );
    assert_eq!(WORKLOAD_TOS & 0b11, 0, "the lower two bits are ECN's");
}

#[test]
fn outbound_capture_is_the_last_word_after_all_exemptions() {
    let rules = chain(&nft_text(&everything()), "output_nat");
    assert_eq!(
        rules,
        [
            "type nat hook output priority -100; policy accept;",
            "meta l4proto != tcp return",
            "meta skuid 1337 goto from_proxy",
            "meta skgid 1338 goto from_proxy",
            "meta mark 0x1337 goto from_proxy",
            "meta skuid 42 return",
            "meta skgid 43 return",
            "ip daddr 127.0.0.0/8 return",
            "ip6 daddr ::1/128 return",
            "ip daddr 203.0.113.0/24 return",
            "ip6 daddr 2001:db8:2::/61 return",
            "tcp dport 25 return",
            "ip daddr 192.0.2.53/32 tcp dport 53 return",
            "ip6 daddr 2001:db8::53/128 tcp dport 53 return",
            "meta l4proto tcp redirect to :15001",
        ]
    );
}

#[test]
fn dns_passes_to_listed_name_servers_alone_and_to_none_where_none_is_known() {
    let by_cgroup = |mut plan: Plan| {
        plan.outbound.as_mut().unwrap().by_cgroup = true;
        plan
    };
    let unknown = || Plan { dns_servers: Vec::new(), ..everything() };
    let refused = || Plan { udp: Udp::Refuse, ..everything() };
    for plan in [unknown(), refused(), by_cgroup(unknown()), by_cgroup(refused())] {
        let (v4, v6) = iptables_text(&plan);
        for text in [nft_text(&plan), v4, v6] {
            assert!(!text.contains("dport 53"), "{text}");
        }
    }
    for plan in [everything(), by_cgroup(everything())] {
        let all = nft_text(&plan);
        let rules: Vec<&str> = all.lines().filter(|line| line.contains("dport 53 ")).collect();
        assert!(rules.len() == 4 && rules.iter().all(|rule| rule.contains(" daddr ")), "{rules:?}");
    }
}

#[test]
fn what_is_not_tcp_is_refused_only_on_the_side_that_is_captured() {
    let refuses = |plan: &Plan, name: &str| {
        chain(&nft_text(plan), name).last().is_some_and(|rule| rule.starts_with("reject with icmpx"))
    };
    let (mut inbound, mut outbound, mut allow) = (everything(), everything(), everything());
    inbound.outbound = None;
    outbound.inbound = None;
    allow.udp = Udp::Allow;
    assert_eq!((refuses(&everything(), "input_filter"), refuses(&everything(), "output_filter")), (true, true));
    assert_eq!((refuses(&inbound, "input_filter"), refuses(&inbound, "output_filter")), (true, false));
    assert_eq!((refuses(&outbound, "input_filter"), refuses(&outbound, "output_filter")), (false, true));
    assert_eq!((refuses(&allow, "input_filter"), refuses(&allow, "output_filter")), (false, false));
}

#[test]
fn with_capture_by_cgroup_nothing_outbound_is_redirected_but_the_pod_itself() {
    let mut plan = everything();
    plan.outbound.as_mut().unwrap().by_cgroup = true;
    let text = nft_text(&plan);
    assert!(!text.contains(":15001") && !text.contains("postrouting"), "{text}");
    let rules = chain(&text, "output_nat");
    assert!(rules.iter().skip(2).all(|rule| rule.ends_with("goto from_proxy")) && rules.len() == 5, "{rules:?}");
    let filter = chain(&text, "output_filter");
    assert!(!filter.iter().any(|rule| rule.contains("untracked")), "{text}");
    // What the programs did not see is refused, after all that is exempt.
    let reset = filter.iter().position(|rule| rule == "meta l4proto tcp reject with tcp reset").unwrap();
    let exempt = |rule: &String| rule.ends_with("return") && rule.contains("tcp");
    assert!(filter.iter().rposition(exempt).unwrap() < reset, "{filter:?}");
    plan.inbound = None;
    assert_eq!(chain(&nft_text(&plan), "output_nat"), Vec::<String>::new());
}

#[test]
fn transparent_capture_ends_in_a_reset_when_nobody_listens() {
    let rules = chain(&nft_text(&transparent()), "prerouting_filter");
    let at = |rule: &str| rules.iter().position(|line| line.starts_with(rule)).unwrap_or_else(|| panic!("{rule}"));
    // Answers to connections that were opened from here must not get there.
    assert!(at("ct direction reply return") < at("meta nfproto ipv4 meta l4proto tcp tproxy ip to :15006"));
    assert!(at("meta nfproto ipv6 meta l4proto tcp tproxy ip6") < at("tcp flags & syn != syn ct state established"));
    assert_eq!(rules.last().unwrap(), "meta l4proto tcp reject with tcp reset");
    assert!(chain(&nft_text(&transparent()), "prerouting_nat").is_empty());
    assert!(chain(&nft_text(&everything()), "output_mark").is_empty());
}

#[test]
fn another_life_of_half_closed_connections_is_another_object() {
    let mut plan = everything();
    assert!(nft_text(&plan).contains("ct timeout half_closed_3600s_v6 {"));
    plan.half_closed = Duration::from_millis(5);
    assert!(nft_text(&plan).contains("policy = { fin_wait : 1, close_wait : 1 }"), "at least a second");
}

#[test]
fn iptables_has_each_rule_once_for_its_family() {
    let (v4, v6) = iptables_text(&everything());
    for text in [&v4, &v6] {
        assert!(text.contains("-A PORTCULLIS_OUTPUT -p tcp -m comment --comment \"outbound capture\" -j REDIRECT"));
        assert!(text.contains("-I OUTPUT 1 -j PORTCULLIS_OUTPUT\n"));
        assert_eq!(text.matches("COMMIT\n").count(), 3);
        assert_eq!(text.matches("--dscp 0x01").count(), 1);
    }
    assert!(v4.contains("-d 192.0.2.53/32 ") && !v4.contains("2001:") && !v4.contains("ipv6-icmp"), "{v4}");
    assert!(v6.contains("-d 2001:db8::53/128 ") && !v6.contains("192.0.2") && !v6.contains("-p icmp "), "{v6}");
}

#[test]
fn iptables_lets_older_connections_by_before_the_target_that_drops_them() {
    let (v4, _) = iptables_text(&transparent());
    let older = v4.find("! --tcp-flags SYN SYN -m conntrack --ctstate ESTABLISHED -m socket").unwrap();
    assert!(older < v4.find("-j TPROXY --on-port 15006").unwrap(), "{v4}");
    assert!(v4.contains("*mangle\n:PORTCULLIS_PREROUTING"));
}

#[test]
fn names_and_comments_fit_their_bounds() {
    for plan in [everything(), transparent()] {
        let Ruleset { chains, .. } = chains::ruleset(&plan);
        for chain in &chains {
            assert!(iptables_text::name_of(chain).len() <= 28, "{}", chain.name);
            for rule in &chain.rules {
                assert!(rule.comment.len() <= 100 && !rule.comment.contains(['"', '\'']), "{}", rule.comment);
            }
        }
    }
}

#[test]
fn a_plan_of_every_family_has_a_timeout_object() {
    let timeouts = chains::ruleset(&everything()).timeouts;
    assert_eq!(timeouts.iter().map(|timeout| timeout.family).collect::<Vec<_>>(), Family::BOTH);
}

#[test]
fn errors_say_what_to_do() {
    let said = Error::kernel("applying", Errno::PERM).to_string();
    assert!(said.contains("CAP_NET_ADMIN") && said.contains("run as root"), "{said}");
    let said = in_netns(std::path::Path::new("/nonexistent/netns"), || ()).unwrap_err().to_string();
    assert!(said.starts_with("cannot open the network namespace /nonexistent/netns: "), "{said}");
}
