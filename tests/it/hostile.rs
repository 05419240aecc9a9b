//! Certificates and handshakes that no honest peer shows: each is refused for a reason of its own, with the alert that
//! fits it, the workload never hears of it, and the next good client is served.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::client::{Shown, client_hello, echoed, presenting, refusal, trusting};
use crate::harness::{Domain, Echo, Metrics, PATIENCE, Proxy, echo, soon, until};
use crate::seen::{access_line, grown, seen};
use crate::testing::{
    ExtendedKeyUsagePurpose as ExtendedUse, IsCa, Issued, Key, KeyUsagePurpose as Use, San, Spec, TestCa,
};

const HANDSHAKES: &str = "portcullis_tls_handshakes_total";

/// A proxy in front of an echo, and a client that it serves.
struct World {
    domain: Domain,
    workload: Echo,
    proxy: Proxy,
    address: SocketAddr,
    good: Arc<ClientConfig>,
    /// Connections that the workload must have had so far.
    served: usize,
}

impl World {
    /// `more` is further config; `revoked` go on a revocation list.
    async fn new(more: &str, revoked: impl FnOnce(&TestCa) -> Vec<Issued>) -> (Self, Vec<Issued>) {
        Self::start(more, revoked, |_| ()).await
    }

    async fn start(
        more: &str,
        revoked: impl FnOnce(&TestCa) -> Vec<Issued>,
        change: impl FnOnce(&mut tokio::process::Command),
    ) -> (Self, Vec<Issued>) {
        let domain = Domain::new("a.example");
        let workload = echo().await;
        let revoked = revoked(&domain.ca);
        let list = domain.path().join("list.pem");
        std::fs::write(&list, domain.ca.crl(&revoked.iter().collect::<Vec<_>>()).1).unwrap();
        let config = format!(
            "{}  crls: [{}]\ninbound:\n  - name: api\n    listen: 127.0.0.1:0\n    to: {}\n    allow: [{}, {}]\n{more}",
            domain.identity("/server"),
            list.display(),
            workload.address,
            domain.id("/client"),
            domain.id("/*")
        );
        let proxy = Proxy::start_with(domain.path(), "server", &config, change).await;
        proxy.ready().await;
        let address = proxy.address("api").await;
        let good = presenting(&domain.ca, Some(domain.ca.svid("/client").into()));
        (Self { domain, workload, proxy, address, good, served: 0 }, revoked)
    }

    async fn plain(more: &str) -> Self {
        Self::new(more, |_| Vec::new()).await.0
    }

    /// The next good client is served, and nobody but good clients has reached the workload.
    async fn serves(&mut self, after: &str) {
        let call = async { echoed(TcpStream::connect(self.address).await.unwrap(), &self.good).await };
        let (echoed, seen) = seen(&mut self.proxy, "api", call).await;
        echoed.unwrap_or_else(|error| panic!("after {after}: {error}; {}", seen.line));
        seen.succeeded(after);
        assert_eq!(seen.line["cause"], "done", "after {after}: {}", seen.line);
        self.served += 1;
        assert_eq!(
            *self.workload.accepted.borrow(),
            self.served,
            "after {after}: the workload was dialled for a stranger"
        );
    }
}

/// A certificate that must be refused.
struct BadCertificate {
    case: &'static str,
    shown: Shown,
    reason: &'static str,
    /// The alert as rustls calls it.
    alert: &'static str,
    /// A word that the access log's details must hold.
    detail: &'static str,
}

/// A certificate that has signed itself.
fn self_signed(spec: &Spec) -> Shown {
    let made = TestCa::root_with("a.example", spec);
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from_pem_slice(made.key_pem().as_bytes()).unwrap());
    Shown { chain: vec![made.der().clone()], key }
}

