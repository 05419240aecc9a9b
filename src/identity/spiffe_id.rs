//! SPIFFE IDs and trust domains, parsed by the SPIFFE ID specification and by nothing else.
//!
//! A web URL parser is the wrong tool: it folds `a/../admin` into `admin`, decodes percent signs and lower-cases
//! hosts, and every one of these lets two different strings name one identity. In: text or bytes from a certificate or
//! a config file. Out: [`SpiffeId`] and [`TrustDomain`], which compare byte by byte and clone for the price of a counter.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The longest SPIFFE ID that is accepted, in bytes (SPIFFE ID specification, section 2.3).
pub const MAX_ID_BYTES: usize = 2048;
/// The longest trust domain name that is accepted, in bytes (SPIFFE ID specification, section 2.3).
pub const MAX_TRUST_DOMAIN_BYTES: usize = 255;

const SCHEME: &str = "spiffe://";

/// Why a text is not a SPIFFE ID or trust domain name. The words follow the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpiffeIdError {
    /// No text at all.
    Empty,
    /// Longer than [`MAX_ID_BYTES`].
    TooLong,
    /// Does not start with `spiffe://` in lower case.
    WrongScheme,
    /// Nothing between `spiffe://` and the path.
    MissingTrustDomain,
    /// The trust domain name is longer than [`MAX_TRUST_DOMAIN_BYTES`].
    TrustDomainTooLong,
    /// A character outside `a-z0-9.-_` in the trust domain: no upper case, port, user info or percent-encoding.
    BadTrustDomainChar,
    /// A character outside `a-zA-Z0-9.-_` in a path segment: no query, fragment, percent-encoding, blank or control.
    BadPathSegmentChar,
    /// Two slashes in a row.
    EmptySegment,
    /// A segment that is `.` or `..`.
    DotSegment,
    /// The path ends in a slash.
    TrailingSlash,
    /// A workload's ID needs a path, and there is none.
    NoPath,
}

impl fmt::Display for SpiffeIdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "it is empty",
            Self::TooLong => "it is longer than 2048 bytes",
            Self::WrongScheme => "it does not start with spiffe://",
            Self::MissingTrustDomain => "the trust domain is missing",
            Self::TrustDomainTooLong => "the trust domain is longer than 255 bytes",
            Self::BadTrustDomainChar => "a trust domain holds only a-z, 0-9, dot, dash and underscore",
            Self::BadPathSegmentChar => "a path segment holds only letters, digits, dot, dash and underscore",
            Self::EmptySegment => "a path segment is empty",
            Self::DotSegment => "a path segment is '.' or '..'",
            Self::TrailingSlash => "the path ends in a slash",
            Self::NoPath => "a workload's SPIFFE ID needs a path",
        })
    }
}

impl std::error::Error for SpiffeIdError {}

fn check_trust_domain(name: &str) -> Result<(), SpiffeIdError> {
    if name.is_empty() {
        return Err(SpiffeIdError::MissingTrustDomain);
    }
    if name.len() > MAX_TRUST_DOMAIN_BYTES {
        return Err(SpiffeIdError::TrustDomainTooLong);
    }
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
    if name.bytes().all(allowed) { Ok(()) } else { Err(SpiffeIdError::BadTrustDomainChar) }
}

/// Checks one path segment by the specification's rules.
///
/// # Errors
/// The first rule that the segment breaks.
pub fn check_segment(segment: &str) -> Result<(), SpiffeIdError> {
    if segment.is_empty() {
        return Err(SpiffeIdError::EmptySegment);
    }
    if segment == "." || segment == ".." {
        return Err(SpiffeIdError::DotSegment);
    }
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if segment.bytes().all(allowed) { Ok(()) } else { Err(SpiffeIdError::BadPathSegmentChar) }
}

/// The name of a trust domain, such as `nhs.example` (SPIFFE ID specification, section 2.1).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Reads a bare name (`nhs.example`) or an ID (`spiffe://nhs.example/…`), whose trust domain is taken.
    ///
    /// # Errors
    /// The rule that the text breaks.
    pub fn parse(text: &str) -> Result<Self, SpiffeIdError> {
        if text.is_empty() {
            return Err(SpiffeIdError::MissingTrustDomain);
        }
        if text.contains(":/") {
            return SpiffeId::parse(text).map(|id| id.trust_domain());
        }
        check_trust_domain(text)?;
        Ok(Self(text.into()))
    }

    /// The name, without scheme.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The trust domain's own ID, `spiffe://name`.
    pub fn id(&self) -> String {
        format!("{SCHEME}{}", self.0)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TrustDomain({})", self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeIdError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::parse(s)
    }
}

