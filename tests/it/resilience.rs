//! Upstreams that fail, hang, go away and come back; connections that go stale, age and lose their right to live: what a
//! caller is told of it, and how often the upstream is asked.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use http_body_util::BodyExt;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use crate::client::{presenting, server_name};
use crate::harness::{Domain, Proxy, Running, identity_files, soon, succeeds, tool, until};
use crate::load::{Load, Outgoing, nothing, request};
use crate::pair::{Answer, Extra, Pair, Way, curl, http_origin, requests_seen};
use crate::testing::{Issued, Spec, TestCa};

const RETRIES: &str = "portcullis_http_retries_total";
const EJECTIONS: &str = "portcullis_upstream_ejections_total";

/// What an origin does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Does {
    /// Answers.
    Answers,
    /// Answers, and closes the connection without having said so.
    AnswersAndCloses,
    /// Resets the connection.
    Resets,
}

/// An HTTP/1 origin that misbehaves as it is told: `does` gets a path and how often that was asked for before.
struct Origin {
    address: SocketAddr,
    asked: Arc<Mutex<HashMap<String, usize>>>,
}

impl Origin {
    async fn start(does: impl Fn(&str, usize) -> Does + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, asked) = (listener.local_addr().unwrap(), Arc::<Mutex<HashMap<String, usize>>>::default());
        let (does, count) = (Arc::new(does), Arc::clone(&asked));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(talk(stream, Arc::clone(&does), Arc::clone(&count)));
            }
        });
        Self { address, asked }
    }

    fn asked(&self, path: &str) -> usize {
        self.asked.lock().unwrap().get(path).copied().unwrap_or(0)
    }
}

async fn talk(
    mut stream: TcpStream,
    does: Arc<impl Fn(&str, usize) -> Does>,
    asked: Arc<Mutex<HashMap<String, usize>>>,
) -> Option<()> {
    let mut bytes = Vec::new();
    loop {
        let end = loop {
            if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            if stream.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
        };
        let head = String::from_utf8(bytes.drain(..end).collect()).unwrap().to_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
        let length: usize = length.map_or(0, |length| length.trim().parse().unwrap());
        while bytes.len() < length {
            if stream.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
        }
        bytes.drain(..length);
        let path = head.split(' ').nth(1).unwrap().to_owned();
        let before = {
            let mut asked = asked.lock().unwrap();
            let count = asked.entry(path.clone()).or_default();
            *count += 1;
            *count - 1
        };
        match does(&path, before) {
            Does::Resets => {
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
                return None;
            }
            answers => {
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.ok()?;
                if answers == Does::AnswersAndCloses {
                    return None;
                }
            }
        }
    }
}

async fn get(way: &Way, path: &str) -> Answer {
    way.request(&format!("GET {path} HTTP/1.1\r\nHost: a.example")).await
}

async fn post(way: &Way, path: &str) -> Answer {
    let head = format!("POST {path} HTTP/1.1\r\nHost: a.example\r\nContent-Length: 4\r\nConnection: close\r\n\r\n");
    Answer::parse(&way.send(format!("{head}body").as_bytes()).await)
}

#[tokio::test]
async fn a_connection_that_went_stale_costs_no_request() {
    let origin = Origin::start(|path, before| match path {
        // On a connection that has served, the next request finds out that nobody is there.
        "/reset" if before % 2 == 1 => Does::Resets,
        "/closes" => Does::AnswersAndCloses,
        _ => Does::Answers,
    })
    .await;
    let pair = Pair::plain(origin.address).await;
    let way = Way::Plain(pair.address);
    for _ in 0..100 {
        assert_eq!(get(&way, "/closes").await.status, 200);
    }
    assert!((100..=110).contains(&origin.asked("/closes")), "{}", origin.asked("/closes"));
    for _ in 0..8 {
        assert_eq!(get(&way, "/reset").await.status, 200);
    }
    assert!(pair.server.metrics().await.sum(RETRIES, &[("result", "sent")]) >= 7.0);
}