fn bad_certificates(ca: &TestCa, revoked: Vec<Issued>) -> Vec<BadCertificate> {
    const ID: &str = "spiffe://a.example/client";
    const LONG_PAST: (u64, u64) = (1_000_000_000, 1_000_000_060);
    const FAR_AHEAD: (u64, u64) = (4_000_000_000, 4_000_000_060);
    let good = || Spec::leaf(ID);
    let issue = |spec: Spec| Shown::from(ca.issue(&spec));
    let case = |case, shown, reason, alert, detail| BadCertificate { case, shown, reason, alert, detail };
    // The same trust domain by name, another authority.
    let impostor = TestCa::new("a.example");
    let foreign = TestCa::new("b.example");
    let intermediate = ca.intermediate();
    let mut headless = Shown::from(intermediate.issue(&good()));
    headless.chain.truncate(1);
    let mut wrong_chain = Shown::from(intermediate.issue(&good()));
    wrong_chain.chain[1] = ca.intermediate().der().clone();
    let brief = ca.intermediate_with(&Spec::authority("a.example").valid(LONG_PAST.0, LONG_PAST.1));
    let lent = ca.intermediate_with(&Spec::authority("b.example"));
    // An SVID, used as if it were an authority.
    let climber = TestCa::root_with("a.example", &good());
    let mut climbed = Shown::from(climber.issue(&good()));
    climbed.chain.push(ca.svid("/client").der().clone());
    let mut stolen = Shown::from(ca.issue(&good()));
    stolen.key = ca.issue(&good()).key();
    let mut long = Shown::from(ca.issue(&good()));
    long.chain.extend((0..12).map(|_| ca.der().clone()));
    let mut cases = vec![
        case("expired", issue(good().valid(LONG_PAST.0, LONG_PAST.1)), "expired", "CertificateExpired", " s ago"),
        case(
            "not yet valid",
            issue(good().valid(FAR_AHEAD.0, FAR_AHEAD.1)),
            "not_yet_valid",
            "CertificateExpired",
            "for another",
        ),
        case("under an expired intermediate", brief.issue(&good()).into(), "expired", "CertificateExpired", ID),
        case(
            "other trust domain",
            foreign.svid("/client").into(),
            "unknown_trust_domain",
            "UnknownCA",
            "spiffe://b.example/client",
        ),
        case(
            "our authority's word for another trust domain",
            issue(Spec::leaf("spiffe://b.example/client")),
            "unknown_trust_domain",
            "UnknownCA",
            "spiffe://b.example/client",
        ),
        case("no URI SAN", issue(good().sans([])), "bad_spiffe_id", "BadCertificate", "no URI SAN"),
        case(
            "a DNS name instead",
            issue(good().sans([San::dns("client.a.example")])),
            "bad_spiffe_id",
            "BadCertificate",
            "no URI SAN",
        ),
        case(
            "two URI SANs",
            issue(good().sans([San::uri(ID), San::uri("spiffe://a.example/admin")])),
            "bad_spiffe_id",
            "BadCertificate",
            "2 URI SANs",
        ),
        case(
            "the same URI SAN twice",
            issue(good().sans([San::uri(ID), San::uri(ID)])),
            "bad_spiffe_id",
            "BadCertificate",
            "2 URI SANs",
        ),
        case(
            "https SAN",
            issue(good().sans([San::uri("https://a.example/client")])),
            "bad_spiffe_id",
            "BadCertificate",
            "not a SPIFFE ID",
        ),
        case(
            "an https SAN besides",
            issue(good().sans([San::uri(ID), San::uri("https://a.example/client")])),
            "bad_spiffe_id",
            "BadCertificate",
            "2 URI SANs",
        ),
        case(
            "CA leaf",
            issue(good().is_ca(IsCa::Ca(rcgen::BasicConstraints::Unconstrained))),
            "bad_certificate",
            "BadCertificate",
            "is a CA",
        ),
        case("self-signed", self_signed(&good()), "untrusted", "UnknownCA", ID),
        case("other authority of that name", impostor.svid("/client").into(), "untrusted", "UnknownCA", ID),
        case("without its intermediate", headless, "untrusted", "UnknownCA", ID),
        case("wrong chain", wrong_chain, "untrusted", "UnknownCA", ID),
        case("signed by an SVID", climbed, "untrusted", "UnknownCA", ID),
        case(
            "under another trust domain's intermediate",
            lent.issue(&good()).into(),
            "untrusted",
            "UnknownCA",
            "another trust domain",
        ),
        case("chain without end", long, "bad_certificate", "BadCertificate", "too long"),
        case("RSA leaf", issue(good().key(Key::Rsa)), "peer_key_type", "UnsupportedCertificate", "type rsa"),
        case("P-256 leaf", issue(good().key(Key::P256)), "peer_key_type", "UnsupportedCertificate", "ca_key_type"),
        case("Ed25519 leaf", issue(good().key(Key::Ed25519)), "peer_key_type", "UnsupportedCertificate", "type other"),
        case(
            "signed by a P-256 authority",
            TestCa::root_with("a.example", &Spec::authority("a.example").key(Key::P256)).issue(&good()).into(),
            "untrusted",
            "UnknownCA",
            ID,
        ),
        case(
            "under a P-256 intermediate",
            ca.intermediate_with(&Spec::authority("a.example").key(Key::P256)).issue(&good()).into(),
            "chain_signature",
            "UnsupportedCertificate",
            ID,
        ),
        case(
            "no digitalSignature",
            issue(good().usages([Use::KeyEncipherment])),
            "bad_certificate",
            "BadCertificate",
            "digitalSignature",
        ),
        case("no keyUsage", issue(good().usages([])), "bad_certificate", "BadCertificate", "digitalSignature"),
        case(
            "keyCertSign",
            issue(good().usages([Use::DigitalSignature, Use::KeyCertSign])),
            "bad_certificate",
            "BadCertificate",
            "signing",
        ),
        case(
            "cRLSign",
            issue(good().usages([Use::DigitalSignature, Use::CrlSign])),
            "bad_certificate",
            "BadCertificate",
            "signing",
        ),
        case(
            "for servers only",
            issue(good().extended([ExtendedUse::ServerAuth])),
            "bad_certificate",
            "BadCertificate",
            "clientAuth",
        ),
        case("someone else's certificate", stolen, "bad_signature", "DecryptError", "ignature"),
        case(
            "no certificate at all",
            Shown { chain: Vec::new(), key: ca.svid("/client").key() },
            "no_certificate",
            "CertificateRequired",
            "",
        ),
    ];
    for (name, bytes) in [
        ("query", &b"spiffe://a.example/client?role=admin"[..]),
        ("fragment", b"spiffe://a.example/client#admin"),
        ("dot segment", b"spiffe://a.example/./client"),
        ("two dots", b"spiffe://a.example/other/../client"),
        ("escaped dots", b"spiffe://a.example/other/%2e%2e/client"),
        ("empty segment", b"spiffe://a.example//client"),
        ("slash at the end", b"spiffe://a.example/client/"),
        ("NUL", b"spiffe://a.example/client\0.evil.example"),
        ("newline", b"spiffe://a.example/client\n"),
        ("control characters", b"spiffe://a.example/\x1b[2Jclient"),
        ("not ASCII", "spiffe://a.example/clíent".as_bytes()),
        ("not text", b"spiffe://a.example/client\xff"),
        ("no path", b"spiffe://a.example"),
        ("root path", b"spiffe://a.example/"),
        ("port", b"spiffe://a.example:8443/client"),
        ("user", b"spiffe://client@a.example/client"),
        ("capital letters in the trust domain", b"spiffe://A.example/client"),
        ("no trust domain", b"spiffe:///client"),
        ("empty", b""),
    ] {
        cases.push(case(name, issue(Spec::leaf(bytes)), "bad_spiffe_id", "BadCertificate", ""));
    }
    cases.push(case(
        "too long an ID",
        issue(Spec::leaf(format!("{ID}/{}", "a".repeat(2048)))),
        "bad_spiffe_id",
        "BadCertificate",
        "",
    ));
    cases.extend(revoked.into_iter().map(|issued| case("revoked", issued.into(), "revoked", "CertificateRevoked", ID)));
    cases
}

