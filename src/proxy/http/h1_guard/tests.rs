//! The guard by itself over every way to cut the bytes, then in front of hyper.

use std::collections::VecDeque;
use std::task::Waker;

use super::*;

mod served;

/// Gives out its pieces, one for each read, and then the end.
#[derive(Debug)]
struct Script(VecDeque<Vec<u8>>);

impl Script {
    fn new<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Self {
        Self(pieces.into_iter().filter(|piece| !piece.is_empty()).map(<[u8]>::to_vec).collect())
    }
}

impl AsyncRead for Script {
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

#[derive(Clone, Debug, PartialEq, Eq)]
enum Ending {
    Closed,
    /// Which request, and why.
    Refused(u64, Refusal),
    Broken(&'static str),
    /// It waits to be told what the last request became.
    Held,
}

/// What passes, and how it ends.
fn pass<'a>(pieces: impl IntoIterator<Item = &'a [u8]>, room: usize, limits: GuardLimits) -> (Vec<u8>, Ending) {
    let (mut guard, handle) = H1Guard::new(Script::new(pieces), limits);
    let mut cx = Context::from_waker(Waker::noop());
    let mut passed = Vec::new();
    let mut space = vec![0; room];
    loop {
        let mut buf = ReadBuf::new(&mut space);
        match Pin::new(&mut guard).poll_read(&mut cx, &mut buf) {
            Poll::Ready(Ok(())) if buf.filled().is_empty() => return (passed, Ending::Closed),
            Poll::Ready(Ok(())) => passed.extend_from_slice(buf.filled()),
            Poll::Ready(Err(error)) => {
                assert_eq!(error.kind(), io::ErrorKind::InvalidData);
                return (passed, Ending::Broken(FramingError::find(&error).unwrap().reason));
            }
            Poll::Pending => {
                let Some((nth, refusal)) = handle.0.refused.get() else { return (passed, Ending::Held) };
                let length = passed.len() - STAND_IN.len();
                assert_eq!(passed.split_off(length), STAND_IN);
                return (passed, Ending::Refused(*nth, *refusal));
            }
        }
    }
}

/// The answer, the same for every way to cut the bytes in two, byte for byte, and for every size of the reader.
fn pass_cut(bytes: &[u8], limits: GuardLimits) -> (Vec<u8>, Ending) {
    let whole = pass([bytes], 64 * 1024, limits);
    let shown = bytes.escape_ascii();
    for cut in 0..bytes.len() {
        let (one, two) = bytes.split_at(cut);
        assert_eq!(pass([one, two], 64 * 1024, limits), whole, "{shown} cut at {cut}");
    }
    for room in [1, 7, 64 * 1024] {
        assert_eq!(pass(bytes.chunks(1), room, limits), whole, "{shown} byte for byte into {room}");
        assert_eq!(pass([bytes], room, limits), whole, "{shown} into {room}");
    }
    whole
}

const SMALL: GuardLimits = GuardLimits {
    max_request_line: 40,
    max_headers: 4,
    max_header_bytes: 90,
    max_trailers: 2,
    max_trailer_bytes: 40,
    max_chunk_extensions: 10,
    header_timeout: Duration::from_secs(10),
    idle_timeout: Duration::from_secs(60),
};

fn fails(bytes: &[u8], status: u16, limits: GuardLimits) -> &'static str {
    let shown = bytes.escape_ascii();
    let (passed, ending) = pass_cut(bytes, limits);
    let Ending::Refused(1, refusal) = ending else { panic!("{shown}: {ending:?}") };
    assert_eq!(refusal.status, status, "{shown}: {}", refusal.reason);
    assert_eq!(passed, b"", "{shown}");
    // After a good request the same is refused as the second, and the first passes whole.
    let good = b"POST /first HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi";
    let (passed, ending) = pass_cut(&[good, bytes].concat(), limits);
    assert_eq!(ending, Ending::Refused(2, refusal), "{shown}");
    assert_eq!(passed, good, "{shown}");
    refusal.reason
}

