//! Every way round the gate that a program without privileges has, from inside and from outside. Each is first seen to
//! work where there are no rules, so that none of them proves nothing.

use std::net::SocketAddr;

use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::attempts::{ALL, attempt};
use crate::client::{client_hello, echoed, presenting};
use crate::harness::{exchange, soon, succeeds, until};
use crate::mesh::{BACKENDS, CAPTURE_PORTS, Extra, Mesh, PORT, Pods, both};
use crate::netns::{APPLICATION, Pod, ROOT};
use crate::pods::{Workload, marker};

/// A port that no config names.
const UNDECLARED: u16 = 5555;

/// Tries all ways at once, and holds that none of them brought anything to the workloads or onto the wire.
async fn nothing_gets_through(pods: &Pods, from: &Pod, to: &[SocketAddr], workloads: &[Workload]) {
    let met = || workloads.iter().map(|workload| workload.met().len()).sum::<usize>();
    let before = met();
    let tries = to.iter().flat_map(|to| ALL.map(|(name, way)| (*to, name, way)));
    join_all(tries.map(|(to, name, way)| async move {
        let marker = marker(name);
        let answer = attempt(from, way, to, &marker).await;
        assert!(answer.is_err(), "{name} to {to}: {answer:?}");
        assert!(!workloads.iter().any(|workload| workload.has_heard(&marker)), "{name} to {to}");
        // A stranger may say in clear what it wants to.
        assert!(from.name == "stranger" || !pods.wire.saw(&marker).await, "{name} to {to} was seen in clear");
    }))
    .await;
    assert_eq!(before, met(), "a workload was reached");
}

#[tokio::test]
async fn without_rules_every_attempt_arrives_in_clear() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.await;
    let workloads = both(&pods.stranger, UNDECLARED).await;
    for workload in &workloads {
        for (name, way) in ALL {
            let marker = marker(name);
            let answer = attempt(&pods.client, way, workload.address, &marker).await;
            assert_eq!(answer.ok().as_ref(), Some(&marker), "{name} to {}", workload.address);
            assert!(workload.has_heard(&marker) && pods.wire.saw(&marker).await, "{name}");
        }
    }
}

#[tokio::test]
async fn no_attempt_from_inside_leaves_in_clear() {
    for rules in BACKENDS {
        let Some(pods) = Pods::ruled_by(rules) else { return };
        let mesh = pods.await.joined(Extra::default()).await;
        // The ports of the proxy are nobody's at other hosts, and no way out.
        let (mut targets, mut workloads) = (Vec::new(), Vec::new());
        for port in [UNDECLARED].into_iter().chain(CAPTURE_PORTS) {
            targets.extend(mesh.stranger.at(port));
            workloads.extend(both(&mesh.stranger, port).await);
        }
        nothing_gets_through(&mesh, &mesh.client, &targets, &workloads).await;
    }
}

#[tokio::test]
async fn every_attempt_to_a_declared_destination_goes_by_mtls_or_not_at_all() {
    for rules in BACKENDS {
        let Some(pods) = Pods::ruled_by(rules) else { return };
        let mesh = pods.await.joined(Extra::default()).await;
        for workload in both(&mesh.server, PORT).await {
            let arrived = join_all(ALL.map(|(name, way)| {
                let (mesh, workload) = (&mesh, &workload);
                async move {
                    let marker = marker(name);
                    let answer = attempt(&mesh.client, way, workload.address, &marker).await;
                    assert_eq!(answer.is_ok(), workload.has_heard(&marker), "{name} to {}", workload.address);
                    assert!(!mesh.wire.saw(&marker).await, "{name} to {} was seen in clear", workload.address);
                    answer.is_ok()
                }
            }))
            .await;
            assert!(arrived[0], "the plain way is carried");
        }
    }
}

#[tokio::test]
async fn no_attempt_from_outside_reaches_the_workload() {
    for rules in BACKENDS {
        let Some(pods) = Pods::ruled_by(rules) else { return };
        let mesh = pods.await.joined(Extra::default()).await;
        let (mut targets, mut workloads) = (Vec::new(), Vec::new());
        for port in [PORT, UNDECLARED] {
            targets.extend(mesh.server.at(port));
            workloads.extend(both(&mesh.server, port).await);
        }
        nothing_gets_through(&mesh, &mesh.stranger, &targets, &workloads).await;
        // A peer with an identity does reach it, at the port that is declared.
        let good = presenting(&mesh.domain.ca, Some(mesh.domain.ca.svid("/client").into()));
        for to in mesh.server.at(PORT) {
            echoed(mesh.stranger.connect(APPLICATION, to).await.unwrap(), &good).await.unwrap();
        }
        for to in mesh.server.at(UNDECLARED) {
            let stream = mesh.stranger.connect(APPLICATION, to).await;
            if let Ok(stream) = stream {
                assert!(echoed(stream, &good).await.is_err(), "{to} is not declared");
            }
        }
    }
}

