//! What the proxy says of one connection: the series that grew, and the line in the access log.

use std::collections::BTreeMap;
use std::future::Future;

use serde_json::Value;

use crate::harness::{Metrics, Proxy, field};

/// Everything that one connection left behind.
pub struct Seen {
    before: Metrics,
    after: Metrics,
    /// Its line in the access log.
    pub line: Value,
}

impl Seen {
    /// Where a metric has grown: by how much for each value of this label.
    pub fn grown(&self, name: &str, label: &str) -> BTreeMap<String, f64> {
        grown(&self.before, &self.after, name, label)
    }

    /// The labels of the one series of `tls_negotiated_total` that grew, in this order.
    pub fn negotiated<const N: usize>(&self, labels: [&str; N]) -> [String; N] {
        labels.map(|label| {
            let grown = self.grown("portcullis_tls_negotiated_total", label);
            assert!(grown.values().sum::<f64>() == 1.0, "{label}: {grown:?}");
            grown.into_keys().next().unwrap()
        })
    }

    /// Holds metric and access log against the reason that this failed handshake must have, and nothing else.
    pub fn failed(&self, case: &str, direction: &str, reason: &str) {
        let line = &self.line;
        let reasons = self.grown("portcullis_tls_handshakes_total", "reason");
        assert_eq!(reasons, BTreeMap::from([(reason.to_owned(), 1.0)]), "{case}: {line}");
        let results = self.grown("portcullis_tls_handshakes_total", "result");
        assert_eq!(results.into_keys().collect::<Vec<_>>(), ["failure"], "{case}");
        let directions = self.grown("portcullis_tls_handshakes_total", "direction");
        assert_eq!(directions.into_keys().collect::<Vec<_>>(), [direction], "{case}");
        assert_eq!(self.grown("portcullis_tls_negotiated_total", "compliant"), BTreeMap::new(), "{case}");
        assert_eq!(line["reason"], reason, "{case}: {line}");
        assert_eq!(line["direction"], direction, "{case}: {line}");
        assert_eq!(line["peer"], Value::Null, "{case}: {line}");
        assert!(line["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{case}: {line}");
    }

    /// Holds metric and access log against a handshake that succeeded within the profile.
    pub fn succeeded(&self, case: &str) {
        let results = self.grown("portcullis_tls_handshakes_total", "result");
        assert_eq!(results, BTreeMap::from([("success".to_owned(), 1.0)]), "{case}: {}", self.line);
        let compliant = self.grown("portcullis_tls_negotiated_total", "compliant");
        assert_eq!(compliant, BTreeMap::from([("true".to_owned(), 1.0)]), "{case}: {}", self.line);
        assert_eq!(self.line["reason"], Value::Null, "{case}: {}", self.line);
    }

    /// What the peer offered below the profile.
    pub fn weak(&self) -> Vec<String> {
        self.grown("portcullis_tls_offered_weak_total", "what").into_keys().collect()
    }
}

/// Does something that makes one connection to this listener, and waits for its line in the access log.
pub async fn seen<T>(proxy: &mut Proxy, listener: &str, act: impl Future<Output = T>) -> (T, Seen) {
    let before = proxy.metrics().await;
    let done = act.await;
    let line = access_line(proxy, listener).await;
    let after = proxy.metrics().await;
    (done, Seen { before, after, line })
}

/// The next line of this listener in the access log.
pub async fn access_line(proxy: &mut Proxy, listener: &str) -> Value {
    let of_ours = |line: &str| {
        let access = field(line, "target")? == "portcullis::access" && field(line, "listener")? == listener;
        access.then(|| serde_json::from_str(line).unwrap())
    };
    proxy.running.line(&format!("the end of a connection to {listener}"), of_ours).await
}

/// Where a metric has grown between two readings: by how much for each value of this label.
pub fn grown(before: &Metrics, after: &Metrics, name: &str, label: &str) -> BTreeMap<String, f64> {
    let mut by_value = BTreeMap::<String, f64>::new();
    for (sign, metrics) in [(1.0, after), (-1.0, before)] {
        for (labels, value) in metrics.matching(name, &[]) {
            *by_value.entry(labels.get(label).cloned().unwrap_or_default()).or_default() += sign * value;
        }
    }
    by_value.retain(|_, value| *value != 0.0);
    by_value
}
