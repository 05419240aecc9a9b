//! Keys and certificates: what a CA of ours looks like and what it signs.
//!
//! In: names, lifetimes and the time of day. Out: DER. Key bytes leave the C library only as PKCS#8 that is zeroed when
//! dropped.

use std::sync::Arc;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm, KeyPair,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SignatureAlgorithm, SigningKey,
};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::AuthorityError;
use crate::identity::{SpiffeId, TrustDomain};

/// How far before the moment of issue an SVID's NotBefore lies, in seconds: room for clocks that go slow, the same as
/// SPIRE's.
pub const BACKDATE: u64 = 10;

/// The kind of key that is made for an SVID. The CA's own key is always P-384.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum SvidKey {
    /// ECDSA on secp384r1.
    #[default]
    P384,
    /// ECDSA on secp256r1, for workloads that cannot use the larger curve.
    P256,
}

impl SvidKey {
    fn algorithms(self) -> (&'static EcdsaSigningAlgorithm, &'static SignatureAlgorithm) {
        match self {
            Self::P384 => (&ECDSA_P384_SHA384_ASN1_SIGNING, &rcgen::PKCS_ECDSA_P384_SHA384),
            Self::P256 => (&ECDSA_P256_SHA256_ASN1_SIGNING, &rcgen::PKCS_ECDSA_P256_SHA256),
        }
    }
}

/// A key pair inside the C library, in the form that rcgen signs with. rcgen's own type would keep a second copy of the
/// private key on our heap that nobody zeroes.
#[derive(Clone)]
struct EcKey {
    pair: Arc<EcdsaKeyPair>,
    algorithm: &'static SignatureAlgorithm,
}

impl EcKey {
    fn generate(kind: SvidKey) -> Result<Self, AuthorityError> {
        let (signing, algorithm) = kind.algorithms();
        let pair =
            EcdsaKeyPair::generate(signing).map_err(|_| AuthorityError::Crypto("no key could be made".into()))?;
        Ok(Self { pair: Arc::new(pair), algorithm })
    }

    fn from_pkcs8(kind: SvidKey, der: &[u8]) -> Result<Self, AuthorityError> {
        let (signing, algorithm) = kind.algorithms();
        let pair = EcdsaKeyPair::from_pkcs8(signing, der)
            .map_err(|e| AuthorityError::Crypto(format!("the private key cannot be read: {e}")))?;
        Ok(Self { pair: Arc::new(pair), algorithm })
    }

    fn to_pkcs8(&self) -> Result<Zeroizing<Vec<u8>>, AuthorityError> {
        let document =
            self.pair.to_pkcs8v1().map_err(|_| AuthorityError::Crypto("the key cannot be written down".into()))?;
        Ok(Zeroizing::new(document.as_ref().to_vec()))
    }
}

impl PublicKeyData for EcKey {
    fn der_bytes(&self) -> &[u8] {
        self.pair.public_key().as_ref()
    }
    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.algorithm
    }
}

impl SigningKey for EcKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let random = aws_lc_rs::rand::SystemRandom::new();
        let signature = self.pair.sign(&random, message).map_err(|_| rcgen::Error::RingUnspecified)?;
        Ok(signature.as_ref().to_vec())
    }
}

/// The CA certificate's serial number in hexadecimal, by which one CA is told from another.
pub(crate) type CaId = Arc<str>;

/// A CA certificate with its key, ready to sign.
pub(crate) struct Ca {
    pub(crate) der: CertificateDer<'static>,
    issuer: Issuer<'static, EcKey>,
    pub(crate) not_after: u64,
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ca").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// What a leaf is made from.
pub(crate) struct LeafRequest<'a> {
    pub(crate) id: &'a SpiffeId,
    pub(crate) dns_names: &'a [String],
    pub(crate) key: SvidKey,
    /// Seconds since the Unix epoch.
    pub(crate) now: u64,
    /// Seconds from `now`.
    pub(crate) ttl: u64,
}

/// A leaf and its key (PKCS#8).
pub(crate) struct Leaf {
    pub(crate) der: CertificateDer<'static>,
    pub(crate) key: Zeroizing<Vec<u8>>,
    /// Seconds since the Unix epoch.
    pub(crate) not_after: u64,
}

