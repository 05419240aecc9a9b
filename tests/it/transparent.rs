//! Transparent interception as applications know it: they know nothing of it. Real clients and servers in pods, each
//! behind a sidecar, and every exemption from the rules.

use std::net::SocketAddr;
use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::agent::go_path;
use crate::harness::{Proxy, Running, exchange, field, soon, succeeds, tool, until};
use crate::mesh::{BACKENDS, Extra, Mesh, PORT, Pods, both};
use crate::netns::{APPLICATION, PROXY, Pod, ROOT, within_reach};
use crate::pods::{Workload, marker};
use crate::postgres::{OWNER, Postgres, postgres_tool, psql_by};

const HTTP: &str = "protocol: http";

#[tokio::test]
async fn neither_application_knows_and_nothing_is_in_clear() {
    let Some(pods) = Pods::new() else { return };
    let mesh = pods.await.joined(Extra::default()).await;
    for workload in both(&mesh.server, PORT).await {
        mesh.sealed(&mesh.client, workload.address, &workload).await;
        let met = &workload.met()[0];
        assert_eq!(met.peer.ip(), workload.address.ip(), "the sidecar speaks from the pod's own address");
    }
    let identity = [("direction", "inbound"), ("version", "TLSv1.3")];
    assert_eq!(mesh.behind.metrics().await.sum("portcullis_tls_negotiated_total", &identity), 2.0);
    let Mesh { before, behind, .. } = mesh;
    assert!(before.stop().await.success());
    assert!(behind.stop().await.success());
}

#[tokio::test]
async fn curl_unmodified() {
    let Some(pods) = Pods::new() else { return };
    let mesh = pods.await.joined(Extra { api: HTTP, records: HTTP, ..Extra::default() }).await;
    let dir = mesh.domain.path();
    let server = within_reach(&go_path("http-peer"), dir);
    let curl = within_reach(&tool("PORTCULLIS_TEST_CURL", "curl"), dir);
    for at in mesh.server.at(PORT) {
        let _origin = go_server_in(&mesh.server, &server, &["server", "-listen", &at.to_string()]).await;
        let marker = String::from_utf8(marker("curl")).unwrap();
        let url = format!("http://{at}/seen");
        let mut command = mesh.client.command(APPLICATION, &curl);
        command.args(["-q", "-sS", "--noproxy", "*", "-m", "20", "-w", "\n%{http_code}", "-d", &marker, &url]);
        let said = succeeds(&mut command, "").await;
        let (body, status) = said.rsplit_once('\n').unwrap();
        assert_eq!(status, "200", "{said}");
        assert!(body.contains(&at.to_string()), "the server sees the host that was asked for: {said}");
        mesh.wire.only_sealed(at.ip(), marker.as_bytes()).await;
    }
}

#[tokio::test]
async fn psql_unmodified() {
    let Some(pods) = Pods::new() else { return };
    let mesh = pods.await.joined(Extra::default()).await;
    let addresses = format!("{},{}", mesh.server.v4, mesh.server.v6);
    let postgres = Postgres::start_by(|program| mesh.server.command(OWNER, program), &addresses, PORT).await;
    for at in mesh.server.at(PORT) {
        let marker = String::from_utf8(marker("psql")).unwrap();
        let psql = |sql: String| {
            let command = mesh.client.command(APPLICATION, postgres_tool("psql"));
            async move { psql_by(command, &at.ip().to_string(), PORT, &sql, "").await }
        };
        psql(format!("CREATE TABLE t{} AS SELECT '{marker}' AS secret", usize::from(at.is_ipv6()))).await;
        let said = psql(format!("SELECT secret, inet_server_addr() FROM t{}", usize::from(at.is_ipv6()))).await;
        // The server itself says at which of its addresses it was called.
        assert_eq!(said.trim(), format!("{marker}|{}", at.ip()));
        mesh.wire.only_sealed(at.ip(), marker.as_bytes()).await;
    }
    postgres.stop().await;
}

