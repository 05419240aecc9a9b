//! What the rest of the house sees of our identity, and its state.
//!
//! In: what the keeper found. Out: [`Current`], published only when something in it changed.

use std::sync::Arc;

use tokio::sync::watch;

use super::Identity;

/// How good the current identity is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SvidState {
    /// None has come yet, or it was withdrawn.
    Absent,
    /// Valid, and the source is well.
    Fresh,
    /// Valid, but the source cannot be reached, the rotation is overdue or what the source offers now is refused.
    Stale,
    /// Past its end: nothing is done with it.
    Expired,
}

/// What the rest of the house sees: the identity if one may be used, and the state.
#[derive(Clone, Debug)]
pub struct Current {
    /// The identity, only while it may be used (fresh or stale).
    pub identity: Option<Arc<Identity>>,
    /// Its state.
    pub state: SvidState,
    /// In words, why the state is not fresh; empty when it is.
    pub why: String,
    /// When the state began, seconds since the Unix epoch; 0 before the first.
    pub since: u64,
    /// The generation of the latest identity, also when it may no longer be used; 0 before the first.
    pub generation: u64,
    /// Until when the latest SVID and its chain are valid, seconds since the Unix epoch, that second included; also when
    /// that has passed.
    pub not_after: Option<u64>,
    /// When the source last gave a full set, seconds since the Unix epoch.
    pub last_update: Option<u64>,
    /// When our leaf certificate was last replaced by another one (or first taken), seconds since the Unix epoch.
    pub last_rotation: Option<u64>,
    /// The SVID has passed 60 % of its life and no newer one has come: alarm.
    pub rotation_overdue: bool,
    /// Whether the source can be reached.
    pub source_reachable: bool,
    /// Why the SVID that the source offers now, or a part of its set, is not taken; empty when all is.
    pub refused: Vec<String>,
    /// What has happened so far.
    pub counters: Counters,
}

/// What has happened since the start. Each only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Our leaf certificate was replaced by another one; the first one is no rotation.
    pub rotations: u64,
    /// A leaf certificate was offered as ours and refused (each counted once).
    pub refused: u64,
    /// Rotation became overdue.
    pub overdue: u64,
    /// The identity was withdrawn: the source no longer names it.
    pub withdrawn: u64,
    /// The identity expired while it was the current one.
    pub expired: u64,
    /// The source became unreachable.
    pub outages: u64,
    /// Trust bundles or revocation lists changed.
    pub trust_changes: u64,
}

impl Default for Current {
    fn default() -> Self {
        Self {
            identity: None,
            state: SvidState::Absent,
            why: "no identity has come yet".into(),
            since: 0,
            generation: 0,
            not_after: None,
            last_update: None,
            last_rotation: None,
            rotation_overdue: false,
            source_reachable: false,
            refused: Vec::new(),
            counters: Counters::default(),
        }
    }
}

impl Current {
    /// Whether nothing differs that anybody would look at.
    fn same_as(&self, other: &Self) -> bool {
        let same_identity = match (&self.identity, &other.identity) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (a, b) => a.is_none() && b.is_none(),
        };
        same_identity
            && self.state == other.state
            && self.why == other.why
            && self.generation == other.generation
            && self.not_after == other.not_after
            && self.last_update == other.last_update
            && self.last_rotation == other.last_rotation
            && self.rotation_overdue == other.rotation_overdue
            && self.source_reachable == other.source_reachable
            && self.refused == other.refused
            && self.counters == other.counters
    }
}

/// Publishes what has changed, if anything has, and tells a log when the state is another one.
pub(super) fn publish(out: &watch::Sender<Current>, mut next: Current) {
    out.send_if_modified(|current| {
        if current.same_as(&next) {
            return false;
        }
        if current.state == next.state && current.since != 0 {
            next.since = current.since;
        } else {
            announce(&next, current.since == 0);
        }
        *current = next;
        true
    });
}

fn announce(current: &Current, first: bool) {
    let why = &current.why;
    match current.state {
        SvidState::Absent if first => tracing::info!("waiting for an identity: {why}"),
        SvidState::Fresh => tracing::info!("our identity is fresh"),
        SvidState::Stale => tracing::warn!("our identity is stale, and used until it expires: {why}"),
        SvidState::Expired => tracing::error!("our identity has expired, nothing is served: {why}"),
        SvidState::Absent => tracing::warn!("we have no identity, nothing is served: {why}"),
    }
}
