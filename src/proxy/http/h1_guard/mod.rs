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

mod handle;
mod head;
mod scan;
#[cfg(test)]
mod tests;

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use handle::Shared;
use scan::{Scanner, Step};

pub use handle::{FramingError, GuardHandle, Refusal, Ticket};

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
        let shared = Arc::new(Shared::new());
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
        (guard, GuardHandle::new(shared))
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
        self.shared.refuse(self.scanner.heads() + 1, refusal);
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
        } else if self.shared.finished() < self.scanner.heads() {
            Wait::Busy(Instant::now().checked_add(self.idle_timeout))
        } else {
            Wait::Idle(self.shared.idle_since().and_then(|since| since.checked_add(self.idle_timeout)))
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
        let tunnel = ready!(self.shared.poll_verdict(self.scanner.heads(), cx));
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
    crate::proxy::io::writes_pass!();

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
