//! The rules of captured traffic in real network namespaces: what goes where, what nft(8) makes of them, and that nothing
//! of anybody else's is touched. A listener that says its name stands for the proxy here.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use portcullis::intercept::{
    self, Backend, InboundCapture, InboundMode, OutboundCapture, Plan, ProxyOwner, Standing, Udp, WORKLOAD_TOS,
    in_netns,
};
use rustix::thread::{Gid, Uid, set_thread_res_gid, set_thread_res_uid};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

use crate::harness::PATIENCE;

const POD: &str = "10.99.0.2";
const POD_V6: &str = "fd99::2";
const ALIAS: &str = "10.99.7.7";
const PEER: &str = "10.99.0.1";
const PEER_V6: &str = "fd99::1";
/// A client that may reach the workload directly, and a server that may be reached.
const FRIEND: &str = "10.99.0.3";
const FRIEND_V6: &str = "fd99::3";
const APP: u32 = 1000;
const PROXY: u32 = 1337;
const SKIPPED: u32 = 1001;
const BACKENDS: [Backend; 2] = [Backend::Nftables, Backend::Iptables];

fn run(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}\n{said}");
    String::from_utf8(output.stdout).unwrap()
}

/// Two namespaces, joined by a cable: a pod, and a peer of it.
struct Pod {
    pod: String,
    peer: String,
}

impl Drop for Pod {
    fn drop(&mut self) {
        for name in [&self.pod, &self.peer] {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

impl Pod {
    /// None, and loudly, where namespaces cannot be had.
    fn new() -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = |what: &str| format!("portcullis-{}-{number}-{what}", std::process::id());
        let pod = Self { pod: name("pod"), peer: name("peer") };
        let made = Command::new("ip").args(["netns", "add", &pod.pod]).output();
        let why = match made {
            Ok(output) if output.status.success() => String::new(),
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(why) => format!("ip: {why}"),
        };
        if !rustix::process::geteuid().is_root() || !why.is_empty() {
            eprintln!("SKIPPED: no network namespaces here, this takes root and iproute2 ({why})");
            return None;
        }
        let (a, b) = (&pod.pod, &pod.peer);
        run(&format!(
            "ip netns add {b}
             for n in {a} {b}; do ip -n $n link set lo up; done
             ip -n {a} link add eth0 type veth peer name eth0 netns {b}
             ip -n {a} addr add {ALIAS}/32 dev lo
             ip -n {a} addr add {POD}/24 dev eth0
             ip -n {a} addr add {POD_V6}/64 dev eth0 nodad
             for address in {PEER} {FRIEND}; do ip -n {b} addr add $address/24 dev eth0; done
             for address in {PEER_V6} {FRIEND_V6}; do ip -n {b} addr add $address/64 dev eth0 nodad; done
             for n in {a} {b}; do ip -n $n link set eth0 up; done"
        ));
        Some(pod)
    }

    fn path(name: &str) -> PathBuf {
        Path::new("/run/netns").join(name)
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_netns(&Self::path(&self.pod), work).unwrap()
    }

    fn outside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_netns(&Self::path(&self.peer), work).unwrap()
    }

    fn apply(&self, plan: &Plan, backend: Backend) {
        let applied = self.inside(|| intercept::apply_with(plan, backend)).unwrap();
        assert_eq!(applied.backend, backend);
        assert_eq!(self.standing(plan), Standing::Whole, "{backend:?}");
    }

    /// Has conntrack look at connections from now on: without any rules it does not.
    fn track(&self) {
        self.in_pod("nft add table inet other");
        self.in_pod("nft add chain inet other in { type filter hook input priority 0\\; }");
        self.in_pod("nft add rule inet other in ct state new accept");
    }

    fn standing(&self, plan: &Plan) -> Standing {
        self.inside(|| intercept::standing(plan)).unwrap()
    }

    fn in_pod(&self, command: &str) -> String {
        run(&format!("ip netns exec {} {command}", self.pod))
    }

    fn nft_list(&self) -> String {
        self.in_pod("nft list ruleset")
    }

    /// The servers of a pod: a workload, and what stands for the proxy.
    fn servers(&self) -> Vec<Server> {
        let mut servers = self.inside(|| {
            let proxy = ["127.0.0.1:15001", "[::1]:15001"].map(|address| Server::start("outbound", address));
            let inbound = ["0.0.0.0:15006", "[::]:15006"].map(|address| Server::start("inbound", address));
            let workload = ["0.0.0.0:8080", "[::]:8080", "0.0.0.0:9090", "[::]:9090"];
            proxy.into_iter().chain(inbound).chain(workload.map(|at| Server::start("workload", at))).collect::<Vec<_>>()
        });
        servers.extend(self.outside(|| {
            ["0.0.0.0:8080", "[::]:8080", "0.0.0.0:9090", "0.0.0.0:53", "[::]:9090"].map(|at| Server::start("peer", at))
        }));
        servers
    }
}

/// A listener that tells each client its own name, where the client wanted to go and who it is; then it echoes.
struct Server(TcpListener);

impl Drop for Server {
    fn drop(&mut self) {
        // It would keep its namespace alive.
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }
}

impl Server {
    fn start(name: &'static str, address: &str) -> Self {
        Self::of(name, socket(address))
    }

