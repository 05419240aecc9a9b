//! Judging a peer's certificate chain by today's bundles, and remembering those that verified.
//!
//! One [`Trust`] belongs to one generation of bundles and revocation lists and dies with it, and its memory with it. A
//! remembered chain saves the signature checks of the chain and nothing else: the dates, the key type and the use are
//! judged anew each time, and the peer's own signature over the handshake is never skipped.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::digest;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor, UnixTime};
use webpki::{CertRevocationList, EndEntityCert, RevocationOptionsBuilder};

use super::profile::Profile;
use super::reason::Reason;
use super::record::Failure;
use crate::clock::Clock;
use crate::identity::svid::{LeafFacts, MAX_CERT_BYTES, MAX_CHAIN, SvidError, Usage};
use crate::identity::{Authority, KeyType, SpiffeId, TrustBundles};

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
    anchors: BTreeMap<String, Vec<Anchor>>,
    profile: Arc<Profile>,
    clock: Clock,
    remembered: Mutex<lru::LruCache<[u8; 32], Arc<Peer>>>,
    hits: AtomicU64,
    misses: AtomicU64,
}

impl std::fmt::Debug for Trust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trust").field("domains", &self.anchors.len()).finish_non_exhaustive()
    }
}

impl Trust {
    /// A generation of its own for these bundles. Revocation lists were read when the bundles were made; one that
    /// cannot be read here would revoke nothing, so it is an error.
    ///
    /// # Errors
    /// Which revocation list cannot be read.
    pub fn new(bundles: Arc<TrustBundles>, profile: Arc<Profile>, clock: Clock) -> Result<Self, String> {
        let lists = bundles
            .crls()
            .iter()
            .enumerate()
            .map(|(index, der)| {
                let list = webpki::OwnedCertRevocationList::from_der(der)
                    .map_err(|e| format!("revocation list {index}: {e}"))?;
                Ok((der, Arc::new(CertRevocationList::Owned(list))))
            })
            .collect::<Result<Vec<_>, String>>()?;
        let anchors = bundles
            .iter()
            .map(|(domain, authorities)| {
                let anchors = authorities.iter().map(|authority| Anchor::new(authority, &lists, &profile)).collect();
                (domain.as_str().to_owned(), anchors)
            })
            .collect();
        Ok(Self {
            bundles,
            anchors,
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
        let anchors = self.anchors.get(domain).ok_or_else(|| {
            Failure::new(Reason::UnknownTrustDomain, format!("no bundle for the trust domain of {}", facts.id))
        })?;
        let (leaf, intermediates) = chain.split_first().ok_or_else(|| Failure::new(Reason::NoCertificate, ""))?;
        let end_entity = EndEntityCert::try_from(leaf)
            .map_err(|e| Failure::new(Reason::BadCertificate, format!("{}: {e}", facts.id)))?;
        let mut refusal = webpki::Error::UnknownIssuer;
        // One authority at a time, each with its own lists. webpki does not look at an anchor's own dates.
        for anchor in anchors.iter().filter(|a| a.valid.0 <= now.as_secs() && now.as_secs() <= a.valid.1) {
            let lists: Vec<&CertRevocationList<'_>> = anchor.lists.iter().map(|list| &**list).collect();
            // A list speaks only of what its issuer signed; certificates that no list covers are not thereby suspect.
            let revocation = RevocationOptionsBuilder::new(&lists)
                .ok()
                .map(|b| b.with_status_policy(webpki::UnknownStatusPolicy::Allow).build());
            let eku = match usage {
                Usage::Client => webpki::KeyUsage::client_auth(),
                Usage::Server => webpki::KeyUsage::server_auth(),
            };
            let only = std::slice::from_ref(&anchor.anchor);
            match end_entity.verify_for_usage(self.algorithms().all, only, intermediates, now, eku, revocation, None) {
                Ok(path) => {
                    let mut valid = (facts.not_before, facts.not_after);
                    let mut narrow = |(from, to): (u64, u64)| valid = (valid.0.max(from), valid.1.min(to));
                    narrow(anchor.valid);
                    for intermediate in path.intermediate_certificates() {
                        narrow(check_issuer(&intermediate.der(), domain)?);
                    }
                    return Ok(valid);
                }
                Err(error) if telling(&error) > telling(&refusal) => refusal = error,
                Err(_) => {}
            }
        }
        Err(failure_of(&refusal, &facts.id))
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, lru::LruCache<[u8; 32], Arc<Peer>>> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How much a refusal tells: little if it comes from an authority that did not issue the chain, or only a namesake.
fn telling(error: &webpki::Error) -> u8 {
    match error {
        webpki::Error::UnknownIssuer => 0,
        webpki::Error::InvalidSignatureForPublicKey => 1,
        _ => 2,
    }
}

/// One authority as an anchor, with the revocation lists that may speak of what it signed.
struct Anchor {
    anchor: TrustAnchor<'static>,
    /// Seconds since the Unix epoch, both ends included.
    valid: (u64, u64),
    lists: Vec<Arc<CertRevocationList<'static>>>,
}

impl Anchor {
    /// Authorities may share a name, one after a rotation for instance, and webpki finds a list by name alone. A list
    /// under this name that another key signed would make every peer of this authority look suspect, so it is not asked.
    fn new(
        authority: &Authority,
        lists: &[(&CertificateRevocationListDer<'static>, Arc<CertRevocationList<'static>>)],
        profile: &Profile,
    ) -> Self {
        let name = authority.anchor.subject.as_ref();
        let lists = lists
            .iter()
            .filter(|(der, list)| list.issuer() != name || signed_by(der, &authority.der, profile))
            .map(|(_, list)| Arc::clone(list))
            .collect();
        Self { anchor: authority.anchor.clone(), valid: (authority.not_before, authority.not_after), lists }
    }
}

/// Whether the key of a certificate signed a revocation list, by an algorithm of the profile.
fn signed_by(list: &[u8], authority: &[u8], profile: &Profile) -> bool {
    let Ok((_, list)) = x509_parser::parse_x509_crl(list) else { return false };
    let Ok((_, authority)) = x509_parser::parse_x509_certificate(authority) else { return false };
    let key = authority.public_key().subject_public_key.data.as_ref();
    let (message, signature) = (list.tbs_cert_list.as_ref(), list.signature_value.data.as_ref());
    profile.algorithms().all.iter().any(|algorithm| algorithm.verify_signature(key, message, signature).is_ok())
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
