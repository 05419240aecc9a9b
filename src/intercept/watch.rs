//! Whether the interception stands, as the proxy that runs can see it.
//!
//! In: a [`Plan`], and the [`Arrivals`] of our own inbound capture. Out: [`Seen`], one [`Finding`] for each thing that was
//! looked at. With CAP_NET_ADMIN the rules are read. Without it, only what passes through them tells: a connection of the
//! proxy to its own host's address, which the rules of every plan with inbound capture bring back to the capture port.
//! Nothing without a capability can tell of the rules for connections from elsewhere or from other users; [`Seen`] does
//! not claim it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustix::thread::CapabilitySet;
use serde::Serialize;
use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpSocket};

use super::addresses;
use super::arrivals::Arrivals;
use super::changes::Changes;
use super::plan::{InboundCapture, Plan, ProxyOwner};
use super::{Standing, standing_in_nftables};

/// How long a probe may be on its way. It never leaves this host.
const PROBE: Duration = Duration::from_millis(500);
/// How long the rules may take to be read. The kernel has a deadline of its own, for each of some questions.
const READ: Duration = Duration::from_secs(10);
/// One rule that is changed is often followed by others.
const SETTLE: Duration = Duration::from_millis(100);
/// What is found where nf_tables has no table of ours.
const MISSING: &str = "the rules are missing";
/// How often a port is drawn that is not to be one of some.
const DRAWS: usize = 64;

/// What was found of one thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", content = "detail", rename_all = "snake_case")]
pub enum Finding {
    /// It was looked at, and is as declared.
    Holds(String),
    /// It is not.
    Broken(String),
    /// It could not be looked at, and why.
    NotChecked(String),
}

/// What one look has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Seen {
    /// All rules, as read from the kernel.
    pub rules: Finding,
    /// Whether the rules know this process as the proxy.
    pub owner: Finding,
    /// A connection of ours to our own IPv4 address.
    pub own_address_ipv4: Finding,
    /// The same for IPv6.
    pub own_address_ipv6: Finding,
}

impl Seen {
    fn all(&self) -> [&Finding; 4] {
        [&self.rules, &self.owner, &self.own_address_ipv4, &self.own_address_ipv6]
    }

    /// What is broken, a line each.
    pub fn broken(&self) -> Vec<String> {
        let broken = |finding: &Finding| match finding {
            Finding::Broken(what) => Some(what.clone()),
            Finding::Holds(_) | Finding::NotChecked(_) => None,
        };
        self.all().into_iter().filter_map(broken).collect()
    }

    /// Why something could not be looked at, a line each.
    pub fn not_checked(&self) -> Vec<String> {
        let why = |finding: &Finding| match finding {
            Finding::NotChecked(why) => Some(why.clone()),
            Finding::Holds(_) | Finding::Broken(_) => None,
        };
        self.all().into_iter().filter_map(why).collect()
    }

    /// Whether the interception is whole; none if nothing that shows it could be looked at. Who we are shows nothing.
    pub fn whole(&self) -> Option<bool> {
        let [rules, _, v4, v6] = self.all();
        match self.broken().is_empty() {
            false => Some(false),
            true => [rules, v4, v6].iter().any(|finding| matches!(finding, Finding::Holds(_))).then_some(true),
        }
    }
}

/// Looks, for as long as the proxy runs.
#[derive(Debug)]
pub struct Watch {
    arrivals: Arc<Arrivals>,
    changes: Option<Changes>,
    /// The rules that are being read, should that take long.
    reading: Option<tokio::task::JoinHandle<Finding>>,
}

impl Watch {
    /// With the arrivals of the inbound capture. Within a runtime.
    pub fn new(arrivals: Arc<Arrivals>) -> Self {
        Self { arrivals, changes: Changes::listen().ok(), reading: None }
    }

    /// Waits for `interval`, or until somebody changes rules if that can be heard.
    pub async fn pause(&mut self, interval: Duration) {
        let heard = async {
            match &mut self.changes {
                Some(changes) => changes.next().await,
                None => std::future::pending().await,
            }
        };
        match tokio::time::timeout(interval, heard).await {
            Err(_) => {}
            Ok(Ok(())) => tokio::time::sleep(SETTLE).await,
            Ok(Err(_)) => {
                self.changes = None;
                tokio::time::sleep(interval).await;
            }
        }
    }

