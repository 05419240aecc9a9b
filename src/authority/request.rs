//! What an authority is asked for and with, what it answers, and what it cannot do.

use std::path::PathBuf;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::ca::{self, CaId};
use super::{SvidKey, ca_set};
use crate::identity::{SpiffeId, Svid, SvidError, TrustDomain};

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
            Self::TooManyCas => write!(f, "{} CAs are published, which is the limit", ca_set::MAX_CAS),
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
    pub(super) id: SpiffeId,
    pub(super) hint: Option<String>,
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: Zeroizing<Vec<u8>>,
    pub(super) ca: CaId,
    pub(super) not_after: u64,
    pub(super) issued_wall: u64,
    pub(super) issued: Instant,
    pub(super) renew_after: Duration,
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
