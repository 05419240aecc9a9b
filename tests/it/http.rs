//! HTTP/1.0, HTTP/1.1 and HTTP/2 through two sidecars, with clients that nobody here wrote: curl, nghttp2's, Python's and
//! Go's. What a client sends arrives whole and in its own version, what comes back is what the origin said, bodies
//! stream, and many requests share few connections.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::agent::go;
use crate::harness::{Proxy, free_port, soon, succeeds, tool};
use crate::pair::{Answer, Extra, Pair, Way, all_well, curl, http_origin, peak_memory, requests_seen};

const REQUESTS: &str = "portcullis_http_requests_total";
const SUCCESS: [(&str, &str); 2] = [("direction", "inbound"), ("result", "success")];

async fn handshakes(server: &Proxy) -> f64 {
    server.metrics().await.sum("portcullis_tls_handshakes_total", &SUCCESS)
}

async fn go_client_through_the_pair(protocol: &str) {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    let mut client = go("http-peer");
    client.args(["client", "-to", &pair.address.to_string(), "-protocol", protocol]);
    let lines = all_well(&mut client).await;
    assert_eq!(lines.len(), 20, "every scenario has a line");
    // A request is counted when its response has ended.
    let seen = requests_seen(at).await;
    assert!(seen > 150, "{seen}");
    assert!(handshakes(&pair.server).await <= 8.0, "a handshake serves many requests");
    // The last scenario but one goes away in the middle: that is a client's doing, and none of an upstream's.
    let gone = [("direction", "inbound"), ("cause", "client_reset")];
    pair.server.metric_reaches("portcullis_http_request_ends_total", &gone, 1.0).await;
}

#[tokio::test]
async fn a_go_client_in_http_1_1() {
    go_client_through_the_pair("http/1.1").await;
}

#[tokio::test]
async fn a_go_client_in_http_2() {
    go_client_through_the_pair("h2").await;
}

#[tokio::test]
async fn python_clients() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/client.py");
    for kind in ["stdlib", "httpx-h1", "httpx-h2"] {
        let mut client = Command::new(tool("PORTCULLIS_TEST_PYTHON", "python3"));
        client.env("PYTHONPATH", tool("PORTCULLIS_TEST_PYTHON_PACKAGES", ""));
        let lines = all_well(client.args([script, &pair.address.to_string(), kind])).await;
        assert_eq!(lines.len(), 7, "{kind}");
    }
}

#[tokio::test]
async fn the_origin_sees_the_version_that_the_client_speaks() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    let url = format!("http://{}/echo", pair.address);
    // A proxy speaks its own minor version (RFC 9110, section 6.2), so an old client may look like a newer one.
    for (option, version, origin) in [
        ("--http1.0", "1", &["HTTP/1.0", "HTTP/1.1"][..]),
        ("--http1.1", "1.1", &["HTTP/1.1"]),
        ("--http2-prior-knowledge", "2", &["HTTP/2.0"]),
    ] {
        let answer = curl(&[option, &url]).await;
        assert_eq!(answer.status, 200, "{option}: {answer:?}");
        // An answer to HTTP/1.0 may say 1.1 as well.
        let versions = if version == "1" { &["1", "1.1"][..] } else { &[version] };
        assert!(versions.contains(&answer.version.as_str()), "{option}: {answer:?}");
        let seen: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
        assert!(origin.contains(&seen["protocol"].as_str().unwrap()), "{option}: {seen}");
        assert_eq!(seen["host"], pair.address.to_string(), "{option}: the host is the client's");
    }
}

