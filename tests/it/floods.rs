//! Floods of HTTP/2 frames against the running proxy: each ends its own connection and no other.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::soon;
use crate::pair::{Pair, curl, http_origin};

/// `GET http://a/status/200`, by the static table and literals that are not indexed (RFC 7541, sections 6.1 and 6.2.2).
const GET: &[u8] = b"\x82\x86\x04\x0b/status/200\x01\x01a";
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// Frames of one flood at the most: far more than anybody may send, and bounded.
const MOST: u32 = 200_000;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// What a flood is made of, by the number of the step.
type Step = fn(u32) -> Vec<u8>;

fn floods() -> [(&'static str, Step); 7] {
    [
        ("SETTINGS", |_| frame(4, 0, 0, b"")),
        ("PING", |_| frame(6, 0, 0, b"12345678")),
        ("unknown frames", |_| frame(0xbe, 0, 0, b"")),
        ("WINDOW_UPDATE", |_| frame(8, 0, 0, &[0, 0, 0, 1])),
        // Rapid reset: each request is begun and thrown away.
        ("RST_STREAM", |n| [frame(1, 5, 2 * n + 1, GET), frame(3, 0, 2 * n + 1, &[0, 0, 0, 8])].concat()),
        ("CONTINUATION", |n| if n == 0 { frame(1, 1, 1, GET) } else { frame(9, 0, 1, b"") }),
        ("empty DATA", |n| if n == 0 { frame(1, 4, 1, GET) } else { frame(0, 0, 1, b"") }),
    ]
}

#[tokio::test]
async fn each_flood_ends_its_own_connection_and_no_other() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    for (name, step) in floods() {
        let (mut read, mut write) = TcpStream::connect(pair.address).await.unwrap().into_split();
        let answers = tokio::spawn(async move {
            let mut answers = Vec::new();
            // A reset is an end as well.
            let _ = read.read_to_end(&mut answers).await;
            answers
        });
        let flood = async {
            write.write_all(PREFACE).await?;
            for n in 0..MOST {
                write.write_all(&step(n)).await?;
            }
            std::io::Result::Ok(())
        };
        // The end shows in the writes, or in what is read.
        let _ = tokio::time::timeout(Duration::from_secs(20), flood).await;
        let answers = soon(&format!("the end of a flood of {name}"), answers).await.unwrap();
        assert!(answers.len() < 16 << 20, "{name}: {} bytes of answers", answers.len());
        let answer = curl(&[&format!("http://{}/status/200", pair.address)]).await;
        assert_eq!(answer.status, 200, "{name}: the next client is served");
    }
}
