//! What of a message's header section goes on, and what does not.
//!
//! By RFC 9110, section 7.6.1: what concerns one connection ends with it. Besides, nobody but us says who a peer is:
//! `x-forwarded-client-cert` and our own headers are removed in every spelling that a backend may fold into them
//! (CGI and WSGI make `_` of `-`).

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

use crate::config::schema::Forwarded;
use crate::policy::http::same_field;

/// The verified identity, in Envoy's format.
pub(super) const CLIENT_CERT: &str = "x-forwarded-client-cert";
/// Ours all begin like this.
pub(super) const OURS: &str = "portcullis-";
/// The version that a request came in, between two sidecars.
pub(super) const VERSION: HeaderName = HeaderName::from_static("portcullis-version");
/// Why the proxy itself answered; for the local caller only.
pub(super) const REASON: HeaderName = HeaderName::from_static("portcullis-reason");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Fields that end a message, say where it goes or how it is judged, and that no `Connection` may name away
/// (RFC 9110, section 7.6.1: only what is meant for this connection may stand there).
const KEPT: [HeaderName; 5] =
    [header::HOST, header::CONTENT_LENGTH, header::CONTENT_TYPE, header::AUTHORIZATION, header::COOKIE];

/// Whether `name` begins with `wanted`, which is in lower case with `-`, in any spelling that a backend may fold into it.
fn begins_folded(name: &str, wanted: &str) -> bool {
    // Names of a header map are in lower case already.
    name.len() >= wanted.len()
        && name.bytes().zip(wanted.bytes()).all(|(is, want)| is == want || (is == b'_' && want == b'-'))
}

fn is_forwarded(name: &str) -> bool {
    same_field(name, "forwarded") || begins_folded(name, "x-forwarded-") || same_field(name, "x-real-ip")
}

/// The elements of a list that may stand in several fields. As octets: one that is no text hides none of the others.
fn elements(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &[u8]> {
    let values = headers.get_all(name).into_iter();
    values.flat_map(|value| value.as_bytes().split(|octet| *octet == b',')).map(<[u8]>::trim_ascii)
}

/// Removes what ends with the connection (RFC 9110, section 7.6.1), an upgrade included: who carries one on sets it anew.
///
/// `trailers` in `TE` stays: it is what gRPC asks for.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        let named: Vec<HeaderName> = elements(headers, header::CONNECTION)
            .filter_map(|name| HeaderName::from_bytes(name).ok())
            .filter(|name| !KEPT.contains(name))
            .collect();
        for name in named {
            // What `TE` says is looked at below.
            if name != header::TE {
                headers.remove(name);
            }
        }
        headers.remove(header::CONNECTION);
    }
    if headers.contains_key(header::TE) {
        let trailers = elements(headers, header::TE).any(|coding| coding.eq_ignore_ascii_case(b"trailers"));
        if trailers {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
        } else {
            headers.remove(header::TE);
        }
    }
    for name in [
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        KEEP_ALIVE,
        PROXY_CONNECTION,
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
    ] {
        headers.remove(name);
    }
}

/// Removes what only a proxy may say: our own headers, with `client_cert` the identity of the peer and, where `forwarded`
/// says so, where a request is said to come from.
pub fn remove_claims(headers: &mut HeaderMap, forwarded: Forwarded, client_cert: bool) {
    let claimed = |name: &HeaderName| {
        let name = name.as_str();
        match name.as_bytes().first() {
            Some(b'x') => {
                (client_cert && same_field(name, CLIENT_CERT))
                    || (forwarded == Forwarded::Remove && !same_field(name, CLIENT_CERT) && is_forwarded(name))
            }
            Some(b'f') => forwarded == Forwarded::Remove && is_forwarded(name),
            Some(b'p') => begins_folded(name, OURS),
            _ => false,
        }
    };
    if headers.keys().any(claimed) {
        let names: Vec<HeaderName> = headers.keys().filter(|name| claimed(name)).cloned().collect();
        for name in names {
            headers.remove(name);
        }
    }
}

/// Adds the sender to `X-Forwarded-For`, says the scheme where nobody has, and continues `Forwarded` (RFC 7239) where there
/// is one. A sender without an address adds nothing.
pub fn append_forwarded(headers: &mut HeaderMap, client: Option<std::net::IpAddr>, scheme: &'static str) {
    let Some(client) = client else { return };
    let text = client.to_canonical().to_string();
    join(headers, FORWARDED_FOR, &text);
    if !headers.contains_key(FORWARDED_PROTO) {
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static(scheme));
    }
    if headers.contains_key(header::FORWARDED) {
        let node = if text.contains(':') { format!("\"[{text}]\"") } else { text };
        join(headers, header::FORWARDED, &format!("for={node};proto={scheme}"));
    }
}

/// Adds an element to a list that may stand in several fields.
fn join(headers: &mut HeaderMap, name: HeaderName, element: &str) {
    let before: Vec<&[u8]> = headers.get_all(&name).iter().map(HeaderValue::as_bytes).collect();
    let mut value = before.join(&b", "[..]);
    if !value.is_empty() {
        value.extend_from_slice(b", ");
    }
    value.extend_from_slice(element.as_bytes());
    if let Ok(value) = HeaderValue::from_bytes(&value) {
        headers.insert(name, value);
    }
}

