//! The record that each handshake leaves, accepted or refused, in both directions.

use std::time::Duration;

use super::reason::Reason;
use crate::identity::{KeyType, SpiffeId};

/// Which way a connection goes, seen from the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Towards the workload: we are the TLS server.
    Inbound,
    /// From the workload: we are the TLS client.
    Outbound,
}

impl Direction {
    /// The label value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// What was negotiated. All texts are of closed sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Negotiated {
    /// `TLSv1.3` or `TLSv1.2`.
    pub version: &'static str,
    /// IANA name of the suite.
    pub cipher_suite: &'static str,
    /// IANA name of the group.
    pub group: &'static str,
    /// IANA name of the scheme the peer signed with; `none` when resumed.
    pub signature: &'static str,
    /// The peer's key.
    pub peer_key: KeyType,
    /// Whether the session was resumed.
    pub resumed: bool,
    /// Whether all of this lies within the declared profile.
    pub compliant: bool,
}

/// One handshake.
#[derive(Clone, Debug)]
pub struct HandshakeRecord {
    /// Which way.
    pub direction: Direction,
    /// From the first byte to the end.
    pub took: Duration,
    /// The part of `took` that was our own computing (and system calls); the rest was waiting for the network.
    pub computing: Duration,
    /// What was negotiated, if it got that far.
    pub negotiated: Option<Negotiated>,
    /// The peer, if proven.
    pub peer: Option<SpiffeId>,
    /// Whose certificate was shown where the refusal came before the proof of possession: the chain is good, the
    /// holder may be another.
    pub claimed: Option<SpiffeId>,
    /// Why it failed; none if it did not.
    pub failure: Option<Failure>,
    /// What the peer offered below the profile (closed set: `SSLv3`, `TLSv1.0`, `TLSv1.1`, `3DES`, `RC4`, `CBC`, …).
    pub offered_weak: Vec<&'static str>,
}

/// A failure: the word, and the details for a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The word.
    pub reason: Reason,
    /// Details in words: by how many seconds expired, which ID, which alert.
    pub detail: String,
}

impl Failure {
    /// A failure with details.
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.detail.is_empty() { self.reason.fmt(f) } else { write!(f, "{}: {}", self.reason, self.detail) }
    }
}
