//! The authority's own config file.
//!
//! In: one YAML file. Out: an [`AuthorityConfig`] that makes sense, or an error with file, line and column. Unknown keys
//! are refused.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::attest::Selectors;
use super::{Options, SvidKey, SvidRequest};
use crate::config::schema::{LogFormat, Span};
use crate::identity::{SpiffeId, TrustDomain};

/// The largest config file that is read, in bytes.
pub const MAX_CONFIG_BYTES: u64 = 1024 * 1024;
/// The most entries in one file.
pub const MAX_ENTRIES: usize = 1000;

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AuthorityConfig {
    /// The trust domain whose authority this is.
    pub trust_domain: TrustDomain,
    /// The path of the Workload API's Unix socket. Its folder is made if it is missing.
    pub socket: PathBuf,
    /// The socket's mode in octal digits. Whoever may write to the socket may ask; what they get is decided by the
    /// entries.
    #[serde(default)]
    pub socket_mode: SocketMode,
    /// Life of an SVID where its entry says nothing else.
    #[serde(default = "svid_ttl")]
    pub svid_ttl: Span,
    /// Life of a CA certificate.
    #[serde(default = "ca_ttl")]
    pub ca_ttl: Span,
    /// Kind of the SVIDs' keys.
    #[serde(default)]
    pub svid_key: SvidKey,
    /// Where the CA key is kept (0700); in memory only when absent, and then every start makes a new CA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_dir: Option<PathBuf>,
    /// Who is to be issued what. Without entries nobody is issued anything.
    #[serde(default)]
    pub entries: Vec<Entry>,
    /// Further trust domains, each with the place of its SPIFFE bundle document. All callers are told of them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub federates_with: BTreeMap<TrustDomain, Federation>,
    /// Where our own bundle is written as a SPIFFE bundle document, for others to federate with; kept up to date.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bundle_file: Option<PathBuf>,
    /// Form of the log lines.
    #[serde(default)]
    pub log_format: LogFormat,
    /// `error`, `warn`, `info`, `debug` or a filter such as `portcullis::authority=debug,info`.
    #[serde(default = "log_level")]
    pub log_level: String,
}

fn log_level() -> String {
    "info".into()
}

fn svid_ttl() -> Span {
    Span::seconds(3600)
}

fn ca_ttl() -> Span {
    Span::seconds(30 * 86_400)
}

/// One SVID for the processes that fit the selectors. A process that fits several entries is issued several SVIDs, in
/// the order of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The SPIFFE ID to issue, of the authority's trust domain.
    pub spiffe_id: SpiffeId,
    /// Which processes it is for. At least one selector; all that are there must fit.
    pub selectors: Selectors,
    /// DNS SANs of the SVID.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<String>,
    /// Life of the SVID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Span>,
    /// A hint by which the workload may choose among its SVIDs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Entry {
    /// What the authority is asked for.
    pub fn request(&self) -> SvidRequest {
        SvidRequest {
            id: self.spiffe_id.clone(),
            dns_names: self.dns.clone(),
            ttl: self.ttl.map(|ttl| ttl.0),
            hint: self.hint.clone(),
        }
    }
}

/// Where another trust domain's SPIFFE bundle document is. A text is a file's path or an https URL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Federation {
    /// A path or URL; the server of a URL is trusted by the system's web CAs (profile `https_web`).
    Location(String),
    /// A URL with what its server is trusted by.
    Endpoint(Endpoint),
}

/// A bundle endpoint (SPIFFE Federation specification, section 5).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// `https://HOST[:PORT]/path`.
    pub url: String,
    /// Profile `https_web`: the CA certificates (PEM) that the server is trusted by, instead of the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Profile `https_spiffe`: the server's SPIFFE ID, proved by the bundle that we have of its trust domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint_spiffe_id: Option<SpiffeId>,
    /// Profile `https_spiffe`: a file with the bundle to begin with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bootstrap: Option<PathBuf>,
}

/// The mode of the socket, written in octal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketMode(pub u32);

impl Default for SocketMode {
    fn default() -> Self {
        Self(0o666)
    }
}

impl Serialize for SocketMode {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:04o}", self.0))
    }
}

impl<'de> Deserialize<'de> for SocketMode {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match u32::from_str_radix(&text, 8) {
            Ok(mode) if mode <= 0o777 => Ok(Self(mode)),
            _ => Err(serde::de::Error::custom(format!(
                "'{}' is not a mode in octal digits such as \"0660\"",
                text.escape_debug()
            ))),
        }
    }
}

impl JsonSchema for SocketMode {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "SocketMode".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "pattern": "^0?[0-7]{3}$", "description": "A mode in octal digits.", "examples": ["0660"] })
    }
}

/// Why a config file was refused: file, place and reason in one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(String);

impl std::fmt::Display for ConfigError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

