//! The server's side: prebuilt configurations, and the handshake with whoever connected.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::server::{Accepted, Acceptor, ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, Error, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio_rustls::StartHandshake;

use super::outcome::{Attempt, Authenticated, Terms, conclude, failure_of, failure_of_tls};
use super::profile::Profile;
use super::reason::Reason;
use super::record::{Direction, Failure, HandshakeRecord};
use super::tickets::GenerationTicketer;
use super::trust::Trust;
use super::verifier::{Admits, PeerVerifier};
use super::{alpn, hello};
use crate::clock::Clock;
use crate::identity::svid::Usage;
use crate::identity::{Identity, SpiffeId};
use crate::policy::ListenerPolicy;

/// Everything that a listener's handshakes borrow: built once for a generation of identity, trust and policy.
#[derive(Debug)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    /// For clients that offer only protocols which we carry without knowing them.
    opaque: Arc<ServerConfig>,
    serves: Serves,
    verifier: Arc<PeerVerifier<ByPolicy>>,
    identity: Arc<Identity>,
    profile: Arc<Profile>,
    legacy_tls12: bool,
}

/// What a listener speaks inside TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serves {
    /// Bytes: no protocol is named.
    Bytes,
    /// HTTP and nothing else.
    Http,
    /// HTTP, and bytes for clients that ask for something else.
    Any,
}

/// What a listener's clients may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepts {
    /// Inside TLS.
    pub serves: Serves,
    /// TLS 1.2 as well.
    pub legacy_tls12: bool,
}

#[derive(Debug)]
struct ByPolicy(Arc<ListenerPolicy>);

impl Admits for ByPolicy {
    fn admits(&self, peer: &SpiffeId) -> Result<(), Failure> {
        // What is carried inside may still have to be admitted one by one.
        let decision = self.0.door(peer);
        if decision.admits() {
            return Ok(());
        }
        Err(Failure::new(Reason::Denied, format!("{peer} (rule {})", decision.rule)))
    }
}

/// Our one certificate, whatever name was asked for.
#[derive(Debug)]
struct OwnSvid(Arc<CertifiedKey>);

impl ResolvesServerCert for OwnSvid {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

impl ServerTls {
    /// Builds the configuration of one listener. `generation` is sealed into its tickets.
    ///
    /// # Errors
    /// The profile cannot be had from the provider, or the system gave no random bytes.
    pub fn new(
        profile: &Arc<Profile>,
        identity: &Arc<Identity>,
        trust: &Arc<Trust>,
        policy: &Arc<ListenerPolicy>,
        clock: &Clock,
        accepts: Accepts,
        generation: u64,
    ) -> Result<Self, rustls::Error> {
        let Accepts { serves, legacy_tls12 } = accepts;
        let verifier = Arc::new(PeerVerifier::new(Arc::clone(trust), ByPolicy(Arc::clone(policy)), Usage::Client));
        let mut config = ServerConfig::builder_with_details(profile.provider(legacy_tls12), clock.provider())
            .with_protocol_versions(Profile::versions(legacy_tls12))?
            .with_client_cert_verifier(Arc::clone(&verifier) as _)
            .with_cert_resolver(Arc::new(OwnSvid(identity.svid.certified_key())));
        config.require_ems = true;
        config.max_early_data_size = 0;
        // Stateless tickets only: what is sealed carries its generation, what is stored would not.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        if profile.resumption {
            config.ticketer = Arc::new(GenerationTicketer::new(generation, clock.clone())?);
            // Each resumption brings a new one, so one connection's ticket is enough for the next; a second costs
            // both sides some microseconds on every handshake.
            config.send_tls13_tickets = 1;
        } else {
            config.send_tls13_tickets = 0;
        }
        let opaque = Arc::new(config.clone());
        if serves != Serves::Bytes {
            config.alpn_protocols = alpn::served();
        }
        Ok(Self {
            config: Arc::new(config),
            opaque,
            serves,
            verifier,
            identity: Arc::clone(identity),
            profile: Arc::clone(profile),
            legacy_tls12,
        })
    }

    /// The configuration for a client that has offered these protocols.
    fn config_for(&self, hello: &ClientHello<'_>) -> &Arc<ServerConfig> {
        let strange = self.serves == Serves::Any && hello.alpn().is_some_and(|offered| !alpn::shared(offered));
        if strange { &self.opaque } else { &self.config }
    }

    /// Our own identity that these handshakes show.
    pub fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }
}

