//! Rotation under load: two sidecars with SVIDs of four seconds and a CA that is replaced in the middle carry traffic for
//! half a minute, over connections that stay open all the time and over new ones, and not one exchange fails.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use portcullis::authority::{Authority, Options};
use portcullis::clock::Clock;
use portcullis::identity::TrustDomain;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::agent::{Agent, entry, own_uid};
use crate::harness::{Proxy, echo, exchange, soon, until};

/// How long the traffic goes on.
const TRAFFIC: Duration = Duration::from_secs(30);
/// Connections that stay open.
const OLD: usize = 8;
/// Tasks that make new connections, one after the other.
const MAKERS: usize = 4;
/// Between two exchanges, and between two new connections of a task.
const PACE: Duration = Duration::from_millis(10);

/// What was done.
#[derive(Default)]
struct Tally {
    exchanges: AtomicU64,
    connections: AtomicU64,
}

async fn keep_exchanging(address: SocketAddr, tally: Arc<Tally>, stop: watch::Receiver<bool>) -> Result<(), String> {
    let mut stream = TcpStream::connect(address).await.map_err(|error| format!("old, connect: {error}"))?;
    let mut count = 0_u64;
    while !*stop.borrow() {
        let text = format!("exchange {count} of a connection that stays");
        exchange(&mut stream, text.as_bytes()).await.map_err(|error| format!("old, exchange {count}: {error}"))?;
        tally.exchanges.fetch_add(1, Ordering::Relaxed);
        count += 1;
        tokio::time::sleep(PACE).await;
    }
    end_of(stream).await.map_err(|error| format!("old, end after {count}: {error}"))
}

async fn keep_connecting(address: SocketAddr, tally: Arc<Tally>, stop: watch::Receiver<bool>) -> Result<(), String> {
    while !*stop.borrow() {
        let number = tally.connections.fetch_add(1, Ordering::Relaxed);
        let fail = |what: &str, error: std::io::Error| format!("new {number}, {what}: {error}");
        let mut stream = TcpStream::connect(address).await.map_err(|error| fail("connect", error))?;
        exchange(&mut stream, b"hello and good-bye").await.map_err(|error| fail("exchange", error))?;
        end_of(stream).await.map_err(|error| fail("end", error))?;
        tokio::time::sleep(PACE).await;
    }
    Ok(())
}

/// Finishes and wants the other side to finish in order as well.
async fn end_of(mut stream: TcpStream) -> std::io::Result<()> {
    stream.shutdown().await?;
    let mut rest = Vec::new();
    soon("the orderly end", stream.read_to_end(&mut rest)).await?;
    assert!(rest.is_empty(), "{rest:?}");
    Ok(())
}

fn authorities(state: &Value) -> usize {
    state["bundles"][0]["authorities"].as_array().map_or(0, Vec::len)
}

async fn know(proxies: &[&Proxy], count: usize) {
    for proxy in proxies {
        until(&format!("{count} authorities in the bundle"), async || {
            (authorities(&proxy.state().await) == count).then_some(())
        })
        .await;
    }
}

async fn rotations(proxy: &Proxy) -> f64 {
    proxy.metrics().await.sum("portcullis_svid_rotations_total", &[("result", "success")])
}

