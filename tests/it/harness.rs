//! Starts the real binary and talks to it: what every end-to-end test stands on.
//!
//! States are waited for where they are told (log lines, `/state`, `/metrics`), never slept for.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};

use crate::netns::{Namespace, ROOT};
use crate::testing::{Issued, Spec, TestCa};

/// How long anything may take before a test gives up on it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for something that should happen soon; a test that hangs says where.
pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("timed out: {what}"))
}

/// Asks again until the answer is there.
pub async fn until<T, F, Fut>(what: &str, mut ask: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    soon(what, async {
        let mut tick = tokio::time::interval(Duration::from_millis(20));
        loop {
            tick.tick().await;
            if let Some(answer) = ask().await {
                return answer;
            }
        }
    })
    .await
}

/// The program under test.
pub fn program() -> &'static str {
    env!("CARGO_BIN_EXE_portcullis")
}

/// A path that `tests/setup` has written down, or the program's plain name.
pub fn tool(variable: &str, plain: &str) -> PathBuf {
    std::env::var_os(variable).map_or_else(|| plain.into(), PathBuf::from)
}

/// A program that runs beside a test and is ended with it; its lines can be waited for.
pub struct Running {
    pub child: Child,
    lines: mpsc::UnboundedReceiver<String>,
    /// All lines so far, for messages.
    pub said: Vec<String>,
}

