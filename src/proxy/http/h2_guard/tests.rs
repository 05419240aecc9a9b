use std::convert::Infallible;
use std::time::Duration;

use http_body_util::Empty;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

use tokio::time::Instant;

use super::rates::Bucket;
use super::*;

const NONE: Rate = Rate { per_second: 0, burst: 0 };
const ALL: Rate = Rate { per_second: 0, burst: u32::MAX };

fn frame(number: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[number, 0, 0, 0, 0, 1], payload].concat()
}

fn limits(kind: Kind, rate: Rate) -> FrameLimits {
    let mut limits =
        FrameLimits { settings: ALL, ping: ALL, priority: ALL, window_update: ALL, rst_stream: ALL, other: ALL };
    match kind {
        Kind::Settings => limits.settings = rate,
        Kind::Ping => limits.ping = rate,
        Kind::Priority => limits.priority = rate,
        Kind::WindowUpdate => limits.window_update = rate,
        Kind::RstStream => limits.rst_stream = rate,
        Kind::Other => limits.other = rate,
    }
    limits
}

/// Reads all of it into a buffer of `room`. What passes, without the block that stands in, and the flood.
async fn pass(pieces: &[&[u8]], room: usize, limits: &FrameLimits) -> (Vec<u8>, Option<Flood>) {
    let (mut near, far) = duplex(64 * 1024);
    let (mut guard, handle) = H2Guard::new(far, limits, 16 * 1024, 16 * 1024);
    let mut passed = Vec::new();
    let mut space = vec![0; room];
    let mut pieces = pieces.iter();
    loop {
        if let Some(piece) = pieces.next() {
            near.write_all(piece).await.unwrap();
        } else {
            near.shutdown().await.unwrap();
        }
        loop {
            // A read that would wait is the next piece's turn.
            let read = tokio::select! {
                biased;
                read = guard.read(&mut space) => read,
                () = tokio::task::yield_now() => break,
            };
            match read {
                Ok(0) => return (passed, handle.flood()),
                Ok(count) => passed.extend_from_slice(&space[..count]),
                Err(error) => {
                    let flood = *error.get_ref().unwrap().downcast_ref::<Flood>().unwrap();
                    assert_eq!(handle.flood(), Some(flood));
                    let block = [&BLOCK_START[..], &BLOCK_MORE.repeat(9)].concat();
                    let length = passed.len() - block.len();
                    assert_eq!(passed.split_off(length), block);
                    return (passed, Some(flood));
                }
            }
        }
    }
}

const COUNTED: [(u8, Kind); 10] = [
    (2, Kind::Priority),
    (3, Kind::RstStream),
    (4, Kind::Settings),
    (5, Kind::Other),
    (6, Kind::Ping),
    (7, Kind::Other),
    (8, Kind::WindowUpdate),
    (10, Kind::Other),
    (16, Kind::Other),
    (255, Kind::Other),
];

