//! What the targets share.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, ReadBuf};

/// Gives out its bytes in pieces, one for each read, and then the end.
#[derive(Debug)]
pub struct Pieces(VecDeque<Vec<u8>>);

impl Pieces {
    /// Pieces of `size` bytes, at least one.
    pub fn new(bytes: &[u8], size: usize) -> Self {
        Self(bytes.chunks(size.max(1)).map(<[u8]>::to_vec).collect())
    }
}

impl AsyncRead for Pieces {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(mut piece) = self.0.pop_front() {
            let rest = piece.split_off(piece.len().min(buf.remaining()));
            buf.put_slice(&piece);
            if !rest.is_empty() {
                self.0.push_front(rest);
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// How a stream that was read to its end ended.
#[derive(Debug)]
pub enum Ending {
    /// Orderly.
    Closed,
    /// It said nothing more.
    Silent,
    /// With an error.
    Failed(io::Error),
}

/// Reads all there is, `room` bytes at a time at most.
pub fn read_all(io: &mut (impl AsyncRead + Unpin), room: usize) -> (Vec<u8>, Ending) {
    let mut cx = Context::from_waker(Waker::noop());
    let mut all = Vec::new();
    let mut space = vec![0; room.max(1)];
    loop {
        let mut buf = ReadBuf::new(&mut space);
        match Pin::new(&mut *io).poll_read(&mut cx, &mut buf) {
            Poll::Ready(Ok(())) if buf.filled().is_empty() => return (all, Ending::Closed),
            Poll::Ready(Ok(())) => all.extend_from_slice(buf.filled()),
            Poll::Ready(Err(error)) => return (all, Ending::Failed(error)),
            Poll::Pending => return (all, Ending::Silent),
        }
    }
}
