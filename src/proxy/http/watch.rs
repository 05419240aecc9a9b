//! The clock of one HTTP connection: its age, its peer's SVID, and whether anything still moves.
//!
//! In: the deadlines, and how far the connection has got. Out: what is due.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::downstream::Downstream;
use crate::proxy::pace::Deadlines;
use crate::proxy::record::Cause;

/// What a connection's timer has found.
pub(super) enum Due {
    Nothing,
    /// Nothing new begins on it.
    Shut,
    /// Its age is reached.
    Drain,
    /// It is over.
    Stop(Cause),
}

/// The deadlines of a connection, and when it last got on.
pub(super) struct Watch {
    deadlines: Deadlines,
    /// When an HTTP/1 connection that drains is closed although nothing was asked on it.
    shut: Option<Instant>,
    looked: Instant,
    seen: u64,
}

impl Watch {
    pub(super) fn new(deadlines: &Deadlines) -> Self {
        Self { deadlines: *deadlines, shut: None, looked: Instant::now(), seen: 0 }
    }

    /// Nothing more begins after so long.
    pub(super) fn shut_after(&mut self, wait: Duration) {
        self.shut = Instant::now().checked_add(wait);
    }

    /// When to look next.
    pub(super) fn next(&self) -> Instant {
        let still = self.looked + self.deadlines.idle;
        let fixed = [self.deadlines.max_age, self.deadlines.peer_expiry, self.shut];
        fixed.into_iter().flatten().fold(still, Instant::min)
    }

    /// What is due. A connection on which nothing has moved between two looks has stood still for `idle`, whether nothing
    /// was asked on it or its client takes no answer.
    pub(super) fn look(&mut self, down: &Downstream) -> Due {
        let now = Instant::now();
        let passed = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if passed(self.deadlines.peer_expiry) {
            return Due::Stop(Cause::PeerExpired);
        }
        if passed(self.deadlines.max_age) {
            self.deadlines.max_age = None;
            return Due::Drain;
        }
        if passed(self.shut) {
            self.shut = None;
            return Due::Shut;
        }
        if self.looked + self.deadlines.idle <= now {
            let progress = down.progress.load(Ordering::Relaxed);
            if progress == self.seen {
                return Due::Stop(Cause::Idle);
            }
            (self.seen, self.looked) = (progress, now);
        }
        Due::Nothing
    }
}
