//! Request paths in one form: judged in it, and forwarded in it.
//!
//! In: the path and query of a request as the client wrote them, and what the listener says about `%2F`. Out: a
//! [`NormalPath`], or a [`PathError`], which is answered with 400. Pure; what is already in normal form is shared, not
//! copied.
//!
//! # The form
//!
//! By RFC 3986, sections 6.2.2 and 5.2.4, and beyond it where servers are known to differ:
//!
//! | written | becomes |
//! |---|---|
//! | `%61`, any encoded unreserved character | the character |
//! | `%c3` | `%C3` |
//! | `//` | `/`, before dot segments are looked at |
//! | `/./`, `/x/../`, with encoded dots too | removed |
//! | `..` above the root | refused |
//! | `%2F` | by `escaped_slash`: refused, kept as part of its segment (refused beside dots even so), or decoded into `/` |
//! | a backslash, `%5C` | refused |
//! | a control character or space, raw; a control character, encoded; `%zz`; `#` | refused |
//! | an octet above 127, raw; encoded octets that are no UTF-8 | refused |
//! | `"<>[]^{}` and the like, raw | percent-encoded |
//! | `/..;x/`, `/.;x/`, `/;x/` | refused: who strips path parameters reads a dot segment or nothing there |
//! | `/a;x=1/` | kept: see below |
//!
//! The query is passed on as it is and judged by nobody; control characters, spaces and `#` in it are refused.
//!
//! # Two readings
//!
//! Rules read [`NormalPath::judged`], in which encoded characters that a segment may hold without encoding
//! (`!$&'()*+,=:@`) are decoded: RFC 3986 keeps `%3A` and `:` apart, yet hardly any server does, and `/a%3Ab` must not
//! walk round a rule about `/a:b`. What is forwarded keeps them as the client wrote them, since signatures over paths
//! depend on it. `;` begins a path parameter for some servers and is a plain character for others, so a `deny` holds in
//! either reading and an `allow` only in the literal one.

use std::sync::Arc;

use http::uri::PathAndQuery;

use crate::config::schema::EscapedSlash;

/// The longest path that is judged, as written and in normal form, in bytes, query not counted.
pub const MAX_PATH_BYTES: usize = 8192;

/// Why a path is refused. The texts name no part of the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PathError {
    /// It does not begin with `/`.
    NotAbsolute,
    /// It is longer than [`MAX_PATH_BYTES`].
    TooLong,
    /// `%` without two hexadecimal digits.
    BadEscape,
    /// `%2F`, and the listener refuses it; or it is kept and stands beside dots.
    EscapedSlash,
    /// A backslash, raw or encoded.
    Backslash,
    /// A control character, raw or encoded, or a raw space.
    Control,
    /// An octet above 127, or encoded octets that are no UTF-8.
    NotUtf8,
    /// `#`.
    Fragment,
    /// A `..` above the root.
    AboveRoot,
    /// Path parameters on an empty or a dot segment.
    Parameters,
}

impl PathError {
    /// The reason, in words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotAbsolute => "the path does not begin with '/'",
            Self::TooLong => "the path is too long",
            Self::BadEscape => "'%' without two hexadecimal digits",
            Self::EscapedSlash => "an encoded slash",
            Self::Backslash => "a backslash",
            Self::Control => "a control character or a space",
            Self::NotUtf8 => "octets that are no UTF-8",
            Self::Fragment => "a fragment",
            Self::AboveRoot => "a path above the root",
            Self::Parameters => "path parameters on an empty or dot segment",
        }
    }
}

impl std::fmt::Display for PathError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::error::Error for PathError {}

/// A path in normal form, with its query. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NormalPath {
    whole: PathAndQuery,
    /// Where the reading of the rules differs from the form that is forwarded.
    judged: Option<Arc<str>>,
}

