//! Traces, as a receiver of real OTLP sees them: spans of both sidecars in the caller's trace, each under the one before,
//! and the workload under the last. A collector that is gone, silent, slow or unfriendly costs a request nothing.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Instant;

use serde_json::Value;
use tokio::process::Command;

use crate::agent::{go, heard};
use crate::harness::{Proxy, Running, free_port, succeeds, tool};
use crate::pair::{Extra, Pair, Way, curl, http_origin, requests_seen};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";
const DROPPED: &str = "portcullis_spans_dropped_total";

/// A receiver, and where it takes gRPC and HTTP.
async fn receiver(arguments: &[&str]) -> (Running, SocketAddr, SocketAddr) {
    let mut running = Running::start(go("otlp-receiver").args(arguments));
    let listening = heard(&mut running, "where it listens", |line| line["event"] == "listening").await;
    let address = |name: &str| listening[name].as_str().unwrap().parse().unwrap();
    let (grpc, http) = (address("grpc"), address("http"));
    (running, grpc, http)
}

fn telemetry(endpoint: SocketAddr, protocol: &str, ratio: f64) -> String {
    format!("telemetry: {{ traces: {{ endpoint: 'http://{endpoint}', protocol: {protocol}, ratio: {ratio} }} }}\n")
}

async fn traced_pair(origin: SocketAddr, telemetry: &str) -> Pair {
    Pair::start(origin, Extra { server: telemetry, client: telemetry, ..Extra::default() }).await
}

/// The next span of each of the two sidecars in this trace, by direction of its proxy.
async fn two_spans(receiver: &mut Running, trace: &str) -> HashMap<String, Value> {
    let mut spans = HashMap::new();
    while spans.len() < 2 {
        let span = heard(receiver, "a span", |line| line["event"] == "span" && line["trace_id"] == trace).await;
        spans.insert(span["span_id"].as_str().unwrap().to_owned(), span);
    }
    spans
}

async fn spans_lead_from_the_caller_to_the_workload(protocol: &str) {
    let (mut origin, at) = http_origin().await;
    let (mut collector, grpc, http) = receiver(&[]).await;
    let endpoint = if protocol == "grpc" { grpc } else { http };
    // The ratio is for traces that begin here; the caller has decided for this one.
    let mut pair = traced_pair(at, &telemetry(endpoint, protocol, 0.0)).await;
    let head = format!(
        "POST /status/503?token=secret HTTP/1.1\r\nHost: records.example\r\ntraceparent: 00-{TRACE}-{CALLER}-01\r\ntracestate: vendor=abc\r\nContent-Length: 0"
    );
    let way = Way::Plain(pair.address);
    assert_eq!(way.request(&head).await.status, 503);
    let seen = heard(&mut origin, "the request", |line| line["event"] == "request").await;
    let workload = seen["traceparent"].as_str().unwrap().to_owned();
    let parts: Vec<&str> = workload.split('-').collect();
    assert_eq!((parts[0], parts[1], parts[3]), ("00", TRACE, "01"), "{workload}");
    assert_eq!(seen["tracestate"], "vendor=abc", "{seen}");
    let spans = two_spans(&mut collector, TRACE).await;
    // From the workload's parent up to the caller, over one span of each sidecar.
    let inward = &spans[parts[2]];
    let outward = &spans[inward["parent_span_id"].as_str().unwrap()];
    assert_eq!(outward["parent_span_id"], CALLER, "{outward}");
    assert_eq!((&inward["kind"], &outward["kind"]), (&"server".into(), &"client".into()), "{inward}\n{outward}");
    let (client, server) = (pair.domain.id("/client"), pair.domain.id("/server"));
    for (span, proxy) in [(inward, &mut pair.server), (outward, &mut pair.client)] {
        let attributes = &span["attributes"];
        assert_eq!(span["via"], protocol, "{span}");
        assert_eq!(attributes["http.request.method"], "POST", "{span}");
        assert_eq!(attributes["http.response.status_code"], 503, "{span}");
        assert!(span["start"].as_u64().unwrap() <= span["end"].as_u64().unwrap(), "{span}");
        let text = span.to_string();
        assert!(text.contains(&client) && text.contains(&server), "both identities: {span}");
        assert!(text.contains("TLS_AES_256_GCM_SHA384") || text.contains("1.3"), "facts of TLS: {span}");
        assert!(!text.contains("secret"), "a query may hold secrets: {span}");
        assert!(span["resource"]["service.name"].is_string(), "{span}");
        let line = proxy.request("the request", |line| line["status"] == 503).await;
        assert_eq!((&line["trace_id"], &line["span_id"]), (&TRACE.into(), &span["span_id"]), "{line}");
    }
    // By the conventions a 5xx is an error to whoever served it and to whoever asked.
    assert_eq!((&inward["status"], &outward["status"]), (&"error".into(), &"error".into()), "{inward}\n{outward}");
    // What the caller does not want sampled is passed on and not exported.
    let unsampled = head.replace("-01\r\n", "-00\r\n").replace(TRACE, "11111111111111111111111111111111");
    way.request(&unsampled).await;
    let seen = heard(&mut origin, "the request", |line| line["event"] == "request").await;
    let told = seen["traceparent"].as_str().unwrap();
    assert!(told.starts_with("00-11111111111111111111111111111111-") && told.ends_with("-00"), "{told}");
    way.request(&head.replace(TRACE, "22222222222222222222222222222222")).await;
    two_spans(&mut collector, "22222222222222222222222222222222").await;
    assert!(!collector.heard().iter().any(|line| line.contains("11111111111111111111111111111111")));
}

