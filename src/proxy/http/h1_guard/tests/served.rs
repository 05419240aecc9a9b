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

use super::naive::{Served, naive};
use super::*;

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
    answer.split("HTTP/1.").skip(1).map(|rest| rest.split(' ').nth(1).unwrap()).collect()
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
        let served: Vec<_> = served.iter().map(|one| (one.target.as_str(), one.body.as_deref().unwrap())).collect();
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
        let (accepted, _) = naive(&bytes);
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
