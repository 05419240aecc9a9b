//! Certificates for tests: a small authority that issues good SVIDs and, where asked, bad ones.
//!
//! Stands on rcgen and rustls types alone, so that unit tests (`crate::testing`) and integration tests (by `#[path]`)
//! can both use it. Everything it makes is valid from 2000 to 2100 unless told otherwise, so that it suits the system's
//! clock and a stepped one.
#![allow(dead_code, missing_docs, unreachable_pub)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams, CustomExtension, DnType, Issuer,
    KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber,
};
pub use rcgen::{ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// 2000-01-01, seconds since the Unix epoch: where default validity begins.
pub const LONG_AGO: u64 = 946_684_800;
/// 2100-01-01, seconds since the Unix epoch: where default validity ends.
pub const FAR_OFF: u64 = 4_102_444_800;

const SUBJECT_ALT_NAME: &[u64] = &[2, 5, 29, 17];

/// The kind of key to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    P384,
    P256,
    Rsa,
    Ed25519,
}

impl Key {
    fn generate(self) -> KeyPair {
        KeyPair::generate_for(match self {
            Self::P384 => &rcgen::PKCS_ECDSA_P384_SHA384,
            Self::P256 => &rcgen::PKCS_ECDSA_P256_SHA256,
            Self::Rsa => &rcgen::PKCS_RSA_SHA256,
            Self::Ed25519 => &rcgen::PKCS_ED25519,
        })
        .unwrap()
    }
}

/// One subject alternative name, with bytes that no decent encoder would write if need be.
#[derive(Clone, Debug)]
pub enum San {
    Uri(Vec<u8>),
    Dns(Vec<u8>),
}

impl San {
    pub fn uri(text: impl AsRef<[u8]>) -> Self {
        Self::Uri(text.as_ref().to_vec())
    }

    pub fn dns(text: impl AsRef<[u8]>) -> Self {
        Self::Dns(text.as_ref().to_vec())
    }
}

/// What a certificate shall be. [`Spec::leaf`] and [`Spec::authority`] are by the specification; change what the test
/// is about.
#[derive(Clone, Debug)]
pub struct Spec {
    pub sans: Vec<San>,
    /// Seconds since the Unix epoch.
    pub not_before: u64,
    /// Seconds since the Unix epoch.
    pub not_after: u64,
    pub key: Key,
    pub is_ca: IsCa,
    pub usages: Vec<KeyUsagePurpose>,
    pub extended: Vec<ExtendedKeyUsagePurpose>,
    /// Further extensions: object identifier, critical, DER content.
    pub extensions: Vec<(Vec<u64>, bool, Vec<u8>)>,
    pub common_name: String,
}

impl Spec {
    /// An X509-SVID as SPIRE issues it, with a P-384 key. `id` is the whole SPIFFE ID.
    pub fn leaf(id: impl AsRef<[u8]>) -> Self {
        Self {
            sans: vec![San::uri(id)],
            not_before: LONG_AGO,
            not_after: FAR_OFF,
            key: Key::P384,
            is_ca: IsCa::ExplicitNoCa,
            usages: vec![
                KeyUsagePurpose::DigitalSignature,
                KeyUsagePurpose::KeyEncipherment,
                KeyUsagePurpose::KeyAgreement,
            ],
            extended: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            extensions: Vec::new(),
            common_name: "workload".into(),
        }
    }

