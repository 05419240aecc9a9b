//! A pod and a peer of it in two network namespaces, and servers in them that say who they are.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use portcullis::intercept::{
    self, Backend, InboundCapture, InboundMode, OutboundCapture, Plan, ProxyOwner, Standing, Udp, in_netns,
};
use rustix::thread::{Gid, Uid, set_thread_res_gid, set_thread_res_uid};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

use crate::harness::PATIENCE;
use crate::netns::{available, skipped};

pub const POD: &str = "10.99.0.2";
pub const POD_V6: &str = "fd99::2";
pub const ALIAS: &str = "10.99.7.7";
pub const PEER: &str = "10.99.0.1";
pub const PEER_V6: &str = "fd99::1";
/// A client that may reach the workload directly, and a server that may be reached.
pub const FRIEND: &str = "10.99.0.3";
pub const FRIEND_V6: &str = "fd99::3";
pub const APP: u32 = 1000;
pub const PROXY: u32 = 1337;
pub const SKIPPED: u32 = 1001;
pub const BACKENDS: [Backend; 2] = [Backend::Nftables, Backend::Iptables];

pub fn run(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}\n{said}");
    String::from_utf8(output.stdout).unwrap()
}

/// Two namespaces, joined by a cable: a pod, and a peer of it.
pub struct Pod {
    pub pod: String,
    pub peer: String,
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
    #[track_caller]
    pub fn new() -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        if let Err(why) = available() {
            skipped(&why, std::panic::Location::caller());
            return None;
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = |what: &str| format!("portcullis-{}-{number}-{what}", std::process::id());
        let pod = Self { pod: name("pod"), peer: name("peer") };
        let (a, b) = (&pod.pod, &pod.peer);
        run(&format!(
            "ip netns add {a}
             ip netns add {b}
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

    pub fn path(name: &str) -> PathBuf {
        Path::new("/run/netns").join(name)
    }

    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_netns(&Self::path(&self.pod), work).unwrap()
    }

    pub fn outside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_netns(&Self::path(&self.peer), work).unwrap()
    }

    pub fn apply(&self, plan: &Plan, backend: Backend) {
        let applied = self.inside(|| intercept::apply_with(plan, backend)).unwrap();
        assert_eq!(applied.backend, backend);
        assert_eq!(self.standing(plan), Standing::Whole, "{backend:?}");
    }

    /// Has conntrack look at connections from now on: without any rules it does not.
    pub fn track(&self) {
        self.in_pod("nft add table inet other");
        self.in_pod("nft add chain inet other in { type filter hook input priority 0\\; }");
        self.in_pod("nft add rule inet other in ct state new accept");
    }

    pub fn standing(&self, plan: &Plan) -> Standing {
        self.inside(|| intercept::standing(plan)).unwrap()
    }

    pub fn in_pod(&self, command: &str) -> String {
        run(&format!("ip netns exec {} {command}", self.pod))
    }

    pub fn at_peer(&self, command: &str) -> String {
        run(&format!("ip netns exec {} {command}", self.peer))
    }

    pub fn nft_list(&self) -> String {
        self.in_pod("nft list ruleset")
    }

    /// The servers of a pod: a workload, and what stands for the proxy.
    pub fn servers(&self) -> Vec<Server> {
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
pub struct Server(TcpListener);

impl Drop for Server {
    fn drop(&mut self) {
        // It would keep its namespace alive.
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }
}

impl Server {
    pub fn start(name: &'static str, address: &str) -> Self {
        Self::of(name, socket(address))
    }

    /// One that takes connections for foreign addresses.
    pub fn transparent(name: &'static str, address: &str) -> Self {
        let socket = socket(address);
        match address.starts_with('[') {
            true => socket.set_ip_transparent_v6(true).unwrap(),
            false => socket.set_ip_transparent_v4(true).unwrap(),
        }
        Self::of(name, socket)
    }

    pub fn of(name: &'static str, socket: Socket) -> Self {
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

pub fn socket(address: &str) -> Socket {
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
    let _ = stream.write_all(format!("{name} {wanted} {}\n", from.ip()).as_bytes());
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

pub fn become_user(uid: u32) {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
    set_thread_res_gid(gid, gid, gid).unwrap();
    set_thread_res_uid(uid, uid, uid).unwrap();
}

pub fn port(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// A connection that one has, with a reader of what comes.
pub fn dial(to: SocketAddr) -> std::io::Result<(String, BufReader<TcpStream>)> {
    greeted(TcpStream::connect_timeout(&to, PATIENCE)?)
}

pub fn greeted(stream: TcpStream) -> std::io::Result<(String, BufReader<TcpStream>)> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line)?;
    Ok((line.trim().to_owned(), stream))
}

/// Whether what is sent comes back.
pub fn echoes(stream: &mut BufReader<TcpStream>) -> std::io::Result<bool> {
    stream.get_mut().write_all(b"there and back")?;
    let mut back = [0; 14];
    stream.read_exact(&mut back)?;
    Ok(&back == b"there and back")
}

impl Pod {
    /// What a process of the pod is told when it connects.
    pub fn pod_asks(&self, user: u32, to: SocketAddr) -> String {
        self.inside(|| {
            become_user(user);
            dial(to).map_or_else(|why| why.kind().to_string(), |(line, _)| line)
        })
    }

    /// What somebody outside is told.
    pub fn peer_asks(&self, source: &str, to: SocketAddr) -> String {
        self.outside(|| {
            let from = SocketAddr::new(source.parse().unwrap(), 0);
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
            socket.bind(&from.into()).unwrap();
            let asked = socket.connect_timeout(&to.into(), PATIENCE).and_then(|()| greeted(socket.into()));
            asked.map_or_else(|why| why.kind().to_string(), |(line, _)| line)
        })
    }
}

pub fn plan() -> Plan {
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

pub fn tproxy(preserve_source: bool) -> Plan {
    let mut plan = plan();
    let mode = InboundMode::Tproxy { mark: 0x1506, table: 1506, preserve_source };
    plan.inbound.as_mut().unwrap().mode = mode;
    plan
}
