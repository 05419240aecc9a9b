use super::super::places::{KEPT, OTHER};
use super::*;
use crate::identity::{Identity, KeyType, SpiffeId, Svid, TrustBundles, TrustDomain};
use crate::posture::Kind;
use crate::testing::TestCa;
use crate::tls::record::{Failure, Negotiated};
use std::sync::Arc;
use std::time::Duration;

fn labels() -> Labels {
    Labels { service_name: "records".into(), environment: "test".into(), domain: "clinical".into() }
}

fn negotiated() -> Negotiated {
    Negotiated {
        version: "TLSv1.3",
        cipher_suite: "TLS_AES_256_GCM_SHA384",
        group: "X25519MLKEM768",
        signature: "ecdsa_secp384r1_sha384",
        peer_key: KeyType::P384,
        resumed: false,
        compliant: true,
    }
}

const TCP: &str = "protocol=\"tcp\"";

/// The value of the one series of that name whose labels hold all of these texts.
fn value(metrics: &Metrics, name: &str, has: &[&str]) -> Option<f64> {
    let text = metrics.render().1;
    let series = |line: &&str| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])) && has.iter().all(|h| line.contains(h))
    };
    let found: Vec<&str> = text.lines().filter(series).collect();
    assert!(found.len() < 2, "{found:?}");
    Some(found.first()?.rsplit(' ').next()?.parse().unwrap())
}

fn decided(rule: &str) -> Decision {
    Decision { verdict: Verdict::Allow, rule: rule.into(), mode: PolicyMode::Enforce, audited: None }
}

fn handshaken() -> HandshakeRecord {
    HandshakeRecord {
        direction: Direction::Inbound,
        took: Duration::from_micros(700),
        computing: Duration::from_micros(300),
        negotiated: Some(negotiated()),
        peer: None,
        claimed: None,
        failure: None,
        offered_weak: Vec::new(),
    }
}

fn ended(peer: &str) -> ConnectionRecord {
    ConnectionRecord {
        listener: "api".into(),
        direction: Direction::Inbound,
        carries: Carries::Tcp,
        client: "127.0.0.1:1".into(),
        upstream: None,
        peer: Some(SpiffeId::parse(peer).unwrap()),
        local: None,
        rule: None,
        tls: Some(negotiated()),
        watched: None,
        handshake_failure: None,
        bytes_sent: 0,
        bytes_received: 0,
        duration: Duration::ZERO,
        cause: Cause::Done,
        detail: String::new(),
    }
}

#[test]
fn series_stay_bounded_whoever_calls_and_whatever_rules_are_called() {
    let metrics = Metrics::new(&labels(), 100, false).unwrap();
    for n in 0..50_000 {
        metrics.opened(Direction::Inbound, Carries::Tcp);
        metrics.closed(&ended(&format!("spiffe://td{}.example/w/{n}", n % 1000)));
        metrics.decision(Direction::Inbound, &decided(&format!("rule-{n}")));
    }
    let (_, text) = metrics.render();
    let series = |name: &str| text.lines().filter(|line| line.starts_with(name)).count();
    assert_eq!(series("portcullis_peer_connections_total{"), 101);
    assert_eq!(series("portcullis_peer_info{"), 101);
    assert_eq!(series("portcullis_authorization_decisions_total{"), MOST_NAMES + 1);
    assert!(text.lines().count() < 1500, "{}", text.lines().count());
    assert_eq!(value(&metrics, "portcullis_peer_connections_total", &["spiffe_id=\"other\""]), Some(49_900.0));
}

