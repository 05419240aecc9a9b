//! From a file to a [`Config`] that is whole and meaningful, or to the list of what is wrong with it.
//!
//! One line an error, `FILE:LINE:COLUMN: what is wrong; what to do`. Lines of the file are never quoted: they may hold
//! what a log must not.

use std::fmt;
use std::io::Read;
use std::path::Path;

use serde_saphyr::{Error, MessageFormatter};

use super::positions::{Positions, at};
use super::schema::Config;
use super::{files, validate};

pub use super::positions::Place;

/// The largest config file, in bytes.
pub const MAX_FILE_BYTES: u64 = 1024 * 1024;
/// How many errors are listed; the rest is counted.
pub const MAX_ERRORS: usize = 20;

/// Something to say about one place of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Where; none if it is about the file as a whole.
    pub place: Option<Place>,
    /// What is wrong and what to do, one line.
    pub what: String,
}

impl Finding {
    /// The finding as a line that names the file: `FILE:LINE:COLUMN: …`.
    pub fn line(&self, name: &str) -> String {
        self.line_with(name, "")
    }

    /// As [`Finding::line`], with a word such as `warning: ` after the place.
    pub fn line_with(&self, name: &str, word: &str) -> String {
        match self.place {
            Some(Place { line, column }) => format!("{name}:{line}:{column}: {word}{}", self.what),
            None => format!("{name}: {word}{}", self.what),
        }
    }
}

/// Everything that is wrong with one file. Displayed as one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    /// The file, as it was named.
    pub name: String,
    /// What is wrong, in the order of the file, at most [`MAX_ERRORS`]. Never empty.
    pub errors: Vec<Finding>,
    /// How many more there are.
    pub more: usize,
}

impl ConfigErrors {
    pub(super) fn new(name: &str, mut errors: Vec<Finding>) -> Self {
        errors.sort_by_key(|finding| finding.place);
        let more = errors.len().saturating_sub(MAX_ERRORS);
        errors.truncate(MAX_ERRORS);
        Self { name: name.to_owned(), errors, more }
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, finding) in self.errors.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            f.write_str(&finding.line(&self.name))?;
        }
        if self.more > 0 {
            write!(f, "\n{}: and {} more errors; correct these first", self.name, self.more)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// A config that was read, with what belongs to it.
#[derive(Debug)]
pub struct Loaded {
    /// The config: defaults filled in, names of suites and groups in the IANA form, relative paths resolved against
    /// the directory of the file.
    pub config: Config,
    /// What is allowed and yet worth a look.
    pub warnings: Vec<Finding>,
    /// SHA-256 of the file's bytes, lower-case hex.
    pub digest: String,
    /// The file, as it was named.
    pub name: String,
    pub(super) positions: Positions,
}

impl Loaded {
    /// Where the rule of that name stands, `allow:<listener>` included; none if the file has no such rule.
    pub fn place_of_rule(&self, rule: &str) -> Option<Place> {
        if let Some(listener) = rule.strip_prefix("allow:") {
            let index = self.config.inbound.iter().position(|l| l.name == listener)?;
            return Some(self.positions.at(at!["inbound", index, "allow"]));
        }
        let index = self.config.policy.rules.iter().position(|r| r.name == rule)?;
        Some(self.positions.at(at!["policy", "rules", index]))
    }
}

/// What the surroundings contribute to a config.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// The value of `SPIFFE_ENDPOINT_SOCKET`, used where the file names no identity source.
    pub endpoint: Option<String>,
    /// No identity source at all is a warning, not an error: for looking at a file away from where it will run.
    pub identity_optional: bool,
}

impl LoadOptions {
    /// As this process finds them.
    pub fn from_env() -> Self {
        let endpoint = std::env::var("SPIFFE_ENDPOINT_SOCKET").ok().filter(|value| !value.is_empty());
        Self { endpoint, identity_optional: false }
    }
}