#[tokio::test]
async fn each_bad_certificate_is_refused_for_its_own_reason() {
    let (mut world, revoked) = World::new("tls: { handshake_timeout: 30s }\n", |ca| vec![ca.svid("/client")]).await;
    for BadCertificate { case, shown, reason, alert, detail } in bad_certificates(&world.domain.ca, revoked) {
        let config = presenting(&world.domain.ca, Some(shown));
        let address = world.address;
        let (error, seen) = seen(&mut world.proxy, "api", refusal(address, &config)).await;
        seen.failed(case, "inbound", reason);
        assert!(error.to_string().ends_with(alert), "{case}: {error}");
        assert!(seen.line["detail"].as_str().unwrap().contains(detail), "{case}: {}", seen.line);
        world.serves(case).await;
    }
    assert!(world.proxy.stop().await.success());
}

/// What a client does, step by step.
enum Step {
    Send(Vec<u8>),
    /// One byte at a time, until the other side has had enough.
    Drip(Vec<u8>),
    /// Waits for the first bytes of an answer.
    Hear,
    /// Says that nothing more will come, and goes on listening.
    Finish,
    Close,
    Reset,
}
use Step::{Close, Drip, Finish, Hear, Reset, Send};

/// How a refusal looks from outside.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// An alert and the end.
    Alert(u8),
    /// An alert that is encrypted already, and the end.
    SealedAlert,
    /// The end, without a word.
    Nothing,
    /// The client did not stay to see.
    Unheard,
}
use Answer::{Alert, Nothing, SealedAlert, Unheard};

