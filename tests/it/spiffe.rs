//! Sidecars whose identity comes from a Workload API, opposite peers built on go-spiffe whose identity comes from the
//! same one: both directions, what was negotiated as the peer sees it, how connections end, and every trouble that an
//! agent can make: absent, restarted, hanging, without an entry for us, and gone until the SVID has expired.

use std::net::SocketAddr;

use rustix::process::Signal;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use crate::agent::{Agent, entry, event, go_path, go_server, heard, own_uid, run};
use crate::harness::{Echo, Proxy, Running, echo, exchange, field, program, soon, until};

const PROXY: &str = "spiffe://lab.example/proxy";
const CLIENT: &str = "spiffe://lab.example/go-client";
const SERVER: &str = "spiffe://lab.example/go-server";

fn by_path(id: &str, path: &std::path::Path, more: &str) -> String {
    entry(id, &format!("path: {}", path.display()), more)
}

/// Entries for the proxy and the two go-spiffe programs, each known by its executable.
fn entries(domain: &str, proxy_more: &str) -> String {
    let id = |name: &str| format!("spiffe://{domain}/{name}");
    by_path(&id("proxy"), program().as_ref(), proxy_more)
        + &by_path(&id("go-client"), &go_path("spiffe-client"), "")
        + &by_path(&id("stranger"), &go_path("spiffe-client"), ", hint: stranger")
        + &by_path(&id("go-server"), &go_path("spiffe-server"), "")
}

fn authority(entries: &str) -> String {
    format!("trust_domain: lab.example\nentries:\n{entries}")
}

fn inbound(to: SocketAddr, allow: &str, more: &str) -> String {
    format!("inbound:\n  - {{ name: api, listen: \"127.0.0.1:0\", to: \"{to}\", allow: [\"{allow}\"] {more} }}\n")
}

fn outbound(to: SocketAddr, expect: &str) -> String {
    format!("outbound:\n  - {{ name: up, listen: \"127.0.0.1:0\", to: \"{to}\", expect: \"{expect}\" }}\n")
}

/// One connection of the go-spiffe client: its line.
async fn connect(agent: &Agent, to: SocketAddr, expect: &str, more: &[&str]) -> Value {
    let mut command = agent.go("spiffe-client", &["-addr", &to.to_string(), "-expect", expect, "-timeout", "25s"]);
    let (_, lines) = run(command.args(more)).await;
    event(&lines, "connection").clone()
}

async fn failures(proxy: &Proxy, direction: &str, reason: &str) -> f64 {
    proxy.metrics().await.sum("portcullis_tls_handshakes_total", &[("direction", direction), ("reason", reason)])
}

/// Sends a text and waits for the end of the connection, whatever end it is.
async fn try_through(address: SocketAddr) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(b"anybody there?").await?;
    stream.shutdown().await?;
    let mut answer = Vec::new();
    soon("the end of the connection", stream.read_to_end(&mut answer)).await?;
    Ok(answer)
}

/// A workload that answers the first line of each connection and closes.
async fn one_line_each() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                if stream.read_line(&mut line).await.is_ok() {
                    let _ = stream.write_all(line.as_bytes()).await;
                    let _ = stream.shutdown().await;
                    // The client's side of the end, so that no byte is left unread and the close is no reset.
                    let _ = stream.read_to_string(&mut line).await;
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn a_go_spiffe_client_reaches_the_workload_and_sees_what_was_negotiated() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path(), "lab", &authority(&entries("lab.example", ""))).await;
    let workload = one_line_each().await;
    let config = agent.identity() + &inbound(workload, CLIENT, "");
    let proxy = Proxy::start(dir.path(), "proxy", &config).await;
    proxy.ready().await;
    let to = proxy.address("api").await;
    for (curves, curve, group) in [("", "X25519MLKEM768", "X25519MLKEM768"), ("P384,P256", "P384", "secp384r1")] {
        let (to, arguments) = (to.to_string(), ["-hold", "-timeout", "25s", "-curves", curves]);
        let mut client = agent.go("spiffe-client", &["-addr", &to, "-expect", PROXY]);
        let (_, lines) = run(client.args(arguments)).await;
        let seen = event(&lines, "connection");
        assert_eq!(seen["ok"], true, "{seen}");
        assert_eq!(seen["version"], "TLSv1.3", "{seen}");
        assert_eq!(seen["cipher_suite"], "TLS_AES_256_GCM_SHA384", "{seen}");
        assert_eq!(seen["curve"], curve, "{seen}");
        assert_eq!(seen["peer"], PROXY, "{seen}");
        assert_eq!(seen["peer_certificate"]["key_type"], "ecdsa P-384", "{seen}");
        assert_eq!(event(&lines, "closed")["ended"], "close_notify", "{lines:?}");
        let labels = [
            ("direction", "inbound"),
            ("version", "TLSv1.3"),
            ("cipher_suite", "TLS_AES_256_GCM_SHA384"),
            ("group", group),
            ("key_type", "ecdsa-p384"),
            ("compliant", "true"),
        ];
        assert_eq!(proxy.metrics().await.sum("portcullis_tls_negotiated_total", &labels), 1.0);
    }
    proxy.metric_reaches("portcullis_connections_total", &[("cause", "done")], 2.0).await;
}