#[test]
fn bad_heads_are_refused() {
    let table: &[(&str, &[&str])] = &[
        (
            "invalid method",
            &[
                "\u{0}",
                " GET / HTTP/1.1\r\nhost: a\r\n\r\n",
                "\nGET / HTTP/1.1\r\nhost: a\r\n\r\n",
                "\rGET / HTTP/1.1\r\nhost: a\r\n\r\n",
                "\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n",
                "\r\n\nGET / HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET\r\n",
                "GET\t/ HTTP/1.1\r\nhost: a\r\n\r\n",
                "G(T / HTTP/1.1\r\nhost: a\r\n\r\n",
                "G\u{e9}T / HTTP/1.1\r\nhost: a\r\n\r\n",
                "GE\u{0}T / HTTP/1.1\r\nhost: a\r\n\r\n",
                "\u{16}\u{3}\u{1}\u{2}",
            ],
        ),
        (
            "request line without a version",
            &["GET /\r\n", "GET /\r\nhost: a\r\n\r\n", "GET /\tHTTP/1.1\r\nhost: a\r\n\r\n"],
        ),
        (
            "invalid version",
            &[
                "GET / \r\n\r\n",
                "GET / HTTP/1.1 \r\nhost: a\r\n\r\n",
                "GET  / HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET /  HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET /a b HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET / http/1.1\r\nhost: a\r\n\r\n",
                "GET / HTTP/1.10\r\nhost: a\r\n\r\n",
                "GET / HTTP/11\r\nhost: a\r\n\r\n",
                "GET / HTTP/1.1\r\r\nhost: a\r\n\r\n",
                "GET / HTTP/x.1\r\nhost: a\r\n\r\n",
                "GET / ICY/1.1\r\nhost: a\r\n\r\n",
            ],
        ),
        (
            "invalid byte in the request target",
            &[
                "GET /#top HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET /\u{e9} HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET /\u{7f} HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET /\u{0} HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET /\ta HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET /\ra HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET /\u{b} HTTP/1.1\r\nhost: a\r\n\r\n",
            ],
        ),
        (
            "invalid form of the request target",
            &[
                "GET * HTTP/1.1\r\nhost: a\r\n\r\n",
                "OPTIONS ** HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET a HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET a:443 HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET ?x HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET \\x HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET ftp://a/ HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET http:/a/ HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET javascript:x HTTP/1.1\r\nhost: a\r\n\r\n",
            ],
        ),
        (
            "userinfo in the request target",
            &[
                "GET http://u@a/ HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET http://u:p@a/ HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET http://@a/ HTTP/1.1\r\nhost: a\r\n\r\n",
                "CONNECT u@a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n",
            ],
        ),
        (
            "invalid authority",
            &[
                "GET http:///x HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET http:// HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET http://a%2eb/ HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET http://a\\b/ HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET http://a:x/ HTTP/1.1\r\nhost: a\r\n\r\n",
                "CONNECT /x HTTP/1.1\r\nhost: a\r\n\r\n",
                "CONNECT a: HTTP/1.1\r\nhost: a\r\n\r\n",
                "CONNECT a:0 HTTP/1.1\r\nhost: a:0\r\n\r\n",
                "CONNECT a:65536 HTTP/1.1\r\nhost: a\r\n\r\n",
                "CONNECT a:1/ HTTP/1.1\r\nhost: a:1\r\n\r\n",
                "CONNECT http://a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n",
            ],
        ),
        (
            "CONNECT without a port",
            &["CONNECT a HTTP/1.1\r\nhost: a\r\n\r\n", "CONNECT [::1] HTTP/1.1\r\nhost: a\r\n\r\n"],
        ),
        (
            "CONNECT with a body",
            &[
                "CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\ncontent-length: 1\r\n\r\nx",
                "CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\ntransfer-encoding: chunked\r\n\r\n",
            ],
        ),
        (
            "bare LF in a head",
            &[
                "GET / HTTP/1.1\n",
                "GET / HTTP/1.1\nhost: a\n\n",
                "GET / HTTP/1.1\r\nhost: a\n\r\n",
                "GET / HTTP/1.1\r\nhost: a\r\n\n",
                "GET / HTTP/1.1\r\nhost: a\nx: y\r\n\r\n",
            ],
        ),
        (
            "control character in a field value",
            &[
                "GET / HTTP/1.1\r\nhost: a\r\nx: a\rb\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: a\r\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: a\r\nx: \u{0}\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: a\r\nx: \u{7f}\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: a\r\nx: \u{1b}[0m\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: \u{b}chunked\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\u{c}\r\n\r\n",
            ],
        ),
        (
            "obsolete line folding",
            &[
                "GET / HTTP/1.1\r\nhost: a\r\nx: a\r\n b\r\n\r\n",
                "GET / HTTP/1.1\r\n host: a\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: a\r\n\t\r\n\r\n",
            ],
        ),
        (
            "white space before the colon",
            &[
                "GET / HTTP/1.1\r\nhost : a\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length\t: 1\r\n\r\n",
                "GET / HTTP/1.1\r\nx y: a\r\n\r\n",
            ],
        ),
        ("field line without a colon", &["GET / HTTP/1.1\r\nhost\r\n\r\n"]),
        ("field without a name", &["GET / HTTP/1.1\r\n: a\r\n\r\n"]),
        (
            "invalid field name",
            &[
                "GET / HTTP/1.1\r\nh(st: a\r\n\r\n",
                "GET / HTTP/1.1\r\nho\u{0}st: a\r\n\r\n",
                "GET / HTTP/1.1\r\nho\rst: a\r\n\r\n",
                "GET / HTTP/1.1\r\nh\u{f6}st: a\r\n\r\n",
                "GET / HTTP/1.1\r\n\"host\": a\r\n\r\n",
                "GET / HTTP/1.1\r\n\r \r\n",
            ],
        ),
        ("no Host", &["GET / HTTP/1.1\r\n\r\n", "GET http://a/ HTTP/1.1\r\nx: y\r\n\r\n"]),
        (
            "more than one Host",
            &["GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n", "GET / HTTP/1.0\r\nhost: a\r\nHOST: b\r\n\r\n"],
        ),
        (
            "invalid Host",
            &[
                "GET / HTTP/1.1\r\nhost:\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: a b\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: a,b\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: a/b\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: u@a\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: a:b\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: a:\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: a:1:2\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: a:99999\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: [::1\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: [::g]\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: [fe80::1%25eth0]\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: [::1]x\r\n\r\n",
                "GET / HTTP/1.1\r\nhost: \u{e9}\r\n\r\n",
                "GET / HTTP/1.0\r\nhost: a;b\r\n\r\n",
            ],
        ),
        (
            "Host differs from the target",
            &[
                "GET http://a/ HTTP/1.1\r\nhost: b\r\n\r\n",
                "GET http://a:80/ HTTP/1.1\r\nhost: a\r\n\r\n",
                "GET http://a/ HTTP/1.0\r\nhost: b\r\n\r\n",
                "CONNECT a:1 HTTP/1.1\r\nhost: a:2\r\n\r\n",
            ],
        ),
        (
            "both Content-Length and Transfer-Encoding",
            &[
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\nTRANSFER-encoding: CHUNKED\r\nContent-LENGTH: 0\r\n\r\n0\r\n\r\n",
            ],
        ),
        (
            "more than one Content-Length",
            &[
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\nhello",
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\nContent-Length: 6\r\n\r\nhello!",
            ],
        ),
        (
            "invalid Content-Length",
            &[
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length:\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +5\r\n\r\nhello",
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -5\r\n\r\nhello",
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5, 5\r\n\r\nhello",
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5 5\r\n\r\nhello",
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length:  0x5\r\n\r\nhello",
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5.0\r\n\r\nhello",
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: \"5\"\r\n\r\nhello",
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5_0\r\n\r\nhello",
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: \u{665}\r\n\r\nhello",
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9223372036854775808\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 18446744073709551616\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999999\r\n\r\n",
            ],
        ),
        (
            "Transfer-Encoding other than chunked",
            &[
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding:\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: identity\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: ,chunked\r\n\r\n0\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked,\r\n\r\n0\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked;q=1\r\n\r\n0\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: \"chunked\"\r\n\r\n0\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunkedx\r\n\r\n0\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: c hunked\r\n\r\n0\r\n\r\n",
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chun\u{212a}ed\r\n\r\n0\r\n\r\n",
            ],
        ),
        (
            "more than one Transfer-Encoding",
            &[
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            ],
        ),
        (
            "Transfer-Encoding in HTTP/1.0",
            &["POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"],
        ),
    ];
    for (reason, heads) in table {
        for head in *heads {
            assert_eq!(fails(head.as_bytes(), 400, GuardLimits::default()), *reason, "{head:?}");
        }
    }
}