#[tokio::test]
async fn curl_uploads_downloads_and_keeps_its_connection() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    let url = |path: &str| format!("http://{}{path}", pair.address);
    let file = pair.domain.path().join("upload");
    std::fs::write(&file, vec![b'x'; 3_000_000]).unwrap();
    let upload = format!("@{}", file.display());
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let answer = curl(&[version, "--head", &url("/bytes/5000")]).await;
        assert!(answer.status == 200 && answer.body.to_lowercase().contains("content-length: 5000"), "{answer:?}");
        let answer = curl(&[version, "--data-binary", &upload, &url("/echo")]).await;
        assert!(answer.body.contains("\"body_bytes\":3000000"), "{answer:?}");
        // In chunks, and only after 100 (Continue).
        let upload = ["-T", file.to_str().unwrap(), "-H", "Transfer-Encoding: chunked", "-H", "Expect: 100-continue"];
        let upload = if version == "--http1.1" { &upload[..] } else { &upload[..2] };
        let answer = curl(&[&[version], upload, &[&url("/echo?chunked=1")]].concat()).await;
        assert!(answer.body.contains("\"body_bytes\":3000000") && answer.body.contains("\"PUT\""), "{answer:?}");
        // This curl fails to use a connection of HTTP/2 without TLS again, whoever serves it.
        if version == "--http1.1" {
            let answer = curl(&[version, &url("/echo/1"), &url("/echo/2"), "-o", "/dev/null"]).await;
            assert_eq!(answer.connects, 0, "the second transfer uses the first one's connection");
        }
        let answer = curl(&[version, "-I", "-X", "OPTIONS", &url("/status/204")]).await;
        assert_eq!(answer.status, 204, "{answer:?}");
    }
}

#[tokio::test]
async fn an_http_1_0_client_gets_what_it_understands() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    let way = Way::Plain(pair.address);
    // The origin answers in chunks, which HTTP/1.0 has none of: the body ends with the connection.
    let answer = Answer::parse(&way.send(b"GET /echo?chunked=1 HTTP/1.0\r\nHost: old.example\r\n\r\n").await);
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.header("transfer-encoding"), None, "{answer:?}");
    assert!(answer.body.starts_with('{') && answer.body.ends_with('}'), "{answer:?}");
    assert_eq!(answer.json()["host"], "old.example");
    // One that asks to keep the connection may get that, with a length.
    let asks = b"GET /echo HTTP/1.0\r\nHost: old.example\r\nConnection: keep-alive\r\n\r\nGET /echo/2 HTTP/1.0\r\nHost: old.example\r\n\r\n";
    let answers = way.send(asks).await;
    let count = answers.matches("HTTP/1.").count() - answers.matches("\"HTTP/1.").count();
    let first = Answer::parse(&answers);
    assert_eq!(first.status, 200, "{answers}");
    if count == 2 {
        assert!(first.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("keep-alive")), "{answers}");
        assert!(first.header("content-length").is_some(), "{answers}");
    }
    // A body with a length, as HTTP/1.0 has it.
    let post = b"POST /echo HTTP/1.0\r\nHost: old.example\r\nContent-Length: 5\r\n\r\nhello";
    assert_eq!(Answer::parse(&way.send(post).await).json()["body_bytes"], 5);
}

#[tokio::test]
async fn requests_that_follow_each_other_without_waiting_are_answered_in_order() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    for way in pair.ways().await {
        let one = |path: &str, end: &str| format!("GET {path} HTTP/1.1\r\nHost: a.example\r\n{end}\r\n");
        let all = [
            one("/delay/100", ""),
            "POST /echo/two HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
                .to_owned(),
            one("/echo/three", "Connection: close\r\n"),
        ];
        let answers = way.send(all.concat().as_bytes()).await;
        let targets =
            ["/delay/100", "/echo/two", "/echo/three"].map(|path| answers.find(&format!("\"target\":\"{path}\"")));
        assert!(targets.iter().all(Option::is_some) && targets.is_sorted(), "{}: {answers}", way.name());
    }
}