#[test]
fn handshakes_are_counted_by_what_came_of_them() {
    let metrics = Metrics::new(&labels(), 10, false).unwrap();
    let mut record = HandshakeRecord { offered_weak: vec!["3DES"], ..handshaken() };
    metrics.handshake(&record);
    record.negotiated = None;
    record.failure = Some(Failure::new(Reason::Expired, "7 s ago"));
    metrics.handshake(&record);
    let value = |name: &str, has: &[&str]| value(&metrics, &format!("portcullis_{name}"), has);
    assert_eq!(value("tls_handshakes_total", &["inbound", "reason=\"expired\""]), Some(1.0));
    assert_eq!(value("tls_handshakes_total", &["inbound", "success"]), Some(1.0));
    assert_eq!(value("tls_offered_weak_total", &["inbound", "3DES"]), Some(2.0));
    assert_eq!(value("tls_handshake_duration_seconds_bucket", &["le=\"0.00075\""]), Some(1.0));
    assert_eq!(value("tls_handshake_duration_seconds_bucket", &["le=\"0.0005\""]), Some(0.0));
    assert_eq!(value("tls_handshake_duration_seconds_count", &[]), Some(1.0), "failures have no duration");
    assert_eq!(value("tls_negotiated_total", &["key_type=\"ecdsa-p384\"", "compliant=\"true\""]), Some(1.0));
    assert!(metrics.render().1.contains("service_name=\"records\""));
}

#[test]
fn what_is_alerted_on_is_there_before_it_happens() {
    let metrics = Metrics::new(&labels(), 10, false).unwrap();
    for direction in ["direction=\"inbound\"", "direction=\"outbound\""] {
        for reason in Reason::ALL {
            let reason = format!("reason=\"{reason}\"");
            assert_eq!(value(&metrics, "portcullis_tls_handshakes_total", &[direction, &reason]), Some(0.0));
        }
        for carries in Carries::ALL {
            let protocol = format!("protocol=\"{}\"", carries.as_str());
            for cause in Cause::ALL {
                let cause = format!("cause=\"{}\"", cause.as_str());
                assert_eq!(value(&metrics, "portcullis_connections_total", &[direction, &protocol, &cause]), Some(0.0));
            }
            assert_eq!(value(&metrics, "portcullis_connections_open", &[direction, &protocol]), Some(0.0));
            for way in ["way=\"sent\"", "way=\"received\""] {
                assert_eq!(value(&metrics, "portcullis_bytes_total", &[direction, &protocol, way]), Some(0.0));
            }
        }
    }
    assert_eq!(value(&metrics, "portcullis_svid_state", &["absent"]), Some(1.0));
    assert_eq!(value(&metrics, "portcullis_svid_state", &["expired"]), Some(0.0));
    assert_eq!(value(&metrics, "portcullis_identity_source_up", &[]), Some(0.0));
    assert_eq!(value(&metrics, "portcullis_build_info", &["provider=\"aws-lc-rs\""]), Some(1.0));
}

#[test]
fn figures_that_nobody_supplies_have_no_series() {
    let metrics = Metrics::new(&labels(), 10, false).unwrap();
    assert_eq!(value(&metrics, "portcullis_tls_handshakes_in_progress", &[]), None);
    assert_eq!(value(&metrics, "portcullis_log_lines_lost_total", &[]), None);
    metrics.handshakes_in_progress(3);
    metrics.log_lines_lost(2);
    metrics.log_lines_lost(5);
    assert_eq!(value(&metrics, "portcullis_tls_handshakes_in_progress", &[]), Some(3.0));
    assert_eq!(value(&metrics, "portcullis_log_lines_lost_total", &[]), Some(5.0));
}

#[test]
fn connections_open_and_end() {
    let metrics = Metrics::new(&labels(), 10, false).unwrap();
    metrics.opened(Direction::Inbound, Carries::Tcp);
    metrics.opened(Direction::Inbound, Carries::Tcp);
    metrics.moved(Direction::Inbound, Carries::Tcp, 10, 20);
    metrics.closed(&ConnectionRecord { cause: Cause::Truncated, ..ended("spiffe://td.example/w") });
    assert_eq!(value(&metrics, "portcullis_connections_open", &["inbound", TCP]), Some(1.0));
    assert_eq!(value(&metrics, "portcullis_connections_total", &["inbound", TCP, "truncated"]), Some(1.0));
    assert_eq!(value(&metrics, "portcullis_bytes_total", &["inbound", TCP, "sent"]), Some(10.0));
    assert_eq!(value(&metrics, "portcullis_bytes_total", &["inbound", TCP, "received"]), Some(20.0));
    assert_eq!(value(&metrics, "portcullis_peer_connections_total", &["td.example/w"]), Some(1.0));
}

