//! Judging a peer's certificate chain by today's bundles, and remembering those that verified.
//!
//! One [`Trust`] belongs to one generation of bundles and revocation lists and dies with it, and its memory with it. A
//! remembered chain saves the signature checks of the chain and nothing else: the dates, the key type and the use are
//! judged anew each time, and the peer's own signature over the handshake is never skipped.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::digest;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use webpki::{CertRevocationList, EndEntityCert, RevocationOptionsBuilder};

use super::profile::Profile;
use super::reason::Reason;
use super::record::Failure;
use crate::clock::Clock;
use crate::identity::svid::{LeafFacts, MAX_CERT_BYTES, MAX_CHAIN, SvidError, Usage};
use crate::identity::{KeyType, SpiffeId, TrustBundles};

/// How many chains are remembered.
const REMEMBERED: NonZeroUsize = NonZeroUsize::MIN.saturating_add(2047);

/// A peer whose chain verified: what later judgements need, shared by all its connections.
#[derive(Debug)]
pub struct Peer {
    facts: LeafFacts,
    chain: Box<[CertificateDer<'static>]>,
    /// The narrowest validity of the chain and its anchor, seconds since the Unix epoch, both ends included.
    valid: (u64, u64),
}

impl Peer {
    /// Its SPIFFE ID.
    pub fn id(&self) -> &SpiffeId {
        &self.facts.id
    }

    /// Its key.
    pub fn key_type(&self) -> KeyType {
        self.facts.key_type
    }

    /// The leaf's serial number in hexadecimal.
    pub fn serial(&self) -> &str {
        &self.facts.serial
    }

    /// The earliest end in the chain, seconds since the Unix epoch.
    pub fn not_after(&self) -> u64 {
        self.valid.1
    }

    /// The chain as presented, leaf first (DER).
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }
}

/// One generation of trust: bundles, revocation lists and the memory that belongs to them.
pub struct Trust {
    bundles: Arc<TrustBundles>,
    crls: Vec<CertRevocationList<'static>>,
    profile: Arc<Profile>,
    clock: Clock,
    remembered: Mutex<lru::LruCache<[u8; 32], Arc<Peer>>>,
    hits: AtomicU64,
    misses: AtomicU64,
}

impl std::fmt::Debug for Trust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trust").field("crls", &self.crls.len()).finish_non_exhaustive()
    }
}

impl Trust {
    /// A generation of its own for these bundles. Revocation lists were read when the bundles were made; one that
    /// cannot be read here would revoke nothing, so it is an error.
    ///
    /// # Errors
    /// Which revocation list cannot be read.
    pub fn new(bundles: Arc<TrustBundles>, profile: Arc<Profile>, clock: Clock) -> Result<Self, String> {
        let crls = bundles
            .crls()
            .iter()
            .enumerate()
            .map(|(index, der)| {
                webpki::OwnedCertRevocationList::from_der(der)
                    .map(CertRevocationList::Owned)
                    .map_err(|e| format!("revocation list {index}: {e}"))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            bundles,
            crls,
            profile,
            clock,
            remembered: Mutex::new(lru::LruCache::new(REMEMBERED)),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        })
    }

    /// The bundles of this generation.
    pub fn bundles(&self) -> &Arc<TrustBundles> {
        &self.bundles
    }

    /// How often a chain was remembered and how often not.
    pub fn memory_counts(&self) -> (u64, u64) {
        (self.hits.load(Ordering::Relaxed), self.misses.load(Ordering::Relaxed))
    }

    pub(super) fn algorithms(&self) -> WebPkiSupportedAlgorithms {
        self.profile.algorithms()
    }

