//! One connection's numbers, from accept to end: whoever drops it writes the record.

use std::sync::Arc;

use super::capture::First;
use super::listener::{Client, Shared};
use super::passthrough::Passed;
use super::record::{Carries, Cause, ConnectionRecord, Watched};
use super::registry::{Entry, Registration, TooMany};
use crate::clock::Clock;
use crate::config::schema::{Connections, OnPeerExpiry};
use crate::identity::SpiffeId;
use crate::policy::Decision;
use crate::tls::Peer;
use crate::tls::reason::Reason;
use crate::tls::record::{Direction, HandshakeRecord, Negotiated};

use super::pace::Deadlines;
use super::tcp::End;

/// A connection that is registered and will leave a record.
pub(super) struct Connection {
    shared: Arc<Shared>,
    carries: Carries,
    registration: Registration,
    local: Option<SpiffeId>,
    decision: Option<Decision>,
    tls: Option<Negotiated>,
    watched: Option<Watched>,
    handshake_failure: Option<Reason>,
    pub(super) upstream: Option<String>,
    pub(super) sent: u64,
    pub(super) received: u64,
    end: Option<End>,
}

impl Connection {
    pub(super) fn open(
        shared: &Arc<Shared>,
        direction: Direction,
        carries: Carries,
        listener: &Arc<str>,
        client: Client,
    ) -> Self {
        shared.observer.opened(direction, carries);
        Self {
            carries,
            registration: shared.registry.register(direction, Arc::clone(listener), client),
            shared: Arc::clone(shared),
            local: None,
            decision: None,
            tls: None,
            watched: None,
            handshake_failure: None,
            upstream: None,
            sent: 0,
            received: 0,
            end: None,
        }
    }

    pub(super) fn carries(&self) -> Carries {
        self.carries
    }

    pub(super) fn entry(&self) -> &Arc<Entry> {
        self.registration.entry()
    }

    pub(super) fn set_local(&mut self, id: &SpiffeId) {
        self.local = Some(id.clone());
    }

    /// Tells of a handshake and keeps what the record needs.
    pub(super) fn handshake(&mut self, record: &HandshakeRecord) {
        self.shared.observer.handshake(record);
        self.tls = record.negotiated;
        self.handshake_failure = record.failure.as_ref().map(|failure| failure.reason);
        if let Some(failure) = &record.failure {
            let cause = if failure.reason == Reason::Denied { Cause::Denied } else { Cause::Handshake };
            self.end(cause, failure.to_string());
        }
    }

    pub(super) fn decided(&mut self, direction: Direction, decision: &Decision) {
        self.shared.observer.decision(direction, decision);
        self.decision = Some(decision.clone());
    }

    pub(super) fn set_peer(&mut self, peer: &Arc<Peer>, most: usize) -> Result<(), TooMany> {
        self.registration.set_peer(peer, most)
    }

    pub(super) fn set_unproven(&mut self) {
        self.registration.set_unproven();
    }

    /// Keeps the words by which its listener was picked, where they were asked.
    pub(super) fn set_heard(&mut self, first: Option<First>) {
        self.registration.set_heard(first);
    }

    pub(super) fn set_passing(&mut self, passed: &Arc<Passed>) {
        self.registration.set_passing(passed);
    }

    /// Keeps what was seen of TLS that is not ours.
    pub(super) fn watched(&mut self, watched: Watched) {
        self.watched = Some(watched);
    }

    pub(super) fn end(&mut self, cause: Cause, detail: impl Into<String>) {
        self.end = Some(End { cause, detail: detail.into() });
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let entry = self.registration.entry();
        // A task that was dropped unfinished was told to, or the runtime is going down.
        let end = self
            .end
            .take()
            .unwrap_or_else(|| End { cause: entry.stopped().unwrap_or(Cause::Drained), detail: String::new() });
        let record = ConnectionRecord {
            listener: Arc::clone(&entry.listener),
            direction: entry.direction,
            carries: self.carries,
            client: entry.client.to_string(),
            upstream: self.upstream.take(),
            peer: entry.peer().map(|peer| peer.id().clone()),
            local: self.local.take(),
            rule: self.decision.take().map(|decision| (decision.rule, decision.mode)),
            tls: self.tls,
            watched: self.watched,
            handshake_failure: self.handshake_failure,
            bytes_sent: self.sent,
            bytes_received: self.received,
            duration: entry.opened.elapsed(),
            cause: end.cause,
            detail: end.detail,
        };
        self.shared.observer.closed(&record);
    }
}

/// The deadlines of a connection that has no peer of its own: its requests go over connections that have.
pub(super) fn lone_deadlines(limits: &Connections, entry: &Entry) -> Deadlines {
    Deadlines {
        idle: limits.idle_timeout.0,
        half_closed: limits.half_closed_timeout.0,
        max_age: limits.max_age.and_then(|age| entry.opened.checked_add(age.0)),
        peer_expiry: None,
    }
}

/// The deadlines of a connection whose peer is known.
pub(super) fn deadlines(limits: &Connections, entry: &Entry, peer: &Peer, clock: &Clock) -> Deadlines {
    let left = std::time::Duration::from_secs((peer.not_after() + 1).saturating_sub(clock.now()));
    Deadlines {
        peer_expiry: (limits.on_peer_expiry == OnPeerExpiry::Close)
            .then(|| std::time::Instant::now().checked_add(left))
            .flatten(),
        ..lone_deadlines(limits, entry)
    }
}