impl Running {
    pub fn start(command: &mut Command) -> Self {
        let name = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let (tell, lines) = mpsc::unbounded_channel();
        let streams: [Box<dyn tokio::io::AsyncRead + Send + Unpin>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for stream in streams {
            let tell = tell.clone();
            tokio::spawn(async move {
                let mut lines = BufReader::new(stream).lines();
                while let Ok(Some(line)) = lines.next_line().await {
                    if tell.send(line).is_err() {
                        // Nobody listens any more, but the pipe must not fill up.
                    }
                }
            });
        }
        Self { child, lines, said: Vec::new() }
    }

    /// Waits for a line for which `pick` has an answer.
    pub async fn line<T>(&mut self, what: &str, pick: impl Fn(&str) -> Option<T>) -> T {
        let found = tokio::time::timeout(PATIENCE, async {
            while let Some(line) = self.lines.recv().await {
                let picked = pick(&line);
                self.said.push(line);
                if let Some(picked) = picked {
                    return Some(picked);
                }
            }
            None
        })
        .await;
        match found {
            Ok(Some(found)) => found,
            _ => panic!("no line that tells: {what}; said so far:\n{}", self.said.join("\n")),
        }
    }

    /// Takes in what has been said up to now.
    pub fn heard(&mut self) -> &[String] {
        while let Ok(line) = self.lines.try_recv() {
            self.said.push(line);
        }
        &self.said
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.child.id().unwrap()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub async fn wait(&mut self) -> ExitStatus {
        soon("the program to end", self.child.wait()).await.unwrap()
    }
}

/// A proxy that runs.
pub struct Proxy {
    pub running: Running,
    pub admin: SocketAddr,
    pub config: PathBuf,
    /// Where it runs, if not here.
    namespace: Option<Namespace>,
}

impl Proxy {
    /// Starts `run` with this config (an `admin:` with port 0 is added) and waits until the admin server answers.
    pub async fn start(dir: &Path, name: &str, config: &str) -> Self {
        Self::start_with(dir, name, config, |_| ()).await
    }

    pub async fn start_with(dir: &Path, name: &str, config: &str, change: impl FnOnce(&mut Command)) -> Self {
        Self::launch(dir, name, config, None, Command::new(program()), change).await
    }

    /// The same in a network namespace, where `command` runs the program.
    pub async fn start_within(place: &Namespace, dir: &Path, name: &str, config: &str, command: Command) -> Self {
        Self::launch(dir, name, config, Some(place.clone()), command, |_| ()).await
    }

    /// One that was started by other means.
    pub fn adopted(running: Running, admin: SocketAddr, config: PathBuf) -> Self {
        Self { running, admin, config, namespace: None }
    }

    async fn launch(
        dir: &Path,
        name: &str,
        config: &str,
        namespace: Option<Namespace>,
        mut command: Command,
        change: impl FnOnce(&mut Command),
    ) -> Self {
        let path = dir.join(format!("{name}.yaml"));
        std::fs::write(&path, with_admin(config)).unwrap();
        command.arg("run").arg("--config").arg(&path);
        change(&mut command);
        let mut running = Running::start(&mut command);
        let admin = running.line("the admin address", |line| field(line, "admin")?.parse().ok()).await;
        Self { running, admin, config: path, namespace }
    }

    /// Writes another config in place of the one in use, as an editor would, by renaming.
    pub fn rewrite(&self, config: &str) {
        let next = self.config.with_extension("next");
        std::fs::write(&next, with_admin(config)).unwrap();
        std::fs::rename(next, &self.config).unwrap();
    }

    /// Waits until `/readyz` says yes.
    pub async fn ready(&self) {
        until("readiness", || async { (self.get("/readyz").await.0 == 200).then_some(()) }).await;
    }

    pub async fn get(&self, path: &str) -> (u16, String) {
        let connected = match &self.namespace {
            Some(namespace) => namespace.connect(ROOT, self.admin).await,
            None => TcpStream::connect(self.admin).await,
        };
        let answer = async { ask(connected?, path).await };
        answer.await.unwrap_or((0, String::new()))
    }

    pub async fn state(&self) -> serde_json::Value {
        serde_json::from_str(&self.get("/state").await.1).unwrap()
    }

    pub async fn metrics(&self) -> Metrics {
        Metrics::parse(&self.get("/metrics").await.1)
    }

    /// Waits until the sum of the matching series reaches `least`.
    pub async fn metric_reaches(&self, name: &str, labels: &[(&str, &str)], least: f64) {
        until(&format!("{name}{labels:?} >= {least}"), || async {
            (self.metrics().await.sum(name, labels) >= least).then_some(())
        })
        .await;
    }

    /// The real address of a listener.
    pub async fn address(&self, listener: &str) -> SocketAddr {
        let state = self.state().await;
        let listeners = state["listeners"].as_array().unwrap();
        let found = listeners.iter().find(|l| l["name"] == listener).unwrap_or_else(|| panic!("{state}"));
        found["address"].as_str().unwrap().parse().unwrap()
    }

    /// Asks it to stop and waits for that.
    pub async fn stop(mut self) -> ExitStatus {
        self.running.signal(rustix::process::Signal::TERM);
        self.running.wait().await
    }
}

fn with_admin(config: &str) -> String {
    let admin = if config.contains("\nadmin:") { "" } else { "\nadmin: { listen: 127.0.0.1:0 }\n" };
    format!("{config}{admin}")
}

/// A field of a JSON log line.
pub fn field(line: &str, name: &str) -> Option<String> {
    let value: serde_json::Value = serde_json::from_str(line).ok()?;
    let found = value.get(name).or_else(|| value.get("fields").and_then(|fields| fields.get(name)))?;
    Some(found.as_str().map_or_else(|| found.to_string(), str::to_owned))
}

/// A plain HTTP/1.0 request: status and body.
pub async fn get(address: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    ask(TcpStream::connect(address).await?, path).await
}

async fn ask(mut stream: TcpStream, path: &str) -> std::io::Result<(u16, String)> {
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: admin\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Ok((status, body.to_owned()))
}

/// What `/metrics` said.
#[derive(Debug, Default)]
pub struct Metrics(Vec<(String, BTreeMap<String, String>, f64)>);

impl Metrics {
    pub fn parse(text: &str) -> Self {
        let series = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).filter_map(|line| {
            let (head, value) = line.rsplit_once(' ')?;
            let (name, labels) = head.split_once('{').unwrap_or((head, ""));
            let mut found = BTreeMap::new();
            for pair in labels.trim_end_matches('}').split("\",").filter(|pair| !pair.is_empty()) {
                let (key, value) = pair.split_once("=\"")?;
                found.insert(key.to_owned(), value.trim_end_matches('"').to_owned());
            }
            Some((name.to_owned(), found, value.parse().ok()?))
        });
        Self(series.collect())
    }

    /// The sum of all series of that name that carry these labels.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.matching(name, labels).map(|(_, value)| value).sum()
    }

