//! Reads from the socket in large steps.
//!
//! rustls asks for 4 kB at a time, which costs four system calls for one full record. Here a worker thread lends a large
//! buffer for the read; what rustls did not take yet keeps the buffer, and it goes back once that is taken. An idle
//! connection holds none.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What a worker thread lends, in bytes.
const LENT: usize = 64 * 1024;

thread_local! {
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// A stream that reads ahead.
#[derive(Debug)]
pub struct ReadAhead<S> {
    io: S,
    /// The lent buffer while something in it has not been taken: empty otherwise.
    lent: Vec<u8>,
    /// The part of it that has not been taken.
    from: usize,
    to: usize,
}

impl<S> ReadAhead<S> {
    /// Reads ahead of whoever reads from `io`.
    pub fn new(io: S) -> Self {
        Self { io, lent: Vec::new(), from: 0, to: 0 }
    }

    /// The same, of which these bytes have been read already and come once more.
    pub fn resumed(io: S, bytes: Vec<u8>) -> Self {
        Self { io, from: 0, to: bytes.len(), lent: bytes }
    }

    /// The stream underneath.
    pub fn get_ref(&self) -> &S {
        &self.io
    }

    /// Gives what was read ahead, as far as it fits. Answers whether there was anything.
    fn give(&mut self, buf: &mut ReadBuf<'_>) -> bool {
        let Some(rest) = self.lent.get(self.from..self.to).filter(|rest| !rest.is_empty()) else { return false };
        let count = rest.len().min(buf.remaining());
        buf.put_slice(rest.get(..count).unwrap_or_default());
        self.from += count;
        if self.from == self.to {
            // The thread keeps one spare buffer; a second one is freed.
            SPARE.set(std::mem::take(&mut self.lent));
        }
        true
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.give(buf) {
            return Poll::Ready(Ok(()));
        }
        let mut lent = SPARE.take();
        lent.resize(LENT, 0);
        let mut ahead = ReadBuf::new(&mut lent);
        let read = Pin::new(&mut this.io).poll_read(cx, &mut ahead);
        let count = ahead.filled().len();
        if count == 0 {
            SPARE.set(lent);
            return read;
        }
        ready!(read)?;
        (this.lent, this.from, this.to) = (lent, 0, count);
        this.give(buf);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ReadAhead<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn gives_every_byte_once_and_in_order_and_the_end_after_them() {
        let (near, mut far) = tokio::io::duplex(256 * 1024);
        let sent: Vec<u8> = (0..200_000u32).map(|n| (n % 251) as u8).collect();
        far.write_all(&sent).await.unwrap();
        drop(far);
        let mut first = vec![0; 9];
        let mut near = near;
        near.read_exact(&mut first).await.unwrap();
        let mut near = ReadAhead::resumed(near, first);
        let mut got = Vec::new();
        let mut step = 1;
        loop {
            let mut buffer = vec![0; step];
            let count = near.read(&mut buffer).await.unwrap();
            if count == 0 {
                break;
            }
            got.extend_from_slice(&buffer[..count]);
            step = step % 5000 + 613;
        }
        assert!(got == sent);
        assert!(near.lent.is_empty(), "nothing is kept once everything is taken");
    }
}
