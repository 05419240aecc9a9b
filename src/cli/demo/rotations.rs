//! Replacements of SVIDs, as the sidecars' `/state` shows them.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::task::JoinSet;

use super::scrape;

/// How often a sidecar is asked whether its SVID is another one.
const LOOK: Duration = Duration::from_millis(100);

/// A replacement of an SVID.
#[derive(Clone, Debug)]
pub(super) struct Rotation {
    pub(super) name: &'static str,
    pub(super) before: String,
    pub(super) after: String,
    pub(super) generation: u64,
}

/// The rotations of some sidecars. Nobody is asked any more when it drops.
#[derive(Debug)]
pub(super) struct Rotations {
    seen: Arc<Mutex<Vec<Rotation>>>,
    _watchers: JoinSet<()>,
}

impl Rotations {
    /// Watches sidecars, each by name and admin address.
    pub(super) fn watch(sidecars: impl IntoIterator<Item = (&'static str, SocketAddr)>) -> Self {
        let seen = Arc::default();
        let mut watchers = JoinSet::new();
        for (name, admin) in sidecars {
            watchers.spawn(watch(name, admin, Arc::clone(&seen)));
        }
        Self { seen, _watchers: watchers }
    }

    /// Those since this was last asked.
    pub(super) fn take(&self) -> Vec<Rotation> {
        std::mem::take(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Writes down every change of a sidecar's SVID that its `/state` shows.
async fn watch(name: &'static str, admin: SocketAddr, seen: Arc<Mutex<Vec<Rotation>>>) {
    let mut tick = tokio::time::interval(LOOK);
    let mut before: Option<String> = None;
    loop {
        tick.tick().await;
        let state = scrape::state(admin).await;
        let Some(after) = state.pointer("/identity/serial").and_then(Value::as_str) else { continue };
        if let Some(before) = before.replace(after.to_owned())
            && before != after
        {
            let generation = state.pointer("/identity/generation").and_then(Value::as_u64).unwrap_or(0);
            let rotation = Rotation { name, before, after: after.to_owned(), generation };
            seen.lock().unwrap_or_else(PoisonError::into_inner).push(rotation);
        }
    }
}