#[tokio::test(start_paused = true)]
async fn every_kind_is_counted_by_itself_however_the_bytes_are_cut() {
    for (number, kind) in COUNTED {
        let limits = limits(kind, Rate { per_second: 0, burst: 2 });
        let others: Vec<u8> =
            COUNTED.iter().filter(|(_, other)| *other != kind).flat_map(|it| frame(it.0, b"12")).collect();
        // DATA, HEADERS and CONTINUATION are not counted, and payloads are not frames.
        let data = [frame(0, &frame(number, b"")), frame(1, &[number; 40]), frame(9, b"")].concat();
        let one = frame(number, b"12345");
        let good = [&PREFACE[..], &one, &others, &data, &one, &data].concat();
        let bad = [&good[..], &one, &data].concat();
        for cut in 0..bad.len() {
            let (first, second) = bad.split_at(cut);
            let (passed, flood) = pass(&[first, second], 1000, &limits).await;
            assert_eq!((passed, flood), (good.clone(), Some(Flood { kind })), "{number} cut at {cut}");
        }
        let bytes: Vec<_> = bad.chunks(1).collect();
        for room in [1, 5, 1000] {
            assert_eq!(pass(&bytes, room, &limits).await, (good.clone(), Some(Flood { kind })));
            assert_eq!(pass(&[&bad], room, &limits).await, (good.clone(), Some(Flood { kind })));
            assert_eq!(pass(&[&good], room, &limits).await, (good.clone(), None));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn tokens_come_back_with_time_up_to_the_burst() {
    let mut bucket = Bucket::new(Rate { per_second: 10, burst: 3 }, Instant::now());
    let mut taken = || (0..100).take_while(|_| bucket.take(Instant::now())).count();
    assert_eq!(taken(), 3);
    for (millis, expected) in [(99, 0), (1, 1), (150, 1), (50, 1), (1000, 3), (1_000_000, 3)] {
        tokio::time::advance(Duration::from_millis(millis)).await;
        assert_eq!(taken(), expected, "after {millis} ms");
    }
    let mut none = Bucket::new(NONE, Instant::now());
    tokio::time::advance(Duration::from_secs(1 << 30)).await;
    assert!(!none.take(Instant::now()));
}

#[tokio::test(start_paused = true)]
async fn bytes_written_earn_frames() {
    for (kind, number, each) in [(Kind::Ping, 6, 64), (Kind::WindowUpdate, 8, 32), (Kind::RstStream, 3, 1024)] {
        let (mut near, far) = duplex(64 * 1024);
        let (mut guard, handle) = H2Guard::new(far, &limits(kind, Rate { per_second: 0, burst: 1 }), 1, 1);
        let mut space = [0; 1000];
        near.write_all(PREFACE).await.unwrap();
        guard.read_exact(&mut space[..PREFACE.len()]).await.unwrap();
        for round in 0..3 {
            near.write_all(&frame(number, b"1234")).await.unwrap();
            guard.read_exact(&mut space[..HEADER + 4]).await.unwrap();
            assert_eq!(handle.flood(), None, "{kind:?} {round}");
            let half = vec![0; each / 2];
            guard.write_all(&half).await.unwrap();
            assert_eq!(guard.write_vectored(&[io::IoSlice::new(&half)]).await.unwrap(), half.len());
        }
        near.write_all(&frame(number, b"1234").repeat(2)).await.unwrap();
        while handle.flood().is_none() {
            assert!(guard.read(&mut space).await.unwrap() > 0);
        }
        assert_eq!(handle.flood(), Some(Flood { kind }));
    }
}

/// What a server with the guard says to these bytes, as (type, payload) of each frame.
async fn served(bytes: &[u8], max_header_list_size: u32) -> (Vec<(u8, Vec<u8>)>, Option<Flood>) {
    let (mut near, far) = duplex(1024 * 1024);
    let (guard, handle) = H2Guard::new(far, &FrameLimits::default(), max_header_list_size, 16 * 1024);
    let service = service_fn(async |_: Request<Incoming>| Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new())));
    let server = http2::Builder::new(TokioExecutor::new())
        .max_header_list_size(max_header_list_size)
        .max_frame_size(16 * 1024)
        .serve_connection(TokioIo::new(guard), service);
    near.write_all(bytes).await.unwrap();
    let server = tokio::spawn(server);
    let mut answer = Vec::new();
    near.read_to_end(&mut answer).await.unwrap();
    assert!(server.await.unwrap().is_err());
    let mut frames = Vec::new();
    let mut rest = &answer[..];
    while let Some((header, after)) = rest.split_first_chunk::<HEADER>() {
        let (payload, after) = after.split_at(u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize);
        frames.push((header[3], payload.to_vec()));
        rest = after;
    }
    (frames, handle.flood())
}

#[tokio::test(start_paused = true)]
async fn a_flood_ends_with_goaway_enhance_your_calm() {
    for max_header_list_size in [1, 16 * 1024, 64 * 1024, 1024 * 1024] {
        let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        let ping = [&[0, 0, 8, 6, 0, 0, 0, 0, 0][..], b"12345678"].concat();
        let bytes = [PREFACE, &settings[..], &ping.repeat(10_000)].concat();
        let (frames, flood) = served(&bytes, max_header_list_size).await;
        assert_eq!(flood, Some(Flood { kind: Kind::Ping }));
        let (number, payload) = frames.last().unwrap();
        // Error code 11 (RFC 9113 section 7).
        assert_eq!((*number, &payload[4..8]), (7, &[0, 0, 0, 11][..]));
        // Answers earn less than they cost.
        let pongs = frames.iter().filter(|(number, _)| *number == 6).count();
        assert!((1_000..2_000).contains(&pongs), "{pongs}");
    }
}

proptest! {
    #[test]
    fn frames_of_any_kind_and_size_pass_under_their_rates(
        frames in proptest::collection::vec((any::<u8>(), 0..300usize), 0..20),
        piece in 1..200usize,
        room in 1..200usize,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let mut bytes = PREFACE.to_vec();
        for (number, length) in &frames {
            bytes.extend(frame(*number, &vec![*number; *length]));
        }
        let pieces: Vec<_> = bytes.chunks(piece).collect();
        let (passed, flood) = runtime.block_on(pass(&pieces, room, &limits(Kind::Other, ALL)));
        prop_assert_eq!((passed, flood), (bytes, None));
    }
}

#[tokio::test(start_paused = true)]
async fn the_answer_to_the_farewell_is_given_after_what_was_on_its_way() {
    let pong = [&[0, 0, 8, PING_TYPE, ACK, 0, 0, 0, 0][..], b"farewell"].concat();
    let request = frame(1, b"a request that the answer overtook");
    let skipped = [&[0, 0, 8, SKIPPED_TYPE, ACK, 0, 0, 0, 0][..], b"farewell"].concat();
    let all = [&pong[..], &request, &pong].concat();
    // However the bytes are cut.
    for cut in 1..all.len() {
        let (mut near, far) = duplex(64 * 1024);
        let (mut guard, handle) = H2Guard::new(far, &FrameLimits::default(), 16 * 1024, 16 * 1024);
        let mut got = vec![0; PREFACE.len() + pong.len()];
        // Before that, nothing is changed.
        near.write_all(&[&PREFACE[..], &pong].concat()).await.unwrap();
        guard.read_exact(&mut got).await.unwrap();
        assert_eq!(&got[PREFACE.len()..], pong);
        handle.drain();
        let began = Instant::now();
        let (first, second) = all.split_at(cut);
        near.write_all(first).await.unwrap();
        let mut got = vec![0; all.len()];
        let (a, b) = tokio::join!(guard.read_exact(&mut got), async {
            tokio::task::yield_now().await;
            near.write_all(second).await
        });
        a.unwrap();
        b.unwrap();
        assert_eq!(got, [&skipped[..], &request, &pong].concat(), "{cut}");
        assert!(began.elapsed() < STRAGGLERS, "{cut}");
        let mut late = vec![0; pong.len()];
        guard.read_exact(&mut late).await.unwrap();
        assert_eq!(late, pong, "{cut}");
        assert!(began.elapsed() >= STRAGGLERS, "{cut}");
    }
}
