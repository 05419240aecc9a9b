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
