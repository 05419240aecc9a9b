use super::*;
use crate::config::schema::{PolicyMode, Span};
use crate::identity::{KeyType, SpiffeId};
use crate::proxy::listener::Client;
use crate::proxy::record::{HttpVersion, RequestCause, TraceContext};
use crate::tls::record::{Direction, Negotiated};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use opentelemetry::trace::{SpanKind, Status};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::ResourceSpans;
use prost::Message;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::SystemTime;
use tokio::net::TcpListener;

const TRACE: TraceContext =
    TraceContext { trace_id: [0xab; 16], span_id: [0xcd; 8], parent: Some([0xef; 8]), sampled: true };

fn record() -> RequestRecord {
    RequestRecord {
        listener: "api".into(),
        direction: Direction::Inbound,
        client: Client::Tcp("10.0.0.7:4711".parse().unwrap()),
        peer: Some(SpiffeId::parse("spiffe://td.example/web").unwrap()),
        local: Some(SpiffeId::parse("spiffe://td.example/api").unwrap()),
        tls: Some(Negotiated {
            version: "TLSv1.3",
            cipher_suite: "TLS_AES_256_GCM_SHA384",
            group: "X25519MLKEM768",
            signature: "ecdsa_secp384r1_sha384",
            peer_key: KeyType::P384,
            resumed: false,
            compliant: true,
        }),
        upstream: Some("127.0.0.1:8080".into()),
        rule: Some(("read-patients".into(), PolicyMode::Enforce)),
        route: "/patients/{id}".into(),
        method: http::Method::GET,
        host: "records.nhs.example".into(),
        path: "/patients/7".into(),
        version: HttpVersion::Http2,
        status: Some(200),
        grpc_status: None,
        bytes_sent: 3,
        bytes_received: 12,
        began: SystemTime::UNIX_EPOCH + Duration::from_secs(1),
        duration: Duration::from_millis(5),
        attempts: 1,
        cause: RequestCause::Done,
        detail: String::new(),
        trace: Some(TRACE),
    }
}

/// What a collector got: the path, the type of the content, the spans.
type Got = (String, String, Vec<ResourceSpans>);

/// A collector that takes what comes, over HTTP/1.1 or over gRPC.
async fn collector(protocol: TraceProtocol) -> (SocketAddr, mpsc::UnboundedReceiver<Got>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (got, taken) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let got = got.clone();
            let service = service_fn(move |request| answer(request, protocol, got.clone()));
            match protocol {
                TraceProtocol::Grpc => {
                    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    tokio::spawn(server.serve_connection(TokioIo::new(socket), service));
                }
                TraceProtocol::Http => {
                    let server = hyper::server::conn::http1::Builder::new();
                    tokio::spawn(server.serve_connection(TokioIo::new(socket), service));
                }
            }
        }
    });
    (address, taken)
}

async fn answer(
    request: Request<Incoming>,
    protocol: TraceProtocol,
    got: mpsc::UnboundedSender<Got>,
) -> Result<Response<impl hyper::body::Body<Data = Bytes, Error = Infallible>>, Infallible> {
    let path = request.uri().path().to_owned();
    let kind = request.headers()["content-type"].to_str().unwrap().to_owned();
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let grpc = protocol == TraceProtocol::Grpc;
    let message = if grpc { body.slice(5..) } else { body };
    got.send((path, kind.clone(), ExportTraceServiceRequest::decode(message).unwrap().resource_spans)).unwrap();
    let mut trailers = http::HeaderMap::new();
    trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
    let frames = if grpc {
        vec![Ok(Frame::data(Bytes::from_static(&[0; 5]))), Ok(Frame::trailers(trailers))]
    } else {
        Vec::new()
    };
    let body = StreamBody::new(futures_util::stream::iter(frames));
    Ok(Response::builder().header("content-type", kind).body(body).unwrap())
}

fn declared(address: SocketAddr, protocol: TraceProtocol) -> Declared {
    Declared {
        endpoint: format!("http://{address}"),
        protocol,
        ratio: 1.0,
        timeout: Span::seconds(60),
        queue: 100,
        max_batch: 10,
    }
}

fn start(declared: &Declared) -> Traces {
    let labels = Labels { service_name: "records".into(), environment: "test".into(), domain: String::new() };
    Traces::start(declared, &labels, Counts::new(&Registry::new()).unwrap()).unwrap()
}