#[test]
fn other_versions_are_refused_with_505() {
    for version in ["0.9", "1.2", "1.9", "2.0", "3.0", "9.9"] {
        fails(format!("GET / HTTP/{version}\r\nhost: a\r\n\r\n").as_bytes(), 505, GuardLimits::default());
    }
    fails(crate::proxy::detect::PREFACE, 505, GuardLimits::default());
}

#[test]
fn what_is_too_large_is_refused_as_such() {
    let line = |length: usize| format!("GET /{} HTTP/1.1", "a".repeat(length - 14));
    let host = "host: a\r\n";
    // A request line of the greatest length passes; one more, with or without an end, does not.
    let good = format!("{}\r\n{host}\r\n", line(40));
    assert_eq!(pass_cut(good.as_bytes(), SMALL), (good.clone().into_bytes(), Ending::Closed));
    fails(format!("{}\r\n{host}\r\n", line(41)).as_bytes(), 414, SMALL);
    fails("a".repeat(42).as_bytes(), 414, SMALL);
    // The section: 9 bytes of Host, 2 of the empty line, 5 around the value.
    let field = |length: usize| format!("x: {}\r\n", "b".repeat(length - 5));
    let good = format!("{}\r\n{host}{}\r\n", line(40), field(79));
    assert_eq!(pass_cut(good.as_bytes(), SMALL), (good.clone().into_bytes(), Ending::Closed));
    fails(format!("{}\r\n{host}{}\r\n", line(40), field(80)).as_bytes(), 431, SMALL);
    fails(format!("{}\r\n{}", line(40), "y".repeat(90)).as_bytes(), 431, SMALL);
    // The number of fields.
    let good = format!("{}\r\n{host}{}\r\n", line(40), "x: y\r\n".repeat(3));
    assert_eq!(pass_cut(good.as_bytes(), SMALL), (good.clone().into_bytes(), Ending::Closed));
    fails(format!("{}\r\n{host}{}\r\n", line(40), "x: y\r\n".repeat(4)).as_bytes(), 431, SMALL);
    // Limits that no byte can keep, and ones without an end, are no special case.
    let none = GuardLimits { max_request_line: 0, max_headers: 0, max_header_bytes: 0, ..SMALL };
    assert_eq!(
        pass_cut(b"GET / HTTP/1.1\r\n", none).1,
        Ending::Refused(1, Refusal { status: 414, reason: "request line too long" })
    );
    let all = GuardLimits { max_request_line: usize::MAX, max_header_bytes: usize::MAX, ..SMALL };
    assert_eq!(pass_cut(good.as_bytes(), all), (good.clone().into_bytes(), Ending::Closed));
}

