//! What an operator sees: metrics that promtool has nothing to say about, probes, state without secrets, and the access
//! log as JSON and on a terminal.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::harness::{
    Domain, Joined, Metrics, Proxy, Running, echo, exchange, get, inbound_listener, output, program, rest_of, soon,
    tool, until,
};
use crate::testing::{Key, Spec};

/// One exchange with the admin server: the head and the body of the answer.
async fn ask(admin: SocketAddr, request: &str) -> (String, String) {
    let mut stream = TcpStream::connect(admin).await.unwrap();
    let text = format!("{request} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n");
    stream.write_all(text.as_bytes()).await.unwrap();
    let answer = String::from_utf8(rest_of(&mut stream).await.unwrap()).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_lowercase(), body.to_owned())
}

/// A connection that nobody admits: something speaks plaintext to an mTLS port.
async fn plaintext_to(address: SocketAddr) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let _ = rest_of(&mut stream).await;
}

#[tokio::test]
async fn promtool_has_nothing_to_say_and_the_labels_are_there() {
    let labels = "labels: { service_name: records, environment: test, domain: clinical }\n";
    let policy = "policy: { rules: [{ name: shadow, from: ['spiffe://a.example'], action: deny, mode: audit }] }\n";
    let joined = Joined::start("", &format!("{labels}{policy}")).await;
    // Traffic, refusals of several kinds, a reload, a failed reload.
    let mut live = joined.connected().await;
    plaintext_to(joined.server.address("in").await).await;
    let other = Joined::client_of(&joined.domain, &joined.server, "/other").await;
    let mut refused = TcpStream::connect(other.address("out").await).await.unwrap();
    rest_of(&mut refused).await.unwrap_err();
    joined.server.reloaded(&format!("{}{labels}{policy}drain_timeout: 4s\n", joined.server_config)).await;
    joined.server.reload("inbound: [");
    joined.server.metric_reaches("portcullis_config_reloads_total", &[("result", "failure")], 1.0).await;
    exchange(&mut live, b"more").await.unwrap();

    for proxy in [&joined.server, &joined.client] {
        let (head, text) = ask(proxy.admin, "GET /metrics").await;
        assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
        let mut promtool = Command::new(tool("PORTCULLIS_TEST_PROMTOOL", "promtool"));
        let verdict = output(promtool.args(["check", "metrics"]), &text).await;
        let said = [verdict.stdout, verdict.stderr].concat();
        assert!(verdict.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
    }
    let (_, text) = ask(joined.server.admin, "GET /metrics").await;
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        for label in ["service_name=\"records\"", "environment=\"test\"", "domain=\"clinical\""] {
            assert!(line.starts_with("portcullis_") && line.contains(label), "{line}");
        }
    }
    let metrics = Metrics::parse(&text);
    for (name, labels, value) in [
        ("tls_handshakes_total", &[("direction", "inbound"), ("result", "success")][..], 1.0),
        ("tls_handshakes_total", &[("direction", "inbound"), ("reason", "not_tls")], 1.0),
        ("tls_handshakes_total", &[("direction", "inbound"), ("reason", "denied")], 1.0),
        ("authorization_decisions_total", &[("rule", "allow:in"), ("decision", "allow"), ("mode", "enforce")], 1.0),
        ("authorization_decisions_total", &[("rule", "default"), ("decision", "deny"), ("mode", "enforce")], 1.0),
        ("authorization_decisions_total", &[("rule", "shadow"), ("decision", "deny"), ("mode", "audit")], 2.0),
        ("connections_open", &[("direction", "inbound")], 1.0),
        ("connections_total", &[("cause", "denied")], 1.0),
        ("connections_total", &[("cause", "handshake_failed")], 1.0),
        ("svid_state", &[("state", "fresh")], 1.0),
        ("svid_state", &[("state", "expired")], 0.0),
        ("svid_expiry_timestamp_seconds", &[], crate::testing::FAR_OFF as f64),
        ("trust_bundle_expiry_timestamp_seconds", &[("trust_domain", "a.example")], crate::testing::FAR_OFF as f64),
        ("identity_source_up", &[], 1.0),
        ("tls_handshake_duration_seconds_count", &[("direction", "inbound"), ("resumed", "false")], 1.0),
        ("build_info", &[("version", env!("CARGO_PKG_VERSION")), ("fips", "false")], 1.0),
    ] {
        let name = format!("portcullis_{name}");
        assert!(metrics.matching(&name, labels).next().is_some(), "no {name}{labels:?}\n{text}");
        assert_eq!(metrics.sum(&name, labels), value, "{name}{labels:?}\n{text}");
    }
}

