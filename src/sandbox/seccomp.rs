//! The filter of system calls (seccomp(2)): those that a proxy makes, and no others.
//!
//! Two filters, of which the kernel follows the stricter. What is on the list is allowed. What no part of this program ever
//! does, and whoever has taken it over would do first (run a program, trace, mount, load code into the kernel, enter another
//! namespace), ends the process: that is no mistake of ours to survive, and the kernel's audit log tells of it. Everything
//! else fails with ENOSYS, as on an older kernel: libraries know how to live with that, and a call that we forgot is an error
//! in one place instead of an outage. That is also why clone3 is left out, whose flags a filter cannot see: glibc then uses
//! clone, and of that only what makes a thread is allowed, so there are no new processes.
//!
//! In: nothing. Out: filters in force for every thread there is and will be. Calls whose arguments do not count are
//! remembered by the kernel (from 5.11 on) and cost nothing; reading, writing and polling are among them.

use std::collections::BTreeMap;

use libc::{c_int, c_long};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op,
    SeccompCondition as Condition, SeccompFilter, SeccompRule, TargetArch,
};

mod calls;

use calls::{ALLOWED, FATAL};

/// Rules by the number of the call; none means whatever the arguments.
type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

/// Puts the filters on.
///
/// # Errors
/// The kernel has no filters, or one of the threads has one of its own; in words.
pub(super) fn filter_all_threads() -> Result<(), String> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH);
    let architecture = architecture.map_err(|_| format!("there is no filter for {}", std::env::consts::ARCH))?;
    for program in programs(architecture).map_err(|error| error.to_string())? {
        seccompiler::apply_filter_all_threads(&program).map_err(in_words)?;
    }
    Ok(())
}

fn in_words(error: seccompiler::Error) -> String {
    match error {
        seccompiler::Error::Seccomp(error) => {
            format!(
                "the kernel takes no filter ({error}); it needs CONFIG_SECCOMP_FILTER, and no filter around us that forbids it"
            )
        }
        other => other.to_string(),
    }
}

/// Both filters, in the order in which they are put on: the first must not forbid the second.
fn programs(architecture: TargetArch) -> Result<[BpfProgram; 2], BackendError> {
    let program = |rules, other, listed| SeccompFilter::new(rules, other, listed, architecture)?.try_into();
    let unknown = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    Ok([
        program(fatal()?, SeccompAction::Allow, SeccompAction::KillProcess)?,
        program(allowed()?, unknown, SeccompAction::Allow)?,
    ])
}

/// What ends the process.
fn fatal() -> Result<Rules, BackendError> {
    let mut rules: Rules = FATAL.iter().map(|call| (*call, Vec::new())).collect();
    // With any of these set.
    let namespaces = NAMESPACES.iter().map(|flag| SeccompRule::new(vec![masked(0, *flag, *flag)?]));
    rules.insert(libc::SYS_clone, namespaces.collect::<Result<_, _>>()?);
    Ok(rules)
}

const NAMESPACES: [c_int; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

/// What is allowed, some of it only with certain arguments.
fn allowed() -> Result<Rules, BackendError> {
    let mut rules: Rules = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    let own = u64::from(std::process::id());
    let any_of = |index, values: &[u64]| -> Result<Vec<_>, BackendError> {
        values.iter().map(|value| SeccompRule::new(vec![equal(index, *value)?])).collect()
    };
    rules.insert(libc::SYS_socket, sockets()?);
    rules.insert(libc::SYS_socketpair, any_of(0, &[number(libc::AF_UNIX)])?);
    // A thread, and nothing in it that is not shared with the others.
    let thread = libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_SIGHAND;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![masked(0, thread, thread)?])?]);
    // Memory is never writable and executable, and what was written never becomes executable. Modules of the resolver are
    // mapped as they are in their files.
    let both = libc::PROT_WRITE | libc::PROT_EXEC;
    rules.insert(
        libc::SYS_mmap,
        vec![
            SeccompRule::new(vec![masked(2, both, libc::PROT_NONE)?])?,
            SeccompRule::new(vec![masked(2, both, libc::PROT_WRITE)?])?,
            SeccompRule::new(vec![masked(2, both, libc::PROT_EXEC)?])?,
        ],
    );
    rules.insert(libc::SYS_mprotect, vec![SeccompRule::new(vec![masked(2, libc::PROT_EXEC, 0)?])?]);
    rules.insert(libc::SYS_prctl, any_of(0, &PRCTL.map(number))?);
    rules.insert(libc::SYS_ioctl, any_of(1, &IOCTL)?);
    // To read a limit, not to set one.
    rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(vec![whole(2, 0)?])?]);
    // abort(3) and the like, at ourselves.
    rules.insert(libc::SYS_tgkill, any_of(0, &[own])?);
    Ok(rules)
}

/// Addresses of the internet, Unix sockets, and of netlink what getaddrinfo(3) asks for (routes, links) and what tells of
/// rules of nftables.
fn sockets() -> Result<Vec<SeccompRule>, BackendError> {
    let plain = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6];
    let plain = plain.iter().map(|family| SeccompRule::new(vec![equal(0, number(*family))?]));
    let netlink = [libc::NETLINK_ROUTE, libc::NETLINK_NETFILTER];
    let netlink = netlink
        .iter()
        .map(|protocol| SeccompRule::new(vec![equal(0, number(libc::AF_NETLINK))?, equal(2, number(*protocol))?]));
    plain.chain(netlink).collect()
}

/// Names of threads and of memory, and a question that libcap asks when a module of the resolver loads it.
const PRCTL: [c_int; 4] = [libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_VMA, libc::PR_CAPBSET_READ];
/// Of sockets and pipes; whether something is a terminal; names of interfaces, for addresses with a zone.
const IOCTL: [u64; 7] =
    [libc::FIONBIO, libc::FIONREAD, libc::FIOCLEX, libc::TIOCOUTQ, libc::TCGETS, libc::SIOCGIFINDEX, libc::SIOCGIFNAME];

/// A constant of C as the kernel sees it in 32 bits.
fn number(constant: c_int) -> u64 {
    u64::from(constant.cast_unsigned())
}

/// The lower half of an argument: the kernel looks at no more of an int.
fn equal(argument: u8, value: u64) -> Result<Condition, BackendError> {
    Condition::new(argument, Len::Dword, Op::Eq, value)
}

fn whole(argument: u8, value: u64) -> Result<Condition, BackendError> {
    Condition::new(argument, Len::Qword, Op::Eq, value)
}

fn masked(argument: u8, mask: c_int, value: c_int) -> Result<Condition, BackendError> {
    Condition::new(argument, Len::Dword, Op::MaskedEq(number(mask)), number(value))
}

#[cfg(test)]
mod tests;