    /// One that takes connections for foreign addresses.
    fn transparent(name: &'static str, address: &str) -> Self {
        let socket = socket(address);
        match address.starts_with('[') {
            true => socket.set_ip_transparent_v6(true).unwrap(),
            false => socket.set_ip_transparent_v4(true).unwrap(),
        }
        Self::of(name, socket)
    }

    fn of(name: &'static str, socket: Socket) -> Self {
        socket.listen(16).unwrap();
        let listener = TcpListener::from(socket);
        let server = Self(listener.try_clone().unwrap());
        std::thread::spawn(move || {
            while let Ok((stream, from)) = listener.accept() {
                std::thread::spawn(move || serve(name, stream, from));
            }
        });
        server
    }
}

fn socket(address: &str) -> Socket {
    let address: SocketAddr = address.parse().unwrap();
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP)).unwrap();
    socket.set_reuse_address(true).unwrap();
    if address.is_ipv6() {
        socket.set_only_v6(true).unwrap();
    }
    socket.bind(&address.into()).unwrap();
    socket
}

fn serve(name: &str, mut stream: TcpStream, from: SocketAddr) {
    let local = stream.local_addr().unwrap();
    let reference = SockRef::from(&stream);
    let original = if local.is_ipv4() { reference.original_dst_v4() } else { reference.original_dst_v6() };
    let wanted = original.ok().and_then(|address: SockAddr| address.as_socket()).unwrap_or(local);
    let _ = stream.set_read_timeout(Some(PATIENCE));
    let _ = writeln!(stream, "{name} {wanted} {}", from.ip());
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

fn become_user(uid: u32) {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
    set_thread_res_gid(gid, gid, gid).unwrap();
    set_thread_res_uid(uid, uid, uid).unwrap();
}

fn port(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// A connection that one has, with a reader of what comes.
fn dial(to: SocketAddr) -> std::io::Result<(String, BufReader<TcpStream>)> {
    greeted(TcpStream::connect_timeout(&to, PATIENCE)?)
}

fn greeted(stream: TcpStream) -> std::io::Result<(String, BufReader<TcpStream>)> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line)?;
    Ok((line.trim().to_owned(), stream))
}

/// Whether what is sent comes back.
fn echoes(stream: &mut BufReader<TcpStream>) -> std::io::Result<bool> {
    stream.get_mut().write_all(b"there and back")?;
    let mut back = [0; 14];
    stream.read_exact(&mut back)?;
    Ok(&back == b"there and back")
}

impl Pod {
    /// What a process of the pod is told when it connects.
    fn pod_asks(&self, user: u32, to: SocketAddr) -> String {
        self.inside(|| {
            become_user(user);
            dial(to).map_or_else(|why| why.kind().to_string(), |(line, _)| line)
        })
    }

    /// What somebody outside is told.
    fn peer_asks(&self, source: &str, to: SocketAddr) -> String {
        self.outside(|| {
            let from = SocketAddr::new(source.parse().unwrap(), 0);
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
            socket.bind(&from.into()).unwrap();
            let asked = socket.connect_timeout(&to.into(), PATIENCE).and_then(|()| greeted(socket.into()));
            asked.map_or_else(|why| why.kind().to_string(), |(line, _)| line)
        })
    }
}

