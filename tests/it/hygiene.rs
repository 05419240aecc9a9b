//! What is not one well-formed, unambiguous request is answered with its status, ends its connection, and never reaches the
//! workload; the next client is served. And what may not pass a proxy, or not from outside, does not.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::{Domain, Proxy, exchange, soon};
use crate::pair::{Answer, Extra, Pair, Way, curl, http_origin};
use crate::testing::Spec;

/// A workload that keeps every whole request as it came, and answers each with `served`.
#[derive(Clone)]
struct Recorder {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Recorder {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let recorder = Self { address: listener.local_addr().unwrap(), requests: Arc::default() };
        let keep = Arc::clone(&recorder.requests);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(Self::serve(stream, Arc::clone(&keep)));
            }
        });
        recorder
    }

    /// The simplest reading of HTTP/1 there is: whatever a strict one in front lets through must be right by it.
    async fn serve(stream: TcpStream, keep: Arc<Mutex<Vec<String>>>) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        loop {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                if stream.read_until(b'\n', &mut head).await? == 0 {
                    return Ok(());
                }
            }
            let mut text = String::from_utf8_lossy(&head).into_owned();
            let lower = text.to_ascii_lowercase();
            let mut body = Vec::new();
            if lower.contains("\r\ntransfer-encoding: chunked\r\n") {
                loop {
                    let mut line = String::new();
                    stream.read_line(&mut line).await?;
                    // Also where the connection was given up: half a request is none.
                    let Ok(size) = usize::from_str_radix(line.trim(), 16) else { return Ok(()) };
                    let at = body.len();
                    body.resize(at + size, 0);
                    stream.read_exact(&mut body[at..]).await?;
                    // The end of the chunk, or of the trailers.
                    let mut end = String::new();
                    loop {
                        match stream.read_line(&mut end).await? {
                            0 => return Ok(()),
                            2 => break,
                            _ => {}
                        }
                    }
                    if size == 0 {
                        break;
                    }
                }
            } else if let Some((_, rest)) = lower.split_once("\r\ncontent-length: ") {
                body.resize(rest.split_once("\r\n").and_then(|(length, _)| length.parse().ok()).unwrap_or(0), 0);
                stream.read_exact(&mut body).await?;
            }
            text.push_str(&String::from_utf8_lossy(&body));
            keep.lock().unwrap().push(text);
            stream.get_mut().write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nserved").await?;
        }
    }

    fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }
}

/// The bytes of something that is no request, and the answers that it may get.
struct Bad {
    name: &'static str,
    bytes: Vec<u8>,
    statuses: &'static [u16],
}

/// What does not begin like HTTP/1 may also be closed without a word: it could be a broken preface of HTTP/2, to which an
/// answer in HTTP/1 would be no connection error (RFC 9113, section 3.4).
const NO_HTTP: &[u16] = &[0, 400, 505];

fn bad(name: &'static str, statuses: &'static [u16], bytes: impl AsRef<[u8]>) -> Bad {
    Bad { name, bytes: bytes.as_ref().to_vec(), statuses }
}

/// Malformed in one header line; the request is a POST whose body would be `hello`.
fn line(name: &'static str, line: &str) -> Bad {
    bad(name, &[400], format!("POST /x HTTP/1.1\r\nHost: a.example\r\n{line}\r\n\r\nhello"))
}

/// A coding of the body that is none, or that nobody knows (RFC 9112, section 6.1).
fn coding(name: &'static str, coding: &str) -> Bad {
    Bad { statuses: &[400, 501], ..line(name, coding) }
}

/// A body in chunks that is malformed somewhere; what follows would be smuggled.
fn chunks(name: &'static str, body: &str) -> Bad {
    bad(
        name,
        &[400],
        format!(
            "POST /x HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n{body}GET /smuggled HTTP/1.1\r\nHost: a.example\r\n\r\n"
        ),
    )
}

