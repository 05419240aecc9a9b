//! The keeper on a clock that the test moves, with a source that says what the test tells it to.

use std::future::Future;
use std::pin::Pin;

use proptest::prelude::*;
use rustls::pki_types::UnixTime;
use tokio::sync::mpsc;

use super::*;
use crate::clock::SteppedClock;
use crate::identity::{KeyType, SpiffeId, TrustDomain};
use crate::testing::{Issued, Key, Spec, TestCa};

const START: u64 = 1_800_000_000;
const WEB: &str = "spiffe://nhs.example/web";
const API: &str = "spiffe://nhs.example/api";
const GRACE: u64 = 2;

/// Says what the test tells it to say.
struct Scripted(mpsc::UnboundedReceiver<Event>);

impl Source for Scripted {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn next(&mut self) -> Pin<Box<dyn Future<Output = Event> + Send + '_>> {
        Box::pin(async {
            match self.0.recv().await {
                Some(event) => event,
                None => std::future::pending().await,
            }
        })
    }
}

struct Bench {
    ca: TestCa,
    clock: Arc<SteppedClock>,
    events: mpsc::UnboundedSender<Event>,
    current: watch::Receiver<Current>,
}

fn options() -> KeeperOptions {
    KeeperOptions {
        choice: Choice::default(),
        withdraw_grace: Duration::from_secs(GRACE),
        svid_keys: SvidKeys::P384,
        crls: Vec::new(),
    }
}

fn chosen(id: Option<&str>, hint: Option<&str>) -> KeeperOptions {
    let id = id.map(|id| SpiffeId::parse(id).unwrap());
    KeeperOptions { choice: Choice::new(id, hint.map(Into::into)), ..options() }
}

fn svid(issued: &Issued, hint: Option<&str>) -> Svid {
    Svid::new(issued.chain.clone(), issued.key(), hint.map(Into::into)).unwrap()
}

impl Bench {
    fn new() -> Self {
        Self::with(options())
    }

    fn with(options: KeeperOptions) -> Self {
        let clock = SteppedClock::starting_at(START);
        let (events, script) = mpsc::unbounded_channel();
        let (keeper, current) = Keeper::new(options, clock.clock());
        tokio::spawn(keeper.run(Box::new(Scripted(script))));
        Self { ca: TestCa::new("nhs.example"), clock, events, current }
    }

    fn now(&self) -> u64 {
        self.clock.clock().now()
    }

    /// An SVID that lives for `life` seconds from now, as SPIRE dates it.
    fn issue(&self, id: &str, life: u64) -> Issued {
        self.ca.issue(&Spec::leaf(id).valid(self.now() - 10, self.now() + life))
    }

    fn bundles(&self, more: &[&TestCa]) -> TrustBundles {
        let mut bundles = TrustBundles::empty();
        let mut roots = vec![self.ca.root()];
        roots.extend(more.iter().map(|ca| ca.root()));
        bundles.set(TrustDomain::parse("nhs.example").unwrap(), roots).unwrap();
        bundles
    }

    async fn event(&self, event: Event) -> Current {
        self.events.send(event).unwrap();
        self.after_millis(10).await
    }

    async fn offer(&self, svids: &[&Issued]) -> Current {
        self.offer_with(svids.iter().map(|issued| svid(issued, None)).collect(), self.bundles(&[])).await
    }

    async fn offer_with(&self, svids: Vec<Svid>, bundles: TrustBundles) -> Current {
        self.event(Event::Update(Update { svids, bundles, ..Update::default() })).await
    }

    async fn no_identity(&self) -> Current {
        self.event(Event::NoIdentity { why: "no identity issued".into() }).await
    }

    async fn outage(&self) -> Current {
        self.event(Event::Unavailable { why: "connection refused".into() }).await
    }

    async fn after(&self, seconds: u64) -> Current {
        self.after_millis(seconds * 1000).await
    }

    async fn after_millis(&self, millis: u64) -> Current {
        tokio::time::sleep(Duration::from_millis(millis)).await;
        self.current.borrow().clone()
    }
}

fn leaf(current: &Current) -> &[u8] {
    current.identity.as_ref().unwrap().svid.chain()[0].as_ref()
}

