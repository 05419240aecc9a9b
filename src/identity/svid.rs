//! X509-SVIDs: what a certificate must be before anything is proved with it.
//!
//! [`LeafFacts::read`] holds a certificate against the X509-SVID specification; it does not look at signatures, which
//! is the verifier's work (`tls::verifier`). [`Svid`] is our own one: chain and private key, checked to belong together.
//!
//! Where the specification leaves a choice: a leaf without basicConstraints passes, because section 4.1 demands that cA be
//! false, which is the value it has when nothing is said (RFC 5280, section 4.2.1.9), and go-spiffe reads it so; keyUsage
//! that is not marked critical passes, because that duty is the issuer's; an extendedKeyUsage must hold both uses in our
//! own SVID (section 4.4) and the one that is needed in a peer's.

use std::sync::Arc;

use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, KeyUsage, ParsedExtension};

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
    /// basicConstraints say CA (sections 4.1 and 5.2).
    LeafIsCa,
    /// keyUsage is missing or lacks digitalSignature (section 4.3).
    NoDigitalSignature,
    /// keyUsage has keyCertSign or cRLSign (sections 4.3 and 5.2).
    SigningUsage,
    /// extendedKeyUsage is there and lacks serverAuth or clientAuth as needed (section 4.4).
    WrongExtendedUsage,
    /// The chain is empty or longer than [`MAX_CHAIN`], or a certificate exceeds [`MAX_CERT_BYTES`].
    BadChainLength,
    /// A certificate of the chain above the leaf may not sign SVIDs.
    BadIssuer {
        /// Which one, counted from the leaf, which is 0.
        index: usize,
        /// Which rule it breaks, in words.
        why: String,
    },
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
            Self::BadIssuer { index, why } => write!(f, "certificate {index} of the chain is no authority: {why}"),
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
        let extensions = Extensions::read(&cert).map_err(SvidError::Unreadable)?;
        let uri = match extensions.uris.as_slice() {
            [] => return Err(SvidError::NoUriSan),
            [uri] => std::str::from_utf8(uri).map_err(|_| SvidError::BadSpiffeId(SpiffeIdError::BadPathSegmentChar))?,
            more => return Err(SvidError::SeveralUriSans(more.len())),
        };
        let id = SpiffeId::parse_workload(uri).map_err(SvidError::BadSpiffeId)?;
        if extensions.is_ca {
            return Err(SvidError::LeafIsCa);
        }
        let usage = extensions.key_usage.ok_or(SvidError::NoDigitalSignature)?;
        if usage.key_cert_sign() || usage.crl_sign() {
            return Err(SvidError::SigningUsage);
        }
        if !usage.digital_signature() {
            return Err(SvidError::NoDigitalSignature);
        }
        let (client_auth, server_auth) = extensions.extended.unwrap_or((true, true));
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

/// What the extensions say that the specification speaks of.
#[derive(Default)]
struct Extensions<'a> {
    /// All URI names, also those that are not even text: each counts.
    uris: Vec<&'a [u8]>,
    is_ca: bool,
    key_usage: Option<KeyUsage>,
    /// Client and server use, if the extension is there.
    extended: Option<(bool, bool)>,
}

impl<'a> Extensions<'a> {
    fn read(cert: &'a X509Certificate<'a>) -> Result<Self, String> {
        // RFC 5280, section 4.2: none twice. Of two the reader next door might believe the other one.
        cert.extensions_map().map_err(|e| e.to_string())?;
        let mut found = Self::default();
        for extension in cert.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(san) => {
                    found.uris.extend(san.general_names.iter().filter_map(|name| match name {
                        GeneralName::URI(uri) => Some(uri.as_bytes()),
                        GeneralName::Invalid(tag, bytes) if tag.0 == URI_TAG => Some(*bytes),
                        _ => None,
                    }));
                }
                ParsedExtension::KeyUsage(usage) => found.key_usage = Some(*usage),
                ParsedExtension::ExtendedKeyUsage(usage) => {
                    // anyExtendedKeyUsage is neither of the two that section 4.4 names; webpki does not take it either.
                    found.extended = Some((usage.client_auth, usage.server_auth));
                }
                ParsedExtension::BasicConstraints(basic) => found.is_ca = basic.ca,
                ParsedExtension::ParseError { error } => return Err(error.to_string()),
                _ => {}
            }
        }
        Ok(found)
    }
}

