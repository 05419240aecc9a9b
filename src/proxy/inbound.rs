//! Towards the workload: mTLS in, plaintext to the workload. Requests are judged one by one, bytes once. Captured clients
//! that speak no TLS go by [`super::plaintext`], where they are let in.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use super::capture::InboundCapture;
use super::connection::{Connection, deadlines};
use super::detect::{Detected, Outcome, Prefixed, read_until_detected};
use super::hold;
use super::http::{self, Spoken, Way};
use super::io::Plain;
use super::ledger::Fate;
use super::listener::{Accepted, Inbound, Shared};
use super::pace::Deadlines;
use super::plaintext::{self, Begins, Caller};
use super::proxy_protocol;
use super::record::{Cause, Event};
use super::registry::Known;
use super::state::InboundState;
use super::tcp::Forward;
use super::upstream::ToWorkload;
use crate::config::schema::{Connections, Detect, HttpLimits, OnDetectTimeout, Protocol, ProxyProtocol};
use crate::identity::SpiffeId;
use crate::policy::{Admitted, Subject};
use crate::tls::reason::Reason;
use crate::tls::record::{Direction, Failure, HandshakeRecord};
use crate::tls::{Alpn, Authenticated, Peer, ReadAhead, server};

/// How long the workload may take to accept.
const WORKLOAD_TIMEOUT: Duration = http::WORKLOAD_TIMEOUT;

/// The bytes of a proven peer.
struct Proven {
    stream: Prefixed<TlsStream<ReadAhead<TcpStream>>>,
    peer: Arc<Peer>,
}

impl Subject for Proven {
    fn spiffe_id(&self) -> &SpiffeId {
        self.peer.id()
    }
}

/// Bytes that may be admitted as a whole.
pub(super) trait Carried {
    /// What carries them.
    type Stream: AsyncRead + AsyncWrite + Unpin;

    /// The bytes, to be forwarded.
    fn into_stream(self) -> Self::Stream;

    /// Both sides have finished, so what is left of the stream ends in order.
    fn finished(stream: &Self::Stream);
}

impl Carried for Proven {
    type Stream = Prefixed<TlsStream<ReadAhead<TcpStream>>>;

    fn into_stream(self) -> Self::Stream {
        self.stream
    }

    /// close_notify has said so.
    fn finished(_: &Self::Stream) {}
}

/// What an opened connection carries.
enum Opened {
    /// Bytes, admitted as a whole.
    Bytes(Admitted<Proven>, ToWorkload, Deadlines),
    /// Bytes of whoever it is, let in as they are.
    Plaintext(Admitted<Caller>, ToWorkload, Deadlines),
    /// Requests, none of which is admitted yet.
    Requests(Proven, Spoken, Way, Deadlines, Arc<InboundState>),
}

pub(super) async fn serve(accepted: Accepted, listener: Arc<Inbound>, shared: Arc<Shared>) {
    let connection = opened(&accepted, &listener, &shared);
    serve_opened(connection, accepted, listener, shared).await;
}

/// Serves a captured connection that the listener takes.
pub(super) async fn serve_captured(
    accepted: Accepted,
    listener: Arc<Inbound>,
    capture: &InboundCapture,
    shared: Arc<Shared>,
) {
    let mut connection = opened(&accepted, &listener, &shared);
    // Registered first and asked again then: whoever moves the port later finds it.
    if let Some(cause) = capture.moved(connection.entry()) {
        connection.end(cause, "changed meanwhile");
        return accepted.io.abort();
    }
    serve_opened(connection, accepted, listener, shared).await;
}

fn opened(accepted: &Accepted, listener: &Inbound, shared: &Arc<Shared>) -> Connection {
    let carries = listener.state.load().protocol.into();
    Connection::open(shared, Direction::Inbound, carries, &listener.name, accepted.client)
}

