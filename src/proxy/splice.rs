//! Bytes between two TCP sockets that never come into this process: splice(2) moves them through a pipe in the kernel.
//!
//! In: two connected sockets, what was read ahead of each, deadlines. Out: how it ended. As in [`super::tcp`], half-close
//! works both ways, and nothing is held while nothing moves: a pipe costs two descriptors, so a worker thread lends one
//! when bytes come and takes it back once it is empty. Where no pipe of a useful size is to be had (descriptors, or the
//! user's pages for pipes, pipe(7)), bytes are copied through a buffer of the thread instead. An urgent byte (tcp(7)) is
//! dropped, as recv(2) drops it where it is not asked for, and what follows it is carried.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::pace::{Deadlines, Pace};
use super::record::Cause;
use super::tcp::End;

/// What a pipe holds, in bytes: below pipe-max-size (pipe(7)), and large enough that system calls do not count.
const PIPE: usize = 512 * 1024;
/// The smallest pipe that is worth its system calls.
const SMALLEST: usize = 64 * 1024;
/// Empty pipes that a worker thread keeps.
const SPARE: usize = 2;
/// How long a thread that could have no pipe does not ask for one.
const WITHOUT: Duration = Duration::from_secs(1);
/// What a thread lends to copy through, in bytes.
const COPIED: usize = 64 * 1024;
/// What is copied at once where splice(2) has nothing, in bytes: enough to get past an urgent mark.
const PAST_MARK: usize = 512;
/// Rounds of one direction before others get their turn.
const ROUNDS: usize = 8;

thread_local! {
    static PIPES: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
    static WITHOUT_UNTIL: Cell<Option<Instant>> = const { Cell::new(None) };
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A pipe, empty where it is not in use.
#[derive(Debug)]
struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
    size: usize,
}

impl Pipe {
    /// One of the thread's, or a new one. None where there is none to be had.
    fn lent() -> Option<Self> {
        if let Some(spare) = PIPES.with_borrow_mut(Vec::pop) {
            return Some(spare);
        }
        if WITHOUT_UNTIL.get().is_some_and(|until| Instant::now() < until) {
            return None;
        }
        let made = Self::new();
        WITHOUT_UNTIL.set(made.is_none().then(|| Instant::now() + WITHOUT));
        made
    }

    fn new() -> Option<Self> {
        let (out, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        let size = [PIPE, SMALLEST].into_iter().find_map(|size| fcntl_setpipe_size(&into, size).ok())?;
        Some(Self { out, into, size })
    }

    fn give_back(self) {
        PIPES.with_borrow_mut(|pipes| {
            if pipes.len() < SPARE {
                pipes.push(self);
            }
        });
    }
}

/// What one direction has taken and not yet delivered.
#[derive(Debug, Default)]
enum Held {
    #[default]
    Nothing,
    /// So many bytes in a pipe, never none.
    Piped(Pipe, usize),
    /// Bytes, and how many of them were delivered.
    Copied(Vec<u8>, usize),
}

#[derive(Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    Closing,
    Closed,
}

/// One direction.
#[derive(Debug, Default)]
struct Half {
    state: State,
    held: Held,
    moved: u64,
}

impl Half {
    /// One that begins with what was read ahead.
    fn after(ahead: Vec<u8>) -> Self {
        let moved = ahead.len() as u64;
        let held = if ahead.is_empty() { Held::Nothing } else { Held::Copied(ahead, 0) };
        Self { state: State::Open, held, moved }
    }

