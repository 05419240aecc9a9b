//! Two sidecars that carry HTTP: a client's program speaks plaintext to the first, the second speaks plaintext to an
//! origin, and between them is mTLS. And the programs that stand at either end.
#![allow(dead_code)]

use std::net::SocketAddr;
use std::sync::Arc;

use rustls::ClientConfig;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio_rustls::TlsConnector;

use crate::agent::{go, go_server};
use crate::client::{presenting, server_name};
use crate::harness::{Domain, Proxy, Running, output, soon, tool};

/// What a test adds to the configs of the two. Each text is YAML without indentation.
#[derive(Clone, Copy, Default)]
pub struct Extra<'a> {
    /// Keys of the inbound listener.
    pub inbound: &'a str,
    /// Keys of the outbound listener.
    pub outbound: &'a str,
    /// What follows in the server's config, such as `policy:`.
    pub server: &'a str,
    /// What follows in the client's config.
    pub client: &'a str,
    /// Whether the policy alone decides; else the listener admits the client.
    pub ruled: bool,
}

/// Two sidecars that run: `out` of the client's leads to `in` of the server's.
pub struct Pair {
    pub domain: Domain,
    pub server: Proxy,
    pub client: Proxy,
    pub server_config: String,
    pub client_config: String,
    /// Where the client's program connects to, in plaintext.
    pub address: SocketAddr,
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect()
}

impl Pair {
    pub async fn start(origin: SocketAddr, extra: Extra<'_>) -> Self {
        let domain = Domain::new("a.example");
        let server_config = Self::inbound(&domain, origin, extra);
        let server = Proxy::start(domain.path(), "server", &server_config).await;
        server.ready().await;
        let client_config = Self::outbound(&domain, server.address("in").await, extra);
        let client = Proxy::start(domain.path(), "client", &client_config).await;
        client.ready().await;
        let address = client.address("out").await;
        Self { domain, server, client, server_config, client_config, address }
    }

    /// Two sidecars that nothing was added to.
    pub async fn plain(origin: SocketAddr) -> Self {
        Self::start(origin, Extra::default()).await
    }

    /// The config of a server's sidecar.
    pub fn inbound(domain: &Domain, origin: SocketAddr, extra: Extra<'_>) -> String {
        let protocol = if extra.inbound.contains("protocol:") { "" } else { "    protocol: http\n" };
        let allow = if extra.ruled { String::new() } else { format!("    allow: ['{}']\n", domain.id("/client")) };
        format!(
            "{}inbound:\n  - name: in\n    listen: 127.0.0.1:0\n    to: '{origin}'\n{protocol}{allow}{}{}\n",
            domain.identity("/server"),
            indented(extra.inbound),
            extra.server
        )
    }

    /// The config of a client's sidecar.
    pub fn outbound(domain: &Domain, to: SocketAddr, extra: Extra<'_>) -> String {
        let protocol = if extra.outbound.contains("protocol:") { "" } else { "    protocol: http\n" };
        format!(
            "{}outbound:\n  - name: out\n    listen: 127.0.0.1:0\n    to: '{to}'\n    expect: '{}'\n{protocol}{}{}\n",
            domain.identity("/client"),
            domain.id("/server"),
            indented(extra.outbound),
            extra.client
        )
    }

    /// Past the client's sidecar: straight to the server's, as this identity and with this protocol by ALPN.
    pub fn peer(&self, path: &str, alpn: &[&str]) -> Arc<ClientConfig> {
        tls(&self.domain, path, alpn)
    }

    /// Where a request may come from: the client's program, or a peer that is no Portcullis.
    pub async fn ways(&self) -> [Way; 2] {
        [Way::Plain(self.address), Way::Tls(self.server.address("in").await, self.peer("/client", &["http/1.1"]))]
    }
}

/// A TLS client with an SVID of the domain.
pub fn tls(domain: &Domain, path: &str, alpn: &[&str]) -> Arc<ClientConfig> {
    let config = presenting(&domain.ca, Some(domain.ca.svid(path).into()));
    let mut config = Arc::unwrap_or_clone(config);
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Arc::new(config)
}

/// A stream of either kind.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A way to a proxy.
#[derive(Clone, Debug)]
pub enum Way {
    /// To an outbound listener.
    Plain(SocketAddr),
    /// To an inbound listener.
    Tls(SocketAddr, Arc<ClientConfig>),
}

