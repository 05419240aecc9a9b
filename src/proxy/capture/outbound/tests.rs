use super::*;
use crate::config::parse;

/// What the outbound listeners of a config take: the place of the one that does, and what has to be read for that.
fn taken(listeners: &str, to: &str, first: Option<First>) -> (Option<usize>, Wants) {
    let text = format!("identity: unix:///run/x.sock\nintercept: {{ outbound: {{}} }}\noutbound:\n{listeners}");
    let config = parse(&text, "test").unwrap().config;
    let to = to.parse().unwrap();
    let known = BTreeMap::new();
    let all: Vec<_> =
        config.outbound.into_iter().map(|outbound| Keys::new(outbound.capture.unwrap(), &known)).collect();
    (all.iter().position(|keys| keys.take(to, first.as_ref())), wants(all.iter(), to))
}

fn http(host: &str) -> Option<First> {
    Some(First::Http { host: Some(host.into()) })
}

fn tls(name: &str) -> Option<First> {
    Some(First::Tls { server_name: Some(name.into()) })
}

const HOST: Wants = Wants { host: true, server_name: false };
const NOTHING: Wants = Wants { host: false, server_name: false };

#[test]
fn the_first_listener_for_which_every_key_holds_takes_it() {
    let listeners = "\
- { name: a, capture: { addresses: [10.0.0.0/8], ports: [80, 8080] }, expect: spiffe://td/a }
- { name: b, capture: { addresses: [10.1.0.0/16, 'fd00::/8'] }, expect: spiffe://td/b }
- { name: c, capture: { ports: [443] }, expect: spiffe://td/c }";
    for (to, by) in [
        ("10.1.0.1:80", Some(0)),
        ("10.1.0.1:81", Some(1)),
        ("[fd00::1]:443", Some(1)),
        ("[::ffff:10.1.0.1]:443", Some(1)),
        ("192.0.2.1:443", Some(2)),
        ("192.0.2.1:80", None),
    ] {
        assert_eq!(taken(listeners, to, None), (by, NOTHING), "{to}");
    }
}

#[test]
fn a_name_that_was_never_resolved_matches_nothing() {
    let listeners = "\
- { name: a, capture: { names: [records.example] }, expect: spiffe://td/a }
- { name: b, capture: { ports: [443] }, expect: spiffe://td/b }";
    assert_eq!(taken(listeners, "192.0.2.1:443", None), (Some(1), NOTHING));
}

#[test]
fn only_what_a_listener_before_the_first_certain_one_asks_for_is_read() {
    let listeners = "\
- { name: a, capture: { http_hosts: ['*.a.example'], ports: [80] }, protocol: http, expect: spiffe://td/a }
- { name: b, capture: { ports: [80] }, expect: spiffe://td/b }
- { name: c, capture: { sni: [c.example] }, expect: spiffe://td/c }";
    for (to, first, by, wants) in [
        ("192.0.2.1:80", http("x.a.example"), Some(0), HOST),
        ("192.0.2.1:80", http("x.b.example"), Some(1), HOST),
        ("192.0.2.1:80", Some(First::Http { host: None }), Some(1), HOST),
        ("192.0.2.1:80", Some(First::Silent), Some(1), HOST),
        ("192.0.2.1:80", tls("x.a.example"), Some(1), HOST),
        ("192.0.2.1:443", tls("c.example"), Some(2), Wants { host: false, server_name: true }),
        ("192.0.2.1:443", tls("d.example"), None, Wants { host: false, server_name: true }),
        ("192.0.2.1:443", http("c.example"), None, Wants { host: false, server_name: true }),
        ("192.0.2.1:443", None, None, Wants { host: false, server_name: true }),
    ] {
        assert_eq!(taken(listeners, to, first.clone()), (by, wants), "{to} {first:?}");
    }
}
