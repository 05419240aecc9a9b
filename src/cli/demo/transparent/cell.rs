//! The demo's cell: a tree of processes with a network, a folder for its files and process ids of its own.
//!
//! The command starts itself once more as the first process of the cell. Whatever ends that one, the kernel ends all the
//! others, and removes every namespace, interface, rule and file with them: nothing is left, not even after SIGKILL
//! (pid_namespaces(7), mount_namespaces(7), network_namespaces(7)).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, ExitStatus};

use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, set_parent_process_death_signal};
use rustix::thread::UnshareFlags;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::super::super::{Failure, Outcome};

/// What tells the command that it is in its cell.
pub(in super::super) const INSIDE: &str = "--inside";

/// This program, wherever it lies and whoever may look there.
pub(super) fn program() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("portcullis").env_remove("SPIFFE_ENDPOINT_SOCKET").env_remove("PORTCULLIS_CONFIG");
    command
}

/// Runs this command again in a new cell, and ends as it ends.
///
/// # Errors
/// Why there is none.
pub(super) fn run() -> Outcome {
    let runtime = Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    let ended = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(Failure::new)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::new)?;
        let (started, first) = oneshot::channel();
        let (end, mut ended) = oneshot::channel();
        // The first process dies with the thread that started it, so that thread waits for it.
        std::thread::spawn(move || hold(started, end));
        let first = first.await.map_err(Failure::new)??;
        loop {
            let signal = tokio::select! {
                _ = terminate.recv() => Signal::TERM,
                _ = interrupt.recv() => Signal::INT,
                ended = &mut ended => break ended.map_err(Failure::new)?.map_err(Failure::new),
            };
            // If it has ended meanwhile, that is what is heard of next.
            let _ = pidfd_send_signal(&first, signal);
        }
    })?;
    match ended.code() {
        Some(0) => Ok(ExitCode::SUCCESS),
        // It has said why itself.
        Some(code) => Err(Failure { code: u8::try_from(code).unwrap_or(1), message: String::new() }),
        None => Err(Failure::new(format!("the demo was stopped: {ended}"))),
    }
}

fn hold(started: oneshot::Sender<Result<OwnedFd, Failure>>, end: oneshot::Sender<io::Result<ExitStatus>>) {
    let first = separate().and_then(|()| {
        let child = program().args(std::env::args_os().skip(1)).arg(INSIDE).spawn().map_err(Failure::new)?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let handle = pid.ok_or(Errno::SRCH).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
        Ok((child, handle.map_err(Failure::new)?))
    });
    match first {
        Ok((mut child, handle)) => {
            let _ = started.send(Ok(handle));
            let _ = end.send(child.wait());
        }
        Err(failure) => drop(started.send(Err(failure))),
    }
}

/// What this thread starts from now on is in a cell of its own.
fn separate() -> Result<(), Failure> {
    unshare(UnshareFlags::NEWPID | UnshareFlags::NEWNS | UnshareFlags::NEWNET).map_err(|errno| {
        let why = "the demo needs namespaces of its own (network, mount, pid), and cannot make them here";
        Failure::new(match errno {
            Errno::PERM => format!("{why}: not permitted. In a container, give it the capability SYS_ADMIN"),
            errno => format!("{why}: {errno}"),
        })
    })
}

/// A network namespace for this thread alone, and what it can be entered by.
pub(super) fn network() -> Result<File, String> {
    let why = |error: io::Error| format!("no network namespace can be made: {error}");
    unshare(UnshareFlags::NEWNET).map_err(|errno| why(errno.into()))?;
    File::open("/proc/thread-self/ns/net").map_err(why)
}

fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    // Deprecated for what it can do to file descriptors, which none of these flags has to do with.
    #[expect(deprecated, reason = "the one that is not is unsafe because of another flag")]
    rustix::thread::unshare(flags)
}

/// Furnishes the cell, as its first process. Answers the folder for its files, which are in memory.
///
/// # Errors
/// What cannot be had.
pub(super) fn furnish() -> Result<PathBuf, Failure> {
    let cannot = |what: String| move |errno: Errno| Failure::new(format!("{what}: {errno}"));
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(cannot("the demo cannot be tied to its command".into()))?;
    // Nothing that is mounted from here on is seen outside.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(cannot("the demo's mounts cannot be kept to itself".into()))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", "/proc", "proc", flags, None)
        .map_err(cannot("/proc cannot be mounted for the demo's own processes".into()))?;
    let folder = std::env::temp_dir();
    mount("portcullis-demo", &folder, "tmpfs", flags, c"mode=0755,size=16m")
        .map_err(cannot(format!("no folder in memory can be mounted at {}", folder.display())))?;
    Ok(folder)
}
