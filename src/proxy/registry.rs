//! What is open right now, so that it can be judged again.
//!
//! A connection registers before its first check. Whoever changes policy or trust publishes the change first and then
//! walks the registry; a connection writes its peer down first and then looks whether anything was published since. So
//! no change slips between. The requests under way on a connection stand in its [`Entry`], by the same rule.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use atomic_waker::AtomicWaker;

use super::capture::First;
use super::http::live::Requests;
use super::passthrough::Passed;
use super::record::Cause;
use crate::identity::SpiffeId;
use crate::tls::Peer;
use crate::tls::record::Direction;

const SHARDS: usize = 16;

/// What is known of who is at the other end.
#[derive(Clone, Debug)]
pub enum Known {
    /// It has proven who it is.
    Peer(Arc<Peer>),
    /// It speaks plaintext and has proven nothing.
    Unproven,
    /// It passes through to where it was for, which proves nothing to us.
    Passing(Arc<Passed>),
}

/// One open connection.
#[derive(Debug)]
pub struct Entry {
    number: u64,
    /// Which way.
    pub direction: Direction,
    /// The listener's name.
    pub listener: Arc<str>,
    /// Who connected, as text.
    pub client: super::listener::Client,
    /// When.
    pub opened: Instant,
    known: OnceLock<Known>,
    /// What it was picked by, once it was: the client's first words, where they were asked.
    heard: OnceLock<Option<First>>,
    /// 0, or one more than the index of the cause in [`Cause::ALL`].
    stop: AtomicU8,
    /// Whether it is to end as soon as what is under way on it has ended.
    draining: AtomicBool,
    /// Whether it carries requests that are judged one by one.
    http: AtomicBool,
    requests: Requests,
    waker: AtomicWaker,
}

impl Entry {
    /// The proven peer, once there is one.
    pub fn peer(&self) -> Option<&Arc<Peer>> {
        match self.known.get()? {
            Known::Peer(peer) => Some(peer),
            Known::Unproven | Known::Passing(_) => None,
        }
    }

    /// The client's first words, by which its listener was picked; none before it was.
    pub(super) fn heard(&self) -> Option<Option<&First>> {
        self.heard.get().map(Option::as_ref)
    }

    /// Whether it is plaintext that was let through, of whoever it is.
    pub fn is_unproven(&self) -> bool {
        matches!(self.known.get(), Some(Known::Unproven))
    }

    /// Tells the connection to end. The first cause stays.
    pub fn stop(&self, cause: Cause) {
        let code = Cause::ALL.iter().position(|c| *c == cause).and_then(|i| u8::try_from(i + 1).ok()).unwrap_or(1);
        let _ = self.stop.compare_exchange(0, code, Ordering::SeqCst, Ordering::SeqCst);
        self.waker.wake();
    }

    /// Why the connection was told to end, if it was.
    pub fn stopped(&self) -> Option<Cause> {
        match self.stop.load(Ordering::SeqCst) {
            0 => None,
            code => Cause::ALL.get(usize::from(code) - 1).copied(),
        }
    }

    /// Asks the connection to end once what is under way on it has ended.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    /// Whether the connection was asked to end in order.
    pub fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Notes that this connection carries HTTP.
    pub fn carries_requests(&self) {
        self.http.store(true, Ordering::SeqCst);
    }

    /// Whether its requests are judged one by one.
    pub fn is_http(&self) -> bool {
        self.http.load(Ordering::SeqCst)
    }

    /// The requests under way on it.
    pub fn requests(&self) -> &Requests {
        &self.requests
    }

    /// Like [`Entry::stopped`], and wakes the task when it comes to that.
    pub fn poll_stopped(&self, waker: &std::task::Waker) -> Option<Cause> {
        self.waker.register(waker);
        self.stopped()
    }

    /// [`Entry::poll_stopped`] as a function, for a forwarder.
    pub fn stopper(&self) -> impl FnMut(&std::task::Waker) -> Option<Cause> + '_ {
        |waker| self.poll_stopped(waker)
    }

    /// Waits until the connection is asked to end in order.
    pub async fn until_draining(&self) {
        std::future::poll_fn(|cx| {
            self.waker.register(cx.waker());
            if self.draining.load(Ordering::SeqCst) { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
    }

    /// Waits until the connection is told to end.
    pub async fn until_stopped(&self) -> Cause {
        std::future::poll_fn(|cx| match self.poll_stopped(cx.waker()) {
            Some(cause) => std::task::Poll::Ready(cause),
            None => std::task::Poll::Pending,
        })
        .await
    }
}

/// All open connections of a proxy.
#[derive(Debug)]
pub struct Registry {
    shards: [Mutex<HashMap<u64, Arc<Entry>>>; SHARDS],
    per_peer: Mutex<HashMap<(Direction, SpiffeId), usize>>,
    next: AtomicU64,
    open: AtomicUsize,
    pooled: AtomicUsize,
    draining: AtomicBool,
    emptied: tokio::sync::Notify,
}

impl Default for Registry {
    fn default() -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            per_peer: Mutex::default(),
            next: AtomicU64::new(0),
            open: AtomicUsize::new(0),
            pooled: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            emptied: tokio::sync::Notify::new(),
        }
    }
}

