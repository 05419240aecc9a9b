//! A trust domain in trouble: its agent hangs, dies, comes back; its server is away until the SVIDs have expired.

use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use tokio::net::TcpStream;

use crate::harness::{Proxy, echo, field, until};
use crate::spire::{Extra, Pair, SLOW, World, event, go, go_program, identity, ready, today};
use crate::stories::{echo_once, ended, whole};

fn serial(identity: &Value) -> String {
    identity["serial"].as_str().unwrap_or_else(|| panic!("no SVID: {identity:#}")).to_owned()
}

async fn now(proxy: &Proxy) -> Value {
    proxy.state().await["identity"].clone()
}

/// Waits until both proxies' identities are in order again.
async fn both_fresh(pair: &Pair, what: &str) {
    for proxy in [&pair.client, &pair.server] {
        identity(proxy, SLOW, what, |i| i["state"] == "fresh" && i["rotation_overdue"] == false).await;
    }
}

/// One after the other, because each needs the agent or the server for itself.
pub async fn agent_and_server(world: Arc<World>) {
    let mut spire = world.lonely("three.example").await;
    let folder = world.folder("outage");
    let backend = echo().await;
    let watch = go_program("spiffe-watch", &folder, "watch");
    spire.entry("/outage/watch", &watch, &[]).await;
    let mut pair = Pair::start(
        &folder,
        &spire,
        &spire,
        backend.address,
        Extra {
            // The peer's SVID expires together with ours; what ends connections here is to be our own.
            config: "connections: { on_peer_expiry: keep }\n",
            ..Extra::default()
        },
    )
    .await;
    let mut open = TcpStream::connect(pair.way_in).await.unwrap();
    echo_once(&mut open).await.unwrap();

    // The agent hangs without closing anything: an alarm, and the valid SVID is used on.
    let (_, kept) = (spire.signal_agent(Signal::STOP), serial(&now(&pair.server).await));
    for proxy in [&mut pair.client, &mut pair.server] {
        let overdue = identity(proxy, SLOW, "the overdue alarm", |i| i["rotation_overdue"] == true).await;
        assert_eq!(overdue["state"], "stale", "{overdue:#}");
        assert!(overdue["why"].as_str().unwrap().contains("rotation is overdue"), "{overdue:#}");
        let alarm = |line: &str| field(line, "message").filter(|m| m.contains("rotation is overdue"));
        proxy.running.line("the overdue alarm", alarm).await;
        assert_eq!(proxy.metrics().await.sum("portcullis_svid_rotation_overdue", &[]), 1.0);
        assert_eq!(proxy.metrics().await.sum("portcullis_svid_state", &[("state", "stale")]), 1.0);
        assert_eq!(proxy.get("/readyz").await.0, 200, "a valid SVID is good enough");
    }
    assert_eq!(serial(&now(&pair.server).await), kept);
    echo_once(&mut open).await.unwrap();
    whole(pair.way_in).await.unwrap();
    spire.signal_agent(Signal::CONT);
    both_fresh(&pair, "a fresh SVID once the agent goes on").await;
    assert_ne!(serial(&now(&pair.server).await), kept);

    // The agent dies and is started again with the keys on its disk.
    let kept = serial(&now(&pair.server).await);
    spire.kill_agent().await;
    for proxy in [&pair.client, &pair.server] {
        let stale = identity(proxy, SLOW, "the loss to be seen", |i| i["state"] == "stale").await;
        assert_eq!(stale["source_reachable"], false, "{stale:#}");
        assert_eq!(proxy.metrics().await.sum("portcullis_identity_source_up", &[]), 0.0);
    }
    assert_eq!(serial(&now(&pair.server).await), kept);
    echo_once(&mut open).await.unwrap();
    whole(pair.way_in).await.unwrap();
    spire.restart_agent().await;
    both_fresh(&pair, "reconnecting to the agent").await;
    assert_eq!(now(&pair.server).await["source_reachable"], true);
    echo_once(&mut open).await.unwrap();
    whole(pair.way_in).await.unwrap();

    // The server is away for longer than an SVID lives, and the agent goes on serving what it has.
    spire.kill_server().await;
    for proxy in [&mut pair.client, &mut pair.server] {
        let expired = identity(proxy, SLOW, "the SVID to expire", |i| i["state"] == "expired").await;
        assert!(expired["spiffe_id"].is_null(), "it is not used: {expired:#}");
        assert_eq!(proxy.get("/readyz").await.0, 503);
        let told = |line: &str| field(line, "message").filter(|m| m.contains("our identity has expired"));
        proxy.running.line("that it has expired", told).await;
    }
    ended(&mut open, Duration::from_secs(30)).await;
    // Whichever expired first ended it.
    until("the cause on record", || async {
        let cause = [("cause", "own_identity_gone")];
        let client = pair.client.metrics().await.sum("portcullis_connections_total", &cause);
        let server = pair.server.metrics().await.sum("portcullis_connections_total", &cause);
        (client + server >= 1.0).then_some(())
    })
    .await;
    let served = *backend.accepted.borrow();
    whole(pair.way_in).await.unwrap_err();
    let to = pair.server.address("api").await;
    whole(to).await.unwrap_err();
    for (proxy, direction) in [(&pair.client, "outbound"), (&pair.server, "inbound")] {
        let refused = [("direction", direction), ("reason", "no_identity")];
        proxy.metric_reaches("portcullis_tls_handshakes_total", &refused, 1.0).await;
    }
    assert_eq!(*backend.accepted.borrow(), served, "nothing is served with an expired SVID");
    // The agent itself says nothing of it: it hands out an expired SVID. (This workload's own may last a little longer.)
    until("an expired SVID from the agent", || async {
        let mut watch = go(&watch, &spire, &["-updates", "1", "-timeout", "25s"]);
        let update = event(&mut watch, "update").await;
        (update["svids"][0]["not_after_unix"].as_u64().unwrap() < today()).then_some(())
    })
    .await;

    spire.restart_server().await;
    both_fresh(&pair, "recovery once the server is back").await;
    ready(&pair.client).await;
    ready(&pair.server).await;
    whole(pair.way_in).await.unwrap();
    assert_eq!(now(&pair.server).await["counters"]["withdrawn"], 0, "it was never without an entry");
}