/// Reads, checks and completes the config file at `path`. Whether the files that it names exist is another question:
/// [`files::check_files`].
///
/// # Errors
/// All that is wrong with it.
pub fn load(path: &Path) -> Result<Loaded, ConfigErrors> {
    load_with(path, &LoadOptions::from_env())
}

/// As [`load`], with the surroundings given.
///
/// # Errors
/// All that is wrong with it.
pub fn load_with(path: &Path, options: &LoadOptions) -> Result<Loaded, ConfigErrors> {
    let name = path.display().to_string();
    let refuse = |what: String| ConfigErrors::new(&name, vec![Finding { place: None, what }]);
    let bytes = read_bounded(path).map_err(|e| refuse(format!("cannot be read: {}", files::in_words(&e))))?;
    let text = std::str::from_utf8(&bytes).map_err(|e| {
        let good = bytes.get(..e.valid_up_to()).unwrap_or_default();
        let line = good.iter().filter(|&&b| b == b'\n').count() + 1;
        refuse(format!("line {line} is not UTF-8; save the file as UTF-8 text"))
    })?;
    let mut loaded = parse_with(text, &name, options)?;
    if let Some(directory) = path.parent() {
        files::anchor_paths(&mut loaded.config, directory);
    }
    Ok(loaded)
}

/// Reads a config from `text`; `name` stands in the errors. Relative paths stay as they are.
///
/// # Errors
/// All that is wrong with it.
pub fn parse(text: &str, name: &str) -> Result<Loaded, ConfigErrors> {
    parse_with(text, name, &LoadOptions::from_env())
}

/// As [`parse`], with the surroundings given.
///
/// # Errors
/// All that is wrong with it.
pub fn parse_with(text: &str, name: &str, options: &LoadOptions) -> Result<Loaded, ConfigErrors> {
    let digest = digest_hex(text.as_bytes());
    let nothing = |line: &str| matches!(line.trim().trim_start_matches('\u{feff}'), "" | "---" | "...");
    if text.lines().all(|line| nothing(line) || line.trim_start().starts_with('#')) {
        let what = "the file says nothing; a config names an identity and at least one listener".to_owned();
        return Err(ConfigErrors::new(name, vec![Finding { place: Some(Place::START), what }]));
    }
    let mut config: Config = serde_saphyr::from_str_with_options(text, yaml_options())
        .map_err(|error| ConfigErrors::new(name, vec![in_our_words(&error)]))?;
    let positions = Positions::read(text, yaml_options());
    let validate::Findings { errors, warnings } = validate::validate(&mut config, &positions, options);
    if !errors.is_empty() {
        return Err(ConfigErrors::new(name, errors));
    }
    Ok(Loaded { config, warnings, digest, name: name.to_owned(), positions })
}

/// SHA-256, lower-case hex.
pub(super) fn digest_hex(bytes: &[u8]) -> String {
    hex(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes).as_ref())
}

/// Bytes as lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut hex, byte| {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// Reads a file of at most [`MAX_FILE_BYTES`].
pub(super) fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let why = format!("it is larger than {MAX_FILE_BYTES} bytes; no config needs that");
        return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, why));
    }
    Ok(bytes)
}

/// Strict where YAML is lax, and small budgets: a config is written by hand or by a small template.
fn yaml_options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        strict_booleans: true,
        merge_keys: serde_saphyr::MergeKeyPolicy::Error,
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::Error,
        reject_unsupported_tags: true,
        with_snippet: false,
        budget: serde_saphyr::budget! {
            max_events: 400_000,
            max_nodes: 200_000,
            max_depth: 16,
            max_documents: 1,
            max_aliases: 100,
            max_anchors: 100,
            max_recorded_anchor_events: 20_000,
            max_recorded_anchor_bytes: 1024 * 1024,
            max_total_scalar_bytes: 1024 * 1024,
            max_total_comment_bytes: 1024 * 1024,
            max_buffered_comment_events: 1_000,
            flow_nesting_limit: 16,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 20_000,
            max_replay_stack_depth: 8,
        },
    }
}

