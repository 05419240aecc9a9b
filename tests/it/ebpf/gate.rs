//! A pod whose application is captured by the programs of its cgroup; who answers says where a connection went.

use std::io::{self, BufRead, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use libbpf_rs::query::{LinkInfoIter, LinkTypeInfo};
use portcullis::intercept::Error;
use portcullis::intercept::ebpf::{self, Cgroup};
use portcullis::intercept::plan::{OutboundCapture, Plan, ProxyOwner, Udp};
use socket2::{SockAddr, SockRef, Socket, Type};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::process::Command;

use crate::netns::{APPLICATION, Net, PROXY, Pod, ROOT, become_user, skipped};

/// The proxy's port.
pub const CAPTURE: u16 = 15001;
/// The port of servers.
pub const SERVER: u16 = 8080;

/// A cgroup below that of the tests. It is a threaded one (cgroups(7)), so that a single thread can be in it.
#[derive(Debug)]
pub struct OwnCgroup(pub PathBuf);

impl OwnCgroup {
    fn new() -> Result<Self, String> {
        Self::within(Cgroup::own().map_err(text)?.path())
    }

    /// One in another.
    pub fn below(other: &Self) -> Self {
        Self::within(&other.0).unwrap()
    }

    fn within(path: &Path) -> Result<Self, String> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = path.join(format!("portcullis-test-{}-{number}", std::process::id()));
        let made = std::fs::create_dir(&path).and_then(|()| {
            let made = Self(path.clone());
            std::fs::write(path.join("cgroup.type"), "threaded")?;
            Ok(made)
        });
        made.map_err(|error| format!("{}: {error}", path.display()))
    }

    pub fn opened(&self) -> Cgroup {
        Cgroup::open(&self.0).unwrap()
    }

    /// Puts this thread, and no other of the process, into it.
    pub fn join(path: &Path) {
        let thread = rustix::thread::gettid().as_raw_nonzero().to_string();
        std::fs::write(path.join("cgroup.threads"), thread).unwrap();
    }
}

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        // Threads that ended a moment ago may still be counted.
        for _ in 0..1000 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::yield_now();
        }
    }
}

/// Whether programs can be attached here.
fn available() -> Result<(), String> {
    static ANSWER: OnceLock<Result<(), String>> = OnceLock::new();
    let ask = || {
        let cgroup = OwnCgroup::new()?;
        let applied = ebpf::apply(&plan(), &cgroup.opened());
        let removed = ebpf::remove(&cgroup.opened());
        applied.and(removed.map(|_| ())).map_err(text)
    };
    ANSWER.get_or_init(ask).clone()
}

fn text(error: Error) -> String {
    error.to_string()
}

/// What is captured unless a test says otherwise.
pub fn plan() -> Plan {
    Plan {
        proxy: ProxyOwner { uid: Some(PROXY), gid: None, mark: None },
        inbound: None,
        outbound: Some(OutboundCapture {
            port: CAPTURE,
            skip_ports: Vec::new(),
            skip_destinations: Vec::new(),
            skip_uids: Vec::new(),
            skip_gids: Vec::new(),
            by_cgroup: true,
        }),
        udp: Udp::Refuse,
        dns_servers: Vec::new(),
        half_closed: Duration::from_secs(60),
    }
}

/// What is captured, with exemptions.
pub fn plan_with(change: impl FnOnce(&mut OutboundCapture)) -> Plan {
    let mut plan = plan();
    change(plan.outbound.as_mut().unwrap());
    plan
}

/// Where a connection went.
#[derive(Debug, PartialEq, Eq)]
pub enum Went {
    /// To the proxy, which learned that it was for this.
    ToProxy(SocketAddr),
    /// To the proxy, which did not learn for what.
    Unknown,
    /// To the server that it was for.
    Direct,
}

/// What a client met.
#[derive(Debug)]
pub struct Met {
    pub went: Went,
    /// Who the client believes to speak to.
    pub peer: SocketAddr,
}