/// Puts a cookie that HTTP/2 has split into crumbs together again (RFC 9113, section 8.2.3): not every workload does.
pub(super) fn join_cookies(headers: &mut HeaderMap) {
    let mut crumbs = headers.get_all(header::COOKIE).iter();
    if crumbs.next().is_none() || crumbs.next().is_none() {
        return;
    }
    let crumbs: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(mut whole) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
        whole.set_sensitive(true);
        headers.insert(header::COOKIE, whole);
    }
}

/// The deadline that a gRPC caller has set (`grpc-timeout` of its HTTP/2 protocol document: at most eight digits and a
/// unit); none if it set none, or none that can be read.
pub fn grpc_timeout(headers: &HeaderMap) -> Option<std::time::Duration> {
    use std::time::Duration;
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let unit = text.bytes().next_back()?;
    let digits = text.get(..text.len() - 1)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        b'H' => Duration::from_secs(count * 3600),
        b'M' => Duration::from_secs(count * 60),
        b'S' => Duration::from_secs(count),
        b'm' => Duration::from_millis(count),
        b'u' => Duration::from_micros(count),
        b'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        map
    }

    fn names(map: &HeaderMap) -> Vec<&str> {
        let mut names: Vec<&str> = map.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn what_concerns_one_connection_ends_with_it() {
        let mut map = headers(&[
            ("connection", "close, X-Hop"),
            ("connection", "te, authorization, host"),
            ("x-hop", "1"),
            ("te", "gzip, trailers"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("host", "a"),
            ("authorization", "secret"),
            ("x-end-to-end", "1"),
        ]);
        remove_hop_by_hop(&mut map);
        assert_eq!(names(&map), ["authorization", "host", "te", "x-end-to-end"]);
        assert_eq!(map["te"], "trailers");
        let mut map = headers(&[("te", "gzip;q=1")]);
        remove_hop_by_hop(&mut map);
        assert!(map.is_empty());
    }

    #[test]
    fn octets_above_ascii_hide_no_element_of_a_list() {
        let mut map = headers(&[("x-hop", "1"), ("x-end-to-end", "1")]);
        map.insert("connection", HeaderValue::from_bytes(b"\xe9, x-hop").unwrap());
        map.insert("te", HeaderValue::from_bytes(b"\xe9,\ttrailers").unwrap());
        remove_hop_by_hop(&mut map);
        assert_eq!(names(&map), ["te", "x-end-to-end"]);
        assert_eq!(map["te"], "trailers");
    }

    #[test]
    fn nobody_but_us_says_who_a_peer_is() {
        let hostile = [
            ("x-forwarded-client-cert", "URI=spiffe://td/admin"),
            ("x_forwarded_client_cert", "URI=spiffe://td/admin"),
            ("X-Forwarded_Client-Cert", "URI=spiffe://td/admin"),
            ("portcullis-version", "1.1"),
            ("portcullis_reason", "x"),
            ("forwarded", "for=1.2.3.4"),
            ("x-forwarded-for", "1.2.3.4"),
            ("x_forwarded_host", "evil"),
            ("x-real-ip", "1.2.3.4"),
            ("x-other", "stays"),
        ];
        let mut map = headers(&hostile);
        remove_claims(&mut map, Forwarded::Remove, true);
        assert_eq!(names(&map), ["x-other"]);
        let mut map = headers(&hostile);
        remove_claims(&mut map, Forwarded::Keep, true);
        assert_eq!(names(&map), ["forwarded", "x-forwarded-for", "x-other", "x-real-ip", "x_forwarded_host"]);
    }

    #[test]
    fn the_sender_is_added_to_what_is_there() {
        let mut map =
            headers(&[("x-forwarded-for", "10.0.0.1"), ("x-forwarded-for", "10.0.0.2"), ("forwarded", "for=a")]);
        append_forwarded(&mut map, Some("::1".parse().unwrap()), "https");
        assert_eq!(map["x-forwarded-for"], "10.0.0.1, 10.0.0.2, ::1");
        assert_eq!(map["forwarded"], "for=a, for=\"[::1]\";proto=https");
        assert_eq!(map["x-forwarded-proto"], "https");
    }

    #[test]
    fn crumbs_of_a_cookie_become_one() {
        let mut map = headers(&[("cookie", "a=1"), ("x", "y"), ("cookie", "b=2")]);
        join_cookies(&mut map);
        assert_eq!(map.get_all("cookie").iter().collect::<Vec<_>>(), ["a=1; b=2"]);
    }

    #[test]
    fn a_grpc_caller_says_how_long_it_waits() {
        let wait = |text| grpc_timeout(&headers(&[("grpc-timeout", text)]));
        assert_eq!(wait("100m"), Some(std::time::Duration::from_millis(100)));
        assert_eq!(wait("99999999H").map(|d| d.as_secs()), Some(99_999_999 * 3600));
        for bad in ["", "m", "1", "100000000S", "-1S", "1x"] {
            assert_eq!(wait(bad), None, "{bad}");
        }
    }
}
