//! Work in another network namespace (network_namespaces(7)).

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::Error;

/// Does something in the network namespace that a file stands for (`/run/netns/NAME`, `/proc/PID/ns/net`). It runs on a
/// thread of its own, which alone enters the namespace and ends with it.
///
/// # Errors
/// Why the namespace cannot be entered.
pub fn in_netns<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
    let shown = path.display();
    let namespace =
        File::open(path).map_err(|why| Error::new(format!("cannot open the network namespace {shown}: {why}")))?;
    let enter = || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).map_err(|errno| {
            let what = format!("cannot enter the network namespace {shown}");
            if errno == rustix::io::Errno::PERM {
                Error::new(format!("{what}: this takes CAP_SYS_ADMIN; run as root"))
            } else {
                Error::new(format!("{what}: {errno}"))
            }
        })
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".to_owned());
        let running = thread.spawn_scoped(scope, || enter().map(|()| work()));
        let running = running
            .map_err(|why| Error::new(format!("cannot start a thread for the network namespace {shown}: {why}")))?;
        running
            .join()
            .unwrap_or_else(|_| Err(Error::new(format!("the work in the network namespace {shown} broke off"))))
    })
}
