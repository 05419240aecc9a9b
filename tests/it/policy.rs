//! Who may do what: rules of every kind against clients of every kind, and `explain` beside the proxy that runs.

use std::net::SocketAddr;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{Domain, Echo, Proxy, echo, free_port, portcullis, soon};
use crate::testing::{Issued, Spec, TestCa};

/// A server's sidecar of a.example that trusts b.example too, and a way to come to it as anybody.
struct World {
    domain: Domain,
    other: TestCa,
    unknown: TestCa,
    workload: Echo,
    proxy: Proxy,
}

/// Whether bytes come back over a connection that begins its handshake now, as this client; else what went wrong.
pub async fn gets_through(stream: TcpStream, server: &TestCa, svid: &Issued) -> std::io::Result<()> {
    let mut roots = RootCertStore::empty();
    roots.add(server.root()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(svid.chain.clone(), svid.key())
        .unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let through = async {
        let mut stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
        stream.write_all(b"may I?").await?;
        let mut back = [0; 6];
        stream.read_exact(&mut back).await?;
        assert_eq!(&back, b"may I?");
        stream.shutdown().await
    };
    soon("the fate of a client", through).await
}

/// What became of a client.
#[derive(Debug, PartialEq, Eq)]
struct Fate {
    admitted: bool,
    /// From the access log: the rule that decided, none if the peer was not proven.
    rule: Option<String>,
}

impl World {
    /// `listeners` and what follows, with `{to}` where the workload's address belongs.
    async fn start(config: &str) -> Self {
        let (domain, other) = (Domain::new("a.example"), TestCa::new("b.example"));
        let workload = echo().await;
        let own = domain.ca.issue(&Spec::leaf(domain.id("/server")).dns("localhost"));
        let bundles = [("a.example", domain.ca.pem()), ("b.example", other.pem())];
        let identity = crate::harness::identity_files(domain.path(), "server", &own, &bundles);
        let config = identity + &config.replace("{to}", &workload.address.to_string());
        let proxy = Proxy::start(domain.path(), "server", &config).await;
        proxy.ready().await;
        Self { domain, other, unknown: TestCa::new("c.example"), workload, proxy }
    }

    /// Whether this client gets its bytes through and back.
    async fn try_as(&self, id: &str, address: SocketAddr) -> bool {
        let ca = [&self.domain.ca, &self.other, &self.unknown]
            .into_iter()
            .find(|ca| id.starts_with(&format!("spiffe://{}/", ca.domain())))
            .unwrap();
        let svid = ca.issue(&Spec::leaf(id));
        let stream = TcpStream::connect(address).await.unwrap();
        gets_through(stream, &self.domain.ca, &svid).await.is_ok()
    }

    async fn fate(&mut self, id: &str, listener: &str) -> Fate {
        let address = self.proxy.address(listener).await;
        let admitted = self.try_as(id, address).await;
        let record = self.proxy.record("the end of a connection", |_| true).await;
        assert_eq!(record["listener"], listener);
        Fate { admitted, rule: record["rule"].as_str().map(str::to_owned) }
    }

    async fn decisions(&self, rule: &str, decision: &str, mode: &str) -> f64 {
        let labels = [("direction", "inbound"), ("rule", rule), ("decision", decision), ("mode", mode)];
        self.proxy.metrics().await.sum("portcullis_authorization_decisions_total", &labels)
    }

    /// What `explain` says: whether the peer would be let through, and by which rule.
    async fn explained(&self, id: &str, to: &str) -> (bool, String, serde_json::Value) {
        let config = self.proxy.config.to_str().unwrap();
        let asked = ["explain", "--config", config, "--from", id, "--to", to];
        let (code, out, err) = portcullis(&[&asked[..], &["--output", "json"]].concat()).await;
        assert!(err.is_empty(), "{err}");
        let answer: serde_json::Value = serde_json::from_str(&out).unwrap();
        let admitted = answer["admitted"].as_bool().unwrap();
        assert_eq!(code, i32::from(!admitted), "the exit code says the same");
        let (in_words_code, words, _) = portcullis(&asked).await;
        assert_eq!(in_words_code, code);
        assert!(words.starts_with(if admitted { "allowed: " } else { "denied: " }), "{words}");
        (admitted, answer["rule"].as_str().unwrap().to_owned(), answer)
    }
}

#[tokio::test]
async fn explain_and_the_running_proxy_agree() {
    let (clinic, admin) = (free_port().await, free_port().await);
    let config = format!(
        "inbound:
  - {{ name: clinic, listen: '127.0.0.1:{clinic}', to: '{{to}}', allow: ['spiffe://a.example/ns/clinic/sa/web'] }}
  - {{ name: admin, listen: '127.0.0.1:{admin}', to: '{{to}}' }}
policy:
  rules:
    - {{ name: auditors, from: ['spiffe://a.example/ns/*/sa/auditor'], to: [clinic] }}
    - {{ name: labs, from: ['spiffe://a.example/ns/labs/**'], to: [clinic] }}
    - {{ name: neighbours, from: ['spiffe://b.example'], to: [clinic] }}
    - {{ name: not-the-night-shift, from: ['spiffe://b.example/ns/night/**'], action: deny }}
    - {{ name: admins, from: ['spiffe://a.example/admin'], to: [{admin}] }}
    - {{ name: no-contractors, from: ['spiffe://a.example/ns/contractors/**'], action: deny }}
"
    );
    let mut world = World::start(&config).await;
    let mut reached = 0;
    for (id, listener, admitted, rule) in [
        ("spiffe://a.example/ns/clinic/sa/web", "clinic", true, "allow:clinic"),
        ("spiffe://a.example/ns/clinic/sa/web2", "clinic", false, "default"),
        ("spiffe://a.example/ns/clinic/sa/Web", "clinic", false, "default"),
        ("spiffe://a.example/ns/clinic/sa", "clinic", false, "default"),
        ("spiffe://a.example/ns/x/sa/auditor", "clinic", true, "auditors"),
        ("spiffe://a.example/ns/x/y/sa/auditor", "clinic", false, "default"),
        ("spiffe://a.example/ns/contractors/sa/auditor", "clinic", false, "no-contractors"),
        ("spiffe://a.example/ns/labs/blood/sa/reader", "clinic", true, "labs"),
        ("spiffe://a.example/ns/labs", "clinic", false, "default"),
        ("spiffe://a.example/ns/labsy/x", "clinic", false, "default"),
        ("spiffe://b.example/whoever", "clinic", true, "neighbours"),
        ("spiffe://b.example/ns/night/sa/cleaner", "clinic", false, "not-the-night-shift"),
        ("spiffe://b.example/ns/clinic/sa/web", "clinic", true, "neighbours"),
        ("spiffe://b.example/ns/clinic/sa/web", "admin", false, "default"),
        ("spiffe://a.example/ns/clinic/sa/web", "admin", false, "default"),
        ("spiffe://a.example/admin", "admin", true, "admins"),
        ("spiffe://a.example/admin", "clinic", false, "default"),
    ] {
        let fate = world.fate(id, listener).await;
        assert_eq!(fate, Fate { admitted, rule: Some(rule.into()) }, "{id} → {listener}");
        let (explained, by, _) = world.explained(id, listener).await;
        assert_eq!((explained, by.as_str()), (admitted, rule), "explain: {id} → {listener}");
        reached += usize::from(admitted);
        assert_eq!(*world.workload.accepted.borrow(), reached, "the workload hears of admitted peers only");
    }
    assert_eq!(world.decisions("no-contractors", "deny", "enforce").await, 1.0);
    assert_eq!(world.decisions("neighbours", "allow", "enforce").await, 2.0);
    // By port, as rules name it.
    assert_eq!(world.explained("spiffe://a.example/admin", &admin.to_string()).await.1, "admins");
    // Who cannot be proven is no matter of policy.
    let stranger = world.fate("spiffe://c.example/admin", "admin").await;
    assert_eq!(stranger, Fate { admitted: false, rule: None });
    let unknown = [("reason", "unknown_trust_domain")];
    world.proxy.metric_reaches("portcullis_tls_handshakes_total", &unknown, 1.0).await;
}

#[tokio::test]
async fn a_rule_in_audit_mode_reports_and_does_nothing() {
    let mut world = World::start(
        "inbound: [{ name: in, listen: '127.0.0.1:0', to: '{to}', allow: ['spiffe://a.example'] }]
policy:
  rules:
    - { name: not-from-batch, from: ['spiffe://a.example/batch/**'], action: deny, mode: audit }
    - { name: neighbours-soon, from: ['spiffe://b.example'], mode: audit }
",
    )
    .await;
    let (batch, web, neighbour) = ("spiffe://a.example/batch/job", "spiffe://a.example/web", "spiffe://b.example/web");
    assert_eq!(world.fate(batch, "in").await, Fate { admitted: true, rule: Some("allow:in".into()) });
    assert_eq!(world.fate(web, "in").await, Fate { admitted: true, rule: Some("allow:in".into()) });
    assert_eq!(world.fate(neighbour, "in").await, Fate { admitted: false, rule: Some("default".into()) });
    assert_eq!(world.decisions("not-from-batch", "deny", "audit").await, 1.0);
    assert_eq!(world.decisions("neighbours-soon", "allow", "audit").await, 1.0);
    assert_eq!(world.decisions("allow:in", "allow", "enforce").await, 2.0);
    assert_eq!(world.decisions("default", "deny", "enforce").await, 1.0);
    for (id, would) in [(batch, "deny".into()), (neighbour, "allow".into()), (web, serde_json::Value::Null)] {
        assert_eq!(world.explained(id, "in").await.2["would_change_to"], would, "{id}");
    }
}

#[tokio::test]
async fn audit_for_all_lets_every_proven_peer_through_and_says_what_it_would_do() {
    let mut world = World::start(
        "inbound: [{ name: in, listen: '127.0.0.1:0', to: '{to}', allow: ['spiffe://a.example/web'] }]
policy:
  mode: audit
  rules: [{ name: never, from: ['spiffe://b.example'], action: deny }]
",
    )
    .await;
    for (id, rule) in [
        ("spiffe://a.example/web", "allow:in"),
        ("spiffe://a.example/other", "default"),
        ("spiffe://b.example/web", "never"),
    ] {
        assert_eq!(world.fate(id, "in").await, Fate { admitted: true, rule: Some(rule.into()) }, "{id}");
        let (admitted, by, answer) = world.explained(id, "in").await;
        assert_eq!((admitted, by.as_str(), &answer["mode"]), (true, rule, &"audit".into()));
    }
    for (rule, decision) in [("allow:in", "allow"), ("default", "deny"), ("never", "deny")] {
        assert_eq!(world.decisions(rule, decision, "audit").await, 1.0, "{rule}");
        assert_eq!(world.decisions(rule, decision, "enforce").await, 0.0, "{rule}");
    }
    // Audit is no way in for those who prove nothing.
    assert!(!world.fate("spiffe://c.example/web", "in").await.admitted);
    // Enforced by a reload, what was only reported comes true.
    let config = std::fs::read_to_string(&world.proxy.config).unwrap();
    world.proxy.reloaded(&config.replace("mode: audit", "mode: enforce")).await;
    assert!(!world.fate("spiffe://b.example/web", "in").await.admitted);
    assert!(world.fate("spiffe://a.example/web", "in").await.admitted);
}