impl std::borrow::Borrow<str> for TrustDomain {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// A SPIFFE ID, such as `spiffe://nhs.example/ns/gp/sa/frontend` (SPIFFE ID specification, section 2).
///
/// Scheme and trust domain are lower case and nothing else: section 2.4 calls them case-insensitive, section 2.1 demands
/// lower case, and folding would give one identity two spellings. go-spiffe reads it so too.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    text: Arc<str>,
    /// Where the trust domain ends in `text`, in bytes.
    path_start: u16,
}

impl SpiffeId {
    /// Reads an ID, with or without a path.
    ///
    /// # Errors
    /// The first rule that the text breaks.
    pub fn parse(text: &str) -> Result<Self, SpiffeIdError> {
        if text.is_empty() {
            return Err(SpiffeIdError::Empty);
        }
        if text.len() > MAX_ID_BYTES {
            return Err(SpiffeIdError::TooLong);
        }
        let rest = text.strip_prefix(SCHEME).ok_or(SpiffeIdError::WrongScheme)?;
        let (name, path) = match rest.split_once('/') {
            Some((name, path)) => (name, Some(path)),
            None => (rest, None),
        };
        check_trust_domain(name)?;
        if let Some(path) = path {
            let mut segments = path.split('/').peekable();
            while let Some(segment) = segments.next() {
                if segment.is_empty() && segments.peek().is_none() {
                    return Err(SpiffeIdError::TrailingSlash);
                }
                check_segment(segment)?;
            }
        }
        // At most 9 + 255, so it fits.
        let path_start = u16::try_from(SCHEME.len() + name.len()).map_err(|_| SpiffeIdError::TooLong)?;
        Ok(Self { text: text.into(), path_start })
    }

    /// Reads the ID of a workload: as [`SpiffeId::parse`], and a path is demanded (X509-SVID specification, section 2).
    ///
    /// # Errors
    /// The first rule that the text breaks.
    pub fn parse_workload(text: &str) -> Result<Self, SpiffeIdError> {
        let id = Self::parse(text)?;
        if id.path().is_empty() { Err(SpiffeIdError::NoPath) } else { Ok(id) }
    }

    /// The whole ID as text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The trust domain's name, borrowed.
    pub fn trust_domain_name(&self) -> &str {
        self.text.get(SCHEME.len()..usize::from(self.path_start)).unwrap_or_default()
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> TrustDomain {
        TrustDomain(self.trust_domain_name().into())
    }

    /// The path with its leading slash, or an empty text.
    pub fn path(&self) -> &str {
        self.text.get(usize::from(self.path_start)..).unwrap_or_default()
    }

    /// The path's segments, none for an ID without a path.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.path().split('/').skip(1)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SpiffeId({})", self.text)
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::parse(s)
    }
}

