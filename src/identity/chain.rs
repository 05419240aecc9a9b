//! Whether our own SVID leads to an authority of its own trust domain, before it is shown to anybody.
//!
//! A peer would refuse it anyway, and for the reason it gives nobody can act. Narrower than what peers are judged by:
//! revocation lists and extended uses of intermediates are the peers' to judge.

use std::time::{Duration, UNIX_EPOCH};

use rustls::pki_types::{CertificateDer, SignatureVerificationAlgorithm, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, aws_lc_rs as algorithms};

use super::svid::check_issuer;
use super::{Svid, TrustBundles};

/// Signatures that a chain may carry: ECDSA on the two curves that an SVID of ours may have.
const SIGNATURES: &[&dyn SignatureVerificationAlgorithm] = &[
    algorithms::ECDSA_P384_SHA384,
    algorithms::ECDSA_P256_SHA256,
    algorithms::ECDSA_P384_SHA256,
    algorithms::ECDSA_P256_SHA384,
];

/// Builds the path from our own leaf to an authority of its trust domain that is valid now. Answers until when the whole
/// path is valid, seconds since the Unix epoch, that second included.
///
/// # Errors
/// Why there is no such path, in words for a log.
pub fn verify_own_chain(svid: &Svid, bundles: &TrustBundles, now: UnixTime) -> Result<u64, String> {
    let (id, domain, seconds) = (svid.id(), svid.id().trust_domain_name(), now.as_secs());
    let facts = svid.facts();
    if seconds > facts.not_after {
        return Err(format!("{id} expired at {}", date(facts.not_after)));
    }
    if seconds < facts.not_before {
        return Err(format!("{id} is not valid before {}: is the clock right?", date(facts.not_before)));
    }
    let authorities = bundles
        .authorities(domain)
        .ok_or_else(|| format!("{id} cannot be verified: there is no trust bundle for its trust domain {domain}"))?;
    // webpki does not look at an authority's own dates.
    let current: Vec<_> = authorities.iter().filter(|a| (a.not_before..=a.not_after).contains(&seconds)).collect();
    let anchors: Vec<TrustAnchor<'_>> = current.iter().map(|a| a.anchor.clone()).collect();
    let untrusted = |e: webpki::Error| match e {
        webpki::Error::UnsupportedSignatureAlgorithmContext(_)
        | webpki::Error::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => format!(
            "{id} is signed by an authority whose key or signature is not ECDSA on P-384 or P-256: with SPIRE, set the \
             server's ca_key_type to \"ec-p384\""
        ),
        e => {
            format!("{id} does not verify against the {} authorities of its trust domain's bundle: {e}", current.len())
        }
    };
    let (leaf, intermediates) = svid.chain().split_first().ok_or_else(|| format!("{id} has no certificate"))?;
    let end_entity = EndEntityCert::try_from(leaf).map_err(untrusted)?;
    let path =
        end_entity.verify_for_usage(SIGNATURES, &anchors, intermediates, now, AnyUse, None, None).map_err(untrusted)?;
    let mut until = facts.not_after;
    for intermediate in path.intermediate_certificates() {
        let der: CertificateDer<'_> = intermediate.der();
        until = until.min(check_issuer(&der, true).map_err(|why| format!("an intermediate of {id}: {why}"))?.1);
    }
    // A renewed authority keeps its name and key: the path holds as long as one of its certificates does.
    let anchor = path.anchor();
    let anchored = current
        .iter()
        .filter(|a| {
            a.anchor.subject == anchor.subject && a.anchor.subject_public_key_info == anchor.subject_public_key_info
        })
        .map(|a| a.not_after)
        .max();
    Ok(until.min(anchored.unwrap_or(seconds)))
}

/// A time as people write it. Reasons hold points in time, not distances, so that they stay the same while they last.
pub(super) fn date(seconds: u64) -> String {
    let limit = 253_402_300_799; // the last second of the year 9999
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds.min(limit))).to_string()
}

/// The leaf's own extended use was read by [`Svid::new`].
struct AnyUse;