#[tokio::test]
async fn grpc_go_unmodified() {
    let Some(pods) = Pods::new() else { return };
    let mesh = pods.await.joined(Extra { api: HTTP, records: HTTP, ..Extra::default() }).await;
    let dir = mesh.domain.path();
    let server = within_reach(&go_path("grpc-interop-server"), dir);
    let client = within_reach(&go_path("grpc-interop-client"), dir);
    for at in mesh.server.at(PORT) {
        let _origin = go_server_in(&mesh.server, &server, &["-listen", &at.to_string()]).await;
        let mut command = mesh.client.command(APPLICATION, &client);
        let lines = crate::pair::all_well(command.args(["-to", &at.to_string(), "-cases", "all"])).await;
        let passed = lines.iter().filter(|line| line["event"] == "passed").count();
        assert_eq!(passed, crate::grpc::CASES.len(), "{lines:?}");
        // The method's name stands in the request in clear, where it is not sealed.
        mesh.wire.only_sealed(at.ip(), b"/grpc.testing.TestService/").await;
        mesh.wire.only_sealed(at.ip(), b"PRI * HTTP/2.0").await;
    }
}

/// A server of tests/go in a pod, as the application.
async fn go_server_in(pod: &Pod, program: &Path, arguments: &[&str]) -> Running {
    let mut running = Running::start(pod.command(APPLICATION, program).args(arguments));
    running.line("where the server listens", |line| field(line, "listening")).await;
    running
}

#[tokio::test]
async fn a_port_that_is_bound_to_localhost_stays_private() {
    let Some(pods) = Pods::new() else { return };
    let mut mesh = pods.await.joined(Extra::default()).await;
    let private: [SocketAddr; 2] = [([127, 0, 0, 1], PORT).into(), (std::net::Ipv6Addr::LOCALHOST, PORT).into()];
    let workloads = [Workload::start(&mesh.server, private[0]).await, Workload::start(&mesh.server, private[1]).await];
    for to in mesh.server.at(PORT) {
        if let Ok(mut stream) = mesh.client.connect(APPLICATION, to).await {
            assert!(exchange(&mut stream, b"is anybody there").await.is_err(), "{to}");
        }
        let record = mesh.behind.ended("unreachable").await;
        assert_eq!(record["upstream"], to.to_string(), "{record}");
    }
    for workload in &workloads {
        assert!(workload.met().is_empty(), "{}", workload.address);
        // From within it is reached as ever.
        let mut stream = mesh.server.connect(APPLICATION, workload.address).await.unwrap();
        exchange(&mut stream, b"hello").await.unwrap();
    }
}

#[tokio::test]
async fn who_and_what_is_exempt_passes_uncaptured_and_nothing_else_does() {
    for rules in BACKENDS {
        const SKIPPED_USER: u32 = 2001;
        const SKIPPED_GROUP: u32 = 2002;
        const SKIPPED_PORT: u16 = 9000;
        let Some(pods) = Pods::ruled_by(rules) else { return };
        let pods = pods.await;
        let friend = pods.net.pod("friend").await;
        let outbound = format!(
            "skip_uids: [{SKIPPED_USER}], skip_gids: [{SKIPPED_GROUP}], skip_ports: [{SKIPPED_PORT}], skip_destinations: ['{}', '{}/128']",
            friend.v4, friend.v6
        );
        let inbound = format!("skip_ports: [{SKIPPED_PORT}], skip_sources: ['{}/32', '{}']", friend.v4, friend.v6);
        let mesh = pods.joined(Extra { inbound: &inbound, outbound: &outbound, ..Extra::default() }).await;
        let (client, stranger) = (&mesh.client, &mesh.stranger);
        let at_server = both(&mesh.server, PORT).await;
        let at_stranger = both(stranger, PORT + 1).await;
        let at_friend = both(&friend, PORT + 1).await;
        let skipped_there = both(stranger, SKIPPED_PORT).await;
        let skipped_here = both(&mesh.server, SKIPPED_PORT).await;
        for n in [0, 1] {
            // Outbound: the proxy's user, a skipped one, a skipped group, a port, a network.
            mesh.in_clear(client, PROXY, at_stranger[n].address, &at_stranger[n]).await;
            mesh.in_clear(client, SKIPPED_USER, at_stranger[n].address, &at_stranger[n]).await;
            mesh.in_clear(client, SKIPPED_GROUP, at_stranger[n].address, &at_stranger[n]).await;
            mesh.in_clear(client, APPLICATION, skipped_there[n].address, &skipped_there[n]).await;
            mesh.in_clear(client, APPLICATION, at_friend[n].address, &at_friend[n]).await;
            for uid in [APPLICATION, ROOT] {
                refused(client, uid, at_stranger[n].address).await;
            }
            // Inbound: a port, a network of clients.
            mesh.in_clear(stranger, APPLICATION, skipped_here[n].address, &skipped_here[n]).await;
            mesh.in_clear(&friend, APPLICATION, at_server[n].address, &at_server[n]).await;
            refused(stranger, APPLICATION, at_server[n].address).await;
        }
        // Loopback is nobody's business, in any pod, at any of its addresses.
        for pod in [client, &mesh.server] {
            for to in ["127.0.0.1:8089", "127.9.9.9:8089", "[::1]:8089"] {
                let workload = Workload::start(pod, to.parse::<SocketAddr>().unwrap()).await;
                let mut stream = pod.connect(APPLICATION, workload.address).await.unwrap();
                exchange(&mut stream, b"to myself").await.unwrap();
                assert_eq!(workload.met()[0].peer, stream.local_addr().unwrap(), "{to}");
            }
        }
        // And none of it has come by the proxies.
        for proxy in [&mesh.before, &mesh.behind] {
            assert_eq!(proxy.metrics().await.sum("portcullis_connections_total", &[("cause", "done")]), 0.0);
        }
    }
}

