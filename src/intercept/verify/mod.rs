//! Proof by traffic that what is declared is captured: attempts with a token to get round the gate, both ways.
//!
//! In: a [`Plan`], in the network namespace of the calling thread. Out: a [`Finding`] for each attempt. The attempts are
//! played between this host and one of our own beside it (`stage`), as a user of the workload and as the proxy (`actor`);
//! each has a deadline (`probe`). Rules, sockets and addresses that others use are left alone. Where we may not make a
//! host of our own, what only it can show is unproven, and said so.
//!
//! Nobody who listens is needed: what is captured while the proxy is down is refused, and that is found here.

mod actor;
mod probe;
mod stage;

use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use serde::Serialize;
use socket2::{Socket, Type};

use self::actor::{Actor, Us};
use self::probe::{Way, target};
use self::stage::{Absent, Ends, Stage};
use super::plan::{InboundCapture, OutboundCapture, Plan, Udp};
use super::{Standing, addresses, standing};

/// How long the way to the other host may take to stand.
const READY: Duration = Duration::from_secs(1);
const DNS: u16 = 53;
const APPLY: &str = "run `portcullis redirect apply` with this config in this network namespace; if it stays, a rule of \
                     somebody else comes first (nft list ruleset)";

/// What is attempted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Attempt {
    /// The rules as the kernel shows them.
    Rules,
    /// The eBPF programs as the kernel shows them.
    Programs,
    /// That the proxy's own connections pass.
    Proxy,
    /// A connection of the workload.
    OutboundTcp,
    /// A connection of the workload to the port of DNS, where no name server is.
    OutboundTcpDns,
    /// A datagram of the workload.
    OutboundUdp,
    /// A datagram of the workload to the port of DNS, where no name server is.
    OutboundUdpDns,
    /// A connection to the workload.
    InboundTcp,
    /// A datagram to the workload.
    InboundUdp,
    /// A connection of the proxy to the workload by this host's own address, as a call to a service of one's own.
    OwnAddress,
}

impl Attempt {
    /// In words.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rules => "rules",
            Self::Programs => "eBPF programs",
            Self::Proxy => "the proxy itself",
            Self::OutboundTcp => "outbound TCP",
            Self::OutboundTcpDns => "outbound TCP to port 53",
            Self::OutboundUdp => "outbound UDP",
            Self::OutboundUdpDns => "outbound UDP to port 53",
            Self::InboundTcp => "inbound TCP",
            Self::InboundUdp => "inbound UDP",
            Self::OwnAddress => "own address",
        }
    }
}

/// What an attempt shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It is as declared: what is to be captured was captured or refused.
    Holds,
    /// Something passes round the gate.
    Passes,
    /// Something else is not as declared.
    Differs,
    /// It cannot be told.
    Unproven,
}

/// The outcome of one attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was attempted.
    pub attempt: Attempt,
    /// `IPv4` or `IPv6`, if it was of one of them.
    pub family: Option<&'static str>,
    /// What it shows.
    pub verdict: Verdict,
    /// What happened.
    pub detail: String,
    /// What to do, unless it holds.
    pub remedy: Option<String>,
}

/// Whether all that is declared was proven to hold; with `lenient`, what cannot be told does not count.
pub fn proven(findings: &[Finding], lenient: bool) -> bool {
    findings.iter().all(|finding| match finding.verdict {
        Verdict::Holds => true,
        Verdict::Unproven => lenient,
        Verdict::Passes | Verdict::Differs => false,
    })
}

/// Attempts everything that the plan is to prevent, as user `wanted` or, if that does not say, as nobody. It takes some
/// milliseconds if all is captured and the proxy is down, and at most some six seconds.
pub fn verify(plan: &Plan, wanted: Option<u32>) -> Vec<Finding> {
    let us = Us::now();
    let cast = Cast { plan, application: us.application(plan, wanted), proxy: us.proxy(plan) };
    let mut findings = vec![rules(plan)];
    match Stage::build(plan) {
        Ok(stage) => findings.extend(cast.on_stage(&stage)),
        Err(why) => findings.extend(cast.alone(&why)),
    }
    findings
}

fn rules(plan: &Plan) -> Finding {
    let (verdict, detail) = match standing(plan) {
        Ok(Standing::Whole) => (Verdict::Holds, "the kernel has all of them".into()),
        Ok(Standing::Missing) => (Verdict::Differs, "there are none".into()),
        Ok(Standing::Differs(what)) => (Verdict::Differs, what.join("; ")),
        Err(why) => (Verdict::Unproven, why.to_string()),
    };
    let remedy = (verdict == Verdict::Differs).then(|| APPLY.to_owned());
    Finding { attempt: Attempt::Rules, family: None, verdict, detail, remedy }
}

