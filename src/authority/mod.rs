//! A small SPIFFE authority: for laptops, tests, edge sites and the demo.
//!
//! Owns a trust domain's CA keys and signs X509-SVIDs with them. In: who is to be issued what (a config file, or calls
//! in the same process). Out: SVIDs and trust bundles, as an [`embedded::EmbeddedSource`] for our own proxy or over the
//! standard SPIFFE Workload API for everybody else ([`server`]). Keys are P-384; CA keys lie in memory or in one file
//! that only we may read, SVID keys in memory only.

pub mod attest;
pub mod bundle_document;
pub mod ca;
pub mod config;
pub mod embedded;
pub mod federation;
mod serve;
pub mod server;
mod state;
mod streams;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::watch;
use tokio::time::Instant;
use zeroize::Zeroizing;

pub use ca::SvidKey;
pub use config::AuthorityConfig;
pub use embedded::EmbeddedSource;
pub use serve::{ServeError, serve};
pub use server::WorkloadApiServer;

use bundle_document::BundleDocument;
use ca::{CaId, LeafRequest};
use state::{CaSet, FileMark, StateDir};

use crate::clock::Clock;
use crate::identity::{SpiffeId, Svid, SvidError, TrustBundles, TrustDomain};

/// The shortest life of an SVID that can be asked for.
pub const MIN_SVID_TTL: Duration = Duration::from_secs(2);
/// The longest life of a CA that can be asked for: ten years.
pub const MAX_CA_TTL: Duration = Duration::from_secs(10 * 365 * 86_400);
/// The most DNS names in one SVID.
pub const MAX_DNS_NAMES: usize = 32;

/// What the authority could not do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuthorityError {
    /// The state directory or a file in it.
    State {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A key or certificate.
    Crypto(String),
    /// A setting or request that makes no sense.
    Invalid(String),
    /// The active CA's life is over, and no other could be made.
    CaExpired,
    /// There is no prepared CA that could take over.
    NothingPrepared,
    /// More CAs are published than is allowed; retire some.
    TooManyCas,
}

impl std::fmt::Display for AuthorityError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::State { path, why } => write!(f, "authority state {}: {why}", path.display()),
            Self::Crypto(why) | Self::Invalid(why) => f.write_str(why),
            Self::CaExpired => f.write_str("the CA has expired"),
            Self::NothingPrepared => f.write_str("no CA has been prepared to take over"),
            Self::TooManyCas => write!(f, "{} CAs are published, which is the limit", state::MAX_CAS),
        }
    }
}

impl std::error::Error for AuthorityError {}

/// What an authority is made with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The trust domain whose authority it is.
    pub trust_domain: TrustDomain,
    /// Life of an SVID where a request names none. At least [`MIN_SVID_TTL`].
    pub svid_ttl: Duration,
    /// Life of a CA certificate. At least twice `svid_ttl`, at most [`MAX_CA_TTL`].
    pub ca_ttl: Duration,
    /// Kind of the SVIDs' keys where a request names none.
    pub svid_key: SvidKey,
    /// Where the CA keys are kept (0700), shared by several processes; in memory only when absent.
    pub state_dir: Option<PathBuf>,
}

