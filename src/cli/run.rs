//! `portcullis run`: the proxy.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};

use super::{Failure, Outcome};
use crate::accelerate::Acceleration;
use crate::app::Node;
use crate::app::source::source_of;
use crate::authority::make_state_dir;
use crate::clock::Clock;
use crate::config::{Loaded, Watcher, load};
use crate::proxy::inherited::Inherited;
use crate::sandbox::Sandbox;
use crate::telemetry::log::Log;

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
pub fn run(args: &RunArgs) -> Outcome {
    // Before anything else is opened: they are known by the numbers of their descriptors.
    let inherited = Inherited::take();
    let loaded = load(&args.config)?;
    // Read from files that are out of reach afterwards.
    let threads = loaded.config.threads.unwrap_or_else(threads_by_quota);
    if let Some(directory) = loaded.config.identity.authority.as_ref().and_then(|own| own.state_dir.as_deref()) {
        make_state_dir(directory).map_err(Failure::new)?;
    }
    // With the privileges of the start, which the sandbox takes.
    let acceleration = Acceleration::start(&loaded.config).map_err(Failure::new)?;
    // Before there are threads: a part of it is each thread's own.
    let sandbox = Sandbox::enter(&loaded.config, &args.config).map_err(Failure::new)?;
    let log = Log::start(&loaded.config.telemetry).map_err(Failure::new)?;
    for warning in &loaded.warnings {
        tracing::warn!("{}", warning.line(&loaded.name));
    }
    acceleration.tell();
    super::give_memory_back();
    raise_descriptor_limit();
    let traffic = traffic_runtime(threads)?;
    // Admin, identity and reloads have threads of their own: a loaded data path still answers probes and rotates.
    let control = Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("control")
        .enable_all()
        .build()
        .map_err(Failure::new)?;
    let start = Start { inherited, sandbox, acceleration };
    let outcome = control.block_on(serve(&args.config, loaded, &log, traffic.handle().clone(), start));
    log.flush();
    traffic.shutdown_background();
    control.shutdown_background();
    outcome
}

/// Each connection takes two descriptors, and the usual soft limit of 1,024 is for programs that use select(2). The hard
/// limit is the administrator's word and stays.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// How many threads the data path has unless the config says: as many as the CPU quota allows to run at once.
pub(super) fn threads_by_quota() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get)
}

/// The runtime of the data path.
pub(super) fn traffic_runtime(threads: usize) -> Result<Runtime, Failure> {
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(threads);
    builder.thread_name("traffic").enable_all().build().map_err(Failure::new)
}

/// What had to be done before there were threads.
struct Start {
    inherited: Inherited,
    sandbox: Sandbox,
    acceleration: Acceleration,
}

async fn serve(path: &Path, loaded: Loaded, log: &Log, traffic: tokio::runtime::Handle, start: Start) -> Outcome {
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::new)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::new)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(Failure::new)?;
    let mut watcher = Watcher::new(path, &loaded.digest);
    let clock = Clock::system();
    let source = source_of(&loaded.config.identity, &clock).map_err(Failure::new)?;
    let node = Node::start(loaded.config, source, clock, traffic, start.inherited, start.sandbox, start.acceleration)
        .await
        .map_err(Failure::new)?;
    for listener in node.proxy().listeners() {
        tracing::info!(
            listener = listener.name,
            direction = listener.direction.as_str(),
            address = listener.address,
            "listening"
        );
    }
    tracing::info!(version = env!("CARGO_PKG_VERSION"), admin = %node.admin(), "started");
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => reload(path, &node, log, &mut watcher),
            _ = watcher.changed() => reload(path, &node, log, &mut watcher),
        }
    }
    let _draining = node.readiness().wait_for("drain");
    let timeout = node.proxy().config().drain_timeout.0;
    tracing::info!(open = node.proxy().registry().len(), timeout_seconds = timeout.as_secs_f64(), "draining");
    let drained = async {
        let left = node.proxy().drain(timeout).await;
        node.flush().await;
        left
    };
    tokio::select! {
        left = drained => {
            if left > 0 {
                tracing::warn!(left, "the drain time was over; the rest was closed");
            }
            tracing::info!("stopped");
            Ok(ExitCode::SUCCESS)
        }
        _ = terminate.recv() => Ok(stopped_at_once()),
        _ = interrupt.recv() => Ok(stopped_at_once()),
    }
}

fn stopped_at_once() -> ExitCode {
    tracing::warn!("told to stop again: stopped at once");
    ExitCode::FAILURE
}

/// Reads the config again. A bad one is refused with the reason, and the old one goes on.
fn reload(path: &Path, node: &Node, log: &Log, watcher: &mut Watcher) {
    match load(path) {
        Ok(loaded) => {
            watcher.known(&loaded.digest);
            for warning in &loaded.warnings {
                tracing::warn!("{}", warning.line(&loaded.name));
            }
            let telemetry = loaded.config.telemetry.clone();
            match node.reload(loaded.config) {
                Ok(()) => {
                    log.reload(&telemetry);
                    tracing::info!(digest = loaded.digest, "config reloaded");
                }
                Err(why) => tracing::error!(%why, "config not reloaded; the old one goes on"),
            }
        }
        Err(errors) => {
            node.reload_failed();
            for error in errors.to_string().lines() {
                tracing::error!(%error, "config not reloaded; the old one goes on");
            }
        }
    }
}