#[test]
fn a_peer_unseen_for_long_loses_its_series_to_one_that_is_admitted() {
    let metrics = Metrics::new(&labels(), 1, false).unwrap();
    let now = Instant::now();
    metrics.count_peer("inbound", "spiffe://td.example/a", true, now);
    metrics.count_peer("outbound", "spiffe://td.example/a", true, now);
    metrics.count_peer("inbound", "spiffe://td.example/stranger", false, now + KEPT);
    metrics.count_peer("inbound", "spiffe://td.example/b", true, now + KEPT);
    let text = metrics.render().1;
    let mut peers: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("portcullis_peer_info{"))
        .filter_map(|line| line.split("spiffe_id=\"").nth(1)?.split('"').next())
        .collect();
    peers.sort_unstable();
    assert_eq!(peers, [OTHER, "spiffe://td.example/b"]);
}

fn current(identity: Identity) -> Current {
    Current {
        state: SvidState::Fresh,
        identity: Some(Arc::new(identity)),
        source_reachable: true,
        ..Current::default()
    }
}

#[test]
fn trust_domains_come_and_go_with_the_bundles() {
    let metrics = Metrics::new(&labels(), 10, false).unwrap();
    let ca = TestCa::new("td.example");
    let issued = ca.svid("/w");
    let svid = Arc::new(Svid::new(issued.chain.clone(), issued.key(), None).unwrap());
    let with = |domains: &[String]| {
        let mut bundles = TrustBundles::empty();
        for domain in domains {
            bundles.set(TrustDomain::parse(domain).unwrap(), vec![ca.der().clone()]).unwrap();
        }
        current(Identity { svid: Arc::clone(&svid), bundles: Arc::new(bundles), generation: 1 })
    };
    for round in 0..200 {
        let domains: Vec<String> = (0..250).map(|n| format!("td-{round}-{n}.example")).collect();
        metrics.identity(&with(&domains));
    }
    let series = |metrics: &Metrics| {
        let text = metrics.render().1;
        text.lines().filter(|line| line.starts_with("portcullis_trust_bundle_expiry_timestamp_seconds{")).count()
    };
    assert_eq!(series(&metrics), 250);
    metrics.identity(&with(&["td.example".into()]));
    assert_eq!(series(&metrics), 1);
    assert_eq!(value(&metrics, "portcullis_svid_state", &["\"fresh\""]), Some(1.0));
    assert_eq!(value(&metrics, "portcullis_svid_state", &["\"absent\""]), Some(0.0));
    // What was trusted last goes on being told when the identity is gone.
    metrics.identity(&Current { state: SvidState::Expired, ..Current::default() });
    assert_eq!(series(&metrics), 1);
}

#[test]
fn rotations_are_counted_once_however_often_they_are_told() {
    let metrics = Metrics::new(&labels(), 10, false).unwrap();
    let counters = Counters { rotations: 3, refused: 1, ..Counters::default() };
    let current = Current { counters, not_after: Some(1_900_000_000), rotation_overdue: true, ..Current::default() };
    metrics.identity(&current);
    metrics.identity(&current);
    assert_eq!(value(&metrics, "portcullis_svid_rotations_total", &["success"]), Some(3.0));
    assert_eq!(value(&metrics, "portcullis_svid_rotations_total", &["refused"]), Some(1.0));
    assert_eq!(value(&metrics, "portcullis_svid_expiry_timestamp_seconds", &[]), Some(1_900_000_000.0));
    assert_eq!(value(&metrics, "portcullis_svid_rotation_overdue", &[]), Some(1.0));
}

#[test]
fn the_memory_of_chains_is_summed_over_generations() {
    let metrics = Metrics::new(&labels(), 10, false).unwrap();
    metrics.chain_memory((5, 2));
    metrics.chain_memory((6, 2));
    metrics.chain_memory((1, 1));
    assert_eq!(value(&metrics, "portcullis_tls_chain_memory_total", &["hit"]), Some(7.0));
    assert_eq!(value(&metrics, "portcullis_tls_chain_memory_total", &["miss"]), Some(3.0));
}

