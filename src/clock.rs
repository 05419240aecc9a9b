//! The wall clock, in one place so that tests can move it.
//!
//! Everything that judges a validity period asks a [`Clock`], never `SystemTime`. In: nothing. Out: seconds since
//! the Unix epoch. The trait underneath is rustls's own [`TimeProvider`], so that the TLS library and our judgements
//! can never disagree about the time.

use std::sync::Arc;

use rustls::pki_types::UnixTime;
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};

/// A shared source of wall-clock time.
#[derive(Clone, Debug)]
pub struct Clock(Arc<dyn TimeProvider>);

impl Clock {
    /// The system's clock.
    pub fn system() -> Self {
        Self(Arc::new(DefaultTimeProvider))
    }

    /// A clock that follows another provider (tests, simulations).
    pub fn from_provider(provider: Arc<dyn TimeProvider>) -> Self {
        Self(provider)
    }

    /// Seconds since the Unix epoch. A clock that cannot be read answers the end of time, at which every
    /// certificate has expired: closed by default.
    pub fn now(&self) -> u64 {
        self.unix_time().as_secs()
    }

    /// The same as [`Clock::now`], in the type that rustls and webpki take.
    pub fn unix_time(&self) -> UnixTime {
        self.0
            .current_time()
            .unwrap_or_else(|| UnixTime::since_unix_epoch(std::time::Duration::from_secs(u64::from(u32::MAX) * 1000)))
    }

    /// The provider itself, for rustls configurations.
    pub fn provider(&self) -> Arc<dyn TimeProvider> {
        Arc::clone(&self.0)
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::system()
    }
}

/// A clock for tests: starts at the real time (or a given one) and then moves with tokio's clock, which a test can
/// pause and advance, plus whatever it is told to jump.
#[derive(Debug)]
pub struct SteppedClock {
    start: u64,
    began: tokio::time::Instant,
    jumped: std::sync::atomic::AtomicI64,
}

impl SteppedClock {
    /// A clock that reads `start` seconds now.
    pub fn starting_at(start: u64) -> Arc<Self> {
        Arc::new(Self { start, began: tokio::time::Instant::now(), jumped: std::sync::atomic::AtomicI64::new(0) })
    }

    /// Moves the wall clock by `seconds` without any monotonic time passing.
    pub fn jump(&self, seconds: i64) {
        self.jumped.fetch_add(seconds, std::sync::atomic::Ordering::SeqCst);
    }

    /// This clock as the shared handle.
    pub fn clock(self: &Arc<Self>) -> Clock {
        Clock(Arc::clone(self) as Arc<dyn TimeProvider>)
    }
}

impl TimeProvider for SteppedClock {
    fn current_time(&self) -> Option<UnixTime> {
        let jumped = self.jumped.load(std::sync::atomic::Ordering::SeqCst);
        let base = self.start.saturating_add(self.began.elapsed().as_secs());
        Some(UnixTime::since_unix_epoch(std::time::Duration::from_secs(base.saturating_add_signed(jumped))))
    }
}
