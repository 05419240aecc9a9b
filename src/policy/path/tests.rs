use proptest::prelude::*;

use super::EscapedSlash::{Decode, Keep, Refuse};
use super::*;

fn normal(path: &str, escaped: EscapedSlash) -> Result<String, PathError> {
    NormalPath::parse(path, escaped).map(|path| path.as_str().to_owned())
}

#[test]
fn one_form_for_every_spelling() {
    for (written, expected) in [
        ("/", "/"),
        ("/a/b", "/a/b"),
        ("/a/b/", "/a/b/"),
        ("//a///b//", "/a/b/"),
        ("/%61/%7e%5F%2d%2E%41", "/a/~_-.A"),
        ("/a/./b/.", "/a/b/"),
        ("/a/b/../c", "/a/c"),
        ("/a/b/..", "/a/"),
        ("/a/..", "/"),
        ("/a/%2e%2E/b", "/b"),
        ("/a/%2e/b", "/a/b"),
        ("/a//../b", "/b"),
        ("/a/.../b", "/a/.../b"),
        ("/a/..b/.b", "/a/..b/.b"),
        ("/caf%c3%a9", "/caf%C3%A9"),
        ("/a%20b", "/a%20b"),
        ("/%252e%252e/x", "/%252e%252e/x"),
        ("/{a}|^`\"<>[]", "/%7Ba%7D%7C%5E%60%22%3C%3E%5B%5D"),
        ("/a!$&'()*+,=:@b", "/a!$&'()*+,=:@b"),
        ("/a%3ab", "/a%3Ab"),
        ("/a;x=1/b", "/a;x=1/b"),
        ("/..a;x", "/..a;x"),
    ] {
        for escaped in [Refuse, Keep, Decode] {
            assert_eq!(normal(written, escaped).as_deref(), Ok(expected), "{written}");
        }
    }
}

#[test]
fn what_could_be_read_in_two_ways_is_refused() {
    for (written, why) in [
        ("", PathError::NotAbsolute),
        ("a/b", PathError::NotAbsolute),
        ("*", PathError::NotAbsolute),
        ("?q", PathError::NotAbsolute),
        ("http://h/a", PathError::NotAbsolute),
        ("/..", PathError::AboveRoot),
        ("/a/../..", PathError::AboveRoot),
        ("/a//../../b", PathError::AboveRoot),
        ("/%2e%2e/", PathError::AboveRoot),
        ("/a\\b", PathError::Backslash),
        ("/a%5cb", PathError::Backslash),
        ("/a%00", PathError::Control),
        ("/a%0d%0a", PathError::Control),
        ("/a%7F", PathError::Control),
        ("/a b", PathError::Control),
        ("/a\u{0}", PathError::Control),
        ("/a\tb", PathError::Control),
        ("/a%zz", PathError::BadEscape),
        ("/a%4", PathError::BadEscape),
        ("/a%", PathError::BadEscape),
        ("/a%+1", PathError::BadEscape),
        ("/é", PathError::NotUtf8),
        ("/%ff", PathError::NotUtf8),
        ("/%c0%af", PathError::NotUtf8),
        ("/%e0%80%af", PathError::NotUtf8),
        ("/%c3/a", PathError::NotUtf8),
        ("/a#b", PathError::Fragment),
        ("/a?b#c", PathError::Fragment),
        ("/a?b c", PathError::Control),
        ("/a?b\u{7f}", PathError::Control),
        ("/a/..;/b", PathError::Parameters),
        ("/a/..;x=1", PathError::Parameters),
        ("/a/%2e%2e;/b", PathError::Parameters),
        ("/a/..%3b/b", PathError::Parameters),
        ("/a/.;/b", PathError::Parameters),
        ("/;x/b", PathError::Parameters),
    ] {
        for escaped in [Refuse, Keep, Decode] {
            assert_eq!(normal(written, escaped), Err(why), "{written:?}");
        }
    }
    let long = format!("/{}", "a".repeat(MAX_PATH_BYTES));
    assert_eq!(normal(&long, Refuse), Err(PathError::TooLong));
    assert!(normal(long.get(..MAX_PATH_BYTES).unwrap(), Refuse).is_ok());
    // Each brace becomes three bytes.
    let braces = |count| format!("/a{}", "{".repeat(count));
    assert_eq!(normal(&braces(MAX_PATH_BYTES / 3), Refuse).unwrap().len(), MAX_PATH_BYTES);
    assert_eq!(normal(&braces(MAX_PATH_BYTES / 3 + 1), Refuse), Err(PathError::TooLong));
}