struct BadHandshake {
    case: &'static str,
    steps: Vec<Step>,
    reason: &'static str,
    answer: Answer,
}

/// Does the steps, and listens to the end unless the last one was to leave.
async fn perform(address: SocketAddr, steps: Vec<Step>) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let mut heard = Vec::new();
    for step in steps {
        match step {
            // The other side may have had enough already: what it says is what counts.
            Send(bytes) => drop(stream.write_all(&bytes).await),
            Drip(bytes) => {
                let mut tick = tokio::time::interval(Duration::from_millis(50));
                for byte in bytes {
                    tick.tick().await;
                    if stream.write_all(&[byte]).await.is_err() {
                        break;
                    }
                }
            }
            Hear => drop(soon("an answer", stream.read_buf(&mut heard)).await.unwrap()),
            Finish => stream.shutdown().await.unwrap(),
            Close => return Unheard,
            Reset => {
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
                return Unheard;
            }
        }
    }
    // A reset is an end as well.
    let _ = soon("the end", stream.read_to_end(&mut heard)).await;
    match heard[..] {
        [.., 0x15, 3, _, 0, 2, 2, description] => Alert(description),
        // Two bytes, their type and the seal of AES-GCM.
        [.., 0x17, 3, 3, 0, 19, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] => SealedAlert,
        _ => Nothing,
    }
}

/// A record of a handshake message of this type.
fn handshake(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    let message: Vec<u8> = [&[kind], &length[1..], body].concat();
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    [&[0x16, 3, 1], &length[..], &message].concat()
}

/// A ClientHello made by hand: this version, AES-256-GCM in TLS 1.3 and 1.2, and these extensions.
fn hello(version: u16, extensions: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut body = version.to_be_bytes().to_vec();
    body.extend([7; 32]);
    body.extend([0, 0, 4, 0x13, 2, 0xC0, 0x2C, 1, 0]);
    let mut all = Vec::new();
    for (kind, content) in extensions {
        all.extend(kind.to_be_bytes());
        all.extend(u16::try_from(content.len()).unwrap().to_be_bytes());
        all.extend(content);
    }
    body.extend(u16::try_from(all.len()).unwrap().to_be_bytes());
    body.extend(all);
    handshake(1, &body)
}

/// What TLS 1.3 on secp384r1 needs, the key share left out.
fn extensions() -> Vec<(u16, Vec<u8>)> {
    vec![(43, vec![4, 3, 4, 3, 3]), (10, vec![0, 2, 0, 24]), (13, vec![0, 2, 5, 3])]
}

