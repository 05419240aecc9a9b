//! What is removed from a header section, and what is added, against the plain definition of both. The first byte of the
//! input says what came with it; then come lines of `name: value`.
#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::{HeaderMap, HeaderName, HeaderValue};
use libfuzzer_sys::fuzz_target;
use portcullis::config::schema::Forwarded;
use portcullis::proxy::http::headers::{append_forwarded, grpc_timeout, remove_claims, remove_hop_by_hop};

const HOP_BY_HOP: [&str; 8] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "transfer-encoding",
    "upgrade",
];
const KEPT: [&str; 5] = ["authorization", "content-length", "content-type", "cookie", "host"];
const CLIENT_CERT: &str = "x-forwarded-client-cert";

fn read(text: &[u8]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for line in text.split(|byte| *byte == b'\n') {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
            headers.append(name, value);
        }
    }
    headers
}

fn without(headers: &HeaderMap, gone: impl Fn(&str) -> bool) -> HeaderMap {
    let mut rest = HeaderMap::new();
    for (name, value) in headers.iter().filter(|(name, _)| !gone(name.as_str())) {
        rest.append(name, value.clone());
    }
    rest
}

/// The elements of a list that may stand in several fields.
fn list(headers: &HeaderMap, name: &str) -> Vec<Vec<u8>> {
    let values = headers.get_all(name).iter();
    let elements = values.flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    elements.map(|element| element.trim_ascii().to_ascii_lowercase()).collect()
}

fuzz_target!(|input: &[u8]| {
    let Some((how, text)) = input.split_first() else { return };
    let before = read(text);

    let mut headers = before.clone();
    remove_hop_by_hop(&mut headers);
    let named = list(&before, "connection");
    let mut expected = without(&before, |name| {
        HOP_BY_HOP.contains(&name) || (!KEPT.contains(&name) && named.iter().any(|named| named == name.as_bytes()))
    });
    if list(&before, "te").iter().any(|coding| coding == b"trailers") {
        expected.insert("te", HeaderValue::from_static("trailers"));
    }
    assert_eq!(headers, expected);

    let forwarded = [Forwarded::Remove, Forwarded::Append, Forwarded::Keep][usize::from(how % 3)];
    let client_cert = how & 4 != 0;
    let before = headers.clone();
    remove_claims(&mut headers, forwarded, client_cert);
    let expected = without(&before, |name| {
        let folded = name.replace('_', "-");
        match folded.as_str() {
            CLIENT_CERT => client_cert,
            "forwarded" | "x-real-ip" => forwarded == Forwarded::Remove,
            name if name.starts_with("x-forwarded-") => forwarded == Forwarded::Remove,
            name => name.starts_with("portcullis-"),
        }
    });
    assert_eq!(headers, expected);

    let client = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)][usize::from(how / 8 % 2)];
    let before = headers.clone();
    append_forwarded(&mut headers, Some(client), "https");
    let ours = |name: &str| matches!(name, "forwarded" | "x-forwarded-for" | "x-forwarded-proto");
    assert_eq!(without(&headers, ours), without(&before, ours));
    let node = if client.is_ipv6() { format!("for=\"[{client}]\"") } else { format!("for={client}") };
    for (name, added) in [("x-forwarded-for", client.to_string()), ("forwarded", format!("{node};proto=https"))] {
        let after: Vec<_> = headers.get_all(name).iter().collect();
        if name == "forwarded" && !before.contains_key(name) {
            assert!(after.is_empty());
        } else {
            let there: Vec<_> = before.get_all(name).iter().map(HeaderValue::as_bytes).collect();
            let there = there.join(&b", "[..]);
            let elements = if there.is_empty() { vec![added.as_bytes()] } else { vec![&there, added.as_bytes()] };
            assert_eq!(after, [&elements.join(&b", "[..])[..]]);
        }
    }
    assert!(headers.contains_key("x-forwarded-proto"));

    let longest = std::time::Duration::from_secs(99_999_999 * 3600);
    assert!(grpc_timeout(&headers).is_none_or(|timeout| timeout <= longest));
});
