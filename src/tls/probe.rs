//! Watches one handshake from outside: what the verifier found, and how much of the time was computing.
//!
//! A verifier belongs to a configuration that many handshakes share, and rustls hands it nothing of the connection it
//! works for. But it is called inside the poll of that connection's handshake, on the same thread; so the probe lays a
//! [`Verdict`] out for the length of each poll and takes it up again behind it.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use rustls::SignatureScheme;

use super::record::Failure;
use super::trust::Peer;

/// What the verifier found during one handshake.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// The peer, if its chain and signature stood.
    pub(super) peer: Option<Arc<Peer>>,
    /// Whose certificate it was that was refused by name: its chain is good, but it had not yet proven to hold the key.
    pub(super) claimed: Option<Arc<Peer>>,
    /// What the peer signed the handshake with.
    pub(super) scheme: Option<SignatureScheme>,
    /// Why the peer was refused.
    pub(super) failure: Option<Failure>,
}

thread_local! {
    static CURRENT: RefCell<Option<Verdict>> = const { RefCell::new(None) };
}

/// Writes into the verdict of the handshake that is being polled on this thread, if there is one.
pub(super) fn note(write: impl FnOnce(&mut Verdict)) {
    CURRENT.with_borrow_mut(|current| {
        if let Some(verdict) = current {
            write(verdict);
        }
    });
}

/// A handshake under watch.
pub(super) struct Probe<F> {
    handshake: F,
    verdict: Option<Verdict>,
    computing: Duration,
}

impl<F> Probe<F> {
    pub(super) fn new(handshake: F) -> Self {
        Self { handshake, verdict: Some(Verdict::default()), computing: Duration::ZERO }
    }

    /// What was found so far, and the time spent in polls.
    pub(super) fn finish(self) -> (Verdict, Duration) {
        (self.verdict.unwrap_or_default(), self.computing)
    }
}

impl<F: Future + Unpin> Future for &mut Probe<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut **self;
        CURRENT.set(this.verdict.take());
        let began = Instant::now();
        let polled = Pin::new(&mut this.handshake).poll(cx);
        this.computing += began.elapsed();
        this.verdict = CURRENT.take();
        Poll::Ready(ready!(polled))
    }
}