fn bad_handshakes(whole: &[u8]) -> Vec<BadHandshake> {
    let case = |case, steps, reason, answer| BadHandshake { case, steps, reason, answer };
    let half = || whole[..whole.len() / 2].to_vec();
    let whole = || whole.to_vec();
    let with = |extension: (u16, Vec<u8>)| {
        let mut all = extensions();
        all.retain(|(kind, _)| *kind != extension.0);
        all.push(extension);
        hello(0x0303, &all)
    };
    let garbage: Vec<u8> = (0..512u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8 | 0x80).collect();
    let mut nonsense = vec![0x16, 3, 1, 2, 0];
    nonsense.extend(&garbage);
    let server_hello = [&[3, 3][..], &[7; 32], &[0, 0x13, 2, 0, 0, 0]].concat();
    let in_a_hello = handshake(1, &garbage);
    let mut cut_short = whole();
    // The message says that it is shorter than what it holds.
    cut_short[8] = cut_short[8].wrapping_sub(9);
    // No key share for a group of ours.
    let retry = || with((51, vec![0, 0]));
    let padded = |size: usize| with((21, vec![0; size]));
    vec![
        case("nothing, closed", vec![Close], "peer_closed", Unheard),
        case("nothing, finished", vec![Finish], "peer_closed", Nothing),
        case("nothing, reset", vec![Reset], "peer_closed", Unheard),
        case("garbage", vec![Send(garbage)], "not_tls", Nothing),
        case("garbage in a record", vec![Send(nonsense)], "protocol_error", Alert(50)),
        case("garbage in a ClientHello", vec![Send(in_a_hello)], "protocol_error", Alert(50)),
        case("plain HTTP", vec![Send(b"GET / HTTP/1.1\r\nHost: api\r\n\r\n".to_vec())], "not_tls", Nothing),
        case("HTTP/2 without TLS", vec![Send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec())], "not_tls", Nothing),
        case("SSH", vec![Send(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec())], "not_tls", Nothing),
        case("PROXY protocol", vec![Send(b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n".to_vec())], "not_tls", Nothing),
        case("SSL 2.0", vec![Send(vec![0x80, 0x2e, 1, 0, 2, 0, 21, 0, 0, 0, 16])], "not_tls", Nothing),
        case("an alert first", vec![Send(vec![0x15, 3, 1, 0, 2, 2, 40])], "not_tls", Nothing),
        case("SSL 3.0", vec![Send(hello(0x0300, &[]))], "no_shared_version", Alert(70)),
        case("TLS 1.0", vec![Send(hello(0x0301, &[]))], "no_shared_version", Alert(70)),
        case("only a version to come", vec![Send(with((43, vec![2, 3, 9])))], "no_shared_version", Alert(70)),
        case("only TLS 1.2", vec![Send(with((43, vec![2, 3, 3])))], "no_shared_version", Alert(70)),
        case("a ServerHello", vec![Send(handshake(2, &server_hello))], "protocol_error", Alert(10)),
        case("an empty ClientHello", vec![Send(handshake(1, &[]))], "protocol_error", Alert(50)),
        case("a ClientHello cut short", vec![Send(cut_short)], "protocol_error", Alert(50)),
        case("half a ClientHello, closed", vec![Send(half()), Close], "peer_closed", Unheard),
        case("half a ClientHello, finished", vec![Send(half()), Finish], "peer_closed", Nothing),
        case("half a ClientHello, reset", vec![Send(half()), Reset], "peer_closed", Unheard),
        case("16 KiB of ClientHello", vec![Send(padded(16_000))], "hello_too_large", Nothing),
        case("no end to the ClientHello", vec![Send(padded(16_000)), Send(padded(16_000))], "hello_too_large", Nothing),
        case("no groups", vec![Send(with((10, vec![0, 2, 0, 23])))], "no_shared_group", Alert(40)),
        case("closed after the ServerHello", vec![Send(whole()), Hear, Close], "peer_closed", Unheard),
        case("reset after the ServerHello", vec![Send(whole()), Hear, Reset], "peer_closed", Unheard),
        case("finished after the ServerHello", vec![Send(whole()), Hear, Finish], "peer_closed", Nothing),
        case("a second ClientHello", vec![Send(whole()), Hear, Send(whole())], "protocol_error", SealedAlert),
        case(
            "the same again after a HelloRetryRequest",
            vec![Send(retry()), Hear, Send(retry())],
            "protocol_error",
            Alert(47),
        ),
        case("closed after a HelloRetryRequest", vec![Send(retry()), Hear, Close], "peer_closed", Unheard),
        case(
            "data where the certificate belongs",
            vec![Send(whole()), Hear, Send([&[0x17, 3, 3, 0, 64][..], &[9; 64]].concat())],
            "protocol_error",
            SealedAlert,
        ),
        case(
            "an alert after the ServerHello",
            vec![Send(whole()), Hear, Send(vec![0x15, 3, 3, 0, 2, 2, 48])],
            "peer_alert",
            Nothing,
        ),
    ]
}

#[tokio::test]
async fn each_bad_handshake_is_refused_for_its_own_reason() {
    let mut world = World::plain("tls: { handshake_timeout: 30s }\n").await;
    for BadHandshake { case, steps, reason, answer } in bad_handshakes(&client_hello(&world.good)) {
        let address = world.address;
        let (heard, seen) = seen(&mut world.proxy, "api", perform(address, steps)).await;
        seen.failed(case, "inbound", reason);
        assert_eq!(heard, answer, "{case}: {}", seen.line);
        world.serves(case).await;
    }
    // A client that does not trust us says so.
    let stranger = trusting(None, Some(world.domain.ca.svid("/client").into()));
    let address = world.address;
    let (error, seen) = seen(&mut world.proxy, "api", refusal(address, &stranger)).await;
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");
    seen.failed("a client that does not trust us", "inbound", "peer_alert");
    assert!(seen.line["detail"].as_str().unwrap().contains("UnknownCA"), "{}", seen.line);
    world.serves("a client that does not trust us").await;
    assert!(world.proxy.stop().await.success());
}

#[tokio::test]
async fn one_deadline_covers_the_whole_handshake() {
    let mut world = World::plain("tls: { handshake_timeout: 2s }\n").await;
    let whole = client_hello(&world.good);
    let half = whole[..whole.len() / 2].to_vec();
    let case = |case, steps| BadHandshake { case, steps, reason: "timeout", answer: Nothing };
    for BadHandshake { case, steps, reason, answer } in [
        case("silence", vec![]),
        case("one byte, then silence", vec![Send(vec![0x16])]),
        case("half a ClientHello, then silence", vec![Send(half)]),
        // Each byte comes soon enough, all of them do not.
        case("a byte now and then", vec![Drip(whole.clone())]),
        case("silence after the ServerHello", vec![Send(whole), Hear]),
    ] {
        let address = world.address;
        let (heard, seen) = seen(&mut world.proxy, "api", perform(address, steps)).await;
        seen.failed(case, "inbound", reason);
        assert_eq!(heard, answer, "{case}");
        world.serves(case).await;
    }
    assert!(world.proxy.stop().await.success());
}

#[tokio::test]
async fn who_finds_no_place_among_the_handshakes_is_told_apart_from_who_is_slow() {
    let mut world = World::plain("tls: { handshake_timeout: 2s, max_handshakes: 1 }\n").await;
    let before = world.proxy.metrics().await;
    let whole = client_hello(&world.good);
    let (half, rest) = whole.split_at(whole.len() / 2);
    // It came first, so its time is over first, and until its ClientHello is whole it holds no place.
    let mut late = TcpStream::connect(world.address).await.unwrap();
    late.write_all(half).await.unwrap();
    world.serves("half a ClientHello").await;
    let mut holder = TcpStream::connect(world.address).await.unwrap();
    holder.write_all(&whole).await.unwrap();
    holder.read_u8().await.unwrap();
    late.write_all(rest).await.unwrap();
    for reason in ["overloaded", "timeout"] {
        let line = access_line(&mut world.proxy, "api").await;
        assert_eq!(line["reason"], reason, "{line}");
    }
    let mut reasons = grown(&before, &world.proxy.metrics().await, HANDSHAKES, "reason");
    assert_eq!(reasons.remove("none"), Some(1.0), "the good one");
    assert_eq!(reasons.into_iter().collect::<Vec<_>>(), [("overloaded".to_owned(), 1.0), ("timeout".to_owned(), 1.0)]);
    world.serves("one too many").await;
    assert!(world.proxy.stop().await.success());
}

/// A connection that sends one byte at a time.
struct Bytewise(TcpStream);

impl AsyncRead for Bytewise {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut one = [0; 1];
        let mut small = ReadBuf::new(&mut one);
        ready!(Pin::new(&mut self.0).poll_read(cx, &mut small))?;
        buf.put_slice(small.filled());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Bytewise {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let one = &bytes[..bytes.len().min(1)];
        Pin::new(&mut self.0).poll_write(cx, one)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[tokio::test]
async fn an_honest_client_that_sends_byte_by_byte_is_served() {
    let mut world = World::plain("tls: { handshake_timeout: 30s }\n").await;
    let (address, good) = (world.address, Arc::clone(&world.good));
    let call = async {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        echoed(Bytewise(stream), &good).await
    };
    let (echoed, seen) = seen(&mut world.proxy, "api", call).await;
    echoed.unwrap();
    seen.succeeded("byte by byte");
    world.served += 1;
    world.serves("a client that sends byte by byte").await;
    assert!(world.proxy.stop().await.success());
}

/// A burst.
const BURST: usize = 2_000;
/// What the proxy may have open at once.
const PLACES: usize = 1_500;

fn total(metrics: &Metrics, cause: &str) -> f64 {
    metrics.sum("portcullis_connections_total", &[("direction", "inbound"), ("cause", cause)])
}

fn open(metrics: &Metrics) -> f64 {
    metrics.sum("portcullis_connections_open", &[("direction", "inbound")])
}

/// Waits until nothing is open and a whole burst has ended.
async fn ended(proxy: &Proxy, before: &Metrics) -> Metrics {
    let count = |metrics: &Metrics| metrics.sum("portcullis_connections_total", &[("direction", "inbound")]);
    until("the end of the burst", || async {
        let metrics = proxy.metrics().await;
        (open(&metrics) == 0.0 && count(&metrics) - count(before) >= BURST as f64).then_some(metrics)
    })
    .await
}

/// Room for both ends of a burst and more: the usual soft limit is 1,024.
fn raise_descriptors(least: u64) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < least) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(least), maximum: limit.maximum }).unwrap();
    }
}