    /// A signing certificate of a trust domain, with a P-384 key.
    pub fn authority(domain: &str) -> Self {
        Self {
            sans: vec![San::uri(format!("spiffe://{domain}"))],
            is_ca: IsCa::Ca(BasicConstraints::Unconstrained),
            usages: vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign],
            extended: Vec::new(),
            // A name of its own for each, so that no test passes because two authorities are mistaken for one.
            common_name: format!("{domain} authority {}", next_number()),
            ..Self::leaf("")
        }
    }

    /// Valid in this time only, seconds since the Unix epoch.
    pub fn valid(mut self, not_before: u64, not_after: u64) -> Self {
        (self.not_before, self.not_after) = (not_before, not_after);
        self
    }

    /// With a key of another kind.
    pub fn key(mut self, key: Key) -> Self {
        self.key = key;
        self
    }

    /// With these names instead.
    pub fn sans(mut self, sans: impl Into<Vec<San>>) -> Self {
        self.sans = sans.into();
        self
    }

    /// With a DNS name besides.
    pub fn dns(mut self, name: &str) -> Self {
        self.sans.push(San::dns(name));
        self
    }

    /// With these key usages instead; none leaves the extension out.
    pub fn usages(mut self, usages: impl Into<Vec<KeyUsagePurpose>>) -> Self {
        self.usages = usages.into();
        self
    }

    /// With these extended key usages instead; none leaves the extension out.
    pub fn extended(mut self, extended: impl Into<Vec<ExtendedKeyUsagePurpose>>) -> Self {
        self.extended = extended.into();
        self
    }

    /// With these basic constraints instead ([`IsCa::NoCa`] leaves the extension out).
    #[allow(clippy::wrong_self_convention)]
    pub fn is_ca(mut self, is_ca: IsCa) -> Self {
        self.is_ca = is_ca;
        self
    }

    /// With one extension more.
    pub fn extension(mut self, oid: &[u64], critical: bool, content: impl Into<Vec<u8>>) -> Self {
        self.extensions.push((oid.to_vec(), critical, content.into()));
        self
    }

    fn params(&self) -> CertificateParams {
        let mut params = CertificateParams::default();
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        params.not_before = epoch + Duration::from_secs(self.not_before);
        params.not_after = epoch + Duration::from_secs(self.not_after);
        params.serial_number = Some(SerialNumber::from(next_number()));
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Portcullis tests");
        params.distinguished_name.push(DnType::CommonName, self.common_name.as_str());
        params.is_ca = self.is_ca;
        params.key_usages.clone_from(&self.usages);
        params.extended_key_usages.clone_from(&self.extended);
        params.use_authority_key_identifier_extension = true;
        if !self.sans.is_empty() {
            let content = alt_names(&self.sans);
            params.custom_extensions.push(CustomExtension::from_oid_content(SUBJECT_ALT_NAME, content));
        }
        for (oid, critical, content) in &self.extensions {
            let mut extension = CustomExtension::from_oid_content(oid, content.clone());
            extension.set_criticality(*critical);
            params.custom_extensions.push(extension);
        }
        params
    }
}

/// A certificate with its key and the intermediates that lead to (not including) the root.
pub struct Issued {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    key: KeyPair,
    serial: SerialNumber,
    pem: String,
}

impl Issued {
    /// The certificate itself.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.chain[0]
    }

    /// The private key (PKCS#8).
    pub fn key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.serialize_der()).into()
    }

    /// The whole chain as a PEM file.
    pub fn chain_pem(&self) -> String {
        self.pem.clone()
    }

    /// The private key as a PEM file (PKCS#8).
    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }
}

/// An authority of a trust domain: a root, or an intermediate under one.
pub struct TestCa {
    domain: String,
    issuer: Issuer<'static, KeyPair>,
    certificate: Certificate,
    root: CertificateDer<'static>,
    /// From this authority upwards, without the root; with the same as PEM.
    above: Vec<CertificateDer<'static>>,
    above_pem: String,
}

impl TestCa {
    /// A root with a P-384 key.
    pub fn new(domain: &str) -> Self {
        Self::root_with(domain, &Spec::authority(domain))
    }

    /// A root made to measure.
    pub fn root_with(domain: &str, spec: &Spec) -> Self {
        let key = spec.key.generate();
        let params = spec.params();
        let certificate = params.self_signed(&key).unwrap();
        Self {
            domain: domain.into(),
            issuer: Issuer::new(params, key),
            root: certificate.der().clone(),
            certificate,
            above: Vec::new(),
            above_pem: String::new(),
        }
    }

