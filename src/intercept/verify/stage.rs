//! Where the probes are played: a host of our own at the other end of a link of our own.
//!
//! In: the plan, whose exemptions the addresses must not fall under. Out: a [`Stage`], which is gone without a trace when
//! it drops, and also when the process is killed: the kernel removes a namespace that nobody holds, and the link with it.
//! It needs CAP_NET_ADMIN, and CAP_SYS_ADMIN to make a namespace.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::super::link;
use super::super::plan::Plan;

/// How long the kernel may take to see that the link is up.
const READY: Duration = Duration::from_secs(2);

/// The addresses of one family: ours, and that of the host at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) near: IpAddr,
    pub(super) far: IpAddr,
}

/// A host beside this one.
#[derive(Debug)]
pub(super) struct Stage {
    far: File,
    name: String,
    /// IPv4, or why there is none.
    pub(super) v4: Result<Ends, Absent>,
    /// IPv6, or why there is none.
    pub(super) v6: Result<Ends, Absent>,
}

/// Why a family has no stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Absent {
    /// The host does not speak it, so nothing can pass.
    SwitchedOff,
    /// Something else, in words.
    Because(String),
}

impl Stage {
    /// Sets it up beside the network namespace of this thread.
    pub(super) fn build(plan: &Plan) -> Result<Self, String> {
        let far = namespace()?;
        let name = format!("pcl-{:08x}", fastrand::u32(..));
        link::pair(&name, &name, &far).map_err(|errno| match errno {
            Errno::PERM => "a link for probes takes CAP_NET_ADMIN".to_owned(),
            errno => format!("no link for probes can be made: {errno}"),
        })?;
        let unknown = || Err(Absent::Because("the link for probes was not set up".into()));
        let mut stage = Self { far, name, v4: unknown(), v6: unknown() };
        let failed = |what: &str, errno| format!("the link for probes cannot be set up ({what}): {errno}");
        link::up(&stage.name).map_err(|errno| failed("our end", errno))?;
        stage.there(|| link::up(&stage.name))?.map_err(|errno| failed("the other end", errno))?;
        stage.wait()?;
        stage.v4 = stage.ends(plan, &candidates_v4(), 30);
        stage.v6 = stage.ends(plan, &candidates_v6(), 64);
        Ok(stage)
    }

    /// Waits until both ends carry packets. If that takes too long, the attempts will tell.
    fn wait(&self) -> Result<(), String> {
        let deadline = Instant::now() + READY;
        let ready = || Ok::<_, String>(carries(&self.name) && self.there(|| carries(&self.name))?);
        while !ready()? && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Does something on the other host.
    pub(super) fn there<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, String> {
        let enter = || rustix::thread::move_into_link_name_space(self.far.as_fd(), Some(LinkNameSpaceType::Network));
        thread(|| match enter() {
            Ok(()) => Ok(work()),
            Err(errno) => Err(format!("the namespace of the probes cannot be entered: {errno}")),
        })?
    }

    fn ends(&self, plan: &Plan, candidates: &[Ends], prefix: u8) -> Result<Ends, Absent> {
        let Some(ends) = candidates.iter().find(|ends| !exempt(plan, ends.far)) else {
            let why = "every address that could be tried is exempt (skip_destinations, skip_sources, dns_servers)";
            return Err(Absent::Because(why.into()));
        };
        let because = |what: &str, errno: Errno| match (ends.near, errno) {
            (IpAddr::V6(_), Errno::ACCESS | Errno::PERM | Errno::AFNOSUPPORT | Errno::OPNOTSUPP) if !speaks_v6() => {
                Absent::SwitchedOff
            }
            _ => Absent::Because(format!("{what} of the link for probes gets no address: {errno}")),
        };
        link::address(&self.name, ends.near, prefix).map_err(|errno| because("our end", errno))?;
        let there = self.there(|| link::address(&self.name, ends.far, prefix)).map_err(Absent::Because)?;
        there.map_err(|errno| because("the other end", errno))?;
        Ok(*ends)
    }
}

fn carries(name: &str) -> bool {
    // A list that changes while it is read is read again.
    link::carries(name).unwrap_or(false)
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Should this fail, the namespace that is gone in a moment takes it along.
        let _ = link::remove(&self.name);
    }
}