impl NormalPath {
    /// Reads a path, with or without a query.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn parse(path_and_query: &str, escaped: EscapedSlash) -> Result<Self, PathError> {
        if let Some(whole) = rewritten(path_and_query, escaped)? {
            return Self::read(whole);
        }
        Self::read(path_and_query.to_owned())
    }

    /// As [`NormalPath::parse`], of a parsed URI's path, whose bytes are shared where they are in normal form.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn of(written: &PathAndQuery, escaped: EscapedSlash) -> Result<Self, PathError> {
        match rewritten(written.as_str(), escaped)? {
            Some(whole) => Self::read(whole),
            None => Ok(Self { whole: written.clone(), judged: judged(written.path()) }),
        }
    }

    fn read(whole: String) -> Result<Self, PathError> {
        let whole = PathAndQuery::try_from(whole).map_err(|_| PathError::TooLong)?;
        Ok(Self { judged: judged(whole.path()), whole })
    }

    /// The path in normal form, without the query: what is forwarded.
    pub fn as_str(&self) -> &str {
        self.whole.path()
    }

    /// The path as rules read it: see the module's documentation.
    pub fn judged(&self) -> &str {
        self.judged.as_deref().unwrap_or_else(|| self.whole.path())
    }

    /// The query as the client wrote it, without `?`; none if there is none.
    pub fn query(&self) -> Option<&str> {
        self.whole.query()
    }

    /// Path in normal form and query: what goes into the request that is forwarded.
    pub fn path_and_query(&self) -> &PathAndQuery {
        &self.whole
    }
}

/// RFC 3986, section 2.3.
fn unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

/// What a segment may hold besides unreserved characters, and what no server takes for a delimiter there.
fn plain_reserved(byte: u8) -> bool {
    matches!(byte, b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b'=' | b':' | b'@')
}

/// The path and query in normal form; none if they are that already.
fn rewritten(written: &str, escaped: EscapedSlash) -> Result<Option<String>, PathError> {
    let (path, query) = match written.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (written, None),
    };
    for byte in query.unwrap_or_default().bytes() {
        match byte {
            0..=b' ' | 0x7f => return Err(PathError::Control),
            b'#' => return Err(PathError::Fragment),
            _ => {}
        }
    }
    if path.len() > MAX_PATH_BYTES {
        return Err(PathError::TooLong);
    }
    if is_plainly_normal(path.as_bytes()) {
        return Ok(None);
    }
    let mut normal = Writer::of(path, escaped)?;
    if normal == path {
        return Ok(None);
    }
    // Raw characters that are written as escapes take more room.
    if normal.len() > MAX_PATH_BYTES {
        return Err(PathError::TooLong);
    }
    if let Some(query) = query {
        normal.push('?');
        normal.push_str(query);
    }
    Ok(Some(normal))
}

/// The quick look that most paths pass: no escape, no parameter, no dot segment, nothing doubled, nothing unusual.
fn is_plainly_normal(path: &[u8]) -> bool {
    let Some((b'/', rest)) = path.split_first() else { return false };
    // Length of the segment so far, and whether it is of dots only.
    let (mut length, mut dots) = (0_usize, true);
    for &byte in rest {
        if byte == b'/' {
            if dots && length <= 2 {
                return false;
            }
            (length, dots) = (0, true);
        } else if unreserved(byte) || plain_reserved(byte) {
            length += 1;
            dots = dots && byte == b'.';
        } else {
            return false;
        }
    }
    length == 0 || !dots || length > 2
}

/// A path under way into its normal form.
struct Writer {
    /// Begins with `/`.
    out: String,
    /// Where the segment under way begins.
    segment: usize,
}

