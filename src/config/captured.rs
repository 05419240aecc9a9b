//! The written forms of networks and of captured ports.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::de::value::SeqAccessDeserializer;
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::intercept::CapturedPorts;

/// A network, `10.0.0.0/8`, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Network(pub IpNet);

impl Network {
    /// Reads `ADDRESS` or `ADDRESS/PREFIX` with no bits set behind the prefix.
    ///
    /// # Errors
    /// What is wrong and what to write, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self(address.to_canonical().into()));
        }
        let net: IpNet = text.parse().map_err(|_| {
            format!("'{}' is not a network; write 10.0.0.0/8, fd00::/8 or an address", text.escape_debug())
        })?;
        if net.trunc() != net {
            return Err(format!("'{net}' has bits behind its prefix; write {}", net.trunc()));
        }
        Ok(Self(net))
    }

    /// Whether the address is in it. An IPv4 address in IPv6 form counts as IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.prefix_len() == self.0.max_prefix_len() { self.0.addr().fmt(f) } else { self.0.fmt(f) }
    }
}

impl Serialize for Network {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(Error::custom)
    }
}

impl JsonSchema for Network {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Network".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "A network or an address.",
            "examples": ["10.0.0.0/8", "fd00::/8", "192.0.2.7"]
        })
    }
}

impl Serialize for CapturedPorts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Any => serializer.serialize_str("any"),
            Self::Ports(ports) => ports.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for CapturedPorts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyOrPorts;
        impl<'de> Visitor<'de> for AnyOrPorts {
            type Value = CapturedPorts;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of ports, or `any`")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                match text {
                    "any" => Ok(CapturedPorts::Any),
                    _ => Err(E::custom(format!("'{}' is neither a list of ports nor `any`", text.escape_debug()))),
                }
            }
            fn visit_seq<A: SeqAccess<'de>>(self, ports: A) -> Result<Self::Value, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(ports)).map(CapturedPorts::Ports)
            }
        }
        deserializer.deserialize_any(AnyOrPorts)
    }
}

impl JsonSchema for CapturedPorts {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "CapturedPorts".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "A list of ports, or `any`: those that no other listener names.",
            "oneOf": [
                { "const": "any" },
                { "type": "array", "items": { "type": "integer", "minimum": 1, "maximum": 65535 } }
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_and_written_alike() {
        for text in ["10.0.0.0/8", "192.0.2.7", "fd00::/8", "::1", "0.0.0.0/0"] {
            assert_eq!(Network::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Network::parse("192.0.2.7/32").unwrap().to_string(), "192.0.2.7");
        assert!(Network::parse("10.1.0.0/8").unwrap_err().ends_with("write 10.0.0.0/8"));
        for bad in ["", "10.0.0.0/33", "example", "10.0.0/8", "10.0.0.0/", "\n"] {
            assert!(Network::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn mapped_addresses_are_what_they_map() {
        let net = Network::parse("10.0.0.0/8").unwrap();
        assert!(net.contains("10.1.2.3".parse().unwrap()));
        assert!(net.contains("::ffff:10.1.2.3".parse().unwrap()));
        assert!(!net.contains("::ffff:11.1.2.3".parse().unwrap()));
        assert_eq!(Network::parse("::ffff:10.1.2.3").unwrap().to_string(), "10.1.2.3");
    }
}
