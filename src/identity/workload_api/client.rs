//! The client: asks for ever, and notices an agent that hangs.
//!
//! Three things tell a silent agent from a quiet one. A first answer must come within a deadline. HTTP/2 pings find a
//! dead connection, but only every five minutes, because a gRPC server in Go (SPIRE's agent) answers more frequent ones
//! by closing the connection. And an SVID that passes 60 % of its life without a new one is asked for again over a new
//! connection, so that a hanging agent is found in proportion to what is at stake.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper::http;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::{Code, Request, Status};

use super::address::{Address, AddressError};
use super::pb::{FETCH_X509_SVID, SECURITY_HEADER, X509SvidRequest, X509SvidResponse};
use super::{MAX_MESSAGE_BYTES, response};
use crate::clock::Clock;
use crate::config::schema::WorkloadApi;
use crate::identity::Svid;
use crate::identity::source::{Event, Source, Update};

/// How long things may take. Defaults are for production; tests shorten them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    /// Opening the socket.
    pub(super) connect: Duration,
    /// From the open socket to the first message.
    pub(super) first_message: Duration,
    /// Between pings. Just above the five minutes that gRPC servers in Go allow at the most often.
    pub(super) ping_interval: Duration,
    /// From a ping to its answer.
    pub(super) ping_timeout: Duration,
    /// Bounds of the pause between attempts.
    pub(super) backoff: (Duration, Duration),
    /// The least pause between two times of asking again for an overdue SVID.
    pub(super) ask_again: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            first_message: Duration::from_secs(10),
            ping_interval: Duration::from_secs(305),
            ping_timeout: Duration::from_secs(10),
            backoff: (Duration::from_millis(200), Duration::from_secs(10)),
            ask_again: Duration::from_secs(10),
        }
    }
}

/// A [`Source`] that streams from a SPIFFE Workload API.
#[derive(Debug)]
pub struct WorkloadApiSource {
    session: Session,
    /// Runs from the first call of `next` on. A task of its own, so that a caller that gives up waiting does not break
    /// off a connection that is being made.
    running: Option<(mpsc::Receiver<Event>, AbortOnDrop)>,
}

#[derive(Debug)]
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl WorkloadApiSource {
    /// A source that streams from one address. Nothing is connected before the first call of [`Source::next`], which
    /// must come from within a tokio runtime.
    pub fn new(address: Address, clock: Clock) -> Self {
        Self { session: Session { address, clock, timing: Timing::default() }, running: None }
    }

    /// The same from a config, or from `SPIFFE_ENDPOINT_SOCKET` without one.
    ///
    /// # Errors
    /// The address is missing, or is not one.
    pub fn from_config(config: Option<&WorkloadApi>, clock: Clock) -> Result<Self, AddressError> {
        let address = match config {
            Some(config) => Address::parse(&config.address)?,
            None => Address::from_env()?,
        };
        Ok(Self::new(address, clock))
    }

    /// The address that is asked.
    pub fn address(&self) -> &Address {
        &self.session.address
    }

    #[cfg(test)]
    pub(super) fn with_timing(mut self, timing: Timing) -> Self {
        self.session.timing = timing;
        self
    }
}

impl Source for WorkloadApiSource {
    fn name(&self) -> &'static str {
        "workload-api"
    }

    fn next(&mut self) -> Pin<Box<dyn Future<Output = Event> + Send + '_>> {
        Box::pin(async move {
            loop {
                let session = &self.session;
                let (events, _) = self.running.get_or_insert_with(|| {
                    // One event waits at the most; the stream's own flow control holds back the rest.
                    let (sender, receiver) = mpsc::channel(1);
                    (receiver, AbortOnDrop(tokio::spawn(session.clone().run(sender))))
                });
                match events.recv().await {
                    Some(event) => return event,
                    // The task never ends by itself; should it have panicked, a new one takes its place.
                    None => self.running = None,
                }
            }
        })
    }
}

#[derive(Clone, Debug)]
struct Session {
    address: Address,
    clock: Clock,
    timing: Timing,
}

/// Why a stream is over.
enum End {
    /// The agent cannot be reached, or answers nonsense.
    Unavailable(String),
    /// The agent says that we have no identity.
    NoIdentity(String),
    /// An SVID is overdue: ask anew.
    Overdue,
    /// Nobody listens to us any more.
    Unheard,
}

impl Session {
    async fn run(self, events: mpsc::Sender<Event>) {
        let mut backoff = Backoff::new(self.timing.backoff);
        loop {
            let end = match self.stream(&events, &mut backoff).await {
                Ok(never) => match never {},
                Err(end) => end,
            };
            let event = match end {
                End::Unheard => return,
                End::Overdue => {
                    tracing::debug!(address = %self.address, "an SVID is overdue, asking the agent anew");
                    continue;
                }
                End::Unavailable(why) => Event::Unavailable { why: format!("{}: {why}", self.address) },
                End::NoIdentity(why) => Event::NoIdentity { why: format!("{}: {why}", self.address) },
            };
            if events.send(event).await.is_err() {
                return;
            }
            tokio::time::sleep(backoff.next()).await;
        }
    }