#[tokio::test]
async fn over_grpc() {
    spans_lead_from_the_caller_to_the_workload("grpc").await;
}

#[tokio::test]
async fn over_http() {
    spans_lead_from_the_caller_to_the_workload("http").await;
}

#[tokio::test]
async fn a_trace_that_nobody_began_begins_here() {
    let (mut origin, at) = http_origin().await;
    let (mut collector, grpc, _) = receiver(&[]).await;
    let pair = traced_pair(at, &telemetry(grpc, "grpc", 1.0)).await;
    let way = Way::Plain(pair.address);
    // Also where the caller sends something that is no traceparent (W3C Trace Context, section 3.2.2.2).
    for header in
        ["", "\r\ntraceparent: 00-00000000000000000000000000000000-00f067aa0ba902b7-01", "\r\ntraceparent: junk"]
    {
        way.request(&format!("GET /echo HTTP/1.1\r\nHost: a.example{header}")).await;
        let seen = heard(&mut origin, "the request", |line| line["event"] == "request").await;
        let parts: Vec<String> = seen["traceparent"].as_str().unwrap().split('-').map(str::to_owned).collect();
        assert!(parts.len() == 4 && parts[1].len() == 32 && parts[1].bytes().any(|b| b != b'0'), "{parts:?}");
        let spans = two_spans(&mut collector, &parts[1]).await;
        let roots = spans.values().filter(|span| span["parent_span_id"] == "").count();
        assert_eq!(roots, 1, "{spans:?}");
    }
}

#[tokio::test]
async fn grpc_calls_are_named_as_such() {
    let (_origin, at) = crate::grpc::grpc_origin().await;
    let (mut collector, grpc, _) = receiver(&[]).await;
    let pair = traced_pair(at, &telemetry(grpc, "grpc", 1.0)).await;
    crate::grpc::cases(pair.address, "empty_unary").await;
    let span = heard(&mut collector, "a span", |line| line["event"] == "span").await;
    assert!(span["attributes"].to_string().contains("grpc.testing.TestService"), "{span}");
}

/// Requests go on as if nothing were there, and what could not be delivered is counted.
async fn costs_nothing(endpoint: SocketAddr, protocol: &str, counted: bool) {
    let (_origin, at) = http_origin().await;
    let pair = traced_pair(at, &telemetry(endpoint, protocol, 1.0)).await;
    let url = format!("http://{}/status/200", pair.address);
    let begin = Instant::now();
    assert_eq!(curl(&["--http1.1", &url]).await.status, 200);
    let mut load = Command::new(tool("PORTCULLIS_TEST_H2LOAD", "h2load"));
    load.args(["-n", "8000", "-c", "4", "-m", "16", &url]);
    let said = succeeds(&mut load, "").await;
    assert!(said.contains("8000 succeeded, 0 failed, 0 errored"), "{said}");
    assert_eq!(requests_seen(at).await, 8001);
    // No figure of speed: a request that waited for a collector would have needed its time-out 8000 times.
    assert!(begin.elapsed() < crate::harness::PATIENCE);
    for proxy in [&pair.client, &pair.server] {
        if counted {
            proxy.metric_reaches(DROPPED, &[], 1.0).await;
        }
    }
    // It stops in its own time, too.
    let stop = async |proxy: Proxy| assert!(proxy.stop().await.success());
    stop(pair.client).await;
    stop(pair.server).await;
}

#[tokio::test]
async fn a_collector_that_never_answers_costs_nothing() {
    let (_collector, grpc, http) = receiver(&["-black-hole"]).await;
    costs_nothing(grpc, "grpc", true).await;
    costs_nothing(http, "http", true).await;
}

#[tokio::test]
async fn a_collector_that_is_not_there_costs_nothing() {
    let nobody = ([127, 0, 0, 1], free_port().await).into();
    costs_nothing(nobody, "grpc", true).await;
}

#[tokio::test]
async fn a_collector_that_is_slow_or_unfriendly_costs_nothing() {
    let (_slow, grpc, _) = receiver(&["-slow", "3s"]).await;
    costs_nothing(grpc, "grpc", false).await;
    let (_unfriendly, _, http) = receiver(&["-refuse"]).await;
    costs_nothing(http, "http", true).await;
}
