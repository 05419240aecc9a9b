//! Traffic without a pause while SPIRE renews SVIDs of a minute's life and then replaces its CA: nothing fails.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::harness::{Proxy, Running, echo, until};
use crate::spire::{Extra, Pair, SLOW, World, agent_program, event, go_program, identity, listening, today, within};
use crate::stories::{echo_once, whole};

/// Connections that are opened, used and finished one after the other.
struct Fresh {
    made: Arc<AtomicU64>,
    failed: Arc<Mutex<Vec<String>>>,
    _tasks: JoinSet<()>,
}

impl Fresh {
    fn start(way_in: SocketAddr) -> Self {
        let (made, failed) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(Vec::new())));
        let mut tasks = JoinSet::new();
        for _ in 0..2 {
            let (made, failed) = (Arc::clone(&made), Arc::clone(&failed));
            tasks.spawn(async move {
                let mut pace = tokio::time::interval(Duration::from_millis(25));
                loop {
                    pace.tick().await;
                    if let Err(error) = whole(way_in).await {
                        failed.lock().unwrap().push(error.to_string());
                    }
                    made.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Self { made, failed, _tasks: tasks }
    }

    fn none_failed(&self, when: &str) {
        let failed = self.failed.lock().unwrap();
        let made = self.made.load(Ordering::Relaxed);
        assert!(failed.is_empty(), "{when}: {} of {made} new connections failed: {failed:?}", failed.len());
    }

    /// Waits until `more` connections have been made since now.
    async fn go_on(&self, more: u64) {
        let goal = self.made.load(Ordering::Relaxed) + more;
        until("traffic", || async { (self.made.load(Ordering::Relaxed) >= goal).then_some(()) }).await;
    }
}

/// Connections that stay open and are used all the time.
struct Held {
    /// For each how often it was used, and how it ended.
    state: Vec<watch::Receiver<(u64, Option<String>)>>,
    _tasks: JoinSet<()>,
}

impl Held {
    async fn open(way_in: SocketAddr, number: usize) -> Self {
        let (mut state, mut tasks) = (Vec::new(), JoinSet::new());
        for _ in 0..number {
            let mut stream = TcpStream::connect(way_in).await.unwrap();
            echo_once(&mut stream).await.unwrap();
            let (tell, told) = watch::channel((1, None));
            state.push(told);
            tasks.spawn(async move {
                let mut pace = tokio::time::interval(Duration::from_millis(50));
                loop {
                    pace.tick().await;
                    let end = echo_once(&mut stream).await.err().map(|error| error.to_string());
                    let over = end.is_some();
                    tell.send_modify(|(count, ended)| {
                        *count += u64::from(!over);
                        *ended = end;
                    });
                    if over {
                        return;
                    }
                }
            });
        }
        Self { state, _tasks: tasks }
    }

    /// None has ended, and each is used further.
    async fn all_go_on(&self, when: &str) {
        for told in &self.state {
            let (before, _) = told.borrow().clone();
            until(when, || async {
                let (count, ended) = told.borrow().clone();
                assert!(ended.is_none(), "{when}: an open connection ended after {count} uses: {ended:?}");
                (count > before + 1).then_some(())
            })
            .await;
        }
    }

    async fn all_end(&self, when: &str) {
        for told in &self.state {
            until(when, || async { told.borrow().1.is_some().then_some(()) }).await;
        }
    }
}

fn rotations(identity: &Value) -> u64 {
    identity["counters"]["rotations"].as_u64().unwrap()
}

/// Waits until the bundle of a trust domain has so many authorities.
async fn authorities(proxy: &Proxy, domain: &str, number: usize, what: &str) {
    within(SLOW, what, proxy, |state| {
        let bundles = state["bundles"].as_array().cloned().unwrap_or_default();
        let found = bundles.iter().find(|bundle| bundle["trust_domain"] == domain);
        let there = found.is_some_and(|bundle| bundle["authorities"].as_array().unwrap().len() == number);
        async move { there.then_some(()) }
    })
    .await;
}

/// Files that hold an SVID which the old CA signed and which outlives the whole story.
struct OldSvid(PathBuf);

impl OldSvid {
    async fn fetch(world: &World, folder: &Path, program: &Path) -> Self {
        until("an SVID for the file", || async {
            let mut fetch = Command::new(program);
            fetch.args(["api", "fetch", "x509", "-silent", "-socketPath"]).arg(world.one.socket());
            fetch.arg("-write").arg(folder).kill_on_drop(true);
            fetch.output().await.unwrap().status.success().then_some(())
        })
        .await;
        Self(folder.into())
    }

    /// A go-spiffe program with it; of the other domain it trusts today's bundle.
    async fn start(&self, world: &World, program: &Path, more: &[&str]) -> Running {
        let file = |name: &str| self.0.join(name).display().to_string();
        let other = self.0.join("two.pem");
        std::fs::write(&other, world.two.ask(&["bundle", "show"], &[]).await).unwrap();
        let mut command = Command::new(program);
        command.args(["-cert", &file("svid.0.pem"), "-key", &file("svid.0.key"), "-bundle", &file("bundle.0.pem")]);
        command.args(["-bundle", &format!("two.example={}", other.display())]).args(more);
        Running::start(&mut command)
    }

    /// Connects to the server's proxy.
    async fn connect(&self, world: &World, program: &Path, to: &str, expect: &str) -> Value {
        let arguments = ["-addr", to, "-expect", expect, "-timeout", "25s"];
        event(&mut self.start(world, program, &arguments).await, "connection").await
    }
}

/// At least two rotations, then prepare, activate, taint, revoke.
pub async fn under_traffic(world: Arc<World>) {
    let folder = world.folder("rotation");
    let backend = echo().await;
    let fetch = agent_program(&folder, "fetch");
    let client = go_program("spiffe-client", &folder, "go-client");
    let server = go_program("spiffe-server", &folder, "go-server");
    let lasting = ["-x509SVIDTTL", "3600", "-federatesWith", "spiffe://two.example"];
    let old_id = world.one.entry("/rotation/old", &fetch, &lasting).await;
    // One that the old CA signed, in the hands of a client and of a server, for the time after the CA is gone.
    let kept = OldSvid::fetch(&world, &folder, &fetch).await;
    let arguments = ["-listen", "127.0.0.1:0", "-allow", "spiffe://two.example/rotation/server", "-timeout", "590s"];
    let mut old_server = kept.start(&world, &server, &arguments).await;
    let to_old = listening(&mut old_server).await;
    let extra = Extra {
        config: "connections: { on_peer_expiry: keep }\n",
        server: format!("outbound:\n  - name: old\n    listen: 127.0.0.1:0\n    to: {to_old}\n    expect: {old_id}\n"),
        allow: vec![old_id],
        ..Extra::default()
    };
    let pair = Pair::start(&folder, &world.one, &world.two, backend.address, extra).await;
    let api = pair.server.address("api").await.to_string();

    let fresh = Fresh::start(pair.way_in);
    let first = Held::open(pair.way_in, 4).await;
    for proxy in [&pair.client, &pair.server] {
        identity(proxy, SLOW, "two rotations", |i| rotations(i) >= 2).await;
    }
    // The SVIDs that the first connections were opened with must be over, or their going on says nothing.
    within(SLOW, "the first connections' peer to have expired", &pair.server, |state| {
        let listed = state["connections"]["listed"].as_array().unwrap().iter();
        let oldest = listed.filter_map(|connection| connection["peer_not_after"].as_u64()).min();
        async move { oldest.is_some_and(|until| until < today()).then_some(()) }
    })
    .await;
    fresh.go_on(50).await;
    first.all_go_on("after two rotations").await;
    fresh.none_failed("during two rotations");

    let ca = |answer: &Value, which: &str| answer[which]["authority_id"].as_str().unwrap().to_owned();
    let local = ["localauthority", "x509"];
    let show = world.one.ask_json(&[&local[..], &["show"]].concat(), &[]).await;
    let old = ca(&show, "active");
    let prepared = world.one.ask_json(&[&local[..], &["prepare"]].concat(), &[]).await;
    let new = ca(&prepared, "prepared_authority");
    world.two.refresh(&world.one).await;
    for proxy in [&pair.client, &pair.server] {
        authorities(proxy, "one.example", 2, "the new CA to be trusted").await;
    }
    let seen = kept.connect(&world, &client, &api, &pair.server_id).await;
    assert!(seen["ok"] == true, "the old CA is still good: {seen:#}");
    let old_way = pair.server.address("old").await;
    whole(old_way).await.unwrap();
    first.all_go_on("after prepare").await;

    world.one.ask(&[&local[..], &["activate"]].concat(), &["-authorityID", &new]).await;
    world.one.ask(&[&local[..], &["taint"]].concat(), &["-authorityID", &old]).await;
    // For a moment the agent may have no identity for the workload now, which the grace must cover.
    // From here on nothing is signed by the old CA, so the next SVID is of the new one.
    let before = rotations(&pair.client.state().await["identity"]);
    world.two.refresh(&world.one).await;
    identity(&pair.client, SLOW, "an SVID of the new CA", |i| i["state"] == "fresh" && rotations(i) > before).await;
    fresh.go_on(50).await;
    first.all_go_on("after taint").await;
    fresh.none_failed("until after taint");
    let second = Held::open(pair.way_in, 4).await;

    world.one.ask(&[&local[..], &["revoke"]].concat(), &["-authorityID", &old]).await;
    world.two.refresh(&world.one).await;
    for proxy in [&pair.client, &pair.server] {
        authorities(proxy, "one.example", 1, "the old CA to be gone").await;
    }
    first.all_end("connections whose peer the old CA vouched for to end").await;
    let ended = [("direction", "inbound"), ("cause", "bundle_changed")];
    pair.server.metric_reaches("portcullis_connections_total", &ended, 4.0).await;
    fresh.go_on(50).await;
    second.all_go_on("after revoke").await;
    fresh.none_failed("until after revoke");
    let seen = kept.connect(&world, &client, &api, &pair.server_id).await;
    assert!(seen["ok"] == false, "nothing trusts the old CA: {seen:#}");
    whole(old_way).await.unwrap_err();
    for direction in ["inbound", "outbound"] {
        let untrusted = [("direction", direction), ("result", "failure"), ("reason", "untrusted")];
        pair.server.metric_reaches("portcullis_tls_handshakes_total", &untrusted, 1.0).await;
    }
    let labels = [("cause", "bundle_changed")];
    assert_eq!(pair.server.metrics().await.sum("portcullis_connections_total", &labels), 4.0);
    for proxy in [&pair.client, &pair.server] {
        let counters = proxy.state().await["identity"]["counters"].clone();
        assert_eq!((&counters["withdrawn"], &counters["expired"]), (&0.into(), &0.into()), "{counters:#}");
    }

    // One more rotation, all of the new CA.
    let before = rotations(&pair.client.state().await["identity"]);
    identity(&pair.client, SLOW, "a rotation under the new CA", |i| rotations(i) > before).await;
    second.all_go_on("after a rotation under the new CA").await;
    fresh.go_on(50).await;
    fresh.none_failed("until the end");
}