fn id(current: &Current) -> &str {
    current.identity.as_ref().unwrap().svid.id().as_str()
}

#[tokio::test(start_paused = true)]
async fn the_first_identity() {
    let bench = Bench::new();
    let current = bench.after(3).await;
    assert_eq!((current.state, current.generation), (SvidState::Absent, 0));
    assert!(current.identity.is_none() && !current.source_reachable);
    assert!(current.why.contains("has not answered yet"), "{}", current.why);
    let issued = bench.issue(WEB, 60);
    let now = bench.now();
    let current = bench.offer(&[&issued]).await;
    assert_eq!((current.state, current.generation, current.why.as_str()), (SvidState::Fresh, 1, ""));
    assert_eq!(current.identity.as_ref().unwrap().generation, 1);
    assert_eq!((current.not_after, current.last_update, current.since), (Some(now + 60), Some(now), now));
    assert!(current.source_reachable && current.refused.is_empty());
    assert_eq!(current.counters, Counters { trust_changes: 1, ..Counters::default() });
}

#[tokio::test(start_paused = true)]
async fn rotation_counts_generations_and_a_repeated_set_changes_nothing() {
    let mut bench = Bench::new();
    let first = bench.issue(WEB, 60);
    bench.offer(&[&first]).await;
    bench.after(25).await;
    let second = bench.issue(WEB, 60);
    let current = bench.offer(&[&second]).await;
    assert_eq!((current.state, current.generation, leaf(&current)), (SvidState::Fresh, 2, second.der().as_ref()));
    assert_eq!((current.counters.rotations, current.last_rotation), (1, Some(START + 25)));
    bench.current.mark_unchanged();
    let again = bench.offer(&[&second]).await;
    assert!(Arc::ptr_eq(again.identity.as_ref().unwrap(), current.identity.as_ref().unwrap()));
    assert_eq!((again.generation, again.counters), (2, current.counters));
    // The very same moment: not even a notice. Later only the time of the update differs.
    assert!(!bench.current.has_changed().unwrap());
    bench.after(3).await;
    assert_eq!(bench.offer(&[&second]).await.last_update, Some(START + 28));
}

#[tokio::test(start_paused = true)]
async fn a_change_of_trust_is_a_new_generation_of_the_same_svid() {
    let bench = Bench::new();
    let issued = bench.issue(WEB, 600);
    let first = bench.offer(&[&issued]).await;
    let next = TestCa::new("nhs.example");
    let current = bench.offer_with(vec![svid(&issued, None)], bench.bundles(&[&next])).await;
    assert_eq!((current.generation, current.counters.rotations, current.counters.trust_changes), (2, 0, 2));
    let identity = current.identity.unwrap();
    assert_eq!((identity.generation, identity.bundles.authorities("nhs.example").unwrap().len()), (2, 2));
    assert!(Arc::ptr_eq(&identity.svid, &first.identity.unwrap().svid));
}

#[tokio::test(start_paused = true)]
async fn an_outage_keeps_a_valid_identity_until_it_expires_and_no_longer() {
    let bench = Bench::new();
    let issued = bench.issue(WEB, 60);
    bench.offer(&[&issued]).await;
    let current = bench.outage().await;
    assert_eq!((current.state, leaf(&current)), (SvidState::Stale, issued.der().as_ref()));
    assert!(current.why.contains("connection refused") && !current.source_reachable, "{}", current.why);
    bench.outage().await;
    let current = bench.after(59).await;
    assert_eq!((current.state, current.identity.is_some()), (SvidState::Stale, true));
    // Valid up to and including notAfter, and found out within a fifth of a second.
    let current = bench.after_millis(2200).await;
    assert_eq!((current.state, current.identity.is_none()), (SvidState::Expired, true));
    assert!(current.why.contains("expired at 2027-01-15T08:01:00Z"), "{}", current.why);
    assert_eq!((current.generation, current.not_after), (1, Some(START + 60)));
    assert_eq!((current.counters.expired, current.counters.outages), (1, 1));
    // The source comes back with a fresh one.
    bench.after(49).await;
    let fresh = bench.issue(WEB, 60);
    let current = bench.offer(&[&fresh]).await;
    assert_eq!((current.state, current.generation, leaf(&current)), (SvidState::Fresh, 2, fresh.der().as_ref()));
}

