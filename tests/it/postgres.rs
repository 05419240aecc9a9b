//! Protocols that the proxy knows nothing of, with clients and servers of their own: PostgreSQL with psql and pgbench,
//! HTTP/1.1 with curl, and a server that speaks first; over TCP and over Unix sockets.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::process::Command;

use crate::harness::{
    Domain, Joined, Proxy, Running, exchange, free_port, inbound_listener, output, rest_of, soon, succeeds, tool,
};

/// A PostgreSQL server of our own, on a TCP port and a Unix socket. It refuses to run as root.
pub struct Postgres {
    running: Running,
    port: u16,
    dir: tempfile::TempDir,
}

pub fn postgres_tool(name: &str) -> PathBuf {
    tool("PORTCULLIS_TEST_POSTGRES_BIN", "").join(name)
}

/// Who owns the data, if we are root: nobody.
pub const OWNER: u32 = 65534;

/// A program of the server, run as the owner of the data.
fn as_owner(program: &Path) -> Command {
    let mut command = Command::new(program);
    if rustix::process::geteuid().is_root() {
        command.uid(OWNER).gid(OWNER);
    }
    command
}

impl Postgres {
    async fn start() -> Self {
        Self::start_by(as_owner, "127.0.0.1", free_port().await).await
    }

    /// Starts it at these addresses and this port, its programs run by `command` as the owner. Whoever reaches it may do
    /// everything.
    pub async fn start_by(command: impl Fn(&Path) -> Command, addresses: &str, port: u16) -> Self {
        let dir = tempfile::tempdir().unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(dir.path(), Some(OWNER), Some(OWNER)).unwrap();
        }
        let data = dir.path().join("data");
        let mut initdb = command(&postgres_tool("initdb"));
        initdb.arg("-D").arg(&data).args(["-U", "postgres", "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8"]);
        succeeds(initdb.current_dir("/"), "").await;
        std::fs::write(data.join("pg_hba.conf"), "local all all trust\nhost all all all trust\n").unwrap();
        let mut postgres = command(&postgres_tool("postgres"));
        postgres.current_dir("/").arg("-D").arg(&data).args(["-p", &port.to_string(), "-c", "fsync=off"]);
        postgres.args(["-c", &format!("listen_addresses={addresses}"), "-c"]);
        postgres.arg(format!("unix_socket_directories={}", dir.path().display()));
        let mut running = Running::start(&mut postgres);
        running.line("PostgreSQL to be ready", |line| line.contains("ready to accept connections").then_some(())).await;
        Self { running, port, dir }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join(format!(".s.PGSQL.{}", self.port))
    }

    pub async fn stop(mut self) {
        self.running.signal(rustix::process::Signal::INT);
        assert!(self.running.wait().await.success());
    }
}

/// psql at this host (an address, or a folder with a socket) and port.
async fn psql(host: &str, port: u16, sql: &str, input: &str) -> String {
    psql_by(Command::new(postgres_tool("psql")), host, port, sql, input).await
}

/// The same, by a command that runs psql.
pub async fn psql_by(mut command: Command, host: &str, port: u16, sql: &str, input: &str) -> String {
    command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", "postgres"]);
    command.args(["-h", host, "-p", &port.to_string(), "-c", sql]).env("PGCONNECT_TIMEOUT", "20");
    succeeds(&mut command, input).await
}

