//! OpenSSL on the other side of the mTLS, in both directions and both versions: what is negotiated lies within the
//! profile and is on record, and each offer below it is refused with a reason of its own.

use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;

use crate::harness::{Domain, Proxy, Running, echo, soon, tool};
use crate::seen::seen;
use crate::testing::{Key, Spec, TestCa};

/// What a handshake must come to.
enum Outcome {
    /// Version, suite and group.
    Served([&'static str; 3]),
    /// The reason, and the number of the alert that OpenSSL was sent (RFC 8446, section 6), if one was due.
    Refused(&'static str, Option<u8>),
}
use Outcome::{Refused, Served};

const TLS13_P384: Outcome = Served(["TLSv1.3", "TLS_AES_256_GCM_SHA384", "secp384r1"]);
const TLS13_CHACHA: Outcome = Served(["TLSv1.3", "TLS_CHACHA20_POLY1305_SHA256", "secp384r1"]);
const TLS12_P384: Outcome = Served(["TLSv1.2", "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", "secp384r1"]);

/// Certificates of OpenSSL's side: a folder with `NAME.crt`, `NAME.key` and what else its command line names.
struct Files {
    domain: Domain,
    authority: PathBuf,
}

impl Files {
    fn new() -> Self {
        let domain = Domain::new("a.example");
        let spec = || Spec::leaf(domain.id("/openssl")).dns("localhost");
        let [_, _, authority] = domain.files("good", &domain.ca.issue(&spec()));
        domain.files("p256", &domain.ca.issue(&spec().key(Key::P256)));
        domain.files("rsa", &domain.ca.issue(&spec().key(Key::Rsa)));
        domain.files("expired", &domain.ca.issue(&spec().valid(1_000_000_000, 1_000_000_060)));
        domain.files("stranger", &TestCa::new("a.example").issue(&spec()));
        domain.files("other", &domain.ca.issue(&Spec::leaf(domain.id("/other")).dns("localhost")));
        // OpenSSL's own configuration is the only way to have it leave the extended master secret out.
        let lines = "openssl_conf = top\n[top]\nssl_conf = ssl\n[ssl]\nsystem_default = all\n[all]\nOptions = ";
        std::fs::write(domain.path().join("plain.cnf"), lines.to_owned() + "SessionTicket\n").unwrap();
        std::fs::write(domain.path().join("no-ems.cnf"), lines.to_owned() + "-ExtendedMasterSecret\n").unwrap();
        Self { domain, authority }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.domain.path().join(name)
    }

    /// `openssl COMMAND` with this certificate. A configuration of ours, so that no distribution's minimum hides what
    /// is asked for.
    fn openssl(&self, command: &str, who: &str, args: &str) -> Command {
        let mut openssl = Command::new(tool("PORTCULLIS_TEST_OPENSSL", "openssl"));
        let without_ems = args.contains(NO_EMS);
        openssl.env("OPENSSL_CONF", self.path(if without_ems { "no-ems.cnf" } else { "plain.cnf" })).arg(command);
        if who != NOBODY {
            openssl.arg("-cert").arg(self.path(&format!("{who}.crt")));
            openssl.arg("-key").arg(self.path(&format!("{who}.key")));
        }
        openssl.arg("-CAfile").arg(&self.authority).arg("-verify_return_error");
        openssl.args(args.split_whitespace().filter(|arg| *arg != NO_EMS)).kill_on_drop(true);
        openssl
    }
}

const NOBODY: &str = "";
/// Stands in a command line where OpenSSL shall leave the extended master secret out.
const NO_EMS: &str = "(no-ems)";

struct Spoken {
    status: ExitStatus,
    errors: String,
}

/// Runs `s_client`: has each line come back, renegotiates if asked to, and waits for the end.
async fn s_client(command: &mut Command, lines: &[&str], renegotiate: bool) -> Spoken {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("openssl");
    let mut input = child.stdin.take().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    let talk = async {
        for line in lines {
            input.write_all(format!("{line}\n").as_bytes()).await.unwrap();
            let mut back = String::new();
            output.read_line(&mut back).await.unwrap();
            assert_eq!(back.trim_end(), *line);
        }
        // A client that must be refused keeps its input open, so that it does not leave of its own accord.
        let mut text = String::new();
        if renegotiate {
            input.write_all(b"R\n").await.unwrap();
            while !text.contains("RENEGOTIATING") {
                assert!(errors.read_line(&mut text).await.unwrap() > 0, "{text}");
            }
            // It begins with the next line.
            input.write_all(b"after\n").await.unwrap();
        }
        let kept = (renegotiate || lines.is_empty()).then_some(input);
        errors.read_to_string(&mut text).await.unwrap();
        let status = child.wait().await.unwrap();
        drop(kept);
        Spoken { status, errors: text }
    };
    soon("s_client", talk).await
}

struct Inbound {
    case: &'static str,
    listener: &'static str,
    who: &'static str,
    args: &'static str,
    outcome: Outcome,
    /// What it offers below the profile.
    weak: &'static [&'static str],
}

fn inbound_cases() -> Vec<Inbound> {
    let case = |case, listener, who, args, outcome, weak| Inbound { case, listener, who, args, outcome, weak };
    const TLS12: &str = "-tls1_2 -groups P-384 -cipher ECDHE-ECDSA-AES256-GCM-SHA384";
    vec![
        case("TLS 1.3 on P-384", "strict", "good", "-tls1_3 -groups P-384", TLS13_P384, &[]),
        case(
            "ChaCha20 alone",
            "strict",
            "good",
            "-tls1_3 -groups P-384 -ciphersuites TLS_CHACHA20_POLY1305_SHA256",
            TLS13_CHACHA,
            &[],
        ),
        case("P-384 behind others", "strict", "good", "-tls1_3 -groups X25519:P-256:P-384", TLS13_P384, &[]),
        case(
            "what OpenSSL offers by itself",
            "strict",
            "good",
            "",
            TLS13_P384,
            &["CBC", "RSA_KEY_EXCHANGE", "TLSv1.0", "TLSv1.1"],
        ),
        case("TLS 1.3 where 1.2 is allowed", "legacy", "good", "-tls1_3 -groups P-384", TLS13_P384, &[]),
        case("TLS 1.2 where allowed", "legacy", "good", TLS12, TLS12_P384, &[]),
        case("TLS 1.2 with its usual suites", "legacy", "good", "-tls1_2", TLS12_P384, &["CBC", "RSA_KEY_EXCHANGE"]),
        case("TLS 1.2 where not allowed", "strict", "good", TLS12, Refused("no_shared_version", Some(70)), &[]),
        case(
            "TLS 1.1",
            "strict",
            "good",
            "-tls1_1 -cipher ECDHE-ECDSA-AES256-SHA:@SECLEVEL=0",
            Refused("no_shared_version", Some(70)),
            &["CBC", "TLSv1.1"],
        ),
        case(
            "TLS 1.0 even where 1.2 is allowed",
            "legacy",
            "good",
            "-tls1 -cipher ECDHE-ECDSA-AES256-SHA:@SECLEVEL=0",
            Refused("no_shared_version", Some(70)),
            &["CBC", "TLSv1.0"],
        ),
        case(
            "AES-128 in TLS 1.3",
            "strict",
            "good",
            "-tls1_3 -groups P-384 -ciphersuites TLS_AES_128_GCM_SHA256",
            Refused("no_shared_suite", Some(40)),
            &[],
        ),
        case(
            "AES-128 in TLS 1.2",
            "legacy",
            "good",
            "-tls1_2 -groups P-384 -cipher ECDHE-ECDSA-AES128-GCM-SHA256",
            Refused("no_shared_suite", Some(40)),
            &[],
        ),
        case(
            "CBC",
            "legacy",
            "good",
            "-tls1_2 -groups P-384 -cipher ECDHE-ECDSA-AES256-SHA384",
            Refused("no_shared_suite", Some(40)),
            &["CBC"],
        ),
        // It needs no group and offers none, and that is seen first.
        case(
            "RSA key exchange",
            "legacy",
            "good",
            "-tls1_2 -cipher AES256-GCM-SHA384",
            Refused("no_shared_group", Some(40)),
            &["RSA_KEY_EXCHANGE"],
        ),
        case(
            "anonymous and NULL",
            "legacy",
            "good",
            "-tls1_2 -cipher ADH-AES256-GCM-SHA384:ECDHE-ECDSA-NULL-SHA:@SECLEVEL=0",
            Refused("no_shared_suite", Some(40)),
            &["ANON", "NULL"],
        ),
        case("P-256", "strict", "good", "-tls1_3 -groups P-256", Refused("no_shared_group", Some(40)), &[]),
        case("X25519", "strict", "good", "-tls1_3 -groups X25519", Refused("no_shared_group", Some(40)), &[]),
        case(
            "P-256 in TLS 1.2",
            "legacy",
            "good",
            "-tls1_2 -groups P-256 -cipher ECDHE-ECDSA-AES256-GCM-SHA384",
            Refused("no_shared_group", Some(40)),
            &[],
        ),
        case(
            "X25519 in TLS 1.2",
            "legacy",
            "good",
            "-tls1_2 -groups X25519 -cipher ECDHE-ECDSA-AES256-GCM-SHA384",
            Refused("no_shared_group", Some(40)),
            &[],
        ),
        case(
            "no signature in common",
            "strict",
            "good",
            "-tls1_3 -groups P-384 -sigalgs rsa_pss_rsae_sha256",
            Refused("no_shared_signature", Some(40)),
            &[],
        ),
        case("no certificate", "strict", NOBODY, "-tls1_3 -groups P-384", Refused("no_certificate", Some(116)), &[]),
        case("no certificate in TLS 1.2", "legacy", NOBODY, TLS12, Refused("no_certificate", Some(116)), &[]),
        case("P-256 key", "strict", "p256", "-tls1_3 -groups P-384", Refused("peer_key_type", Some(43)), &[]),
        case("P-256 key in TLS 1.2", "legacy", "p256", TLS12, Refused("peer_key_type", Some(43)), &[]),
        // A client that keeps to the signatures it was asked for has nothing to show.
        case("RSA key", "strict", "rsa", "-tls1_3 -groups P-384", Refused("no_certificate", Some(116)), &[]),
        case("expired", "strict", "expired", "-tls1_3 -groups P-384", Refused("expired", Some(45)), &[]),
        case("other CA", "legacy", "stranger", TLS12, Refused("untrusted", Some(48)), &[]),
        case("no rule", "strict", "other", "-tls1_3 -groups P-384", Refused("denied", Some(49)), &[]),
        case(
            "no extended master secret",
            "legacy",
            "good",
            "-tls1_2 -groups P-384 -cipher ECDHE-ECDSA-AES256-GCM-SHA384 (no-ems)",
            Refused("no_extended_master_secret", Some(40)),
            &[],
        ),
    ]
}

/// A proxy with an inbound listener for TLS 1.3 and one that allows TLS 1.2.
async fn server(files: &Files, workload: std::net::SocketAddr) -> Proxy {
    let listener = |name: &str, legacy: bool| {
        format!(
            "  - name: {name}\n    listen: 127.0.0.1:0\n    to: {workload}\n    allow: [{}]\n    legacy_tls12: {legacy}\n",
            files.domain.id("/openssl")
        )
    };
    let config = format!(
        "{}tls: {{ handshake_timeout: 30s }}\ninbound:\n{}{}",
        files.domain.identity("/server"),
        listener("strict", false),
        listener("legacy", true)
    );
    let proxy = Proxy::start(files.domain.path(), "server", &config).await;
    proxy.ready().await;
    proxy
}

#[tokio::test]
async fn s_client_gets_the_profile_or_a_reason() {
    let files = Files::new();
    let workload = echo().await;
    let mut proxy = server(&files, workload.address).await;
    let mut served = 0;
    for Inbound { case, listener, who, args, outcome, weak } in inbound_cases() {
        let address = proxy.address(listener).await;
        let connect = format!("-connect {address} -servername localhost -brief {args}");
        let mut openssl = files.openssl("s_client", who, &connect);
        let lines: &[&str] = if matches!(outcome, Served(_)) { &["one line", "and another"] } else { &[] };
        let (spoken, seen) = seen(&mut proxy, listener, s_client(&mut openssl, lines, false)).await;
        assert_eq!(seen.weak(), weak, "{case}: {}\n{}", seen.line, spoken.errors);
        match outcome {
            Served(what) => {
                served += 1;
                assert!(spoken.status.success(), "{case}: {}", spoken.errors);
                seen.succeeded(case);
                assert_eq!(seen.negotiated(["version", "cipher_suite", "group"]), what, "{case}");
                let [direction, signature, key] = seen.negotiated(["direction", "signature", "key_type"]);
                assert_eq!([&*direction, &*signature, &*key], ["inbound", "ecdsa_secp384r1_sha384", "ecdsa-p384"]);
                assert_eq!(seen.line["cause"], "done", "{case}: {}", seen.line);
                assert_eq!(seen.line["peer"], files.domain.id("/openssl"), "{case}");
            }
            Refused(reason, alert) => {
                seen.failed(case, "inbound", reason);
                assert!(!spoken.status.success(), "{case}");
                assert_alert(case, &spoken.errors, alert);
                let mut good = files.openssl("s_client", "good", &format!("-connect {address} -brief -groups P-384"));
                let (spoken, seen) =
                    crate::seen::seen(&mut proxy, listener, s_client(&mut good, &["next"], false)).await;
                seen.succeeded(case);
                assert!(spoken.status.success(), "after {case}: {}", spoken.errors);
                served += 1;
            }
        }
        assert_eq!(*workload.accepted.borrow(), served, "{case}: the workload is dialled for admitted peers alone");
    }
    assert!(proxy.stop().await.success());
}

fn assert_alert(case: &str, said: &str, alert: Option<u8>) {
    match alert {
        Some(number) => {
            let found = said.lines().any(|line| line.ends_with(&format!("SSL alert number {number}")));
            assert!(found, "{case}: no alert {number} in\n{said}");
        }
        None => assert!(!said.contains("SSL alert number"), "{case}: {said}"),
    }
}

#[tokio::test]
async fn renegotiation_is_refused() {
    let files = Files::new();
    let workload = echo().await;
    let mut proxy = server(&files, workload.address).await;
    let address = proxy.address("legacy").await;
    let args = format!("-connect {address} -brief -tls1_2 -groups P-384");
    let mut openssl = files.openssl("s_client", "good", &args);
    let (spoken, seen) = seen(&mut proxy, "legacy", s_client(&mut openssl, &["before"], true)).await;
    assert!(spoken.errors.contains("no renegotiation"), "{}", spoken.errors);
    // One handshake on this connection, the first one.
    seen.succeeded("renegotiation");
    assert_eq!(seen.line["peer"], files.domain.id("/openssl"));
    assert!(proxy.stop().await.success());
}

/// Who stands behind an outbound listener.
enum Upstream {
    /// `s_server` with this certificate and these arguments. It asks for our certificate.
    OpenSsl(&'static str, &'static str),
    /// A server without TLS that says this first, and then listens.
    Says(&'static [u8]),
    /// One that accepts and closes.
    Closes,
}
use Upstream::{Closes, OpenSsl, Says};

struct Outbound {
    case: &'static str,
    upstream: Upstream,
    legacy: bool,
    outcome: Outcome,
}

fn outbound_cases() -> Vec<Outbound> {
    let case = |case, legacy, upstream, outcome| Outbound { case, upstream, legacy, outcome };
    const TLS12: &str = "-tls1_2 -groups P-384 -cipher ECDHE-ECDSA-AES256-GCM-SHA384";
    vec![
        case("tls13", false, OpenSsl("good", "-tls1_3"), TLS13_P384),
        case("tls13-p384-alone", false, OpenSsl("good", "-tls1_3 -groups P-384"), TLS13_P384),
        case("tls13-chacha", false, OpenSsl("good", "-ciphersuites TLS_CHACHA20_POLY1305_SHA256"), TLS13_CHACHA),
        case("tls12-allowed", true, OpenSsl("good", TLS12), TLS12_P384),
        case("tls13-where-12-is-allowed", true, OpenSsl("good", ""), TLS13_P384),
        case("tls12-not-allowed", false, OpenSsl("good", TLS12), Refused("no_shared_version", None)),
        case("tls11", true, OpenSsl("good", "-tls1_1 -cipher ALL:@SECLEVEL=0"), Refused("no_shared_version", None)),
        case("wrong-peer", false, OpenSsl("other", ""), Refused("wrong_peer", Some(49))),
        case("wrong-peer-tls12", true, OpenSsl("other", TLS12), Refused("wrong_peer", Some(49))),
        case("expired", false, OpenSsl("expired", ""), Refused("expired", Some(45))),
        case("other-ca", false, OpenSsl("stranger", ""), Refused("untrusted", Some(48))),
        case("p256", false, OpenSsl("p256", ""), Refused("peer_key_type", Some(43))),
        // A server that shares no suite, group or signature says so by alert, and not which of the three it was. In
        // TLS 1.2 the curve of its key is one of the groups.
        case("p256-tls12", true, OpenSsl("p256", TLS12), Refused("peer_alert", None)),
        case("rsa", false, OpenSsl("rsa", ""), Refused("peer_alert", None)),
        case("aes128", false, OpenSsl("good", "-ciphersuites TLS_AES_128_GCM_SHA256"), Refused("peer_alert", None)),
        case("cbc", true, OpenSsl("good", "-tls1_2 -cipher ECDHE-ECDSA-AES256-SHA384"), Refused("peer_alert", None)),
        case("p256-group", false, OpenSsl("good", "-groups P-256"), Refused("peer_alert", None)),
        case("no-ems", true, OpenSsl("good", "-tls1_2 (no-ems)"), Refused("no_extended_master_secret", Some(40))),
        case("plain-smtp", false, Says(b"220 mail.example ESMTP\r\n"), Refused("not_tls", None)),
        case("plain-http", false, Says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), Refused("not_tls", None)),
        case("closes", false, Closes, Refused("peer_closed", None)),
        case("silent", false, Says(b""), Refused("timeout", None)),
    ]
}

async fn plain_server(says: Option<&'static [u8]>) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut first = [0; 4096];
                let _ = stream.read(&mut first).await;
                if let Some(says) = says {
                    let _ = stream.write_all(says).await;
                    let _ = stream.read_to_end(&mut Vec::new()).await;
                }
            });
        }
    });
    address
}