    /// Judges a chain (leaf first) for one use, now.
    ///
    /// # Errors
    /// The reason, with details for a log.
    pub fn judge(&self, chain: &[CertificateDer<'_>], usage: Usage) -> Result<Arc<Peer>, Failure> {
        self.judge_at(chain, usage, self.clock.now())
    }

    /// Judges a chain as of another moment, seconds since the Unix epoch: for live connections that may outlast their
    /// peer's SVID.
    ///
    /// # Errors
    /// The reason, with details for a log.
    pub fn judge_at(&self, chain: &[CertificateDer<'_>], usage: Usage, at: u64) -> Result<Arc<Peer>, Failure> {
        if chain.len() > MAX_CHAIN || chain.iter().any(|cert| cert.len() > MAX_CERT_BYTES) {
            return Err(Failure::new(Reason::BadCertificate, "the chain is too long"));
        }
        let Some(leaf) = chain.first() else { return Err(Failure::new(Reason::NoCertificate, "")) };
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(at));
        let key = digest_of(chain, usage);
        let remembered = self.memory().get(&key).cloned();
        if let Some(peer) = remembered {
            within(peer.valid, now.as_secs(), "a certificate of the chain")?;
            self.hits.fetch_add(1, Ordering::Relaxed);
            return Ok(peer);
        }
        self.misses.fetch_add(1, Ordering::Relaxed);
        let facts = LeafFacts::read(leaf).map_err(|why| {
            let reason = match why {
                SvidError::NoUriSan | SvidError::SeveralUriSans(_) | SvidError::BadSpiffeId(_) => Reason::BadSpiffeId,
                _ => Reason::BadCertificate,
            };
            Failure::new(reason, why.to_string())
        })?;
        if !self.profile.allows_key(facts.key_type) {
            return Err(Failure::new(
                Reason::PeerKeyType,
                format!("{} has a key of type {}. {}", facts.id, facts.key_type.as_str(), Reason::PeerKeyType.advice()),
            ));
        }
        if !facts.may_be(usage) {
            return Err(Failure::new(Reason::BadCertificate, SvidError::WrongExtendedUsage.to_string()));
        }
        within((facts.not_before, facts.not_after), now.as_secs(), facts.id.as_str())?;
        let valid = self.verify(chain, &facts, usage, now)?;
        let peer = Arc::new(Peer { facts, chain: chain.iter().map(|cert| cert.clone().into_owned()).collect(), valid });
        self.memory().put(key, Arc::clone(&peer));
        Ok(peer)
    }

    /// Builds the path to an authority of the leaf's own trust domain. Answers the narrowest validity in it.
    fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        facts: &LeafFacts,
        usage: Usage,
        now: UnixTime,
    ) -> Result<(u64, u64), Failure> {
        let domain = facts.id.trust_domain_name();
        let authorities = self.bundles.authorities(domain).ok_or_else(|| {
            Failure::new(Reason::UnknownTrustDomain, format!("no bundle for the trust domain of {}", facts.id))
        })?;
        // webpki does not look at an anchor's own dates.
        let current: Vec<_> =
            authorities.iter().filter(|a| a.not_before <= now.as_secs() && now.as_secs() <= a.not_after).collect();
        let anchors: Vec<TrustAnchor<'_>> = current.iter().map(|a| a.anchor.clone()).collect();
        let (leaf, intermediates) = chain.split_first().ok_or_else(|| Failure::new(Reason::NoCertificate, ""))?;
        let end_entity = EndEntityCert::try_from(leaf)
            .map_err(|e| Failure::new(Reason::BadCertificate, format!("{}: {e}", facts.id)))?;
        let lists: Vec<&CertRevocationList<'_>> = self.crls.iter().collect();
        // A list speaks only of what its issuer signed; certificates that no list covers are not thereby suspect.
        let revocation = RevocationOptionsBuilder::new(&lists)
            .ok()
            .map(|b| b.with_status_policy(webpki::UnknownStatusPolicy::Allow).build());
        let eku = match usage {
            Usage::Client => webpki::KeyUsage::client_auth(),
            Usage::Server => webpki::KeyUsage::server_auth(),
        };
        let path = end_entity
            .verify_for_usage(self.algorithms().all, &anchors, intermediates, now, eku, revocation, None)
            .map_err(|error| failure_of(&error, &facts.id))?;
        let mut valid = (facts.not_before, facts.not_after);
        let mut narrow = |(from, to): (u64, u64)| valid = (valid.0.max(from), valid.1.min(to));
        for intermediate in path.intermediate_certificates() {
            narrow(check_issuer(&intermediate.der(), domain)?);
        }
        let anchor = path.anchor();
        // A renewed authority keeps name and key: any of its certificates is an anchor until its own end.
        let anchored = current
            .iter()
            .filter(|a| {
                a.anchor.subject == anchor.subject && a.anchor.subject_public_key_info == anchor.subject_public_key_info
            })
            .map(|a| (a.not_before, a.not_after))
            .max_by_key(|(_, not_after)| *not_after);
        // The anchor came out of this very list; were it not so, nothing would be remembered past this second.
        narrow(anchored.unwrap_or((now.as_secs(), now.as_secs())));
        Ok(valid)
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, lru::LruCache<[u8; 32], Arc<Peer>>> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// X509-SVID specification, section 4: a signing certificate may sign certificates, and if it names a SPIFFE ID, that is
/// one of the same trust domain.
fn check_issuer(der: &CertificateDer<'_>, domain: &str) -> Result<(u64, u64), Failure> {
    let bad = |why: String| Failure::new(Reason::Untrusted, why);
    let (_, cert) = x509_parser::parse_x509_certificate(der).map_err(|e| bad(format!("an intermediate: {e}")))?;
    if let Ok(Some(usage)) = cert.key_usage()
        && !usage.value.key_cert_sign()
    {
        return Err(bad("an intermediate may not sign certificates (keyUsage)".into()));
    }
    if let Ok(Some(names)) = cert.subject_alternative_name() {
        for name in &names.value.general_names {
            if let x509_parser::extensions::GeneralName::URI(uri) = name
                && SpiffeId::parse(uri).is_ok_and(|id| id.trust_domain_name() != domain)
            {
                return Err(bad(format!("an intermediate belongs to another trust domain than {domain}")));
            }
        }
    }
    Ok(crate::identity::svid::validity_of(&cert))
}

fn within((from, to): (u64, u64), now: u64, what: &str) -> Result<(), Failure> {
    if now > to {
        return Err(Failure::new(Reason::Expired, format!("{what} expired {} s ago", now - to)));
    }
    if now < from {
        return Err(Failure::new(Reason::NotYetValid, format!("{what} is not valid for another {} s", from - now)));
    }
    Ok(())
}

fn failure_of(error: &webpki::Error, id: &SpiffeId) -> Failure {
    use webpki::Error as E;
    let reason = match error {
        E::CertExpired { .. } => Reason::Expired,
        E::CertNotValidYet { .. } => Reason::NotYetValid,
        E::CertRevoked => Reason::Revoked,
        E::UnsupportedSignatureAlgorithmContext(_) | E::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => {
            Reason::ChainSignature
        }
        E::UnknownIssuer
        | E::InvalidSignatureForPublicKey
        | E::UnknownRevocationStatus
        | E::MaximumPathDepthExceeded
        | E::MaximumPathBuildCallsExceeded
        | E::MaximumSignatureChecksExceeded
        | E::PathLenConstraintViolated
        | E::NameConstraintViolation
        | E::EndEntityUsedAsCa => Reason::Untrusted,
        _ => Reason::BadCertificate,
    };
    Failure::new(reason, format!("{id}: {error}"))
}

/// A digest over the use and the whole chain with its lengths, so that no two chains share one.
fn digest_of(chain: &[CertificateDer<'_>], usage: Usage) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(&[match usage {
        Usage::Client => 1,
        Usage::Server => 2,
    }]);
    for cert in chain {
        context.update(&(cert.len() as u64).to_be_bytes());
        context.update(cert);
    }
    let mut key = [0; 32];
    key.copy_from_slice(context.finish().as_ref());
    key
}
