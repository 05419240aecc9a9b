//! Two pods whose traffic is captured, and a third that nothing is done to: what tests of transparent interception stand
//! on. The applications in them know of no proxy.

use std::net::SocketAddr;
use std::process::Output;

use crate::harness::{Domain, Proxy, exchange, output, program};
use crate::netns::{APPLICATION, Net, Pod, ROOT};
use crate::pods::{Workload, marker};
use crate::wire::Wire;

/// The port of the workload.
pub const PORT: u16 = 8080;
/// Where the rules bring captured connections.
pub const CAPTURE_PORTS: [u16; 2] = [15001, 15006];

/// What goes into the configs beside what all have.
#[derive(Clone, Copy, Default)]
pub struct Extra<'a> {
    /// Into the maps of `intercept.inbound` and `intercept.outbound`, both sides.
    pub inbound: &'a str,
    pub outbound: &'a str,
    /// Into the inbound listener `api` of the server.
    pub api: &'a str,
    /// Into the outbound listener `records` of the client.
    pub records: &'a str,
    /// Behind the whole config of the server.
    pub server: &'a str,
    /// Behind the whole config of the client.
    pub client: &'a str,
}

/// The pods, before anything is captured.
pub struct Pods {
    pub net: Net,
    pub client: Pod,
    pub server: Pod,
    /// Outside the mesh: no rules, no proxy.
    pub stranger: Pod,
    pub wire: Wire,
    pub domain: Domain,
    /// What rules are written with: `redirect apply --mode`.
    rules: &'static str,
}

/// Both ways to write rules.
pub const BACKENDS: [&str; 2] = ["nft", "iptables"];

/// Who dials and who is dialled, each with a sidecar and rules.
pub struct Mesh {
    pub pods: Pods,
    pub before: Proxy,
    pub behind: Proxy,
}

impl std::ops::Deref for Mesh {
    type Target = Pods;

    fn deref(&self) -> &Pods {
        &self.pods
    }
}

impl Pods {
    #[track_caller]
    pub fn new() -> Option<impl Future<Output = Self>> {
        Self::ruled_by("auto")
    }

    /// Such that rules are written with this.
    #[track_caller]
    pub fn ruled_by(rules: &'static str) -> Option<impl Future<Output = Self>> {
        let net = Net::new()?;
        Some(async move {
            let (client, server, stranger) =
                (net.pod("client").await, net.pod("server").await, net.pod("stranger").await);
            for pod in [&client, &server, &stranger] {
                // Data in the SYN without a cookie, both ways, for whoever asks for it (tcp_fastopen in ip-sysctl.rst).
                pod.sysctl("net/ipv4/tcp_fastopen", "1543").await;
            }
            let wire = net.wire().await;
            Self { net, client, server, stranger, wire, domain: Domain::new("a.example"), rules }
        })
    }

    /// The `intercept:` part.
    pub fn intercept(extra: Extra<'_>) -> String {
        let [host, host6] = Net::HOST;
        format!(
            "intercept:\n  inbound: {{ {} }}\n  outbound: {{ {} }}\n  dns_servers: ['{host}', '{host6}']\n",
            extra.inbound, extra.outbound
        )
    }

    /// The config of the server's sidecar.
    pub fn server_config(&self, extra: Extra<'_>) -> String {
        format!(
            "{}{}inbound:\n  - name: api\n    capture: [{PORT}]\n    allow: ['{}']\n{}{}\n{}\n",
            self.domain.identity("/server"),
            Self::intercept(extra),
            self.domain.id("/client"),
            indented(extra.api),
            self.records(""),
            extra.server
        )
    }

    /// The config of the client's sidecar.
    pub fn client_config(&self, extra: Extra<'_>) -> String {
        format!(
            "{}{}{}\n{}\n",
            self.domain.identity("/client"),
            Self::intercept(extra),
            self.records(extra.records),
            extra.client
        )
    }

    /// Calls to any pod's `PORT` are for the server.
    fn records(&self, more: &str) -> String {
        format!(
            "outbound:\n  - name: records\n    capture: {{ addresses: [10.77.0.0/24, 'fd00:77::/64'], ports: [{PORT}] }}\n    \
             expect: '{}'\n{}",
            self.domain.id("/server"),
            indented(more)
        )
    }

    /// Rules first, then the sidecars.
    pub async fn joined(self, extra: Extra<'_>) -> Mesh {
        let (server_config, client_config) = (self.server_config(extra), self.client_config(extra));
        self.apply(&self.server, &server_config).await;
        self.apply(&self.client, &client_config).await;
        let behind = self.server.proxy(&self.domain, &server_config).await;
        let before = self.client.proxy(&self.domain, &client_config).await;
        behind.ready().await;
        before.ready().await;
        Mesh { pods: self, before, behind }
    }

    /// `portcullis redirect` with these arguments in a pod, as root.
    pub async fn redirect(&self, pod: &Pod, arguments: &[&str]) -> Output {
        output(pod.command(ROOT, program()).arg("redirect").args(arguments), "").await
    }

    /// Makes the rules of this config in a pod.
    pub async fn apply(&self, pod: &Pod, config: &str) {
        let path = self.domain.path().join(format!("{}.rules.yaml", pod.name));
        std::fs::write(&path, config).unwrap();
        let done = self.redirect(pod, &["apply", "--mode", self.rules, "--config", path.to_str().unwrap()]).await;
        assert!(done.status.success(), "{}", told(&done));
    }

    /// Takes them away again.
    pub async fn remove(&self, pod: &Pod) {
        let done = self.redirect(pod, &["remove"]).await;
        assert!(done.status.success(), "{}", told(&done));
    }

    /// A text of the application in `from` comes back from an echo server at `to`; nothing of it was seen on the wire.
    pub async fn sealed(&self, from: &Pod, to: SocketAddr, workload: &Workload) {
        let marker = marker("sealed");
        let mut stream = from.connect(APPLICATION, to).await.unwrap_or_else(|error| panic!("{to}: {error}"));
        assert_eq!(stream.peer_addr().unwrap(), to, "the application sees whom it called");
        exchange(&mut stream, &marker).await.unwrap_or_else(|error| panic!("{to}: {error}"));
        let met = workload.heard(&marker).await;
        assert_eq!(met.local, to, "the workload sees its own address");
        self.wire.only_sealed(to.ip(), &marker).await;
    }

    /// The same in clear, and seen: what a test that holds the opposite is held against.
    pub async fn in_clear(&self, from: &Pod, uid: u32, to: SocketAddr, workload: &Workload) {
        let marker = marker("in clear");
        let mut stream = from.connect(uid, to).await.unwrap_or_else(|error| panic!("{uid} to {to}: {error}"));
        exchange(&mut stream, &marker).await.unwrap_or_else(|error| panic!("{uid} to {to}: {error}"));
        workload.heard(&marker).await;
        assert!(self.wire.saw(&marker).await, "{uid} to {to}");
    }
}

/// Workloads at both addresses of a pod.
pub async fn both(pod: &Pod, port: u16) -> [Workload; 2] {
    let [v4, v6] = pod.at(port);
    [Workload::start(pod, v4).await, Workload::start(pod, v6).await]
}

/// What a program said, for messages.
pub fn told(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}

fn indented(lines: &str) -> String {
    lines.lines().map(|line| format!("    {line}\n")).collect()
}
