//! Handshakes over loopback with the real library on both sides: what is proven, what is refused and why, and that a
//! kept ticket opens nothing once its grounds are gone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::ProducesTickets;
use rustls::{ClientConfig, ServerConfig, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::reason::Reason;
use super::record::HandshakeRecord;
use super::{Authenticated, ClientTls, Profile, ServerTls, Trust, client, server};
use crate::clock::SteppedClock;
use crate::config::schema::{SvidKeys, TlsConfig};
use crate::identity::{Identity, Svid, TrustBundles, TrustDomain};
use crate::policy::{Expected, Policy};
use crate::testing::{Issued, Key, Spec, TestCa};

const NOW: u64 = 1_800_000_000;
const CLIENT: &str = "spiffe://a.example/client";
const SERVER: &str = "spiffe://a.example/server";

const TLS13: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];
const TLS12: &[&SupportedProtocolVersion] = &[&rustls::version::TLS12];

/// Everything that one test moves about.
struct World {
    ca: TestCa,
    time: Arc<SteppedClock>,
    profile: Arc<Profile>,
    client: Issued,
    server: Issued,
}

impl World {
    /// SVIDs of five minutes: shorter than the life of a ticket.
    fn new() -> Self {
        Self::with(SvidKeys::P384, Key::P384)
    }

    fn with(svid_keys: SvidKeys, key: Key) -> Self {
        let ca = TestCa::new("a.example");
        let short = |id: &str| Spec::leaf(id).valid(NOW - 10, NOW + 300).key(key).dns("localhost");
        let config = TlsConfig { svid_keys, ..TlsConfig::default() };
        Self {
            client: ca.issue(&short(CLIENT)),
            server: ca.issue(&short(SERVER)),
            time: SteppedClock::starting_at(NOW),
            profile: Arc::new(Profile::from_config(&config).unwrap()),
            ca,
        }
    }

    fn bundles(&self, authorities: &[&TestCa]) -> Arc<TrustBundles> {
        let mut bundles = TrustBundles::empty();
        bundles
            .set(TrustDomain::parse("a.example").unwrap(), authorities.iter().map(|ca| ca.root()).collect())
            .unwrap();
        Arc::new(bundles)
    }

    fn identity(&self, own: &Issued, bundles: &Arc<TrustBundles>) -> Arc<Identity> {
        let svid = Svid::new(own.chain.clone(), own.key(), None).unwrap();
        Arc::new(Identity { svid: Arc::new(svid), bundles: Arc::clone(bundles), generation: 1 })
    }

    fn trust(&self, bundles: &Arc<TrustBundles>) -> Arc<Trust> {
        Arc::new(Trust::new(Arc::clone(bundles), Arc::clone(&self.profile), self.time.clock()).unwrap())
    }

    /// Our server, which trusts `authorities` and admits `allow`.
    fn server(&self, authorities: &[&TestCa], allow: &str, generation: u64) -> Arc<ServerTls> {
        let bundles = self.bundles(authorities);
        let text = format!(
            "identity: unix:///run/x.sock\ninbound:\n  - {{name: in, listen: '127.0.0.1:1', to: '127.0.0.1:2', allow: ['{allow}']}}\n"
        );
        let policy = Policy::compile(&crate::config::parse(&text, "test").unwrap().config).listener("in").unwrap();
        let identity = self.identity(&self.server, &bundles);
        let trust = self.trust(&bundles);
        Arc::new(
            ServerTls::new(
                &self.profile,
                &identity,
                &trust,
                &policy,
                &self.time.clock(),
                server::Accepts { serves: server::Serves::Bytes, legacy_tls12: true },
                generation,
            )
            .unwrap(),
        )
    }

    /// Our client, which trusts `authorities` and expects `expect`.
    fn client(&self, authorities: &[&TestCa], expect: &str) -> Arc<ClientTls> {
        let bundles = self.bundles(authorities);
        let expected = Arc::new(Expected::new("out", &[expect.parse().unwrap()]));
        let identity = self.identity(&self.client, &bundles);
        let trust = self.trust(&bundles);
        Arc::new(ClientTls::new(&self.profile, &identity, &trust, &expected, &self.time.clock(), true).unwrap())
    }

