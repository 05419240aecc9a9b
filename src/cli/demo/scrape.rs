//! Reads a sidecar's admin address as anybody could: GET over HTTP, then the text of Prometheus or JSON.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// More than any answer of a demo sidecar.
const MOST_BYTES: u64 = 4 * 1024 * 1024;

/// The body of a GET.
pub(super) async fn get(address: SocketAddr, path: &str) -> io::Result<String> {
    let asking = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(MOST_BYTES).read_to_end(&mut answer).await?;
        let answer = String::from_utf8_lossy(&answer);
        match answer.split_once("\r\n\r\n") {
            Some((head, body)) if head.split(' ').nth(1) == Some("200") => Ok(body.to_owned()),
            _ => Err(io::Error::other(format!("{path} did not answer 200"))),
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// What `/state` says; nothing if it could not be had.
pub(super) async fn state(admin: SocketAddr) -> Value {
    let text = get(admin, "/state").await.unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

/// What `/metrics` says; nothing if it could not be had.
pub(super) async fn metrics(admin: SocketAddr) -> Metrics {
    Metrics::parse(&get(admin, "/metrics").await.unwrap_or_default())
}

type Labels = BTreeMap<String, String>;

/// The series of a scrape.
#[derive(Debug, Default)]
pub(super) struct Metrics(Vec<(String, Labels, f64)>);

impl Metrics {
    /// Reads our own metrics, whose label values hold no quotes.
    pub(super) fn parse(text: &str) -> Self {
        let series = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
            let (head, value) = line.rsplit_once(' ')?;
            let (name, labels) = head.split_once('{').unwrap_or((head, ""));
            let pairs = labels.trim_end_matches('}').split("\",").filter_map(|pair| pair.split_once("=\""));
            let labels = pairs.map(|(key, value)| (key.to_owned(), value.trim_end_matches('"').to_owned())).collect();
            Some((name.to_owned(), labels, value.parse().ok()?))
        });
        Self(series.collect())
    }

    fn matching<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = (&'a Labels, f64)> {
        let fits = |have: &Labels| labels.iter().all(|(key, value)| have.get(*key).is_some_and(|v| v == value));
        self.0.iter().filter(move |(found, have, _)| found == name && fits(have)).map(|(_, have, value)| (have, *value))
    }

    /// The sum of the series of that name that carry these labels.
    pub(super) fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.matching(name, labels).map(|(_, value)| value).sum()
    }

    /// The same as a count.
    pub(super) fn count(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        self.sum(name, labels) as u64
    }

    /// The counts by the value of one label, without zeros.
    pub(super) fn by(&self, name: &str, labels: &[(&str, &str)], label: &str) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for (have, value) in self.matching(name, labels).filter(|(_, value)| *value > 0.0) {
            *counts.entry(have.get(label).cloned().unwrap_or_default()).or_default() += value as u64;
        }
        counts
    }

    /// A quantile of a histogram, by linear interpolation inside the bucket as Prometheus does; none without samples.
    pub(super) fn quantile(&self, name: &str, labels: &[(&str, &str)], q: f64) -> Option<f64> {
        let mut buckets: Vec<(f64, f64)> = Vec::new();
        let series = format!("{name}_bucket");
        for (have, value) in self.matching(&series, labels) {
            let bound = have.get("le").and_then(|le| le.parse::<f64>().ok()).unwrap_or(f64::INFINITY);
            match buckets.iter_mut().find(|(other, _)| *other == bound) {
                Some((_, sum)) => *sum += value,
                None => buckets.push((bound, value)),
            }
        }
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        let rank = q * buckets.last().map(|(_, all)| *all).filter(|all| *all > 0.0)?;
        let (mut from, mut before) = (0.0, 0.0);
        for (bound, upto) in buckets {
            if upto >= rank {
                if bound.is_infinite() || upto <= before {
                    return Some(from);
                }
                return Some(from + (bound - from) * (rank - before) / (upto - before));
            }
            (from, before) = (bound, upto);
        }
        None
    }
}
