//! The metrics, on the `prometheus` crate; nothing outside this file knows which crate it is.
//!
//! Names and labels are those users alert on: see ARCHITECTURE.md. Every label value comes out of a closed set, out of the
//! config, or out of a set with a cap of its own (`Places`).

mod http;
mod passed;

use std::collections::BTreeSet;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use self::http::Http;
use self::passed::Passed;
use super::places::Places;
use super::process::{Process, unix_now};
use super::traces::{self, Traces};
use crate::config::schema::{self, Labels, PolicyMode};
use crate::identity::keeper::{Counters, Current, SvidState};
use crate::policy::{Decision, Verdict};
use crate::posture;
use crate::proxy::ledger::Fate;
use crate::proxy::record::{Carries, Cause, ConnectionRecord, Event, RequestRecord};
use crate::tls::hello::WEAK;
use crate::tls::reason::Reason;
use crate::tls::record::{Direction, HandshakeRecord};

/// Upper bounds of the handshake histogram, seconds.
const HANDSHAKE_BUCKETS: &[f64] =
    &[0.0001, 0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];
/// The most rule names, and the most trust domains, that get a series of their own.
const MOST_NAMES: usize = 512;
const DIRECTIONS: [Direction; 2] = [Direction::Inbound, Direction::Outbound];
const VERDICTS: [Verdict; 2] = [Verdict::Allow, Verdict::Deny];
const MODES: [PolicyMode; 2] = [PolicyMode::Enforce, PolicyMode::Audit];

/// The decisions of one rule: by direction, verdict and mode. Looked up once, because each request counts one.
type RuleSeries = [OnceLock<IntCounter>; DIRECTIONS.len() * VERDICTS.len() * MODES.len()];

/// All metrics of one proxy.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    handshake_duration: HistogramVec,
    handshakes: IntCounterVec,
    negotiated: IntCounterVec,
    offered_weak: IntCounterVec,
    svid_expiry: Gauge,
    svid_rotations: IntCounterVec,
    svid_state: IntGaugeVec,
    svid_overdue: IntGauge,
    source_up: IntGauge,
    bundle_expiry: GaugeVec,
    bundle_domains: Mutex<BTreeSet<String>>,
    decisions: IntCounterVec,
    rules: Places<RuleSeries>,
    open: IntGaugeVec,
    connections: IntCounterVec,
    moving: [[[IntCounter; 2]; Carries::ALL.len()]; 2],
    peer_connections: IntCounterVec,
    peer_info: IntGaugeVec,
    peers: Places<()>,
    accept_errors: IntCounterVec,
    reloads: IntCounterVec,
    reloaded: Gauge,
    chains: IntCounterVec,
    plaintext: IntCounterVec,
    plaintext_listeners: Places<()>,
    http: Http,
    passed: Passed,
    spans: traces::Counts,
    process: Process,
    handshakes_in_progress: IntGaugeVec,
    log_lines_lost: IntCounterVec,
    lines_counted: Mutex<u64>,
    counted: Mutex<Counters>,
    chains_counted: Mutex<(u64, u64)>,
    drift: IntGaugeVec,
    drift_detected: IntCounterVec,
}

