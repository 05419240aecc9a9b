//! The authority as a program: `portcullis authority`.
//!
//! In: a config and a shutdown signal. Out: a running authority with its Workload API, its foreign bundles, its own
//! bundle on disk, and entries that follow the config file.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::config::{AuthorityConfig, ConfigError};
use super::federation::{self, Federated, Place};
use super::server::{EntriesHandle, WorkloadApiServer};
use super::state::{FileMark, write_atomic};
use super::{Authority, AuthorityError};
use crate::clock::Clock;
use crate::identity::TrustDomain;

/// How often the time of day and the config file are looked at.
const TICK: Duration = Duration::from_secs(1);

/// Why the authority could not be started.
#[derive(Debug)]
pub enum ServeError {
    /// The authority itself.
    Authority(AuthorityError),
    /// The Workload API's socket.
    Socket(std::io::Error),
    /// A part of the config.
    Config(String),
    /// The bundle file cannot be written.
    BundleFile(PathBuf, std::io::Error),
}

impl std::fmt::Display for ServeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Authority(e) => e.fmt(f),
            Self::Socket(e) => write!(f, "Workload API: {e}"),
            Self::Config(why) => f.write_str(why),
            Self::BundleFile(path, e) => write!(f, "bundle file {}: {e}", path.display()),
        }
    }
}

impl std::error::Error for ServeError {}

/// Runs the authority until `shutdown` is ready. With `reload_from`, that file is read again on SIGHUP and when it
/// changes: entries, SVID lifetimes of entries, federation and the bundle file follow it; what needs a restart is
/// refused with the reason, and the old config goes on.
///
/// # Errors
/// Only at the start. Later failures are logged and tried again.
pub async fn serve(
    config: AuthorityConfig,
    reload_from: Option<PathBuf>,
    clock: Clock,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let hangup = signal(SignalKind::hangup()).map_err(ServeError::Socket)?;
    // Before the config is used, so that a change from now on is seen.
    let mark = reload_from.as_deref().and_then(FileMark::of);
    let authority = Authority::open(config.options(), clock).map_err(ServeError::Authority)?;
    let places = places(&config).map_err(ServeError::Config)?;
    federation::load_files(&authority, &places);
    let federated = federation::watch(&authority, &places);
    if let Some(path) = &config.bundle_file {
        write_bundle(&authority, path).map_err(|e| ServeError::BundleFile(path.clone(), e))?;
    }
    warn_of_links(&config);
    let server =
        WorkloadApiServer::bind(authority.clone(), &config.socket, config.socket_mode.0, config.entries.clone())
            .map_err(ServeError::Socket)?;
    tracing::info!(
        trust_domain = config.trust_domain.as_str(),
        socket = %config.socket.display(),
        entries = config.entries.len(),
        ca = authority.published().active_ca().unwrap_or_default(),
        "the authority is ready"
    );
    let keeper = Upkeep { entries: server.entries(), authority, federated, places, config, reload_from, mark, hangup };
    tokio::select! {
        () = server.run(shutdown) => {}
        () = keeper.run() => {}
    }
    tracing::info!("the authority has stopped");
    Ok(())
}

fn places(config: &AuthorityConfig) -> Result<BTreeMap<TrustDomain, Place>, String> {
    config.federates_with.iter().map(|(d, f)| Ok((d.clone(), Place::from_config(f)?))).collect()
}

/// The kernel names executables by their real path; an entry that names a link never fits.
fn warn_of_links(config: &AuthorityConfig) {
    for entry in &config.entries {
        if let Some(path) = &entry.selectors.path
            && let Ok(real) = path.canonicalize()
            && real != *path
        {
            tracing::warn!(
                spiffe_id = %entry.spiffe_id,
                path = %path.display(),
                real = %real.display(),
                "the path selector leads over a link, so it fits nobody; write the real path"
            );
        }
    }
}

fn write_bundle(authority: &Authority, path: &Path) -> std::io::Result<()> {
    let text = authority.bundle_document().write().map_err(std::io::Error::other)?;
    if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder)?;
    }
    write_atomic(path, text.as_bytes(), 0o644)
}

/// What goes on beside the server.
struct Upkeep {
    authority: Authority,
    entries: EntriesHandle,
    federated: Federated,
    places: BTreeMap<TrustDomain, Place>,
    config: AuthorityConfig,
    reload_from: Option<PathBuf>,
    mark: Option<FileMark>,
    hangup: tokio::signal::unix::Signal,
}

impl Upkeep {
    async fn run(mut self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut published = self.authority.subscribe();
        // With the path, because a reload may name another one.
        let mut written = (self.config.bundle_file.clone(), self.authority.bundle_document());
        loop {
            tokio::select! {
                _ = tick.tick() => {
                    if let Err(error) = self.authority.maintain() {
                        tracing::warn!(%error, "the CA cannot be maintained");
                    }
                    self.reload_if_changed();
                }
                _ = published.changed() => {}
                _ = self.hangup.recv() => self.reload(),
            }
            let wanted = (self.config.bundle_file.clone(), self.authority.bundle_document());
            if let Some(path) = &self.config.bundle_file
                && wanted != written
            {
                match write_bundle(&self.authority, path) {
                    Ok(()) => written = wanted,
                    Err(error) => tracing::warn!(%error, path = %path.display(), "the bundle file cannot be written"),
                }
            }
        }
    }

    fn reload_if_changed(&mut self) {
        let mark = self.reload_from.as_deref().and_then(FileMark::of);
        if mark.is_some() && mark != self.mark {
            self.mark = mark;
            self.reload();
        }
    }

    fn reload(&mut self) {
        let Some(path) = &self.reload_from else { return };
        match AuthorityConfig::load(path).map_err(|e: ConfigError| e.to_string()).and_then(|c| self.adopt(c)) {
            Ok(()) => tracing::info!(entries = self.config.entries.len(), "the config was reloaded"),
            Err(why) => tracing::error!(why, "the changed config is refused; the old one goes on"),
        }
    }

    fn adopt(&mut self, config: AuthorityConfig) -> Result<(), String> {
        let fixed = |c: &AuthorityConfig| (c.options(), c.socket.clone(), c.socket_mode);
        if fixed(&config) != fixed(&self.config) {
            return Err(
                "trust_domain, socket, socket_mode, svid_ttl, ca_ttl, svid_key and state_dir change only with a restart"
                    .into(),
            );
        }
        let places = places(&config)?;
        if places != self.places {
            for gone in self.places.keys().filter(|domain| !places.contains_key(*domain)) {
                self.authority.remove_foreign_bundle(gone).map_err(|e| e.to_string())?;
            }
            federation::load_files(&self.authority, &places);
            self.federated = federation::watch(&self.authority, &places);
            self.places = places;
        }
        if config.entries != self.config.entries {
            warn_of_links(&config);
            self.entries.set(config.entries.clone());
        }
        self.config = config;
        Ok(())
    }
}
