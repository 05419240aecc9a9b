//! Captured outbound connections, by real rules in namespaces: which listener takes them, what passes through to where it
//! was for, and what of the workload's own TLS is cut.

use std::net::SocketAddr;
use std::process::Output;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{Domain, Proxy, Running, exchange, program, soon, succeeds, tool};
use crate::netns::{APPLICATION, Net, Pod, ROOT};
use crate::pods::Workload;
use crate::testing::Spec;

/// A pod whose outbound traffic is captured, and one that it talks to.
struct Captured {
    _net: Net,
    near: Pod,
    far: Pod,
    domain: Domain,
    proxy: Proxy,
    identity: String,
}

impl Captured {
    /// None, and the test is over, where namespaces are not to be had.
    async fn start(config: &str) -> Option<Self> {
        let net = Net::new()?;
        let (near, far) = (net.pod("near").await, net.pod("far").await);
        let domain = Domain::new("a.example");
        let identity = domain.identity("/near");
        let proxy = near.proxy(&domain, &format!("{identity}{config}")).await;
        proxy.ready().await;
        // Low ports without privileges.
        far.sysctl("net/ipv4/ip_unprivileged_port_start", "0").await;
        let mut apply = near.command(ROOT, program());
        apply.args(["redirect", "apply", "--config"]).arg(&proxy.config);
        succeeds(&mut apply, "").await;
        Some(Self { _net: net, near, far, domain, proxy, identity })
    }

    /// `openssl s_server` on the other pod, which answers requests.
    async fn tls_server(&self, port: u16, options: &[&str]) -> Running {
        let own = self.domain.ca.issue(&Spec::leaf(self.domain.id("/far")).dns("far.example"));
        let [certificate, key, _] = self.domain.files("far", &own);
        let mut server = self.far.command(ROOT, tool("PORTCULLIS_TEST_OPENSSL", "openssl"));
        server.args(["s_server", "-www", "-accept", &port.to_string()]).args(options);
        server.arg("-cert").arg(certificate).arg("-key").arg(key);
        let mut server = Running::start(&mut server);
        server.line("that it accepts", |line| (line == "ACCEPT").then_some(())).await;
        server
    }

    /// curl, as the application, asks the other pod for `/`.
    async fn curl(&self, url: &str, options: &[&str]) -> Output {
        let mut curl = self.near.command(APPLICATION, tool("PORTCULLIS_TEST_CURL", "curl"));
        curl.args(["-sS", "--max-time", "20", "--noproxy", "*", "-k"]).args(options).arg(url);
        soon("curl", curl.output()).await.unwrap()
    }

    async fn passed(&self, labels: &[(&str, &str)]) -> f64 {
        self.proxy.metrics().await.sum("portcullis_passthrough_tls_total", labels)
    }
}

fn listener_of(record: &Value) -> &str {
    record["listener"].as_str().unwrap()
}

/// Whether nothing comes any more, and not as an orderly end.
async fn is_reset(stream: &mut TcpStream) -> bool {
    let read = soon("the end of a connection", stream.read(&mut [0; 64])).await;
    read.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
}

const WATCHED: &str = "
intercept: { outbound: {} }
outbound:
  - { name: strict, capture: { addresses: [10.77.0.0/24, 'fd00:77::/64'], ports: [443] }, passthrough: tls }
  - { name: legacy, capture: { ports: [444] }, passthrough: tls, legacy_tls12: true }
";

