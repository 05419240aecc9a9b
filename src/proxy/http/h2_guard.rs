//! A guard against floods of HTTP/2 frames between a downstream and hyper's server.
//!
//! In: the bytes of a downstream, from the connection preface on. Out: the same bytes, as long as none of the kinds of
//! frame below comes faster than its [`Rate`]. Only the nine bytes of frame headers (RFC 9113 section 4.1) are looked
//! at. RFC 9113 section 10.5 names these attacks; h2 0.4.20 and hyper 1.12 bound some of them themselves.
//!
//! | flood | bounded by |
//! |---|---|
//! | empty DATA | h2: more than 100 without END_STREAM in a connection's life end it |
//! | small DATA | h2: a budget that follows `initial_connection_window_size` (half of it, at least 25,600 bytes; each frame under 256 bytes costs what it lacks until it is read) |
//! | CONTINUATION | h2: by count and size for each header block, from `max_header_list_size` |
//! | HPACK bombs | h2: `max_header_list_size`, `header_table_size` |
//! | streams opened | h2: `max_concurrent_streams`; refusals count into `max_local_error_reset_streams` |
//! | frames on closed streams, malformed messages | h2: `max_local_error_reset_streams` |
//! | RST_STREAM before hyper took the stream | h2: `max_pending_accept_reset_streams` |
//! | RST_STREAM after that (rapid reset) | here: h2 has no limit, and each reset throws a request's work away |
//! | SETTINGS | here: each is answered |
//! | PING | here: each is answered |
//! | PRIORITY | here: ignored by h2, for nothing |
//! | WINDOW_UPDATE | here |
//! | GOAWAY, PUSH_PROMISE, unknown types | here: h2 skips unknown ones in a loop that never yields |
//! | answers not read | `max_send_buf_size`, `keep_alive_interval` and `keep_alive_timeout` |
//!
//! So the server is to set `max_concurrent_streams`, `max_header_list_size`, `header_table_size`, `max_frame_size`,
//! `initial_stream_window_size`, `initial_connection_window_size` (a budget for small DATA comes with it; hyper does
//! not hand on h2's own knob), `max_pending_accept_reset_streams`, `max_local_error_reset_streams`,
//! `max_send_buf_size`, and `keep_alive_interval` and `keep_alive_timeout` with a `timer`.
//!
//! A peer that reads much has a right to more PING (it measures the path by them), WINDOW_UPDATE and RST_STREAM, so
//! bytes written to it earn these. When a rate is exceeded, h2 gets the start of a header block that never ends instead
//! of the frame: it says GOAWAY with ENHANCE_YOUR_CALM and ends the connection, its own defence against CONTINUATION
//! floods. Should it ask for more nevertheless, the read fails with a [`Flood`].
//!
//! The guard also takes part in ending a connection in order (RFC 9113 section 6.8). h2 says GOAWAY without a limit and
//! PING, and when the answer to that comes it says GOAWAY again, with the last stream that it has seen. But answers to
//! PING overtake HEADERS that wait in the peer's queue, as they do in h2's own client, and such a stream would be lost. So
//! the guard gives that answer to h2 a little later ([`FloodHandle::drain`]).

mod rates;

use std::error::Error;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use crate::proxy::detect::PREFACE;
use rates::Buckets;
pub use rates::{FrameLimits, Kind, Rate};

const HEADER: usize = 9;
/// HEADERS without END_HEADERS on stream 1, then CONTINUATION frames without an end.
const BLOCK_START: [u8; HEADER] = [0, 0, 0, 1, 0, 0, 0, 0, 1];
const BLOCK_MORE: [u8; HEADER] = [0, 0, 0, 9, 0, 0, 0, 0, 1];

/// How much later h2 hears that the peer has heard of the end: time for what was on its way before.
const STRAGGLERS: Duration = Duration::from_millis(500);
const PONG: usize = 8;
const PING_TYPE: u8 = 6;
const ACK: u8 = 1;
/// A type that nobody has given a meaning, so that h2 skips the frame (RFC 9113 section 5.5).
const SKIPPED_TYPE: u8 = 0xfa;

