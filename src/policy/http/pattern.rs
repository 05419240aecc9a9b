//! The texts in which rules speak of requests: methods, hosts, paths, header names, names of gRPC.
//!
//! In: what a user wrote. Out: something that can be matched, or what is wrong with it and what to write instead.

use std::net::Ipv6Addr;

use http::{HeaderName, Method};

use crate::config::schema::EscapedSlash;
use crate::policy::path::NormalPath;
pub use crate::policy::pattern::{MAX_SEGMENTS, Segment};

/// The longest text of any of them, in bytes.
pub const MAX_TEXT_BYTES: usize = 1024;

/// A type that is written as one text: reading, writing and its place in the schema.
macro_rules! written_as_text {
    ($type:ident, $pattern:literal, $description:literal) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::parse(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
            }
        }
        impl schemars::JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }
            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string", "pattern": $pattern, "description": $description })
            }
        }
    };
}

fn short(text: &str) -> Result<(), String> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(format!("longer than {MAX_TEXT_BYTES} bytes; write a shorter one"));
    }
    Ok(())
}

/// A method. They are case-sensitive (RFC 9110, section 9.1), and none of the registered ones has lower-case letters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MethodName(Method);

impl MethodName {
    /// Reads a method.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        let shown = text.escape_debug();
        if text.len() > 32 {
            return Err(format!("'{shown}' is not a method; write such as GET, at most 32 letters"));
        }
        if text.bytes().any(|byte| byte.is_ascii_lowercase()) {
            let upper = text.to_ascii_uppercase();
            return Err(format!("'{shown}' is not a method, they are case-sensitive; write {}", upper.escape_debug()));
        }
        match Method::from_bytes(text.as_bytes()) {
            Ok(method) => Ok(Self(method)),
            Err(_) => Err(format!("'{shown}' is not a method; write such as GET")),
        }
    }

    /// The method.
    pub fn method(&self) -> &Method {
        &self.0
    }

    fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

written_as_text!(MethodName, "^[A-Z0-9!#$%&'*+.^_`|~-]{1,32}$", "A method, in capitals: GET.");

/// The name of a header, in lower case. `-` and `_` are the same in it and are written `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FieldName(String);

impl FieldName {
    /// Reads a name.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        let shown = text.escape_debug();
        short(text).map_err(|why| format!("the name of a header is {why}"))?;
        if text.eq_ignore_ascii_case("host") {
            return Err("the host is no header here; write it under `hosts:`".into());
        }
        match HeaderName::from_bytes(text.as_bytes()) {
            Ok(name) => Ok(Self(name.as_str().replace('_', "-"))),
            Err(_) => Err(format!("'{shown}' is not the name of a header; write such as x-tenant")),
        }
    }

    /// The name, in lower case with `-`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

written_as_text!(FieldName, "^[A-Za-z0-9!#$%&'*+.^_`|~-]+$", "The name of a header.");

/// The name of a gRPC service with its package, or of a method.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcName(String);