/// Who attempts what.
struct Cast<'a> {
    plan: &'a Plan,
    application: Result<Actor, String>,
    proxy: Result<Actor, String>,
}

/// One family on the stage.
struct Scene<'a> {
    cast: &'a Cast<'a>,
    stage: &'a Stage,
    ends: Ends,
}

impl Cast<'_> {
    fn on_stage(&self, stage: &Stage) -> Vec<Finding> {
        let family = |ends: &Result<Ends, Absent>, name: &'static str| match ends {
            Ok(ends) => named(name, Scene { cast: self, stage, ends: *ends }.play()),
            // What is not spoken does not pass.
            Err(Absent::SwitchedOff) => {
                let off = |attempt| finding(attempt, Verdict::Holds, "switched off on this host");
                named(name, self.declared().map(off).collect())
            }
            Err(Absent::Because(why)) => named(name, self.declared().map(|attempt| unproven(attempt, why)).collect()),
        };
        // Each family waits for its own deadlines.
        std::thread::scope(|scope| {
            let six = scope.spawn(|| family(&stage.v6, "IPv6"));
            let mut findings = family(&stage.v4, "IPv4");
            match six.join() {
                Ok(six) => findings.extend(six),
                Err(_) => findings.extend(named("IPv6", vec![unproven(Attempt::OutboundTcp, "the probes broke off")])),
            }
            findings
        })
    }

    /// What can be shown without a host beside this one: connections to our own address.
    fn alone(&self, why: &str) -> Vec<Finding> {
        let (v4, v6) = addresses::own().unwrap_or_default();
        let one = |name: &'static str, own: Option<IpAddr>| {
            let shown = self.declared().map(|attempt| match (attempt, own) {
                (Attempt::OutboundTcp, Some(own)) => self.outbound_to_own(own),
                (Attempt::OwnAddress, Some(own)) => self.own_address(own),
                (attempt, _) => unproven(attempt, why),
            });
            named(name, shown.collect())
        };
        [one("IPv4", v4), one("IPv6", v6)].concat()
    }

    /// What is to be shown for each family.
    fn declared(&self) -> impl Iterator<Item = Attempt> {
        let Plan { inbound, outbound, udp, .. } = self.plan;
        let outbound = outbound.as_ref();
        let refuses_udp = *udp != Udp::Allow;
        let dns = outbound.is_some_and(|outbound| !outbound.skip_ports.contains(&DNS));
        [
            (Attempt::Proxy, outbound.is_some()),
            (Attempt::OutboundTcp, outbound.is_some()),
            (Attempt::OutboundTcpDns, dns),
            (Attempt::OutboundUdp, outbound.is_some() && refuses_udp),
            (Attempt::OutboundUdpDns, dns && refuses_udp),
            (Attempt::InboundTcp, inbound.is_some()),
            (Attempt::InboundUdp, inbound.is_some() && refuses_udp),
            (Attempt::OwnAddress, inbound.is_some()),
        ]
        .into_iter()
        .filter_map(|(attempt, declared)| declared.then_some(attempt))
    }

    /// The workload calls this host by its own address, which is captured like any other.
    fn outbound_to_own(&self, own: IpAddr) -> Finding {
        let ports = self.plan.outbound.as_ref().map(|outbound| &*outbound.skip_ports).unwrap_or_default();
        captured(Attempt::OutboundTcp, target(Type::STREAM, own, None, ports), |target| {
            by_tcp(target, &self.application)
        })
    }

    fn own_address(&self, own: IpAddr) -> Finding {
        captured(Attempt::OwnAddress, target(Type::STREAM, own, None, self.inbound_skipped()), |target| {
            by_tcp(target, &self.proxy)
        })
    }

    fn inbound_skipped(&self) -> &[u16] {
        self.plan.inbound.as_ref().map(|inbound: &InboundCapture| &*inbound.skip_ports).unwrap_or_default()
    }

    fn outbound_skipped(&self) -> &[u16] {
        self.plan.outbound.as_ref().map(|outbound: &OutboundCapture| &*outbound.skip_ports).unwrap_or_default()
    }
}

