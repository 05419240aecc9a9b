//! Judges the lines of a request head, one whole line at a time, and of a trailer section.
//!
//! In: lines without their CRLF. Out: the facts that decide where the request ends, or why it is refused. Rules of
//! RFC 9112 (HTTP/1.1) and RFC 9110 (HTTP semantics); where this is stricter than they are, the place says so.

use std::net::Ipv6Addr;
use std::ops::Range;

use super::Refusal;
use crate::proxy::detect::is_token;

/// The greatest body or chunk, in bytes: what fits the signed 64 bits that many an HTTP library counts in.
pub(super) const MAX_LENGTH: u64 = i64::MAX as u64;

/// How a request's body ends (RFC 9112 section 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    Length(u64),
    Chunked,
}

/// What the lines of a head said so far. The ranges are places in the head.
#[derive(Debug, Default)]
pub(super) struct Facts {
    connect: bool,
    http11: bool,
    /// The target's authority, in absolute form and for CONNECT.
    authority: Option<Range<usize>>,
    host: Option<Range<usize>>,
    length: Option<u64>,
    chunked: bool,
    upgrade: bool,
}

impl Facts {
    /// Judges the request line (RFC 9112 section 3), which begins at `offset` of the head.
    pub(super) fn request_line(&mut self, line: &[u8], offset: usize) -> Result<(), Refusal> {
        let method_len = line.iter().take_while(|byte| is_token(**byte)).count();
        let (method, rest) = line.split_at_checked(method_len).unwrap_or_default();
        let rest = match rest.split_first() {
            Some((b' ', rest)) if !method.is_empty() => rest,
            _ => return Err(Refusal::bad("invalid method")),
        };
        let Some(target_len) = memchr::memchr(b' ', rest) else {
            return Err(Refusal::bad("request line without a version"));
        };
        let (target, version) = rest.split_at_checked(target_len).unwrap_or_default();
        self.http11 = match version.split_first().map(|(_, version)| version).unwrap_or_default() {
            b"HTTP/1.1" => true,
            b"HTTP/1.0" => false,
            [b'H', b'T', b'T', b'P', b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit() => {
                return Err(Refusal { status: 505, reason: "unsupported version" });
            }
            _ => return Err(Refusal::bad("invalid version")),
        };
        self.connect = method == b"CONNECT";
        let begin = offset + method_len + 1;
        self.authority =
            target_authority(method, target).map_err(Refusal::bad)?.map(|at| begin + at.start..begin + at.end);
        Ok(())
    }

    /// Judges a field line, which begins at `offset` of the head.
    pub(super) fn field(&mut self, line: &[u8], offset: usize) -> Result<(), Refusal> {
        let Field { name, value, at } = field(line).map_err(Refusal::bad)?;
        // Few names matter, and their lengths tell them apart.
        match name.len() {
            4 if name.eq_ignore_ascii_case(b"host") => {
                if self.host.is_some() {
                    return Err(Refusal::bad("more than one Host"));
                }
                authority(value, false).map_err(|_| Refusal::bad("invalid Host"))?;
                self.host = Some(offset + at..offset + at + value.len());
            }
            7 if name.eq_ignore_ascii_case(b"upgrade") => self.upgrade = true,
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                if self.length.is_some() {
                    return Err(Refusal::bad("more than one Content-Length"));
                }
                self.length = Some(content_length(value).ok_or(Refusal::bad("invalid Content-Length"))?);
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                if self.chunked {
                    return Err(Refusal::bad("more than one Transfer-Encoding"));
                }
                if !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(Refusal::bad("Transfer-Encoding other than chunked"));
                }
                self.chunked = true;
            }
            _ => {}
        }
        Ok(())
    }

    /// Judges a whole head. The flag: what follows the body may belong to another protocol.
    ///
    /// Any Upgrade in HTTP/1.1 counts, with or without Connection, as it does for hyper: they must never disagree.
    pub(super) fn end(&self, head: &[u8]) -> Result<(Body, bool), Refusal> {
        let part = |range: &Range<usize>| head.get(range.clone()).unwrap_or_default();
        if self.http11 && self.host.is_none() {
            return Err(Refusal::bad("no Host"));
        }
        // RFC 9112 section 3.2 lets a server prefer the target's authority: two names are one too many here.
        if let (Some(authority), Some(host)) = (&self.authority, &self.host)
            && !part(authority).eq_ignore_ascii_case(part(host))
        {
            return Err(Refusal::bad("Host differs from the target"));
        }
        if self.chunked && !self.http11 {
            return Err(Refusal::bad("Transfer-Encoding in HTTP/1.0"));
        }
        if self.chunked && self.length.is_some() {
            return Err(Refusal::bad("both Content-Length and Transfer-Encoding"));
        }
        if self.connect && (self.chunked || self.length.is_some_and(|length| length > 0)) {
            return Err(Refusal::bad("CONNECT with a body"));
        }
        let body = if self.chunked { Body::Chunked } else { Body::Length(self.length.unwrap_or(0)) };
        Ok((body, self.connect || (self.upgrade && self.http11)))
    }
}

/// A field line taken apart, without the white space around the value.
#[derive(Debug)]
pub(super) struct Field<'a> {
    pub(super) name: &'a [u8],
    pub(super) value: &'a [u8],
    /// Where the value begins in the line.
    pub(super) at: usize,
}

