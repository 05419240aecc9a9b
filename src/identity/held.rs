//! The SVID that is ours, and what time does to it.

use std::sync::Arc;

use super::chain::date;
use super::{Identity, Svid, TrustBundles};

/// The share of an SVID's life after which its rotation is overdue, in percent. SPIRE renews at half life.
const OVERDUE_PERCENT: u64 = 60;
/// Authorities date certificates back (SPIRE by 10 s) for peers with slow clocks: so much of the time before we first saw
/// an SVID, in seconds, is not counted as its life.
const DATED_BACK: u64 = 60;

/// The SVID that is ours now, whether it is still valid or not. All times are seconds since the Unix epoch.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) identity: Arc<Identity>,
    /// The earliest end in its path, included.
    pub(super) until: u64,
    /// The last second at which its rotation is not overdue.
    pub(super) due: u64,
    pub(super) overdue: bool,
    pub(super) expired: bool,
}

/// What has come to pass since the last look.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Passed {
    pub(super) overdue: bool,
    pub(super) expired: bool,
}

impl Held {
    /// An identity that is first seen now.
    pub(super) fn new(identity: Identity, until: u64, now: u64) -> Self {
        let facts = identity.svid.facts();
        let born = facts.not_before + now.saturating_sub(facts.not_before).min(DATED_BACK);
        let due = born + facts.not_after.saturating_sub(born) * OVERDUE_PERCENT / 100;
        Self { identity: Arc::new(identity), until, due, overdue: false, expired: false }
    }

    pub(super) fn svid(&self) -> &Arc<Svid> {
        &self.identity.svid
    }

    /// The same SVID with other bundles.
    pub(super) fn trust(&mut self, bundles: Arc<TrustBundles>, generation: u64) {
        let svid = Arc::clone(&self.identity.svid);
        self.identity = Arc::new(Identity { svid, bundles, generation });
    }

    /// Holds it against the wall clock, which may have jumped either way.
    pub(super) fn look(&mut self, now: u64) -> Passed {
        let (overdue, expired) = (now > self.due, now > self.until);
        let passed = Passed { overdue: overdue && !self.overdue, expired: expired && !self.expired };
        (self.overdue, self.expired) = (overdue, expired);
        passed
    }

    /// Why it is not fresh, if it is not.
    pub(super) fn complaints(&self, now: u64) -> Vec<String> {
        let (id, begin, end) = (self.svid().id(), self.svid().facts().not_before, date(self.until));
        if self.expired {
            return vec![format!("{id} expired at {end}")];
        }
        let mut complaints = Vec::new();
        if self.overdue {
            complaints.push(format!(
                "rotation is overdue: {id} has passed {OVERDUE_PERCENT} % of its life, it ends at {end}"
            ));
        }
        if now < begin {
            complaints.push(format!("the clock stands before the beginning of {id}, {}", date(begin)));
        }
        complaints
    }

    /// Seconds until time changes something, if it will.
    pub(super) fn next_change(&self, now: u64) -> Option<u64> {
        [self.until, self.due].into_iter().filter(|end| now <= *end).map(|end| end - now + 1).min()
    }
}
