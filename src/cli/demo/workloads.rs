//! The two workloads: a small HTTP service, and the one that calls it all the time. Neither knows anything of TLS.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Empty, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::proxy::proxy_protocol::TLV_SPIFFE_ID;

/// Connections that the service takes at once.
const MOST_CONNECTIONS: usize = 64;
/// How long one request may take before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(5);
/// Callers that keep their connection for a while; one more opens a new one for each request.
const KEPT: u64 = 3;
/// Between two requests of one caller: about 30 requests a second together.
const PAUSE: Duration = Duration::from_millis(130);

/// Who was let through to the service, by the identity that its sidecar proved, and how often.
pub(super) type Callers = Arc<Mutex<BTreeMap<String, u64>>>;

/// The `records` service. Ends when dropped.
#[derive(Debug)]
pub(super) struct Records {
    /// Where it listens.
    pub(super) address: SocketAddr,
    callers: Callers,
    _tasks: JoinSet<()>,
}

impl Records {
    pub(super) async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let callers = Callers::default();
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, Arc::clone(&callers)));
        Ok(Self { address, callers, _tasks: tasks })
    }

    /// Connections so far, by who was behind them.
    pub(super) fn callers(&self) -> BTreeMap<String, u64> {
        self.callers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn serve(listener: TcpListener, callers: Callers) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let Ok((mut stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let callers = Arc::clone(&callers);
        connections.spawn(async move {
            let caller: Arc<str> = caller(&mut stream).await.unwrap_or_else(|_| "nobody".into()).into();
            *callers.lock().unwrap_or_else(PoisonError::into_inner).entry(caller.to_string()).or_default() += 1;
            let service = service_fn(move |request: Request<Incoming>| {
                let caller = Arc::clone(&caller);
                async move {
                    let record = request.uri().path();
                    let text = serde_json::json!({ "record": record, "caller": &*caller }).to_string() + "\n";
                    Ok::<_, std::convert::Infallible>(Response::new(Full::new(Bytes::from(text))))
                }
            });
            // A caller that goes away is no matter of the service.
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            drop(place);
        });
    }
}

/// Reads the PROXY protocol header that the sidecar sends ahead, and the SPIFFE ID in it.
async fn caller(stream: &mut TcpStream) -> io::Result<String> {
    let mut head = [0; 16];
    stream.read_exact(&mut head).await?;
    let [.., family, high, low] = head;
    let mut body = vec![0; usize::from(u16::from_be_bytes([high, low]))];
    stream.read_exact(&mut body).await?;
    let addresses = match family {
        0x11 => 12,
        0x21 => 36,
        _ => 0,
    };
    let mut rest = body.get(addresses..).unwrap_or_default();
    while let [kind, high, low, tail @ ..] = rest {
        let Some((value, tail)) = tail.split_at_checked(usize::from(u16::from_be_bytes([*high, *low]))) else { break };
        if *kind == TLV_SPIFFE_ID {
            return Ok(String::from_utf8_lossy(value).into_owned());
        }
        rest = tail;
    }
    Err(io::ErrorKind::InvalidData.into())
}

/// A kept HTTP/1.1 connection through a sidecar, in plaintext as a workload makes it.
pub(super) struct Caller {
    sender: SendRequest<Empty<Bytes>>,
    connection: tokio::task::JoinHandle<()>,
}

impl Caller {
    pub(super) async fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        let connection = tokio::spawn(async move { drop(connection.await) });
        Ok(Self { sender, connection })
    }

    /// Asks for one record: what is answered, if that is a success.
    pub(super) async fn ask(&mut self, path: &str) -> io::Result<String> {
        match self.request(path, &[]).await? {
            (status, body) if status.is_success() => Ok(body),
            (status, _) => Err(io::Error::other(format!("status {status}"))),
        }
    }

    /// A GET with these headers: what is answered.
    pub(super) async fn request(&mut self, path: &str, headers: &[(&str, &str)]) -> io::Result<(StatusCode, String)> {
        let asking = async {
            let request = Request::get(path).header("host", "records");
            let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
            let request = request.body(Empty::new()).map_err(io::Error::other)?;
            self.sender.ready().await.map_err(io::Error::other)?;
            let answer = self.sender.send_request(request).await.map_err(io::Error::other)?;
            let status = answer.status();
            let body = answer.into_body().collect().await.map_err(io::Error::other)?.to_bytes();
            Ok((status, String::from_utf8_lossy(&body).trim().to_owned()))
        };
        tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Waits until the other side ends the connection; false if it does not within `limit`.
    pub(super) async fn ended(&mut self, limit: Duration) -> bool {
        tokio::time::timeout(limit, &mut self.connection).await.is_ok()
    }
}

/// What came of the traffic so far.
#[derive(Debug, Default)]
pub(super) struct Tally {
    requests: AtomicU64,
    failures: AtomicU64,
    first_failure: Mutex<Option<String>>,
}

impl Tally {
    /// Requests that were answered, and those that were not.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.requests.load(Ordering::Relaxed), self.failures.load(Ordering::Relaxed))
    }

    /// What went wrong first.
    pub(super) fn first_failure(&self) -> Option<String> {
        self.first_failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One more was answered.
    pub(super) fn answered(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// One more was not.
    pub(super) fn failed(&self, what: &str, why: &io::Error) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let mut first = self.first_failure.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| format!("{what}: {why}"));
    }
}