#[test]
fn what_passes_is_a_target_to_hyper_too() {
    for byte in 0u8..=255 {
        for start in ["/", "/?", "/a/b", "/a?b", "http://a/", "http://a?", "http://a/?"] {
            let target = [start.as_bytes(), &[byte], b"z"].concat();
            let request = [b"GET ", &target[..], b" HTTP/1.1\r\nhost: a\r\n\r\n"].concat();
            let passed = pass([&request[..]], 1000, GuardLimits::default()).1 == Ending::Closed;
            let parsed = hyper::http::Uri::try_from(&target[..]).is_ok();
            assert!(parsed || !passed, "{}", target.escape_ascii());
            // In the path and the query, what RFC 3986 allows passes.
            let allowed = byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@/%?".contains(&byte);
            assert!(passed || !allowed, "{}", target.escape_ascii());
        }
    }
}

/// Good requests of every kind. None of them ends what the guard watches.
const GOOD: &[&str] = &[
    "GET / HTTP/1.1\r\nhost: a\r\n\r\n",
    "\r\nGET / HTTP/1.1\r\nHost:a.example:8080\r\n\r\n",
    "GET / HTTP/1.0\r\n\r\n",
    "GET / HTTP/1.0\r\nupgrade: x\r\n\r\n",
    "OPTIONS * HTTP/1.1\r\nHOST: \t a_b-c.~ \t\r\n\r\n",
    "GET /a?b=c/?%00;|{}\"^\\ HTTP/1.1\r\nhost: [2001:db8::1]:443\r\n\r\n",
    "GET http://A.example HTTP/1.1\r\nhost: a.EXAMPLE\r\n\r\n",
    "GET HTTPS://a:443?x HTTP/1.1\r\nhost: a:443\r\n\r\n",
    "GET http://a/x HTTP/1.0\r\n\r\n",
    "M-SEARCH /x HTTP/1.1\r\nx-empty:\r\nhost: a\r\n\r\n",
    "g!t /x HTTP/1.1\r\nhost: 10.0.0.1:1\r\nX-Text: \u{e9}\u{20ac} \t(x)\r\n\r\n",
    "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello",
    "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n",
    "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 005\r\n\r\n\r\n\r\n\0",
    "POST / HTTP/1.0\r\ncontent-length: 3\r\n\r\nabc",
    "POST / HTTP/1.1\r\nhost: a\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\nexpect: 100-continue\r\n\r\n5\r\nhello\r\n0010\r\n0123456789abcdef\r\n000\r\n\r\n",
];

