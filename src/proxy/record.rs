//! The one record that a connection leaves when it ends, and the one of each request. Metrics, log lines and spans come
//! from them.

use std::sync::Arc;
use std::time::Duration;

use crate::config::schema::{PolicyMode, Protocol};
use crate::identity::SpiffeId;
use crate::tls::flight::Picked;
use crate::tls::reason::Reason;
use crate::tls::record::{Direction, Negotiated};

/// A closed set of reasons with their words.
macro_rules! causes {
    ($(#[$about:meta])* $set:ident { $( $(#[$doc:meta])* $name:ident = $word:literal; )* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $set { $( $(#[$doc])* $name, )* }
        impl $set {
            /// All of them, in the order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];
            /// The word in metrics and logs.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word,)* }
            }
        }
    };
}

causes! {
    /// Why a connection ended: a closed set.
    Cause {
    /// Both sides finished in order.
    Done = "done";
    /// The handshake with the peer failed; the record has the reason.
    Handshake = "handshake_failed";
    /// No rule admitted the peer.
    Denied = "denied";
    /// It came to a capture port without having been captured, so it was for nobody.
    NotCaptured = "not_captured";
    /// It was captured, and is one that we have opened ourselves: the rules send our own connections back to us.
    Loop = "loop";
    /// It was captured, and no listener takes what it was for.
    Undeclared = "undeclared";
    /// The process-wide or per-peer cap on connections was reached.
    Limit = "limit";
    /// The workload or the upstream could not be reached.
    Unreachable = "unreachable";
    /// A TLS peer vanished without close_notify: what was received may be cut short.
    Truncated = "truncated";
    /// A side reset the connection or the network failed.
    Reset = "reset";
    /// No byte moved for `idle_timeout`.
    Idle = "idle_timeout";
    /// One side finished and the other was silent for `half_closed_timeout`.
    HalfClosed = "half_closed_timeout";
    /// The connection reached `max_age`.
    MaxAge = "max_age";
    /// A change of policy no longer admits the peer.
    PolicyChanged = "policy_changed";
    /// A change of trust bundles no longer verifies the peer.
    BundleChanged = "bundle_changed";
    /// The peer's certificate was revoked.
    Revoked = "revoked";
    /// The peer's SVID expired.
    PeerExpired = "peer_expired";
    /// Our own identity expired or was withdrawn.
    OwnExpired = "own_identity_gone";
    /// The listener was removed or the process was told to stop, and the drain time was over.
    Drained = "drained";
    /// The TLS protocol was broken after the handshake.
    TlsError = "tls_error";
    /// It was TLS of the workload's own, and its server picked something below the declared profile, or could not be
    /// understood.
    WeakTls = "weak_tls";
    /// The bytes were not what the listener carries: no protocol was recognised in time, or a broken one.
    Protocol = "protocol";
    }
}

causes! {
    /// How a request ended: a closed set.
    RequestCause {
    /// The response was delivered whole.
    Done = "done";
    /// No rule admitted it.
    Denied = "denied";
    /// It was for a host that belongs to another listener than the one that has captured the connection.
    Misdirected = "misdirected";
    /// It was not one well-formed, unambiguous request, or larger than allowed.
    BadRequest = "bad_request";
    /// No connection to the workload or the upstream could be had.
    Unreachable = "unreachable";
    /// No answer within the request's time.
    Timeout = "timeout";
    /// Too much is under way already.
    Overloaded = "overloaded";
    /// The workload or the upstream broke off, or did not speak HTTP.
    UpstreamReset = "upstream_reset";
    /// Whoever asked went away before the response was whole.
    ClientReset = "client_reset";
    /// The body stood still for longer than allowed.
    BodyTimeout = "body_timeout";
    /// A change of policy no longer admits it.
    PolicyChanged = "policy_changed";
    /// The connection that carried it was told to end: see the connection's own record.
    ConnectionEnded = "connection_ended";
    }
}

/// The HTTP version that a request came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HttpVersion {
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    Http2,
}

impl HttpVersion {
    /// As OpenTelemetry's `network.protocol.version` has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http10 => "1.0",
            Self::Http11 => "1.1",
            Self::Http2 => "2",
        }
    }
}

/// What one HTTP request leaves behind when it ends: metric, log line and span come from it.
#[derive(Clone, Debug)]
pub struct RequestRecord {
    /// The listener's name.
    pub listener: Arc<str>,
    /// Which way.
    pub direction: Direction,
    /// Who connected to us.
    pub client: super::listener::Client,
    /// The peer's SPIFFE ID: inbound who asks, outbound who answers; none where nobody was reached.
    pub peer: Option<SpiffeId>,
    /// Our own SPIFFE ID.
    pub local: Option<SpiffeId>,
    /// What was negotiated with the peer.
    pub tls: Option<Negotiated>,
    /// Where it was sent, as declared in the config.
    pub upstream: Option<Arc<str>>,
    /// The rule that decided, and in which mode.
    pub rule: Option<(Arc<str>, PolicyMode)>,
    /// The declared pattern that its path matched, out of the config and never out of the request; `*` where none did.
    pub route: Arc<str>,
    /// The method.
    pub method: http::Method,
    /// The host it was for, without the port; empty where it named none.
    pub host: Box<str>,
    /// The path as it was judged, without the query, which may hold secrets.
    pub path: Box<str>,
    /// The version it came in.
    pub version: HttpVersion,
    /// The status that was answered; none if whoever asked was gone before.
    pub status: Option<u16>,
    /// gRPC's own status, where it was one.
    pub grpc_status: Option<u16>,
    /// Body bytes from who asked.
    pub bytes_sent: u64,
    /// Body bytes back.
    pub bytes_received: u64,
    /// When its head was whole.
    pub began: std::time::SystemTime,
    /// From there to the end of the response.
    pub duration: Duration,
    /// How often it was sent upstream: 1 without a retry, 0 if never.
    pub attempts: u32,
    /// How it ended.
    pub cause: RequestCause,
    /// Details in words.
    pub detail: String,
    /// The trace it belongs to, and our span in it.
    pub trace: Option<TraceContext>,
}

