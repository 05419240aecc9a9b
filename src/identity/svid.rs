//! X509-SVIDs: what a certificate must be before anything is proved with it.
//!
//! [`LeafFacts::read`] holds a certificate against the X509-SVID specification; it does not look at signatures, which
//! is the verifier's work (`tls::verifier`). [`Svid`] is our own one: chain and private key, checked to belong together.

use std::sync::Arc;

use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, ParsedExtension};

use super::{SpiffeId, SpiffeIdError};

/// The most certificates that a chain may have, leaf and intermediates together.
pub const MAX_CHAIN: usize = 6;
/// The largest certificate that is read, in bytes.
pub const MAX_CERT_BYTES: usize = 16 * 1024;

/// The key of a certificate, as far as the profile tells keys apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KeyType {
    /// ECDSA on secp384r1.
    P384,
    /// ECDSA on secp256r1.
    P256,
    /// RSA of any length.
    Rsa,
    /// Anything else.
    Other,
}

impl KeyType {
    /// The name used in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::P384 => "ecdsa-p384",
            Self::P256 => "ecdsa-p256",
            Self::Rsa => "rsa",
            Self::Other => "other",
        }
    }
}

/// Which rule of the X509-SVID specification a certificate breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SvidError {
    /// Not a certificate that can be read.
    Unreadable(String),
    /// No URI SAN, or no SAN at all.
    NoUriSan,
    /// More than one URI SAN (section 2).
    SeveralUriSans(usize),
    /// The URI SAN is not a workload's SPIFFE ID.
    BadSpiffeId(SpiffeIdError),
    /// basicConstraints say CA (section 4.1).
    LeafIsCa,
    /// keyUsage is missing or lacks digitalSignature (section 4.3).
    NoDigitalSignature,
    /// keyUsage has keyCertSign or cRLSign (section 4.3).
    SigningUsage,
    /// extendedKeyUsage is there and lacks serverAuth or clientAuth as needed (section 4.4).
    WrongExtendedUsage,
    /// The chain is empty or longer than [`MAX_CHAIN`], or a certificate exceeds [`MAX_CERT_BYTES`].
    BadChainLength,
    /// The private key is not the one of the certificate, or of a kind that cannot sign here.
    KeyMismatch(String),
}

impl std::fmt::Display for SvidError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unreadable(why) => write!(f, "the certificate cannot be read: {why}"),
            Self::NoUriSan => f.write_str("the certificate has no URI SAN, so it names no SPIFFE ID"),
            Self::SeveralUriSans(n) => write!(f, "the certificate has {n} URI SANs; an SVID has exactly one"),
            Self::BadSpiffeId(why) => write!(f, "the URI SAN is not a SPIFFE ID: {why}"),
            Self::LeafIsCa => f.write_str("the leaf certificate is a CA"),
            Self::NoDigitalSignature => f.write_str("the leaf's keyUsage lacks digitalSignature"),
            Self::SigningUsage => f.write_str("the leaf's keyUsage allows signing certificates or lists"),
            Self::WrongExtendedUsage => f.write_str("the leaf's extendedKeyUsage lacks serverAuth or clientAuth"),
            Self::BadChainLength => f.write_str("the chain is empty, too long, or holds an oversized certificate"),
            Self::KeyMismatch(why) => {
                write!(f, "the private key does not fit the certificate: {why}")
            }
        }
    }
}

impl std::error::Error for SvidError {}

/// Which of the two uses a leaf is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Usage {
    /// The peer is a TLS client.
    Client,
    /// The peer is a TLS server.
    Server,
}

/// What a leaf certificate says of itself. Nothing in it is proved yet.
#[derive(Clone, Debug)]
pub struct LeafFacts {
    /// The one SPIFFE ID.
    pub id: SpiffeId,
    /// The kind of its key.
    pub key_type: KeyType,
    /// Seconds since the Unix epoch.
    pub not_before: u64,
    /// Seconds since the Unix epoch.
    pub not_after: u64,
    /// The serial number in hexadecimal.
    pub serial: String,
    client_auth: bool,
    server_auth: bool,
}

