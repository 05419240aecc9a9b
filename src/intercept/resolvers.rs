//! The name servers that a network namespace asks, by the file of resolv.conf(5) that is read there.
//!
//! In: a file, or the path of a network namespace. Out: addresses; none where no file names any, and then no DNS passes.

use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::path::{Component, Path};

use rustix::fs::{Mode, OFlags, ResolveFlags};

/// Where the resolvers are declared that the C library asks: resolv.conf(5).
pub const RESOLV_CONF: &str = "/etc/resolv.conf";
/// More than the C library ever asks (`MAXNS` is 3), and as much as is read of the file.
const MAX_RESOLVERS: usize = 16;
const MAX_RESOLV_CONF: u64 = 64 * 1024;

/// The resolvers that a file names in the form of resolv.conf(5), at most 16; none if it cannot be read.
pub fn resolvers(path: &Path) -> Vec<IpAddr> {
    read(File::open(path))
}

/// The resolvers of those who live in a network namespace, or of this process if it is its own (`None`). One that has a
/// name has a file of its own, or shares that of the machine (ip-netns(8)); one of a process has that of the process's
/// root directory. Of any other it is not known who lives there, and this process's file counts.
pub fn resolvers_in_netns(netns: Option<&Path>) -> Vec<IpAddr> {
    resolvers_of(Path::new("/"), netns)
}

fn resolvers_of(root: &Path, netns: Option<&Path>) -> Vec<IpAddr> {
    let machines = || resolvers(&root.join("etc/resolv.conf"));
    match netns.and_then(tenant) {
        Some(Tenant::Name(name)) => match File::open(root.join("etc/netns").join(name).join("resolv.conf")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => machines(),
            opened => read(opened),
        },
        Some(Tenant::Process(pid)) => read(open_beneath(&root.join("proc").join(pid).join("root"))),
        None => machines(),
    }
}

/// Whose network namespace a path stands for.
#[derive(Debug, PartialEq, Eq)]
enum Tenant<'a> {
    Name(&'a str),
    Process(&'a str),
}

fn tenant(netns: &Path) -> Option<Tenant<'_>> {
    let mut parts = Vec::new();
    for part in netns.components() {
        match part {
            Component::RootDir => {}
            Component::Normal(part) => parts.push(part.to_str()?),
            _ => return None,
        }
    }
    match parts.as_slice() {
        _ if !netns.is_absolute() => None,
        ["run", "netns", name] | ["var", "run", "netns", name] => Some(Tenant::Name(name)),
        ["proc", pid, "ns", "net"] if pid.bytes().all(|byte| byte.is_ascii_digit()) => Some(Tenant::Process(pid)),
        _ => None,
    }
}

/// Opens a process's file as the process would: links lead within its root directory, not within ours (openat2(2)). What
/// is no plain file, such as a pipe, must not hold us up.
fn open_beneath(root: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, flags | OFlags::DIRECTORY, Mode::empty())?;
    let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = rustix::fs::openat2(root, "etc/resolv.conf", flags | OFlags::NONBLOCK, Mode::empty(), within)?;
    Ok(File::from(file))
}

fn read(file: io::Result<File>) -> Vec<IpAddr> {
    let mut text = Vec::new();
    if let Ok(file) = file {
        // What was read before an error is of use still.
        let _ = file.take(MAX_RESOLV_CONF).read_to_end(&mut text);
    }
    named(&String::from_utf8_lossy(&text))
}

fn named(text: &str) -> Vec<IpAddr> {
    let server = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let address = words.next().filter(|key| *key == "nameserver").and_then(|_| words.next())?;
        // A link-local address may name its interface.
        address.split('%').next()?.parse().ok()
    };
    text.lines().filter_map(server).take(MAX_RESOLVERS).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn resolvers_are_read_as_the_c_library_reads_them() {
        let text = "# nameserver 192.0.2.1\nsearch a.example\n nameserver 10.96.0.10\nnameserver fe80::1%eth0 # x\n\
                    nameserver\nnameserver nonsense\nnameservers 192.0.2.2\nnameserver\t::1\n";
        let found: Vec<String> = named(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.96.0.10", "fe80::1", "::1"]);
        assert_eq!(named(&"nameserver 192.0.2.1\n".repeat(100)).len(), MAX_RESOLVERS);
        assert!(resolvers(Path::new("/nonexistent/resolv.conf")).is_empty());
    }

    #[test]
    fn a_path_tells_whose_a_network_namespace_is_where_it_can() {
        let of = |path| tenant(Path::new(path));
        for path in ["/run/netns/blue", "/var/run/netns/blue", "//run/./netns/blue/"] {
            assert_eq!(of(path), Some(Tenant::Name("blue")), "{path}");
        }
        assert_eq!(of("/proc/42/ns/net"), Some(Tenant::Process("42")));
        for path in [
            "run/netns/blue",
            "/run/netns",
            "/run/netns/..",
            "/run/netns/a/b",
            "/proc/self/ns/net",
            "/proc/42/ns/mnt",
            "/proc/42/task/43/ns/net",
            "/srv/net",
        ] {
            assert_eq!(of(path), None, "{path}");
        }
    }

    #[test]
    fn who_lives_in_another_namespace_has_a_file_of_his_own() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("etc/resolv.conf", "nameserver 192.0.2.1\n");
        write("etc/netns/blue/resolv.conf", "nameserver 192.0.2.2\n");
        write("etc/netns/silent/resolv.conf", "");
        write("etc/netns/red/hosts", "");
        write("proc/42/root/etc/resolv.conf", "nameserver 192.0.2.3\n");
        // Of a container: an absolute link, which leads elsewhere outside.
        write("proc/43/root/run/stub.conf", "nameserver 192.0.2.4\n");
        std::fs::create_dir(dir.path().join("proc/43/root/etc")).unwrap();
        symlink("/run/stub.conf", dir.path().join("proc/43/root/etc/resolv.conf")).unwrap();
        std::fs::create_dir_all(dir.path().join("proc/44/root")).unwrap();
        let last = |netns: Option<&str>| {
            let found = resolvers_of(dir.path(), netns.map(Path::new));
            found.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        for (netns, expected) in [
            (None, "192.0.2.1"),
            (Some("/run/netns/blue"), "192.0.2.2"),
            (Some("/run/netns/silent"), ""),
            (Some("/run/netns/red"), "192.0.2.1"),
            (Some("/run/netns/other"), "192.0.2.1"),
            (Some("/proc/42/ns/net"), "192.0.2.3"),
            (Some("/proc/43/ns/net"), "192.0.2.4"),
            (Some("/proc/44/ns/net"), ""),
            (Some("/proc/45/ns/net"), ""),
            (Some("/proc/self/ns/net"), "192.0.2.1"),
        ] {
            assert_eq!(last(netns), expected, "{netns:?}");
        }
    }

    #[test]
    fn the_file_of_a_living_process_is_found() {
        let own = format!("/proc/{}/ns/net", std::process::id());
        assert_eq!(resolvers_in_netns(Some(Path::new(&own))), resolvers(Path::new(RESOLV_CONF)));
    }
}