impl Options {
    /// The defaults: SVIDs of one hour with P-384 keys, a CA of thirty days, in memory.
    pub fn new(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            svid_ttl: Duration::from_secs(3600),
            ca_ttl: Duration::from_secs(30 * 86_400),
            svid_key: SvidKey::default(),
            state_dir: None,
        }
    }

    /// Holds the lifetimes against each other.
    ///
    /// # Errors
    /// [`AuthorityError::Invalid`] with the setting's name.
    pub fn check(&self) -> Result<(), AuthorityError> {
        check_ttl(self.svid_ttl)?;
        if self.ca_ttl > MAX_CA_TTL {
            return Err(AuthorityError::Invalid("ca_ttl is longer than ten years".into()));
        }
        if self.ca_ttl < self.svid_ttl.saturating_mul(2) {
            return Err(AuthorityError::Invalid(format!(
                "ca_ttl ({}) must be at least twice svid_ttl ({})",
                humantime::format_duration(self.ca_ttl),
                humantime::format_duration(self.svid_ttl)
            )));
        }
        Ok(())
    }

    /// Whether an authority with these options could fulfil a request.
    ///
    /// # Errors
    /// [`AuthorityError::Invalid`] with the reason.
    pub fn check_request(&self, request: &SvidRequest) -> Result<(), AuthorityError> {
        let domain = self.trust_domain.as_str();
        if request.id.trust_domain_name() != domain {
            return Err(AuthorityError::Invalid(format!("{} is not of trust domain '{domain}'", request.id)));
        }
        if request.id.path().is_empty() {
            return Err(AuthorityError::Invalid(format!("{} has no path, so it names no workload", request.id)));
        }
        if request.dns_names.len() > MAX_DNS_NAMES {
            return Err(AuthorityError::Invalid(format!("more than {MAX_DNS_NAMES} DNS names for {}", request.id)));
        }
        for name in &request.dns_names {
            let host = name.strip_prefix("*.").unwrap_or(name);
            if rustls::pki_types::DnsName::try_from(host).is_err() {
                return Err(AuthorityError::Invalid(format!("'{}' is not a DNS name", name.escape_debug())));
            }
        }
        if let Some(ttl) = request.ttl {
            check_ttl(ttl)?;
            if ttl.saturating_mul(2) > self.ca_ttl {
                return Err(AuthorityError::Invalid(format!(
                    "the ttl of {} ({}) is longer than half of ca_ttl",
                    request.id,
                    humantime::format_duration(ttl)
                )));
            }
        }
        Ok(())
    }
}

fn check_ttl(ttl: Duration) -> Result<(), AuthorityError> {
    if ttl < MIN_SVID_TTL {
        return Err(AuthorityError::Invalid(format!(
            "svid_ttl ({}) is shorter than {} s",
            humantime::format_duration(ttl),
            MIN_SVID_TTL.as_secs()
        )));
    }
    Ok(())
}

/// What an SVID is asked for with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SvidRequest {
    /// The SPIFFE ID, of the authority's own trust domain and with a path.
    pub id: SpiffeId,
    /// DNS SANs, for peers that check host names.
    pub dns_names: Vec<String>,
    /// Life of the SVID; the authority's `svid_ttl` when absent.
    pub ttl: Option<Duration>,
    /// The operator's hint, passed on to the workload.
    pub hint: Option<String>,
}

impl SvidRequest {
    /// A request for one ID with the authority's defaults.
    pub fn new(id: SpiffeId) -> Self {
        Self { id, dns_names: Vec::new(), ttl: None, hint: None }
    }
}

/// An SVID with its key as it was issued. The key is zeroed when dropped.
pub struct IssuedSvid {
    id: SpiffeId,
    hint: Option<String>,
    chain: Vec<CertificateDer<'static>>,
    key: Zeroizing<Vec<u8>>,
    ca: CaId,
    not_after: u64,
    issued_wall: u64,
    issued: Instant,
    renew_after: Duration,
}

impl std::fmt::Debug for IssuedSvid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IssuedSvid").field("id", &self.id).field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

impl IssuedSvid {
    /// Its SPIFFE ID.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The operator's hint.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The chain, leaf first (DER), without the CA.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The private key (PKCS#8 DER).
    pub fn key_pkcs8(&self) -> &[u8] {
        &self.key
    }

    /// Not valid after, seconds since the Unix epoch.
    pub fn not_after(&self) -> u64 {
        self.not_after
    }

    /// The same in the form that the rest of the house uses.
    ///
    /// # Errors
    /// [`SvidError`], if our own SVID should ever break a rule that we hold others to.
    pub fn to_svid(&self) -> Result<Svid, SvidError> {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.to_vec()));
        Svid::new(self.chain.clone(), key, self.hint.clone())
    }

    /// When it is to be replaced: at half its life, give or take a tenth of that, so that many workloads started together
    /// do not renew together for ever.
    pub fn renew_at(&self) -> Instant {
        self.issued + self.renew_after
    }

    /// Whether it is to be replaced. The wall clock is asked as well, because the monotonic one stands still while a
    /// machine sleeps, and because a clock that was set back makes it one that is not valid yet.
    pub fn due(&self, now: u64) -> bool {
        Instant::now() >= self.renew_at()
            || now.saturating_add(ca::BACKDATE) < self.issued_wall
            || now.saturating_sub(self.issued_wall) > self.renew_after.as_secs().saturating_add(1)
    }
}

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