    /// Looks once, and once more if anything is broken: a probe that met a loaded machine is no drift.
    pub async fn look(&mut self, plan: &Plan) -> Seen {
        let first = self.look_once(plan).await;
        match first.whole() {
            Some(false) => self.look_once(plan).await,
            _ => first,
        }
    }

    async fn look_once(&mut self, plan: &Plan) -> Seen {
        let rules = self.rules(plan).await;
        let (own_address_ipv4, own_address_ipv6) = match addresses::own() {
            Ok((v4, v6)) => tokio::join!(self.own_address(plan, v4, "IPv4"), self.own_address(plan, v6, "IPv6")),
            Err(errno) => {
                let unknown = Finding::NotChecked(format!("the addresses of this host cannot be read: {errno}"));
                (unknown.clone(), unknown)
            }
        };
        let held =
            [&own_address_ipv4, &own_address_ipv6].into_iter().any(|finding| matches!(finding, Finding::Holds(_)));
        let rules = match rules {
            // They work, so they are there.
            Finding::Broken(what) if what == MISSING && held => Finding::NotChecked(
                "the rules are not in nf_tables; those of iptables cannot be read by the proxy".into(),
            ),
            rules => rules,
        };
        Seen { rules, owner: owner(&plan.proxy), own_address_ipv4, own_address_ipv6 }
    }

    async fn rules(&mut self, plan: &Plan) -> Finding {
        let may =
            rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::NET_ADMIN));
        if !may {
            return Finding::NotChecked("reading the rules takes CAP_NET_ADMIN, which this process has not".into());
        }
        let reading = match &mut self.reading {
            Some(reading) => reading,
            none => {
                let plan = plan.clone();
                none.insert(tokio::task::spawn_blocking(move || read(&plan)))
            }
        };
        match tokio::time::timeout(READ, &mut *reading).await {
            Err(_) => Finding::NotChecked("the kernel takes too long to show its rules".into()),
            Ok(read) => {
                self.reading = None;
                read.unwrap_or_else(|error| Finding::NotChecked(format!("the rules cannot be read: {error}")))
            }
        }
    }

    async fn own_address(&self, plan: &Plan, address: Option<IpAddr>, family: &str) -> Finding {
        let Some(inbound) = &plan.inbound else {
            return Finding::NotChecked("the proxy's own connections show nothing without inbound capture".into());
        };
        let Some(address) = address else {
            return Finding::NotChecked(format!("this host has no {family} address that others can call"));
        };
        match tokio::time::timeout(PROBE, self.probe(plan, inbound, address)).await {
            Ok(Ok(Landed::Captured)) => {
                Finding::Holds(format!("a connection to {address} came in at the capture port"))
            }
            Ok(Ok(Landed::Uncaptured)) => Finding::Broken(format!("a connection to {address} was not captured")),
            Ok(Ok(Landed::Refused)) => Finding::Broken(format!(
                "a connection to {address} was captured, but not by port {}, where this proxy listens",
                inbound.port
            )),
            Ok(Ok(Landed::Closed)) => Finding::NotChecked(format!(
                "a connection to {address} was captured and closed: is connections.max reached?"
            )),
            Ok(Err(error)) => Finding::NotChecked(format!("no connection to {address} can be tried: {error}")),
            Err(_) => {
                Finding::Broken(format!("a connection to {address} came in nowhere, in {} ms", PROBE.as_millis()))
            }
        }
    }

    /// Connects to a port of our own that only we know.
    async fn probe(&self, plan: &Plan, inbound: &InboundCapture, address: IpAddr) -> io::Result<Landed> {
        let target = listen(address, &inbound.skip_ports)?;
        let to = target.local_addr()?;
        let socket = match address {
            IpAddr::V4(_) => TcpSocket::new_v4(),
            IpAddr::V6(_) => TcpSocket::new_v6(),
        }?;
        if let Some(mark) = plan.proxy.mark {
            SockRef::from(&socket).set_mark(mark)?;
        }
        socket.bind(SocketAddr::new(address, 0))?;
        let from = socket.local_addr()?;
        let mut awaited = self.arrivals.expect(from, to);
        let uncaptured = async {
            while target.accept().await?.1 != from {}
            Ok(Landed::Uncaptured)
        };
        let closed = async {
            match socket.connect(to).await {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(Landed::Refused),
                Err(error) => Err(error),
                Ok(mut stream) => {
                    // Whoever has accepted it says nothing.
                    let _ = stream.read(&mut [0]).await;
                    Ok(Landed::Closed)
                }
            }
        };
        tokio::select! {
            biased;
            () = awaited.come() => Ok(Landed::Captured),
            landed = uncaptured => landed,
            landed = closed => landed,
        }
    }
}

