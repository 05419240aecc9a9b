//! Captured inbound connections in pods, with the rules that `redirect apply` makes: mTLS and plaintext at one port, where
//! they go on to, what the workload sees, and what is refused.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::agent::{Agent, entry};
use crate::harness::{Domain, Proxy, exchange, program, rest_of, succeeds};
use crate::netns::{APPLICATION, Net, PROXY, Pod, ROOT, hand_over, within_reach};
use crate::pods::{Workload, marker};

/// The port at which captured connections come in, by default.
const CAPTURE: u16 = 15006;

/// A pod whose inbound traffic is captured, and a client in another one.
struct Captured {
    domain: Domain,
    net: Net,
    client: Pod,
    server: Pod,
    proxy: Proxy,
}

/// Options of the proxy's process.
#[derive(Clone, Copy, PartialEq)]
enum May {
    /// What it needs for redirection: nothing.
    Nothing,
    /// CAP_NET_ADMIN.
    NetAdmin,
}

impl Captured {
    /// `listeners` and `intercept` are parts of the config.
    async fn start(intercept: &str, listeners: &str, may: May) -> Option<Self> {
        let captured = Self::without_rules(intercept, listeners, may).await?;
        captured.apply().await;
        Some(captured)
    }

    async fn without_rules(intercept: &str, listeners: &str, may: May) -> Option<Self> {
        let net = Net::new()?;
        let (client, server) = (net.pod("client").await, net.pod("server").await);
        let domain = Domain::new("a.example");
        let config = Self::config(&domain, intercept, listeners);
        let proxy = match may {
            May::Nothing => server.proxy(&domain, &config).await,
            May::NetAdmin => {
                hand_over(domain.path(), PROXY);
                let program = within_reach(program().as_ref(), domain.path());
                let command = with_net_admin(&server, &program);
                Proxy::start_within(&server, domain.path(), "server", &config, command).await
            }
        };
        proxy.ready().await;
        Some(Self { domain, net, client, server, proxy })
    }

    fn config(domain: &Domain, intercept: &str, listeners: &str) -> String {
        let allow = format!("allow: ['{}']", domain.id("/client"));
        let listeners = listeners.replace("ALLOW", &allow);
        format!("{}intercept: {intercept}\ninbound:\n{listeners}", domain.identity("/server"))
    }

    async fn apply(&self) {
        let mut apply = Command::new(program());
        apply.args(["redirect", "apply", "--netns", &self.server.path(), "--config"]).arg(&self.proxy.config);
        succeeds(&mut apply, "").await;
    }

    /// A connection in plaintext from the client's pod.
    async fn plain(&self, to: SocketAddr) -> std::io::Result<TcpStream> {
        self.client.connect(APPLICATION, to).await
    }

    /// A mesh peer's sidecar in the client's pod, which leads to this address.
    async fn peer(&self, to: SocketAddr) -> Proxy {
        let config = format!(
            "{}outbound:\n  - {{ name: out, listen: '127.0.0.1:9001', to: '{to}', expect: '{}' }}\n",
            self.domain.identity("/client"),
            self.domain.id("/server")
        );
        let peer = self.client.proxy(&self.domain, &config).await;
        peer.ready().await;
        peer
    }

    /// What `status` says in words, and its exit code.
    async fn status(&self) -> String {
        let mut status = self.server.command(ROOT, program());
        succeeds(status.args(["status", "--admin", &self.proxy.admin.to_string()]), "").await
    }
}

/// Whether a connection to there is reset, be it while it opens, on the first bytes or after them.
async fn is_reset(place: &Pod, to: SocketAddr) -> bool {
    let attempt = async {
        let mut stream = place.connect(APPLICATION, to).await?;
        stream.write_all(b"anybody").await?;
        rest_of(&mut stream).await
    };
    match attempt.await {
        Ok(_) => false,
        Err(error) => {
            assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
            true
        }
    }
}

/// The program as the proxy's user, with the one capability.
fn with_net_admin(pod: &Pod, program: &std::path::Path) -> Command {
    let mut command = pod.command(ROOT, "setpriv");
    let uid = PROXY.to_string();
    command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups"]);
    command.args(["--inh-caps=-all,+net_admin", "--bounding-set=-all,+net_admin", "--ambient-caps=+net_admin", "--"]);
    command.arg(program);
    command
}

