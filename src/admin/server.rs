//! The HTTP server of the admin address.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::Readiness;

/// Connections at once; more wait in the kernel's queue.
const MOST_CONNECTIONS: usize = 64;
/// How long a request's head may take, and how long a connection may stay idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one connection may live: scrapes are short.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(300);

const INDEX: &str = "\
/livez    200 while the data path answers\n\
/readyz   200 when ready, 503 with what is waited for\n\
/metrics  Prometheus text\n\
/state    JSON: config, identity, bundles, listeners, connections\n";

/// An answer that takes a moment.
pub type Later<T> = Pin<Box<dyn Future<Output = T> + Send>>;

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
    /// Binds.
    ///
    /// # Errors
    /// The address, the system's error and what to do.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        let explain = |error: io::Error| {
            let text = format!("cannot listen on the admin address {address}: {error}; set admin.listen to a free one");
            io::Error::new(error.kind(), text)
        };
        let listener = TcpListener::bind(address).await.map_err(explain)?;
        let address = listener.local_addr().map_err(explain)?;
        Ok(Self { listener, address })
    }

    /// The address, with the real port.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Answers until dropped.
    pub async fn run(self, sources: Sources) {
        let sources = Arc::new(sources);
        let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(_) => {
                    // Descriptors may be short; the data path is told about that by its own listeners.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let sources = Arc::clone(&sources);
            tokio::spawn(async move {
                let service = service_fn(move |request| answer(Arc::clone(&sources), request));
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD_TIMEOUT)
                    .max_buf_size(16 * 1024)
                    .serve_connection(TokioIo::new(stream), service);
                let _ = tokio::time::timeout(CONNECTION_TIMEOUT, connection).await;
                drop(place);
            });
        }
    }
}

async fn answer(sources: Arc<Sources>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    const TEXT: &str = "text/plain; charset=utf-8";
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
                let text = format!("waiting for: {}\n", waiting.join(", "));
                reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, text)
            }
        }
        "/metrics" => {
            let (kind, text) = (sources.metrics)();
            reply(StatusCode::OK, kind, text)
        }
        "/state" => {
            let text = serde_json::to_string_pretty(&(sources.state)()).unwrap_or_default();
            reply(StatusCode::OK, "application/json", text + "\n")
        }
        _ => reply(StatusCode::NOT_FOUND, TEXT, format!("not here; there are\n{INDEX}")),
    })
}

fn reply(status: StatusCode, kind: &'static str, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut reply = Response::new(Full::new(text.into()));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    reply
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    async fn ask(address: SocketAddr, head: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn answers_what_it_is_there_for_and_nothing_else() {
        let server = Server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = server.local_addr();
        let readiness = Readiness::default();
        let token = readiness.wait_for("identity");
        let sources = Sources {
            readiness,
            metrics: Box::new(|| ("text/plain", "up 1\n".into())),
            state: Box::new(|| serde_json::json!({ "version": "1" })),
            alive: Box::new(|| Box::pin(async { true })),
        };
        tokio::spawn(server.run(sources));
        assert!(ask(address, "GET /readyz").await.starts_with("HTTP/1.1 503"));
        assert!(ask(address, "GET /readyz").await.ends_with("waiting for: identity\n"));
        drop(token);
        assert!(ask(address, "GET /readyz").await.starts_with("HTTP/1.1 200"));
        assert!(ask(address, "GET /livez").await.starts_with("HTTP/1.1 200"));
        assert!(ask(address, "GET /metrics").await.ends_with("up 1\n"));
        assert!(ask(address, "HEAD /metrics").await.ends_with("\r\n\r\n"));
        assert!(ask(address, "GET /state").await.contains("\"version\": \"1\""));
        assert!(ask(address, "POST /state").await.starts_with("HTTP/1.1 405"));
        assert!(ask(address, "GET /../etc").await.starts_with("HTTP/1.1 404"));
    }
}