impl Writer {
    fn of(path: &str, escaped: EscapedSlash) -> Result<String, PathError> {
        let Some(rest) = path.strip_prefix('/') else { return Err(PathError::NotAbsolute) };
        let mut writer = Self { out: String::with_capacity(path.len()), segment: 1 };
        writer.out.push('/');
        let mut beyond_ascii = false;
        let mut bytes = rest.bytes();
        while let Some(byte) = bytes.next() {
            match byte {
                b'/' => writer.end_segment(true)?,
                b'\\' => return Err(PathError::Backslash),
                b'#' => return Err(PathError::Fragment),
                0..=b' ' | 0x7f => return Err(PathError::Control),
                0x80.. => return Err(PathError::NotUtf8),
                b'%' => {
                    let (Some(high), Some(low)) = (bytes.next().and_then(digit), bytes.next().and_then(digit)) else {
                        return Err(PathError::BadEscape);
                    };
                    match (high << 4 | low, escaped) {
                        (b'/', EscapedSlash::Refuse) => return Err(PathError::EscapedSlash),
                        (b'/', EscapedSlash::Decode) => writer.end_segment(true)?,
                        (b'\\', _) => return Err(PathError::Backslash),
                        (0..b' ' | 0x7f, _) => return Err(PathError::Control),
                        (octet, _) if unreserved(octet) => writer.out.push(char::from(octet)),
                        (octet, _) => {
                            beyond_ascii |= !octet.is_ascii();
                            writer.escape(octet);
                        }
                    }
                }
                byte if unreserved(byte) || plain_reserved(byte) || byte == b';' => writer.out.push(char::from(byte)),
                byte => writer.escape(byte),
            }
        }
        writer.end_segment(false)?;
        if beyond_ascii && std::str::from_utf8(&decoded(rest)).is_err() {
            return Err(PathError::NotUtf8);
        }
        Ok(writer.out)
    }

    /// Writes an octet as `%XX`.
    fn escape(&mut self, octet: u8) {
        const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
        self.out.push('%');
        for digit in [octet >> 4, octet & 15] {
            self.out.push(DIGITS.get(usize::from(digit)).copied().map_or('0', char::from));
        }
    }

    /// The segment under way is whole; `more` if a slash follows.
    fn end_segment(&mut self, more: bool) -> Result<(), PathError> {
        let segment = self.out.get(self.segment..).unwrap_or_default();
        match segment {
            "" => {}
            "." => self.out.truncate(self.segment),
            ".." => {
                self.out.truncate(self.segment);
                // Without the slash that ends the segment before; none before the root.
                let Some(before) = self.out.strip_suffix('/').filter(|before| !before.is_empty()) else {
                    return Err(PathError::AboveRoot);
                };
                let keep = before.rfind('/').map_or(0, |slash| slash + 1);
                self.out.truncate(keep);
                self.segment = keep;
            }
            segment => {
                let (name, parameters) = without_parameters(segment);
                if parameters && matches!(name, "" | "." | "..") {
                    return Err(PathError::Parameters);
                }
                // Kept, it is for a workload that takes it for no slash. Were it mistaken for one, nothing may climb.
                if segment.contains("%2F")
                    && segment.split("%2F").any(|part| matches!(without_parameters(part).0, "." | ".."))
                {
                    return Err(PathError::EscapedSlash);
                }
                if more {
                    self.out.push('/');
                    self.segment = self.out.len();
                }
            }
        }
        Ok(())
    }
}

/// A segment in normal form up to its parameters, and whether it has any. An encoded `;` counts: some decode first.
pub(super) fn without_parameters(segment: &str) -> (&str, bool) {
    match segment.find(';').into_iter().chain(segment.find("%3B")).min() {
        Some(at) => (segment.get(..at).unwrap_or_default(), true),
        None => (segment, false),
    }
}

fn digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

/// The octets that a path stands for. Its escapes have been checked.
fn decoded(path: &str) -> Vec<u8> {
    let mut octets = Vec::with_capacity(path.len());
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        octets.push(match byte {
            b'%' => {
                let mut next = || bytes.next().and_then(digit).unwrap_or_default();
                let high = next();
                high << 4 | next()
            }
            byte => byte,
        });
    }
    octets
}

/// A path in normal form as rules read it; none if that is the same.
fn judged(path: &str) -> Option<Arc<str>> {
    let mut reading = String::new();
    // What has been read into `reading`.
    let mut taken = 0;
    for (at, _) in path.match_indices('%') {
        let octet = match path.as_bytes().get(at + 1..at + 3) {
            Some([high, low]) => digit(*high).zip(digit(*low)).map(|(high, low)| high << 4 | low),
            _ => None,
        };
        if let Some(octet) = octet.filter(|octet| plain_reserved(*octet)) {
            reading.push_str(path.get(taken..at).unwrap_or_default());
            reading.push(char::from(octet));
            taken = at + 3;
        }
    }
    if taken == 0 {
        return None;
    }
    reading.push_str(path.get(taken..).unwrap_or_default());
    Some(reading.into())
}

#[cfg(test)]
mod tests;
