//! Ways round the programs, as an application might go them by design or by accident.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::gate::{Gate, Met, Went, dial, hear, mapped, plan, servers, went, write};
use crate::harness::{succeeds, tool};
use crate::netns::{APPLICATION, ROOT};

/// linux/socket.h.
const MSG_FASTOPEN: i32 = 0x2000_0000;

/// Data goes with the SYN, and connect(2) is never called.
fn fast_open(to: SocketAddr, protocol: Option<Protocol>) -> io::Result<Met> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, protocol)?;
    socket.set_write_timeout(Some(Duration::from_secs(3)))?;
    socket.send_to_with_flags(b"early", &SockAddr::from(to), MSG_FASTOPEN)?;
    hear(&socket)
}

#[tokio::test]
async fn fast_open_is_captured_the_first_time_and_when_it_has_its_cookie() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::open(parts).await;
    // Client and server side; without this the second one would be an ordinary connection.
    gate.pod.sysctl("net/ipv4/tcp_fastopen", "1027").await;
    gate.proxy().await;
    gate.apply(plan()).await.unwrap();
    let [v4, v6] = servers();
    for to in [v4, v6, mapped(v4)] {
        for time in 0..3 {
            let met = gate.inside(APPLICATION, move || fast_open(to, None)).await.unwrap();
            let canonical = SocketAddr::new(to.ip().to_canonical(), to.port());
            assert_eq!((met.went, met.peer), (Went::ToProxy(canonical), to), "{to}, {time}");
        }
    }
    // Proof that data went with a SYN at all.
    let counted = gate.pod.run(ROOT, || std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap()).await;
    assert!(counter(&counted, "TCPFastOpenActive") >= 1, "{counted}");
    assert!(counter(&counted, "TCPFastOpenPassive") >= 1, "{counted}");
}

fn counter(netstat: &str, name: &str) -> u64 {
    let mut lines = netstat.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let place = names.split(' ').position(|field| field == name).unwrap();
    values.split(' ').nth(place).unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_connect_that_waits_for_the_first_byte_is_captured() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::open(parts).await;
    gate.pod.sysctl("net/ipv4/tcp_fastopen", "1027").await;
    gate.proxy().await;
    gate.apply(plan()).await.unwrap();
    let python = tool("PORTCULLIS_TEST_PYTHON", "python3");
    // 30 is TCP_FASTOPEN_CONNECT (linux/tcp.h).
    let script = "import socket, sys\n\
                  s = socket.socket()\n\
                  s.setsockopt(socket.IPPROTO_TCP, 30, 1)\n\
                  s.connect((sys.argv[1], int(sys.argv[2])))\n\
                  s.sendall(b'early')\n\
                  print(s.makefile().readline())\n";
    let [to, _] = servers();
    for _ in 0..2 {
        let mut command = gate.command(ROOT, python.to_str().unwrap());
        command.args(["-c", script, &to.ip().to_string(), &to.port().to_string()]);
        assert_eq!(went(&succeeds(&mut command, "").await), Went::ToProxy(to));
    }
}

#[tokio::test]
async fn multipath_tcp_is_captured_by_its_first_subflow() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::closed(parts, plan()).await;
    let [v4, v6] = servers();
    for to in [v4, v6, mapped(v4)] {
        let canonical = SocketAddr::new(to.ip().to_canonical(), to.port());
        let connected = gate.inside(APPLICATION, move || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::MPTCP))?;
            dial(&socket, to)?;
            hear(&socket)
        });
        let met = connected.await.unwrap();
        assert_eq!((met.went, met.peer), (Went::ToProxy(canonical), to));
        let met = gate.inside(APPLICATION, move || fast_open(to, Some(Protocol::MPTCP))).await.unwrap();
        assert_eq!((met.went, met.peer), (Went::ToProxy(canonical), to));
    }
}

#[tokio::test]
async fn a_socket_that_is_bound_to_a_device_an_address_or_a_port_is_captured() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::closed(parts, plan()).await;
    let own = [IpAddr::from(gate.pod.v4), gate.pod.v6.into()];
    for (to, own) in servers().into_iter().zip(own) {
        let device = gate.ask_as(ROOT, to, |socket| socket.bind_device(Some(b"eth0"))).await.unwrap();
        assert_eq!(device.went, Went::ToProxy(to));
        for port in [0, 45_678] {
            let bind = move |socket: &Socket| socket.bind(&SockAddr::from(SocketAddr::new(own, port)));
            assert_eq!(gate.ask_as(APPLICATION, to, bind).await.unwrap().went, Went::ToProxy(to), "{own} {port}");
        }
    }
}

#[tokio::test]
async fn a_socket_that_connects_again_is_judged_again() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::closed(parts, plan()).await;
    let neighbour = SocketAddr::from(([127, 0, 0, 1], 7000));
    gate.neighbour(neighbour).await;
    let [to, _] = servers();
    let all = gate.inside(APPLICATION, move || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let again = |to: SocketAddr| {
            rustix::net::connect_unspec(&socket).unwrap();
            dial(&socket, to).unwrap();
            hear(&socket).unwrap()
        };
        dial(&socket, to).unwrap();
        [hear(&socket).unwrap(), again(neighbour), again(SocketAddr::new(to.ip(), 83))]
    });
    let [first, local, last] = all.await;
    assert_eq!((first.went, first.peer), (Went::ToProxy(to), to));
    assert_eq!((local.went, local.peer), (Went::Direct, neighbour));
    let elsewhere = SocketAddr::new(to.ip(), 83);
    assert_eq!((last.went, last.peer), (Went::ToProxy(elsewhere), elsewhere));
}

#[tokio::test]
async fn a_server_with_a_client_of_the_same_port_is_not_told_of_another_s_destination() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::closed(parts, plan()).await;
    let [to, _] = servers();
    let port = SocketAddr::from(([127, 0, 0, 1], 45_679));
    let original = gate.inside(APPLICATION, move || {
        let bound = || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&SockAddr::from(port)).unwrap();
            socket
        };
        let captured = bound();
        dial(&captured, to).unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let plain = bound();
        dial(&plain, listener.local_addr().unwrap()).unwrap();
        let (accepted, from) = listener.accept().unwrap();
        assert_eq!(from, port);
        assert_eq!(write(&plain, b"x").unwrap(), 1);
        socket2::SockRef::from(&accepted).original_dst_v4().map(|address| address.as_socket())
    });
    assert!(original.await.is_err());
}

#[tokio::test]
async fn where_a_destination_cannot_be_stored_the_connection_is_refused() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::closed(parts, plan()).await;
    // What a socket may store comes out of this budget.
    gate.pod.sysctl("net/core/optmem_max", "0").await;
    for to in servers() {
        let refused = gate.ask(to).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied, "{refused}");
    }
}
