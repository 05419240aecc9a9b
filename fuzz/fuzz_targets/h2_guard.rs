//! What passes is what came, up to a frame header. The first byte of the input says how the rest is cut.
#![no_main]

use libfuzzer_sys::fuzz_target;
use portcullis::proxy::http::h2_guard::{FrameLimits, H2Guard, Rate};
use portcullis_fuzz::{Ending, Pieces, read_all};

fn pass(bytes: &[u8], piece: usize, room: usize) -> (Vec<u8>, bool) {
    let few = Rate { per_second: 0, burst: 3 };
    let limits =
        FrameLimits { settings: few, ping: few, priority: few, window_update: few, rst_stream: few, other: few };
    let (mut guard, handle) = H2Guard::new(Pieces::new(bytes, piece), &limits, 16 * 1024, 16 * 1024);
    let (passed, ending) = read_all(&mut guard, room);
    assert_eq!(matches!(ending, Ending::Failed(_)), handle.flood().is_some());
    (passed, handle.flood().is_some())
}

fuzz_target!(|input: &[u8]| {
    let Some((how, bytes)) = input.split_first() else { return };
    let (passed, flood) = pass(bytes, usize::MAX, 64 * 1024);
    assert_eq!(pass(bytes, usize::from(how % 16), usize::from(how / 16)), (passed.clone(), flood));
    // A part of a header at the end is never given out.
    assert!(flood || (bytes.starts_with(&passed) && passed.len() + 9 > bytes.len()));
});
