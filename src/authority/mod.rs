//! A small SPIFFE authority: for laptops, tests, edge sites and the demo.
//!
//! Owns a trust domain's CA keys and signs X509-SVIDs with them. In: who is to be issued what (a config file, or calls
//! in the same process). Out: SVIDs and trust bundles, as an [`embedded::EmbeddedSource`] for our own proxy or over the
//! standard SPIFFE Workload API for everybody else ([`server`]). Keys are P-384; CA keys lie in memory or in one file
//! that only we may read, SVID keys in memory only.

pub mod attest;
pub mod bundle_document;
pub mod ca;
mod ca_set;
pub mod config;
pub mod embedded;
pub mod federation;
mod request;
mod serve;
pub mod server;
mod state;
mod streams;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use tokio::sync::watch;
use tokio::time::Instant;

pub use ca::SvidKey;
pub use config::AuthorityConfig;
pub use embedded::EmbeddedSource;
pub(crate) use federation::SYSTEM_CA_FILES;
pub use request::{AuthorityError, IssuedSvid, MAX_CA_TTL, MAX_DNS_NAMES, MIN_SVID_TTL, Options, SvidRequest};
pub use serve::{ServeError, serve};
pub use server::WorkloadApiServer;
pub(crate) use state::make_state_dir;

use bundle_document::BundleDocument;
use ca::{CaId, LeafRequest};
use ca_set::CaSet;
use state::{FileMark, StateDir};

use crate::clock::Clock;
use crate::identity::{TrustBundles, TrustDomain};

/// What the authority publishes at one moment.
#[derive(Clone, Debug)]
pub struct Published {
    /// The own bundle and the foreign ones.
    pub bundles: TrustBundles,
    /// Counts up with every change.
    pub generation: u64,
    own: Vec<CertificateDer<'static>>,
    sequence: u64,
    active: Option<CaId>,
    /// CAs whose SVIDs may go on until they are due.
    sound: Vec<CaId>,
}

impl Published {
    /// The own CA certificates (DER), those that sign, will sign and did sign.
    pub fn own_authorities(&self) -> &[CertificateDer<'static>] {
        &self.own
    }

    /// Whether an SVID must be replaced though it is not due, because its CA is tainted or gone.
    pub fn disowns(&self, svid: &IssuedSvid) -> bool {
        !self.sound.contains(&svid.ca)
    }

    /// The serial number (hexadecimal) of the CA that signs.
    pub fn active_ca(&self) -> Option<&str> {
        self.active.as_deref()
    }
}

/// A trust domain's authority. Handles are cheap and share one state.
#[derive(Clone, Debug)]
pub struct Authority(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    options: Options,
    clock: Clock,
    dir: Option<StateDir>,
    state: Mutex<State>,
    published: watch::Sender<Arc<Published>>,
}

#[derive(Debug)]
struct State {
    set: CaSet,
    mark: Option<FileMark>,
    foreign: BTreeMap<TrustDomain, Vec<CertificateDer<'static>>>,
    generation: u64,
}

impl Authority {
    /// Opens the authority: from its state directory if there is something in it, with a new CA otherwise.
    ///
    /// # Errors
    /// Settings that make no sense, a state directory that others may read, a damaged state file.
    pub fn open(options: Options, clock: Clock) -> Result<Self, AuthorityError> {
        options.check()?;
        let now = clock.now();
        let ttl = options.svid_ttl.as_secs();
        let dir = options.state_dir.as_deref().map(StateDir::open).transpose()?;
        let (set, mark) = match &dir {
            None => (CaSet::new(&options.trust_domain, now, options.ca_ttl, ttl)?, None),
            Some(dir) => {
                let _lock = dir.lock()?;
                let (mut set, mut changed) = match dir.load(&options.trust_domain)? {
                    Some(set) => (set, false),
                    None => (CaSet::new(&options.trust_domain, now, options.ca_ttl, ttl)?, true),
                };
                if set.longest_ttl < ttl {
                    set.longest_ttl = ttl;
                    changed = true;
                }
                if set.advance(&options.trust_domain, now, options.ca_ttl)? {
                    set.sequence = set.sequence.saturating_add(1);
                    changed = true;
                }
                if changed {
                    dir.save(&options.trust_domain, &set)?;
                }
                (set, dir.mark())
            }
        };
        let state = State { set, mark, foreign: BTreeMap::new(), generation: 1 };
        let published = watch::Sender::new(Arc::new(state.publish(&options.trust_domain)?));
        Ok(Self(Arc::new(Shared { options, clock, dir, state: Mutex::new(state), published })))
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.options.trust_domain
    }

    /// What it was made with.
    pub fn options(&self) -> &Options {
        &self.0.options
    }

