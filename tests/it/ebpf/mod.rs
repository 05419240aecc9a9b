//! Outbound capture by eBPF programs, in a cgroup and a network namespace of the test's own: what is captured, what is
//! exempt, every way round that we know of, and that nothing opens the gate but who may.

mod accelerated;
mod around;
mod exempt;
mod gate;
mod lifetime;

use std::net::SocketAddr;

use crate::harness::{Domain, Proxy, exchange};
use crate::netns::{APPLICATION, PROXY, ROOT, hand_over, within_reach};
use crate::pods::{Workload, marker};
use gate::{CAPTURE, Gate, SERVER, Went, mapped, plan, servers};

#[tokio::test]
async fn connections_of_both_families_reach_the_proxy_which_learns_where_they_were_for() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::closed(parts, plan()).await;
    let [v4, v6] = servers();
    for to in [v4, v6] {
        let met = gate.ask(to).await.unwrap();
        assert_eq!((met.went, met.peer), (Went::ToProxy(to), to));
    }
    // IPv4 in the form of IPv6 is IPv4 to the proxy and stays what it was to the application.
    let met = gate.ask(mapped(v4)).await.unwrap();
    assert_eq!((met.went, met.peer), (Went::ToProxy(v4), mapped(v4)));
    // A port on which nobody listens, too.
    let nobody = SocketAddr::new(v4.ip(), 9);
    assert_eq!(gate.ask(nobody).await.unwrap().went, Went::ToProxy(nobody));
}

#[tokio::test]
async fn many_connections_at_once_are_each_handed_over_with_their_own_destination() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::closed(parts, plan()).await;
    let ask = |number: u16| {
        let to = SocketAddr::new(servers()[usize::from(number % 2)].ip(), 1000 + number);
        let gate = &gate;
        async move { (to, gate.ask(to).await.unwrap()) }
    };
    for (to, met) in futures_util::future::join_all((0..200).map(ask)).await {
        assert_eq!((met.went, met.peer), (Went::ToProxy(to), to));
    }
}

#[tokio::test]
async fn what_comes_to_the_proxy_s_port_by_itself_has_no_destination() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::closed(parts, plan()).await;
    for to in ["127.0.0.1", "::1"] {
        let to = SocketAddr::new(to.parse().unwrap(), CAPTURE);
        let met = gate.ask(to).await.unwrap();
        assert_eq!((met.went, met.peer), (Went::Unknown, to));
    }
}

#[tokio::test]
async fn a_client_that_has_closed_before_it_is_accepted_has_left_its_destination() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::open(parts).await;
    gate.apply(plan()).await.unwrap();
    let [to, _] = servers();
    let original = gate.inside(PROXY, move || {
        let listener = std::net::TcpListener::bind(("127.0.0.1", CAPTURE)).unwrap();
        (listener, to)
    });
    let (listener, to) = original.await;
    let port = gate.inside(APPLICATION, move || {
        let stream = std::net::TcpStream::connect(to).unwrap();
        stream.local_addr().unwrap().port()
    });
    let port = port.await;
    let (accepted, client) = listener.accept().unwrap();
    assert_eq!(client.port(), port);
    let original = socket2::SockRef::from(&accepted).original_dst_v4().unwrap();
    assert_eq!(original.as_socket(), Some(to));
}

