//! What is not captured, and nothing beside it.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use portcullis::intercept::plan::{Plan, ProxyOwner, Udp};
use socket2::Socket;

use super::gate::{CAPTURE, Gate, SERVER, Went, mapped, plan, plan_with, servers};
use crate::netns::{APPLICATION, Net, PROXY, ROOT};

const OTHER: u32 = 2001;

#[tokio::test]
async fn the_proxy_and_declared_users_connect_directly() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::closed(parts, plan_with(|outbound| outbound.skip_uids = vec![5, OTHER])).await;
    for to in servers() {
        for (uid, went) in [(PROXY, Went::Direct), (OTHER, Went::Direct), (APPLICATION, Went::ToProxy(to))] {
            assert_eq!(gate.ask_as(uid, to, |_| Ok(())).await.unwrap().went, went, "{uid}");
        }
        assert_eq!(gate.ask_as(ROOT, to, |_| Ok(())).await.unwrap().went, Went::ToProxy(to));
    }
}

#[tokio::test]
async fn groups_are_those_of_the_process() {
    let Some(parts) = Gate::net() else { return };
    let plan = Plan {
        proxy: ProxyOwner { uid: None, gid: Some(PROXY), mark: None },
        ..plan_with(|outbound| outbound.skip_gids = vec![OTHER])
    };
    let gate = Gate::closed(parts, plan).await;
    let [to, _] = servers();
    for (id, went) in [(PROXY, Went::Direct), (OTHER, Went::Direct), (APPLICATION, Went::ToProxy(to))] {
        assert_eq!(gate.ask_as(id, to, |_| Ok(())).await.unwrap().went, went, "{id}");
    }
    // The user's number is no group's.
    let met = gate.inside(ROOT, move || {
        let user = rustix::process::Uid::from_raw(OTHER);
        rustix::thread::set_thread_res_uid(user, user, user).unwrap();
        super::gate::ask_from_here(to)
    });
    assert_eq!(met.await.unwrap().went, Went::ToProxy(to));
}

#[tokio::test]
async fn sockets_with_the_proxy_s_mark_connect_directly() {
    let Some(parts) = Gate::net() else { return };
    let plan = Plan { proxy: ProxyOwner { uid: None, gid: None, mark: Some(0x539) }, ..plan() };
    let gate = Gate::closed(parts, plan).await;
    let [to, _] = servers();
    for (mark, went) in [(0x539, Went::Direct), (0x538, Went::ToProxy(to)), (0, Went::ToProxy(to))] {
        let met = gate.ask_as(ROOT, to, move |socket: &Socket| socket.set_mark(mark)).await.unwrap();
        assert_eq!(met.went, went, "{mark}");
    }
    let forbidden = gate.ask_as(APPLICATION, to, |socket| socket.set_mark(0x539)).await;
    assert_eq!(forbidden.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
}

#[tokio::test]
async fn loopback_stays_loopback_and_an_alias_of_it_does_not_count() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::closed(parts, plan()).await;
    for at in ["0.0.0.0", "::1"] {
        gate.neighbour((at.parse::<IpAddr>().unwrap(), 7000).into()).await;
    }
    let own =
        ["127.0.0.1", "127.9.9.9", "0.0.0.0", "::ffff:127.0.0.1", "::ffff:127.1.2.3", "::ffff:0.0.0.0", "::1", "::"];
    for to in own {
        let to = SocketAddr::new(to.parse().unwrap(), 7000);
        assert_eq!(gate.ask(to).await.unwrap().went, Went::Direct, "{to}");
    }
    // Another address of the pod, be it on the loopback interface, is no loopback: the inbound policy is for it.
    let aliased = gate.pod.command(ROOT, "ip").args(["addr", "add", "10.99.0.1/32", "dev", "lo"]).status().await;
    assert!(aliased.unwrap().success());
    for to in ["10.99.0.1".parse().unwrap(), IpAddr::from(gate.pod.v4), gate.pod.v6.into()] {
        let to = SocketAddr::new(to, 7000);
        assert_eq!(gate.ask(to).await.unwrap().went, Went::ToProxy(to), "{to}");
    }
}

