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

/// The most revocation lists that are held at once.
pub const MAX_CRLS: usize = 256;

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
    /// More than [`MAX_AUTHORITIES`] in one bundle, [`MAX_TRUST_DOMAINS`] domains or [`MAX_CRLS`] lists.
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
        let (not_before, not_after) = super::svid::check_issuer(&der, false)?;
        let anchor =
            webpki::anchor_from_trusted_cert(&der).map_err(|e| format!("not a usable certificate: {e}"))?.to_owned();
        Ok(Self { anchor, not_before, not_after, der })
    }
}

/// Reads a revocation list with all its entries, as the verifiers will. Answers how new it is, for comparison: when it was
/// issued (seconds since the Unix epoch), then its number.
pub(crate) fn check_crl(der: &[u8]) -> Result<(i64, Vec<u8>), String> {
    webpki::OwnedCertRevocationList::from_der(der).map_err(|e| e.to_string())?;
    let (_, list) = x509_parser::parse_x509_crl(der).map_err(|e| e.to_string())?;
    let digits = list.crl_number().map(|number| number.to_bytes_be()).unwrap_or_default();
    // RFC 5280, section 5.2.3: 20 bytes at most. Of one length, numbers compare as bytes do.
    let mut number = vec![0; 20_usize.saturating_sub(digits.len())];
    number.extend(digits);
    Ok((list.last_update().timestamp(), number))
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
        let mut authorities = ders
            .into_iter()
            .enumerate()
            .map(|(index, der)| Authority::from_der(der).map_err(|why| BundleError::BadAuthority { index, why }))
            .collect::<Result<Vec<_>, _>>()?;
        // A bundle is a set: the same authorities in another order are no change.
        authorities.sort_by(|a, b| a.der.as_ref().cmp(b.der.as_ref()));
        authorities.dedup_by(|a, b| a.der == b.der);
        self.domains.insert(domain, authorities.into());
        Ok(())
    }

    /// Replaces the revocation lists, after reading each of them once. They are kept newest first.
    ///
    /// # Errors
    /// [`BundleError::BadCrl`] or [`BundleError::TooMany`]; the earlier lists then stay.
    pub fn set_crls(&mut self, crls: Vec<CertificateRevocationListDer<'static>>) -> Result<(), BundleError> {
        if crls.len() > MAX_CRLS {
            return Err(BundleError::TooMany("revocation lists"));
        }
        let mut dated = crls
            .into_iter()
            .enumerate()
            .map(|(index, crl)| match check_crl(&crl) {
                Ok(age) => Ok((age, crl)),
                Err(why) => Err(BundleError::BadCrl { index, why }),
            })
            .collect::<Result<Vec<_>, _>>()?;
        // webpki asks only the first list of an issuer's name. A newer list takes the older one's place (RFC 5280, section
        // 5), so the newest has to stand first, whichever way and in whatever order they came.
        dated.sort_by(|(a, x), (b, y)| b.cmp(a).then_with(|| x.as_ref().cmp(y.as_ref())));
        dated.dedup();
        let crls: Vec<_> = dated.into_iter().map(|(_, crl)| crl).collect();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FAR_OFF, IsCa, KeyUsagePurpose as Ku, LONG_AGO, San, Spec, TestCa};

    fn domain(name: &str) -> TrustDomain {
        TrustDomain::parse(name).unwrap()
    }

    fn bundles(cas: &[&TestCa]) -> TrustBundles {
        let mut bundles = TrustBundles::empty();
        for ca in cas {
            bundles.set(domain(ca.domain()), vec![ca.root()]).unwrap();
        }
        bundles
    }

    #[test]
    fn each_domain_has_its_own_authorities() {
        let (nhs, gp) = (TestCa::new("nhs.example"), TestCa::new("gp.example"));
        let bundles = bundles(&[&nhs, &gp]);
        let [authority] = bundles.authorities("nhs.example").unwrap() else { panic!("one authority") };
        assert_eq!(authority.der, nhs.root());
        assert_eq!((authority.not_before, authority.not_after), (LONG_AGO, FAR_OFF));
        assert_eq!(bundles.authorities("gp.example").unwrap()[0].der, gp.root());
        assert!(bundles.authorities("other.example").is_none());
        assert_eq!(bundles.iter().map(|(d, _)| d.as_str()).collect::<Vec<_>>(), ["gp.example", "nhs.example"]);
    }

    #[test]
    fn what_is_no_authority_is_refused_and_the_bundle_stays() {
        let ca = TestCa::new("nhs.example");
        let mut bundles = bundles(&[&ca]);
        let authority = || Spec::authority("nhs.example");
        let made = |spec: Spec| TestCa::root_with("nhs.example", &spec).root();
        for (der, word) in [
            (ca.svid("/web").der().clone(), "basicConstraints"),
            (made(authority().is_ca(IsCa::NoCa)), "basicConstraints"),
            (made(authority().usages([Ku::CrlSign])), "keyCertSign"),
            (made(authority().sans([San::uri("spiffe://nhs.example/root")])), "no path"),
            (CertificateDer::from(vec![1, 2, 3]), "cannot be read"),
            (CertificateDer::from([ca.root().as_ref(), b"\0"].concat()), "bytes follow"),
        ] {
            let error = bundles.set(domain("nhs.example"), vec![ca.root(), der]).unwrap_err();
            let BundleError::BadAuthority { index: 1, why } = &error else { panic!("{error}") };
            assert!(why.contains(word), "{why}");
        }
        assert_eq!(bundles.set(domain("nhs.example"), Vec::new()), Err(BundleError::Empty));
        assert_eq!(bundles.authorities("nhs.example").unwrap().len(), 1);
        // An authority that has no SPIFFE ID, or whose keyUsage says nothing, is one all the same.
        let plain = vec![made(authority().sans([])), made(authority().usages([]))];
        bundles.set(domain("nhs.example"), plain).unwrap();
        assert_eq!(bundles.authorities("nhs.example").unwrap().len(), 2);
    }

    #[test]
    fn a_bundle_is_a_set() {
        let (a, b) = (TestCa::new("nhs.example"), TestCa::new("nhs.example"));
        let (mut one, mut two) = (TrustBundles::empty(), TrustBundles::empty());
        one.set(domain("nhs.example"), vec![a.root(), b.root()]).unwrap();
        two.set(domain("nhs.example"), vec![b.root(), a.root(), b.root()]).unwrap();
        assert!(one.same_as(&two));
        two.set(domain("nhs.example"), vec![a.root()]).unwrap();
        assert!(!one.same_as(&two));
        two.set(domain("gp.example"), vec![a.root()]).unwrap();
        assert!(!one.same_as(&two));
        let mut three = one.clone();
        three.set_crls(vec![a.crl(&[]).0]).unwrap();
        assert!(!one.same_as(&three));
    }

    #[test]
    fn sizes_are_bounded() {
        let ca = TestCa::new("nhs.example");
        let mut bundles = TrustBundles::empty();
        let many = vec![ca.root(); MAX_AUTHORITIES + 1];
        assert!(matches!(bundles.set(domain("nhs.example"), many), Err(BundleError::TooMany(_))));
        for n in 0..MAX_TRUST_DOMAINS {
            bundles.set(domain(&format!("d{n}")), vec![ca.root()]).unwrap();
        }
        assert!(matches!(bundles.set(domain("one.more"), vec![ca.root()]), Err(BundleError::TooMany(_))));
        bundles.set(domain("d0"), vec![ca.root()]).unwrap();
        let lists = vec![ca.crl(&[]).0; MAX_CRLS + 1];
        assert!(matches!(bundles.set_crls(lists), Err(BundleError::TooMany(_))));
    }

    #[test]
    fn revocation_lists_are_read_to_the_last_entry() {
        let ca = TestCa::new("nhs.example");
        let (good, _) = ca.crl(&[&ca.svid("/web")]);
        let mut bundles = bundles(&[&ca]);
        bundles.set_crls(vec![good.clone(), good.clone()]).unwrap();
        assert_eq!(bundles.crls(), std::slice::from_ref(&good));
        let broken = CertificateRevocationListDer::from(good[..good.len() - 1].to_vec());
        let error = bundles.set_crls(vec![good.clone(), broken]).unwrap_err();
        assert!(matches!(error, BundleError::BadCrl { index: 1, .. }), "{error}");
        assert_eq!(bundles.crls(), [good]);
    }

    #[test]
    fn of_several_lists_of_one_issuer_the_newest_stands_first() {
        let ca = TestCa::new("nhs.example");
        let web = ca.svid("/web");
        let old = ca.crl_at(&[], LONG_AGO).0;
        let new = ca.crl_at(&[&web], LONG_AGO + 1).0;
        // Same second: the number decides.
        let newer = ca.crl_at(&[&web], LONG_AGO + 1).0;
        for lists in [[&old, &new, &newer], [&newer, &old, &new], [&new, &newer, &old]] {
            let mut bundles = bundles(&[&ca]);
            bundles.set_crls(lists.into_iter().cloned().collect()).unwrap();
            assert_eq!(bundles.crls(), [newer.clone(), new.clone(), old.clone()]);
        }
    }
}
