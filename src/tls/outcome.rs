//! What a handshake comes to: an [`Authenticated`] connection or a refusal, and the record that both leave.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::{AlertDescription, Error, HandshakeKind, PeerIncompatible};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use super::alpn::Alpn;
use super::probe::{Probe, Verdict};
use super::profile::{self, Profile};
use super::read_ahead::ReadAhead;
use super::reason::Reason;
use super::record::{Direction, Failure, HandshakeRecord, Negotiated};
use super::trust::Peer;
use super::verifier::{Admits, PeerVerifier};
use crate::identity::SpiffeId;

/// A connection whose peer has proven its identity. Only this room makes one.
#[derive(Debug)]
pub struct Authenticated<S = ReadAhead<TcpStream>> {
    stream: TlsStream<S>,
    peer: Arc<Peer>,
    negotiated: Negotiated,
}

impl<S> Authenticated<S> {
    #[cfg(test)]
    pub(super) fn new(stream: TlsStream<S>, peer: Arc<Peer>, negotiated: Negotiated) -> Self {
        Self { stream, peer, negotiated }
    }

    /// The peer.
    pub fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// What was negotiated.
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// What is spoken on it.
    pub fn alpn(&self) -> Alpn {
        Alpn::of(self.stream.get_ref().1.alpn_protocol())
    }

    /// The bytes. Only an admitted connection gives them away: see `policy::Admitted`.
    pub(crate) fn into_stream(self) -> TlsStream<S> {
        self.stream
    }
}

impl<S> crate::policy::Subject for Authenticated<S> {
    fn spiffe_id(&self) -> &SpiffeId {
        self.peer.id()
    }
}

/// A handshake under way: begun at its first byte.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) direction: Direction,
    pub(super) began: Instant,
    pub(super) offered_weak: Vec<&'static str>,
}

impl Attempt {
    pub(super) fn record(
        self,
        computing: Duration,
        peer: Option<SpiffeId>,
        outcome: Result<Negotiated, Failure>,
    ) -> HandshakeRecord {
        let (negotiated, failure) = match outcome {
            Ok(negotiated) => (Some(negotiated), None),
            Err(failure) => (None, Some(failure)),
        };
        HandshakeRecord {
            direction: self.direction,
            took: self.began.elapsed(),
            computing,
            negotiated,
            peer,
            claimed: None,
            failure,
            offered_weak: self.offered_weak,
        }
    }
}

/// What a handshake is held against, besides what the library checks.
pub(super) struct Terms<'a, A> {
    pub(super) verifier: &'a PeerVerifier<A>,
    pub(super) profile: &'a Profile,
    pub(super) legacy_tls12: bool,
}

/// Drives a handshake to its end under watch, and makes the record of it. `before` is what it has computed already.
pub(super) async fn conclude<S, T, A>(
    attempt: Attempt,
    handshake: impl Future<Output = io::Result<T>> + Unpin,
    before: Duration,
    deadline: tokio::time::Instant,
    terms: Terms<'_, A>,
) -> (HandshakeRecord, Option<Authenticated<S>>)
where
    T: Into<TlsStream<S>>,
    A: Admits,
{
    let mut probe = Probe::new(handshake);
    let outcome = tokio::time::timeout_at(deadline, &mut probe).await;
    let (verdict, computing) = probe.finish();
    let computing = before + computing;
    let stream: TlsStream<S> = match outcome {
        Ok(Ok(stream)) => stream.into(),
        Ok(Err(error)) => {
            // Proven is who has signed; whoever was refused by name had only shown a certificate.
            let peer = verdict.peer.as_ref().filter(|_| verdict.scheme.is_some()).map(|peer| peer.id().clone());
            let claimed = verdict.claimed.as_ref().map(|peer| peer.id().clone());
            let failure = failure_of(&error, verdict, attempt.direction);
            return (HandshakeRecord { claimed, ..attempt.record(computing, peer, Err(failure)) }, None);
        }
        Err(_) => {
            let failure = Failure::new(Reason::Timeout, "the handshake did not finish in time");
            return (attempt.record(computing, None, Err(failure)), None);
        }
    };
    let connection = stream.get_ref().1;
    let judged = match &verdict.peer {
        Some(peer) => Ok(Arc::clone(peer)),
        // A resumed handshake asked no verifier: the chain of the first one is judged again, today.
        None => terms.verifier.judge(connection.peer_certificates().unwrap_or_default()),
    };
    match judged {
        Ok(peer) => {
            let negotiated = negotiated(connection, &verdict, &peer, terms.profile, terms.legacy_tls12);
            let record = attempt.record(computing, Some(peer.id().clone()), Ok(negotiated));
            (record, Some(Authenticated { stream, peer, negotiated }))
        }
        Err(failure) => (attempt.record(computing, None, Err(failure)), None),
    }
}

