//! Captured connections, handed over as the rules would: held without an identity, plaintext, loops, and what becomes of them
//! when another listener takes them.

use super::*;
use crate::config::schema::{CapturedPorts, Plaintext, PolicyMode};
use crate::proxy::ledger::{Port, Safe};
use crate::proxy::listener::Accepted;

/// A server's proxy that captures, and what hands connections over to it.
struct Captured {
    ca: TestCa,
    time: Arc<SteppedClock>,
    server: Node,
    svid: Issued,
    /// Whoever connects here was captured on its way to the workload.
    front: SocketAddr,
    workload: SocketAddr,
}

impl Captured {
    /// `listener` and `rest` are parts of the config; the workload is an echo server unless another is given.
    async fn start(listener: &str, rest: &str, identity_at_once: bool, workload: Option<SocketAddr>) -> Self {
        let ca = TestCa::new("a.example");
        let time = SteppedClock::starting_at(NOW);
        let svid = ca.issue(&Spec::leaf(B).valid(NOW - 10, NOW + 300));
        let own = identity(&svid, &[&ca], 1);
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let intercept = if rest.contains("intercept:") { "" } else { "intercept: { inbound: { port: PORT } }\n" };
        let config = format!(
            "inbound:\n  - {{ name: in, capture: any, allow: ['{A}']{listener} }}\n{}",
            format!("{rest}{intercept}").replace("PORT", &port.to_string())
        );
        let server = Node::start(&config, identity_at_once.then_some(own), &time);
        let workload = match workload {
            Some(workload) => workload,
            None => echo().await,
        };
        let front = capture(&server, Some(workload)).await;
        Self { ca, time, server, svid, front, workload }
    }

    async fn plain(&self) -> TcpStream {
        TcpStream::connect(self.front).await.unwrap()
    }

    /// The sidecar of a mesh peer.
    fn peer(&self) -> Node {
        let svid = self.ca.issue(&Spec::leaf(A).valid(NOW - 10, NOW + 300));
        let to = self.front;
        let config = format!("outbound:\n  - {{name: out, listen: '127.0.0.1:0', to: '{to}', expect: '{B}'}}\n");
        Node::start(&config, Some(identity(&svid, &[&self.ca], 1)), &self.time)
    }

    fn port(&self) -> Port {
        let ports = self.server.proxy.plaintext();
        ports.into_iter().find(|port| port.port == Some(self.workload.port())).expect("a page for the port")
    }

    /// Waits until so many connections are open.
    async fn open(&self, count: usize) {
        while self.server.proxy.registry().len() != count {
            tokio::task::yield_now().await;
        }
    }
}

/// Hands over what connects, as captured on its way to `to`, or to the very socket it came to.
async fn capture(node: &Node, to: Option<SocketAddr>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let front = listener.local_addr().unwrap();
    let capture = node.proxy.house().captures.inbound().unwrap();
    let (shared, to) = (Arc::clone(&node.proxy.shared), to.unwrap_or(front));
    tokio::spawn(async move {
        while let Ok((stream, from)) = listener.accept().await {
            let accepted = Accepted::on_its_way(stream, from, to, &shared);
            let (capture, shared) = (Arc::clone(&capture), Arc::clone(&shared));
            tokio::spawn(async move { capture.take(accepted, to, shared).await });
        }
    });
    front
}

/// The same for what was captured on its way from the workload.
async fn capture_outbound(node: &Node, to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let front = listener.local_addr().unwrap();
    let capture = node.proxy.house().captures.outbound().unwrap();
    let shared = Arc::clone(&node.proxy.shared);
    tokio::spawn(async move {
        while let Ok((stream, from)) = listener.accept().await {
            let accepted = Accepted::on_its_way(stream, from, to, &shared);
            tokio::spawn(Arc::clone(&capture).take(accepted, to, Arc::clone(&shared)));
        }
    });
    front
}

/// A client's proxy that captures.
struct Outgoing {
    ca: TestCa,
    time: Arc<SteppedClock>,
    client: Node,
    rest: String,
}