/// Registers what was made.
pub(super) fn keep<C: Collector + Clone + 'static>(
    registry: &Registry,
    made: prometheus::Result<C>,
) -> prometheus::Result<C> {
    let collector = made?;
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

impl Metrics {
    /// All metrics with their constant labels, each closed set at zero from the start.
    ///
    /// # Errors
    /// A label value that the text format cannot carry, or a name used twice: a mistake of ours or of the config.
    pub fn new(labels: &Labels, max_peers: usize, fips: bool) -> prometheus::Result<Self> {
        let constant = [
            ("service_name".to_owned(), labels.service_name.clone()),
            ("environment".to_owned(), labels.environment.clone()),
            ("domain".to_owned(), labels.domain.clone()),
        ];
        let registry = Registry::new_custom(Some("portcullis".into()), Some(constant.into_iter().collect()))?;
        let counters = |name: &str, help: &str, labels: &[&str]| {
            keep(&registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let gauges =
            |name: &str, help: &str, labels: &[&str]| keep(&registry, IntGaugeVec::new(Opts::new(name, help), labels));
        let gauge = |name: &str, help: &str| keep(&registry, Gauge::new(name, help));
        let whole = |name: &str, help: &str| keep(&registry, IntGauge::new(name, help));
        let bytes = counters(
            "bytes_total",
            "Bytes carried, from the side that connected (sent) and back (received).",
            &["direction", "protocol", "way"],
        )?;
        let moving = DIRECTIONS.map(|direction| {
            Carries::ALL.map(|carries| {
                ["sent", "received"].map(|way| bytes.with_label_values(&[direction.as_str(), carries.as_str(), way]))
            })
        });
        let build = gauges(
            "build_info",
            "Version and provider of the cryptography; always 1.",
            &["version", "provider", "fips"],
        )?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION"), "aws-lc-rs", if fips { "true" } else { "false" }]).set(1);
        let metrics = Self {
            handshake_duration: keep(
                &registry,
                HistogramVec::new(
                    HistogramOpts::new(
                        "tls_handshake_duration_seconds",
                        "From the first byte of a TLS handshake to its end, successful ones only.",
                    )
                    .buckets(HANDSHAKE_BUCKETS.to_vec()),
                    &["direction", "version", "cipher_suite", "group", "resumed"],
                ),
            )?,
            handshakes: counters(
                "tls_handshakes_total",
                "TLS handshakes by result; the reason of a failed one is of a closed set.",
                &["direction", "result", "reason"],
            )?,
            negotiated: counters(
                "tls_negotiated_total",
                "What TLS handshakes negotiated, and whether it lies within the declared profile.",
                &["direction", "version", "cipher_suite", "group", "signature", "key_type", "compliant"],
            )?,
            offered_weak: counters(
                "tls_offered_weak_total",
                "TLS handshakes in which the peer offered something below the profile.",
                &["direction", "what"],
            )?,
            svid_expiry: gauge(
                "svid_expiry_timestamp_seconds",
                "When our SVID and its chain expire, seconds since the Unix epoch; 0 without one.",
            )?,
            svid_rotations: counters(
                "svid_rotations_total",
                "Replacements of our SVID by the identity source, taken or refused.",
                &["result"],
            )?,
            svid_state: gauges("svid_state", "The state of our SVID: 1 for the one it is in.", &["state"])?,
            svid_overdue: whole(
                "svid_rotation_overdue",
                "1 while our SVID is past 60 % of its life without a newer one.",
            )?,
            source_up: whole("identity_source_up", "1 while the identity source can be reached.")?,
            bundle_expiry: keep(
                &registry,
                GaugeVec::new(
                    Opts::new(
                        "trust_bundle_expiry_timestamp_seconds",
                        "When the last authority of a trust domain expires, seconds since the Unix epoch.",
                    ),
                    &["trust_domain"],
                ),
            )?,
            bundle_domains: Mutex::default(),
            decisions: counters(
                "authorization_decisions_total",
                "Authorization decisions by rule; mode audit: what was decided and not carried out.",
                &["direction", "rule", "decision", "mode"],
            )?,
            rules: Places::new(MOST_NAMES),
            open: gauges(
                "connections_open",
                "Connections that are open, those in a handshake included.",
                &["direction", "protocol"],
            )?,
            connections: counters(
                "connections_total",
                "Connections that have ended, by cause.",
                &["direction", "protocol", "cause"],
            )?,
            moving,
            peer_connections: counters(
                "peer_connections_total",
                "Connections of each proven peer; those beyond telemetry.max_peers share spiffe_id other.",
                &["direction", "spiffe_id"],
            )?,
            peer_info: gauges(
                "peer_info",
                "Proven peers, at most telemetry.max_peers of them, the rest as other; always 1.",
                &["direction", "spiffe_id"],
            )?,
            peers: Places::new(max_peers),
            accept_errors: counters("accept_errors_total", "Failures to accept a connection, by kind.", &["kind"])?,
            reloads: counters("config_reloads_total", "Reloads of the config, by result.", &["result"])?,
            reloaded: gauge("config_last_reload_success_timestamp_seconds", "When the config in force was taken.")?,
            chains: counters(
                "tls_chain_memory_total",
                "Certificate chains of peers that were remembered (hit) or verified anew (miss).",
                &["result"],
            )?,
            plaintext: counters(
                "plaintext_connections_total",
                "Connections to inbound listeners that were plaintext, by what became of them.",
                &["listener", "result"],
            )?,
            plaintext_listeners: Places::new(MOST_NAMES),
            http: Http::new(&registry)?,
            passed: Passed::new(&registry)?,
            spans: traces::Counts::new(&registry)?,
            process: Process::new(&registry)?,
            handshakes_in_progress: gauges(
                "tls_handshakes_in_progress",
                "TLS handshakes that hold one of the tls.max_handshakes places.",
                &[],
            )?,
            log_lines_lost: counters(
                "log_lines_lost_total",
                "Log lines that were dropped because stderr was too slow.",
                &[],
            )?,
            lines_counted: Mutex::default(),
            counted: Mutex::default(),
            chains_counted: Mutex::default(),
            drift: gauges("drift", "1 while something is not as declared.", &["kind"])?,
            drift_detected: counters(
                "drift_detected_total",
                "How often something came to differ from what is declared.",
                &["kind"],
            )?,
            registry,
        };
        metrics.reloaded.set(unix_now());
        metrics.begin_at_zero();
        Ok(metrics)
    }

    fn begin_at_zero(&self) {
        for direction in DIRECTIONS.map(Direction::as_str) {
            self.handshakes.with_label_values(&[direction, "success", "none"]);
            for reason in Reason::ALL {
                self.handshakes.with_label_values(&[direction, "failure", reason.as_str()]);
            }
            for what in WEAK {
                self.offered_weak.with_label_values(&[direction, what]);
            }
            for carries in Carries::ALL.map(Carries::as_str) {
                for cause in Cause::ALL {
                    self.connections.with_label_values(&[direction, carries, cause.as_str()]);
                }
                self.open.with_label_values(&[direction, carries]);
            }
        }
        for result in ["success", "refused"] {
            self.svid_rotations.with_label_values(&[result]);
        }
        for result in ["success", "failure"] {
            self.reloads.with_label_values(&[result]);
        }
        for kind in ["descriptors", "memory", "other"] {
            self.accept_errors.with_label_values(&[kind]);
        }
        for kind in posture::Kind::ALL.map(posture::Kind::as_str) {
            self.drift.with_label_values(&[kind]);
            self.drift_detected.with_label_values(&[kind]);
        }
        for result in ["hit", "miss"] {
            self.chains.with_label_values(&[result]);
        }
        self.identity(&Current::default());
    }

    /// A handshake ended.
    pub fn handshake(&self, record: &HandshakeRecord) {
        let direction = record.direction.as_str();
        match (&record.failure, &record.negotiated) {
            (Some(failure), _) => {
                self.handshakes.with_label_values(&[direction, "failure", failure.reason.as_str()]).inc();
            }
            (None, Some(n)) => {
                self.handshakes.with_label_values(&[direction, "success", "none"]).inc();
                let truth = |is: bool| if is { "true" } else { "false" };
                self.handshake_duration
                    .with_label_values(&[direction, n.version, n.cipher_suite, n.group, truth(n.resumed)])
                    .observe(record.took.as_secs_f64());
                let labels = [
                    direction,
                    n.version,
                    n.cipher_suite,
                    n.group,
                    n.signature,
                    n.peer_key.as_str(),
                    truth(n.compliant),
                ];
                self.negotiated.with_label_values(&labels).inc();
            }
            (None, None) => {}
        }
        for what in &record.offered_weak {
            self.offered_weak.with_label_values(&[direction, what]).inc();
        }
    }

    /// A decision was made. What shadow rules say by themselves is counted beside it, in mode audit.
    pub fn decision(&self, direction: Direction, decision: &Decision) {
        self.count_decision(direction, &decision.rule, decision.verdict, decision.mode);
        if let Some((rule, verdict)) = &decision.audited {
            self.count_decision(direction, rule, *verdict, PolicyMode::Audit);
        }
    }

    fn count_decision(&self, direction: Direction, rule: &str, verdict: Verdict, mode: PolicyMode) {
        let word = |mode| match mode {
            PolicyMode::Enforce => "enforce",
            PolicyMode::Audit => "audit",
        };
        let forget = |gone: &str, _: &RuleSeries| {
            for direction in DIRECTIONS.map(Direction::as_str) {
                for verdict in VERDICTS.map(Verdict::as_str) {
                    for mode in MODES.map(word) {
                        // Most of these combinations never were.
                        let _ = self.decisions.remove_label_values(&[direction, gone, verdict, mode]);
                    }
                }
            }
        };
        let at = (direction as usize * VERDICTS.len() + verdict as usize) * MODES.len() + mode as usize;
        self.rules.visit(rule, true, Instant::now(), forget, |rule, series| {
            let labels = [direction.as_str(), rule, verdict.as_str(), word(mode)];
            if let Some(one) = series.get(at) {
                one.get_or_init(|| self.decisions.with_label_values(&labels)).inc();
            }
        });
    }

    /// A request's head has arrived.
    pub fn request_begun(&self, direction: Direction) {
        self.http.begun(direction);
    }

    /// A request ended.
    pub fn request(&self, record: &RequestRecord) {
        self.http.ended(record, Instant::now());
    }

    /// Starts sending spans; what becomes of them is counted here.
    ///
    /// # Errors
    /// The endpoint cannot be used, or there can be no thread; in words.
    pub fn traces(&self, declared: &schema::Traces, labels: &Labels) -> Result<Traces, String> {
        Traces::start(declared, labels, self.spans.clone())
    }

    /// Something happened that is no end of anything.
    pub fn event(&self, direction: Direction, listener: &str, event: Event) {
        match event {
            Event::PassedTls(watched) => self.passed.tls(watched),
            Event::PassedPlaintext => self.passed.plaintext(listener),
            Event::OfferedWeak(what) => self.offered_weak.with_label_values(&[direction.as_str(), what]).inc(),
            Event::Plaintext(fate) => self.count_plaintext(listener, fate),
            event => self.http.event(direction, event),
        }
    }

    fn count_plaintext(&self, listener: &str, fate: Fate) {
        let forget = |gone: &str, (): &()| {
            for fate in Fate::ALL.map(Fate::as_str) {
                // Most of these never were.
                let _ = self.plaintext.remove_label_values(&[gone, fate]);
            }
        };
        self.plaintext_listeners.visit(listener, true, Instant::now(), forget, |listener, ()| {
            self.plaintext.with_label_values(&[listener, fate.as_str()]).inc();
        });
    }

    /// A connection was accepted.
    pub fn opened(&self, direction: Direction, carries: Carries) {
        self.open.with_label_values(&[direction.as_str(), carries.as_str()]).inc();
    }

    /// Bytes moved.
    pub fn moved(&self, direction: Direction, carries: Carries, sent: u64, received: u64) {
        let [inbound, outbound] = &self.moving;
        let [tcp, http, detect, pool] = match direction {
            Direction::Inbound => inbound,
            Direction::Outbound => outbound,
        };
        let [out, back] = match carries {
            Carries::Tcp => tcp,
            Carries::Http => http,
            Carries::Detect => detect,
            Carries::Pool => pool,
        };
        out.inc_by(sent);
        back.inc_by(received);
    }

    /// A connection ended.
    pub fn closed(&self, record: &ConnectionRecord) {
        let direction = record.direction.as_str();
        self.open.with_label_values(&[direction, record.carries.as_str()]).dec();
        self.connections.with_label_values(&[direction, record.carries.as_str(), record.cause.as_str()]).inc();
        if let Some(peer) = &record.peer {
            // A crowd that no rule admits must not push out those that matter.
            let admitted = !matches!(record.cause, Cause::Denied | Cause::Handshake | Cause::Limit);
            self.count_peer(direction, peer.as_str(), admitted, Instant::now());
        }
    }

    fn count_peer(&self, direction: &str, peer: &str, may_displace: bool, now: Instant) {
        let forget = |gone: &str, (): &()| {
            for direction in DIRECTIONS.map(Direction::as_str) {
                // Only a direction that was used has series.
                let _ = self.peer_connections.remove_label_values(&[direction, gone]);
                let _ = self.peer_info.remove_label_values(&[direction, gone]);
            }
        };
        self.peers.visit(peer, may_displace, now, forget, |peer, ()| {
            self.peer_connections.with_label_values(&[direction, peer]).inc();
            self.peer_info.with_label_values(&[direction, peer]).set(1);
        });
    }

    /// Accepting failed.
    pub fn accept_failed(&self, kind: &'static str) {
        self.accept_errors.with_label_values(&[kind]).inc();
    }

    /// The config was reloaded, or could not be.
    pub fn reloaded(&self, success: bool) {
        self.reloads.with_label_values(&[if success { "success" } else { "failure" }]).inc();
        if success {
            self.reloaded.set(unix_now());
        }
    }

    /// A drift began, or is over.
    pub fn drift(&self, kind: posture::Kind, stands: bool) {
        self.drift.with_label_values(&[kind.as_str()]).set(i64::from(stands));
        if stands {
            self.drift_detected.with_label_values(&[kind.as_str()]).inc();
        }
    }

    /// The identity or its state changed.
    pub fn identity(&self, current: &Current) {
        let states = [
            (SvidState::Absent, "absent"),
            (SvidState::Fresh, "fresh"),
            (SvidState::Stale, "stale"),
            (SvidState::Expired, "expired"),
        ];
        for (state, name) in states {
            self.svid_state.with_label_values(&[name]).set(i64::from(current.state == state));
        }
        self.svid_overdue.set(i64::from(current.rotation_overdue));
        self.source_up.set(i64::from(current.source_reachable));
        self.svid_expiry.set(current.not_after.unwrap_or(0) as f64);
        {
            let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
            let more = |now: u64, before: u64| now.saturating_sub(before);
            let (success, refused) = (&["success"], &["refused"]);
            self.svid_rotations.with_label_values(success).inc_by(more(current.counters.rotations, counted.rotations));
            self.svid_rotations.with_label_values(refused).inc_by(more(current.counters.refused, counted.refused));
            *counted = current.counters;
        }
        let Some(identity) = &current.identity else { return };
        let mut known = self.bundle_domains.lock().unwrap_or_else(PoisonError::into_inner);
        let mut now = BTreeSet::new();
        for (domain, authorities) in identity.bundles.iter().take(MOST_NAMES) {
            let last = authorities.iter().map(|authority| authority.not_after).max().unwrap_or(0);
            self.bundle_expiry.with_label_values(&[domain.as_str()]).set(last as f64);
            now.insert(domain.as_str().to_owned());
        }
        for gone in known.difference(&now) {
            let _ = self.bundle_expiry.remove_label_values(&[gone.as_str()]);
        }
        *known = now;
    }

    /// The chain memory's own counts, which begin anew with each generation of trust.
    pub fn chain_memory(&self, counts: (u64, u64)) {
        let mut counted = self.chains_counted.lock().unwrap_or_else(PoisonError::into_inner);
        let before = if counts.0 < counted.0 || counts.1 < counted.1 { (0, 0) } else { *counted };
        self.chains.with_label_values(&["hit"]).inc_by(counts.0 - before.0);
        self.chains.with_label_values(&["miss"]).inc_by(counts.1 - before.1);
        *counted = counts;
    }

    /// How many handshakes are under way at this moment. There is no series before the first call.
    pub fn handshakes_in_progress(&self, now: usize) {
        let none: &[&str] = &[];
        self.handshakes_in_progress.with_label_values(none).set(i64::try_from(now).unwrap_or(i64::MAX));
    }

    /// How many log lines were lost since the start, all together. There is no series before the first call.
    fn log_lines_lost(&self, all: u64) {
        let none: &[&str] = &[];
        let mut counted = self.lines_counted.lock().unwrap_or_else(PoisonError::into_inner);
        self.log_lines_lost.with_label_values(none).inc_by(all.saturating_sub(*counted));
        *counted = all.max(*counted);
    }

    /// The text for `/metrics` and its content type.
    pub fn render(&self) -> (&'static str, String) {
        self.process.refresh();
        if let Some(lost) = super::log::lines_lost() {
            self.log_lines_lost(lost);
        }
        let families = self.registry.gather();
        let text = TextEncoder::new().encode_to_string(&families).unwrap_or_default();
        ("text/plain; version=0.0.4; charset=utf-8", text)
    }
}

#[cfg(test)]
mod tests;
