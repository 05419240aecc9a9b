//! Patterns of SPIFFE IDs, by whole path segments.
//!
//! `spiffe://td/ns/*/sa/web`: `*` stands for exactly one segment. `spiffe://td/ns/**`: `**`, only at the end, for one or
//! more. `spiffe://td`: every workload of the trust domain. No other wildcard exists, so that no pattern ever cuts a
//! name in half.

use crate::identity::{SpiffeId, TrustDomain};

/// The most segments that a pattern may have.
pub const MAX_SEGMENTS: usize = 32;

/// The most different sets of places where the patterns of one listener may have `*`, in one trust domain. A decision
/// follows at most one path a shape through the compiled index, so this bounds what it costs, whatever the number of
/// rules.
pub const MAX_WILDCARD_SHAPES: usize = 64;

/// One segment of a pattern.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Segment {
    /// Exactly this.
    Literal(String),
    /// Any one segment.
    One,
    /// One or more segments; always the last.
    Rest,
}

/// A SPIFFE ID, a pattern of them, or a whole trust domain.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct IdPattern {
    text: String,
    domain: TrustDomain,
    segments: Vec<Segment>,
}

impl IdPattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.len() > crate::identity::spiffe_id::MAX_ID_BYTES {
            return Err("it is longer than 2048 bytes".into());
        }
        let rest = text.strip_prefix("spiffe://").ok_or("it does not start with spiffe://")?;
        let (name, path) = match rest.split_once('/') {
            Some((name, path)) => (name, Some(path)),
            None => (rest, None),
        };
        let domain = TrustDomain::parse(name).map_err(|e| e.to_string())?;
        let mut segments = Vec::new();
        match path {
            None => segments.push(Segment::Rest),
            Some(path) => {
                let count = path.split('/').count();
                if count > MAX_SEGMENTS {
                    return Err(format!("it has more than {MAX_SEGMENTS} segments"));
                }
                for (index, part) in path.split('/').enumerate() {
                    segments.push(match part {
                        "*" => Segment::One,
                        "**" if index + 1 == count => Segment::Rest,
                        "**" => return Err("'**' stands only at the end".into()),
                        part if part.contains('*') => {
                            return Err(format!(
                                "'{part}': a wildcard stands for whole segments only ('*' or, at the end, '**')"
                            ));
                        }
                        part => {
                            crate::identity::spiffe_id::check_segment(part).map_err(|e| e.to_string())?;
                            Segment::Literal(part.to_owned())
                        }
                    });
                }
            }
        }
        Ok(Self { text: text.to_owned(), domain, segments })
    }

    /// The pattern as written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The trust domain it speaks of.
    pub fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// Its segments.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Whether it stands for exactly one SPIFFE ID.
    pub fn is_exact(&self) -> bool {
        self.segments.iter().all(|segment| matches!(segment, Segment::Literal(_)))
    }

    /// The places of `*` in the pattern, as bits: bit n for segment n.
    pub fn wildcard_shape(&self) -> u32 {
        self.segments
            .iter()
            .zip(0..u32::BITS)
            .filter(|(segment, _)| matches!(segment, Segment::One))
            .fold(0, |bits, (_, place)| bits | (1 << place))
    }

    /// Whether an ID matches: the plain definition that the compiled index is tested against.
    pub fn matches(&self, id: &SpiffeId) -> bool {
        if id.trust_domain_name() != self.domain.as_str() {
            return false;
        }
        let mut rest = id.segments();
        for segment in &self.segments {
            match (segment, rest.next()) {
                (_, None) => return false,
                (Segment::Rest, Some(_)) => return true,
                (Segment::One, Some(_)) => {}
                (Segment::Literal(want), Some(have)) if want == have => {}
                (Segment::Literal(_), Some(_)) => return false,
            }
        }
        rest.next().is_none()
    }
}

impl std::fmt::Display for IdPattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl serde::Serialize for IdPattern {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> serde::Deserialize<'de> for IdPattern {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(|why| {
            serde::de::Error::custom(format!(
                "'{}' is not a SPIFFE ID or a pattern of them: {why}",
                text.escape_debug()
            ))
        })
    }
}

impl schemars::JsonSchema for IdPattern {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "IdPattern".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "pattern": "^spiffe://[a-z0-9._-]+(/([a-zA-Z0-9._-]+|\\*))*(/\\*\\*)?$",
            "description": "A SPIFFE ID; '*' stands for one whole segment, '**' at the end for one or more; without a path: the whole trust domain."
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, id: &str) -> bool {
        IdPattern::parse(pattern).unwrap().matches(&SpiffeId::parse(id).unwrap())
    }

    #[test]
    fn wildcards_take_whole_segments() {
        for (pattern, id, expected) in [
            ("spiffe://td/a/b", "spiffe://td/a/b", true),
            ("spiffe://td/a/b", "spiffe://td/a", false),
            ("spiffe://td/a/b", "spiffe://td/a/b/c", false),
            ("spiffe://td/a/b", "spiffe://td2/a/b", false),
            ("spiffe://td/a/b", "spiffe://td/a/B", false),
            ("spiffe://td/ns/*/sa/web", "spiffe://td/ns/x/sa/web", true),
            ("spiffe://td/ns/*/sa/web", "spiffe://td/ns/x/y/sa/web", false),
            ("spiffe://td/ns/*/sa/web", "spiffe://td/ns/sa/web", false),
            ("spiffe://td/ns/*", "spiffe://td/ns/x", true),
            ("spiffe://td/ns/*", "spiffe://td/ns", false),
            ("spiffe://td/ns/**", "spiffe://td/ns/x/y/z", true),
            ("spiffe://td/ns/**", "spiffe://td/ns", false),
            ("spiffe://td/ns/**", "spiffe://td/nsx/y", false),
            ("spiffe://td/**", "spiffe://td/x", true),
            ("spiffe://td", "spiffe://td/x/y", true),
            ("spiffe://td", "spiffe://td", false),
            ("spiffe://td", "spiffe://td.evil/x", false),
            ("spiffe://td", "spiffe://evil.td/x", false),
        ] {
            assert_eq!(matches(pattern, id), expected, "{pattern} {id}");
        }
    }

    #[test]
    fn other_forms_are_refused() {
        for pattern in [
            "",
            "td/a",
            "https://td/a",
            "spiffe://",
            "spiffe:///a",
            "spiffe://*/a",
            "spiffe://*.td/a",
            "spiffe://TD/a",
            "spiffe://td/",
            "spiffe://td/a/",
            "spiffe://td//a",
            "spiffe://td/../a",
            "spiffe://td/a*",
            "spiffe://td/*a",
            "spiffe://td/**/a",
            "spiffe://td/***",
            "spiffe://td/a?b",
            "spiffe://td:80/a",
            "spiffe://td/%61",
        ] {
            assert!(IdPattern::parse(pattern).is_err(), "{pattern}");
        }
        let deep = |segments| format!("spiffe://td{}", "/a".repeat(segments));
        assert!(IdPattern::parse(&deep(MAX_SEGMENTS)).is_ok());
        assert!(IdPattern::parse(&deep(MAX_SEGMENTS + 1)).is_err());
    }

    #[test]
    fn shapes_tell_where_the_wildcards_stand() {
        let shape = |text: &str| IdPattern::parse(text).unwrap().wildcard_shape();
        assert_eq!(shape("spiffe://td/a/*/b/*"), 0b1010);
        assert_eq!(shape("spiffe://td/*/**"), 0b1);
        assert!(IdPattern::parse("spiffe://td/a").unwrap().is_exact());
        assert!(!IdPattern::parse("spiffe://td").unwrap().is_exact());
    }
}