#[tokio::test]
async fn a_go_spiffe_client_that_is_not_admitted_or_speaks_too_weakly_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path(), "lab", &authority(&entries("lab.example", ""))).await;
    let workload = echo().await;
    let config = agent.identity() + &inbound(workload.address, CLIENT, "");
    let proxy = Proxy::start(dir.path(), "proxy", &config).await;
    proxy.ready().await;
    let to = proxy.address("api").await;
    let cases: [(&[&str], &str); 3] = [
        (&["-hint", "stranger"], "denied"),
        (&["-curves", "X25519,P256"], "no_shared_group"),
        (&["-max", "1.2"], "no_shared_version"),
    ];
    for (arguments, reason) in cases {
        let seen = connect(&agent, to, PROXY, arguments).await;
        assert_eq!((&seen["ok"], &seen["ended"]), (&false.into(), &"alert".into()), "{reason}: {seen}");
        proxy.metric_reaches("portcullis_tls_handshakes_total", &[("reason", reason)], 1.0).await;
    }
    // The other way round: the client finds somebody else than it expects.
    let seen = connect(&agent, to, SERVER, &[]).await;
    assert_eq!((&seen["ok"], &seen["stage"]), (&false.into(), &"handshake".into()), "{seen}");
    proxy.metric_reaches("portcullis_tls_handshakes_total", &[("reason", "peer_alert")], 1.0).await;
    assert_eq!(*workload.accepted.borrow(), 0, "nobody reached the workload");
    assert_eq!(connect(&agent, to, PROXY, &[]).await["ok"], true, "the next client is served");
}

#[tokio::test]
async fn tls_1_2_where_it_is_asked_for_and_only_the_one_suite() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path(), "lab", &authority(&entries("lab.example", ""))).await;
    let workload = echo().await;
    let config = agent.identity() + &inbound(workload.address, CLIENT, ", legacy_tls12: true");
    let proxy = Proxy::start(dir.path(), "proxy", &config).await;
    proxy.ready().await;
    let to = proxy.address("api").await;
    let seen = connect(&agent, to, PROXY, &["-max", "1.2"]).await;
    assert_eq!(seen["version"], "TLSv1.2", "{seen}");
    assert_eq!(seen["cipher_suite"], "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", "{seen}");
    assert_eq!(seen["curve"], "P384", "{seen}");
    let weak = ["-max", "1.2", "-suites", "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"];
    assert_eq!(connect(&agent, to, PROXY, &weak).await["ok"], false);
    assert_eq!(failures(&proxy, "inbound", "no_shared_suite").await, 1.0);
    assert_eq!(connect(&agent, to, PROXY, &[]).await["version"], "TLSv1.3");
}