/// A peer sent more frames of a kind than its rate allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flood {
    /// Of which kind.
    pub kind: Kind,
}

impl fmt::Display for Flood {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "flood of HTTP/2 frames: {}", self.kind.as_str())
    }
}

impl Error for Flood {}

/// Tells whether a guard ended its connection. Clones are the same handle.
#[derive(Clone, Debug, Default)]
pub struct FloodHandle(Arc<Told>);

#[derive(Debug, Default)]
struct Told {
    flood: OnceLock<Flood>,
    draining: AtomicBool,
}

impl FloodHandle {
    /// The flood that ended the connection.
    pub fn flood(&self) -> Option<Flood> {
        self.0.flood.get().copied()
    }

    /// h2 is about to end the connection in order: what is on its way is waited for. To be called before it is told.
    pub fn drain(&self) {
        self.0.draining.store(true, Ordering::Relaxed);
    }
}

/// The guard, around a downstream. Reads are counted, writes go through.
#[derive(Debug)]
pub struct H2Guard<S> {
    io: S,
    buckets: Buckets,
    handle: FloodHandle,
    /// Bytes to come before the next frame header.
    payload: usize,
    /// A frame header that came in parts, and how much of it is here.
    header: [u8; HEADER],
    length: usize,
    /// So much of the whole header was given out again.
    given: usize,
    /// So many frames of the endless block were given out.
    block: usize,
    frames: usize,
    pong: Pong,
}

/// The answer to h2's PING of farewell.
#[derive(Debug)]
enum Pong {
    /// Not here.
    Awaited,
    /// So much of it is here.
    Coming([u8; PONG], usize),
    /// To be given to h2 at this time.
    Kept([u8; PONG], Pin<Box<Sleep>>),
    /// h2 has it.
    Given,
}

impl<S> H2Guard<S> {
    /// A guard for a server that is told `max_header_list_size` and `max_frame_size`, in bytes, and its handle.
    pub fn new(io: S, limits: &FrameLimits, max_header_list_size: u32, max_frame_size: u32) -> (Self, FloodHandle) {
        let handle = FloodHandle::default();
        // More CONTINUATION frames than h2 takes: five quarters of what the largest header list needs, at least five.
        let needed = usize::try_from(max_header_list_size / max_frame_size.max(1)).unwrap_or(usize::MAX);
        let guard = Self {
            io,
            buckets: Buckets::new(limits),
            handle: handle.clone(),
            payload: PREFACE.len(),
            header: [0; HEADER],
            length: 0,
            given: 0,
            block: 0,
            frames: needed.saturating_mul(2).saturating_add(8),
            pong: Pong::Awaited,
        };
        (guard, handle)
    }

    /// Counts a whole frame header. False: its kind comes too fast.
    fn count(&mut self, header: &mut [u8; HEADER]) -> bool {
        let [high, middle, low, number, flags, ..] = header;
        let (high, middle, low) = (*high, *middle, *low);
        let kind = Kind::of(*number);
        if let Some(kind) = kind
            && !self.buckets.take(kind)
        {
            let _ = self.handle.0.flood.set(Flood { kind });
            return false;
        }
        self.payload = usize::try_from(u32::from_be_bytes([0, high, middle, low])).unwrap_or(usize::MAX);
        if *number == PING_TYPE
            && *flags & ACK != 0
            && self.payload == PONG
            && matches!(self.pong, Pong::Awaited)
            && self.handle.0.draining.load(Ordering::Relaxed)
        {
            *number = SKIPPED_TYPE;
            self.pong = Pong::Coming([0; PONG], 0);
        }
        true
    }

    /// Keeps the payload of the answer that is given later.
    fn keep(&mut self, bytes: &[u8]) {
        let Pong::Coming(payload, here) = &mut self.pong else { return };
        for (to, from) in payload.iter_mut().skip(*here).zip(bytes) {
            *to = *from;
            *here += 1;
        }
        if *here == PONG {
            self.pong = Pong::Kept(*payload, Box::pin(tokio::time::sleep(STRAGGLERS)));
        }
    }

