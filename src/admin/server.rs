//! The HTTP server of the admin address.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HOST, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::{Readiness, secrets};

/// Connections at once; more wait in the kernel's queue.
const MOST_CONNECTIONS: usize = 64;
/// How long a request's head may take, and how long a connection may stay idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one connection may live: scrapes are short, and a reader that is slow must not keep its place from a probe.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the last answer may take after that.
const LAST_ANSWER: Duration = Duration::from_secs(5);

const INDEX: &str = "\
/livez    200 while the data path answers\n\
/readyz   200 when ready, 503 with what is waited for\n\
/metrics  Prometheus text\n\
/state    JSON: config, identity, bundles, listeners, connections\n";

/// An answer that takes a moment.
type Later<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Who answers.
pub struct Sources {
    /// What is waited for.
    pub readiness: Readiness,
    /// Content type and text of the metrics.
    pub metrics: Box<dyn Fn() -> (&'static str, String) + Send + Sync>,
    /// The state.
    pub state: Box<dyn Fn() -> serde_json::Value + Send + Sync>,
    /// Whether the data path is alive; it may take a second to find out.
    pub alive: Box<dyn Fn() -> Later<bool> + Send + Sync>,
}

impl std::fmt::Debug for Sources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sources").field("readiness", &self.readiness).finish_non_exhaustive()
    }
}

/// The bound admin address.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
}

impl Server {
    /// Serves on a socket that is bound already.
    ///
    /// # Errors
    /// The system's error.
    pub fn from_listener(listener: TcpListener) -> io::Result<Self> {
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// Binds.
    ///
    /// # Errors
    /// The address, the system's error and what to do about it.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        let explain = |error: io::Error| {
            let remedy = match error.kind() {
                io::ErrorKind::AddrInUse => {
                    "another process has it, perhaps another portcullis: set admin.listen to a free one; port 0 picks one"
                }
                io::ErrorKind::AddrNotAvailable => "this machine has no such address: correct admin.listen",
                io::ErrorKind::PermissionDenied => {
                    "ports below 1024 need a privilege: set admin.listen to a higher one"
                }
                _ => "set admin.listen to another one",
            };
            io::Error::new(error.kind(), format!("cannot listen on the admin address {address}: {error}; {remedy}"))
        };
        let listener = TcpListener::bind(address).await.map_err(explain)?;
        let address = listener.local_addr().map_err(explain)?;
        Ok(Self { listener, address })
    }

    /// The address, with the real port.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Answers until dropped; open connections end then too.
    pub async fn run(self, sources: Sources) {
        let service = Arc::new(Service { sources, guarded: self.address.ip().to_canonical().is_loopback() });
        let mut open = JoinSet::new();
        loop {
            while open.try_join_next().is_some() {}
            if open.len() >= MOST_CONNECTIONS {
                open.join_next().await;
                continue;
            }
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    open.spawn(serve(stream, Arc::clone(&service)));
                }
                // Descriptors may be short; the data path is told about that by its own listeners.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }
}

async fn serve(stream: TcpStream, service: Arc<Service>) {
    let answer = service_fn(move |request| answer(Arc::clone(&service), request));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), answer);
    let mut connection = pin!(connection);
    if tokio::time::timeout(CONNECTION_TIMEOUT, connection.as_mut()).await.is_err() {
        connection.as_mut().graceful_shutdown();
        let _ = tokio::time::timeout(LAST_ANSWER, connection).await;
    }
}

/// Who answers, and to whom.
struct Service {
    sources: Sources,
    /// On loopback only names of this machine are answered to.
    guarded: bool,
}

/// Whether the request is meant for this machine: by an IP address, `localhost`, a name without dots, or none. A web page
/// may point a name of its own at 127.0.0.1 and read, as one origin, whatever answers there; that name has dots.
fn for_this_machine(request: &Request<Incoming>) -> bool {
    let Some(host) = request.headers().get(HOST) else { return true };
    let Ok(host) = host.to_str() else { return false };
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => return address.parse::<IpAddr>().is_ok(),
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    let name = name.strip_suffix('.').unwrap_or(name);
    !name.contains('.') || name.parse::<IpAddr>().is_ok() || name.ends_with(".localhost")
}

