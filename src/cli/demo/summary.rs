//! The closing table. Every number in it is read back from the sidecars' `/metrics`, but for the requests, which only the
//! workload that made them can count.

use std::collections::BTreeMap;
use std::io;

use super::ledger::{Ledger, Promise, Thing};
use super::scrape::Metrics;
use super::screen::{Screen, Tone, grouped};
use super::workloads::Tally;
use super::world::World;

const DURATION: &str = "portcullis_tls_handshake_duration_seconds";
pub(super) const HANDSHAKES: &str = "portcullis_tls_handshakes_total";
const NEGOTIATED: &str = "portcullis_tls_negotiated_total";
pub(super) const CONNECTIONS: &str = "portcullis_connections_total";
const ROTATIONS: &str = "portcullis_svid_rotations_total";
pub(super) const DECISIONS: &str = "portcullis_authorization_decisions_total";
const WEAK: &str = "portcullis_tls_offered_weak_total";
/// What the records sidecar must have refused for at least once.
const REASONS: [&str; 5] = ["denied", "untrusted", "unknown_trust_domain", "no_certificate", "not_tls"];

/// One sidecar's side of the table.
pub(super) struct Side {
    pub(super) metrics: Metrics,
    pub(super) direction: &'static str,
}

impl Side {
    pub(super) fn handshakes(&self, resumed: &str) -> u64 {
        self.metrics.count(&format!("{DURATION}_count"), &[("direction", self.direction), ("resumed", resumed)])
    }

    pub(super) fn by(&self, name: &str, label: &str) -> BTreeMap<String, u64> {
        self.metrics.by(name, &[("direction", self.direction)], label)
    }

    fn latency(&self, resumed: &str) -> String {
        let labels = [("direction", self.direction), ("resumed", resumed)];
        let at = |q| self.metrics.quantile(DURATION, &labels, q).map(|seconds| seconds * 1000.0);
        match (at(0.5), at(0.99)) {
            (Some(half), Some(most)) => format!("{half:.2} / {most:.2} ms"),
            _ => "-".into(),
        }
    }

    fn resumed_share(&self) -> String {
        let (full, resumed) = (self.handshakes("false"), self.handshakes("true"));
        match full + resumed {
            0 => "-".into(),
            all => format!("{} ({:.0} %)", grouped(resumed), resumed as f64 * 100.0 / all as f64),
        }
    }

    fn negotiated(&self, label: &str) -> String {
        list(&self.by(NEGOTIATED, label))
    }

    pub(super) fn outside(&self) -> u64 {
        self.metrics.count(NEGOTIATED, &[("direction", self.direction), ("compliant", "false")])
    }

    pub(super) fn rotations(&self) -> u64 {
        self.metrics.count(ROTATIONS, &[("result", "success")])
    }

    fn rows(&self) -> Vec<String> {
        vec![
            grouped(self.handshakes("false") + self.handshakes("true")),
            self.resumed_share(),
            self.latency("false"),
            self.latency("true"),
            self.negotiated("version"),
            self.negotiated("cipher_suite"),
            self.negotiated("group"),
            grouped(self.outside()),
            grouped(self.rotations()),
        ]
    }
}

const ROWS: [&str; 9] = [
    "handshakes",
    "  resumed",
    "  full: p50 / p99 *",
    "  resumed: p50 / p99 *",
    "TLS version",
    "cipher suite",
    "group",
    "outside the profile",
    "SVID rotations",
];

fn list(counts: &BTreeMap<String, u64>) -> String {
    match counts.len() {
        1 => counts.keys().cloned().collect(),
        _ => counted(counts),
    }
}

/// The chapter's heading, and what concerns handshakes.
pub(super) fn handshakes(screen: &mut Screen<'_>, records: &Side, frontend: &Side) -> io::Result<()> {
    screen.chapter("What the sidecars' own /metrics say of all this")?;
    let heading = format!("   {:<24}{:<28}{}", "", "/records, inbound", "/frontend, outbound");
    let heading = screen.bold(&heading);
    screen.line(&heading)?;
    for (name, (left, right)) in ROWS.iter().zip(records.rows().into_iter().zip(frontend.rows())) {
        screen.line(&format!("   {name:<24}{left:<28}{right}"))?;
    }
    Ok(())
}

/// The end of the table.
pub(super) fn note(screen: &mut Screen<'_>) -> io::Result<()> {
    let note = screen.faint(&format!("   * from the buckets of {DURATION}"));
    screen.line(&note)
}

