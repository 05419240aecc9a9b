//! The proxy's own sandbox: what is in force is told and is true, it bites, and what has to work within it does. That nothing
//! else suffers is what all other tests show: they run within it, too.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use landlock::{AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::process::Command;

use crate::harness::{
    Domain, Joined, Proxy, Running, echo, exchange, field, identity_files, inbound_listener, output, program, until,
};
use crate::testing::Spec;

const PARTS: [&str; 5] = ["no_new_privs", "core_dumps", "capabilities", "landlock", "seccomp"];

/// Whether this kernel has Landlock, asked of the kernel and not of the program under test.
fn landlock_is_here() -> bool {
    let strict = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    strict.handle_access(AccessFs::ReadFile).is_ok_and(|rules| rules.create().is_ok())
}

/// For the log of a run: what could not be looked at here, and why.
fn skipped(why: &str) {
    eprintln!("SKIPPED: {why}");
}

/// What `/proc/…/status` says, by field.
fn status(path: impl AsRef<Path>) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(path).unwrap();
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

/// The same of every thread of a process.
fn threads(pid: u32) -> Vec<BTreeMap<String, String>> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.map(|task| status(task.unwrap().path().join("status"))).collect()
}

fn pid(proxy: &Proxy) -> u32 {
    proxy.running.child.id().unwrap()
}

/// A set of capabilities as `/proc` writes it.
fn capabilities(of: &BTreeMap<String, String>, set: &str) -> u64 {
    u64::from_str_radix(&of[set], 16).unwrap()
}

const CAP_SETPCAP: u64 = 1 << 8;
const CAP_NET_BIND_SERVICE: u64 = 1 << 10;

#[tokio::test]
async fn what_is_said_to_be_in_force_is_so_for_every_thread() {
    let joined = Joined::start("", "").await;
    joined.connected().await;
    let sandbox = joined.server.state().await["sandbox"].clone();
    assert_eq!(sandbox["mode"], "prefer", "by default");
    for part in PARTS {
        let expected = part != "landlock" || landlock_is_here();
        assert_eq!(sandbox[part]["in_force"], expected, "{part}: {sandbox}");
        assert_eq!(sandbox[part]["why"].is_null(), expected, "{part}: {sandbox}");
    }
    let us = status("/proc/self/status");
    let pid = pid(&joined.server);
    let all = threads(pid);
    assert!(all.len() > 3, "{}", all.len());
    for thread in &all {
        let name = &thread["Name"];
        assert_eq!(thread["NoNewPrivs"], "1", "{name}");
        assert_eq!(thread["Seccomp"], "2", "{name}");
        for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            assert_eq!(capabilities(thread, set), 0, "{name}: {set}");
        }
        if capabilities(&us, "CapEff") & CAP_SETPCAP != 0 {
            assert_eq!(capabilities(thread, "CapBnd"), 0, "{name}");
        }
    }
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core: Vec<_> =
        limits.lines().find(|line| line.starts_with("Max core file size")).unwrap().split_whitespace().collect();
    assert_eq!(core[4..6], ["0", "0"]);
    // The process can still read about itself.
    let metrics = joined.server.metrics().await;
    assert!(metrics.sum("portcullis_process_open_fds", &[]) > 3.0);
    assert!(metrics.sum("portcullis_process_resident_memory_bytes", &[]) > 1e6);
}

