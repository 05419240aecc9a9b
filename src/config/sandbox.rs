//! How far the proxy locks itself in.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Whether the proxy gives up, once it has started, what it does not need: privileges, capabilities, files, system calls,
/// core dumps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SandboxMode {
    /// It keeps everything.
    Off,
    /// As far as the kernel has the means; what it has not is a warning.
    #[default]
    Prefer,
    /// All of it, or the proxy does not run.
    Require,
}

impl SandboxMode {
    /// As a config writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Prefer => "prefer",
            Self::Require => "require",
        }
    }
}