impl Outgoing {
    /// `listeners` are those of the config, `unmatched` is part of `intercept.outbound`.
    async fn start(listeners: &str, unmatched: &str) -> Self {
        let (ca, time) = (TestCa::new("a.example"), SteppedClock::starting_at(NOW));
        let svid = ca.issue(&Spec::leaf(A).valid(NOW - 10, NOW + 300));
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let rest = format!("intercept: {{ outbound: {{ port: {port}, {unmatched} }} }}\n");
        let client = Node::start(&config(listeners, &rest), Some(identity(&svid, &[&ca], 1)), &time);
        Self { ca, time, client, rest }
    }

    /// The listeners from now on.
    fn declare(&self, listeners: &str) {
        self.client.proxy.apply(config_of(&config(listeners, &self.rest))).unwrap();
    }

    /// A mesh peer in front of an echo server.
    async fn peer(&self) -> (Node, SocketAddr) {
        let svid = self.ca.issue(&Spec::leaf(B).valid(NOW - 10, NOW + 300));
        let to = echo().await;
        let config = format!("inbound:\n  - {{name: in, listen: '127.0.0.1:0', to: '{to}', allow: ['{A}']}}\n");
        let node = Node::start(&config, Some(identity(&svid, &[&self.ca], 1)), &self.time);
        let address = node.address("in");
        (node, address)
    }
}

fn config(listeners: &str, rest: &str) -> String {
    let elsewhere = "  - {name: elsewhere, capture: {ports: [1]}, passthrough: any}";
    format!("outbound:\n{listeners}{elsewhere}\n{rest}")
}

#[tokio::test]
async fn a_captured_connection_waits_for_the_first_identity_and_is_served_then() {
    let captured = Captured::start("", "", false, None).await;
    let peer = captured.peer();
    let mut stream = TcpStream::connect(peer.address("out")).await.unwrap();
    stream.write_all(b"early").await.unwrap();
    captured.open(1).await;
    captured.server.become_identity(Some(identity(&captured.svid, &[&captured.ca], 1)));
    let mut back = [0; 5];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"early");
    drop(stream);
    let record = captured.server.ended().await;
    assert_eq!(record.peer.as_ref().map(|id| id.as_str()), Some(A));
    assert_eq!(record.upstream, Some(captured.workload.to_string()));
}

#[tokio::test]
async fn who_has_waited_for_long_enough_is_refused_and_so_is_plaintext() {
    let rest = "intercept: { inbound: { port: PORT }, hold: 10ms }\n";
    let captured = Captured::start(", plaintext: allow", rest, false, None).await;
    let mut stream = captured.plain().await;
    // The cut may come before the bytes.
    let cut = stream.write_all(b"hello").await.is_err();
    assert!(cut || rest_is_cut(&mut stream).await);
    let record = captured.server.ended().await;
    assert_eq!((record.handshake_failure, record.upstream), (Some(Reason::NoIdentity), None));
}

async fn rest_is_cut(stream: &mut TcpStream) -> bool {
    rest(stream).await.is_err()
}

#[tokio::test]
async fn plaintext_is_refused_unless_it_is_let_in_and_counted_either_way() {
    let captured = Captured::start("", "", true, None).await;
    let mut stream = captured.plain().await;
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let _ = rest(&mut stream).await;
    let record = captured.server.ended().await;
    assert_eq!((record.handshake_failure, record.upstream), (Some(Reason::NotTls), None));
    let port = captured.port();
    assert_eq!((port.connections.refused, port.connections.let_through, port.plaintext), (1, 0, Plaintext::Refuse));
    assert_eq!((port.callers.len(), port.safe_to_go_strict), (1, Safe::Yes));
}

#[tokio::test]
async fn plaintext_that_is_let_in_reaches_the_workload_as_it_is_beside_mtls() {
    for (word, mode) in [("audit", PolicyMode::Audit), ("allow", PolicyMode::Enforce)] {
        let listener = format!(", plaintext: {word}, protocol: detect");
        let captured = Captured::start(&listener, "", true, None).await;
        let mut stream = captured.plain().await;
        exchange(&mut stream, b"NOT / any HTTP at all\r\n\r\n").await;
        stream.shutdown().await.unwrap();
        assert!(rest(&mut stream).await.unwrap().is_empty(), "an orderly end");
        let record = captured.server.ended().await;
        assert_eq!((record.cause, record.peer, record.tls), (Cause::Done, None, None));
        assert_eq!(record.rule, Some(("plaintext:in".into(), mode)));
        assert_eq!((record.bytes_sent, record.bytes_received), (25, 25));
        let port = captured.port();
        assert_eq!((port.connections.let_through, port.safe_to_go_strict), (1, Safe::No), "{}", port.answer);
        let peer = captured.peer();
        let mut stream = TcpStream::connect(peer.address("out")).await.unwrap();
        exchange(&mut stream, b"opaque\0").await;
        drop(stream);
        let record = captured.server.ended().await;
        assert_eq!(record.peer.as_ref().map(|id| id.as_str()), Some(A), "{record:?}");
        assert_eq!(captured.port().connections.let_through, 1);
    }
}