#[tokio::test(start_paused = true)]
async fn a_source_that_goes_on_serving_an_expired_svid_is_not_believed() {
    let bench = Bench::new();
    let issued = bench.issue(WEB, 20);
    bench.offer(&[&issued]).await;
    let current = bench.after(30).await;
    assert_eq!(current.state, SvidState::Expired);
    let current = bench.offer(&[&issued]).await;
    assert_eq!((current.state, current.identity.is_none(), current.counters.refused), (SvidState::Expired, true, 1));
    bench.offer(&[&issued]).await;
    assert_eq!(bench.after(30).await.counters.refused, 1);
}

#[tokio::test(start_paused = true)]
async fn an_expired_svid_never_takes_the_place_of_a_valid_one_but_its_bundles_do() {
    let bench = Bench::new();
    let old = bench.issue(WEB, 5);
    let good = bench.issue(WEB, 600);
    bench.offer(&[&good]).await;
    bench.after(10).await;
    let next = TestCa::new("nhs.example");
    let current = bench.offer_with(vec![svid(&old, None)], bench.bundles(&[&next])).await;
    assert_eq!((current.state, leaf(&current)), (SvidState::Stale, good.der().as_ref()));
    assert!(current.refused[0].contains("expired at"), "{:?}", current.refused);
    assert_eq!(current.identity.unwrap().bundles.authorities("nhs.example").unwrap().len(), 2);
    assert_eq!(bench.offer(&[&good]).await.state, SvidState::Fresh);
}

#[tokio::test(start_paused = true)]
async fn an_svid_that_does_not_verify_is_not_taken() {
    let bench = Bench::new();
    let good = bench.issue(WEB, 600);
    bench.offer(&[&good]).await;
    let stranger = TestCa::new("nhs.example");
    let current = bench.offer(&[&stranger.svid("/web")]).await;
    assert_eq!((current.state, leaf(&current)), (SvidState::Stale, good.der().as_ref()));
    assert!(current.why.contains("does not verify"), "{}", current.why);
    assert_eq!((current.generation, current.counters.refused), (1, 1));
    // A bundle that no longer holds the authority of the SVID that we have.
    let mut bundles = TrustBundles::empty();
    bundles.set(TrustDomain::parse("nhs.example").unwrap(), vec![stranger.root()]).unwrap();
    let current = bench.offer_with(vec![svid(&good, None)], bundles).await;
    assert_eq!((current.state, current.generation), (SvidState::Stale, 2));
    // The SVID of the authority that is to come arrives before the authority does.
    let current = bench.offer_with(vec![svid(&stranger.svid("/web"), None)], bench.bundles(&[&stranger])).await;
    assert_eq!((current.state, current.generation), (SvidState::Fresh, 3));
}

#[tokio::test(start_paused = true)]
async fn one_that_is_not_valid_yet_is_taken_when_its_time_comes() {
    let bench = Bench::new();
    let early = bench.ca.issue(&Spec::leaf(WEB).valid(START + 7, START + 600));
    let current = bench.offer(&[&early]).await;
    assert_eq!(current.state, SvidState::Absent);
    assert!(current.why.contains("not valid before"), "{}", current.why);
    assert_eq!(bench.after(9).await.state, SvidState::Fresh);
}

#[tokio::test(start_paused = true)]
async fn rotation_is_overdue_at_60_percent() {
    let bench = Bench::new();
    let issued = bench.issue(WEB, 1000);
    bench.offer(&[&issued]).await;
    let current = bench.after(599).await;
    assert_eq!((current.state, current.rotation_overdue), (SvidState::Fresh, false));
    let current = bench.after(3).await;
    assert_eq!((current.state, current.rotation_overdue), (SvidState::Stale, true));
    assert!(current.why.contains("rotation is overdue") && current.source_reachable, "{}", current.why);
    // The same leaf again is no newer one; the alarm is raised once.
    let current = bench.offer(&[&issued]).await;
    assert_eq!((current.rotation_overdue, current.counters.overdue), (true, 1));
    let current = bench.offer(&[&bench.issue(WEB, 1000)]).await;
    assert_eq!((current.state, current.rotation_overdue, current.counters.overdue), (SvidState::Fresh, false, 1));
}