#[test]
fn names_cannot_write_series_of_their_own() {
    let labels = Labels { service_name: "a\"} 1\nevil 1".into(), ..labels() };
    let metrics = Metrics::new(&labels, 10, false).unwrap();
    metrics.decision(Direction::Inbound, &decided("x\"} 1\nevil_total 7\n\\"));
    let text = metrics.render().1;
    assert!(text.lines().all(|line| line.starts_with("portcullis_") || line.starts_with("# ")), "{text}");
}

#[test]
fn a_drift_stands_until_it_is_over_and_each_is_counted() {
    let metrics = Metrics::new(&labels(), 10, false).unwrap();
    let now = |name: &str| value(&metrics, name, &["interception"]);
    assert_eq!((now("portcullis_drift"), now("portcullis_drift_detected_total")), (Some(0.0), Some(0.0)));
    metrics.drift(Kind::Interception, true);
    assert_eq!((now("portcullis_drift"), now("portcullis_drift_detected_total")), (Some(1.0), Some(1.0)));
    metrics.drift(Kind::Interception, false);
    metrics.drift(Kind::Interception, true);
    metrics.drift(Kind::Interception, false);
    assert_eq!((now("portcullis_drift"), now("portcullis_drift_detected_total")), (Some(0.0), Some(2.0)));
}

#[test]
fn two_proxies_of_one_process_count_apart() {
    let one = Metrics::new(&labels(), 10, false).unwrap();
    let two = Metrics::new(&labels(), 10, false).unwrap();
    one.opened(Direction::Inbound, Carries::Tcp);
    assert_eq!(value(&one, "portcullis_connections_open", &["inbound", TCP]), Some(1.0));
    assert_eq!(value(&two, "portcullis_connections_open", &["inbound", TCP]), Some(0.0));
}

/// Not a bench: it holds the cost far below a handshake's (some hundred microseconds) even in a debug build.
#[test]
fn a_connection_s_records_cost_microseconds() {
    let metrics = Metrics::new(&labels(), 100, false).unwrap();
    let (handshake, connection, decision) = (handshaken(), ended("spiffe://td.example/w"), decided("allow:api"));
    let rounds = 5_000;
    let began = Instant::now();
    for _ in 0..rounds {
        metrics.opened(Direction::Inbound, Carries::Tcp);
        metrics.handshake(&handshake);
        metrics.decision(Direction::Inbound, &decision);
        metrics.moved(Direction::Inbound, Carries::Tcp, 100, 100);
        metrics.closed(&connection);
    }
    let each = began.elapsed() / rounds;
    println!("all records of one connection: {each:?}");
    assert!(each < Duration::from_micros(200), "{each:?}");
}

#[test]
fn every_metric_has_our_prefix_and_says_what_it_is() {
    let metrics = Metrics::new(&labels(), 10, false).unwrap();
    metrics.handshake(&handshaken());
    metrics.opened(Direction::Inbound, Carries::Tcp);
    metrics.decision(Direction::Inbound, &decided("allow:api"));
    metrics.closed(&ended("spiffe://td.example/w"));
    metrics.handshakes_in_progress(1);
    metrics.log_lines_lost(0);
    let (kind, text) = metrics.render();
    assert_eq!(kind, "text/plain; version=0.0.4; charset=utf-8");
    for line in text.lines().filter(|line| line.starts_with("# HELP")) {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        assert!(words[2].starts_with("portcullis_") && !words[3].is_empty(), "{line}");
    }
}

#[test]
fn plaintext_is_counted_by_listener_and_result_and_beside_requests() {
    let metrics = Metrics::new(&labels(), 10, false).unwrap();
    for (fate, times) in [(Fate::Refused, 3), (Fate::Audited, 2), (Fate::Allowed, 1)] {
        for _ in 0..times {
            metrics.event(Direction::Inbound, "api", Event::Plaintext(fate));
        }
    }
    let count = |result| value(&metrics, "portcullis_plaintext_connections_total", &["listener=\"api\"", result]);
    assert_eq!(count("result=\"refused\""), Some(3.0));
    assert_eq!(count("result=\"audited\""), Some(2.0));
    assert_eq!(count("result=\"allowed\""), Some(1.0));
}
