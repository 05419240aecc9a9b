//! The metrics of requests.
//!
//! Recording one must cost far less than carrying it: the series of a route are looked up by their labels once and kept in
//! its place from then on. Routes come out of the config, and nothing else that a peer chooses is a label.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

use super::{DIRECTIONS, keep};
use crate::proxy::record::{Event, RequestCause, RequestRecord};
use crate::telemetry::places::{OTHER, Places};
use crate::tls::record::Direction;

/// Upper bounds of the duration histogram, seconds: from a call on the same machine to a long poll.
const BUCKETS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// The most routes that have series of their own.
const MOST_ROUTES: usize = 256;
/// The most combinations of direction, method and status class, over all routes, that have series of their own; a peer
/// chooses the method. Each is a histogram of about 1.5 kB.
const MOST_SERIES: usize = 4096;

/// The registered methods of RFC 9110, section 9.3, and PATCH (RFC 5789); others share the last.
const METHODS: [&str; 10] = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "CONNECT", "TRACE", OTHER];
/// The classes of status codes (RFC 9110, section 15), and no answer at all.
const CLASSES: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", "none"];
/// The codes of gRPC, and whatever else an upstream calls its status.
const GRPC: [&str; 18] =
    ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16", OTHER];
/// What a `detect` listener may find.
const DETECTED: [&str; 5] = ["tls", "http1", "http2", "opaque", "timeout"];

/// How many requests there were, and how long they took.
type Requests = (IntCounter, Histogram);

/// The series of one route.
#[derive(Debug)]
struct Route {
    /// By direction, method and status class.
    requests: Box<[OnceLock<Requests>; DIRECTIONS.len() * METHODS.len() * CLASSES.len()]>,
    /// By direction and gRPC status.
    grpc: Box<[OnceLock<IntCounter>; DIRECTIONS.len() * GRPC.len()]>,
}

impl Default for Route {
    fn default() -> Self {
        Self { requests: Box::new([const { OnceLock::new() }; _]), grpc: Box::new([const { OnceLock::new() }; _]) }
    }
}

/// All metrics of requests.
#[derive(Debug)]
pub(super) struct Http {
    requests: IntCounterVec,
    duration: HistogramVec,
    grpc: IntCounterVec,
    routes: Places<Route>,
    /// How many elements of `Route::requests` there are in all places.
    series: AtomicUsize,
    in_flight: [IntGauge; 2],
    /// By direction, then in the order of [`RequestCause::ALL`].
    ends: [Vec<IntCounter>; 2],
    detected: IntCounterVec,
    retried: IntCounter,
    retry_refused: IntCounter,
    ejected: IntCounter,
    restored: IntCounter,
    shadow_differs: IntCounter,
    module_failures: IntCounterVec,
}