/// A pod with a proxy on a wire, and servers on the other side of it.
pub struct Gate {
    pub pod: Pod,
    pub cgroup: Arc<OwnCgroup>,
    pub net: Net,
}

impl Gate {
    /// None, and the test is over, where this machine has no namespaces or no eBPF.
    #[track_caller]
    pub fn net() -> Option<(Net, OwnCgroup)> {
        let net = Net::new()?;
        if let Err(why) = available() {
            skipped(&format!("no eBPF: {why}"), std::panic::Location::caller());
            return None;
        }
        Some((net, OwnCgroup::new().unwrap()))
    }

    /// Servers answer in the host, on the wire's addresses; a proxy in the pod; nothing is captured yet.
    pub async fn open((net, cgroup): (Net, OwnCgroup)) -> Self {
        let pod = net.pod("pod").await;
        let gate = Self { pod, cgroup: Arc::new(cgroup), net };
        for host in Net::HOST {
            answer(gate.net.host.listen(ROOT, (host, SERVER).into()).await, false);
        }
        gate
    }

    /// The same, with a proxy that says what it has learned, and captured as `plan` has it.
    pub async fn closed(parts: (Net, OwnCgroup), plan: Plan) -> Self {
        let gate = Self::open(parts).await;
        gate.proxy().await;
        gate.apply(plan).await.unwrap();
        gate
    }

    pub async fn proxy(&self) {
        for loopback in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            answer(self.listen(PROXY, (loopback, CAPTURE).into()).await, true);
        }
    }

    /// A server in the pod that is not the proxy.
    pub async fn neighbour(&self, at: SocketAddr) {
        answer(self.listen(APPLICATION, at).await, false);
    }

    async fn listen(&self, uid: u32, at: SocketAddr) -> TcpListener {
        let listener = self.inside(uid, move || std::net::TcpListener::bind(at)).await.unwrap();
        listener.set_nonblocking(true).unwrap();
        TcpListener::from_std(listener).unwrap()
    }

    /// Does this in the pod and in the cgroup, as this user.
    pub async fn inside<T: Send + 'static>(&self, uid: u32, job: impl FnOnce() -> T + Send + 'static) -> T {
        let cgroup = self.cgroup.0.clone();
        let joined = move || {
            OwnCgroup::join(&cgroup);
            become_user(uid);
            job()
        };
        self.pod.run(ROOT, joined).await
    }

    /// A program in the pod and in the cgroup.
    pub fn command(&self, uid: u32, program: &str) -> Command {
        let mut command = self.pod.command(ROOT, "sh");
        command.args(["-c", "echo $$ >\"$0\"; exec \"$@\""]).arg(self.cgroup.0.join("cgroup.procs"));
        let uid = uid.to_string();
        command.args(["setpriv", "--reuid", &uid, "--regid", &uid, "--clear-groups", program]);
        command
    }

    pub async fn apply(&self, plan: Plan) -> Result<(), Error> {
        let cgroup = self.cgroup.opened();
        self.pod.run(ROOT, move || ebpf::apply(&plan, &cgroup)).await
    }

    pub async fn remove(&self) -> Result<bool, Error> {
        let cgroup = self.cgroup.opened();
        self.pod.run(ROOT, move || ebpf::remove(&cgroup)).await
    }

    pub async fn faults(&self, plan: Plan) -> Vec<ebpf::Fault> {
        let cgroup = self.cgroup.opened();
        self.pod.run(ROOT, move || ebpf::standing(&plan, &cgroup)).await.unwrap()
    }

    /// Connects as the application.
    pub async fn ask(&self, to: SocketAddr) -> io::Result<Met> {
        self.ask_as(APPLICATION, to, |_| Ok(())).await
    }

    /// Connects as this user, from a socket that was prepared.
    pub async fn ask_as(
        &self,
        uid: u32,
        to: SocketAddr,
        prepare: impl FnOnce(&Socket) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Met> {
        self.inside(uid, move || {
            let socket = Socket::new(socket2::Domain::for_address(to), Type::STREAM, None)?;
            prepare(&socket)?;
            dial(&socket, to)?;
            hear(&socket)
        })
        .await
    }

    /// The links that are attached to the cgroup, by id.
    pub fn links(&self) -> Vec<u32> {
        let id = std::fs::metadata(&self.cgroup.0).unwrap().ino();
        let ours =
            |link: &libbpf_rs::query::LinkInfo| matches!(&link.info, LinkTypeInfo::Cgroup(at) if at.cgroup_id == id);
        let mut links: Vec<u32> = LinkInfoIter::default().filter(ours).map(|link| link.id).collect();
        links.sort_unstable();
        links
    }

    /// Where the pins are.
    pub fn pins(&self) -> Option<PathBuf> {
        pins_of(&self.cgroup.0)
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        // The network namespace is gone when the test ends, the pins are not.
        if let Some(pins) = self.pins() {
            for pin in std::fs::read_dir(&pins).unwrap() {
                let _ = std::fs::remove_file(pin.unwrap().path());
            }
            let _ = std::fs::remove_dir(pins);
        }
    }
}