#[tokio::test]
async fn spans_arrive_over_grpc_and_over_http() {
    for (protocol, path, kind) in [
        (TraceProtocol::Grpc, "/opentelemetry.proto.collector.trace.v1.TraceService/Export", "application/grpc"),
        (TraceProtocol::Http, "/v1/traces", "application/x-protobuf"),
    ] {
        let (address, mut taken) = collector(protocol).await;
        let traces = start(&declared(address, protocol));
        for _ in 0..25 {
            traces.send(&record());
        }
        traces.send(&RequestRecord { trace: Some(TraceContext { sampled: false, ..TRACE }), ..record() });
        traces.send(&RequestRecord { trace: None, ..record() });
        traces.flush().await;
        assert_eq!(traces.counts.exported.get(), 25);
        assert_eq!((traces.counts.failed.get(), traces.counts.queue_full.get()), (0, 0));
        let mut batches = Vec::new();
        while let Ok(got) = taken.try_recv() {
            batches.push(got);
        }
        assert!(batches.len() >= 3, "10 at the most in one");
        let (at, of, resources) = &batches[0];
        assert_eq!((at.as_str(), of.as_str()), (path, kind));
        let resource = resources[0].resource.as_ref().unwrap();
        let text = |key: &str| {
            let found = resource.attributes.iter().find(|attribute| attribute.key == key)?;
            match found.value.as_ref()?.value.as_ref()? {
                Any::StringValue(text) => Some(text.clone()),
                _ => None,
            }
        };
        assert_eq!(text("service.name").as_deref(), Some("records"));
        assert_eq!(text("deployment.environment.name").as_deref(), Some("test"));
        let span = &resources[0].scope_spans[0].spans[0];
        assert_eq!((span.trace_id.as_slice(), span.span_id.as_slice()), (&[0xab; 16][..], &[0xcd; 8][..]));
        assert_eq!((span.parent_span_id.as_slice(), span.name.as_str()), (&[0xef; 8][..], "GET /patients/{id}"));
        assert_eq!((span.start_time_unix_nano, span.end_time_unix_nano), (1_000_000_000, 1_005_000_000));
        let spans = |got: &Got| got.2.iter().flat_map(|r| &r.scope_spans).map(|s| s.spans.len()).sum::<usize>();
        assert!(batches.iter().all(|got| spans(got) <= 10));
        assert_eq!(batches.iter().map(spans).sum::<usize>(), 25);
        // What waits when everything ends is sent all the same.
        traces.send(&record());
        drop(traces);
        assert_eq!(spans(&taken.recv().await.unwrap()), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_collector_that_never_answers_costs_spans_and_no_more() {
    for protocol in [TraceProtocol::Grpc, TraceProtocol::Http] {
        // The kernel accepts, nobody reads.
        let hole = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let traces = start(&Declared { queue: 4, max_batch: 4, ..declared(hole.local_addr().unwrap(), protocol) });
        for _ in 0..1000 {
            traces.send(&record());
        }
        let dropped = traces.counts.queue_full.get();
        assert!((992..=996).contains(&dropped), "{dropped}");
        assert_eq!(traces.counts.exported.get(), 0);
        // Ends although nothing can be sent: the clock of this test runs ahead.
        traces.flush().await;
        assert_eq!(traces.counts.exported.get(), 0);
    }
}

#[tokio::test]
async fn spans_that_a_collector_does_not_take_in_time_are_given_up_and_counted() {
    let hole = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    // Bound by us and by nobody else, and nobody listens.
    let refusing = tokio::net::TcpSocket::new_v4().unwrap();
    refusing.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let gone = refusing.local_addr().unwrap();
    for protocol in [TraceProtocol::Grpc, TraceProtocol::Http] {
        for address in [hole.local_addr().unwrap(), gone] {
            let timeout = Span(Duration::from_millis(50));
            let traces = start(&Declared { timeout, ..declared(address, protocol) });
            for _ in 0..15 {
                traces.send(&record());
            }
            traces.flush().await;
            assert_eq!(traces.counts.failed.get(), 15, "{protocol:?} {address}");
            assert_eq!(traces.counts.exported.get(), 0);
        }
    }
}

#[tokio::test]
async fn an_endpoint_that_cannot_be_used_is_told_at_the_start() {
    let declared =
        Declared { endpoint: "http://[::1".into(), ..declared(([127, 0, 0, 1], 1).into(), TraceProtocol::Grpc) };
    for protocol in [TraceProtocol::Grpc, TraceProtocol::Http] {
        let declared = Declared { protocol, ..declared.clone() };
        let why = Traces::start(&declared, &Labels::default(), Counts::new(&Registry::new()).unwrap()).unwrap_err();
        assert!(why.starts_with("telemetry.traces: "), "{why}");
    }
}

#[test]
fn what_waits_is_small_whatever_was_asked_for() {
    let long = "é".repeat(100_000);
    let kept =
        kept(&RequestRecord { path: long.as_str().into(), host: long.as_str().into(), detail: long, ..record() });
    assert!([&*kept.path, &*kept.host, &kept.detail].iter().all(|text| (1..=LONGEST_TEXT).contains(&text.len())));
    assert_eq!(&*super::kept(&record()).path, "/patients/7");
}

#[test]
fn a_url_without_a_path_means_the_usual_one() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _within = runtime.enter();
    let address = "127.0.0.1:4318".parse().unwrap();
    for (endpoint, expected) in [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"),
        ("http://127.0.0.1:4318/of/ours", "http://127.0.0.1:4318/of/ours"),
    ] {
        let declared = Declared { endpoint: endpoint.into(), ..declared(address, TraceProtocol::Http) };
        let exporter = format!("{:?}", exporter(&declared, &Labels::default()).unwrap());
        assert!(exporter.contains(&format!("collector_endpoint: {expected},")), "{exporter}");
    }
}

/// The attributes of a record's span, as text.
fn attributes(record: &RequestRecord) -> std::collections::BTreeMap<String, String> {
    let span = span::of(record).unwrap();
    span.attributes.iter().map(|kv| (kv.key.to_string(), kv.value.to_string())).collect()
}

#[test]
fn a_request_that_came_in_is_a_server_s_span() {
    let span = span::of(&record()).unwrap();
    assert_eq!((span.span_kind, span.status), (SpanKind::Server, Status::Unset));
    assert!(span.parent_span_is_remote && span.span_context.is_sampled());
    let expected = [
        ("client.address", "10.0.0.7"),
        ("client.port", "4711"),
        ("http.request.body.size", "3"),
        ("http.request.method", "GET"),
        ("http.response.body.size", "12"),
        ("http.response.status_code", "200"),
        ("http.route", "/patients/{id}"),
        ("network.protocol.name", "http"),
        ("network.protocol.version", "2"),
        ("portcullis.cause", "done"),
        ("portcullis.listener", "api"),
        ("portcullis.local.spiffe_id", "spiffe://td.example/api"),
        ("portcullis.peer.spiffe_id", "spiffe://td.example/web"),
        ("portcullis.rule", "read-patients"),
        ("portcullis.rule.mode", "enforce"),
        ("portcullis.upstream", "127.0.0.1:8080"),
        ("server.address", "records.nhs.example"),
        ("tls.cipher", "TLS_AES_256_GCM_SHA384"),
        ("tls.curve", "X25519MLKEM768"),
        ("tls.protocol.name", "tls"),
        ("tls.protocol.version", "1.3"),
        ("url.path", "/patients/7"),
        ("url.scheme", "https"),
    ];
    assert_eq!(attributes(&record()), expected.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
}

#[test]
fn a_request_that_went_out_is_a_client_s_span_and_its_errors_are_its_own() {
    let out = RequestRecord {
        direction: Direction::Outbound,
        route: "*".into(),
        method: http::Method::from_bytes(b"PROPFIND").unwrap(),
        status: Some(404),
        grpc_status: Some(5),
        attempts: 3,
        ..record()
    };
    let span = span::of(&out).unwrap();
    assert_eq!((span.span_kind, &*span.name), (SpanKind::Client, "HTTP"));
    assert_eq!(span.status, Status::error(""));
    let all = attributes(&out);
    for (key, value) in [
        ("error.type", "404"),
        ("http.request.method", "_OTHER"),
        ("http.request.method_original", "PROPFIND"),
        ("http.request.resend_count", "2"),
        ("rpc.system", "grpc"),
        ("rpc.grpc.status_code", "5"),
    ] {
        assert_eq!(all[key], value);
    }
    assert!(["client.address", "http.route", "url.template"].iter().all(|key| !all.contains_key(*key)));
}

#[test]
fn what_counts_as_an_error() {
    let error = |direction, cause, status| {
        let span = span::of(&RequestRecord { direction, cause, status, ..record() }).unwrap();
        let kind = span.attributes.iter().find(|kv| kv.key.as_str() == "error.type").map(|kv| kv.value.to_string());
        assert_eq!(span.status != Status::Unset, kind.is_some());
        kind
    };
    let (inbound, outbound) = (Direction::Inbound, Direction::Outbound);
    assert_eq!(error(inbound, RequestCause::Denied, Some(403)), None);
    assert_eq!(error(outbound, RequestCause::Denied, Some(403)).as_deref(), Some("403"));
    assert_eq!(error(inbound, RequestCause::Done, Some(503)).as_deref(), Some("503"));
    assert_eq!(error(inbound, RequestCause::UpstreamReset, Some(200)).as_deref(), Some("upstream_reset"));
    assert_eq!(error(inbound, RequestCause::Done, None).as_deref(), Some("done"));
    assert_eq!(error(outbound, RequestCause::ClientReset, None).as_deref(), Some("client_reset"));
}

#[test]
fn a_time_that_cannot_be_is_no_crash() {
    let span = span::of(&RequestRecord { duration: Duration::MAX, ..record() }).unwrap();
    assert_eq!(span.start_time, span.end_time);
    assert!(span::of(&RequestRecord { trace: None, ..record() }).is_none());
}