impl AuthorityConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let name = path.display();
        let fail = |why: String| ConfigError(format!("{name}: {why}"));
        let file = std::fs::File::open(path).map_err(|e| fail(format!("it cannot be opened: {e}")))?;
        let mut text = String::new();
        file.take(MAX_CONFIG_BYTES + 1)
            .read_to_string(&mut text)
            .map_err(|e| fail(format!("it cannot be read: {e}")))?;
        if text.len() as u64 > MAX_CONFIG_BYTES {
            return Err(fail(format!("it is larger than {MAX_CONFIG_BYTES} bytes")));
        }
        Self::parse(&text, &name.to_string())
    }

    /// Reads and checks a text; `name` stands for the file in errors.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place.
    pub fn parse(text: &str, name: &str) -> Result<Self, ConfigError> {
        let options = serde_saphyr::options! {
            strict_booleans: true,
            merge_keys: serde_saphyr::MergeKeyPolicy::Error,
            duplicate_keys: serde_saphyr::DuplicateKeyPolicy::Error,
            with_snippet: false,
        };
        let config: Self = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
            let place = error.location().map_or(String::new(), |l| format!(":{}:{}", l.line(), l.column()));
            ConfigError(format!("{name}{place}: {}", error.without_snippet()))
        })?;
        config.check().map_err(|why| ConfigError(format!("{name}: {why}")))?;
        Ok(config)
    }

    /// What the authority itself is made with.
    pub fn options(&self) -> Options {
        Options {
            trust_domain: self.trust_domain.clone(),
            svid_ttl: self.svid_ttl.0,
            ca_ttl: self.ca_ttl.0,
            svid_key: self.svid_key,
            state_dir: self.state_dir.clone(),
        }
    }

    /// Whether it makes sense as a whole.
    fn check(&self) -> Result<(), String> {
        let options = self.options();
        options.check().map_err(|e| e.to_string())?;
        if self.entries.len() > MAX_ENTRIES {
            return Err(format!("more than {MAX_ENTRIES} entries"));
        }
        for (index, entry) in self.entries.iter().enumerate() {
            let fail = |why: &str| format!("entries[{index}] ({}): {why}", entry.spiffe_id);
            options.check_request(&entry.request()).map_err(|e| fail(&e.to_string()))?;
            if entry.selectors.is_empty() {
                return Err(fail("it has no selector, so it would be for every process; name at least one"));
            }
            if entry.selectors.path.as_ref().is_some_and(|p| !p.is_absolute()) {
                return Err(fail("the selector `path` is not absolute"));
            }
            if entry.hint.as_ref().is_some_and(|h| h.is_empty() || h.len() > 1024) {
                return Err(fail("the hint is empty or longer than 1024 bytes"));
            }
            if self.entries.iter().take(index).any(|e| e == entry) {
                return Err(fail("the same entry is there twice"));
            }
        }
        for (domain, federation) in &self.federates_with {
            if *domain == self.trust_domain {
                return Err(format!("federates_with: '{}' is our own trust domain", domain.as_str()));
            }
            super::federation::Place::from_config(federation)
                .map_err(|why| format!("federates_with '{}': {why}", domain.as_str()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../examples/authority.yaml");

    #[test]
    fn the_example_is_good() {
        let config = AuthorityConfig::parse(EXAMPLE, "authority.yaml").unwrap();
        assert!(!config.entries.is_empty());
        assert_eq!(config.socket_mode.0, 0o666);
    }

    #[test]
    fn defaults() {
        let config = AuthorityConfig::parse("trust_domain: lab.test\nsocket: /tmp/s\n", "x").unwrap();
        assert_eq!(config.svid_ttl, Span::seconds(3600));
        assert_eq!(config.socket_mode, SocketMode(0o666));
        assert!(config.state_dir.is_none() && config.entries.is_empty());
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let base = "trust_domain: lab.test\nsocket: /tmp/s\n";
        let entry = |text: &str| format!("{base}entries:\n  - spiffe_id: spiffe://lab.test/a\n    {text}\n");
        for (text, words) in [
            (format!("{base}colour: red\n"), &["x:3:1", "colour"][..]),
            (format!("{base}svid_ttl: soon\n"), &["x:3", "length of time"]),
            (format!("{base}svid_ttl: 1s\n"), &["shorter than 2 s"]),
            (format!("{base}svid_ttl: 1h\nca_ttl: 90m\n"), &["at least twice"]),
            (format!("{base}socket_mode: \"0999\"\n"), &["octal"]),
            (format!("{base}socket_mode: \"1777\"\n"), &["octal"]),
            (format!("{base}trust_domain: b\n"), &["x:3", "trust_domain"]),
            (entry("selectors: {}"), &["entries[0]", "no selector"]),
            (entry("selectors: { uid: 0, colour: red }"), &["colour"]),
            (entry("selectors: { path: web }"), &["not absolute"]),
            (entry("selectors: { uid: 0 }\n    dns: [\"a b\"]"), &["not a DNS name"]),
            (entry("selectors: { uid: 0 }\n    ttl: 300d"), &["half of ca_ttl"]),
            (entry("selectors: { uid: 0 }\n    hint: \"\""), &["hint is empty"]),
            (entry("selectors: { uid: 0 }").replace("lab.test/a", "else.test/a"), &["not of trust domain"]),
            (entry("selectors: { uid: 0 }").replace("lab.test/a", "lab.test"), &["no path"]),
            (format!("{base}federates_with: {{ lab.test: /x }}\n"), &["our own"]),
            (format!("{base}federates_with: {{ b.test: \"http://x/\" }}\n"), &["b.test", "https"]),
            ("socket: /tmp/s\n".into(), &["trust_domain"]),
            ("[".into(), &["x:"]),
        ] {
            let error = AuthorityConfig::parse(&text, "x").unwrap_err().to_string();
            for word in words {
                assert!(error.contains(word), "{text}: {error}");
            }
        }
        let twice = entry("selectors: { uid: 0 }\n  - spiffe_id: spiffe://lab.test/a\n    selectors: { uid: 0 }");
        assert!(AuthorityConfig::parse(&twice, "x").unwrap_err().to_string().contains("twice"));
    }

    #[test]
    fn a_file_that_is_too_large_or_missing_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("large");
        assert!(AuthorityConfig::load(&path).unwrap_err().to_string().contains("cannot be opened"));
        std::fs::write(&path, vec![b'#'; usize::try_from(MAX_CONFIG_BYTES).unwrap() + 1]).unwrap();
        assert!(AuthorityConfig::load(&path).unwrap_err().to_string().contains("larger"));
    }
}