#[tokio::test(start_paused = true)]
async fn an_old_svid_is_overdue_from_the_start() {
    let bench = Bench::new();
    let old = bench.ca.issue(&Spec::leaf(WEB).valid(START - 3000, START + 600));
    let current = bench.offer(&[&old]).await;
    assert_eq!((current.state, current.rotation_overdue), (SvidState::Stale, true));
}

#[tokio::test(start_paused = true)]
async fn a_message_without_us_that_is_followed_by_the_full_set_does_no_harm() {
    let mut bench = Bench::new();
    let (web, api) = (bench.issue(WEB, 60), bench.issue(API, 60));
    let before = bench.offer(&[&web, &api]).await;
    bench.current.mark_unchanged();
    bench
        .events
        .send(Event::Update(Update { svids: vec![svid(&api, None)], bundles: bench.bundles(&[]), ..Update::default() }))
        .unwrap();
    let next = bench.issue(WEB, 60);
    let current = bench.offer(&[&next, &api]).await;
    assert_eq!((current.state, id(&current), current.generation), (SvidState::Fresh, WEB, 2));
    assert_eq!(leaf(&current), next.der().as_ref());
    assert_eq!(current.counters.withdrawn, 0);
    assert_eq!(before.generation, 1);
    let current = bench.after(GRACE + 1).await;
    assert_eq!((id(&current), current.generation), (WEB, 2));
}

#[tokio::test(start_paused = true)]
async fn an_identity_that_is_no_longer_named_is_withdrawn_after_the_grace() {
    let bench = Bench::with(chosen(Some(WEB), None));
    let (web, api) = (bench.issue(WEB, 600), bench.issue(API, 600));
    bench.offer(&[&api, &web]).await;
    bench.offer(&[&api]).await;
    let current = bench.after_millis(1500).await;
    assert_eq!((current.state, id(&current)), (SvidState::Fresh, WEB));
    // Saying it again does not prolong the grace.
    bench.offer(&[&api]).await;
    let current = bench.after_millis(600).await;
    assert_eq!((current.state, current.identity.is_none()), (SvidState::Absent, true));
    assert!(current.why.contains(WEB) && current.why.contains(API), "{}", current.why);
    assert_eq!((current.counters.withdrawn, current.not_after), (1, None));
    let again = bench.issue(WEB, 600);
    let current = bench.offer(&[&api, &again]).await;
    assert_eq!((current.state, current.generation), (SvidState::Fresh, 2));
}

#[tokio::test(start_paused = true)]
async fn permission_denied_withdraws_after_the_grace_and_back() {
    let bench = Bench::new();
    let current = bench.no_identity().await;
    assert_eq!((current.state, current.source_reachable), (SvidState::Absent, true));
    assert!(current.why.contains("no identity issued"), "{}", current.why);
    bench.offer(&[&bench.issue(WEB, 600)]).await;
    assert_eq!(bench.no_identity().await.state, SvidState::Fresh);
    // A full set within the grace cancels.
    bench.offer(&[&bench.issue(WEB, 600)]).await;
    assert_eq!(bench.after(GRACE + 1).await.state, SvidState::Fresh);
    bench.no_identity().await;
    bench.after(1).await;
    bench.no_identity().await;
    bench.outage().await;
    let current = bench.after(1).await;
    assert_eq!((current.state, current.identity.is_none()), (SvidState::Absent, true));
    assert!(current.why.contains("no identity issued"), "{}", current.why);
    assert_eq!(current.counters.withdrawn, 1);
    assert_eq!(bench.offer(&[&bench.issue(WEB, 600)]).await.state, SvidState::Fresh);
}

#[tokio::test(start_paused = true)]
async fn an_empty_set_is_like_no_identity() {
    let bench = Bench::new();
    bench.offer(&[&bench.issue(WEB, 600)]).await;
    assert_eq!(bench.offer(&[]).await.state, SvidState::Fresh);
    assert_eq!(bench.after(GRACE).await.state, SvidState::Absent);
}