    /// A client of the bare library, which verifies nothing that this is about and keeps tickets.
    fn bare_client(&self, own: Option<&Issued>, versions: &[&'static SupportedProtocolVersion]) -> Arc<ClientConfig> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.ca.root()).unwrap();
        // The client's order of groups decides in TLS 1.3; ours asks for the hybrid first, as current libraries do.
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        provider.kx_groups.sort_by_key(|group| group.name() != rustls::NamedGroup::X25519MLKEM768);
        let provider = Arc::new(provider);
        let builder = ClientConfig::builder_with_details(provider, self.time.clock().provider())
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots);
        Arc::new(match own {
            Some(own) => builder.with_client_auth_cert(own.chain.clone(), own.key()).unwrap(),
            None => builder.with_no_client_auth(),
        })
    }

    /// A server of the bare library that asks for no certificate.
    fn bare_server(
        &self,
        own: &Issued,
        versions: &[&'static SupportedProtocolVersion],
        ticketer: &Arc<dyn ProducesTickets>,
    ) -> Arc<ServerConfig> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_details(provider, self.time.clock().provider())
            .with_protocol_versions(versions)
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(own.chain.clone(), own.key())
            .unwrap();
        config.ticketer = Arc::clone(ticketer);
        Arc::new(config)
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (one, other) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (one.unwrap(), other.unwrap().0)
}

/// A handshake of a bare client with our server. The client reads one byte, so that it takes tickets in and learns of a
/// refusal; answers what each side saw.
async fn call(tls: &Arc<ServerTls>, config: &Arc<ClientConfig>) -> (HandshakeRecord, std::io::Result<u8>) {
    let (near, far) = sockets().await;
    let slots = Semaphore::new(8);
    let connector = tokio_rustls::TlsConnector::from(Arc::clone(config));
    let client = async {
        let mut stream = connector.connect(ServerName::try_from("localhost").unwrap(), near).await?;
        stream.read_u8().await
    };
    let server = async {
        let (record, ours) = server::accept(far, Arc::clone(tls), &slots, soon()).await;
        if let Some(ours) = ours {
            let mut stream = ours.into_stream();
            stream.write_u8(7).await.unwrap();
            stream.flush().await.unwrap();
        }
        record
    };
    let (seen, record) = tokio::join!(client, server);
    (record, seen)
}

/// A handshake of our client with a bare server that sends one byte.
async fn dial(tls: &Arc<ClientTls>, config: &Arc<ServerConfig>) -> (HandshakeRecord, Option<Authenticated<TcpStream>>) {
    let (near, far) = sockets().await;
    let slots = Semaphore::new(8);
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::clone(config));
    let server = async {
        if let Ok(mut stream) = acceptor.accept(far).await {
            let _ = stream.write_u8(7).await;
            let _ = stream.flush().await;
        }
    };
    let client = async {
        let name = ServerName::try_from("localhost").unwrap();
        let (record, ours) = client::connect(near, name, Arc::clone(tls), super::Offer::Nothing, &slots, soon()).await;
        let Some(ours) = ours else { return (record, None) };
        let (peer, negotiated) = (Arc::clone(ours.peer()), *ours.negotiated());
        let mut stream = ours.into_stream();
        assert_eq!(stream.read_u8().await.unwrap(), 7);
        (record, Some(Authenticated::new(stream, peer, negotiated)))
    };
    let ((), result) = tokio::join!(server, client);
    result
}

fn reason(record: &HandshakeRecord) -> Option<Reason> {
    record.failure.as_ref().map(|failure| failure.reason)
}

fn resumed(record: &HandshakeRecord) -> bool {
    record.negotiated.is_some_and(|negotiated| negotiated.resumed)
}

#[tokio::test]
async fn a_good_peer_is_proven_and_what_was_negotiated_is_on_record() {
    let world = World::new();
    let tls = world.server(&[&world.ca], CLIENT, 1);
    for (versions, version, suite, group) in [
        (TLS13, "TLSv1.3", "TLS_AES_256_GCM_SHA384", "X25519MLKEM768"),
        (TLS12, "TLSv1.2", "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", "secp384r1"),
    ] {
        let (record, seen) = call(&tls, &world.bare_client(Some(&world.client), versions)).await;
        assert_eq!(seen.unwrap(), 7);
        assert_eq!(record.failure, None);
        assert_eq!(record.peer.as_ref().map(|id| id.as_str()), Some(CLIENT));
        let negotiated = record.negotiated.unwrap();
        assert_eq!((negotiated.version, negotiated.cipher_suite, negotiated.group), (version, suite, group));
        assert_eq!(negotiated.signature, "ecdsa_secp384r1_sha384");
        assert!(negotiated.compliant && !negotiated.resumed);
        assert!(record.computing > Duration::ZERO && record.computing <= record.took);
    }
}