impl Scene<'_> {
    fn play(&self) -> Vec<Finding> {
        let Ends { near, far } = self.ends;
        let skipped = self.cast.outbound_skipped();
        let application = &self.cast.application;
        let here = |kind| target(kind, near, None, self.cast.inbound_skipped());
        let there = |kind, port| self.stage.there(|| target(kind, far, port, skipped)).unwrap_or_else(failed);
        let play = |attempt| match attempt {
            Attempt::Rules | Attempt::Programs => unproven(attempt, "it is read from the kernel, not attempted"),
            Attempt::Proxy => self.proxy_passes(there(Type::STREAM, None)),
            Attempt::OutboundTcp => captured(attempt, there(Type::STREAM, None), |to| by_tcp(to, application)),
            Attempt::OutboundTcpDns => captured(attempt, there(Type::STREAM, Some(DNS)), |to| by_tcp(to, application)),
            Attempt::OutboundUdp => captured(attempt, there(Type::DGRAM, None), |to| by_udp(to, application)),
            Attempt::OutboundUdpDns => captured(attempt, there(Type::DGRAM, Some(DNS)), |to| by_udp(to, application)),
            Attempt::InboundTcp => captured(attempt, here(Type::STREAM), |target| {
                probe::tcp(target, |to| {
                    self.stage.there(|| Actor::OURSELVES.socket(to, Type::STREAM, |s| probe::connect(s, to)))?
                })
            }),
            Attempt::InboundUdp => captured(attempt, here(Type::DGRAM), |target| {
                probe::udp(target, |to| {
                    self.stage.there(|| Actor::OURSELVES.socket(to, Type::DGRAM, |s| probe::connect(s, to)))?
                })
            }),
            Attempt::OwnAddress => self.cast.own_address(near),
        };
        self.cast.declared().map(play).collect()
    }

    /// The one attempt that is to succeed. It comes first, and so the others find the way there open.
    fn proxy_passes(&self, target: io::Result<Socket>) -> Finding {
        let deadline = Instant::now() + READY;
        let target = match target {
            Ok(target) => target,
            Err(error) => return unproven(Attempt::Proxy, &format!("there is nothing to be reached: {error}")),
        };
        let way = loop {
            match by_tcp(&target, &self.cast.proxy) {
                // The addresses are not in use yet, or the first packet was lost.
                Way::Failed(_) | Way::Silent if self.cast.proxy.is_ok() && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                way => break way,
            }
        };
        match way {
            Way::Arrived => finding(Attempt::Proxy, Verdict::Holds, "its own connections pass"),
            Way::Refused | Way::Taken => Finding {
                remedy: Some(APPLY.into()),
                ..finding(
                    Attempt::Proxy,
                    Verdict::Differs,
                    "its connections are captured or refused: it reaches nobody",
                )
            },
            Way::Silent => unproven(Attempt::Proxy, "its own connection was neither accepted nor refused"),
            Way::Failed(why) => unproven(Attempt::Proxy, &why),
        }
    }
}

fn by_tcp(target: &Socket, actor: &Result<Actor, String>) -> Way {
    let actor = match actor {
        Ok(actor) => *actor,
        Err(why) => return Way::Failed(why.clone()),
    };
    probe::tcp(target, |to| actor.socket(to, Type::STREAM, |socket| probe::connect(socket, to)))
}

fn by_udp(target: &Socket, actor: &Result<Actor, String>) -> Way {
    let actor = match actor {
        Ok(actor) => *actor,
        Err(why) => return Way::Failed(why.clone()),
    };
    probe::udp(target, |to| actor.socket(to, Type::DGRAM, |socket| probe::connect(socket, to)))
}

/// What it shows that something was attempted that is not to arrive.
fn captured(attempt: Attempt, target: io::Result<Socket>, by: impl FnOnce(&Socket) -> Way) -> Finding {
    let way = match target {
        Ok(target) => by(&target),
        Err(error) => Way::Failed(format!("there is nothing to be reached: {error}")),
    };
    match way {
        Way::Arrived => Finding {
            remedy: Some(APPLY.into()),
            ..finding(attempt, Verdict::Passes, "it arrived as if nothing captured it")
        },
        Way::Refused => finding(attempt, Verdict::Holds, "refused"),
        Way::Taken => finding(attempt, Verdict::Holds, "taken by the proxy"),
        Way::Silent => unproven(attempt, "neither refused nor accepted: something else drops it, or it takes too long"),
        Way::Failed(why) => unproven(attempt, &why),
    }
}

fn finding(attempt: Attempt, verdict: Verdict, detail: &str) -> Finding {
    Finding { attempt, family: None, verdict, detail: detail.into(), remedy: None }
}

fn unproven(attempt: Attempt, why: &str) -> Finding {
    finding(attempt, Verdict::Unproven, why)
}

fn failed<T>(why: String) -> io::Result<T> {
    Err(io::Error::other(why))
}

fn named(family: &'static str, findings: Vec<Finding>) -> Vec<Finding> {
    findings.into_iter().map(|finding| Finding { family: Some(family), ..finding }).collect()
}

#[cfg(test)]
mod tests;