/// A place in a distributed trace (W3C Trace Context, section 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace.
    pub trace_id: [u8; 16],
    /// Our own span.
    pub span_id: [u8; 8],
    /// The span that ours is part of, if there was one.
    pub parent: Option<[u8; 8]>,
    /// Whether the span is to be exported.
    pub sampled: bool,
}

/// What a connection was opened for: the label of its metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Carries {
    /// Bytes.
    Tcp,
    /// HTTP.
    Http,
    /// Either, as its first bytes say.
    Detect,
    /// Our own requests, on a connection that is kept for them.
    Pool,
}

impl Carries {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Tcp, Self::Http, Self::Detect, Self::Pool];

    /// The label value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Http => "http",
            Self::Detect => "detect",
            Self::Pool => "pool",
        }
    }
}

impl From<Protocol> for Carries {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self::Tcp,
            Protocol::Http => Self::Http,
            Protocol::Detect => Self::Detect,
        }
    }
}

/// What is known of a connection at its end.
#[derive(Clone, Debug)]
pub struct ConnectionRecord {
    /// The listener's name.
    pub listener: Arc<str>,
    /// Which way.
    pub direction: Direction,
    /// What it was opened for.
    pub carries: Carries,
    /// Address of who connected, as text (`unix` for a Unix socket).
    pub client: String,
    /// Where it went to, as text, if it was dialled.
    pub upstream: Option<String>,
    /// The peer's SPIFFE ID, if proven.
    pub peer: Option<SpiffeId>,
    /// Our own SPIFFE ID, if we had one.
    pub local: Option<SpiffeId>,
    /// The rule that decided, and in which mode.
    pub rule: Option<(Arc<str>, PolicyMode)>,
    /// What was negotiated.
    pub tls: Option<Negotiated>,
    /// What was seen of TLS that is not ours and passes through.
    pub watched: Option<Watched>,
    /// Why the handshake failed, if it did.
    pub handshake_failure: Option<Reason>,
    /// Bytes from who connected towards the upstream.
    pub bytes_sent: u64,
    /// Bytes from the upstream towards who connected.
    pub bytes_received: u64,
    /// From accept to end.
    pub duration: Duration,
    /// Why it ended.
    pub cause: Cause,
    /// Details in words.
    pub detail: String,
}

/// What the server of a watched connection has picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watched {
    /// What it is.
    pub picked: Picked,
    /// Whether it lies within the declared profile.
    pub compliant: bool,
}

/// What the data path tells besides beginnings and ends. Names in it come out of closed sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A `detect` listener made up its mind: `tls`, `http1`, `http2`, `opaque`, or `timeout`.
    Detected(&'static str),
    /// A connection was plaintext, and what became of it.
    Plaintext(super::ledger::Fate),
    /// A request was sent once more.
    Retried,
    /// A request could have been sent once more, and the budget was used up.
    RetryRefused,
    /// An address of an upstream gets no more requests for a while.
    Ejected,
    /// An address of an upstream gets requests again.
    Restored,
    /// The shadow Rego module would have decided otherwise.
    ShadowDiffered,
    /// TLS passes through whose server has picked this.
    PassedTls(Watched),
    /// TLS passes through whose client has offered something below the profile ([`crate::tls::hello::WEAK`]).
    OfferedWeak(&'static str),
    /// Something passes through in clear.
    PassedPlaintext,
    /// A Rego module gave no answer, which is a refusal: `time`, `evaluation`, `no_facts`, `not_loaded`.
    ModuleFailed(&'static str),
}

/// Who wants to know what happens on the data path. Records are plain; the observer keeps nothing of a connection.
pub trait Observer: Send + Sync + 'static {
    /// A handshake ended, well or not.
    fn handshake(&self, record: &crate::tls::record::HandshakeRecord);
    /// A decision was made about a peer.
    fn decision(&self, direction: Direction, decision: &crate::policy::Decision);
    /// A connection was accepted.
    fn opened(&self, direction: Direction, carries: Carries);
    /// Bytes moved: towards the upstream, and back. Of requests those of their bodies, when they end.
    fn moved(&self, direction: Direction, carries: Carries, sent: u64, received: u64);
    /// A connection ended.
    fn closed(&self, record: &ConnectionRecord);
    /// Something worth counting that is no end of anything.
    fn event(&self, direction: Direction, listener: &Arc<str>, event: Event);
    /// A request's head has arrived.
    fn request_begun(&self, direction: Direction);
    /// A request ended.
    fn request(&self, record: &RequestRecord);
    /// Accepting failed; `kind` is one of a closed set (`descriptors`, `memory`, `other`).
    fn accept_failed(&self, listener: &str, kind: &'static str);
}
