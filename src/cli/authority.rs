//! `portcullis authority`: a small SPIFFE authority that serves the Workload API.

use std::path::PathBuf;

use super::{Failure, Outcome};

/// Arguments of `authority`.
#[derive(Debug, clap::Args)]
pub struct AuthorityArgs {
    /// The authority's config file: its trust domain, its socket and who is given which identity.
    #[arg(short, long, value_name = "FILE")]
    pub config: PathBuf,
}

/// Runs the authority until it is told to stop.
///
/// # Errors
/// Why it could not start, or why it ended.
pub fn authority(_args: &AuthorityArgs) -> Outcome {
    Err(Failure::new("`authority` is not in this build yet; use a later one"))
}
