//! What a peer speaks, told from its first bytes.
//!
//! In: the first bytes of a connection, at most [`MAX`] of them. Out: TLS, HTTP/1, HTTP/2 or something else, and a
//! stream that gives the bytes again. The verdict never changes when more bytes come.
//!
//! The bias is towards HTTP: what some lenient server could take for a request must not slip past the rules for
//! requests by looking odd. The strict guard behind this room refuses it with a 400 instead.
//!
//! * A method in capitals (RFC 9110 section 9.1), white space and `/` are HTTP/1 at once. Redis's inline commands on a
//!   key that begins with `/`, and RTSP with a bare path, are taken for HTTP: name their ports as opaque.
//! * `CONNECT` and a letter, digit or `[`, and `http://` or `https://` after any method, are HTTP/1 at once.
//! * Any other token (RFC 9110 section 5.6.2) of at most 32 bytes and white space wait for ` HTTP/` in the same line.
//!   A line's end or another control byte first: opaque. That is where SMTP, IMAP, Redis, memcached, NATS, SSH and SIP
//!   end. [`MAX`] bytes first: HTTP/1 when the target began with `/`, else opaque.
//! * Empty lines before the first are skipped, as HTTP servers do.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::{Instant, timeout_at};

/// The number of bytes after which the answer is final.
pub const MAX: usize = 64;
/// The connection preface of HTTP/2 (RFC 9113 section 3.4).
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const MAX_METHOD: usize = 32;

/// What the first bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detected {
    /// A TLS ClientHello (RFC 8446 sections 4 and 5.1).
    Tls,
    /// A request line of HTTP/1.
    Http1,
    /// The connection preface of HTTP/2.
    Http2,
    /// Anything else.
    Opaque,
    /// Not to be told yet. Never the answer for [`MAX`] bytes.
    More,
}

/// Tells what a connection speaks from its first bytes. Looks at no more than [`MAX`].
pub fn detect(bytes: &[u8]) -> Detected {
    let bytes = bytes.get(..MAX).unwrap_or(bytes);
    if bytes.first() == Some(&22) {
        tls(bytes)
    } else if bytes.starts_with(PREFACE) {
        Detected::Http2
    } else if PREFACE.starts_with(bytes) {
        Detected::More
    } else {
        http1(bytes)
    }
}

/// Tells TLS ([`Detected::Tls`]) from whatever else it is ([`Detected::Opaque`]), mostly by the first byte.
pub fn tls_or_not(bytes: &[u8]) -> Detected {
    match bytes.first() {
        None => Detected::More,
        Some(22) => tls(bytes),
        Some(_) => Detected::Opaque,
    }
}

/// A record of type handshake, version 3.x, a length that a record can have, and the beginning of a ClientHello in it,
/// which may go on in others.
fn tls(bytes: &[u8]) -> Detected {
    let fits = |at: usize, good: fn(u8) -> bool| bytes.get(at).is_none_or(|byte| good(*byte));
    let length = match bytes {
        [_, _, _, high, low, ..] => Some(u16::from_be_bytes([*high, *low])),
        _ => None,
    };
    let good = fits(1, |byte| byte == 3)
        && fits(2, |byte| byte <= 4)
        && fits(3, |byte| byte <= 0x40)
        && length.is_none_or(|length| (1..=0x4000).contains(&length))
        && fits(5, |byte| byte == 1);
    match (good, bytes.len() > 5) {
        (false, _) => Detected::Opaque,
        (true, false) => Detected::More,
        (true, true) => Detected::Tls,
    }
}

fn http1(bytes: &[u8]) -> Detected {
    // What to say when the bytes given do not decide.
    let unless_more = |last: Detected| if bytes.len() < MAX { Detected::More } else { last };
    let Some(start) = bytes.iter().position(|byte| !matches!(byte, b'\r' | b'\n')) else {
        return unless_more(Detected::Opaque);
    };
    let line = bytes.get(start..).unwrap_or_default();
    let length = line.iter().take_while(|byte| is_token(**byte)).count();
    let (method, rest) = line.split_at_checked(length).unwrap_or_default();
    if method.len() > MAX_METHOD {
        return Detected::Opaque;
    }
    match rest.first() {
        None => return unless_more(Detected::Opaque),
        Some(b' ' | b'\t') if !method.is_empty() => {}
        Some(_) => return Detected::Opaque,
    }
    let Some(gap) = rest.iter().position(|byte| !matches!(byte, b' ' | b'\t')) else {
        return unless_more(Detected::Opaque);
    };
    let target = rest.get(gap..).unwrap_or_default();
    let first = target.first().copied().unwrap_or_default();
    let capitals = method.iter().all(|byte| byte.is_ascii_uppercase() || *byte == b'-');
    let connect = method == b"CONNECT" && (first.is_ascii_alphanumeric() || first == b'[');
    if (capitals && first == b'/') || connect || is_absolute(target) {
        return Detected::Http1;
    }
    let control = target.iter().position(|byte| byte.is_ascii_control() && *byte != b'\t');
    let line = target.get(..control.unwrap_or(target.len())).unwrap_or_default();
    let version = line.windows(6).any(|six| matches!(six, [b' ' | b'\t', name @ ..] if name == b"HTTP/"));
    match (version, control) {
        (true, _) => Detected::Http1,
        (false, Some(_)) => Detected::Opaque,
        (false, None) if first == b'/' => unless_more(Detected::Http1),
        (false, None) => unless_more(Detected::Opaque),
    }
}