impl Registry {
    /// Registers a connection; it is open until the guard drops.
    pub fn register(
        self: &Arc<Self>,
        direction: Direction,
        listener: Arc<str>,
        client: super::listener::Client,
    ) -> Registration {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let entry = Arc::new(Entry {
            number,
            direction,
            listener,
            client,
            opened: Instant::now(),
            known: OnceLock::new(),
            heard: OnceLock::new(),
            stop: AtomicU8::new(0),
            draining: AtomicBool::new(self.draining.load(Ordering::SeqCst)),
            http: AtomicBool::new(false),
            requests: Requests::default(),
            waker: AtomicWaker::new(),
        });
        self.count(client).fetch_add(1, Ordering::SeqCst);
        if let Some(shard) = self.shard(number) {
            shard.lock().unwrap_or_else(PoisonError::into_inner).insert(number, Arc::clone(&entry));
        }
        Registration { registry: Arc::clone(self), entry }
    }

    fn shard(&self, number: u64) -> Option<&Mutex<HashMap<u64, Arc<Entry>>>> {
        self.shards.get(usize::try_from(number % SHARDS as u64).unwrap_or(0))
    }

    fn count(&self, client: super::listener::Client) -> &AtomicUsize {
        if client == super::listener::Client::Pool { &self.pooled } else { &self.open }
    }

    /// How many connections are open, those in a handshake included and those that are kept to send requests on not.
    pub fn len(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Waits until none is open.
    pub async fn until_empty(&self) {
        self.until(|| self.is_empty()).await;
    }

    /// Waits until none is open, and none kept to send requests on.
    pub async fn until_gone(&self) {
        self.until(|| self.is_empty() && self.pooled.load(Ordering::SeqCst) == 0).await;
    }

    async fn until(&self, done: impl Fn() -> bool) {
        loop {
            let notified = self.emptied.notified();
            if done() {
                return;
            }
            notified.await;
        }
    }

    /// Judges every open connection, with who is there if that is known, and tells those to end for which `judge` gives a
    /// cause. Answers how many those were.
    pub fn rejudge(&self, mut judge: impl FnMut(&Entry, Option<&Known>) -> Option<Cause>) -> usize {
        let mut ended = 0;
        for entry in self.snapshot(usize::MAX) {
            if let Some(cause) = judge(&entry, entry.known.get()) {
                entry.stop(cause);
                ended += 1;
            }
        }
        ended
    }

    /// Asks every connection, also those to come, to end in order.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        for entry in self.snapshot(usize::MAX) {
            entry.drain();
        }
    }

    /// Tells all that `which` picks to end.
    pub fn stop_all(&self, cause: Cause, which: impl Fn(&Entry) -> bool) {
        for entry in self.snapshot(usize::MAX) {
            if which(&entry) {
                entry.stop(cause);
            }
        }
    }

    /// At most so many of the open connections, the oldest first within what is looked at.
    pub fn snapshot(&self, most: usize) -> Vec<Arc<Entry>> {
        let mut entries = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            entries.extend(shard.values().take(most - entries.len().min(most)).cloned());
        }
        entries.sort_unstable_by_key(|entry| entry.number);
        entries
    }
}

/// Too many connections of one peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

/// Keeps a connection registered.
#[derive(Debug)]
pub struct Registration {
    registry: Arc<Registry>,
    entry: Arc<Entry>,
}

impl Registration {
    /// The entry.
    pub fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }

    /// Writes the proven peer down and counts it.
    ///
    /// # Errors
    /// The peer has `most` connections already.
    pub fn set_peer(&self, peer: &Arc<Peer>, most: usize) -> Result<(), TooMany> {
        let mut per_peer = self.registry.per_peer.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (self.entry.direction, peer.id().clone());
        let count = per_peer.get(&key).copied().unwrap_or(0);
        if count >= most {
            return Err(TooMany);
        }
        if self.entry.known.set(Known::Peer(Arc::clone(peer))).is_ok() {
            per_peer.insert(key, count + 1);
        }
        Ok(())
    }

    /// Writes down that it is plaintext, of whoever it is.
    pub fn set_unproven(&self) {
        // Once it is known who is there, that stays.
        let _ = self.entry.known.set(Known::Unproven);
    }

    /// Writes down what a captured connection was picked by.
    pub(super) fn set_heard(&self, first: Option<First>) {
        let _ = self.entry.heard.set(first);
    }

    /// Writes down that it passes through.
    pub fn set_passing(&self, passed: &Arc<Passed>) {
        let _ = self.entry.known.set(Known::Passing(Arc::clone(passed)));
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(peer) = self.entry.peer() {
            let mut per_peer = self.registry.per_peer.lock().unwrap_or_else(PoisonError::into_inner);
            let key = (self.entry.direction, peer.id().clone());
            if let Some(count) = per_peer.get_mut(&key) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    per_peer.remove(&key);
                }
            }
        }
        if let Some(shard) = self.registry.shard(self.entry.number) {
            shard.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.entry.number);
        }
        if self.registry.count(self.entry.client).fetch_sub(1, Ordering::SeqCst) == 1 {
            self.registry.emptied.notify_waiters();
        }
    }
}