#[tokio::test]
async fn nghttp2_clients_multiplex_over_few_handshakes() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    let url = format!("http://{}/status/200", pair.address);
    let mut nghttp = Command::new(tool("PORTCULLIS_TEST_NGHTTP", "nghttp"));
    let said = succeeds(nghttp.args(["-nv", "--no-dep", "-m", "20", &url]), "").await;
    assert_eq!(said.matches(":status: 200").count(), 20, "{said}");
    assert!(!said.contains("RST_STREAM") && !said.contains("error_code=PROTOCOL_ERROR"), "{said}");
    for (arguments, requests) in [(&["-m", "32"][..], "4000"), (&["--h1"], "2000")] {
        let mut load = Command::new(tool("PORTCULLIS_TEST_H2LOAD", "h2load"));
        load.args(["-n", requests, "-c", "8", "-t", "1"]).args(arguments).arg(&url);
        let said = succeeds(&mut load, "").await;
        let wanted = format!("{requests} succeeded, 0 failed, 0 errored, 0 timeout");
        assert!(said.contains(&wanted), "{arguments:?}: {said}");
    }
    let counted = [("direction", "inbound"), ("method", "GET"), ("status_class", "2xx")];
    pair.server.metric_reaches(REQUESTS, &counted, 6020.0).await;
    assert!(handshakes(&pair.server).await <= 8.0, "a handshake serves thousands of requests");
}

/// What a proxy may need for a body that is many times as large.
const BOUND: u64 = 24 << 20;
const BIG: usize = 64 << 20;

#[tokio::test]
async fn a_big_body_does_not_fill_the_proxies_when_the_other_side_is_slow() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    let way = Way::Plain(pair.address);
    assert_eq!(way.request("GET /echo HTTP/1.1\r\nHost: a.example").await.status, 200);
    let before = [&pair.client, &pair.server].map(|proxy| peak_memory(&proxy.running));

    // Up: the origin takes 64 KiB every 2 ms.
    let mut stream = TcpStream::connect(pair.address).await.unwrap();
    let head =
        format!("POST /slow-read/2 HTTP/1.1\r\nHost: a.example\r\nContent-Length: {BIG}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let piece = vec![7; 1 << 20];
    for _ in 0..BIG / piece.len() {
        soon("a slow upload", stream.write_all(&piece)).await.unwrap();
    }
    let mut answer = String::new();
    soon("the answer to an upload", stream.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.contains(&BIG.to_string()), "{answer}");

    // Down: the client takes 64 KiB every 2 ms.
    let mut stream = TcpStream::connect(pair.address).await.unwrap();
    let head = format!("GET /bytes/{BIG} HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut total, mut piece) = (0, vec![0; 64 << 10]);
    loop {
        let read = soon("a slow download", stream.read(&mut piece)).await.unwrap();
        if read == 0 {
            break;
        }
        total += read;
        tokio::time::sleep(Duration::from_millis(2) * u32::try_from(read).unwrap() / (64 << 10)).await;
    }
    assert!(total > BIG, "{total}");
    for (proxy, before) in [&pair.client, &pair.server].into_iter().zip(before) {
        let grown = peak_memory(&proxy.running).saturating_sub(before);
        assert!(grown < BOUND, "{grown} bytes more for a body of {BIG}");
    }
}

#[tokio::test]
async fn metric_and_access_log_tell_of_each_request_once() {
    let (_origin, at) = http_origin().await;
    let mut pair = Pair::plain(at).await;
    let way = Way::Plain(pair.address);
    let head = "POST /echo/a%2e/b?secret=1 HTTP/1.1\r\nHost: records.example:81\r\nContent-Length: 0";
    assert_eq!(way.request(head).await.status, 200);
    let (client, server) = (pair.domain.id("/client"), pair.domain.id("/server"));
    for (proxy, direction, peer, local) in
        [(&mut pair.client, "outbound", &server, &client), (&mut pair.server, "inbound", &client, &server)]
    {
        let labels = [("direction", direction), ("method", "POST"), ("status_class", "2xx")];
        proxy.metric_reaches(REQUESTS, &labels, 1.0).await;
        proxy.metric_reaches("portcullis_http_request_duration_seconds_count", &[("direction", direction)], 1.0).await;
        let metrics = proxy.metrics().await;
        assert_eq!(metrics.sum(REQUESTS, &[]), 1.0);
        assert_eq!(metrics.sum("portcullis_http_requests_in_flight", &[]), 0.0);
        let routes: Vec<_> = metrics.matching(REQUESTS, &[]).map(|(labels, _)| labels["route"].clone()).collect();
        assert!(routes.iter().all(|route| !route.contains("echo")), "never by raw path: {routes:?}");
        let line = proxy.request("the request", |_| true).await;
        for (field, value) in [
            ("direction", direction),
            ("peer", peer.as_str()),
            ("local", local.as_str()),
            ("method", "POST"),
            ("host", "records.example"),
            ("cause", "done"),
        ] {
            assert_eq!(line[field], value, "{field}: {line}");
        }
        assert_eq!(line["status"], 200, "{line}");
        assert!(line["path"].as_str().unwrap().starts_with("/echo/"), "{line}");
        assert!(line["rule"].is_string() && line["route"].is_string(), "{line}");
        assert!(!line.to_string().contains("secret"), "a query may hold secrets: {line}");
    }
}

#[tokio::test]
async fn whoever_cannot_be_reached_is_reported_to_the_local_caller_only() {
    // The workload is gone: the server's sidecar says so to a stranger, and not why.
    let nobody = ([127, 0, 0, 1], free_port().await).into();
    let mut pair = Pair::plain(nobody).await;
    let head = "GET / HTTP/1.1\r\nHost: a.example";
    let [local, peer] = pair.ways().await;
    let answer = peer.request(head).await;
    assert!([502, 503].contains(&answer.status), "{answer:?}");
    assert_eq!(answer.header("portcullis-reason"), None, "{answer:?}");
    let answer = local.request(head).await;
    assert!([502, 503].contains(&answer.status), "{answer:?}");
    let line = pair.server.request("a failed request", |line| line["cause"] == "unreachable").await;
    assert!(line["status"] == 502 || line["status"] == 503, "{line}");

    // The server's sidecar is gone: the client's own says so, and why.
    assert!(pair.server.stop().await.success());
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let answer = curl(&[version, "-i", &format!("http://{}/", pair.address)]).await;
        assert!([502, 503].contains(&answer.status), "{answer:?}");
        assert!(answer.body.to_lowercase().contains("portcullis-reason: "), "{answer:?}");
    }
    let line = pair.client.request("an unreachable upstream", |line| line["cause"] == "unreachable").await;
    assert_eq!(line["peer"], serde_json::Value::Null, "nobody was reached: {line}");
}

