//! The client's side: one prebuilt configuration for each upstream, and the handshake with it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::ClientConfig;
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::pki_types::ServerName;
use rustls::sign::CertifiedKey;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio_rustls::TlsConnector;

use super::alpn::Offer;
use super::outcome::{Attempt, Authenticated, Terms, conclude};
use super::profile::Profile;
use super::reason::Reason;
use super::record::{Direction, Failure, HandshakeRecord};
use super::sessions::Sessions;
use super::trust::Trust;
use super::verifier::{Admits, PeerVerifier};
use crate::clock::Clock;
use crate::identity::svid::Usage;
use crate::identity::{Identity, SpiffeId};
use crate::policy::Expected;

/// Everything that an upstream's handshakes borrow: built once for a generation of identity and trust.
///
/// The store of tickets belongs to it: nothing kept for one upstream is ever offered to another, and all of it goes
/// with the generation.
#[derive(Debug)]
pub struct ClientTls {
    /// One for each [`Offer`]; they share the store of tickets.
    configs: [Arc<ClientConfig>; Offer::ALL.len()],
    verifier: Arc<PeerVerifier<ByExpectation>>,
    identity: Arc<Identity>,
    profile: Arc<Profile>,
    legacy_tls12: bool,
}

#[derive(Debug)]
struct ByExpectation(Arc<Expected>);

impl Admits for ByExpectation {
    fn admits(&self, peer: &SpiffeId) -> Result<(), Failure> {
        if self.0.contains(peer) {
            return Ok(());
        }
        Err(Failure::new(Reason::WrongPeer, format!("the upstream is {peer}, expected {}", self.0)))
    }
}

#[derive(Debug)]
struct OwnSvid(Arc<CertifiedKey>);

impl ResolvesClientCert for OwnSvid {
    fn resolve(&self, _: &[&[u8]], schemes: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.key.choose_scheme(schemes).is_some().then(|| Arc::clone(&self.0))
    }
    fn has_certs(&self) -> bool {
        true
    }
}

impl ClientTls {
    /// Builds the configuration of one upstream.
    ///
    /// # Errors
    /// The profile cannot be had from the provider.
    pub fn new(
        profile: &Arc<Profile>,
        identity: &Arc<Identity>,
        trust: &Arc<Trust>,
        expected: &Arc<Expected>,
        clock: &Clock,
        legacy_tls12: bool,
    ) -> Result<Self, rustls::Error> {
        let verifier =
            Arc::new(PeerVerifier::new(Arc::clone(trust), ByExpectation(Arc::clone(expected)), Usage::Server));
        let mut config = ClientConfig::builder_with_details(profile.provider(legacy_tls12), clock.provider())
            .with_protocol_versions(Profile::versions(legacy_tls12))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&verifier) as _)
            .with_client_cert_resolver(Arc::new(OwnSvid(identity.svid.certified_key())));
        config.require_ems = true;
        config.enable_early_data = false;
        config.resumption = if profile.resumption {
            Resumption::store(Arc::new(Sessions::new(clock.clone())))
        } else {
            Resumption::disabled()
        };
        let configs = Offer::ALL.map(|offer| {
            let mut config = config.clone();
            config.alpn_protocols = offer.protocols();
            Arc::new(config)
        });
        Ok(Self { configs, verifier, identity: Arc::clone(identity), profile: Arc::clone(profile), legacy_tls12 })
    }

    fn config(&self, offer: Offer) -> &Arc<ClientConfig> {
        let [nothing, http1, http2, tunnel] = &self.configs;
        match offer {
            Offer::Nothing => nothing,
            Offer::Http1 => http1,
            Offer::Http2 => http2,
            Offer::Tunnel => tunnel,
        }
    }

    /// Our own identity that these handshakes show.
    pub fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }
}

/// Performs the handshake with an upstream that has just been connected to; `offer` is what we can speak inside.
///
/// # Errors
/// None of its own: a refusal is a record without a connection.
pub async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    name: ServerName<'static>,
    tls: Arc<ClientTls>,
    offer: Offer,
    slots: &Semaphore,
    deadline: Instant,
) -> (HandshakeRecord, Option<Authenticated<S>>) {
    let deadline = tokio::time::Instant::from_std(deadline);
    let attempt = Attempt { direction: Direction::Outbound, began: Instant::now(), offered_weak: Vec::new() };
    let _slot = match tokio::time::timeout_at(deadline, slots.acquire()).await {
        Ok(Ok(slot)) => slot,
        _ => {
            let failure = Failure::new(Reason::Overloaded, "no place among the handshakes under way");
            return (attempt.record(Duration::ZERO, None, Err(failure)), None);
        }
    };
    let handshake = TlsConnector::from(Arc::clone(tls.config(offer))).connect(name, stream);
    let terms = Terms { verifier: &tls.verifier, profile: &tls.profile, legacy_tls12: tls.legacy_tls12 };
    conclude(attempt, handshake, Duration::ZERO, deadline, terms).await
}