impl LeafFacts {
    /// Reads a leaf and holds it against the X509-SVID specification, sections 2 to 4.
    ///
    /// # Errors
    /// The first rule it breaks.
    pub fn read(der: &[u8]) -> Result<Self, SvidError> {
        if der.len() > MAX_CERT_BYTES {
            return Err(SvidError::BadChainLength);
        }
        let (rest, cert) =
            x509_parser::parse_x509_certificate(der).map_err(|e| SvidError::Unreadable(e.to_string()))?;
        if !rest.is_empty() {
            return Err(SvidError::Unreadable("bytes after the certificate".into()));
        }
        let mut uris = Vec::new();
        let mut key_usage = None;
        let mut extended = None;
        let mut is_ca = false;
        for extension in cert.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(san) => {
                    uris.extend(san.general_names.iter().filter_map(|name| match name {
                        GeneralName::URI(uri) => Some(*uri),
                        _ => None,
                    }));
                }
                ParsedExtension::KeyUsage(usage) => key_usage = Some(*usage),
                ParsedExtension::ExtendedKeyUsage(usage) => {
                    extended = Some((usage.any || usage.client_auth, usage.any || usage.server_auth));
                }
                ParsedExtension::BasicConstraints(basic) => is_ca = basic.ca,
                ParsedExtension::ParseError { error } => {
                    return Err(SvidError::Unreadable(error.to_string()));
                }
                _ => {}
            }
        }
        let uri = match uris.as_slice() {
            [] => return Err(SvidError::NoUriSan),
            [uri] => *uri,
            more => return Err(SvidError::SeveralUriSans(more.len())),
        };
        let id = SpiffeId::parse_workload(uri).map_err(SvidError::BadSpiffeId)?;
        if is_ca {
            return Err(SvidError::LeafIsCa);
        }
        let usage = key_usage.ok_or(SvidError::NoDigitalSignature)?;
        if usage.key_cert_sign() || usage.crl_sign() {
            return Err(SvidError::SigningUsage);
        }
        if !usage.digital_signature() {
            return Err(SvidError::NoDigitalSignature);
        }
        let (client_auth, server_auth) = extended.unwrap_or((true, true));
        let (not_before, not_after) = validity_of(&cert);
        Ok(Self {
            id,
            key_type: key_type_of(&cert),
            not_before,
            not_after,
            serial: cert.raw_serial_as_string(),
            client_auth,
            server_auth,
        })
    }

    /// Whether the extended key usage, if there is one, allows this use (X509-SVID specification, section 4.4).
    pub fn may_be(&self, usage: Usage) -> bool {
        match usage {
            Usage::Client => self.client_auth,
            Usage::Server => self.server_auth,
        }
    }
}

/// Validity period in seconds since the Unix epoch; times before it count as 0.
pub(crate) fn validity_of(cert: &X509Certificate<'_>) -> (u64, u64) {
    let seconds = |time: i64| u64::try_from(time).unwrap_or(0);
    let validity = cert.validity();
    (seconds(validity.not_before.timestamp()), seconds(validity.not_after.timestamp()))
}

fn key_type_of(cert: &X509Certificate<'_>) -> KeyType {
    use x509_parser::oid_registry as oid;
    let algorithm = &cert.public_key().algorithm;
    if algorithm.algorithm == oid::OID_PKCS1_RSAENCRYPTION {
        return KeyType::Rsa;
    }
    if algorithm.algorithm != oid::OID_KEY_TYPE_EC_PUBLIC_KEY {
        return KeyType::Other;
    }
    match algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok()) {
        Some(curve) if curve == oid::OID_NIST_EC_P384 => KeyType::P384,
        Some(curve) if curve == oid::OID_EC_P256 => KeyType::P256,
        _ => KeyType::Other,
    }
}

/// One X509-SVID of ours: chain, private key and what the leaf says. The key is zeroed when the last handle drops.
pub struct Svid {
    facts: LeafFacts,
    chain: Vec<CertificateDer<'static>>,
    key: Arc<rustls::sign::CertifiedKey>,
    hint: Option<String>,
}

impl Svid {
    /// Puts a chain (leaf first) and its key (PKCS#8 or SEC1) together and checks that they belong together.
    ///
    /// # Errors
    /// The first rule of the specification that the leaf breaks, or that the key is another one's.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        hint: Option<String>,
    ) -> Result<Self, SvidError> {
        if chain.is_empty() || chain.len() > MAX_CHAIN || chain.iter().any(|c| c.len() > MAX_CERT_BYTES) {
            return Err(SvidError::BadChainLength);
        }
        let facts = LeafFacts::read(chain.first().ok_or(SvidError::BadChainLength)?)?;
        let key = zeroize::Zeroizing::new(KeyBytes(key));
        let signing = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key.0)
            .map_err(|e| SvidError::KeyMismatch(e.to_string()))?;
        drop(key);
        let certified = rustls::sign::CertifiedKey::new(chain.clone(), signing);
        certified.keys_match().map_err(|e| SvidError::KeyMismatch(e.to_string()))?;
        Ok(Self { facts, chain, key: Arc::new(certified), hint })
    }

    /// Our SPIFFE ID.
    pub fn id(&self) -> &SpiffeId {
        &self.facts.id
    }

    /// What the leaf says of itself.
    pub fn facts(&self) -> &LeafFacts {
        &self.facts
    }

    /// The chain, leaf first (DER).
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// Chain and signing key in the form that rustls takes.
    pub fn certified_key(&self) -> Arc<rustls::sign::CertifiedKey> {
        Arc::clone(&self.key)
    }

    /// The operator's hint of the Workload API, if any.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// Whether this is the same leaf certificate as another one's.
    pub fn same_leaf(&self, other: &Self) -> bool {
        self.chain.first() == other.chain.first()
    }
}

impl std::fmt::Debug for Svid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Svid").field("facts", &self.facts).field("hint", &self.hint).finish_non_exhaustive()
    }
}

/// The bytes of a private key, zeroed when dropped; the signing key made from them is the C library's to clear.
struct KeyBytes(PrivateKeyDer<'static>);

impl zeroize::Zeroize for KeyBytes {
    fn zeroize(&mut self) {
        self.0.zeroize();
    }
}