#[tokio::test]
async fn traffic_goes_on_while_svids_and_the_ca_rotate() {
    let dir = tempfile::tempdir().unwrap();
    let state_dir = dir.path().join("state");
    let server_id = "spiffe://lab.example/server";
    let client_id = "spiffe://lab.example/client";
    let config = format!(
        "trust_domain: lab.example\nstate_dir: {}\nsvid_ttl: 4s\nca_ttl: 1h\nentries:\n{}{}",
        state_dir.display(),
        entry(server_id, &own_uid(), ""),
        entry(client_id, &own_uid(), "")
    );
    let agent = Agent::start(dir.path(), "lab", &config).await;
    // A connection outlives the SVIDs it began with, and goes on: that is what this test is about.
    let keep = "connections: { on_peer_expiry: keep }\n";
    let workload = echo().await;
    let server = format!(
        "{}{keep}inbound:\n  - {{ name: api, listen: \"127.0.0.1:0\", to: \"{}\", allow: [\"{client_id}\"] }}\n",
        agent.identity_with(&format!("spiffe_id: {server_id}")),
        workload.address
    );
    let mut server = Proxy::start(dir.path(), "server", &server).await;
    server.ready().await;
    let client = format!(
        "{}{keep}outbound:\n  - {{ name: up, listen: \"127.0.0.1:0\", to: \"{}\", expect: \"{server_id}\" }}\n",
        agent.identity_with(&format!("spiffe_id: {client_id}")),
        server.address("api").await
    );
    let mut client = Proxy::start(dir.path(), "client", &client).await;
    client.ready().await;
    let address = client.address("up").await;
    let both = [&server, &client];

    let mut before = TcpStream::connect(address).await.unwrap();
    exchange(&mut before, b"under the first CA").await.unwrap();
    let tally = Arc::new(Tally::default());
    let (stop, stopped) = watch::channel(false);
    let mut traffic = JoinSet::new();
    for _ in 0..OLD {
        traffic.spawn(keep_exchanging(address, Arc::clone(&tally), stopped.clone()));
    }
    for _ in 0..MAKERS {
        traffic.spawn(keep_connecting(address, Arc::clone(&tally), stopped.clone()));
    }
    let end = tokio::time::Instant::now() + TRAFFIC;

    // Whoever shares the authority's state directory may rotate its CA: publish the next one, and let it sign when
    // everybody knows it. The running authority takes that over.
    let mut serials: [BTreeSet<String>; 2] = Default::default();
    let operator = {
        let mut options = Options::new(TrustDomain::parse("lab.example").unwrap());
        options.state_dir = Some(state_dir);
        options.ca_ttl = Duration::from_secs(3600);
        options.svid_ttl = Duration::from_secs(4);
        Authority::open(options, Clock::system()).unwrap()
    };
    assert_eq!(operator.published().active_ca(), Some(agent.ca.as_str()));
    let mut rotated_ca = false;
    let mut tick = tokio::time::interval(Duration::from_millis(200));
    let failure = loop {
        tokio::select! {
            ended = traffic.join_next() => break Some(ended),
            () = tokio::time::sleep_until(end) => break None,
            _ = tick.tick() => {
                for (proxy, serials) in both.iter().zip(&mut serials) {
                    serials.insert(proxy.state().await["identity"]["serial"].to_string());
                }
                // After some SVIDs of the first CA, so that the second has its share.
                if !rotated_ca && serials.iter().all(|serials| serials.len() >= 5) {
                    rotated_ca = true;
                    know(&both, 1).await;
                    operator.prepare_ca().unwrap();
                    know(&both, 2).await;
                    operator.activate_ca().unwrap();
                    assert_ne!(operator.published().active_ca(), Some(agent.ca.as_str()));
                    serials.iter_mut().for_each(BTreeSet::clear);
                }
            }
        }
    };
    if let Some(failure) = failure {
        let telling = |line: &&String| !line.contains("connection done");
        let said: Vec<String> = [&mut server, &mut client]
            .iter_mut()
            .flat_map(|p| p.running.heard().iter().filter(telling).cloned())
            .collect();
        panic!("the traffic was interrupted: {failure:?}; the proxies said:\n{}", said.join("\n"));
    }
    let both = [&server, &client];
    stop.send_replace(true);
    let mut failures = Vec::new();
    while let Some(ended) = soon("the end of the traffic", traffic.join_next()).await {
        failures.extend(ended.unwrap().err());
    }
    assert_eq!(failures, Vec::<String>::new());

    // It really happened.
    assert!(rotated_ca, "the CA was not rotated");
    for (proxy, serials) in both.iter().zip(&serials) {
        assert!(rotations(proxy).await >= 8.0, "{}", rotations(proxy).await);
        assert!(serials.len() >= 3, "since the CA was rotated: {serials:?}");
    }
    let (exchanges, connections) = (tally.exchanges.load(Ordering::Relaxed), tally.connections.load(Ordering::Relaxed));
    assert!(exchanges > 1000 && connections > 200, "{exchanges} exchanges, {connections} new connections");
    for (proxy, direction) in both.iter().zip(["inbound", "outbound"]) {
        proxy
            .metric_reaches("portcullis_connections_total", &[("cause", "done")], (connections + OLD as u64) as f64)
            .await;
        let metrics = proxy.metrics().await;
        let all = metrics.sum("portcullis_connections_total", &[("direction", direction)]);
        assert_eq!(all, metrics.sum("portcullis_connections_total", &[("cause", "done")]), "every one ended in order");
        assert_eq!(metrics.sum("portcullis_tls_handshakes_total", &[("result", "failure")]), 0.0);
        assert_eq!(metrics.sum("portcullis_tls_handshakes_total", &[("result", "success")]), all + 1.0);
    }
    // And the second CA is the one that signs: without the first, a connection of today is still good on both sides. One
    // from the beginning has lived as long as its CA was trusted, and no longer.
    exchange(&mut before, b"half a minute later").await.unwrap();
    let mut after = TcpStream::connect(address).await.unwrap();
    exchange(&mut after, b"under the second CA").await.unwrap();
    operator.retire_old_cas(Duration::ZERO).await.unwrap();
    know(&both, 1).await;
    let error = soon("the end of the oldest connection", before.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    exchange(&mut after, b"still under the second CA").await.unwrap();
    let ended = [("cause", "bundle_changed")];
    let mut changed = 0.0;
    for proxy in both {
        changed += proxy.metrics().await.sum("portcullis_connections_total", &ended);
    }
    assert!(changed >= 1.0);
    drop(after);
    agent.stop().await;
}