#[tokio::test]
async fn a_burst_of_2000_strangers_is_bounded_and_accounted_for() {
    raise_descriptors(8_192);
    let mut world =
        World::plain(&format!("tls: {{ handshake_timeout: 60s }}\nconnections: {{ max: {PLACES} }}\n")).await;
    // First those that stop half-way and stay: they take all places, and the rest is turned away.
    let before = world.proxy.metrics().await;
    let half = client_hello(&world.good)[..100].to_vec();
    let mut silent = Vec::new();
    for _ in 0..BURST {
        // Those turned away may be gone before they are here.
        if let Ok(mut stream) = TcpStream::connect(world.address).await {
            let _ = stream.write_all(&half).await;
            silent.push(stream);
        }
    }
    let turned_away = (BURST - PLACES) as f64;
    world.proxy.metric_reaches("portcullis_connections_total", &[("cause", "limit")], turned_away).await;
    let during = world.proxy.metrics().await;
    assert_eq!(open(&during), PLACES as f64);
    assert_eq!(total(&during, "limit") - total(&before, "limit"), turned_away);
    drop(silent);
    let after = ended(&world.proxy, &before).await;
    let causes = grown(&before, &after, "portcullis_connections_total", "cause");
    assert_eq!(causes.values().sum::<f64>(), BURST as f64, "{causes:?}");
    assert_eq!(causes["handshake_failed"], PLACES as f64, "{causes:?}");
    let reasons = grown(&before, &after, HANDSHAKES, "reason");
    assert_eq!(reasons.into_iter().collect::<Vec<_>>(), [("peer_closed".to_owned(), PLACES as f64)]);
    serves_quietly(&mut world).await;
    // Then those that go all the way and have nothing to show.
    let before = world.proxy.metrics().await;
    let nobody = presenting(&world.domain.ca, None);
    let mut burst = JoinSet::new();
    for _ in 0..BURST {
        let (nobody, address) = (Arc::clone(&nobody), world.address);
        burst.spawn(async move { refusal(address, &nobody).await });
    }
    soon("the end of the burst", burst.join_all()).await;
    let after = ended(&world.proxy, &before).await;
    let causes = grown(&before, &after, "portcullis_connections_total", "cause");
    assert_eq!(causes.values().sum::<f64>(), BURST as f64, "{causes:?}");
    assert!(causes.keys().all(|cause| ["handshake_failed", "limit"].contains(&cause.as_str())), "{causes:?}");
    let refused = grown(&before, &after, HANDSHAKES, "reason");
    assert_eq!(refused.get("no_certificate"), causes.get("handshake_failed"), "{refused:?}");
    assert_eq!(refused.len(), 1, "{refused:?}");
    serves_quietly(&mut world).await;
    assert!(world.proxy.stop().await.success());
}