/// Whether a target begins with `http://` or `https://` (RFC 9110 section 4.2).
fn is_absolute(target: &[u8]) -> bool {
    [&b"http://"[..], b"https://"]
        .iter()
        .any(|scheme| target.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme)))
}

/// `tchar` of RFC 9110 section 5.6.2.
pub(super) const fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~'
        )
}

/// How the wait for the first bytes ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// They told what they are; never [`Detected::More`].
    Detected(Detected),
    /// The time was over before they did.
    TimedOut,
    /// The peer ended its side before they did.
    Closed,
}

/// Reads until [`detect`] gives an answer: `first` is how long the first byte may take, `rest` how long the others may
/// after it. What was read is in the stream that comes back.
///
/// # Errors
///
/// The stream's own, with which the connection is lost.
pub async fn read_until_detected<S>(io: S, first: Duration, rest: Duration) -> io::Result<(Outcome, Prefixed<S>)>
where
    S: AsyncRead + Unpin,
{
    read_until(io, detect, first, rest).await
}

/// [`read_until_detected`] by another way to tell, which gives an answer for [`MAX`] bytes at the latest.
///
/// # Errors
///
/// The stream's own, with which the connection is lost.
pub async fn read_until<S>(
    mut io: S,
    detect: fn(&[u8]) -> Detected,
    first: Duration,
    rest: Duration,
) -> io::Result<(Outcome, Prefixed<S>)>
where
    S: AsyncRead + Unpin,
{
    let mut seen = [0; MAX];
    let mut length = 0;
    let ahead = |seen: &[u8; MAX], length| seen.get(..length).unwrap_or_default().to_vec();
    let mut deadline = Instant::now().checked_add(first);
    let outcome = loop {
        let space = seen.get_mut(length..).unwrap_or_default();
        let read = match deadline {
            Some(deadline) => timeout_at(deadline, io.read(space)).await,
            None => Ok(io.read(space).await),
        };
        match read {
            Err(_) => break Outcome::TimedOut,
            Ok(Ok(0)) => break Outcome::Closed,
            Ok(Ok(count)) => {
                if length == 0 {
                    deadline = Instant::now().checked_add(rest);
                }
                length += count;
            }
            Ok(Err(error)) => return Err(error),
        }
        match detect(seen.get(..length).unwrap_or_default()) {
            Detected::More => {}
            found => break Outcome::Detected(found),
        }
    };
    Ok((outcome, Prefixed::with(ahead(&seen, length), io)))
}

/// A stream whose first bytes were read already and come once more.
#[derive(Debug)]
pub struct Prefixed<S> {
    /// Empty as soon as all of it was given.
    seen: Vec<u8>,
    at: usize,
    io: S,
}

impl<S> Prefixed<S> {
    /// A stream of which nothing was read yet.
    pub fn new(io: S) -> Self {
        Self::with(Vec::new(), io)
    }

    /// A stream of which these bytes were read.
    pub fn with(seen: Vec<u8>, io: S) -> Self {
        Self { seen, at: 0, io }
    }

    /// The bytes that were read ahead and not given again yet.
    pub fn ahead(&self) -> &[u8] {
        self.seen.get(self.at..).unwrap_or_default()
    }

    /// The stream underneath.
    pub fn get_ref(&self) -> &S {
        &self.io
    }

    /// The bytes that were read ahead and not given again, and the stream underneath.
    pub fn into_parts(self) -> (Vec<u8>, S) {
        (self.ahead().to_vec(), self.io)
    }
}