#[test]
fn good_requests_pass_byte_for_byte() {
    // Chunks and data that look like anything.
    let head = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
    let data = "\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n\0";
    let chunked = format!("{head}00{:X};n;m=\"v; w\"\r\n{data}\r\n0;x\r\nx-sum: 1\r\nY:\r\n\r\n", data.len());
    for good in GOOD.iter().copied().chain([&chunked[..]]) {
        let good = good.as_bytes().to_vec();
        assert_eq!(pass_cut(&good, GuardLimits::default()), (good.clone(), Ending::Closed), "{}", good.escape_ascii());
        // One after the other, with a bad one at the end.
        let three = [&good[..], &good, &good, b"bad\r\n"].concat();
        let refusal = Refusal::bad("invalid method");
        assert_eq!(pass_cut(&three, GuardLimits::default()), (good.repeat(3), Ending::Refused(4, refusal)));
    }
}

#[test]
fn an_end_in_the_middle_of_a_head_passes_none_of_it() {
    for bytes in ["G", "\r", "\r\n", "GET / HTTP/1.1\r\nhost: a\r\n", "GET / HTTP/1.1\r\nhost: a\r\n\r"] {
        assert_eq!(pass_cut(bytes.as_bytes(), GuardLimits::default()), (Vec::new(), Ending::Closed));
    }
    let body = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nhello";
    assert_eq!(pass_cut(body, GuardLimits::default()), (body.to_vec(), Ending::Closed));
}

