//! `portcullis run`: the proxy.

use std::path::PathBuf;

use super::{Failure, Outcome};

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// The config file. It is read again on SIGHUP and when its content changes.
    #[arg(short, long, value_name = "FILE", env = "PORTCULLIS_CONFIG")]
    pub config: PathBuf,
}

/// Runs the proxy until it is told to stop.
///
/// # Errors
/// Why it could not start, or why it ended.
pub fn run(_args: &RunArgs) -> Outcome {
    Err(Failure::new("`run` is not in this build yet; use a later one"))
}
