//! The rules themselves: applied again, taken away, broken by another hand, beside somebody else's; and what the kernel
//! makes of connections that they have captured.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;

use crate::client::{presenting, server_name};
use crate::harness::{exchange, rest_of, soon, succeeds};
use crate::mesh::{Extra, PORT, Pods, both};
use crate::netns::{APPLICATION, Net, Pod, ROOT};
use crate::pods::marker;

/// Runs nft, which knows nothing of us, in a pod.
async fn nft(pod: &Pod, line: &str) -> String {
    succeeds(pod.command(ROOT, "nft").args(line.split(' ')), "").await
}

/// Somebody else's rules, which must stay as they are.
const FOREIGN: &str = "table inet somebody_else {\n\tchain output {\n\t\ttype filter hook output priority filter; \
                       policy accept;\n\t\ttcp dport 6666 counter packets 0 bytes 0 drop\n\t}\n}\n";

async fn foreign(pod: &Pod) -> String {
    nft(pod, "list table inet somebody_else").await
}

#[tokio::test]
async fn applied_twice_is_applied_once_and_open_connections_live_on() {
    let Some(pods) = Pods::new() else { return };
    let mesh = pods.await.joined(Extra::default()).await;
    let workloads = both(&mesh.server, PORT).await;
    let mut open = Vec::new();
    for workload in &workloads {
        open.push(mesh.client.connect(APPLICATION, workload.address).await.unwrap());
    }
    let configs =
        [(&mesh.client, mesh.client_config(Extra::default())), (&mesh.server, mesh.server_config(Extra::default()))];
    for (pod, config) in &configs {
        let before = nft(pod, "list ruleset").await;
        for _ in 0..3 {
            mesh.apply(pod, config).await;
            assert_eq!(nft(pod, "list ruleset").await, before);
        }
        for stream in &mut open {
            exchange(stream, b"still here").await.unwrap();
        }
    }
    // Other rules take the place of these as a whole, and still nothing is cut.
    for (pod, config) in &configs {
        mesh.apply(pod, &config.replace("outbound: {  }", "outbound: { skip_ports: [9000] }")).await;
        assert!(nft(pod, "list ruleset").await.contains("dport 9000"));
    }
    for (stream, workload) in open.iter_mut().zip(&workloads) {
        exchange(stream, b"still here").await.unwrap();
        assert_eq!(workload.met().len(), 1);
        mesh.sealed(&mesh.client, workload.address, workload).await;
    }
}

#[tokio::test]
async fn removed_rules_leave_nothing_and_somebody_elses_stay() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.await;
    succeeds(pods.client.command(ROOT, "nft").args(["-f", "-"]), FOREIGN).await;
    let theirs = foreign(&pods.client).await;
    let alone = nft(&pods.client, "list ruleset").await;
    let routing = "rule show";
    let rules = async || {
        let mut text = String::new();
        for family in ["-4", "-6"] {
            let mut command = pods.client.command(ROOT, "ip");
            text += &succeeds(command.arg(family).args(routing.split(' ')), "").await;
        }
        text
    };
    let routed = rules().await;
    for inbound in ["", "mode: tproxy", "mode: tproxy, preserve_source: true"] {
        pods.apply(&pods.client, &pods.client_config(Extra { inbound, ..Extra::default() })).await;
        assert_ne!(nft(&pods.client, "list ruleset").await, alone);
        assert_eq!(foreign(&pods.client).await, theirs);
        for _ in 0..2 {
            pods.remove(&pods.client).await;
            assert_eq!(nft(&pods.client, "list ruleset").await, alone, "{inbound}");
            assert_eq!(rules().await, routed, "{inbound}");
        }
    }
    for workload in both(&pods.server, PORT).await {
        pods.in_clear(&pods.client, APPLICATION, workload.address, &workload).await;
    }
}

#[tokio::test]
async fn rules_that_another_hand_has_broken_are_made_whole() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.await;
    let config = pods.client_config(Extra::default());
    pods.apply(&pods.client, &config).await;
    let whole = nft(&pods.client, "list table inet portcullis").await;
    let chains: Vec<String> = whole
        .lines()
        .filter_map(|line| Some(line.trim().strip_prefix("chain ")?.trim_end_matches(" {").to_owned()))
        .collect();
    assert!(chains.len() > 3, "{whole}");
    let elsewhere = both(&pods.stranger, 5555).await;
    for chain in &chains {
        nft(&pods.client, &format!("flush chain inet portcullis {chain}")).await;
        assert_ne!(nft(&pods.client, "list table inet portcullis").await, whole, "{chain}");
        pods.apply(&pods.client, &config).await;
        assert_eq!(nft(&pods.client, "list table inet portcullis").await, whole, "{chain}");
    }
    nft(&pods.client, "insert rule inet portcullis output_nat accept").await;
    for workload in &elsewhere {
        pods.in_clear(&pods.client, APPLICATION, workload.address, workload).await;
    }
    pods.apply(&pods.client, &config).await;
    for workload in &elsewhere {
        assert!(pods.client.connect(APPLICATION, workload.address).await.is_err());
    }
}

