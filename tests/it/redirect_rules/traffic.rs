//! What goes where under the rules: captured, exempt or refused.

use std::io::ErrorKind;
use std::net::{IpAddr, Shutdown, SocketAddr, UdpSocket};
use std::time::Duration;

use portcullis::intercept::{Backend, Plan, ProxyOwner, Udp, WORKLOAD_TOS};
use socket2::{Domain, Socket, Type};

use super::pod::*;
use crate::harness::PATIENCE;

#[test]
fn both_directions_and_both_families_are_captured_and_each_exemption_is_kept() {
    let Some(pod) = Pod::new() else { return };
    let _servers = pod.servers();
    // What would be without rules, or none of the below proves a thing.
    assert_eq!(pod.pod_asks(APP, port(PEER, 8080)), format!("peer {PEER}:8080 {POD}"));
    assert_eq!(pod.peer_asks(PEER, port(POD, 8080)), format!("workload {POD}:8080 {PEER}"));
    for backend in BACKENDS {
        pod.apply(&plan(), backend);
        let starts = |said: String, with: &str| assert!(said.starts_with(with), "{backend:?}: {said:?}, not {with:?}");

        starts(pod.pod_asks(APP, port(PEER, 8080)), "outbound 10.99.0.1:8080 ");
        starts(pod.pod_asks(APP, port(PEER_V6, 8080)), "outbound [fd99::1]:8080 ");
        starts(pod.pod_asks(APP, port(&format!("::ffff:{PEER}"), 8080)), "outbound 10.99.0.1:8080 ");
        // Own addresses and an alias are as good as any; only loopback itself is not captured.
        for own in [POD, ALIAS] {
            starts(pod.pod_asks(APP, port(own, 8080)), &format!("outbound {own}:8080 "));
        }
        starts(pod.pod_asks(APP, port(POD_V6, 8080)), "outbound [fd99::2]:8080 ");
        starts(pod.pod_asks(APP, port("127.0.0.1", 8080)), "workload 127.0.0.1:8080 ");
        starts(pod.pod_asks(APP, port("::1", 8080)), "workload [::1]:8080 ");

        starts(pod.pod_asks(PROXY, port(PEER, 8080)), "peer ");
        starts(pod.pod_asks(PROXY, port(PEER_V6, 8080)), "peer ");
        starts(pod.pod_asks(SKIPPED, port(PEER, 8080)), "peer ");
        starts(pod.pod_asks(APP, port(FRIEND, 8080)), "peer ");
        starts(pod.pod_asks(APP, port(FRIEND_V6, 8080)), "peer ");
        starts(pod.pod_asks(APP, port(PEER, 9090)), "peer ");
        starts(pod.pod_asks(APP, port(PEER, 53)), "peer ");
        starts(pod.pod_asks(APP, port(FRIEND, 53)), "peer ");

        starts(pod.peer_asks(PEER, port(POD, 8080)), "inbound 10.99.0.2:8080 10.99.0.1");
        starts(pod.peer_asks(PEER_V6, port(POD_V6, 8080)), "inbound [fd99::2]:8080 fd99::1");
        // A port at which nobody listens, and the capture port itself: it is for the proxy to refuse them.
        starts(pod.peer_asks(PEER, port(POD, 7)), "inbound 10.99.0.2:7 ");
        starts(pod.peer_asks(PEER, port(POD, 15006)), "inbound 10.99.0.2:15006 ");
        starts(pod.peer_asks(PEER, port(POD, 9090)), "workload ");
        starts(pod.peer_asks(FRIEND, port(POD, 8080)), "workload ");
        starts(pod.peer_asks(FRIEND_V6, port(POD_V6, 8080)), "workload ");
    }
}