#[tokio::test]
async fn each_refusal_has_its_reason_and_its_alert() {
    let world = World::new();
    let tls = world.server(&[&world.ca], CLIENT, 1);
    let stranger_ca = TestCa::new("a.example");
    let foreign_ca = TestCa::new("b.example");
    let leaf = |id: &str| Spec::leaf(id).valid(NOW - 100, NOW + 100);
    let cases = [
        (Some(world.ca.issue(&leaf(CLIENT).valid(NOW - 100, NOW - 7))), Reason::Expired, "CertificateExpired"),
        (Some(world.ca.issue(&leaf(CLIENT).valid(NOW + 7, NOW + 100))), Reason::NotYetValid, "CertificateExpired"),
        (Some(stranger_ca.issue(&leaf(CLIENT))), Reason::Untrusted, "UnknownCA"),
        (Some(foreign_ca.issue(&leaf("spiffe://b.example/client"))), Reason::UnknownTrustDomain, "UnknownCA"),
        (Some(world.ca.issue(&leaf("spiffe://a.example/other"))), Reason::Denied, "AccessDenied"),
        (Some(world.ca.issue(&leaf(CLIENT).key(Key::P256))), Reason::PeerKeyType, "UnsupportedCertificate"),
        (Some(world.ca.issue(&leaf("https://a.example/client"))), Reason::BadSpiffeId, "BadCertificate"),
        (None, Reason::NoCertificate, "CertificateRequired"),
    ];
    for (own, expected, alert) in cases {
        let (record, seen) = call(&tls, &world.bare_client(own.as_ref(), TLS13)).await;
        assert_eq!(reason(&record), Some(expected), "{record:?}");
        assert_eq!(record.peer, None, "{expected}: nothing was proven");
        assert!(seen.unwrap_err().to_string().contains(alert), "{expected}");
    }
    let (record, _) =
        call(&tls, &world.bare_client(Some(&world.ca.issue(&leaf(CLIENT).valid(NOW - 100, NOW - 7))), TLS13)).await;
    assert!(record.failure.unwrap().detail.contains("expired 7 s ago"));
}

#[tokio::test]
async fn a_p256_key_is_refused_in_tls12_too_where_schemes_do_not_name_the_curve() {
    let world = World::new();
    let tls = world.server(&[&world.ca], CLIENT, 1);
    let p256 = world.ca.issue(&Spec::leaf(CLIENT).valid(NOW - 1, NOW + 100).key(Key::P256));
    let (record, _) = call(&tls, &world.bare_client(Some(&p256), TLS12)).await;
    assert_eq!(reason(&record), Some(Reason::PeerKeyType));
    let world = World::with(SvidKeys::P256Allowed, Key::P256);
    let tls = world.server(&[&world.ca], CLIENT, 1);
    let (record, seen) = call(&tls, &world.bare_client(Some(&world.client), TLS13)).await;
    assert_eq!((reason(&record), seen.unwrap()), (None, 7));
}

#[tokio::test]
async fn a_remembered_chain_is_used_and_still_judged_by_the_clock() {
    let world = World::new();
    let bundles = world.bundles(&[&world.ca]);
    let trust = world.trust(&bundles);
    let chain: Vec<CertificateDer<'static>> = world.client.chain.clone();
    let usage = crate::identity::svid::Usage::Client;
    assert!(trust.judge(&chain, usage).is_ok());
    assert!(trust.judge(&chain, usage).is_ok());
    assert_eq!(trust.memory_counts(), (1, 1));
    world.time.jump(301);
    assert_eq!(trust.judge(&chain, usage).unwrap_err().reason, Reason::Expired);
    world.time.jump(-400);
    assert_eq!(trust.judge(&chain, usage).unwrap_err().reason, Reason::NotYetValid);
}

#[tokio::test]
async fn proof_1_after_both_svids_have_expired_a_kept_ticket_opens_nothing() {
    for versions in [TLS13, TLS12] {
        // Our server.
        let world = World::new();
        let tls = world.server(&[&world.ca], CLIENT, 1);
        let bare = world.bare_client(Some(&world.client), versions);
        let (first, _) = call(&tls, &bare).await;
        let (second, seen) = call(&tls, &bare).await;
        assert!(!resumed(&first) && resumed(&second), "tickets work at all: {second:?}");
        assert_eq!(seen.unwrap(), 7);
        assert_eq!(second.peer.as_ref().map(|id| id.as_str()), Some(CLIENT), "a resumed peer is judged and named");
        world.time.jump(301);
        let (third, seen) = call(&tls, &bare).await;
        assert_eq!(reason(&third), Some(Reason::Expired), "{third:?}");
        assert!(seen.is_err());
        // Our client.
        let world = World::new();
        let ours = world.client(&[&world.ca], SERVER);
        let ticketer = rustls::crypto::aws_lc_rs::Ticketer::new().unwrap();
        let bare = world.bare_server(&world.server, versions, &ticketer);
        let (first, _) = dial(&ours, &bare).await;
        let (second, connection) = dial(&ours, &bare).await;
        assert!(!resumed(&first) && resumed(&second), "{second:?}");
        assert!(connection.is_some());
        world.time.jump(301);
        let (third, connection) = dial(&ours, &bare).await;
        assert_eq!(reason(&third), Some(Reason::Expired), "{third:?}");
        assert!(connection.is_none());
    }
}