#[tokio::test]
async fn mtls_and_audited_plaintext_meet_the_workload_at_the_address_that_was_called() {
    let listeners = "  - { name: api, capture: [8080], plaintext: audit, ALLOW }\n";
    let Some(mut pod) = Captured::start("{ inbound: {} }", listeners, May::Nothing).await else { return };
    let wire = pod.net.wire().await;
    for address in pod.server.at(8080) {
        let workload = Workload::start(&pod.server, address).await;
        let heard = marker("plaintext");
        let mut stream = pod.plain(address).await.unwrap();
        exchange(&mut stream, &heard).await.unwrap();
        let met = workload.heard(&heard).await;
        assert_eq!(met.local, address, "not 127.0.0.1");
        assert_eq!(met.peer.ip(), address.ip(), "redirected connections come from the pod itself");
        stream.shutdown().await.unwrap();
        assert!(rest_of(&mut stream).await.unwrap().is_empty());
        let record = pod.proxy.ended("done").await;
        assert_eq!((record["rule"].as_str(), record["mode"].as_str()), (Some("plaintext:api"), Some("audit")));
        assert!(record["peer"].is_null() && record["tls_version"].is_null(), "{record}");

        let sealed = marker("sealed");
        let peer = pod.peer(address).await;
        let mut stream = pod.client.connect(APPLICATION, ([127, 0, 0, 1], 9001).into()).await.unwrap();
        exchange(&mut stream, &sealed).await.unwrap();
        workload.heard(&sealed).await;
        wire.only_sealed(address.ip(), &sealed).await;
        drop(stream);
        let record = pod.proxy.ended("done").await;
        assert_eq!(record["peer"], pod.domain.id("/client"));
        assert!(peer.stop().await.success());
    }
    let state = pod.proxy.state().await;
    let port = &state["plaintext"][0];
    assert_eq!((&port["port"], &port["connections"]["let_through"]), (&8080.into(), &2.into()), "{port}");
    assert_eq!((port["safe_to_go_strict"].as_str(), port["callers"].as_array().unwrap().len()), (Some("no"), 2));
    let said = pod.status().await;
    assert!(said.contains("port 8080 (api, plaintext: audit): safe to go strict? no: 2 let through"), "{said}");
    let counted = [("listener", "api"), ("result", "audited")];
    pod.proxy.metric_reaches("portcullis_plaintext_connections_total", &counted, 2.0).await;
}

#[tokio::test]
async fn who_comes_before_the_identity_is_held_and_served_when_it_has_come() {
    let Some(net) = Net::new() else { return };
    let (client, server) = (net.pod("client").await, net.pod("server").await);
    let dir = tempfile::tempdir().unwrap();
    let domain = Domain::new("a.example");
    let socket = dir.path().join("agent.sock");
    let listeners = "inbound:\n  - { name: api, capture: [8080], plaintext: allow, allow: ['spiffe://a.example'] }\n";
    let config =
        format!("identity: unix://{}\nintercept: {{ inbound: {{}}, hold: 60s }}\n{listeners}", socket.display());
    let proxy = server.proxy(&domain, &config).await;
    let mut apply = Command::new(program());
    apply.args(["redirect", "apply", "--netns", &server.path(), "--config"]).arg(&proxy.config);
    succeeds(&mut apply, "").await;
    let [address, _] = server.at(8080);
    let workload = Workload::start(&server, address).await;
    let mut stream = client.connect(APPLICATION, address).await.unwrap();
    stream.write_all(b"early").await.unwrap();
    proxy.metric_reaches("portcullis_connections_open", &[("direction", "inbound")], 1.0).await;
    assert_eq!(proxy.get("/readyz").await.0, 503);
    assert!(workload.met().is_empty());
    let entries = format!(
        "trust_domain: a.example\nentries:\n{}",
        entry("spiffe://a.example/server", &format!("uid: {PROXY}"), "")
    );
    let agent = Agent::start(dir.path(), "agent", &entries).await;
    proxy.ready().await;
    workload.heard(b"early").await;
    let mut back = [0; 5];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"early");
    drop(stream);
    assert!(proxy.stop().await.success());
    agent.stop().await;
}

#[tokio::test]
async fn strict_ports_private_ports_and_the_proxy_s_own_port_let_nothing_in() {
    let listeners =
        "  - { name: api, capture: [8080], ALLOW }\n  - { name: rest, capture: any, plaintext: allow, ALLOW }\n";
    let Some(mut pod) = Captured::start("{ inbound: {} }", listeners, May::Nothing).await else { return };
    let [strict, _] = pod.server.at(8080);
    let workload = Workload::start(&pod.server, strict).await;
    let mut stream = pod.plain(strict).await.unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let _ = rest_of(&mut stream).await;
    assert_eq!(pod.proxy.ended("handshake_failed").await["reason"], "not_tls");
    assert!(workload.met().is_empty());

    // What listens on the loopback interface only is reached by nobody outside.
    let local = [SocketAddr::from((Ipv4Addr::LOCALHOST, 7000)), (Ipv6Addr::LOCALHOST, 7000).into()];
    for (local, outside) in local.into_iter().zip(pod.server.at(7000)) {
        let private = Workload::start(&pod.server, local).await;
        assert!(is_reset(&pod.client, outside).await, "a refusal is a reset");
        pod.proxy.ended("unreachable").await;
        assert!(private.met().is_empty());
    }

    // To its own port, from outside and from inside.
    let [outside, outside_v6] = pod.server.at(CAPTURE);
    let inside = [SocketAddr::from((Ipv4Addr::LOCALHOST, CAPTURE)), (Ipv6Addr::LOCALHOST, CAPTURE).into()];
    for (place, to) in
        [(&pod.client, outside), (&pod.client, outside_v6), (&pod.server, inside[0]), (&pod.server, inside[1])]
    {
        assert!(is_reset(place, to).await, "{to}");
        pod.proxy.ended("not_captured").await;
    }
    let not_captured = [("cause", "not_captured")];
    pod.proxy.metric_reaches("portcullis_connections_total", &not_captured, 4.0).await;
}

