//! `portcullis man`: man pages, from the same words as `--help`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::CommandFactory;

use super::{Cli, Failure, Outcome, Streams};

/// Arguments of `man`.
#[derive(Debug, clap::Args)]
pub struct ManArgs {
    /// Write portcullis.1 and a page for each command into this directory.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// Prints the main page, or writes all of them.
///
/// # Errors
/// If they cannot be written.
pub fn man(args: &ManArgs, streams: &mut Streams<'_>) -> Outcome {
    match &args.out {
        Some(directory) => clap_mangen::generate_to(Cli::command(), directory)
            .map_err(|e| Failure::new(format!("{}: {e}; name a directory that can be written", directory.display())))?,
        None => clap_mangen::Man::new(Cli::command()).render(&mut streams.out)?,
    }
    Ok(ExitCode::SUCCESS)
}