fn framing() -> Vec<Bad> {
    vec![
        line("both lengths", "Content-Length: 5\r\nTransfer-Encoding: chunked"),
        line("both lengths, the other way round", "Transfer-Encoding: chunked\r\nContent-Length: 5"),
        line("two lengths", "Content-Length: 5\r\nContent-Length: 6"),
        line("the same length twice", "Content-Length: 5\r\nContent-Length: 5"),
        line("a list of lengths", "Content-Length: 5, 5"),
        line("a signed length", "Content-Length: +5"),
        line("a negative length", "Content-Length: -5"),
        line("a hexadecimal length", "Content-Length: 0x5"),
        line("a length with a gap", "Content-Length: 5 5"),
        line("an empty length", "Content-Length: "),
        line("a length of words", "Content-Length: five"),
        line("a length beyond 64 bits", "Content-Length: 18446744073709551621"),
        line("a length with more behind it", "Content-Length: 5;q=1"),
        line("a blank before the colon of a length", "Content-Length : 5"),
        line("a tab before the colon", "Transfer-Encoding\t: chunked"),
        line("a blank before a colon", "X-Any : 5\r\nContent-Length: 5"),
        line(
            "an underscore in place of the hyphen beside a real one",
            "Transfer_Encoding : chunked\r\nContent-Length: 5",
        ),
        coding("chunked twice", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
        coding("chunked twice in a list", "Transfer-Encoding: chunked, chunked"),
        coding("chunked not last", "Transfer-Encoding: chunked, identity"),
        coding("an empty coding", "Transfer-Encoding: "),
        line("a vertical tab in a coding", "Transfer-Encoding: \u{b}chunked"),
        coding("quotes around a coding", "Transfer-Encoding: \"chunked\""),
        bad(
            "an unknown coding",
            &[400, 501],
            "POST /x HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: xchunked\r\n\r\nhello",
        ),
        bad(
            "a coding that is none",
            &[400, 501],
            "POST /x HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: identity\r\n\r\nhello",
        ),
        bad(
            "another coding before",
            &[400, 501],
            "POST /x HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        ),
        bad(
            "chunks in HTTP/1.0",
            &[400],
            "POST /x HTTP/1.0\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        chunks("a size that is no number", "five\r\nhello\r\n0\r\n\r\n"),
        chunks("a size with a prefix", "0x5\r\nhello\r\n0\r\n\r\n"),
        chunks("a signed size", "+5\r\nhello\r\n0\r\n\r\n"),
        chunks("a negative size", "-5\r\nhello\r\n0\r\n\r\n"),
        chunks("no size", "\r\nhello\r\n0\r\n\r\n"),
        chunks("a size beyond 64 bits", "FFFFFFFFFFFFFFFFF\r\nhello\r\n0\r\n\r\n"),
        chunks("a bare LF after a size", "5\nhello\r\n0\r\n\r\n"),
        chunks("a bare LF in an extension", "5;a\nb\r\nhello\r\n0\r\n\r\n"),
        chunks("a bare CR in an extension", "5;a\rb\r\nhello\r\n0\r\n\r\n"),
        chunks("more data than the size says", "4\r\nhello\r\n0\r\n\r\n"),
        chunks("a bare LF after the data", "5\r\nhello\n0\r\n\r\n"),
        chunks("two bytes that are no end of a chunk", "5\r\nhelloXX0\r\n\r\n"),
        chunks("a bare LF after the last chunk", "5\r\nhello\r\n0\n\r\n"),
        chunks("a trailer folded", "0\r\nX-A: 1\r\n 2\r\n\r\n"),
        chunks("a trailer without a colon", "0\r\nnonsense\r\n\r\n"),
    ]
}

fn heads() -> Vec<Bad> {
    let head = |name, head: &str| bad(name, &[400], head);
    let field = |name, field: &str| bad(name, &[400], format!("GET /x HTTP/1.1\r\nHost: a.example\r\n{field}\r\n\r\n"));
    vec![
        field("a folded line", "X-A: 1\r\n 2"),
        field("a line folded by a tab", "X-A: 1\r\n\t2"),
        field("NUL in a value", "X-A: 1\u{0}2"),
        field("a bare CR in a value", "X-A: 1\r2"),
        field("a bare LF as the end of a line", "X-A: 1\nX-B: 2"),
        field("a control character in a value", "X-A: 1\u{1}2"),
        field("DEL in a value", "X-A: 1\u{7f}2"),
        field("a line without a colon", "nonsense"),
        field("no name", ": value"),
        field("a blank in a name", "X A: 1"),
        field("a control character in a name", "X\u{1}A: 1"),
        field("a slash in a name", "X/A: 1"),
        head("bare LFs only", "GET /x HTTP/1.1\nHost: a.example\n\n"),
        head("a blank before the first field", "GET /x HTTP/1.1\r\n Host: a.example\r\n\r\n"),
        head("no host", "GET /x HTTP/1.1\r\nAccept: */*\r\n\r\n"),
        head("two hosts", "GET /x HTTP/1.1\r\nHost: a.example\r\nHost: b.example\r\n\r\n"),
        head("the same host twice", "GET /x HTTP/1.1\r\nHost: a.example\r\nHost: a.example\r\n\r\n"),
        head("two hosts in a list", "GET /x HTTP/1.1\r\nHost: a.example, b.example\r\n\r\n"),
        head("a host with a path", "GET /x HTTP/1.1\r\nHost: a.example/y\r\n\r\n"),
        head("a host with a blank", "GET /x HTTP/1.1\r\nHost: a.example b\r\n\r\n"),
        head("a host with a user", "GET /x HTTP/1.1\r\nHost: user@a.example\r\n\r\n"),
        head("a host with a port that is none", "GET /x HTTP/1.1\r\nHost: a.example:http\r\n\r\n"),
        head("a target with a user", "GET http://user@a.example/x HTTP/1.1\r\nHost: a.example\r\n\r\n"),
        head("a target that is no path", "GET x HTTP/1.1\r\nHost: a.example\r\n\r\n"),
        head("a blank in the target", "GET /a b HTTP/1.1\r\nHost: a.example\r\n\r\n"),
        head("NUL in the target", "GET /a\u{0} HTTP/1.1\r\nHost: a.example\r\n\r\n"),
        head("a bare CR in the request line", "GET /a\rb HTTP/1.1\r\nHost: a.example\r\n\r\n"),
        head("a tab after the method", "GET\t/a HTTP/1.1\r\nHost: a.example\r\n\r\n"),
        head("a method that is none", "GE(T /x HTTP/1.1\r\nHost: a.example\r\n\r\n"),
        head("the asterisk with another method than OPTIONS", "GET * HTTP/1.1\r\nHost: a.example\r\n\r\n"),
        bad("a version that there is not", &[400, 505], "GET /x HTTP/3.7\r\nHost: a.example\r\n\r\n"),
        bad("HTTP/2 as a version", &[400, 505], "GET /x HTTP/2.0\r\nHost: a.example\r\n\r\n"),
        bad("a version in small letters", NO_HTTP, "GET /x http/1.1\r\nHost: a.example\r\n\r\n"),
        bad("no version", NO_HTTP, "GET /x\r\nHost: a.example\r\n\r\n"),
        bad("no request at all", NO_HTTP, "\u{16}\u{3}\u{1}\u{0}not http\r\n\r\n"),
        bad("bytes above 127 in a name", &[400], b"GET /x HTTP/1.1\r\nHost: a.example\r\nX-\xc3\xa4: 1\r\n\r\n"),
    ]
}

fn too_large() -> Vec<Bad> {
    let get = |fields: &str| format!("GET /x HTTP/1.1\r\nHost: a.example\r\n{fields}\r\n");
    let many: String = (0..150).map(|n| format!("X-{n}: 1\r\n")).collect();
    vec![
        bad("too many fields", &[431], get(&many)),
        bad("one field too long", &[431], get(&format!("X-Long: {}\r\n", "x".repeat(40_000)))),
        bad("fields too long together", &[431], get(&format!("X-A: {}\r\n", "x".repeat(1000)).repeat(60))),
        bad("one name too long", &[400, 431], get(&format!("{}: 1\r\n", "x".repeat(40_000)))),
        bad("a head that never ends", &[431], get(&format!("X-A: {}", "x".repeat(80_000)))),
        bad("a target too long", &[414], format!("GET /{} HTTP/1.1\r\nHost: a.example\r\n\r\n", "x".repeat(20_000))),
        bad("a target that never ends", &[414], format!("GET /{}", "x".repeat(80_000))),
        bad("a method that never ends", &[400, 414, 431, 501], "X".repeat(80_000)),
    ]
}

/// How many answers there are: one request, one answer.
fn answers(text: &str) -> usize {
    let status = |rest: &&str| rest.get(2..5).is_some_and(|code| code.bytes().all(|byte| byte.is_ascii_digit()));
    text.split("HTTP/1.").skip(1).filter(status).count()
}

async fn each_is_refused(table: fn() -> Vec<Bad>) {
    let origin = Recorder::start().await;
    let pair = Pair::plain(origin.address).await;
    for way in pair.ways().await {
        for case in table() {
            let name = format!("{} {}", case.name, way.name());
            // `send` waits for the end of the connection: it must come from the proxy.
            let text = way.send(&case.bytes).await;
            let answer = Answer::parse(&text);
            assert!(case.statuses.contains(&answer.status), "{name}: {:?} expected, {text}", case.statuses);
            assert_eq!(answers(&text), usize::from(answer.status != 0), "{name}: {text}");
            assert!(!text.contains("served"), "{name}: nothing of the workload's: {text}");
            let good = way.request("GET /good HTTP/1.1\r\nHost: a.example").await;
            assert_eq!(good.status, 200, "after {name}: {good:?}");
            let seen = origin.seen();
            assert_eq!(seen.len(), 1, "{name}: the workload saw {seen:?}");
            assert!(seen[0].starts_with("GET /good HTTP/1.1\r\n"), "{name}: {seen:?}");
        }
    }
    let refused = [("direction", "inbound"), ("cause", "bad_request")];
    pair.server.metric_reaches("portcullis_http_request_ends_total", &refused, 1.0).await;
}

#[tokio::test]
async fn ambiguous_framing_is_refused() {
    each_is_refused(framing).await;
}

#[tokio::test]
async fn malformed_heads_are_refused() {
    each_is_refused(heads).await;
}

#[tokio::test]
async fn what_is_too_large_is_refused() {
    each_is_refused(too_large).await;
}

#[tokio::test]
async fn a_bad_request_behind_a_good_one_spoils_only_itself() {
    let origin = Recorder::start().await;
    let pair = Pair::plain(origin.address).await;
    for way in pair.ways().await {
        let good = "POST /first HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\n\r\nhello";
        for case in [framing(), heads()].concat_bytes() {
            let text = way.send(&[good.as_bytes(), &case.1].concat()).await;
            let name = format!("{} {}", case.0, way.name());
            let seen = origin.seen();
            assert_eq!(seen.len(), 1, "{name}: {seen:?}");
            assert!(seen[0].starts_with("POST /first ") && seen[0].ends_with("\r\n\r\nhello"), "{name}: {seen:?}");
            assert!(text.starts_with("HTTP/1.1 200"), "{name}: {text}");
            assert!(answers(&text) <= 2, "{name}: {text}");
        }
    }
}

trait Concat {
    fn concat_bytes(self) -> Vec<(&'static str, Vec<u8>)>;
}

impl<const N: usize> Concat for [Vec<Bad>; N] {
    fn concat_bytes(self) -> Vec<(&'static str, Vec<u8>)> {
        self.into_iter().flatten().map(|case| (case.name, case.bytes)).collect()
    }
}

#[tokio::test]
async fn a_head_that_does_not_come_is_408() {
    let origin = Recorder::start().await;
    let limits = "http: { header_timeout: 400ms }\n";
    let pair = Pair::start(origin.address, Extra { server: limits, client: limits, ..Extra::default() }).await;
    for way in pair.ways().await {
        for part in ["GET /x HTTP/1.1\r\nHost: a.ex", "GET ", "GET /x HTTP/1.1\r\nHost: a.example\r\n"] {
            let answer = Answer::parse(&way.send(part.as_bytes()).await);
            assert_eq!(answer.status, 408, "{} {part:?}: {answer:?}", way.name());
        }
        // Bytes that trickle do not begin the time anew.
        let mut stream = way.connect().await;
        let mut answer = vec![0; 1024];
        let trickle = async {
            for byte in b"GET /x HTTP/1.1\r\nX-Slow: ".iter().chain([b'x'; 2000].iter()) {
                if stream.write_all(&[*byte]).await.is_err() || stream.flush().await.is_err() {
                    break;
                }
                let piece = tokio::time::timeout(std::time::Duration::from_millis(20), stream.read(&mut answer)).await;
                if let Ok(read) = piece {
                    return read.unwrap_or(0);
                }
            }
            stream.read(&mut answer).await.unwrap_or(0)
        };
        let read = soon("an answer to a head that trickles", trickle).await;
        let text = String::from_utf8_lossy(&answer[..read]).into_owned();
        assert!(text.is_empty() || text.contains(" 408 "), "{}: {text}", way.name());
    }
    assert!(origin.seen().is_empty());
}

#[tokio::test]
async fn a_body_that_stands_still_is_given_up() {
    let origin = Recorder::start().await;
    let limits = "http: { body_idle_timeout: 400ms }\n";
    let mut pair = Pair::start(origin.address, Extra { server: limits, client: limits, ..Extra::default() }).await;
    for way in pair.ways().await {
        let answer =
            Answer::parse(&way.send(b"POST /x HTTP/1.1\r\nHost: a.example\r\nContent-Length: 100\r\n\r\nhalf").await);
        assert!([0, 408].contains(&answer.status), "{}: {answer:?}", way.name());
    }
    assert!(origin.seen().is_empty(), "half a request is none");
    pair.server.request("a body given up", |line| line["cause"] == "body_timeout").await;
}

#[tokio::test]
async fn hop_by_hop_fields_end_at_each_hop() {
    let origin = Recorder::start().await;
    let pair = Pair::plain(origin.address).await;
    for way in pair.ways().await {
        let head = "GET /x HTTP/1.1\r\nHost: a.example\r\nConnection: X-Mine, close, TE\r\nX-Mine: 1\r\nKeep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\nProxy-Authorization: Basic YTpi\r\nTE: gzip, trailers\r\nX-Theirs: 2\r\n\r\n";
        assert_eq!(Answer::parse(&way.send(head.as_bytes()).await).status, 200, "{}", way.name());
        let seen = origin.seen().remove(0).to_ascii_lowercase();
        for gone in ["x-mine", "keep-alive", "proxy-connection", "gzip"] {
            assert!(!seen.contains(gone), "{} {gone}: {seen}", way.name());
        }
        assert!(seen.contains("\r\nx-theirs: 2\r\n"), "{}: {seen}", way.name());
        // A field that frames the request or names its target must not be talked away.
        for named in ["Host", "Content-Length", "Authorization", "x-forwarded-client-cert"] {
            let head = format!(
                "POST /x HTTP/1.1\r\nHost: a.example\r\nAuthorization: Bearer t\r\nConnection: close, {named}\r\nContent-Length: 5\r\n\r\nhello"
            );
            let answer = Answer::parse(&way.send(head.as_bytes()).await);
            let seen = origin.seen();
            assert!(seen.len() <= 1, "{} {named}: {seen:?}", way.name());
            if answer.status == 200 {
                assert!(seen[0].ends_with("hello"), "{} {named}: {seen:?}", way.name());
                assert!(
                    seen[0].to_ascii_lowercase().contains("\r\nhost: a.example\r\n"),
                    "{} {named}: {seen:?}",
                    way.name()
                );
            } else {
                assert!(answer.status == 400 && seen.is_empty(), "{} {named}: {answer:?} {seen:?}", way.name());
            }
        }
    }
}

/// Names that a backend may take for `x-forwarded-client-cert`.
const SPELLINGS: &[&str] = &[
    "x-forwarded-client-cert",
    "X-Forwarded-Client-Cert",
    "X-FORWARDED-CLIENT-CERT",
    "x_forwarded_client_cert",
    "X_Forwarded-Client_Cert",
    "x-forwarded_client-cert",
];

#[tokio::test]
async fn nobody_outside_sets_the_client_certificate_field() {
    let origin = Recorder::start().await;
    for setting in ["off", "set"] {
        let extra = format!("http: {{ forward_client_cert: {setting} }}");
        let pair = Pair::start(origin.address, Extra { inbound: &extra, ..Extra::default() }).await;
        for way in pair.ways().await {
            for spelling in SPELLINGS {
                let head = format!(
                    "GET /x HTTP/1.1\r\nHost: a.example\r\n{spelling}: URI=spiffe://a.example/admin\r\n{spelling}: By=x"
                );
                assert_eq!(way.request(&head).await.status, 200, "{} {spelling}", way.name());
                let seen = origin.seen().remove(0);
                assert!(!seen.contains("spiffe://a.example/admin"), "{} {spelling}: {seen}", way.name());
                let folded = seen.to_ascii_lowercase().replace('_', "-");
                let count = folded.matches("\r\nx-forwarded-client-cert:").count();
                assert_eq!(count, usize::from(setting == "set"), "{} {spelling}: {seen}", way.name());
            }
        }
    }
    // In HTTP/2 as well, and as a trailer.
    let (_echo, at) = http_origin().await;
    let pair = Pair::start(at, Extra { inbound: "http: { forward_client_cert: set }", ..Extra::default() }).await;
    for spelling in SPELLINGS {
        let field = format!("{spelling}: URI=spiffe://a.example/admin");
        let answer = curl(&["--http2-prior-knowledge", "-H", &field, &format!("http://{}/echo", pair.address)]).await;
        assert!(answer.status == 200 && !answer.body.contains("/admin"), "{spelling}: {answer:?}");
    }
    for way in pair.ways().await {
        let post = "POST /echo HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\nTrailer: x-forwarded-client-cert\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Forwarded-Client-Cert: URI=spiffe://a.example/admin\r\nX-Fine: yes\r\n\r\n";
        let answer = Answer::parse(&way.send(post.as_bytes()).await);
        assert!(!answer.body.contains("/admin"), "{}: {answer:?}", way.name());
    }
}

#[tokio::test]
async fn the_client_certificate_field_names_the_verified_peer() {
    let origin = Recorder::start().await;
    let domain = Domain::new("a.example");
    let extra = Extra { inbound: "http: { forward_client_cert: set }", ..Extra::default() };
    let server = Proxy::start(domain.path(), "server", &Pair::inbound(&domain, origin.address, extra)).await;
    server.ready().await;
    let own = domain.ca.issue(&Spec::leaf(domain.id("/client")));
    let [certificate, ..] = domain.files("peer", &own);
    // What openssl makes of the certificate, with nothing of ours in between.
    let mut openssl = tokio::process::Command::new(crate::harness::tool("PORTCULLIS_TEST_OPENSSL", "openssl"));
    openssl.args(["x509", "-noout", "-fingerprint", "-sha256", "-in"]).arg(certificate);
    let said = crate::harness::succeeds(&mut openssl, "").await;
    let hash = said.trim().split_once('=').unwrap().1.replace(':', "").to_ascii_lowercase();
    let config = crate::client::presenting(&domain.ca, Some((&own).into()));
    let way = Way::Tls(server.address("in").await, config);
    assert_eq!(way.request("GET /x HTTP/1.1\r\nHost: a.example").await.status, 200);
    let seen = origin.seen().remove(0);
    let line = seen.lines().find(|line| line.to_ascii_lowercase().starts_with("x-forwarded-client-cert:")).unwrap();
    let value = line.split_once(':').unwrap().1.trim();
    let parts: Vec<&str> = value.split(';').collect();
    assert!(parts.contains(&format!("URI={}", domain.id("/client")).as_str()), "{value}");
    assert!(parts.contains(&format!("Hash={hash}").as_str()), "{value}");
}

#[tokio::test]
async fn forwarded_fields_are_as_declared() {
    let origin = Recorder::start().await;
    let sent = "GET /x HTTP/1.1\r\nHost: a.example\r\nForwarded: for=192.0.2.1\r\nX-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Host: evil.example\r\nX-Forwarded-Proto: https\r\nX_Forwarded_For: 192.0.2.9";
    for setting in ["remove", "append", "keep"] {
        let extra = format!("http: {{ forwarded: {setting} }}");
        let pair = Pair::start(origin.address, Extra { inbound: &extra, ..Extra::default() }).await;
        let [_, way] = pair.ways().await;
        assert_eq!(way.request(sent).await.status, 200, "{setting}");
        let seen = origin.seen().remove(0).to_ascii_lowercase();
        let had = |what: &str| seen.contains(what);
        match setting {
            "remove" => assert!(!had("192.0.2.") && !had("evil.example"), "{seen}"),
            "append" => assert!(had("192.0.2.1") && had("127.0.0.1"), "{seen}"),
            _ => assert!(had("\r\nx-forwarded-for: 192.0.2.1\r\n") && had("evil.example"), "{seen}"),
        }
    }
}

#[tokio::test]
async fn what_only_sidecars_say_to_each_other_nobody_else_can_say() {
    // Whatever the header is in which one tells the other a request's version, a client's own must not be taken for it.
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    for way in pair.ways().await {
        for name in ["portcullis-version", "portcullis-http-version", "portcullis-protocol", "portcullis-reason"] {
            let answer = way.request(&format!("GET /echo HTTP/1.1\r\nHost: a.example\r\n{name}: HTTP/1.0")).await;
            assert_eq!(answer.status, 200, "{} {name}: {answer:?}", way.name());
            assert_eq!(answer.json()["protocol"], "HTTP/1.1", "{} {name}", way.name());
        }
    }
}

#[tokio::test]
async fn bytes_that_are_no_http_end_the_connection_and_no_other() {
    let origin = Recorder::start().await;
    let pair = Pair::plain(origin.address).await;
    for way in pair.ways().await {
        for junk in [
            &b"\x00\x01\x02\x03"[..],
            &[0xff; 5000],
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nthis is no frame at all",
            b"\r\n\r\n\r\n\r\njunk\r\n\r\n",
        ] {
            let mut stream = way.connect().await;
            let _ = stream.write_all(junk).await;
            let _ = stream.shutdown().await;
            let mut answer = Vec::new();
            let _ = soon("the end", stream.read_to_end(&mut answer)).await;
            assert_eq!(
                way.request("GET /good HTTP/1.1\r\nHost: a.example").await.status,
                200,
                "{} {junk:?}",
                way.name()
            );
            assert_eq!(origin.seen().len(), 1, "{} {junk:?}", way.name());
        }
    }
    // A plain connection of bytes is none of this.
    let workload = crate::harness::echo().await;
    let tcp = Extra { inbound: "protocol: tcp", outbound: "protocol: tcp", ..Extra::default() };
    let pair = Pair::start(workload.address, tcp).await;
    exchange(&mut TcpStream::connect(pair.address).await.unwrap(), b"\x00\x01\x02 bytes").await.unwrap();
}
