//! How a story is told: things that are promised are waited for, shown and ticked off, at a pace that a person can follow.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ledger::{Ledger, Promise};
use super::rotations::Rotations;
use super::screen::{Screen, Tone, grouped};
use super::workloads::Tally;

/// How long anything may take to be seen; then it was not.
const PATIENCE: Duration = Duration::from_secs(8);
/// How far beyond its time the story may go while something is waited for.
const OVERTIME: Duration = Duration::from_secs(15);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// The beginning of a serial number, enough to tell one from another by eye.
pub(super) fn short(serial: &str) -> String {
    serial.chars().filter(|c| *c != ':').take(8).collect()
}

/// A story under way that promises to show things of one kind.
pub(super) struct Telling<'s, 'out, P> {
    pub(super) screen: &'s mut Screen<'out>,
    pub(super) ledger: &'s mut Ledger<P>,
    /// How long it is to take.
    pub(super) total: Duration,
    /// What came of the traffic so far, once it has begun.
    pub(super) tally: Option<Arc<Tally>>,
}

impl<P: Promise> Telling<'_, '_, P> {
    /// Until when to wait for what should be seen now.
    pub(super) fn end_of_patience(&self) -> Instant {
        (Instant::now() + PATIENCE).min(self.screen.began() + self.total + OVERTIME)
    }

    /// Asks again until there is an answer or patience ends.
    pub(super) async fn until<T>(&mut self, mut ask: impl AsyncFnMut() -> Option<T>) -> io::Result<Option<T>> {
        let end = self.end_of_patience();
        loop {
            if let Some(answer) = ask().await {
                return Ok(Some(answer));
            }
            if Instant::now() >= end {
                return Ok(None);
            }
            self.progress()?;
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Draws how far the story is, and how the traffic fares.
    pub(super) fn progress(&mut self) -> io::Result<()> {
        let (requests, failures) = self.tally.as_ref().map_or((0, 0), |tally| tally.counts());
        let done = self.screen.began().elapsed().as_secs_f64() / self.total.as_secs_f64();
        self.screen.progress(done, &format!("{} requests, {failures} failures", grouped(requests)))
    }

    /// Leaves the reader time, up to a part of the whole.
    pub(super) async fn rest_until(&mut self, part: f64) -> io::Result<()> {
        let end = self.screen.began() + self.total.mul_f64(part);
        while Instant::now() < end {
            self.progress()?;
            tokio::time::sleep(LOOK.min(end.saturating_duration_since(Instant::now()))).await;
        }
        self.screen.rest()
    }

    /// Ticks a thing off and says so, or says that it was not seen.
    pub(super) fn seen(&mut self, promise: P, seen: bool, word: &str, what: &str) -> io::Result<()> {
        if self.ledger.tick(promise, seen) {
            let tone = if word == "refused" { Tone::Refused } else { Tone::Good };
            self.screen.tell(tone, word, what)
        } else {
            self.screen.tell(Tone::Bad, "NOT SEEN", promise.words())
        }
    }

    /// Shows rotations as they come until all of these sidecars have had one. True if they had.
    pub(super) async fn rotations(&mut self, rotations: &Rotations, names: &[&'static str]) -> io::Result<bool> {
        let mut waiting = names.to_vec();
        let end = self.end_of_patience();
        while !waiting.is_empty() && Instant::now() < end {
            for rotation in rotations.take() {
                waiting.retain(|name| *name != rotation.name);
                let (before, after) = (short(&rotation.before), short(&rotation.after));
                let what =
                    format!("/{:<9} SVID {before} -> {after}  generation {}", rotation.name, rotation.generation);
                self.screen.tell(Tone::Good, "rotated", &what)?;
            }
            self.progress()?;
            tokio::time::sleep(LOOK).await;
        }
        Ok(waiting.is_empty())
    }

    /// Says how the traffic fares.
    pub(super) fn tally(&mut self, when: &str) -> io::Result<()> {
        let Some(tally) = &self.tally else { return Ok(()) };
        let (requests, failures) = tally.counts();
        let tone = if failures == 0 { Tone::Plain } else { Tone::Bad };
        let what = format!("{when}: {} requests so far, {failures} failures", grouped(requests));
        self.screen.tell(tone, "traffic", &what)
    }

    /// Ticks off that there was traffic and none of it failed, or says what failed.
    pub(super) fn no_failure(&mut self, promise: P) -> io::Result<()> {
        let Some(tally) = &self.tally else { return Ok(()) };
        let (requests, failures) = tally.counts();
        if self.ledger.tick(promise, requests > 0 && failures == 0) {
            return Ok(());
        }
        let first = tally.first_failure().unwrap_or_default();
        self.screen.tell(Tone::Bad, "FAILED", &format!("{failures} of {requests} requests; the first: {first}"))
    }
}
