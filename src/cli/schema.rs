//! `portcullis schema`: the JSON schema of the config, for editors.

use std::process::ExitCode;

use super::{Failure, Outcome, Streams};
use crate::config::Config;

/// The JSON schema as text, with a line end.
///
/// # Errors
/// If it cannot be written as JSON.
pub fn text() -> Result<String, Failure> {
    let schema = schemars::schema_for!(Config);
    let mut text = serde_json::to_string_pretty(&schema).map_err(Failure::new)?;
    text.push('\n');
    Ok(text)
}

/// Prints the schema.
///
/// # Errors
/// If it cannot be written.
pub fn schema(streams: &mut Streams<'_>) -> Outcome {
    streams.out.write_all(text()?.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
