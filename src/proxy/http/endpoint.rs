//! One address of an upstream, with its open connections and how well it has served lately.
//!
//! HTTP/1 connections are lent to one request at a time, HTTP/2 connections to many. What is lent is a [`Lease`], which
//! counts as in flight until it is released. An address that fails several times in a row is ejected: it gets no
//! requests for a while, then is tried again, and is ejected for longer if that fails too.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper::client::conn::{http1, http2};
use rustls::pki_types::ServerName;

use super::body::RequestBody;
use crate::identity::SpiffeId;
use crate::tls::Peer;
use crate::tls::record::Negotiated;

/// How long an idle HTTP/1 connection is kept.
const IDLE: Duration = Duration::from_secs(55);
/// Ejected at most so many times as long as the first time.
const LONGEST: u32 = 10;

/// What an upstream connection has proven, for the records of its requests.
#[derive(Debug)]
pub(super) struct Proof {
    pub(super) peer: Arc<Peer>,
    pub(super) local: SpiffeId,
    pub(super) negotiated: Negotiated,
}

/// Where an endpoint is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum At {
    /// The workload, as the listener's target says.
    Workload,
    /// One address of an upstream's name.
    Address(SocketAddr, ServerName<'static>),
}

/// An HTTP/2 connection.
#[derive(Debug)]
pub(super) struct Shared2 {
    pub(super) number: u64,
    pub(super) sender: http2::SendRequest<RequestBody>,
    /// Whether the far end is a sidecar that restores versions.
    pub(super) mesh: bool,
    pub(super) proof: Option<Arc<Proof>>,
    /// No new requests from then on: the peer's SVID ends soon.
    pub(super) retire_at: Option<Instant>,
    streams: AtomicUsize,
    /// Requests that the other side lets be under way on it, as far as it has said so.
    pub(super) most: Arc<AtomicUsize>,
    gone: AtomicBool,
}

impl Shared2 {
    pub(super) fn new(
        sender: http2::SendRequest<RequestBody>,
        mesh: bool,
        proof: Option<Arc<Proof>>,
        retire_at: Option<Instant>,
    ) -> Self {
        Self {
            number: next_number(),
            sender,
            mesh,
            proof,
            retire_at,
            streams: AtomicUsize::new(0),
            most: Arc::new(AtomicUsize::new(usize::MAX)),
            gone: AtomicBool::new(false),
        }
    }

    fn usable(&self) -> bool {
        !self.gone.load(Ordering::Relaxed)
            && !self.sender.is_closed()
            && self.retire_at.is_none_or(|at| Instant::now() < at)
    }

    /// Whether the other side takes one more request on it; more than it takes would wait here for those that are there,
    /// however long they live.
    fn has_room(&self) -> bool {
        self.streams() < self.most.load(Ordering::Relaxed)
    }

    /// Requests under way on it.
    pub(super) fn streams(&self) -> usize {
        self.streams.load(Ordering::Relaxed)
    }
}

/// An HTTP/1 connection.
#[derive(Debug)]
pub(super) struct Owned1 {
    pub(super) number: u64,
    pub(super) sender: http1::SendRequest<RequestBody>,
    pub(super) proof: Option<Arc<Proof>>,
    pub(super) retire_at: Option<Instant>,
    since: Instant,
    /// Held as long as the connection is open: their number is bounded.
    _place: Option<tokio::sync::OwnedSemaphorePermit>,
}

impl Owned1 {
    pub(super) fn new(
        sender: http1::SendRequest<RequestBody>,
        proof: Option<Arc<Proof>>,
        retire_at: Option<Instant>,
        place: Option<tokio::sync::OwnedSemaphorePermit>,
    ) -> Self {
        Self { number: next_number(), sender, proof, retire_at, since: Instant::now(), _place: place }
    }
}

fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// What a mesh peer has shown to speak to requests of HTTP/1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Speaks {
    Unknown,
    Mesh,
    Plain,
}

/// One address.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) at: At,
    in_flight: AtomicUsize,
    failures: AtomicU32,
    ejections: AtomicU32,
    /// When it may be used again, in milliseconds since `born`; 0 if it is not ejected.
    ejected_until: AtomicU64,
    born: Instant,
    speaks: AtomicU8,
    idle1: Mutex<Vec<Owned1>>,
    open2: Mutex<Vec<Arc<Shared2>>>,
    /// One dials at a time where many would share what comes of it.
    pub(super) dialling: tokio::sync::Mutex<()>,
    pub(super) places1: Arc<tokio::sync::Semaphore>,
    /// Told when a request on an HTTP/2 connection is over, or the connection is.
    freed: tokio::sync::Notify,
}

