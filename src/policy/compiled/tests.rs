use proptest::prelude::*;

use super::*;
use crate::config::schema::{PolicyConfig, Rule, RuleTarget};
use crate::policy::pattern::{MAX_SEGMENTS, MAX_WILDCARD_SHAPES};

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).unwrap()
}

fn patterns(texts: &[&str]) -> Vec<IdPattern> {
    texts.iter().map(|text| IdPattern::parse(text).unwrap()).collect()
}

fn listener(name: &str, port: u16, allow: &[&str]) -> Inbound {
    Inbound {
        name: name.into(),
        listen: Some(([127, 0, 0, 1], port).into()),
        capture: None,
        to: Some("127.0.0.1:80".into()),
        plaintext: Default::default(),
        protocol: Default::default(),
        allow: patterns(allow),
        legacy_tls12: false,
        allow_remote_target: false,
        proxy_protocol: Default::default(),
        http: Default::default(),
        connections: Default::default(),
    }
}

fn rule(name: &str, from: &[&str], action: Action, mode: PolicyMode) -> Rule {
    Rule { name: name.into(), from: patterns(from), to: Vec::new(), action, mode, http: Vec::new() }
}

fn config(inbound: Vec<Inbound>, rules: Vec<Rule>) -> Config {
    let loaded = crate::config::parse_with(
        "identity: unix:///a\noutbound: [{name: o, listen: '127.0.0.1:1', to: 'a:1', expect: 'spiffe://td/a'}]",
        "",
        &Default::default(),
    );
    Config { inbound, policy: PolicyConfig { rules, ..Default::default() }, ..loaded.unwrap().config }
}

fn one(allow: &[&str], rules: Vec<Rule>) -> Arc<ListenerPolicy> {
    Policy::compile(&config(vec![listener("api", 1, allow)], rules)).listener("api").unwrap()
}

use Action::{Allow, Deny};
use PolicyMode::{Audit, Enforce};

#[test]
fn nothing_is_admitted_unless_a_rule_says_so() {
    let decision = one(&[], vec![]).decide(&id("spiffe://td/a"));
    assert_eq!((decision.verdict, &*decision.rule, decision.admits()), (Verdict::Deny, "default", false));
    assert!(!Policy::default().decide("api", &id("spiffe://td/a")).admits());
    assert!(!Policy::default().could_admit(&id("spiffe://td/a")));
}

#[test]
fn deny_wins_and_the_first_rule_of_the_file_is_named() {
    let rules = one(
        &["spiffe://td/b"],
        vec![
            rule("all", &["spiffe://td"], Allow, Enforce),
            rule("b-too", &["spiffe://td/b"], Allow, Enforce),
            rule("not-c", &["spiffe://td/x/*", "spiffe://td/c"], Deny, Enforce),
            rule("not-c-either", &["spiffe://td/c"], Deny, Enforce),
        ],
    );
    let decide = |text: &str| {
        let decision = rules.decide(&id(text));
        (decision.verdict, decision.rule.to_string())
    };
    assert_eq!(decide("spiffe://td/a"), (Verdict::Allow, "all".into()));
    assert_eq!(decide("spiffe://td/b"), (Verdict::Allow, "allow:api".into()));
    assert_eq!(decide("spiffe://td/c"), (Verdict::Deny, "not-c".into()));
    assert_eq!(decide("spiffe://td/x/y"), (Verdict::Deny, "not-c".into()));
    assert_eq!(decide("spiffe://other/b"), (Verdict::Deny, "default".into()));
    assert_eq!(decide("spiffe://td"), (Verdict::Deny, "default".into()));
}

#[test]
fn rules_apply_to_listeners_by_name_and_by_port() {
    let to = |name: &str, to: Vec<RuleTarget>| Rule { to, ..rule(name, &["spiffe://td/a"], Allow, Enforce) };
    let policy = Policy::compile(&config(
        vec![listener("one", 1, &[]), listener("two", 2, &[]), listener("three", 3, &[])],
        vec![
            to("by-name", vec![RuleTarget::Listener("one".into())]),
            to("by-port", vec![RuleTarget::Port(2), RuleTarget::Port(1)]),
        ],
    ));
    let named = |listener: &str| policy.decide(listener, &id("spiffe://td/a")).rule.to_string();
    assert_eq!([named("one"), named("two"), named("three")], ["by-name", "by-port", "default"]);
    assert!(policy.could_admit(&id("spiffe://td/a")) && !policy.could_admit(&id("spiffe://td/b")));
}

