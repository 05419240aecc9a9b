//! Captured connections beside explicit ones, by the real program in network namespaces: set-up, round trip, throughput
//! and CPU of every mode, in one interleaved run. Needs root; see README.md here.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]

mod support;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use portcullis::intercept::in_netns;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use support::bare::client_config;
use support::{CLIENT, Ca, Key, SERVER};

const PROGRAM: &str = env!("CARGO_BIN_EXE_portcullis");
const PROXY: u32 = 1337;
const WORKLOAD: u16 = 8080;
const EXPLICIT: u16 = 8443;
/// Connections for the set-up figures, of each mode.
const SETUPS: usize = 600;
/// Round trips of each size, of each mode.
const TRIPS: usize = 4000;
/// How often each throughput is measured.
const ROUNDS: usize = 5;

/// A network namespace, for as long as this lives.
struct Pod {
    /// In the namespace; it ends with us.
    holder: Child,
    address: Ipv4Addr,
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

impl Pod {
    fn new(address: Ipv4Addr) -> Self {
        let mut unshare = Command::new("unshare");
        unshare.args(["--net", "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = unshare.spawn().expect("unshare of util-linux");
        // What comes back tells that it is there.
        holder.stdin.as_mut().unwrap().write_all(b"?").unwrap();
        holder.stdout.as_mut().unwrap().read_exact(&mut [0]).expect("network namespaces, which root can make");
        let pod = Self { holder, address };
        pod.ip("link set lo up\n");
        pod
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.holder.id()).into()
    }

    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_netns(&self.path(), work).unwrap()
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    fn ip(&self, lines: &str) {
        let mut ip = self.command("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
        ip.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        assert!(ip.wait().unwrap().success(), "{lines}");
    }

    /// Joins it to the wire.
    fn join(&self, wire: &Pod, number: usize) {
        wire.ip(&format!(
            "link add p{number} type veth peer name eth0 netns {}\nlink set p{number} master wire up\n",
            self.holder.id()
        ));
        self.ip(&format!("addr add {}/24 dev eth0\nlink set eth0 up\n", self.address));
    }

    /// A workload that echoes what comes after an `e`, and counts in silence what comes after an `s`.
    fn serve(&self) {
        let listener = self.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, WORKLOAD)).unwrap());
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                std::thread::spawn(move || answer(stream));
            }
        });
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; 64 << 10];
    stream.read_exact(&mut buffer[..1])?;
    let echoes = buffer[0] == b'e';
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            count if echoes => stream.write_all(&buffer[..count])?,
            _ => {}
        }
    }
    stream.write_all(b".")
}

/// A proxy of a pod.
struct Proxy(Child);

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a proxy may do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rights {
    /// What everybody may.
    User,
    /// Have transparent sockets.
    Transparent,
    /// Load programs into the kernel.
    Root,
}

impl Proxy {
    /// Started and ready.
    fn start(pod: &Pod, config: &Path, rights: Rights) -> Self {
        let mut command = pod.command("setpriv");
        let user = PROXY.to_string();
        if rights != Rights::Root {
            command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]);
        }
        if rights == Rights::Transparent {
            command.args(["--inh-caps", "+net_raw", "--ambient-caps", "+net_raw"]);
        }
        command.args(["--pdeathsig", "KILL", "--", PROGRAM, "run", "--config"]).arg(config).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = Vec::new();
        let admin: SocketAddr = loop {
            let Some(Ok(line)) = lines.next() else { panic!("the proxy has ended: {said:?}") };
            let json: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
            if let Some(admin) = json.get("admin").and_then(|admin| admin.as_str()) {
                break admin.parse().unwrap();
            }
            said.push(line);
        };
        std::thread::spawn(move || lines.for_each(drop));
        let began = Instant::now();
        while !pod.run(|| ready(admin)) {
            assert!(began.elapsed() < Duration::from_secs(30), "the proxy is not ready");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self(child)
    }

    /// What it has used of the CPU.
    fn cpu(&self) -> Duration {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let fields: Vec<&str> = text.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
    }
}