#[tokio::test]
async fn the_log_says_at_start_what_is_in_force() {
    let domain = Domain::new("a.example");
    let workload = echo().await;
    let listener = inbound_listener("in", workload.address, &domain.id("/client"), "");
    let mut proxy = Proxy::start(domain.path(), "server", &format!("{}{listener}", domain.identity("/server"))).await;
    let said = proxy.running.heard().iter().find(|line| line.contains("\"message\":\"sandbox\"")).cloned().unwrap();
    for part in PARTS.iter().filter(|part| **part != "landlock" || landlock_is_here()) {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[tokio::test]
async fn off_leaves_the_process_as_it_was_started() {
    let joined = Joined::start("", "sandbox: off\n").await;
    let sandbox = joined.server.state().await["sandbox"].clone();
    assert_eq!(sandbox["mode"], "off");
    let us = status("/proc/self/status");
    let it = status(format!("/proc/{}/status", pid(&joined.server)));
    for field in ["NoNewPrivs", "Seccomp", "CapEff", "CapBnd"] {
        assert_eq!(it[field], us[field], "{field}");
    }
    for part in PARTS {
        assert_eq!(sandbox[part]["in_force"], false, "{part}");
    }
}

#[tokio::test]
async fn a_file_outside_is_out_of_reach_and_one_inside_is_read_when_it_changes() {
    if !landlock_is_here() {
        return skipped("this kernel has no Landlock");
    }
    let mut joined = Joined::start("", "").await;
    let serial = async |proxy: &Proxy| proxy.state().await["identity"]["serial"].as_str().unwrap().to_owned();
    let before = serial(&joined.server).await;

    // A good certificate, with its key, in another directory, that a link leads to.
    let outside = tempfile::tempdir().unwrap();
    let next = joined.domain.ca.issue(&Spec::leaf(joined.domain.id("/server")).dns("localhost"));
    identity_files(outside.path(), "server", &next, &[("a.example", joined.domain.ca.pem())]);
    for file in ["server.crt", "server.key"] {
        let inside = joined.domain.path().join(file);
        std::fs::remove_file(&inside).unwrap();
        std::os::unix::fs::symlink(outside.path().join(file), inside).unwrap();
    }
    joined.server.logged(&["server.", "Permission denied"]).await;
    assert_eq!(serial(&joined.server).await, before);
    joined.connected().await;

    // The same files within: taken without a word.
    identity_files(joined.domain.path(), "server", &next, &[("a.example", joined.domain.ca.pem())]);
    until("the next certificate", async || (serial(&joined.server).await != before).then_some(())).await;
    joined.connected().await;
}

#[tokio::test]
async fn a_reload_that_needs_another_directory_is_refused_with_what_to_do() {
    if !landlock_is_here() {
        return skipped("this kernel has no Landlock");
    }
    let domain = Domain::new("a.example");
    let workload = echo().await;
    // Not below the directory of the config, all of which stays readable.
    let folder = tempfile::tempdir().unwrap();
    for directory in ["modules", "sockets", "elsewhere"] {
        std::fs::create_dir(folder.path().join(directory)).unwrap();
    }
    let at = |name: &str| folder.path().join(name).display().to_string();
    for module in ["modules/a.rego", "modules/b.rego", "elsewhere/c.rego"] {
        std::fs::write(at(module), "package portcullis.authz\ndefault allow := true\n").unwrap();
    }
    let identity = domain.identity("/server");
    let config = |module: &str, socket: &str| {
        format!(
            "{identity}inbound:\n  - {{ name: in, listen: '127.0.0.1:0', to: '{}', protocol: http, allow: ['{}'],\n      \
             http: {{ rego: {{ module: {} }} }} }}\n\
             outbound:\n  - {{ name: out, listen: 'unix://{}', to: 'localhost:1', expect: '{}' }}\n",
            workload.address,
            domain.id("/client"),
            at(module),
            at(socket),
            domain.id("/client"),
        )
    };
    let first = config("modules/a.rego", "sockets/a.sock");
    let mut proxy = Proxy::start(domain.path(), "server", &first).await;
    proxy.ready().await;

    for (module, socket, named) in [
        ("elsewhere/c.rego", "sockets/a.sock", "inbound 'in', http.rego: "),
        ("modules/a.rego", "elsewhere/a.sock", "outbound 'out', listen: "),
    ] {
        proxy.reload(&config(module, socket));
        let line = proxy.logged(&["config not reloaded; the old one goes on", named]).await;
        assert!(line.contains("elsewhere/") && line.contains("restart"), "{line}");
        UnixStream::connect(at("sockets/a.sock")).await.unwrap();
    }
    proxy.reloaded(&config("modules/b.rego", "sockets/b.sock")).await;
    UnixStream::connect(at("sockets/b.sock")).await.unwrap();
    until("the old socket to go", async || (!Path::new(&at("sockets/a.sock")).exists()).then_some(())).await;

    proxy.reload(&format!("{}sandbox: off\n", config("modules/b.rego", "sockets/b.sock")));
    proxy.logged(&["sandbox: cannot be changed while running"]).await;
    assert!(proxy.stop().await.success());
    assert!(!Path::new(&at("sockets/b.sock")).exists(), "its file is removed in the end");
}

/// A port below 1024 that is free.
fn low_port() -> Option<u16> {
    (600..1024).find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok())
}

#[tokio::test]
async fn the_capability_for_low_ports_is_kept_where_one_is_declared_and_nowhere_else() {
    let start = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap();
    let us = status("/proc/self/status");
    if start.trim() != "1024" || capabilities(&us, "CapEff") & CAP_NET_BIND_SERVICE == 0 {
        return skipped("low ports are free for all here, or we may not have them");
    }
    let domain = Domain::new("a.example");
    let workload = echo().await;
    let listener = |port: u16| {
        let to = workload.address;
        format!(
            "  - {{ name: p{port}, listen: '127.0.0.1:{port}', to: '{to}', allow: ['{}'] }}\n",
            domain.id("/client")
        )
    };
    let identity = domain.identity("/server");
    let low = low_port().unwrap();

    let proxy = Proxy::start(domain.path(), "low", &format!("{identity}inbound:\n{}", listener(low))).await;
    assert_eq!(capabilities(&status(format!("/proc/{}/status", pid(&proxy))), "CapEff"), CAP_NET_BIND_SERVICE);
    let detail = proxy.state().await["sandbox"]["capabilities"]["detail"].to_string();
    assert!(detail.contains("CAP_NET_BIND_SERVICE"), "{detail}");
    // Another one can come, because that capability stayed.
    let second = (low + 1..1024).find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok()).unwrap();
    proxy.reloaded(&format!("{identity}inbound:\n{}{}", listener(low), listener(second))).await;
    proxy.stop().await;

    let high = format!("{identity}inbound:\n{}", listener(0));
    let mut proxy = Proxy::start(domain.path(), "high", &high).await;
    proxy.reload(&format!("{high}{}", listener(low)));
    let line = proxy.logged(&["config not reloaded; the old one goes on", "CAP_NET_BIND_SERVICE"]).await;
    assert!(line.contains("restart"), "{line}");
}