async fn answer(service: Arc<Service>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    const TEXT: &str = "text/plain; charset=utf-8";
    let sources = &service.sources;
    if service.guarded && !for_this_machine(&request) {
        let text = "this host name is not this machine's: ask by 127.0.0.1 or localhost\n";
        return Ok(reply(StatusCode::MISDIRECTED_REQUEST, TEXT, text));
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut refusal =
            reply(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD: nothing here changes anything\n");
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return Ok(refusal);
    }
    Ok(match request.uri().path() {
        "/" => reply(StatusCode::OK, TEXT, INDEX),
        "/livez" => match (sources.alive)().await {
            true => reply(StatusCode::OK, TEXT, "alive\n"),
            false => reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, "the data path does not answer\n"),
        },
        "/readyz" => {
            let waiting = sources.readiness.waiting_for();
            if waiting.is_empty() {
                reply(StatusCode::OK, TEXT, "ready\n")
            } else {
                let mut text = format!("waiting for: {}\n", waiting.join(", "));
                for (name, why) in sources.readiness.reasons() {
                    text.push_str(&format!("{name}: {}\n", why.replace(char::is_control, " ")));
                }
                reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, text)
            }
        }
        "/metrics" => {
            let (kind, text) = (sources.metrics)();
            reply(StatusCode::OK, kind, text)
        }
        "/state" => {
            let mut state = (sources.state)();
            secrets::hide(&mut state);
            let text = serde_json::to_string_pretty(&state).unwrap_or_default();
            reply(StatusCode::OK, "application/json", text + "\n")
        }
        _ => reply(StatusCode::NOT_FOUND, TEXT, format!("not here; there are\n{INDEX}")),
    })
}