async fn serve_opened(mut connection: Connection, accepted: Accepted, listener: Arc<Inbound>, shared: Arc<Shared>) {
    let Accepted { io, client, at, _place } = accepted;
    let entry = Arc::clone(connection.entry());
    // The handshake's state is large and short-lived: in a box it is gone when the long part begins.
    let opening = Box::pin(open(&mut connection, client, io, at, &listener, &shared));
    let opened = tokio::select! {
        biased;
        opened = opening => opened,
        // Told to end while opening, by a drain.
        _ = entry.until_stopped() => None,
    };
    match opened {
        None => {}
        Some(Opened::Bytes(admitted, plain, deadlines)) => {
            forward(connection, admitted, plain, deadlines, shared).await;
        }
        Some(Opened::Plaintext(admitted, plain, deadlines)) => {
            forward(connection, admitted, plain, deadlines, shared).await;
        }
        Some(Opened::Requests(proven, spoken, way, deadlines, state)) => {
            let limits = Arc::clone(&state.http_limits);
            drop(state);
            Box::pin(http::serve(proven.stream, spoken, way, connection, limits, deadlines, shared)).await;
        }
    }
}

/// Authenticates, finds out what is carried, and admits what is admitted as a whole.
async fn open(
    connection: &mut Connection,
    client: super::listener::Client,
    io: Plain,
    accepted_at: Instant,
    listener: &Arc<Inbound>,
    shared: &Arc<Shared>,
) -> Option<Opened> {
    let Plain::Tcp(stream) = io else { return None };
    let (state, began) = hold::usable(&listener.state, accepted_at, &shared.published).await;
    let Some(tls) = state.tls.clone() else {
        connection.handshake(&refused(Direction::Inbound, Reason::NoIdentity, "we have no SVID that may be used"));
        super::io::abort(&stream);
        return None;
    };
    let local = tls.identity().svid.id().clone();
    connection.set_local(&local);
    let server = stream.local_addr().ok();
    let stream = match (plaintext::look(connection, stream, client, &state).await?, &state.plaintext) {
        (Begins::Tls(stream), _) => stream,
        (Begins::Plaintext(caller), permission) => {
            let permission = permission.as_ref()?;
            let opened = plaintext::open(connection, caller, listener, &state, permission, shared).await;
            return opened.map(|(admitted, plain, deadlines)| Opened::Plaintext(admitted, plain, deadlines));
        }
    };
    let deadline = began + state.profile.handshake_timeout;
    let (record, authenticated) = server::accept(stream, tls, &state.slots, deadline).await;
    connection.handshake(&record);
    let Some(authenticated) = authenticated else {
        if record.failure.as_ref().is_some_and(|failure| failure.reason == Reason::NotTls) {
            plaintext::tell(connection, shared, Fate::Refused);
        }
        if let Some(claimed) = &record.claimed {
            connection.decided(Direction::Inbound, &state.policy.door(claimed));
        }
        return None;
    };
    let negotiated = *authenticated.negotiated();
    let (spoken, proven) = carried(connection, authenticated, &state, shared).await?;
    let peer = Arc::clone(&proven.peer);
    if spoken.is_some() {
        connection.entry().carries_requests();
    }
    if connection.set_peer(&peer, state.limits.max_per_peer).is_err() {
        connection.end(Cause::Limit, "connections.max_per_peer is reached");
        return None;
    }
    // Whatever was published since this connection took its state is looked at now that the registry knows the peer.
    let changed = |connection: &mut Connection| {
        let now = listener.state.load();
        if !Arc::ptr_eq(&now, &state)
            && let Some(cause) = now.rejudge(connection.entry(), &Known::Peer(Arc::clone(&peer)), &shared.clock)
        {
            connection.end(cause, "changed during the handshake");
            return true;
        }
        false
    };
    let limits = deadlines(&state.limits, connection.entry(), &peer, &shared.clock);
    if let Some(spoken) = spoken {
        if changed(connection) {
            return None;
        }
        connection.upstream = state.target(client).map(|target| target.to_string());
        let way = Way::inbound(Arc::clone(listener), peer, negotiated, local);
        return Some(Opened::Requests(proven, spoken, way, limits, state));
    }
    let admitted = match state.policy.admit(proven) {
        Ok(admitted) => admitted,
        Err((_, decision)) => {
            connection.decided(Direction::Inbound, &decision);
            connection.end(Cause::Denied, format!("rule {}", decision.rule));
            return None;
        }
    };
    connection.decided(Direction::Inbound, admitted.decision());
    if changed(connection) {
        return None;
    }
    let mut plain = workload(connection, &state).await?;
    if state.proxy_protocol == ProxyProtocol::V2 {
        let header = proxy_protocol::header(&client, server, peer.id(), &negotiated);
        introduce(connection, &mut plain, &header).await?;
    }
    Some(Opened::Bytes(admitted, plain, limits))
}

