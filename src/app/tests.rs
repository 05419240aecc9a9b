//! Two proxies in one process, real sockets, real handshakes: what goes through, what does not, and what ends a live
//! connection.

mod captured;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

use super::Proxy;
use crate::clock::SteppedClock;
use crate::config::{Config, parse};
use crate::identity::keeper::{Current, SvidState};
use crate::identity::{Identity, Svid, TrustBundles, TrustDomain};
use crate::policy::Decision;
use crate::proxy::record::{Carries, Cause, ConnectionRecord, Event, Observer, RequestRecord};
use crate::testing::{Issued, Spec, TestCa};
use crate::tls::reason::Reason;
use crate::tls::record::{Direction, HandshakeRecord};

const NOW: u64 = 1_800_000_000;
const A: &str = "spiffe://a.example/client";
const B: &str = "spiffe://a.example/server";

/// Keeps every record of a proxy.
struct Seen {
    closed: mpsc::UnboundedSender<ConnectionRecord>,
    handshakes: Mutex<Vec<HandshakeRecord>>,
    decisions: Mutex<Vec<(Direction, Decision)>>,
}

impl Observer for Seen {
    fn handshake(&self, record: &HandshakeRecord) {
        self.handshakes.lock().unwrap().push(record.clone());
    }
    fn decision(&self, direction: Direction, decision: &Decision) {
        self.decisions.lock().unwrap().push((direction, decision.clone()));
    }
    fn opened(&self, _: Direction, _: Carries) {}
    fn moved(&self, _: Direction, _: Carries, _: u64, _: u64) {}
    fn closed(&self, record: &ConnectionRecord) {
        let _ = self.closed.send(record.clone());
    }
    fn accept_failed(&self, _: &str, _: &'static str) {}
    fn event(&self, _: Direction, _: &Arc<str>, _: Event) {}
    fn request_begun(&self, _: Direction) {}
    fn request(&self, _: &RequestRecord) {}
}

/// One proxy under test with all that drives it.
struct Node {
    proxy: Arc<Proxy>,
    current: watch::Sender<Current>,
    seen: Arc<Seen>,
    closed: tokio::sync::Mutex<mpsc::UnboundedReceiver<ConnectionRecord>>,
}

impl Node {
    fn start(config: &str, identity: Option<Arc<Identity>>, time: &Arc<SteppedClock>) -> Self {
        let (closed, records) = mpsc::unbounded_channel();
        let seen = Arc::new(Seen { closed, handshakes: Mutex::default(), decisions: Mutex::default() });
        let (sender, receiver) = watch::channel(current(identity));
        let proxy = Proxy::start(
            config_of(config),
            receiver,
            Arc::clone(&seen) as _,
            time.clock(),
            tokio::runtime::Handle::current(),
            &mut crate::proxy::inherited::Inherited::none(),
        )
        .unwrap();
        tokio::spawn(Arc::clone(&proxy).follow());
        Self { proxy, current: sender, seen, closed: records.into() }
    }

    fn address(&self, name: &str) -> SocketAddr {
        let listeners = self.proxy.listeners();
        listeners.iter().find(|listener| listener.name == name).unwrap().address.parse().unwrap()
    }

    async fn ended(&self) -> ConnectionRecord {
        let mut closed = self.closed.lock().await;
        tokio::time::timeout(Duration::from_secs(10), closed.recv()).await.expect("a record in time").unwrap()
    }

    fn become_identity(&self, identity: Option<Arc<Identity>>) {
        self.current.send_replace(current(identity));
    }
}

fn current(identity: Option<Arc<Identity>>) -> Current {
    let state = if identity.is_some() { SvidState::Fresh } else { SvidState::Absent };
    Current { identity, state, ..Current::default() }
}

fn config_of(text: &str) -> Config {
    parse(&format!("identity: unix:///run/x.sock\n{text}"), "test").unwrap().config
}

fn identity(own: &Issued, authorities: &[&TestCa], generation: u64) -> Arc<Identity> {
    let mut bundles = TrustBundles::empty();
    let ders = authorities.iter().map(|ca| ca.root()).collect();
    bundles.set(TrustDomain::parse("a.example").unwrap(), ders).unwrap();
    let svid = Svid::new(own.chain.clone(), own.key(), None).unwrap();
    Arc::new(Identity { svid: Arc::new(svid), bundles: Arc::new(bundles), generation })
}

/// An echo server that answers with what it got and closes when the other side has finished.
async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
    });
    address
}

/// A client's proxy and a server's proxy, joined, in front of an echo server.
struct Pair {
    ca: TestCa,
    time: Arc<SteppedClock>,
    client: Node,
    server: Node,
    client_svid: Issued,
}