#[tokio::test]
async fn sidecars_seal_what_a_captured_application_says() {
    let Some((net, cgroup)) = Gate::net() else { return };
    let wire = net.wire().await;
    let server = net.pod("server").await;
    let domain = Domain::new("a.example");
    let gate = Gate::open((net, cgroup)).await;
    let workload = Workload::start(&server, ([127, 0, 0, 1], 8080)).await;
    let inbound = format!(
        "{}inbound:\n  - {{ name: in, listen: '{}:8443', to: '127.0.0.1:8080', allow: ['{}'] }}\n",
        domain.identity("/server"),
        server.v4,
        domain.id("/client")
    );
    let behind = server.proxy(&domain, &inbound).await;
    let outbound = format!(
        "{}outbound:\n  - name: out\n    capture: {{ addresses: ['{}'], ports: [{SERVER}] }}\n    to: '{}:8443'\n    \
         expect: '{}'\nintercept:\n  proxy: {{ uid: {PROXY} }}\n  outbound: {{ port: {CAPTURE} }}\n",
        domain.identity("/client"),
        server.v4,
        server.v4,
        domain.id("/server")
    );
    hand_over(domain.path(), PROXY);
    let program = within_reach(std::path::Path::new(crate::harness::program()), domain.path());
    let command = gate.command(PROXY, program.to_str().unwrap());
    let before = Proxy::start_within(&gate.pod.namespace, domain.path(), "client", &outbound, command).await;
    behind.ready().await;
    before.ready().await;
    gate.apply(plan()).await.unwrap();

    let marker = marker("captured by eBPF");
    let to = SocketAddr::new(server.v4.into(), SERVER);
    let stream = gate.inside(APPLICATION, move || std::net::TcpStream::connect(to)).await.unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut stream = tokio::net::TcpStream::from_std(stream).unwrap();
    exchange(&mut stream, &marker).await.unwrap();
    workload.heard(&marker).await;
    wire.only_sealed(server.v4.into(), &marker).await;
    // What no listener takes is refused, not passed.
    assert!(gate.ask(servers()[0]).await.is_err());
    drop(stream);
    assert!(before.stop().await.success());
    assert!(behind.stop().await.success());
}

#[tokio::test]
async fn only_the_cgroup_and_only_the_namespace_are_captured() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::closed(parts, plan()).await;
    let other = gate.net.pod("other").await;
    let [to, _] = servers();
    assert_eq!(gate.ask(to).await.unwrap().went, Went::ToProxy(to));
    let outside = gate.pod.run(ROOT, move || gate::ask_from_here(to)).await.unwrap();
    assert_eq!(outside.went, Went::Direct);
    let cgroup = gate.cgroup.0.clone();
    let elsewhere = other.run(ROOT, move || {
        gate::OwnCgroup::join(&cgroup);
        gate::ask_from_here(to)
    });
    assert_eq!(elsewhere.await.unwrap().went, Went::Direct);
}

#[tokio::test]
async fn with_the_rules_of_the_same_plan_nothing_outside_the_cgroup_gets_round() {
    let Some(parts) = Gate::net() else { return };
    let plan = gate::plan_with(|outbound| outbound.skip_uids = vec![2001]);
    let gate = Gate::closed(parts, plan.clone()).await;
    let (v4, v6) = (gate.pod.v4, gate.pod.v6);
    gate.pod.run(ROOT, move || portcullis::intercept::apply(&plan)).await.unwrap();
    for (to, own) in servers().into_iter().zip([v4.into(), v6.into()]) {
        assert_eq!(gate.ask(to).await.unwrap().went, Went::ToProxy(to));
        assert_eq!(gate.ask_as(2001, to, |_| Ok(())).await.unwrap().went, Went::Direct);
        assert_eq!(gate.ask_as(PROXY, to, |_| Ok(())).await.unwrap().went, Went::Direct);
        let refused = gate.pod.connect(APPLICATION, to).await.unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        assert!(gate.pod.connect(PROXY, to).await.is_ok());
        // Bound to the pod's address, the unspecified one means that address and not loopback.
        let unspecified = if to.is_ipv4() { "0.0.0.0:7000" } else { "[::]:7000" };
        gate.neighbour(SocketAddr::new(own, 7000)).await;
        let bind = move |socket: &socket2::Socket| socket.bind(&SocketAddr::new(own, 0).into());
        let own = gate.ask_as(APPLICATION, unspecified.parse().unwrap(), bind).await;
        assert!(own.is_err(), "{own:?}");
    }
}
