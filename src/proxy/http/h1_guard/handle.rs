//! What a guard and the service of its connection tell each other.
//!
//! In: from the guard, which request is refused; from the service, which are over and which became tunnels. Out: the
//! answers to each other's questions.

use std::error::Error;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use atomic_waker::AtomicWaker;
use tokio::time::Instant;

/// How a request is to be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// 400, 408, 414, 431 or 505.
    pub status: u16,
    /// Why, in words that hold nothing of the request.
    pub reason: &'static str,
}

impl Refusal {
    pub(super) const fn bad(reason: &'static str) -> Self {
        Self { status: 400, reason }
    }
}

/// A request's body broke its framing. The reads of the connection fail with it, in an [`io::Error`] of kind
/// `InvalidData`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FramingError {
    /// Why, in words that hold nothing of the request.
    pub reason: &'static str,
}

impl FramingError {
    /// Finds it among the causes of another error, such as the one of a body.
    pub fn find(error: &(dyn Error + 'static)) -> Option<Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            let found = error.downcast_ref().or_else(|| inner.and_then(|inner| inner.downcast_ref()));
            if let Some(found) = found {
                return Some(*found);
            }
            next = error.source();
        }
        None
    }
}

impl fmt::Display for FramingError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "bad framing of a request body: {}", self.reason)
    }
}

impl Error for FramingError {}

/// What a guard and the service of its connection tell each other. Requests count from 1.
#[derive(Debug)]
pub(super) struct Shared {
    /// Tickets given.
    given: AtomicU64,
    /// The last request that is over.
    finished: AtomicU64,
    /// When it was over, in microseconds since `began`.
    finished_at: AtomicU64,
    /// The last request that is known to stay a request.
    plain: AtomicU64,
    /// The request that became a tunnel, or 0.
    tunnel: AtomicU64,
    refused: OnceLock<(u64, Refusal)>,
    waker: AtomicWaker,
    began: Instant,
}

impl Shared {
    pub(super) fn new() -> Self {
        Self {
            given: AtomicU64::new(0),
            finished: AtomicU64::new(0),
            finished_at: AtomicU64::new(0),
            plain: AtomicU64::new(0),
            tunnel: AtomicU64::new(0),
            refused: OnceLock::new(),
            waker: AtomicWaker::new(),
            began: Instant::now(),
        }
    }

    /// The `nth` request is refused. The first refusal is the one that counts.
    pub(super) fn refuse(&self, nth: u64, refusal: Refusal) {
        let _ = self.refused.set((nth, refusal));
    }

    /// How many requests are over.
    pub(super) fn finished(&self) -> u64 {
        self.finished.load(Ordering::Acquire)
    }

    /// When the last request was over, or the connection began.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        self.began.checked_add(Duration::from_micros(self.finished_at.load(Ordering::Acquire)))
    }

    /// Ready when it is known whether the `nth` request became a tunnel.
    pub(super) fn poll_verdict(&self, nth: u64, cx: &mut Context<'_>) -> Poll<bool> {
        self.waker.register(cx.waker());
        let tunnel = self.tunnel.load(Ordering::Acquire) == nth;
        if tunnel || self.plain.load(Ordering::Acquire) >= nth { Poll::Ready(tunnel) } else { Poll::Pending }
    }

    fn refusal(&self, nth: u64) -> Option<Refusal> {
        self.refused.get().filter(|(at, _)| *at == nth).map(|(_, refusal)| *refusal)
    }
}

/// The service's end of a guard. Clones are the same handle.
#[derive(Clone, Debug)]
pub struct GuardHandle(Arc<Shared>);

impl GuardHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    /// The ticket of the next request. The service takes one at the start of each call, in order.
    pub fn next_request(&self) -> Ticket {
        let nth = self.0.given.fetch_add(1, Ordering::AcqRel) + 1;
        Ticket { nth, shared: Arc::clone(&self.0) }
    }

    /// How the `nth` request of the connection, counted from 1, is to be refused.
    pub fn refusal(&self, nth: u64) -> Option<Refusal> {
        self.0.refusal(nth)
    }
}

/// One request on its way. Keep it until the response's body is dropped: the drop is how the guard learns that the
/// request is over, for the idle timeout and for what follows a request that could have become a tunnel.
#[derive(Debug)]
pub struct Ticket {
    nth: u64,
    shared: Arc<Shared>,
}

impl Ticket {
    /// Which request of the connection it is, from 1.
    pub fn nth(&self) -> u64 {
        self.nth
    }

    /// Set when the head was bad. The request at hand is then a stand-in: answer it with this status and forward
    /// nothing.
    pub fn refusal(&self) -> Option<Refusal> {
        self.shared.refusal(self.nth)
    }

    /// The request becomes a tunnel: what follows it passes unwatched. To be said before the response is returned.
    /// Without effect on a request that neither is a CONNECT nor has an Upgrade.
    pub fn tunnel(&self) {
        self.shared.tunnel.store(self.nth, Ordering::Release);
        self.shared.waker.wake();
    }

    /// The request stays a request, although it could have become a tunnel. The drop says the same, later.
    pub fn not_tunnel(&self) {
        self.shared.plain.fetch_max(self.nth, Ordering::AcqRel);
        self.shared.waker.wake();
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let now = u64::try_from(self.shared.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.shared.finished_at.store(now, Ordering::Release);
        self.shared.finished.fetch_max(self.nth, Ordering::AcqRel);
        self.not_tunnel();
    }
}
