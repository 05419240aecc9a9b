//! Life of a proxy that runs: reloads good and bad, drain, identities that change, limits, and what the workload is
//! told about its clients.

use std::net::SocketAddr;

use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::{Domain, Joined, Proxy, echo, exchange, free_port, inbound_listener, rest_of, soon, until};
use crate::testing::{Spec, TestCa};

const RELOADS: &str = "portcullis_config_reloads_total";

async fn refuses_connections(address: SocketAddr) {
    until("the listener to be closed", || async { TcpStream::connect(address).await.err().map(drop) }).await;
}

/// Whatever it was that ended it: nothing more comes, and it was no orderly end.
async fn is_cut(stream: &mut TcpStream) {
    let end = rest_of(stream).await;
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

/// A place becomes free a moment after the end of the connection that had it.
async fn serves_again(address: SocketAddr) {
    until("a free place", || async {
        let mut stream = TcpStream::connect(address).await.ok()?;
        exchange(&mut stream, b"is there room?").await.ok()
    })
    .await;
}

#[tokio::test]
async fn a_reload_leaves_unchanged_listeners_alone() {
    let mut joined = Joined::start("", "").await;
    let kept = joined.server.address("in").await;
    let mut live = joined.connected().await;

    // One more listener, by file change alone.
    let port = free_port().await;
    let second = |port: u16| {
        let to = joined.workload.address;
        format!(
            "  - {{ name: second, listen: '127.0.0.1:{port}', to: '{to}', allow: ['{}'] }}\n",
            joined.domain.id("/client")
        )
    };
    joined.server.rewrite(&format!("{}{}", joined.server_config, second(port)));
    joined.server.metric_reaches(RELOADS, &[("result", "success")], 1.0).await;
    let added = joined.server.address("second").await;
    assert_eq!(added.port(), port);
    let client_config = std::fs::read_to_string(&joined.client.config).unwrap();
    let to_second = client_config.replace(&kept.to_string(), &added.to_string());
    joined.client.reloaded(&to_second).await;
    let mut through_second = joined.connected().await;

    // It moves: the old port closes, the new one serves, and what is open stays open.
    let moved = free_port().await;
    joined.server.reloaded(&format!("{}{}", joined.server_config, second(moved))).await;
    assert_eq!(joined.server.address("second").await.port(), moved);
    refuses_connections(added).await;
    exchange(&mut through_second, b"still here").await.unwrap();

    // It goes, and with it what it served.
    joined.server.reloaded(&joined.server_config.clone()).await;
    refuses_connections(SocketAddr::from(([127, 0, 0, 1], moved))).await;
    is_cut(&mut through_second).await;
    assert_eq!(joined.server.ended("drained").await["listener"], "second");

    // The first has noticed nothing of all that.
    assert_eq!(joined.server.address("in").await, kept);
    exchange(&mut live, b"and still here").await.unwrap();
    joined.client.reloaded(&client_config).await;
    joined.connected().await;
}

#[tokio::test]
async fn a_bad_config_is_refused_with_the_reason_and_the_old_one_goes_on() {
    let mut joined = Joined::start("", "").await;
    let mut live = joined.connected().await;
    let holder = echo().await;
    let good = joined.server_config.clone();
    let more = |listener: &str| format!("{good}{listener}\n");
    let to = joined.workload.address;
    let someone = joined.domain.id("/someone");
    let other_identity = joined.domain.identity("/somebody-else");
    let changed_identity = {
        let listener = good.split_once("inbound:").unwrap().1;
        format!("{other_identity}inbound:{listener}")
    };
    let cases = [
        ("syntax", more("outbound: ["), vec!["server.yaml:"]),
        ("unknown key", more("drain_timeuot: 3s"), vec!["unknown key 'drain_timeuot'"]),
        (
            "address in use",
            more(&format!("  - {{ name: more, listen: '{}', to: '{to}', allow: ['{someone}'] }}", holder.address)),
            vec!["cannot listen on", "listener 'more'"],
        ),
        ("another identity", changed_identity, vec!["identity: cannot be changed while running"]),
        ("other labels", more("labels: { service_name: x }"), vec!["labels: cannot be changed while running"]),
        (
            "a target elsewhere",
            more(&format!("  - {{ name: more, listen: '127.0.0.1:0', to: '192.0.2.1:80', allow: ['{someone}'] }}")),
            vec!["192.0.2.1:80", "allow_remote_target: true"],
        ),
        (
            "plaintext for others",
            more(&format!("outbound:\n  - {{ name: out, listen: '0.0.0.0:0', to: '{to}', expect: '{someone}' }}")),
            vec!["0.0.0.0:0", "allow_remote_clients: true"],
        ),
    ];
    for (what, config, words) in cases {
        let failed = [("result", "failure")];
        let before = joined.server.metrics().await.sum(RELOADS, &failed);
        joined.server.reload(&config);
        let line = joined.server.logged(&[&["config not reloaded; the old one goes on"], &words[..]].concat()).await;
        assert!(line.contains("\"ERROR\""), "{what}: {line}");
        joined.server.metric_reaches(RELOADS, &failed, before + 1.0).await;
        exchange(&mut live, what.as_bytes()).await.unwrap();
        joined.connected().await;
    }
    assert_eq!(joined.server.metrics().await.sum(RELOADS, &[("result", "success")]), 0.0);
    let listeners = joined.server.state().await["listeners"].as_array().unwrap().len();
    assert_eq!(listeners, 1);
    // What is right again is taken again.
    joined.server.reloaded(&more("drain_timeout: 3s")).await;
    exchange(&mut live, b"the end").await.unwrap();
}

#[tokio::test]
async fn a_change_of_rules_ends_what_it_no_longer_admits() {
    let mut joined = Joined::start("", "").await;
    let mut live = joined.connected().await;
    let deny = "policy: { rules: [{ name: not-any-more, from: ['spiffe://a.example/client'], action: deny }] }\n";
    let denying = format!("{}{deny}", joined.server_config);
    joined.server.reloaded(&denying).await;
    is_cut(&mut live).await;
    let record = joined.server.ended("policy_changed").await;
    assert_eq!(record["peer"], "spiffe://a.example/client");
    assert_eq!(record["rule"], "allow:in", "the rule that had admitted it");
    // Nor does it come in again, though it has a session ticket.
    is_cut(&mut joined.connect().await).await;
    assert_eq!(joined.server.ended("denied").await["rule"], "not-any-more");
    // The client has a say of its own.
    joined.server.reloaded(&joined.server_config).await;
    let mut live = joined.connected().await;
    let config = std::fs::read_to_string(&joined.client.config).unwrap();
    joined.client.reloaded(&config.replace("spiffe://a.example/server'", "spiffe://a.example/another'")).await;
    is_cut(&mut live).await;
    assert_eq!(joined.client.ended("policy_changed").await["peer"], "spiffe://a.example/server");
}

#[tokio::test]
async fn nobody_slips_through_a_listener_that_goes_or_moves() {
    let mut joined = Joined::start("", "tls: { handshake_timeout: 1m }\n").await;
    let svid = joined.domain.ca.svid("/client");
    let second = |port: u16| {
        let (to, allow) = (joined.workload.address, joined.domain.id("/client"));
        format!(
            "{}  - {{ name: second, listen: '127.0.0.1:{port}', to: '{to}', allow: ['{allow}'] }}\n\
             tls: {{ handshake_timeout: 1m }}\n",
            joined.server_config
        )
    };
    let gone = format!("{}tls: {{ handshake_timeout: 1m }}\n", joined.server_config);
    let ports = [free_port().await, free_port().await];
    for next in [second(ports[1]), gone] {
        joined.server.reloaded(&second(ports[0])).await;
        // Accepted before the reload, its handshake begins after it.
        let early = TcpStream::connect(joined.server.address("second").await).await.unwrap();
        joined.server.metric_reaches("portcullis_connections_open", &[("direction", "inbound")], 1.0).await;
        joined.server.reloaded(&next).await;
        crate::policy::gets_through(early, &joined.domain.ca, &svid).await.unwrap_err();
        assert_eq!(joined.server.ended("drained").await["listener"], "second");
        joined.server.metric_reaches("portcullis_connections_total", &[("cause", "drained")], 1.0).await;
    }
    assert_eq!(*joined.workload.accepted.borrow(), 0);
}

#[tokio::test]
async fn sigterm_drains() {
    let mut joined = Joined::start("", "drain_timeout: 10m\n").await;
    let mut live = joined.connected().await;
    let address = joined.server.address("in").await;
    joined.server.running.signal(Signal::TERM);
    joined.server.logged(&["\"draining\"", "\"open\":1"]).await;
    refuses_connections(address).await;
    assert_eq!(joined.server.get("/readyz").await, (503, "waiting for: drain\n".into()));
    assert_eq!(joined.server.get("/livez").await.0, 200);
    exchange(&mut live, b"there is time").await.unwrap();
    live.shutdown().await.unwrap();
    assert_eq!(rest_of(&mut live).await.unwrap(), b"");
    joined.server.ended("done").await;
    assert_eq!(joined.server.running.wait().await.code(), Some(0));
}

#[tokio::test]
async fn the_drain_has_an_end() {
    let mut joined = Joined::start("", "drain_timeout: 300ms\n").await;
    let mut live = joined.connected().await;
    joined.server.running.signal(Signal::TERM);
    assert_eq!(joined.server.ended("drained").await["peer"], "spiffe://a.example/client");
    is_cut(&mut live).await;
    joined.server.logged(&["the drain time was over", "\"left\":1"]).await;
    assert_eq!(joined.server.running.wait().await.code(), Some(0));
    // The other end knows that it was cut.
    joined.client.ended("truncated").await;
}

#[tokio::test]
async fn a_second_sigterm_ends_it_at_once() {
    let mut joined = Joined::start("", "drain_timeout: 10m\n").await;
    let mut live = joined.connected().await;
    joined.server.running.signal(Signal::TERM);
    joined.server.logged(&["\"draining\""]).await;
    joined.server.running.signal(Signal::INT);
    joined.server.logged(&["told to stop again"]).await;
    assert_eq!(joined.server.running.wait().await.code(), Some(1));
    is_cut(&mut live).await;
}

#[tokio::test]
async fn replaced_files_are_a_rotation_and_nobody_notices() {
    let mut joined = Joined::start("", "").await;
    let mut live = joined.connected().await;
    let serial = |state: &serde_json::Value| state["identity"]["serial"].as_str().unwrap().to_owned();
    let first = serial(&joined.server.state().await);
    let (rotations, success) = ("portcullis_svid_rotations_total", [("result", "success")]);
    let before = joined.server.metrics().await.sum(rotations, &success);
    let own = joined.domain.ca.issue(&Spec::leaf(joined.domain.id("/server")).dns("localhost"));
    joined.domain.files("server", &own);
    until("another SVID", || async { (serial(&joined.server.state().await) != first).then_some(()) }).await;
    joined.server.metric_reaches(rotations, &success, before + 1.0).await;
    exchange(&mut live, b"the old connection").await.unwrap();
    joined.connected().await;

    // A certificate whose key has not come: refused with the reason, and the old one stays.
    let second = serial(&joined.server.state().await);
    let stranger = joined.domain.ca.issue(&Spec::leaf(joined.domain.id("/server")).dns("localhost"));
    let certificate = joined.domain.path().join("server.crt");
    std::fs::write(&certificate, stranger.chain_pem()).unwrap();
    let line = joined.server.logged(&["does not belong to the certificate in"]).await;
    assert!(line.contains("server.key") && line.contains("server.crt"), "{line}");
    let state = joined.server.state().await;
    assert_eq!(serial(&state), second);
    assert!(state["identity"]["why"].as_str().unwrap().contains("does not belong"), "{state}");
    assert_eq!(joined.server.metrics().await.sum("portcullis_identity_source_up", &[]), 0.0);
    exchange(&mut live, b"is untouched").await.unwrap();
    joined.connected().await;
    // The key comes after all.
    std::fs::write(joined.domain.path().join("server.key"), stranger.key_pem()).unwrap();
    joined.server.metric_reaches("portcullis_identity_source_up", &[], 1.0).await;
    assert_ne!(serial(&joined.server.state().await), second);
    exchange(&mut live, b"and goes on").await.unwrap();
}

#[tokio::test]
async fn an_authority_that_leaves_the_bundle_takes_its_connections_along() {
    let (ours, theirs) = (Domain::new("a.example"), Domain::new("b.example"));
    let workload = echo().await;
    let both = |own: &Domain, name: &str, path: &str| {
        let svid = own.ca.issue(&Spec::leaf(own.id(path)));
        let bundles = [("a.example", ours.ca.pem()), ("b.example", theirs.ca.pem())];
        crate::harness::identity_files(own.path(), name, &svid, &bundles)
    };
    let listener =
        inbound_listener("in", workload.address, &ours.id("/client"), "").replace("']", "', 'spiffe://b.example']");
    let mut server = Proxy::start(ours.path(), "server", &(both(&ours, "server", "/server") + &listener)).await;
    server.ready().await;
    let to = server.address("in").await;
    let out = format!(
        "outbound:\n  - {{ name: out, listen: '127.0.0.1:0', to: '{to}', expect: 'spiffe://a.example/server' }}\n"
    );
    let near = Proxy::start(ours.path(), "client", &(both(&ours, "client", "/client") + &out)).await;
    let far = Proxy::start(theirs.path(), "client", &(both(&theirs, "client", "/client") + &out)).await;
    near.ready().await;
    far.ready().await;
    let mut stays = TcpStream::connect(near.address("out").await).await.unwrap();
    let mut goes = TcpStream::connect(far.address("out").await).await.unwrap();
    exchange(&mut stays, b"near").await.unwrap();
    exchange(&mut goes, b"far").await.unwrap();

    std::fs::write(ours.path().join("server.b.example.pem"), TestCa::new("b.example").pem()).unwrap();
    is_cut(&mut goes).await;
    assert_eq!(server.ended("bundle_changed").await["peer"], "spiffe://b.example/client");
    is_cut(&mut TcpStream::connect(far.address("out").await).await.unwrap()).await;
    assert_eq!(server.ended("handshake_failed").await["reason"], "untrusted");
    exchange(&mut stays, b"as ever").await.unwrap();
}

#[tokio::test]
async fn a_revoked_peer_is_cut_off() {
    let domain = Domain::new("a.example");
    let workload = echo().await;
    let list = domain.path().join("revoked.pem");
    std::fs::write(&list, domain.ca.crl_at(&[], 1_700_000_000).1).unwrap();
    let config = format!(
        "{}  crls: ['{}']\n{}",
        domain.identity("/server"),
        list.display(),
        inbound_listener("in", workload.address, "spiffe://a.example", "")
    );
    let mut server = Proxy::start(domain.path(), "server", &config).await;
    server.ready().await;
    let good = Joined::client_of(&domain, &server, "/good").await;
    let bad = domain.ca.svid("/bad");
    let identity = crate::harness::identity_files(domain.path(), "bad", &bad, &[("a.example", domain.ca.pem())]);
    let to = server.address("in").await;
    let out = format!(
        "outbound:\n  - {{ name: out, listen: '127.0.0.1:0', to: '{to}', expect: 'spiffe://a.example/server' }}\n"
    );
    let revoked = Proxy::start(domain.path(), "bad", &(identity + &out)).await;
    revoked.ready().await;
    let mut stays = TcpStream::connect(good.address("out").await).await.unwrap();
    let mut goes = TcpStream::connect(revoked.address("out").await).await.unwrap();
    exchange(&mut stays, b"good").await.unwrap();
    exchange(&mut goes, b"bad").await.unwrap();

    std::fs::write(&list, domain.ca.crl_at(&[&bad], 1_700_000_100).1).unwrap();
    is_cut(&mut goes).await;
    assert_eq!(server.ended("revoked").await["peer"], "spiffe://a.example/bad");
    is_cut(&mut TcpStream::connect(revoked.address("out").await).await.unwrap()).await;
    assert_eq!(server.ended("handshake_failed").await["reason"], "revoked");
    exchange(&mut stays, b"as ever").await.unwrap();
}

#[tokio::test]
async fn the_cap_on_connections_holds_and_gives_way_again() {
    let mut joined = Joined::start("", "connections: { max: 2 }\n").await;
    let mut live = [joined.connected().await, joined.connected().await];
    is_cut(&mut joined.connect().await).await;
    assert_eq!(joined.server.ended("limit").await["detail"], "connections.max is reached");
    assert_eq!(*joined.workload.accepted.borrow(), 2);
    for stream in &mut live {
        exchange(stream, b"undisturbed").await.unwrap();
    }
    let [first, _second] = live;
    drop(first);
    serves_again(joined.client.address("out").await).await;
}

#[tokio::test]
async fn a_peer_has_a_cap_of_its_own() {
    let domain = Domain::new("a.example");
    let workload = echo().await;
    let listener = inbound_listener("in", workload.address, "spiffe://a.example", ", connections: { max_per_peer: 1 }");
    let mut server = Proxy::start(domain.path(), "server", &(domain.identity("/server") + &listener)).await;
    server.ready().await;
    let one = Joined::client_of(&domain, &server, "/one").await;
    let two = Joined::client_of(&domain, &server, "/two").await;
    let mut of_one = TcpStream::connect(one.address("out").await).await.unwrap();
    exchange(&mut of_one, b"one").await.unwrap();
    is_cut(&mut TcpStream::connect(one.address("out").await).await.unwrap()).await;
    let record = server.ended("limit").await;
    assert_eq!(record["detail"], "connections.max_per_peer is reached");
    assert_eq!(*workload.accepted.borrow(), 1);
    let mut of_two = TcpStream::connect(two.address("out").await).await.unwrap();
    exchange(&mut of_two, b"two").await.unwrap();
    // Its place is free again once it has ended.
    drop(of_one);
    serves_again(one.address("out").await).await;
}

#[tokio::test]
async fn idle_and_old_connections_end() {
    for (limit, cause) in [("idle_timeout: 200ms", "idle_timeout"), ("max_age: 400ms", "max_age")] {
        let mut joined = Joined::start(&format!(", connections: {{ {limit} }}"), "").await;
        // The handshake counts towards the age, so on a slow machine there may be no time left for an exchange.
        let mut live = joined.connect().await;
        let record = joined.server.ended(cause).await;
        assert_eq!(record["peer"], "spiffe://a.example/client");
        is_cut(&mut live).await;
        joined.client.ended("truncated").await;
    }
}

#[tokio::test]
async fn a_half_closed_connection_does_not_wait_for_ever() {
    let workload = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let domain = Domain::new("a.example");
    let listener = inbound_listener(
        "in",
        workload.local_addr().unwrap(),
        &domain.id("/client"),
        ", connections: { half_closed_timeout: 200ms }",
    );
    let mut server = Proxy::start(domain.path(), "server", &(domain.identity("/server") + &listener)).await;
    server.ready().await;
    let client = Joined::client_of(&domain, &server, "/client").await;
    let mut stream = TcpStream::connect(client.address("out").await).await.unwrap();
    stream.write_all(b"all I have").await.unwrap();
    stream.shutdown().await.unwrap();
    // The workload reads the end and says nothing at all.
    let (mut behind, _) = soon("the workload's connection", workload.accept()).await.unwrap();
    let mut got = vec![0; 10];
    soon("the bytes", behind.read_exact(&mut got)).await.unwrap();
    assert_eq!(got, b"all I have");
    let record = server.ended("half_closed_timeout").await;
    assert_eq!((&record["bytes_sent"], &record["bytes_received"]), (&10.into(), &0.into()));
    is_cut(&mut stream).await;
}

/// A PROXY protocol header as a receiver reads it: source, destination, TLVs.
async fn read_header(stream: &mut TcpStream) -> (SocketAddr, SocketAddr, Vec<(u8, Vec<u8>)>) {
    let mut fixed = [0; 16];
    stream.read_exact(&mut fixed).await.unwrap();
    assert_eq!(&fixed[..12], b"\r\n\r\n\0\r\nQUIT\n");
    assert_eq!(fixed[12], 0x21, "version 2, PROXY");
    assert_eq!(fixed[13], 0x11, "TCP over IPv4");
    let mut body = vec![0; usize::from(u16::from_be_bytes([fixed[14], fixed[15]]))];
    stream.read_exact(&mut body).await.unwrap();
    let address = |ip: usize, port: usize| {
        let ip: [u8; 4] = body[ip..ip + 4].try_into().unwrap();
        SocketAddr::from((ip, u16::from_be_bytes([body[port], body[port + 1]])))
    };
    (address(0, 8), address(4, 10), tlvs(&body[12..]))
}

fn tlvs(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let length = usize::from(u16::from_be_bytes([bytes[1], bytes[2]]));
        found.push((bytes[0], bytes[3..3 + length].to_vec()));
        bytes = &bytes[3 + length..];
    }
    found
}

