//! Why a handshake failed: a closed set, the same word in metric, log and admin.

use std::fmt;

macro_rules! reasons {
    ($( $(#[$doc:meta])* $name:ident = $word:literal, $advice:literal; )*) => {
        /// Why a handshake failed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason { $( $(#[$doc])* $name, )* }

        impl Reason {
            /// All of them, in the order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The word in metrics, logs and admin.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word,)* }
            }

            /// What an operator can do about it, one sentence.
            pub fn advice(self) -> &'static str {
                match self { $(Self::$name => $advice,)* }
            }
        }
    };
}

reasons! {
    /// The peer's certificate, or one above it, is past its end.
    Expired = "expired", "The peer's SVID was not rotated: look at its agent; compare the clocks of both machines.";
    /// The peer's certificate is not valid yet.
    NotYetValid = "not_yet_valid", "Compare the clocks of both machines.";
    /// The chain does not lead to an authority of the peer's trust domain.
    Untrusted = "untrusted", "The peer's authority is not in our bundle for its trust domain: has the bundle been rotated or federation been refreshed?";
    /// No bundle is known for the peer's trust domain.
    UnknownTrustDomain = "unknown_trust_domain", "Federate with the peer's trust domain, or refuse it on purpose.";
    /// A certificate of the chain is on a revocation list.
    Revoked = "revoked", "The certificate was withdrawn; the peer needs a new SVID.";
    /// The server's identity is none of the expected ones.
    WrongPeer = "wrong_peer", "The upstream answered with another SPIFFE ID than `expect` names: correct `expect` or the address.";
    /// The peer is who it says, and no rule admits it.
    Denied = "denied", "No rule admits this SPIFFE ID on this listener; `portcullis explain` shows why.";
    /// The client sent no certificate.
    NoCertificate = "no_certificate", "The client showed none: it speaks plain TLS, or its key is of a kind (RSA) that signs nothing we take. It must present an X509-SVID with an ECDSA key.";
    /// The certificate names no SPIFFE ID, several, or a malformed one.
    BadSpiffeId = "bad_spiffe_id", "The peer's certificate is not an X509-SVID: exactly one URI SAN, a well-formed SPIFFE ID with a path.";
    /// The certificate breaks another rule for leaf certificates.
    BadCertificate = "bad_certificate", "The peer's leaf certificate breaks the X509-SVID specification (CA flag, key usage) or cannot be read.";
    /// The peer's key is of a type that the profile does not allow.
    PeerKeyType = "peer_key_type", "The profile demands P-384 SVIDs: SPIRE 1.14 and later issue them with server `ca_key_type = \"ec-p384\"` and agent `workload_x509_svid_key_type = \"ec-p384\"`; or allow P-256 by `svid_keys: p256-allowed`.";
    /// A certificate of the chain is signed in a way that the profile does not allow.
    ChainSignature = "chain_signature", "The peer's authority signs with an algorithm outside the profile: issue from a P-384 authority, or allow P-256 by `svid_keys: p256-allowed`.";
    /// The signature of the handshake does not fit the certificate.
    BadSignature = "bad_signature", "The peer does not hold the key of the certificate it sent.";
    /// No cipher suite in common.
    NoSharedSuite = "no_shared_suite", "The peer offers none of the declared cipher suites.";
    /// No TLS version in common.
    NoSharedVersion = "no_shared_version", "The peer cannot speak TLS 1.3; `legacy_tls12: true` on this listener would allow TLS 1.2 with the one suite of the profile.";
    /// No key exchange group in common.
    NoSharedGroup = "no_shared_group", "The peer offers none of the declared groups.";
    /// No signature scheme in common.
    NoSharedSignature = "no_shared_signature", "The peer accepts no signature that our key can make.";
    /// The peer lacks the extended master secret in TLS 1.2.
    NoExtendedMasterSecret = "no_extended_master_secret", "The peer's TLS 1.2 is too old (RFC 7627 is missing).";
    /// The ClientHello is larger than any real one.
    HelloTooLarge = "hello_too_large", "The ClientHello exceeds the bound; no known TLS library sends one of that size.";
    /// The first bytes are not TLS.
    NotTls = "not_tls", "Something speaks plaintext to an mTLS port.";
    /// TLS, but broken.
    Protocol = "protocol_error", "The peer broke the TLS protocol.";
    /// The peer sent an alert. Which one is in the log.
    PeerAlert = "peer_alert", "The peer refused us: its log knows why.";
    /// The peer closed before the handshake was done.
    PeerClosed = "peer_closed", "The peer closed or reset the connection during the handshake.";
    /// The overall deadline passed.
    Timeout = "timeout", "The peer was silent or too slow.";
    /// Too many handshakes were under way.
    Overloaded = "overloaded", "More handshakes at once than `tls.max_handshakes` allows.";
    /// We have no identity to show.
    NoIdentity = "no_identity", "Our own SVID is absent or expired: look at the identity source.";
    /// Reading or writing failed in another way.
    Io = "io_error", "The network failed; the log has the system's own words.";
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl serde::Serialize for Reason {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}