#[test]
fn audited_rules_change_nothing_and_are_reported() {
    // The table of the module's documentation, row by row.
    let peer = id("spiffe://td/a");
    let a = &["spiffe://td/a"];
    for (enforced, audited, admits, change) in [
        (Some(Allow), Deny, true, Some(Verdict::Deny)),
        (Some(Allow), Allow, true, None),
        (Some(Deny), Deny, false, None),
        (Some(Deny), Allow, false, None),
        (None, Allow, false, Some(Verdict::Allow)),
        (None, Deny, false, None),
    ] {
        let mut rules = vec![rule("shadow", a, audited, Audit)];
        rules.extend(enforced.map(|action| rule("real", a, action, Enforce)));
        let decision = one(&[], rules).decide(&peer);
        let said = if audited == Deny { Verdict::Deny } else { Verdict::Allow };
        assert_eq!(decision.audited, Some(("shadow".into(), said)));
        assert_eq!((decision.admits(), decision.would_change_to()), (admits, change), "{enforced:?} {audited:?}");
        assert_eq!(&*decision.rule, if enforced.is_some() { "real" } else { "default" });
    }
    let both = one(&[], vec![rule("s1", a, Allow, Audit), rule("s2", a, Deny, Audit)]).decide(&peer);
    assert_eq!(both.audited, Some(("s2".into(), Verdict::Deny)));
}

#[test]
fn audit_for_all_lets_through_and_says_what_it_would_have_done() {
    let mut config = config(vec![listener("api", 1, &["spiffe://td/a"])], vec![]);
    config.policy.mode = Audit;
    let policy = Policy::compile(&config);
    let decision = policy.decide("api", &id("spiffe://td/b"));
    assert_eq!((decision.verdict, decision.mode, decision.admits()), (Verdict::Deny, Audit, true));
    assert!(policy.could_admit(&id("spiffe://elsewhere/b")));
    assert!(!policy.decide("no-such-listener", &id("spiffe://td/b")).admits());
}

#[test]
fn a_reload_knows_what_changed() {
    let base = || vec![rule("r", &["spiffe://td/a", "spiffe://td/b"], Allow, Enforce)];
    let first = one(&["spiffe://td/x"], base());
    assert!(first.same_rules_as(&one(&["spiffe://td/x"], base())));
    let reordered = vec![rule("r", &["spiffe://td/b", "spiffe://td/a", "spiffe://td/a"], Allow, Enforce)];
    assert!(first.same_rules_as(&one(&["spiffe://td/x"], reordered)));
    for other in [
        one(&["spiffe://td/y"], base()),
        one(&["spiffe://td/x"], vec![]),
        one(&["spiffe://td/x"], vec![rule("r2", &["spiffe://td/a", "spiffe://td/b"], Allow, Enforce)]),
        one(&["spiffe://td/x"], vec![rule("r", &["spiffe://td/a", "spiffe://td/b"], Deny, Enforce)]),
        one(&["spiffe://td/x"], vec![rule("r", &["spiffe://td/a", "spiffe://td/b"], Allow, Audit)]),
    ] {
        assert!(!first.same_rules_as(&other));
    }
    let policy = |allow| Policy::compile(&config(vec![listener("api", 1, allow)], base()));
    assert_eq!(policy(&["spiffe://td/x"]).digest(), policy(&["spiffe://td/x"]).digest());
    assert_ne!(policy(&["spiffe://td/x"]).digest(), policy(&["spiffe://td/y"]).digest());
    assert_ne!(policy(&[]).digest(), Policy::default().digest());
}

/// The most nodes that one decision for `peer` visits.
fn visited(rules: &ListenerPolicy, peer: &SpiffeId) -> usize {
    let path = peer.path().strip_prefix('/');
    rules.patterns.get(peer.trust_domain_name()).map_or(0, |root| root.walk(path, &mut Firsts::default()))
}

#[test]
fn the_cost_does_not_grow_with_the_number_of_rules() {
    let with = |count: usize| {
        let rules = (0..count).map(|n| {
            let texts =
                [format!("spiffe://td/ns/*/sa/s{n}"), format!("spiffe://td/ns/n{n}/**"), format!("spiffe://td/x/y{n}")];
            rule(&format!("r{n}"), &texts.each_ref().map(String::as_str), Allow, Enforce)
        });
        one(&[], rules.collect())
    };
    let (few, many) = (with(10), with(10_000));
    for peer in ["spiffe://td/ns/n3/sa/s3", "spiffe://td/ns/n3/sa/s4", "spiffe://td/x/y3", "spiffe://td/none"] {
        assert_eq!(visited(&few, &id(peer)), visited(&many, &id(peer)), "{peer}");
        assert_eq!(few.decide(&id(peer)), many.decide(&id(peer)));
    }
}

