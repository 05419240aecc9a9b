//! The stage: an authority, three pods on a wire, in each the rules and the proxy as an administrator would have them.

use std::fs::{File, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::task::JoinSet;

use super::super::clinic::Clinic;
use super::super::scrape;
use super::super::world::{DOMAIN, id, open};
use super::cell;
use super::pods::{Pod, Wire};
use super::tap::Tap;
use crate::authority::attest::Selectors;
use crate::authority::config::Entry;
use crate::authority::{Authority, WorkloadApiServer};
use crate::clock::Clock;
use crate::identity::SpiffeId;

/// Where the service is.
pub(super) const PORT: u16 = 8080;
/// Where the proxies tell of themselves.
const ADMIN: u16 = 9902;
/// The user that proxies run as, by which the rules know them.
pub(super) const PROXY: u32 = 1337;
/// The rule that denies.
pub(super) const DENIES: &str = "no-admin";

/// A pod with a proxy.
#[derive(Debug)]
pub(super) struct Sidecar {
    pub(super) pod: Arc<Pod>,
    /// Its group, by which the authority knows which proxy it is.
    gid: u32,
    config: PathBuf,
    log: PathBuf,
    running: Mutex<Option<Child>>,
}

impl Sidecar {
    fn new(pod: Pod, number: u8, folder: &Path, text: &str) -> io::Result<Self> {
        let config = folder.join(format!("{}.yaml", pod.name));
        std::fs::write(&config, text)?;
        std::fs::set_permissions(&config, Permissions::from_mode(0o644))?;
        let log = folder.join(format!("{}.log", pod.name));
        Ok(Self { pod: Arc::new(pod), gid: gid(number), config, log, running: Mutex::default() })
    }

    /// `portcullis redirect apply`, as root. What it says.
    pub(super) async fn apply(&self) -> Result<String, String> {
        self.redirect(&["apply", "--config"], Some(&self.config)).await
    }

    /// What somebody does who does not know better.
    pub(super) async fn remove(&self) -> Result<String, String> {
        self.redirect(&["remove"], None).await
    }

    async fn redirect(&self, arguments: &[&str], config: Option<&Path>) -> Result<String, String> {
        let mut command = cell::program();
        command.arg("redirect").args(arguments).args(config).current_dir("/").stdin(Stdio::null());
        let output = self.pod.run(move || command.output()).await.map_err(|error| error.to_string())?;
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(said(&output.stdout)) } else { Err(said(&output.stderr)) }
    }

    /// `portcullis run`, as the proxy's user. Its log goes into a file of the cell, or with those of the others.
    pub(super) async fn start(&self, log: Option<&File>) -> Result<(), String> {
        let why = |error: io::Error| format!("the proxy of {} cannot be started: {error}", self.pod.name);
        let log = log.map_or_else(|| File::create(&self.log), File::try_clone).map_err(why)?;
        let mut command = cell::program();
        command.args(["run", "--config"]).arg(&self.config).current_dir("/").uid(PROXY).gid(self.gid);
        // A signal from the terminal is for the demo, which decides what becomes of its proxies.
        command.process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = self.pod.run(move || command.spawn()).await.map_err(why)?;
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
        Ok(())
    }

    /// Kills the proxy, as the kernel does when memory is short.
    pub(super) fn kill(&self) -> io::Result<()> {
        let Some(mut child) = self.running.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return Err(io::Error::other("it does not run"));
        };
        child.kill()?;
        child.wait().map(drop)
    }

    /// What it has logged last.
    pub(super) fn last_words(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().last().unwrap_or_default().to_owned()
    }

    /// Where it tells of itself.
    pub(super) fn admin(&self) -> SocketAddr {
        (self.pod.v4, ADMIN).into()
    }

    /// `/state`.
    pub(super) async fn state(&self) -> Value {
        scrape::state(self.admin()).await
    }

    /// `/metrics`.
    pub(super) async fn metrics(&self) -> scrape::Metrics {
        scrape::metrics(self.admin()).await
    }
}

fn gid(number: u8) -> u32 {
    PROXY + u32::from(number)
}

/// Everything that is there.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) wire: Wire,
    pub(super) tap: Tap,
    pub(super) frontend: Sidecar,
    pub(super) records: Sidecar,
    pub(super) stranger: Sidecar,
    pub(super) service: Clinic,
    _tasks: JoinSet<()>,
}