#[tokio::test]
async fn proof_2_after_a_change_of_bundle_or_policy_a_kept_ticket_opens_nothing() {
    let other = TestCa::new("a.example");
    for versions in [TLS13, TLS12] {
        let world = World::new();
        let bare = world.bare_client(Some(&world.client), versions);
        let before = world.server(&[&world.ca], CLIENT, 1);
        let _ = call(&before, &bare).await;
        assert!(resumed(&call(&before, &bare).await.0));
        // The bundle no longer holds the authority of the client.
        let (record, seen) = call(&world.server(&[&other], CLIENT, 2), &bare).await;
        assert_eq!(reason(&record), Some(Reason::Untrusted), "{record:?}");
        assert!(seen.is_err());
        // The policy no longer admits the client.
        let before = world.server(&[&world.ca], CLIENT, 3);
        let _ = call(&before, &bare).await;
        assert!(resumed(&call(&before, &bare).await.0));
        let (record, seen) = call(&world.server(&[&world.ca], "spiffe://a.example/other", 4), &bare).await;
        assert_eq!(reason(&record), Some(Reason::Denied), "{record:?}");
        assert!(seen.is_err());
        // A mere change of generation: nothing is refused, and nothing is resumed.
        let (record, seen) = call(&world.server(&[&world.ca], CLIENT, 5), &bare).await;
        assert!(!resumed(&record));
        assert_eq!((reason(&record), seen.unwrap()), (None, 7));
        // Our client: what it kept under one generation of trust goes with it.
        let ticketer = rustls::crypto::aws_lc_rs::Ticketer::new().unwrap();
        let server = world.bare_server(&world.server, versions, &ticketer);
        let ours = world.client(&[&world.ca], SERVER);
        dial(&ours, &server).await;
        assert!(resumed(&dial(&ours, &server).await.0));
        let (record, connection) = dial(&world.client(&[&other], SERVER), &server).await;
        assert_eq!(reason(&record), Some(Reason::Untrusted), "{record:?}");
        assert!(connection.is_none());
    }
}

#[tokio::test]
async fn proof_3_a_server_of_an_untrusted_authority_under_the_same_name_is_not_resumed_to() {
    for versions in [TLS13, TLS12] {
        let world = World::new();
        let impostor_ca = TestCa::new("a.example");
        let impostor = impostor_ca.issue(&Spec::leaf(SERVER).dns("localhost"));
        // Both servers share the keys of their tickets, as a fleet behind one name does.
        let ticketer = rustls::crypto::aws_lc_rs::Ticketer::new().unwrap();
        let honest = world.bare_server(&world.server, versions, &ticketer);
        let dishonest = world.bare_server(&impostor, versions, &ticketer);
        let one = world.client(&[&world.ca], SERVER);
        dial(&one, &honest).await;
        assert!(resumed(&dial(&one, &honest).await.0));
        // Another upstream of ours under the same name has a store of its own.
        let another = world.client(&[&world.ca], SERVER);
        let (record, connection) = dial(&another, &dishonest).await;
        assert_eq!(reason(&record), Some(Reason::Untrusted), "{record:?}");
        assert!(connection.is_none());
    }
}

#[tokio::test]
async fn what_an_upstream_gave_us_to_resume_with_is_forgotten_after_ten_minutes() {
    for versions in [TLS13, TLS12] {
        let world = World::new();
        // An upstream whose tickets live for hours, and SVIDs that outlive this test.
        let ticketer = rustls::crypto::aws_lc_rs::Ticketer::new().unwrap();
        let lasting = world.ca.issue(&Spec::leaf(SERVER).dns("localhost"));
        let server = world.bare_server(&lasting, versions, &ticketer);
        let ours = world.client(&[&world.ca], SERVER);
        dial(&ours, &server).await;
        assert!(resumed(&dial(&ours, &server).await.0));
        world.time.jump(601);
        let (record, connection) = dial(&ours, &server).await;
        assert!(!resumed(&record) && connection.is_some(), "{record:?}");
    }
}