impl GrpcName {
    /// Reads a name.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        short(text).map_err(|why| format!("a name of gRPC is {why}"))?;
        let word = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        if text.split('.').all(word) {
            return Ok(Self(text.to_owned()));
        }
        Err(format!(
            "'{}' is not a name of gRPC; write such as `service: nhs.records.v1.Records` and `method: Get`",
            text.escape_debug()
        ))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

written_as_text!(
    GrpcName,
    "^[A-Za-z_][A-Za-z0-9_]*(\\.[A-Za-z_][A-Za-z0-9_]*)*$",
    "The name of a gRPC service with its package, or of a method."
);

/// A host, or a pattern of hosts. `*.nhs.example` stands for exactly one label before the rest, as in certificates
/// (RFC 9525, section 6.3): not for the rest alone, and not for two labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPattern {
    text: String,
    kind: HostKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum HostKind {
    Name,
    OneLabel,
    V6(Ipv6Addr),
}

impl HostPattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        let refuse = |why: &str| Err(format!("'{}' is not a host or a pattern of them: {why}", text.escape_debug()));
        let lower = text.to_ascii_lowercase();
        if let Some(inner) = lower.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            return match inner.parse() {
                Ok(address) => Ok(Self { text: lower, kind: HostKind::V6(address) }),
                Err(_) => refuse("no IPv6 address stands between the brackets; write such as [::1]"),
            };
        }
        if text.len() > 253 {
            return refuse("it is longer than 253 bytes; write a shorter one");
        }
        let (name, kind) = match lower.strip_prefix("*.") {
            Some(rest) => (rest, HostKind::OneLabel),
            None => (lower.as_str(), HostKind::Name),
        };
        if name.contains(':') {
            return refuse("ports are not compared; leave the port out");
        }
        if name.contains('*') {
            return refuse("'*' stands for one whole label and only in front; write such as *.nhs.example");
        }
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
        };
        if !name.split('.').all(label) {
            return refuse("write a name such as records.nhs.example, without a dot at the end");
        }
        Ok(Self { text: lower, kind })
    }

    /// The pattern, in lower case.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether a host matches: without port and without a dot at the end, in any case.
    pub fn matches(&self, host: &str) -> bool {
        match self.kind {
            HostKind::Name => host.eq_ignore_ascii_case(&self.text),
            HostKind::OneLabel => match (host.split_once('.'), self.text.split_once('.')) {
                (Some((label, rest)), Some((_, wanted))) => !label.is_empty() && rest.eq_ignore_ascii_case(wanted),
                _ => false,
            },
            HostKind::V6(wanted) => host
                .strip_prefix('[')
                .and_then(|rest| rest.strip_suffix(']'))
                .is_some_and(|inner| inner.parse() == Ok(wanted)),
        }
    }
}

impl std::fmt::Display for HostPattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

written_as_text!(
    HostPattern,
    "^((\\*\\.)?[A-Za-z0-9_-]+(\\.[A-Za-z0-9_-]+)*|\\[[0-9A-Fa-f:.]+\\])$",
    "A host without port; '*.' in front stands for exactly one label."
);

/// A path, a template of paths, or everything below a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathPattern {
    text: String,
    kind: PathKind,
    segments: Vec<Segment>,
}

/// How a path pattern was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathKind {
    /// As a text: `{name}` stands for one segment.
    Template,
    /// As `exact:`.
    Exact,
    /// As `prefix:`: itself and everything below, by whole segments; `{name}` may stand in it.
    Prefix,
}