    /// The clock that it goes by.
    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    /// What is published, now and after every change.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Published>> {
        self.0.published.subscribe()
    }

    /// What is published now.
    pub fn published(&self) -> Arc<Published> {
        self.0.published.borrow().clone()
    }

    /// Issues an SVID with a new key, signed by the active CA.
    ///
    /// # Errors
    /// An ID of another trust domain, a bad DNS name, a lifetime out of bounds, or a CA past its end.
    pub fn issue(&self, request: &SvidRequest) -> Result<IssuedSvid, AuthorityError> {
        self.check_request(request)?;
        let options = &self.0.options;
        let ttl = request.ttl.unwrap_or(options.svid_ttl).as_secs();
        if self.lock().set.longest_ttl < ttl {
            // An old CA stays published for as long as the longest SVID can live.
            self.change(|set, _| {
                let longer = set.longest_ttl < ttl;
                set.longest_ttl = set.longest_ttl.max(ttl);
                Ok(longer)
            })?;
        }
        let now = self.0.clock.now();
        let (ca_id, ca) = {
            let state = self.lock();
            let (id, ca) = state.set.active().ok_or(AuthorityError::CaExpired)?;
            (id.clone(), Arc::clone(ca))
        };
        let leaf = ca.sign_leaf(&LeafRequest {
            id: &request.id,
            dns_names: &request.dns_names,
            key: options.svid_key,
            now,
            ttl,
        })?;
        let mut random = [0_u8; 2];
        ca::fill_random(&mut random)?;
        let part = f64::from(u16::from_le_bytes(random)) / f64::from(u16::MAX);
        let life = leaf.not_after.saturating_sub(now) as f64;
        Ok(IssuedSvid {
            id: request.id.clone(),
            hint: request.hint.clone(),
            chain: vec![leaf.der],
            key: leaf.key,
            ca: ca_id,
            not_after: leaf.not_after,
            issued_wall: now,
            issued: Instant::now(),
            renew_after: Duration::from_secs_f64(life * (0.45 + 0.1 * part)),
        })
    }

    /// Whether a request could be fulfilled.
    ///
    /// # Errors
    /// [`AuthorityError::Invalid`] with the reason.
    pub fn check_request(&self, request: &SvidRequest) -> Result<(), AuthorityError> {
        self.0.options.check_request(request)
    }

    /// Does what the time of day asks for: takes over what another process of the same state directory has changed,
    /// publishes the next CA, lets it sign, drops old ones. Cheap when there is nothing to do; call it about every
    /// second while SVIDs are short-lived.
    ///
    /// # Errors
    /// The state directory cannot be read or written; the CAs in memory stay as they are.
    pub fn maintain(&self) -> Result<(), AuthorityError> {
        let shared = &self.0;
        if let Some(dir) = &shared.dir {
            let mark = dir.mark();
            let mut state = self.lock();
            if mark.is_some() && mark != state.mark {
                // Remembered first, so that a damaged file is complained of once and not every second.
                state.mark = mark;
                if let Some(set) = dir.load(&shared.options.trust_domain)? {
                    state.set = set;
                    self.publish(&mut state)?;
                }
            }
        }
        let now = shared.clock.now();
        if !self.lock().set.is_due(now) {
            return Ok(());
        }
        self.change(|set, now| set.advance(&shared.options.trust_domain, now, shared.options.ca_ttl))
    }

    /// Calls [`Authority::maintain`] every second, for ever, and logs what goes wrong.
    pub async fn upkeep(&self) {
        loop {
            if let Err(error) = self.maintain() {
                tracing::warn!(%error, "the CA cannot be maintained");
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Publishes a new CA that does not sign yet.
    ///
    /// # Errors
    /// [`AuthorityError::TooManyCas`], or the state directory.
    pub fn prepare_ca(&self) -> Result<(), AuthorityError> {
        let options = &self.0.options;
        self.change(|set, now| set.prepare(&options.trust_domain, now, options.ca_ttl).map(|()| true))
    }

    /// Lets the prepared CA sign. SVIDs of the one before stay good and are replaced as they fall due.
    ///
    /// # Errors
    /// [`AuthorityError::NothingPrepared`], or the state directory.
    pub fn activate_ca(&self) -> Result<(), AuthorityError> {
        self.change(|set, now| set.activate(now).map(|()| true))
    }

    /// Replaces the CA with overlap: publishes a new one, gives everybody `overlap` to learn of it, lets it sign.
    ///
    /// # Errors
    /// See [`Authority::prepare_ca`] and [`Authority::activate_ca`].
    pub async fn rotate_ca(&self, overlap: Duration) -> Result<(), AuthorityError> {
        self.prepare_ca()?;
        tokio::time::sleep(overlap).await;
        self.activate_ca()
    }

    /// Has all SVIDs that an old CA signed replaced at once.
    ///
    /// # Errors
    /// The state directory.
    pub fn taint_old_cas(&self) -> Result<(), AuthorityError> {
        self.change(|set, _| Ok(set.taint_old()))
    }

    /// Takes the old CAs out of the bundle before their last SVID has expired: has those SVIDs replaced, waits `grace`
    /// for that, and publishes the old CAs no more.
    ///
    /// # Errors
    /// The state directory.
    pub async fn retire_old_cas(&self, grace: Duration) -> Result<(), AuthorityError> {
        self.taint_old_cas()?;
        tokio::time::sleep(grace).await;
        self.change(|set, _| Ok(set.drop_tainted()))
    }

    /// Sets the bundle of another trust domain, from its CA certificates (DER).
    ///
    /// # Errors
    /// Our own trust domain, or certificates that are no CAs; the earlier bundle then stays.
    pub fn set_foreign_bundle(
        &self,
        domain: &TrustDomain,
        authorities: Vec<CertificateDer<'static>>,
    ) -> Result<(), AuthorityError> {
        if domain == self.trust_domain() {
            return Err(AuthorityError::Invalid(format!("'{}' is our own trust domain", domain.as_str())));
        }
        TrustBundles::empty()
            .set(domain.clone(), authorities.clone())
            .map_err(|e| AuthorityError::Invalid(format!("bundle of '{}': {e}", domain.as_str())))?;
        let mut state = self.lock();
        if state.foreign.get(domain) == Some(&authorities) {
            return Ok(());
        }
        let before = state.foreign.insert(domain.clone(), authorities);
        let done = self.publish(&mut state);
        if done.is_err() {
            match before {
                Some(before) => state.foreign.insert(domain.clone(), before),
                None => state.foreign.remove(domain),
            };
        }
        done
    }

    /// Forgets the bundle of another trust domain.
    ///
    /// # Errors
    /// None in practice: what is left was published before.
    pub fn remove_foreign_bundle(&self, domain: &TrustDomain) -> Result<(), AuthorityError> {
        let mut state = self.lock();
        if state.foreign.remove(domain).is_some() { self.publish(&mut state) } else { Ok(()) }
    }

    /// Our own bundle as a SPIFFE bundle document, for other trust domains.
    pub fn bundle_document(&self) -> BundleDocument {
        let published = self.published();
        BundleDocument {
            authorities: published.own.clone(),
            sequence: Some(published.sequence),
            // A new CA is published for a third of a CA's life before it signs; ask several times within that.
            refresh_hint: Some((self.0.options.ca_ttl / 20).clamp(Duration::from_secs(1), Duration::from_secs(3600))),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the set of CAs, on disk first and in memory only if that went well.
    fn change(
        &self,
        apply: impl FnOnce(&mut CaSet, u64) -> Result<bool, AuthorityError>,
    ) -> Result<(), AuthorityError> {
        let shared = &self.0;
        let domain = &shared.options.trust_domain;
        let mut state = self.lock();
        let _file_lock = shared.dir.as_ref().map(StateDir::lock).transpose()?;
        let mut set = match &shared.dir {
            // Another process may have been first.
            Some(dir) => dir.load(domain)?.unwrap_or_else(|| state.set.clone()),
            None => state.set.clone(),
        };
        if apply(&mut set, shared.clock.now())? {
            set.sequence = set.sequence.saturating_add(1);
            if let Some(dir) = &shared.dir {
                dir.save(domain, &set)?;
            }
        }
        state.mark = shared.dir.as_ref().and_then(StateDir::mark);
        if state.set.sequence == set.sequence {
            return Ok(());
        }
        state.set = set;
        self.publish(&mut state)
    }

    fn publish(&self, state: &mut State) -> Result<(), AuthorityError> {
        state.generation = state.generation.saturating_add(1);
        let published = state.publish(&self.0.options.trust_domain)?;
        self.0.published.send_replace(Arc::new(published));
        Ok(())
    }
}

impl State {
    fn publish(&self, domain: &TrustDomain) -> Result<Published, AuthorityError> {
        let own: Vec<_> = self.set.slots.iter().map(|s| s.der.clone()).collect();
        let mut bundles = TrustBundles::empty();
        bundles.set(domain.clone(), own.clone()).map_err(|e| AuthorityError::Crypto(e.to_string()))?;
        for (foreign, ders) in &self.foreign {
            bundles
                .set(foreign.clone(), ders.clone())
                .map_err(|e| AuthorityError::Invalid(format!("bundle of '{}': {e}", foreign.as_str())))?;
        }
        Ok(Published {
            bundles,
            generation: self.generation,
            own,
            sequence: self.set.sequence,
            active: self.set.active().map(|(id, _)| id.clone()),
            sound: self.set.slots.iter().filter(|s| !s.tainted).map(|s| s.id.clone()).collect(),
        })
    }
}

#[cfg(test)]
mod tests;