impl Http {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let counters =
            |name: &str, help: &str, labels: &[&str]| keep(registry, IntCounterVec::new(Opts::new(name, help), labels));
        let in_flight = keep(
            registry,
            IntGaugeVec::new(Opts::new("http_requests_in_flight", "Requests that are under way."), &["direction"]),
        )?;
        let ends =
            counters("http_request_ends_total", "Requests that have ended, by how they did.", &["direction", "cause"])?;
        let detected = counters(
            "detected_total",
            "What listeners that detect the protocol made of the first bytes.",
            &["direction", "result"],
        )?;
        for direction in DIRECTIONS.map(Direction::as_str) {
            for result in DETECTED {
                detected.with_label_values(&[direction, result]);
            }
        }
        let retries = counters(
            "http_retries_total",
            "Requests sent once more, and those that could have been if the budget had not been used up.",
            &["result"],
        )?;
        let ejections = counters(
            "upstream_ejections_total",
            "Addresses of upstreams that get no more requests for a while, and those that get them again.",
            &["change"],
        )?;
        let labels = ["direction", "method", "status_class", "route"];
        Ok(Self {
            requests: counters("http_requests_total", "Requests that have ended, by route and status class.", &labels)?,
            duration: keep(
                registry,
                HistogramVec::new(
                    HistogramOpts::new(
                        "http_request_duration_seconds",
                        "From the end of a request's head to the end of its response.",
                    )
                    .buckets(BUCKETS.to_vec()),
                    &labels,
                ),
            )?,
            grpc: counters(
                "grpc_requests_total",
                "gRPC calls that have ended, by gRPC's own status.",
                &["direction", "grpc_status", "route"],
            )?,
            routes: Places::new(MOST_ROUTES),
            series: AtomicUsize::new(0),
            in_flight: DIRECTIONS.map(|direction| in_flight.with_label_values(&[direction.as_str()])),
            ends: DIRECTIONS.map(|direction| {
                let ended = |cause: &RequestCause| ends.with_label_values(&[direction.as_str(), cause.as_str()]);
                RequestCause::ALL.iter().map(ended).collect()
            }),
            detected,
            retried: retries.with_label_values(&["sent"]),
            retry_refused: retries.with_label_values(&["budget_exhausted"]),
            ejected: ejections.with_label_values(&["ejected"]),
            restored: ejections.with_label_values(&["restored"]),
            shadow_differs: keep(
                registry,
                IntCounter::new(
                    "rego_shadow_differs_total",
                    "Requests that the shadow Rego module would have decided otherwise.",
                ),
            )?,
            module_failures: keep(
                registry,
                IntCounterVec::new(
                    Opts::new(
                        "rego_failures_total",
                        "Requests that were refused because a Rego module gave no answer.",
                    ),
                    &["failure"],
                ),
            )?,
        })
    }

    /// A request's head has arrived.
    pub(super) fn begun(&self, direction: Direction) {
        if let Some(gauge) = self.in_flight.get(direction as usize) {
            gauge.inc();
        }
    }

    /// A request ended.
    pub(super) fn ended(&self, record: &RequestRecord, now: Instant) {
        let direction = record.direction as usize;
        if let Some(gauge) = self.in_flight.get(direction) {
            gauge.dec();
        }
        if let Some(ended) = self.ends.get(direction).and_then(|ends| ends.get(record.cause as usize)) {
            ended.inc();
        }
        let (method, class) = (method(&record.method), class(record.status));
        let at = (direction * METHODS.len() + method) * CLASSES.len() + class;
        let forget = |gone: &str, route: &Route| self.forget(gone, route);
        self.routes.visit(&record.route, true, now, forget, |name, route| {
            if let Some((count, duration)) = self.series(at, name, route) {
                count.inc();
                duration.observe(record.duration.as_secs_f64());
            }
            if let Some(status) = record.grpc_status {
                let status = usize::from(status).min(GRPC.len() - 1);
                if let (Some(one), Some(word)) = (route.grpc.get(direction * GRPC.len() + status), GRPC.get(status)) {
                    let labels = [record.direction.as_str(), word, name];
                    one.get_or_init(|| self.grpc.with_label_values(&labels)).inc();
                }
            }
        });
    }

    /// The series of a route; those of `other` where there are too many already.
    fn series<'a>(&'a self, at: usize, name: &str, route: &'a Route) -> Option<&'a Requests> {
        let cell = route.requests.get(at)?;
        if let Some(series) = cell.get() {
            return Some(series);
        }
        let (cell, name) = if name != OTHER && self.series.load(Ordering::Relaxed) >= MOST_SERIES {
            (self.routes.other().requests.get(at)?, OTHER)
        } else {
            (cell, name)
        };
        let labels = labels(at, name)?;
        Some(cell.get_or_init(|| {
            if name != OTHER {
                self.series.fetch_add(1, Ordering::Relaxed);
            }
            (self.requests.with_label_values(&labels), self.duration.with_label_values(&labels))
        }))
    }

    /// Takes the series of a route out of the registry.
    fn forget(&self, name: &str, route: &Route) {
        let had = route.requests.iter().enumerate().filter(|(_, cell)| cell.get().is_some());
        for labels in had.filter_map(|(at, _)| labels(at, name)) {
            let _ = self.requests.remove_label_values(&labels);
            let _ = self.duration.remove_label_values(&labels);
            self.series.fetch_sub(1, Ordering::Relaxed);
        }
        for direction in DIRECTIONS.map(Direction::as_str) {
            for status in GRPC {
                // Most of these never were.
                let _ = self.grpc.remove_label_values(&[direction, status, name]);
            }
        }
    }

    /// Something worth counting that is no end of anything.
    pub(super) fn event(&self, direction: Direction, event: Event) {
        match event {
            // Counted by `Passed`.
            Event::PassedTls(_) | Event::OfferedWeak(_) | Event::PassedPlaintext => {}
            Event::Detected(result) => self.detected.with_label_values(&[direction.as_str(), result]).inc(),
            // No request, and counted beside them.
            Event::Plaintext(_) => {}
            Event::Retried => self.retried.inc(),
            Event::RetryRefused => self.retry_refused.inc(),
            Event::Ejected => self.ejected.inc(),
            Event::Restored => self.restored.inc(),
            Event::ShadowDiffered => self.shadow_differs.inc(),
            Event::ModuleFailed(failure) => self.module_failures.with_label_values(&[failure]).inc(),
        }
    }
}

/// The labels of the element `at` of `Route::requests`.
fn labels(at: usize, route: &str) -> Option<[&str; 4]> {
    let (rest, class) = (at / CLASSES.len(), at % CLASSES.len());
    let (direction, method) = (rest / METHODS.len(), rest % METHODS.len());
    Some([DIRECTIONS.get(direction)?.as_str(), METHODS.get(method)?, CLASSES.get(class)?, route])
}

/// Where a method stands among [`METHODS`].
fn method(method: &::http::Method) -> usize {
    let registered = METHODS.len() - 1;
    METHODS.iter().take(registered).position(|word| *word == method.as_str()).unwrap_or(registered)
}

/// Where a status stands among [`CLASSES`].
fn class(status: Option<u16>) -> usize {
    match status {
        Some(status @ 100..600) => usize::from(status / 100 - 1),
        _ => CLASSES.len() - 1,
    }
}

#[cfg(test)]
mod tests;