#[test]
fn broken_bodies_end_the_reading() {
    let head = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
    let table: &[(&str, &str, &[&str])] = &[
        ("", "chunk without a size", &["\r\n", ";a\r\n"]),
        ("", "invalid chunk size", &["\n", " 5\r\n", "+5\r\n", "-1\r\n", "x\r\n", "\0"]),
        ("5", "invalid chunk size", &["\nhello", " \r\nhello", "\t;a\r\nhello", "h\r\n", "_0\r\n", "\0\r\n"]),
        ("0", "invalid chunk size", &["x5\r\nhello", "\n\r\n"]),
        ("0000000000000005", "chunk size too large", &["0\r\n", "a"]),
        ("8000000000000000", "chunk size too large", &["\r\n"]),
        ("ffffffffffffffff", "chunk size too large", &["\r\n", ";"]),
        ("5\r", "bare CR after a chunk size", &["hello", "\r\n", "\0"]),
        ("0\r", "bare CR after a chunk size", &["\r"]),
        ("5;", "invalid chunk extension", &["\r\n", " a\r\n", ";\r\n", "=\r\n", "\n"]),
        ("5;a=", "invalid chunk extension", &["\n", "\0", "\u{7f}", "\u{e9}", "\u{1b}"]),
        ("5;a\r", "bare CR after a chunk size", &["a\r\n"]),
        ("5;a12345678", "chunk extensions too large", &["90\r\n"]),
        ("5\r\nhello", "chunk longer than its size", &["x", "\n", "0\r\n\r\n"]),
        ("5\r\nhello\r", "chunk longer than its size", &["\r\n", "0"]),
        ("1;a1234\r\nx\r\n1;a12", "chunk extensions too large", &["345\r\n"]),
        ("0\r\n", "bare LF in a trailer section", &["\n", "a: b\n\r\n", "a: b\r\n\n"]),
        ("0\r\n", "control character in a field value", &["a: b\rc\r\n\r\n", "a: \0\r\n\r\n"]),
        ("0\r\n", "obsolete line folding", &["a: b\r\n c\r\n\r\n", " a: b\r\n\r\n"]),
        ("0\r\n", "white space before the colon", &["a : b\r\n\r\n"]),
        ("0\r\n", "field line without a colon", &["GET\r\n\r\n"]),
        ("0\r\n", "invalid field name", &["\r \r\n\r\n"]),
        ("0\r\n", "too many trailer fields", &["a: b\r\na: b\r\na: b\r\n\r\n"]),
        (
            "0\r\n",
            "trailer section too large",
            &["a: 0123456789012345678901234567890123\r\n\r\n", "0123456789012345678901234567890123456789"],
        ),
        (
            "0\r\n",
            "forbidden trailer field",
            &[
                "Content-Length: 5\r\n\r\n",
                "a: b\r\nTRANSFER-ENCODING: chunked\r\n\r\n",
                "host: b\r\n\r\n",
                "authorization: x\r\n\r\n",
                "X-Forwarded-Client-Cert: x\r\n\r\n",
                "if-match: x\r\n\r\n",
            ],
        ),
    ];
    for (good, reason, bads) in table {
        for bad in *bads {
            let limits = GuardLimits { max_header_bytes: 1000, ..SMALL };
            let bytes = format!("{head}{good}{bad}");
            let (passed, ending) = pass_cut(bytes.as_bytes(), limits);
            assert_eq!(ending, Ending::Broken(reason), "{bytes:?}");
            // A prefix of the chunk size or extension may be out already; never a byte of what is wrong.
            assert!(bytes.as_bytes().starts_with(&passed), "{bytes:?}");
            assert!(passed.len() < bytes.len() && passed.len() >= head.len() + good.len(), "{bytes:?}");
        }
    }
    // The largest of everything passes.
    let limits = GuardLimits { max_header_bytes: 1000, ..SMALL };
    let good =
        format!("{head}5;a123456789\r\nhello\r\n0\r\na: 01234567890123456789012345678\r\nb:\r\n\r\n").into_bytes();
    assert_eq!(pass_cut(&good, limits), (good.clone(), Ending::Closed));
    let huge = format!("{head}7fffffffffffffff\r\nhello").into_bytes();
    assert_eq!(pass_cut(&huge, limits), (huge.clone(), Ending::Closed));
}

