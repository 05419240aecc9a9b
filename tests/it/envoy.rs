//! Envoy on the other side of the mTLS, in both directions, with the hybrid group and with P-384. Its own statistics say
//! what it negotiated; whoever is not who the other expects is refused, whichever side looks.

use std::net::SocketAddr;
use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::harness::{Domain, Proxy, Running, echo, exchange, soon, tool, until};
use crate::testing::Spec;

const GROUPS: [(&str, &str, &str); 2] =
    [("X25519MLKEM768, P-384", "X25519MLKEM768", "X25519MLKEM768"), ("P-384", "P-384", "secp384r1")];

pub struct Envoy {
    _running: Running,
    admin: SocketAddr,
    pub address: SocketAddr,
}

impl Envoy {
    /// Starts Envoy from a template of tests/envoy with an SVID of this domain.
    async fn start(
        domain: &Domain,
        template: &str,
        path: &str,
        upstream: SocketAddr,
        curves: &str,
        peer: &str,
    ) -> Self {
        Self::start_with(domain, template, path, upstream, &[("CURVES", curves), ("EXPECT", peer), ("ALLOW", peer)])
            .await
    }

    /// The same, with values for whatever else the template asks for.
    pub async fn start_with(
        domain: &Domain,
        template: &str,
        path: &str,
        upstream: SocketAddr,
        values: &[(&str, &str)],
    ) -> Self {
        let own = domain.ca.issue(&Spec::leaf(domain.id(path)).dns("localhost"));
        // Two Envoys may work in one folder, from different templates.
        let name = format!("envoy-{}", template.trim_end_matches(".yaml"));
        let [certificate, key, ca] = domain.files(&name, &own);
        let file = |path: &Path| path.display().to_string();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/envoy").join(template);
        let mut text = std::fs::read_to_string(source).unwrap();
        let own = [
            ("ADMIN_PORT", "0"),
            ("LISTEN_PORT", "0"),
            ("UPSTREAM_PORT", &upstream.port().to_string()),
            ("CERT", &file(&certificate)),
            ("KEY", &file(&key)),
            ("CA", &file(&ca)),
        ];
        for (name, value) in own.iter().chain(values) {
            text = text.replace(&format!("@{name}@"), value);
        }
        let config = domain.path().join(format!("{name}.yaml"));
        std::fs::write(&config, text).unwrap();
        let told = domain.path().join(format!("{name}.admin"));
        let _ = std::fs::remove_file(&told);
        let mut command = Command::new(tool("PORTCULLIS_TEST_ENVOY", "envoy"));
        command.args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]);
        let running = Running::start(command.arg("-c").arg(&config).arg("--admin-address-path").arg(&told));
        let admin =
            until("Envoy's admin address", async || std::fs::read_to_string(&told).ok()?.trim().parse().ok()).await;
        let address = until("Envoy's listener", async || {
            let body = ask(admin, "/listeners?format=json").await?;
            let listeners: serde_json::Value = serde_json::from_str(&body).ok()?;
            let address = &listeners["listener_statuses"][0]["local_address"]["socket_address"];
            format!("127.0.0.1:{}", address["port_value"].as_u64()?).parse().ok()
        })
        .await;
        Self { _running: running, admin, address }
    }

    /// Waits until a statistic whose name ends like this is at least 1.
    pub async fn counts(&self, end: &str) {
        until(&format!("Envoy to count {end}"), async || {
            let stats = ask(self.admin, "/stats").await?;
            let mut values =
                stats.lines().filter_map(|line| line.split_once(": ")).filter(|(name, _)| name.ends_with(end));
            values.any(|(_, value)| value.parse::<u64>().is_ok_and(|value| value >= 1)).then_some(())
        })
        .await;
    }

    /// What it negotiated, by its own account.
    async fn negotiated(&self, group: &str) {
        for end in ["ssl.versions.TLSv1.3", "ssl.ciphers.TLS_AES_256_GCM_SHA384", "ssl.sigalgs.ecdsa_secp384r1_sha384"]
        {
            self.counts(end).await;
        }
        self.counts(&format!("ssl.curves.{group}")).await;
    }
}

/// Asks Envoy's admin server, which takes nothing below HTTP/1.1 and may answer in chunks.
async fn ask(admin: SocketAddr, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(admin).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    let (head, mut rest) = answer.split_once("\r\n\r\n")?;
    if !head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        return Some(rest.to_owned());
    }
    let mut body = String::new();
    loop {
        let (size, chunk) = rest.split_once("\r\n")?;
        let size = usize::from_str_radix(size, 16).ok()?;
        if size == 0 {
            return Some(body);
        }
        body.push_str(chunk.get(..size)?);
        rest = chunk.get(size + 2..)?;
    }
}

async fn negotiated_here(proxy: &Proxy, direction: &str, group: &str) {
    let labels = [
        ("direction", direction),
        ("version", "TLSv1.3"),
        ("cipher_suite", "TLS_AES_256_GCM_SHA384"),
        ("group", group),
        ("key_type", "ecdsa-p384"),
        ("compliant", "true"),
    ];
    proxy.metric_reaches("portcullis_tls_negotiated_total", &labels, 1.0).await;
}

fn inbound(domain: &Domain, to: SocketAddr, allow: &str) -> String {
    format!(
        "{}inbound:\n  - {{ name: api, listen: \"127.0.0.1:0\", to: \"{to}\", allow: [\"{allow}\"] }}\n",
        domain.identity("/proxy")
    )
}

