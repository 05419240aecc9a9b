//! A path in normal form is its own normal form, holds nothing that could be written otherwise, and is the same however
//! it was read.
#![no_main]

use http::uri::PathAndQuery;
use libfuzzer_sys::fuzz_target;
use portcullis::config::schema::EscapedSlash;
use portcullis::policy::path::{MAX_PATH_BYTES, NormalPath};

fuzz_target!(|text: &str| {
    let query = text.split_once('?').map(|(_, query)| query);
    let [refuse, keep, decode] = [EscapedSlash::Refuse, EscapedSlash::Keep, EscapedSlash::Decode].map(|escaped| {
        let path = NormalPath::parse(text, escaped);
        if let Ok(path) = &path {
            let again = NormalPath::parse(path.path_and_query().as_str(), escaped);
            assert_eq!(again.as_ref(), Ok(path));
            assert_eq!(path.query(), query);
            assert!(path.as_str().len() <= MAX_PATH_BYTES);
            in_one_form(path.as_str(), escaped == EscapedSlash::Keep);
            in_one_form(path.judged(), escaped == EscapedSlash::Keep);
        }
        // A fragment is lost on the way into a URI.
        if let Ok(uri) = PathAndQuery::try_from(text)
            && uri.as_str() == text
        {
            assert_eq!(NormalPath::of(&uri, escaped), path);
        }
        path
    });
    if refuse.is_ok() {
        assert_eq!(refuse, keep);
        assert_eq!(refuse, decode);
    }
});

fn in_one_form(path: &str, slash: bool) {
    let segments = path.strip_prefix('/').expect("absolute");
    assert!(!path.contains("//") && segments.split('/').all(|segment| !matches!(segment, "." | "..")));
    assert!(path.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'\\' | b'#' | b'?')));
    for (at, _) in path.match_indices('%') {
        let digits = &path[at + 1..at + 3];
        assert!(digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'A'..=b'F')));
        let octet = u8::from_str_radix(digits, 16).expect("hexadecimal");
        assert!(!octet.is_ascii_alphanumeric() && !b"-._~\\".contains(&octet) && !octet.is_ascii_control());
        assert!(slash || octet != b'/');
    }
}