impl PathPattern {
    /// Reads a pattern of that kind.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str, kind: PathKind) -> Result<Self, String> {
        let refuse = |why: String| Err(format!("'{}' is not a path pattern: {why}", text.escape_debug()));
        if let Err(why) = short(text) {
            return refuse(why);
        }
        let Some(path) = text.strip_prefix('/') else {
            return refuse("it does not begin with '/'; write such as /patients/{id}".into());
        };
        if text.contains([';', '?']) || text.contains("%3B") {
            return refuse("parameters and queries are not compared; write the path alone".into());
        }
        if text.contains('*') {
            return refuse("no '*' here; write {name} for one segment, or `{ prefix: /path }`".into());
        }
        if kind == PathKind::Prefix && path.ends_with('/') {
            return refuse("a prefix ends with a whole segment; leave the last '/' out".into());
        }
        let mut segments = Vec::new();
        let mut plain = String::new();
        // The root as a prefix has no segment; as a path it has an empty one, which is what ends with a slash.
        for part in path.split('/').filter(|_| kind != PathKind::Prefix || !path.is_empty()) {
            let name = part.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
            match name {
                Some(name) if kind != PathKind::Exact && is_variable(name) => {
                    segments.push(Segment::One);
                    plain.push_str("/x");
                }
                _ if part.contains(['{', '}']) => {
                    return refuse("'{' and '}' enclose the name of one whole segment; write such as /a/{id}".into());
                }
                _ => {
                    plain.push('/');
                    plain.push_str(part);
                    segments.push(Segment::Literal(String::new()));
                }
            }
        }
        if segments.len() > MAX_SEGMENTS {
            return refuse(format!("it has more than {MAX_SEGMENTS} segments; write a shorter one"));
        }
        let plain = if plain.is_empty() { "/" } else { plain.as_str() };
        let normal = match NormalPath::parse(plain, EscapedSlash::Keep) {
            Ok(normal) => normal,
            Err(why) => return refuse(format!("{why}; write a plain path")),
        };
        if normal.as_str() != plain {
            return refuse("requests are compared in normal form, so it could not match; write it in that form".into());
        }
        let parts = normal.judged().strip_prefix('/').unwrap_or_default().split('/');
        for (segment, part) in segments.iter_mut().zip(parts) {
            if let Segment::Literal(literal) = segment {
                part.clone_into(literal);
            }
        }
        Ok(Self { text: text.to_owned(), kind, segments })
    }

    /// The path of a gRPC method, or of all methods of a service.
    pub fn of_grpc(service: &GrpcName, method: Option<&GrpcName>) -> Self {
        let literal = |name: &GrpcName| Segment::Literal(name.as_str().to_owned());
        let text = format!("/{}/{}", service.as_str(), method.map_or("*", GrpcName::as_str));
        let segments = vec![literal(service), method.map_or(Segment::One, literal)];
        Self { text, kind: PathKind::Exact, segments }
    }

    /// The pattern as written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// How it was written.
    pub fn kind(&self) -> PathKind {
        self.kind
    }

    /// Its segments, as rules read paths. A path that ends with a slash has an empty one at the end.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// What stands for it in metric labels: the text; for a prefix with `/*` behind it.
    pub fn route(&self) -> String {
        match self.kind {
            PathKind::Prefix => format!("{}/*", self.text.trim_end_matches('/')),
            PathKind::Template | PathKind::Exact => self.text.clone(),
        }
    }

    /// The places of `{name}` in the pattern, as bits: bit n for segment n.
    pub fn wildcard_shape(&self) -> u32 {
        self.segments
            .iter()
            .zip(0..u32::BITS)
            .filter(|(segment, _)| matches!(segment, Segment::One))
            .fold(0, |bits, (_, place)| bits | (1 << place))
    }
}

fn is_variable(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

impl serde::Serialize for PathPattern {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeMap;
        let key = match self.kind {
            PathKind::Template => return serializer.serialize_str(&self.text),
            PathKind::Exact => "exact",
            PathKind::Prefix => "prefix",
        };
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry(key, &self.text)?;
        map.end()
    }
}

impl<'de> serde::Deserialize<'de> for PathPattern {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::value::MapAccessDeserializer;
        use serde::de::{Error, MapAccess, Visitor};

        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Written {
            exact: Option<String>,
            prefix: Option<String>,
        }
        struct TextOrMap;
        impl<'de> Visitor<'de> for TextOrMap {
            type Value = PathPattern;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a path, `{ exact: /path }` or `{ prefix: /path }`")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                PathPattern::parse(text, PathKind::Template).map_err(E::custom)
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                match <Written as serde::Deserialize>::deserialize(MapAccessDeserializer::new(map))? {
                    Written { exact: Some(text), prefix: None } => PathPattern::parse(&text, PathKind::Exact),
                    Written { exact: None, prefix: Some(text) } => PathPattern::parse(&text, PathKind::Prefix),
                    _ => Err("a path says either `exact` or `prefix`; write one of them".into()),
                }
                .map_err(A::Error::custom)
            }
        }
        deserializer.deserialize_any(TextOrMap)
    }
}

