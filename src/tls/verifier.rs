//! The certificate verifiers that rustls calls: identity is judged inside the handshake, so that a refused peer gets the
//! right alert and learns nothing else.
//!
//! rustls takes an error that stands for an alert; our own reason travels beside it in the [`Verdict`] of the handshake
//! that is being polled (see [`super::probe`]).

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use super::probe::{self, Verdict};
use super::reason::Reason;
use super::record::Failure;
use super::trust::{Peer, Trust};
use crate::identity::SpiffeId;
use crate::identity::svid::Usage;

/// Whom a verifier lets through once the chain is good.
pub(super) trait Admits: std::fmt::Debug + Send + Sync {
    /// # Errors
    /// The reason, with details for a log.
    fn admits(&self, peer: &SpiffeId) -> Result<(), Failure>;
}

/// Verifies clients or servers of one generation of trust.
#[derive(Debug)]
pub(super) struct PeerVerifier<A> {
    trust: Arc<Trust>,
    admits: A,
    usage: Usage,
    hints: Vec<DistinguishedName>,
}

impl<A: Admits> PeerVerifier<A> {
    pub(super) fn new(trust: Arc<Trust>, admits: A, usage: Usage) -> Self {
        Self { trust, admits, usage, hints: Vec::new() }
    }

    /// Everything that is judged of a peer apart from its signature: also asked after a resumed handshake.
    pub(super) fn judge(&self, chain: &[CertificateDer<'_>]) -> Result<Arc<Peer>, Failure> {
        let peer = self.trust.judge(chain, self.usage)?;
        self.admits.admits(peer.id())?;
        Ok(peer)
    }

    fn verify(&self, end_entity: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>]) -> Result<(), Error> {
        let mut chain = Vec::with_capacity(1 + intermediates.len());
        chain.push(CertificateDer::from(end_entity.as_ref()));
        chain.extend(intermediates.iter().map(|cert| CertificateDer::from(cert.as_ref())));
        let judged = self.trust.judge(&chain, self.usage).and_then(|peer| match self.admits.admits(peer.id()) {
            Ok(()) => Ok(peer),
            Err(failure) => {
                probe::note(|verdict| verdict.claimed = Some(peer));
                Err(failure)
            }
        });
        match judged {
            Ok(peer) => {
                probe::note(|verdict| verdict.peer = Some(peer));
                Ok(())
            }
            Err(failure) => {
                let error = Error::InvalidCertificate(alert_for(failure.reason));
                probe::note(|verdict| verdict.failure = Some(failure));
                Err(error)
            }
        }
    }

    fn signed(
        &self,
        valid: Result<HandshakeSignatureValid, Error>,
        scheme: SignatureScheme,
    ) -> Result<HandshakeSignatureValid, Error> {
        probe::note(|verdict: &mut Verdict| match &valid {
            Ok(_) => verdict.scheme = Some(scheme),
            Err(error) => verdict.failure = Some(Failure::new(Reason::BadSignature, error.to_string())),
        });
        valid
    }
}

/// The rustls error whose alert fits the reason (RFC 8446, section 6.2).
fn alert_for(reason: Reason) -> CertificateError {
    match reason {
        Reason::Expired => CertificateError::Expired,
        Reason::NotYetValid => CertificateError::NotValidYet,
        Reason::Untrusted | Reason::UnknownTrustDomain => CertificateError::UnknownIssuer,
        Reason::Revoked => CertificateError::Revoked,
        Reason::PeerKeyType | Reason::ChainSignature => CertificateError::InvalidPurpose,
        Reason::Denied | Reason::WrongPeer => CertificateError::ApplicationVerificationFailure,
        _ => CertificateError::BadEncoding,
    }
}

impl<A: Admits> ClientCertVerifier for PeerVerifier<A> {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // No hints: a stranger need not learn whom we trust, and clients pick their one SVID anyway.
        &self.hints
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let valid = rustls::crypto::verify_tls12_signature(message, cert, dss, &self.trust.algorithms());
        self.signed(valid, dss.scheme)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let valid = rustls::crypto::verify_tls13_signature(message, cert, dss, &self.trust.algorithms());
        self.signed(valid, dss.scheme)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.algorithms().supported_schemes()
    }
}

impl<A: Admits> ServerCertVerifier for PeerVerifier<A> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity, intermediates).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ClientCertVerifier::verify_tls12_signature(self, message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ClientCertVerifier::verify_tls13_signature(self, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.algorithms().supported_schemes()
    }
}
