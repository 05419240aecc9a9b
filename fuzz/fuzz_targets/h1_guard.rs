//! The guard against a plain reader of HTTP/1 that sees the whole connection at once: the same requests, and no byte of
//! a head that the plain reader refuses. The first byte of the input says how the rest is cut.
#![no_main]

use libfuzzer_sys::fuzz_target;
use portcullis::proxy::http::h1_guard::{FramingError, GuardLimits, H1Guard};
use portcullis_fuzz::{Ending, Pieces, read_all};

#[path = "../../src/proxy/http/h1_guard/tests/naive.rs"]
mod naive;

/// What is passed, and whether a head or a body was refused.
fn pass(bytes: &[u8], piece: usize, room: usize) -> (Vec<u8>, bool) {
    // The plain reader knows no limits.
    let limits = GuardLimits {
        max_request_line: usize::MAX,
        max_headers: usize::MAX,
        max_header_bytes: usize::MAX,
        max_trailers: usize::MAX,
        max_trailer_bytes: usize::MAX,
        max_chunk_extensions: usize::MAX,
        ..GuardLimits::default()
    };
    let (mut guard, handle) = H1Guard::new(Pieces::new(bytes, piece), limits);
    let mut passed = Vec::new();
    loop {
        let (more, ending) = read_all(&mut guard, room);
        passed.extend(more);
        match ending {
            Ending::Closed => return (passed, false),
            Ending::Failed(error) => {
                assert!(FramingError::find(&error).is_some());
                return (passed, true);
            }
            Ending::Silent => {}
        }
        if (1..=bytes.len() as u64).any(|nth| handle.refusal(nth).is_some()) {
            let stand_in = b"GET / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";
            assert!(passed.ends_with(stand_in));
            passed.truncate(passed.len() - stand_in.len());
            return (passed, true);
        }
        // It waits to be told that nothing became a tunnel.
        handle.next_request().not_tunnel();
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((how, bytes)) = input.split_first() else { return };
    if bytes.windows(8).any(|eight| eight == b"CONNECT ") {
        return;
    }
    let (passed, refused) = pass(bytes, usize::MAX, 64 * 1024);
    assert_eq!(pass(bytes, usize::from(how % 16), usize::from(how / 16)), (passed.clone(), refused));
    assert!(bytes.starts_with(&passed));
    let (accepted, whole) = naive::naive(bytes);
    assert_eq!(naive::naive(&passed), (accepted.clone(), whole));
    // Only the body of the last one may be passed in part.
    let partial = accepted.last().is_some_and(|last| last.body.is_none());
    assert!(passed.len() == whole || (partial && passed.len() > whole));
});