/// Does something on a thread of its own, in whose place and role nothing else stands. It begins in the network namespace of
/// the calling thread.
pub(super) fn thread<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("probe".into());
        let running = thread.spawn_scoped(scope, work);
        let running = running.map_err(|error| format!("no thread for a probe: {error}"))?;
        running.join().map_err(|_| "a probe broke off".to_owned())
    })
}

/// A network namespace that lives by this file.
fn namespace() -> Result<File, String> {
    thread(|| {
        // Deprecated for what it can do to file descriptors, which a network namespace has nothing to do with.
        #[expect(deprecated, reason = "the one that is not is unsafe because of another flag")]
        rustix::thread::unshare(UnshareFlags::NEWNET).map_err(|errno| match errno {
            Errno::PERM => "a host of our own for probes takes CAP_SYS_ADMIN, to make a network namespace".to_owned(),
            errno => format!("no network namespace for probes can be made: {errno}"),
        })?;
        File::open("/proc/thread-self/ns/net")
            .map_err(|error| format!("the namespace of the probes cannot be held: {error}"))
    })?
}

/// Whether the plan lets traffic with that host pass.
fn exempt(plan: &Plan, far: IpAddr) -> bool {
    let skips = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&far));
    plan.dns_servers.contains(&far)
        || plan.outbound.as_ref().is_some_and(|outbound| skips(&outbound.skip_destinations))
        || plan.inbound.as_ref().is_some_and(|inbound| skips(&inbound.skip_sources))
}

/// Addresses that are nobody's: for documentation (RFC 5737), then for benchmarks (RFC 2544).
fn candidates_v4() -> Vec<Ends> {
    [[192, 0, 2], [198, 51, 100], [203, 0, 113], [198, 18, 0], [198, 19, 255]]
        .into_iter()
        .map(|[a, b, c]| {
            let first = fastrand::u8(..64) * 4;
            let address = |last| IpAddr::V4(Ipv4Addr::new(a, b, c, first + last));
            Ends { near: address(1), far: address(2) }
        })
        .collect()
}

/// Addresses that are nobody's: for documentation (RFC 3849), then unique local ones (RFC 4193).
fn candidates_v6() -> Vec<Ends> {
    [[0x2001, 0xdb8], [0xfd00 | fastrand::u16(..0x100), fastrand::u16(..)]]
        .into_iter()
        .map(|[a, b]| {
            let (c, d) = (fastrand::u16(..), fastrand::u16(..));
            let address = |last| IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, last));
            Ends { near: address(1), far: address(2) }
        })
        .collect()
}

/// Whether this thread's namespace has an IPv6 address but loopback's.
fn speaks_v6() -> bool {
    let list = std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
    list.lines().any(|line| line.split_ascii_whitespace().last().is_some_and(|name| name != "lo"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::plan::Udp;
    use crate::intercept::verify::tests::plan;

    #[test]
    fn a_host_that_is_exempt_proves_nothing() {
        let mut plan = plan(Udp::Dns, &["192.0.2.53"], &[]);
        plan.outbound.as_mut().unwrap().skip_destinations = vec!["198.51.100.0/24".parse().unwrap()];
        plan.inbound.as_mut().unwrap().skip_sources = vec!["2001:db8::/32".parse().unwrap()];
        for exempt_one in ["198.51.100.9", "2001:db8:1::2", "192.0.2.53"] {
            assert!(exempt(&plan, exempt_one.parse().unwrap()), "{exempt_one}");
        }
        assert!(!exempt(&plan, "192.0.2.2".parse().unwrap()));
        assert!(candidates_v6().iter().any(|ends| !exempt(&plan, ends.far)));
        assert!(candidates_v4().iter().filter(|ends| !exempt(&plan, ends.far)).count() >= 3);
    }

    #[test]
    fn both_ends_are_on_one_link() {
        for _ in 0..1000 {
            for Ends { near, far } in candidates_v4() {
                let net = IpNet::new(near, 30).unwrap().trunc();
                assert!(net.contains(&far) && ![net.addr(), net.broadcast(), near].contains(&far), "{near} {far}");
            }
            for Ends { near, far } in candidates_v6() {
                assert!(IpNet::new(near, 64).unwrap().trunc().contains(&far), "{near} {far}");
            }
        }
    }
}