fn ready(admin: SocketAddr) -> bool {
    let ask = || -> io::Result<String> {
        let mut stream = TcpStream::connect(admin)?;
        stream.write_all(b"GET /readyz HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.contains(" 200 "))
}

/// One connection to a workload.
enum Link {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Link {
    fn send(&mut self, bytes: &[u8]) {
        match self {
            Self::Plain(stream) => stream.write_all(bytes).unwrap(),
            Self::Tls(stream) => stream.write_all(bytes).unwrap(),
        }
    }

    fn receive(&mut self, bytes: &mut [u8]) {
        match self {
            Self::Plain(stream) => stream.read_exact(bytes).unwrap(),
            Self::Tls(stream) => stream.read_exact(bytes).unwrap(),
        }
    }

    /// Says that this was all, and waits until the workload has it.
    fn finish(mut self) {
        match &mut self {
            Self::Plain(stream) => stream.shutdown(Shutdown::Write).unwrap(),
            Self::Tls(stream) => {
                stream.conn.send_close_notify();
                stream.flush().unwrap();
            }
        }
        self.receive(&mut [0]);
    }
}

/// A way to a workload.
struct Mode<'a> {
    name: &'static str,
    /// Where the connection begins.
    from: &'a Pod,
    to: SocketAddr,
    /// Of the client, where it speaks TLS itself.
    tls: Option<Arc<ClientConfig>>,
    proxy: &'a Proxy,
}

impl Mode<'_> {
    fn tcp(&self) -> TcpStream {
        let stream = TcpStream::connect(self.to).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    fn dress(&self, stream: TcpStream) -> Link {
        match &self.tls {
            None => Link::Plain(stream),
            Some(config) => {
                let name = "localhost".try_into().unwrap();
                let connection = ClientConnection::new(Arc::clone(config), name).unwrap();
                Link::Tls(Box::new(StreamOwned::new(connection, stream)))
            }
        }
    }

    fn open(&self) -> Link {
        self.dress(self.from.run(|| self.tcp()))
    }

    /// From connect(2) to the first byte back. The thread is in the namespace before.
    fn setups(&self, count: usize) -> Vec<Duration> {
        self.from.run(|| {
            let one = || {
                let began = Instant::now();
                let mut link = self.dress(self.tcp());
                link.send(b"e.");
                link.receive(&mut [0]);
                let took = began.elapsed();
                link.finish();
                took
            };
            (0..count).map(|_| one()).collect()
        })
    }
}

fn plaintext<'a>(name: &'static str, from: &'a Pod, to: SocketAddr, proxy: &'a Proxy) -> Mode<'a> {
    Mode { name, from, to, tls: None, proxy }
}

fn median<T: Ord + Copy>(mut of: Vec<T>) -> T {
    of.sort_unstable();
    of[of.len() / 2]
}

fn micros(of: Duration) -> f64 {
    of.as_secs_f64() * 1e6
}