fn outbound(domain: &Domain, to: SocketAddr, expect: &str) -> String {
    format!(
        "{}outbound:\n  - {{ name: up, listen: \"127.0.0.1:0\", to: \"{to}\", expect: \"{expect}\" }}\n",
        domain.identity("/proxy")
    )
}

/// Connects, sends a little and waits for an end that is no answer.
async fn goes_nowhere(address: SocketAddr) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let _ = stream.write_all(b"let me in").await;
    let mut answer = Vec::new();
    let _ = soon("the end of a refused connection", stream.read_to_end(&mut answer)).await;
    assert!(answer.is_empty());
}

#[tokio::test]
async fn envoy_as_the_client() {
    let domain = Domain::new("a.example");
    let workload = echo().await;
    let proxy = Proxy::start(domain.path(), "proxy", &inbound(&domain, workload.address, &domain.id("/envoy"))).await;
    proxy.ready().await;
    let to = proxy.address("api").await;
    for (curves, theirs, ours) in GROUPS {
        let envoy = Envoy::start(&domain, "client.yaml", "/envoy", to, curves, &domain.id("/proxy")).await;
        let mut stream = TcpStream::connect(envoy.address).await.unwrap();
        exchange(&mut stream, b"from Envoy to Portcullis").await.unwrap();
        envoy.negotiated(theirs).await;
        negotiated_here(&proxy, "inbound", ours).await;
        stream.shutdown().await.unwrap();
        assert_eq!(soon("the end", stream.read(&mut [0; 8])).await.unwrap(), 0);
    }
    assert_eq!(*workload.accepted.borrow(), 2);
    proxy.metric_reaches("portcullis_connections_total", &[("direction", "inbound"), ("cause", "done")], 2.0).await;
}

#[tokio::test]
async fn envoy_as_the_server() {
    let domain = Domain::new("a.example");
    let workload = echo().await;
    for (curves, theirs, ours) in GROUPS {
        let envoy =
            Envoy::start(&domain, "server.yaml", "/envoy", workload.address, curves, &domain.id("/proxy")).await;
        let proxy = Proxy::start(domain.path(), "proxy", &outbound(&domain, envoy.address, &domain.id("/envoy"))).await;
        proxy.ready().await;
        let mut stream = TcpStream::connect(proxy.address("up").await).await.unwrap();
        exchange(&mut stream, b"from Portcullis to Envoy").await.unwrap();
        envoy.negotiated(theirs).await;
        negotiated_here(&proxy, "outbound", ours).await;
        stream.shutdown().await.unwrap();
        assert_eq!(soon("the end", stream.read(&mut [0; 8])).await.unwrap(), 0);
        proxy
            .metric_reaches("portcullis_connections_total", &[("direction", "outbound"), ("cause", "done")], 1.0)
            .await;
    }
}

#[tokio::test]
async fn an_envoy_that_is_somebody_else_is_refused() {
    let domain = Domain::new("a.example");
    let workload = echo().await;
    // As the client: nobody whom a rule admits.
    let proxy = Proxy::start(domain.path(), "inward", &inbound(&domain, workload.address, &domain.id("/envoy"))).await;
    proxy.ready().await;
    let to = proxy.address("api").await;
    let envoy = Envoy::start(&domain, "client.yaml", "/other", to, "P-384", &domain.id("/proxy")).await;
    goes_nowhere(envoy.address).await;
    let denied = [("direction", "inbound"), ("reason", "denied")];
    proxy.metric_reaches("portcullis_tls_handshakes_total", &denied, 1.0).await;
    assert_eq!(*workload.accepted.borrow(), 0);
    drop(envoy);

    // As the server: not whom we expect. It dials its backend whatever we do, so only its word counts.
    let envoy = Envoy::start(&domain, "server.yaml", "/other", workload.address, "P-384", &domain.id("/proxy")).await;
    let proxy = Proxy::start(domain.path(), "outward", &outbound(&domain, envoy.address, &domain.id("/envoy"))).await;
    proxy.ready().await;
    goes_nowhere(proxy.address("up").await).await;
    let wrong = [("direction", "outbound"), ("reason", "wrong_peer")];
    proxy.metric_reaches("portcullis_tls_handshakes_total", &wrong, 1.0).await;
}

#[tokio::test]
async fn an_envoy_that_expects_somebody_else_refuses_us() {
    let domain = Domain::new("a.example");
    let workload = echo().await;
    let proxy = Proxy::start(domain.path(), "inward", &inbound(&domain, workload.address, &domain.id("/envoy"))).await;
    proxy.ready().await;
    let to = proxy.address("api").await;
    let envoy = Envoy::start(&domain, "client.yaml", "/envoy", to, "P-384", &domain.id("/records")).await;
    goes_nowhere(envoy.address).await;
    envoy.counts("ssl.fail_verify_san").await;
    let alert = [("direction", "inbound"), ("reason", "peer_alert")];
    proxy.metric_reaches("portcullis_tls_handshakes_total", &alert, 1.0).await;
    assert_eq!(*workload.accepted.borrow(), 0);
    drop(envoy);

    let envoy = Envoy::start(&domain, "server.yaml", "/envoy", workload.address, "P-384", &domain.id("/records")).await;
    let proxy = Proxy::start(domain.path(), "outward", &outbound(&domain, envoy.address, &domain.id("/envoy"))).await;
    proxy.ready().await;
    goes_nowhere(proxy.address("up").await).await;
    envoy.counts("ssl.fail_verify_san").await;
    // In TLS 1.3 the refusal comes after our handshake is done: an alert, which is no end.
    proxy
        .metric_reaches("portcullis_connections_total", &[("direction", "outbound"), ("cause", "tls_error")], 1.0)
        .await;
}