fn plan() -> Plan {
    Plan {
        proxy: ProxyOwner { uid: Some(PROXY), gid: None, mark: None },
        inbound: Some(InboundCapture {
            port: 15006,
            mode: InboundMode::Redirect,
            skip_ports: vec![9090],
            skip_sources: vec![format!("{FRIEND}/32").parse().unwrap(), format!("{FRIEND_V6}/128").parse().unwrap()],
        }),
        outbound: Some(OutboundCapture {
            port: 15001,
            skip_ports: vec![9090],
            skip_destinations: vec![
                format!("{FRIEND}/32").parse().unwrap(),
                format!("{FRIEND_V6}/128").parse().unwrap(),
            ],
            skip_uids: vec![SKIPPED],
            skip_gids: Vec::new(),
            by_cgroup: false,
        }),
        udp: Udp::Dns,
        dns_servers: vec![PEER.parse().unwrap()],
        half_closed: Duration::from_secs(3600),
    }
}

fn tproxy(preserve_source: bool) -> Plan {
    let mut plan = plan();
    let mode = InboundMode::Tproxy { mark: 0x1506, table: 1506, preserve_source };
    plan.inbound.as_mut().unwrap().mode = mode;
    plan
}

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
        assert_eq!((ask(APP, port(PEER_V6, 53)), ask(APP, port(PEER, 5353))), (Ok(()), refused));
        pod.apply(&with(Udp::Refuse, vec![PEER.parse().unwrap()]), backend);
        assert_eq!(ask(APP, port(PEER, 53)), refused);
        pod.apply(&with(Udp::Allow, Vec::new()), backend);
        assert_eq!((ask(APP, port(PEER, 5353)), from_peer(PEER, port(POD, 4000))), (Ok(()), Ok(())));
    }
}

#[test]
fn what_is_printed_is_what_is_applied_and_twice_is_as_once() {
    let Some(pod) = Pod::new() else { return };
    let Some(other) = Pod::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rules.nft");
    let mut many = plan();
    many.proxy = ProxyOwner { uid: Some(1), gid: Some(2), mark: Some(3) };
    many.outbound.as_mut().unwrap().skip_destinations =
        ["10.0.0.0/8", "10.64.0.0/11", "0.0.0.0/0", "2001:db8::/29", "::/0"].map(|net| net.parse().unwrap()).to_vec();
    for plan in [plan(), tproxy(false), tproxy(true), many] {
        std::fs::write(&file, intercept::nft_text(&plan)).unwrap();
        run(&format!("ip netns exec {} nft -f {}", other.pod, file.display()));
        pod.apply(&plan, Backend::Nftables);
        let first = pod.nft_list();
        assert_eq!(first, other.nft_list());
        pod.apply(&plan, Backend::Nftables);
        assert_eq!(first, pod.nft_list());
        // Whoever loads the text by hand has the same as we, and we know it.
        let without_routes = matches!(other.standing(&plan), Standing::Whole);
        assert!(
            without_routes || matches!(plan.inbound.unwrap().mode, InboundMode::Tproxy { preserve_source: true, .. })
        );
        for pod in [&pod, &other] {
            pod.inside(intercept::remove).unwrap();
            assert_eq!(pod.nft_list(), "");
        }
    }
}

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

#[test]
fn what_belongs_to_others_stays_and_nothing_of_ours_is_left() {
    let Some(pod) = Pod::new() else { return };
    let rules = |pod: &Pod| {
        ["iptables-legacy-save", "ip6tables-legacy-save", "ip rule", "ip -6 rule", "ip route show table all"]
            .map(|command| {
                let text = pod.in_pod(command);
                // Counters, times and link-local addresses change by themselves.
                let lines = text.lines().filter(|line| !line.starts_with(['#', ':']) && !line.contains("fe80:"));
                let lines = lines.map(str::to_owned);
                lines.collect::<Vec<_>>().join("\n")
            })
            .join("\n")
    };
    pod.in_pod("sh -ec 'nft add table inet other; nft add chain inet other out { type nat hook output priority -90\\; }; nft add rule inet other out tcp dport 1 accept'");
    pod.in_pod("iptables-legacy -t nat -A OUTPUT -p tcp --dport 2 -j ACCEPT");
    pod.in_pod("ip6tables-legacy -t nat -A OUTPUT -p tcp --dport 2 -j ACCEPT");
    // The tables of iptables are made by the first look at them.
    for table in ["mangle", "filter"] {
        pod.in_pod(&format!("sh -ec 'iptables-legacy -t {table} -S; ip6tables-legacy -t {table} -S'"));
    }
    pod.in_pod("ip rule add fwmark 0x77 lookup 77");
    let (nft, rest) = (pod.nft_list(), rules(&pod));
    for (plan, backend) in
        [(plan(), Backend::Nftables), (tproxy(true), Backend::Iptables), (tproxy(true), Backend::Nftables)]
    {
        pod.apply(&plan, backend);
        let with_ours = pod.nft_list();
        assert_eq!(with_ours.contains("table inet portcullis"), backend == Backend::Nftables);
        assert!(with_ours.starts_with(&nft), "{with_ours}");
        for line in rest.lines() {
            assert!(rules(&pod).contains(line), "{line}");
        }
    }
    for _ in 0..2 {
        pod.inside(intercept::remove).unwrap();
        assert_eq!((pod.nft_list(), rules(&pod)), (nft.clone(), rest.clone()));
    }
    pod.apply(&tproxy(true), Backend::Iptables);
    pod.inside(intercept::remove).unwrap();
    assert_eq!((pod.nft_list(), rules(&pod)), (nft, rest));
    assert_eq!(pod.standing(&plan()), Standing::Missing);
}