#[tokio::test]
async fn readiness_names_what_it_waits_for() {
    let domain = Domain::new("a.example");
    let workload = echo().await;
    let identity = domain.identity("/server");
    let key = domain.path().join("server.key");
    let hidden = domain.path().join("hidden.key");
    std::fs::rename(&key, &hidden).unwrap();
    let config = identity + &inbound_listener("in", workload.address, &domain.id("/client"), "");
    let mut server = Proxy::start(domain.path(), "server", &config).await;
    assert_eq!(server.get("/livez").await, (200, "alive\n".into()));
    let text = until("the reason", || async {
        let (status, text) = server.get("/readyz").await;
        assert_eq!(status, 503);
        text.contains("server.key").then_some(text)
    })
    .await;
    assert!(text.starts_with("waiting for: identity\nidentity: "), "{text}");
    let state = server.state().await;
    assert_eq!((&state["ready"], &state["waiting_for"][0]), (&false.into(), &"identity".into()));
    assert_eq!(state["identity"]["state"], "absent");
    assert_eq!(state["listeners"][0]["serving"], false);
    // Nothing is served meanwhile, and the record says why.
    if let Ok(mut stream) = TcpStream::connect(server.address("in").await).await {
        rest_of(&mut stream).await.unwrap_err();
    } // else the reset came even before
    assert_eq!(server.ended("handshake_failed").await["reason"], "no_identity");
    std::fs::rename(&hidden, &key).unwrap();
    // Ready is never said before the listeners serve.
    until("readiness", || async {
        let state = server.state().await;
        let serving = state["listeners"][0]["serving"].as_bool().unwrap();
        assert!(serving || !state["ready"].as_bool().unwrap(), "{state}");
        serving.then_some(())
    })
    .await;
    server.ready().await;
    assert_eq!(server.get("/readyz").await, (200, "ready\n".into()));
    assert_eq!(server.state().await["listeners"][0]["serving"], true);
}