#[test]
fn the_proxy_meets_the_inbound_policy_at_its_own_address_and_reaches_its_workload_with_the_mark_of_it() {
    let Some(pod) = Pod::new() else { return };
    let _servers = pod.servers();
    for backend in BACKENDS {
        pod.apply(&plan(), backend);
        assert!(pod.pod_asks(PROXY, port(POD, 8080)).starts_with("inbound 10.99.0.2:8080 "));
        assert!(pod.pod_asks(PROXY, port(POD_V6, 8080)).starts_with("inbound [fd99::2]:8080 "));
        assert!(pod.pod_asks(PROXY, port(POD, 9090)).starts_with("workload "));
        for (user, name) in [(PROXY, "workload"), (APP, "outbound")] {
            for to in [port(POD, 8080), port(POD_V6, 8080)] {
                let said = pod.inside(|| {
                    become_user(user);
                    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
                    match to {
                        SocketAddr::V4(_) => rustix::net::sockopt::set_ip_tos(&socket, WORKLOAD_TOS).unwrap(),
                        SocketAddr::V6(_) => {
                            rustix::net::sockopt::set_ipv6_tclass(&socket, u32::from(WORKLOAD_TOS)).unwrap();
                        }
                    }
                    socket.connect_timeout(&to.into(), PATIENCE).unwrap();
                    greeted(socket.into()).unwrap().0
                });
                assert!(said.starts_with(name), "{backend:?}, user {user}: {said}");
            }
        }
    }
}

#[test]
fn whoever_calls_the_workload_from_here_meets_the_inbound_policy_also_where_nothing_outbound_is_captured() {
    let Some(pod) = Pod::new() else { return };
    let _servers = pod.servers();
    for backend in BACKENDS {
        pod.apply(&Plan { outbound: None, ..plan() }, backend);
        for own in [POD, ALIAS, POD_V6] {
            let said = pod.pod_asks(APP, port(own, 8080));
            assert!(said.starts_with("inbound "), "{backend:?}, {own}: {said}");
        }
        assert!(pod.pod_asks(APP, port(POD, 9090)).starts_with("workload "));
        assert!(pod.pod_asks(APP, port("127.0.0.1", 8080)).starts_with("workload "));
        assert!(pod.pod_asks(APP, port(PEER, 8080)).starts_with("peer "));
    }
}

/// Sends a datagram and waits for its echo; what the kernel says where it refuses.
fn datagram(from: &UdpSocket, to: SocketAddr) -> std::io::Result<()> {
    from.set_read_timeout(Some(PATIENCE))?;
    from.connect(to)?;
    from.send(b"?")?;
    let mut back = [0; 8];
    from.recv(&mut back).map(|_| ())
}

/// A socket that sends back what it gets, until the test is over.
fn echo_datagrams(address: &str) {
    let address: SocketAddr = address.parse().unwrap();
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None).unwrap();
    if address.is_ipv6() {
        socket.set_only_v6(true).unwrap();
    }
    socket.bind(&address.into()).unwrap();
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 8];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
}

#[test]
fn udp_passes_only_where_the_plan_says_so() {
    let Some(pod) = Pod::new() else { return };
    pod.outside(|| {
        ["0.0.0.0:53", "[fd99::1]:53", "10.99.0.1:5353", "10.99.0.3:5353", "0.0.0.0:9090"].map(echo_datagrams)
    });
    pod.inside(|| ["0.0.0.0:4000", "0.0.0.0:9090"].map(echo_datagrams));
    let ask = |user: u32, to: SocketAddr| {
        let any: IpAddr = if to.is_ipv4() { "0.0.0.0" } else { "::" }.parse().unwrap();
        pod.inside(|| {
            become_user(user);
            datagram(&UdpSocket::bind((any, 0)).unwrap(), to)
        })
        .map_err(|why| why.kind())
    };
    let from_peer = |source: &str, to: SocketAddr| {
        pod.outside(|| datagram(&UdpSocket::bind((source, 0)).unwrap(), to)).map_err(|why| why.kind())
    };
    let refused = Err(ErrorKind::ConnectionRefused);
    // Who sends from here is told at once.
    let ask = |user: u32, to: SocketAddr| match ask(user, to) {
        Err(ErrorKind::PermissionDenied) => Err(ErrorKind::ConnectionRefused),
        answer => answer,
    };
    for backend in BACKENDS {
        pod.apply(&plan(), backend);
        assert_eq!(ask(APP, port(PEER, 53)), Ok(()), "{backend:?}");
        for (address, number) in [(PEER, 5353), (PEER_V6, 53)] {
            assert_eq!(ask(APP, port(address, number)), refused, "{backend:?}, {address}");
        }
        assert_eq!(ask(PROXY, port(PEER, 5353)), Ok(()));
        assert_eq!(ask(SKIPPED, port(PEER, 5353)), Ok(()));
        assert_eq!(ask(APP, port(FRIEND, 5353)), Ok(()));
        assert_eq!(ask(APP, port(PEER, 9090)), Ok(()));
        assert_eq!(ask(APP, port("127.0.0.1", 4000)), Ok(()));
        assert_eq!(from_peer(PEER, port(POD, 4000)), refused);
        assert_eq!(from_peer(PEER, port(POD, 9090)), Ok(()));
        assert_eq!(from_peer(FRIEND, port(POD, 4000)), Ok(()));

        let with = |udp: Udp, dns_servers: Vec<IpAddr>| Plan { udp, dns_servers, ..plan() };
        pod.apply(&with(Udp::Dns, Vec::new()), backend);
        // Where no name server is known, none may be asked.
        assert_eq!((ask(APP, port(PEER, 53)), ask(APP, port(PEER_V6, 53))), (refused, refused));
        pod.apply(&with(Udp::Refuse, vec![PEER.parse().unwrap()]), backend);
        assert_eq!(ask(APP, port(PEER, 53)), refused);
        pod.apply(&with(Udp::Allow, Vec::new()), backend);
        assert_eq!((ask(APP, port(PEER, 5353)), from_peer(PEER, port(POD, 4000))), (Ok(()), Ok(())));
    }
}