/// Shows the table and ticks off what it confirms.
pub(super) async fn show(
    screen: &mut Screen<'_>,
    ledger: &mut Ledger<Thing>,
    world: &World,
    tally: &Tally,
) -> io::Result<()> {
    let records = Side { metrics: world.records.metrics().await, direction: "inbound" };
    let frontend = Side { metrics: world.frontend.metrics().await, direction: "outbound" };
    let refused = records.metrics.by(HANDSHAKES, &[("direction", "inbound"), ("result", "failure")], "reason");
    let denied = records.metrics.count(DECISIONS, &[("direction", "inbound"), ("decision", "deny")]);
    let ended = records.by(CONNECTIONS, "cause");
    let carried = frontend.by(CONNECTIONS, "cause");
    let weak = records.by(WEAK, "what");
    let (requests, failures) = tally.counts();
    let http = Http::of(&world.clinic.metrics().await);

    handshakes(screen, &records, &frontend)?;
    for (name, what) in [
        ("connections, /frontend", counted(&carried)),
        ("connections, /records", counted(&ended)),
        ("denied by policy", grouped(denied)),
        ("refused by reason", counted(&refused)),
        ("weak offers", counted(&weak)),
        ("HTTP, /clinic", format!("{} over {} mTLS handshakes", counted(&http.classes), grouped(http.handshakes))),
        ("  gRPC by status", counted(&http.grpc)),
        ("  decided by", counted(&http.rules)),
    ] {
        wrapped(screen, name, &what)?;
    }
    let count = format!("{} answered, {} failed (the workloads' own count)", grouped(requests), failures);
    wrapped(screen, "requests", &count)?;
    note(screen)?;

    let each_rotated = records.rotations() >= 2 && frontend.rotations() >= 2;
    if !ledger.tick(Thing::Rotations, each_rotated) {
        screen.tell(Tone::Bad, "NOT SEEN", Thing::Rotations.words())?;
    }
    let told = Told {
        refused: &refused,
        carried: &carried,
        ended: &ended,
        weak: &weak,
        outside: records.outside() + frontend.outside(),
        handshakes: frontend.handshakes("false"),
        denied,
        http: &http,
    };
    if !ledger.tick(Thing::ReadBack, told.confirms()) {
        screen.tell(Tone::Bad, "NOT SEEN", Thing::ReadBack.words())?;
    }
    Ok(())
}

pub(super) fn counted(counts: &BTreeMap<String, u64>) -> String {
    let parts: Vec<_> = counts.iter().map(|(name, count)| format!("{name} {}", grouped(*count))).collect();
    if parts.is_empty() { "none".into() } else { parts.join(", ") }
}

/// A row whose text may need several lines.
pub(super) fn wrapped(screen: &mut Screen<'_>, name: &str, text: &str) -> io::Result<()> {
    const WIDTH: usize = 60;
    let mut name = name;
    let mut line = String::new();
    for part in text.split_inclusive(", ") {
        if line.len() + part.trim_end().len() > WIDTH && !line.is_empty() {
            screen.line(&format!("   {name:<24}{line}"))?;
            name = "";
            line.clear();
        }
        line.push_str(part);
    }
    screen.line(&format!("   {name:<24}{line}"))
}

/// What the sidecar of the clinic tells of requests.
pub(super) struct Http {
    classes: BTreeMap<String, u64>,
    grpc: BTreeMap<String, u64>,
    rules: BTreeMap<String, u64>,
    handshakes: u64,
}

impl Http {
    pub(super) fn of(metrics: &Metrics) -> Self {
        let inbound = [("direction", "inbound")];
        Self {
            classes: metrics.by("portcullis_http_requests_total", &inbound, "status_class"),
            grpc: metrics.by("portcullis_grpc_requests_total", &inbound, "grpc_status"),
            rules: metrics.by(DECISIONS, &inbound, "rule"),
            handshakes: metrics.count(HANDSHAKES, &[("direction", "inbound"), ("result", "success")]),
        }
    }

    /// Whether it is what was shown: answers and refusals, each by its rule, and nothing that failed.
    pub(super) fn confirms(&self) -> bool {
        let ruled = ["read-patients", "book", "no-admin", "default"].iter().all(|rule| self.rules.contains_key(*rule));
        ruled && self.classes.keys().eq(["2xx", "4xx"]) && self.grpc.keys().eq(["0", "7"]) && self.handshakes > 0
    }
}

/// What the metrics tell that bears on the verdict.
struct Told<'a> {
    refused: &'a BTreeMap<String, u64>,
    carried: &'a BTreeMap<String, u64>,
    ended: &'a BTreeMap<String, u64>,
    weak: &'a BTreeMap<String, u64>,
    outside: u64,
    handshakes: u64,
    denied: u64,
    http: &'a Http,
}

impl Told<'_> {
    /// Whether the sidecars tell the story that was shown.
    fn confirms(&self) -> bool {
        let all_reasons = REASONS.iter().all(|reason| self.refused.contains_key(*reason));
        let in_order = self.carried.keys().all(|cause| cause == "done") && !self.carried.is_empty();
        all_reasons
            && in_order
            && self.ended.contains_key("policy_changed")
            && self.weak.contains_key("3DES")
            && self.outside == 0
            && self.handshakes > 0
            && self.denied >= 2
            && self.http.confirms()
    }
}