    fn poll(&mut self, cx: &mut Context<'_>, from: &TcpStream, to: &TcpStream) -> Poll<io::Result<()>> {
        for _ in 0..ROUNDS {
            std::task::ready!(self.deliver(cx, to))?;
            match self.state {
                State::Closed => return Poll::Ready(Ok(())),
                State::Closing => {
                    match socket2::SockRef::from(to).shutdown(std::net::Shutdown::Write) {
                        // The other side has gone already: nothing is lost, everything was written before.
                        Err(error) if error.kind() != io::ErrorKind::NotConnected => return Poll::Ready(Err(error)),
                        _ => self.state = State::Closed,
                    }
                }
                State::Open => std::task::ready!(self.take(cx, from))?,
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes what is held. Ready: nothing is held any more.
    fn deliver(&mut self, cx: &mut Context<'_>, to: &TcpStream) -> Poll<io::Result<()>> {
        loop {
            let written = match &mut self.held {
                Held::Nothing => return Poll::Ready(Ok(())),
                Held::Piped(pipe, left) => to.try_io(Interest::WRITABLE, || {
                    splice(&pipe.out, None, to, None, *left, SpliceFlags::MOVE | SpliceFlags::NONBLOCK)
                        .map_err(io::Error::from)
                }),
                Held::Copied(bytes, from) => to.try_write(bytes.get(*from..).unwrap_or_default()),
            };
            match written {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(count) => self.delivered(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::task::ready!(to.poll_write_ready(cx))?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn delivered(&mut self, count: usize) {
        self.held = match std::mem::take(&mut self.held) {
            Held::Piped(pipe, left) if left > count => Held::Piped(pipe, left - count),
            Held::Piped(pipe, _) => {
                pipe.give_back();
                Held::Nothing
            }
            Held::Copied(bytes, from) if from + count < bytes.len() => Held::Copied(bytes, from + count),
            Held::Copied(..) | Held::Nothing => Held::Nothing,
        };
    }

    /// Takes what there is, while nothing is held. Ready: something, or the end.
    fn take(&mut self, cx: &mut Context<'_>, from: &TcpStream) -> Poll<io::Result<()>> {
        loop {
            // Asked first: who has nothing to say costs no pipe.
            std::task::ready!(from.poll_read_ready(cx))?;
            let taken = match Pipe::lent() {
                Some(pipe) => spliced(pipe, from),
                None => copied(from),
            };
            match taken {
                Ok(Held::Nothing) => self.state = State::Closing,
                Ok(held) => {
                    self.moved += match &held {
                        Held::Piped(_, count) => *count as u64,
                        Held::Copied(bytes, _) => bytes.len() as u64,
                        Held::Nothing => 0,
                    };
                    self.held = held;
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    continue;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
            return Poll::Ready(Ok(()));
        }
    }
}

/// Moves bytes into a pipe. Nothing: the end.
///
/// splice(2) does not pass the mark of an urgent byte: it says EAGAIN there, or that this is the end once the peer has
/// sent its FIN, whatever is queued behind. recv(2) passes it, so neither is believed before that has said the same.
fn spliced(pipe: Pipe, from: &TcpStream) -> io::Result<Held> {
    let mut moved = 0;
    // Both calls within one `try_io`: EAGAIN of the first alone must not take away that the socket is readable.
    let copied = from.try_io(Interest::READABLE, || {
        match splice(from, None, &pipe.into, None, pipe.size, SpliceFlags::MOVE | SpliceFlags::NONBLOCK) {
            Ok(0) | Err(Errno::AGAIN) => past_mark(from),
            Ok(count) => {
                moved = count;
                Ok(Held::Nothing)
            }
            Err(error) => Err(error.into()),
        }
    });
    if moved > 0 {
        return Ok(Held::Piped(pipe, moved));
    }
    // An empty one, so it may be lent again.
    pipe.give_back();
    copied
}

/// Copies what is behind an urgent mark, if there is one. Nothing: the end.
fn past_mark(from: &TcpStream) -> io::Result<Held> {
    let mut bytes = [0; PAST_MARK];
    let (count, _) = recv(from, &mut bytes[..], RecvFlags::empty())?;
    Ok(held(bytes.get(..count).unwrap_or_default()))
}

/// Copies bytes. Nothing: the end.
fn copied(from: &TcpStream) -> io::Result<Held> {
    BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(COPIED, 0);
        let count = from.try_read(buffer)?;
        Ok(held(buffer.get(..count).unwrap_or_default()))
    })
}

fn held(bytes: &[u8]) -> Held {
    if bytes.is_empty() { Held::Nothing } else { Held::Copied(bytes.to_vec(), 0) }
}

/// One end of what is forwarded.
#[derive(Debug)]
pub struct Side<'a> {
    /// The socket.
    pub socket: &'a TcpStream,
    /// What was read of it already.
    pub ahead: Vec<u8>,
}

/// Forwards between a client and a server until both have finished, a deadline passes, or `stop` has a cause (it is given
/// the waker of the task, to be woken when it comes to that). `progress` hears how many bytes came from the client and
/// from the server since the last call.
#[derive(Debug)]
pub struct Splice<'a, S, F> {
    client: &'a TcpStream,
    server: &'a TcpStream,
    stop: S,
    from_client: Half,
    from_server: Half,
    pace: Pace<F>,
}

impl<'a, S, F> Splice<'a, S, F> {
    /// Ready to forward; nothing moves until it is polled.
    pub fn new(client: Side<'a>, server: Side<'a>, stop: S, deadlines: Deadlines, progress: F) -> Self {
        Self {
            client: client.socket,
            server: server.socket,
            stop,
            from_client: Half::after(client.ahead),
            from_server: Half::after(server.ahead),
            pace: Pace::new(deadlines, progress),
        }
    }

    fn half_closed(&self) -> bool {
        self.from_client.state == State::Closed || self.from_server.state == State::Closed
    }
}

impl<S, F> Future for Splice<'_, S, F>
where
    S: FnMut(&Waker) -> Option<Cause> + Unpin,
    F: FnMut(u64, u64) + Unpin,
{
    type Output = End;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<End> {
        let this = self.get_mut();
        if let Some(cause) = (this.stop)(cx.waker()) {
            return Poll::Ready(End::new(cause));
        }
        let out = this.from_client.poll(cx, this.client, this.server);
        let back = match &out {
            Poll::Ready(Err(_)) => Poll::Pending,
            _ => this.from_server.poll(cx, this.server, this.client),
        };
        this.pace.moved((this.from_client.moved, this.from_server.moved));
        match (out, back) {
            (Poll::Ready(Err(error)), _) | (_, Poll::Ready(Err(error))) => {
                return Poll::Ready(End { cause: Cause::Reset, detail: error.to_string() });
            }
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(End::new(Cause::Done)),
            _ => {}
        }
        let half_closed = this.half_closed();
        match this.pace.poll(cx, half_closed, None) {
            Some(cause) => Poll::Ready(End::new(cause)),
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests;
