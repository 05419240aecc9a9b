//! Resident memory and start-up of the real program: idle, with idle mTLS connections, and after they have closed.
//!
//! Not a criterion bench: each figure is one reading of one process. See README.md here.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use support::bare::client_config;
use support::{CLIENT, Ca, Key, SERVER};

struct Proxy {
    child: Child,
    admin: SocketAddr,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Proxy {
    fn start(dir: &std::path::Path, config: &str) -> Self {
        let path = dir.join("config.yaml");
        std::fs::write(&path, format!("{config}\nadmin: {{ listen: 127.0.0.1:0 }}\n")).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_portcullis"))
            .args(["run", "--config"])
            .arg(&path)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let admin = loop {
            let line = lines.next().expect("the proxy says where its admin address is").unwrap();
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            if let Some(admin) = line.get("admin").and_then(|admin| admin.as_str()) {
                break admin.parse().unwrap();
            }
        };
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, admin }
    }

    fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.admin).unwrap();
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn until(&self, path: &str, good: impl Fn(&str) -> bool) {
        let began = Instant::now();
        while !good(&self.get(path)) {
            assert!(began.elapsed() < Duration::from_secs(60), "{path}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Resident memory, KiB.
    fn resident(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    fn listener(&self) -> SocketAddr {
        let answer = self.get("/state");
        let state: serde_json::Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        state["listeners"][0]["address"].as_str().unwrap().parse().unwrap()
    }

    fn open(&self) -> u64 {
        let answer = self.get("/metrics");
        let line =
            answer.lines().find(|l| l.starts_with("portcullis_connections_open") && l.contains("inbound")).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }
}

fn main() {
    let _ = rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit {
            current: Some(60_000),
            maximum: rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum,
        },
    );
    let dir = tempfile::tempdir().unwrap();
    start_up(dir.path());
    let ca = Ca::new(Key::P384);
    let (server, client) = (ca.issue(SERVER), ca.issue(CLIENT));
    // A workload that accepts and says nothing.
    let workload = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = workload.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        while let Ok((stream, _)) = workload.accept() {
            kept.push(stream);
            // Those that the proxy has closed are let go.
            if kept.len() % 512 == 0 {
                kept.retain(|stream: &TcpStream| {
                    stream.set_nonblocking(true).unwrap();
                    !matches!(stream.peek(&mut [0]), Ok(0))
                });
            }
        }
    });
    let files = ca.write_files(dir.path(), &server);
    let config = format!("{files}inbound:\n  - {{name: in, listen: '127.0.0.1:0', to: '{to}', allow: ['{CLIENT}']}}\n");
    for count in [1000, 5000] {
        let proxy = Proxy::start(dir.path(), &config);
        proxy.until("/readyz", |answer| answer.starts_with("HTTP/1.1 200") || answer.starts_with("HTTP/1.0 200"));
        let at = proxy.listener();
        let tls = client_config(&ca, &client, "X25519MLKEM768", false);
        // The first connections grow what every process grows once.
        let warm: Vec<_> = (0..50).map(|_| connect(at, &tls)).collect();
        let before = proxy.resident();
        let idle: Vec<_> = (0..count).map(|_| connect(at, &tls)).collect();
        proxy.until("/metrics", |_| proxy.open() == count as u64 + 50);
        let with = proxy.resident();
        println!(
            "{count} idle mTLS connections: {:.1} KiB each ({} -> {} KiB resident)",
            (with - before) as f64 / f64::from(count),
            before,
            with
        );
        drop((idle, warm));
        proxy.until("/metrics", |_| proxy.open() == 0);
        let at_once = proxy.resident();
        std::thread::sleep(Duration::from_secs(12));
        println!("  after they closed: {at_once} KiB at once, {} KiB twelve seconds later", proxy.resident());
    }
}

/// From the start of the program to the first 200 of `/readyz`, against the embedded authority; then its idle size.
fn start_up(dir: &std::path::Path) {
    let config = "identity: {authority: {spiffe_id: 'spiffe://bench.example/server'}}\ninbound:\n  - {name: in, listen: '127.0.0.1:0', to: '127.0.0.1:1', allow: ['spiffe://bench.example/client']}\n";
    let mut took: Vec<Duration> = (0..11)
        .map(|_| {
            let began = Instant::now();
            let proxy = Proxy::start(dir, config);
            proxy.until("/readyz", |answer| answer.contains(" 200 "));
            began.elapsed()
        })
        .collect();
    took.sort();
    println!(
        "start to ready: median {:.1} ms, slowest of 11 {:.1} ms",
        took[5].as_secs_f64() * 1e3,
        took[10].as_secs_f64() * 1e3
    );
    let proxy = Proxy::start(dir, config);
    proxy.until("/readyz", |answer| answer.contains(" 200 "));
    println!("idle process: {} KiB resident", proxy.resident());
}

fn connect(at: SocketAddr, config: &Arc<rustls::ClientConfig>) -> (rustls::ClientConnection, TcpStream) {
    let mut stream = TcpStream::connect(at).unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let mut tls = rustls::ClientConnection::new(Arc::clone(config), name).unwrap();
    while tls.is_handshaking() || tls.wants_write() {
        tls.complete_io(&mut stream).unwrap();
    }
    (tls, stream)
}