impl Ca {
    /// A new self-signed CA of a trust domain, by the X509-SVID specification, sections 2 and 4: URI SAN is the trust
    /// domain, CA is set, keyUsage holds keyCertSign and cRLSign and is critical.
    pub(crate) fn generate(domain: &TrustDomain, now: u64, ttl: u64) -> Result<Self, AuthorityError> {
        let key = EcKey::generate(SvidKey::P384)?;
        let mut params = CertificateParams::default();
        let serial = random_serial()?;
        let mut name = DistinguishedName::new();
        name.push(DnType::OrganizationName, "Portcullis");
        // Two CAs of one domain must differ in name, or a verifier that finds issuers by name tries the wrong one.
        let short: String = hex(&serial).chars().take(16).collect();
        name.push(DnType::CommonName, format!("authority {short}"));
        params.distinguished_name = name;
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.subject_alt_names = vec![SanType::URI(ia5(&format!("spiffe://{}", domain.as_str()))?)];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let not_after = now.saturating_add(ttl);
        params.not_before = moment(now.saturating_sub(BACKDATE))?;
        params.not_after = moment(not_after)?;
        let certificate = params.self_signed(&key).map_err(crypto)?;
        Ok(Self { der: certificate.into(), issuer: Issuer::new(params, key), not_after })
    }

    /// A CA as it was written down, after checking that the key is the certificate's.
    pub(crate) fn load(der: CertificateDer<'static>, pkcs8: &[u8]) -> Result<Self, AuthorityError> {
        let facts = CaFacts::read(&der)?;
        let key = EcKey::from_pkcs8(SvidKey::P384, pkcs8)?;
        if key.der_bytes() != facts.public_key {
            return Err(AuthorityError::Crypto("the private key is not the CA certificate's".into()));
        }
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(crypto)?;
        Ok(Self { der, issuer, not_after: facts.not_after })
    }

    /// The private key (PKCS#8), for writing it down.
    pub(crate) fn key_pkcs8(&self) -> Result<Zeroizing<Vec<u8>>, AuthorityError> {
        self.issuer.key().to_pkcs8()
    }

