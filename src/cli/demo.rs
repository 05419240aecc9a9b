//! `portcullis demo`: everything on one machine with nothing set up.

use super::{Failure, Outcome};

/// Arguments of `demo`.
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// How long to show it, in seconds.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(5..=86_400))]
    pub seconds: u64,
    /// Leave it running, and print what to try.
    #[arg(long)]
    pub keep: bool,
}

/// Shows the demo.
///
/// # Errors
/// What it meant to show and could not.
pub fn demo(_args: &DemoArgs) -> Outcome {
    Err(Failure::new("`demo` is not in this build yet; use a later one"))
}
