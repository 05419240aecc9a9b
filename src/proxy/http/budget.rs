//! How many requests may be sent once more: a share of all requests, so that retries cannot become the load.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The time over which the share is taken.
const WINDOW: Duration = Duration::from_secs(10);
/// Always allowed in that time, so that a quiet client may retry at all.
const FLOOR: f64 = 10.0;

/// A budget of retries.
#[derive(Debug)]
pub(super) struct Budget {
    share: f64,
    counts: Mutex<Counts>,
    requests: std::sync::atomic::AtomicU64,
}

/// Two halves of a sliding window.
#[derive(Debug)]
struct Counts {
    began: Instant,
    now: (f64, f64),
    before: (f64, f64),
}

impl Budget {
    /// `share` of all requests may be retries.
    pub(super) fn new(share: f64) -> Self {
        let counts = Counts { began: Instant::now(), now: (0.0, 0.0), before: (0.0, 0.0) };
        Self { share, counts: Mutex::new(counts), requests: 0.into() }
    }

    /// A request is sent for the first time.
    pub(super) fn request(&self) {
        self.requests.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }

    /// Whether one more may be sent again; if so, it is counted.
    pub(super) fn try_retry(&self, now: Instant) -> bool {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let age = now.saturating_duration_since(counts.began);
        if age >= WINDOW {
            counts.before = if age >= 2 * WINDOW { (0.0, 0.0) } else { counts.now };
            counts.now = (0.0, 0.0);
            counts.began = now;
        }
        counts.now.0 += self.requests.swap(0, std::sync::atomic::Ordering::Relaxed) as f64;
        // What is left of the window before weighs as much as of it still lies within the time.
        let weight = 1.0 - now.saturating_duration_since(counts.began).as_secs_f64() / WINDOW.as_secs_f64();
        let requests = counts.now.0 + counts.before.0 * weight;
        let retries = counts.now.1 + counts.before.1 * weight;
        let allowed = retries + 1.0 <= (self.share * requests).max(FLOOR);
        if allowed {
            counts.now.1 += 1.0;
        }
        allowed
    }
}

/// A random wait before try number `attempt` (from 1): up to `first`, up to twice as long each time, at most `most`
/// (exponential backoff with full jitter).
pub(super) fn backoff(attempt: u32, first: Duration, most: Duration) -> Duration {
    let factor = 1_u32.checked_shl(attempt.saturating_sub(1)).unwrap_or(u32::MAX);
    first.saturating_mul(factor).min(most).mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_a_share_of_requests_and_never_the_load() {
        let budget = Budget::new(0.2);
        let now = Instant::now();
        let retries = |budget: &Budget, at| (0..10_000).filter(|_| budget.try_retry(at)).count();
        assert_eq!(retries(&budget, now), 10, "the floor");
        for _ in 0..1000 {
            budget.request();
        }
        assert_eq!(retries(&budget, now), 190, "a fifth of a thousand, the floor's included");
        // Half a window later half of what was counts, on both sides.
        let later = retries(&budget, now + WINDOW + WINDOW / 2);
        assert!(later <= 10, "{later}");
        assert_eq!(retries(&budget, now + 10 * WINDOW), 10, "all is forgotten");
    }

    #[test]
    fn waits_grow_and_stay_within_their_bound() {
        let (first, most) = (Duration::from_millis(25), Duration::from_millis(250));
        for attempt in 1..40 {
            let bound = first.saturating_mul(2_u32.saturating_pow(attempt - 1)).min(most);
            for _ in 0..50 {
                assert!(backoff(attempt, first, most) <= bound);
            }
        }
    }
}
