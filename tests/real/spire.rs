//! Trust domains run by SPIRE's own programs, and proxies that get their identities there.
//!
//! Workloads are told apart by the path of their program (`unix:path`), so every one runs a copy of its own.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokio::process::{Child, Command};

use crate::harness::{PATIENCE, Proxy, Running, program};

/// A state that SPIRE brings about in its own time: entries are synchronised every 5 s, SVIDs renewed after 25 to 31 s,
/// and an agent that missed its server for a while asks again only after a minute or two.
pub const SLOW: Duration = Duration::from_secs(180);

/// Waits like `harness::until`, as long as it is told to, and tells where it stands when it gives up.
pub async fn within<T, F, Fut>(limit: Duration, what: &str, proxy: &Proxy, mut ask: F) -> T
where
    F: FnMut(Value) -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let asked = tokio::time::timeout(limit, async {
        let mut tick = tokio::time::interval(Duration::from_millis(50));
        loop {
            tick.tick().await;
            if let Some(answer) = ask(proxy.state().await).await {
                return answer;
            }
        }
    });
    match asked.await {
        Ok(answer) => answer,
        Err(_) => panic!("not within {} s: {what}; {:#}", limit.as_secs(), proxy.state().await["identity"]),
    }
}

/// Waits until `/state` has an identity for which `holds`.
pub async fn identity(proxy: &Proxy, limit: Duration, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    within(limit, what, proxy, |state| {
        let identity = state["identity"].clone();
        let holds = holds(&identity);
        async move { holds.then_some(identity) }
    })
    .await
}

/// Seconds since the Unix epoch.
pub fn today() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

/// What PATH and the environment lack, and how to get it.
pub fn missing() -> Vec<(String, &'static str)> {
    let spire = "SPIRE 1.13.0 or later, looked for in PATH; from https://github.com/spiffe/spire/releases, or built with \
                 Go: git clone -b v1.13.0 https://github.com/spiffe/spire && go build ./cmd/... (module \
                 github.com/spiffe/spire)";
    let mut missing = Vec::new();
    for name in ["spire-server", "spire-agent"] {
        if in_path(name).is_none() {
            missing.push((name.to_owned(), spire));
        }
    }
    for name in ["spiffe-client", "spiffe-server", "spiffe-watch"] {
        if !go_spiffe(name).is_file() {
            missing.push((name.to_owned(), "built by tests/setup; start the tests with tests/real/run"));
        }
    }
    missing
}

fn in_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

fn go_spiffe(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os("PORTCULLIS_TEST_GO").unwrap_or_default()).join(name)
}

/// What all stories share.
pub struct World {
    dir: tempfile::TempDir,
    kept: AtomicBool,
    pub one: Spire,
    pub two: Spire,
}