#[tokio::test]
async fn rules_that_send_our_own_connections_back_make_no_loop() {
    let listeners = "  - { name: any, capture: any, plaintext: allow, ALLOW }\n";
    let Some(mut pod) = Captured::without_rules("{ inbound: {} }", listeners, May::Nothing).await else { return };
    // As `redirect apply` would make them if it did not know the proxy's own leg.
    let rules = "table inet loop {\n\
        chain in { type nat hook prerouting priority -100; tcp dport 8080 redirect to :15006; }\n\
        chain out { type nat hook output priority -100; tcp dport 8080 redirect to :15006; }\n}\n";
    succeeds(pod.server.command(ROOT, "nft").args(["-f", "-"]), rules).await;
    for address in pod.server.at(8080) {
        let workload = Workload::start(&pod.server, address).await;
        assert!(is_reset(&pod.client, address).await);
        let record = pod.proxy.ended("loop").await;
        assert_eq!(record["upstream"], address.to_string());
        assert!(workload.met().is_empty());
    }
    let metrics = pod.proxy.metrics().await;
    assert_eq!(metrics.sum("portcullis_connections_total", &[("cause", "loop")]), 2.0, "each came back once");
}

#[tokio::test]
async fn by_tproxy_the_workload_is_met_and_sees_the_client_where_that_is_declared() {
    for preserve in [false, true] {
        let intercept = format!("{{ inbound: {{ mode: tproxy, preserve_source: {preserve} }} }}");
        let listeners = "  - { name: api, capture: [8080], plaintext: allow, ALLOW }\n";
        let Some(mut pod) = Captured::start(&intercept, listeners, May::NetAdmin).await else { return };
        for address in pod.server.at(8080) {
            let workload = Workload::start(&pod.server, address).await;
            let heard = marker("by tproxy");
            let mut stream = pod.plain(address).await.unwrap();
            exchange(&mut stream, &heard).await.unwrap();
            let (met, client) = (workload.heard(&heard).await, stream.local_addr().unwrap());
            assert_eq!(met.local, address);
            assert_eq!(met.peer.ip() == client.ip(), preserve, "{met:?}");
            assert_ne!(met.peer, client, "conntrack would take both connections for one");
            stream.shutdown().await.unwrap();
            assert!(rest_of(&mut stream).await.unwrap().is_empty());
            pod.proxy.ended("done").await;
            let peer = pod.peer(address).await;
            let mut stream = pod.client.connect(APPLICATION, ([127, 0, 0, 1], 9001).into()).await.unwrap();
            exchange(&mut stream, b"by mTLS").await.unwrap();
            assert_eq!(workload.heard(b"by mTLS").await.peer.ip() == client.ip(), preserve);
            drop(stream);
            assert!(peer.stop().await.success());
        }
        // The port itself is nobody's here either.
        assert!(is_reset(&pod.client, pod.server.at(CAPTURE)[0]).await);
        pod.proxy.ended("not_captured").await;
    }
}

#[tokio::test]
async fn a_declared_mark_is_set_or_nothing_is_dialled() {
    let intercept = "{ inbound: {}, proxy: { mark: 1337 } }";
    let listeners = "  - { name: api, capture: [8080], plaintext: allow, ALLOW }\n";
    for may in [May::NetAdmin, May::Nothing] {
        let Some(mut pod) = Captured::start(intercept, listeners, may).await else { return };
        // Counts what carries the mark.
        let rules =
            "table inet seen {\n chain out { type filter hook output priority 0; meta mark 1337 counter; }\n}\n";
        succeeds(pod.server.command(ROOT, "nft").args(["-f", "-"]), rules).await;
        let [address, _] = pod.server.at(8080);
        let workload = Workload::start(&pod.server, address).await;
        if may == May::NetAdmin {
            let mut stream = pod.plain(address).await.unwrap();
            exchange(&mut stream, b"marked").await.unwrap();
            let seen = succeeds(pod.server.command(ROOT, "nft").args(["list", "table", "inet", "seen"]), "").await;
            assert!(seen.contains("counter packets") && !seen.contains("counter packets 0 "), "{seen}");
        } else {
            assert!(is_reset(&pod.client, address).await);
            let record = pod.proxy.ended("unreachable").await;
            assert!(record["detail"].as_str().unwrap().contains("give the proxy CAP_NET_ADMIN"), "{record}");
            assert!(workload.met().is_empty());
        }
    }
}