impl Stage {
    /// Sets it up in this cell: the service listens, there is an authority, but neither rules nor proxies.
    pub(super) async fn build(folder: &Path, life: Duration) -> Result<Self, String> {
        let io = |error: io::Error| error.to_string();
        let wire = Wire::new().await?;
        let [frontend, records, stranger] =
            [wire.pod("frontend", 1).await?, wire.pod("records", 2).await?, wire.pod("stranger", 3).await?];
        let tap = Tap::start(&wire.0, PORT).await.map_err(|error| format!("no tap on the wire: {error}"))?;
        let [v4, v6] = records.at(PORT);
        let listeners = records.listen(PORT).await.map_err(|error| format!("the records workload: {error}"))?;
        let service = Clinic::on(v4, listeners);

        let socket = folder.join("agent.sock");
        let mut tasks = JoinSet::new();
        serve_identities(&socket, life, &mut tasks)?;
        let caller = |pod: &Pod| common(pod, &socket) + &captured_outbound(&[v4, v6]);
        let callers = [caller(&frontend), caller(&stranger)];
        let called = common(&records, &socket) + &captured_inbound();
        Ok(Self {
            wire,
            tap,
            frontend: Sidecar::new(frontend, 1, folder, &callers[0]).map_err(io)?,
            records: Sidecar::new(records, 2, folder, &called).map_err(io)?,
            stranger: Sidecar::new(stranger, 3, folder, &callers[1]).map_err(io)?,
            service,
            _tasks: tasks,
        })
    }

    /// All that have a proxy.
    pub(super) fn sidecars(&self) -> [&Sidecar; 3] {
        [&self.records, &self.frontend, &self.stranger]
    }
}

/// An authority in memory, which knows a proxy by its user and group.
fn serve_identities(socket: &Path, life: Duration, tasks: &mut JoinSet<()>) -> Result<(), String> {
    let authority: Authority = open(DOMAIN, life, Clock::system())?;
    let entry = |(name, number): (&str, u8)| {
        let selectors = Selectors { uid: Some(PROXY), gid: Some(gid(number)), ..Selectors::default() };
        let spiffe_id = SpiffeId::parse(&id(name)).map_err(|error| error.to_string())?;
        Ok::<_, String>(Entry { spiffe_id, selectors, dns: Vec::new(), ttl: None, hint: None })
    };
    let entries =
        [("frontend", 1), ("records", 2), ("stranger", 3)].into_iter().map(entry).collect::<Result<_, _>>()?;
    let server = WorkloadApiServer::bind(authority.clone(), socket, 0o666, entries)
        .map_err(|error| format!("the authority: {error}"))?;
    tasks.spawn(server.run(std::future::pending()));
    tasks.spawn(async move { authority.upkeep().await });
    Ok(())
}

/// What is in the config of each: it captures all there is, both ways.
fn common(pod: &Pod, socket: &Path) -> String {
    format!(
        "identity: 'unix://{}'
labels: {{ service_name: {}, environment: demo, domain: demo }}
admin: {{ listen: '{}:{ADMIN}' }}
telemetry: {{ log_format: json }}
intercept:
  proxy: {{ uid: {PROXY} }}
  inbound: {{}}
  outbound: {{}}
  udp: refuse
  check_interval: 1s
  require_interception: true
",
        socket.display(),
        pod.name,
        pod.v4
    )
}

fn captured_inbound() -> String {
    let frontend = id("frontend");
    format!(
        "inbound:
  - name: records
    capture: [{PORT}]
    protocol: http
    http: {{ forward_client_cert: set }}
policy:
  rules:
    - name: read-records
      from: ['{frontend}']
      http: [{{ methods: [GET], paths: ['/records/{{id}}'] }}]
    - name: {DENIES}
      from: ['spiffe://{DOMAIN}']
      action: deny
      http: [{{ paths: [{{ prefix: /admin }}] }}]
"
    )
}

fn captured_outbound(to: &[SocketAddr]) -> String {
    let addresses = to.iter().map(|address| format!("'{}'", address.ip())).collect::<Vec<_>>().join(", ");
    let records = id("records");
    format!(
        "outbound:
  - name: records
    capture: {{ addresses: [{addresses}], ports: [{PORT}] }}
    expect: '{records}'
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{LoadOptions, parse_with};
    use crate::intercept::Plan;

    #[test]
    fn the_configs_are_good_without_a_warning_and_declare_a_plan() {
        let socket = Path::new("/tmp/agent.sock");
        let pod = Pod::for_tests("records", 2);
        for rest in [captured_inbound(), captured_outbound(&pod.at(PORT))] {
            let text = common(&pod, socket) + &rest;
            let loaded = parse_with(&text, "demo", &LoadOptions::default()).unwrap();
            assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
            let plan = Plan::declared(&loaded.config, &[]).unwrap();
            assert_eq!(plan.proxy.uid, Some(PROXY));
            assert_eq!(plan.inbound.unwrap().skip_ports, [ADMIN]);
        }
    }
}
