//! Outbound capture by eBPF programs of a cgroup, in place of a redirect rule and without conntrack.
//!
//! In: a [`Plan`] and the cgroup whose processes it is for. Out: the programs of `ebpf/capture.c`, attached and pinned,
//! so that they stay when whoever set them up has ended. The proxy needs nothing new: `SO_ORIGINAL_DST` on the accepted
//! socket is answered by a program.
//!
//! What is captured is what is in the cgroup *and* in the network namespace from which [`apply`] was called: a cgroup may
//! hold more than one pod, and the proxy's port is one of the namespace. The proxy's sockets must be in the cgroup, too,
//! or there is no answer for it and it refuses what it accepts.

mod bytes;
mod cgroup;
mod links;
pub(crate) mod object;
mod pins;

use std::os::unix::net::UnixDatagram;
use std::path::Path;

use super::{Error, Plan};

pub use cgroup::Cgroup;
pub use links::Fault;

/// Captures the connections that processes of `cgroup` open in the network namespace of the calling thread, from now on.
/// What was there before of ours is replaced without a moment in which nothing is captured; open connections live on. Of
/// the plan only what is outbound counts here; [`super::apply`] makes the rules for the rest.
///
/// Needs CAP_BPF, CAP_NET_ADMIN and a BPF file system.
///
/// # Errors
/// Why it could not. If it was the first time, nothing is left of it.
pub fn apply(plan: &Plan, cgroup: &Cgroup) -> Result<(), Error> {
    install(plan, cgroup).map_err(|why| Error::new(format!("eBPF capture: {why}")))
}

fn install(plan: &Plan, cgroup: &Cgroup) -> Result<(), String> {
    let netns = netns_cookie()?;
    let plan = bytes::encode(plan, netns)?;
    let pins = pins::Pins::make(Path::new(pins::BPFFS), cgroup, netns)?;
    let stood = links::any(&pins);
    match links::install(&plan, cgroup, &pins) {
        Err(why) if !stood => Err(pins.clear().err().map_or(why.clone(), |rest| format!("{why}; and then {rest}"))),
        done => done,
    }
}

/// Ends the capture of this cgroup in the network namespace of the calling thread. Whether there was one.
///
/// # Errors
/// Why it could not.
pub fn remove(cgroup: &Cgroup) -> Result<bool, Error> {
    let removed = netns_cookie()
        .and_then(|netns| pins::Pins::find(Path::new(pins::BPFFS), cgroup, netns))
        .and_then(|pins| pins.map(pins::Pins::clear).transpose());
    removed.map(|done| done.is_some()).map_err(|why| Error::new(format!("removing eBPF capture: {why}")))
}

/// Ends the captures of all other cgroups, or of all, in the network namespace of the calling thread: what an earlier
/// config or another `--cgroup` has left there. How many there were.
///
/// # Errors
/// Why it could not.
pub fn clear_others(keep: Option<&Cgroup>) -> Result<usize, Error> {
    let bpffs = Path::new(pins::BPFFS);
    // Kernels without eBPF capture have none, and know no cookies.
    if !pins::any(bpffs) {
        return Ok(0);
    }
    let cleared = netns_cookie().and_then(|netns| pins::clear_others(bpffs, keep, netns));
    cleared.map_err(|why| Error::new(format!("removing other eBPF captures: {why}")))
}

/// What is wrong with the capture of this cgroup in the network namespace of the calling thread; nothing if it stands as
/// declared. Needs what [`apply`] needs.
///
/// # Errors
/// Why it cannot be found out.
pub fn standing(plan: &Plan, cgroup: &Cgroup) -> Result<Vec<Fault>, Error> {
    compare(plan, cgroup).map_err(|why| Error::new(format!("reading eBPF capture: {why}")))
}

fn compare(plan: &Plan, cgroup: &Cgroup) -> Result<Vec<Fault>, String> {
    let netns = netns_cookie()?;
    let plan = bytes::encode(plan, netns)?;
    match pins::Pins::find(Path::new(pins::BPFFS), cgroup, netns)? {
        Some(pins) => links::faults(&plan, cgroup, &pins),
        None => Ok(vec![Fault::Nothing]),
    }
}

// The macro's own code is unsafe inside: it makes the call that no crate has a ready wrapper for.
#[derive(Clone, Copy, Debug)]
struct NetnsCookie;
nix::getsockopt_impl!(
    NetnsCookie,
    libc::SOL_SOCKET,
    libc::SO_NETNS_COOKIE,
    [u8; 8],
    nix::sys::socket::sockopt::GetStruct<[u8; 8]>
);

/// What the programs know the calling thread's network namespace by (socket(7), SO_NETNS_COOKIE; Linux 5.14).
pub(crate) fn netns_cookie() -> Result<u64, String> {
    let socket = UnixDatagram::unbound().map_err(|error| format!("a socket cannot be opened: {error}"))?;
    let cookie = nix::sys::socket::getsockopt(&socket, NetnsCookie)
        .map_err(|error| format!("the network namespace has no cookie, so eBPF capture needs Linux 5.15: {error}"))?;
    Ok(u64::from_ne_bytes(cookie))
}