impl Pair {
    async fn new(server_extra: &str) -> Self {
        Self::with(server_extra, A).await
    }

    async fn with(server_extra: &str, client_id: &str) -> Self {
        let ca = TestCa::new("a.example");
        let time = SteppedClock::starting_at(NOW);
        let life = |id: &str| Spec::leaf(id).valid(NOW - 10, NOW + 300);
        let (client_svid, server_svid) = (ca.issue(&life(client_id)), ca.issue(&life(B)));
        let config = inbound(echo().await, &format!("[{A}]"), server_extra);
        let server = Node::start(&config, Some(identity(&server_svid, &[&ca], 1)), &time);
        let to = server.address("in");
        let config = format!("outbound:\n  - {{name: out, listen: '127.0.0.1:0', to: '{to}', expect: '{B}'}}\n");
        let client = Node::start(&config, Some(identity(&client_svid, &[&ca], 1)), &time);
        Self { ca, time, client, server, client_svid }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.client.address("out")).await.unwrap()
    }
}

fn inbound(to: SocketAddr, allow: &str, extra: &str) -> String {
    format!("inbound:\n  - {{name: in, listen: '127.0.0.1:0', to: '{to}', allow: {allow}}}\n{extra}")
}

async fn exchange(stream: &mut TcpStream, text: &[u8]) {
    stream.write_all(text).await.unwrap();
    let mut back = vec![0; text.len()];
    tokio::time::timeout(Duration::from_secs(10), stream.read_exact(&mut back))
        .await
        .expect("an echo in time")
        .unwrap();
    assert_eq!(back, text);
}

/// Reads to the end; an error counts as one.
async fn rest(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = stream.read_to_end(&mut bytes);
    tokio::time::timeout(Duration::from_secs(10), read).await.expect("an end in time").map(|_| bytes)
}