impl webpki::ExtendedKeyUsageValidator for AnyUse {
    fn validate(&self, uses: webpki::KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        for each in uses {
            each?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::TrustDomain;
    use crate::testing::{ExtendedKeyUsagePurpose as Eku, FAR_OFF, Issued, Key, Spec, TestCa};

    const NOW: u64 = 1_800_000_000;
    const ID: &str = "spiffe://nhs.example/web";

    fn check(issued: &Issued, roots: &[&TestCa]) -> Result<u64, String> {
        check_at(issued, roots, NOW)
    }

    fn check_at(issued: &Issued, roots: &[&TestCa], now: u64) -> Result<u64, String> {
        let svid = Svid::new(issued.chain.clone(), issued.key(), None).unwrap();
        let mut bundles = TrustBundles::empty();
        let domain = TrustDomain::parse(roots[0].domain()).unwrap();
        bundles.set(domain, roots.iter().map(|ca| ca.root()).collect()).unwrap();
        verify_own_chain(&svid, &bundles, UnixTime::since_unix_epoch(Duration::from_secs(now)))
    }

    #[test]
    fn good_chains() {
        let ca = TestCa::new("nhs.example");
        let spec = Spec::leaf(ID).valid(NOW - 10, NOW + 60);
        for key in [Key::P384, Key::P256] {
            assert_eq!(check(&ca.issue(&spec.clone().key(key)), &[&ca]), Ok(NOW + 60));
            let other = TestCa::root_with("nhs.example", &Spec::authority("nhs.example").key(key));
            assert_eq!(check(&other.issue(&spec), &[&ca, &other]), Ok(NOW + 60));
        }
        assert_eq!(check(&ca.intermediate().intermediate().issue(&spec), &[&ca]), Ok(NOW + 60));
    }

    #[test]
    fn the_shortest_life_of_the_path_counts() {
        let ca = TestCa::new("nhs.example");
        let short = ca.intermediate_with(&Spec::authority("nhs.example").valid(NOW - 10, NOW + 30));
        assert_eq!(check(&short.svid("/web"), &[&ca]), Ok(NOW + 30));
        let brief = TestCa::root_with("nhs.example", &Spec::authority("nhs.example").valid(NOW - 10, NOW + 20));
        assert_eq!(check(&brief.svid("/web"), &[&brief, &ca]), Ok(NOW + 20));
        assert_eq!(check(&ca.svid("/web"), &[&ca]), Ok(FAR_OFF));
    }

    #[test]
    fn dates_include_both_ends() {
        let ca = TestCa::new("nhs.example");
        let issued = ca.issue(&Spec::leaf(ID).valid(NOW, NOW + 60));
        for (now, word) in
            [(NOW - 1, "not valid before 2027-01-15T08:00:00Z"), (NOW + 61, "expired at 2027-01-15T08:01:00Z")]
        {
            let why = check_at(&issued, &[&ca], now).unwrap_err();
            assert!(why.contains(word), "{why}");
        }
        assert_eq!(check_at(&issued, &[&ca], NOW), Ok(NOW + 60));
        assert_eq!(check_at(&issued, &[&ca], NOW + 60), Ok(NOW + 60));
    }

    #[test]
    fn no_path_no_identity() {
        let (ca, other) = (TestCa::new("nhs.example"), TestCa::new("nhs.example"));
        let why = check(&other.svid("/web"), &[&ca]).unwrap_err();
        assert!(why.contains("does not verify against the 1 authorities"), "{why}");
        // The intermediate is missing from the chain.
        let mut cut = ca.intermediate().svid("/web");
        cut.chain.truncate(1);
        assert!(check(&cut, &[&ca]).is_err());
        // The right authority stands in the bundle of another trust domain.
        let foreign = TestCa::new("gp.example");
        let why = check(&foreign.issue(&Spec::leaf(ID)), &[&foreign]).unwrap_err();
        assert!(why.contains("no trust bundle for its trust domain nhs.example"), "{why}");
        // The authority itself has expired.
        let dead = TestCa::root_with("nhs.example", &Spec::authority("nhs.example").valid(NOW - 10, NOW - 1));
        let why = check(&dead.svid("/web"), &[&dead]).unwrap_err();
        assert!(why.contains("against the 0 authorities"), "{why}");
    }

    #[test]
    fn an_authority_with_an_rsa_key_is_refused_with_the_remedy() {
        let rsa = TestCa::root_with("nhs.example", &Spec::authority("nhs.example").key(Key::Rsa));
        let why = check(&rsa.svid("/web"), &[&rsa]).unwrap_err();
        assert!(why.contains("ca_key_type"), "{why}");
    }

    #[test]
    fn extended_use_of_an_intermediate_is_the_peers_to_judge() {
        let ca = TestCa::new("nhs.example");
        let server_only = ca.intermediate_with(&Spec::authority("nhs.example").extended([Eku::ServerAuth]));
        assert!(check(&server_only.svid("/web"), &[&ca]).is_ok());
    }
}