/// The workloads that ask all the time, over connections kept and new: `frontend`, and `web` beside it. Ends when dropped.
#[derive(Debug)]
pub(super) struct Frontend {
    /// What came of it.
    pub(super) tally: Arc<Tally>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Frontend {
    /// Begins to ask at `address` as `own`; a kept connection lives for `keep`, so that it ends in order before its SVIDs
    /// do.
    pub(super) fn start(address: SocketAddr, own: &str, keep: Duration) -> Self {
        let tally = Arc::new(Tally::default());
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for number in 0..=KEPT {
            let keep = if number == KEPT { Duration::ZERO } else { keep };
            let whom = Whom { address, own: own.to_owned(), below: "/records", keep };
            tasks.spawn(ask_on(whom, number, Arc::clone(&tally), stopped.clone()));
        }
        Self { tally, stop, tasks }
    }

    /// Begins to ask somebody else as well, for what is `below` this path, on one connection to the end.
    pub(super) fn also(&mut self, address: SocketAddr, own: &str, below: &'static str) {
        let whom = Whom { address, own: own.to_owned(), below, keep: Duration::MAX };
        self.tasks.spawn(ask_on(whom, 0, Arc::clone(&self.tally), self.stop.subscribe()));
    }

    /// Lets every caller finish what it is about.
    pub(super) async fn stop(&mut self) {
        self.stop.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Whom a caller asks, as whom, for what, and how long on one connection.
struct Whom {
    address: SocketAddr,
    own: String,
    below: &'static str,
    keep: Duration,
}

async fn ask_on(whom: Whom, number: u64, tally: Arc<Tally>, mut stopped: watch::Receiver<bool>) {
    let Whom { address, own, below, keep } = whom;
    for round in 0_u64.. {
        let opened = Instant::now();
        match Caller::connect(address).await {
            Ok(mut caller) => loop {
                match caller.ask(&format!("{below}/{}", round * (KEPT + 1) + number)).await {
                    Ok(answer) if answer.contains(&format!("\"{own}\"")) => {
                        tally.answered();
                    }
                    Ok(answer) => tally.failed("another answer", &io::Error::other(answer)),
                    Err(error) => {
                        tally.failed("no answer", &error);
                        break;
                    }
                }
                if opened.elapsed() >= keep || pause(&mut stopped).await {
                    break;
                }
            },
            Err(error) => tally.failed("no connection", &error),
        }
        if pause(&mut stopped).await {
            return;
        }
    }
}

/// True when it is time to stop.
pub(super) async fn pause(stopped: &mut watch::Receiver<bool>) -> bool {
    tokio::time::timeout(PAUSE, stopped.wait_for(|stop| *stop)).await.is_ok()
}