#[tokio::test]
async fn postgresql_with_its_own_clients() {
    let postgres = Postgres::start().await;
    let domain = Domain::new("a.example");
    let allow = domain.id("/client");
    let server = Proxy::start(
        domain.path(),
        "server",
        &format!(
            "{}{}  - {{ name: unix, listen: '127.0.0.1:0', to: 'unix://{}', allow: ['{allow}'] }}\n",
            domain.identity("/server"),
            inbound_listener("tcp", ([127, 0, 0, 1], postgres.port).into(), &allow, ""),
            postgres.socket().display()
        ),
    )
    .await;
    server.ready().await;
    let front = domain.path().join(".s.PGSQL.5432");
    let expect = domain.id("/server");
    let client = Proxy::start(
        domain.path(),
        "client",
        &format!(
            "{}outbound:\n  - {{ name: tcp, listen: '127.0.0.1:0', to: '{}', expect: '{expect}' }}\n  \
             - {{ name: unix, listen: 'unix://{}', to: '{}', expect: '{expect}' }}\n",
            domain.identity("/client"),
            server.address("tcp").await,
            front.display(),
            server.address("unix").await,
        ),
    )
    .await;
    client.ready().await;
    let port = client.address("tcp").await.port();
    let folder = domain.path().to_str().unwrap();

    // In through TCP, out through the Unix socket: a few thousand rows each way.
    let rows: String = (0..5000).map(|n| format!("{n}\tpatient {n} {}\n", "x".repeat(n % 200))).collect();
    psql("127.0.0.1", port, "CREATE TABLE t (id int PRIMARY KEY, line text)", "").await;
    psql("127.0.0.1", port, "COPY t FROM STDIN", &rows).await;
    let back = psql(folder, 5432, "COPY (SELECT * FROM t ORDER BY id) TO STDOUT", "").await;
    assert!(back == rows, "what came back differs: {} bytes of {}", back.len(), rows.len());
    psql(folder, 5432, "INSERT INTO t SELECT id + 5000, repeat(line, 3) FROM t", "").await;
    assert_eq!(psql("127.0.0.1", port, "SELECT count(*), max(id) FROM t", "").await.trim(), "10000|9999");

    // Both ends of both sidecars have counted what was carried, and agree.
    let length = rows.len() as f64;
    for (direction, proxy) in [("inbound", &server), ("outbound", &client)] {
        for way in ["sent", "received"] {
            let labels = [("direction", direction), ("protocol", "tcp"), ("way", way)];
            proxy.metric_reaches("portcullis_bytes_total", &labels, length).await;
        }
    }
    for proxy in [&server, &client] {
        proxy.metric_reaches("portcullis_connections_total", &[("cause", "done")], 5.0).await;
    }
    let carried = |metrics: &crate::harness::Metrics, way| metrics.sum("portcullis_bytes_total", &[("way", way)]);
    let (at_server, at_client) = (server.metrics().await, client.metrics().await);
    for way in ["sent", "received"] {
        assert_eq!(carried(&at_server, way), carried(&at_client, way), "{way}");
    }

    let bench = |arguments: &[&str]| {
        let mut command = Command::new(postgres_tool("pgbench"));
        command.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-U", "postgres"]).args(arguments).arg("postgres");
        command
    };
    succeeds(&mut bench(&["-i", "-q", "-s", "1"]), "").await;
    let report = succeeds(&mut bench(&["-c", "4", "-j", "2", "-T", "2"]), "").await;
    let figure = |name: &str| {
        let line = report.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{report}"));
        line.chars().filter(char::is_ascii_digit).collect::<String>().parse::<u64>().unwrap()
    };
    assert_eq!(figure("number of clients"), 4);
    assert!(figure("number of transactions actually processed") > 0, "{report}");
    assert!(report.contains("number of failed transactions: 0 "), "{report}");
    assert!(client.stop().await.success());
    assert!(!front.exists(), "the socket file goes with the proxy");
    assert!(server.stop().await.success());
    postgres.stop().await;
}

#[tokio::test]
async fn a_server_may_speak_first_and_finish_first() {
    let workload = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let domain = Domain::new("a.example");
    let listener = inbound_listener("in", workload.local_addr().unwrap(), &domain.id("/client"), "");
    let mut server = Proxy::start(domain.path(), "server", &(domain.identity("/server") + &listener)).await;
    server.ready().await;
    let client = Joined::client_of(&domain, &server, "/client").await;
    let mut stream = TcpStream::connect(client.address("out").await).await.unwrap();
    let (mut behind, _) = soon("the workload's connection", workload.accept()).await.unwrap();
    behind.write_all(b"220 who is there\r\n").await.unwrap();
    let mut greeting = [0; 18];
    soon("the greeting", stream.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"220 who is there\r\n");
    // The server has finished; the client still has something to say.
    behind.shutdown().await.unwrap();
    assert_eq!(rest_of(&mut stream).await.unwrap(), b"");
    stream.write_all(b"a late word").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(rest_of(&mut behind).await.unwrap(), b"a late word");
    let record = server.ended("done").await;
    assert_eq!((&record["bytes_sent"], &record["bytes_received"]), (&11.into(), &18.into()));
}

/// An echo server on a Unix socket.
fn unix_echo(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
    });
}