    pub fn matching<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = (&'a BTreeMap<String, String>, f64)> {
        self.0
            .iter()
            .filter(move |(found, have, _)| {
                found == name && labels.iter().all(|(key, value)| have.get(*key).is_some_and(|v| v == value))
            })
            .map(|(_, labels, value)| (labels, *value))
    }

    pub fn series(&self) -> usize {
        self.0.len()
    }
}

/// Writes an identity as PEM files and answers the `identity:` part of a config.
pub fn identity_files(dir: &Path, name: &str, own: &Issued, bundles: &[(&str, String)]) -> String {
    let write = |file: String, text: &str| {
        let path = dir.join(file);
        let next = path.with_extension("next");
        std::fs::write(&next, text).unwrap();
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&next, private).unwrap();
        std::fs::rename(&next, &path).unwrap();
        path.display().to_string()
    };
    let certificate = write(format!("{name}.crt"), &own.chain_pem());
    let key = write(format!("{name}.key"), &own.key_pem());
    let bundles: String = bundles
        .iter()
        .map(|(domain, pem)| format!("      {domain}: {}\n", write(format!("{name}.{domain}.pem"), pem)))
        .collect();
    format!("identity:\n  files:\n    certificate: {certificate}\n    key: {key}\n    bundles:\n{bundles}")
}

/// A trust domain for a test: an authority, a folder, and SVIDs written where a proxy reads them.
pub struct Domain {
    pub ca: TestCa,
    pub dir: tempfile::TempDir,
}

impl Domain {
    pub fn new(name: &str) -> Self {
        Self { ca: TestCa::new(name), dir: tempfile::tempdir().unwrap() }
    }

    pub fn id(&self, path: &str) -> String {
        format!("spiffe://{}{path}", self.ca.domain())
    }

    /// The `identity:` part for an SVID with this path, which also carries the DNS name localhost.
    pub fn identity(&self, path: &str) -> String {
        let own = self.ca.issue(&Spec::leaf(self.id(path)).dns("localhost"));
        identity_files(self.dir.path(), path.trim_matches('/'), &own, &[(self.ca.domain(), self.ca.pem())])
    }

    /// Files for programs that take PEM: certificate, key, authority.
    pub fn files(&self, name: &str, own: &Issued) -> [PathBuf; 3] {
        identity_files(self.dir.path(), name, own, &[(self.ca.domain(), self.ca.pem())]);
        let path = |end: String| self.dir.path().join(format!("{name}.{end}"));
        [path("crt".into()), path("key".into()), path(format!("{}.pem", self.ca.domain()))]
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// An echo server; counts its connections.
pub struct Echo {
    pub address: SocketAddr,
    pub accepted: watch::Receiver<usize>,
}

pub async fn echo() -> Echo {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (count, accepted) = watch::channel(0);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            count.send_modify(|count| *count += 1);
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
    });
    Echo { address, accepted }
}

/// Sends and expects the same back.
pub async fn exchange(stream: &mut TcpStream, text: &[u8]) -> std::io::Result<()> {
    stream.write_all(text).await?;
    let mut back = vec![0; text.len()];
    soon("an echo", stream.read_exact(&mut back)).await?;
    assert_eq!(back, text);
    Ok(())
}

impl Proxy {
    /// The next line of the access log that `pick` wants, as JSON.
    pub async fn record(&mut self, what: &str, pick: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
        let read = |line: &str| {
            let line: serde_json::Value = serde_json::from_str(line).ok()?;
            (line["target"] == "portcullis::access" && pick(&line)).then_some(line)
        };
        self.running.line(what, read).await
    }

    /// The record of the next connection that ended for this cause.
    pub async fn ended(&mut self, cause: &str) -> serde_json::Value {
        self.record(&format!("a connection that ended with {cause}"), |line| line["cause"] == cause).await
    }

