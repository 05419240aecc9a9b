//! Registration entries that come and go, and several of them for one workload.

use std::path::Path;
use std::sync::Arc;

use tokio::net::TcpStream;

use crate::harness::{echo, field, program};
use crate::spire::{Extra, Pair, SLOW, World, copy_of, event, go, go_program, identity, proxy, ready, within};
use crate::stories::{echo_once, ended, whole};

/// Without its entry a proxy loses its identity after the grace, and everything with it; with a new entry it recovers.
pub async fn deleted_and_made_again(world: Arc<World>) {
    let backend = echo().await;
    let mut pair =
        Pair::start(&world.folder("deleted"), &world.two, &world.two, backend.address, Extra::default()).await;
    let mut open = TcpStream::connect(pair.way_in).await.unwrap();
    echo_once(&mut open).await.unwrap();

    world.two.delete_entry("/deleted/server").await;
    let gone = identity(&pair.server, SLOW, "the identity to be withdrawn", |i| i["state"] == "absent").await;
    assert_eq!(gone["counters"]["withdrawn"], 1, "{gone:#}");
    assert_eq!(gone["source_reachable"], true, "{gone:#}");
    assert!(gone["why"].as_str().unwrap().contains("is there an entry whose selectors fit this process?"), "{gone:#}");
    let held = |line: &str| field(line, "message").filter(|m| m.contains("the source does not name our identity"));
    pair.server.running.line("that the grace began", held).await;
    ended(&mut open, SLOW).await;
    let (status, waiting) = pair.server.get("/readyz").await;
    assert!(status == 503 && waiting.starts_with("waiting for: identity\n"), "{status} {waiting}");
    let closed = [("direction", "inbound"), ("cause", "own_identity_gone")];
    pair.server.metric_reaches("portcullis_connections_total", &closed, 1.0).await;
    whole(pair.way_in).await.unwrap_err();
    let refused = [("direction", "inbound"), ("reason", "no_identity")];
    pair.server.metric_reaches("portcullis_tls_handshakes_total", &refused, 1.0).await;
    assert_eq!(*backend.accepted.borrow(), 1, "nobody is served without an identity");

    world.two.entry("/deleted/server", &pair.server_program, &[]).await;
    ready(&pair.server).await;
    whole(pair.way_in).await.unwrap();
    let back = pair.server.state().await["identity"].clone();
    assert_eq!(back["spiffe_id"], pair.server_id.as_str(), "{back:#}");
}

/// One program with three entries: each proxy takes the SVID that its config names and keeps it when it is renewed.
pub async fn several(world: Arc<World>) {
    let folder = world.folder("several");
    let backend = echo().await;
    let own = copy_of(Path::new(program()), &folder, "proxy");
    let go_client = go_program("spiffe-client", &folder, "go-client");
    let caller = world.two.entry("/several/caller", &go_client, &[]).await;
    let mut ids = Vec::new();
    for name in ["red", "green", "blue"] {
        ids.push(world.two.entry(&format!("/several/{name}"), &own, &["-hint", &format!("{name}-hint")]).await);
    }
    let config = |choice: &str| {
        format!(
            "identity:\n  workload_api: {{ address: \"unix://{}\" }}\n{choice}tls: {{ svid_keys: p256-allowed }}\n\
             inbound:\n  - name: api\n    listen: 127.0.0.1:0\n    to: {}\n    allow: [{caller}]\n",
            world.two.socket().display(),
            backend.address
        )
    };
    let by_id = proxy(&folder, &own, "by-id", &config(&format!("  spiffe_id: {}\n", ids[1]))).await;
    let by_hint = proxy(&folder, &own, "by-hint", &config("  hint: blue-hint\n")).await;
    let first = proxy(&folder, &own, "first", &config("")).await;
    let nobody = proxy(&folder, &own, "nobody", &config("  hint: white-hint\n")).await;
    let chosen = [(&by_id, ids[1].as_str()), (&by_hint, ids[2].as_str())];
    for (proxy, id) in chosen {
        ready(proxy).await;
        let to = proxy.address("api").await.to_string();
        let mut client = go(&go_client, &world.two, &["-addr", &to, "-expect", id, "-timeout", "25s"]);
        let seen = event(&mut client, "connection").await;
        assert_eq!((&seen["ok"], &seen["peer"]), (&true.into(), &id.into()), "{seen:#}");
    }
    ready(&first).await;
    let taken = first.state().await["identity"]["spiffe_id"].as_str().unwrap().to_owned();
    assert!(ids.contains(&taken), "{taken}");
    let none = within(SLOW, "all three to be named", &nobody, |state| {
        let why = state["identity"]["why"].as_str().unwrap().to_owned();
        let all =
            ["red", "green", "blue"].iter().all(|name| why.contains(&format!("/several/{name} (hint '{name}-hint')")));
        async move { all.then_some((state["ready"].clone(), why)) }
    })
    .await;
    assert!(none.0 == false && none.1.contains("no SVID with hint 'white-hint'"), "{none:?}");
    // What was chosen stays chosen.
    for (proxy, id) in chosen.into_iter().chain([(&first, taken.as_str())]) {
        let renewed = identity(proxy, SLOW, "a rotation", |i| i["counters"]["rotations"].as_u64() >= Some(1)).await;
        assert_eq!(renewed["spiffe_id"], id, "{renewed:#}");
        assert_eq!(renewed["counters"]["withdrawn"], 0, "{renewed:#}");
    }
}