#[tokio::test]
async fn state_tells_everything_but_secrets() {
    let joined = Joined::start("", "").await;
    let mut live = joined.connected().await;
    let (head, text) = ask(joined.server.admin, "GET /state").await;
    assert!(head.starts_with("http/1.1 200") && head.contains("content-type: application/json"), "{head}");
    let state: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(state["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(state["ready"], true);
    let profile = serde_json::json!({
        "cipher_suites": ["TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"],
        "groups": ["X25519MLKEM768", "secp384r1"],
        "svid_keys": "p384",
        "resumption": true,
        "fips": false,
    });
    assert_eq!(state["profile"], profile);
    let identity = &state["identity"];
    assert_eq!(identity["spiffe_id"], "spiffe://a.example/server");
    assert_eq!((&identity["state"], &identity["not_after"]), (&"fresh".into(), &crate::testing::FAR_OFF.into()));
    assert_eq!(identity["key_type"], "ecdsa-p384");
    assert_eq!(state["bundles"][0]["trust_domain"], "a.example");
    assert_eq!(state["bundles"][0]["authorities"][0]["not_after"], crate::testing::FAR_OFF);
    assert_eq!(state["connections"]["open"], 1);
    let connection = &state["connections"]["listed"][0];
    assert_eq!(
        (&connection["peer"], &connection["direction"]),
        (&"spiffe://a.example/client".into(), &"inbound".into())
    );
    assert_eq!(state["config"]["inbound"][0]["allow"][0], "spiffe://a.example/client");

    // No line of the key's PEM, and none of its bytes in another dress, whether in the state, the metrics or the log.
    exchange(&mut live, b"more").await.unwrap();
    drop(live);
    let Joined { mut server, domain, .. } = joined;
    server.record("the end of the connection", |_| true).await;
    let (_, metrics) = ask(server.admin, "GET /metrics").await;
    let log = server.running.heard().join("\n");
    let pem = std::fs::read_to_string(domain.path().join("server.key")).unwrap();
    let lines: Vec<&str> = pem.lines().filter(|line| !line.starts_with('-')).collect();
    assert!(lines.len() > 2, "a key was looked for");
    for shown in [&text, &metrics, &log] {
        assert!(!shown.is_empty() && !shown.contains("PRIVATE KEY"));
        assert!(lines.iter().all(|line| !shown.contains(*line)));
    }
    let _ = server.stop().await;
}

#[tokio::test]
async fn the_admin_server_answers_only_what_changes_nothing() {
    let joined = Joined::start("", "").await;
    let admin = joined.server.admin;
    assert!(admin.ip().is_loopback());
    for path in ["/", "/livez", "/readyz", "/metrics", "/state"] {
        let (head, body) = ask(admin, &format!("GET {path}")).await;
        assert!(head.starts_with("http/1.1 200") && !body.is_empty(), "{path}: {head}");
        let (head, body) = ask(admin, &format!("HEAD {path}")).await;
        assert!(head.starts_with("http/1.1 200") && body.is_empty(), "{path}: {head}");
        for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
            let (head, _) = ask(admin, &format!("{method} {path}")).await;
            assert!(head.starts_with("http/1.1 405") && head.contains("allow: get, head"), "{method} {path}: {head}");
        }
    }
    for path in ["/nothing", "/state/", "/../etc/passwd", "/debug/pprof"] {
        let (head, _) = ask(admin, &format!("GET {path}")).await;
        assert!(head.starts_with("http/1.1 404"), "{path}: {head}");
    }
    // What is not HTTP gets no answer that anybody could use, and the next question is answered.
    let mut stream = TcpStream::connect(admin).await.unwrap();
    stream.write_all(&[0x16, 3, 1, 0, 0, 0, 0, 0, b'\r', b'\n', b'\r', b'\n']).await.unwrap();
    let answer = rest_of(&mut stream).await.unwrap_or_default();
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(get(admin, "/livez").await.unwrap().0, 200);
}

#[tokio::test]
async fn the_access_log_has_a_line_for_every_connection() {
    let mut joined = Joined::start("", "").await;
    let mut stream = joined.connected().await;
    stream.shutdown().await.unwrap();
    rest_of(&mut stream).await.unwrap();
    for (proxy, peer, local, rule, direction, listener) in [
        (&mut joined.server, "/client", "/server", "allow:in", "inbound", "in"),
        (&mut joined.client, "/server", "/client", "expect:out", "outbound", "out"),
    ] {
        let line = proxy.ended("done").await;
        for (field, value) in [
            ("level", "INFO"),
            ("message", "connection done"),
            ("peer", &format!("spiffe://a.example{peer}")),
            ("local", &format!("spiffe://a.example{local}")),
            ("rule", rule),
            ("mode", "enforce"),
            ("direction", direction),
            ("listener", listener),
            ("tls_version", "TLSv1.3"),
            ("cipher_suite", "TLS_AES_256_GCM_SHA384"),
            ("group", "X25519MLKEM768"),
            ("key_type", "ecdsa-p384"),
        ] {
            assert_eq!(line[field], value, "{field}: {line}");
        }
        assert_eq!(line["resumed"], false);
        assert_eq!((&line["bytes_sent"], &line["bytes_received"]), (&5.into(), &5.into()), "{line}");
        assert!(line["duration_seconds"].as_f64().unwrap() > 0.0, "{line}");
        assert!(line["client"].as_str().unwrap().parse::<SocketAddr>().is_ok(), "{line}");
        assert!(line["timestamp"].is_string() && line["upstream"].is_string(), "{line}");
    }
    // A refusal has one as well, with the word that the metric has.
    let weak = joined.domain.ca.issue(&Spec::leaf(joined.domain.id("/client")).key(Key::P256));
    let [certificate, key, authority] = joined.domain.files("weak", &weak);
    let mut openssl = Command::new(tool("PORTCULLIS_TEST_OPENSSL", "openssl"));
    openssl.args(["s_client", "-quiet", "-connect", &joined.server.address("in").await.to_string()]);
    openssl.arg("-cert").arg(certificate).arg("-key").arg(key).arg("-CAfile").arg(authority);
    output(&mut openssl, "hello\n").await;
    let line = joined.server.ended("handshake_failed").await;
    assert_eq!((&line["reason"], &line["message"]), (&"peer_key_type".into(), &"connection refused".into()), "{line}");
    assert!(line["detail"].as_str().unwrap().contains("P-384"), "{line}");
    joined.server.metric_reaches("portcullis_tls_handshakes_total", &[("reason", "peer_key_type")], 1.0).await;
}

#[tokio::test]
async fn the_access_log_can_be_turned_off_while_running() {
    let mut joined = Joined::start("", "telemetry: { access_log: true }\n").await;
    joined.connected().await;
    joined.server.ended("done").await;
    joined.server.reloaded(&format!("{}telemetry: {{ access_log: false }}\n", joined.server_config)).await;
    joined.connected().await;
    joined.server.metric_reaches("portcullis_connections_total", &[("cause", "done")], 2.0).await;
    // Lines come in order: when "stopped" is there, nothing can come any more.
    joined.server.running.signal(rustix::process::Signal::TERM);
    joined.server.logged(&["\"stopped\""]).await;
    let lines = joined.server.running.heard().iter().filter(|line| line.contains("portcullis::access")).count();
    assert_eq!(lines, 1);
}

#[tokio::test]
async fn on_a_terminal_the_log_is_for_people() {
    let domain = Domain::new("a.example");
    let workload = echo().await;
    let config = domain.identity("/server")
        + &inbound_listener("in", workload.address, &domain.id("/client"), "")
        + "admin: { listen: 127.0.0.1:0 }\n";
    let file = domain.path().join("server.yaml");
    std::fs::write(&file, config).unwrap();
    // util-linux's script gives the program a terminal of its own; the shell in it tells its number before it becomes
    // the program.
    let run = format!("echo pid=$$; exec {} run --config {}", program(), file.display());
    let mut terminal = Running::start(Command::new("script").args(["-qec", &run, "/dev/null"]).env("SHELL", "/bin/sh"));
    let pid = terminal.line("its process", |line| line.trim().strip_prefix("pid=")?.parse().ok()).await;
    let on_terminal = Ended(rustix::process::Pid::from_raw(pid).unwrap());
    let address: SocketAddr = terminal
        .line("the listener's address", |line| {
            assert!(!line.starts_with('{'), "not JSON: {line}");
            let line = plain(line);
            let at = line.split_once("address=")?.1;
            at.trim().trim_matches('"').parse().ok()
        })
        .await;
    let admin: SocketAddr = terminal
        .line("the start", |line| {
            assert!(line.contains("\u{1b}["), "no colours: {line}");
            plain(line).split_once("admin=")?.1.trim().parse().ok()
        })
        .await;
    until("readiness", || async { (get(admin, "/readyz").await.ok()?.0 == 200).then_some(()) }).await;
    plaintext_to(address).await;
    let line = terminal.line("a line about the refusal", |l| l.contains("connection refused").then(|| plain(l))).await;
    assert!(line.contains("not_tls") && line.contains("INFO"), "{line}");
    drop(on_terminal);
    assert!(!terminal.wait().await.success(), "script tells how its program ended: by a signal");
}

/// Ends a process that is not our own child, however the test ends. The terminal's end alone would only be a SIGHUP.
struct Ended(rustix::process::Pid);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(self.0, rustix::process::Signal::KILL);
    }
}