#[tokio::test]
async fn silence_is_plaintext_only_where_the_server_is_known_to_speak_first() {
    for (detect, passes) in [
        ("detect: { timeout: 30ms }\n", false),
        ("detect: { timeout: 30ms, on_timeout: opaque }\n", true),
        ("detect: { timeout: 30ms, opaque_ports: [WORKLOAD] }\n", true),
    ] {
        let greeting = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let workload = greeting.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = greeting.accept().await {
                let _ = stream.write_all(b"220 ready\r\n").await;
            }
        });
        let detect = detect.replace("WORKLOAD", &workload.port().to_string());
        let captured = Captured::start(", plaintext: audit", &detect, true, Some(workload)).await;
        let mut stream = captured.plain().await;
        let got = rest(&mut stream).await;
        if passes {
            assert_eq!(got.unwrap(), b"220 ready\r\n", "{detect}");
        } else {
            assert!(got.is_err(), "a cut is a reset");
            assert_eq!(captured.server.ended().await.cause, Cause::Protocol);
            assert!(captured.server.proxy.plaintext().is_empty(), "silence is not plaintext");
        }
    }
}

#[tokio::test]
async fn live_plaintext_ends_on_both_sides_when_it_is_no_longer_let_in() {
    for (change, cause) in [(true, Cause::PolicyChanged), (false, Cause::Drained)] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let captured = Captured::start(", plaintext: audit", "", true, Some(listener.local_addr().unwrap())).await;
        let mut stream = captured.plain().await;
        stream.write_all(b"x").await.unwrap();
        let (mut workload, _) = listener.accept().await.unwrap();
        assert_eq!(workload.read_u8().await.unwrap(), b'x');
        let mut config = captured.server.proxy.config();
        config.inbound[0].plaintext = Plaintext::Allow;
        captured.server.proxy.apply(config.clone()).unwrap();
        workload.write_all(b"y").await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'y', "still let in");
        if change {
            config.inbound[0].plaintext = Plaintext::Refuse;
        } else {
            config.inbound[0].name = "other".into();
            config.inbound[0].capture = Some(CapturedPorts::Ports(vec![1]));
        }
        captured.server.proxy.apply(config).unwrap();
        assert_eq!(captured.server.ended().await.cause, cause);
        assert!(rest_is_cut(&mut stream).await && rest_is_cut(&mut workload).await);
    }
}

#[tokio::test]
async fn live_plaintext_ends_with_our_own_identity() {
    let captured = Captured::start(", plaintext: allow", "", true, None).await;
    let mut stream = captured.plain().await;
    exchange(&mut stream, b"before").await;
    captured.server.become_identity(None);
    assert_eq!(captured.server.ended().await.cause, Cause::OwnExpired);
    assert!(rest_is_cut(&mut stream).await);
}

#[tokio::test]
async fn a_reset_of_one_side_of_plaintext_is_one_of_the_other() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let captured = Captured::start(", plaintext: allow", "", true, Some(listener.local_addr().unwrap())).await;
    for client_resets in [true, false] {
        let mut client = captured.plain().await;
        client.write_all(b"x").await.unwrap();
        let (mut workload, _) = listener.accept().await.unwrap();
        assert_eq!(workload.read_u8().await.unwrap(), b'x');
        let (cut, mut other) = if client_resets { (client, workload) } else { (workload, client) };
        socket2::SockRef::from(&cut).set_linger(Some(Duration::ZERO)).unwrap();
        drop(cut);
        assert!(rest_is_cut(&mut other).await);
        assert_eq!(captured.server.ended().await.cause, Cause::Reset);
    }
}