#[tokio::test]
async fn a_get_is_sent_again_after_a_reset_and_a_post_is_not() {
    let origin = Origin::start(|_, before| if before == 0 { Does::Resets } else { Does::Answers }).await;
    let mut pair = Pair::plain(origin.address).await;
    let way = Way::Plain(pair.address);
    assert_eq!(get(&way, "/get").await.status, 200);
    assert_eq!(origin.asked("/get"), 2);
    assert_eq!(pair.server.metrics().await.sum(RETRIES, &[("result", "sent")]), 1.0);
    let line = pair.server.request("the GET", |line| line["path"] == "/get").await;
    assert_eq!(line["attempts"], 2, "{line}");
    let answer = post(&way, "/post").await;
    assert_eq!(answer.status, 502, "{answer:?}");
    assert_eq!(origin.asked("/post"), 1, "nobody knows what has become of it");
    // Nor does the other sidecar send it again: the answer is an answer.
    assert_eq!(post(&way, "/post").await.status, 200);
    assert_eq!(pair.server.metrics().await.sum(RETRIES, &[("result", "sent")]), 1.0);
}

#[tokio::test]
async fn retries_stay_within_their_share_of_requests() {
    let origin = Origin::start(|_, _| Does::Resets).await;
    let pair = Pair::plain(origin.address).await;
    let way = Way::Plain(pair.address);
    const REQUESTS: usize = 120;
    for _ in 0..REQUESTS {
        assert_eq!(get(&way, "/").await.status, 502);
    }
    let metrics = pair.server.metrics().await;
    let (sent, refused) =
        (metrics.sum(RETRIES, &[("result", "sent")]), metrics.sum(RETRIES, &[("result", "budget_exhausted")]));
    // A fifth, or ten in ten seconds.
    assert!((10.0..=0.2 * REQUESTS as f64).contains(&sent), "{sent} of {REQUESTS} were sent again");
    assert_eq!(sent + refused, REQUESTS as f64);
    assert_eq!(origin.asked("/"), REQUESTS + sent as usize);
}

/// A client's sidecar before two servers' sidecars, each with an origin of its own.
struct Fork {
    domain: Domain,
    origins: [(Running, SocketAddr); 2],
    servers: [Proxy; 2],
    server_configs: [String; 2],
    client: Proxy,
    way: Way,
}

impl Fork {
    async fn start(http: &str) -> Self {
        let domain = Domain::new("a.example");
        let origins = [http_origin().await, http_origin().await];
        let mut server_configs = [String::new(), String::new()];
        let mut servers = Vec::new();
        for (index, (_, origin)) in origins.iter().enumerate() {
            let config = Pair::inbound(&domain, *origin, Extra::default());
            let server = Proxy::start(domain.path(), &format!("server-{index}"), &config).await;
            server.ready().await;
            // It comes back where it was.
            server_configs[index] =
                config.replace("listen: 127.0.0.1:0", &format!("listen: {}", server.address("in").await));
            servers.push(server);
        }
        let servers: [Proxy; 2] = servers.try_into().ok().unwrap();
        let [a, b] = [servers[0].address("in").await, servers[1].address("in").await];
        let extra = Extra { outbound: http, ..Extra::default() };
        let config = Pair::outbound(&domain, a, extra).replace(&format!("to: '{a}'"), &format!("to: ['{a}', '{b}']"));
        let client = Proxy::start(domain.path(), "client", &config).await;
        client.ready().await;
        let way = Way::Plain(client.address("out").await);
        Self { domain, origins, servers, server_configs, client, way }
    }

    async fn seen(&self) -> [u64; 2] {
        [requests_seen(self.origins[0].1).await, requests_seen(self.origins[1].1).await]
    }
}

#[tokio::test]
async fn requests_are_spread_and_avoid_the_address_that_has_more_under_way() {
    let fork = Fork::start("").await;
    for _ in 0..60 {
        assert_eq!(get(&fork.way, "/echo").await.status, 200);
    }
    let seen = fork.seen().await;
    assert!(seen.iter().all(|seen| *seen >= 10) && seen[0] + seen[1] == 60, "{seen:?}");
    // One that does not end, at one of them: from then on the other has fewer.
    let mut held = fork.way.connect().await;
    held.write_all(b"GET /held/one HTTP/1.1\r\nHost: a.example\r\n\r\n").await.unwrap();
    assert_ne!(soon("the head of a held answer", held.read(&mut [0; 64])).await.unwrap(), 0);
    let before = fork.seen().await;
    let busy = usize::from(before[1] > seen[1]);
    for _ in 0..40 {
        assert_eq!(get(&fork.way, "/echo").await.status, 200);
    }
    let after = fork.seen().await;
    assert_eq!(after[busy], before[busy], "{before:?} {after:?}");
    assert_eq!(after[1 - busy], before[1 - busy] + 40);
}

