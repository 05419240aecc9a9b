//! Values with a written form of their own: lengths of time, one or many, and the short form of `identity`.
//!
//! None of them is `untagged`: serde buffers untagged values, and their errors lose line and column.

use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use schemars::JsonSchema;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer, StrDeserializer};
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::schema::{IdentityConfig, RuleTarget, WorkloadApi};

/// One value or a list of them.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One.
    One(T),
    /// Several.
    Many(Vec<T>),
}

impl<T> Default for OneOrMany<T> {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl<T> OneOrMany<T> {
    /// The values as a slice.
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Many(values) => values,
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Either<T> {
            type Value = OneOrMany<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text or a list of texts")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                T::deserialize(StrDeserializer::new(text)).map(OneOrMany::One)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, values: A) -> Result<Self::Value, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(values)).map(OneOrMany::Many)
            }
        }
        deserializer.deserialize_any(Either(PhantomData))
    }
}

impl<'de> Deserialize<'de> for RuleTarget {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NameOrPort;
        impl Visitor<'_> for NameOrPort {
            type Value = RuleTarget;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name or the port of an inbound listener")
            }
            fn visit_str<E: Error>(self, name: &str) -> Result<Self::Value, E> {
                Ok(RuleTarget::Listener(name.to_owned()))
            }
            fn visit_u64<E: Error>(self, port: u64) -> Result<Self::Value, E> {
                u16::try_from(port)
                    .map(RuleTarget::Port)
                    .map_err(|_| E::custom(format!("{port} is not a port; ports go up to 65535")))
            }
            fn visit_i64<E: Error>(self, port: i64) -> Result<Self::Value, E> {
                u64::try_from(port).map_or_else(
                    |_| Err(E::custom(format!("{port} is not a port; ports go from 1 to 65535"))),
                    |port| self.visit_u64(port),
                )
            }
        }
        deserializer.deserialize_any(NameOrPort)
    }
}

/// `identity:` as a map, or as the bare address of a Workload API.
pub(super) fn identity<'de, D: Deserializer<'de>>(deserializer: D) -> Result<IdentityConfig, D::Error> {
    struct AddressOrMap;
    impl<'de> Visitor<'de> for AddressOrMap {
        type Value = IdentityConfig;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("the address of a SPIFFE Workload API, or a map")
        }
        fn visit_str<E: Error>(self, address: &str) -> Result<Self::Value, E> {
            let workload_api = Some(WorkloadApi { address: address.to_owned() });
            Ok(IdentityConfig { workload_api, ..IdentityConfig::default() })
        }
        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
            IdentityConfig::deserialize(MapAccessDeserializer::new(map))
        }
    }
    deserializer.deserialize_any(AddressOrMap)
}

pub(super) fn identity_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
    let map = generator.subschema_for::<IdentityConfig>();
    schemars::json_schema!({
        "oneOf": [
            {
                "type": "string",
                "description": "The address of a SPIFFE Workload API.",
                "pattern": "^(unix:/|tcp://)",
                "examples": ["unix:///run/spire/sockets/agent.sock", "tcp://127.0.0.1:8081"]
            },
            map
        ]
    })
}

/// A length of time, written `250ms`, `5s`, `1h 30m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl Span {
    /// So many seconds.
    pub const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

impl std::fmt::Display for Span {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl Serialize for Span {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_duration(&text).map(Self).map_err(|e| {
            Error::custom(format!("'{}' is not a length of time ({e}); write 250ms, 5s or 1h 30m", text.escape_debug()))
        })
    }
}

impl JsonSchema for Span {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Span".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "description": "A length of time: 250ms, 5s, 1h 30m.", "examples": ["5s", "1h 30m"] })
    }
}