#[tokio::test]
async fn tls_of_the_workload_passes_within_the_profile_and_is_cut_below_it() {
    let Some(mut captured) = Captured::start(WATCHED).await else { return };
    let p384 = ["-groups", "secp384r1"];
    let tls12 = ["-tls1_2", "-cipher", "ECDHE-ECDSA-AES256-GCM-SHA384", "-groups", "secp384r1"];
    for (port, options, picked) in [
        (443, &p384[..], ["TLSv1.3", "TLS_AES_256_GCM_SHA384", "secp384r1", "true"]),
        (444, &tls12, ["TLSv1.2", "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", "secp384r1", "true"]),
        (443, &tls12, ["TLSv1.2", "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", "secp384r1", "false"]),
        (
            443,
            &["-ciphersuites", "TLS_AES_128_GCM_SHA256", "-groups", "secp384r1"],
            ["TLSv1.3", "TLS_AES_128_GCM_SHA256", "secp384r1", "false"],
        ),
        (443, &["-groups", "X25519"], ["TLSv1.3", "TLS_AES_256_GCM_SHA384", "X25519", "false"]),
        (
            444,
            &["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-GCM-SHA256", "-groups", "P-256"],
            ["TLSv1.2", "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "secp256r1", "false"],
        ),
        (
            444,
            &["-tls1_1", "-cipher", "ECDHE-ECDSA-AES128-SHA:@SECLEVEL=0", "-groups", "P-256"],
            ["TLSv1.1", "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA", "secp256r1", "false"],
        ),
    ] {
        let server = captured.tls_server(port, options).await;
        let [version, cipher_suite, group, compliant] = picked;
        let labels = [("version", version), ("cipher_suite", cipher_suite), ("group", group), ("compliant", compliant)];
        let before = captured.passed(&labels).await;
        let client = ["--tls-max", "1.3", "--tlsv1.0", "--ciphers", "ALL:@SECLEVEL=0"];
        for address in captured.far.at(port) {
            let answer = captured.curl(&format!("https://{address}/"), &client).await;
            let said = String::from_utf8_lossy(&answer.stderr).into_owned();
            let page = String::from_utf8_lossy(&answer.stdout).into_owned();
            let cause = if compliant == "true" { "done" } else { "weak_tls" };
            assert_eq!(answer.status.success(), compliant == "true", "{picked:?}: {said}");
            assert_eq!(page.contains(version), compliant == "true", "{picked:?}: {page}");
            let record = captured
                .proxy
                .record("the connection", |line| line["upstream"] == address.to_string() && line["cause"].is_string())
                .await;
            let name = if port == 443 { "strict" } else { "legacy" };
            assert_eq!((record["cause"].as_str(), listener_of(&record)), (Some(cause), name), "{record}");
            assert_eq!(record["rule"], format!("passthrough:{name}"), "{record}");
            let seen = ["tls_version", "cipher_suite", "group"].map(|field| record[field].as_str().unwrap());
            assert_eq!(seen, [version, cipher_suite, group], "{record}");
            assert_eq!((&record["compliant"], &record["peer"]), (&Value::Bool(compliant == "true"), &Value::Null));
        }
        assert_eq!(captured.passed(&labels).await - before, 2.0, "{picked:?}");
        drop(server);
    }
    let weak = captured.proxy.metrics().await.sum("portcullis_tls_offered_weak_total", &[("direction", "outbound")]);
    assert!(weak > 0.0, "curl has offered what it was told to");
}

#[tokio::test]
async fn what_is_audited_passes_and_is_counted() {
    let config = "
intercept: { outbound: { watch: audit } }
outbound: [{ name: out, capture: { ports: [443] }, passthrough: tls }]
";
    let Some(mut captured) = Captured::start(config).await else { return };
    let _server = captured.tls_server(443, &["-ciphersuites", "TLS_AES_128_GCM_SHA256", "-groups", "X25519"]).await;
    let answer = captured.curl(&format!("https://{}/", captured.far.at(443)[0]), &[]).await;
    assert!(answer.status.success(), "{answer:?}");
    captured.proxy.logged(&["below the profile", "TLS_AES_128_GCM_SHA256"]).await;
    let record = captured.proxy.ended("done").await;
    assert_eq!(record["compliant"], false, "{record}");
    assert_eq!(captured.passed(&[("compliant", "false")]).await, 1.0);
}

#[tokio::test]
async fn a_server_below_the_profile_gets_no_application_data_even_early() {
    let Some(mut captured) = Captured::start(WATCHED).await else { return };
    let [address, _] = captured.far.at(443);
    let listener = captured.far.listen(ROOT, address).await;
    let hello = crate::client::client_hello(&crate::client::presenting(&captured.domain.ca, None));
    // As a client with early data would: the hello, in pieces of a few bytes, and something encrypted behind it.
    let message = &hello[5..];
    let fragments: Vec<u8> = message
        .chunks(3)
        .flat_map(|chunk| [&[22, 3, 1, 0, u8::try_from(chunk.len()).unwrap()][..], chunk].concat())
        .collect();
    let early = [&[23, 3, 3, 0, 9][..], b"secret!!!"].concat();
    let mut client = captured.near.connect(APPLICATION, address).await.unwrap();
    client.set_nodelay(true).unwrap();
    for piece in fragments.chunks(101) {
        client.write_all(piece).await.unwrap();
    }
    client.write_all(&early).await.unwrap();
    let (mut server, _) = soon("the dialled server", listener.accept()).await.unwrap();
    let mut heard = vec![0; fragments.len()];
    soon("the hello", server.read_exact(&mut heard)).await.unwrap();
    assert!(heard == fragments, "it passes untouched");
    // A ServerHello of TLS 1.2 that picks RC4.
    let body = [&[3, 3][..], &[7; 32], &[0, 0, 5, 0]].concat();
    let answer =
        [&[22, 3, 3, 0, u8::try_from(body.len()).unwrap() + 4, 2, 0, 0, u8::try_from(body.len()).unwrap()][..], &body];
    server.write_all(&answer.concat()).await.unwrap();
    assert!(is_reset(&mut server).await, "the server hears nothing more");
    assert!(is_reset(&mut client).await, "the client never hears the answer");
    let record = captured.proxy.ended("weak_tls").await;
    assert_eq!(record["cipher_suite"], "TLS_RSA_WITH_RC4_128_SHA", "{record}");
}

#[tokio::test]
async fn only_tls_passes_where_only_tls_may_and_what_nobody_takes_is_refused() {
    let Some(mut captured) = Captured::start(WATCHED).await else { return };
    let [address, _] = captured.far.at(443);
    let workload = Workload::start(&captured.far, address).await;
    for words in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\x16\x03\x01\x00\x05\x02nope"] {
        let mut client = captured.near.connect(APPLICATION, address).await.unwrap();
        client.write_all(words).await.unwrap();
        assert!(is_reset(&mut client).await);
        let record = captured.proxy.ended("denied").await;
        assert_eq!(record["rule"], "passthrough:strict", "{record}");
    }
    let [other, _] = captured.far.at(4443);
    let elsewhere = Workload::start(&captured.far, other).await;
    // The reset may be there before connect(2) has returned.
    match captured.near.connect(APPLICATION, other).await {
        Ok(mut client) => assert!(is_reset(&mut client).await),
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
    let record = captured.proxy.ended("undeclared").await;
    assert_eq!((&record["upstream"], &record["rule"]), (&other.to_string().into(), &"unmatched".into()), "{record}");
    assert!(workload.met().is_empty() && elsewhere.met().is_empty(), "neither was even dialled");
}

#[tokio::test]
async fn plaintext_passes_whole_where_that_is_declared_and_whoever_speaks_first() {
    let config = "
intercept: { outbound: { unmatched: passthrough } }
outbound: [{ name: out, capture: { ports: [80] }, passthrough: any }]
";
    let Some(mut captured) = Captured::start(config).await else { return };
    for (port, listener) in [(80, "out"), (81, "captured")] {
        for address in captured.far.at(port) {
            let _workload = Workload::start(&captured.far, address).await;
            let mut client = captured.near.connect(APPLICATION, address).await.unwrap();
            let bytes: Vec<u8> = (0..3_000_000u32).map(|at| (at * 7 % 251) as u8).collect();
            exchange(&mut client, b"short").await.unwrap();
            let (mut read, mut write) = client.split();
            let mut heard = Vec::new();
            let (wrote, answered) = tokio::join!(
                async {
                    write.write_all(&bytes).await?;
                    write.shutdown().await
                },
                soon("the echo", read.read_to_end(&mut heard))
            );
            wrote.unwrap();
            answered.unwrap();
            assert!(heard == bytes);
            let record = captured.proxy.ended("done").await;
            assert_eq!((listener_of(&record), &record["bytes_sent"]), (listener, &3_000_005.into()), "{record}");
        }
        let left = captured.proxy.metrics().await;
        assert_eq!(left.sum("portcullis_passthrough_plaintext_total", &[("listener", listener)]), 2.0);
    }
    let [address, _] = captured.far.at(25);
    let mail = captured.far.listen(ROOT, address).await;
    let mut client = captured.near.connect(APPLICATION, address).await.unwrap();
    let (mut server, _) = soon("the dialled server", mail.accept()).await.unwrap();
    server.write_all(b"220 mail.example").await.unwrap();
    let mut greeting = [0; 16];
    soon("the greeting", client.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"220 mail.example");
}

#[tokio::test]
async fn a_live_connection_ends_when_it_may_pass_no_longer() {
    let config = "
intercept: { outbound: { unmatched: passthrough } }
outbound: [{ name: out, capture: { ports: [80] }, passthrough: any }]
";
    let Some(mut captured) = Captured::start(config).await else { return };
    let mut clients = Vec::new();
    for port in [80, 81, 82] {
        let [address, _] = captured.far.at(port);
        let _workload = Workload::start(&captured.far, address).await;
        let mut client = captured.near.connect(APPLICATION, address).await.unwrap();
        exchange(&mut client, b"before").await.unwrap();
        clients.push(client);
    }
    // One listener lets only TLS pass now, another takes what nobody took before, and what is on 82 goes on.
    let after = format!(
        "{}
intercept: {{ outbound: {{ unmatched: passthrough }} }}
outbound:
  - {{ name: out, capture: {{ ports: [80] }}, passthrough: tls }}
  - {{ name: new, capture: {{ ports: [81] }}, expect: '{}' }}
",
        captured.identity,
        captured.domain.id("/far")
    );
    captured.proxy.reloaded(&after).await;
    for client in &mut clients[..2] {
        assert!(is_reset(client).await);
    }
    let ended: Vec<String> = {
        let mut ended = Vec::new();
        for _ in 0..2 {
            ended.push(listener_of(&captured.proxy.ended("policy_changed").await).to_owned());
        }
        ended.sort();
        ended
    };
    assert_eq!(ended, ["captured", "out"]);
    exchange(&mut clients[2], b"after").await.unwrap();
}

/// The other pod's own sidecar, explicit, in front of an echo server or an origin of HTTP.
async fn mesh(captured: &Captured, port: u16, protocol: &str, to: SocketAddr) -> Proxy {
    let config = format!(
        "{}inbound:\n  - {{ name: in, listen: '0.0.0.0:{port}', to: '{to}', protocol: {protocol}, allow: ['{}'] }}\n",
        captured.domain.identity("/far"),
        captured.domain.id("/near"),
    );
    let proxy = captured.far.proxy(&captured.domain, &config).await;
    proxy.ready().await;
    proxy
}

#[tokio::test]
async fn what_the_client_says_decides_which_listener_takes_it() {
    let config = "
intercept: { outbound: {} }
outbound:
  - { name: web, capture: { http_hosts: ['*.web.example'] }, protocol: http, expect: spiffe://a.example/far }
  - { name: sealed, capture: { sni: [sealed.example] }, expect: spiffe://a.example/far }
  - { name: rest, capture: { ports: [8443] }, expect: spiffe://a.example/nobody }
";
    let Some(mut captured) = Captured::start(config).await else { return };
    // An origin that answers each request with its own words.
    let origin = captured.far.listen(ROOT, ([127, 0, 0, 1], 8080).into()).await;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = origin.accept().await {
            tokio::spawn(async move {
                let mut heard = [0; 4096];
                while let Ok(1..) = stream.read(&mut heard).await {
                    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nyes";
                    if stream.write_all(answer).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    let far = mesh(&captured, 8443, "http", ([127, 0, 0, 1], 8080).into()).await;
    let [address, _] = captured.far.at(8443);
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let answer = captured.curl(&format!("http://{address}/"), &[version, "-H", "Host: a.web.example"]).await;
        assert!(answer.status.success(), "{version}: {answer:?}");
        let record = captured.proxy.record("the request", |line| line["listener"] == "web").await;
        assert_eq!(record["peer"], "spiffe://a.example/far", "{version}: {record}");
        let answer = captured.curl(&format!("http://{address}/"), &[version, "-H", "Host: web.example"]).await;
        assert!(!answer.status.success(), "{version}: {answer:?}");
        let record = captured.proxy.record("the other listener", |line| line["listener"] == "rest").await;
        assert_eq!(record["reason"], "wrong_peer", "{record}");
    }
    // A kept connection is for the hosts of its listener only.
    let mut client = captured.near.connect(APPLICATION, address).await.unwrap();
    let asking = |host: &str| format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
    client.write_all(asking("b.web.example").as_bytes()).await.unwrap();
    let mut heard = vec![0; 4096];
    let count = soon("an answer", client.read(&mut heard)).await.unwrap();
    assert!(heard[..count].starts_with(b"HTTP/1.1 200"), "{}", heard[..count].escape_ascii());
    client.write_all(asking("records.example").as_bytes()).await.unwrap();
    let mut rest = Vec::new();
    soon("the end", client.read_to_end(&mut rest)).await.unwrap();
    assert!(memchr::memmem::find(&rest, b"HTTP/1.1 421").is_some(), "{}", rest.escape_ascii());
    let record = captured.proxy.record("the refusal", |line| line["status"] == 421).await;
    assert_eq!((&record["cause"], &record["host"]), (&"misdirected".into(), &"records.example".into()), "{record}");
    drop(far);
}

#[tokio::test]
async fn tls_of_the_workload_is_carried_inside_mtls_where_its_server_name_says_so() {
    let config = "
intercept: { outbound: {} }
outbound:
  - { name: sealed, capture: { sni: [sealed.example] }, expect: spiffe://a.example/far }
";
    let Some(mut captured) = Captured::start(config).await else { return };
    let _server = captured.tls_server(4443, &[]).await;
    let _far = mesh(&captured, 8443, "tcp", ([127, 0, 0, 1], 4443).into()).await;
    let [address, _] = captured.far.at(8443);
    for (name, goes) in [("sealed.example", true), ("open.example", false)] {
        let resolve = format!("{name}:8443:{}", address.ip());
        let answer = captured.curl(&format!("https://{name}:8443/"), &["--resolve", &resolve]).await;
        assert_eq!(answer.status.success(), goes, "{name}: {answer:?}");
        let record = captured.proxy.ended(if goes { "done" } else { "undeclared" }).await;
        assert_eq!(record["peer"].is_string(), goes, "{record}");
    }
}
