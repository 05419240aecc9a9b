//! `portcullis authority`: a small SPIFFE authority that serves the Workload API.

use std::path::PathBuf;
use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};

use super::{Failure, Outcome};
use crate::authority::config::AuthorityConfig;
use crate::authority::serve;
use crate::clock::Clock;
use crate::config::schema::Telemetry;
use crate::telemetry::log::Log;

/// Arguments of `authority`.
#[derive(Debug, clap::Args)]
pub struct AuthorityArgs {
    /// The authority's config file: its trust domain, its socket and who is given which identity. It is read again on
    /// SIGHUP and when its content changes.
    #[arg(short, long, value_name = "FILE")]
    pub config: PathBuf,
}

/// Runs the authority until it is told to stop.
///
/// # Errors
/// Why it could not start, or why it ended.
pub fn authority(args: &AuthorityArgs) -> Outcome {
    let config = AuthorityConfig::load(&args.config).map_err(Failure::new)?;
    let log = Log::start(&Telemetry::default()).map_err(Failure::new)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    let outcome = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(Failure::new)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::new)?;
        let told = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        serve(config, Some(args.config.clone()), Clock::system(), told).await.map_err(Failure::new)
    });
    log.flush();
    outcome.map(|()| ExitCode::SUCCESS)
}