    /// Signs a leaf by the X509-SVID specification, sections 2 to 4: exactly one URI SAN, CA explicitly not set,
    /// digitalSignature critical, both extended uses. Its life ends with the CA's at the latest.
    pub(crate) fn sign_leaf(&self, request: &LeafRequest<'_>) -> Result<Leaf, AuthorityError> {
        let not_after = request.now.saturating_add(request.ttl).min(self.not_after);
        if not_after <= request.now {
            return Err(AuthorityError::CaExpired);
        }
        let key = EcKey::generate(request.key)?;
        let mut params = CertificateParams::default();
        let mut name = DistinguishedName::new();
        name.push(DnType::OrganizationName, "Portcullis");
        // X.520 allows 64 characters in a common name.
        if let Some(first) = request.dns_names.iter().find(|n| n.len() <= 64) {
            name.push(DnType::CommonName, first.as_str());
        }
        params.distinguished_name = name;
        params.serial_number = Some(SerialNumber::from_slice(&random_serial()?));
        params.subject_alt_names = vec![SanType::URI(ia5(request.id.as_str())?)];
        for dns in request.dns_names {
            params.subject_alt_names.push(SanType::DnsName(ia5(dns)?));
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = moment(request.now.saturating_sub(BACKDATE))?;
        params.not_after = moment(not_after)?;
        let der = params.signed_by(&key, &self.issuer).map_err(crypto)?.into();
        Ok(Leaf { der, key: key.to_pkcs8()?, not_after })
    }
}

/// What a CA certificate says of itself.
pub(crate) struct CaFacts {
    pub(crate) id: CaId,
    /// Seconds since the Unix epoch.
    pub(crate) not_after: u64,
    public_key: Vec<u8>,
}

impl CaFacts {
    pub(crate) fn read(der: &[u8]) -> Result<Self, AuthorityError> {
        let (_, cert) = x509_parser::parse_x509_certificate(der)
            .map_err(|e| AuthorityError::Crypto(format!("the CA certificate cannot be read: {e}")))?;
        Ok(Self {
            id: hex(cert.raw_serial()).into(),
            not_after: u64::try_from(cert.validity().not_after.timestamp()).unwrap_or(0),
            public_key: cert.public_key().subject_public_key.data.to_vec(),
        })
    }
}

fn crypto(error: rcgen::Error) -> AuthorityError {
    AuthorityError::Crypto(error.to_string())
}

fn ia5(text: &str) -> Result<rcgen::string::Ia5String, AuthorityError> {
    text.try_into().map_err(crypto)
}

/// 16 random bytes, positive and without leading zeros, as RFC 5280, section 4.1.2.2 wants serial numbers.
fn random_serial() -> Result<[u8; 16], AuthorityError> {
    let mut serial = [0_u8; 16];
    fill_random(&mut serial)?;
    if let Some(first) = serial.first_mut() {
        *first = (*first & 0x7f) | 0x40;
    }
    Ok(serial)
}

pub(crate) fn fill_random(bytes: &mut [u8]) -> Result<(), AuthorityError> {
    aws_lc_rs::rand::fill(bytes).map_err(|_| AuthorityError::Crypto("the system gives no random numbers".into()))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn moment(seconds: u64) -> Result<OffsetDateTime, AuthorityError> {
    i64::try_from(seconds)
        .ok()
        .and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok())
        // RFC 5280 writes years in four digits.
        .filter(|t| t.year() <= 9999)
        .ok_or_else(|| AuthorityError::Crypto("a date lies beyond the year 9999".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::svid::{KeyType, LeafFacts, Usage};

    fn domain() -> TrustDomain {
        TrustDomain::parse("lab.test").unwrap()
    }

    #[test]
    fn a_leaf_keeps_the_specification_and_verifies() {
        let now = 1_800_000_000;
        let ca = Ca::generate(&domain(), now, 86_400).unwrap();
        for (key, expected) in [(SvidKey::P384, KeyType::P384), (SvidKey::P256, KeyType::P256)] {
            let id = SpiffeId::parse("spiffe://lab.test/web").unwrap();
            let request =
                LeafRequest { id: &id, dns_names: &["web.lab.test".into(), "localhost".into()], key, now, ttl: 60 };
            let leaf = ca.sign_leaf(&request).unwrap();
            let facts = LeafFacts::read(&leaf.der).unwrap();
            assert_eq!(facts.id, id);
            assert_eq!(facts.key_type, expected);
            assert_eq!((facts.not_before, facts.not_after), (now - 10, now + 60));
            assert!(facts.may_be(Usage::Client) && facts.may_be(Usage::Server));

            let anchor = webpki::anchor_from_trusted_cert(&ca.der).unwrap();
            let end = webpki::EndEntityCert::try_from(&leaf.der).unwrap();
            end.verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                &[anchor],
                &[],
                rustls::pki_types::UnixTime::since_unix_epoch(std::time::Duration::from_secs(now)),
                webpki::KeyUsage::server_auth(),
                None,
                None,
            )
            .unwrap();
            assert_eq!(end.valid_dns_names().collect::<Vec<_>>(), ["web.lab.test", "localhost"]);

            let (_, parsed) = x509_parser::parse_x509_certificate(&leaf.der).unwrap();
            let usage = parsed.key_usage().unwrap().unwrap();
            assert!(usage.critical && usage.value.flags == 1, "digitalSignature and nothing else, critical");
            assert!(!parsed.basic_constraints().unwrap().unwrap().value.ca, "CA:FALSE is written out");
        }
    }

    #[test]
    fn a_ca_names_its_domain_and_may_sign() {
        let ca = Ca::generate(&domain(), 1_800_000_000, 3600).unwrap();
        let (_, parsed) = x509_parser::parse_x509_certificate(&ca.der).unwrap();
        let usage = parsed.key_usage().unwrap().unwrap();
        assert!(usage.critical && usage.value.key_cert_sign() && usage.value.crl_sign());
        assert!(!usage.value.digital_signature());
        let san = parsed.subject_alternative_name().unwrap().unwrap();
        assert_eq!(san.value.general_names, [x509_parser::extensions::GeneralName::URI("spiffe://lab.test")]);
        assert!(crate::identity::Authority::from_der(ca.der).is_ok());
    }

    #[test]
    fn a_leaf_never_outlives_its_ca() {
        let now = 1_800_000_000;
        let ca = Ca::generate(&domain(), now, 100).unwrap();
        let id = SpiffeId::parse("spiffe://lab.test/web").unwrap();
        let request = |now| LeafRequest { id: &id, dns_names: &[], key: SvidKey::P384, now, ttl: 3600 };
        assert_eq!(ca.sign_leaf(&request(now + 90)).unwrap().not_after, now + 100);
        assert!(matches!(ca.sign_leaf(&request(now + 100)), Err(AuthorityError::CaExpired)));
    }

    #[test]
    fn a_written_ca_signs_as_before_and_a_strange_key_is_refused() {
        let now = 1_800_000_000;
        let ca = Ca::generate(&domain(), now, 3600).unwrap();
        let other = Ca::generate(&domain(), now, 3600).unwrap();
        let key = ca.key_pkcs8().unwrap();
        let loaded = Ca::load(ca.der.clone(), &key).unwrap();
        assert_eq!(loaded.not_after, ca.not_after);
        assert!(Ca::load(other.der, &key).is_err());
        let id = SpiffeId::parse("spiffe://lab.test/web").unwrap();
        let leaf =
            loaded.sign_leaf(&LeafRequest { id: &id, dns_names: &[], key: SvidKey::P384, now, ttl: 60 }).unwrap();
        let anchor = webpki::anchor_from_trusted_cert(&ca.der).unwrap();
        webpki::EndEntityCert::try_from(&leaf.der)
            .unwrap()
            .verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                &[anchor],
                &[],
                rustls::pki_types::UnixTime::since_unix_epoch(std::time::Duration::from_secs(now)),
                webpki::KeyUsage::client_auth(),
                None,
                None,
            )
            .unwrap();
    }
}
