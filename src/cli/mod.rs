//! The commands.
//!
//! Owns arguments, what is printed for a person, and exit codes; one file a command. In: arguments. Out: an exit code,
//! results on stdout, and on stderr one line for each thing that went wrong.
//!
//! Exit codes: 0 fine; 1 the config is bad, the peer would be denied, or the command failed; 2 the command was not
//! understood.

pub mod authority;
pub mod check;
pub mod completions;
pub mod demo;
pub mod explain;
pub mod man;
pub mod redirect;
pub mod run;
pub mod schema;
pub mod status;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

const EXIT_CODES: &str = "\
Exit codes:
  0  fine
  1  the config is bad, the peer would be denied, or the command failed
  2  the command was not understood";

/// Zero-trust mTLS sidecar proxy: SPIFFE identities, declared cryptography, proof by measurement.
#[derive(Debug, Parser)]
#[command(name = "portcullis", version, propagate_version = true, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the proxy.
    Run(run::RunArgs),
    /// Show everything on this machine, with nothing set up: workloads, sidecars, rotation, a denied stranger.
    Demo(demo::DemoArgs),
    /// Say whether configs are good, and what they mean.
    Check(check::CheckArgs),
    /// Say what policy makes of a peer, and by which rule, without any traffic.
    Explain(explain::ExplainArgs),
    /// Say how a running proxy fares: ready or not, its identity, who still speaks plaintext.
    Status(status::StatusArgs),
    /// Make, remove or show the rules that bring a workload's traffic to the proxy.
    #[command(subcommand)]
    Redirect(redirect::RedirectCommand),
    /// Run a small SPIFFE authority that serves the Workload API.
    Authority(authority::AuthorityArgs),
    /// Print shell completions.
    Completions(completions::CompletionsArgs),
    /// Print the man page, or write one for each command.
    Man(man::ManArgs),
    /// Print the JSON schema of the config file.
    Schema,
}

/// Why a command ended without what it was asked for.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// The exit code.
    pub code: u8,
    /// What goes to stderr, a line for each thing that is wrong; nothing if it has been said already.
    pub message: String,
}

impl Failure {
    /// Exit code 1, and a line that says what is wrong and what to do.
    pub fn new(message: impl std::fmt::Display) -> Self {
        Self { code: 1, message: format!("portcullis: {message}") }
    }

    /// Exit code 2: the arguments do not fit together.
    pub fn usage(message: impl std::fmt::Display) -> Self {
        Self { code: 2, message: format!("portcullis: {message}") }
    }
}

impl From<crate::config::ConfigErrors> for Failure {
    /// The lines begin with the file's name already.
    fn from(errors: crate::config::ConfigErrors) -> Self {
        Self { code: 1, message: errors.to_string() }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            // Whoever reads us has seen enough: `portcullis schema | head`.
            return Self { code: 0, message: String::new() };
        }
        Self::new(error)
    }
}

/// How a command ends.
pub type Outcome = Result<ExitCode, Failure>;

/// Where a command writes.
pub struct Streams<'a> {
    /// Results.
    pub out: &'a mut dyn Write,
    /// Complaints.
    pub err: &'a mut dyn Write,
}

impl std::fmt::Debug for Streams<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Streams")
    }
}

/// Has memory that is free go back to the system even while nobody asks for any: for commands that stay. It starts a thread,
/// which is one more that must be within the sandbox.
fn give_memory_back() {
    if let Err(error) = tikv_jemalloc_ctl::background_thread::write(true) {
        tracing::warn!(%error, "memory that is free goes back to the system late");
    }
}

/// Reads the arguments, the program's name first, and does what they say.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // A terminal that is gone cannot be told anything.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
        }
    };
    let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
    let outcome = execute(cli.command, &mut Streams { out: &mut out, err: &mut err });
    let outcome = outcome.and_then(|code| out.flush().map(|()| code).map_err(Failure::from));
    outcome.unwrap_or_else(|failure| {
        if !failure.message.is_empty() {
            let _ = writeln!(err, "{}", failure.message);
        }
        ExitCode::from(failure.code)
    })
}

/// Does what a command says.
///
/// # Errors
/// Why it could not, with the exit code.
pub fn execute(command: Command, streams: &mut Streams<'_>) -> Outcome {
    match command {
        Command::Run(args) => run::run(&args),
        Command::Demo(args) => demo::demo(&args, streams),
        Command::Check(args) => check::check(&args, streams),
        Command::Explain(args) => explain::explain(&args, streams),
        Command::Status(args) => status::status(&args, streams),
        Command::Redirect(command) => redirect::redirect(&command, streams),
        Command::Authority(args) => authority::authority(&args, streams),
        Command::Completions(args) => completions::completions(&args, streams),
        Command::Man(args) => man::man(&args, streams),
        Command::Schema => schema::schema(streams),
    }
}

#[cfg(test)]
mod tests;