impl<S> Prefixed<Prefixed<S>> {
    /// One in place of two.
    pub fn joined(self) -> Prefixed<S> {
        let (mut seen, inner) = self.into_parts();
        let (rest, io) = inner.into_parts();
        seen.extend(rest);
        Prefixed::with(seen, io)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let ahead = this.ahead();
        if ahead.is_empty() {
            return Pin::new(&mut this.io).poll_read(cx, buf);
        }
        let ahead = ahead.get(..buf.remaining()).unwrap_or(ahead);
        let count = ahead.len();
        buf.put_slice(ahead);
        this.at += count;
        if this.at == this.seen.len() {
            this.seen = Vec::new();
            this.at = 0;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    super::io::writes_pass!();

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{AsyncWriteExt, duplex};

    use super::*;

    const HELLO: &[u8] = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
    /// What a client of each protocol says first.
    const SAMPLES: &[(&[u8], Detected)] = &[
        (HELLO, Detected::Tls),
        (b"\x16\x03\x03\x40\x00\x01", Detected::Tls),
        (b"\x16\x03\x01\x40\x01\x01", Detected::Opaque),
        (b"\x16\x03\x01\x00\x01\x01", Detected::Tls),
        (b"\x16\x03\x01\x00\x00\x01", Detected::Opaque),
        (b"\x16\x03\x01\x02\x00\x02", Detected::Opaque),
        (b"\x16\x02", Detected::Opaque),
        (b"\x15\x03\x01", Detected::Opaque),
        (PREFACE, Detected::Http2),
        (b"PRI * HTTP/2.0\r\n\r\nSN\r\n\r\n", Detected::Http1),
        (b"PRI / HTTP/1.1\r\n", Detected::Http1),
        (b"GET / HTTP/1.1\r\n", Detected::Http1),
        (b"GET /\r\n", Detected::Http1),
        (b"GET  /  HTTP/1.1\r\n", Detected::Http1),
        (b"\r\n\nGET / HTTP/1.1\r\n", Detected::Http1),
        (b"VERSION-CONTROL /x HTTP/1.1\r\n", Detected::Http1),
        (b"OPTIONS * HTTP/1.1\r\n", Detected::Http1),
        (b"get / HTTP/1.1\r\n", Detected::Http1),
        (b"g!t\t/\tHTTP/1.1\r\n", Detected::Http1),
        (b"CONNECT records.example:443 HTTP/1.1\r\n", Detected::Http1),
        (b"CONNECT [::1]:443 HTTP/1.1\r\n", Detected::Http1),
        (b"GET http://records.example/ HTTP/1.1\r\n", Detected::Http1),
        (b"x HTTPS://records.example/ HTTP/1.1\r\n", Detected::Http1),
        (b"GET records HTTP/1.1\r\n", Detected::Http1),
        (b"EHLO mail.example\r\n", Detected::Opaque),
        (b"MAIL FROM:<a@b.example>\r\n", Detected::Opaque),
        (b"a001 LOGIN user secret\r\n", Detected::Opaque),
        (b"USER anonymous\r\n", Detected::Opaque),
        (b"GET key\r\n", Detected::Opaque),
        (b"KEYS *\r\n", Detected::Opaque),
        (b"PING\r\n", Detected::Opaque),
        (b"*1\r\n$4\r\nPING\r\n", Detected::Opaque),
        (b"get key\r\n", Detected::Opaque),
        (b"stats\r\n", Detected::Opaque),
        (b"set key 0 0 1\r\nx\r\n", Detected::Opaque),
        (b"SSH-2.0-OpenSSH_9.6\r\n", Detected::Opaque),
        (b"SSH-2.0-OpenSSH_9.6 Debian-3\r\n", Detected::Opaque),
        (b"CONNECT {\"verbose\":false}\r\n", Detected::Opaque),
        (b"INVITE sip:bob@records.example SIP/2.0\r\n", Detected::Opaque),
        (b"OPTIONS * RTSP/1.0\r\n", Detected::Opaque),
        (b"0033git-upload-pack /project.git\0host=x\0", Detected::Opaque),
        (b"\x55\x00\x00\x01\x8d\xa2", Detected::Opaque),
        (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", Detected::Opaque),
        (b"\x10\x0c\x00\x04MQTT", Detected::Opaque),
        (b"AMQP\x00\x00\x09\x01", Detected::Opaque),
        (b"\r\n\r\n\0\r\nQUIT\n", Detected::Opaque),
    ];

    #[test]
    fn every_protocol_is_told_from_every_prefix() {
        for (bytes, expected) in SAMPLES {
            let shown = bytes.escape_ascii();
            assert_eq!(detect(bytes), *expected, "{shown}");
            monotone(bytes);
            // What follows changes nothing.
            for tail in [&b"\r\n / HTTP/1.1\r\n"[..], &[b'a'; MAX], &[0; MAX]] {
                assert_eq!(detect(&[bytes, tail].concat()), *expected, "{shown}");
            }
        }
    }

    #[test]
    fn tls_is_told_from_everything_else_as_soon_as_can_be() {
        for (bytes, expected) in SAMPLES {
            let tls = *expected == Detected::Tls;
            assert_eq!(
                tls_or_not(bytes),
                if tls { Detected::Tls } else { Detected::Opaque },
                "{}",
                bytes.escape_ascii()
            );
        }
        for more in [&b""[..], b"\x16", &HELLO[..5]] {
            assert_eq!(tls_or_not(more), Detected::More, "{}", more.escape_ascii());
        }
        assert_eq!(tls_or_not(b"G"), Detected::Opaque, "nothing that begins so becomes TLS");
    }

    #[test]
    fn at_most_a_fixed_number_of_bytes_is_wanted() {
        for (start, expected) in [
            (&b"\r\n\r"[..], Detected::Opaque),
            (b"GET a", Detected::Opaque),
            (b"get /", Detected::Http1),
            (b"get   ", Detected::Opaque),
        ] {
            let last = *start.last().unwrap();
            let mut bytes = start.to_vec();
            bytes.resize(MAX - 1, last);
            assert_eq!(detect(&bytes), Detected::More, "{}", start.escape_ascii());
            bytes.push(last);
            assert_eq!(detect(&bytes), expected, "{}", start.escape_ascii());
        }
        assert_eq!(detect(&[b'A'; 32]), Detected::More);
        assert_eq!(detect(&[b'A'; 33]), Detected::Opaque);
        assert_eq!(detect(b""), Detected::More);
    }

    /// The answer is "more" up to some byte and then one and the same.
    fn monotone(bytes: &[u8]) {
        let mut answer = Detected::More;
        for length in 0..=bytes.len() {
            let now = detect(&bytes[..length]);
            assert!(answer == Detected::More || answer == now, "{} at {length}", bytes.escape_ascii());
            assert!(now != Detected::More || length < MAX, "{}", bytes.escape_ascii());
            answer = now;
        }
    }

    proptest! {
        #[test]
        fn no_answer_is_taken_back(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            monotone(&bytes);
        }

        #[test]
        fn no_answer_is_taken_back_near_a_request_line(
            bytes in "[\r\n]{0,3}[A-Za-z*-]{0,34}[ \t]{0,3}(/|\\*|a|http://|PRI \\* HTTP/2.0\r\n)?[ -~]{0,40}( HTTP/1.1)?[\r\n\0]?.{0,9}"
        ) {
            monotone(bytes.as_bytes());
        }

        #[test]
        fn no_answer_is_taken_back_near_a_known_start(
            sample in proptest::sample::select(SAMPLES),
            at in any::<proptest::sample::Index>(),
            byte in any::<u8>(),
        ) {
            let mut bytes = sample.0.to_vec();
            *at.get_mut(bytes.as_mut_slice()) = byte;
            monotone(&bytes);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_read_comes_again_and_then_the_rest() {
        for (bytes, expected) in SAMPLES {
            let (mut near, far) = duplex(4096);
            near.write_all(bytes).await.unwrap();
            near.write_all(&[7; 100]).await.unwrap();
            let (outcome, mut stream) =
                read_until_detected(far, Duration::from_secs(1), Duration::from_secs(1)).await.unwrap();
            assert_eq!(outcome, Outcome::Detected(*expected), "{}", bytes.escape_ascii());
            assert!(!stream.ahead().is_empty() && stream.ahead().len() <= MAX);
            let mut first = [0; 3];
            stream.read_exact(&mut first).await.unwrap();
            drop(near);
            let mut all = first.to_vec();
            stream.read_to_end(&mut all).await.unwrap();
            assert_eq!(all, [bytes, &[7; 100][..]].concat());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_and_an_early_end_are_told_apart_and_keep_the_bytes() {
        let began = Instant::now();
        let (mut near, far) = duplex(64);
        near.write_all(b"GET").await.unwrap();
        let (outcome, stream) = read_until_detected(far, Duration::from_secs(3), Duration::from_secs(3)).await.unwrap();
        assert_eq!((outcome, stream.ahead()), (Outcome::TimedOut, &b"GET"[..]));
        assert_eq!(began.elapsed().as_secs(), 3);

        let (mut near, far) = duplex(64);
        near.write_all(b"GE").await.unwrap();
        drop(near);
        let (outcome, stream) = read_until_detected(far, Duration::MAX, Duration::MAX).await.unwrap();
        assert_eq!((outcome, stream.ahead()), (Outcome::Closed, &b"GE"[..]));
    }

    #[tokio::test]
    async fn writes_go_through() {
        let (mut near, far) = duplex(64);
        near.write_all(b"AMQP\0").await.unwrap();
        let (_, mut stream) = read_until_detected(far, Duration::from_secs(1), Duration::from_secs(1)).await.unwrap();
        assert_eq!(stream.is_write_vectored(), stream.get_ref().is_write_vectored());
        let sent = stream.write_vectored(&[io::IoSlice::new(b"ab"), io::IoSlice::new(b"cd")]).await.unwrap();
        stream.write_all(b"e").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut got = Vec::new();
        near.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, [&b"abcd"[..sent], b"e"].concat());
    }
}