/// What is spoken: HTTP in some form, or none for bytes. By ALPN where it says, by the first bytes where it does not.
async fn carried(
    connection: &mut Connection,
    authenticated: Authenticated,
    state: &InboundState,
    shared: &Shared,
) -> Option<(Option<Spoken>, Proven)> {
    let (alpn, peer) = (authenticated.alpn(), Arc::clone(authenticated.peer()));
    let stream = authenticated.into_stream();
    let known = match (state.protocol, alpn) {
        (Protocol::Tcp, _) => Some(None),
        (_, Alpn::Mesh) => Some(Some(Spoken::Mesh)),
        (_, Alpn::H2) => Some(Some(Spoken::Http2)),
        (_, Alpn::Http11) => Some(Some(Spoken::Http1)),
        (Protocol::Detect, Alpn::None) if state.server_first => Some(None),
        (_, Alpn::None) => None,
    };
    if let Some(spoken) = known {
        return Some((spoken, Proven { stream: Prefixed::new(stream), peer }));
    }
    let sniffing = match state.protocol {
        Protocol::Detect => Sniffing::any(&state.detect),
        _ => Sniffing::http(&state.limits, &state.http_limits),
    };
    let (spoken, stream) = sniff(connection, stream, sniffing, shared, Direction::Inbound).await?;
    Some((spoken, Proven { stream, peer }))
}

/// How the first bytes are waited for.
pub(super) struct Sniffing {
    /// For the first one.
    first: Duration,
    /// For the others.
    rest: Duration,
    /// What becomes of a silent connection on a listener that carries bytes as well; none where only HTTP is served.
    opaque: Option<OnDetectTimeout>,
}

impl Sniffing {
    /// On a listener that carries HTTP and bytes.
    pub(super) fn any(detect: &Detect) -> Self {
        Self { first: detect.timeout.0, rest: detect.timeout.0, opaque: Some(detect.on_timeout) }
    }

    /// On a listener that carries HTTP only: its connections may be opened ahead of their use.
    pub(super) fn http(limits: &Connections, http: &HttpLimits) -> Self {
        Self { first: limits.idle_timeout.0, rest: http.header_timeout.0, opaque: None }
    }
}