#[test]
fn an_encoded_slash_is_what_the_listener_says() {
    for path in ["/a%2Fb", "/a%2fb"] {
        assert_eq!(normal(path, Refuse), Err(PathError::EscapedSlash));
        assert_eq!(normal(path, Keep).unwrap(), "/a%2Fb");
        assert_eq!(normal(path, Decode).unwrap(), "/a/b");
    }
    assert_eq!(normal("/a%2f%2f..%2fb", Decode).unwrap(), "/b");
    assert_eq!(normal("/http:%2f%2fb/c", Keep).unwrap(), "/http:%2F%2Fb/c");
    for climbing in ["/a/..%2fb", "/a/b%2f..", "/a/%2e%2f", "/a/b%2F..;x%2fc"] {
        assert_eq!(normal(climbing, Keep), Err(PathError::EscapedSlash));
    }
    assert_eq!(normal("/..%2f", Decode), Err(PathError::AboveRoot));
}

#[test]
fn the_query_is_not_touched_and_nothing_is_copied_without_need() {
    let path = NormalPath::parse("/a/../b?x=%61//../é?&", Refuse).unwrap();
    assert_eq!((path.as_str(), path.query()), ("/b", Some("x=%61//../é?&")));
    assert_eq!(path.path_and_query().as_str(), "/b?x=%61//../é?&");
    assert_eq!(NormalPath::parse("/b", Refuse).unwrap().query(), None);
    assert_eq!(NormalPath::parse("/b?", Refuse).unwrap().path_and_query().as_str(), "/b?");

    for text in ["/a/b;c?d", "/a/%C3%A9", "/patients/7?x=1"] {
        let written = PathAndQuery::from_maybe_shared(bytes_of(text)).unwrap();
        let path = NormalPath::of(&written, Refuse).unwrap();
        assert_eq!(path.path_and_query().as_str().as_ptr(), written.as_str().as_ptr(), "shared");
    }
    let written = PathAndQuery::from_static("/a/../b?c");
    assert_eq!(NormalPath::of(&written, Refuse).unwrap().path_and_query().as_str(), "/b?c");
}

fn bytes_of(text: &str) -> hyper::body::Bytes {
    hyper::body::Bytes::copy_from_slice(text.as_bytes())
}

#[test]
fn rules_read_reserved_characters_alike_and_the_workload_gets_them_as_written() {
    let path = NormalPath::parse("/a%3ab/%40%2B%3b%25%3A", Refuse).unwrap();
    assert_eq!(path.as_str(), "/a%3Ab/%40%2B%3B%25%3A");
    assert_eq!(path.judged(), "/a:b/@+%3B%25:");
    let plain = NormalPath::parse("/a:b", Refuse).unwrap();
    assert_eq!((plain.as_str(), plain.judged()), ("/a:b", "/a:b"));
}