async fn refused(from: &Pod, uid: u32, to: SocketAddr) {
    if let Ok(mut stream) = from.connect(uid, to).await {
        assert!(exchange(&mut stream, b"hello").await.is_err(), "{uid} of {} to {to}", from.name);
    }
}

#[tokio::test]
async fn a_service_that_calls_its_own_address_meets_the_inbound_policy() {
    for rules in BACKENDS {
        let Some(pods) = Pods::ruled_by(rules) else { return };
        let mesh = pods.await.joined(Extra::default()).await;
        let workloads = both(&mesh.server, PORT).await;
        for workload in &workloads {
            refused(&mesh.server, APPLICATION, workload.address).await;
            assert!(workload.met().is_empty(), "only the client's identity is allowed");
        }
        let (own, client) = (mesh.domain.id("/server"), mesh.domain.id("/client"));
        let config = mesh.server_config(Extra::default());
        let config = config.replace(&format!("allow: ['{client}']"), &format!("allow: ['{client}', '{own}']"));
        mesh.behind.reloaded(&config).await;
        for workload in &workloads {
            let mut stream = mesh.server.connect(APPLICATION, workload.address).await.unwrap();
            exchange(&mut stream, b"to myself").await.unwrap();
            assert_eq!(workload.met().len(), 1);
        }
    }
}

#[tokio::test]
async fn connections_are_held_until_the_identity_is_there() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.await;
    let (server_config, client_config) = (pods.server_config(Extra::default()), pods.client_config(Extra::default()));
    pods.apply(&pods.server, &server_config).await;
    pods.apply(&pods.client, &client_config).await;
    let withheld = ["server.key", "client.key"].map(|name| pods.domain.path().join(name));
    for key in &withheld {
        std::fs::rename(key, key.with_extension("withheld")).unwrap();
    }
    let workload = Workload::start(&pods.server, pods.server.at(PORT)[0]).await;
    let behind = pods.server.proxy(&pods.domain, &server_config).await;
    let before = pods.client.proxy(&pods.domain, &client_config).await;
    let mut stream = pods.client.connect(APPLICATION, workload.address).await.unwrap();
    let marker = marker("held");
    stream.write_all(&marker).await.unwrap();
    let taken = async |proxy: &Proxy, direction| {
        proxy.metrics().await.sum("portcullis_connections_open", &[("direction", direction)]) == 1.0
    };
    until("the connection to be held", || async { taken(&before, "outbound").await.then_some(()) }).await;
    assert_eq!((before.get("/readyz").await.0, behind.get("/readyz").await.0), (503, 503));
    let give = |key: &std::path::PathBuf| std::fs::rename(key.with_extension("withheld"), key).unwrap();
    // The client's sidecar can speak now, and the server's cannot: it holds as well.
    give(&withheld[1]);
    until("the connection to be held there", || async { taken(&behind, "inbound").await.then_some(()) }).await;
    assert!(workload.met().is_empty() && !pods.wire.saw(&marker).await);
    give(&withheld[0]);
    let mut back = vec![0; marker.len()];
    soon("the echo", stream.read_exact(&mut back)).await.unwrap();
    assert_eq!(back, marker);
    pods.wire.only_sealed(workload.address.ip(), &marker).await;
}