/// One line of figures, each beside the first mode's.
fn line(what: &str, modes: &[Mode<'_>], figures: &[f64]) {
    let shown: Vec<String> = modes
        .iter()
        .zip(figures)
        .map(|(mode, figure)| format!("{} {figure:.1} ({:.2})", mode.name, figure / figures[0]))
        .collect();
    println!("  {what:<28} {}", shown.join("   "));
}

fn compare(title: &str, modes: &[Mode<'_>]) {
    println!("{title}");
    let mut setups = vec![Vec::new(); modes.len()];
    modes.iter().for_each(|mode| drop(mode.setups(20)));
    for _ in 0..SETUPS / 10 {
        for (mode, took) in modes.iter().zip(&mut setups) {
            took.extend(mode.setups(10));
        }
    }
    line("set-up, us", modes, &setups.into_iter().map(|took| micros(median(took))).collect::<Vec<_>>());
    for size in [64, 16 << 10] {
        let mut links: Vec<Link> = modes.iter().map(Mode::open).collect();
        links.iter_mut().for_each(|link| link.send(b"e"));
        let (sent, mut back) = (vec![7; size], vec![0; size]);
        let mut trips = vec![Vec::new(); modes.len()];
        for _ in 0..TRIPS / 50 {
            for (link, took) in links.iter_mut().zip(&mut trips) {
                for _ in 0..50 {
                    let began = Instant::now();
                    link.send(&sent);
                    link.receive(&mut back);
                    took.push(began.elapsed());
                }
            }
        }
        let medians: Vec<f64> = trips.into_iter().map(|took| micros(median(took))).collect();
        line(&format!("round trip of {size} B, us"), modes, &medians);
    }
    for size in [1 << 10, 16 << 10, 64 << 10] {
        let total: usize = if size == 1 << 10 { 64 << 20 } else { 256 << 20 };
        let (mut rates, mut costs) = (vec![Vec::new(); modes.len()], vec![Vec::new(); modes.len()]);
        for _ in 0..ROUNDS {
            for (index, mode) in modes.iter().enumerate() {
                let mut link = mode.open();
                link.send(b"s");
                let bytes = vec![7; size];
                let (began, before) = (Instant::now(), mode.proxy.cpu());
                (0..total / size).for_each(|_| link.send(&bytes));
                link.finish();
                rates[index].push((total as f64 / began.elapsed().as_secs_f64() / 1e6) as u64);
                let cpu = mode.proxy.cpu().saturating_sub(before);
                costs[index].push((cpu.as_secs_f64() * 1e3 / (total as f64 / 1e9)) as u64);
            }
        }
        let medians = |of: Vec<Vec<u64>>| of.into_iter().map(|of| median(of) as f64).collect::<Vec<_>>();
        line(&format!("writes of {} KiB, MB/s", size >> 10), modes, &medians(rates));
        line(&format!("writes of {} KiB, CPU ms/GB", size >> 10), modes, &medians(costs));
    }
}

/// Files of an identity that the proxy may read, and a config beside them.
fn config(dir: &Path, name: &str, ca: &Ca, id: &str, rest: &str) -> PathBuf {
    let dir = dir.join(name);
    std::fs::create_dir(&dir).unwrap();
    let identity = ca.write_files(&dir, &ca.issue(id));
    let path = dir.join("config.yaml");
    let text = format!("{identity}admin: {{listen: '127.0.0.1:0'}}\ntelemetry: {{access_log: false}}\n{rest}");
    std::fs::write(&path, text).unwrap();
    for file in std::fs::read_dir(&dir).unwrap() {
        std::os::unix::fs::chown(file.unwrap().path(), Some(PROXY), None).unwrap();
    }
    path
}

fn redirect(pod: &Pod, config: &Path, more: &[&str]) {
    let mut apply = Command::new(PROGRAM);
    apply.args(["redirect", "apply", "--config"]).arg(config).arg("--netns").arg(pod.path()).args(more);
    let done = apply.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// A cgroup that this process, and what it starts, is in while this lives.
struct Cgroup {
    path: PathBuf,
    above: PathBuf,
}

impl Cgroup {
    fn enter() -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        let above: PathBuf = mounts.lines().find(|line| line.contains(" - cgroup2 "))?.split(' ').nth(4)?.into();
        let path = above.join(format!("portcullis-bench-{}", std::process::id()));
        std::fs::create_dir(&path).ok()?;
        std::fs::write(path.join("cgroup.procs"), std::process::id().to_string()).ok()?;
        Some(Self { path, above })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for process in std::fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = std::fs::write(self.above.join("cgroup.procs"), process);
        }
        let _ = std::fs::remove_dir(&self.path);
    }
}

fn main() {
    if !rustix::process::geteuid().is_root() {
        println!("intercept: skipped, it needs root to make network namespaces");
        return;
    }
    let cgroup = cfg!(feature = "ebpf").then(Cgroup::enter).flatten();
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(PROXY), None).unwrap();
    let ca = Ca::new(Key::P384);
    let wire = Pod::new(Ipv4Addr::UNSPECIFIED);
    wire.ip("link add wire type bridge\nlink set wire up\n");
    let pods: Vec<Pod> = (1..=6).map(|number| Pod::new(Ipv4Addr::new(10, 79, 0, number))).collect();
    pods.iter().enumerate().for_each(|(number, pod)| pod.join(&wire, number));
    let [tester, server, handed, client, programs, spare] = &pods[..] else { panic!("six pods") };
    [server, handed, spare].into_iter().for_each(Pod::serve);

    let inbound = |mode: &str| {
        format!(
            "intercept: {{check_interval: 1h, inbound: {{mode: {mode}}}}}\ninbound:\n  - {{name: explicit, listen: '0.0.0.0:{EXPLICIT}', \
             to: '127.0.0.1:{WORKLOAD}', allow: ['{CLIENT}']}}\n  - {{name: taken, capture: [{WORKLOAD}], allow: ['{CLIENT}']}}\n"
        )
    };
    let outbound = |mode: &str| {
        let to = SocketAddr::from((server.address, EXPLICIT));
        format!(
            "intercept: {{check_interval: 1h, outbound: {{mode: {mode}}}}}\noutbound:\n  - {{name: explicit, listen: '127.0.0.1:9001', \
             to: '{to}', expect: '{SERVER}'}}\n  - {{name: taken, capture: {{addresses: ['{}']}}, expect: '{SERVER}'}}\n  - {{name: passing, capture: {{addresses: ['{}']}}, passthrough: any}}\n",
            server.address, spare.address
        )
    };
    let configs = [
        config(dir.path(), "server", &ca, SERVER, &inbound("redirect")),
        config(dir.path(), "handed", &ca, SERVER, &inbound("tproxy")),
        config(dir.path(), "client", &ca, CLIENT, &outbound("redirect")),
    ];
    for (pod, config) in [server, handed, client].into_iter().zip(&configs) {
        redirect(pod, config, &[]);
    }
    let applied: Vec<Duration> = (0..21)
        .map(|_| {
            let began = Instant::now();
            redirect(&wire, &configs[0], &[]);
            began.elapsed()
        })
        .collect();
    println!("redirect apply, the whole process: {:.1} ms", micros(median(applied)) / 1e3);

    let proxies = [
        Proxy::start(server, &configs[0], Rights::User),
        Proxy::start(handed, &configs[1], Rights::Transparent),
        Proxy::start(client, &configs[2], Rights::User),
    ];
    let tls = client_config(&ca, &ca.issue(CLIENT), "X25519MLKEM768", false);
    let towards = |name, port, index: usize| Mode {
        name,
        from: tester,
        to: (if index == 0 { server.address } else { handed.address }, port).into(),
        tls: Some(Arc::clone(&tls)),
        proxy: &proxies[index],
    };
    compare(
        "inbound, a client that speaks mTLS itself (beside explicit)",
        &[towards("explicit", EXPLICIT, 0), towards("REDIRECT", WORKLOAD, 0), towards("TPROXY", WORKLOAD, 1)],
    );
    let captured = SocketAddr::from((server.address, EXPLICIT));
    let mut modes = vec![
        plaintext("explicit", client, ([127, 0, 0, 1], 9001).into(), &proxies[2]),
        plaintext("REDIRECT", client, captured, &proxies[2]),
    ];
    let by_program = cgroup.as_ref().map(|cgroup| {
        let config = config(dir.path(), "programs", &ca, CLIENT, &outbound("ebpf"));
        redirect(programs, &config, &["--cgroup", cgroup.path.to_str().unwrap()]);
        Proxy::start(programs, &config, Rights::User)
    });
    match &by_program {
        Some(proxy) => modes.push(plaintext("eBPF", programs, captured, proxy)),
        None => println!("eBPF capture: skipped, it needs the feature `ebpf` and cgroup2"),
    }
    compare("outbound, a client that speaks plaintext, through both sidecars (beside explicit)", &modes);
    drop(modes);
    // Without mTLS of ours: both plaintext, once as it is and once through the sidecar, by splice(2).
    compare(
        "outbound, pass-through of plaintext by one sidecar",
        &[plaintext("REDIRECT", client, (spare.address, WORKLOAD).into(), &proxies[2])],
    );
    acceleration(dir.path(), &ca, spare, server);
    if let Some(cgroup) = &cgroup {
        let mut remove = Command::new(PROGRAM);
        remove.args(["redirect", "remove", "--netns"]).arg(programs.path()).arg("--cgroup").arg(&cgroup.path);
        assert!(remove.status().unwrap().success());
    }
}

