//! The sockets that the proxy opens: to its workload and to upstreams.
//!
//! In: an address, and what is declared of interception. Out: a connected socket that the rules take for the proxy's own.
//! If they do not, it comes back as a captured connection and would be dialled again, for ever: so what is being dialled
//! is written down ([`Dials`]), and whoever takes captured connections asks there.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpStream;

use super::io::tune;
use crate::config::schema::{InboundMode, Intercept};
use crate::intercept::WORKLOAD_TOS;

/// What is declared of the sockets of one listener's connections.
#[derive(Clone, Debug, Default)]
pub struct Dialer {
    /// `SO_MARK` of all of them.
    mark: Option<u32>,
    /// Whether those to the workload say so to the rules.
    to_workload: bool,
    /// `SO_MARK` of those to the workload that carry the client's own address; none where they do not.
    source_mark: Option<u32>,
    /// Where they are written down; none where nothing is captured.
    dials: Option<Arc<Dials>>,
}

/// Where a socket leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Towards {
    /// To our own workload.
    Workload,
    /// To another machine's proxy, or wherever the workload wanted to go.
    Upstream,
}

/// What the proxy has open or is opening, by both ends. As many as there are such sockets.
#[derive(Debug, Default)]
pub struct Dials(Mutex<HashMap<(SocketAddr, SocketAddr), Towards>>);

/// One that is written down until this is dropped.
#[derive(Debug)]
pub struct Dial {
    dials: Arc<Dials>,
    ends: (SocketAddr, SocketAddr),
}

/// A connected socket. For an upstream, `dial` is of use until its handshake is over; for the workload, as long as the
/// socket is open.
#[derive(Debug)]
pub struct Dialled {
    /// The socket.
    pub stream: TcpStream,
    /// Its entry, where there is one.
    pub dial: Option<Dial>,
}

impl Dialer {
    /// By the config: for a listener whose workload is on this machine or not.
    pub fn declared(intercept: Option<&Intercept>, workload_is_here: bool, dials: &Arc<Dials>) -> Self {
        let Some(intercept) = intercept else { return Self::default() };
        let inbound = intercept.inbound.as_ref();
        let preserved = inbound.filter(|inbound| inbound.mode == InboundMode::Tproxy && inbound.preserve_source);
        Self {
            mark: intercept.proxy.mark,
            to_workload: inbound.is_some() && workload_is_here,
            source_mark: preserved.map(|inbound| inbound.mark),
            dials: Some(Arc::clone(dials)),
        }
    }

    /// Connects to an upstream's address within `timeout`.
    ///
    /// # Errors
    /// The system's, `TimedOut`, or that the declared mark cannot be set.
    pub async fn upstream(&self, address: SocketAddr, timeout: Duration) -> io::Result<Dialled> {
        let socket = self.socket(address, self.mark)?;
        self.connect(socket, address, Towards::Upstream, timeout).await
    }

    /// Connects to the workload within `timeout`, from the address of `client` where that is to be preserved.
    ///
    /// # Errors
    /// As for [`Dialer::upstream`].
    pub async fn workload(
        &self,
        address: SocketAddr,
        client: Option<SocketAddr>,
        timeout: Duration,
    ) -> io::Result<Dialled> {
        let socket = match (self.source_mark, client) {
            (Some(mark), Some(client)) => self.socket_from(client, address, mark)?,
            _ => self.socket(address, self.mark)?,
        };
        if self.to_workload {
            match address {
                SocketAddr::V4(_) => socket.set_tos_v4(WORKLOAD_TOS.into()),
                SocketAddr::V6(_) => socket.set_tclass_v6(WORKLOAD_TOS.into()),
            }?;
        }
        self.connect(socket, address, Towards::Workload, timeout).await
    }

    fn socket(&self, address: SocketAddr, mark: Option<u32>) -> io::Result<Socket> {
        let kind = Type::STREAM.nonblocking();
        let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
        if let Some(mark) = mark {
            // Without it the connection would be captured, so there is none without it.
            socket.set_mark(mark).map_err(|error| {
                let what = format!("its socket cannot be marked: {error}; give the proxy CAP_NET_ADMIN or CAP_NET_RAW");
                io::Error::new(error.kind(), what)
            })?;
        }
        Ok(socket)
    }

    /// A socket bound to the client's address (`IP_TRANSPARENT`, ip(7)), at another port than the client's: with the same,
    /// conntrack would take both connections for one.
    fn socket_from(&self, client: SocketAddr, address: SocketAddr, mark: u32) -> io::Result<Socket> {
        let from = SocketAddr::new(client.ip().to_canonical(), 0);
        let bound = || {
            let socket = self.socket(address, Some(mark))?;
            match address {
                SocketAddr::V4(_) => socket.set_ip_transparent_v4(true),
                SocketAddr::V6(_) => socket.set_ip_transparent_v6(true),
            }?;
            socket.bind(&from.into())?;
            Ok(socket)
        };
        let preserving = |error: io::Error| {
            io::Error::new(error.kind(), format!("the client's address cannot be preserved: {error}"))
        };
        let socket = bound().map_err(preserving)?;
        if socket.local_addr()?.as_socket().map(|local| local.port()) == Some(client.port()) {
            // The first one keeps the port that the second one shall not get.
            return bound().map_err(preserving);
        }
        Ok(socket)
    }