#[test]
fn the_worst_rules_that_load_stay_within_the_bound() {
    // Every way to put '*' into six places: 64 shapes, all of which match.
    let texts: Vec<String> = (0..64_u32)
        .map(|bits| {
            let segments: Vec<&str> = (0..6).map(|bit| if bits >> bit & 1 == 1 { "*" } else { "a" }).collect();
            format!("spiffe://td/{}{}", segments.join("/"), "/a".repeat(MAX_SEGMENTS - 6))
        })
        .collect();
    let rules = one(&texts.iter().map(String::as_str).collect::<Vec<_>>(), vec![]);
    let peer = id(&format!("spiffe://td{}", "/a".repeat(MAX_SEGMENTS)));
    assert!(rules.decide(&peer).admits());
    assert!(visited(&rules, &peer) <= MAX_WILDCARD_SHAPES * (MAX_SEGMENTS + 1));
    let longest = id(&format!("spiffe://td{}", "/a".repeat(1_000)));
    assert!(visited(&rules, &longest) <= MAX_WILDCARD_SHAPES * (MAX_SEGMENTS + 1));
}

/// The definition, without an index.
fn naive(config: &Config, listener: &Inbound, peer: &SpiffeId) -> Decision {
    let own = Rule {
        name: format!("allow:{}", listener.name),
        from: listener.allow.clone(),
        to: vec![],
        action: Allow,
        mode: Enforce,
        http: vec![],
    };
    let matching: Vec<&Rule> = std::iter::once(&own)
        .chain(config.policy.rules.iter().filter(|rule| rule.applies_to(listener)))
        .filter(|rule| rule.from.iter().any(|pattern| pattern.matches(peer)))
        .collect();
    let first = |action, mode| {
        matching.iter().find(|rule| (rule.action, rule.mode) == (action, mode)).map(|rule| rule.name.as_str().into())
    };
    let (verdict, rule) = match (first(Deny, Enforce), first(Allow, Enforce)) {
        (Some(rule), _) => (Verdict::Deny, rule),
        (None, Some(rule)) => (Verdict::Allow, rule),
        (None, None) => (Verdict::Deny, "default".into()),
    };
    let audited = match (first(Deny, Audit), first(Allow, Audit)) {
        (Some(rule), _) => Some((rule, Verdict::Deny)),
        (None, rule) => rule.map(|rule| (rule, Verdict::Allow)),
    };
    Decision { verdict, rule, mode: config.policy.mode, audited }
}

fn any_domain() -> impl Strategy<Value = &'static str> {
    prop_oneof![4 => Just("td"), 1 => Just("td.b")]
}

fn any_id() -> impl Strategy<Value = SpiffeId> {
    (any_domain(), prop::collection::vec("[ab]", 0..5)).prop_map(|(domain, segments)| {
        let path: String = segments.iter().map(|s| format!("/{s}")).collect();
        id(&format!("spiffe://{domain}{path}"))
    })
}

fn any_pattern() -> impl Strategy<Value = IdPattern> {
    let segment = prop_oneof![3 => Just("a"), 2 => Just("b"), 2 => Just("*")];
    (any_domain(), prop::collection::vec(segment, 0..5), any::<bool>()).prop_map(|(domain, segments, rest)| {
        let mut text = format!("spiffe://{domain}");
        for segment in segments.into_iter().chain(rest.then_some("**")) {
            text = format!("{text}/{segment}");
        }
        IdPattern::parse(&text).unwrap()
    })
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let target =
        prop_oneof![Just(vec![]), Just(vec![RuleTarget::Port(1)]), Just(vec![RuleTarget::Listener("two".into())])];
    (
        "r[0-9]{6}",
        prop::collection::vec(any_pattern(), 1..4),
        target,
        prop_oneof![2 => Just(Allow), 1 => Just(Deny)],
        prop_oneof![2 => Just(Enforce), 1 => Just(Audit)],
    )
        .prop_map(|(name, from, to, action, mode)| Rule { name, from, to, action, mode, http: vec![] })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn the_index_is_the_definition(
        allow in prop::collection::vec(any_pattern(), 0..3),
        rules in prop::collection::vec(any_rule(), 0..12),
        peers in prop::collection::vec(any_id(), 1..20),
        all in prop_oneof![3 => Just(Enforce), 1 => Just(Audit)],
    ) {
        let mut one = listener("one", 1, &[]);
        one.allow = allow;
        let mut config = config(vec![one, listener("two", 2, &[])], rules);
        config.policy.mode = all;
        let policy = Policy::compile(&config);
        for peer in &peers {
            for listener in &config.inbound {
                let decision = policy.decide(&listener.name, peer);
                prop_assert_eq!(&decision, &naive(&config, listener, peer));
                prop_assert_eq!(policy.listener(&listener.name).unwrap().decide(peer), decision);
            }
        }
    }

    #[test]
    fn a_deny_is_final(mut rules in prop::collection::vec(any_rule(), 0..8), peer in any_id()) {
        prop_assume!(!peer.path().is_empty());
        rules.push(rule("no", &[peer.as_str()], Deny, Enforce));
        let policy = Policy::compile(&config(vec![listener("one", 1, &["spiffe://td", "spiffe://td.b"])], rules));
        prop_assert!(!policy.decide("one", &peer).admits());
        prop_assert!(!policy.could_admit(&peer));
    }
}
