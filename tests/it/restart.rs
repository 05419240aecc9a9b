//! Sockets that somebody else has opened, as systemd does: a new process takes over from an old one under load, and no
//! request fails. And what is passed by mistake.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use command_fds::CommandFdExt;
use command_fds::FdMapping;
use rustix::process::Signal;
use tokio::process::Command;

use crate::harness::{Domain, Proxy, free_port, program};
use crate::load::Load;
use crate::pair::{Extra, Pair, Way, http_origin};

/// A socket that is kept open while processes come and go.
struct Kept(TcpListener);

impl Kept {
    fn open() -> Self {
        Self(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    fn address(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }

    fn fd(&self) -> OwnedFd {
        self.0.try_clone().unwrap().into()
    }
}

/// Starts by the protocol of sd_listen_fds(3). The process has to know its own number beforehand, so a shell becomes it.
fn activated(command: &mut Command, config: &Path, sockets: Vec<OwnedFd>, pid: &str) {
    let mappings = (3..).zip(sockets);
    let mappings: Vec<_> = mappings.map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd }).collect();
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("LISTEN_PID={pid}; export LISTEN_PID; exec \"$0\" \"$@\"")]);
    shell.arg(program()).arg("run").arg("--config").arg(config);
    shell.env("LISTEN_FDS", mappings.len().to_string()).env("LISTEN_FDNAMES", "ignored");
    shell.fd_mappings(mappings).unwrap();
    *command = shell;
}

fn path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.yaml"))
}

async fn started(dir: &Path, name: &str, config: &str, sockets: Vec<OwnedFd>) -> Proxy {
    let file = path(dir, name);
    Proxy::start_with(dir, name, config, |command| activated(command, &file, sockets, "$$")).await
}

/// The next process is started and ready before the old one is told to end, as in any rolling restart.
async fn handed_over(mut old: Proxy, dir: &Path, name: &str, config: &str, socket: &Kept, load: &mut Load) -> Proxy {
    load.goes_on_for(200).await;
    let new = started(dir, name, config, vec![socket.fd()]).await;
    new.ready().await;
    old.running.signal(Signal::TERM);
    load.goes_on_for(200).await;
    assert!(old.running.wait().await.success());
    let said = old.running.heard().join("\n");
    assert!(said.contains("stopped") && !said.contains("the drain time was over"), "{name}: {said}");
    load.goes_on_for(200).await;
    new
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_both_sidecars_are_restarted_twice_under_load() {
    let (_origin, at) = http_origin().await;
    let domain = Domain::new("a.example");
    let (inbound, outbound) = (Kept::open(), Kept::open());
    let listen = |config: String, at: SocketAddr| config.replace("listen: 127.0.0.1:0", &format!("listen: {at}"));
    let server_config = listen(Pair::inbound(&domain, at, Extra::default()), inbound.address());
    let client_config = listen(Pair::outbound(&domain, inbound.address(), Extra::default()), outbound.address());
    let dir = domain.path();
    let mut server = started(dir, "server", &server_config, vec![inbound.fd()]).await;
    let mut client = started(dir, "client", &client_config, vec![outbound.fd()]).await;
    server.ready().await;
    client.ready().await;
    let mut load = Load::start(outbound.address());
    for _ in 0..2 {
        server = handed_over(server, dir, "server", &server_config, &inbound, &mut load).await;
        client = handed_over(client, dir, "client", &client_config, &outbound, &mut load).await;
    }
    let tally = load.all_went_well().await;
    // It really went through the processes that are there now, and on connections that were kept.
    for proxy in [&client, &server] {
        proxy.metric_reaches("portcullis_http_requests_total", &[("status_class", "2xx")], 200.0).await;
    }
    assert!(tally.streams.load(std::sync::atomic::Ordering::Relaxed) > 8, "{tally:?}");
    assert!(client.stop().await.success());
    // Whoever connects now is not refused: the socket is the service manager's, and the next process serves it.
    let waiting = Way::Plain(outbound.address());
    let asks = tokio::spawn(async move { waiting.request("GET /echo HTTP/1.1\r\nHost: a.example").await });
    let next = started(dir, "client", &client_config, vec![outbound.fd()]).await;
    assert_eq!(asks.await.unwrap().status, 200);
    drop((next, server));
}

/// The sockets that a process has open, and whether each is closed on exec.
fn sockets_of(pid: u32) -> Vec<(String, bool)> {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().filter_map(Result::ok);
    open.filter_map(|fd| {
        let link = std::fs::read_link(fd.path()).ok()?.display().to_string();
        let info = format!("/proc/{pid}/fdinfo/{}", fd.file_name().display());
        let info = std::fs::read_to_string(info).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?.trim();
        let flags = u32::from_str_radix(flags, 8).ok()?;
        link.starts_with("socket:").then_some((link, flags & 0o2_000_000 != 0))
    })
    .collect()
}

#[tokio::test]
async fn sockets_are_matched_by_address_and_the_rest_is_reported() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    let dir = pair.domain.path();
    let (tcp, admin, stray) = (Kept::open(), Kept::open(), Kept::open());
    let unix = dir.join("out.sock");
    let unix_socket = std::os::unix::net::UnixListener::bind(&unix).unwrap();
    let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let connected = TcpListener::bind("127.0.0.1:0").unwrap();
    let connected = std::net::TcpStream::connect(connected.local_addr().unwrap()).unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    let outbound = pair.client_config.replace("listen: 127.0.0.1:0", &format!("listen: {}", tcp.address()));
    let (head, listener) = outbound.split_once("outbound:\n").unwrap();
    let second = listener
        .replace("name: out", "name: by-path")
        .replace(&format!("listen: {}", tcp.address()), &format!("listen: 'unix://{}'", unix.display()));
    let config = format!("{head}outbound:\n{listener}{second}\nadmin: {{ listen: '{}' }}\n", admin.address());
    let sockets = vec![
        stray.fd(),
        datagrams.into(),
        unix_socket.try_clone().unwrap().into(),
        admin.fd(),
        connected.into(),
        file.into(),
        tcp.fd(),
    ];
    let proxy = started(dir, "activated", &config, sockets).await;
    proxy.ready().await;
    assert_eq!(proxy.admin, admin.address());
    let said = proxy.running.said.join("\n");
    assert!(said.contains(&stray.address().to_string()) && said.contains("nothing is declared"), "{said}");
    for why in
        ["descriptor 4: not a stream socket", "descriptor 7: a socket that does not", "descriptor 8: not a socket"]
    {
        assert!(said.contains(why), "{why}: {said}");
    }
    let way = Way::Plain(tcp.address());
    assert_eq!(way.request("GET /echo HTTP/1.1\r\nHost: a.example").await.status, 200);
    let socket = unix.display().to_string();
    assert_eq!(crate::pair::curl(&["--unix-socket", &socket, "http://a.example/echo"]).await.status, 200);
    // Nobody else has them: children get none, and no variable that says so.
    let pid = proxy.running.child.id().unwrap();
    let open = sockets_of(pid);
    assert!(open.iter().all(|(_, close_on_exec)| *close_on_exec), "{open:?}");
    let own = |name: &str| open.iter().any(|(link, _)| link == name);
    let inode = |fd: &dyn std::os::fd::AsFd| format!("socket:[{}]", rustix::fs::fstat(fd.as_fd()).unwrap().st_ino);
    assert!(own(&inode(&unix_socket)) && own(&inode(&tcp.0)) && !own(&inode(&stray.0)), "{open:?}");

    // A reload that takes a listener away closes its socket here: the service manager has the only other one.
    proxy.reloaded(&config.replace(&second, "")).await;
    assert!(proxy.state().await["listeners"].as_array().unwrap().iter().all(|l| l["name"] != "by-path"));
    let gone = async || (!sockets_of(pid).iter().any(|(link, _)| *link == inode(&unix_socket))).then_some(());
    crate::harness::until("the socket to be closed", gone).await;
    assert!(unix.exists(), "whoever made the file removes it");
    assert!(proxy.stop().await.success());
    assert!(unix.exists());
}

