//! What we keep to resume a session with an upstream: for ten minutes at most, whatever the upstream allows.
//!
//! One store belongs to one upstream's configuration and goes with it. In and out: what rustls hands over. Bounded in
//! names and in tickets for each.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustls::NamedGroup;
use rustls::client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::pki_types::ServerName;

use super::tickets::TICKET_LIFETIME;
use crate::clock::Clock;

/// Names of one upstream that sessions are kept for.
const MOST_NAMES: usize = 16;
/// TLS 1.3 tickets for each name. Each is used once, and each connection brings at least one.
const MOST_TICKETS: usize = 32;

/// Sessions of one upstream.
pub(super) struct Sessions {
    clock: Clock,
    names: Mutex<HashMap<ServerName<'static>, Kept>>,
}

/// With each session stands when it came, seconds since the Unix epoch.
#[derive(Default)]
struct Kept {
    group: Option<NamedGroup>,
    tls12: Option<(u64, Tls12ClientSessionValue)>,
    tls13: VecDeque<(u64, Tls13ClientSessionValue)>,
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sessions")
    }
}

impl Sessions {
    pub(super) fn new(clock: Clock) -> Self {
        Self { clock, names: Mutex::default() }
    }

    fn names(&self) -> MutexGuard<'_, HashMap<ServerName<'static>, Kept>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with(&self, name: ServerName<'static>, change: impl FnOnce(&mut Kept)) {
        let mut names = self.names();
        if names.len() < MOST_NAMES || names.contains_key(&name) {
            change(names.entry(name).or_default());
        }
    }

    /// Whether something that came then may still be used. A clock that went back makes everything old.
    fn fresh(&self, since: u64) -> bool {
        self.clock.now().checked_sub(since).is_some_and(|age| age <= u64::from(TICKET_LIFETIME))
    }
}

impl ClientSessionStore for Sessions {
    fn set_kx_hint(&self, name: ServerName<'static>, group: NamedGroup) {
        self.with(name, |kept| kept.group = Some(group));
    }

    fn kx_hint(&self, name: &ServerName<'_>) -> Option<NamedGroup> {
        self.names().get(name)?.group
    }

    fn set_tls12_session(&self, name: ServerName<'static>, value: Tls12ClientSessionValue) {
        let now = self.clock.now();
        self.with(name, |kept| kept.tls12 = Some((now, value)));
    }

    fn tls12_session(&self, name: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        let names = self.names();
        let (since, session) = names.get(name)?.tls12.as_ref()?;
        self.fresh(*since).then(|| session.clone())
    }

    fn remove_tls12_session(&self, name: &ServerName<'static>) {
        if let Some(kept) = self.names().get_mut(name) {
            kept.tls12 = None;
        }
    }

    fn insert_tls13_ticket(&self, name: ServerName<'static>, value: Tls13ClientSessionValue) {
        let now = self.clock.now();
        self.with(name, |kept| {
            if kept.tls13.len() >= MOST_TICKETS {
                kept.tls13.pop_front();
            }
            kept.tls13.push_back((now, value));
        });
    }

    fn take_tls13_ticket(&self, name: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        let mut names = self.names();
        let kept = names.get_mut(name)?;
        // The newest is the last; once that is too old, all are.
        let (since, ticket) = kept.tls13.pop_back()?;
        if self.fresh(since) {
            return Some(ticket);
        }
        kept.tls13.clear();
        None
    }
}