/// The tag of uniformResourceIdentifier in a GeneralName (RFC 5280, section 4.2.1.6).
const URI_TAG: u32 = 6;

/// Holds a signing certificate against the X509-SVID specification, sections 3.2, 4.1 and 4.3: it is a CA, its keyUsage,
/// which an intermediate must have and an authority of a bundle may lack, holds keyCertSign, and the SPIFFE IDs that it
/// names, if any, have no path. Answers its validity period, seconds since the Unix epoch.
///
/// # Errors
/// The first rule that it breaks, in words.
pub fn check_issuer(der: &[u8], usage_required: bool) -> Result<(u64, u64), String> {
    if der.len() > MAX_CERT_BYTES {
        return Err(format!("it is larger than {MAX_CERT_BYTES} bytes"));
    }
    let (rest, cert) =
        x509_parser::parse_x509_certificate(der).map_err(|e| format!("it cannot be read as a certificate: {e}"))?;
    if !rest.is_empty() {
        return Err("bytes follow the certificate".into());
    }
    let extensions = Extensions::read(&cert)?;
    if !extensions.is_ca {
        return Err("its basicConstraints do not say CA".into());
    }
    let may_sign = extensions.key_usage.map_or(!usage_required, |usage| usage.key_cert_sign());
    if !may_sign {
        return Err("its keyUsage lacks keyCertSign".into());
    }
    // A CA of an older PKI may carry other names; only those that claim to be SPIFFE IDs are held to the rule.
    for uri in extensions.uris.iter().filter_map(|uri| std::str::from_utf8(uri).ok()) {
        if uri.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("spiffe:")) {
            let id = SpiffeId::parse(uri).map_err(|why| format!("its URI SAN is not a SPIFFE ID: {why}"))?;
            if !id.path().is_empty() {
                return Err(format!("it is named {id}, and the SPIFFE ID of an authority has no path"));
            }
        }
    }
    Ok(validity_of(&cert))
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