#[tokio::test]
async fn the_upstream_must_be_the_expected_one() {
    let world = World::new();
    let ticketer = rustls::crypto::aws_lc_rs::Ticketer::new().unwrap();
    let server = world.bare_server(&world.server, TLS13, &ticketer);
    let (record, connection) = dial(&world.client(&[&world.ca], "spiffe://a.example/other"), &server).await;
    assert_eq!(reason(&record), Some(Reason::WrongPeer), "{record:?}");
    assert!(connection.is_none());
    assert_eq!(record.claimed.as_ref().map(|id| id.as_str()), Some(SERVER));
}

#[tokio::test]
async fn a_revocation_list_speaks_for_its_own_authority_only_even_among_namesakes() {
    // Several times, because a bundle has no order that a test could choose.
    for _ in 0..4 {
        judge_namesakes();
    }
}

fn judge_namesakes() {
    let mut spec = Spec::authority("a.example");
    spec.common_name = "the one name".into();
    let (old, new) = (TestCa::root_with("a.example", &spec), TestCa::root_with("a.example", &spec));
    let (good, bad, newer) = (old.svid("/good"), old.svid("/bad"), new.svid("/newer"));
    let world = World::new();
    let mut bundles = TrustBundles::empty();
    bundles.set(TrustDomain::parse("a.example").unwrap(), vec![new.root(), old.root()]).unwrap();
    bundles.set_crls(vec![old.crl(&[&bad]).0]).unwrap();
    let trust = world.trust(&Arc::new(bundles));
    let usage = crate::identity::svid::Usage::Client;
    assert!(trust.judge(&good.chain, usage).is_ok());
    assert!(trust.judge(&newer.chain, usage).is_ok(), "no list of the new authority says anything");
    assert_eq!(trust.judge(&bad.chain, usage).unwrap_err().reason, Reason::Revoked);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(24))]

    /// The referee is a generation of trust that has just been made and remembers nothing.
    #[test]
    fn no_order_of_rotations_expiries_and_removals_lets_a_remembered_verdict_outlive_its_grounds(
        steps in proptest::collection::vec((0..6u8, 0..4usize, 0..200i64), 1..30)
    ) {
        let world = World::new();
        let other = TestCa::new("a.example");
        let authorities = [&world.ca, &other];
        let leaf = |ca: usize, from: u64, to: u64| (ca, authorities[ca].issue(&Spec::leaf(CLIENT).valid(from, to)));
        let leaves =
            [leaf(0, NOW - 10, NOW + 100), leaf(0, NOW + 50, NOW + 400), leaf(1, NOW - 10, NOW + 300), leaf(1, NOW, NOW + 60)];
        let (mut trusted, mut revoked) = ([true; 2], [false; 4]);
        let usage = crate::identity::svid::Usage::Client;
        let generation = |trusted: [bool; 2], revoked: [bool; 4]| {
            let mut bundles = TrustBundles::empty();
            let ders: Vec<_> = (0..2).filter(|ca| trusted[*ca]).map(|ca| authorities[ca].root()).collect();
            if !ders.is_empty() {
                bundles.set(TrustDomain::parse("a.example").unwrap(), ders).unwrap();
            }
            let lists = (0..2).map(|ca| {
                let named: Vec<_> = leaves.iter().zip(revoked).filter(|(l, r)| l.0 == ca && *r).map(|(l, _)| &l.1).collect();
                authorities[ca].crl(&named).0
            });
            bundles.set_crls(lists.collect()).unwrap();
            world.trust(&Arc::new(bundles))
        };
        let mut trust = generation(trusted, revoked);
        for (step, which, seconds) in steps {
            match step {
                0 => world.time.jump(seconds - 60),
                1 => { trusted[which % 2] ^= true; trust = generation(trusted, revoked); }
                2 => { revoked[which] ^= true; trust = generation(trusted, revoked); }
                _ => {
                    let chain = &leaves[which].1.chain;
                    let outcome = |judged: Result<Arc<super::Peer>, super::record::Failure>| {
                        judged.map(|peer| peer.not_after()).map_err(|failure| failure.reason)
                    };
                    let referee = generation(trusted, revoked);
                    proptest::prop_assert_eq!(outcome(trust.judge(chain, usage)), outcome(referee.judge(chain, usage)));
                }
            }
        }
    }
}