    /// Waits for a log line that holds all these words.
    pub async fn logged(&mut self, words: &[&str]) -> String {
        let found = |line: &str| words.iter().all(|word| line.contains(word)).then(|| line.to_owned());
        self.running.line(&words.join(" … "), found).await
    }

    /// Rewrites the config and says so by SIGHUP.
    pub fn reload(&self, config: &str) {
        self.rewrite(config);
        self.running.signal(rustix::process::Signal::HUP);
    }

    /// Rewrites the config, and waits until it is in force.
    pub async fn reloaded(&self, config: &str) {
        let success = [("result", "success")];
        let before = self.metrics().await.sum("portcullis_config_reloads_total", &success);
        self.reload(config);
        self.metric_reaches("portcullis_config_reloads_total", &success, before + 1.0).await;
    }
}

/// Runs a program to its end, with this on its standard input.
pub async fn output(command: &mut Command, input: &str) -> std::process::Output {
    let name = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let mut stdin = child.stdin.take().unwrap();
    let feed = async move {
        // A program that does not read its input to the end is no failure.
        let _ = stdin.write_all(input.as_bytes()).await;
        drop(stdin);
    };
    soon(&name, async { tokio::join!(feed, child.wait_with_output()).1 }).await.unwrap()
}

/// Standard output of a program that must succeed.
pub async fn succeeds(command: &mut Command, input: &str) -> String {
    let name = format!("{command:?}");
    let output = output(command, input).await;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}

/// Runs the program under test to its end: exit code, standard output, standard error.
pub async fn portcullis(arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(program());
    let output = output(command.args(arguments).env_remove("SPIFFE_ENDPOINT_SOCKET"), "").await;
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// A port that nobody listens on at this moment.
pub async fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

/// A client's sidecar that runs before a server's sidecar, with an echo server behind: `out` leads to `in`.
pub struct Joined {
    pub domain: Domain,
    pub workload: Echo,
    pub server: Proxy,
    pub client: Proxy,
    /// The server's config without what a test has put behind it.
    pub server_config: String,
}

impl Joined {
    /// `inbound` goes into the listener's own map, `rest` behind the whole server config.
    pub async fn start(inbound: &str, rest: &str) -> Self {
        let domain = Domain::new("a.example");
        let workload = echo().await;
        let listener = inbound_listener("in", workload.address, &domain.id("/client"), inbound);
        let server_config = format!("{}{listener}", domain.identity("/server"));
        let server = Proxy::start(domain.path(), "server", &format!("{server_config}{rest}")).await;
        server.ready().await;
        let client = Self::client_of(&domain, &server, "/client").await;
        Self { domain, workload, server, client, server_config }
    }

    /// A client's sidecar with this identity.
    pub async fn client_of(domain: &Domain, server: &Proxy, path: &str) -> Proxy {
        let config = format!(
            "{}outbound:\n  - {{ name: out, listen: '127.0.0.1:0', to: '{}', expect: '{}' }}\n",
            domain.identity(path),
            server.address("in").await,
            domain.id("/server")
        );
        let client = Proxy::start(domain.path(), path.trim_matches('/'), &config).await;
        client.ready().await;
        client
    }

    /// A connection of the client's workload.
    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.client.address("out").await).await.unwrap()
    }

    /// A connection that has carried bytes both ways.
    pub async fn connected(&self) -> TcpStream {
        let mut stream = self.connect().await;
        exchange(&mut stream, b"first").await.unwrap();
        stream
    }
}

/// The `inbound:` part with one listener.
pub fn inbound_listener(name: &str, to: SocketAddr, allow: &str, more: &str) -> String {
    format!("inbound:\n  - {{ name: {name}, listen: '127.0.0.1:0', to: '{to}', allow: ['{allow}']{more} }}\n")
}

/// Reads until the other side ends; a reset is an error.
pub async fn rest_of(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    soon("the end of a connection", stream.read_to_end(&mut bytes)).await.map(|_| bytes)
}