#[tokio::test(start_paused = true)]
async fn the_first_by_default_and_the_same_as_long_as_it_is_named() {
    let bench = Bench::new();
    let (web, api) = (bench.issue(WEB, 600), bench.issue(API, 600));
    assert_eq!(id(&bench.offer(&[&web, &api]).await), WEB);
    let current = bench.offer(&[&api, &web]).await;
    assert_eq!((id(&current), current.generation), (WEB, 1));
    bench.offer(&[&api]).await;
    let current = bench.after(GRACE).await;
    assert_eq!((id(&current), current.state, current.counters.withdrawn), (API, SvidState::Fresh, 1));
}

#[tokio::test(start_paused = true)]
async fn chosen_by_hint_and_of_repeated_hints_the_first() {
    let bench = Bench::with(chosen(None, Some("external")));
    let (web, api, third) = (bench.issue(WEB, 600), bench.issue(API, 600), bench.issue(API, 600));
    let current = bench.offer_with(vec![svid(&web, Some("internal"))], bench.bundles(&[])).await;
    assert_eq!(current.state, SvidState::Absent);
    assert!(current.why.contains("hint 'external'") && current.why.contains("hint 'internal'"), "{}", current.why);
    let set = || vec![svid(&web, Some("internal")), svid(&api, Some("external")), svid(&third, Some("external"))];
    for _ in 0..2 {
        let current = bench.offer_with(set(), bench.bundles(&[])).await;
        assert_eq!((leaf(&current), current.generation), (api.der().as_ref(), 1));
    }
    // The hint moves to another identity: a change that the operator made.
    let moved = vec![svid(&web, Some("external")), svid(&api, None)];
    assert_eq!(id(&bench.offer_with(moved, bench.bundles(&[])).await), WEB);
}

#[tokio::test(start_paused = true)]
async fn chosen_by_id_and_any_good_one_of_that_id_will_do() {
    let bench = Bench::with(chosen(Some(API), None));
    let (web, api) = (bench.issue(WEB, 600), bench.issue(API, 600));
    let expired = bench.ca.issue(&Spec::leaf(API).valid(START - 100, START - 1));
    let current = bench.offer(&[&web, &expired, &api]).await;
    assert_eq!((leaf(&current), current.state, current.counters.refused), (api.der().as_ref(), SvidState::Fresh, 0));
}

#[tokio::test(start_paused = true)]
async fn what_the_source_left_out_is_refused_and_not_withdrawn() {
    let bench = Bench::new();
    let web = bench.issue(WEB, 600);
    bench.offer(&[&web]).await;
    let update = Update {
        bundles: bench.bundles(&[]),
        refused: vec!["the certificate has 2 URI SANs".into()],
        ..Update::default()
    };
    bench.event(Event::Update(update)).await;
    let current = bench.after(GRACE + 1).await;
    assert_eq!((current.state, leaf(&current)), (SvidState::Stale, web.der().as_ref()));
    assert!(current.why.contains("2 URI SANs"), "{}", current.why);
}

#[tokio::test(start_paused = true)]
async fn the_wall_clock_jumps() {
    let bench = Bench::new();
    let issued = bench.issue(WEB, 3600);
    bench.offer(&[&issued]).await;
    bench.after(60).await;
    bench.clock.jump(7200);
    let current = bench.after(6).await;
    assert_eq!((current.state, current.identity.is_none()), (SvidState::Expired, true));
    // Somebody sets it right again: the SVID was never gone.
    bench.clock.jump(-7200);
    let current = bench.after(6).await;
    assert_eq!((current.state, leaf(&current), current.generation), (SvidState::Fresh, issued.der().as_ref(), 1));
    bench.clock.jump(-7200);
    let current = bench.after(6).await;
    assert_eq!((current.state, current.identity.is_some()), (SvidState::Stale, true));
    assert!(current.why.contains("the clock stands before"), "{}", current.why);
}