impl Way {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Plain(_) => "to the outbound listener",
            Self::Tls(..) => "to the inbound listener",
        }
    }

    pub async fn connect(&self) -> Box<dyn Stream> {
        match self {
            Self::Plain(address) => Box::new(TcpStream::connect(address).await.unwrap()),
            Self::Tls(address, config) => {
                let stream = TcpStream::connect(address).await.unwrap();
                Box::new(TlsConnector::from(Arc::clone(config)).connect(server_name(), stream).await.unwrap())
            }
        }
    }

    /// Sends these bytes and takes what comes until the proxy ends the connection, however it does that.
    pub async fn send(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect().await;
        // The proxy may have had enough before it has all of them.
        let _ = stream.write_all(bytes).await;
        let _ = stream.flush().await;
        let mut answer = Vec::new();
        let _ = soon("the end of a connection", stream.read_to_end(&mut answer)).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// One HTTP/1.1 request on a connection of its own: status, head and body as they came.
    pub async fn request(&self, head: &str) -> Answer {
        Answer::parse(&self.send(format!("{head}\r\nConnection: close\r\n\r\n").as_bytes()).await)
    }
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    /// 0 if nothing came.
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn parse(text: &str) -> Self {
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((text, ""));
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        Self { status, head: head.to_owned(), body: body.to_owned() }
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut fields = self.head.lines().skip(1).filter_map(|line| line.split_once(':'));
        fields.find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }

    /// The body, where it is JSON (in chunks or not).
    pub fn json(&self) -> Value {
        let begin = self.body.find('{').unwrap_or(0);
        let end = self.body.rfind('}').map_or(0, |at| at + 1);
        self.body.get(begin..end).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
    }
}

/// The server of tests/go/cmd/http-peer: it answers with what it has seen, and prints a line for each request.
pub async fn http_origin() -> (Running, SocketAddr) {
    go_server(go("http-peer").arg("server")).await
}

/// How many requests that server has seen.
pub async fn requests_seen(origin: SocketAddr) -> u64 {
    Way::Plain(origin).request("GET /requests HTTP/1.1\r\nHost: origin").await.body.trim().parse().unwrap()
}

/// Runs a program whose lines each tell of one step, and holds that all were well. Gives the lines.
pub async fn all_well(command: &mut Command) -> Vec<Value> {
    let name = format!("{command:?}");
    command.kill_on_drop(true).stdin(std::process::Stdio::null());
    // Many steps, each of which gives up by itself.
    let run = tokio::time::timeout(4 * crate::harness::PATIENCE, command.output());
    let out =
        run.await.unwrap_or_else(|_| panic!("timed out: {name}")).unwrap_or_else(|error| panic!("{name}: {error}"));
    let (text, errors) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    let lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let failed: Vec<String> = lines.iter().filter(|line| line["ok"] == false).map(Value::to_string).collect();
    assert!(failed.is_empty(), "{name}\n{}", failed.join("\n"));
    assert!(out.status.success() && !lines.is_empty(), "{name}: {}\n{text}\n{errors}", out.status);
    lines
}

/// What curl brought back.
#[derive(Debug)]
pub struct Curled {
    pub status: u16,
    /// `1`, `1.1` or `2`.
    pub version: String,
    /// New connections that the last transfer needed.
    pub connects: u32,
    pub body: String,
}

/// Runs curl; `-i` among the arguments puts the heads before the body.
pub async fn curl(arguments: &[&str]) -> Curled {
    let mut command = Command::new(tool("PORTCULLIS_TEST_CURL", "curl"));
    command.args(["-sS", "-m", "30", "-w", "\n%{http_code} %{http_version} %{num_connects}"]).args(arguments);
    let out = output(&mut command, "").await;
    let (text, errors) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{command:?}: {}\n{errors}\n{text}", out.status);
    let (body, told) = text.rsplit_once('\n').unwrap();
    let told: Vec<&str> = told.split(' ').collect();
    Curled {
        status: told[0].parse().unwrap(),
        version: told[1].to_owned(),
        connects: told[2].parse().unwrap(),
        body: body.to_owned(),
    }
}

/// The most memory that a process has ever had, in bytes.
pub fn peak_memory(running: &Running) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", running.child.id().unwrap())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

impl Proxy {
    /// The record of the next request that `pick` wants.
    pub async fn request(&mut self, what: &str, pick: impl Fn(&Value) -> bool) -> Value {
        self.record(what, |line| line["method"].is_string() && pick(line)).await
    }
}