/// One X509-SVID of ours: chain, private key and what the leaf says. The bytes of the key are zeroed once the signing key
/// is made from them; that one is the C library's, which clears it when the last handle drops.
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
        // First, so that no way out leaves the bytes behind.
        let key = zeroize::Zeroizing::new(key);
        if chain.len() > MAX_CHAIN || chain.iter().any(|c| c.len() > MAX_CERT_BYTES) {
            return Err(SvidError::BadChainLength);
        }
        let (leaf, issuers) = chain.split_first().ok_or(SvidError::BadChainLength)?;
        let facts = LeafFacts::read(leaf)?;
        if !(facts.may_be(Usage::Client) && facts.may_be(Usage::Server)) {
            return Err(SvidError::WrongExtendedUsage);
        }
        for (index, issuer) in issuers.iter().enumerate() {
            check_issuer(issuer, true).map_err(|why| SvidError::BadIssuer { index: index + 1, why })?;
        }
        let signing = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key)
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::BasicConstraints;

    use super::*;
    use crate::testing::{ExtendedKeyUsagePurpose as Eku, IsCa, Issued, Key, KeyUsagePurpose as Ku, San, Spec, TestCa};

    const ID: &str = "spiffe://nhs.example/ns/gp/sa/web";

    fn read(spec: &Spec) -> Result<LeafFacts, SvidError> {
        LeafFacts::read(TestCa::new("nhs.example").issue(spec).der())
    }

    fn refused(spec: &Spec) -> SvidError {
        read(spec).unwrap_err()
    }

    fn svid(issued: &Issued) -> Result<Svid, SvidError> {
        Svid::new(issued.chain.clone(), issued.key(), None)
    }

    #[test]
    fn a_good_leaf_tells_its_facts() {
        let facts = read(&Spec::leaf(ID).valid(1_700_000_000, 1_700_003_600).dns("web.nhs.example")).unwrap();
        assert_eq!(facts.id.as_str(), ID);
        assert_eq!((facts.not_before, facts.not_after), (1_700_000_000, 1_700_003_600));
        assert_eq!(facts.key_type, KeyType::P384);
        assert!(facts.may_be(Usage::Client) && facts.may_be(Usage::Server));
        assert!(!facts.serial.is_empty());
    }

    #[test]
    fn key_types_are_told_apart() {
        for (key, kind) in [
            (Key::P384, KeyType::P384),
            (Key::P256, KeyType::P256),
            (Key::Rsa, KeyType::Rsa),
            (Key::Ed25519, KeyType::Other),
        ] {
            assert_eq!(read(&Spec::leaf(ID).key(key)).unwrap().key_type, kind);
        }
    }

    #[test]
    fn exactly_one_uri_san() {
        assert_eq!(refused(&Spec::leaf(ID).sans([])), SvidError::NoUriSan);
        assert_eq!(refused(&Spec::leaf(ID).sans([San::dns("web.nhs.example")])), SvidError::NoUriSan);
        for other in ["spiffe://nhs.example/other", "https://nhs.example/web", ID, ""] {
            let sans = [San::uri(ID), San::uri(other)];
            assert_eq!(refused(&Spec::leaf(ID).sans(sans)), SvidError::SeveralUriSans(2), "{other:?}");
        }
        // A second one that is not even text counts all the same.
        assert_eq!(refused(&Spec::leaf(ID).sans([San::uri(ID), San::uri(b"\xff\xfe")])), SvidError::SeveralUriSans(2));
    }

    #[test]
    fn the_uri_san_is_a_workloads_spiffe_id() {
        use SpiffeIdError as E;
        for (uri, why) in [
            (&b"https://nhs.example/web"[..], E::WrongScheme),
            (b"SPIFFE://nhs.example/web", E::WrongScheme),
            (b"", E::Empty),
            (b"spiffe://nhs.example", E::NoPath),
            (b"spiffe://nhs.example/", E::TrailingSlash),
            (b"spiffe:///web", E::MissingTrustDomain),
            (b"spiffe://nhs.example:443/web", E::BadTrustDomainChar),
            (b"spiffe://user@nhs.example/web", E::BadTrustDomainChar),
            (b"spiffe://NHS.example/web", E::BadTrustDomainChar),
            (b"spiffe://nhs.example\0.evil.example/web", E::BadTrustDomainChar),
            (b"spiffe://nhs.example/web?query", E::BadPathSegmentChar),
            (b"spiffe://nhs.example/web#fragment", E::BadPathSegmentChar),
            (b"spiffe://nhs.example/web\0", E::BadPathSegmentChar),
            (b"spiffe://nhs.example/web\n", E::BadPathSegmentChar),
            (b"spiffe://nhs.example/w%65b", E::BadPathSegmentChar),
            (b"spiffe://nhs.example/w\xc3\xa9b", E::BadPathSegmentChar),
            (b"spiffe://nhs.example/w\xe9b", E::BadPathSegmentChar),
            (b"spiffe://nhs.example/./web", E::DotSegment),
            (b"spiffe://nhs.example/a/../web", E::DotSegment),
            (b"spiffe://nhs.example//web", E::EmptySegment),
        ] {
            let found = refused(&Spec::leaf(uri));
            assert_eq!(found, SvidError::BadSpiffeId(why), "{}", uri.escape_ascii());
        }
        let long = format!("spiffe://nhs.example/{}", "a".repeat(2048));
        assert_eq!(refused(&Spec::leaf(long)), SvidError::BadSpiffeId(E::TooLong));
    }

    #[test]
    fn a_leaf_is_not_a_ca_and_may_sign_neither_certificates_nor_lists() {
        assert_eq!(refused(&Spec::leaf(ID).is_ca(IsCa::Ca(BasicConstraints::Unconstrained))), SvidError::LeafIsCa);
        // cA is false when nothing is said.
        assert!(read(&Spec::leaf(ID).is_ca(IsCa::NoCa)).is_ok());
        assert_eq!(refused(&Spec::leaf(ID).usages([])), SvidError::NoDigitalSignature);
        assert_eq!(refused(&Spec::leaf(ID).usages([Ku::KeyAgreement])), SvidError::NoDigitalSignature);
        assert_eq!(refused(&Spec::leaf(ID).usages([Ku::DigitalSignature, Ku::KeyCertSign])), SvidError::SigningUsage);
        assert_eq!(refused(&Spec::leaf(ID).usages([Ku::DigitalSignature, Ku::CrlSign])), SvidError::SigningUsage);
        assert!(read(&Spec::leaf(ID).usages([Ku::DigitalSignature])).is_ok());
    }

    #[test]
    fn extended_usage_if_present_holds_what_is_needed() {
        let facts = read(&Spec::leaf(ID).extended([])).unwrap();
        assert!(facts.may_be(Usage::Client) && facts.may_be(Usage::Server));
        let facts = read(&Spec::leaf(ID).extended([Eku::ServerAuth])).unwrap();
        assert!(!facts.may_be(Usage::Client) && facts.may_be(Usage::Server));
        let facts = read(&Spec::leaf(ID).extended([Eku::ClientAuth, Eku::CodeSigning])).unwrap();
        assert!(facts.may_be(Usage::Client) && !facts.may_be(Usage::Server));
        for neither in [Eku::CodeSigning, Eku::Any] {
            let facts = read(&Spec::leaf(ID).extended([neither])).unwrap();
            assert!(!facts.may_be(Usage::Client) && !facts.may_be(Usage::Server));
        }
    }

    #[test]
    fn no_extension_twice() {
        // A second keyUsage, which says digitalSignature again; a second subjectAltName with the same name.
        let usage = crate::testing::tlv(0x03, &[0x07, 0x80]);
        let found = refused(&Spec::leaf(ID).extension(&[2, 5, 29, 15], true, usage));
        assert!(matches!(found, SvidError::Unreadable(_)), "{found}");
        let names = crate::testing::tlv(0x30, &crate::testing::tlv(0x86, ID.as_bytes()));
        let found = refused(&Spec::leaf(ID).extension(&[2, 5, 29, 17], false, names));
        assert!(matches!(found, SvidError::Unreadable(_)), "{found}");
    }

    #[test]
    fn what_is_no_certificate() {
        let der = TestCa::new("nhs.example").svid("/web").der().to_vec();
        assert!(LeafFacts::read(&der).is_ok());
        let mut longer = der.clone();
        longer.push(0);
        for bytes in [&longer[..], &der[..der.len() - 1], &der[1..], b"", b"\0", b"-----BEGIN CERTIFICATE-----"] {
            assert!(matches!(LeafFacts::read(bytes), Err(SvidError::Unreadable(_))), "{}", bytes.len());
        }
        assert_eq!(LeafFacts::read(&vec![0x30; MAX_CERT_BYTES + 1]).unwrap_err(), SvidError::BadChainLength);
    }

    #[test]
    fn chain_and_key_belong_together() {
        let ca = TestCa::new("nhs.example");
        let (ours, other) = (ca.svid("/web"), ca.svid("/web"));
        let made = svid(&ours).unwrap();
        assert_eq!(made.id().as_str(), ID.replace("/ns/gp/sa", ""));
        assert!(made.same_leaf(&svid(&ours).unwrap()) && !made.same_leaf(&svid(&other).unwrap()));
        assert!(matches!(Svid::new(ours.chain.clone(), other.key(), None), Err(SvidError::KeyMismatch(_))));
        let p256 = ca.issue(&Spec::leaf(ID).key(Key::P256));
        assert!(matches!(Svid::new(ours.chain.clone(), p256.key(), None), Err(SvidError::KeyMismatch(_))));
        let garbage = rustls::pki_types::PrivatePkcs8KeyDer::from(vec![1, 2, 3]).into();
        assert!(matches!(Svid::new(ours.chain.clone(), garbage, None), Err(SvidError::KeyMismatch(_))));
    }

    #[test]
    fn keys_may_come_as_sec1() {
        let issued = TestCa::new("nhs.example").svid("/web");
        // PKCS#8 wraps the same structure (RFC 5958, section 2; RFC 5915).
        let pkcs8 = issued.key();
        let (_, wrapped) = x509_parser::der_parser::parse_der(pkcs8.secret_der()).unwrap();
        let sec1 = wrapped.as_sequence().unwrap()[2].as_slice().unwrap().to_vec();
        let key = rustls::pki_types::PrivateSec1KeyDer::from(sec1).into();
        assert!(Svid::new(issued.chain.clone(), key, None).is_ok());
    }

    #[test]
    fn keys_never_show_in_debug_output() {
        let issued = TestCa::new("nhs.example").svid("/web");
        let shown = format!("{:?}", svid(&issued).unwrap());
        assert!(shown.contains("nhs.example") && !shown.to_lowercase().contains("key:"), "{shown}");
    }

    #[test]
    fn our_own_leaf_needs_both_uses() {
        let ca = TestCa::new("nhs.example");
        for only in [Eku::ClientAuth, Eku::ServerAuth, Eku::CodeSigning] {
            let issued = ca.issue(&Spec::leaf(ID).extended([only]));
            assert_eq!(svid(&issued).unwrap_err(), SvidError::WrongExtendedUsage);
        }
        assert!(svid(&ca.issue(&Spec::leaf(ID).extended([]))).is_ok());
    }

    #[test]
    fn length_of_a_chain() {
        let ca = TestCa::new("nhs.example");
        let leaf = ca.svid("/web");
        assert_eq!(Svid::new(Vec::new(), leaf.key(), None).unwrap_err(), SvidError::BadChainLength);
        let mut chain = leaf.chain.clone();
        chain.resize(MAX_CHAIN, ca.root());
        assert!(Svid::new(chain.clone(), leaf.key(), None).is_ok());
        chain.push(ca.root());
        assert_eq!(Svid::new(chain, leaf.key(), None).unwrap_err(), SvidError::BadChainLength);
        let huge = vec![leaf.der().clone(), CertificateDer::from(vec![0x30; MAX_CERT_BYTES + 1])];
        assert_eq!(Svid::new(huge, leaf.key(), None).unwrap_err(), SvidError::BadChainLength);
    }

    #[test]
    fn what_stands_above_the_leaf_may_sign() {
        let root = TestCa::new("nhs.example");
        assert!(svid(&root.intermediate().intermediate().svid("/web")).is_ok());
        let authority = || Spec::authority("nhs.example");
        for (spec, word) in [
            (authority().is_ca(IsCa::ExplicitNoCa), "basicConstraints"),
            (authority().is_ca(IsCa::NoCa), "basicConstraints"),
            (authority().usages([Ku::CrlSign]), "keyCertSign"),
            (authority().usages([]), "keyCertSign"),
            (authority().sans([San::uri("spiffe://nhs.example/ca")]), "no path"),
            (authority().sans([San::uri("Spiffe://nhs.example")]), "not a SPIFFE ID"),
        ] {
            let Err(SvidError::BadIssuer { index: 1, why }) = svid(&root.intermediate_with(&spec).svid("/web")) else {
                panic!("{word} was let through");
            };
            assert!(why.contains(word), "{why}");
        }
        // A signing certificate need not be an SVID, and may carry other names.
        assert!(svid(&root.intermediate_with(&authority().sans([])).svid("/web")).is_ok());
        assert!(
            svid(&root.intermediate_with(&authority().sans([San::uri("https://ca.example/x")])).svid("/web")).is_ok()
        );
        let mut junk = root.svid("/web").chain;
        junk.push(CertificateDer::from(vec![1, 2, 3]));
        let leaf = root.svid("/web");
        assert!(matches!(Svid::new(junk, leaf.key(), None), Err(SvidError::BadIssuer { index: 1, .. })));
    }

    #[test]
    fn an_rsa_key_is_read_and_named() {
        // Whether it may be used is the profile's affair (`svid_keys`), not the specification's.
        let issued = TestCa::new("nhs.example").issue(&Spec::leaf(ID).key(Key::Rsa));
        let made = Svid::new(issued.chain.clone(), issued.key(), Some("rsa".into())).unwrap();
        assert_eq!((made.facts().key_type, made.hint()), (KeyType::Rsa, Some("rsa")));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        /// Whatever bytes a stranger sends: an answer, never a panic, and never an ID that breaks the rules.
        #[test]
        fn mutated_certificates_are_answered(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 1..6),
        ) {
            static LEAF: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
            let leaf = LEAF.get_or_init(|| TestCa::new("nhs.example").svid("/web").der().to_vec());
            let mut der = leaf.clone();
            for (at, byte, what) in edits {
                let at = at.index(der.len());
                match what {
                    0 => der[at] = byte,
                    1 => der[at] ^= 1 << (byte % 8),
                    2 => der.insert(at, byte),
                    _ if der.len() > 1 => drop(der.remove(at)),
                    _ => {}
                }
            }
            if let Ok(facts) = LeafFacts::read(&der) {
                prop_assert!(SpiffeId::parse_workload(facts.id.as_str()).is_ok());
            }
            let _ = check_issuer(&der, true);
        }

        #[test]
        fn noise_is_answered(der in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(LeafFacts::read(&der).is_err());
            prop_assert!(check_issuer(&der, false).is_err());
        }
    }
}
