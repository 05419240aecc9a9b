//! What a user declares.
//!
//! Owns the schema ([`schema`]), its defaults, loading with positions ([`mod@load`]), validation, and watching for change
//! ([`watch`]). In: one YAML file. Out: a [`Config`] that is whole and meaningful, or [`ConfigErrors`] of which each
//! line names file, line and column and says what to do. Unknown keys are refused.

mod accelerate;
pub mod address;
mod captured;
pub mod files;
pub mod http;
pub mod intercept;
pub mod load;
mod positions;
pub mod profile_names;
mod sandbox;
pub mod schema;
pub mod traffic;
mod validate;
mod values;
pub mod watch;

pub use files::check_files;
pub use load::{ConfigErrors, Finding, LoadOptions, Loaded, load, load_with, parse, parse_with};
pub use schema::Config;
pub use watch::Watcher;

/// What stands in place of a listener's name in records of captured connections that no listener takes. No listener may
/// have it.
pub const CAPTURED: &str = "captured";