#[tokio::test(start_paused = true)]
async fn a_p256_svid_is_refused_with_the_remedy_unless_allowed() {
    let bench = Bench::new();
    let p256 = bench.ca.issue(&Spec::leaf(WEB).key(Key::P256));
    let current = bench.offer(&[&p256]).await;
    assert_eq!((current.state, current.counters.refused), (SvidState::Absent, 1));
    for word in
        ["ca_key_type=\"ec-p384\"", "workload_x509_svid_key_type=\"ec-p384\"", "SPIRE 1.14", "svid_keys: p256-allowed"]
    {
        assert!(current.why.contains(word), "{}", current.why);
    }
    let good = bench.issue(WEB, 600);
    bench.offer(&[&good]).await;
    let current = bench.offer(&[&p256]).await;
    assert_eq!((current.state, leaf(&current)), (SvidState::Stale, good.der().as_ref()));

    let bench = Bench::with(KeeperOptions { svid_keys: SvidKeys::P256Allowed, ..options() });
    let p256 = bench.ca.issue(&Spec::leaf(WEB).key(Key::P256));
    let current = bench.offer(&[&p256]).await;
    assert_eq!(current.identity.unwrap().svid.facts().key_type, KeyType::P256);
    let rsa = bench.ca.issue(&Spec::leaf(WEB).key(Key::Rsa));
    let current = bench.offer(&[&rsa]).await;
    assert!(current.why.contains("type rsa") && !current.why.contains("svid_keys"), "{}", current.why);
}

#[tokio::test(start_paused = true)]
async fn no_identity_before_the_revocation_lists_are_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("list.pem");
    let bench = Bench::with(KeeperOptions { crls: vec![path.clone()], ..options() });
    let web = bench.issue(WEB, 600);
    bench.offer(&[&web]).await;
    let current = bench.after(5).await;
    assert_eq!((current.state, current.identity.is_none()), (SvidState::Absent, true));
    assert!(current.why.contains("list.pem"), "{}", current.why);
    let (first, pem) = bench.ca.crl(&[]);
    std::fs::write(&path, pem).unwrap();
    let current = bench.after(5).await;
    assert_eq!((current.state, current.generation), (SvidState::Fresh, 1));
    assert_eq!(current.identity.unwrap().bundles.crls(), std::slice::from_ref(&first));
    // Joined with those of the source.
    let (second, _) = bench.ca.crl(&[&web]);
    let update =
        Update { svids: vec![svid(&web, None)], bundles: bench.bundles(&[]), crls: vec![second], ..Update::default() };
    let current = bench.event(Event::Update(update)).await;
    assert_eq!((current.generation, current.identity.unwrap().bundles.crls().len()), (2, 2));
    // Broken lists are refused, from either side, and the ones before stay.
    std::fs::remove_file(&path).unwrap();
    let current = bench.after(5).await;
    assert_eq!((current.state, current.generation), (SvidState::Stale, 2));
    assert_eq!(current.identity.unwrap().bundles.crls().len(), 2);
    let update = Update {
        svids: vec![svid(&web, None)],
        bundles: bench.bundles(&[]),
        crls: vec![vec![1, 2, 3].into()],
        ..Update::default()
    };
    let current = bench.event(Event::Update(update)).await;
    assert_eq!((current.state, current.generation), (SvidState::Stale, 2));
    assert_eq!(current.identity.as_ref().unwrap().bundles.crls().len(), 2);
    assert!(current.refused[0].contains("revocation list 0"), "{:?}", current.refused);
}

#[tokio::test(start_paused = true)]
async fn work_ends_when_nobody_listens() {
    let (_events, script) = mpsc::unbounded_channel();
    let (keeper, current) = Keeper::new(options(), Clock::system());
    let work = tokio::spawn(keeper.run(Box::new(Scripted(script))));
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(!work.is_finished());
    drop(current);
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert!(work.is_finished());
}

