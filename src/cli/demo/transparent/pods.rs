//! Pods: hosts on a wire, each a network namespace without a name, with an IPv4 and an IPv6 address.
//!
//! A namespace lives by a thread that is in it and does there what it is asked to. A process that the thread starts, and
//! a socket that it opens, belong to the pod.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::mpsc::{SyncSender, sync_channel};

use rustix::process::{Gid, Uid};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::cell;
use crate::intercept::link;

/// Who applications are: nobody.
pub(super) const APPLICATION: u32 = 65_534;
/// The bridge, in the cell's own network.
const WIRE: &str = "wire";
/// The number of the host that is the wire itself.
const HOST: u8 = 254;
/// Jobs that may wait for a thread.
const QUEUE: usize = 16;

type Job = Box<dyn FnOnce() + Send>;

/// A host.
#[derive(Debug)]
pub(super) struct Pod {
    pub(super) name: &'static str,
    pub(super) v4: Ipv4Addr,
    pub(super) v6: Ipv6Addr,
    jobs: SyncSender<Job>,
}

/// The wire: a bridge, which is a host, too.
#[derive(Debug)]
pub(super) struct Wire(pub(super) Pod);

impl Wire {
    pub(super) async fn new() -> Result<Self, String> {
        let (host, _) = Pod::enter("outsider", HOST, || Ok(())).await?;
        let (v4, v6) = (host.v4, host.v6);
        let made = host.run(move || {
            link::bridge(WIRE)?;
            furnish(WIRE, v4, v6)
        });
        made.await.map_err(|error| format!("no bridge can be made: {error}"))?;
        Ok(Self(host))
    }

    /// Another pod on the wire; `number` is the last part of its addresses.
    pub(super) async fn pod(&self, name: &'static str, number: u8) -> Result<Pod, String> {
        let (pod, namespace): (_, File) = Pod::enter(name, number, cell::network).await?;
        let why = |error: io::Error| format!("the pod {name} cannot be joined to the wire: {error}");
        let joined = self.0.run(move || {
            link::pair(name, "eth0", &namespace)?;
            link::join(name, WIRE)?;
            Ok(link::up(name)?)
        });
        joined.await.map_err(why)?;
        let (v4, v6) = (pod.v4, pod.v6);
        pod.run(move || furnish("eth0", v4, v6)).await.map_err(why)?;
        Ok(pod)
    }
}

fn furnish(name: &str, v4: Ipv4Addr, v6: Ipv6Addr) -> io::Result<()> {
    link::up("lo")?;
    link::address(name, v4.into(), 24)?;
    link::address(name, v6.into(), 64).map_err(|errno| io::Error::other(format!("IPv6: {errno}")))?;
    Ok(link::up(name)?)
}

impl Pod {
    /// Starts the thread of a host, which first goes where it shall be.
    async fn enter<T: Send + 'static>(
        name: &'static str,
        number: u8,
        go: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Result<(Self, T), String> {
        let (jobs, todo) = sync_channel::<Job>(QUEUE);
        let (tell, there) = oneshot::channel();
        let thread = std::thread::Builder::new().name(name.into());
        let spawned = thread.spawn(move || {
            let gone = go();
            let well = gone.is_ok();
            if tell.send(gone).is_ok() && well {
                todo.into_iter().for_each(|job| job());
            }
        });
        spawned.map_err(|error| format!("no thread for {name}: {error}"))?;
        let gone = there.await.map_err(|_| format!("the thread of {name} broke off"))??;
        let (v4, v6) = (Ipv4Addr::new(10, 77, 0, number), Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, number.into()));
        Ok((Self { name, v4, v6, jobs }, gone))
    }

    /// Does this in the pod. What it starts and what it opens belongs there.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let gone = || io::Error::other(format!("the thread of {} broke off", self.name));
        let (tell, done) = oneshot::channel();
        let job: Job = Box::new(move || drop(tell.send(job())));
        self.jobs.try_send(job).map_err(|_| gone())?;
        done.await.map_err(|_| gone())?
    }

    /// Listens on a port of both addresses, as an application does.
    pub(super) async fn listen(&self, port: u16) -> io::Result<Vec<TcpListener>> {
        let at = self.at(port);
        // On a thread of its own: that of the pod stays root.
        let listeners = self.run(move || {
            let bind = move || {
                let (user, group) = (Uid::from_raw(APPLICATION), Gid::from_raw(APPLICATION));
                rustix::thread::set_thread_groups(&[])?;
                rustix::thread::set_thread_res_gid(group, group, group)?;
                rustix::thread::set_thread_res_uid(user, user, user)?;
                at.into_iter().map(std::net::TcpListener::bind).collect::<io::Result<Vec<_>>>()
            };
            let bound = std::thread::spawn(bind).join();
            bound.unwrap_or_else(|_| Err(io::Error::other("the thread broke off")))
        });
        let adopt = |listener: std::net::TcpListener| {
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        };
        listeners.await?.into_iter().map(adopt).collect()
    }

    /// This port of both addresses.
    pub(super) fn at(&self, port: u16) -> [SocketAddr; 2] {
        [IpAddr::from(self.v4), self.v6.into()].map(|address| SocketAddr::new(address, port))
    }
}

#[cfg(test)]
impl Pod {
    /// One that does nothing.
    pub(super) fn for_tests(name: &'static str, number: u8) -> Self {
        let (jobs, _) = sync_channel(0);
        Self { name, v4: Ipv4Addr::new(10, 77, 0, number), v6: Ipv6Addr::LOCALHOST, jobs }
    }
}