/// Without the colours.
fn plain(line: &str) -> String {
    let mut parts = line.split("\u{1b}[");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + part.split_once('m').map_or("", |(_, rest)| rest))
}

#[tokio::test]
async fn text_and_levels_may_be_asked_for() {
    let mut joined =
        Joined::start("", "telemetry: { log_format: json, log_level: 'info,portcullis::identity=warn' }\n").await;
    joined.connected().await;
    joined.server.logged(&["\"target\":\"portcullis::access\"", "\"cause\":\"done\""]).await;
    assert!(!joined.server.running.said.iter().any(|line| line.contains("our identity is fresh")));
    let domain = Domain::new("a.example");
    let config = domain.identity("/server")
        + &inbound_listener("in", joined.workload.address, &domain.id("/client"), "")
        + "telemetry: { log_format: text, log_level: info }\nadmin: { listen: 127.0.0.1:0 }\n";
    let file = domain.path().join("server.yaml");
    std::fs::write(&file, config).unwrap();
    let mut server = Running::start(Command::new(program()).arg("run").arg("--config").arg(file));
    let line = server.line("the start", |line| line.contains("started").then(|| line.to_owned())).await;
    assert!(line.contains(" INFO ") && line.contains("admin=127.0.0.1:") && !line.contains('\u{1b}'), "{line}");
    // Nobody at the other end of a probe is no reason to stop.
    let mut silent = TcpStream::connect(joined.server.admin).await.unwrap();
    silent.shutdown().await.unwrap();
    let mut nothing = Vec::new();
    let _ = soon("the end", silent.read_to_end(&mut nothing)).await;
    assert_eq!(joined.server.get("/livez").await.0, 200);
}