/// One thing that happens.
#[derive(Clone, Debug)]
enum Step {
    /// A full set with an SVID of ours that lives so many seconds (or ended so many ago), and perhaps another one first.
    Offer {
        life: i64,
        other_first: bool,
    },
    Repeat,
    Stranger,
    P256,
    Without,
    LeftOut,
    NoIdentity,
    Outage,
    Jump(i64),
    Wait(u64),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (-20i64..120, any::<bool>()).prop_map(|(life, other_first)| Step::Offer { life, other_first }),
        1 => Just(Step::Repeat),
        1 => Just(Step::Stranger),
        1 => Just(Step::P256),
        1 => Just(Step::Without),
        1 => Just(Step::LeftOut),
        1 => Just(Step::NoIdentity),
        1 => Just(Step::Outage),
        1 => (-100i64..100).prop_map(Step::Jump),
        3 => (0u64..40).prop_map(Step::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]
    /// Whatever happens in whatever order: what is published is ours, proved, of an allowed key and not expired, says why
    /// when it is not fresh, and does not outlive the source's word that there is none.
    #[test]
    fn no_order_of_events_publishes_what_must_not_be_used(steps in prop::collection::vec(any_step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let bench = Bench::with(chosen(Some(WEB), None));
            let api = bench.ca.svid("/api");
            let stranger = TestCa::new("nhs.example");
            let mut last_offered: Option<Issued> = None;
            let mut before = bench.after_millis(10).await;
            // When the source last began to say that we have no identity.
            let mut none_since: Option<Instant> = None;
            for step in steps {
                match step.clone() {
                    Step::Offer { life, other_first } => {
                        let end = bench.now().saturating_add_signed(life);
                        let issued = bench.ca.issue(&Spec::leaf(WEB).valid(end - 200, end));
                        let set = if other_first { vec![&api, &issued] } else { vec![&issued] };
                        bench.offer(&set).await;
                        last_offered = Some(issued);
                    }
                    Step::Repeat => {
                        if let Some(issued) = &last_offered {
                            bench.offer(&[issued]).await;
                        }
                    }
                    Step::Stranger => drop(bench.offer(&[&stranger.svid("/web")]).await),
                    Step::P256 => drop(bench.offer(&[&bench.ca.issue(&Spec::leaf(WEB).key(Key::P256))]).await),
                    Step::Without => drop(bench.offer(&[&api]).await),
                    Step::LeftOut => {
                        let refused = vec!["broken".to_owned()];
                        let update = Update { bundles: bench.bundles(&[]), refused, ..Update::default() };
                        bench.event(Event::Update(update)).await;
                    }
                    Step::NoIdentity => drop(bench.no_identity().await),
                    Step::Outage => drop(bench.outage().await),
                    Step::Jump(by) => {
                        bench.clock.jump(by);
                        bench.after(6).await;
                    }
                    Step::Wait(seconds) => drop(bench.after(seconds).await),
                }
                none_since = match step {
                    Step::NoIdentity | Step::Without => none_since.or_else(|| Some(Instant::now())),
                    Step::Repeat if last_offered.is_none() => none_since,
                    Step::Outage | Step::Jump(_) | Step::Wait(_) => none_since,
                    _ => None,
                };
                // Whatever the clock says now is noticed within a fifth of a second.
                let now = bench.now();
                let current = bench.after_millis(250).await;
                let usable = matches!(current.state, SvidState::Fresh | SvidState::Stale);
                assert_eq!(current.identity.is_some(), usable, "{step:?}: {current:?}");
                assert_eq!(current.why.is_empty(), current.state == SvidState::Fresh, "{step:?}: {current:?}");
                assert!(current.generation >= before.generation, "{step:?}: {current:?}");
                assert!(current.counters.rotations >= before.counters.rotations);
                if let Some(identity) = &current.identity {
                    let facts = identity.svid.facts();
                    assert_eq!(identity.generation, current.generation);
                    assert_eq!((facts.id.as_str(), facts.key_type), (WEB, KeyType::P384));
                    assert!(now <= facts.not_after, "{step:?}: {current:?}");
                    assert!(verify_own_chain(&identity.svid, &bench.bundles(&[]), UnixTime::since_unix_epoch(Duration::from_secs(facts.not_after))).is_ok());
                }
                if none_since.is_some_and(|since| since.elapsed() > Duration::from_secs(GRACE)) {
                    assert_eq!(current.state, SvidState::Absent, "{step:?}: {current:?}");
                }
                before = current;
            }
        });
    }
}