#[test]
fn nothing_passes_after_a_request_that_may_switch_protocols() {
    let connect = "CONNECT a:443 HTTP/1.1\r\nhost: a:443\r\n\r\n";
    let upgrade = "POST / HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\ncontent-length: 2\r\n\r\nhi";
    for head in [connect, upgrade] {
        for tail in ["", "\0\n\0", "GET / HTTP/1.1\r\n", "bad\r\n"] {
            let bytes = format!("{head}{tail}");
            let (passed, ending) = pass_cut(bytes.as_bytes(), GuardLimits::default());
            let expected = if tail.is_empty() { Ending::Closed } else { Ending::Held };
            assert_eq!((passed, ending), (head.as_bytes().to_vec(), expected), "{bytes:?}");
        }
    }
}

#[test]
fn what_was_held_passes_in_a_tunnel_and_is_judged_otherwise() {
    let connect = &b"CONNECT a:443 HTTP/1.1\r\nhost: a:443\r\n\r\n"[..];
    let mut cx = Context::from_waker(Waker::noop());
    for tunnel in [true, false] {
        let (mut guard, handle) = H1Guard::new(Script::new([connect, b"\0bad", b"more"]), GuardLimits::default());
        let mut space = [0; 1000];
        let mut read = || {
            let mut buf = ReadBuf::new(&mut space);
            let poll = Pin::new(&mut guard).poll_read(&mut cx, &mut buf);
            poll.map(|result| result.map(|()| buf.filled().to_vec()).unwrap())
        };
        assert_eq!(read(), Poll::Ready(connect.to_vec()));
        assert_eq!(read(), Poll::Pending);
        let ticket = handle.next_request();
        if tunnel {
            ticket.tunnel();
            drop(ticket);
            assert_eq!(read(), Poll::Ready(b"\0bad".to_vec()));
            assert_eq!(read(), Poll::Ready(b"more".to_vec()));
            assert_eq!(read(), Poll::Ready(Vec::new()));
        } else {
            ticket.not_tunnel();
            assert_eq!(read(), Poll::Ready(STAND_IN.to_vec()));
            assert_eq!(read(), Poll::Pending);
            assert_eq!(handle.refusal(2), Some(Refusal::bad("invalid method")));
            assert_eq!(handle.refusal(1), None);
            let (_, rest) = guard.into_parts();
            assert!(rest.is_empty());
        }
    }
}

#[test]
fn a_peer_whose_every_read_ends_in_half_a_head_is_held_to_a_bound() {
    let good = &b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..];
    let pieces = good.repeat(1000);
    let (mut guard, _) = H1Guard::new(Script::new(pieces.chunks(good.len() + 1)), GuardLimits::default());
    let mut cx = Context::from_waker(Waker::noop());
    let mut passed = 0;
    let mut space = [0; 1000];
    loop {
        let mut buf = ReadBuf::new(&mut space);
        assert!(Pin::new(&mut guard).poll_read(&mut cx, &mut buf).is_ready());
        if buf.filled().is_empty() {
            break;
        }
        passed += buf.filled().len();
        assert!(guard.held.len() < 4 * good.len(), "{}", guard.held.len());
    }
    assert_eq!(passed, pieces.len());
    assert_eq!(guard.held.capacity(), 0);
}
