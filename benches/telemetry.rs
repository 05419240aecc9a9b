//! What telling of one request costs: all of its metrics with the decision about it, and its line in the access log,
//! and its place in a trace.
//!
//! The point to look at: the metrics well under a microsecond, and with four threads at the same series not many times
//! more.

use std::hint::black_box;
use std::time::{Duration, Instant, SystemTime};

use criterion::{Criterion, criterion_group, criterion_main};
use portcullis::config::schema::{Labels, PolicyMode};
use portcullis::policy::{Decision, Verdict};
use portcullis::proxy::listener::Client;
use portcullis::proxy::record::{HttpVersion, RequestCause, RequestRecord};
use portcullis::proxy::trace::Sampler;
use portcullis::telemetry::{Metrics, access};
use portcullis::tls::record::Direction;

fn record() -> RequestRecord {
    RequestRecord {
        listener: "api".into(),
        direction: Direction::Inbound,
        client: Client::Unix,
        peer: None,
        local: None,
        tls: None,
        upstream: None,
        rule: None,
        route: "/patients/{id}".into(),
        method: http::Method::GET,
        host: "records.nhs.example".into(),
        path: "/patients/7".into(),
        version: HttpVersion::Http2,
        status: Some(200),
        grpc_status: None,
        bytes_sent: 0,
        bytes_received: 100,
        began: SystemTime::UNIX_EPOCH,
        duration: Duration::from_millis(3),
        attempts: 1,
        cause: RequestCause::Done,
        detail: String::new(),
        trace: None,
    }
}

fn request(c: &mut Criterion) {
    let Ok(metrics) = Metrics::new(&Labels::default(), 100, false) else { return };
    let decision = Decision { verdict: Verdict::Allow, rule: "read".into(), mode: PolicyMode::Enforce, audited: None };
    let tell = |record: &RequestRecord| {
        metrics.request_begun(record.direction);
        metrics.decision(record.direction, &decision);
        metrics.request(record);
    };
    let mut group = c.benchmark_group("telemetry/request");
    let record = record();
    group.bench_function("metrics", |b| b.iter(|| tell(black_box(&record))));
    group.bench_function("metrics_4_threads", |b| {
        b.iter_custom(|rounds| {
            let began = Instant::now();
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| (0..rounds).for_each(|_| tell(black_box(&record))));
                }
            });
            began.elapsed()
        });
    });
    let json = tracing_subscriber::fmt().json().flatten_event(true).with_writer(std::io::sink).finish();
    tracing::subscriber::with_default(json, || {
        group.bench_function("access_log", |b| b.iter(|| access::request(black_box(&record))));
    });
    let sampler = Sampler::ratio(0.1);
    let mut parent = http::HeaderMap::new();
    parent.insert(
        "traceparent",
        http::HeaderValue::from_static("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"),
    );
    for (case, headers) in [("trace_begun", http::HeaderMap::new()), ("trace_continued", parent)] {
        group.bench_function(case, |b| {
            b.iter_batched_ref(
                || headers.clone(),
                |headers| {
                    let trace = sampler.incoming(headers);
                    sampler.outgoing(trace.as_ref(), headers);
                },
                criterion::BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, request);
criterion_main!(benches);
