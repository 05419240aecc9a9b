//! What a listener's connections are served with: one immutable state, swapped as a whole by a reload or a rotation, and
//! by which live connections and requests are judged again.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::dialer::Dialer;
use super::hold::Holds;
use super::http::Pools;
use super::listener::Client;
use super::passthrough::Passing;
use super::record::{Cause, RequestCause};
use super::registry::{Entry, Known};
use super::upstream::{HostPort, Target};
use crate::clock::Clock;
use crate::config::schema::{Connections, Detect, HttpLimits, InboundHttp, OnPeerExpiry, Protocol, ProxyProtocol};
use crate::identity::svid::Usage;
use crate::policy::http::pattern::HostPattern;
use crate::policy::{Expected, ListenerPolicy, Plaintext};
use crate::tls::reason::Reason;
use crate::tls::{ClientTls, Peer, Profile, ServerTls, Trust};

/// What an inbound listener's connections are served with.
#[derive(Debug)]
pub struct InboundState {
    /// The workload; none where captured connections go on to where they were for.
    pub to: Option<Target>,
    /// Who may connect.
    pub policy: Arc<ListenerPolicy>,
    /// The permission to let plaintext in; none where it is refused.
    pub plaintext: Option<Plaintext>,
    /// How long connections may wait for an identity.
    pub hold: Duration,
    /// Limits and timeouts.
    pub limits: Connections,
    /// Whether the peer's identity is sent ahead of the bytes.
    pub proxy_protocol: ProxyProtocol,
    /// What it carries.
    pub protocol: Protocol,
    /// Whether bytes are carried unseen because the server speaks first.
    pub server_first: bool,
    /// How it is found out what is spoken.
    pub detect: Arc<Detect>,
    /// Options of HTTP.
    pub http: InboundHttp,
    /// Limits of HTTP.
    pub http_limits: Arc<HttpLimits>,
    /// Where requests go, if it carries any.
    pub pools: Pools,
    /// How the workload is dialled.
    pub dialer: Dialer,
    /// The profile.
    pub profile: Arc<Profile>,
    /// Places for handshakes.
    pub slots: Arc<Semaphore>,
    /// Trust of this generation; none before the first identity.
    pub trust: Option<Arc<Trust>>,
    /// Prebuilt TLS; none while there is no identity that may be used.
    pub tls: Option<Arc<ServerTls>>,
}

/// What an outbound listener's connections are served with.
#[derive(Debug)]
pub struct OutboundState {
    /// The upstream's addresses as declared; none where captured connections go on to where they were for.
    pub to: Vec<HostPort>,
    /// Whom we expect there.
    pub expected: Arc<Expected>,
    /// What passes through in place of that, if anything does.
    pub passing: Option<Arc<Passing>>,
    /// The hosts that requests may be for; any where there are none.
    pub hosts: Arc<[HostPattern]>,
    /// Limits and timeouts.
    pub limits: Connections,
    /// What it carries.
    pub protocol: Protocol,
    /// Whether bytes are carried unseen because the server speaks first.
    pub server_first: bool,
    /// How it is found out what is spoken.
    pub detect: Arc<Detect>,
    /// Limits of HTTP.
    pub http_limits: Arc<HttpLimits>,
    /// Where requests go, if it carries any.
    pub pools: Pools,
    /// How upstreams are dialled.
    pub dialer: Dialer,
    /// How long one address may take to accept.
    pub connect_timeout: Duration,
    /// How long connections may wait for an identity.
    pub hold: Duration,
    /// The profile.
    pub profile: Arc<Profile>,
    /// Places for handshakes.
    pub slots: Arc<Semaphore>,
    /// Trust of this generation; none before the first identity.
    pub trust: Option<Arc<Trust>>,
    /// Prebuilt TLS; none while there is no identity that may be used.
    pub tls: Option<Arc<ClientTls>>,
}

impl InboundState {
    /// Where this client's bytes go.
    pub fn target(&self, client: Client) -> Option<Target> {
        self.to.clone().or_else(|| client.original().map(Target::Original))
    }

    /// Whether a live connection would still be admitted; the cause if not.
    pub fn rejudge(&self, entry: &Entry, known: &Known, clock: &Clock) -> Option<Cause> {
        let (Some(trust), Some(_)) = (&self.trust, &self.tls) else { return Some(Cause::OwnExpired) };
        let Known::Peer(peer) = known else {
            return self.plaintext.is_none().then_some(Cause::PolicyChanged);
        };
        rejudge_trust(trust, peer, Usage::Client, self.limits.on_peer_expiry, clock).or_else(|| {
            let admitted = match (entry.is_http(), self.protocol) {
                (true, Protocol::Tcp) | (false, Protocol::Http) => false,
                (true, _) => self.policy.could_admit(peer.id()),
                (false, _) => self.policy.decide(peer.id()).admits(),
            };
            (!admitted).then_some(Cause::PolicyChanged)
        })
    }

    /// Ends those requests of a live connection that would no longer be admitted. Answers how many those were.
    pub fn rejudge_requests(&self, entry: &Entry, peer: &Peer) -> usize {
        if entry.requests().is_empty() {
            return 0;
        }
        let rules = self.policy.for_peer(peer.id());
        entry
            .requests()
            .rejudge(|facts| (!rules.decide(facts).decision.admits()).then_some(RequestCause::PolicyChanged))
    }

    /// It was replaced: nothing new begins by it.
    pub fn retire(&self) {
        self.pools.retire();
    }
}

impl OutboundState {
    /// Whether a request for this host belongs here.
    pub fn takes_host(&self, host: Option<&str>) -> bool {
        let host = host.map(|host| host.trim_end_matches('.'));
        self.hosts.is_empty() || host.is_some_and(|host| self.hosts.iter().any(|pattern| pattern.matches(host)))
    }

    /// Whether a live connection to this upstream would still be admitted; the cause if not.
    pub fn rejudge(&self, _: &Entry, known: &Known, clock: &Clock) -> Option<Cause> {
        let (Some(trust), Some(_)) = (&self.trust, &self.tls) else { return Some(Cause::OwnExpired) };
        let Known::Peer(peer) = known else { return Some(Cause::PolicyChanged) };
        rejudge_trust(trust, peer, Usage::Server, self.limits.on_peer_expiry, clock)
            .or_else(|| (!self.expected.contains(peer.id())).then_some(Cause::PolicyChanged))
    }
}

impl OutboundState {
    /// It was replaced: nothing new begins by it.
    pub fn retire(&self) {
        self.pools.retire();
    }
}

impl Holds for InboundState {
    fn is_usable(&self) -> bool {
        self.tls.is_some()
    }
    fn hold(&self) -> Duration {
        self.hold
    }
}

impl Holds for OutboundState {
    fn is_usable(&self) -> bool {
        self.tls.is_some()
    }
    fn hold(&self) -> Duration {
        self.hold
    }
}

fn rejudge_trust(trust: &Trust, peer: &Peer, usage: Usage, on_expiry: OnPeerExpiry, clock: &Clock) -> Option<Cause> {
    // Where expiry is allowed to pass, everything else is still judged, as of the last moment of validity.
    let expired = clock.now() > peer.not_after();
    let judged = if expired && on_expiry == OnPeerExpiry::Keep {
        trust.judge_at(peer.chain(), usage, peer.not_after())
    } else {
        trust.judge(peer.chain(), usage)
    };
    match judged {
        Ok(_) => None,
        Err(failure) => Some(match failure.reason {
            Reason::Revoked => Cause::Revoked,
            Reason::Expired => Cause::PeerExpired,
            _ => Cause::BundleChanged,
        }),
    }
}