    /// Connects, asks, and passes on what comes until something goes wrong.
    async fn stream(
        &self,
        events: &mpsc::Sender<Event>,
        backoff: &mut Backoff,
    ) -> Result<std::convert::Infallible, End> {
        let mut connection = self.connect().await?;
        let deadline = tokio::time::Instant::now() + self.timing.first_message;
        let late = || {
            let seconds = self.timing.first_message.as_secs_f32();
            End::Unavailable(format!("no answer within {seconds} s; does the agent hang?"))
        };
        let mut grpc = tonic::client::Grpc::with_origin(Http2(connection.sender.clone()), connection.origin.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES);
        let mut request = Request::new(X509SvidRequest {});
        request.metadata_mut().insert(SECURITY_HEADER, tonic::metadata::MetadataValue::from_static("true"));
        let path = http::uri::PathAndQuery::from_static(FETCH_X509_SVID);
        let codec = tonic_prost::ProstCodec::<X509SvidRequest, X509SvidResponse>::default();
        let answer = tokio::time::timeout_at(deadline, grpc.server_streaming(request, path, codec)).await;
        let mut stream = match answer {
            Err(_) => return Err(late()),
            Ok(Err(status)) => return Err(connection.why(status).await),
            Ok(Ok(response)) => response.into_inner(),
        };
        let mut wait = Wait::Until(deadline);
        loop {
            let message = tokio::select! {
                message = stream.message() => message,
                over = wait.over(&self.clock) => return Err(match over { Over::Deadline => late(), Over::Age => End::Overdue }),
                () = events.closed() => return Err(End::Unheard),
            };
            let message = match message {
                Ok(Some(message)) => message,
                Ok(None) => return Err(End::Unavailable("the agent ended the stream; is it being restarted?".into())),
                Err(status) => return Err(connection.why(status).await),
            };
            let update = response::read(message).map_err(End::Unavailable)?;
            wait = Wait::age(&update, self.clock.now(), self.timing.ask_again);
            backoff.reset();
            if events.send(Event::Update(update)).await.is_err() {
                return Err(End::Unheard);
            }
        }
    }

    async fn connect(&self) -> Result<Connection, End> {
        let opened = tokio::time::timeout(self.timing.connect, async {
            match &self.address {
                Address::Unix(path) => {
                    let io = UnixStream::connect(path).await.map_err(|e| self.explain(&e))?;
                    self.handshake(io, "http://localhost").await
                }
                Address::Tcp(address) => {
                    let io = TcpStream::connect(address).await.map_err(|e| self.explain(&e))?;
                    let _ = io.set_nodelay(true);
                    self.handshake(io, &format!("http://{address}")).await
                }
            }
        });
        match opened.await {
            Ok(connection) => connection.map_err(End::Unavailable),
            Err(_) => Err(End::Unavailable(format!(
                "no connection within {} s; does the agent hang?",
                self.timing.connect.as_secs_f32()
            ))),
        }
    }

    async fn handshake<I>(&self, io: I, origin: &str) -> Result<Connection, String>
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(self.timing.ping_interval)
            .keep_alive_timeout(self.timing.ping_timeout)
            // A whole message fits, so that a large one needs no round trips.
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(1 << 20)
            .max_header_list_size(16 * 1024)
            .handshake(TokioIo::new(io))
            .await
            .map_err(|e| broke(&chain(&e)))?;
        let origin = origin.parse().map_err(|e| format!("{e}"))?;
        let (told, failure) = tokio::sync::oneshot::channel();
        let driver = AbortOnDrop(tokio::spawn(async move {
            if let Err(error) = connection.await {
                let _ = told.send(chain(&error));
            }
        }));
        Ok(Connection { sender, origin, failure, _driver: driver })
    }

    fn explain(&self, error: &std::io::Error) -> String {
        use std::io::ErrorKind;
        let Address::Unix(path) = &self.address else {
            return match error.kind() {
                ErrorKind::ConnectionRefused => "nobody listens there; is the agent running?".into(),
                _ => format!("it cannot be connected to: {error}"),
            };
        };
        match error.kind() {
            ErrorKind::NotFound => "there is no socket; is the agent running, and is this its path?".into(),
            ErrorKind::ConnectionRefused => "nobody listens on the socket; is the agent running?".into(),
            ErrorKind::PermissionDenied => format!(
                "we (uid {}) may not open it; the socket must be writable for us and every folder above {} searchable",
                rustix::process::geteuid().as_raw(),
                path.display()
            ),
            _ => format!("it cannot be connected to: {error}; is the agent running?"),
        }
    }
}