#[test]
fn transparent_capture_hands_over_and_passes_nothing_when_nobody_listens() {
    let Some(pod) = Pod::new() else { return };
    let _servers = (
        pod.outside(|| Server::start("peer", "0.0.0.0:8080")),
        pod.inside(|| ["0.0.0.0:8080", "[::]:8080", "0.0.0.0:9090"].map(|at| Server::start("workload", at))),
    );
    pod.track();
    let (line, mut older) = pod.outside(|| dial(port(POD, 8080))).unwrap();
    assert!(line.starts_with("workload"), "{line}");
    for backend in BACKENDS {
        pod.apply(&tproxy(false), backend);
        let nobody = |source: &str, to: SocketAddr| {
            let from = port(source, 0);
            pod.outside(|| {
                let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
                socket.bind(&from.into()).unwrap();
                socket.connect_timeout(&to.into(), Duration::from_secs(1)).map_err(|why| why.kind())
            })
        };
        // A reset where there is one: iptables has none for this place.
        let refused = if backend == Backend::Nftables { ErrorKind::ConnectionRefused } else { ErrorKind::TimedOut };
        assert_eq!(nobody(PEER, port(POD, 8080)).err(), Some(refused));
        assert_eq!(nobody(PEER_V6, port(POD_V6, 8080)).err(), Some(refused));
        assert!(pod.peer_asks(PEER, port(POD, 9090)).starts_with("workload"));
        assert!(pod.peer_asks(FRIEND, port(POD, 8080)).starts_with("workload"));
        assert!(echoes(&mut older).unwrap(), "older than the rules");
        // A listener that is not transparent is not handed anything.
        let plain = pod.inside(|| Server::start("inbound", "0.0.0.0:15006"));
        assert_eq!(nobody(PEER, port(POD, 8080)).err(), Some(refused));
        drop(plain);

        let listening = pod.inside(|| ["0.0.0.0:15006", "[::]:15006"].map(|at| Server::transparent("inbound", at)));
        assert_eq!(pod.peer_asks(PEER, port(POD, 8080)), "inbound 10.99.0.2:8080 10.99.0.1");
        assert_eq!(pod.peer_asks(PEER_V6, port(POD_V6, 8080)), "inbound [fd99::2]:8080 fd99::1");
        let (_, mut captured) = pod.outside(|| dial(port(POD, 8080))).unwrap();
        assert!(echoes(&mut captured).unwrap());
        // What the proxy calls of the pod itself does not come in, and is redirected all the same.
        assert!(pod.pod_asks(PROXY, port(POD, 8080)).starts_with("inbound 10.99.0.2:8080 "));
        // Connections that the pod opens are not taken for inbound ones when their answers come.
        assert!(pod.pod_asks(PROXY, port(PEER, 8080)).starts_with("peer"));
        drop(listening);
        assert!(echoes(&mut captured).unwrap(), "it has a socket of its own");
        captured.get_ref().shutdown(Shutdown::Both).unwrap();
    }
}

