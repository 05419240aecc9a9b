//! Opening a connection to an upstream and beginning HTTP on it.
//!
//! Towards a mesh upstream: TCP, the handshake, the gate (`expect`), then what ALPN says. Such a connection stands in the
//! registry and leaves a record of its own, as every connection with a peer does. Towards the workload: a plaintext
//! connection in the version that is asked for. Either is driven by a task that ends with it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::OwnedSemaphorePermit;

use super::endpoint::{At, Endpoint, Lease, Owned1, Proof, Shared2, Speaks};
use super::pool::{Failed, Pool, Route, Want};
use crate::policy::Admitted;
use crate::proxy::connection::{Connection, deadlines};
use crate::proxy::listener::Client;
use crate::proxy::record::{Carries, Cause, RequestCause};
use crate::tls::record::Direction;
use crate::tls::{Alpn, Authenticated, Offer, ReadAhead, client};

/// Flow-control windows for what comes back: h2 counts small frames against the connection's, so it is not small.
pub(super) const STREAM_WINDOW: u32 = 1 << 20;
pub(super) const CONNECTION_WINDOW: u32 = 4 << 20;
/// An upstream that answers no ping for so long is gone.
const PING_AFTER: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long HTTP may take to begin on a fresh connection.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection that ends in order may take for it.
const FAREWELL: Duration = Duration::from_secs(1);
/// Bytes of a response's head at most.
const MAX_RESPONSE_HEAD: usize = 256 * 1024;

/// Opens a connection to `endpoint`.
pub(super) async fn dial(pool: &Arc<Pool>, endpoint: &Arc<Endpoint>, want: Want) -> Result<Lease, Failed> {
    match (&pool.route, &endpoint.at) {
        (Route::Workload { target, dialer, connect_timeout }, _) => {
            let place = place(endpoint, want, *connect_timeout).await?;
            let io = target
                .connect(dialer, None, *connect_timeout)
                .await
                .map_err(|error| Failed::unreachable(&error, format!("{target}: {error}")))?;
            let begun = begin(io, want == Want::Http2, false, None, None, place).await;
            let begun = begun.map_err(|error| Failed::unreachable(&error, format!("{target}: {error}")))?;
            Ok(begun.lend(endpoint, |driver| async move {
                let _ = driver.await;
            }))
        }
        (Route::Mesh(_), At::Address(..)) => mesh(pool, endpoint, want).await,
        (Route::Mesh(_), At::Workload) => Err(Failed::new(RequestCause::Unreachable, "no address")),
    }
}

/// A place among the HTTP/1 connections of an address.
async fn place(endpoint: &Endpoint, want: Want, timeout: Duration) -> Result<Option<OwnedSemaphorePermit>, Failed> {
    if want == Want::Http2 {
        return Ok(None);
    }
    match tokio::time::timeout(timeout, Arc::clone(&endpoint.places1).acquire_owned()).await {
        Ok(Ok(place)) => Ok(Some(place)),
        _ => Err(Failed::new(RequestCause::Overloaded, "all HTTP/1 connections to the address are in use")),
    }
}

async fn mesh(pool: &Arc<Pool>, endpoint: &Arc<Endpoint>, want: Want) -> Result<Lease, Failed> {
    let (Route::Mesh(route), At::Address(address, name)) = (&pool.route, &endpoint.at) else {
        return Err(Failed::new(RequestCause::Unreachable, "no address"));
    };
    let mut connection =
        Connection::open(&pool.shared, Direction::Outbound, Carries::Pool, &pool.listener, Client::Pool);
    let Some(tls) = route.tls.clone() else {
        connection.handshake(&crate::proxy::inbound::refused(
            Direction::Outbound,
            crate::tls::reason::Reason::NoIdentity,
            "we have no SVID that may be used",
        ));
        return Err(Failed::new(RequestCause::Unreachable, "we have no SVID that may be used"));
    };
    let local = tls.identity().svid.id().clone();
    connection.set_local(&local);
    connection.upstream = Some(format!("{} ({address})", name.to_str()));
    let place = place(endpoint, want, route.connect_timeout).await?;
    let dialled = route.dialer.upstream(*address, route.connect_timeout).await.map_err(|error| {
        connection.end(Cause::Unreachable, format!("{address}: {error}"));
        Failed::unreachable(&error, format!("{address}: {error}"))
    })?;
    let offer = match want {
        Want::Http1 => Offer::Http1,
        Want::Http2 => Offer::Http2,
        Want::Tunnel => Offer::Tunnel,
    };
    let deadline = Instant::now() + route.profile.handshake_timeout;
    let (record, authenticated) =
        client::connect(ReadAhead::new(dialled.stream), name.clone(), tls, offer, &route.slots, deadline).await;
    connection.handshake(&record);
    let Some(authenticated) = authenticated else {
        let why = record.failure.map(|failure| failure.to_string()).unwrap_or_default();
        return Err(Failed::new(RequestCause::Unreachable, format!("{address}: handshake failed: {why}")));
    };
    let peer = Arc::clone(authenticated.peer());
    let negotiated = *authenticated.negotiated();
    let alpn = authenticated.alpn();
    if connection.set_peer(&peer, route.limits.max_per_peer).is_err() {
        connection.end(Cause::Limit, "connections.max_per_peer is reached");
        return Err(Failed::new(RequestCause::Overloaded, "connections.max_per_peer is reached"));
    }
    let admitted: Admitted<Authenticated> = match route.expected.admit(authenticated) {
        Ok(admitted) => admitted,
        Err((_, decision)) => {
            connection.decided(Direction::Outbound, &decision);
            connection.end(Cause::Denied, format!("rule {}", decision.rule));
            return Err(Failed::new(RequestCause::Denied, "the upstream is not whom we expect"));
        }
    };
    connection.decided(Direction::Outbound, admitted.decision());
    // Whoever swaps the state retires the pool before walking the registry, which knows the peer now.
    if pool.is_retired() {
        connection.end(Cause::Drained, "changed during the handshake");
        return Err(Failed::retired());
    }
    let expiry = deadlines(&route.limits, connection.entry(), &peer, &pool.shared.clock).peer_expiry;
    // New requests move to a fresh connection, and so to a fresh SVID, well before this one's ends.
    let retire_at = expiry.map(|at| {
        let now = Instant::now();
        now + at.saturating_duration_since(now).mul_f64(0.8)
    });
    let proof = Some(Arc::new(Proof { peer, local, negotiated }));
    let speaks2 = matches!(alpn, Alpn::Mesh | Alpn::H2);
    let begun =
        begin(admitted.into_subject().into_stream(), speaks2, alpn == Alpn::Mesh, proof, retire_at, place).await;
    let begun = begun.map_err(|error| {
        connection.end(Cause::Protocol, format!("{address}: {error}"));
        Failed::unreachable(&error, format!("{address}: {error}"))
    })?;
    if want == Want::Http1 {
        endpoint.learn(if speaks2 { Speaks::Mesh } else { Speaks::Plain });
    }
    let (number, forgetful) = (begun.number(), Arc::downgrade(endpoint));
    let forget = move || {
        if let Some(endpoint) = forgetful.upgrade() {
            endpoint.forget(number);
        }
    };
    Ok(begun.lend(endpoint, |driver| drive(driver, connection, expiry, forget)))
}

