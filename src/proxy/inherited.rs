//! Listening sockets that were opened for us (socket activation, sd_listen_fds(3)).
//!
//! In: what `LISTEN_PID` and `LISTEN_FDS` say. Out: sockets for those listeners whose declared address they have, used in
//! place of binding. Whoever opened them keeps them open, so nobody who connects is lost while one process takes over
//! from another: what the old one has not accepted stays in the one queue that the new one accepts from.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;

use listenfd::ListenFd;

use super::listener::{Address, Listener, SocketFile};

/// Sockets that are taken at most.
const MOST: usize = 256;

/// A socket of those.
#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// The sockets that were opened for us and not claimed yet.
#[derive(Debug, Default)]
pub struct Inherited {
    sockets: Vec<(Address, Socket)>,
    /// What was passed and cannot be used, in words.
    refused: Vec<String>,
}

impl Inherited {
    /// None.
    pub fn none() -> Self {
        Self::default()
    }

    /// Takes what was passed to this process. To be called once, before the process opens anything and before it has
    /// threads: descriptors are known by their numbers only, and the variables are removed.
    pub fn take() -> Self {
        let variable = |name: &str| std::env::var(name).ok();
        let (Some(pid), Some(count)) = (variable("LISTEN_PID"), variable("LISTEN_FDS")) else {
            return Self::none();
        };
        // Meant for whoever started us, and handed on by mistake.
        if pid.parse() != Ok(std::process::id()) {
            return Self::none();
        }
        let refused = |why: String| Self { sockets: Vec::new(), refused: vec![why] };
        let count = match count.parse::<usize>() {
            Ok(count) if count <= MOST => count,
            _ => return refused(format!("LISTEN_FDS is '{count}', which is not a number up to {MOST}")),
        };
        // No part of the protocol; where the descriptors begin is not for the environment to say.
        if variable("LISTEN_FDS_FIRST_FD").is_some() {
            return refused("LISTEN_FDS_FIRST_FD is set".to_owned());
        }
        let mut passed = ListenFd::from_env();
        let mut inherited = Self::none();
        for index in 0..count.min(passed.len()) {
            // sd_listen_fds(3): SD_LISTEN_FDS_START is 3.
            match one(&mut passed, index) {
                Ok(found) => inherited.sockets.push(found),
                Err(why) => inherited.refused.push(format!("descriptor {}: {why}", index + 3)),
            }
        }
        inherited
    }

    /// The socket that listens on this address, if one was passed. To be called within a runtime.
    ///
    /// # Errors
    /// The system's error.
    pub fn claim(&mut self, address: &Address) -> io::Result<Option<Listener>> {
        let Some(at) = self.sockets.iter().position(|(found, _)| found == address) else { return Ok(None) };
        let (address, socket) = self.sockets.swap_remove(at);
        let listener = match (socket, address) {
            (Socket::Tcp(socket), _) => Listener::Tcp(tokio::net::TcpListener::from_std(socket)?),
            (Socket::Unix(socket), Address::Unix(path)) => {
                Listener::Unix(tokio::net::UnixListener::from_std(socket)?, SocketFile::foreign(path))
            }
            (Socket::Unix(_), Address::Tcp(_)) => return Ok(None),
        };
        Ok(Some(listener))
    }

    /// The TCP socket that listens on this address, if one was passed. To be called within a runtime.
    ///
    /// # Errors
    /// The system's error.
    pub fn claim_tcp(&mut self, address: SocketAddr) -> io::Result<Option<tokio::net::TcpListener>> {
        Ok(match self.claim(&Address::Tcp(address))? {
            Some(Listener::Tcp(listener)) => Some(listener),
            _ => None,
        })
    }

    /// Closes what nobody has claimed, and says so: whoever opened a socket that is not served has made a mistake, and
    /// connections to it would hang.
    pub fn close_rest(&mut self) {
        for (address, _) in self.sockets.drain(..) {
            tracing::warn!(%address, "a socket was passed for an address that nothing is declared to listen on: closed");
        }
        for why in self.refused.drain(..) {
            tracing::warn!(%why, "a socket was passed that cannot be used");
        }
    }
}

/// Only sockets that streams can be accepted from; closed on exec (listenfd sees to that).
fn one(passed: &mut ListenFd, index: usize) -> Result<(Address, Socket), String> {
    let text = |error: io::Error| error.to_string();
    if let Ok(Some(socket)) = passed.take_tcp_listener(index) {
        listening(&socket)?;
        socket.set_nonblocking(true).map_err(text)?;
        let at = socket.local_addr().map_err(text)?;
        return Ok((Address::Tcp(at), Socket::Tcp(socket)));
    }
    if let Ok(Some(socket)) = passed.take_unix_listener(index) {
        listening(&socket)?;
        socket.set_nonblocking(true).map_err(text)?;
        let at = socket.local_addr().map_err(text)?;
        let path = at.as_pathname().ok_or("a Unix socket without a path")?;
        return Ok((Address::Unix(path.to_owned()), Socket::Unix(socket)));
    }
    // Taken to be closed.
    let datagrams = passed.take_udp_socket(index).is_ok() || passed.take_unix_datagram(index).is_ok();
    Err(if datagrams { "not a stream socket" } else { "not a socket of a kind that is known here" }.to_owned())
}

fn listening(socket: impl AsFd) -> Result<(), String> {
    match socket2::SockRef::from(&socket).is_listener() {
        Ok(true) => Ok(()),
        Ok(false) => Err("a socket that does not listen (systemd: Accept=no is needed)".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