/// As in most containers. The proxy cannot ask again once it is confined, and a reload must know all the same.
#[tokio::test]
async fn where_low_ports_are_free_for_all_a_reload_adds_one_without_a_capability() {
    let script = "ip link set lo up && echo 0 > /proc/sys/net/ipv4/ip_unprivileged_port_start && exec \"$@\"";
    let within = |program: &str| {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", script, "sh", program]);
        command
    };
    if !output(&mut within("true"), "").await.status.success() {
        return skipped("network namespaces are not to be had here");
    }
    let domain = Domain::new("a.example");
    let listener = |port: u16| {
        format!(
            "  - {{ name: p{port}, listen: '127.0.0.1:{port}', to: '127.0.0.1:1', allow: ['{}'] }}\n",
            domain.id("/a")
        )
    };
    let first =
        format!("{}admin: {{ listen: '127.0.0.1:0' }}\ninbound:\n{}", domain.identity("/server"), listener(8443));
    let config = domain.path().join("server.yaml");
    std::fs::write(&config, &first).unwrap();
    let mut running = Running::start(within(program()).arg("run").arg("--config").arg(&config));
    let admin = running.line("the admin address", |line| field(line, "admin")?.parse().ok()).await;
    let mut proxy = Proxy::adopted(running, admin, config);
    assert_eq!(capabilities(&status(format!("/proc/{}/status", pid(&proxy))), "CapEff"), 0);
    proxy.reload(&format!("{first}{}", listener(443)));
    proxy.logged(&["config reloaded"]).await;
}

