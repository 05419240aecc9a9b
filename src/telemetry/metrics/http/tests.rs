use super::*;
use crate::proxy::listener::Client;
use crate::proxy::record::HttpVersion;
use crate::telemetry::places::KEPT;
use prometheus::TextEncoder;
use std::time::{Duration, SystemTime};

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
        method: ::http::Method::GET,
        host: "".into(),
        path: "/patients/7".into(),
        version: HttpVersion::Http2,
        status: Some(200),
        grpc_status: None,
        bytes_sent: 0,
        bytes_received: 0,
        began: SystemTime::UNIX_EPOCH,
        duration: Duration::from_millis(3),
        attempts: 1,
        cause: RequestCause::Done,
        detail: String::new(),
        trace: None,
    }
}

fn metrics() -> (Registry, Http) {
    let registry = Registry::new();
    let http = Http::new(&registry).unwrap();
    (registry, http)
}

fn text(registry: &Registry) -> String {
    TextEncoder::new().encode_to_string(&registry.gather()).unwrap()
}

/// The value of the one series that begins so.
fn value(registry: &Registry, series: &str) -> Option<f64> {
    let text = text(registry);
    let found: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix(series)).collect();
    assert!(found.len() < 2, "{found:?}");
    found.first().map(|value| value.trim().parse().unwrap())
}

#[test]
fn a_request_is_counted_by_all_that_is_known_of_it() {
    let (registry, http) = metrics();
    http.begun(Direction::Inbound);
    http.begun(Direction::Inbound);
    http.ended(&record(), Instant::now());
    let labels = r#"direction="inbound",method="GET",route="/patients/{id}",status_class="2xx""#;
    assert_eq!(value(&registry, &format!("http_requests_total{{{labels}}}")), Some(1.0));
    let bucket = |le| value(&registry, &format!("http_request_duration_seconds_bucket{{{labels},le=\"{le}\"}}"));
    assert_eq!((bucket("0.0025"), bucket("0.005")), (Some(0.0), Some(1.0)));
    assert_eq!(value(&registry, "http_requests_in_flight{direction=\"inbound\"}"), Some(1.0));
    assert_eq!(value(&registry, "http_request_ends_total{cause=\"done\",direction=\"inbound\"}"), Some(1.0));
    assert!(!text(&registry).contains("grpc_requests_total"));
}

#[test]
fn every_method_and_every_status_has_its_class() {
    let (registry, http) = metrics();
    let of = |name: &[u8], status| RequestRecord {
        method: ::http::Method::from_bytes(name).unwrap(),
        status,
        direction: Direction::Outbound,
        ..record()
    };
    for (name, status, method, class) in [
        (&b"PATCH"[..], Some(100), "PATCH", "1xx"),
        (b"TRACE", Some(304), "TRACE", "3xx"),
        (b"PROPFIND", Some(404), "other", "4xx"),
        (b"other", Some(599), "other", "5xx"),
        (b"get", Some(600), "other", "none"),
        (b"CONNECT", Some(99), "CONNECT", "none"),
        (b"HEAD", None, "HEAD", "none"),
    ] {
        http.ended(&of(name, status), Instant::now());
        let series = format!(
            "http_requests_total{{direction=\"outbound\",method=\"{method}\",route=\"/patients/{{id}}\",\
             status_class=\"{class}\"}}"
        );
        assert_eq!(value(&registry, &series), Some(1.0), "{series}");
    }
    for (at, status) in [(0, "0"), (7, "7"), (16, "16"), (17, "other"), (u16::MAX, "other")] {
        http.ended(&RequestRecord { grpc_status: Some(at), ..record() }, Instant::now());
        let expected = if at == u16::MAX { 2.0 } else { 1.0 };
        let series =
            format!("grpc_requests_total{{direction=\"inbound\",grpc_status=\"{status}\",route=\"/patients/{{id}}\"}}");
        assert_eq!(value(&registry, &series), Some(expected), "{series}");
    }
}

