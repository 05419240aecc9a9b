//! What a user declares.
//!
//! Owns the schema ([`schema`]), its defaults, loading with positions, validation and watching for change. In: one YAML
//! file. Out: a [`schema::Config`] that is whole and meaningful, or an error that names file, line and column and what
//! to do. Unknown keys are refused.

pub mod schema;

pub use schema::Config;