fn reply(status: StatusCode, kind: &'static str, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut reply = Response::new(Full::new(text.into()));
    *reply.status_mut() = status;
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    // All of it is true at this moment only, and none of it is a page.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    reply
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Status, head and body of the answer to these bytes.
    async fn send(address: SocketAddr, request: &[u8]) -> (u16, String, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        // A reset after the answer is as good as an end.
        while let Ok(1..) = stream.read_buf(&mut answer).await {}
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        (status, head.to_ascii_lowercase(), body.to_owned())
    }

    async fn ask(address: SocketAddr, line: &str) -> (u16, String, String) {
        let request = format!("{line} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
        send(address, request.as_bytes()).await
    }

    fn sources(readiness: &Readiness) -> Sources {
        Sources {
            readiness: readiness.clone(),
            metrics: Box::new(|| ("text/plain; version=0.0.4", "up 1\n".into())),
            state: Box::new(|| serde_json::json!({ "version": "1", "from": "https://user:secret@host.example/" })),
            alive: Box::new(|| Box::pin(async { true })),
        }
    }

    async fn serve_these(sources: Sources) -> (SocketAddr, tokio::task::JoinHandle<()>) {
        let server = Server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        (server.local_addr(), tokio::spawn(server.run(sources)))
    }

    #[tokio::test]
    async fn answers_what_it_is_there_for_and_nothing_else() {
        let (address, _server) = serve_these(sources(&Readiness::default())).await;
        let (status, head, body) = ask(address, "GET /metrics?any=thing").await;
        assert_eq!((status, body.as_str()), (200, "up 1\n"));
        assert!(head.contains("content-type: text/plain; version=0.0.4") && head.contains("no-store"), "{head}");
        let (status, head, body) = ask(address, "HEAD /metrics").await;
        assert_eq!((status, body.as_str()), (200, ""));
        assert!(head.contains("content-length: 5"), "{head}");
        let (status, head, body) = ask(address, "GET /state").await;
        assert!(status == 200 && head.contains("content-type: application/json"), "{head}");
        let state: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(state, serde_json::json!({ "version": "1", "from": "https://***@host.example/" }));
        let (status, _, body) = ask(address, "GET /").await;
        assert!(
            status == 200 && ["/livez", "/readyz", "/metrics", "/state"].iter().all(|e| body.contains(e)),
            "{body}"
        );
        for path in ["/../etc", "/metrics/", "//", "/%2e%2e/state", "*"] {
            let (status, _, body) = ask(address, &format!("GET {path}")).await;
            assert!(status == 404 || status == 400, "{path}: {status} {body}");
        }
    }

    #[tokio::test]
    async fn nothing_but_get_and_head() {
        let (address, _server) = serve_these(sources(&Readiness::default())).await;
        for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "QUIT"] {
            let (status, head, body) = ask(address, &format!("{method} /state")).await;
            assert_eq!(status, 405, "{method}");
            assert!(head.contains("allow: get, head") && body.contains("GET and HEAD"), "{head} {body}");
        }
        let (status, ..) = ask(address, "CONNECT host.example:443").await;
        assert_eq!(status, 405);
        let mut request =
            format!("POST /state HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: 5000\r\n\r\n")
                .into_bytes();
        request.extend([b'x'; 5000]);
        assert_eq!(send(address, &request).await.0, 405);
    }

    #[tokio::test]
    async fn tells_what_it_waits_for_and_why() {
        let readiness = Readiness::default();
        let (address, _server) = serve_these(sources(&readiness)).await;
        let token = readiness.wait_for("identity");
        let (status, _, body) = ask(address, "GET /readyz").await;
        assert_eq!((status, body.as_str()), (503, "waiting for: identity\n"));
        let drain = readiness.wait_for("drain");
        token.because("the agent is not there\r\nready");
        let (status, _, body) = ask(address, "GET /readyz").await;
        assert_eq!(
            (status, body.as_str()),
            (503, "waiting for: drain, identity\nidentity: the agent is not there  ready\n")
        );
        drop((token, drain));
        assert_eq!(ask(address, "GET /readyz").await.0, 200);
        let _again = readiness.wait_for("identity");
        assert_eq!(ask(address, "HEAD /readyz").await.0, 503);
    }

    #[tokio::test]
    async fn lives_as_long_as_the_data_path() {
        let alive = Arc::new(AtomicBool::new(true));
        let source = {
            let alive = Arc::clone(&alive);
            Box::new(move || {
                let alive = alive.load(Ordering::SeqCst);
                Box::pin(async move { alive }) as Later<bool>
            })
        };
        let (address, _server) = serve_these(Sources { alive: source, ..sources(&Readiness::default()) }).await;
        assert_eq!(ask(address, "GET /livez").await.0, 200);
        alive.store(false, Ordering::SeqCst);
        assert_eq!(ask(address, "GET /livez").await.0, 503);
    }

    #[tokio::test]
    async fn a_name_that_is_not_this_machine_s_is_not_answered_on_loopback() {
        let (address, _server) = serve_these(sources(&Readiness::default())).await;
        let with = async |host: &str| {
            let request = format!("GET /state HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
            send(address, request.as_bytes()).await.0
        };
        for host in ["127.0.0.1:9902", "127.0.0.1", "localhost:9902", "a.localhost", "[::1]:9902", "[::1]", "admin", ""]
        {
            assert_eq!(with(host).await, 200, "{host}");
        }
        for host in ["evil.example", "evil.example:9902", "127.0.0.1.evil.example", "evil.example.", "[evil.example]"] {
            assert_eq!(with(host).await, 421, "{host}");
        }
        assert_eq!(send(address, b"GET /livez HTTP/1.0\r\n\r\n").await.0, 200);
    }

    #[tokio::test]
    async fn garbage_and_heads_without_end_are_refused() {
        let (address, _server) = serve_these(sources(&Readiness::default())).await;
        assert!(matches!(send(address, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n").await.0, 0 | 400));
        let mut endless = b"GET / HTTP/1.1\r\n".to_vec();
        for n in 0..5000 {
            endless.extend(format!("x-{n}: y\r\n").into_bytes());
        }
        assert!(matches!(send(address, &endless).await.0, 0 | 400 | 431));
        assert_eq!(ask(address, "GET /livez").await.0, 200);
    }

    #[tokio::test]
    async fn silent_connections_have_a_cap_and_an_end_and_others_are_answered_then() {
        let (address, server) = serve_these(sources(&Readiness::default())).await;
        let mut silent = Vec::new();
        for _ in 0..MOST_CONNECTIONS {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        // No place is left: the answer waits in the kernel's queue.
        let waits = tokio::time::timeout(Duration::from_millis(200), ask(address, "GET /livez")).await;
        assert!(waits.is_err());
        drop(silent.pop());
        assert_eq!(ask(address, "GET /livez").await.0, 200);
        server.abort();
        let _ = server.await;
        // Open connections end with the server.
        let mut byte = [0];
        for mut stream in silent {
            assert!(matches!(stream.read(&mut byte).await, Ok(0) | Err(_)));
        }
    }

    #[tokio::test]
    async fn a_silent_connection_ends_after_the_time_for_a_head() {
        let (mut client, server) = {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            (client, listener.accept().await.unwrap().0)
        };
        tokio::time::pause();
        let service = Arc::new(Service { sources: sources(&Readiness::default()), guarded: true });
        let began = tokio::time::Instant::now();
        serve(server, service).await;
        assert!(began.elapsed() <= HEAD_TIMEOUT + Duration::from_secs(1), "{:?}", began.elapsed());
        let mut rest = Vec::new();
        let _ = client.read_to_end(&mut rest).await;
    }

    #[tokio::test]
    async fn an_address_that_cannot_be_had_is_told_with_the_remedy() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let error = Server::bind(address).await.unwrap_err().to_string();
        assert!(error.contains(&address.to_string()) && error.contains("set admin.listen to a free one"), "{error}");
        let error = Server::bind("203.0.113.7:1".parse().unwrap()).await.unwrap_err().to_string();
        assert!(error.contains("203.0.113.7:1") && error.contains("admin.listen"), "{error}");
    }
}
