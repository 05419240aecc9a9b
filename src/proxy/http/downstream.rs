//! One connection of whoever asks: HTTP is served on it until it ends, is drained, or is told to end.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use http::HeaderValue;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};

use super::dial::{CONNECTION_WINDOW, STREAM_WINDOW};
use super::h1_guard::{GuardHandle, GuardLimits, H1Guard};
use super::h2_guard::{FloodHandle, FrameLimits, H2Guard};
use super::linger::Lingering;
use super::service;
use super::tunnel::Tunnel;
use super::watch::{Due, Watch};
use crate::config::schema::HttpLimits;
use crate::identity::SpiffeId;
use crate::policy::http::{ConnectionFacts, TlsFacts};
use crate::policy::{ListenerPolicy, PeerPolicy};
use crate::proxy::connection::Connection;
use crate::proxy::listener::{Inbound, Outbound, Shared};
use crate::proxy::pace::Deadlines;
use crate::proxy::record::{Carries, Cause, RequestCause};
use crate::proxy::registry::Entry;
use crate::tls::Peer;
use crate::tls::record::Negotiated;

/// How long a connection that was told to end may take for its farewell.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long an idle HTTP/1 connection is left open when draining. Its client may be about to send a request, which would
/// fail; on a connection that is in use the next answer says `connection: close`.
const IDLE_DRAIN: Duration = Duration::from_secs(2);
/// Streams that a peer may reset before it is told to calm down (CVE-2023-44487).
const MAX_RESETS: usize = 64;
/// The smallest that HTTP/2 allows (RFC 9113, section 6.5.2), bytes.
const MAX_FRAME_SIZE: u32 = 16_384;

/// What is spoken on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::proxy) enum Spoken {
    /// HTTP/1.
    Http1,
    /// HTTP/2.
    Http2,
    /// HTTP/2 of another sidecar, whose requests say what they came in.
    Mesh,
}

/// Which way the requests of a connection go, and what that needs.
pub(in crate::proxy) enum Way {
    /// To the workload.
    Inbound(Box<Incoming>),
    /// To an upstream.
    Outbound(Arc<Outbound>),
}

impl Way {
    /// To the workload, from this peer.
    pub(in crate::proxy) fn inbound(
        listener: Arc<Inbound>,
        peer: Arc<Peer>,
        negotiated: Negotiated,
        local: SpiffeId,
    ) -> Self {
        let facts = Arc::new(ConnectionFacts {
            source: peer.id().clone(),
            destination: Some(local.clone()),
            tls: Some(TlsFacts {
                version: negotiated.version,
                cipher_suite: negotiated.cipher_suite,
                group: negotiated.group,
                key_type: negotiated.peer_key,
                resumed: negotiated.resumed,
            }),
        });
        let client_cert = client_cert(&peer, &local);
        let rules = ArcSwapOption::empty();
        Self::Inbound(Box::new(Incoming { listener, peer, negotiated, local, facts, client_cert, rules }))
    }
}

/// A proven peer that asks.
pub(in crate::proxy) struct Incoming {
    pub(in crate::proxy) listener: Arc<Inbound>,
    pub(in crate::proxy) peer: Arc<Peer>,
    pub(in crate::proxy) negotiated: Negotiated,
    pub(in crate::proxy) local: SpiffeId,
    /// What a module may know of the connection.
    pub(super) facts: Arc<ConnectionFacts>,
    /// `x-forwarded-client-cert` for this peer.
    pub(super) client_cert: Option<HeaderValue>,
    /// The rules about this peer, as long as the listener's are the same.
    rules: ArcSwapOption<(Arc<ListenerPolicy>, Arc<PeerPolicy>)>,
}

impl Incoming {
    /// The rules about this peer in `policy`.
    pub(super) fn rules(&self, policy: &Arc<ListenerPolicy>) -> Arc<PeerPolicy> {
        if let Some(known) = &*self.rules.load()
            && Arc::ptr_eq(&known.0, policy)
        {
            return Arc::clone(&known.1);
        }
        let rules = policy.for_peer(self.peer.id());
        self.rules.store(Some(Arc::new((Arc::clone(policy), Arc::clone(&rules)))));
        rules
    }
}

/// By Envoy's format: who is told, the SHA-256 of the peer's certificate, its SPIFFE ID. None of these can hold a
/// separator.
fn client_cert(peer: &Peer, local: &SpiffeId) -> Option<HeaderValue> {
    let leaf = peer.chain().first()?;
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, leaf);
    let hex: String = hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    HeaderValue::from_str(&format!("By={local};Hash={hex};URI={}", peer.id())).ok()
}