/// Where the pins of a cgroup are.
pub fn pins_of(cgroup: &Path) -> Option<PathBuf> {
    let id = std::fs::metadata(cgroup).unwrap().ino();
    let mut all = std::fs::read_dir("/sys/fs/bpf/portcullis").unwrap().map(|entry| entry.unwrap().path());
    all.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(&format!("{id}-")))
}

/// Addresses of both families on the other side of the wire.
pub fn servers() -> [SocketAddr; 2] {
    Net::HOST.map(|host| (host, SERVER).into())
}

/// An IPv4 address in the form of an IPv6 one.
pub fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(v4) => (v4.to_ipv6_mapped(), address.port()).into(),
        IpAddr::V6(_) => panic!("{address} is no IPv4"),
    }
}

pub fn dial(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    socket.set_write_timeout(Some(Duration::from_secs(3)))?;
    socket.connect(&SockAddr::from(to))
}

/// Reads the answer of whoever was reached.
pub fn hear(socket: &Socket) -> io::Result<Met> {
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    let (mut said, mut reader) = (String::new(), io::BufReader::new(socket));
    reader.read_line(&mut said)?;
    let peer = socket.peer_addr()?.as_socket().unwrap();
    Ok(Met { went: went(&said), peer })
}

/// What an answer means.
pub fn went(said: &str) -> Went {
    match said.split_whitespace().collect::<Vec<_>>()[..] {
        ["direct"] => Went::Direct,
        ["proxy", "unknown"] => Went::Unknown,
        ["proxy", original] => Went::ToProxy(original.parse().unwrap()),
        _ => panic!("'{said}' is no answer"),
    }
}

/// Tells whoever connects where he is; as the proxy also for what the connection was.
fn answer(listener: TcpListener, proxy: bool) {
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let said = match (proxy, original(&stream)) {
                (false, _) => "direct\n".to_owned(),
                (true, Some(original)) => format!("proxy {original}\n"),
                (true, None) => "proxy unknown\n".to_owned(),
            };
            tokio::spawn(async move {
                let _ = stream.write_all(said.as_bytes()).await;
                // A socket that is closed with unread bytes resets its connection.
                let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
            });
        }
    });
}

fn original(stream: &tokio::net::TcpStream) -> Option<SocketAddr> {
    let socket = SockRef::from(stream);
    let asked = match stream.local_addr().unwrap() {
        SocketAddr::V4(_) => socket.original_dst_v4(),
        SocketAddr::V6(_) => socket.original_dst_v6(),
    };
    asked.ok()?.as_socket()
}

/// Sends with these flags.
pub fn write(socket: &Socket, bytes: &[u8]) -> io::Result<usize> {
    let mut writer: &Socket = socket;
    writer.write(bytes)
}

/// Connects from this thread.
pub fn ask_from_here(to: SocketAddr) -> io::Result<Met> {
    let socket = Socket::new(socket2::Domain::for_address(to), Type::STREAM, None)?;
    dial(&socket, to)?;
    hear(&socket)
}