#[tokio::test]
async fn a_plain_client_reaches_a_go_spiffe_server() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path(), "lab", &authority(&entries("lab.example", ""))).await;
    for (curves, curve) in [("", "X25519MLKEM768"), ("P384,P256", "P384")] {
        let (mut server, at) =
            go_server(&mut agent.go("spiffe-server", &["-allow", PROXY, "-accept", "1", "-curves", curves])).await;
        let proxy = Proxy::start(dir.path(), "proxy", &(agent.identity() + &outbound(at, SERVER))).await;
        proxy.ready().await;
        let mut stream = TcpStream::connect(proxy.address("up").await).await.unwrap();
        exchange(&mut stream, b"to the other side").await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(soon("the end", stream.read(&mut [0; 8])).await.unwrap(), 0);
        let seen = heard(&mut server, "the connection", |line| line["event"] == "connection").await;
        assert_eq!(seen["ended"], "close_notify", "{seen}");
        assert_eq!(seen["peer"], PROXY, "{seen}");
        assert_eq!(seen["version"], "TLSv1.3", "{seen}");
        assert_eq!(seen["curve"], curve, "{seen}");
        let suite = seen["cipher_suite"].as_str().unwrap();
        assert!(["TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"].contains(&suite), "{seen}");
        assert_eq!(seen["peer_certificate"]["key_type"], "ecdsa P-384", "{seen}");
        assert_eq!(seen["bytes"], 17, "{seen}");
        proxy.metric_reaches("portcullis_connections_total", &[("cause", "done")], 1.0).await;
        assert!(proxy.stop().await.success());
    }
}

#[tokio::test]
async fn a_go_spiffe_server_that_is_somebody_else_or_does_not_want_us() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path(), "lab", &authority(&entries("lab.example", ""))).await;
    let (mut server, at) = go_server(&mut agent.go("spiffe-server", &["-allow", CLIENT])).await;
    let wrong = format!("{}{}", agent.identity(), outbound(at, "spiffe://lab.example/records"));
    let mut proxy = Proxy::start(dir.path(), "proxy", &wrong).await;
    proxy.ready().await;
    let error = try_through(proxy.address("up").await).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(failures(&proxy, "outbound", "wrong_peer").await, 1.0);
    let seen = heard(&mut server, "our refusal", |line| line["event"] == "connection").await;
    assert_eq!((&seen["stage"], &seen["ended"]), (&"handshake".into(), &"alert".into()), "{seen}");

    // Now it is the one, and refuses us: in TLS 1.3 that comes after our handshake is done.
    proxy.rewrite(&format!("{}{}", agent.identity(), outbound(at, SERVER)));
    proxy.metric_reaches("portcullis_config_reloads_total", &[("result", "success")], 1.0).await;
    let error = try_through(proxy.address("up").await).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    let seen = heard(&mut server, "its refusal", |line| line["event"] == "connection").await;
    assert_eq!((&seen["stage"], &seen["bytes"]), (&"handshake".into(), &0.into()), "{seen}");
    let line =
        proxy.running.line("the access log", |line| line.contains("connection ended").then(|| line.to_owned())).await;
    assert_eq!(field(&line, "cause").as_deref(), Some("tls_error"), "{line}");
    assert!(line.contains("alert: BadCertificate"), "{line}");
}

#[tokio::test]
async fn an_upstream_that_vanishes_without_close_notify_is_recorded_as_a_truncation() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path(), "lab", &authority(&entries("lab.example", ""))).await;
    let arguments = ["-allow", PROXY, "-abrupt", "-max-age", "500ms"];
    let (_server, at) = go_server(&mut agent.go("spiffe-server", &arguments)).await;
    let mut proxy = Proxy::start(dir.path(), "proxy", &(agent.identity() + &outbound(at, SERVER))).await;
    proxy.ready().await;
    let mut stream = TcpStream::connect(proxy.address("up").await).await.unwrap();
    exchange(&mut stream, b"half a story").await.unwrap();
    let error = soon("the end", stream.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "a cut is no end");
    let truncated = [("direction", "outbound"), ("cause", "truncated")];
    proxy.metric_reaches("portcullis_connections_total", &truncated, 1.0).await;
    proxy.running.line("the access log", |line| line.contains("\"cause\":\"truncated\"").then_some(())).await;
}

