//! Bytes between the two sides of an admitted connection.
//!
//! Buffers are lent only while bytes move: each worker thread has one, a read goes into it and straight out to the other
//! side. Only what the other side does not take at once is kept with the connection, and given back when it has. So an
//! idle connection holds no buffer of ours.
//!
//! Half-close works both ways. An end without close_notify on a remote side of TLS is a truncation and is passed on as a
//! reset, never as an orderly end.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::pace::{Deadlines, Pace};
use super::record::Cause;

/// What a worker thread lends, in bytes: four TLS records.
const LENT: usize = 64 * 1024;
/// How long the last words of a TLS peer that takes no more bytes are waited for. They are there already, if there are any.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Rounds of one direction before others get their turn.
const ROUNDS: usize = 8;

thread_local! {
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; LENT].into_boxed_slice());
}

/// How a connection ended.
#[derive(Debug)]
pub struct End {
    /// Why.
    pub cause: Cause,
    /// Details in words.
    pub detail: String,
}

impl End {
    pub(super) fn new(cause: Cause) -> Self {
        Self { cause, detail: String::new() }
    }
}

/// One direction.
#[derive(Debug, Default)]
struct Half {
    state: State,
    /// Bytes that the other side has not taken yet.
    held: Vec<u8>,
    taken: usize,
    unflushed: bool,
    /// An end or error that came behind bytes not yet delivered.
    deferred: Option<io::Result<()>>,
    moved: u64,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    Closing,
    Closed,
}

/// Which side an error came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// Whoever is reached over the network: a peer over TLS, or what is let through in plaintext.
    Remote,
    /// Our own workload.
    Workload,
}

type HalfResult = Poll<Result<(), (Side, io::Error)>>;

impl Half {
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        (r, reading): (&mut R, Side),
        (w, writing): (&mut W, Side),
    ) -> HalfResult
    where
        R: AsyncRead + AsyncWrite + Unpin,
        W: AsyncWrite + Unpin,
    {
        for _ in 0..ROUNDS {
            while let Some(rest) = self.held.get(self.taken..).filter(|rest| !rest.is_empty()) {
                match Pin::new(&mut *w).poll_write(cx, rest) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Ok(0)) => return Poll::Ready(Err((writing, io::ErrorKind::WriteZero.into()))),
                    Poll::Ready(Ok(count)) => self.taken += count,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err((writing, error))),
                }
            }
            if self.taken > 0 {
                self.held = Vec::new();
                self.taken = 0;
            }
            match self.state {
                State::Closed => return Poll::Ready(Ok(())),
                State::Closing => {
                    match Pin::new(&mut *w).poll_shutdown(cx) {
                        Poll::Pending => return Poll::Pending,
                        // The other side has gone already: nothing is lost, everything was written before.
                        Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::NotConnected => {}
                        Poll::Ready(Err(error)) => return Poll::Ready(Err((writing, error))),
                        Poll::Ready(Ok(())) => {}
                    }
                    self.state = State::Closed;
                }
                State::Open => match self.deferred.take() {
                    Some(Ok(())) => self.state = State::Closing,
                    Some(Err(error)) => return Poll::Ready(Err((reading, error))),
                    None => match self.pass(cx, r, (w, writing)) {
                        Poll::Ready(Ok(())) => {}
                        other => return other,
                    },
                },
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads what there is into the lent buffer and writes it out. Ready: there may be more.
    fn pass<R, W>(&mut self, cx: &mut Context<'_>, r: &mut R, (w, writing): (&mut W, Side)) -> HalfResult
    where
        R: AsyncRead + AsyncWrite + Unpin,
        W: AsyncWrite + Unpin,
    {
        BUFFER.with_borrow_mut(|buffer| {
            let mut lent = ReadBuf::new(buffer);
            let mut dry = false;
            while lent.remaining() > 0 && self.deferred.is_none() {
                let before = lent.filled().len();
                match Pin::new(&mut *r).poll_read(cx, &mut lent) {
                    Poll::Pending => {
                        dry = true;
                        break;
                    }
                    Poll::Ready(Ok(())) if lent.filled().len() == before => self.deferred = Some(Ok(())),
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => self.deferred = Some(Err(error)),
                }
            }
            if dry {
                // TLS may owe its peer an answer of its own (no_renegotiation, a key update), and the peer may wait for it.
                // What fails here fails at the next read or write.
                let _ = Pin::new(&mut *r).poll_flush(cx);
            }
            let mut rest = lent.filled();
            self.moved += rest.len() as u64;
            while !rest.is_empty() {
                match Pin::new(&mut *w).poll_write(cx, rest) {
                    Poll::Pending => {
                        self.held = rest.to_vec();
                        return Poll::Pending;
                    }
                    Poll::Ready(Ok(0)) => return Poll::Ready(Err((writing, io::ErrorKind::WriteZero.into()))),
                    Poll::Ready(Ok(count)) => {
                        self.unflushed = true;
                        rest = rest.get(count..).unwrap_or_default();
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Err((writing, error))),
                }
            }
            if dry && self.unflushed {
                match Pin::new(&mut *w).poll_flush(cx) {
                    Poll::Ready(Ok(())) => self.unflushed = false,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err((writing, error))),
                    Poll::Pending => {}
                }
            }
            if dry { Poll::Pending } else { Poll::Ready(Ok(())) }
        })
    }
}