impl Endpoint {
    pub(super) fn new(at: At, max_http1: usize) -> Self {
        Self {
            at,
            in_flight: AtomicUsize::new(0),
            failures: AtomicU32::new(0),
            ejections: AtomicU32::new(0),
            ejected_until: AtomicU64::new(0),
            born: Instant::now(),
            speaks: AtomicU8::new(0),
            idle1: Mutex::default(),
            open2: Mutex::default(),
            dialling: tokio::sync::Mutex::new(()),
            places1: Arc::new(tokio::sync::Semaphore::new(max_http1)),
            freed: tokio::sync::Notify::new(),
        }
    }

    /// Requests under way at this address.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    pub(super) fn speaks(&self) -> Speaks {
        match self.speaks.load(Ordering::Relaxed) {
            1 => Speaks::Mesh,
            2 => Speaks::Plain,
            _ => Speaks::Unknown,
        }
    }

    pub(super) fn learn(&self, speaks: Speaks) {
        let code = match speaks {
            Speaks::Unknown => 0,
            Speaks::Mesh => 1,
            Speaks::Plain => 2,
        };
        self.speaks.store(code, Ordering::Relaxed);
    }

    /// Whether it may get requests.
    pub(super) fn fit(&self) -> bool {
        match self.ejected_until.load(Ordering::Relaxed) {
            0 => true,
            until => u128::from(until) <= self.born.elapsed().as_millis(),
        }
    }

    /// It served. Answers whether it had been ejected before.
    pub(super) fn succeeded(&self) -> bool {
        if self.failures.load(Ordering::Relaxed) == 0 {
            return false;
        }
        self.failures.store(0, Ordering::Relaxed);
        self.ejections.store(0, Ordering::Relaxed);
        self.ejected_until.swap(0, Ordering::Relaxed) != 0
    }

    /// It failed. Answers whether that ejects it: after so many in a row, and at once when it had been given another try.
    pub(super) fn failed(&self, eject_after: u32, eject_for: Duration) -> bool {
        let failures = self.failures.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        if failures < eject_after || !self.fit() {
            return false;
        }
        let times = self.ejections.fetch_add(1, Ordering::Relaxed);
        let factor = 1_u32.checked_shl(times).unwrap_or(LONGEST).min(LONGEST);
        let until = self.born.elapsed() + eject_for.saturating_mul(factor);
        self.ejected_until.store(u64::try_from(until.as_millis()).unwrap_or(u64::MAX).max(1), Ordering::Relaxed);
        true
    }

    /// An idle HTTP/1 connection, the one used last.
    pub(super) fn take1(self: &Arc<Self>) -> Option<Lease> {
        let mut idle = self.idle1.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        while let Some(connection) = idle.pop() {
            let fresh = connection.since.checked_add(IDLE).is_some_and(|until| now < until)
                && connection.retire_at.is_none_or(|at| now < at);
            if fresh && connection.sender.is_ready() {
                drop(idle);
                return Some(self.lend1(connection, true));
            }
        }
        None
    }

    pub(super) fn lend1(self: &Arc<Self>, connection: Owned1, used_before: bool) -> Lease {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Lease { endpoint: Arc::clone(self), used_before, lent: Lent::Http1(Some(connection)) }
    }

    fn give1(&self, mut connection: Owned1) {
        connection.since = Instant::now();
        self.idle1.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
    }

    /// The HTTP/2 connection with the fewest requests, if it is not full or no further one may be opened; among those on
    /// which the other side takes one more.
    pub(super) fn take2(self: &Arc<Self>, mesh_only: bool, full: usize, most: usize) -> Taken {
        let mut open = self.open2.lock().unwrap_or_else(PoisonError::into_inner);
        if open.iter().any(|connection| !connection.usable()) {
            open.retain(|connection| connection.usable());
        }
        let mut suited = open.iter().filter(|connection| connection.mesh || !mesh_only).peekable();
        let none = suited.peek().is_none();
        let least = suited.filter(|connection| connection.has_room()).min_by_key(|connection| connection.streams());
        match least {
            Some(least) if least.streams() < full || open.len() >= most => {
                let least = Arc::clone(least);
                drop(open);
                Taken::Lease(self.lend2(least, true))
            }
            None if !none && open.len() >= most => Taken::Full,
            _ => Taken::None,
        }
    }

    /// Waits until a request on an HTTP/2 connection is over.
    pub(super) fn freed(&self) -> tokio::sync::futures::Notified<'_> {
        self.freed.notified()
    }

    pub(super) fn lend2(self: &Arc<Self>, connection: Arc<Shared2>, used_before: bool) -> Lease {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        connection.streams.fetch_add(1, Ordering::Relaxed);
        Lease { endpoint: Arc::clone(self), used_before, lent: Lent::Http2(connection) }
    }

    pub(super) fn share2(&self, connection: &Arc<Shared2>) {
        self.open2.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(connection));
    }

    /// No request goes on this connection any more.
    pub(super) fn forget(&self, number: u64) {
        let mut open = self.open2.lock().unwrap_or_else(PoisonError::into_inner);
        for connection in open.iter().filter(|connection| connection.number == number) {
            connection.gone.store(true, Ordering::Relaxed);
        }
        open.retain(|connection| connection.number != number);
        drop(open);
        self.freed.notify_waiters();
        self.idle1.lock().unwrap_or_else(PoisonError::into_inner).retain(|connection| connection.number != number);
    }

    /// Closes what has been idle for long.
    pub(super) fn sweep(&self) {
        let now = Instant::now();
        let fresh = |since: Instant| since.checked_add(IDLE).is_some_and(|until| now < until);
        self.idle1
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|connection| fresh(connection.since) && !connection.sender.is_closed());
        self.open2.lock().unwrap_or_else(PoisonError::into_inner).retain(|connection| connection.usable());
    }
}