async fn s_server(files: &Files, who: &str, args: &str) -> (Running, std::net::SocketAddr) {
    let mut openssl = files.openssl("s_server", who, &format!("-accept 127.0.0.1:0 -Verify 1 -rev {args}"));
    let mut running = Running::start(&mut openssl);
    let accepts = |line: &str| line.strip_prefix("ACCEPT ")?.parse().ok();
    let address = running.line("the address of s_server", accepts).await;
    (running, address)
}

/// `s_server -rev` sends each line back reversed.
async fn reversed(address: std::net::SocketAddr) -> std::io::Result<()> {
    let talk = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(b"stressed\n").await?;
        let mut back = [0; 9];
        stream.read_exact(&mut back).await?;
        assert_eq!(&back, b"desserts\n");
        stream.shutdown().await?;
        assert_eq!(stream.read(&mut back).await?, 0);
        Ok(())
    };
    soon("a line from s_server", talk).await
}

#[tokio::test]
async fn s_server_is_the_expected_peer_within_the_profile_or_is_refused() {
    let files = Files::new();
    let cases = outbound_cases();
    let mut config = format!("{}tls: {{ handshake_timeout: 3s }}\noutbound:\n", files.domain.identity("/client"));
    let mut servers = Vec::new();
    for Outbound { case, upstream, legacy, .. } in &cases {
        let (running, address) = match upstream {
            OpenSsl(who, args) => {
                let (running, address) = s_server(&files, who, args).await;
                (Some(running), address)
            }
            Says(text) => (None, plain_server(Some(text)).await),
            Closes => (None, plain_server(None).await),
        };
        config += &format!(
            "  - name: {case}\n    listen: 127.0.0.1:0\n    to: {address}\n    expect: {}\n    legacy_tls12: {legacy}\n",
            files.domain.id("/openssl")
        );
        servers.push(running);
    }
    let mut proxy = Proxy::start(files.domain.path(), "client", &config).await;
    proxy.ready().await;
    for (Outbound { case, outcome, .. }, server) in cases.iter().zip(&mut servers) {
        let address = proxy.address(case).await;
        let (talked, seen) = seen(&mut proxy, case, reversed(address)).await;
        match *outcome {
            Served(what) => {
                talked.unwrap_or_else(|error| panic!("{case}: {error}"));
                seen.succeeded(case);
                assert_eq!(seen.negotiated(["version", "cipher_suite", "group"]), what, "{case}");
                let [direction, signature, key] = seen.negotiated(["direction", "signature", "key_type"]);
                assert_eq!([&*direction, &*signature, &*key], ["outbound", "ecdsa_secp384r1_sha384", "ecdsa-p384"]);
                assert_eq!(seen.line["peer"], files.domain.id("/openssl"), "{case}");
            }
            Refused(reason, alert) => {
                let error = talked.expect_err(case);
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{case}: a refusal is no orderly end");
                seen.failed(case, "outbound", reason);
                if let (Some(server), Some(number)) = (server, alert) {
                    let told = |line: &str| line.ends_with(&format!("SSL alert number {number}")).then_some(());
                    server.line(&format!("{case}: alert {number}"), told).await;
                }
                let good = proxy.address("tls13").await;
                let (talked, seen) = crate::seen::seen(&mut proxy, "tls13", reversed(good)).await;
                talked.unwrap_or_else(|error| panic!("after {case}: {error}: {}", seen.line));
                seen.succeeded(case);
            }
        }
    }
    assert!(proxy.stop().await.success());
}
