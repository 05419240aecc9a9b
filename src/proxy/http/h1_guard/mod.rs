//! A strict guard on HTTP/1 between a downstream and hyper's server.
//!
//! In: the bytes of a downstream. Out: the same bytes as long as they keep RFC 9112 to the letter. The library behind
//! takes more: bare LF for a line's end, Content-Length next to Transfer-Encoding, other codings before `chunked`,
//! equal Content-Lengths twice, no Host or several, any bytes in chunk extensions, framing fields in trailers. Two
//! readers that part over such a request are how requests are smuggled.
//!
//! * A head is passed when it is whole and judged good. Before it, at most one empty line (RFC 9112 section 2.2).
//! * Instead of a bad head the library gets a small good request, so that what was asked before is answered first. Its
//!   service sees in [`Ticket::refusal`] that this one is to be refused and with which status. Nothing comes after it.
//! * A body is passed as it comes, a trailer section when it is whole. After a violation in either the reads fail with
//!   a [`FramingError`], which [`FramingError::find`] finds in the library's own error.
//! * After a request that may switch protocols (CONNECT, or Upgrade in HTTP/1.1) nothing is passed until its ticket
//!   says that it became a tunnel, or is dropped.
//!
//! The library's own `header_read_timeout` closes without an answer and would count the time between requests too, so
//! the guard keeps both times: [`GuardLimits::header_timeout`] ends in a 408, [`GuardLimits::idle_timeout`] in an
//! orderly end. How long a body takes is not judged here.

mod head;
mod scan;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use atomic_waker::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use scan::{Scanner, Step};

/// What the library reads in place of a refused head.
const STAND_IN: &[u8] = b"GET / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";

/// The limits of one connection.
#[derive(Clone, Copy, Debug)]
pub struct GuardLimits {
    /// The longest request line, in bytes without CRLF; more is a 414.
    pub max_request_line: usize,
    /// The most header fields of a request; more is a 431.
    pub max_headers: usize,
    /// The largest header section, in bytes, with its empty line and without the request line; more is a 431.
    pub max_header_bytes: usize,
    /// The most fields of a trailer section.
    pub max_trailers: usize,
    /// The largest trailer section, in bytes, with its empty line.
    pub max_trailer_bytes: usize,
    /// The most bytes of chunk extensions in one body.
    pub max_chunk_extensions: usize,
    /// From the first byte of a head to its last; longer is a 408.
    pub header_timeout: Duration,
    /// From the end of a response, or the start, to the first byte of the next head; longer ends the connection.
    pub idle_timeout: Duration,
}

impl Default for GuardLimits {
    fn default() -> Self {
        Self {
            max_request_line: 8 * 1024,
            max_headers: 100,
            max_header_bytes: 32 * 1024,
            max_trailers: 32,
            max_trailer_bytes: 8 * 1024,
            max_chunk_extensions: 4 * 1024,
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(120),
        }
    }
}

/// How a request is to be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// 400, 408, 414, 431 or 505.
    pub status: u16,
    /// Why, in words that hold nothing of the request.
    pub reason: &'static str,
}

