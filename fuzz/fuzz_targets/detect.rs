//! No answer is taken back when more bytes come, and none is owed after [`MAX`] bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use portcullis::proxy::detect::{Detected, MAX, detect};

fuzz_target!(|bytes: &[u8]| {
    let mut answer = Detected::More;
    for length in 0..=bytes.len().min(MAX + 1) {
        let now = detect(&bytes[..length]);
        assert!(answer == Detected::More || answer == now);
        assert!(now != Detected::More || length < MAX);
        answer = now;
    }
});
