//! Spans on their way to a collector, by OTLP.
//!
//! In: the records of sampled requests. Out: batches of spans, over gRPC or HTTP. Between the two is a bounded queue, and
//! behind it a thread with a runtime of its own: a collector that is absent, slow or a black hole costs a request one
//! failed attempt to queue, and costs us spans, which are counted. `opentelemetry-otlp` encodes and sends; its batching
//! processor is not used, because its shutdown blocks the thread that asks for it.

mod span;

use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry_otlp::{Protocol, SpanExporter as Otlp, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkError;
use opentelemetry_sdk::trace::SpanExporter;
use prometheus::{IntCounter, IntCounterVec, Opts, Registry};
use tokio::sync::{mpsc, oneshot};

use super::metrics::keep;
use crate::config::schema::{Labels, TraceProtocol, Traces as Declared};
use crate::proxy::record::RequestRecord;

/// How long spans are gathered before they are sent. The queue's reader sleeps so long after the first of a batch, so that
/// not every span wakes a thread.
const GATHER: Duration = Duration::from_millis(200);
/// The longest that [`Traces::flush`] waits.
const FLUSH: Duration = Duration::from_secs(5);
/// The most bytes of a text of others that a span holds. With the length of the queue it bounds the memory of what waits.
const LONGEST_TEXT: usize = 1024;

/// What became of spans.
#[derive(Clone, Debug)]
pub(super) struct Counts {
    exported: IntCounter,
    queue_full: IntCounter,
    failed: IntCounter,
}

impl Counts {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let dropped = Opts::new("spans_dropped_total", "Spans that no collector got, by reason.");
        let dropped = keep(registry, IntCounterVec::new(dropped, &["reason"]))?;
        let exported = IntCounter::new("spans_exported_total", "Spans that the collector took.");
        Ok(Self {
            exported: keep(registry, exported)?,
            queue_full: dropped.with_label_values(&["queue_full"]),
            failed: dropped.with_label_values(&["export_failed"]),
        })
    }
}

/// The way to the collector.
#[derive(Debug)]
pub struct Traces {
    spans: mpsc::Sender<RequestRecord>,
    flushes: mpsc::Sender<oneshot::Sender<()>>,
    counts: Counts,
}

impl Traces {
    /// Starts the thread that sends. It ends once this is dropped and what waited is sent.
    ///
    /// # Errors
    /// The endpoint cannot be used, or there can be no thread; in words.
    pub(super) fn start(declared: &Declared, labels: &Labels, counts: Counts) -> Result<Self, String> {
        let (spans, waiting) = mpsc::channel(declared.queue);
        let (flushes, asked) = mpsc::channel(1);
        let (ready, started) = std::sync::mpsc::sync_channel(1);
        let (theirs, labels, declared) = (counts.clone(), labels.clone(), declared.clone());
        // The runtime is made and dropped on its own thread: dropped on one of another runtime it would panic.
        let thread = std::thread::Builder::new().name("traces".into()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = match runtime {
                Ok(runtime) => runtime,
                Err(error) => return drop(ready.send(Err(format!("the traces' runtime cannot be started: {error}")))),
            };
            let made = {
                let _within = runtime.enter();
                exporter(&declared, &labels)
            };
            match made {
                Ok(exporter) => {
                    let _ = ready.send(Ok(()));
                    runtime.block_on(Sending::new(exporter, declared, theirs).run(waiting, asked));
                }
                Err(why) => drop(ready.send(Err(why))),
            }
            // A name that is being looked up must not hold the thread.
            runtime.shutdown_background();
        });
        thread.map_err(|error| format!("the traces' thread cannot be started: {error}"))?;
        started.recv().unwrap_or_else(|_| Err("the traces' thread ended at once".into()))?;
        Ok(Self { spans, flushes, counts })
    }

    /// Puts the span of a request into the queue, if it is sampled and there is room. Never waits.
    pub fn send(&self, record: &RequestRecord) {
        if !record.trace.is_some_and(|trace| trace.sampled) {
            return;
        }
        match self.spans.try_reserve() {
            Ok(place) => place.send(kept(record)),
            Err(_) => self.counts.queue_full.inc(),
        }
    }

    /// Waits until what is in the queue is sent or given up, five seconds at most.
    pub async fn flush(&self) {
        let (done, wait) = oneshot::channel();
        let flushed = async {
            if self.flushes.send(done).await.is_ok() {
                let _ = wait.await;
            }
        };
        if tokio::time::timeout(FLUSH, flushed).await.is_err() {
            tracing::warn!("the collector of traces did not take the last spans in time");
        }
    }
}

