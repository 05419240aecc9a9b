//! The first bytes of a captured connection: what is spoken, and whom the client says it is for.
//!
//! In: a socket, and which of that somebody wants to know. Out: a [`First`] and the bytes that were read for it, which
//! belong in front of the rest. Bounded in bytes and in time. Nothing here judges: what the client says decides only
//! which listener takes it, and that one reads everything again.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use http::uri::Authority;
use hyper::body::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::{Instant, timeout_at};

use crate::proxy::detect::{Detected, PREFACE, detect};
use crate::tls::flight::{CLIENT_HELLO, Piece, Pieces};
use crate::tls::hello;

/// What a client says first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::proxy) enum First {
    /// TLS.
    Tls {
        /// Whom its ClientHello is for.
        server_name: Option<Box<str>>,
    },
    /// HTTP.
    Http {
        /// The host of its first request, without the port.
        host: Option<Box<str>>,
    },
    /// Something else.
    Other,
    /// Nothing in time.
    Silent,
}

/// What is asked of the first bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::proxy) struct Wants {
    /// The server name of TLS.
    pub(in crate::proxy) server_name: bool,
    /// The host of HTTP.
    pub(in crate::proxy) host: bool,
}

impl Wants {
    /// Whether anything is.
    pub(in crate::proxy) fn any(self) -> bool {
        self.server_name || self.host
    }
}

/// Reads until it is known what is asked for, at most for `within` and a head of at most `most` bytes.
///
/// # Errors
/// The stream's own.
pub(in crate::proxy) async fn read<S: AsyncRead + Unpin>(
    io: &mut S,
    wants: Wants,
    within: Duration,
    most: usize,
) -> io::Result<(First, Vec<u8>)> {
    let deadline = Instant::now() + within;
    let mut look = Look { wants, most, pieces: Pieces::default(), scanned: 0 };
    let mut seen = Vec::new();
    loop {
        let mut buffer = [0; 2048];
        let count = match timeout_at(deadline, io.read(&mut buffer)).await {
            Ok(read) => read?,
            Err(_) => 0,
        };
        if count == 0 {
            return Ok((unfinished(&seen), seen));
        }
        seen.extend_from_slice(buffer.get(..count).unwrap_or_default());
        if let Some(first) = look.at(&seen) {
            return Ok((first, seen));
        }
    }
}

/// What it is, where the name in it does not come.
fn unfinished(seen: &[u8]) -> First {
    match detect(seen) {
        Detected::Tls => First::Tls { server_name: None },
        Detected::Http1 | Detected::Http2 => First::Http { host: None },
        Detected::More if seen.is_empty() => First::Silent,
        Detected::More | Detected::Opaque => First::Other,
    }
}

/// A look at first bytes while they come.
struct Look {
    wants: Wants,
    most: usize,
    pieces: Pieces,
    /// Bytes that hold no end of a head.
    scanned: usize,
}

impl Look {
    /// The answer, once these bytes, which are all so far, give it.
    fn at(&mut self, seen: &[u8]) -> Option<First> {
        match detect(seen) {
            Detected::More => None,
            Detected::Opaque => Some(First::Other),
            Detected::Tls if !self.wants.server_name => Some(First::Tls { server_name: None }),
            Detected::Tls => match self.pieces.next(seen) {
                Piece::More if seen.len() <= hello::MAX_HELLO_BYTES => None,
                Piece::Message { kind: CLIENT_HELLO, body } => {
                    Some(First::Tls { server_name: hello::server_name(&body) })
                }
                _ => Some(First::Tls { server_name: None }),
            },
            Detected::Http1 | Detected::Http2 if !self.wants.host => Some(First::Http { host: None }),
            Detected::Http1 => match self.head(seen) {
                Some(head) if head.len() <= self.most => Some(First::Http { host: host_of_head(head) }),
                Some(_) => Some(First::Http { host: None }),
                None => (seen.len() > self.most).then_some(First::Http { host: None }),
            },
            Detected::Http2 => match first_headers(seen) {
                Frames::Whole(end) if end <= self.most => {
                    let request = seen.get(..end).unwrap_or_default();
                    Some(First::Http { host: host_of_http2(request, self.most) })
                }
                Frames::More if seen.len() <= self.most => None,
                _ => Some(First::Http { host: None }),
            },
        }
    }