/// Sends a datagram and waits for what comes back: an echo, or word that it was refused.
async fn ask(from: &Pod, to: SocketAddr, text: Vec<u8>) -> io::Result<Vec<u8>> {
    let job = move || {
        let own: IpAddr =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((own, 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        socket.send(&text)?;
        let mut back = vec![0; text.len()];
        socket.recv(&mut back)?;
        Ok(back)
    };
    from.run(APPLICATION, job).await
}

/// Echoes datagrams for as long as the test lasts.
async fn udp_echo(pod: &crate::netns::Namespace, at: SocketAddr) {
    let socket = pod.run(ROOT, move || UdpSocket::bind(at)).await.unwrap_or_else(|error| panic!("{at}: {error}"));
    socket.set_nonblocking(true).unwrap();
    let socket = tokio::net::UdpSocket::from_std(socket).unwrap();
    tokio::spawn(async move {
        let mut bytes = vec![0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut bytes).await {
            let _ = socket.send_to(&bytes[..length], from).await;
        }
    });
}

#[tokio::test]
async fn quic_is_refused_at_once_and_questions_to_the_resolver_pass() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.await;
    let (resolver, quic) = (Net::HOST.map(|host| SocketAddr::new(host, 53)), pods.stranger.at(443));
    for at in resolver {
        udp_echo(&pods.net.host, at).await;
    }
    let elsewhere = pods.stranger.at(53);
    let inwards = pods.client.at(443);
    for at in quic.into_iter().chain(elsewhere) {
        udp_echo(&pods.stranger, at).await;
    }
    for at in inwards {
        udp_echo(&pods.client, at).await;
    }
    // Each of them is answered where there are no rules.
    for to in resolver.into_iter().chain(quic).chain(elsewhere) {
        assert_eq!(ask(&pods.client, to, b"hello".to_vec()).await.unwrap(), b"hello", "{to}");
    }
    for to in inwards {
        assert_eq!(ask(&pods.stranger, to, b"hello".to_vec()).await.unwrap(), b"hello", "{to}");
    }
    pods.apply(&pods.client, &pods.client_config(Extra::default())).await;
    for to in resolver {
        assert_eq!(ask(&pods.client, to, b"hello".to_vec()).await.unwrap(), b"hello", "{to}");
    }
    for (from, to) in
        quic.into_iter().chain(elsewhere).map(|to| (&pods.client, to)).chain(inwards.map(|to| (&pods.stranger, to)))
    {
        let marker = marker("datagram");
        let refused = ask(from, to, marker.clone()).await.expect_err("a datagram that passes by the gate");
        // A client of QUIC goes over to TCP at once, if it is told.
        let told = [io::ErrorKind::ConnectionRefused, io::ErrorKind::PermissionDenied];
        assert!(told.contains(&refused.kind()), "{} to {to}: {refused}", from.name);
        assert!(from.name == "stranger" || !pods.wire.saw(&marker).await, "{to}");
    }
    // DNS over TCP goes to the resolver as well, and to nobody else.
    let listener = pods.net.host.listen(ROOT, resolver[0]).await;
    let mut stream = pods.client.connect(APPLICATION, resolver[0]).await.unwrap();
    let (mut served, _) = soon("the question", listener.accept()).await.unwrap();
    stream.write_all(b"?").await.unwrap();
    assert_eq!(served.read_u8().await.unwrap(), b'?');
    assert!(pods.client.connect(APPLICATION, elsewhere[0]).await.is_err());
}

#[tokio::test]
async fn a_half_closed_connection_outlives_the_conntrack_close_wait_time() {
    let Some(pods) = Pods::new() else { return };
    let mesh = pods.await.joined(Extra::default()).await;
    for pod in [&mesh.client, &mesh.server] {
        for state in ["close_wait", "fin_wait", "last_ack"] {
            pod.sysctl(&format!("net/netfilter/nf_conntrack_tcp_timeout_{state}"), "1").await;
        }
    }
    for address in mesh.server.at(PORT) {
        let listener = mesh.server.listen(APPLICATION, address).await;
        let mut stream = mesh.client.connect(APPLICATION, address).await.unwrap();
        let (mut workload, _) = soon("the connection", listener.accept()).await.unwrap();
        stream.write_all(b"a question").await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(rest_of(&mut workload).await.unwrap(), b"a question");
        // Longer than the system gives such a connection. This is about time itself: there is no state to wait for.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        workload.write_all(b"a late answer").await.unwrap();
        drop(workload);
        assert_eq!(rest_of(&mut stream).await.unwrap(), b"a late answer", "{address}");
    }
}

/// A TCP segment with these numbers and this text.
fn segment(from: SocketAddr, to: SocketAddr, sequence: u32, acknowledged: u32, text: &[u8]) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(from.port().to_be_bytes());
    tcp.extend(to.port().to_be_bytes());
    tcp.extend(sequence.to_be_bytes());
    tcp.extend(acknowledged.to_be_bytes());
    // Five words of header; PSH and ACK; window; check sum to come; nothing urgent.
    tcp.extend([0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0]);
    tcp.extend(text);
    let mut pseudo = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
        (IpAddr::V6(from), IpAddr::V6(to)) => [from.octets(), to.octets()].concat(),
        _ => panic!("{from} to {to}"),
    };
    pseudo.extend(u32::try_from(tcp.len()).unwrap().to_be_bytes());
    pseudo.extend([0, 0, 0, 6]);
    let sum: u32 = [&pseudo[..], &tcp[..]]
        .concat()
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let check = !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap();
    tcp[16..18].copy_from_slice(&check.to_be_bytes());
    tcp
}