#[tokio::test]
async fn an_address_that_fails_is_ejected_and_comes_back_when_it_serves() {
    let fork = Fork::start("http: { eject_after: 3, eject_for: 500ms }\nconnect_timeout: 2s").await;
    let Fork { domain, origins, servers: [gone, _stays], server_configs, client, way } = fork;
    assert_eq!(get(&way, "/echo").await.status, 200);
    assert!(gone.stop().await.success());
    let ejected = [("change", "ejected")];
    until("an ejection", async || {
        // Every request is served all the same, by the other.
        assert_eq!(get(&way, "/echo").await.status, 200);
        (client.metrics().await.sum(EJECTIONS, &ejected) >= 1.0).then_some(())
    })
    .await;
    assert_eq!(client.metrics().await.sum(EJECTIONS, &[("change", "restored")]), 0.0);
    let back = Proxy::start(domain.path(), "server-0", &server_configs[0]).await;
    back.ready().await;
    let before = requests_seen(origins[0].1).await;
    until("the address to be restored", async || {
        assert_eq!(get(&way, "/echo").await.status, 200);
        (client.metrics().await.sum(EJECTIONS, &[("change", "restored")]) >= 1.0).then_some(())
    })
    .await;
    assert!(requests_seen(origins[0].1).await > before);
}

#[tokio::test]
async fn an_upstream_that_does_not_accept_is_a_timeout() {
    // A queue that is full: the kernel answers no further SYN.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(0).unwrap();
    let full = socket.local_addr().unwrap().as_socket().unwrap();
    let mut waiting = Vec::new();
    while let Ok(Ok(stream)) = tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(full)).await {
        waiting.push(stream);
    }
    let domain = Domain::new("a.example");
    let extra = Extra { outbound: "connect_timeout: 300ms\nhttp: { retries: { attempts: 0 } }", ..Extra::default() };
    let mut client = Proxy::start(domain.path(), "client", &Pair::outbound(&domain, full, extra)).await;
    client.ready().await;
    let answer = get(&Way::Plain(client.address("out").await), "/").await;
    assert_eq!((answer.status, answer.header("portcullis-reason")), (504, Some("timeout")), "{answer:?}");
    client.request("the request", |line| line["cause"] == "timeout").await;
}

#[tokio::test]
async fn sixty_four_connections_share_a_handshake() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    let mut load = tokio::process::Command::new(tool("PORTCULLIS_TEST_H2LOAD", "h2load"));
    load.args(["--h1", "-n", "200", "-c", "64", "-t", "1"]).arg(format!("http://{}/delay/20", pair.address));
    let said = succeeds(&mut load, "").await;
    assert!(said.contains("200 succeeded, 0 failed, 0 errored, 0 timeout"), "{said}");
    let labels = [("direction", "inbound"), ("result", "success")];
    assert_eq!(pair.server.metrics().await.sum("portcullis_tls_handshakes_total", &labels), 1.0);
}