/// Two authorities that know each other: agent, proxy and a workload in the first one.
async fn federation(dir: &std::path::Path) -> (Agent, Agent) {
    let authority = |own: &str, other: &str| {
        format!(
            "trust_domain: {own}.example\nbundle_file: {}\nfederates_with: {{ {other}.example: {} }}\nentries:\n{}",
            dir.join(format!("{own}.json")).display(),
            dir.join(format!("{other}.json")).display(),
            entries(&format!("{own}.example"), "")
        )
    };
    let a = Agent::start(dir, "a", &authority("a", "b")).await;
    let b = Agent::start(dir, "b", &authority("b", "a")).await;
    (a, b)
}

async fn knows_both(proxy: &Proxy) {
    until("both bundles", async || (proxy.state().await["bundles"].as_array()?.len() == 2).then_some(())).await;
}

#[tokio::test]
async fn federated_trust_domains_reach_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = federation(dir.path()).await;
    let workload = echo().await;
    let (mut server, at) = go_server(&mut b.go("spiffe-server", &["-allow", "spiffe://a.example/proxy"])).await;
    let config = a.identity()
        + &inbound(workload.address, "spiffe://b.example/go-client", "")
        + &outbound(at, "spiffe://b.example/go-server");
    let proxy = Proxy::start(dir.path(), "proxy", &config).await;
    proxy.ready().await;
    knows_both(&proxy).await;
    let to = proxy.address("api").await;
    let seen = connect(&b, to, "spiffe://a.example/proxy", &[]).await;
    assert_eq!((&seen["ok"], &seen["peer"]), (&true.into(), &"spiffe://a.example/proxy".into()), "{seen}");
    let seen = connect(&a, to, "spiffe://a.example/proxy", &[]).await;
    assert_eq!(seen["ok"], false, "the same name in our own domain is another identity: {seen}");
    assert_eq!(failures(&proxy, "inbound", "denied").await, 1.0);
    let mut stream = TcpStream::connect(proxy.address("up").await).await.unwrap();
    exchange(&mut stream, b"across the border").await.unwrap();
    drop(stream);
    let seen = heard(&mut server, "the connection", |line| line["event"] == "connection").await;
    assert_eq!(seen["peer"], "spiffe://a.example/proxy");
}

#[tokio::test]
async fn a_trust_domain_that_we_do_not_federate_with_is_unknown() {
    let dir = tempfile::tempdir().unwrap();
    let told = dir.path().join("lab.json");
    let ours = format!("bundle_file: {}\n", told.display()) + &authority(&entries("lab.example", ""));
    let ours = Agent::start(dir.path(), "lab", &ours).await;
    // It knows us, we do not know it.
    let theirs = format!(
        "trust_domain: b.example\nfederates_with: {{ lab.example: {} }}\nentries:\n{}",
        told.display(),
        entries("b.example", "")
    );
    let b = Agent::start(dir.path(), "b", &theirs).await;
    let workload = echo().await;
    let config = ours.identity() + &inbound(workload.address, "spiffe://b.example/go-client", "");
    let proxy = Proxy::start(dir.path(), "proxy", &config).await;
    proxy.ready().await;
    let seen = connect(&b, proxy.address("api").await, PROXY, &[]).await;
    assert_eq!(
        (&seen["ok"], &seen["peer"]),
        (&false.into(), &PROXY.into()),
        "it took us and we did not take it: {seen}"
    );
    assert_eq!(failures(&proxy, "inbound", "unknown_trust_domain").await, 1.0);
}

#[tokio::test]
async fn one_of_several_svids_is_chosen_by_id_or_hint() {
    let dir = tempfile::tempdir().unwrap();
    let several = entry("spiffe://lab.example/first", &own_uid(), "")
        + &entry("spiffe://lab.example/second", &own_uid(), ", hint: two")
        + &entry("spiffe://lab.example/third", &own_uid(), ", hint: three");
    let agent = Agent::start(dir.path(), "lab", &authority(&several)).await;
    let cases = [
        (agent.identity(), "first"),
        (agent.identity_with("spiffe_id: spiffe://lab.example/third"), "third"),
        (agent.identity_with("hint: two"), "second"),
    ];
    for (identity, chosen) in cases {
        let proxy =
            Proxy::start(dir.path(), "proxy", &(identity + &inbound(([127, 0, 0, 1], 9).into(), CLIENT, ""))).await;
        proxy.ready().await;
        assert_eq!(proxy.state().await["identity"]["spiffe_id"], format!("spiffe://lab.example/{chosen}"));
    }
    let none = agent.identity_with("hint: four") + &inbound(([127, 0, 0, 1], 9).into(), CLIENT, "");
    let proxy = Proxy::start(dir.path(), "proxy", &none).await;
    until("the refusal", async || proxy.state().await["identity"]["why"].as_str()?.contains("four").then_some(()))
        .await;
    assert_eq!(proxy.get("/readyz").await.0, 503);
}