    /// An intermediate under this authority.
    pub fn intermediate(&self) -> Self {
        self.intermediate_with(&Spec::authority(&self.domain))
    }

    /// An intermediate made to measure.
    pub fn intermediate_with(&self, spec: &Spec) -> Self {
        let key = spec.key.generate();
        let params = spec.params();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let mut above = vec![certificate.der().clone()];
        above.extend(self.above.iter().cloned());
        Self {
            domain: self.domain.clone(),
            issuer: Issuer::new(params, key),
            root: self.root.clone(),
            above_pem: certificate.pem() + &self.above_pem,
            certificate,
            above,
        }
    }

    /// The name of its trust domain.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Its own certificate.
    pub fn der(&self) -> &CertificateDer<'static> {
        self.certificate.der()
    }

    /// Its own certificate as PEM.
    pub fn pem(&self) -> String {
        self.certificate.pem()
    }

    /// The root above it (itself, if it is one): what a trust bundle holds.
    pub fn root(&self) -> CertificateDer<'static> {
        self.root.clone()
    }

    /// Its certificate and private key as PEM files, for programs that want to sign with them.
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// A good SVID: `path` with its leading slash, under this authority's trust domain.
    pub fn svid(&self, path: &str) -> Issued {
        self.issue(&Spec::leaf(format!("spiffe://{}{path}", self.domain)))
    }

    /// A certificate made to measure.
    pub fn issue(&self, spec: &Spec) -> Issued {
        let key = spec.key.generate();
        self.issue_for(spec, key)
    }

    /// The same for a key that exists.
    pub fn issue_for(&self, spec: &Spec, key: KeyPair) -> Issued {
        let params = spec.params();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let mut chain = vec![certificate.der().clone()];
        chain.extend(self.above.iter().cloned());
        let serial = params.serial_number.unwrap();
        Issued { chain, key, serial, pem: certificate.pem() + &self.above_pem }
    }

    /// A revocation list of this authority that names these certificates: DER and PEM.
    pub fn crl(&self, revoked: &[&Issued]) -> (CertificateRevocationListDer<'static>, String) {
        self.crl_at(revoked, LONG_AGO)
    }

    /// The same, issued at a time in seconds since the Unix epoch.
    pub fn crl_at(&self, revoked: &[&Issued], issued: u64) -> (CertificateRevocationListDer<'static>, String) {
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        let list = CertificateRevocationListParams {
            this_update: epoch + Duration::from_secs(issued),
            next_update: epoch + Duration::from_secs(FAR_OFF),
            crl_number: SerialNumber::from(next_number()),
            issuing_distribution_point: None,
            revoked_certs: revoked
                .iter()
                .map(|issued| RevokedCertParams {
                    serial_number: issued.serial.clone(),
                    revocation_time: epoch + Duration::from_secs(LONG_AGO),
                    reason_code: None,
                    invalidity_date: None,
                })
                .collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        }
        .signed_by(&self.issuer)
        .unwrap();
        (list.der().clone(), list.pem().unwrap())
    }
}

fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A GeneralNames sequence (RFC 5280, section 4.2.1.6) with whatever bytes the names hold.
fn alt_names(sans: &[San]) -> Vec<u8> {
    let mut names = Vec::new();
    for san in sans {
        let (tag, bytes) = match san {
            San::Dns(bytes) => (0x82, bytes),
            San::Uri(bytes) => (0x86, bytes),
        };
        names.extend(tlv(tag, bytes));
    }
    tlv(0x30, &names)
}

/// One DER element.
pub fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    match content.len() {
        short @ 0..=0x7f => out.push(short as u8),
        medium @ 0x80..=0xff => out.extend([0x81, medium as u8]),
        long => out.extend([0x82, (long >> 8) as u8, long as u8]),
    }
    out.extend(content);
    out
}
