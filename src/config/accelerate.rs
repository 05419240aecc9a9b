//! Whether plaintext is accelerated.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Whether what the proxy and its workload say to each other in plaintext goes past TCP, by eBPF. The kernel is first put to
/// the test, because some lose data or let a queue grow without end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AccelerateMode {
    /// Not.
    #[default]
    Off,
    /// Where the kernel passes the test; `/state` says what it has failed.
    Auto,
    /// Or the proxy does not run.
    Require,
}

impl AccelerateMode {
    /// As a config writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Auto => "auto",
            Self::Require => "require",
        }
    }
}