    async fn connect(
        &self,
        socket: Socket,
        address: SocketAddr,
        towards: Towards,
        timeout: Duration,
    ) -> io::Result<Dialled> {
        let dial = match &self.dials {
            Some(dials) => Some(dials.begin(&socket, address, towards)?),
            None => {
                begin(&socket, address)?;
                None
            }
        };
        let stream = TcpStream::from_std(socket.into())?;
        let connected = async {
            stream.writable().await?;
            stream.take_error()?.map_or(Ok(()), Err)
        };
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no answer in time");
        tokio::time::timeout(timeout, connected).await.map_err(late)??;
        tune(&stream);
        Ok(Dialled { stream, dial })
    }
}

/// Begins to connect; that it is under way is no error (connect(2)).
fn begin(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => Ok(()),
        other => other,
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

impl Dials {
    /// Begins to connect and writes it down, under one lock: whoever accepts what comes of it looks after that.
    fn begin(self: &Arc<Self>, socket: &Socket, address: SocketAddr, towards: Towards) -> io::Result<Dial> {
        let mut dials = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        begin(socket, address)?;
        let local = socket.local_addr()?.as_socket();
        let local = local.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it is no address of TCP"))?;
        let ends = (canonical(local), canonical(address));
        dials.insert(ends, towards);
        Ok(Dial { dials: Arc::clone(self), ends })
    }

    /// Where the socket of ours leads that connects `from` there `to` here; none if it is none of ours.
    pub fn ours(&self, from: SocketAddr, to: SocketAddr) -> Option<Towards> {
        let dials = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        dials.get(&(canonical(from), canonical(to))).copied()
    }
}

impl Drop for Dial {
    fn drop(&mut self) {
        self.dials.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.ends);
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn dialer(yaml: &str) -> (Dialer, Arc<Dials>) {
        let text = format!(
            "identity: unix:///a\nintercept: {yaml}\n\
             inbound: [{{ name: a, capture: any, allow: ['spiffe://td'] }}]"
        );
        let config = crate::config::parse(&text, "f.yaml").unwrap().config;
        let dials = Arc::default();
        (Dialer::declared(config.intercept.as_ref(), true, &dials), dials)
    }

    #[tokio::test]
    async fn what_is_dialled_is_known_before_it_can_be_accepted_and_until_it_is_gone() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).await.unwrap();
            let address = listener.local_addr().unwrap();
            let (dialer, dials) = dialer("{ inbound: {} }");
            let (dialled, accepted) = tokio::join!(dialer.workload(address, None, SOON), listener.accept());
            let (dialled, (_, client)) = (dialled.unwrap(), accepted.unwrap());
            assert_eq!(dials.ours(client, address), Some(Towards::Workload));
            let socket = socket2::SockRef::from(&dialled.stream);
            let tos = if address.is_ipv4() { socket.tos_v4() } else { socket.tclass_v6() }.unwrap();
            assert_eq!(tos, u32::from(WORKLOAD_TOS));
            drop(dialled);
            assert_eq!(dials.ours(client, address), None);
            let (dialled, accepted) = tokio::join!(dialer.upstream(address, SOON), listener.accept());
            assert_eq!(dials.ours(accepted.unwrap().1, address), Some(Towards::Upstream));
            let socket = socket2::SockRef::from(&dialled.as_ref().unwrap().stream);
            let tos = if address.is_ipv4() { socket.tos_v4() } else { socket.tclass_v6() }.unwrap();
            assert_eq!(tos, 0, "what leaves the machine is not marked down");
        }
    }

    #[tokio::test]
    async fn nothing_is_noted_where_nothing_is_captured_and_a_refusal_is_the_system_s() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let plain = Dialer::default();
        assert!(plain.workload(address, None, SOON).await.unwrap().dial.is_none());
        drop(listener);
        let (noting, dials) = dialer("{ inbound: {} }");
        for dialer in [plain, noting] {
            let error = dialer.upstream(address, SOON).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        }
        assert!(dials.0.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_declared_mark_is_on_every_socket_or_there_is_none() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (dialer, _) = dialer("{ inbound: {}, proxy: { mark: 77 } }");
        for dialled in [dialer.upstream(address, SOON).await, dialer.workload(address, None, SOON).await] {
            match dialled {
                Ok(dialled) => assert_eq!(socket2::SockRef::from(&dialled.stream).mark().unwrap(), 77),
                // Without the capability.
                Err(error) => assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}"),
            }
        }
    }
}
