//! Whose traffic a probe is: a thread that belongs to another user for as long as the probe takes.

use std::io;
use std::net::SocketAddr;

use rustix::io::Errno;
use rustix::process::{Gid, Uid, getegid, geteuid};
use rustix::thread::{CapabilitySet, capabilities};
use socket2::{Domain, Socket, Type};

use super::super::plan::Plan;
use super::stage::thread;

/// The user that probes stand for the workload as, unless told otherwise: nobody.
const NOBODY: u32 = 65534;

/// Whom a socket is to belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Actor {
    /// User and group to become; none to stay as we are.
    pub(super) ids: Option<(u32, u32)>,
    /// The mark that its sockets carry.
    pub(super) mark: Option<u32>,
}

/// Who this process is, and whether it can act as others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Us {
    uid: u32,
    gid: u32,
    anybody: bool,
}

impl Us {
    pub(super) fn now() -> Self {
        let both = CapabilitySet::SETUID | CapabilitySet::SETGID;
        let anybody = capabilities(None).is_ok_and(|sets| sets.effective.contains(both));
        Self { uid: geteuid().as_raw(), gid: getegid().as_raw(), anybody }
    }

    /// A user whose traffic is to be captured: `wanted`, or nobody, or ourselves if we can be no other.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) fn application(self, plan: &Plan, wanted: Option<u32>) -> Result<Actor, String> {
        let skipped = plan.outbound.as_ref();
        let exempt_uid =
            |uid| plan.proxy.uid == Some(uid) || skipped.is_some_and(|outbound| outbound.skip_uids.contains(&uid));
        let exempt_gid =
            |gid| plan.proxy.gid == Some(gid) || skipped.is_some_and(|outbound| outbound.skip_gids.contains(&gid));
        if !self.anybody {
            if let Some(other) = wanted.filter(|wanted| *wanted != self.uid) {
                return Err(format!("to act as user {other} takes CAP_SETUID and CAP_SETGID; run as root"));
            }
            if exempt_uid(self.uid) || exempt_gid(self.gid) {
                return Err(format!(
                    "user {} and group {} are exempt, and we are no other; run as root",
                    self.uid, self.gid
                ));
            }
            return Ok(Actor { ids: None, mark: None });
        }
        let uid = wanted.unwrap_or(NOBODY);
        if exempt_uid(uid) {
            return Err(format!("user {uid} is exempt; name a user of the workload with --as"));
        }
        // One of so many is not in a list of 256.
        let gid = (0..=512).map(|more| uid.saturating_sub(more)).find(|gid| !exempt_gid(*gid)).unwrap_or(uid);
        Ok(Actor { ids: Some((uid, gid)), mark: None })
    }

    /// The proxy, as the rules know it.
    ///
    /// # Errors
    /// Why we cannot be it.
    pub(super) fn proxy(self, plan: &Plan) -> Result<Actor, String> {
        let owner = &plan.proxy;
        if owner.uid == Some(self.uid) || owner.gid == Some(self.gid) {
            return Ok(Actor { ids: None, mark: None });
        }
        match (owner.uid, owner.gid, owner.mark) {
            (None, None, mark) => Ok(Actor { ids: None, mark }),
            (uid, gid, _) if self.anybody => {
                Ok(Actor { ids: Some((uid.unwrap_or(NOBODY), gid.or(uid).unwrap_or(NOBODY))), mark: None })
            }
            _ => Err("to act as the proxy takes its user, or root".into()),
        }
    }
}

impl Actor {
    /// As we are.
    pub(super) const OURSELVES: Self = Self { ids: None, mark: None };

    /// A socket of this actor in the network namespace of this thread, as `open` prepares it.
    ///
    /// # Errors
    /// Why the actor cannot be, outside; why there is no such socket, inside.
    pub(super) fn socket(
        self,
        to: SocketAddr,
        kind: Type,
        open: impl FnOnce(&Socket) -> io::Result<()> + Send,
    ) -> Result<io::Result<Socket>, String> {
        thread(move || {
            if let Some((uid, gid)) = self.ids {
                become_user(uid, gid).map_err(|errno| format!("cannot act as user {uid}: {errno}"))?;
            }
            Ok((|| {
                let socket = Socket::new(Domain::for_address(to), kind, None)?;
                if let Some(mark) = self.mark {
                    socket.set_mark(mark)?;
                }
                open(&socket)?;
                Ok(socket)
            })())
        })?
    }
}

/// Gives this thread, and no other of the process, to a user.
fn become_user(uid: u32, gid: u32) -> Result<(), Errno> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(group, group, group)?;
    rustix::thread::set_thread_res_uid(user, user, user)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::plan::{OutboundCapture, ProxyOwner, Udp};
    use std::time::Duration;

    fn plan(proxy: ProxyOwner) -> Plan {
        let outbound = OutboundCapture {
            port: 15001,
            skip_ports: Vec::new(),
            skip_destinations: Vec::new(),
            skip_uids: vec![2000],
            skip_gids: vec![65534, 65533],
            by_cgroup: false,
        };
        Plan {
            proxy,
            inbound: None,
            outbound: Some(outbound),
            udp: Udp::Dns,
            dns_servers: Vec::new(),
            half_closed: Duration::from_secs(60),
        }
    }

    #[test]
    fn an_application_is_nobody_who_is_exempt() {
        let plan = plan(ProxyOwner { uid: Some(1337), gid: Some(65532), mark: None });
        let root = Us { uid: 0, gid: 0, anybody: true };
        assert_eq!(root.application(&plan, None).unwrap().ids, Some((65534, 65531)));
        assert_eq!(root.application(&plan, Some(3000)).unwrap().ids, Some((3000, 3000)));
        for exempt in [1337, 2000] {
            assert!(root.application(&plan, Some(exempt)).unwrap_err().contains("--as"));
        }
        let user = Us { uid: 1000, gid: 1000, anybody: false };
        assert_eq!(user.application(&plan, None), Ok(Actor::OURSELVES));
        assert!(user.application(&plan, Some(1001)).unwrap_err().contains("CAP_SETUID"));
        for (uid, gid) in [(1337, 1000), (1000, 65532), (2000, 1000)] {
            let why = Us { uid, gid, anybody: false }.application(&plan, None).unwrap_err();
            assert!(why.contains("exempt"), "{why}");
        }
    }

    #[test]
    fn the_proxy_is_whom_the_rules_know() {
        let root = Us { uid: 0, gid: 0, anybody: true };
        let by = |uid, gid, mark| plan(ProxyOwner { uid, gid, mark });
        let acting = |plan: &Plan| root.proxy(plan).unwrap();
        assert_eq!(acting(&by(Some(1337), None, None)), Actor { ids: Some((1337, 1337)), mark: None });
        assert_eq!(acting(&by(None, Some(7), Some(9))), Actor { ids: Some((NOBODY, 7)), mark: None });
        assert_eq!(acting(&by(None, None, Some(9))), Actor { ids: None, mark: Some(9) });
        assert_eq!(Us { uid: 1337, gid: 1, anybody: false }.proxy(&by(Some(1337), None, None)), Ok(Actor::OURSELVES));
        assert!(Us { uid: 5, gid: 1, anybody: false }.proxy(&by(Some(1337), None, None)).is_err());
    }
}
