//! Word from the kernel that somebody changes rules (linux/netfilter/nfnetlink.h). Hearing it takes CAP_NET_ADMIN.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use tokio::io::unix::AsyncFd;

/// NFNLGRP_NFTABLES, the seventh group, as a bit.
const NFTABLES: u32 = 1 << (7 - 1);

/// How much is taken in before whoever waits hears of it, however much more there is.
const AT_ONCE: usize = 4096;

/// Hears of every change of nf_tables in the network namespace it was made in. What has changed is not looked at: whoever
/// hears of it looks at the rules.
#[derive(Debug)]
pub(super) struct Changes(AsyncFd<OwnedFd>);

impl Changes {
    /// Begins to listen, within a runtime.
    ///
    /// # Errors
    /// `EPERM` without CAP_NET_ADMIN.
    pub(super) fn listen() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(NETFILTER))?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, NFTABLES))?;
        #[expect(
            deprecated,
            reason = "what replaces it is unsafe, for types that close their descriptor early; this one does not"
        )]
        AsyncFd::new(socket).map(Self)
    }

    /// Waits for the next change, and takes in whatever else has been told.
    pub(super) async fn next(&mut self) -> io::Result<()> {
        let mut ready = self.0.readable().await?;
        let mut some = [0; 64];
        for _ in 0..AT_ONCE {
            // A datagram is cut to the buffer: all of it is gone then.
            match rustix::net::recv(ready.get_inner(), &mut some[..], RecvFlags::empty()) {
                // There was more than the socket holds: changes all the same.
                Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    ready.clear_ready();
                    return Ok(());
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}