#[test]
fn what_another_hand_has_undone_is_noticed_and_mended() {
    let Some(pod) = Pod::new() else { return };
    let plan = tproxy(true);
    assert_eq!(pod.standing(&plan), Standing::Missing);
    pod.apply(&plan, Backend::Nftables);
    // How nft(8) names a rule of a chain that says this.
    let rule = |chain: &str, said: &str| {
        let list = pod.in_pod(&format!("nft -a list chain inet portcullis {chain}"));
        let line = list.lines().find(|line| line.contains(said)).unwrap().to_owned();
        format!("rule inet portcullis {chain} handle {}", line.split("handle ").nth(1).unwrap())
    };
    let damages: [&dyn Fn() -> String; 17] = [
        &|| "nft flush chain inet portcullis output_nat".to_owned(),
        &|| "nft flush table inet portcullis".to_owned(),
        &|| "nft insert rule inet portcullis output_nat accept".to_owned(),
        &|| "nft add rule inet portcullis prerouting_filter accept".to_owned(),
        &|| "nft add chain inet portcullis stray".to_owned(),
        &|| "nft add table inet portcullis { flags dormant\\; }".to_owned(),
        &|| "nft chain inet portcullis prerouting_filter { policy drop\\; }".to_owned(),
        &|| format!("nft delete {}", rule("output_nat", "15001")),
        &|| format!("nft replace {} meta l4proto tcp redirect to :15002", rule("output_nat", "15001")),
        &|| format!("nft replace {} meta skuid 1000 goto from_proxy", rule("output_nat", "skuid 1337")),
        &|| format!("nft replace {} meta skuid 1337 return", rule("output_nat", "skuid 1337")),
        &|| format!("nft replace {} meta l4proto tcp accept", rule("prerouting_filter", "reject")),
        &|| format!("nft replace {} ip daddr 10.99.0.0/16 return", rule("output_filter", "10.99.0.3")),
        &|| "ip rule del fwmark 0x1506".to_owned(),
        &|| "ip -6 rule del fwmark 0x1506".to_owned(),
        &|| "ip route flush table 1506".to_owned(),
        &|| "ip -6 route flush table 1506".to_owned(),
    ];
    for damage in damages {
        let damage = damage();
        pod.in_pod(&format!("sh -ec '{damage}'"));
        let standing = pod.standing(&plan);
        assert!(matches!(&standing, Standing::Differs(what) if !what.is_empty()), "{damage}: {standing:?}");
        pod.apply(&plan, Backend::Nftables);
    }
    pod.in_pod("nft delete table inet portcullis");
    assert_eq!(pod.standing(&plan), Standing::Missing);
    // A plan that is not the one applied is a difference too.
    pod.apply(&plan, Backend::Nftables);
    assert!(matches!(pod.standing(&self::plan()), Standing::Differs(_)));
}

#[test]
fn iptables_rules_that_another_hand_has_undone_are_noticed_and_mended() {
    let Some(pod) = Pod::new() else { return };
    for damage in [
        "iptables-legacy -t nat -F OUTPUT",
        "iptables-legacy -t nat -I OUTPUT -j ACCEPT",
        "ip6tables-legacy -t mangle -F PORTCULLIS_PREROUTING",
        "ip6tables-legacy -t filter -D PORTCULLIS_OUTPUT 1",
        "iptables-legacy -t nat -R PORTCULLIS_FROM_PROXY 1 -j RETURN",
    ] {
        pod.apply(&plan(), Backend::Iptables);
        pod.in_pod(damage);
        assert!(matches!(pod.standing(&plan()), Standing::Differs(_)), "{damage}");
        pod.inside(intercept::remove).unwrap();
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
