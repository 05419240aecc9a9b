//! What a forwarder keeps of time and numbers: its deadlines, and how many bytes it has told of.
//!
//! In: totals of bytes and whether one side has finished. Out: the bytes since the last time, to whoever counts them, and
//! the cause when a deadline has passed. That bytes move costs no look at a timer: it is set anew when it fires.

use std::future::Future;
use std::pin::Pin;
use std::task::Context;
use std::time::{Duration, Instant};

use tokio::time::Sleep;

use super::record::Cause;

/// Times after which a connection ends.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// Without a byte in either direction.
    pub idle: Duration,
    /// Without a byte, once one side has finished.
    pub half_closed: Duration,
    /// When it has reached its age.
    pub max_age: Option<Instant>,
    /// When the peer's SVID expires.
    pub peer_expiry: Option<Instant>,
}

/// Of one connection. `progress` hears how many bytes came from one side and from the other since the last call.
#[derive(Debug)]
pub(super) struct Pace<F> {
    deadlines: Deadlines,
    progress: F,
    told: (u64, u64),
    half_closed: bool,
    last: Instant,
    sleep: Pin<Box<Sleep>>,
}

impl<F> Pace<F> {
    pub(super) fn new(deadlines: Deadlines, progress: F) -> Self {
        let last = Instant::now();
        let sleep = Box::pin(tokio::time::sleep_until(last.into()));
        let mut pace = Self { deadlines, progress, told: (0, 0), half_closed: false, last, sleep };
        pace.reset(None);
        pace
    }

    /// So many bytes have come from one side and from the other by now.
    pub(super) fn moved(&mut self, by_now: (u64, u64))
    where
        F: FnMut(u64, u64),
    {
        let since = (by_now.0 - self.told.0, by_now.1 - self.told.1);
        if since != (0, 0) {
            self.told = by_now;
            self.last = Instant::now();
            (self.progress)(since.0, since.1);
        }
    }

    /// For a deadline that may come earlier than those before.
    pub(super) fn reset(&mut self, also: Option<(Instant, Cause)>) {
        let next = self.next(also).0;
        self.sleep.as_mut().reset(next.into());
    }

    /// What has passed, if anything. That a side has finished counts as a movement.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        half_closed: bool,
        also: Option<(Instant, Cause)>,
    ) -> Option<Cause> {
        if half_closed != self.half_closed {
            self.half_closed = half_closed;
            self.last = Instant::now();
            self.reset(also);
        }
        while self.sleep.as_mut().poll(cx).is_ready() {
            let (at, cause) = self.next(also);
            if at <= Instant::now() {
                return Some(cause);
            }
            self.sleep.as_mut().reset(at.into());
        }
        None
    }

    /// The deadline that comes first, and what it means.
    fn next(&self, also: Option<(Instant, Cause)>) -> (Instant, Cause) {
        let quiet = if self.half_closed {
            (self.last + self.deadlines.half_closed, Cause::HalfClosed)
        } else {
            (self.last + self.deadlines.idle, Cause::Idle)
        };
        let fixed = [
            self.deadlines.max_age.map(|at| (at, Cause::MaxAge)),
            self.deadlines.peer_expiry.map(|at| (at, Cause::PeerExpired)),
            also,
        ];
        fixed.into_iter().flatten().fold(quiet, |first, other| if other.0 < first.0 { other } else { first })
    }
}
