//! What a handshake comes to: an [`Authenticated`] connection or a refusal, and the record that both leave.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::{AlertDescription, Error, HandshakeKind, PeerIncompatible};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use super::probe::Verdict;
use super::profile::{self, Profile};
use super::read_ahead::ReadAhead;
use super::reason::Reason;
use super::record::{Direction, Failure, HandshakeRecord, Negotiated};
use super::trust::Peer;
use crate::identity::SpiffeId;

/// A connection whose peer has proven its identity. Only this room makes one.
#[derive(Debug)]
pub struct Authenticated<S = ReadAhead<TcpStream>> {
    stream: TlsStream<S>,
    peer: Arc<Peer>,
    negotiated: Negotiated,
}

impl<S> Authenticated<S> {
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

/// Reads what was negotiated off a finished connection.
pub(super) fn negotiated(
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
