//! The guard in front of hyper's server, in memory.

use std::sync::Mutex;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::Semaphore;

use super::*;

/// What a service saw of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Served {
    method: String,
    target: String,
    /// None: the body broke its framing or ended early.
    body: Option<Vec<u8>>,
}

type Log = Arc<Mutex<Vec<Served>>>;

/// Serves a connection as the proxy does. `/slow` waits for a permit of the gate; a CONNECT or an Upgrade to `x` of
/// `/tunnel` becomes a tunnel that echoes.
fn serve(limits: GuardLimits) -> (DuplexStream, Log, Arc<Semaphore>) {
    let (near, far) = duplex(64 * 1024);
    let log = Log::default();
    let gate = Arc::new(Semaphore::new(0));
    let (guard, handle) = H1Guard::new(far, limits);
    let (seen, opened) = (Arc::clone(&log), Arc::clone(&gate));
    let service = service_fn(move |request: Request<Incoming>| {
        answer(request, handle.next_request(), Arc::clone(&seen), Arc::clone(&opened))
    });
    let connection =
        http1::Builder::new().half_close(true).auto_date_header(false).serve_connection(TokioIo::new(guard), service);
    tokio::spawn(connection.with_upgrades());
    (near, log, gate)
}

async fn answer(
    mut request: Request<Incoming>,
    ticket: Ticket,
    seen: Log,
    gate: Arc<Semaphore>,
) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let status = |status: u16, body: String| Response::builder().status(status).body(Full::new(body.into())).unwrap();
    if let Some(refusal) = ticket.refusal() {
        return Ok(status(refusal.status, refusal.reason.to_owned()));
    }
    let mut served = Served { method: request.method().to_string(), target: request.uri().to_string(), body: None };
    if request.uri().path() == "/tunnel" || request.method() == Method::CONNECT {
        ticket.tunnel();
        let connect = request.method() == Method::CONNECT;
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let parts = upgrade.await.unwrap().downcast::<TokioIo<H1Guard<DuplexStream>>>().unwrap();
            assert!(parts.read_buf.is_empty(), "a byte of the tunnel came before it was one");
            let mut guard = parts.io.into_inner();
            let mut byte = [0];
            // The first through the guard, the rest without it.
            guard.read_exact(&mut byte).await.unwrap();
            guard.write_all(&byte).await.unwrap();
            let (mut io, first) = guard.into_parts();
            io.write_all(&first).await.unwrap();
            let (mut from, mut to) = tokio::io::split(io);
            tokio::io::copy(&mut from, &mut to).await.unwrap();
            to.shutdown().await.unwrap();
        });
        seen.lock().unwrap().push(served);
        return Ok(status(if connect { 200 } else { 101 }, String::new()));
    }
    if request.uri().path() == "/slow" {
        gate.acquire().await.unwrap().forget();
    }
    let body = request.into_body().collect().await.map(|body| body.to_bytes().to_vec());
    served.body = body.as_ref().ok().cloned();
    seen.lock().unwrap().push(served);
    match body {
        Ok(_) => Ok(status(200, format!("#{}", ticket.nth()))),
        Err(error) => match FramingError::find(&error) {
            Some(violation) => Ok(status(400, violation.reason.to_owned())),
            None => Err(error),
        },
    }
}

/// Sends everything, ends that side and returns the whole answer.
async fn talk(bytes: &[u8]) -> (String, Vec<Served>) {
    let (mut near, log, _gate) = serve(GuardLimits::default());
    near.write_all(bytes).await.unwrap();
    near.shutdown().await.unwrap();
    let mut answer = Vec::new();
    near.read_to_end(&mut answer).await.unwrap();
    let served = log.lock().unwrap().clone();
    (String::from_utf8(answer).unwrap(), served)
}

/// The status lines of an answer.
fn statuses(answer: &str) -> Vec<&str> {
    answer.match_indices("HTTP/1.").map(|(at, _)| &answer[at + 9..at + 12]).collect()
}