    /// Puts the answer that was kept between two frames, when it is time. Answers whether it did.
    fn put_pong(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> bool {
        let Pong::Kept(payload, time) = &mut self.pong else { return false };
        let between = self.payload == 0 && self.length == 0 && buf.remaining() >= HEADER + PONG;
        if time.as_mut().poll(cx).is_pending() || !between {
            return false;
        }
        buf.put_slice(&[0, 0, 8, PING_TYPE, ACK, 0, 0, 0, 0]);
        buf.put_slice(payload);
        self.pong = Pong::Given;
        true
    }

    /// Goes over what was just read. Returns how much of it may pass; a part of a header stays here.
    fn judge(&mut self, bytes: &mut [u8]) -> usize {
        let mut at = 0;
        loop {
            let skipped = self.payload.min(bytes.len() - at);
            self.payload -= skipped;
            if matches!(self.pong, Pong::Coming(..)) {
                self.keep(bytes.get(at..at + skipped).unwrap_or_default());
            }
            at += skipped;
            let rest = bytes.get_mut(at..).unwrap_or_default();
            match rest.first_chunk_mut() {
                Some(header) => {
                    if !self.count(header) {
                        return at;
                    }
                    at += HEADER;
                }
                None => {
                    if let Some(start) = self.header.get_mut(..rest.len()) {
                        start.copy_from_slice(rest);
                    }
                    self.length = rest.len();
                    return at;
                }
            }
        }
    }

    /// Puts the frames of a header block that never ends.
    fn put_block(&mut self, flood: Flood, buf: &mut ReadBuf<'_>) -> io::Result<()> {
        if self.block == self.frames * HEADER {
            return Err(io::Error::new(io::ErrorKind::InvalidData, flood));
        }
        while buf.remaining() > 0 && self.block < self.frames * HEADER {
            let frame = if self.block < HEADER { BLOCK_START } else { BLOCK_MORE };
            let rest = frame.get(self.block % HEADER..).unwrap_or_default();
            let part = rest.get(..buf.remaining()).unwrap_or(rest);
            buf.put_slice(part);
            self.block += part.len();
        }
        Ok(())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for H2Guard<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        loop {
            if let Some(flood) = this.handle.flood() {
                return Poll::Ready(this.put_block(flood, buf));
            }
            if this.put_pong(cx, buf) {
                return Poll::Ready(Ok(()));
            }
            if this.length == HEADER {
                let rest = this.header.get(this.given..).unwrap_or_default();
                let part = rest.get(..buf.remaining()).unwrap_or(rest);
                buf.put_slice(part);
                this.given += part.len();
                if this.given == HEADER {
                    this.length = 0;
                    this.given = 0;
                }
                return Poll::Ready(Ok(()));
            }
            if this.length > 0 {
                // Only the rest of the header, so that nothing has to be put behind it.
                let mut rest = ReadBuf::new(this.header.get_mut(this.length..).unwrap_or_default());
                ready!(Pin::new(&mut this.io).poll_read(cx, &mut rest))?;
                let read = rest.filled().len();
                if read == 0 {
                    return Poll::Ready(Ok(()));
                }
                this.length += read;
                if this.length == HEADER {
                    let mut header = this.header;
                    this.count(&mut header);
                    this.header = header;
                }
                continue;
            }
            ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
            let read = buf.filled_mut().get_mut(before..).unwrap_or_default();
            if read.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let passed = this.judge(read);
            buf.set_filled(before + passed);
            if passed > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for H2Guard<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.io).poll_write(cx, buf))?;
        this.buckets.earn(written);
        Poll::Ready(Ok(written))
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.io).poll_write_vectored(cx, bufs))?;
        this.buckets.earn(written);
        Poll::Ready(Ok(written))
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

#[cfg(test)]
mod tests;
