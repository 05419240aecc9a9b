//! The one record that a connection leaves when it ends. Metric and log line both come from it.

use std::sync::Arc;
use std::time::Duration;

use crate::config::schema::PolicyMode;
use crate::identity::SpiffeId;
use crate::tls::reason::Reason;
use crate::tls::record::{Direction, Negotiated};

macro_rules! causes {
    ($( $(#[$doc:meta])* $name:ident = $word:literal; )*) => {
        /// Why a connection ended: a closed set.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Cause { $( $(#[$doc])* $name, )* }
        impl Cause {
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
    /// Both sides finished in order.
    Done = "done";
    /// The handshake with the peer failed; the record has the reason.
    Handshake = "handshake_failed";
    /// No rule admitted the peer.
    Denied = "denied";
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
}

/// What is known of a connection at its end.
#[derive(Clone, Debug)]
pub struct ConnectionRecord {
    /// The listener's name.
    pub listener: Arc<str>,
    /// Which way.
    pub direction: Direction,
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

/// Who wants to know what happens on the data path. Records are plain; the observer keeps nothing of a connection.
pub trait Observer: Send + Sync + 'static {
    /// A handshake ended, well or not.
    fn handshake(&self, record: &crate::tls::record::HandshakeRecord);
    /// A decision was made about a peer.
    fn decision(&self, direction: Direction, decision: &crate::policy::Decision);
    /// A connection was accepted.
    fn opened(&self, direction: Direction);
    /// Bytes moved on an open connection: towards the upstream, and back.
    fn moved(&self, direction: Direction, sent: u64, received: u64);
    /// A connection ended.
    fn closed(&self, record: &ConnectionRecord);
    /// Accepting failed; `kind` is one of a closed set (`descriptors`, `memory`, `other`).
    fn accept_failed(&self, listener: &str, kind: &'static str);
}
