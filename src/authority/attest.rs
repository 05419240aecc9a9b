//! Who is calling: kernel facts about the process at the other end of a Unix socket.
//!
//! uid, gid and pid are what the kernel noted when the caller connected (SO_PEERCRED), and cannot be made up. The
//! executable comes from `/proc`, by the pid, which the kernel may give to another process once the caller is gone; so
//! the moment of the process's start is noted when the connection is accepted, and a pid with another start is nobody.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::net::unix::UCred;

/// Which processes an entry is for. All that are given must fit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Selectors {
    /// Effective user ID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Effective primary group ID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// Process ID, as this authority's PID namespace counts it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Absolute path of the executable. Only processes in the authority's own mount namespace have one: in another
    /// namespace any user can make any path. A process that may not be dumped, as a proxy in its sandbox, has one only for
    /// an authority with CAP_SYS_PTRACE.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
}

impl Selectors {
    /// Whether nothing is asked for.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a caller fits.
    pub fn fit(&self, caller: &Caller) -> bool {
        fn fits<T: PartialEq + ?Sized>(wanted: Option<&T>, found: Option<&T>) -> bool {
            wanted.is_none() || wanted == found
        }
        !self.is_empty()
            && fits(self.uid.as_ref(), Some(&caller.uid))
            && fits(self.gid.as_ref(), Some(&caller.gid))
            && fits(self.pid.as_ref(), caller.pid.as_ref())
            && fits(self.path.as_deref(), caller.path.as_deref())
    }
}

/// What is known of a caller now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Effective user ID when it connected.
    pub uid: u32,
    /// Effective primary group ID when it connected.
    pub gid: u32,
    /// Process ID; none if it lives in a PID namespace that we cannot see into, or its start could not be noted.
    pub pid: Option<u32>,
    /// The executable, if we may know it.
    pub path: Option<PathBuf>,
}

/// The process that was connected when the connection was accepted.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    uid: u32,
    gid: u32,
    /// pid and start.
    process: Option<(u32, u64)>,
}

/// The process that connected is gone, or its pid is another's now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerGone;

impl Peer {
    /// Notes who is connected. To be called as soon as a connection is accepted.
    pub fn of(credentials: UCred) -> Self {
        let uid = credentials.uid();
        // The kernel says 0 for a process outside our PID namespace.
        let pid = credentials.pid().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
        let process = pid.and_then(|pid| Some((pid, started(pid)?))).filter(|(pid, _)| belongs_to(*pid, uid));
        Self { uid, gid: credentials.gid(), process }
    }

    /// What is known of it now. The executable is read anew each time, because a process may become another program.
    ///
    /// # Errors
    /// The process is gone: what its socket says now is said by somebody else.
    pub fn attest(&self) -> Result<Caller, PeerGone> {
        let mut caller = Caller { uid: self.uid, gid: self.gid, pid: None, path: None };
        if let Some((pid, start)) = self.process {
            let path = executable(pid);
            // After reading, so that what was read was this process's.
            if started(pid) != Some(start) {
                return Err(PeerGone);
            }
            caller.pid = Some(pid);
            caller.path = path;
        }
        Ok(caller)
    }
}

impl std::fmt::Display for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "uid {}, gid {}", self.uid, self.gid)?;
        if let Some(pid) = self.pid {
            write!(f, ", pid {pid}")?;
        }
        match &self.path {
            Some(path) => write!(f, ", path {}", path.display()),
            None => f.write_str(", path unknown"),
        }
    }
}

/// When the process was started, in clock ticks since boot (proc(5), field 22 of `stat`). Pid and start together name
/// one process.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses and may hold blanks and parentheses itself.
    let end = stat.iter().rposition(|b| *b == b')')?;
    let rest = std::str::from_utf8(stat.get(end + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    // The first of these is field 3. A zombie or a dead process (Z, X) speaks for nobody.
    if matches!(fields.next()?, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Whether the process is the user's who connected. The owner of a process that may not be dumped reads as root.
fn belongs_to(pid: u32, uid: u32) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(format!("/proc/{pid}")).is_ok_and(|m| m.uid() == uid || m.uid() == 0)
}

fn executable(pid: u32) -> Option<PathBuf> {
    let link = |path: String| std::fs::read_link(Path::new(&path)).ok();
    let ours = link("/proc/self/ns/mnt".into())?;
    if link(format!("/proc/{pid}/ns/mnt"))? != ours {
        return None;
    }
    link(format!("/proc/{pid}/exe"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller() -> Caller {
        Caller { uid: 1000, gid: 100, pid: Some(7), path: Some("/usr/bin/web".into()) }
    }

    #[test]
    fn all_selectors_must_fit() {
        let all =
            Selectors { uid: Some(1000), gid: Some(100), pid: Some(7), path: Some(PathBuf::from("/usr/bin/web")) };
        assert!(all.fit(&caller()));
        for change in [
            (|c: &mut Caller| c.uid = 0) as fn(&mut Caller),
            |c| c.gid = 0,
            |c| c.pid = Some(8),
            |c| c.pid = None,
            |c| c.path = Some("/usr/bin/web (deleted)".into()),
            |c| c.path = None,
        ] {
            let mut other = caller();
            change(&mut other);
            assert!(!all.fit(&other), "{other:?}");
        }
        assert!(!Selectors::default().fit(&caller()), "no selector fits nobody");
        assert!(Selectors { uid: Some(1000), ..Selectors::default() }.fit(&Caller { path: None, ..caller() }));
    }

    #[tokio::test]
    async fn our_own_process_is_known_by_all_four() {
        let (one, other) = tokio::net::UnixStream::pair().unwrap();
        let peer = Peer::of(one.peer_cred().unwrap());
        let caller = peer.attest().unwrap();
        assert_eq!(caller.uid, rustix::process::geteuid().as_raw());
        assert_eq!(caller.gid, rustix::process::getegid().as_raw());
        assert_eq!(caller.pid, Some(std::process::id()));
        assert_eq!(caller.path, Some(std::env::current_exe().unwrap()));
        drop(other);
    }

    #[test]
    fn a_process_that_is_gone_is_nobody() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id();
        let process = Some((pid, started(pid).unwrap()));
        let peer = Peer { uid: 0, gid: 0, process };
        assert!(peer.attest().is_ok());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(peer.attest(), Err(PeerGone));
        let reused = Peer { process: Some((std::process::id(), 1)), ..peer };
        assert_eq!(reused.attest(), Err(PeerGone), "the same pid with another start");
    }
}