#[tokio::test]
async fn the_proxys_own_ports_are_no_way_in_or_out() {
    let Some(pods) = Pods::new() else { return };
    let mesh = pods.await.joined(Extra::default()).await;
    let good = presenting(&mesh.domain.ca, Some(mesh.domain.ca.svid("/client").into()));
    for port in CAPTURE_PORTS {
        // From outside, by its address; from inside, by loopback and by its address.
        let [v4, v6] = mesh.server.at(port);
        let loopback: [SocketAddr; 2] = [([127, 0, 0, 1], port).into(), (std::net::Ipv6Addr::LOCALHOST, port).into()];
        for (from, to) in [
            (&mesh.stranger, v4),
            (&mesh.stranger, v6),
            (&mesh.server, v4),
            (&mesh.server, v6),
            (&mesh.server, loopback[0]),
            (&mesh.server, loopback[1]),
        ] {
            let refused = match from.connect(APPLICATION, to).await {
                Ok(mut stream) => exchange(&mut stream, b"hello").await.is_err(),
                Err(_) => true,
            };
            assert!(refused, "{} to {to}", from.name);
            let stream = from.connect(APPLICATION, to).await;
            if let Ok(stream) = stream {
                assert!(echoed(stream, &good).await.is_err(), "{} to {to} with TLS", from.name);
            }
        }
    }
    mesh.behind.metric_reaches("portcullis_connections_total", &[("cause", "not_captured")], 1.0).await;
    // No loop: the proxy is idle again, and serves.
    until("the proxy to be idle", || async {
        (mesh.behind.metrics().await.sum("portcullis_connections_open", &[]) == 0.0).then_some(())
    })
    .await;
    let workload = Workload::start(&mesh.server, mesh.server.at(PORT)[0]).await;
    mesh.sealed(&mesh.client, workload.address, &workload).await;
}

#[tokio::test]
async fn an_alias_on_the_loopback_interface_is_no_way_in() {
    let Some(pods) = Pods::new() else { return };
    let mesh = pods.await.joined(Extra::default()).await;
    mesh.server.ip("addr add 10.99.0.1/32 dev lo\naddr add fd00:99::1/128 dev lo nodad\n").unwrap();
    mesh.stranger
        .ip(&format!(
            "route add 10.99.0.1/32 via {}\nroute add fd00:99::1/128 via {}\n",
            mesh.server.v4, mesh.server.v6
        ))
        .unwrap();
    let aliases: [SocketAddr; 2] = ["10.99.0.1:8080".parse().unwrap(), "[fd00:99::1]:8080".parse().unwrap()];
    let mut workloads = Vec::new();
    for alias in aliases {
        workloads.push(Workload::start(&mesh.server, alias).await);
    }
    nothing_gets_through(&mesh, &mesh.stranger, &aliases, &workloads).await;
    // From inside it is no loopback either: undeclared, so refused.
    nothing_gets_through(&mesh, &mesh.server, &aliases, &workloads).await;
}

#[tokio::test]
async fn addresses_of_the_link_are_no_way_round() {
    for rules in BACKENDS {
        let Some(pods) = Pods::ruled_by(rules) else { return };
        let pods = pods.await;
        let [to_stranger, own] = pods.stranger.on_link(UNDECLARED, &pods.client).await;
        let elsewhere = [Workload::start(&pods.stranger, own).await];
        let [to_server, own] = pods.server.on_link(PORT, &pods.stranger).await;
        let workloads = [Workload::start(&pods.server, own).await];
        for (from, to, workload) in [(&pods.client, to_stranger, &elsewhere), (&pods.stranger, to_server, &workloads)] {
            let marker = marker("on the link");
            assert_eq!(attempt(from, ALL[0].1, to, &marker).await.unwrap(), marker);
            assert!(workload[0].has_heard(&marker) && pods.wire.saw(&marker).await);
        }
        let mesh = pods.joined(Extra::default()).await;
        nothing_gets_through(&mesh, &mesh.client, &[to_stranger], &elsewhere).await;
        nothing_gets_through(&mesh, &mesh.stranger, &[to_server], &workloads).await;
        // The application's own pod, called by this address, is undeclared as well.
        nothing_gets_through(&mesh, &mesh.server, &[own], &workloads).await;
    }
}

#[tokio::test]
async fn a_client_hello_in_fragments_is_a_client_hello_and_a_fragment_of_one_is_nothing() {
    let Some(pods) = Pods::new() else { return };
    let mesh = pods.await.joined(Extra::default()).await;
    let good = presenting(&mesh.domain.ca, Some(mesh.domain.ca.svid("/client").into()));
    for workload in both(&mesh.server, PORT).await {
        // Whole, but a byte in each segment: what decides what it is must wait for all of it.
        let mut stream = mesh.stranger.connect(APPLICATION, workload.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        echoed(Trickle(&mut stream), &good).await.unwrap();
        // The beginning of one, and then something else.
        let marker = marker("after a fragment");
        let mut text = client_hello(&good)[..40].to_vec();
        text.extend_from_slice(&marker);
        let met = workload.met().len();
        let mut stream = mesh.stranger.connect(APPLICATION, workload.address).await.unwrap();
        let _ = stream.write_all(&text).await;
        let _ = stream.shutdown().await;
        let mut rest = Vec::new();
        let _ = soon("its end", stream.read_to_end(&mut rest)).await;
        assert!(!workload.has_heard(&marker));
        assert_eq!(workload.met().len(), met, "the workload was not even dialled");
    }
}

/// Writes a byte at a time.
struct Trickle<'a>(&'a mut tokio::net::TcpStream);

