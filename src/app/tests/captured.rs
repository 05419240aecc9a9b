//! Captured inbound connections, handed over as the rules would: held without an identity, plaintext, loops.

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