impl Refusal {
    const fn bad(reason: &'static str) -> Self {
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
struct Shared {
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
    fn refusal(&self, nth: u64) -> Option<Refusal> {
        self.refused.get().filter(|(at, _)| *at == nth).map(|(_, refusal)| *refusal)
    }
}

/// The service's end of a guard. Clones are the same handle.
#[derive(Clone, Debug)]
pub struct GuardHandle(Arc<Shared>);

impl GuardHandle {
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

/// The guard, around a downstream. Reads are judged, writes go through.
#[derive(Debug)]
pub struct H1Guard<S> {
    io: S,
    shared: Arc<Shared>,
    scanner: Scanner,
    header_timeout: Duration,
    idle_timeout: Duration,
    /// Bytes read and not given out: up to `good` judged good, then not judged yet.
    held: Vec<u8>,
    given: usize,
    good: usize,
    end: End,
    /// When the first byte of the head in `held` came.
    head_since: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
}

#[derive(Clone, Copy, Debug)]
enum End {
    Open,
    /// A head was refused; so much of the stand-in was given out.
    Refused(usize),
    Broken(FramingError),
    Closed,
}

/// What the connection waits for, and until when at most.
enum Wait {
    Head(Option<Instant>),
    Idle(Option<Instant>),
    Busy(Option<Instant>),
    Unlimited,
}

impl<S> H1Guard<S> {
    /// A guard and its handle.
    pub fn new(io: S, limits: GuardLimits) -> (Self, GuardHandle) {
        let shared = Arc::new(Shared {
            given: AtomicU64::new(0),
            finished: AtomicU64::new(0),
            finished_at: AtomicU64::new(0),
            plain: AtomicU64::new(0),
            tunnel: AtomicU64::new(0),
            refused: OnceLock::new(),
            waker: AtomicWaker::new(),
            began: Instant::now(),
        });
        let guard = Self {
            io,
            shared: Arc::clone(&shared),
            scanner: Scanner::new(limits),
            header_timeout: limits.header_timeout,
            idle_timeout: limits.idle_timeout,
            held: Vec::new(),
            given: 0,
            good: 0,
            end: End::Open,
            head_since: None,
            timer: None,
        };
        (guard, GuardHandle(shared))
    }

    /// The downstream, and what was read from it and not given out. For a tunnel: these bytes are its first.
    pub fn into_parts(mut self) -> (S, Vec<u8>) {
        self.held.drain(..self.given.min(self.held.len()));
        (self.io, self.held)
    }

    /// The downstream.
    pub fn get_ref(&self) -> &S {
        &self.io
    }

    fn refuse(&mut self, refusal: Refusal) {
        let _ = self.shared.refused.set((self.scanner.heads() + 1, refusal));
        self.end = End::Refused(0);
    }

    /// Takes note of why the scanner stopped. False: what it did not pass is never looked at again.
    fn stopped(&mut self, step: Step) -> bool {
        match step {
            Step::More => return true,
            Step::Refused(refusal) => self.refuse(refusal),
            Step::Broken(reason) => self.end = End::Broken(FramingError { reason }),
        }
        false
    }

    /// Judges what is held and was not judged yet.
    fn judge_held(&mut self) {
        let (passed, step) = self.scanner.feed(self.held.get(self.good..).unwrap_or_default());
        self.good += passed;
        if passed > 0 {
            self.head_since = None;
        }
        if !self.stopped(step) {
            self.held.truncate(self.good);
        }
        if self.given == self.held.len() {
            self.forget_held();
        }
    }

    /// Gives the memory back: most connections never hold anything.
    fn forget_held(&mut self) {
        self.held = Vec::new();
        self.given = 0;
        self.good = 0;
        self.head_since = None;
    }

    /// Judges what the last read put after `before`, leaves the good part there and holds the rest.
    fn judge_read(&mut self, buf: &mut ReadBuf<'_>, before: usize) {
        let read = buf.filled().get(before..).unwrap_or_default();
        if read.is_empty() {
            self.end = End::Closed;
        } else if self.held.is_empty() {
            let (passed, step) = self.scanner.feed(read);
            if self.stopped(step) {
                self.held.extend_from_slice(read.get(passed..).unwrap_or_default());
            }
            buf.set_filled(before + passed);
        } else {
            // What was given out goes first, or a peer whose every read ends in half a head would grow this for ever.
            self.held.drain(..self.given.min(self.held.len()));
            self.good -= self.given.min(self.good);
            self.given = 0;
            self.held.extend_from_slice(read);
            buf.set_filled(before);
            self.judge_held();
        }
    }

    /// Part of a head is here. An empty line before it is not.
    fn has_part_of_head(&self) -> bool {
        let part = self.held.get(self.good..).unwrap_or_default();
        self.scanner.in_head() && !matches!(part, b"" | b"\r" | b"\r\n")
    }

    fn waits_for(&mut self) -> Wait {
        if self.has_part_of_head() {
            let since = *self.head_since.get_or_insert_with(Instant::now);
            Wait::Head(since.checked_add(self.header_timeout))
        } else if !self.scanner.in_head() {
            Wait::Unlimited
        } else if self.shared.finished.load(Ordering::Acquire) < self.scanner.heads() {
            Wait::Busy(Instant::now().checked_add(self.idle_timeout))
        } else {
            let since = Duration::from_micros(self.shared.finished_at.load(Ordering::Acquire));
            Wait::Idle(self.shared.began.checked_add(since).and_then(|since| since.checked_add(self.idle_timeout)))
        }
    }

    /// Ready when the wait was too long and `end` says so. One timer serves all waits: it is set again only when it
    /// went off or would go off too late, not for every request.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let wait = self.waits_for();
            let (Wait::Head(Some(until)) | Wait::Idle(Some(until)) | Wait::Busy(Some(until))) = wait else {
                return Poll::Pending;
            };
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(until)));
            if timer.deadline() > until {
                timer.as_mut().reset(until);
            }
            ready!(timer.as_mut().poll(cx));
            if until > Instant::now() {
                timer.as_mut().reset(until);
                continue;
            }
            match wait {
                Wait::Head(_) => {
                    self.forget_held();
                    self.refuse(Refusal { status: 408, reason: "head not complete in time" });
                }
                _ => self.end = End::Closed,
            }
            return Poll::Ready(());
        }
    }

    /// Asks whether the request that holds everything up became a tunnel.
    fn poll_held(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.shared.waker.register(cx.waker());
        let nth = self.scanner.heads();
        let tunnel = self.shared.tunnel.load(Ordering::Acquire) == nth;
        if !tunnel && self.shared.plain.load(Ordering::Acquire) < nth {
            return Poll::Pending;
        }
        self.scanner.release(tunnel);
        self.judge_held();
        Poll::Ready(())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for H1Guard<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        loop {
            if let Some(good @ [_, ..]) = this.held.get(this.given..this.good) {
                let good = good.get(..buf.remaining()).unwrap_or(good);
                buf.put_slice(good);
                this.given += good.len();
                if this.given == this.held.len() {
                    this.forget_held();
                }
                return Poll::Ready(Ok(()));
            }
            match &mut this.end {
                End::Open => {}
                End::Closed => return Poll::Ready(Ok(())),
                End::Broken(error) => return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, *error))),
                End::Refused(given) => {
                    let rest = STAND_IN.get(*given..).unwrap_or_default();
                    let part = rest.get(..buf.remaining()).unwrap_or(rest);
                    buf.put_slice(part);
                    *given += part.len();
                    // After it not even an end, on which the library would drop the answers it owes.
                    return if part.is_empty() { Poll::Pending } else { Poll::Ready(Ok(())) };
                }
            }
            if this.scanner.is_held() {
                if this.poll_held(cx).is_ready() {
                    continue;
                }
                // One read ahead, so that a peer that went away is noticed meanwhile.
                if !this.held.is_empty() {
                    return Poll::Pending;
                }
            }
            match Pin::new(&mut this.io).poll_read(cx, buf) {
                Poll::Ready(Ok(())) => this.judge_read(buf, before),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => ready!(this.poll_timer(cx)),
            }
            if buf.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for H1Guard<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