/// Drives a mesh connection to its end and writes its record.
async fn drive(mut driver: Driver, mut connection: Connection, expiry: Option<Instant>, forget: impl Fn()) {
    let entry = Arc::clone(connection.entry());
    let expired = async {
        match expiry {
            Some(at) => tokio::time::sleep_until(at.into()).await,
            None => std::future::pending().await,
        }
    };
    let cause = tokio::select! {
        biased;
        ended = &mut driver => {
            forget();
            return match ended {
                Ok(()) => connection.end(Cause::Done, ""),
                Err(error) => connection.end(cause_of(&error), error.to_string()),
            };
        }
        cause = entry.until_stopped() => cause,
        () = expired => Cause::PeerExpired,
    };
    forget();
    if cause == Cause::Drained {
        // Nothing is under way on it: with its last handle it says farewell.
        let _ = tokio::time::timeout(FAREWELL, driver).await;
    }
    connection.end(cause, "");
}

fn cause_of(error: &hyper::Error) -> Cause {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(io) = inner.downcast_ref::<io::Error>() {
            return match io.kind() {
                io::ErrorKind::UnexpectedEof => Cause::Truncated,
                io::ErrorKind::InvalidData => Cause::TlsError,
                _ => Cause::Reset,
            };
        }
        source = inner.source();
    }
    Cause::Protocol
}

/// What carries a connection on to its end.
type Driver = std::pin::Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>;

/// A connection on which HTTP has begun, not driven yet.
struct Begun {
    speaks: Speaking,
    driver: Driver,
}

enum Speaking {
    Http1(Owned1),
    Http2(Arc<Shared2>),
}

impl Begun {
    fn number(&self) -> u64 {
        match &self.speaks {
            Speaking::Http1(connection) => connection.number,
            Speaking::Http2(connection) => connection.number,
        }
    }

    /// Starts the task that drives it, and lends it.
    fn lend<F>(self, endpoint: &Arc<Endpoint>, drive: impl FnOnce(Driver) -> F) -> Lease
    where
        F: Future<Output = ()> + Send + 'static,
    {
        tokio::spawn(drive(self.driver));
        match self.speaks {
            Speaking::Http1(connection) => endpoint.lend1(connection, false),
            Speaking::Http2(connection) => {
                endpoint.share2(&connection);
                endpoint.lend2(connection, false)
            }
        }
    }
}

async fn begin<T: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    io: T,
    http2: bool,
    mesh: bool,
    proof: Option<Arc<Proof>>,
    retire_at: Option<Instant>,
    place: Option<OwnedSemaphorePermit>,
) -> io::Result<Begun> {
    let io = TokioIo::new(io);
    let begin = async {
        if http2 {
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_header_list_size(u32::try_from(MAX_RESPONSE_HEAD).unwrap_or(u32::MAX));
            if proof.is_some() {
                builder.keep_alive_interval(PING_AFTER).keep_alive_timeout(PING_TIMEOUT).keep_alive_while_idle(true);
            }
            let (sender, mut driver) = builder.handshake(io).await?;
            let connection = Arc::new(Shared2::new(sender, mesh, proof, retire_at));
            let most = Arc::clone(&connection.most);
            let driver = Box::pin(std::future::poll_fn(move |cx| {
                let ended = std::pin::Pin::new(&mut driver).poll(cx);
                most.store(driver.current_max_send_streams(), Ordering::Relaxed);
                ended
            }));
            Ok(Begun { speaks: Speaking::Http2(connection), driver })
        } else {
            let (sender, driver) = http1::Builder::new().max_buf_size(MAX_RESPONSE_HEAD).handshake(io).await?;
            let connection = Owned1::new(sender, proof, retire_at, place);
            Ok(Begun { speaks: Speaking::Http1(connection), driver: Box::pin(driver.with_upgrades()) })
        }
    };
    match tokio::time::timeout(BEGIN_TIMEOUT, begin).await {
        Ok(Ok(begun)) => Ok(begun),
        Ok(Err(error)) => {
            let error: hyper::Error = error;
            Err(io::Error::other(error))
        }
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "HTTP did not begin in time")),
    }
}