/// What SPIRE's agent looks at to know its caller: the owner of `/proc/PID` must be the one that the socket tells of.
#[tokio::test]
async fn another_process_sees_who_we_are_and_not_what_we_hold() {
    if !rustix::process::geteuid().is_root() {
        return skipped("only root can run the proxy as another user");
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::copy(program(), at("portcullis")).unwrap();
    let config = "identity: { authority: { spiffe_id: 'spiffe://a.example/a', state_dir: state/of/ours } }\n\
                  inbound: [{ name: in, listen: '127.0.0.1:0', to: '127.0.0.1:1', allow: ['spiffe://a.example'] }]\n\
                  admin: { listen: '127.0.0.1:0' }\n";
    std::fs::write(at("a.yaml"), config).unwrap();
    chown(folder.path(), Some(4321), Some(4321)).unwrap();
    let mut command = Command::new(at("portcullis"));
    command.arg("run").arg("--config").arg(at("a.yaml")).uid(4321).gid(4321);
    let mut running = Running::start(&mut command);
    let admin = running.line("the admin address", |line| field(line, "admin")?.parse().ok()).await;
    let proxy = Proxy::adopted(running, admin, at("a.yaml"));
    proxy.ready().await;
    assert!(at("state/of/ours/authority.json").exists(), "the directory was made before the walls stood");

    let proc = format!("/proc/{}", pid(&proxy));
    let owner = |path: &str| std::fs::symlink_metadata(path).map(|meta| (meta.uid(), meta.gid())).unwrap();
    assert_eq!(owner(&proc), (4321, 4321));
    assert_eq!(owner(&format!("{proc}/environ")), (0, 0));
    // The same user, without more rights than that.
    let read = |file: &str| {
        let mut command = Command::new("cat");
        command.arg(format!("{proc}/{file}")).uid(4321).gid(4321);
        command
    };
    for (file, readable) in [("stat", true), ("status", true), ("cgroup", true), ("environ", false), ("maps", false)] {
        assert_eq!(output(&mut read(file), "").await.status.success(), readable, "{file}");
    }
}

/// A filter that answers one system call as a kernel without it does.
fn without(call: i64) -> BpfProgram {
    let rules = [(call, Vec::new())].into_iter().collect();
    let unknown = SeccompAction::Errno(u32::try_from(libc::ENOSYS).unwrap());
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    SeccompFilter::new(rules, SeccompAction::Allow, unknown, architecture).unwrap().try_into().unwrap()
}

/// Does something on a thread of its own, and in the processes that it starts, on a kernel that lacks a system call.
fn on_a_kernel_without<T: Send + 'static>(call: i64, act: impl AsyncFnOnce() -> T + Send + 'static) -> T {
    let lacking = move || {
        seccompiler::apply_filter(&without(call)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(act())
    };
    std::thread::spawn(lacking).join().unwrap()
}

/// A config that runs, and its folder.
fn standing_alone(rest: &str) -> (Domain, String) {
    let domain = Domain::new("a.example");
    let listener = inbound_listener("in", ([127, 0, 0, 1], 1).into(), &domain.id("/client"), "");
    let config = format!("{}{listener}{rest}", domain.identity("/server"));
    (domain, config)
}

#[test]
fn what_the_kernel_lacks_is_a_warning_and_for_who_requires_it_the_end() {
    for (call, part, words) in [
        (libc::SYS_landlock_create_ruleset, "landlock", "no Landlock"),
        (libc::SYS_seccomp, "seccomp", "takes no filter"),
        (libc::SYS_capset, "capabilities", "cannot be given up"),
    ] {
        on_a_kernel_without(call, async move || {
            let (domain, config) = standing_alone("");
            let mut proxy = Proxy::start(domain.path(), "server", &config).await;
            proxy.ready().await;
            let sandbox = proxy.state().await["sandbox"].clone();
            assert_eq!(sandbox[part]["in_force"], false, "{sandbox}");
            assert!(sandbox[part]["why"].as_str().unwrap().contains(words), "{sandbox}");
            let others = PARTS.iter().filter(|other| **other != part && (**other != "landlock" || landlock_is_here()));
            assert!(others.clone().all(|other| sandbox[*other]["in_force"] == true), "{sandbox}");
            let told = |line: &String| line.contains("\"WARN\"") && line.contains(part) && line.contains(words);
            assert!(proxy.running.heard().iter().any(told), "{:?}", proxy.running.said);

            std::fs::write(domain.path().join("strict.yaml"), format!("{config}sandbox: require\n")).unwrap();
            let mut command = Command::new(program());
            command.arg("run").arg("--config").arg(domain.path().join("strict.yaml"));
            let ended = output(&mut command, "").await;
            let said = String::from_utf8(ended.stderr).unwrap();
            assert_eq!(ended.status.code(), Some(1), "{said}");
            let last = said.lines().last().unwrap();
            assert!(last.starts_with("portcullis: sandbox: require, but ") && last.contains(words), "{said}");
        });
    }
}

#[tokio::test]
async fn require_runs_where_all_of_it_is_to_be_had() {
    let (domain, config) = standing_alone("sandbox: require\n");
    if !landlock_is_here() {
        return skipped("this kernel has no Landlock");
    }
    let proxy = Proxy::start(domain.path(), "server", &config).await;
    proxy.ready().await;
    let sandbox: Value = proxy.state().await["sandbox"].clone();
    assert!(PARTS.iter().all(|part| sandbox[part]["in_force"] == true), "{sandbox}");
    assert!(proxy.stop().await.success());
}

/// Where the name server of a test listens: resolv.conf(5) has no ports, so on port 53 of an address of its own.
const NAME_SERVER: &str = "127.77.0.1";

/// Answers every question for an address with 127.0.0.1 (RFC 1035, section 4.1), and one for another kind with nothing.
async fn name_server(socket: tokio::net::UdpSocket) {
    const A: [u8; 4] = [0, 1, 0, 1];
    let mut query = [0; 512];
    while let Ok((length, client)) = socket.recv_from(&mut query).await {
        // One question, behind twelve bytes: labels, an empty one, type and class.
        let name = query[12..length].iter().position(|byte| *byte == 0).unwrap() + 13;
        let wants_address = query[name..name + 4] == A;
        let mut answer = query[..2].to_vec();
        answer.extend([0x81, 0x80, 0, 1, 0, u8::from(wants_address), 0, 0, 0, 0]);
        answer.extend(&query[12..name + 4]);
        if wants_address {
            answer.extend([0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
        }
        socket.send_to(&answer, client).await.unwrap();
    }
}

/// In a mount namespace, where /etc/resolv.conf is another file: as in a container.
#[tokio::test]
async fn names_are_resolved_within_it() {
    let Ok(socket) = tokio::net::UdpSocket::bind((NAME_SERVER, 53)).await else {
        return skipped("port 53 is not to be had here");
    };
    let try_it = output(Command::new("unshare").args(["--mount", "true"]), "").await;
    if !try_it.status.success() {
        return skipped("mount namespaces are not to be had here");
    }
    tokio::spawn(name_server(socket));
    let domain = Domain::new("a.example");
    let workload = echo().await;
    let listener = inbound_listener("in", workload.address, &domain.id("/client"), "");
    let server = Proxy::start(domain.path(), "server", &format!("{}{listener}", domain.identity("/server"))).await;
    server.ready().await;

    let config = format!(
        "{}outbound:\n  - {{ name: out, listen: '127.0.0.1:0', to: 'server.sandbox.test:{}', expect: '{}' }}\n\
         admin: {{ listen: '127.0.0.1:0' }}\n",
        domain.identity("/client"),
        server.address("in").await.port(),
        domain.id("/server")
    );
    let at = |name: &str| domain.path().join(name);
    std::fs::write(at("resolv.conf"), format!("nameserver {NAME_SERVER}\n")).unwrap();
    std::fs::write(at("client.yaml"), config).unwrap();
    let script = "mount --bind \"$1\" \"$(readlink -f /etc/resolv.conf)\" && exec \"$2\" run --config \"$3\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(at("resolv.conf")).arg(program()).arg(at("client.yaml"));
    let mut running = Running::start(&mut command);
    let admin = running.line("the admin address", |line| field(line, "admin")?.parse().ok()).await;
    let client = Proxy::adopted(running, admin, at("client.yaml"));
    client.ready().await;
    let mut stream = tokio::net::TcpStream::connect(client.address("out").await).await.unwrap();
    exchange(&mut stream, b"by name").await.unwrap();
}