/// What became of asking for an open connection.
#[derive(Debug)]
pub(super) enum Taken {
    /// Here it is.
    Lease(Lease),
    /// None is open that suits: another one may be opened.
    None,
    /// No further one may be opened, and those that are open have no room.
    Full,
}

#[derive(Debug)]
enum Lent {
    Http1(Option<Owned1>),
    Http2(Arc<Shared2>),
}

/// A connection lent to one request.
#[derive(Debug)]
pub(super) struct Lease {
    endpoint: Arc<Endpoint>,
    used_before: bool,
    lent: Lent,
}

/// What a leased connection speaks.
#[derive(Debug)]
pub(super) enum Line<'a> {
    Http1(&'a mut http1::SendRequest<RequestBody>),
    Http2(&'a Shared2),
}

impl Lease {
    /// Whether it had served a request before this one.
    pub(super) fn used_before(&self) -> bool {
        self.used_before
    }

    pub(super) fn proof(&self) -> Option<&Arc<Proof>> {
        match &self.lent {
            Lent::Http1(connection) => connection.as_ref()?.proof.as_ref(),
            Lent::Http2(connection) => connection.proof.as_ref(),
        }
    }

    /// What to send on; none once released.
    pub(super) fn line(&mut self) -> Option<Line<'_>> {
        match &mut self.lent {
            Lent::Http1(connection) => connection.as_mut().map(|connection| Line::Http1(&mut connection.sender)),
            Lent::Http2(connection) => Some(Line::Http2(connection)),
        }
    }

    /// The response has ended, whole or not. Only a connection on which it was whole serves another request.
    pub(super) fn release(&mut self, whole: bool) {
        let Lent::Http1(connection) = &mut self.lent else { return };
        let Some(mut connection) = connection.take().filter(|_| whole) else { return };
        if connection.sender.is_ready() {
            return self.endpoint.give1(connection);
        }
        if connection.sender.is_closed() {
            return;
        }
        // The connection's own task has yet to see that the response is over.
        let endpoint = Arc::clone(&self.endpoint);
        tokio::spawn(async move {
            if let Ok(Ok(())) = tokio::time::timeout(Duration::from_secs(1), connection.sender.ready()).await {
                endpoint.give1(connection);
            }
        });
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.endpoint.in_flight.fetch_sub(1, Ordering::Relaxed);
        if let Lent::Http2(connection) = &self.lent {
            connection.streams.fetch_sub(1, Ordering::Relaxed);
            self.endpoint.freed.notify_one();
        }
    }
}