#[tokio::test]
async fn a_connection_of_our_own_that_comes_back_is_refused_and_not_dialled_again() {
    let captured = Captured::start(", plaintext: allow", "", true, None).await;
    let front = capture(&captured.server, None).await;
    let mut stream = TcpStream::connect(front).await.unwrap();
    stream.write_all(b"round and round").await.unwrap();
    assert!(rest_is_cut(&mut stream).await);
    let causes = [captured.server.ended().await.cause, captured.server.ended().await.cause];
    assert_eq!(causes, [Cause::Loop, Cause::Reset], "one came back, and with it the one that was dialled for ended");
    captured.open(0).await;
}

#[tokio::test]
async fn a_port_that_another_listener_takes_ends_what_is_open_to_it_and_no_more() {
    let captured = Captured::start(", plaintext: allow, protocol: detect", "", true, None).await;
    let peer = captured.peer();
    let mut plain = captured.plain().await;
    exchange(&mut plain, b"no TLS\n").await;
    let mut mesh = TcpStream::connect(peer.address("out")).await.unwrap();
    exchange(&mut mesh, b"opaque\0").await;
    let other = echo().await;
    let mut stays = TcpStream::connect(capture(&captured.server, Some(other)).await).await.unwrap();
    exchange(&mut stays, b"no TLS\n").await;
    let mut config = captured.server.proxy.config();
    let mut strict = config.inbound[0].clone();
    strict.name = "strict".into();
    strict.plaintext = Plaintext::Refuse;
    strict.capture = Some(CapturedPorts::Ports(vec![captured.workload.port()]));
    config.inbound.push(strict);
    captured.server.proxy.apply(config).unwrap();
    for _ in 0..2 {
        let record = captured.server.ended().await;
        assert_eq!((record.cause, &*record.listener), (Cause::PolicyChanged, "in"));
    }
    assert!(rest_is_cut(&mut plain).await && rest_is_cut(&mut mesh).await);
    exchange(&mut stays, b"still").await;
    captured.open(1).await;
}

#[tokio::test]
async fn who_waits_for_an_identity_waits_no_longer_once_another_listener_takes_its_port() {
    let captured = Captured::start("", "", false, None).await;
    let mut stream = captured.plain().await;
    captured.open(1).await;
    let mut config = captured.server.proxy.config();
    let mut other = config.inbound[0].clone();
    other.name = "other".into();
    other.capture = Some(CapturedPorts::Ports(vec![captured.workload.port()]));
    config.inbound.push(other);
    captured.server.proxy.apply(config).unwrap();
    assert_eq!(captured.server.ended().await.cause, Cause::PolicyChanged);
    assert!(rest(&mut stream).await.is_ok_and(|rest| rest.is_empty()) || rest_is_cut(&mut stream).await);
}

#[tokio::test]
async fn plaintext_that_passes_ends_when_a_listener_before_its_own_takes_it() {
    let to = echo().await;
    let passes = "  - {name: ext, capture: {addresses: [127.0.0.0/8]}, passthrough: any}\n";
    let outgoing = Outgoing::start(passes, "unmatched: refuse").await;
    let mut stream = TcpStream::connect(capture_outbound(&outgoing.client, to).await).await.unwrap();
    exchange(&mut stream, b"no TLS").await;
    let elsewhere =
        "  - {name: ledger, capture: {addresses: [127.0.0.1], ports: [9]}, expect: 'spiffe://a.example/x'}\n";
    outgoing.declare(&format!("{elsewhere}{passes}"));
    exchange(&mut stream, b"still").await;
    outgoing.declare(&format!("{}{passes}", elsewhere.replace(", ports: [9]", "")));
    let record = outgoing.client.ended().await;
    assert_eq!((record.cause, &*record.listener), (Cause::PolicyChanged, "ext"));
    assert!(rest_is_cut(&mut stream).await);
}