#[tokio::test]
async fn what_is_meant_for_another_process_is_left_alone() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    let (dir, port) = (pair.domain.path(), free_port().await);
    let config = pair.client_config.replace("listen: 127.0.0.1:0", &format!("listen: 127.0.0.1:{port}"));
    let file = path(dir, "other");
    let socket = Kept::open();
    for (pid, count, complaint) in [
        ("1", "1", None),
        ("$$", "many", Some("LISTEN_FDS is 'many'")),
        ("$$", "100000", Some("LISTEN_FDS is '100000'")),
    ] {
        let mut proxy = Proxy::start_with(dir, "other", &config, |command| {
            activated(command, &file, vec![socket.fd()], pid);
            command.env("LISTEN_FDS", count);
        })
        .await;
        proxy.ready().await;
        let said = proxy.running.heard().join("\n");
        match complaint {
            Some(complaint) => assert!(said.contains(complaint), "{said}"),
            None => assert!(!said.contains("a socket was passed"), "{said}"),
        }
        assert!(proxy.stop().await.success());
    }
}

#[tokio::test]
async fn whoever_connects_before_there_is_an_identity_is_served_later_and_not_refused() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    let (dir, socket) = (pair.domain.path(), Kept::open());
    let config = pair.client_config.replace("listen: 127.0.0.1:0", &format!("listen: {}", socket.address()));
    let (key, away) = (dir.join("client.key"), dir.join("client.key.away"));
    std::fs::rename(&key, &away).unwrap();
    let late = started(dir, "late", &config, vec![socket.fd()]).await;
    assert_eq!(late.get("/readyz").await.0, 503);
    let way = Way::Plain(socket.address());
    let asks = tokio::spawn(async move { way.request("GET /echo HTTP/1.1\r\nHost: a.example").await });
    // It has been asked by now, and would have said so.
    for _ in 0..20 {
        assert_eq!(late.get("/readyz").await.0, 503);
    }
    std::fs::rename(&away, &key).unwrap();
    assert_eq!(asks.await.unwrap().status, 200);
}
