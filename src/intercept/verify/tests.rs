use super::super::plan::{InboundMode, ProxyOwner};
use super::*;

pub(super) fn plan(udp: Udp, dns_servers: &[&str], skip_ports: &[u16]) -> Plan {
    Plan {
        proxy: ProxyOwner { uid: Some(1337), ..ProxyOwner::default() },
        inbound: Some(InboundCapture {
            port: 15006,
            mode: InboundMode::Redirect,
            skip_ports: Vec::new(),
            skip_sources: Vec::new(),
        }),
        outbound: Some(OutboundCapture {
            port: 15001,
            skip_ports: skip_ports.to_vec(),
            skip_destinations: Vec::new(),
            skip_uids: Vec::new(),
            skip_gids: Vec::new(),
            by_cgroup: false,
        }),
        udp,
        dns_servers: dns_servers.iter().map(|server| server.parse().unwrap()).collect(),
        half_closed: Duration::from_secs(60),
    }
}

fn declared(plan: &Plan) -> Vec<Attempt> {
    let cast = Cast { plan, application: Ok(Actor::OURSELVES), proxy: Ok(Actor::OURSELVES) };
    cast.declared().collect()
}

#[test]
fn what_is_attempted_is_what_the_plan_prevents() {
    let all = declared(&plan(Udp::Dns, &["192.0.2.53"], &[]));
    assert_eq!(all.len(), 8);
    assert_eq!(declared(&plan(Udp::Dns, &[], &[])).len(), 8);
    assert!(declared(&plan(Udp::Refuse, &[], &[])).contains(&Attempt::OutboundUdpDns));
    let no_udp = declared(&plan(Udp::Allow, &["192.0.2.53"], &[]));
    let of_udp = [Attempt::OutboundUdp, Attempt::OutboundUdpDns, Attempt::InboundUdp];
    assert!(of_udp.iter().all(|attempt| !no_udp.contains(attempt)), "{no_udp:?}");
    let skipped = declared(&plan(Udp::Refuse, &[], &[53]));
    assert!(!skipped.contains(&Attempt::OutboundTcpDns) && !skipped.contains(&Attempt::OutboundUdpDns));
    let inbound = declared(&Plan { outbound: None, ..plan(Udp::Dns, &[], &[]) });
    assert_eq!(inbound, [Attempt::InboundTcp, Attempt::InboundUdp, Attempt::OwnAddress]);
    let outbound = declared(&Plan { inbound: None, ..plan(Udp::Allow, &[], &[]) });
    assert_eq!(outbound, [Attempt::Proxy, Attempt::OutboundTcp, Attempt::OutboundTcpDns]);
}

#[test]
fn only_what_holds_is_proven_and_what_cannot_be_told_is_forgiven_where_that_is_asked_for() {
    let with = |verdict| vec![finding(Attempt::Rules, Verdict::Holds, ""), finding(Attempt::InboundTcp, verdict, "")];
    for (verdict, strictly, leniently) in [
        (Verdict::Holds, true, true),
        (Verdict::Unproven, false, true),
        (Verdict::Passes, false, false),
        (Verdict::Differs, false, false),
    ] {
        let findings = with(verdict);
        assert_eq!((proven(&findings, false), proven(&findings, true)), (strictly, leniently), "{verdict:?}");
    }
}

#[test]
fn what_arrives_passes_and_what_is_silent_proves_nothing() {
    let nowhere = || target(Type::STREAM, IpAddr::from([127, 0, 0, 1]), None, &[]);
    let verdict = |way: Way| captured(Attempt::InboundTcp, nowhere(), |_| way).verdict;
    assert_eq!(verdict(Way::Arrived), Verdict::Passes);
    assert_eq!(verdict(Way::Refused), Verdict::Holds);
    assert_eq!(verdict(Way::Taken), Verdict::Holds);
    assert_eq!(verdict(Way::Silent), Verdict::Unproven);
    assert_eq!(verdict(Way::Failed("x".into())), Verdict::Unproven);
    // That the target could not be had is no refusal of the attempt.
    let target = Err(io::Error::from(io::ErrorKind::PermissionDenied));
    assert_eq!(captured(Attempt::InboundTcp, target, |_| Way::Arrived).verdict, Verdict::Unproven);
}
