//! The requests under way on one connection, so that they can be judged again.
//!
//! A request registers before its first check. Whoever changes policy publishes first and walks the requests then; a
//! request is judged by what is published after it has registered. So no change slips between. In: what a request was
//! judged by. Out: the order to end, to whoever drives the request.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;

use atomic_waker::AtomicWaker;
use slab::Slab;

use super::super::record::RequestCause;
use crate::policy::HttpFacts;

/// One request under way.
#[derive(Debug)]
pub struct Live {
    /// None on an outbound connection, whose requests no rule judges.
    facts: Option<HttpFacts>,
    /// 0, or one more than the index of the cause in [`RequestCause::ALL`].
    stop: AtomicU8,
    waker: AtomicWaker,
}

impl Live {
    /// What it was judged by.
    pub fn facts(&self) -> Option<&HttpFacts> {
        self.facts.as_ref()
    }

    /// Tells the request to end. The first cause stays.
    pub fn stop(&self, cause: RequestCause) {
        let place = RequestCause::ALL.iter().position(|other| *other == cause);
        let code = place.and_then(|place| u8::try_from(place + 1).ok()).unwrap_or(1);
        let _ = self.stop.compare_exchange(0, code, Ordering::SeqCst, Ordering::SeqCst);
        self.waker.wake();
    }

    /// Why it was told to end, if it was.
    pub fn stopped(&self) -> Option<RequestCause> {
        match self.stop.load(Ordering::SeqCst) {
            0 => None,
            code => RequestCause::ALL.get(usize::from(code) - 1).copied(),
        }
    }

    /// Like [`Live::stopped`], and wakes the task when it comes to that.
    pub fn poll_stopped(&self, waker: &Waker) -> Option<RequestCause> {
        self.waker.register(waker);
        self.stopped()
    }
}

/// All requests under way on one connection.
#[derive(Debug, Default)]
pub struct Requests(Mutex<Slab<Arc<Live>>>);

impl Requests {
    fn slab(&self) -> std::sync::MutexGuard<'_, Slab<Arc<Live>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a request. Whoever does calls [`Requests::remove`] with the key when it has ended.
    pub fn register(&self, facts: Option<HttpFacts>) -> (usize, Arc<Live>) {
        let live = Arc::new(Live { facts, stop: AtomicU8::new(0), waker: AtomicWaker::new() });
        (self.slab().insert(Arc::clone(&live)), live)
    }

    /// The request has ended.
    pub fn remove(&self, key: usize) {
        self.slab().try_remove(key);
    }

    /// Tells all of them to end.
    pub fn stop_all(&self, cause: RequestCause) {
        let now: Vec<Arc<Live>> = self.slab().iter().map(|(_, live)| Arc::clone(live)).collect();
        now.iter().for_each(|live| live.stop(cause));
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.slab().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tells those to end for which `judge` gives a cause. Answers how many those were.
    pub fn rejudge(&self, judge: impl Fn(&HttpFacts) -> Option<RequestCause>) -> usize {
        let now: Vec<Arc<Live>> = self.slab().iter().map(|(_, live)| Arc::clone(live)).collect();
        let mut ended = 0;
        for live in now {
            if let Some(cause) = live.facts.as_ref().and_then(&judge) {
                live.stop(cause);
                ended += 1;
            }
        }
        ended
    }
}