impl tokio::io::AsyncRead for Trickle<'_> {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut *self.0).poll_read(context, buffer)
    }
}

impl tokio::io::AsyncWrite for Trickle<'_> {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut *self.0).poll_write(context, &bytes[..bytes.len().min(1)])
    }
    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut *self.0).poll_flush(context)
    }
    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut *self.0).poll_shutdown(context)
    }
}

#[tokio::test]
async fn rules_without_a_proxy_let_nothing_pass() {
    for rules in BACKENDS {
        let Some(pods) = Pods::ruled_by(rules) else { return };
        let pods = pods.await;
        let (server_config, client_config) =
            (pods.server_config(Extra::default()), pods.client_config(Extra::default()));
        pods.apply(&pods.server, &server_config).await;
        pods.apply(&pods.client, &client_config).await;
        let workloads = both(&pods.server, PORT).await;
        let elsewhere = both(&pods.stranger, UNDECLARED).await;
        nothing_gets_through(&pods, &pods.client, &pods.server.at(PORT), &workloads).await;
        nothing_gets_through(&pods, &pods.client, &pods.stranger.at(UNDECLARED), &elsewhere).await;
        nothing_gets_through(&pods, &pods.stranger, &pods.server.at(PORT), &workloads).await;
        // Once the sidecars are there, it passes.
        let behind = pods.server.proxy(&pods.domain, &server_config).await;
        let before = pods.client.proxy(&pods.domain, &client_config).await;
        behind.ready().await;
        before.ready().await;
        for workload in &workloads {
            pods.sealed(&pods.client, workload.address, workload).await;
        }
    }
}

#[tokio::test]
async fn after_the_proxy_was_killed_nothing_passes_in_clear() {
    let Some(pods) = Pods::new() else { return };
    let Mesh { pods, mut before, mut behind } = pods.await.joined(Extra::default()).await;
    let workloads = both(&pods.server, PORT).await;
    let elsewhere = both(&pods.stranger, UNDECLARED).await;
    let mut open = pods.client.connect(APPLICATION, workloads[0].address).await.unwrap();
    exchange(&mut open, b"before").await.unwrap();
    before.running.signal(rustix::process::Signal::KILL);
    before.running.wait().await;
    // What is open ends, and what the application says after that goes nowhere.
    let marker = marker("after the end");
    assert!(exchange(&mut open, &marker).await.is_err());
    assert!(!pods.wire.saw(&marker).await);
    nothing_gets_through(&pods, &pods.client, &pods.server.at(PORT), &workloads).await;
    nothing_gets_through(&pods, &pods.client, &pods.stranger.at(UNDECLARED), &elsewhere).await;
    behind.running.signal(rustix::process::Signal::KILL);
    behind.running.wait().await;
    nothing_gets_through(&pods, &pods.stranger, &pods.server.at(PORT), &workloads).await;
}

#[tokio::test]
async fn transparent_sockets_that_nobody_holds_let_nothing_pass() {
    for rules in BACKENDS {
        let Some(pods) = Pods::ruled_by(rules) else { return };
        let pods = pods.await;
        let workloads = both(&pods.server, PORT).await;
        for mode in ["mode: tproxy", "mode: tproxy, preserve_source: true"] {
            let config = pods.server_config(Extra { inbound: mode, ..Extra::default() });
            pods.apply(&pods.server, &config).await;
            nothing_gets_through(&pods, &pods.stranger, &pods.server.at(PORT), &workloads).await;
        }
        // The rules were what stood in the way.
        pods.remove(&pods.server).await;
        for workload in &workloads {
            pods.in_clear(&pods.stranger, ROOT, workload.address, workload).await;
        }
    }
}

#[tokio::test]
async fn what_somebody_keeps_from_conntrack_does_not_pass() {
    for rules in BACKENDS {
        let Some(pods) = Pods::ruled_by(rules) else { return };
        let mesh = pods.await.joined(Extra::default()).await;
        let elsewhere = both(&mesh.stranger, UNDECLARED).await;
        let workloads = both(&mesh.server, PORT).await;
        let untracked = |hook: &str| {
            let chain = format!("{{ type filter hook {hook} priority -300; }}");
            format!(
                "add table inet somebody_else\nadd chain inet somebody_else c {chain}\n\
             add rule inet somebody_else c meta l4proto tcp notrack\n"
            )
        };
        // No redirect sees such a packet.
        for (pod, hook) in [(&mesh.client, "output"), (&mesh.server, "prerouting")] {
            succeeds(pod.command(ROOT, "nft").args(["-f", "-"]), &untracked(hook)).await;
        }
        nothing_gets_through(&mesh, &mesh.client, &mesh.stranger.at(UNDECLARED), &elsewhere).await;
        nothing_gets_through(&mesh, &mesh.stranger, &mesh.server.at(PORT), &workloads).await;
    }
}