#[test]
fn closed_sets_begin_at_zero() {
    let (registry, http) = metrics();
    for direction in ["inbound", "outbound"] {
        assert_eq!(value(&registry, &format!("http_requests_in_flight{{direction=\"{direction}\"}}")), Some(0.0));
        for cause in RequestCause::ALL {
            let series = format!("http_request_ends_total{{cause=\"{}\",direction=\"{direction}\"}}", cause.as_str());
            assert_eq!(value(&registry, &series), Some(0.0), "{series}");
        }
        for result in DETECTED {
            let series = format!("detected_total{{direction=\"{direction}\",result=\"{result}\"}}");
            assert_eq!(value(&registry, &series), Some(0.0), "{series}");
        }
    }
    for (event, series) in [
        (Event::Detected("opaque"), "detected_total{direction=\"outbound\",result=\"opaque\"}"),
        (Event::Retried, "http_retries_total{result=\"sent\"}"),
        (Event::RetryRefused, "http_retries_total{result=\"budget_exhausted\"}"),
        (Event::Ejected, "upstream_ejections_total{change=\"ejected\"}"),
        (Event::Restored, "upstream_ejections_total{change=\"restored\"}"),
        (Event::ShadowDiffered, "rego_shadow_differs_total "),
    ] {
        assert_eq!(value(&registry, series), Some(0.0), "{series}");
        http.event(Direction::Outbound, event);
        assert_eq!(value(&registry, series), Some(1.0), "{series}");
    }
}

#[test]
fn a_cause_is_counted_under_its_own_name() {
    let (registry, http) = metrics();
    for (n, cause) in RequestCause::ALL.iter().enumerate() {
        for _ in 0..=n {
            http.ended(&RequestRecord { cause: *cause, ..record() }, Instant::now());
        }
        let series = format!("http_request_ends_total{{cause=\"{}\",direction=\"inbound\"}}", cause.as_str());
        assert_eq!(value(&registry, &series), Some(n as f64 + 1.0), "{series}");
    }
}

#[test]
fn routes_of_ever_new_configs_do_not_add_up() {
    let (registry, http) = metrics();
    let now = Instant::now();
    let reloaded = |n: u16, now| {
        let record = RequestRecord { route: format!("/v{n}/{{id}}").into(), grpc_status: Some(0), ..record() };
        http.ended(&record, now);
    };
    let series = |name: &str| text(&registry).lines().filter(|line| line.starts_with(name)).count();
    for n in 0..1000 {
        reloaded(n, now);
    }
    assert_eq!(series("http_requests_total{"), MOST_ROUTES + 1);
    for n in 1000..2000 {
        reloaded(n, now + KEPT + Duration::from_secs(1));
    }
    for name in ["http_requests_total{", "http_request_duration_seconds_count{", "grpc_requests_total{"] {
        assert_eq!(series(name), MOST_ROUTES + 1, "{name}");
    }
    assert!(text(&registry).contains("/v1000/{id}") && !text(&registry).contains("/v0/{id}"));
    assert_eq!(http.series.load(Ordering::Relaxed), MOST_ROUTES);
}

#[test]
fn whoever_tries_every_method_and_answer_on_every_route_gets_no_more_than_all_the_series_there_are() {
    let (registry, http) = metrics();
    for route in 0..u16::try_from(MOST_ROUTES).unwrap() {
        let mut record = RequestRecord { route: format!("/{route}").into(), ..record() };
        for method in METHODS {
            record.method = ::http::Method::from_bytes(method.as_bytes()).unwrap();
            for status in [200, 403, 500] {
                record.status = Some(status);
                http.ended(&record, Instant::now());
            }
        }
    }
    let all = text(&registry);
    let of = |label: &str| all.lines().filter(|l| l.starts_with("http_requests_total{") && l.contains(label)).count();
    assert_eq!(of(""), MOST_SERIES + METHODS.len() * 3);
    assert_eq!(of("route=\"other\""), METHODS.len() * 3);
}