/// Reads the first bytes of a stream to find out what is spoken. None where the connection ends here.
pub(super) async fn sniff<S: AsyncRead + AsyncWrite + Unpin>(
    connection: &mut Connection,
    stream: S,
    sniffing: Sniffing,
    shared: &Shared,
    direction: Direction,
) -> Option<(Option<Spoken>, Prefixed<S>)> {
    let Sniffing { first, rest, opaque } = sniffing;
    let (outcome, stream) = match read_until_detected(stream, first, rest).await {
        Ok(read) => read,
        Err(error) => {
            connection.end(Cause::Reset, error.to_string());
            return None;
        }
    };
    let listener = Arc::clone(&connection.entry().listener);
    let count = |what| {
        if opaque.is_some() {
            shared.observer.event(direction, &listener, Event::Detected(what));
        }
    };
    let spoken = match outcome {
        Outcome::Detected(Detected::Http1) => {
            count("http1");
            Some(Spoken::Http1)
        }
        Outcome::Detected(Detected::Http2) => {
            count("http2");
            Some(Spoken::Http2)
        }
        Outcome::Detected(found) => {
            count(if found == Detected::Tls { "tls" } else { "opaque" });
            if opaque.is_none() && found != Detected::Tls && !is_other_line(stream.ahead()) {
                return Some((Some(Spoken::Http1), stream));
            }
            if opaque.is_none() {
                // Not HTTP's words for whoever speaks no HTTP: an orderly end.
                connection.end(Cause::Protocol, "the first bytes are not HTTP");
                let _ = http::Lingering::new(stream).shutdown().await;
                return None;
            }
            None
        }
        Outcome::TimedOut if opaque.is_none() && !stream.ahead().is_empty() => Some(Spoken::Http1),
        Outcome::TimedOut => {
            count("timeout");
            if opaque != Some(OnDetectTimeout::Opaque) {
                let idle = opaque.is_none();
                let cause = if idle { Cause::Idle } else { Cause::Protocol };
                connection.end(cause, "no protocol was recognised in time");
                return None;
            }
            None
        }
        Outcome::Closed => {
            // Too few bytes to tell, and no more will come: they are carried, if bytes are.
            if stream.ahead().is_empty() {
                connection.end(Cause::Done, "closed before it said anything");
                return None;
            }
            count("opaque");
            opaque.is_none().then_some(Spoken::Http1)
        }
    };
    Some((spoken, stream))
}

/// Whether these bytes begin with a whole line that is none of HTTP/1; anything else may be a bad request of it, which is
/// answered.
fn is_other_line(bytes: &[u8]) -> bool {
    let line = bytes.split_inclusive(|byte| *byte == b'\n').next().unwrap_or_default();
    line.ends_with(b"\n") && !line.windows(6).any(|window| window == b"HTTP/1")
}

/// Dials the workload.
pub(super) async fn workload(connection: &mut Connection, state: &InboundState) -> Option<ToWorkload> {
    let client = connection.entry().client;
    let target = state.target(client)?;
    connection.upstream = Some(target.to_string());
    match target.connect(&state.dialer, client.address(), WORKLOAD_TIMEOUT).await {
        Ok(plain) => Some(plain),
        Err(error) => {
            connection.end(Cause::Unreachable, format!("{target}: {error}"));
            None
        }
    }
}

/// Says to the workload who comes.
async fn introduce(connection: &mut Connection, plain: &mut ToWorkload, header: &[u8]) -> Option<()> {
    let written = tokio::time::timeout(WORKLOAD_TIMEOUT, plain.write_all(header)).await;
    match written.unwrap_or(Err(std::io::ErrorKind::TimedOut.into())) {
        Ok(()) => Some(()),
        Err(error) => {
            let target = connection.upstream.clone().unwrap_or_default();
            connection.end(Cause::Unreachable, format!("{target}: {error}"));
            None
        }
    }
}

async fn forward<T: Carried>(
    mut connection: Connection,
    admitted: Admitted<T>,
    mut plain: ToWorkload,
    deadlines: Deadlines,
    shared: Arc<Shared>,
) {
    let mut remote = admitted.into_subject().into_stream();
    let entry = Arc::clone(connection.entry());
    let carries = connection.carries();
    let end = Forward::new(&mut remote, &mut plain, entry.stopper(), deadlines, |sent, received| {
        connection.sent += sent;
        connection.received += received;
        shared.observer.moved(Direction::Inbound, carries, sent, received);
    })
    .await;
    if end.cause == Cause::Done {
        T::finished(&remote);
    } else {
        plain.abort();
    }
    connection.end(end.cause, end.detail);
}

/// The record of a handshake that was refused before its first byte.
pub(super) fn refused(direction: Direction, reason: Reason, detail: &str) -> HandshakeRecord {
    HandshakeRecord {
        direction,
        took: Duration::ZERO,
        computing: Duration::ZERO,
        negotiated: None,
        peer: None,
        claimed: None,
        failure: Some(Failure::new(reason, detail)),
        offered_weak: Vec::new(),
    }
}