/// As [`World::serves`], where the access log holds other lines yet.
async fn serves_quietly(world: &mut World) {
    echoed(TcpStream::connect(world.address).await.unwrap(), &world.good).await.unwrap();
    world.served += 1;
    let done = [("direction", "inbound"), ("cause", "done")];
    world.proxy.metric_reaches("portcullis_connections_total", &done, world.served as f64).await;
    assert_eq!(*world.workload.accepted.borrow(), world.served, "the workload was dialled for a stranger");
}

/// Reads metrics over a connection that is kept: where descriptors are short, a new one would not be accepted.
struct Scraper(TcpStream);

impl Scraper {
    async fn new(proxy: &Proxy) -> Self {
        let mut scraper = Self(TcpStream::connect(proxy.admin).await.unwrap());
        // The first answer shows that the connection has been accepted.
        scraper.metrics().await;
        scraper
    }

    async fn metrics(&mut self) -> Metrics {
        self.0.write_all(b"GET /metrics HTTP/1.1\r\nHost: admin\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        let text = loop {
            soon("metrics", self.0.read_buf(&mut answer)).await.unwrap();
            let text = String::from_utf8_lossy(&answer).to_ascii_lowercase();
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
            if body.len() >= length.parse().unwrap() {
                break String::from_utf8(answer[head.len() + 4..].to_vec()).unwrap();
            }
        };
        Metrics::parse(&text)
    }
}

