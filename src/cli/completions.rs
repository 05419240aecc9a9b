//! `portcullis completions`: for the shells that clap knows.

use std::process::ExitCode;

use clap::CommandFactory;

use super::{Cli, Outcome, Streams};

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    /// The shell.
    pub shell: clap_complete::Shell,
}

/// Prints the completions, such as for `source <(portcullis completions bash)`.
///
/// # Errors
/// If they cannot be written.
pub fn completions(args: &CompletionsArgs, streams: &mut Streams<'_>) -> Outcome {
    // The generator panics where it cannot write, so it writes into memory.
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "portcullis", &mut text);
    streams.out.write_all(&text)?;
    Ok(ExitCode::SUCCESS)
}
