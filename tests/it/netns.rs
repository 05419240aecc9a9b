//! Network namespaces that stand for pods: hosts on a wire of their own, with IPv4 and IPv6 addresses, in which a test
//! runs programs and opens sockets as the application's or the proxy's user.
//!
//! The namespaces have no names and no process of their own. They live by open files of the test's process, so nothing
//! is left of them when it ends, however it ends. Needs root; where that or namespaces are not to be had, a test says
//! loudly that it was skipped, and is counted by `tests/run`.
#![allow(dead_code)]

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::process::{Gid, Uid};
use socket2::{Domain as Family, SockAddr, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;

use crate::agent::open_to_all;
use crate::harness::{Domain, Proxy, program, until};
use crate::wire::Wire;

/// The user that applications run as.
pub const APPLICATION: u32 = 2000;
/// The user that the proxy runs as, and by which the rules know it.
pub const PROXY: u32 = 1337;
/// Who sets up rules.
pub const ROOT: u32 = 0;

/// How long one attempt to connect may take. A packet that is dropped silently costs a test all of it.
pub const CONNECT: Duration = Duration::from_secs(3);

/// A network namespace.
#[derive(Clone, Debug)]
pub struct Namespace(Arc<File>);

impl Namespace {
    /// A new one, with nothing in it but a loopback interface that is down.
    ///
    /// # Errors
    /// Where namespaces are not to be had.
    fn new() -> io::Result<Self> {
        // What comes back tells that the process is in its namespace. It ends with its input.
        let mut first = std::process::Command::new("unshare")
            .args(["--net", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let (mut input, mut output) = (first.stdin.take().unwrap(), first.stdout.take().unwrap());
        let opened = input.write_all(b"?").and_then(|()| output.read_exact(&mut [0])).and_then(|()| {
            let own = std::fs::metadata("/proc/self/ns/net")?.ino();
            let opened = File::open(format!("/proc/{}/ns/net", first.id()))?;
            if opened.metadata()?.ino() == own { Err(io::Error::other("unshare did nothing")) } else { Ok(opened) }
        });
        drop(input);
        first.wait()?;
        Ok(Self(Arc::new(opened?)))
    }

    /// What other programs of root can open it by, as long as this process lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Does this on a thread that is in the namespace and belongs to this user. What sockets it opens stay there.
    pub async fn run<T: Send + 'static>(&self, uid: u32, job: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = Arc::clone(&self.0);
        let entered = move || {
            use std::os::fd::AsFd;
            let kind = Some(rustix::thread::LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(namespace.as_fd(), kind).unwrap();
            become_user(uid);
            job()
        };
        let joined = tokio::task::spawn_blocking(|| std::thread::spawn(entered).join()).await.unwrap();
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// A connection of this user from here.
    ///
    /// # Errors
    /// As connect(2) has them.
    pub async fn connect(&self, uid: u32, to: SocketAddr) -> io::Result<TcpStream> {
        self.connect_with(uid, to, |_| Ok(())).await
    }

    /// The same; the socket is prepared before it connects.
    ///
    /// # Errors
    /// As connect(2) has them, and those of the preparation.
    pub async fn connect_with(
        &self,
        uid: u32,
        to: SocketAddr,
        prepare: impl FnOnce(&Socket) -> io::Result<()> + Send + 'static,
    ) -> io::Result<TcpStream> {
        let dial = move || {
            let socket = Socket::new(Family::for_address(to), Type::STREAM, None)?;
            prepare(&socket)?;
            socket.connect_timeout(&SockAddr::from(to), CONNECT)?;
            Ok::<_, io::Error>(socket)
        };
        adopt(self.run(uid, dial).await?)
    }

    /// A listening socket of this user here. With port 0 the kernel chooses.
    pub async fn listen(&self, uid: u32, at: SocketAddr) -> TcpListener {
        let listener = self.run(uid, move || std::net::TcpListener::bind(at)).await;
        let listener = listener.unwrap_or_else(|error| panic!("{at}: {error}"));
        listener.set_nonblocking(true).unwrap();
        TcpListener::from_std(listener).unwrap()
    }

    /// Sets `name`, such as `net/ipv4/ip_forward`, in this namespace only.
    pub async fn sysctl(&self, name: &str, value: &str) {
        let (path, value) = (format!("/proc/sys/{name}"), value.to_owned());
        self.run(ROOT, move || std::fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}"))).await;
    }

    /// `program` as this user in here. It dies with the test, and if the test is killed, too.
    pub fn command(&self, uid: u32, program: impl AsRef<OsStr>) -> Command {
        self.command_with(uid, &[], program)
    }

    /// The same. Where the user is not root, it has these capabilities and can get no others.
    pub fn command_with(&self, uid: u32, capabilities: &[&str], program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path())).args(["--", "setpriv", "--pdeathsig", "KILL"]);
        if uid != ROOT {
            let uid = uid.to_string();
            let only: String = capabilities.iter().map(|name| format!(",+{name}")).collect();
            command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups"]);
            command.args(["inh-caps", "ambient-caps", "bounding-set"].map(|set| format!("--{set}=-all{only}")));
        }
        command.arg("--").arg(program).current_dir("/").env_remove("SPIFFE_ENDPOINT_SOCKET");
        command
    }

    /// Has `ip` do all of this in order.
    pub fn ip(&self, lines: &str) -> io::Result<()> {
        let mut ip = std::process::Command::new("nsenter")
            .arg(format!("--net={}", self.path()))
            .args(["--", "ip", "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let fed = ip.stdin.take().unwrap().write_all(lines.as_bytes());
        let output = ip.wait_with_output()?;
        fed?;
        if output.status.success() {
            return Ok(());
        }
        Err(io::Error::other(format!("ip: {}", String::from_utf8_lossy(&output.stderr).trim())))
    }
}

/// Gives this thread, and no other of the process, to a user who has no capabilities.
pub fn become_user(uid: u32) {
    if uid == ROOT {
        return;
    }
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    rustix::thread::set_thread_groups(&[]).unwrap();
    rustix::thread::set_thread_res_gid(group, group, group).unwrap();
    rustix::thread::set_thread_res_uid(user, user, user).unwrap();
}

/// A connected socket as the tests use it.
///
/// # Errors
/// If it cannot be had without blocking.
pub fn adopt(socket: Socket) -> io::Result<TcpStream> {
    socket.set_nonblocking(true)?;
    TcpStream::from_std(socket.into())
}

/// Whether this machine lets a test make namespaces with wires between them.
pub fn available() -> Result<(), String> {
    static ANSWER: OnceLock<Result<(), String>> = OnceLock::new();
    let ask = || {
        if !rustix::process::geteuid().is_root() {
            return Err("no root".to_owned());
        }
        let probe = Namespace::new().and_then(|probe| {
            probe.ip(
                "link add bridge type bridge\nlink add left type veth peer name right\nlink set left master bridge\n",
            )
        });
        probe.map_err(|error| format!("no network namespaces: {error}"))
    };
    ANSWER.get_or_init(ask).clone()
}

/// Whether namespaces are to be had. If not, the test is skipped, and that is said.
#[track_caller]
pub fn to_be_had() -> bool {
    let answer = available();
    if let Err(why) = &answer {
        skipped(why, std::panic::Location::caller());
    }
    answer.is_ok()
}

/// Says on the real standard error, not only into the output that the test runner keeps, that a test was skipped; and
/// leaves a line where `tests/run` counts.
pub fn skipped(why: &str, place: &std::panic::Location<'_>) {
    let thread = std::thread::current();
    // With one thread the test runner does not name it after the test.
    let place = place.to_string();
    let test = thread.name().filter(|name| *name != "main").unwrap_or(&place);
    let line = format!("SKIPPED ({why}): {test}\n");
    let _ = io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("PORTCULLIS_TEST_SKIPPED") {
        let file = File::options().append(true).create(true).open(&path);
        file.and_then(|mut file| file.write_all(line.as_bytes())).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    }
}

/// A wire: a bridge in a namespace of its own, to which pods are joined. It is also the host that they route to.
#[derive(Debug)]
pub struct Net {
    pub host: Namespace,
    pods: AtomicU8,
}

impl Net {
    /// Where the bridge answers, IPv4 and IPv6.
    pub const HOST: [IpAddr; 2] =
        [IpAddr::V4(Ipv4Addr::new(10, 77, 0, 254)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 0xfe))];

    /// A new wire, or none, and the test is over, where namespaces are not to be had.
    #[track_caller]
    pub fn new() -> Option<Self> {
        if !to_be_had() {
            return None;
        }
        let host = Namespace::new().unwrap();
        host.ip("link set lo up\nlink add wire type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
             addr add 10.77.0.254/24 broadcast 10.77.0.255 dev wire\naddr add fd00:77::fe/64 dev wire nodad\n\
             link set wire up\n")
            .unwrap();
        Some(Self { host, pods: AtomicU8::new(0) })
    }

    /// Another pod on the wire.
    pub async fn pod(&self, name: &'static str) -> Pod {
        let number = self.pods.fetch_add(1, Ordering::Relaxed) + 1;
        let (v4, v6) = (Ipv4Addr::new(10, 77, 0, number), Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, number.into()));
        let namespace = Namespace::new().unwrap();
        // No address is tentative for its first second.
        namespace.sysctl("net/ipv6/conf/default/accept_dad", "0").await;
        let peer = namespace.path();
        self.host
            .ip(&format!(
                "link add pod{number} type veth peer name eth0 netns {peer}\nlink set pod{number} master wire\n\
                 link set pod{number} up\n"
            ))
            .unwrap();
        namespace
            .ip(&format!(
                "link set lo up\naddr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\nlink set eth0 up\n\
                 route add default via 10.77.0.254\nroute add default via fd00:77::fe dev eth0\n"
            ))
            .unwrap();
        let pod = Pod { name, v4, v6, namespace };
        pod.up().await;
        pod
    }

    /// Listens to everything that passes between the pods from now on.
    pub async fn wire(&self) -> Wire {
        Wire::tap(self.host.clone()).await
    }
}

/// A host on the wire.
#[derive(Debug)]
pub struct Pod {
    pub name: &'static str,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub namespace: Namespace,
}

impl std::ops::Deref for Pod {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}

impl Pod {
    /// Both addresses with this port.
    pub fn at(&self, port: u16) -> [SocketAddr; 2] {
        [(self.v4, port).into(), (self.v6, port).into()]
    }

    /// Its address on the link alone, with this port, as another pod calls it; and as it calls itself.
    pub async fn on_link(&self, port: u16, from: &Pod) -> [SocketAddr; 2] {
        let (address, index) = self.link().await;
        let (_, scope) = from.link().await;
        [scope, index].map(|scope| SocketAddrV6::new(address, port, 0, scope).into())
    }

    /// The link-local address of eth0, and its index.
    async fn link(&self) -> (Ipv6Addr, u32) {
        // The net of `/proc/net` is that of the first thread.
        let addresses = self.run(ROOT, || std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap()).await;
        let fields = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        // Address, index, prefix, scope (0x20 is the link), flags, name.
        let line = addresses.lines().map(fields).find(|fields| fields[3] == "20" && fields[5] == "eth0");
        let line = line.unwrap_or_else(|| panic!("no address of the link: {addresses}"));
        (u128::from_str_radix(&line[0], 16).unwrap().into(), u32::from_str_radix(&line[1], 16).unwrap())
    }

    /// Waits until the bridge carries what the pod sends.
    async fn up(&self) {
        for host in Net::HOST {
            // Port 9 is nobody's: its refusal has made the whole way.
            until("the host to be reached", || async {
                let answer = self.connect(ROOT, (host, 9).into()).await;
                answer.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused).then_some(())
            })
            .await;
        }
    }

    /// `portcullis run` as the proxy's user.
    pub async fn proxy(&self, domain: &Domain, config: &str) -> Proxy {
        self.proxy_with(domain, config, &[]).await
    }

    /// The same with these capabilities.
    pub async fn proxy_with(&self, domain: &Domain, config: &str, capabilities: &[&str]) -> Proxy {
        hand_over(domain.path(), PROXY);
        let program = within_reach(Path::new(program()), domain.path());
        let command = self.command_with(PROXY, capabilities, program);
        Proxy::start_within(&self.namespace, domain.path(), self.name, config, command).await
    }
}

/// Gives a test's folder, and what is in it, to this user, and lets others see into it.
pub fn hand_over(dir: &Path, uid: u32) {
    open_to_all(dir);
    for entry in std::fs::read_dir(dir).unwrap() {
        std::os::unix::fs::lchown(entry.unwrap().path(), Some(uid), Some(uid)).unwrap();
    }
    std::os::unix::fs::chown(dir, Some(uid), Some(uid)).unwrap();
}

/// A program where other users can run it: itself, or a copy in a test's folder if it lies in somebody's private one.
pub fn within_reach(program: &Path, dir: &Path) -> PathBuf {
    let open = |dir: &Path| dir.as_os_str().is_empty() || std::fs::metadata(dir).is_ok_and(|dir| dir.mode() & 1 == 1);
    if program.ancestors().skip(1).all(open) {
        return program.to_owned();
    }
    let copy = dir.join(program.file_name().unwrap());
    if !copy.exists() {
        std::fs::hard_link(program, &copy).or_else(|_| std::fs::copy(program, &copy).map(|_| ())).unwrap();
    }
    copy
}
