//! Plaintext past TCP: the kernel's test, what the proxy makes of its verdict, and that bytes arrive which TCP never saw.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

use portcullis::accelerate::programs::Programs;
use portcullis::accelerate::self_test;

use super::gate::{Gate, OwnCgroup};
use crate::harness::{Domain, Proxy, output, program};
use crate::netns::ROOT;

/// A config with nothing in it but this.
fn config(domain: &Domain, accelerate: &str) -> String {
    format!(
        "{}accelerate: {accelerate}\noutbound:\n  - {{ name: out, listen: '127.0.0.1:0', to: '192.0.2.1:8443', expect: '{}' }}\n",
        domain.identity("/client"),
        domain.id("/server")
    )
}

/// What this kernel fails.
fn failed() -> Vec<String> {
    let programs = Programs::load(&[]).unwrap();
    self_test::failed(Some(&programs)).iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn the_state_shows_what_the_kernel_has_failed_and_the_proxy_goes_on_without() {
    let Some((net, _cgroup)) = Gate::net() else { return };
    let pod = net.pod("pod").await;
    let failed = pod.run(ROOT, failed).await;
    let domain = Domain::new("a.example");
    for mode in ["auto", "'off'"] {
        let command = pod.command(ROOT, program());
        let proxy = Proxy::start_within(&pod.namespace, domain.path(), "proxy", &config(&domain, mode), command).await;
        proxy.ready().await;
        let state = proxy.state().await["acceleration"].clone();
        if mode == "auto" {
            assert_eq!(
                (&state["active"], &state["refused"]),
                (&failed.is_empty().into(), &failed.clone().into()),
                "{state}"
            );
        } else {
            assert_eq!((&state["active"], &state["mode"]), (&false.into(), &"off".into()), "{state}");
        }
        assert!(proxy.stop().await.success());
    }
}

#[tokio::test]
async fn require_does_not_run_on_a_kernel_that_fails() {
    let Some((net, _cgroup)) = Gate::net() else { return };
    let pod = net.pod("pod").await;
    let failed = pod.run(ROOT, failed).await;
    let domain = Domain::new("a.example");
    let path = domain.path().join("require.yaml");
    std::fs::write(&path, config(&domain, "require")).unwrap();
    let mut command = pod.command(ROOT, program());
    command.arg("run").arg("--config").arg(&path);
    if failed.is_empty() {
        let command = pod.command(ROOT, program());
        let proxy =
            Proxy::start_within(&pod.namespace, domain.path(), "proxy", &config(&domain, "require"), command).await;
        assert_eq!(proxy.state().await["acceleration"]["active"], true);
        return;
    }
    let output = output(&mut command, "").await;
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("accelerate: require cannot be had") && said.contains(&failed[0]), "{said}");
    assert_eq!(said.trim().lines().count(), 1, "{said}");
}

/// Segments that left this thread's network namespace's TCP.
fn segments() -> u64 {
    let snmp = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
    let mut lines = snmp.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let place = names.split(' ').position(|name| name == "OutSegs").unwrap();
    values.split(' ').nth(place).unwrap().parse().unwrap()
}

/// Sends a thousand messages there and back on a fresh connection. How many segments that took.
fn talk(listener: &TcpListener) -> u64 {
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let before = segments();
    for number in 0..1000_u32 {
        let mut got = [0; 4];
        client.write_all(&number.to_ne_bytes()).unwrap();
        server.read_exact(&mut got).unwrap();
        server.write_all(&got).unwrap();
        client.read_exact(&mut got).unwrap();
        assert_eq!(got, number.to_ne_bytes());
    }
    let took = segments() - before;
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(server.read(&mut [0]).unwrap(), 0);
    took
}

#[tokio::test]
async fn connections_within_the_host_to_ports_of_the_plan_go_past_tcp() {
    let Some((net, cgroup)) = Gate::net() else { return };
    let pod = net.pod("pod").await;
    let opened = cgroup.opened();
    let path = cgroup.0.clone();
    let job = move || {
        OwnCgroup::join(&path);
        let planned = ["127.0.0.1:7001", "[::]:7002"].map(|at| TcpListener::bind(at).unwrap());
        let other = TcpListener::bind("127.0.0.1:7003").unwrap();
        let plain = talk(&planned[0]);
        let attached = Programs::load(&[7001, 7002]).unwrap().attach(&opened).unwrap();
        let accelerated = planned.each_ref().map(talk);
        let (apart, _) = (talk(&other), drop(attached));
        (plain, accelerated, apart, talk(&planned[0]))
    };
    let (plain, [v4, v6], apart, after) = pod.run(ROOT, job).await;
    for segments in [plain, apart, after] {
        assert!(segments >= 2000, "{segments}");
    }
    for segments in [v4, v6] {
        assert!(segments < 100, "{segments}");
    }
}
