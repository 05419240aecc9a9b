use super::*;
use crate::clock::SteppedClock;
use crate::config::schema::{EmbeddedIdentity, Span};
use crate::identity::SpiffeId;
use crate::identity::source::{Event, Source, Update};

const NOW: u64 = 1_800_000_000;

fn domain() -> TrustDomain {
    TrustDomain::parse("lab.test").unwrap()
}

fn web() -> SvidRequest {
    SvidRequest::new(SpiffeId::parse("spiffe://lab.test/web").unwrap())
}

fn options(svid_ttl: u64, ca_ttl: u64) -> Options {
    Options { svid_ttl: Duration::from_secs(svid_ttl), ca_ttl: Duration::from_secs(ca_ttl), ..Options::new(domain()) }
}

async fn update(source: &mut EmbeddedSource) -> Update {
    match source.next().await {
        Event::Update(update) => update,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn the_svid_is_renewed_at_half_its_life() {
    let clock = SteppedClock::starting_at(NOW);
    let authority = Authority::open(options(60, 3600), clock.clock()).unwrap();
    let mut source = EmbeddedSource::new(authority, web()).unwrap();
    let first = update(&mut source).await;
    assert_eq!(first.svids[0].facts().not_after, NOW + 60);
    let mut last = Instant::now();
    let mut before = first;
    for _ in 0..5 {
        let next = update(&mut source).await;
        let waited = last.elapsed().as_secs_f64();
        assert!((26.0..=34.0).contains(&waited), "{waited}");
        assert!(!next.svids[0].same_leaf(&before.svids[0]));
        last = Instant::now();
        before = next;
    }
}

#[tokio::test(start_paused = true)]
async fn a_dropped_wait_loses_nothing() {
    let clock = SteppedClock::starting_at(NOW);
    let authority = Authority::open(options(60, 3600), clock.clock()).unwrap();
    let mut source = EmbeddedSource::new(authority.clone(), web()).unwrap();
    let first = update(&mut source).await;
    assert!(tokio::time::timeout(Duration::from_secs(5), source.next()).await.is_err());
    authority.prepare_ca().unwrap();
    let second = update(&mut source).await;
    assert!(second.svids[0].same_leaf(&first.svids[0]), "a new CA alone is no reason for a new SVID");
    assert_eq!(second.bundles.authorities("lab.test").unwrap().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_slept_renews_at_once() {
    let clock = SteppedClock::starting_at(NOW);
    let authority = Authority::open(options(3600, 86_400), clock.clock()).unwrap();
    let mut source = EmbeddedSource::new(authority, web()).unwrap();
    update(&mut source).await;
    clock.jump(2000);
    let began = Instant::now();
    assert_eq!(update(&mut source).await.svids[0].facts().not_after, NOW + 5600);
    assert!(began.elapsed() <= Duration::from_secs(2));
    // Past the end of the CA as well.
    clock.jump(200_000);
    let update = update(&mut source).await;
    assert!(update.svids[0].facts().not_after > NOW + 200_000);
}

#[tokio::test(start_paused = true)]
async fn the_ca_rotates_with_overlap_and_no_svid_is_ever_without_its_ca() {
    let clock = SteppedClock::starting_at(NOW);
    let authority = Authority::open(options(10, 120), clock.clock()).unwrap();
    let mut source = EmbeddedSource::new(authority, web()).unwrap();
    let mut trusted: Vec<Vec<u8>> = Vec::new();
    let mut cas = std::collections::HashSet::new();
    let mut known_before = true;
    while clock.clock().now() < NOW + 600 {
        let update = update(&mut source).await;
        let anchors = update.bundles.authorities("lab.test").unwrap();
        let svid = &update.svids[0];
        let issuer = anchors
            .iter()
            .find(|a| {
                webpki::EndEntityCert::try_from(&svid.chain()[0])
                    .unwrap()
                    .verify_for_usage(
                        webpki::ALL_VERIFICATION_ALGS,
                        std::slice::from_ref(&a.anchor),
                        &[],
                        clock.clock().unix_time(),
                        webpki::KeyUsage::client_auth(),
                        None,
                        None,
                    )
                    .is_ok()
            })
            .expect("the SVID verifies against its own bundle");
        let issuer = issuer.der.to_vec();
        if !trusted.is_empty() {
            known_before &= trusted.contains(&issuer);
        }
        cas.insert(issuer);
        trusted = anchors.iter().map(|a| a.der.to_vec()).collect();
        assert!(trusted.len() <= 3);
        assert!(anchors.iter().all(|a| a.not_after > clock.clock().now()));
    }
    assert!(known_before, "a CA signed before it was published");
    assert!(cas.len() >= 5, "{} CAs in five lives", cas.len());
}

#[tokio::test(start_paused = true)]
async fn rotation_and_retirement_by_hand() {
    let clock = SteppedClock::starting_at(NOW);
    let authority = Authority::open(options(60, 3600), clock.clock()).unwrap();
    let mut source = EmbeddedSource::new(authority.clone(), web()).unwrap();
    let first = update(&mut source).await;
    let old_ca = authority.published().active_ca().unwrap().to_owned();
    authority.rotate_ca(Duration::from_secs(1)).await.unwrap();
    assert_ne!(authority.published().active_ca().unwrap(), old_ca);
    let second = update(&mut source).await;
    assert!(second.svids[0].same_leaf(&first.svids[0]));
    let retire = tokio::spawn({
        let authority = authority.clone();
        async move { authority.retire_old_cas(Duration::from_secs(3)).await }
    });
    let third = update(&mut source).await;
    assert!(!third.svids[0].same_leaf(&first.svids[0]), "SVIDs of a tainted CA are replaced at once");
    assert_eq!(third.bundles.authorities("lab.test").unwrap().len(), 2, "and it is trusted until they are");
    let fourth = update(&mut source).await;
    assert_eq!(fourth.bundles.authorities("lab.test").unwrap().len(), 1);
    assert!(fourth.svids[0].same_leaf(&third.svids[0]));
    retire.await.unwrap().unwrap();
    assert!(matches!(authority.activate_ca(), Err(AuthorityError::NothingPrepared)));
}

#[tokio::test]
async fn a_restart_keeps_the_ca_and_processes_share_a_state_directory() {
    let folder = tempfile::tempdir().unwrap();
    let config = |name: &str| EmbeddedIdentity {
        spiffe_id: SpiffeId::parse(&format!("spiffe://lab.test/{name}")).unwrap(),
        svid_ttl: Span::seconds(60),
        state_dir: Some(folder.path().join("state")),
        federates_with: BTreeMap::new(),
    };
    let mut one = EmbeddedSource::from_config(&config("one"), Clock::system()).unwrap();
    let mut two = EmbeddedSource::from_config(&config("two"), Clock::system()).unwrap();
    let (first, second) = (update(&mut one).await, update(&mut two).await);
    assert!(first.bundles.same_as(&second.bundles));
    // One rotates, the other notices.
    one.authority().rotate_ca(Duration::ZERO).await.unwrap();
    let noticed = update(&mut two).await;
    assert_eq!(noticed.bundles.authorities("lab.test").unwrap().len(), 2);
    let active = one.authority().published().active_ca().unwrap().to_owned();
    assert_eq!(two.authority().published().active_ca().unwrap(), active);
    drop((one, two));
    let again = EmbeddedSource::from_config(&config("one"), Clock::system()).unwrap();
    assert_eq!(again.authority().published().active_ca().unwrap(), active);
    let mut other = config("one");
    other.spiffe_id = SpiffeId::parse("spiffe://other.test/one").unwrap();
    let error = EmbeddedSource::from_config(&other, Clock::system()).unwrap_err();
    assert!(error.to_string().contains("belongs to trust domain"), "{error}");
}

#[tokio::test]
async fn a_damaged_state_file_does_not_stop_what_is_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(60, 3600);
    options.state_dir = Some(folder.path().join("state"));
    let authority = Authority::open(options, Clock::system()).unwrap();
    std::fs::write(folder.path().join("state/authority.json"), "damaged").unwrap();
    assert!(authority.maintain().is_err());
    assert!(authority.maintain().is_ok(), "said once, not every second");
    assert!(authority.issue(&web()).is_ok());
    assert!(authority.prepare_ca().is_err(), "nothing is written over what we do not understand");
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let authority = Authority::open(options(60, 3600), Clock::system()).unwrap();
    let refused = |change: &dyn Fn(&mut SvidRequest)| {
        let mut request = web();
        change(&mut request);
        authority.issue(&request).unwrap_err().to_string()
    };
    assert!(refused(&|r| r.id = SpiffeId::parse("spiffe://else.test/web").unwrap()).contains("not of trust domain"));
    assert!(refused(&|r| r.id = SpiffeId::parse("spiffe://lab.test").unwrap()).contains("no path"));
    assert!(refused(&|r| r.dns_names = vec!["a b".into()]).contains("not a DNS name"));
    assert!(refused(&|r| r.dns_names = vec!["a.test".into(); 33]).contains("DNS names"));
    assert!(refused(&|r| r.ttl = Some(Duration::from_secs(1))).contains("shorter"));
    assert!(refused(&|r| r.ttl = Some(Duration::from_secs(3000))).contains("half of ca_ttl"));
    assert!(Authority::open(options(60, 100), Clock::system()).unwrap_err().to_string().contains("twice"));
    assert!(Authority::open(options(1, 100), Clock::system()).is_err());
    assert!(Authority::open(options(1000, u64::from(u32::MAX)), Clock::system()).is_err());
}

#[test]
fn a_foreign_bundle_is_published_and_forgotten() {
    let ours = Authority::open(options(60, 3600), Clock::system()).unwrap();
    let theirs = Authority::open(
        Options { trust_domain: TrustDomain::parse("else.test").unwrap(), ..options(60, 3600) },
        Clock::system(),
    )
    .unwrap();
    let text = theirs.bundle_document().write().unwrap();
    let read = BundleDocument::read(text.as_bytes()).unwrap();
    ours.set_foreign_bundle(theirs.trust_domain(), read.authorities.clone()).unwrap();
    let generation = ours.published().generation;
    ours.set_foreign_bundle(theirs.trust_domain(), read.authorities.clone()).unwrap();
    assert_eq!(ours.published().generation, generation, "the same again is no change");
    assert_eq!(ours.published().bundles.authorities("else.test").unwrap().len(), 1);
    assert!(ours.set_foreign_bundle(&domain(), read.authorities).is_err(), "never our own");
    assert!(ours.set_foreign_bundle(theirs.trust_domain(), vec![vec![1, 2].into()]).is_err());
    assert_eq!(ours.published().bundles.authorities("else.test").unwrap().len(), 1);
    ours.remove_foreign_bundle(theirs.trust_domain()).unwrap();
    assert!(ours.published().bundles.authorities("else.test").is_none());
}

#[tokio::test]
async fn an_embedded_identity_knows_its_federated_domains_from_the_first_moment() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("else.json");
    let theirs = Authority::open(
        Options { trust_domain: TrustDomain::parse("else.test").unwrap(), ..options(60, 3600) },
        Clock::system(),
    )
    .unwrap();
    std::fs::write(&path, theirs.bundle_document().write().unwrap()).unwrap();
    let mut config = EmbeddedIdentity {
        spiffe_id: web().id,
        svid_ttl: Span::seconds(60),
        state_dir: None,
        federates_with: [(theirs.trust_domain().clone(), path.to_str().unwrap().to_owned())].into(),
    };
    let mut source = EmbeddedSource::from_config(&config, Clock::system()).unwrap();
    assert_eq!(update(&mut source).await.bundles.authorities("else.test").unwrap().len(), 1);
    config.federates_with = [(theirs.trust_domain().clone(), "http://else.test/".to_owned())].into();
    let error = EmbeddedSource::from_config(&config, Clock::system()).unwrap_err();
    assert!(error.to_string().contains("federates_with"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_set_back_makes_a_new_svid() {
    let clock = SteppedClock::starting_at(NOW);
    let authority = Authority::open(options(3600, 86_400), clock.clock()).unwrap();
    let svid = authority.issue(&web()).unwrap();
    assert!(!svid.due(NOW) && !svid.due(NOW - 10));
    assert!(svid.due(NOW - 11));
    assert!(!svid.due(NOW + 1600) && svid.due(NOW + 2000));
}
