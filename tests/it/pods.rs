//! A workload that remembers who spoke to it; and that pods, wires and taps are what other tests take them for.
#![allow(dead_code)]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::{Domain, Running, exchange, succeeds, until};
use crate::netns::{APPLICATION, Net, PROXY, Pod, ROOT};

/// A connection as the workload saw it.
#[derive(Clone, Debug)]
pub struct Met {
    /// Who it came from.
    pub peer: SocketAddr,
    /// Which address of the workload it was for.
    pub local: SocketAddr,
    pub heard: Vec<u8>,
}

/// An echo server in a pod, as the application's user.
pub struct Workload {
    pub address: SocketAddr,
    met: Arc<Mutex<Vec<Met>>>,
}

impl Workload {
    pub async fn start(pod: &Pod, at: impl Into<SocketAddr>) -> Self {
        let listener = pod.listen(APPLICATION, at.into()).await;
        let (address, met) = (listener.local_addr().unwrap(), Arc::<Mutex<Vec<Met>>>::default());
        tokio::spawn(Self::serve(listener, Arc::clone(&met)));
        Self { address, met }
    }

    async fn serve(listener: TcpListener, met: Arc<Mutex<Vec<Met>>>) {
        while let Ok((stream, peer)) = listener.accept().await {
            let local = stream.local_addr().unwrap();
            let number = {
                let mut met = met.lock().unwrap();
                met.push(Met { peer, local, heard: Vec::new() });
                met.len() - 1
            };
            tokio::spawn(Self::answer(stream, Arc::clone(&met), number));
        }
    }

    async fn answer(mut stream: TcpStream, met: Arc<Mutex<Vec<Met>>>, number: usize) {
        let mut bytes = vec![0; 1 << 16];
        while let Ok(length @ 1..) = stream.read(&mut bytes).await {
            met.lock().unwrap()[number].heard.extend_from_slice(&bytes[..length]);
            if stream.write_all(&bytes[..length]).await.is_err() {
                return;
            }
        }
        let _ = stream.shutdown().await;
    }

    /// All connections so far.
    pub fn met(&self) -> Vec<Met> {
        self.met.lock().unwrap().clone()
    }

    /// The connection on which this was heard.
    pub async fn heard(&self, marker: &[u8]) -> Met {
        let found = |met: &Met| memchr::memmem::find(&met.heard, marker).is_some();
        until("the workload to hear of it", || async { self.met().into_iter().find(found) }).await
    }

    /// Whether it has heard this.
    pub fn has_heard(&self, marker: &[u8]) -> bool {
        self.met().iter().any(|met| memchr::memmem::find(&met.heard, marker).is_some())
    }
}

/// A text that occurs nowhere else.
pub fn marker(what: &str) -> Vec<u8> {
    format!("<secret {what} {:016x}>", fastrand::u64(..)).into_bytes()
}

#[tokio::test]
async fn without_rules_pods_talk_in_clear_and_the_tap_sees_it() {
    let Some(net) = Net::new() else { return };
    let (client, server) = (net.pod("client").await, net.pod("server").await);
    let wire = net.wire().await;
    for address in server.at(8080) {
        let workload = Workload::start(&server, address).await;
        let marker = marker("in clear");
        let mut stream = client.connect(APPLICATION, address).await.unwrap();
        exchange(&mut stream, &marker).await.unwrap();
        let met = workload.heard(&marker).await;
        assert_eq!((met.local, met.peer), (address, stream.local_addr().unwrap()));
        assert!(wire.saw(&marker).await, "{address}");
        assert!(wire.bytes_to(address.ip()).await >= marker.len());
    }
    assert!(!wire.saw(&marker("never sent")).await);
}

