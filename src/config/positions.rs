//! From a path in the file, such as `inbound[1].to`, to its line and column.
//!
//! The file is read a second time, into a tree that knows nothing but names and places. So the types of the schema stay
//! plain, and a judgement on meaning can still point at the very value it is about.

use std::fmt;

use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_saphyr::Spanned;

/// A place in the file; both count from 1, columns in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The line.
    pub line: u64,
    /// The column.
    pub column: u64,
}

impl Place {
    /// Where a file begins.
    pub const START: Self = Self { line: 1, column: 1 };

    pub(super) fn of(location: serde_saphyr::Location) -> Self {
        Self { line: location.line().max(1), column: location.column().max(1) }
    }
}

/// One step of a path.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step<'a> {
    /// Into a map.
    Key(&'a str),
    /// Into a list.
    Index(usize),
}

impl<'a> From<&'a str> for Step<'a> {
    fn from(key: &'a str) -> Self {
        Self::Key(key)
    }
}

impl From<usize> for Step<'_> {
    fn from(index: usize) -> Self {
        Self::Index(index)
    }
}

/// Writes a path: `at!["inbound", 1, "to"]`.
macro_rules! at {
    ($($step:expr),* $(,)?) => { &[$($crate::config::positions::Step::from($step)),*] };
}
pub(super) use at;

#[derive(Debug)]
enum Node {
    Scalar,
    List(Vec<Spanned<Node>>),
    Map(Vec<(String, Spanned<Node>)>),
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyNode;
        macro_rules! scalars {
            ($($visit:ident($type:ty)),*) => { $(
                fn $visit<E: serde::de::Error>(self, _: $type) -> Result<Node, E> { Ok(Node::Scalar) }
            )* };
        }
        impl<'de> Visitor<'de> for AnyNode {
            type Value = Node;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("anything")
            }
            scalars!(visit_bool(bool), visit_i64(i64), visit_u64(u64), visit_i128(i128), visit_u128(u128));
            scalars!(visit_f64(f64), visit_str(&str), visit_bytes(&[u8]));
            fn visit_unit<E: serde::de::Error>(self) -> Result<Node, E> {
                Ok(Node::Scalar)
            }
            fn visit_none<E: serde::de::Error>(self) -> Result<Node, E> {
                Ok(Node::Scalar)
            }
            fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<Node, D::Error> {
                inner.deserialize_any(self)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = items.next_element()? {
                    list.push(item);
                }
                Ok(Node::List(list))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node, A::Error> {
                let mut map = Vec::new();
                while let Some(entry) = entries.next_entry()? {
                    map.push(entry);
                }
                Ok(Node::Map(map))
            }
            fn visit_enum<A: serde::de::EnumAccess<'de>>(self, data: A) -> Result<Node, A::Error> {
                data.variant::<IgnoredAny>().map(|_| Node::Scalar)
            }
        }
        deserializer.deserialize_any(AnyNode)
    }
}

/// The places of everything in one file.
#[derive(Debug, Default)]
pub(super) struct Positions(Option<Spanned<Node>>);

impl Positions {
    /// Reads them. A text that the schema has accepted is readable here too; were it not, every place is the start.
    pub(super) fn read(text: &str, options: serde_saphyr::Options) -> Self {
        Self(serde_saphyr::from_str_with_options(text, options).ok())
    }

    /// Where the value at `path` stands, or else the nearest thing around it that exists.
    pub(super) fn at(&self, path: &[Step<'_>]) -> Place {
        self.walk(path).0
    }

    /// Whether the file says anything at `path`, as against a default.
    pub(super) fn has(&self, path: &[Step<'_>]) -> bool {
        self.walk(path).1
    }

    fn walk(&self, path: &[Step<'_>]) -> (Place, bool) {
        let Some(mut node) = self.0.as_ref() else { return (Place::START, false) };
        for step in path {
            let child = match (&node.value, step) {
                (Node::Map(entries), Step::Key(key)) => entries.iter().find(|(name, _)| name == key).map(|(_, v)| v),
                (Node::List(items), Step::Index(index)) => items.get(*index),
                _ => None,
            };
            match child {
                Some(child) => node = child,
                None => return (Place::of(node.referenced), false),
            }
        }
        (Place::of(node.referenced), true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_values_and_falls_back_to_what_is_around_them() {
        let text = "a:\n  - b: x\n    c: [1, {d: 2.5}]\n  - ~\ne: true\n";
        let places = Positions::read(text, serde_saphyr::options! {});
        let at = |path: &[Step<'_>]| (places.at(path).line, places.at(path).column);
        assert_eq!(at(at!["a", 0, "b"]), (2, 8));
        assert_eq!(at(at!["a", 0, "c", 1, "d"]), (3, 16));
        assert_eq!(at(at!["e"]), (5, 4));
        assert_eq!(at(at!["a", 0, "nothing", "below"]), (2, 5));
        assert_eq!(at(at!["a", 7]), (2, 3));
        assert!(places.has(at!["a", 1]) && !places.has(at!["a", 2]));
    }
}