/// Takes a field line apart (RFC 9112 section 5): `token ":" OWS value OWS`, the value without control characters.
pub(super) fn field(line: &[u8]) -> Result<Field<'_>, &'static str> {
    let length = line.iter().take_while(|byte| is_token(**byte)).count();
    let (name, rest) = line.split_at_checked(length).unwrap_or_default();
    let value = match rest.split_first() {
        Some((b':', value)) if !name.is_empty() => value,
        Some((b':', _)) => return Err("field without a name"),
        Some((b' ' | b'\t', _)) if name.is_empty() => return Err("obsolete line folding"),
        Some((b' ' | b'\t', _)) => return Err("white space before the colon"),
        Some(_) => return Err("invalid field name"),
        None => return Err("field line without a colon"),
    };
    // Without a way out early this goes over many bytes at a time.
    if value.iter().fold(false, |bad, byte| bad | ((*byte < 0x20) & (*byte != b'\t')) | (*byte == 0x7f)) {
        return Err("control character in a field value");
    }
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let lead = value.iter().take_while(|byte| blank(byte)).count();
    let value = value.get(lead..).unwrap_or_default();
    let tail = value.iter().rev().take_while(|byte| blank(byte)).count();
    let value = value.get(..value.len() - tail).unwrap_or_default();
    Ok(Field { name, value, at: length + 1 + lead })
}

/// Whether a field has no business in a trailer section (RFC 9110 section 6.5.1): framing, routing, authentication,
/// how content is read, and who the sender is.
pub(super) fn forbidden_in_trailers(name: &[u8]) -> bool {
    const NAMES: [&str; 31] = [
        "age",
        "authorization",
        "cache-control",
        "connection",
        "content-encoding",
        "content-length",
        "content-location",
        "content-range",
        "content-type",
        "cookie",
        "date",
        "expect",
        "expires",
        "forwarded",
        "host",
        "keep-alive",
        "location",
        "max-forwards",
        "pragma",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "range",
        "retry-after",
        "set-cookie",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "vary",
        "via",
    ];
    const STARTS: [&str; 2] = ["if-", "x-forwarded-"];
    NAMES.iter().any(|known| name.eq_ignore_ascii_case(known.as_bytes()))
        || STARTS
            .iter()
            .any(|start| name.get(..start.len()).is_some_and(|head| head.eq_ignore_ascii_case(start.as_bytes())))
}

/// `1*DIGIT` up to [`MAX_LENGTH`] (RFC 9110 section 8.6); a list of equal numbers is refused too.
fn content_length(value: &[u8]) -> Option<u64> {
    if value.is_empty() || value.len() > 19 {
        return None;
    }
    value
        .iter()
        .try_fold(0u64, |sum, byte| {
            let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
            sum.checked_mul(10)?.checked_add(digit)
        })
        .filter(|length| *length <= MAX_LENGTH)
}

/// Judges a target's form (RFC 9112 section 3.2) and finds its authority. What a path may hold is not decided here,
/// only that it is visible ASCII without a fragment and without what hyper's URI would refuse unseen by its service.
fn target_authority(method: &[u8], target: &[u8]) -> Result<Option<Range<usize>>, &'static str> {
    let bad = |byte: &u8| !byte.is_ascii_graphic() || matches!(byte, b'#' | b'"' | b'<' | b'>' | b'`');
    if target.is_empty() || target.iter().any(bad) {
        return Err("invalid byte in the request target");
    }
    if method == b"CONNECT" {
        return authority(target, true).map(|()| Some(0..target.len()));
    }
    match target {
        [b'/', ..] => Ok(None),
        b"*" if method == b"OPTIONS" => Ok(None),
        _ => {
            let begins = |scheme: &[u8]| target.get(..scheme.len()).is_some_and(|it| it.eq_ignore_ascii_case(scheme));
            let begin = match (begins(b"http://"), begins(b"https://")) {
                (true, _) => 7,
                (_, true) => 8,
                _ => return Err("invalid form of the request target"),
            };
            let rest = target.get(begin..).unwrap_or_default();
            let end = begin + rest.iter().position(|byte| matches!(byte, b'/' | b'?')).unwrap_or(rest.len());
            authority(target.get(begin..end).unwrap_or_default(), false)?;
            Ok(Some(begin..end))
        }
    }
}

/// Judges `host [ ":" port ]` (RFC 3986 section 3.2): an IPv6 literal or a name of letters, digits, `-`, `.`, `_` and
/// `~`. Stricter than the grammar: no empty host (which neither http nor https knows), no percent-encoding and no
/// sub-delimiters (which no name in DNS has), no empty port.
fn authority(bytes: &[u8], port_wanted: bool) -> Result<(), &'static str> {
    const BAD: &str = "invalid authority";
    if memchr::memchr(b'@', bytes).is_some() {
        return Err("userinfo in the request target");
    }
    let rest = if let Some(literal) = bytes.strip_prefix(b"[") {
        let end = memchr::memchr(b']', literal).ok_or(BAD)?;
        let address = str::from_utf8(literal.get(..end).unwrap_or_default()).map_err(|_| BAD)?;
        address.parse::<Ipv6Addr>().map_err(|_| BAD)?;
        literal.get(end + 1..).unwrap_or_default()
    } else {
        let end = memchr::memchr(b':', bytes).unwrap_or(bytes.len());
        let (name, rest) = bytes.split_at_checked(end).unwrap_or_default();
        let good = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
        if name.is_empty() || name.len() > 255 || !name.iter().all(good) {
            return Err(BAD);
        }
        rest
    };
    match rest.split_first() {
        None if port_wanted => Err("CONNECT without a port"),
        None => Ok(()),
        Some((b':', port)) if (1..=5).contains(&port.len()) && port.iter().all(u8::is_ascii_digit) => {
            let port = port.iter().fold(0u32, |sum, digit| sum * 10 + u32::from(digit - b'0'));
            let least = u32::from(port_wanted);
            if (least..=u32::from(u16::MAX)).contains(&port) { Ok(()) } else { Err(BAD) }
        }
        Some(_) => Err(BAD),
    }
}
