//! A close that lets the last answer arrive.
//!
//! Whoever is answered while still sending (a refusal, an early response) would get a reset for what we have not read, and
//! a reset takes an answer that was not read yet with it (RFC 9112, section 9.6). So our side is closed first, and what
//! still comes is read and thrown away for a short while.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// How long the other side is waited for.
const LINGER: Duration = Duration::from_secs(1);
/// Bytes that are thrown away at most.
const MOST: usize = 16 << 20;

/// A stream whose close lingers.
pub(in crate::proxy) struct Lingering<S> {
    io: S,
    /// Set once our side is closed.
    rest: Option<Pin<Box<Sleep>>>,
    discarded: usize,
}

impl<S> Lingering<S> {
    pub(in crate::proxy) fn new(io: S) -> Self {
        Self { io, rest: None, discarded: 0 }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Lingering<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Lingering<S> {
    crate::proxy::io::writes_pass!();

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.rest.is_none() {
            ready!(Pin::new(&mut this.io).poll_shutdown(cx))?;
        }
        let rest = this.rest.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER)));
        let mut thrown_away = [0; 8192];
        while this.discarded < MOST && rest.as_mut().poll(cx).is_pending() {
            let mut buf = ReadBuf::new(&mut thrown_away);
            match ready!(Pin::new(&mut this.io).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => this.discarded += buf.filled().len(),
                _ => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_still_comes_is_thrown_away_until_the_other_side_has_done_or_time_is_over() {
        let (near, mut far) = duplex(1024);
        let closing = tokio::spawn(async move { Lingering::new(near).shutdown().await });
        far.write_all(&[7; 100_000]).await.unwrap();
        assert_eq!(far.read(&mut [0; 1]).await.unwrap(), 0, "our side is closed first");
        assert!(!closing.is_finished());
        drop(far);
        closing.await.unwrap().unwrap();

        let (near, far) = duplex(1024);
        Lingering::new(near).shutdown().await.unwrap();
        drop(far);
    }
}