#[tokio::test]
async fn an_upstream_that_is_somebody_else_gets_no_request() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    let wrong = pair.client_config.replace(&pair.domain.id("/server"), &pair.domain.id("/somebody-else"));
    pair.client.reloaded(&wrong).await;
    let answer = Way::Plain(pair.address).request("GET /echo HTTP/1.1\r\nHost: a.example").await;
    assert!([502, 503].contains(&answer.status), "{answer:?}");
    assert!(answer.header("portcullis-reason").is_some(), "{answer:?}");
    let labels = [("direction", "outbound"), ("reason", "wrong_peer")];
    pair.client.metric_reaches("portcullis_tls_handshakes_total", &labels, 1.0).await;
    assert_eq!(requests_seen(at).await, 0);
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_504() {
    let (_origin, at) = http_origin().await;
    let extra = Extra { outbound: "http: { request_timeout: 300ms, retries: { attempts: 0 } }", ..Extra::default() };
    let mut pair = Pair::start(at, extra).await;
    let way = Way::Plain(pair.address);
    let answer = way.request("GET /delay/20000 HTTP/1.1\r\nHost: a.example").await;
    assert_eq!(answer.status, 504, "{answer:?}");
    assert!(answer.header("portcullis-reason").is_some(), "{answer:?}");
    pair.client.request("a timed out request", |line| line["cause"] == "timeout").await;
    assert_eq!(way.request("GET /echo HTTP/1.1\r\nHost: a.example").await.status, 200);
}