struct Connection {
    sender: http2::SendRequest<tonic::body::Body>,
    origin: http::Uri,
    /// What the connection died of.
    failure: tokio::sync::oneshot::Receiver<String>,
    _driver: AbortOnDrop,
}

impl Connection {
    /// A status in words. The connection's own end says more than the status that it gave to the stream.
    async fn why(&mut self, status: Status) -> End {
        match status.code() {
            Code::PermissionDenied => {
                return End::NoIdentity(format!(
                    "the agent has no identity for us ({}); is there an entry whose selectors fit this process?",
                    status.message()
                ));
            }
            Code::Unknown | Code::Unavailable | Code::Internal | Code::Cancelled => {
                // It follows the status within moments, if it is what killed the stream.
                let told = tokio::time::timeout(Duration::from_millis(100), &mut self.failure).await;
                if let Ok(Ok(failure)) = told {
                    return End::Unavailable(broke(&failure));
                }
            }
            _ => {}
        }
        End::Unavailable(format!("the agent answered {:?}: {}", status.code(), status.message()))
    }
}

fn broke(why: &str) -> String {
    format!("the connection broke: {why}; is the agent being restarted, or is this another program's socket?")
}

/// An error with what caused it; hyper's own words end where it becomes interesting.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

/// hyper's handle as the service that tonic calls.
struct Http2(http2::SendRequest<tonic::body::Body>);

impl tower_service::Service<http::Request<tonic::body::Body>> for Http2 {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// What is waited for beside the next message.
#[derive(Clone, Copy, Debug)]
enum Wait {
    /// The first message.
    Until(tokio::time::Instant),
    /// The moment (seconds since the Unix epoch) at which an SVID is overdue.
    Age(u64),
    Nothing,
}

enum Over {
    Deadline,
    Age,
}

impl Wait {
    /// Until the first of the SVIDs has passed 60 % of its life; one that has passed it already is asked for again in
    /// twentieths of its life.
    fn age(update: &Update, now: u64, pause: Duration) -> Self {
        let at = |svid: &Svid| {
            let (from, to) = (svid.facts().not_before, svid.facts().not_after);
            let life = to.saturating_sub(from);
            let overdue = from.saturating_add(life / 5 * 3).saturating_add(life % 5 * 3 / 5);
            if overdue > now { overdue } else { now.saturating_add((life / 20).max(pause.as_secs()).max(1)) }
        };
        update.svids.iter().map(at).min().map_or(Self::Nothing, Self::Age)
    }

    async fn over(self, clock: &Clock) -> Over {
        match self {
            Self::Nothing => std::future::pending().await,
            Self::Until(deadline) => {
                tokio::time::sleep_until(deadline).await;
                Over::Deadline
            }
            Self::Age(at) => {
                loop {
                    let left = at.saturating_sub(clock.now());
                    if left == 0 {
                        return Over::Age;
                    }
                    // In short steps, because the wall clock runs on while a machine sleeps.
                    tokio::time::sleep(Duration::from_secs(left.min(30))).await;
                }
            }
        }
    }
}

/// Exponential backoff with full jitter: between nothing and a ceiling that doubles.
#[derive(Debug)]
struct Backoff {
    first: Duration,
    most: Duration,
    ceiling: Duration,
}

impl Backoff {
    fn new((first, most): (Duration, Duration)) -> Self {
        Self { first, most, ceiling: first }
    }

    fn reset(&mut self) {
        self.ceiling = self.first;
    }

    fn next(&mut self) -> Duration {
        let mut random = [0_u8; 4];
        // Without random numbers there is no jitter, which is no reason to stop trying.
        let part = match aws_lc_rs::rand::fill(&mut random) {
            Ok(()) => f64::from(u32::from_le_bytes(random)) / f64::from(u32::MAX),
            Err(_) => 1.0,
        };
        let pause = self.ceiling.mul_f64(part);
        self.ceiling = (self.ceiling * 2).min(self.most);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_doubles_up_to_its_limit_and_is_spread() {
        let mut backoff = Backoff::new((Duration::from_millis(200), Duration::from_secs(10)));
        let mut longest = Duration::ZERO;
        for n in 0..200_u32 {
            let ceiling = Duration::from_millis(200).saturating_mul(1 << n.min(10)).min(Duration::from_secs(10));
            let pause = backoff.next();
            assert!(pause <= ceiling, "{n}: {pause:?}");
            longest = longest.max(pause);
        }
        assert!(longest > Duration::from_secs(5));
        backoff.reset();
        assert!(backoff.next() <= Duration::from_millis(200));
    }
}