/// What the requests of one connection share.
pub(super) struct Downstream {
    pub(super) shared: Arc<Shared>,
    pub(super) entry: Arc<Entry>,
    pub(super) way: Way,
    pub(super) spoken: Spoken,
    carries: Carries,
    pub(super) limits: Arc<HttpLimits>,
    /// How long either side may be silent in a body.
    pub(super) idle: Duration,
    pub(super) half_closed: Duration,
    pub(super) guard: Option<GuardHandle>,
    pub(super) no_route: Arc<str>,
    sent: AtomicU64,
    received: AtomicU64,
    /// Moves on with every request and every piece of a body.
    pub(super) progress: AtomicU64,
    tunnel: Mutex<Option<Tunnel>>,
}

impl Downstream {
    /// Body bytes of a request that has ended.
    pub(super) fn moved(&self, sent: u64, received: u64) {
        self.sent.fetch_add(sent, Ordering::Relaxed);
        self.received.fetch_add(received, Ordering::Relaxed);
        self.shared.observer.moved(self.direction(), self.carries, sent, received);
        self.touch();
    }

    /// Something moved.
    pub(super) fn touch(&self) {
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// Where requests go now.
    pub(super) fn pool(&self) -> Option<Arc<super::pool::Pool>> {
        let original = self.entry.client.original();
        match &self.way {
            Way::Inbound(incoming) => incoming.listener.state.load().pools.of(original),
            Way::Outbound(listener) => listener.state.load().pools.of(original),
        }
    }

    /// Whether the next answer is the last one on this connection.
    pub(super) fn closes(&self) -> bool {
        self.spoken == Spoken::Http1 && self.entry.draining()
    }

    /// Keeps a tunnel until its connection is free of HTTP.
    pub(super) fn set_tunnel(&self, tunnel: Tunnel) {
        *self.tunnel.lock().unwrap_or_else(PoisonError::into_inner) = Some(tunnel);
    }

    fn take_tunnel(&self) -> Option<Tunnel> {
        self.tunnel.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Serves HTTP on a connection until it ends.
pub(in crate::proxy) async fn serve<S>(
    io: S,
    spoken: Spoken,
    way: Way,
    mut connection: Connection,
    limits: Arc<HttpLimits>,
    deadlines: Deadlines,
    shared: Arc<Shared>,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let entry = Arc::clone(connection.entry());
    let mut down = Downstream {
        shared,
        entry,
        way,
        spoken,
        carries: connection.carries(),
        idle: deadlines.idle,
        half_closed: deadlines.half_closed,
        guard: None,
        no_route: Arc::from("*"),
        sent: AtomicU64::new(0),
        received: AtomicU64::new(0),
        progress: AtomicU64::new(0),
        tunnel: Mutex::default(),
        limits,
    };
    let (end, down) = if spoken == Spoken::Http1 {
        let (guarded, handle) = H1Guard::new(Lingering::new(io), guard_limits(&down.limits, deadlines.idle));
        down.guard = Some(handle);
        let down = Arc::new(down);
        (http1(guarded, &down, &deadlines).await, down)
    } else {
        let down = Arc::new(down);
        let most = u32::try_from(down.limits.max_header_bytes).unwrap_or(u32::MAX);
        let (guarded, floods) = H2Guard::new(Lingering::new(io), &FrameLimits::default(), most, MAX_FRAME_SIZE);
        let mut end = http2(guarded, &floods, &down, &deadlines).await;
        if let Some(flood) = floods.flood() {
            end = (Cause::Protocol, flood.to_string());
        }
        (end, down)
    };
    connection.sent = down.sent.load(Ordering::Relaxed);
    connection.received = down.received.load(Ordering::Relaxed);
    connection.end(end.0, end.1);
}

fn guard_limits(limits: &HttpLimits, idle: Duration) -> GuardLimits {
    GuardLimits {
        max_request_line: limits.max_request_line,
        max_headers: limits.max_headers,
        max_header_bytes: limits.max_header_bytes,
        header_timeout: limits.header_timeout.0,
        idle_timeout: idle,
        ..GuardLimits::default()
    }
}

type End = (Cause, String);

fn end_of(result: hyper::Result<()>) -> End {
    let Err(error) = result else { return (Cause::Done, String::new()) };
    let mut source = std::error::Error::source(&error);
    while let Some(inner) = source {
        if let Some(io) = inner.downcast_ref::<std::io::Error>() {
            let cause = match io.kind() {
                std::io::ErrorKind::UnexpectedEof => Cause::Truncated,
                std::io::ErrorKind::InvalidData => Cause::Protocol,
                std::io::ErrorKind::TimedOut => Cause::Idle,
                _ => Cause::Reset,
            };
            return (cause, io.to_string());
        }
        source = inner.source();
    }
    let cause = if error.is_incomplete_message() || error.is_canceled() { Cause::Reset } else { Cause::Protocol };
    (cause, error.to_string())
}

async fn http1<S>(io: H1Guard<S>, down: &Arc<Downstream>, deadlines: &Deadlines) -> End
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut builder = http1::Builder::new();
    // The guard times the head: it withholds what is not whole.
    builder.timer(TokioTimer::new()).header_read_timeout(None);
    // The guard has the limits; these are room enough for what it lets through.
    builder.max_buf_size((2 * down.limits.max_header_bytes).max(64 * 1024));
    if down.limits.max_headers > 100 {
        builder.max_headers(down.limits.max_headers);
    }
    let context = Arc::clone(down);
    let service = service_fn(move |request| service::handle(&context, request));
    let driver = builder.serve_connection(TokioIo::new(io), service).with_upgrades();
    let mut driver = std::pin::pin!(driver);
    let mut shutting = false;
    let mut watch = Watch::new(deadlines);
    let mut timer = std::pin::pin!(tokio::time::sleep_until(watch.next().into()));
    let end = loop {
        tokio::select! {
            biased;
            result = &mut driver => break end_of(result),
            cause = down.entry.until_stopped() => {
                stop_requests(down);
                driver.as_mut().graceful_shutdown();
                let _ = tokio::time::timeout(FAREWELL, &mut driver).await;
                break (cause, String::new());
            }
            () = down.entry.until_draining(), if !shutting => {
                shutting = true;
                watch.shut_after(IDLE_DRAIN);
                timer.as_mut().reset(watch.next().into());
            }
            () = &mut timer => {
                match watch.look(down) {
                    Due::Nothing => {}
                    // Whoever is in the middle of a request is served to its end.
                    Due::Shut => driver.as_mut().graceful_shutdown(),
                    Due::Drain => down.entry.drain(),
                    Due::Stop(cause) => down.entry.stop(cause),
                }
                timer.as_mut().reset(watch.next().into());
            }
        }
    };
    match down.take_tunnel() {
        Some(tunnel) => tunnel.run(Some(&down.entry)).await.unwrap_or(end),
        None => end,
    }
}

async fn http2<S>(io: H2Guard<S>, guard: &FloodHandle, down: &Arc<Downstream>, deadlines: &Deadlines) -> End
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(down.limits.max_concurrent_streams)
        .max_frame_size(MAX_FRAME_SIZE)
        .max_header_list_size(u32::try_from(down.limits.max_header_bytes).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(MAX_RESETS)
        .max_local_error_reset_streams(MAX_RESETS)
        .max_send_buf_size(256 * 1024);
    let context = Arc::clone(down);
    let service = service_fn(move |request| service::handle(&context, request));
    let driver = builder.serve_connection(TokioIo::new(io), service);
    let mut driver = std::pin::pin!(driver);
    let mut shutting = false;
    let mut watch = Watch::new(deadlines);
    let mut timer = std::pin::pin!(tokio::time::sleep_until(watch.next().into()));
    loop {
        tokio::select! {
            biased;
            result = &mut driver => return end_of(result),
            cause = down.entry.until_stopped() => {
                // GOAWAY, RST_STREAM for what is under way, and then the end.
                driver.as_mut().graceful_shutdown();
                stop_requests(down);
                let _ = tokio::time::timeout(FAREWELL, &mut driver).await;
                return (cause, String::new());
            }
            () = down.entry.until_draining(), if !shutting => {
                shutting = true;
                guard.drain();
                driver.as_mut().graceful_shutdown();
            }
            () = &mut timer => {
                match watch.look(down) {
                    Due::Nothing | Due::Shut => {}
                    Due::Drain => down.entry.drain(),
                    Due::Stop(cause) => down.entry.stop(cause),
                }
                timer.as_mut().reset(watch.next().into());
            }
        }
    }
}

fn stop_requests(down: &Downstream) {
    down.entry.requests().stop_all(RequestCause::ConnectionEnded);
}