/// Reads what was negotiated off a finished connection.
fn negotiated(
    connection: &rustls::CommonState,
    verdict: &Verdict,
    peer: &Peer,
    profile: &Profile,
    legacy_tls12: bool,
) -> Negotiated {
    let mut negotiated = Negotiated {
        version: profile::version_name(connection.protocol_version()),
        cipher_suite: profile::suite_name(connection.negotiated_cipher_suite().map(|suite| suite.suite())),
        group: profile::group_name(connection.negotiated_key_exchange_group().map(|group| group.name())),
        signature: profile::scheme_name(verdict.scheme),
        peer_key: peer.key_type(),
        resumed: connection.handshake_kind() == Some(HandshakeKind::Resumed),
        compliant: false,
    };
    negotiated.compliant = profile.is_compliant(legacy_tls12, &negotiated);
    negotiated
}

/// The reason behind an error of the handshake. What the verifier noted comes first: it knows best.
pub(super) fn failure_of(error: &io::Error, verdict: Verdict, we_are: Direction) -> Failure {
    if let Some(failure) = verdict.failure {
        return failure;
    }
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(error) => failure_of_tls(error, we_are),
        None => match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionAborted => Failure::new(Reason::PeerClosed, error.to_string()),
            _ => Failure::new(Reason::Io, error.to_string()),
        },
    }
}

/// The reason behind a rustls error.
pub(super) fn failure_of_tls(error: &Error, we_are: Direction) -> Failure {
    use PeerIncompatible as P;
    let reason = match error {
        Error::NoCertificatesPresented => Reason::NoCertificate,
        Error::PeerIncompatible(why) => match why {
            P::NoCipherSuitesInCommon => Reason::NoSharedSuite,
            P::NoKxGroupsInCommon | P::NamedGroupsExtensionRequired | P::KeyShareExtensionRequired => {
                Reason::NoSharedGroup
            }
            P::NoSignatureSchemesInCommon
            | P::NoCertificateRequestSignatureSchemesInCommon
            | P::SignatureAlgorithmsExtensionRequired => Reason::NoSharedSignature,
            P::ExtendedMasterSecretExtensionRequired => Reason::NoExtendedMasterSecret,
            P::Tls12NotOffered
            | P::Tls12NotOfferedOrEnabled
            | P::ServerDoesNotSupportTls12Or13
            | P::ServerTlsVersionIsDisabledByOurConfig
            | P::SupportedVersionsExtensionRequired => Reason::NoSharedVersion,
            _ => Reason::Protocol,
        },
        // A server that shares nothing with us says so only by alert; we offer one version, so the alert names the cause.
        Error::AlertReceived(AlertDescription::ProtocolVersion) => Reason::NoSharedVersion,
        Error::InvalidMessage(
            rustls::InvalidMessage::InvalidContentType | rustls::InvalidMessage::UnknownProtocolVersion,
        ) if we_are == Direction::Outbound => Reason::NotTls,
        Error::AlertReceived(_) => Reason::PeerAlert,
        Error::InvalidCertificate(_) => Reason::BadCertificate,
        _ => Reason::Protocol,
    };
    Failure::new(reason, error.to_string())
}