/// The definition, step by step over whole strings and lists: nothing of it is shared with the code above.
fn reference(path: &str, escaped: EscapedSlash) -> Option<String> {
    let mut rest = path.strip_prefix('/')?.to_owned();
    if rest.contains(['\\', '#']) || rest.chars().any(|c| !('!'..='~').contains(&c)) {
        return None;
    }
    // Escapes in capitals; what may not be escaped decoded.
    let mut pieces = rest.split('%');
    let mut all = pieces.next()?.to_owned();
    let mut octets = all.as_bytes().to_vec();
    for piece in pieces {
        let (hex, tail) = piece.split_at_checked(2)?;
        if !hex.chars().all(|c| c.is_ascii_hexdigit()) {
            return None;
        }
        let octet = u8::from_str_radix(hex, 16).unwrap();
        match octet {
            0..=31 | 127 | b'\\' => return None,
            b'/' if escaped == Refuse => return None,
            b'/' if escaped == Decode => all.push('/'),
            _ if "-._~".contains(char::from(octet)) || octet.is_ascii_alphanumeric() => all.push(char::from(octet)),
            _ => all += &format!("%{octet:02X}"),
        }
        all += tail;
        octets.push(octet);
        octets.extend(tail.bytes());
    }
    String::from_utf8(octets).ok()?;
    for c in "\"<>[]^`{|}".chars() {
        all = all.replace(c, &format!("%{:02X}", u32::from(c)));
    }
    rest = all;
    let written: Vec<&str> = rest.split('/').collect();
    let directory = matches!(written.last(), Some(&("" | "." | "..")));
    let mut kept: Vec<&str> = Vec::new();
    for segment in written {
        let name = segment.replace("%3B", ";");
        match segment {
            "" | "." => {}
            ".." => drop(kept.pop()?),
            _ if name.split("%2F").any(|part| ["..", "."].contains(&part.split(';').next().unwrap())) => return None,
            _ if name.starts_with(';') || name.starts_with(".;") || name.starts_with("..;") => return None,
            _ => kept.push(segment),
        }
    }
    let slash = if directory && !kept.is_empty() { "/" } else { "" };
    Some(format!("/{}{slash}", kept.join("/")))
}

fn any_escaped() -> impl Strategy<Value = EscapedSlash> {
    prop_oneof![Just(Refuse), Just(Keep), Just(Decode)]
}

/// Paths of which a good part is acceptable, and every part unpleasant.
fn any_path() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        6 => "[a-cA-C0-9~_-]{1,3}".boxed(),
        6 => Just("/".to_owned()).boxed(),
        3 => prop_oneof![Just("."), Just(".."), Just("%2e"), Just("%2E."), Just("//")].prop_map(str::to_owned).boxed(),
        2 => "%[46][1-9a-f]".boxed(),
        2 => prop_oneof![Just("%2f"), Just("%3a"), Just("%C3%a9"), Just("%25"), Just(";"), Just("%3b"), Just("%20")]
            .prop_map(str::to_owned).boxed(),
        1 => "[!$&'()*+,=:@{}|^`\"<>\\[\\]]".boxed(),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| format!("/{}", pieces.concat()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn the_form_is_the_definition(path in any_path(), escaped in any_escaped()) {
        prop_assert_eq!(normal(&path, escaped).ok(), reference(&path, escaped), "{}", path);
    }

    #[test]
    fn whatever_the_bytes_it_is_the_definition(path in "/?[/.%;25eEfF#\\\\ a\u{0}\u{7f}é-]{0,12}", escaped in any_escaped()) {
        prop_assert_eq!(normal(&path, escaped).ok(), reference(&path, escaped), "{}", path);
    }

    #[test]
    fn the_form_of_the_form_is_itself(path in any_path(), escaped in any_escaped()) {
        if let Ok(once) = NormalPath::parse(&path, escaped) {
            let again = NormalPath::parse(once.as_str(), escaped).unwrap();
            prop_assert_eq!(&again, &once);
            prop_assert_eq!(again.judged(), once.judged());
        }
    }

    #[test]
    fn the_form_holds_nothing_that_could_be_written_otherwise(path in any_path(), escaped in any_escaped()) {
        let Ok(form) = normal(&path, escaped) else { return Ok(()) };
        prop_assert!(form.starts_with('/') && !form.contains("//") && !form.contains('\\'), "{}", form);
        prop_assert!(form.split('/').all(|segment| segment != "." && segment != ".."), "{}", form);
        for (at, _) in form.match_indices('%') {
            let hex = form.get(at + 1..at + 3).unwrap();
            let octet = u8::from_str_radix(hex, 16).unwrap();
            prop_assert!(!unreserved(octet) && hex == hex.to_uppercase(), "{}", form);
            prop_assert!(octet != b'/' || escaped == Keep, "{}", form);
        }
    }
}