#[tokio::test(start_paused = true)]
async fn a_bad_head_is_answered_after_those_before_it() {
    for (bad, expected) in [
        ("GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", "400"),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "505"),
        (&format!("GET /{}", "a".repeat(9000)), "414"),
        (&format!("GET / HTTP/1.1\r\nx: {}", "a".repeat(33000)), "431"),
    ] {
        let first = "POST /1 HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi";
        let second = "POST /2 HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\n!\r\n0\r\n\r\n";
        let never = "GET /never HTTP/1.1\r\nhost: a\r\n\r\n";
        let (answer, served) = talk(format!("{first}{second}{bad}{never}").as_bytes()).await;
        assert_eq!(statuses(&answer), ["200", "200", expected], "{answer}");
        let expected = [("/1", &b"hi"[..]), ("/2", b"!")];
        let served: Vec<_> = served.iter().map(|one| (&one.target[..], one.body.as_deref().unwrap())).collect();
        assert_eq!(served, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn a_bad_head_waits_for_the_slow_answer_before_it() {
    let (mut near, _, gate) = serve(GuardLimits::default());
    near.write_all(b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\nGET / HTTP/1.1\n\n").await.unwrap();
    near.shutdown().await.unwrap();
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    gate.add_permits(1);
    let mut answer = String::new();
    near.read_to_string(&mut answer).await.unwrap();
    assert_eq!(statuses(&answer), ["200", "400"]);
    assert!(answer.ends_with("bare LF in a head"), "{answer}");
}

#[tokio::test(start_paused = true)]
async fn a_broken_body_is_answered_with_400_and_ends_the_connection() {
    let head = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
    for body in ["5\nhello", "5\r\nhello0\r\n\r\n", "0\r\nhost: b\r\n\r\n", "1\r\na\r\n2\n"] {
        let (answer, served) = talk(format!("{head}{body}GET / HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes()).await;
        assert_eq!(statuses(&answer), ["400"], "{body:?}");
        assert_eq!((served.len(), &served[0].body), (1, &None), "{body:?}");
    }
    // An early end is none of the guard's business.
    let (answer, served) = talk(format!("{head}5\r\nhel").as_bytes()).await;
    assert_eq!((statuses(&answer), served.len()), (Vec::new(), 1));
}

#[tokio::test(start_paused = true)]
async fn a_head_that_takes_too_long_is_a_408_and_silence_an_end() {
    let limits = GuardLimits::default();
    // Part of a head, first or later.
    for (start, expected) in [("", &["408"][..]), ("GET / HTTP/1.1\r\nhost: a\r\n\r\n", &["200", "408"])] {
        let (mut near, _, _gate) = serve(limits);
        let began = Instant::now();
        near.write_all(format!("{start}\r\nGET /").as_bytes()).await.unwrap();
        // More bytes give no more time.
        tokio::time::sleep(limits.header_timeout / 2).await;
        near.write_all(b"a").await.unwrap();
        let mut answer = String::new();
        near.read_to_string(&mut answer).await.unwrap();
        assert_eq!(statuses(&answer), expected);
        assert_eq!(began.elapsed().as_secs(), limits.header_timeout.as_secs());
    }
    // Nothing, or an empty line.
    for (start, expected) in [("", &[][..]), ("\r\n", &[]), ("GET / HTTP/1.1\r\nhost: a\r\n\r\n\r\n", &["200"])] {
        let (mut near, _, _gate) = serve(limits);
        let began = Instant::now();
        near.write_all(start.as_bytes()).await.unwrap();
        let mut answer = String::new();
        near.read_to_string(&mut answer).await.unwrap();
        assert_eq!(statuses(&answer), expected);
        assert_eq!(began.elapsed().as_secs(), limits.idle_timeout.as_secs());
    }
}

#[tokio::test(start_paused = true)]
async fn the_idle_time_counts_from_the_end_of_the_last_answer() {
    let limits = GuardLimits::default();
    let (mut near, _, gate) = serve(limits);
    near.write_all(b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    // A slow answer is no silence of the peer.
    tokio::time::sleep(limits.idle_timeout * 5 / 2).await;
    gate.add_permits(1);
    let mut answer = vec![0; 12];
    near.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, b"HTTP/1.1 200");
    let began = Instant::now();
    // Nor does what came before count once another request was answered.
    tokio::time::sleep(limits.idle_timeout / 2).await;
    near.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    near.read_to_end(&mut answer).await.unwrap();
    assert_eq!(statuses(&String::from_utf8(answer).unwrap()), ["200", "200"]);
    assert_eq!(began.elapsed().as_secs(), (limits.idle_timeout * 3 / 2).as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_passes_anything_from_its_first_byte() {
    for head in [
        "CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n",
        "GET /tunnel HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
    ] {
        let (mut near, log, _gate) = serve(GuardLimits::default());
        // The first bytes of the tunnel are early: with the head in one write.
        let early = b"\0\n GET / HTTP/1.1\r\n";
        near.write_all(&[head.as_bytes(), early].concat()).await.unwrap();
        near.write_all(b"late").await.unwrap();
        near.shutdown().await.unwrap();
        let mut answer = Vec::new();
        near.read_to_end(&mut answer).await.unwrap();
        assert!(answer.ends_with(&[&b"\r\n\r\n"[..], early, b"late"].concat()), "{}", answer.escape_ascii());
        assert_eq!(log.lock().unwrap().len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn an_upgrade_that_is_declined_is_followed_by_requests() {
    let upgrade = "POST / HTTP/1.1\r\nhost: a\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\ncontent-length: 2\r\n\r\nhi";
    let (answer, served) = talk(format!("{upgrade}{upgrade}GET /last HTTP/1.1\r\nhost: a\r\n\r\n\0").as_bytes()).await;
    assert_eq!(statuses(&answer), ["200", "200", "200", "400"]);
    assert_eq!(served.len(), 3);
}

/// A second reader of HTTP/1, plain and slow, with the whole connection before it. The requests up to the first that
/// is bad or not whole; a request whose body is bad or not whole is the last one, without its body.
fn naive(mut rest: &[u8]) -> Vec<Served> {
    let mut all = Vec::new();
    loop {
        rest = rest.strip_prefix(b"\r\n").unwrap_or(rest);
        let Some(end) = rest.windows(4).position(|four| four == b"\r\n\r\n") else { return all };
        let (head, after) = (&rest[..end], &rest[end + 4..]);
        let Some((served, body)) = naive_head(head) else { return all };
        let body = match body {
            None => naive_chunked(after),
            Some(length) => {
                usize::try_from(length).ok().and_then(|length| Some((after.get(..length)?.to_vec(), length)))
            }
        };
        let Some((body, length)) = body else {
            all.push(served);
            return all;
        };
        all.push(Served { body: Some(body), ..served });
        rest = &after[length..];
    }
}

fn naive_lines(bytes: &[u8]) -> Option<Vec<String>> {
    // Latin 1, so that every byte is one character.
    let text: String = bytes.iter().map(|byte| char::from(*byte)).collect();
    let lines: Vec<String> = text.split("\r\n").map(str::to_owned).collect();
    let clean = |line: &String| line.chars().all(|c| c == '\t' || (c >= ' ' && c != '\u{7f}'));
    lines.iter().all(clean).then_some(lines)
}

fn naive_token(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c))
}

fn naive_field(line: &str) -> Option<(String, &str)> {
    let (name, value) = line.split_once(':')?;
    naive_token(name).then(|| (name.to_ascii_lowercase(), value.trim_matches([' ', '\t'])))
}

fn naive_authority(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (text, None),
    };
    let good_port = port.is_none_or(|port| port.len() <= 5 && !port.starts_with('+') && port.parse::<u16>().is_ok());
    let literal = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let good_host = match literal {
        Some(literal) => literal.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || "-._~".contains(c)),
    };
    good_port && good_host
}

/// The request, and its length unless it is chunked.
fn naive_head(head: &[u8]) -> Option<(Served, Option<u64>)> {
    let lines = naive_lines(head)?;
    let [method, target, version] = lines[0].split(' ').collect::<Vec<_>>()[..] else { return None };
    let visible = target.chars().all(|c| ('!'..='~').contains(&c) && c != '#');
    let authority = ["http://", "https://"]
        .iter()
        .find(|scheme| target.to_ascii_lowercase().starts_with(**scheme))
        .map(|scheme| target[scheme.len()..].split(['/', '?']).next().unwrap().to_owned());
    let form = target.starts_with('/') || (target == "*" && method == "OPTIONS") || authority.is_some();
    // The sender below makes no CONNECT, and a mutation that does is not worth a reader.
    if !naive_token(method) || method == "CONNECT" || !visible || !form || !["HTTP/1.0", "HTTP/1.1"].contains(&version)
    {
        return None;
    }
    let fields: Vec<_> = lines[1..].iter().map(|line| naive_field(line)).collect::<Option<_>>()?;
    let all =
        |wanted: &str| fields.iter().filter(|(name, _)| name == wanted).map(|(_, value)| *value).collect::<Vec<_>>();
    let (hosts, lengths, codings) = (all("host"), all("content-length"), all("transfer-encoding"));
    let host_good = match hosts[..] {
        [] => version == "HTTP/1.0",
        [host] => naive_authority(host) && authority.as_ref().is_none_or(|it| it.eq_ignore_ascii_case(host)),
        _ => false,
    };
    if !host_good || !authority.is_none_or(|authority| naive_authority(&authority)) {
        return None;
    }
    let served = Served { method: method.to_owned(), target: target.to_owned(), body: None };
    match (&lengths[..], &codings[..]) {
        ([], []) => Some((served, Some(0))),
        ([length], []) if length.chars().all(|c| c.is_ascii_digit()) => {
            Some((served, Some(length.parse().ok().filter(|length| i64::try_from(*length).is_ok())?)))
        }
        ([], [coding]) if coding.eq_ignore_ascii_case("chunked") && version == "HTTP/1.1" => Some((served, None)),
        _ => None,
    }
}

fn naive_chunked(bytes: &[u8]) -> Option<(Vec<u8>, usize)> {
    let mut body = Vec::new();
    let mut rest = bytes;
    loop {
        let end = rest.windows(2).position(|two| two == b"\r\n")?;
        let line = &naive_lines(&rest[..end])?[0];
        let (size, extension) =
            line.split_once(';').map_or((&line[..], None), |(size, extension)| (size, Some(extension)));
        if !(1..=16).contains(&size.len()) || !size.chars().all(|c| c.is_ascii_hexdigit()) {
            return None;
        }
        if extension.is_some_and(|it| !it.is_ascii() || !it.starts_with(|c| naive_token(&String::from(c)))) {
            return None;
        }
        let size = usize::try_from(u64::from_str_radix(size, 16).unwrap()).unwrap();
        rest = &rest[end + 2..];
        if size == 0 {
            break;
        }
        body.extend(rest.get(..size)?);
        rest = rest.get(size..)?.strip_prefix(b"\r\n")?;
    }
    let end = match rest.strip_prefix(b"\r\n") {
        Some(_) => 2,
        None => rest.windows(4).position(|four| four == b"\r\n\r\n")? + 4,
    };
    let bad = ["content-length", "transfer-encoding", "host", "trailer"];
    for line in naive_lines(&rest[..end - 2])?.iter().filter(|line| !line.is_empty()) {
        let (name, _) = naive_field(line)?;
        if bad.contains(&&name[..]) {
            return None;
        }
    }
    Some((body, bytes.len() - rest.len() + end))
}

/// Whole requests, then some bytes put, taken out or changed.
fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let request = proptest::sample::select(super::GOOD);
    let piece = proptest::sample::select(vec![
        "\r",
        "\n",
        "\r\n",
        "\r\n\r\n",
        "\n\n",
        " ",
        "\t",
        ":",
        ";",
        ",",
        "\0",
        "0",
        "5",
        "0\r\n\r\n",
        "\u{e9}",
        "#",
        "+",
        "a",
        "\r\n ",
        "Host: b\r\n",
        "Content-Length: 3\r\n",
        "content-length: 0\r\n",
        "Transfer-Encoding: chunked\r\n",
        "transfer-encoding : chunked\r\n",
        "transfer-encoding: identity\r\n",
        "chunked, ",
        "HTTP/1.0",
        "GET / HTTP/1.1\r\n",
    ]);
    let change = (any::<proptest::sample::Index>(), 0..4usize, proptest::option::of(piece));
    (proptest::collection::vec(request, 1..4), proptest::collection::vec(change, 0..4)).prop_map(
        |(requests, changes)| {
            let mut bytes = requests.concat().into_bytes();
            for (at, removed, put) in changes {
                let at = at.index(bytes.len() + 1);
                let end = bytes.len().min(at + if put.is_some() { removed / 2 } else { removed });
                bytes.splice(at..end, put.unwrap_or_default().bytes());
            }
            bytes
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn hyper_serves_what_a_plain_strict_reader_accepts_and_nothing_else(bytes in mutated()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let (answer, served) = runtime.block_on(talk(&bytes));
        let accepted = naive(&bytes);
        // HTTP/1.0 ends the connection early, and then less is served; never anything else.
        let same = accepted.iter().zip(&served).all(|(accepted, served)| {
            // An absolute form without a path gets one.
            let target = accepted.target == served.target || format!("{}/", accepted.target) == served.target
                || accepted.target.contains("://");
            target && accepted.method == served.method && accepted.body == served.body
        });
        prop_assert!(same && served.len() <= accepted.len(), "{accepted:?}\n{served:?}\n{answer}");
        let persistent = !bytes.windows(8).any(|eight| eight == b"HTTP/1.0");
        prop_assert!(!persistent || served.len() == accepted.len(), "{accepted:?}\n{served:?}\n{answer}");
    }
}
