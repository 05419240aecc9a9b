//! What an agent's message means: held against the rules, SVID by SVID.

use std::collections::BTreeSet;

use rustls::pki_types::{CertificateRevocationListDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::der;
use super::pb::{X509Svid, X509SvidResponse};
use super::{MAX_BUNDLES, MAX_CRLS, MAX_SVIDS};
use crate::identity::bundle::MAX_AUTHORITIES;
use crate::identity::source::Update;
use crate::identity::svid::MAX_CHAIN;
use crate::identity::{SpiffeId, Svid, TrustBundles, TrustDomain};

/// Reads a message. An SVID or federated bundle that breaks a rule is left out and named in `refused`.
///
/// # Errors
/// The message as a whole is refused: it is too large, or holds a revocation list that cannot be read (to go on without
/// it would be to trust what it revokes).
pub(super) fn read(mut message: X509SvidResponse) -> Result<Update, String> {
    if message.svids.len() > MAX_SVIDS {
        return Err(format!("the agent sent {} SVIDs, and the limit is {MAX_SVIDS}", message.svids.len()));
    }
    if message.federated_bundles.len() > MAX_BUNDLES {
        let count = message.federated_bundles.len();
        return Err(format!("the agent sent {count} federated bundles, and the limit is {MAX_BUNDLES}"));
    }
    if message.crl.len() > MAX_CRLS {
        return Err(format!("the agent sent {} revocation lists, and the limit is {MAX_CRLS}", message.crl.len()));
    }
    let mut update = Update::default();
    for (index, svid) in message.svids.iter_mut().enumerate() {
        match read_svid(svid, &mut update.bundles) {
            Ok(svid) => update.svids.push(svid),
            Err(why) => update.refused.push(format!("SVID {index} ({}): {why}", svid.spiffe_id.escape_debug())),
        }
    }
    for (name, bundle) in &message.federated_bundles {
        if let Err(why) = read_federated(name, bundle, &mut update.bundles) {
            update.refused.push(format!("federated bundle '{}': {why}", name.escape_debug()));
        }
    }
    for (index, crl) in std::mem::take(&mut message.crl).into_iter().enumerate() {
        let crl = CertificateRevocationListDer::from(crl);
        webpki::BorrowedCertRevocationList::from_der(&crl)
            .map_err(|e| format!("revocation list {index} of the agent cannot be read: {e}"))?;
        update.crls.push(crl);
    }
    Ok(update)
}

fn read_svid(svid: &mut X509Svid, bundles: &mut TrustBundles) -> Result<Svid, String> {
    let id = SpiffeId::parse_workload(&svid.spiffe_id).map_err(|e| e.to_string())?;
    let domain = id.trust_domain();
    let authorities = der::split(&svid.bundle, MAX_AUTHORITIES).map_err(|e| format!("its bundle: {e}"))?;
    match bundles.authorities(domain.as_str()) {
        None => bundles.set(domain, authorities).map_err(|e| format!("its bundle: {e}"))?,
        // A second word on one domain cannot add to the first, or the more trusting of the two would win.
        // A bundle is a set: in which order an agent writes it says nothing.
        Some(known)
            if known.iter().map(|a| a.der.as_ref()).collect::<BTreeSet<&[u8]>>()
                != authorities.iter().map(|der| der.as_ref()).collect() =>
        {
            return Err("its bundle differs from that of another SVID of the same trust domain".into());
        }
        Some(_) => {}
    }
    let chain = der::split(&svid.x509_svid, MAX_CHAIN).map_err(|e| format!("its chain: {e}"))?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(std::mem::take(&mut svid.x509_svid_key)));
    let hint = (!svid.hint.is_empty()).then(|| std::mem::take(&mut svid.hint));
    let read = Svid::new(chain, key, hint).map_err(|e| e.to_string())?;
    if *read.id() != id {
        return Err(format!("the certificate names another SPIFFE ID, {}", read.id()));
    }
    Ok(read)
}