#[tokio::test]
async fn mtls_ends_when_another_listener_takes_where_it_was_for() {
    for (protocol, said) in [("tcp", &b"bytes"[..]), ("detect", b"opaque\0")] {
        let first = format!(
            "  - {{name: first, capture: {{addresses: [127.0.0.0/8]}}, protocol: {protocol}, expect: '{B}'}}\n"
        );
        let outgoing = Outgoing::start(&first, "unmatched: refuse").await;
        let (_peer, to) = outgoing.peer().await;
        let mut stream = TcpStream::connect(capture_outbound(&outgoing.client, to).await).await.unwrap();
        exchange(&mut stream, said).await;
        outgoing.declare(&first);
        exchange(&mut stream, b"still").await;
        let other = first.replace("first", "other").replace(B, "spiffe://a.example/x");
        outgoing.declare(&format!("{other}{first}"));
        let record = outgoing.client.ended().await;
        assert_eq!((record.cause, &*record.listener), (Cause::PolicyChanged, "first"));
        assert!(rest_is_cut(&mut stream).await);
    }
}

#[tokio::test]
async fn a_workloads_kept_http_connection_ends_when_another_listener_takes_it() {
    let first = format!("  - {{name: first, capture: {{addresses: [127.0.0.0/8]}}, protocol: http, expect: '{B}'}}\n");
    let outgoing = Outgoing::start(&first, "unmatched: refuse").await;
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut stream = TcpStream::connect(capture_outbound(&outgoing.client, closed).await).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut status = [0; 12];
    stream.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 503");
    outgoing.declare(&format!("{}{first}", first.replace("first", "other")));
    loop {
        let record = outgoing.client.ended().await;
        if record.client != "pool" {
            assert_eq!((record.cause, &*record.listener), (Cause::PolicyChanged, "first"));
            break;
        }
    }
}

#[tokio::test]
async fn a_listener_that_went_while_the_client_was_heard_takes_nothing() {
    let first = format!("  - {{name: hosts, capture: {{http_hosts: [a.example]}}, protocol: http, expect: '{B}'}}\n");
    let outgoing = Outgoing::start(&first, "unmatched: refuse").await;
    let mut stream = TcpStream::connect(capture_outbound(&outgoing.client, echo().await).await).await.unwrap();
    while outgoing.client.proxy.registry().is_empty() {
        tokio::task::yield_now().await;
    }
    outgoing.declare("");
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a.example\r\n\r\n").await.unwrap();
    assert!(rest_is_cut(&mut stream).await);
    let record = outgoing.client.ended().await;
    assert_eq!((record.cause, &*record.listener), (Cause::PolicyChanged, "captured"));
}

#[tokio::test]
async fn a_watch_that_is_tightened_during_a_handshake_sees_its_end() {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let outgoing = Outgoing::start("", "unmatched: tls, watch: audit").await;
    let front = capture_outbound(&outgoing.client, server.local_addr().unwrap()).await;
    let mut client = TcpStream::connect(front).await.unwrap();
    client.write_all(&CLIENT_HELLO).await.unwrap();
    let (mut server, _) = server.accept().await.unwrap();
    let mut hello = [0; CLIENT_HELLO.len()];
    server.read_exact(&mut hello).await.unwrap();
    let mut config = outgoing.client.proxy.config();
    config.intercept.as_mut().unwrap().outbound.as_mut().unwrap().watch = PolicyMode::Enforce;
    outgoing.client.proxy.apply(config).unwrap();
    server.write_all(&weak_server_hello()).await.unwrap();
    assert_eq!(outgoing.client.ended().await.cause, Cause::PolicyChanged);
    assert!(rest_is_cut(&mut client).await && rest_is_cut(&mut server).await);
}

/// The first message of TLS 1.2 of a client, RFC 5246, section 7.4.1.2: no session, one cipher, no extension.
const CLIENT_HELLO: [u8; 50] = {
    let mut hello = [7; 50];
    let head = [22, 3, 1, 0, 45, 1, 0, 0, 41, 3, 3];
    let mut at = 0;
    while at < head.len() {
        hello[at] = head[at];
        at += 1;
    }
    let tail = [0, 0, 2, 0, 0x9c, 1, 0];
    let mut at = 0;
    while at < tail.len() {
        hello[43 + at] = tail[at];
        at += 1;
    }
    hello
};

/// The answer of a server that picks TLS 1.2 without a key exchange, and the end of its first flight.
fn weak_server_hello() -> Vec<u8> {
    let mut flight = vec![22, 3, 3, 0, 42, 2, 0, 0, 38, 3, 3];
    flight.extend([7; 32]);
    flight.extend([0, 0, 0x9c, 0]);
    flight.extend([22, 3, 3, 0, 4, 14, 0, 0, 0]);
    flight
}