async fn rotated(domain: &Domain, name: &str, proxy: &Proxy) {
    let success = [("result", "success")];
    let before = proxy.metrics().await.sum("portcullis_svid_rotations_total", &success);
    domain.identity(name);
    proxy.metric_reaches("portcullis_svid_rotations_total", &success, before + 1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_svids_rotate_and_policy_is_reloaded() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    let handshakes = async || {
        let labels = [("direction", "inbound"), ("result", "success")];
        pair.server.metrics().await.sum("portcullis_tls_handshakes_total", &labels)
    };
    let mut load = Load::start(pair.address);
    load.goes_on_for(100).await;
    for round in 1..=2 {
        let before = handshakes().await;
        rotated(&pair.domain, "/client", &pair.client).await;
        load.goes_on_for(100).await;
        assert!(handshakes().await > before, "the old SVID's connections serve no further");
        rotated(&pair.domain, "/server", &pair.server).await;
        load.goes_on_for(100).await;
        let rule = format!(
            "policy:\n  rules:\n    - {{ name: more-{round}, from: ['spiffe://a.example/other'], to: [in] }}\n"
        );
        pair.server.reloaded(&format!("{}{rule}", pair.server_config)).await;
        load.goes_on_for(100).await;
        let before = handshakes().await;
        let other = pair.client_config.replace("    expect:", &format!("    connect_timeout: {round}s\n    expect:"));
        pair.client.reloaded(&other).await;
        load.goes_on_for(100).await;
        assert!(handshakes().await > before, "what the old config opened serves no further");
    }
    load.all_went_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_where_connections_are_of_short_life() {
    let (_origin, at) = http_origin().await;
    let old = "connections: { max_age: 700ms }\n";
    let pair = Pair::start(at, Extra { server: old, client: old, ..Extra::default() }).await;
    let mut load = Load::start(pair.address);
    load.goes_on_for(1200).await;
    load.all_went_well().await;
    let labels = [("direction", "inbound"), ("result", "success")];
    let handshakes = pair.server.metrics().await.sum("portcullis_tls_handshakes_total", &labels);
    assert!(handshakes >= 3.0, "{handshakes}");
}

/// An HTTP/2 client with an SVID, straight at a server's sidecar.
struct Direct {
    sender: http2::SendRequest<Outgoing>,
    driver: tokio::task::JoinHandle<hyper::Result<()>>,
}

async fn direct(ca: &TestCa, own: Issued, to: SocketAddr) -> Direct {
    let mut config = Arc::unwrap_or_clone(presenting(ca, Some(own.into())));
    config.alpn_protocols = vec![b"h2".to_vec()];
    let stream = TcpStream::connect(to).await.unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(server_name(), stream).await.unwrap();
    let (sender, driver) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    Direct { sender, driver: tokio::spawn(driver) }
}

impl Direct {
    /// A stream on which the first piece has come.
    async fn held(&mut self) -> hyper::body::Incoming {
        let asks = request("GET", "https://a.example/held/one", nothing());
        let mut body = soon("an answer", self.sender.send_request(asks)).await.unwrap().into_body();
        let first = soon("the first piece", body.frame()).await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(&first[..], b"held");
        body
    }

    /// The held stream is reset, and the connection ends with GOAWAY.
    async fn ends(self, mut body: hyper::body::Incoming) {
        let error = soon("the end of the stream", body.frame()).await.unwrap().unwrap_err();
        let reset = std::error::Error::source(&error).unwrap().downcast_ref::<h2::Error>().unwrap();
        assert!(reset.is_reset() && reset.is_remote(), "{error:?}");
        drop(body);
        let ended = soon("the end of the connection", self.driver).await.unwrap();
        assert!(ended.is_ok(), "{ended:?}");
    }
}

#[tokio::test]
async fn a_stream_ends_when_its_peers_svid_does() {
    let (_origin, at) = http_origin().await;
    let mut pair = Pair::plain(at).await;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let own = pair.domain.ca.issue(&Spec::leaf(pair.domain.id("/client")).valid(now - 60, now + 4));
    let mut client = direct(&pair.domain.ca, own, pair.server.address("in").await).await;
    let held = client.held().await;
    client.ends(held).await;
    pair.server.request("the stream", |line| line["cause"] == "connection_ended").await;
    let labels = [("cause", "peer_expired")];
    pair.server.metric_reaches("portcullis_connections_total", &labels, 1.0).await;
}

#[tokio::test]
async fn a_stream_ends_when_the_bundle_forgets_its_authority() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    let other = TestCa::new("a.example");
    let own = pair.domain.ca.issue(&Spec::leaf(pair.domain.id("/server")).dns("localhost"));
    let bundle = |text: String| identity_files(pair.domain.path(), "server", &own, &[("a.example", text)]);
    let authorities = async || {
        let state = pair.server.state().await;
        state["bundles"][0]["authorities"].as_array().map_or(0, Vec::len)
    };
    bundle(format!("{}{}", pair.domain.ca.pem(), other.pem()));
    until("two authorities", async || (authorities().await == 2).then_some(())).await;
    let shown = other.issue(&Spec::leaf(pair.domain.id("/client")));
    let mut client = direct(&pair.domain.ca, shown, pair.server.address("in").await).await;
    let held = client.held().await;
    bundle(pair.domain.ca.pem());
    client.ends(held).await;
    let labels = [("cause", "bundle_changed")];
    pair.server.metric_reaches("portcullis_connections_total", &labels, 1.0).await;
}

#[tokio::test]
async fn an_old_http_2_connection_ends_in_order() {
    let (_origin, at) = http_origin().await;
    let extra = Extra { server: "connections: { max_age: 1s }\n", ..Extra::default() };
    let pair = Pair::start(at, extra).await;
    let own = pair.domain.ca.svid("/client");
    let mut client = direct(&pair.domain.ca, own, pair.server.address("in").await).await;
    let asks = request("GET", "https://a.example/delay/2500", nothing());
    let answer = soon("an answer that takes longer", client.sender.send_request(asks)).await.unwrap();
    assert_eq!(answer.status(), 200);
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    assert!(body.starts_with(b"{"));
    // GOAWAY had come, and without an error.
    assert!(client.sender.ready().await.is_err());
    assert!(soon("the end of the connection", client.driver).await.unwrap().is_ok());
}

#[tokio::test]
async fn streams_on_one_connection_are_bounded_and_nobody_fails_for_it() {
    let (_origin, at) = http_origin().await;
    let few = "http: { max_concurrent_streams: 3 }\n";
    let pair = Pair::start(at, Extra { server: few, client: few, ..Extra::default() }).await;
    let url = format!("http://{}/delay/50", pair.address);
    let mut nghttp = tokio::process::Command::new(tool("PORTCULLIS_TEST_NGHTTP", "nghttp"));
    let said = succeeds(nghttp.args(["-nv", "--no-dep", "-m", "20", &url]), "").await;
    assert!(said.contains("SETTINGS_MAX_CONCURRENT_STREAMS(0x03):3"), "{said}");
    // This client sends all at once, before it is told: what is too much is refused, and may be sent again.
    let (served, refused) = (said.matches(":status: 200").count(), said.matches("REFUSED_STREAM").count());
    assert!(served >= 3 && served + refused == 20, "{said}");
    // More than one connection to the other sidecar has room for: what is held stops nobody else.
    let mut held = Vec::new();
    for index in 0..5 {
        let mut stream = TcpStream::connect(pair.address).await.unwrap();
        stream.write_all(format!("GET /held/{index} HTTP/1.1\r\nHost: a.example\r\n\r\n").as_bytes()).await.unwrap();
        assert_ne!(soon("the head of a held answer", stream.read(&mut [0; 64])).await.unwrap(), 0);
        held.push(stream);
    }
    let way = Way::Plain(pair.address);
    let mut asks = JoinSet::new();
    for _ in 0..12 {
        let way = way.clone();
        asks.spawn(async move { get(&way, "/delay/20").await.status });
    }
    while let Some(status) = asks.join_next().await {
        assert_eq!(status.unwrap(), 200);
    }
}

#[tokio::test]
async fn a_call_whose_deadline_passes_is_answered_with_status_4() {
    let (_origin, at) = http_origin().await;
    let mut pair = Pair::plain(at).await;
    let url = format!("http://{}/delay/20000", pair.address);
    let answer = curl(&[
        "--http2-prior-knowledge",
        "-i",
        "-d",
        "",
        "-H",
        "content-type: application/grpc",
        "-H",
        "te: trailers",
        "-H",
        "grpc-timeout: 300m",
        &url,
    ])
    .await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(answer.body.to_lowercase().contains("grpc-status: 4"), "{answer:?}");
    let line = pair.client.request("the call", |line| line["cause"] == "timeout").await;
    assert_eq!(line["grpc_status"], 4, "{line}");
}