fn read_federated(name: &str, bundle: &[u8], bundles: &mut TrustBundles) -> Result<(), String> {
    let domain = TrustDomain::parse(name).map_err(|e| e.to_string())?;
    if bundles.authorities(domain.as_str()).is_some() {
        return Err("it is our own trust domain's, or there twice".into());
    }
    let authorities = der::split(bundle, MAX_AUTHORITIES)?;
    bundles.set(domain, authorities).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::{Authority, Options, SvidRequest};
    use crate::clock::Clock;

    fn authority(domain: &str) -> Authority {
        Authority::open(Options::new(TrustDomain::parse(domain).unwrap()), Clock::system()).unwrap()
    }

    fn svid(authority: &Authority, path: &str, hint: &str) -> X509Svid {
        let id = SpiffeId::parse(&format!("spiffe://{}{path}", authority.trust_domain().as_str())).unwrap();
        let issued = authority.issue(&SvidRequest::new(id.clone())).unwrap();
        X509Svid {
            spiffe_id: id.as_str().into(),
            x509_svid: der::join(issued.chain()),
            x509_svid_key: issued.key_pkcs8().to_vec(),
            bundle: der::join(authority.published().own_authorities()),
            hint: hint.into(),
        }
    }

    fn message(svids: Vec<X509Svid>) -> X509SvidResponse {
        X509SvidResponse { svids, ..X509SvidResponse::default() }
    }

    #[test]
    fn a_full_set_keeps_its_order_and_its_repeated_hints() {
        let (ours, theirs) = (authority("lab.test"), authority("else.test"));
        let mut set = message(vec![svid(&ours, "/b", "same"), svid(&ours, "/a", "same"), svid(&ours, "/c", "")]);
        let foreign = der::join(theirs.published().own_authorities());
        set.federated_bundles = [("spiffe://else.test".to_owned(), foreign)].into();
        let update = read(set).unwrap();
        assert!(update.refused.is_empty(), "{:?}", update.refused);
        let told: Vec<_> = update.svids.iter().map(|s| (s.id().path(), s.hint())).collect();
        assert_eq!(told, [("/b", Some("same")), ("/a", Some("same")), ("/c", None)]);
        let domains: Vec<_> = update.bundles.iter().map(|(d, _)| d.as_str().to_owned()).collect();
        assert_eq!(domains, ["else.test", "lab.test"]);
    }

    #[test]
    fn one_bad_svid_does_not_spoil_the_others() {
        let (ours, theirs) = (authority("lab.test"), authority("else.test"));
        let spoil = |change: &dyn Fn(&mut X509Svid)| {
            let mut bad = svid(&ours, "/bad", "");
            change(&mut bad);
            let update = read(message(vec![bad, svid(&ours, "/good", "")])).unwrap();
            assert_eq!(update.svids.len(), 1);
            assert_eq!(update.svids[0].id().path(), "/good");
            assert_eq!(update.refused.len(), 1);
            update.refused[0].clone()
        };
        assert!(spoil(&|s| s.spiffe_id = "spiffe://lab.test/other".into()).contains("names another SPIFFE ID"));
        assert!(spoil(&|s| s.spiffe_id = "spiffe://lab.test".into()).contains("needs a path"));
        assert!(spoil(&|s| s.x509_svid.clear()).contains("chain is empty"));
        assert!(spoil(&|s| s.x509_svid.truncate(20)).contains("cut off"));
        assert!(spoil(&|s| s.x509_svid_key.clear()).contains("private key"));
        assert!(
            spoil(&|s| s.x509_svid_key = svid(&ours, "/x", "").x509_svid_key.clone()).contains("private key"),
            "another one's key"
        );
        assert!(spoil(&|s| s.bundle.clear()).contains("holds no authority"));
        assert!(spoil(&|s| s.x509_svid = s.bundle.clone()).contains("needs a path"), "a CA is no leaf");
        let foreign = der::join(theirs.published().own_authorities());
        let update = read(message(vec![svid(&ours, "/good", ""), {
            let mut bad = svid(&ours, "/bad", "");
            bad.bundle.clone_from(&foreign);
            bad
        }]))
        .unwrap();
        assert!(update.refused[0].contains("differs"), "{:?}", update.refused);
        assert_eq!(update.bundles.authorities("lab.test").unwrap().len(), 1);
    }

    #[test]
    fn while_a_ca_is_rotated_every_svid_of_a_set_is_taken_whatever_the_order_of_its_authorities() {
        let (old, new) = (authority("lab.test"), authority("lab.test"));
        let ders = [old.published().own_authorities()[0].clone(), new.published().own_authorities()[0].clone()];
        for order in [[0, 1], [1, 0]] {
            let both = der::join(&order.map(|index| ders[index].clone()));
            let set = ["/a", "/b"].map(|path| {
                let mut svid = svid(&old, path, "");
                svid.bundle.clone_from(&both);
                svid
            });
            let update = read(message(set.into())).unwrap();
            assert_eq!((update.svids.len(), update.refused.len()), (2, 0), "{:?}", update.refused);
        }
    }

    #[test]
    fn bad_federated_bundles_are_left_out_and_ours_is_not_replaced() {
        let (ours, theirs) = (authority("lab.test"), authority("else.test"));
        let foreign = der::join(theirs.published().own_authorities());
        let mut set = message(vec![svid(&ours, "/a", "")]);
        set.federated_bundles = [
            ("spiffe://lab.test".to_owned(), foreign.clone()),
            ("spiffe://Else.test".to_owned(), foreign.clone()),
            ("spiffe://empty.test".to_owned(), Vec::new()),
            ("spiffe://else.test".to_owned(), foreign),
        ]
        .into();
        let update = read(set).unwrap();
        assert_eq!(update.refused.len(), 3, "{:?}", update.refused);
        assert_eq!(update.bundles.iter().count(), 2);
        let own = update.bundles.authorities("lab.test").unwrap();
        assert_eq!(own[0].der, ours.published().own_authorities()[0]);
    }

    #[test]
    fn too_much_is_refused_as_a_whole() {
        let many = message(vec![X509Svid::default(); MAX_SVIDS + 1]);
        assert!(read(many).unwrap_err().contains("limit is 100"));
        let mut many = message(vec![]);
        many.federated_bundles = (0..=MAX_BUNDLES).map(|n| (format!("spiffe://d{n}"), vec![])).collect();
        assert!(read(many).unwrap_err().contains("limit is 256"));
        let mut crl = message(vec![]);
        crl.crl = vec![vec![1, 2, 3]];
        assert!(read(crl).unwrap_err().contains("cannot be read"));
    }

    #[test]
    fn revocation_lists_are_passed_on() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::CrlSign];
        let crl = rcgen::CertificateRevocationListParams {
            this_update: rcgen::date_time_ymd(2026, 1, 1),
            next_update: rcgen::date_time_ymd(2036, 1, 1),
            crl_number: rcgen::SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![],
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        }
        .signed_by(&rcgen::Issuer::new(params, key))
        .unwrap();
        let mut set = message(vec![]);
        set.crl = vec![crl.der().to_vec()];
        assert_eq!(read(set).unwrap().crls, [crl.der().clone()]);
    }
}