#[tokio::test]
async fn declared_ports_and_networks_are_reached_directly_in_every_form_of_address() {
    let Some(parts) = Gate::net() else { return };
    let [v4, v6] = servers();
    let gate = Gate::closed(parts, plan()).await;
    let elsewhere = |address: SocketAddr| SocketAddr::new(address.ip(), 81);

    gate.apply(plan_with(|outbound| outbound.skip_ports = vec![SERVER])).await.unwrap();
    for to in [v4, v6, mapped(v4)] {
        assert_eq!(gate.ask(to).await.unwrap().went, Went::Direct, "{to}");
        let captured = gate.ask(elsewhere(to)).await.unwrap().went;
        assert_eq!(captured, Went::ToProxy(SocketAddr::new(to.ip().to_canonical(), 81)), "{to}");
    }

    gate.apply(plan_with(|outbound| outbound.skip_destinations = vec!["10.77.0.0/24".parse().unwrap()])).await.unwrap();
    for to in [v4, mapped(v4)] {
        assert_eq!(gate.ask(to).await.unwrap().went, Went::Direct, "{to}");
    }
    assert_eq!(gate.ask(v6).await.unwrap().went, Went::ToProxy(v6));

    // All of IPv6 is no IPv4.
    gate.apply(plan_with(|outbound| outbound.skip_destinations = vec!["::/0".parse().unwrap()])).await.unwrap();
    assert_eq!(gate.ask(v6).await.unwrap().went, Went::Direct);
    for to in [v4, mapped(v4)] {
        assert_eq!(gate.ask(to).await.unwrap().went, Went::ToProxy(v4), "{to}");
    }

    // One bit less than the network of both.
    let neighbours =
        vec!["10.77.0.255/32".parse().unwrap(), "10.77.1.0/24".parse().unwrap(), "fd00:77::/124".parse().unwrap()];
    gate.apply(plan_with(|outbound| outbound.skip_destinations = neighbours)).await.unwrap();
    for to in [v4, v6] {
        assert_eq!(gate.ask(to).await.unwrap().went, Went::ToProxy(to), "{to}");
    }
}

#[tokio::test]
async fn name_servers_are_reached_at_their_port_only_and_only_where_dns_passes() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::closed(parts, plan()).await;
    let [host, _] = Net::HOST;
    let (dns, other) = (SocketAddr::new(host, 53), servers()[0]);
    for (udp, passes) in [(Udp::Dns, true), (Udp::Allow, true), (Udp::Refuse, false)] {
        gate.apply(Plan { udp, dns_servers: vec![host], ..plan() }).await.unwrap();
        // Nobody answers at the port, and the proxy always does.
        let met = gate.ask(dns).await;
        assert_eq!(met.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused), passes, "{udp:?}");
        assert_eq!(gate.ask(other).await.unwrap().went, Went::ToProxy(other));
    }
}

#[tokio::test]
async fn as_many_exemptions_as_a_config_can_have_all_count() {
    let Some(parts) = Gate::net() else { return };
    let [v4, v6] = servers();
    let gate = Gate::closed(
        parts,
        plan_with(|outbound| {
            outbound.skip_ports = (20_000..20_255).chain([SERVER]).collect();
            outbound.skip_destinations =
                (0..=255).map(|third| format!("10.88.{third}.0/24").parse().unwrap()).collect();
            outbound.skip_uids = (30_000..30_255).chain([OTHER]).collect();
            outbound.skip_gids = (30_000..30_256).collect();
        }),
    )
    .await;
    for to in [v4, v6] {
        assert_eq!(gate.ask(to).await.unwrap().went, Went::Direct);
        let captured = SocketAddr::new(to.ip(), 82);
        assert_eq!(gate.ask(captured).await.unwrap().went, Went::ToProxy(captured));
        let refused = gate.ask_as(OTHER, captured, |_| Ok(())).await.unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    }
}

#[tokio::test]
async fn datagrams_are_none_of_its_business() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::closed(parts, plan()).await;
    let [host, _] = Net::HOST;
    let listening = gate.net.host.run(ROOT, move || UdpSocket::bind((host, CAPTURE))).await.unwrap();
    let (to, from) = (listening.local_addr().unwrap(), gate.pod.v4);
    let peer = gate.inside(APPLICATION, move || {
        let socket = UdpSocket::bind((from, 0)).unwrap();
        socket.connect(to).unwrap();
        socket.send(b"datagram").unwrap();
        socket.peer_addr().unwrap()
    });
    assert_eq!(peer.await, to);
    let mut bytes = [0; 16];
    assert_eq!(listening.recv(&mut bytes).unwrap(), 8);
}
