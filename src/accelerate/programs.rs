//! The programs of `ebpf/accelerate.c`.

use std::net::{IpAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};

use libbpf_rs::{Link, MapCore, MapFlags, Object, ProgramMut};

use crate::intercept::ebpf::object::{self, one_line};
use crate::intercept::ebpf::{Cgroup, netns_cookie};

static BYTECODE: &[u8] = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/ebpf/accelerate.bpf.o"));

const MAX_PORTS: usize = 512;

/// Loaded, and attached to nothing but the table of sockets.
#[derive(Debug)]
pub struct Programs {
    object: Object,
    netns: u64,
}

/// In force until dropped. What is open then goes on by TCP.
#[derive(Debug)]
pub struct Attached {
    _programs: Programs,
    _link: Link,
}

impl Programs {
    /// Loads them for the network namespace of the calling thread and connections to these ports.
    ///
    /// # Errors
    /// Why the kernel does not take them, in words, on one line.
    pub fn load(ports: &[u16]) -> Result<Self, String> {
        let netns = netns_cookie()?;
        let object = object::load(BYTECODE, &plan(netns, ports)?, |_| Ok(()))?;
        let programs = Self { object, netns };
        programs.guard_table()?;
        Ok(programs)
    }

    /// What a socket of the table sends goes by the sk_msg program.
    fn guard_table(&self) -> Result<(), String> {
        let ends = self.ends()?.as_fd().as_raw_fd();
        let attached = self.program("accelerate_message")?.attach_sockmap(ends);
        attached.map_err(|error| one_line("the table takes no sk_msg program", &error))
    }

    fn program(&self, name: &str) -> Result<ProgramMut<'_>, String> {
        let found = self.object.progs_mut().find(|program| program.name() == name);
        found.ok_or_else(|| format!("the bytecode has no program {name}"))
    }

    /// From now on connections that processes of `cgroup` open within this host are accelerated.
    ///
    /// # Errors
    /// Why not, in words, on one line.
    pub fn attach(self, cgroup: &Cgroup) -> Result<Attached, String> {
        let link = self.program("accelerate_sockops")?.attach_cgroup(cgroup.directory.as_raw_fd());
        let link = link.map_err(|error| one_line(&cgroup.path().display().to_string(), &error))?;
        Ok(Attached { _programs: self, _link: link })
    }

    /// Puts one socket into the table, as the program does for those of the cgroup.
    ///
    /// # Errors
    /// Why not, in words, on one line.
    pub(super) fn add(&self, socket: &TcpStream) -> Result<(), String> {
        let text = |error: std::io::Error| error.to_string();
        let (local, remote) = (socket.local_addr().map_err(text)?, socket.peer_addr().map_err(text)?);
        let mut key = Vec::with_capacity(48);
        key.extend(self.netns.to_ne_bytes());
        key.extend(mapped(local.ip()));
        key.extend(mapped(remote.ip()));
        key.extend(u32::from(local.port()).to_ne_bytes());
        key.extend(u32::from(remote.port()).to_ne_bytes());
        let added = self.ends()?.update(&key, &socket.as_raw_fd().to_ne_bytes(), MapFlags::ANY);
        added.map_err(|error| one_line("the table takes no socket", &error))
    }

    fn ends(&self) -> Result<libbpf_rs::Map<'_>, String> {
        self.object.maps().find(|map| map.name() == "ends").ok_or_else(|| "the bytecode has no table".to_owned())
    }
}

fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// `struct plan` of the source.
fn plan(netns: u64, ports: &[u16]) -> Result<Vec<u8>, String> {
    let count = u32::try_from(ports.len()).ok().filter(|_| ports.len() <= MAX_PORTS);
    let count = count.ok_or_else(|| format!("{} ports serve plaintext; there is room for {MAX_PORTS}", ports.len()))?;
    let mut plan = Vec::with_capacity(16 + 2 * MAX_PORTS);
    plan.extend(netns.to_ne_bytes());
    plan.extend(count.to_ne_bytes());
    plan.extend(0_u32.to_ne_bytes());
    plan.extend(ports.iter().flat_map(|port| port.to_ne_bytes()));
    plan.resize(16 + 2 * MAX_PORTS, 0);
    Ok(plan)
}