/// Performs the handshake with a client. `deadline` bounds everything from the first wait on. The ClientHello is read
/// before a place among the `slots` is asked for, so that silent clients hold none.
///
/// # Errors
/// The record of the refusal; the client has been sent the fitting alert, if TLS had begun.
pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    tls: Arc<ServerTls>,
    slots: &Semaphore,
    deadline: Instant,
) -> (HandshakeRecord, Option<Authenticated<S>>) {
    let deadline = tokio::time::Instant::from_std(deadline);
    let mut attempt = Attempt { direction: Direction::Inbound, began: Instant::now(), offered_weak: Vec::new() };
    let mut stream = stream;
    // What the first flight holds besides the hello waits in the socket: only whole hellos are read here.
    let read = tokio::time::timeout_at(deadline, read_hello(&mut stream, &mut attempt)).await;
    let (accepted, reading) = match read {
        Ok(Ok(read)) => read,
        Ok(Err(failure)) => return (attempt.record(Duration::ZERO, None, Err(failure)), None),
        Err(_) => {
            let failure = Failure::new(Reason::Timeout, "the ClientHello did not arrive in time");
            return (attempt.record(Duration::ZERO, None, Err(failure)), None);
        }
    };
    let _slot = match tokio::time::timeout_at(deadline, slots.acquire()).await {
        Ok(Ok(slot)) => slot,
        _ => {
            let failure = Failure::new(Reason::Overloaded, "no place among the handshakes under way");
            return (attempt.record(reading, None, Err(failure)), None);
        }
    };
    let config = Arc::clone(tls.config_for(&accepted.client_hello()));
    let handshake = StartHandshake::from_parts(accepted, stream).into_stream(config);
    let terms = Terms { verifier: &tls.verifier, profile: &tls.profile, legacy_tls12: tls.legacy_tls12 };
    conclude(attempt, handshake, reading, deadline, terms).await
}

/// Reads until the ClientHello is whole. The clock of the attempt begins with the first byte.
async fn read_hello<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    attempt: &mut Attempt,
) -> Result<(Accepted, Duration), Failure> {
    let io_failure = |error: io::Error| failure_of(&error, Default::default(), Direction::Inbound);
    let mut acceptor = Acceptor::default();
    let mut seen = Vec::new();
    let mut computing = Duration::ZERO;
    loop {
        let mut buffer = [0; 2048];
        let count = stream.read(&mut buffer).await.map_err(io_failure)?;
        let began = Instant::now();
        if seen.is_empty() {
            attempt.began = began;
        }
        if count == 0 {
            return Err(Failure::new(Reason::PeerClosed, format!("after {} bytes", seen.len())));
        }
        let fresh = buffer.get(..count).unwrap_or_default();
        seen.extend_from_slice(fresh);
        if !hello::looks_like_tls(&seen) {
            let first: Vec<u8> = seen.iter().copied().take(16).collect();
            return Err(Failure::new(Reason::NotTls, format!("first bytes: {}", first.escape_ascii())));
        }
        let mut rest = fresh;
        while !rest.is_empty() {
            acceptor.read_tls(&mut rest).map_err(io_failure)?;
        }
        let accepted = acceptor.accept();
        computing += began.elapsed();
        match accepted {
            Ok(Some(accepted)) => {
                attempt.offered_weak = hello::offered_weak(&seen);
                return Ok((accepted, computing));
            }
            Ok(None) if seen.len() > hello::MAX_HELLO_BYTES => {
                return Err(Failure::new(Reason::HelloTooLarge, format!("more than {} bytes", hello::MAX_HELLO_BYTES)));
            }
            Ok(None) => {}
            Err((error, mut alert)) => {
                // What an old client offers is worth knowing most of all, and it is refused here.
                attempt.offered_weak = hello::offered_weak(&seen);
                // The library misses the extensions of TLS 1.2 before it looks at the version.
                if hello::is_too_old(&seen) {
                    let _ = stream.write_all(&hello::alert(AlertDescription::ProtocolVersion)).await;
                    return Err(Failure::new(Reason::NoSharedVersion, "the ClientHello is of TLS 1.1 or older"));
                }
                let mut bytes = Vec::new();
                if alert.write_all(&mut bytes).is_err() || bytes.is_empty() {
                    // It prepares one only for what is wrong inside a ClientHello.
                    bytes = hello::alert(match error {
                        Error::InappropriateMessage { .. } | Error::InappropriateHandshakeMessage { .. } => {
                            AlertDescription::UnexpectedMessage
                        }
                        _ => AlertDescription::DecodeError,
                    })
                    .to_vec();
                }
                let _ = stream.write_all(&bytes).await;
                return Err(failure_of_tls(&error, Direction::Inbound));
            }
        }
    }
}