    /// The head of an HTTP/1 request, once it is whole.
    fn head<'a>(&mut self, seen: &'a [u8]) -> Option<&'a [u8]> {
        let begin = seen.iter().position(|byte| !matches!(byte, b'\r' | b'\n'))?;
        let mut at = self.scanned.max(begin);
        while let Some(end) = memchr::memchr(b'\n', seen.get(at..)?).map(|found| at + found + 1) {
            match seen.get(end..)? {
                [b'\n', ..] | [b'\r', b'\n', ..] => return seen.get(begin..end),
                [] | [b'\r'] => {
                    // The next byte tells.
                    self.scanned = end - 1;
                    return None;
                }
                _ => at = end,
            }
        }
        self.scanned = seen.len();
        None
    }
}

/// The host of a head: of an absolute target or of CONNECT's, else of the first `Host`.
fn host_of_head(head: &[u8]) -> Option<Box<str>> {
    let mut lines = head.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let mut words = lines.next()?.split(|byte| matches!(byte, b' ' | b'\t')).filter(|word| !word.is_empty());
    let (method, target) = (words.next()?, words.next()?);
    if method == b"CONNECT" {
        return host_of(target);
    }
    if let Ok(target) = http::Uri::try_from(target)
        && let Some(authority) = target.authority()
    {
        return plain_host(authority);
    }
    let host = lines.find_map(|line| {
        let (name, value) = line.split_at_checked(line.iter().position(|byte| *byte == b':')?)?;
        name.eq_ignore_ascii_case(b"host").then(|| value.get(1..).unwrap_or_default().trim_ascii())
    })?;
    host_of(host)
}

fn host_of(authority: &[u8]) -> Option<Box<str>> {
    plain_host(&Authority::try_from(authority).ok()?)
}

fn plain_host(authority: &Authority) -> Option<Box<str>> {
    let host = authority.host().trim_end_matches('.');
    (!host.is_empty()).then(|| host.to_ascii_lowercase().into())
}

/// How far the frames of HTTP/2 have come (RFC 9113, section 4.1).
enum Frames {
    /// Up to here stand the first HEADERS with all that continues them.
    Whole(usize),
    More,
    Broken,
}

fn first_headers(seen: &[u8]) -> Frames {
    const HEADERS: u8 = 1;
    const CONTINUATION: u8 = 9;
    const END_HEADERS: u8 = 4;
    let mut at = PREFACE.len();
    let mut begun = false;
    loop {
        let Some([high, middle, low, kind, flags, _, _, _, _]) = seen.get(at..at + 9) else { return Frames::More };
        at += 9 + (usize::from(*high) << 16 | usize::from(*middle) << 8 | usize::from(*low));
        match (begun, *kind) {
            (false, HEADERS) | (true, CONTINUATION) => begun = true,
            (false, _) => continue,
            (true, _) => return Frames::Broken,
        }
        if flags & END_HEADERS != 0 {
            return if at <= seen.len() { Frames::Whole(at) } else { Frames::More };
        }
    }
}

/// The host of the first request among these frames: the library that will serve them reads them. What it would answer is
/// thrown away.
fn host_of_http2(frames: &[u8], most: usize) -> Option<Box<str>> {
    let mut context = Context::from_waker(Waker::noop());
    let mut builder = h2::server::Builder::new();
    builder.max_header_list_size(u32::try_from(most).unwrap_or(u32::MAX));
    let handshake = pin!(builder.handshake::<_, Bytes>(Heard(frames)));
    let Poll::Ready(Ok(mut connection)) = handshake.poll(&mut context) else { return None };
    let Poll::Ready(Some(Ok((request, _)))) = connection.poll_accept(&mut context) else { return None };
    match request.uri().authority() {
        Some(authority) => plain_host(authority),
        None => host_of(request.headers().get(http::header::HOST)?.as_bytes()),
    }
}

/// Bytes that were heard, with nobody there to answer.
struct Heard<'a>(&'a [u8]);

impl AsyncRead for Heard<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.0.is_empty() {
            return Poll::Pending;
        }
        let (now, rest) = self.0.split_at(self.0.len().min(buf.remaining()));
        buf.put_slice(now);
        self.0 = rest;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Heard<'_> {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(buf.len()))
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests;
