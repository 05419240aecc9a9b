//! `portcullis authority` as the agent of a test, and the go-spiffe programs that ask it.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tokio::process::Command;

use crate::harness::{Running, field, program, soon, tool};

/// An authority that runs.
pub struct Agent {
    pub running: Running,
    pub socket: PathBuf,
    /// The serial number of the CA that it signed with at the start.
    pub ca: String,
    config: PathBuf,
}

impl Agent {
    /// Starts `authority` with this config, to which the socket is added, and waits until it is ready.
    pub async fn start(dir: &Path, name: &str, config: &str) -> Self {
        open_to_all(dir);
        let socket = dir.join(format!("{name}.sock"));
        let path = dir.join(format!("{name}.authority.yaml"));
        std::fs::write(&path, with_socket(&socket, config)).unwrap();
        let mut command = Command::new(program());
        command.arg("authority").arg("--config").arg(&path);
        let mut running = Running::start(&mut command);
        let ca = running
            .line("the authority is ready", |line| {
                (field(line, "message")? == "the authority is ready").then(|| field(line, "ca"))?
            })
            .await;
        Self { running, socket, ca, config: path }
    }

    /// Writes another config in place of the one in use and waits until it is taken.
    pub async fn reload(&mut self, config: &str) {
        let next = self.config.with_extension("next");
        std::fs::write(&next, with_socket(&self.socket, config)).unwrap();
        std::fs::rename(next, &self.config).unwrap();
        self.running.signal(rustix::process::Signal::HUP);
        self.running.line("the reload", |line| line.contains("the config was reloaded").then_some(())).await;
    }

    /// The address of its Workload API.
    pub fn address(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// The shortest `identity:` part for it.
    pub fn identity(&self) -> String {
        format!("identity: {}\n", self.address())
    }

    /// The `identity:` part that chooses among several SVIDs.
    pub fn identity_with(&self, choice: &str) -> String {
        format!("identity:\n  workload_api: {{ address: \"{}\" }}\n  {choice}\n", self.address())
    }

    /// One of the go-spiffe programs, with its identity from here.
    pub fn go(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = go(name);
        command.arg("-socket").arg(&self.socket).args(arguments);
        command
    }

    pub async fn stop(mut self) {
        self.running.signal(rustix::process::Signal::TERM);
        assert!(self.running.wait().await.success());
    }
}

fn with_socket(socket: &Path, config: &str) -> String {
    format!("socket: {}\n{config}", socket.display())
}

/// Lets other users see into a test's folder, as far as its files let them.
pub fn open_to_all(dir: &Path) {
    std::fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
}

/// The `entries:` item for one ID.
pub fn entry(id: &str, selectors: &str, more: &str) -> String {
    format!("  - {{ spiffe_id: \"{id}\", selectors: {{ {selectors} }} {more} }}\n")
}

/// The selector that fits every process of this test.
pub fn own_uid() -> String {
    format!("uid: {}", rustix::process::geteuid().as_raw())
}

/// Where a go-spiffe program is.
pub fn go_path(name: &str) -> PathBuf {
    let dir = tool("PORTCULLIS_TEST_GO", "");
    if dir.as_os_str().is_empty() { name.into() } else { dir.join(name) }
}

pub fn go(name: &str) -> Command {
    Command::new(go_path(name))
}

/// Runs a program to its end: its exit code and the JSON lines it said.
pub async fn run(command: &mut Command) -> (i32, Vec<Value>) {
    let name = format!("{command:?}");
    command.kill_on_drop(true).stdin(std::process::Stdio::null());
    let output = soon(&name, command.output()).await.unwrap_or_else(|error| panic!("{name}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    (output.status.code().unwrap_or(-1), lines)
}

/// The first line of this event.
pub fn event<'a>(lines: &'a [Value], event: &str) -> &'a Value {
    lines.iter().find(|line| line["event"] == event).unwrap_or_else(|| panic!("no {event} in {lines:?}"))
}

/// Waits for a JSON line that fits.
pub async fn heard(running: &mut Running, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
    running
        .line(what, |line| {
            let value: Value = serde_json::from_str(line).ok()?;
            fits(&value).then_some(value)
        })
        .await
}

/// The trust domains of an update's bundles, in order.
pub fn domains(update: &Value) -> Vec<String> {
    let bundles = update["bundles"].as_array().cloned().unwrap_or_default();
    let mut names: Vec<_> = bundles.iter().map(|b| b["trust_domain"].as_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

/// Starts `spiffe-server` and answers where it listens.
pub async fn go_server(command: &mut Command) -> (Running, std::net::SocketAddr) {
    let mut running = Running::start(command);
    let address = running.line("where the server listens", |line| field(line, "listening")?.parse().ok()).await;
    (running, address)
}