/// Forwards between a remote side and the workload until both have finished, a deadline passes, or `stop` has a cause (it
/// is given the waker of the task, to be woken when it comes to that). `progress` hears how many bytes came from the remote
/// side and from the workload since the last call.
pub struct Forward<'a, T, P, S, F> {
    remote: &'a mut T,
    workload: &'a mut P,
    stop: S,
    from_remote: Half,
    from_workload: Half,
    /// Why nothing can be written to the remote side any more, and until when what its peer said last is waited for.
    broken: Option<(io::Error, Instant)>,
    pace: Pace<F>,
}

impl<T, P, S, F> std::fmt::Debug for Forward<'_, T, P, S, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forward")
            .field("from_remote", &self.from_remote)
            .field("from_workload", &self.from_workload)
            .finish_non_exhaustive()
    }
}

impl<'a, T, P, S, F> Forward<'a, T, P, S, F> {
    /// Ready to forward; nothing moves until it is polled.
    pub fn new(remote: &'a mut T, workload: &'a mut P, stop: S, deadlines: Deadlines, progress: F) -> Self {
        Self {
            remote,
            workload,
            stop,
            from_remote: Half::default(),
            from_workload: Half::default(),
            broken: None,
            pace: Pace::new(deadlines, progress),
        }
    }

    fn half_closed(&self) -> bool {
        self.from_remote.state == State::Closed || self.from_workload.state == State::Closed
    }

    /// When a broken connection ends.
    fn last_words(&self) -> Option<(Instant, Cause)> {
        self.broken.as_ref().map(|(_, until)| (*until, Cause::Reset))
    }
}

impl<T, P, S, F> Future for Forward<'_, T, P, S, F>
where
    T: AsyncRead + AsyncWrite + Unpin,
    P: AsyncRead + AsyncWrite + Unpin,
    S: FnMut(&Waker) -> Option<Cause> + Unpin,
    F: FnMut(u64, u64) + Unpin,
{
    type Output = End;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<End> {
        let this = self.get_mut();
        if let Some(cause) = (this.stop)(cx.waker()) {
            return Poll::Ready(End::new(cause));
        }
        let inward = this.from_remote.poll(cx, (this.remote, Side::Remote), (this.workload, Side::Workload));
        if let Some((error, _)) = &this.broken {
            match inward {
                Poll::Ready(Err((Side::Remote, alert))) if alert.kind() == io::ErrorKind::InvalidData => {
                    return Poll::Ready(end_of(Side::Remote, &alert));
                }
                Poll::Ready(_) => return Poll::Ready(end_of(Side::Remote, error)),
                Poll::Pending => {}
            }
        }
        let outward = match &inward {
            Poll::Ready(Err(_)) => Poll::Pending,
            _ if this.broken.is_some() => Poll::Pending,
            _ => this.from_workload.poll(cx, (this.workload, Side::Workload), (this.remote, Side::Remote)),
        };
        this.pace.moved((this.from_remote.moved, this.from_workload.moved));
        match (inward, outward) {
            (Poll::Ready(Err((side, error))), _) => return Poll::Ready(end_of(side, &error)),
            (Poll::Pending, Poll::Ready(Err((Side::Remote, error)))) => {
                // A peer that refuses us says why and goes: its alert may lie unread before the broken pipe.
                this.broken = Some((error, Instant::now() + LAST_WORDS));
                this.pace.reset(this.last_words());
            }
            (_, Poll::Ready(Err((side, error)))) => return Poll::Ready(end_of(side, &error)),
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(End::new(Cause::Done)),
            _ => {}
        }
        let (half_closed, last_words) = (this.half_closed(), this.last_words());
        match this.pace.poll(cx, half_closed, last_words) {
            Some(cause) => Poll::Ready(End::new(cause)),
            None => Poll::Pending,
        }
    }
}

fn end_of(side: Side, error: &io::Error) -> End {
    let cause = match (side, error.kind()) {
        (Side::Remote, io::ErrorKind::UnexpectedEof) => Cause::Truncated,
        (Side::Remote, io::ErrorKind::InvalidData) => Cause::TlsError,
        _ => Cause::Reset,
    };
    let who = if side == Side::Remote { "remote side" } else { "workload" };
    End { cause, detail: format!("{who}: {error}") }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::proxy::listener::Client;
    use crate::proxy::registry::Registry;
    use crate::tls::record::Direction;

    /// A TLS side whose peer refuses us between our look for bytes and our writing some.
    struct Refusing {
        looked: bool,
        alert: bool,
    }

    impl AsyncRead for Refusing {
        fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            if !self.looked {
                self.looked = true;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let kind = if self.alert { io::ErrorKind::InvalidData } else { io::ErrorKind::ConnectionReset };
            Poll::Ready(Err(kind.into()))
        }
    }

    impl AsyncWrite for Refusing {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn an_alert_explains_the_broken_pipe_behind_it() {
        for (alert, cause) in [(true, Cause::TlsError), (false, Cause::Reset)] {
            let client = Client::Tcp(([127, 0, 0, 1], 1).into());
            let registration = Arc::new(Registry::default()).register(Direction::Outbound, "up".into(), client);
            let (mut workload, mut plain) = tokio::io::duplex(64);
            workload.write_all(b"request").await.unwrap();
            let minute = Duration::from_secs(60);
            let deadlines = Deadlines { idle: minute, half_closed: minute, max_age: None, peer_expiry: None };
            let mut tls = Refusing { looked: false, alert };
            let end = Forward::new(&mut tls, &mut plain, registration.entry().stopper(), deadlines, |_, _| ()).await;
            assert_eq!(end.cause, cause, "{}", end.detail);
        }
    }
}