/// What became of a probe.
enum Landed {
    /// It came in at our capture port.
    Captured,
    /// It came where it was for.
    Uncaptured,
    /// Nobody listens where it came, but somebody does where it was for.
    Refused,
    /// Somebody accepted it, and closed it.
    Closed,
}

fn read(plan: &Plan) -> Finding {
    match standing_in_nftables(plan) {
        Ok(Standing::Whole) => Finding::Holds("the kernel has all rules".into()),
        Ok(Standing::Missing) => Finding::Broken(MISSING.into()),
        Ok(Standing::Differs(what)) => Finding::Broken(format!("the rules differ: {}", what.join("; "))),
        Err(why) => Finding::NotChecked(format!("the rules cannot be read: {why}")),
    }
}

/// Who the rules take for the proxy, and who we are.
fn owner(owner: &ProxyOwner) -> Finding {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    match owner {
        ProxyOwner { mark: Some(mark), .. } => Finding::Holds(format!("our sockets carry the mark {mark:#x}")),
        ProxyOwner { uid: Some(known), .. } if *known == uid => Finding::Holds(format!("we are user {uid}")),
        ProxyOwner { gid: Some(known), .. } if *known == gid => Finding::Holds(format!("we are group {gid}")),
        _ => Finding::Broken(format!(
            "this process is user {uid} and group {gid}, and intercept.proxy names neither: its own connections are captured"
        )),
    }
}

/// A listener on a port that is not one of `not`.
fn listen(address: IpAddr, not: &[u16]) -> io::Result<TcpListener> {
    let at = SocketAddr::new(address, 0);
    for _ in 0..DRAWS {
        let socket = Socket::new(Domain::for_address(at), Type::STREAM.nonblocking(), None)?;
        socket.bind(&at.into())?;
        socket.listen(4)?;
        let listener = TcpListener::from_std(socket.into())?;
        if !not.contains(&listener.local_addr()?.port()) {
            return Ok(listener);
        }
    }
    Err(io::Error::other("all ports that were drawn are among intercept.inbound.skip_ports"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(rules: Finding, owner: Finding, v4: Finding, v6: Finding) -> Seen {
        Seen { rules, owner, own_address_ipv4: v4, own_address_ipv6: v6 }
    }

    #[test]
    fn whole_is_what_was_seen_to_hold_and_is_broken_nowhere() {
        let holds = || Finding::Holds("h".into());
        let broken = |what: &str| Finding::Broken(what.into());
        let unknown = || Finding::NotChecked("u".into());
        assert_eq!(seen(holds(), holds(), holds(), unknown()).whole(), Some(true));
        assert_eq!(seen(unknown(), holds(), unknown(), holds()).whole(), Some(true));
        assert_eq!(seen(unknown(), holds(), unknown(), unknown()).whole(), None);
        let one = seen(holds(), holds(), broken("four"), broken("six"));
        assert_eq!((one.whole(), one.broken()), (Some(false), vec!["four".to_owned(), "six".to_owned()]));
        assert_eq!(seen(holds(), broken("who"), holds(), holds()).whole(), Some(false));
    }

    #[test]
    fn the_proxy_is_known_by_any_of_its_marks() {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let known = |uid, gid, mark| matches!(owner(&ProxyOwner { uid, gid, mark }), Finding::Holds(_));
        assert!(known(Some(uid), None, None) && known(Some(uid + 1), Some(gid), None) && known(None, None, Some(1)));
        assert!(!known(Some(uid + 1), Some(gid + 1), None));
    }

    #[tokio::test]
    async fn a_port_is_drawn_until_it_is_none_of_those_that_are_skipped() {
        let all: Vec<u16> = (1..=u16::MAX).collect();
        let address = IpAddr::from([127, 0, 0, 1]);
        assert!(listen(address, &all).is_err());
        assert_ne!(listen(address, &[8080]).unwrap().local_addr().unwrap().port(), 8080);
    }
}