/// The parser's error as a user should read it.
fn in_our_words(error: &Error) -> Finding {
    let place = error.location().map_or(Place::START, Place::of);
    let mut inner = error.without_snippet();
    while let Error::AliasError { error, .. } = inner {
        inner = error;
    }
    let what = match inner {
        Error::SerdeUnknownField { field, expected, .. } => {
            unknown("key", field, expected, "allowed here", "it takes no keys")
        }
        Error::SerdeUnknownVariant { variant, expected, .. } => {
            unknown("value", variant, expected, "allowed", "nothing is allowed here")
        }
        Error::SerdeMissingField { field, .. } => format!("'{field}' is missing; add it"),
        Error::DuplicateMappingKey { key: Some(key), .. } => {
            format!("the key '{}' is written twice; keep one of them", key.escape_debug())
        }
        Error::DuplicateMappingKey { .. } => "a key is written twice; keep one of them".into(),
        Error::MergeKeyNotAllowed { .. } => "merge keys (<<) are not accepted; write the keys out".into(),
        Error::MultipleDocuments { .. } => "a second document begins; a config is one YAML document".into(),
        Error::Eof { .. } => "the file ends too early; complete it".into(),
        Error::InvalidBooleanStrict { .. } => "this is not true or false; write one of them".into(),
        Error::InvalidScalar { ty, .. } if ty.starts_with(['u', 'i']) => {
            "this is not a whole number from 0 up; write one, without quotes or unit".into()
        }
        Error::NullIntoString { .. } => "there is no value; write one or remove the key".into(),
        Error::SerdeInvalidType { unexpected, expected, .. }
        | Error::SerdeInvalidValue { unexpected, expected, .. } => {
            // serde quotes texts here, which may be anything.
            let found = match unexpected.split_once(' ') {
                Some(("string", _)) => "a text",
                _ if unexpected == "unit value" || unexpected == "null" => "nothing",
                _ => unexpected.as_str(),
            };
            let wanted = expected.strip_prefix("struct ").map_or(expected.as_str(), |_| "a map of keys");
            format!("found {found} where {wanted} belongs; write that")
        }
        Error::Budget { .. }
        | Error::AliasReplayLimitExceeded { .. }
        | Error::AliasReplayStackDepthExceeded { .. }
        | Error::AliasExpansionLimitExceeded { .. } => {
            "larger, deeper or with more aliases than any config needs; write it out plainly".into()
        }
        Error::Unexpected { expected: "mapping start", .. } => {
            "a map belongs here; write its keys indented below, or between braces".into()
        }
        Error::Unexpected { expected: "sequence start", .. } => {
            "a list belongs here; write its items below, each after '- ', or between brackets".into()
        }
        Error::Unexpected { expected: "string scalar", .. } => {
            "one text belongs here; write it without list or map".into()
        }
        Error::Message { msg, .. } if msg.contains(" SPIFFE ID") => {
            format!("{msg}; write it as spiffe://trust-domain/path")
        }
        Error::Message { msg, .. } if msg.contains(" a trust domain: ") => {
            format!("{msg}; write its name, such as example.org")
        }
        Error::Message { msg, .. } if msg == "invalid socket address syntax" => {
            "this is not an address to listen on; write IP:PORT such as 0.0.0.0:8443 or [::1]:8443".into()
        }
        other => serde_saphyr::DefaultMessageFormatter.format_message(other).into_owned(),
    };
    Finding { place: Some(place), what: one_line(&what) }
}

fn unknown(what: &str, found: &str, allowed: &[&str], lead: &str, none: &str) -> String {
    let found = found.escape_debug();
    if allowed.is_empty() {
        return format!("unknown {what} '{found}'; {none}");
    }
    format!("unknown {what} '{found}'; {lead}: {}", allowed.join(", "))
}

fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests;