#[tokio::test]
async fn a_listener_that_detects_carries_http_and_bytes() {
    let (_origin, at) = http_origin().await;
    let extra = Extra { inbound: "protocol: detect", outbound: "protocol: detect", ..Extra::default() };
    let pair = Pair::start(at, extra).await;
    let url = format!("http://{}/echo", pair.address);
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        assert_eq!(curl(&[version, &url]).await.status, 200);
    }
    for result in ["http1", "http2"] {
        let labels = [("direction", "outbound"), ("result", result)];
        pair.client.metric_reaches("portcullis_detected_total", &labels, 1.0).await;
    }
    pair.client.metric_reaches(REQUESTS, &[("direction", "outbound")], 2.0).await;

    let workload = crate::harness::echo().await;
    let pair = Pair::start(workload.address, extra).await;
    let mut stream = TcpStream::connect(pair.address).await.unwrap();
    crate::harness::exchange(&mut stream, b"\x00\x01 these are just bytes").await.unwrap();
    pair.client.metric_reaches("portcullis_detected_total", &[("result", "opaque")], 1.0).await;
}

/// A workload whose clients wait for it to speak: the first words, then an echo.
async fn greeter() -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = stream.write_all(b"220 ready\r\n").await;
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    address
}

#[tokio::test]
async fn where_the_server_speaks_first_the_config_says_so() {
    let workload = greeter().await;
    let detect = "protocol: detect";
    let extra = Extra { inbound: detect, outbound: detect, ..Extra::default() };
    let greeted = async |pair: &Pair| {
        let mut stream = TcpStream::connect(pair.address).await.unwrap();
        let mut words = String::new();
        let mut first = [0; 11];
        if soon("the first words, or the end", stream.read_exact(&mut first)).await.is_ok() {
            words.push_str(&String::from_utf8_lossy(&first));
        }
        words
    };
    // By default nobody who is silent gets through, and that is counted.
    let timeout = "detect: { timeout: 200ms }\n";
    let pair = Pair::start(workload, Extra { server: timeout, client: timeout, ..extra }).await;
    assert_eq!(greeted(&pair).await, "");
    pair.client.metric_reaches("portcullis_detected_total", &[("result", "timeout")], 1.0).await;
    // It may be let through as bytes, after the wait.
    let opaque = "detect: { timeout: 200ms, on_timeout: opaque }\n";
    let pair = Pair::start(workload, Extra { server: opaque, client: opaque, ..extra }).await;
    assert_eq!(greeted(&pair).await, "220 ready\r\n");
    // Or nothing is waited for: a minute would be too long for this test.
    let at_once = format!("detect: {{ timeout: 60s, opaque_ports: [{}] }}\n", workload.port());
    let pair = Pair::start(workload, Extra { server: &at_once, client: opaque, ..extra }).await;
    assert_eq!(greeted(&pair).await, "220 ready\r\n");
    assert_eq!(pair.server.metrics().await.sum("portcullis_detected_total", &[]), 0.0);
}

#[tokio::test]
async fn whoever_takes_no_answer_does_not_hold_a_connection_for_ever() {
    let (_origin, at) = http_origin().await;
    let short = "connections: { idle_timeout: 400ms }";
    let mut pair = Pair::start(at, Extra { outbound: short, ..Extra::default() }).await;
    let mut silent = TcpStream::connect(pair.address).await.unwrap();
    silent.write_all(b"GET /bytes/67108864 HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let ended = pair.client.record("the end of the connection", |line| line["cause"] == "idle_timeout").await;
    assert_eq!((&ended["listener"], &ended["direction"]), (&"out".into(), &"outbound".into()), "{ended}");
    // The workload is told as well: its half of the exchange is over, too.
    pair.server.request("the request", |line| line["path"] == "/bytes/67108864" && line["cause"] != "done").await;
}