#[tokio::test]
async fn a_segment_outside_the_window_does_not_reset_a_captured_connection() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.await;
    // Where outbound traffic is captured as well, another rule keeps the reset from leaving.
    let config = format!(
        "{}intercept: {{ inbound: {{}} }}\ninbound: [{{ name: api, capture: [{PORT}], allow: ['{}'] }}]\n",
        pods.domain.identity("/server"),
        pods.domain.id("/client")
    );
    pods.apply(&pods.server, &config).await;
    let behind = pods.server.proxy(&pods.domain, &config).await;
    behind.ready().await;
    let good = presenting(&pods.domain.ca, Some(pods.domain.ca.svid("/client").into()));
    for workload in both(&pods.server, PORT).await {
        let to = workload.address;
        let stream = pods.stranger.connect(APPLICATION, to).await.unwrap();
        let from = stream.local_addr().unwrap();
        let mut stream = TlsConnector::from(good.clone()).connect(server_name(), stream).await.unwrap();
        let mut talk = async |text: &[u8]| {
            stream.write_all(text).await?;
            stream.flush().await?;
            let mut back = vec![0; text.len()];
            soon("the echo", stream.read_exact(&mut back)).await.map(|_| back)
        };
        assert_eq!(talk(b"before").await.unwrap(), b"before");
        let marker = marker("stray");
        // Far outside the window, but it acknowledges what was sent: a reset in answer to it would be believed.
        let sequence = pods.wire.next_sequence(from, to).await.wrapping_add(1 << 30);
        let stray = segment(from, to, sequence, pods.wire.next_sequence(to, from).await, &marker);
        let send = move || {
            let socket = Socket::new(Domain::for_address(to), Type::RAW, Some(Protocol::TCP))?;
            // A raw socket has no port.
            socket.send_to(&stray, &SocketAddr::new(to.ip(), 0).into())
        };
        pods.stranger.run(ROOT, send).await.unwrap();
        assert!(pods.wire.saw(&marker).await, "it has been on its way");
        assert_eq!(talk(b"after").await.unwrap(), b"after", "{to}");
        assert!(!pods.wire.was_reset(to, from).await, "{to}");
        assert!(!workload.has_heard(&marker));
    }
}

#[tokio::test]
async fn transparent_sockets_carry_what_redirects_carry_and_may_keep_the_clients_address() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.await;
    let workloads = both(&pods.server, PORT).await;
    let client_config = pods.client_config(Extra::default());
    pods.apply(&pods.client, &client_config).await;
    let before = pods.client.proxy(&pods.domain, &client_config).await;
    before.ready().await;
    for (mode, keeps) in [("mode: tproxy", false), ("mode: tproxy, preserve_source: true", true)] {
        let config = pods.server_config(Extra { inbound: mode, ..Extra::default() });
        pods.apply(&pods.server, &config).await;
        let behind = pods.server.proxy_with(&pods.domain, &config, &["net_admin"]).await;
        behind.ready().await;
        for workload in &workloads {
            let calls = workload.met().len();
            pods.sealed(&pods.client, workload.address, workload).await;
            let source = if keeps { pods.client.at(0) } else { pods.server.at(0) };
            let peer = workload.met()[calls].peer.ip();
            assert!(source.iter().any(|source| source.ip() == peer), "{mode}: the workload was called by {peer}");
        }
        assert!(behind.stop().await.success());
    }
}