#[tokio::test]
async fn the_workload_is_told_who_connected() {
    let workload = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let domain = Domain::new("a.example");
    let to = workload.local_addr().unwrap();
    let listener = inbound_listener("in", to, &domain.id("/client"), ", proxy_protocol: v2");
    let mut server = Proxy::start(domain.path(), "server", &(domain.identity("/server") + &listener)).await;
    server.ready().await;
    let client = Joined::client_of(&domain, &server, "/client").await;
    let mut stream = TcpStream::connect(client.address("out").await).await.unwrap();
    stream.write_all(b"payload").await.unwrap();
    let (mut behind, _) = soon("the workload's connection", workload.accept()).await.unwrap();
    let (from, to, found) = soon("the header", read_header(&mut behind)).await;
    let mut payload = [0; 7];
    soon("the bytes", behind.read_exact(&mut payload)).await.unwrap();
    assert_eq!(&payload, b"payload", "they follow the header without a gap");

    assert_eq!(to, server.address("in").await);
    let value = |kind: u8| found.iter().find(|(k, _)| *k == kind).map(|(_, value)| value.clone()).unwrap();
    assert_eq!(value(0xE0), b"spiffe://a.example/client");
    let ssl = value(0x20);
    assert_eq!(ssl[0], 0x07, "TLS, with a client certificate");
    assert_eq!(ssl[1..5], [0; 4], "verified");
    assert_eq!(
        tlvs(&ssl[5..]),
        [(0x21, b"TLSv1.3".to_vec()), (0x23, b"TLS_AES_256_GCM_SHA384".to_vec())],
        "version and cipher"
    );
    drop((stream, behind));
    let record = server.record("the connection's end", |_| true).await;
    assert_eq!(record["client"], from.to_string(), "the header and the access log speak of the same client");
    assert_eq!(record["bytes_sent"], 7, "the header is not counted as the peer's");
}