#[tokio::test]
async fn the_tap_finds_what_is_spread_over_segments() {
    let Some(net) = Net::new() else { return };
    let (client, server) = (net.pod("client").await, net.pod("server").await);
    let wire = net.wire().await;
    let [address, _] = server.at(8080);
    let workload = Workload::start(&server, address).await;
    let marker = marker("a byte at a time");
    let mut stream = client.connect(APPLICATION, address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    for byte in &marker {
        exchange(&mut stream, &[*byte]).await.unwrap();
    }
    workload.heard(&marker).await;
    assert!(wire.saw(&marker).await);
}

#[tokio::test]
async fn sidecars_in_pods_seal_what_the_wire_carries() {
    let Some(net) = Net::new() else { return };
    let (client, server) = (net.pod("client").await, net.pod("server").await);
    let wire = net.wire().await;
    let domain = Domain::new("a.example");
    let workload = Workload::start(&server, ([127, 0, 0, 1], 8080)).await;
    let inbound = format!(
        "{}inbound:\n  - {{ name: in, listen: '{}:8443', to: '127.0.0.1:8080', allow: ['{}'] }}\n",
        domain.identity("/server"),
        server.v4,
        domain.id("/client")
    );
    let outbound = format!(
        "{}outbound:\n  - {{ name: out, listen: '127.0.0.1:9001', to: '{}:8443', expect: '{}' }}\n",
        domain.identity("/client"),
        server.v4,
        domain.id("/server")
    );
    let behind = server.proxy(&domain, &inbound).await;
    let before = client.proxy(&domain, &outbound).await;
    behind.ready().await;
    before.ready().await;
    let marker = marker("sealed");
    let mut stream = client.connect(APPLICATION, ([127, 0, 0, 1], 9001).into()).await.unwrap();
    exchange(&mut stream, &marker).await.unwrap();
    workload.heard(&marker).await;
    wire.only_sealed(server.v4.into(), &marker).await;
    // Without any privilege, and in its sandbox, it still tells of itself.
    let metrics = behind.metrics().await;
    for figure in ["resident_memory_bytes", "open_fds", "cpu_seconds_total"] {
        assert!(metrics.sum(&format!("portcullis_process_{figure}"), &[]) > 0.0, "{figure}");
    }
    drop(stream);
    assert!(before.stop().await.success());
    assert!(behind.stop().await.success());
}

#[tokio::test]
async fn users_of_a_pod_are_who_they_say() {
    let Some(net) = Net::new() else { return };
    let pod = net.pod("pod").await;
    for uid in [ROOT, APPLICATION, PROXY] {
        let said = succeeds(pod.command(uid, "id").arg("-u"), "").await;
        assert_eq!(said.trim(), uid.to_string());
        let listener = pod.listen(uid, (pod.v4, 0).into()).await;
        // The kernel's own word on whose socket it is, which rules go by.
        let port = format!(":{:04X} ", listener.local_addr().unwrap().port());
        let sockets = pod.run(ROOT, || std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap()).await;
        let line = sockets.lines().find(|line| line.contains(&port)).unwrap_or_else(|| panic!("{port}{sockets}"));
        assert_eq!(line.split_whitespace().nth(7), Some(uid.to_string().as_str()), "{line}");
    }
    let capabilities = succeeds(pod.command(APPLICATION, "grep").args(["Cap", "/proc/self/status"]), "").await;
    for kind in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(capabilities.contains(&format!("{kind}:\t0000000000000000")), "{capabilities}");
    }
}

#[tokio::test]
async fn a_pod_is_alone_with_its_ports_and_its_programs_end_with_the_test() {
    let Some(net) = Net::new() else { return };
    let (one, two) = (net.pod("one").await, net.pod("two").await);
    let everywhere: SocketAddr = ([0, 0, 0, 0], 8080).into();
    let _both = (one.listen(APPLICATION, everywhere).await, two.listen(APPLICATION, everywhere).await);
    let mut running =
        Running::start(one.command(APPLICATION, "sh").args(["-c", "echo up; exec cat /dev/zero >/dev/null"]));
    running.line("it runs", |line| (line == "up").then_some(())).await;
    let id = running.child.id().unwrap();
    drop((running, one, two, net));
    until("the program to end", || async {
        let ended = std::fs::read_to_string(format!("/proc/{id}/stat")).map_or(true, |stat| stat.contains(") Z "));
        ended.then_some(())
    })
    .await;
}
