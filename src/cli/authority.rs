//! `portcullis authority`: a small SPIFFE authority that serves the Workload API.

use std::path::PathBuf;
use std::process::ExitCode;

use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};

use super::{Failure, Outcome, Streams};
use crate::authority::{Authority, AuthorityConfig, serve};
use crate::clock::Clock;
use crate::config::schema::Telemetry;
use crate::telemetry::log::Log;

/// Arguments of `authority`.
#[derive(Debug, clap::Args)]
pub struct AuthorityArgs {
    /// The authority's config file: its trust domain, its socket and who is given which identity. Entries and
    /// federation follow it while the authority runs, on SIGHUP and when its content changes.
    #[arg(short, long, value_name = "FILE")]
    pub config: PathBuf,
    /// Print our trust bundle as a SPIFFE bundle document, for other trust domains, and end. Needs a `state_dir`.
    #[arg(long)]
    pub show_bundle: bool,
}

/// Runs the authority until it is told to stop.
///
/// # Errors
/// Why it could not start.
pub fn authority(args: &AuthorityArgs, streams: &mut Streams<'_>) -> Outcome {
    // Its errors begin with the file's name already.
    let config =
        AuthorityConfig::load(&args.config).map_err(|error| Failure { code: 1, message: error.to_string() })?;
    if args.show_bundle {
        return show_bundle(&config, streams);
    }
    let telemetry =
        Telemetry { log_format: config.log_format, log_level: config.log_level.clone(), ..Telemetry::default() };
    let log = Log::start(&telemetry).map_err(Failure::new)?;
    super::give_memory_back();
    let runtime = Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    let served = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(Failure::new)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::new)?;
        let stopped = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        serve(config, Some(args.config.clone()), Clock::system(), stopped).await.map_err(Failure::new)
    });
    log.flush();
    served.map(|()| ExitCode::SUCCESS)
}

fn show_bundle(config: &AuthorityConfig, streams: &mut Streams<'_>) -> Outcome {
    if config.state_dir.is_none() {
        return Err(Failure::new(
            "this authority keeps its CA in memory only, so every start has another bundle; give it a `state_dir`, or \
             have the running one write a `bundle_file`",
        ));
    }
    let authority = Authority::open(config.options(), Clock::system()).map_err(Failure::new)?;
    let text = authority.bundle_document().write().map_err(Failure::new)?;
    streams.out.write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::bundle_document::BundleDocument;

    fn show(config: &str) -> (Outcome, Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.yaml");
        let state = folder.path().join("state");
        std::fs::write(&path, config.replace("STATE", state.to_str().unwrap())).unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let args = AuthorityArgs { config: path, show_bundle: true };
        let outcome = authority(&args, &mut Streams { out: &mut out, err: &mut err });
        (outcome, out)
    }

    #[test]
    fn the_bundle_is_shown_of_an_authority_that_keeps_one() {
        let (outcome, out) = show("{ trust_domain: lab.test, socket: /nowhere/s, state_dir: STATE }");
        assert_eq!(outcome.unwrap(), ExitCode::SUCCESS);
        assert_eq!(BundleDocument::read(&out).unwrap().authorities.len(), 1);
        let (outcome, _) = show("{ trust_domain: lab.test, socket: /nowhere/s }");
        assert!(outcome.unwrap_err().message.contains("in memory only"));
        let (outcome, _) = show("{ trust_domain: lab.test, socket: /nowhere/s, colour: red }");
        assert!(outcome.unwrap_err().message.contains("a.yaml:1:"));
    }
}