/// Whether this kernel lets plaintext go by sockmap; figures only where it does.
fn acceleration(dir: &Path, ca: &Ca, pod: &Pod, server: &Pod) {
    let to = SocketAddr::from((server.address, EXPLICIT));
    let rest = format!(
        "accelerate: require\noutbound:\n  - {{name: out, listen: '127.0.0.1:9001', to: '{to}', expect: '{SERVER}'}}\n"
    );
    let path = config(dir, "accelerated", ca, CLIENT, &rest);
    let plain = config(dir, "plain", ca, CLIENT, &rest.replace("accelerate: require\n", "").replace("9001", "9002"));
    let tried = pod.command(PROGRAM).args(["run", "--config"]).arg(&path).stderr(Stdio::piped()).spawn();
    let mut tried = tried.unwrap();
    let mut lines = BufReader::new(tried.stderr.take().unwrap()).lines();
    let first = lines.next().and_then(Result::ok).unwrap_or_default();
    let _ = tried.kill();
    let _ = tried.wait();
    if first.contains("cannot be had") {
        return println!("sockmap: {first}");
    }
    let proxies = [Proxy::start(pod, &plain, Rights::Root), Proxy::start(pod, &path, Rights::Root)];
    let modes = [
        plaintext("TCP", pod, ([127, 0, 0, 1], 9002).into(), &proxies[0]),
        plaintext("sockmap", pod, ([127, 0, 0, 1], 9001).into(), &proxies[1]),
    ];
    compare("outbound by sockmap (beside TCP)", &modes);
}