#[tokio::test]
async fn unix_sockets_at_both_ends() {
    let domain = Domain::new("a.example");
    let (back, front) = (domain.path().join("workload.sock"), domain.path().join("front.sock"));
    unix_echo(&back);
    let mut server = Proxy::start(
        domain.path(),
        "server",
        &format!(
            "{}inbound:\n  - {{ name: in, listen: '127.0.0.1:0', to: 'unix://{}', allow: ['{}'] }}\n",
            domain.identity("/server"),
            back.display(),
            domain.id("/client")
        ),
    )
    .await;
    server.ready().await;
    // What a crash left behind is in nobody's way.
    drop(UnixListener::bind(&front).unwrap());
    assert!(front.exists());
    let config = format!(
        "{}outbound:\n  - {{ name: out, listen: 'unix://{}', to: '{}', expect: '{}' }}\n",
        domain.identity("/client"),
        front.display(),
        server.address("in").await,
        domain.id("/server")
    );
    let mut client = Proxy::start(domain.path(), "client", &config).await;
    client.ready().await;
    let mut stream = UnixStream::connect(&front).await.unwrap();
    let sent: Vec<u8> = (0..200_000u32).map(|n| n.to_le_bytes()[0]).collect();
    let (mut read, mut write) = stream.split();
    let sending = async {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    soon("all of it", async { tokio::join!(sending, read.read_to_end(&mut got)).1 }).await.unwrap();
    assert!(got == sent, "{} of {}", got.len(), sent.len());
    assert_eq!(client.ended("done").await["client"], "unix");
    let record = server.ended("done").await;
    assert_eq!(record["upstream"], format!("unix://{}", back.display()));
    // A workload that is gone is told of, and the next one is served.
    std::fs::remove_file(&back).unwrap();
    let mut refused = UnixStream::connect(&front).await.unwrap();
    // A Unix socket has no reset: its end is all that can be seen.
    let mut nothing = Vec::new();
    let _ = soon("the end", refused.read_to_end(&mut nothing)).await;
    assert_eq!(nothing, b"");
    let record = server.ended("unreachable").await;
    assert!(record["detail"].as_str().unwrap().contains("workload.sock"), "{record}");
    unix_echo(&back);
    let mut again = UnixStream::connect(&front).await.unwrap();
    again.write_all(b"back").await.unwrap();
    let mut got = [0; 4];
    soon("an echo", again.read_exact(&mut got)).await.unwrap();
    assert_eq!(&got, b"back");
}

#[tokio::test]
async fn a_socket_file_never_outlives_its_proxy() {
    let domain = Domain::new("a.example");
    let identity = domain.identity("/client");
    // Many sockets, so that one that is forgotten now and then is found.
    let front = |n: usize| domain.path().join(format!("{n}.sock"));
    let listeners: String = (0..200)
        .map(|n| {
            let to = "127.0.0.1:1', expect: 'spiffe://a.example/server' }";
            format!("  - {{ name: out-{n}, listen: 'unix://{}', to: '{to}\n", front(n).display())
        })
        .collect();
    let client = Proxy::start(domain.path(), "client", &format!("{identity}outbound:\n{listeners}")).await;
    client.ready().await;
    assert!((0..200).all(|n| front(n).exists()));
    assert!(client.stop().await.success());
    assert_eq!((0..200).filter(|n| front(*n).exists()).count(), 0);
}

#[tokio::test]
async fn the_next_address_is_tried_when_one_does_not_answer_or_is_somebody_else() {
    let joined = Joined::start("", "").await;
    let stranger = Joined::start("", "").await;
    let domain = &joined.domain;
    let config = format!(
        "{}outbound:\n  - {{ name: out, listen: '127.0.0.1:0', to: ['127.0.0.1:{}', '{}', '{}'], expect: '{}' }}\n",
        domain.identity("/third"),
        free_port().await,
        stranger.server.address("in").await,
        joined.server.address("in").await,
        domain.id("/server")
    );
    let allow = joined.server_config.replace("/client'", "/third'");
    joined.server.reloaded(&allow).await;
    let third = Proxy::start(domain.path(), "third", &config).await;
    third.ready().await;
    let mut stream = TcpStream::connect(third.address("out").await).await.unwrap();
    exchange(&mut stream, b"found").await.unwrap();
    let failed = [("direction", "outbound"), ("result", "failure"), ("reason", "untrusted")];
    assert_eq!(third.metrics().await.sum("portcullis_tls_handshakes_total", &failed), 1.0);
    assert_eq!(*stranger.workload.accepted.borrow(), 0);
}

/// An HTTP/1.1 server that answers with method, path and size of the body; counts connections and requests.
struct Web {
    address: std::net::SocketAddr,
    connections: Arc<AtomicUsize>,
    requests: Arc<AtomicUsize>,
}

async fn web() -> Web {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (connections, requests) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let web = Web { address, connections: Arc::clone(&connections), requests: Arc::clone(&requests) };
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            connections.fetch_add(1, Ordering::SeqCst);
            let requests = Arc::clone(&requests);
            let answer = service_fn(move |request: Request<Incoming>| {
                requests.fetch_add(1, Ordering::SeqCst);
                async move {
                    let head = format!("{} {}", request.method(), request.uri().path());
                    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(format!("{head} {}\n", body.len())))))
                }
            });
            let io = hyper_util::rt::TokioIo::new(stream);
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, answer));
        }
    });
    web
}