macro_rules! text_serde {
    ($type:ty, $pattern:literal, $about:literal) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                Self::parse(&text).map_err(|why| {
                    serde::de::Error::custom(format!(concat!("'{}' is not ", $about, ": {}"), text.escape_debug(), why))
                })
            }
        }
        impl schemars::JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }
            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string", "pattern": $pattern, "description": concat!("Text: ", $about, ".") })
            }
        }
    };
}
text_serde!(SpiffeId, "^spiffe://[a-z0-9._-]+(/[a-zA-Z0-9._-]+)*$", "a SPIFFE ID");
text_serde!(TrustDomain, "^(spiffe://)?[a-z0-9._-]+$", "a trust domain");

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn good(text: &str, trust_domain: &str, path: &str) {
        let id = SpiffeId::parse(text).unwrap_or_else(|why| panic!("{text:?}: {why}"));
        assert_eq!(id.trust_domain_name(), trust_domain, "{text:?}");
        assert_eq!(id.trust_domain().as_str(), trust_domain, "{text:?}");
        assert_eq!(id.path(), path, "{text:?}");
        assert_eq!(id.to_string(), text);
    }

    fn bad(text: &str, why: SpiffeIdError) {
        assert_eq!(SpiffeId::parse(text), Err(why), "{text:?}");
    }

    #[test]
    fn examples_of_the_specification() {
        good("spiffe://staging.example.com/payments/mysql", "staging.example.com", "/payments/mysql");
        good("spiffe://k8s-west.example.com/ns/staging/sa/default", "k8s-west.example.com", "/ns/staging/sa/default");
        good(
            "spiffe://example.com/9eebccd2-12bf-40a6-b262-65fe0487d453",
            "example.com",
            "/9eebccd2-12bf-40a6-b262-65fe0487d453",
        );
        // Section 2.1: dotted quads are names like any other, IPv6 addresses are not names.
        good("spiffe://10.2.3.4/web", "10.2.3.4", "/web");
        bad("spiffe://[::1]/web", SpiffeIdError::BadTrustDomainChar);
        good("spiffe://my_domain/web", "my_domain", "/web");
        good("spiffe://trustdomain", "trustdomain", "");
    }

    #[test]
    fn scheme_and_trust_domain_are_compared_as_written() {
        // Section 2.4 lets a reader fold case; section 2.1 forbids upper case. As go-spiffe, we take the strict reading,
        // so that no identity has two spellings.
        bad("SPIFFE://trustdomain/path", SpiffeIdError::WrongScheme);
        bad("Spiffe://", SpiffeIdError::WrongScheme);
        bad("spiffe://TrustDomain/path", SpiffeIdError::BadTrustDomainChar);
        assert_ne!(SpiffeId::parse("spiffe://a/Path").unwrap(), SpiffeId::parse("spiffe://a/path").unwrap());
    }

    #[test]
    fn what_is_no_spiffe_id() {
        bad("", SpiffeIdError::Empty);
        for text in
            ["s", "spiffe", "spiffe:", "spiffe:/", "spiffe:/trustdomain/path", "spiffe:path", "192.168.2.2:6688"]
        {
            bad(text, SpiffeIdError::WrongScheme);
        }
        for text in ["https://trustdomain/path", " spiffe://trustdomain/path", "//trustdomain/path", "/path"] {
            bad(text, SpiffeIdError::WrongScheme);
        }
        for text in ["spiffe://", "spiffe:///", "spiffe:///path"] {
            bad(text, SpiffeIdError::MissingTrustDomain);
        }
        for text in [
            "spiffe://trustdomain:8080/path",
            "spiffe://trustdomain:/path",
            "spiffe://user@trustdomain/path",
            "spiffe://user:secret@trustdomain/path",
            "spiffe://trustdomain?query",
            "spiffe://trustdomain#fragment",
            "spiffe://trust domain/path",
            "spiffe://trustdomain\0/path",
            "spiffe://trustdomain\n",
            "spiffe://%62%61%64/path",
            "spiffe://%F0%9F%A4%AF/path",
            "spiffe://b\u{fc}cher/path",
        ] {
            bad(text, SpiffeIdError::BadTrustDomainChar);
        }
        for text in [
            "spiffe://trustdomain/path?query=1",
            "spiffe://trustdomain/path#fragment",
            "spiffe://trustdomain/pa:th",
            "spiffe://trustdomain/pa@th",
            "spiffe://trustdomain/pa th",
            "spiffe://trustdomain/path\0",
            "spiffe://trustdomain/path\n",
            "spiffe://trustdomain/path\\other",
            "spiffe://trustdomain/*",
            "spiffe://trustdomain/p!a$t&h'/(e)l*e+m,e;n=t",
            "spiffe://trustdomain/elem[ent]",
            "spiffe://trustdomain/%62%61%64",
            "spiffe://trustdomain/path/%2e%2e",
            "spiffe://trustdomain/%F0%9F%A4%AF",
            "spiffe://trustdomain/b\u{fc}cher",
            "spiffe://trustdomain/spiffe://trustdomain/path",
        ] {
            bad(text, SpiffeIdError::BadPathSegmentChar);
        }
    }

    #[test]
    fn empty_segments_and_trailing_slashes() {
        bad("spiffe://trustdomain/", SpiffeIdError::TrailingSlash);
        bad("spiffe://trustdomain/path/", SpiffeIdError::TrailingSlash);
        bad("spiffe://trustdomain//", SpiffeIdError::EmptySegment);
        bad("spiffe://trustdomain//path", SpiffeIdError::EmptySegment);
        bad("spiffe://trustdomain/path//other", SpiffeIdError::EmptySegment);
    }

    #[test]
    fn dot_segments() {
        for path in ["/.", "/./path", "/path/./other", "/path/..", "/..", "/../path", "/path/../other", "/path/."] {
            bad(&format!("spiffe://trustdomain{path}"), SpiffeIdError::DotSegment);
        }
        for path in ["/.path", "/..path", "/...", "/path.", "/path..", "/p..th", "/-", "/_", "/a/.b/c..d"] {
            good(&format!("spiffe://trustdomain{path}"), "trustdomain", path);
        }
    }

    #[test]
    fn every_character_up_to_255_is_judged_as_in_go_spiffe() {
        for c in (0..=255u8).map(char::from).filter(|c| *c != '/') {
            let in_domain = c.is_ascii_lowercase() || c.is_ascii_digit() || ".-_".contains(c);
            let in_path = in_domain || c.is_ascii_uppercase();
            let text = format!("spiffe://trustdomain{c}/path");
            assert_eq!(SpiffeId::parse(&text).is_ok(), in_domain, "{text:?}");
            assert_eq!(TrustDomain::parse(&format!("trustdomain{c}")).is_ok(), in_domain, "{c:?}");
            let text = format!("spiffe://trustdomain/path{c}");
            assert_eq!(SpiffeId::parse(&text).is_ok(), in_path, "{text:?}");
            assert_eq!(check_segment(&c.to_string()).is_ok(), in_path && c != '.', "{c:?}");
        }
    }

    #[test]
    fn lengths() {
        let longest = format!("spiffe://trustdomain/{}", "a".repeat(MAX_ID_BYTES - "spiffe://trustdomain/".len()));
        assert_eq!(longest.len(), 2048);
        assert_eq!(SpiffeId::parse(&longest).unwrap().as_str(), longest);
        bad(&format!("{longest}a"), SpiffeIdError::TooLong);
        let domain = "d".repeat(MAX_TRUST_DOMAIN_BYTES);
        good(&format!("spiffe://{domain}/path"), &domain, "/path");
        good(&format!("spiffe://{domain}"), &domain, "");
        bad(&format!("spiffe://{domain}d/path"), SpiffeIdError::TrustDomainTooLong);
        assert_eq!(TrustDomain::parse(&format!("{domain}d")), Err(SpiffeIdError::TrustDomainTooLong));
    }

    #[test]
    fn a_workload_needs_a_path() {
        assert_eq!(SpiffeId::parse_workload("spiffe://trustdomain"), Err(SpiffeIdError::NoPath));
        assert_eq!(SpiffeId::parse_workload("spiffe://trustdomain/"), Err(SpiffeIdError::TrailingSlash));
        assert_eq!(
            SpiffeId::parse_workload("spiffe://trustdomain/web").unwrap().segments().collect::<Vec<_>>(),
            ["web"]
        );
        assert_eq!(SpiffeId::parse("spiffe://trustdomain").unwrap().segments().count(), 0);
    }

    #[test]
    fn trust_domains_by_name_or_by_id() {
        for text in ["trustdomain", "spiffe://trustdomain", "spiffe://trustdomain/path"] {
            let domain = TrustDomain::parse(text).unwrap();
            assert_eq!((domain.as_str(), domain.id().as_str()), ("trustdomain", "spiffe://trustdomain"));
        }
        for (text, why) in [
            ("", SpiffeIdError::MissingTrustDomain),
            ("spiffe:/trustdomain/path", SpiffeIdError::WrongScheme),
            ("https://trustdomain", SpiffeIdError::WrongScheme),
            ("spiffe://", SpiffeIdError::MissingTrustDomain),
            ("spiffe:///path", SpiffeIdError::MissingTrustDomain),
            ("spiffe://trustdomain/", SpiffeIdError::TrailingSlash),
            ("spiffe://trustdomain/path$", SpiffeIdError::BadPathSegmentChar),
            ("trustdomain/path", SpiffeIdError::BadTrustDomainChar),
            ("trustdomain:8080", SpiffeIdError::BadTrustDomainChar),
            ("TRUSTDOMAIN", SpiffeIdError::BadTrustDomainChar),
        ] {
            assert_eq!(TrustDomain::parse(text), Err(why), "{text:?}");
        }
    }

    #[test]
    fn serde_names_the_rule_and_shows_odd_bytes_escaped() {
        let id: SpiffeId = serde_json::from_str("\"spiffe://trustdomain/web\"").unwrap();
        assert_eq!(serde_json::to_string(&id).unwrap(), "\"spiffe://trustdomain/web\"");
        let error = serde_json::from_str::<SpiffeId>("\"spiffe://trustdomain/we\\nb\"").unwrap_err().to_string();
        assert!(error.contains("we\\nb") && error.contains("path segment"), "{error}");
    }

    /// An ID by the grammar of the specification, of any length that is allowed.
    fn any_id() -> impl Strategy<Value = String> {
        let segment = "[a-zA-Z0-9._-]{1,12}".prop_filter("a dot segment", |s| s != "." && s != "..");
        ("[a-z0-9._-]{1,30}", prop::collection::vec(segment, 0..8)).prop_map(|(domain, segments)| {
            segments.iter().fold(format!("spiffe://{domain}"), |id, segment| id + "/" + segment)
        })
    }

    /// Texts near the border between good and bad.
    fn nearly_an_id() -> impl Strategy<Value = String> {
        prop_oneof![
            any_id(),
            "spiffe://[a-zA-Z0-9._/:@?#% -]{0,40}",
            "(spiffe|SPIFFE|https)?:?/{0,3}[a-z.]{0,5}(/|/\\.|/\\.\\.|/[a-zA-Z.%]{1,5}){0,5}",
            "\\PC{0,40}",
            (2030usize..2070).prop_map(|n| format!("spiffe://t/{}", "x".repeat(n - 11))),
        ]
    }

    proptest! {
        #[test]
        fn parsing_what_is_printed_changes_nothing(text in any_id()) {
            let id = SpiffeId::parse(&text).unwrap();
            prop_assert_eq!(id.to_string(), text.as_str());
            prop_assert_eq!(&SpiffeId::parse(&id.to_string()).unwrap(), &id);
            prop_assert_eq!(format!("{}{}", id.trust_domain().id(), id.path()), text.as_str());
            let joined: String = id.segments().map(|s| format!("/{s}")).collect();
            prop_assert_eq!(joined.as_str(), id.path());
        }

        #[test]
        fn whatever_is_accepted_keeps_every_rule(text in nearly_an_id()) {
            if let Ok(id) = SpiffeId::parse(&text) {
                prop_assert_eq!(id.as_str(), text.as_str());
                prop_assert!(text.len() <= 2048);
                let rest = text.strip_prefix("spiffe://").unwrap();
                let (domain, path) = rest.split_once('/').map_or((rest, None), |(d, p)| (d, Some(p)));
                prop_assert!(!domain.is_empty() && domain.len() <= 255);
                prop_assert!(domain.bytes().all(|b| b"abcdefghijklmnopqrstuvwxyz0123456789.-_".contains(&b)));
                for segment in path.into_iter().flat_map(|p| p.split('/')) {
                    prop_assert!(!matches!(segment, "" | "." | ".."));
                    prop_assert!(segment.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b)));
                }
            }
        }

        #[test]
        fn one_forbidden_byte_anywhere_is_refused(text in any_id(), at in any::<prop::sample::Index>(), byte in 0u8..128) {
            prop_assume!(!byte.is_ascii_alphanumeric() && !b".-_/".contains(&byte));
            let mut bytes = text.into_bytes();
            let at = at.index(bytes.len() + 1);
            bytes.insert(at, byte);
            let inserted = String::from_utf8(bytes.clone()).unwrap();
            prop_assert!(SpiffeId::parse(&inserted).is_err(), "{:?}", inserted);
            bytes.remove(at);
            if let Some(place) = bytes.get_mut(at) {
                // Only the colon and slashes of the scheme may stand where they are.
                let same = *place == byte;
                *place = byte;
                let replaced = String::from_utf8(bytes).unwrap();
                prop_assert!(same || SpiffeId::parse(&replaced).is_err(), "{:?}", replaced);
            }
        }

        #[test]
        fn bytes_beyond_ascii_are_refused(text in any_id(), at in any::<prop::sample::Index>(), c in "[^\\x00-\\x7f]") {
            let mut text = text;
            text.insert_str(at.index(text.len() + 1), &c);
            prop_assert!(SpiffeId::parse(&text).is_err());
        }

        #[test]
        fn two_texts_never_name_one_identity(a in nearly_an_id(), b in nearly_an_id()) {
            if let (Ok(x), Ok(y)) = (SpiffeId::parse(&a), SpiffeId::parse(&b)) {
                prop_assert_eq!(a == b, x == y);
            }
        }

        #[test]
        fn changing_case_changes_the_identity_or_breaks_it(text in any_id(), at in any::<prop::sample::Index>()) {
            let mut bytes = text.clone().into_bytes();
            let place = at.index(bytes.len());
            bytes[place] ^= 0x20;
            let changed = String::from_utf8(bytes).unwrap();
            if let Ok(other) = SpiffeId::parse(&changed) {
                prop_assert_ne!(other, SpiffeId::parse(&text).unwrap());
            }
        }
    }
}