/// Waits until the proxy says that it waits for its identity.
async fn waits_for_identity(proxy: &Proxy) {
    until("readiness to name the identity", async || {
        let (status, body) = proxy.get("/readyz").await;
        (status == 503 && body.contains("identity")).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_agent_that_comes_later_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let workload = echo().await;
    let socket = format!("unix://{}", dir.path().join("late.sock").display());
    // Named by the environment alone.
    let config = inbound(workload.address, CLIENT, "");
    let proxy = Proxy::start_with(dir.path(), "proxy", &config, |command| {
        command.env("SPIFFE_ENDPOINT_SOCKET", &socket);
    })
    .await;
    waits_for_identity(&proxy).await;
    let state = proxy.state().await;
    assert_eq!((&state["identity"]["state"], &state["listeners"][0]["serving"]), (&"absent".into(), &false.into()));
    // Whoever comes now is let go, and it is counted why.
    let to = proxy.address("api").await;
    assert!(try_through(to).await.unwrap_or_default().is_empty());
    assert_eq!(failures(&proxy, "inbound", "no_identity").await, 1.0);
    let mut agent = Agent::start(dir.path(), "late", &authority(&entry("spiffe://lab.example/no", "pid: 1", ""))).await;
    assert_eq!(agent.address(), socket);

    // It is there, and has no entry for us yet.
    until("the agent's refusal", async || {
        let identity = &proxy.state().await["identity"];
        (identity["source_reachable"] == true && identity["why"].as_str()?.contains("no identity issued")).then_some(())
    })
    .await;
    waits_for_identity(&proxy).await;
    agent.reload(&authority(&entries("lab.example", ""))).await;
    proxy.ready().await;
    assert_eq!(connect(&agent, to, PROXY, &[]).await["ok"], true);
    assert_eq!(*workload.accepted.borrow(), 1);
}

async fn source_is(proxy: &Proxy, up: f64) {
    until(&format!("identity_source_up {up}"), async || {
        (proxy.metrics().await.sum("portcullis_identity_source_up", &[]) == up).then_some(())
    })
    .await;
}

async fn state_is(proxy: &Proxy, state: &str) {
    until(&format!("the state {state}"), async || {
        let told = proxy.state().await["identity"]["state"] == *state;
        let counted = proxy.metrics().await.sum("portcullis_svid_state", &[("state", state)]) == 1.0;
        (told && counted).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_agent_that_is_restarted_is_found_again_and_nothing_is_interrupted() {
    let dir = tempfile::tempdir().unwrap();
    let config =
        format!("state_dir: {}\n", dir.path().join("state").display()) + &authority(&entries("lab.example", ""));
    let agent = Agent::start(dir.path(), "lab", &config).await;
    let workload = echo().await;
    let proxy = Proxy::start(dir.path(), "proxy", &(agent.identity() + &inbound(workload.address, CLIENT, ""))).await;
    proxy.ready().await;
    let to = proxy.address("api").await.to_string();
    let arguments = ["-addr", &to, "-expect", PROXY, "-hold", "-ping", "50ms", "-timeout", "60s"];
    let mut held = Running::start(&mut agent.go("spiffe-client", &arguments));
    heard(&mut held, "a connection", |line| line["ok"] == true).await;
    let before = proxy.state().await["identity"]["serial"].clone();
    agent.stop().await;
    source_is(&proxy, 0.0).await;
    state_is(&proxy, "stale").await;
    assert_eq!(proxy.get("/readyz").await.0, 200, "a valid SVID is kept through an outage");
    let agent = Agent::start(dir.path(), "lab", &config).await;
    source_is(&proxy, 1.0).await;
    state_is(&proxy, "fresh").await;
    assert_ne!(proxy.state().await["identity"]["serial"], before);
    assert_eq!(connect(&agent, proxy.address("api").await, PROXY, &[]).await["ok"], true);
    let open = proxy.metrics().await.sum("portcullis_connections_open", &[("direction", "inbound")]);
    assert_eq!(open, 1.0, "the connection from before is still there");
    held.signal(Signal::TERM);
    let end = heard(&mut held, "its end", |line| line["event"] == "closed").await;
    assert_eq!(end["ended"], "timeout", "this side ended it: {end}");
    assert!(end["pings"].as_u64().unwrap() > 0, "{end}");
}

#[tokio::test]
async fn an_agent_that_hangs_is_noticed_and_its_svid_is_not_used_beyond_its_end() {
    let dir = tempfile::tempdir().unwrap();
    // Ours lives for seconds, those of the peers for an hour: only ours expires.
    let agent = Agent::start(dir.path(), "lab", &authority(&entries("lab.example", ", ttl: 6s"))).await;
    let Echo { address: workload, accepted } = echo().await;
    let (_server, at) = go_server(&mut agent.go("spiffe-server", &["-allow", PROXY, "-timeout", "120s"])).await;
    let config = agent.identity() + &inbound(workload, CLIENT, "") + &outbound(at, SERVER);
    let mut proxy = Proxy::start(dir.path(), "proxy", &config).await;
    proxy.ready().await;
    let (to, up) = (proxy.address("api").await.to_string(), proxy.address("up").await);
    let arguments = ["-addr", &to, "-expect", PROXY, "-timeout", "120s"];
    let mut held = Running::start(agent.go("spiffe-client", &arguments).args(["-hold", "-ping", "50ms"]));
    heard(&mut held, "a connection", |line| line["ok"] == true).await;
    let mut outward = TcpStream::connect(up).await.unwrap();
    exchange(&mut outward, b"before").await.unwrap();
    // One that comes again and again and has its identity from before.
    let mut again = Running::start(agent.go("spiffe-client", &arguments).args(["-for", "100s", "-interval", "100ms"]));
    heard(&mut again, "a connection", |line| line["ok"] == true).await;

    agent.running.signal(Signal::STOP);
    proxy.metric_reaches("portcullis_svid_rotation_overdue", &[], 1.0).await;
    proxy.running.line("the alarm", |line| line.contains("rotation is overdue").then_some(())).await;
    let state = proxy.state().await;
    assert!(["stale", "expired"].contains(&state["identity"]["state"].as_str().unwrap()), "{state}");

    state_is(&proxy, "expired").await;
    proxy.running.line("the end", |line| line.contains("has expired, nothing is served").then_some(())).await;
    waits_for_identity(&proxy).await;
    let end = heard(&mut held, "the end of the open connection", |line| line["event"] == "closed").await;
    assert_ne!(end["ended"], "close_notify", "an abort is not an end: {end}");
    assert_ne!(end["ended"], "timeout", "the proxy ended it: {end}");
    let error = soon("the end", outward.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    for direction in ["inbound", "outbound"] {
        let gone = [("direction", direction), ("cause", "own_identity_gone")];
        proxy.metric_reaches("portcullis_connections_total", &gone, 1.0).await;
    }
    proxy
        .metric_reaches("portcullis_tls_handshakes_total", &[("direction", "inbound"), ("reason", "no_identity")], 2.0)
        .await;
    heard(&mut again, "a refusal", |line| line["ok"] == false).await;
    assert!(try_through(up).await.unwrap_or_default().is_empty());
    assert_eq!(failures(&proxy, "outbound", "no_identity").await, 1.0);
    let reached = *accepted.borrow();

    agent.running.signal(Signal::CONT);
    proxy.ready().await;
    state_is(&proxy, "fresh").await;
    assert_eq!(proxy.metrics().await.sum("portcullis_svid_rotation_overdue", &[]), 0.0);
    heard(&mut again, "a connection after the recovery", |line| line["ok"] == true).await;
    let mut outward = TcpStream::connect(up).await.unwrap();
    exchange(&mut outward, b"after").await.unwrap();
    assert!(*accepted.borrow() > reached);
}