#[tokio::test]
async fn bytes_go_through_and_both_ends_leave_a_whole_record() {
    let pair = Pair::new("").await;
    let mut stream = pair.connect().await;
    let large: Vec<u8> = (0..3_000_000u32).map(|n| n as u8).collect();
    let (mut read, mut write) = stream.split();
    let sending = async {
        write.write_all(&large).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut back = Vec::new();
    let (_, got) = tokio::join!(sending, read.read_to_end(&mut back));
    got.unwrap();
    assert!(back == large, "half-close keeps the other direction open until it has finished");
    for (node, peer, local) in [(&pair.client, B, A), (&pair.server, A, B)] {
        let record = node.ended().await;
        assert_eq!(record.cause, Cause::Done, "{record:?}");
        assert_eq!(record.peer.as_ref().map(|id| id.as_str()), Some(peer));
        assert_eq!(record.local.as_ref().map(|id| id.as_str()), Some(local));
        assert_eq!((record.bytes_sent, record.bytes_received), (3_000_000, 3_000_000));
        assert!(record.tls.unwrap().compliant && record.rule.is_some());
    }
    assert!(pair.server.proxy.registry().is_empty());
}

#[tokio::test]
async fn a_stranger_reaches_nothing_and_the_workload_is_not_dialled() {
    let pair = Pair::with("", "spiffe://a.example/stranger").await;
    let mut stream = pair.connect().await;
    let _ = stream.write_all(b"hello").await;
    assert!(rest(&mut stream).await.map_or(true, |bytes| bytes.is_empty()));
    let record = pair.server.ended().await;
    assert_eq!((record.cause, record.handshake_failure), (Cause::Denied, Some(Reason::Denied)));
    assert_eq!(record.upstream, None, "nothing was dialled");
    let decisions = pair.server.seen.decisions.lock().unwrap();
    assert_eq!(decisions.len(), 1);
    assert_eq!(&*decisions[0].1.rule, "default");
}

#[tokio::test]
async fn without_an_identity_nothing_is_served_and_with_one_it_is() {
    let pair = Pair::new("").await;
    pair.client.become_identity(None);
    pair.client.proxy.registry();
    let mut stream = pair.connect().await;
    // The change is published by a task: until then a connection may still be served.
    while pair.client.proxy.listeners().iter().any(|listener| listener.serving) {
        tokio::task::yield_now().await;
    }
    drop(stream);
    let _ = pair.client.ended().await;
    stream = pair.connect().await;
    assert!(rest(&mut stream).await.map_or(true, |bytes| bytes.is_empty()));
    assert_eq!(pair.client.ended().await.handshake_failure, Some(Reason::NoIdentity));
    pair.client.become_identity(Some(identity(&pair.client_svid, &[&pair.ca], 2)));
    while !pair.client.proxy.listeners().iter().all(|listener| listener.serving) {
        tokio::task::yield_now().await;
    }
    exchange(&mut pair.connect().await, b"back again").await;
}

#[tokio::test]
async fn a_live_connection_ends_when_the_policy_no_longer_admits_it() {
    let pair = Pair::new("").await;
    let mut stream = pair.connect().await;
    exchange(&mut stream, b"before").await;
    let mut config = pair.server.proxy.config();
    config.inbound[0].allow = vec![crate::policy::pattern::IdPattern::parse("spiffe://a.example/other").unwrap()];
    pair.server.proxy.apply(config).unwrap();
    assert_eq!(pair.server.ended().await.cause, Cause::PolicyChanged);
    assert!(rest(&mut stream).await.is_err(), "a cut is a reset, never an orderly end");
    assert_eq!(pair.client.ended().await.cause, Cause::Truncated);
}

#[tokio::test]
async fn a_live_connection_ends_when_the_bundle_no_longer_verifies_it_and_outlives_a_mere_rotation() {
    let pair = Pair::new("").await;
    let mut stream = pair.connect().await;
    exchange(&mut stream, b"before").await;
    let renewed = pair.ca.issue(&Spec::leaf(B).valid(NOW - 10, NOW + 600));
    pair.server.become_identity(Some(identity(&renewed, &[&pair.ca], 2)));
    let other = TestCa::new("a.example");
    pair.server.become_identity(Some(identity(&renewed, &[&pair.ca, &other], 3)));
    exchange(&mut stream, b"rotated, and a second authority").await;
    exchange(&mut pair.connect().await, b"a new one too").await;
    pair.server.become_identity(Some(identity(&renewed, &[&other], 4)));
    let record = pair.server.ended().await;
    // The second connection was closed by its own client.
    let record =
        if record.cause == Cause::Done || record.cause == Cause::Reset { pair.server.ended().await } else { record };
    assert_eq!(record.cause, Cause::BundleChanged, "{record:?}");
    assert!(rest(&mut stream).await.is_err());
}

#[tokio::test]
async fn a_live_connection_ends_when_our_own_identity_is_gone() {
    let pair = Pair::new("").await;
    let mut stream = pair.connect().await;
    exchange(&mut stream, b"before").await;
    pair.server.become_identity(None);
    assert_eq!(pair.server.ended().await.cause, Cause::OwnExpired);
}

#[tokio::test]
async fn a_live_connection_ends_when_the_peers_svid_expires_unless_it_may_be_kept() {
    for (extra, ends) in [("", true), ("connections: {on_peer_expiry: keep}\n", false)] {
        let pair = Pair::new(extra).await;
        let mut stream = pair.connect().await;
        exchange(&mut stream, b"before").await;
        pair.time.jump(400);
        // Our own SVID is renewed; with it everything live is judged again, by today's clock.
        let renewed = pair.ca.issue(&Spec::leaf(B).valid(NOW, NOW + 1000));
        pair.server.become_identity(Some(identity(&renewed, &[&pair.ca], 2)));
        if ends {
            assert_eq!(pair.server.ended().await.cause, Cause::PeerExpired);
        } else {
            // The client's proxy has its own opinion of the server's SVID: it did not hear of anything.
            exchange(&mut stream, b"kept").await;
            let other = TestCa::new("a.example");
            pair.server.become_identity(Some(identity(&renewed, &[&other], 3)));
            assert_eq!(pair.server.ended().await.cause, Cause::BundleChanged, "kept, but not beyond its bundle");
        }
    }
}

#[tokio::test]
async fn the_timer_ends_a_connection_at_the_end_of_the_peers_svid() {
    let pair = Pair::new("").await;
    let short = pair.ca.issue(&Spec::leaf(A).valid(NOW - 10, NOW + 1));
    pair.client.become_identity(Some(identity(&short, &[&pair.ca], 2)));
    while pair.client.proxy.current().identity.unwrap().generation != 2 {
        tokio::task::yield_now().await;
    }
    tokio::task::yield_now().await;
    let mut stream = pair.connect().await;
    exchange(&mut stream, b"before").await;
    let record = pair.server.ended().await;
    assert_eq!(record.cause, Cause::PeerExpired, "{record:?}");
}

#[tokio::test]
async fn a_reload_keeps_unchanged_listeners_and_their_connections() {
    let pair = Pair::new("").await;
    let mut stream = pair.connect().await;
    exchange(&mut stream, b"before").await;
    let mut config = pair.server.proxy.config();
    let before = pair.server.address("in");
    let mut second = config.inbound[0].clone();
    second.name = "second".into();
    config.inbound.push(second);
    config.policy.mode = crate::config::schema::PolicyMode::Audit;
    pair.server.proxy.apply(config.clone()).unwrap();
    assert_eq!(pair.server.address("in"), before);
    exchange(&mut stream, b"after").await;
    exchange(&mut pair.connect().await, b"new").await;
    // A config that cannot be had changes nothing.
    let mut bad = config.clone();
    bad.inbound[0].listen = "203.0.113.1:1".parse().ok();
    bad.inbound.pop();
    assert!(pair.server.proxy.apply(bad).unwrap_err().to_string().contains("203.0.113.1:1"));
    assert_eq!(pair.server.proxy.config(), config);
    exchange(&mut stream, b"still").await;
    // A listener that is gone takes its connections along.
    let mut gone = config;
    gone.inbound.remove(0);
    pair.server.proxy.apply(gone).unwrap();
    assert!(rest(&mut stream).await.is_err());
}

#[tokio::test]
async fn draining_lets_connections_finish_and_ends_the_rest() {
    let pair = Pair::new("").await;
    let mut quick = pair.connect().await;
    exchange(&mut quick, b"quick").await;
    let mut slow = pair.connect().await;
    exchange(&mut slow, b"slow").await;
    let server = Arc::clone(&pair.server.proxy);
    let draining = tokio::spawn(async move { server.drain(Duration::from_millis(400)).await });
    exchange(&mut quick, b"still served").await;
    quick.shutdown().await.unwrap();
    assert!(rest(&mut quick).await.unwrap().is_empty());
    assert_eq!(draining.await.unwrap(), 1, "one was left when the time was over");
    assert!(rest(&mut slow).await.is_err());
    assert!(TcpStream::connect(pair.server.address("in")).await.is_err(), "nothing is accepted any more");
}

#[tokio::test]
async fn caps_on_connections_hold_and_give_way() {
    let pair = Pair::new("connections: {max_per_peer: 1}\n").await;
    let mut first = pair.connect().await;
    exchange(&mut first, b"first").await;
    let mut second = pair.connect().await;
    let _ = second.write_all(b"second").await;
    assert!(rest(&mut second).await.map_or(true, |bytes| bytes.is_empty()));
    assert_eq!(pair.server.ended().await.cause, Cause::Limit);
    drop(first);
    pair.server.ended().await;
    exchange(&mut pair.connect().await, b"third").await;
    pair.server.ended().await;
    // Those of the whole process, changed by a reload.
    let mut config = pair.server.proxy.config();
    config.connections.max = 1;
    pair.server.proxy.apply(config).unwrap();
    let mut one = pair.connect().await;
    exchange(&mut one, b"one").await;
    let mut two = pair.connect().await;
    assert!(rest(&mut two).await.map_or(true, |bytes| bytes.is_empty()));
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_a_half_closed_one_sooner() {
    let pair = Pair::new("connections: {idle_timeout: 1s, half_closed_timeout: 200ms}\n").await;
    let mut stream = pair.connect().await;
    exchange(&mut stream, b"before").await;
    assert_eq!(pair.server.ended().await.cause, Cause::Idle);
    // A workload that never finishes its side.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut config = pair.server.proxy.config();
    config.inbound[0].to = Some(listener.local_addr().unwrap().to_string());
    pair.server.proxy.apply(config).unwrap();
    let mut stream = pair.connect().await;
    let (workload, _) = listener.accept().await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(pair.server.ended().await.cause, Cause::HalfClosed);
    drop(workload);
}

#[tokio::test]
async fn the_workload_is_told_who_calls_if_it_asks() {
    let pair = Pair::new("").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut config = pair.server.proxy.config();
    config.inbound[0].to = Some(listener.local_addr().unwrap().to_string());
    config.inbound[0].proxy_protocol = crate::config::schema::ProxyProtocol::V2;
    pair.server.proxy.apply(config).unwrap();
    let mut stream = pair.connect().await;
    stream.write_all(b"payload").await.unwrap();
    stream.shutdown().await.unwrap();
    let (mut workload, _) = listener.accept().await.unwrap();
    let bytes = rest(&mut workload).await.unwrap();
    assert!(bytes.starts_with(b"\r\n\r\n\0\r\nQUIT\n") && bytes.ends_with(b"payload"));
    assert!(bytes.windows(A.len()).any(|window| window == A.as_bytes()));
}

#[tokio::test]
async fn an_upstreams_next_address_is_tried_when_one_is_dead() {
    let pair = Pair::new("").await;
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut config = pair.client.proxy.config();
    config.outbound[0].to =
        crate::config::schema::OneOrMany::Many(vec![dead.to_string(), pair.server.address("in").to_string()]);
    pair.client.proxy.apply(config).unwrap();
    exchange(&mut pair.connect().await, b"found").await;
}
