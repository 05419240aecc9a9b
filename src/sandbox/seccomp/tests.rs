use std::io::ErrorKind;
use std::os::unix::net::UnixStream;

use seccompiler::sock_filter;

use super::*;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();

/// What both filters together make of a call: the kernel follows the stricter, which is the smaller when taken as signed.
fn verdict(call: c_long, arguments: &[u64]) -> u32 {
    let verdicts = programs(here()).unwrap().map(|program| run(&program, call, arguments));
    verdicts.into_iter().min_by_key(|action| action.cast_signed()).unwrap()
}

fn here() -> TargetArch {
    TargetArch::try_from(std::env::consts::ARCH).unwrap()
}

/// AUDIT_ARCH_*, as linux/audit.h has them.
fn audit() -> u32 {
    if cfg!(target_arch = "x86_64") { 0xC000_003E } else { 0xC000_00B7 }
}

/// The instructions of classic BPF that filters consist of (linux/bpf_common.h), on a `struct seccomp_data`.
fn run(program: &[sock_filter], call: c_long, arguments: &[u64]) -> u32 {
    let mut words = vec![u32::try_from(call).unwrap(), audit(), 0, 0];
    for index in 0..6 {
        let argument = arguments.get(index).copied().unwrap_or(0);
        words.extend([argument as u32, (argument >> 32) as u32]);
    }
    let (mut at, mut accumulator) = (0, 0u32);
    loop {
        let sock_filter { code, jt, jf, k } = program[at].clone();
        at += 1;
        let branch = |taken: bool| usize::from(if taken { jt } else { jf });
        match code {
            0x20 => accumulator = words[k as usize / 4],
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => at += branch(accumulator == k),
            0x25 => at += branch(accumulator > k),
            0x35 => at += branch(accumulator >= k),
            0x06 => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn flags(parts: &[c_int]) -> u64 {
    parts.iter().fold(0, |all, flag| all | number(*flag))
}

#[test]
fn what_a_proxy_lives_on_is_allowed() {
    for call in
        [libc::SYS_read, libc::SYS_write, libc::SYS_epoll_pwait, libc::SYS_futex, libc::SYS_splice, libc::SYS_pipe2]
    {
        assert_eq!(verdict(call, &[]), ALLOW, "{call}");
    }
    for call in ALLOWED {
        assert_eq!(verdict(*call, &[1, 2, 3, 4, 5, 6]), ALLOW, "{call}");
    }
}

#[test]
fn what_a_proxy_never_does_ends_it() {
    for call in FATAL {
        assert_eq!(verdict(*call, &[]), KILL, "{call}");
        assert!(!ALLOWED.contains(call), "{call}");
    }
    for call in [libc::SYS_execve, libc::SYS_ptrace, libc::SYS_mount, libc::SYS_bpf, libc::SYS_unshare, libc::SYS_setns]
    {
        assert_eq!(verdict(call, &[]), KILL, "{call}");
    }
}

#[test]
fn all_else_is_as_if_the_kernel_had_it_not() {
    for call in
        [libc::SYS_clone3, libc::SYS_io_uring_setup, libc::SYS_kill, libc::SYS_memfd_create, libc::SYS_openat2, 9999]
    {
        assert_eq!(verdict(call, &[]), ENOSYS, "{call}");
    }
    // The calls of x32, which have the numbers of x86-64 and a bit.
    assert_eq!(verdict(libc::SYS_read | 0x4000_0000, &[]), ENOSYS);
}

#[test]
fn another_architecture_is_not_served() {
    for program in programs(here()).unwrap() {
        let other = [libc::SYS_read.unsigned_abs() as u32, audit() ^ 0xFF];
        // The first two instructions look at the architecture and the third ends the process.
        assert_eq!((program[0].code, program[0].k), (0x20, 4), "loads {}", other[1]);
        assert_eq!((program[1].code, program[1].k), (0x15, audit()));
        assert_eq!((program[2].code, program[2].k), (0x06, KILL));
    }
}

#[test]
fn clone_makes_threads_only() {
    let thread = [libc::CLONE_VM, libc::CLONE_FS, libc::CLONE_FILES, libc::CLONE_SIGHAND, libc::CLONE_THREAD];
    let more = [libc::CLONE_SYSVSEM, libc::CLONE_SETTLS, libc::CLONE_PARENT_SETTID, libc::CLONE_CHILD_CLEARTID];
    let thread = flags(&[&thread[..], &more[..]].concat());
    assert_eq!(verdict(libc::SYS_clone, &[thread]), ALLOW);
    let process = flags(&[libc::SIGCHLD, libc::CLONE_CHILD_SETTID, libc::CLONE_CHILD_CLEARTID]);
    assert_eq!(verdict(libc::SYS_clone, &[process]), ENOSYS);
    let spawn = flags(&[libc::SIGCHLD, libc::CLONE_VM, libc::CLONE_VFORK]);
    assert_eq!(verdict(libc::SYS_clone, &[spawn]), ENOSYS);
    for flag in NAMESPACES {
        assert_eq!(verdict(libc::SYS_clone, &[process | number(flag)]), KILL, "{flag:#x}");
        assert_eq!(verdict(libc::SYS_clone, &[thread | number(flag)]), KILL, "{flag:#x}");
    }
}

#[test]
fn sockets_of_few_families() {
    for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6] {
        assert_eq!(verdict(libc::SYS_socket, &[number(family), 1, 0]), ALLOW);
    }
    for (protocol, expected) in [
        (libc::NETLINK_ROUTE, ALLOW),
        (libc::NETLINK_NETFILTER, ALLOW),
        (libc::NETLINK_AUDIT, ENOSYS),
        (libc::NETLINK_KOBJECT_UEVENT, ENOSYS),
    ] {
        assert_eq!(verdict(libc::SYS_socket, &[number(libc::AF_NETLINK), 3, number(protocol)]), expected, "{protocol}");
    }
    for family in [libc::AF_PACKET, libc::AF_VSOCK, libc::AF_ALG, libc::AF_BLUETOOTH, libc::AF_XDP, 999] {
        assert_eq!(verdict(libc::SYS_socket, &[number(family), 3, 0]), ENOSYS, "{family}");
    }
    assert_eq!(verdict(libc::SYS_socketpair, &[number(libc::AF_UNIX)]), ALLOW);
    assert_eq!(verdict(libc::SYS_socketpair, &[number(libc::AF_INET)]), ENOSYS);
}

#[test]
fn memory_is_writable_or_executable() {
    let (read, write, execute) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
    for (protection, mapped, changed) in [
        (0, ALLOW, ALLOW),
        (read, ALLOW, ALLOW),
        (read | write, ALLOW, ALLOW),
        (read | execute, ALLOW, ENOSYS),
        (read | write | execute, ENOSYS, ENOSYS),
        (write | execute, ENOSYS, ENOSYS),
    ] {
        assert_eq!(verdict(libc::SYS_mmap, &[0, 4096, number(protection)]), mapped, "{protection}");
        assert_eq!(verdict(libc::SYS_mprotect, &[0, 4096, number(protection)]), changed, "{protection}");
    }
}

#[test]
fn what_does_many_things_does_few_of_them() {
    assert_eq!(verdict(libc::SYS_prctl, &[number(libc::PR_SET_NAME)]), ALLOW);
    assert_eq!(verdict(libc::SYS_prctl, &[number(libc::PR_SET_DUMPABLE), 1]), ENOSYS);
    assert_eq!(verdict(libc::SYS_ioctl, &[5, libc::FIONBIO]), ALLOW);
    assert_eq!(verdict(libc::SYS_ioctl, &[0, libc::TIOCSTI]), ENOSYS);
    // The upper half of what is an int to the kernel does not hide it, and does not make it another.
    assert_eq!(verdict(libc::SYS_ioctl, &[0, libc::TIOCSTI | 1 << 32]), ENOSYS);
    assert_eq!(verdict(libc::SYS_prlimit64, &[0, 7, 0]), ALLOW);
    assert_eq!(verdict(libc::SYS_prlimit64, &[0, 7, 1 << 40]), ENOSYS);
    assert_eq!(verdict(libc::SYS_tgkill, &[u64::from(std::process::id()), 1, 6]), ALLOW);
    assert_eq!(verdict(libc::SYS_tgkill, &[1, 1, 9]), ENOSYS);
}

#[test]
fn the_kernel_does_as_the_filter_says() {
    // On a thread of its own: it stays like that.
    std::thread::spawn(|| {
        for program in programs(here()).unwrap() {
            seccompiler::apply_filter(&program).unwrap();
        }
        // A process is not to be had, and this one lives on. (A program would end it.)
        let refused = std::process::Command::new("/bin/true").spawn().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
        let packet = socket2::Socket::new(socket2::Domain::PACKET, socket2::Type::DGRAM, None).unwrap_err();
        assert_eq!(packet.raw_os_error(), Some(libc::ENOSYS));

        // What the proxy does goes on, in new threads too.
        let act = || {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            UnixStream::pair().unwrap();
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("a");
            std::fs::write(&file, "a").unwrap();
            std::fs::rename(&file, folder.path().join("b")).unwrap();
            assert_eq!(std::fs::read_to_string(folder.path().join("b")).unwrap(), "a");
            std::fs::read_dir("/proc/self/fd").unwrap().count();
            use std::net::ToSocketAddrs;
            assert!(("localhost", 80).to_socket_addrs().unwrap().count() > 0);
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(1).build().unwrap();
            runtime.block_on(async {
                let hash = tokio::task::spawn_blocking(|| crate::config::load::hex(b"a")).await.unwrap();
                assert_eq!(hash, "61");
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            });
        };
        act();
        std::thread::spawn(act).join().unwrap();
    })
    .join()
    .unwrap();
}