impl schemars::JsonSchema for PathPattern {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "PathPattern".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let path = |what: &str| schemars::json_schema!({ "type": "string", "pattern": "^/", "description": what });
        let keyed = |key: &str, what: &str| {
            schemars::json_schema!({
                "type": "object",
                "properties": { key: path(what) },
                "required": [key],
                "additionalProperties": false
            })
        };
        schemars::json_schema!({
            "oneOf": [
                path("A path; '{name}' stands for one whole segment."),
                keyed("exact", "A path, to the letter."),
                keyed("prefix", "A path and everything below it, by whole segments.")
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_match_by_whole_labels() {
        for (pattern, host, expected) in [
            ("records.nhs.example", "records.nhs.example", true),
            ("Records.NHS.example", "rECORDS.nhs.EXAMPLE", true),
            ("records.nhs.example", "records.nhs.example.evil", false),
            ("*.nhs.example", "a.nhs.example", true),
            ("*.nhs.example", "nhs.example", false),
            ("*.nhs.example", "a.b.nhs.example", false),
            ("*.nhs.example", ".nhs.example", false),
            ("*.nhs.example", "anhs.example", false),
            ("[::1]", "[0:0::1]", true),
            ("[::1]", "::1", false),
            ("127.0.0.1", "127.0.0.1", true),
        ] {
            assert_eq!(HostPattern::parse(pattern).unwrap().matches(host), expected, "{pattern} {host}");
        }
        for (bad, remedy) in [
            ("", "without a dot at the end"),
            ("*", "only in front"),
            ("a.*.b", "only in front"),
            ("a:80", "leave the port out"),
            ("a.b.", "without a dot at the end"),
            ("a..b", "write a name"),
            ("a b", "write a name"),
            ("[::g]", "such as [::1]"),
            ("http://a", "leave the port out"),
        ] {
            let why = HostPattern::parse(bad).unwrap_err();
            assert!(why.contains(remedy), "{bad}: {why}");
        }
    }

    #[test]
    fn path_patterns_are_written_in_normal_form() {
        use PathKind::{Exact, Prefix, Template};
        for (text, kind, route) in [
            ("/", Template, "/"),
            ("/", Prefix, "/*"),
            ("/patients/{id}", Template, "/patients/{id}"),
            ("/health", Exact, "/health"),
            ("/static", Prefix, "/static/*"),
            ("/t/{tenant}/public", Prefix, "/t/{tenant}/public/*"),
            ("/a%2Fb/caf%C3%A9/", Template, "/a%2Fb/caf%C3%A9/"),
        ] {
            assert_eq!(PathPattern::parse(text, kind).unwrap().route(), route);
        }
        for (text, kind, remedy) in [
            ("patients", Template, "does not begin with '/'"),
            ("/a/*", Template, "write {name} for one segment"),
            ("/a/x{id}", Template, "one whole segment"),
            ("/a/{id", Template, "one whole segment"),
            ("/a/{}", Template, "one whole segment"),
            ("/a/{id}", Exact, "one whole segment"),
            ("/a/", Prefix, "leave the last '/' out"),
            ("/a/../b", Template, "in that form"),
            ("/a//b", Template, "in that form"),
            ("/%61", Template, "in that form"),
            ("/a%3ab", Template, "in that form"),
            ("/a\\b", Template, "a backslash"),
            ("/a;b", Template, "the path alone"),
            ("/a?b", Template, "the path alone"),
            ("/é", Template, "no UTF-8"),
        ] {
            let why = PathPattern::parse(text, kind).unwrap_err();
            assert!(why.contains(remedy), "{text}: {why}");
        }
        assert!(PathPattern::parse(&"/a".repeat(MAX_SEGMENTS), Template).is_ok());
        assert!(PathPattern::parse(&"/a".repeat(MAX_SEGMENTS + 1), Template).is_err());
        assert_eq!(PathPattern::parse("/{a}/b/{c}", Template).unwrap().wildcard_shape(), 0b101);
        assert_eq!(PathPattern::parse("/a%3Ab", Exact).unwrap().segments(), [Segment::Literal("a:b".into())]);
    }

    #[test]
    fn methods_names_and_services_are_tokens() {
        assert_eq!(MethodName::parse("M-SEARCH").unwrap().as_str(), "M-SEARCH");
        assert!(MethodName::parse("get").unwrap_err().ends_with("write GET"));
        assert!(MethodName::parse("").is_err() && MethodName::parse("G T").is_err());
        assert_eq!(FieldName::parse("X_Tenant").unwrap().as_str(), "x-tenant");
        assert!(FieldName::parse(":path").is_err() && FieldName::parse("a b").is_err());
        assert!(FieldName::parse("Host").unwrap_err().contains("`hosts:`"));
        assert_eq!(GrpcName::parse("a.b_1.C").unwrap().as_str(), "a.b_1.C");
        for bad in ["", "a/b", ".a", "a.", "1a", "a*"] {
            assert!(GrpcName::parse(bad).is_err(), "{bad}");
        }
    }
}