#[tokio::test]
async fn exhausted_descriptors_are_waited_for_without_spinning() {
    const LIMIT: usize = 64;
    let (mut world, _) = World::start(
        "tls: { handshake_timeout: 60s }\n",
        |_| Vec::new(),
        |command| {
            let plain = std::mem::replace(command, tokio::process::Command::new("sh"));
            let limited = format!("ulimit -n {LIMIT}; exec \"$0\" \"$@\"");
            command.arg("-c").arg(limited).arg(plain.as_std().get_program()).args(plain.as_std().get_args());
        },
    )
    .await;
    world.serves("the start").await;
    let mut scraper = Scraper::new(&world.proxy).await;
    let before = scraper.metrics().await;
    let mut silent = Vec::new();
    for _ in 0..2 * LIMIT {
        silent.push(TcpStream::connect(world.address).await.unwrap());
    }
    // In the kernel's queue behind all of them, and patient.
    let queued = TcpStream::connect(world.address).await.unwrap();
    let good = Arc::clone(&world.good);
    let queued = tokio::spawn(async move { echoed(queued, &good).await });
    let failures = |metrics: &Metrics| metrics.sum("portcullis_accept_errors_total", &[("kind", "descriptors")]);
    // The waits between two tries double up to a second: with the eleventh they have long reached it.
    let mut metrics = before;
    let mut cpu = None;
    let grows = async {
        let mut tick = tokio::time::interval(Duration::from_millis(100));
        while failures(&metrics) < 12.0 {
            tick.tick().await;
            metrics = scraper.metrics().await;
            if cpu.is_none() && failures(&metrics) >= 1.0 {
                cpu = Some(metrics.sum("portcullis_process_cpu_seconds", &[]));
            }
        }
    };
    tokio::time::timeout(PATIENCE, grows).await.expect("failures to accept that are counted");
    // A loop that spins has counted thousands of failures by now, and spent all that time computing.
    assert!(failures(&metrics) < 20.0, "{}", failures(&metrics));
    let spent = metrics.sum("portcullis_process_cpu_seconds", &[]) - cpu.unwrap();
    assert!(spent < 0.5, "{spent} s of computing while there was nothing to do");
    assert!(open(&metrics) < LIMIT as f64);
    assert!(!queued.is_finished());
    assert_eq!(*world.workload.accepted.borrow(), 1);
    drop(silent);
    queued.await.unwrap().unwrap();
    world.served += 1;
    serves_quietly(&mut world).await;
    assert!(world.proxy.stop().await.success());
}
