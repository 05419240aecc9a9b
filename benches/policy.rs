//! What a decision costs, with few and with many rules, and what reading a SPIFFE ID costs.
//!
//! The point to look at: `10` and `10000` of the same case must be alike.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use portcullis::config::{LoadOptions, parse_with};
use portcullis::identity::SpiffeId;
use portcullis::policy::{ListenerPolicy, Policy};

/// So many rules: a third names one workload, a third has a wildcard in the middle, a third one at the end.
fn rules(count: usize) -> Arc<ListenerPolicy> {
    use std::fmt::Write as _;
    let mut text = "identity: unix:///a\ninbound: [{name: api, listen: '127.0.0.1:1', to: '127.0.0.1:2'}]\n\
                    policy:\n  rules:\n"
        .to_owned();
    for n in 0..count {
        let from = match n % 3 {
            0 => format!("spiffe://td.example/ns/team-{n}/sa/web"),
            1 => format!("spiffe://td.example/ns/*/sa/job-{n}"),
            _ => format!("spiffe://td.example/region/r{n}/**"),
        };
        let _ = writeln!(text, "    - {{name: r{n}, from: ['{from}']}}");
    }
    let options = LoadOptions::default();
    let loaded = parse_with(&text, "bench", &options).unwrap_or_else(|errors| unreadable(&errors));
    let policy = Policy::compile(&loaded.config);
    policy.listener("api").unwrap_or_else(|| unreadable(&"no listener"))
}

fn decision(c: &mut Criterion) {
    let mut group = c.benchmark_group("policy/decision");
    for count in [10, 10_000] {
        let rules = rules(count);
        for (case, peer) in [
            ("exact", "spiffe://td.example/ns/team-3/sa/web"),
            ("pattern", "spiffe://td.example/ns/blue/sa/job-4"),
            ("rest", "spiffe://td.example/region/r5/host/7/sa/web"),
            ("miss", "spiffe://td.example/ns/blue/sa/stranger"),
            ("other_domain", "spiffe://elsewhere.example/ns/blue/sa/stranger"),
        ] {
            let peer = id(peer);
            group.bench_with_input(BenchmarkId::new(case, count), &peer, |b, peer| {
                b.iter(|| rules.decide(black_box(peer)));
            });
        }
    }
    group.finish();
}

fn parse(c: &mut Criterion) {
    let mut group = c.benchmark_group("spiffe_id/parse");
    let long = format!("spiffe://td.example{}", "/segment".repeat(250));
    for (case, text) in [("usual", "spiffe://nhs.example/ns/records/sa/api"), ("2_kB", long.as_str())] {
        group.bench_function(case, |b| b.iter(|| SpiffeId::parse(black_box(text))));
    }
    group.finish();
}

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).unwrap_or_else(|error| unreadable(&error))
}

#[allow(clippy::panic, reason = "a bench has nobody else to tell")]
fn unreadable<T>(what: &dyn std::fmt::Display) -> T {
    panic!("{what}")
}

criterion_group!(benches, decision, parse);
criterion_main!(benches);
