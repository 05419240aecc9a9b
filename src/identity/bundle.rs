//! Trust bundles: for each trust domain the authorities that may sign its SVIDs, and the revocation lists.
//!
//! A domain's SVIDs are judged by its own authorities only; there is no pooled root store to fall into. In: DER. Out:
//! [`TrustBundles`], immutable, with the anchors already parsed for webpki.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor};

use super::TrustDomain;

/// The most authorities that one bundle may hold; more are refused when the bundle is read.
pub const MAX_AUTHORITIES: usize = 64;
/// The most trust domains that are held at once.
pub const MAX_TRUST_DOMAINS: usize = 256;

/// One authority (CA certificate) of a trust domain.
#[derive(Clone, Debug)]
pub struct Authority {
    /// The certificate as it came.
    pub der: CertificateDer<'static>,
    /// The same as webpki wants it.
    pub anchor: TrustAnchor<'static>,
    /// Not valid before, seconds since the Unix epoch. webpki does not check an anchor's own dates; we do.
    pub not_before: u64,
    /// Not valid after, seconds since the Unix epoch.
    pub not_after: u64,
}

/// All trust domains that are known, each with its own authorities, and the certificate revocation lists.
#[derive(Clone, Debug, Default)]
pub struct TrustBundles {
    domains: BTreeMap<TrustDomain, Arc<[Authority]>>,
    crls: Arc<[CertificateRevocationListDer<'static>]>,
}

/// Why bundle material was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BundleError {
    /// An authority is not a certificate that can be read, or not a CA.
    BadAuthority {
        /// Which one, counted from 0.
        index: usize,
        /// What is wrong with it.
        why: String,
    },
    /// More than [`MAX_AUTHORITIES`] in one bundle, or more than [`MAX_TRUST_DOMAINS`] domains.
    TooMany(&'static str),
    /// A revocation list that cannot be read.
    BadCrl {
        /// Which one, counted from 0.
        index: usize,
        /// What is wrong with it.
        why: String,
    },
    /// The bundle holds no authority.
    Empty,
}

impl std::fmt::Display for BundleError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::BadAuthority { index, why } => {
                write!(f, "authority {index} of the bundle: {why}")
            }
            Self::TooMany(what) => write!(f, "too many {what}"),
            Self::BadCrl { index, why } => write!(f, "revocation list {index}: {why}"),
            Self::Empty => f.write_str("the bundle holds no authority"),
        }
    }
}

impl std::error::Error for BundleError {}

impl Authority {
    /// Reads one CA certificate.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn from_der(der: CertificateDer<'static>) -> Result<Self, String> {
        let anchor =
            webpki::anchor_from_trusted_cert(&der).map_err(|e| format!("not a usable certificate: {e}"))?.to_owned();
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).map_err(|e| format!("not a certificate: {e}"))?;
        if !parsed.is_ca() {
            return Err("not a CA certificate (basicConstraints CA is not set)".into());
        }
        let (not_before, not_after) = super::svid::validity_of(&parsed);
        Ok(Self { anchor, not_before, not_after, der })
    }
}

impl TrustBundles {
    /// No domains, no lists: trusts nobody.
    pub fn empty() -> Self {
        Self::default()
    }

    /// Sets the bundle of one trust domain from its CA certificates.
    ///
    /// # Errors
    /// [`BundleError`]; the earlier bundle of that domain then stays.
    pub fn set(&mut self, domain: TrustDomain, ders: Vec<CertificateDer<'static>>) -> Result<(), BundleError> {
        if ders.is_empty() {
            return Err(BundleError::Empty);
        }
        if ders.len() > MAX_AUTHORITIES {
            return Err(BundleError::TooMany("authorities in one bundle"));
        }
        if self.domains.len() >= MAX_TRUST_DOMAINS && !self.domains.contains_key(&domain) {
            return Err(BundleError::TooMany("trust domains"));
        }
        let authorities = ders
            .into_iter()
            .enumerate()
            .map(|(index, der)| Authority::from_der(der).map_err(|why| BundleError::BadAuthority { index, why }))
            .collect::<Result<Vec<_>, _>>()?;
        self.domains.insert(domain, authorities.into());
        Ok(())
    }

    /// Replaces the revocation lists, after reading each of them once.
    ///
    /// # Errors
    /// [`BundleError::BadCrl`]; the earlier lists then stay.
    pub fn set_crls(&mut self, crls: Vec<CertificateRevocationListDer<'static>>) -> Result<(), BundleError> {
        for (index, crl) in crls.iter().enumerate() {
            webpki::BorrowedCertRevocationList::from_der(crl)
                .map_err(|e| BundleError::BadCrl { index, why: e.to_string() })?;
        }
        self.crls = crls.into();
        Ok(())
    }

    /// The authorities of one trust domain; none if it is not known.
    pub fn authorities(&self, domain: &str) -> Option<&[Authority]> {
        self.domains.get(domain).map(|a| &**a)
    }

    /// All domains with their authorities, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&TrustDomain, &[Authority])> {
        self.domains.iter().map(|(d, a)| (d, &**a))
    }

    /// The revocation lists as they came (DER).
    pub fn crls(&self) -> &[CertificateRevocationListDer<'static>] {
        &self.crls
    }

    /// Whether both trust exactly the same authorities and lists.
    pub fn same_as(&self, other: &Self) -> bool {
        self.crls == other.crls
            && self.domains.len() == other.domains.len()
            && self.domains.iter().zip(&other.domains).all(|((d, a), (e, b))| {
                d == e && a.len() == b.len() && a.iter().zip(b.iter()).all(|(x, y)| x.der == y.der)
            })
    }
}