/// What of a record waits in the queue.
fn kept(record: &RequestRecord) -> RequestRecord {
    let mut kept = record.clone();
    if kept.path.len() > LONGEST_TEXT {
        kept.path = cut(&kept.path).into();
    }
    if kept.host.len() > LONGEST_TEXT {
        kept.host = cut(&kept.host).into();
    }
    if kept.detail.len() > LONGEST_TEXT {
        kept.detail = cut(&kept.detail).to_owned();
    }
    kept
}

fn cut(text: &str) -> &str {
    text.get(..text.floor_char_boundary(LONGEST_TEXT)).unwrap_or_default()
}

/// The exporter, within the runtime that it is to work on. Nothing is connected yet.
fn exporter(declared: &Declared, labels: &Labels) -> Result<Otlp, String> {
    let builder = Otlp::builder();
    let timeout = declared.timeout.0;
    let exporter = match declared.protocol {
        TraceProtocol::Grpc => builder.with_tonic().with_endpoint(&declared.endpoint).with_timeout(timeout).build(),
        TraceProtocol::Http => {
            // A URL without a path means the usual one (OTLP specification, "OTLP/HTTP Request").
            let (scheme, rest) = declared.endpoint.split_once("://").unwrap_or_default();
            let endpoint = match rest.split_once('/') {
                Some((_, path)) if !path.is_empty() => declared.endpoint.clone(),
                _ => format!("{scheme}://{}/v1/traces", rest.trim_end_matches('/')),
            };
            let http = builder.with_http().with_protocol(Protocol::HttpBinary);
            http.with_endpoint(endpoint).with_timeout(timeout).build()
        }
    };
    let mut exporter = exporter.map_err(|error| format!("telemetry.traces: {error}"))?;
    let name = if labels.service_name.is_empty() { "portcullis" } else { &labels.service_name };
    let mut resource = vec![KeyValue::new("service.name", name.to_owned())];
    if !labels.environment.is_empty() {
        resource.push(KeyValue::new("deployment.environment.name", labels.environment.clone()));
    }
    exporter.set_resource(&Resource::builder_empty().with_attributes(resource).build());
    Ok(exporter)
}

/// The thread's own.
struct Sending<E> {
    exporter: E,
    timeout: Duration,
    /// Spans in one batch.
    most: usize,
    counts: Counts,
    endpoint: String,
    failing: bool,
}

impl<E: SpanExporter> Sending<E> {
    fn new(exporter: E, declared: Declared, counts: Counts) -> Self {
        Self {
            exporter,
            timeout: declared.timeout.0,
            most: declared.max_batch,
            counts,
            endpoint: declared.endpoint,
            failing: false,
        }
    }

    async fn run(mut self, mut waiting: mpsc::Receiver<RequestRecord>, mut asked: mpsc::Receiver<oneshot::Sender<()>>) {
        let mut batch = Vec::new();
        loop {
            let mut flushed = None;
            tokio::select! {
                Some(done) = asked.recv() => flushed = Some(done),
                count = waiting.recv_many(&mut batch, self.most) => {
                    if count == 0 {
                        break;
                    }
                }
            }
            if flushed.is_none() && batch.len() < self.most {
                tokio::select! {
                    () = tokio::time::sleep(GATHER) => {}
                    Some(done) = asked.recv() => flushed = Some(done),
                }
            }
            loop {
                while batch.len() < self.most
                    && let Ok(record) = waiting.try_recv()
                {
                    batch.push(record);
                }
                if batch.is_empty() {
                    break;
                }
                self.send(&mut batch).await;
            }
            if let Some(done) = flushed {
                let _ = done.send(());
            }
        }
    }

    async fn send(&mut self, batch: &mut Vec<RequestRecord>) {
        let spans: Vec<_> = batch.drain(..).filter_map(|record| span::of(&record)).collect();
        let count = u64::try_from(spans.len()).unwrap_or(u64::MAX);
        // The exporter has a timeout too, but retries, and name resolution, are not all within it.
        let outcome = tokio::time::timeout(self.timeout, self.exporter.export(spans)).await;
        match outcome.unwrap_or(Err(OTelSdkError::Timeout(self.timeout))) {
            Ok(()) => {
                self.counts.exported.inc_by(count);
                if std::mem::take(&mut self.failing) {
                    tracing::info!(endpoint = self.endpoint, "the collector of traces takes spans again");
                }
            }
            Err(error) => {
                self.counts.failed.inc_by(count);
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(endpoint = self.endpoint, %error, "spans cannot be sent to the collector of traces");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