#[test]
fn the_workload_sees_the_client_and_its_answers_come_to_the_proxy() {
    let Some(pod) = Pod::new() else { return };
    let _workload = pod.inside(|| ["0.0.0.0:8080", "[::]:8080"].map(|at| Server::start("workload", at)));
    for backend in BACKENDS {
        // Making a socket transparent takes capabilities, so root is the proxy here.
        pod.apply(&Plan { proxy: ProxyOwner { uid: Some(0), gid: None, mark: None }, ..tproxy(true) }, backend);
        for (client, workload) in [(PEER, port(POD, 8080)), (PEER_V6, port(POD_V6, 8080))] {
            let (line, mut stream) = pod.inside(|| {
                let socket = Socket::new(Domain::for_address(workload), Type::STREAM, None).unwrap();
                match workload {
                    SocketAddr::V4(_) => {
                        socket.set_ip_transparent_v4(true).unwrap();
                        rustix::net::sockopt::set_ip_tos(&socket, WORKLOAD_TOS).unwrap();
                    }
                    SocketAddr::V6(_) => {
                        socket.set_ip_transparent_v6(true).unwrap();
                        rustix::net::sockopt::set_ipv6_tclass(&socket, u32::from(WORKLOAD_TOS)).unwrap();
                    }
                }
                socket.set_mark(0x1506).unwrap();
                socket.bind(&port(client, 0).into()).unwrap();
                socket.connect_timeout(&workload.into(), PATIENCE).unwrap();
                greeted(socket.into()).unwrap()
            });
            assert_eq!(line, format!("workload {workload} {client}"), "{backend:?}");
            assert!(echoes(&mut stream).unwrap());
        }
    }
}

#[test]
fn a_socket_that_is_bound_to_a_device_does_not_get_out() {
    let Some(pod) = Pod::new() else { return };
    let _servers = pod.servers();
    let bound = |patience: Duration| {
        pod.inside(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.bind_device(Some(b"eth0")).unwrap();
            become_user(APP);
            let asked = socket.connect_timeout(&port(PEER, 8080).into(), patience);
            asked.and_then(|()| greeted(socket.into())).map(|(line, _)| line)
        })
    };
    assert!(bound(PATIENCE).unwrap().starts_with("peer"));
    for backend in BACKENDS {
        // A peer that would take the captured segments for its own, if they came.
        pod.at_peer("sysctl -qw net.ipv4.conf.all.route_localnet=1");
        pod.apply(&plan(), backend);
        // Who has made the socket counts, and that was root.
        match bound(Duration::from_secs(1)) {
            Ok(line) => assert!(line.starts_with("outbound"), "{backend:?}: {line}"),
            Err(why) => assert_eq!(why.kind(), ErrorKind::TimedOut, "{backend:?}"),
        }
    }
}

#[test]
fn nobody_outside_gets_at_what_is_bound_to_loopback() {
    let Some(pod) = Pod::new() else { return };
    let _servers = pod.servers();
    // A peer that sends segments for a loopback address by the wire, and takes the answers. The pod knows its card: a
    // question for it would come from the loopback address, and stay without an answer.
    let card = "cat /sys/class/net/eth0/address";
    let (ours, theirs) = (pod.in_pod(card), pod.at_peer(card));
    pod.at_peer(&format!("ip neigh replace 127.0.0.9 lladdr {} dev eth0 nud permanent", ours.trim()));
    pod.in_pod(&format!("ip neigh replace {PEER} lladdr {} dev eth0 nud permanent", theirs.trim()));
    let settings = ["eth0.route_localnet=1", "eth0.accept_local=1", "all.rp_filter=0", "eth0.rp_filter=0"];
    for setting in settings {
        pod.at_peer(&format!("sysctl -qw net.ipv4.conf.{setting}"));
    }
    let ask = |patience: Duration| {
        pod.outside(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.bind_device(Some(b"eth0")).unwrap();
            socket.bind(&port(PEER, 0).into()).unwrap();
            let asked = socket.connect_timeout(&port("127.0.0.9", 8080).into(), patience);
            asked.and_then(|()| greeted(socket.into())).map(|(line, _)| line).map_err(|why| why.kind())
        })
    };
    for backend in BACKENDS {
        pod.apply(&plan(), backend);
        assert_eq!(ask(Duration::from_secs(1)), Err(ErrorKind::TimedOut), "{backend:?}");
    }
    // Without the rules that prevent it, it would be captured as if it were for any address.
    pod.apply(&plan(), Backend::Nftables);
    pod.in_pod("nft flush chain inet portcullis prerouting_filter");
    assert_eq!(ask(PATIENCE), Ok("inbound 127.0.0.9:8080 10.99.0.1".to_owned()));
}