fn curl() -> Command {
    let mut command = Command::new(tool("PORTCULLIS_TEST_CURL", "curl"));
    command.args(["-q", "-sS", "--noproxy", "*", "--max-time", "20"]);
    command
}

#[tokio::test]
async fn curl_through_two_sidecars() {
    let web = web().await;
    let domain = Domain::new("a.example");
    let listener = inbound_listener("in", web.address, &domain.id("/client"), "");
    let server = Proxy::start(domain.path(), "server", &(domain.identity("/server") + &listener)).await;
    server.ready().await;
    let client = Joined::client_of(&domain, &server, "/client").await;
    let base = format!("http://{}", client.address("out").await);
    let urls: Vec<String> = (1..=5).map(|n| format!("{base}/{n}")).collect();
    let said = succeeds(curl().args(["-w", "connects %{num_connects}\n"]).args(&urls), "").await;
    let expected: String = (1..=5).map(|n| format!("GET /{n} 0\nconnects {}\n", if n == 1 { 1 } else { 0 })).collect();
    assert_eq!(said, expected, "five requests on one connection");
    let large = "x".repeat(3_000_000);
    let said = succeeds(curl().args(["--data-binary", "@-", "-H", "Expect:", &format!("{base}/up")]), &large).await;
    assert_eq!(said, "POST /up 3000000\n");
    assert_eq!((web.connections.load(Ordering::SeqCst), web.requests.load(Ordering::SeqCst)), (2, 6));
    server.metric_reaches("portcullis_bytes_total", &[("direction", "inbound"), ("way", "sent")], 3_000_000.0).await;
}

#[tokio::test]
async fn curl_with_a_certificate_of_its_own() {
    let web = web().await;
    let domain = Domain::new("a.example");
    let listener = inbound_listener("in", web.address, &domain.id("/curl"), "");
    let mut server = Proxy::start(domain.path(), "server", &(domain.identity("/server") + &listener)).await;
    server.ready().await;
    let port = server.address("in").await.port();
    let [certificate, key, authority] = domain.files("curl", &domain.ca.svid("/curl"));
    let direct = |with: &[&Path]| {
        let mut command = curl();
        command.args(["--resolve", &format!("localhost:{port}:127.0.0.1")]).arg("--cacert").arg(&authority);
        for (option, file) in ["--cert", "--key"].iter().zip(with) {
            command.arg(option).arg(file);
        }
        command
    };
    let url = format!("https://localhost:{port}");
    let said =
        succeeds(direct(&[&certificate, &key]).args([format!("{url}/a"), format!("{url}/b"), format!("{url}/c")]), "")
            .await;
    assert_eq!(said, "GET /a 0\nGET /b 0\nGET /c 0\n");
    assert_eq!((web.connections.load(Ordering::SeqCst), web.requests.load(Ordering::SeqCst)), (1, 3));
    let record = server.ended("done").await;
    assert_eq!((&record["peer"], &record["tls_version"]), (&domain.id("/curl").into(), &"TLSv1.3".into()));

    // Without a certificate, and with one that no rule admits: refused before the workload hears of it.
    let nobody = output(direct(&[]).arg(&url), "").await;
    assert!(!nobody.status.success());
    assert_eq!(server.ended("handshake_failed").await["reason"], "no_certificate");
    let [certificate, key, _] = domain.files("other", &domain.ca.svid("/other"));
    let other = output(direct(&[&certificate, &key]).arg(&url), "").await;
    assert!(!other.status.success());
    assert_eq!(server.ended("denied").await["rule"], "default");
    // Plain HTTP to the mTLS port.
    let plain = output(curl().arg(format!("http://127.0.0.1:{port}/")), "").await;
    assert!(!plain.status.success());
    assert_eq!(server.ended("handshake_failed").await["reason"], "not_tls");
    assert_eq!(web.connections.load(Ordering::SeqCst), 1);
    // curl refuses a server that its authority does not know.
    let foreign = Domain::new("a.example");
    let [certificate, key, authority] = foreign.files("curl", &foreign.ca.svid("/curl"));
    let mut command = curl();
    command.arg("--cacert").arg(authority).arg("--cert").arg(certificate).arg("--key").arg(key);
    command.args(["--resolve", &format!("localhost:{port}:127.0.0.1")]).arg(&url);
    assert_eq!(output(&mut command, "").await.status.code(), Some(60));
    assert_eq!(server.ended("handshake_failed").await["reason"], "peer_alert");
}