impl World {
    /// Two trust domains that federate with each other.
    pub async fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("portcullis-real-").tempdir().unwrap();
        let bundle_ports = [free_port(), free_port()];
        let names = ["one.example", "two.example"];
        let mut one = Spire::server(dir.path(), names[0], bundle_ports[0], names[1], bundle_ports[1]).await;
        let mut two = Spire::server(dir.path(), names[1], bundle_ports[1], names[0], bundle_ports[0]).await;
        one.trust(&two).await;
        two.trust(&one).await;
        tokio::join!(one.join_agent(), two.join_agent());
        Self { dir, kept: AtomicBool::new(false), one, two }
    }

    /// A folder for one story's files.
    pub fn folder(&self, story: &str) -> PathBuf {
        let path = self.dir.path().canonicalize().unwrap().join(story);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// A trust domain that nobody else uses, federated with one that does not exist.
    pub async fn lonely(&self, name: &str) -> Spire {
        let mut spire = Spire::server(self.dir.path(), name, free_port(), "nowhere.example", free_port()).await;
        spire.join_agent().await;
        spire
    }

    /// Leaves the folder behind.
    pub fn keep(&self) -> &Path {
        self.kept.store(true, Ordering::Relaxed);
        self.dir.path()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.dir.disable_cleanup(self.kept.load(Ordering::Relaxed));
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A copy of a program under a path of its own, so that SPIRE knows it from others.
pub fn copy_of(original: &Path, folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    if std::fs::hard_link(original, &path).is_err() {
        std::fs::copy(original, &path).unwrap();
    }
    path
}

/// A copy of one of the go-spiffe programs.
pub fn go_program(program: &str, folder: &Path, name: &str) -> PathBuf {
    copy_of(&go_spiffe(program), folder, name)
}

/// A copy of SPIRE's agent program, whose `api fetch` writes SVIDs to files.
pub fn agent_program(folder: &Path, name: &str) -> PathBuf {
    copy_of(&in_path("spire-agent").unwrap(), folder, name)
}

/// One trust domain: a server and its agent.
pub struct Spire {
    pub name: String,
    dir: PathBuf,
    server: Child,
    agent: Option<Child>,
}

impl Spire {
    async fn server(dir: &Path, name: &str, bundle_port: u16, other: &str, other_bundle_port: u16) -> Self {
        let dir = dir.canonicalize().unwrap().join(name);
        for folder in ["server", "agent", "public"] {
            std::fs::create_dir_all(dir.join(folder)).unwrap();
        }
        let port = free_port().to_string();
        let text = |path: &str| dir.join(path).display().to_string();
        let server = [
            ("DOMAIN", name.to_owned()),
            ("PORT", port.clone()),
            ("BUNDLE_PORT", bundle_port.to_string()),
            ("OTHER_DOMAIN", other.to_owned()),
            ("OTHER_BUNDLE_PORT", other_bundle_port.to_string()),
            ("DIR", text("server")),
        ];
        fill(include_str!("spire/server.conf"), &server, &dir.join("server.conf"));
        let agent = [
            ("DOMAIN", name.to_owned()),
            ("PORT", port),
            ("DIR", text("agent")),
            ("SOCKET", text("public/agent.sock")),
            ("BUNDLE", text("bundle.pem")),
        ];
        fill(include_str!("spire/agent.conf"), &agent, &dir.join("agent.conf"));
        let server = spawn("spire-server", &dir, "server", &[]);
        let this = Self { name: name.to_owned(), dir, server, agent: None };
        this.server_healthy().await;
        this
    }

    /// Lets this domain's server know the other's bundle at once.
    async fn trust(&self, other: &Self) {
        let file = other.dir.join("bundle.json");
        std::fs::write(&file, other.ask(&["bundle", "show"], &["-format", "spiffe"]).await).unwrap();
        let id = other.id("");
        self.ask(&["bundle", "set"], &["-format", "spiffe", "-id", &id, "-path", file.to_str().unwrap()]).await;
    }

    async fn join_agent(&mut self) {
        std::fs::write(self.dir.join("bundle.pem"), self.ask(&["bundle", "show"], &[]).await).unwrap();
        let token = self.ask_json(&["token", "generate"], &["-spiffeID", &self.id("/node")]).await;
        self.agent = Some(spawn("spire-agent", &self.dir, "agent", &["-joinToken", token["value"].as_str().unwrap()]));
        self.agent_healthy().await;
    }

    async fn server_healthy(&self) {
        self.healthy("spire-server", &self.server_socket()).await;
    }

    async fn agent_healthy(&self) {
        self.healthy("spire-agent", &self.socket()).await;
    }

    async fn healthy(&self, program: &str, socket: &Path) {
        let what = format!("{program} of {} to be healthy; see {}", self.name, self.dir.display());
        crate::harness::until(&what, || async {
            let mut check = Command::new(program);
            check.arg("healthcheck").arg("-socketPath").arg(socket).stdin(Stdio::null()).kill_on_drop(true);
            check.output().await.unwrap().status.success().then_some(())
        })
        .await;
    }

    pub fn id(&self, path: &str) -> String {
        format!("spiffe://{}{path}", self.name)
    }

    /// The Workload API's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("public/agent.sock")
    }

    fn server_socket(&self) -> PathBuf {
        self.dir.join("server/server.sock")
    }

    /// Runs one of the server's own commands.
    pub async fn ask(&self, words: &[&str], arguments: &[&str]) -> String {
        let mut command = Command::new("spire-server");
        command.args(words).arg("-socketPath").arg(self.server_socket()).args(arguments);
        said(&mut command).await
    }

    pub async fn ask_json(&self, words: &[&str], arguments: &[&str]) -> Value {
        let text = self.ask(words, &[arguments, &["-output", "json"]].concat()).await;
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{words:?}: {error}: {text}"))
    }

    /// Makes an entry: processes of this program have this SPIFFE ID. Answers the ID.
    pub async fn entry(&self, path: &str, program: &Path, more: &[&str]) -> String {
        let (id, parent) = (self.id(path), self.id("/node"));
        let selector = format!("unix:path:{}", program.display());
        let mut arguments = vec!["-parentID", &parent, "-spiffeID", &id, "-selector", &selector];
        if !more.contains(&"-x509SVIDTTL") {
            arguments.extend(["-x509SVIDTTL", "60"]);
        }
        arguments.extend(more);
        let made = self.ask_json(&["entry", "create"], &arguments).await;
        assert_eq!(made["results"][0]["status"]["code"], 0, "{made:#}");
        id
    }

    /// Deletes the entries of a SPIFFE ID.
    pub async fn delete_entry(&self, path: &str) {
        let found = self.ask_json(&["entry", "show"], &["-spiffeID", &self.id(path)]).await;
        let entries = found["entries"].as_array().unwrap();
        assert!(!entries.is_empty(), "no entry for {path}");
        for entry in entries {
            self.ask(&["entry", "delete"], &["-entryID", entry["id"].as_str().unwrap()]).await;
        }
    }

    /// Fetches the other domain's bundle now; by itself the server would within the minute.
    pub async fn refresh(&self, other: &Self) {
        self.ask(&["federation", "refresh"], &["-id", &other.id("")]).await;
    }

    pub fn signal_agent(&self, signal: rustix::process::Signal) {
        let id = self.agent.as_ref().unwrap().id().unwrap();
        let pid = rustix::process::Pid::from_raw(i32::try_from(id).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Kills the agent, as a crash would.
    pub async fn kill_agent(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().await.unwrap();
    }

    /// Starts the agent again; its keys and its own SVID are on disk.
    pub async fn restart_agent(&mut self) {
        self.agent = Some(spawn("spire-agent", &self.dir, "agent", &[]));
        self.agent_healthy().await;
    }

    pub async fn kill_server(&mut self) {
        self.server.kill().await.unwrap();
    }

    pub async fn restart_server(&mut self) {
        self.server = spawn("spire-server", &self.dir, "server", &[]);
        self.server_healthy().await;
    }
}

fn fill(template: &str, values: &[(&str, String)], to: &Path) {
    let text = values.iter().fold(template.to_owned(), |text, (key, value)| text.replace(&format!("@{key}@"), value));
    // The head of a template explains the placeholders that were just filled in.
    let body: Vec<&str> = text.lines().skip_while(|line| line.starts_with('#')).collect();
    assert!(!body.iter().any(|line| line.contains('@')), "a placeholder is left in {}", to.display());
    std::fs::write(to, body.join("\n")).unwrap();
}

/// Starts a server or an agent; what it says goes to a file.
fn spawn(program: &str, dir: &Path, name: &str, more: &[&str]) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(dir.join(format!("{name}.log"))).unwrap();
    let mut command = Command::new(program);
    command.arg("run").arg("-config").arg(dir.join(format!("{name}.conf"))).args(more);
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).kill_on_drop(true);
    command.spawn().unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// Runs a program that ends by itself and answers what it said.
pub async fn said(command: &mut Command) -> String {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output()).await;
    let output = output.unwrap_or_else(|_| panic!("{command:?} does not end")).unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// The beginning of a config: identity from this domain's agent, in the profile that SPIRE before 1.14 needs.
pub fn from_agent(spire: &Spire) -> String {
    format!("identity: unix://{}\ntls: {{ svid_keys: p256-allowed }}\n", spire.socket().display())
}

/// A proxy with a program path of its own.
pub async fn proxy(folder: &Path, own_program: &Path, name: &str, config: &str) -> Proxy {
    Proxy::start_with(folder, name, config, |command| {
        let mut other = Command::new(own_program);
        other.args(command.as_std().get_args());
        *command = other;
    })
    .await
}

/// A proxy before a client and one behind a server, each with an entry.
pub struct Pair {
    pub client: Proxy,
    pub server: Proxy,
    pub client_id: String,
    pub server_id: String,
    pub server_program: PathBuf,
    /// Where plaintext goes in.
    pub way_in: SocketAddr,
}

/// What differs between pairs.
#[derive(Default)]
pub struct Extra<'a> {
    /// More lines at the top of both configs.
    pub config: &'a str,
    /// Who else may connect to the server's proxy.
    pub allow: Vec<String>,
    /// More outbound listeners of the client's proxy, as lines of the list.
    pub outbound: String,
    /// More lines at the end of the config of the server's proxy.
    pub server: String,
}

impl Pair {
    /// Makes both entries (`/STORY/client`, `/STORY/server`), starts both proxies and waits until they are ready.
    pub async fn start(folder: &Path, from: &Spire, to: &Spire, backend: SocketAddr, extra: Extra<'_>) -> Self {
        let story = folder.file_name().unwrap().to_str().unwrap().to_owned();
        let client_program = copy_of(Path::new(program()), folder, "client-proxy");
        let server_program = copy_of(Path::new(program()), folder, "server-proxy");
        let make = async |spire: &Spire, role: &str, program: &Path, other: &Spire| {
            let dns = format!("{role}.{story}.test");
            let other_id = other.id("");
            let mut more = vec!["-hint", role, "-dns", &dns];
            if spire.name != other.name {
                more.extend(["-federatesWith", &other_id]);
            }
            spire.entry(&format!("/{story}/{role}"), program, &more).await
        };
        let client_id = make(from, "client", &client_program, to).await;
        let server_id = make(to, "server", &server_program, from).await;
        let allow = [vec![client_id.clone()], extra.allow].concat().join(", ");
        let server = proxy(
            folder,
            &server_program,
            "server",
            &format!(
                "{}{}inbound:\n  - name: api\n    listen: 127.0.0.1:0\n    to: {backend}\n    allow: [{allow}]\n{}",
                from_agent(to),
                extra.config,
                extra.server
            ),
        )
        .await;
        let client = proxy(
            folder,
            &client_program,
            "client",
            &format!(
                "{}{}outbound:\n  - name: records\n    listen: 127.0.0.1:0\n    to: {}\n    expect: {server_id}\n{}",
                from_agent(from),
                extra.config,
                server.address("api").await,
                extra.outbound
            ),
        )
        .await;
        ready(&server).await;
        ready(&client).await;
        let way_in = client.address("records").await;
        Self { client, server, client_id, server_id, server_program, way_in }
    }
}

/// Waits until a proxy is ready; entries reach an agent within some seconds.
pub async fn ready(proxy: &Proxy) {
    within(SLOW, "readiness", proxy, |state| async move { (state["ready"] == true).then_some(()) }).await;
}

/// Starts a go-spiffe program, whose lines are JSON.
pub fn go(program: &Path, spire: &Spire, arguments: &[&str]) -> Running {
    Running::start(Command::new(program).arg("-socket").arg(spire.socket()).args(arguments))
}

/// Waits for the address of a `spiffe-server`.
pub async fn listening(running: &mut Running) -> String {
    running
        .line("its address", |line| {
            let value: Value = serde_json::from_str(line).ok()?;
            Some(value["listening"].as_str()?.to_owned())
        })
        .await
}

/// Waits for an event of a go-spiffe program.
pub async fn event(running: &mut Running, name: &str) -> Value {
    running
        .line(name, |line| {
            let value: Value = serde_json::from_str(line).ok()?;
            (value["event"] == name).then_some(value)
        })
        .await
}
