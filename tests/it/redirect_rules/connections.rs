//! Connections that are open: rules are made anew under them, segments go astray, one side falls silent.

use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use portcullis::intercept::{Backend, InboundMode, Plan};

use super::pod::*;
use crate::harness::{PATIENCE, tool};

#[test]
fn a_connection_lives_through_new_rules_and_each_way_of_writing_them() {
    let Some(pod) = Pod::new() else { return };
    let _servers = pod.servers();
    pod.track();
    let old = pod.inside(|| dial(port(PEER, 8080)));
    pod.apply(&plan(), Backend::Nftables);
    let out = pod.inside(|| dial(port(PEER, 8080)));
    let inbound = pod.outside(|| dial(port(POD, 8080)));
    let mut streams = Vec::new();
    for (connection, name) in [(old, "peer"), (out, "outbound"), (inbound, "inbound")] {
        let (line, stream) = connection.unwrap();
        assert!(line.starts_with(name), "{line}");
        streams.push(stream);
    }
    let mut other = plan();
    other.outbound.as_mut().unwrap().port = 15009;
    other.half_closed = Duration::from_secs(60);
    for (plan, backend) in [
        (plan(), Backend::Nftables),
        (other, Backend::Nftables),
        (tproxy(true), Backend::Nftables),
        (plan(), Backend::Iptables),
    ] {
        pod.apply(&plan, backend);
        for stream in &mut streams {
            assert!(echoes(stream).unwrap());
        }
    }
}

/// A connection from outside, and in it a segment far beyond the window, which conntrack calls invalid. The numbers are
/// read out of the socket (TCP_REPAIR, tcp(7)).
const OUT_OF_WINDOW: &str = r#"
import socket, struct, sys
source, to = sys.argv[1:3]
connection = socket.create_connection((to, 8080), 10, (source, 0))
connection.recv(100)
numbers = []
connection.setsockopt(6, 19, 1)
for queue in 1, 2:
    connection.setsockopt(6, 20, queue)
    numbers.append(connection.getsockopt(6, 21) & 0xffffffff)
connection.setsockopt(6, 19, -1)
port = connection.getsockname()[1]
def segment(checksum):
    sequence = (numbers[1] + 0x40000000) & 0xffffffff
    return struct.pack("!HHIIBBHHH", port, 8080, sequence, numbers[0], 5 << 4, 0x18, 1024, checksum, 0) + b"late"
pseudo = socket.inet_aton(source) + socket.inet_aton(to) + struct.pack("!HH", 6, len(segment(0))) + segment(0)
total = sum(struct.unpack("!%dH" % (len(pseudo) // 2), pseudo))
while total >> 16:
    total = (total & 0xffff) + (total >> 16)
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
raw.bind((source, 0))
raw.sendto(segment(~total & 0xffff), (to, 0))
try:
    connection.sendall(b"still here")
    print(connection.recv(100).decode())
except ConnectionError as why:
    print(type(why).__name__)
"#;

#[test]
fn a_segment_that_conntrack_does_not_know_resets_nothing() {
    let Some(pod) = Pod::new() else { return };
    let _servers = pod.servers();
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("segment.py");
    std::fs::write(&script, OUT_OF_WINDOW).unwrap();
    let python = tool("PORTCULLIS_TEST_PYTHON", "python3");
    let say = || {
        run(&format!("ip netns exec {} {} {} {PEER} {POD}", pod.peer, python.display(), script.display()))
            .trim()
            .to_owned()
    };
    pod.apply(&Plan { outbound: None, ..plan() }, Backend::Nftables);
    assert_eq!(say(), "still here");
    // Without the rule it is as the rule says.
    pod.in_pod("nft flush chain inet portcullis prerouting_filter");
    assert_eq!(say(), "ConnectionResetError");
    pod.apply(&Plan { outbound: None, ..plan() }, Backend::Iptables);
    assert_eq!(say(), "still here");
}

/// The seconds that conntrack gives a half-closed connection from this port, once it is that.
fn life(pod: &Pod, port: u16) -> u32 {
    let number = format!("sport={port} ");
    let until = Instant::now() + PATIENCE;
    loop {
        let table = pod.in_pod("cat /proc/net/nf_conntrack");
        let line = table.lines().find(|line| line.contains(&number) && line.contains(" CLOSE_WAIT "));
        if let Some(seconds) = line.and_then(|line| line.split_ascii_whitespace().nth(4)) {
            return seconds.parse().unwrap();
        }
        assert!(Instant::now() < until, "{table}");
    }
}

#[test]
fn a_half_closed_connection_is_remembered_as_long_as_the_plan_says_and_keeps_what_it_had() {
    let Some(pod) = Pod::new() else { return };
    let listen = |address: &str, transparent: bool| {
        pod.inside(|| {
            let socket = socket(address);
            socket.set_ip_transparent_v4(transparent).unwrap();
            socket.listen(4).unwrap();
            TcpListener::from(socket)
        })
    };
    let outbound = listen("127.0.0.1:15001", false);
    // Opens a connection, closes its one half, and keeps the other.
    let half_closed = |listener: &TcpListener, client: TcpStream| {
        let (server, _) = listener.accept().unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        (client.local_addr().unwrap().port(), client, server)
    };
    let mut kept = Vec::new();
    for (plan, inbound) in [(plan(), "0.0.0.0:15006"), (tproxy(false), "0.0.0.0:15006")] {
        let inbound = listen(inbound, matches!(plan.inbound.as_ref().unwrap().mode, InboundMode::Tproxy { .. }));
        pod.apply(&plan, Backend::Nftables);
        kept.push(half_closed(&outbound, pod.inside(|| TcpStream::connect(port(PEER, 8080)).unwrap())));
        kept.push(half_closed(&inbound, pod.outside(|| TcpStream::connect(port(POD, 8080)).unwrap())));
        for (client, ..) in &kept {
            assert!((3000..=3600).contains(&life(&pod, *client)));
        }
        let shorter = Plan { half_closed: Duration::from_secs(600), ..plan };
        pod.apply(&shorter, Backend::Nftables);
        let later = half_closed(&outbound, pod.inside(|| TcpStream::connect(port(PEER, 8080)).unwrap()));
        assert!((300..=600).contains(&life(&pod, later.0)));
        for (client, ..) in &kept {
            assert!((3000..=3600).contains(&life(&pod, *client)));
        }
    }
}
