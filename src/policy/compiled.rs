//! Rules as compiled, and the decision.
//!
//! # What a decision is
//!
//! The listener's own `allow` list is a rule named `allow:<listener>`; the rules under `policy.rules` that apply to the
//! listener follow in the order of the file. A rule *matches* when one of its patterns does. Then:
//!
//! | some enforced `deny` matches | some enforced `allow` matches | verdict | named rule |
//! |---|---|---|---|
//! | yes | — | deny | the first such `deny` in the order of the file |
//! | no | yes | allow | the first such `allow` |
//! | no | no | deny | `default` |
//!
//! # Audit
//!
//! `mode: audit` **on a rule** makes it a shadow, as in Envoy's `shadow_rules` and Istio's dry run: it changes nothing.
//! An audited `deny` does not refuse and an audited `allow` does not admit. What the audited rules say by themselves is
//! in [`Decision::audited`]: the first matching audited `deny`, or else the first matching audited `allow`, or nothing.
//!
//! | verdict of the enforced rules | audited rule that matches | goes through | would change it, if enforced |
//! |---|---|---|---|
//! | allow | `deny` | yes | yes, to deny |
//! | allow | `allow` | yes | no |
//! | deny (by a rule) | either | no | no: deny wins |
//! | deny (`default`) | `allow` | no | yes, to allow |
//! | deny (`default`) | `deny` | no | no |
//!
//! `policy.mode: audit`, **for all**, is for the first days in front of a service, as Linkerd's `audit` policy: verdicts
//! are made as above and reported, and none is carried out: every peer that has proven an identity of a trusted domain
//! goes through ([`Decision::admits`]). Who cannot prove one is refused all the same.
//!
//! # Requests
//!
//! On a listener that carries HTTP, requests are decided by [`ListenerPolicy::for_peer`]. [`ListenerPolicy::decide`] is
//! about connections whose bytes nobody reads: there an `allow` with `http:` admits nothing, and a `deny` with `http:`
//! refuses, because what it speaks of could pass unseen. [`ListenerPolicy::door`] is what a handshake may ask: whether
//! any request could get through.
//!
//! # What a decision costs
//!
//! One look into a hash table for rules that name exact IDs, and one walk through a trie of path segments for patterns.
//! The walk follows at most one path for each different set of places where patterns have `*`
//! ([`MAX_WILDCARD_SHAPES`](super::pattern::MAX_WILDCARD_SHAPES), held at load) and is at most
//! [`MAX_SEGMENTS`](super::pattern::MAX_SEGMENTS) deep, whatever the number of rules. Nothing is allocated.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use super::http::{HeaderNames, HttpRule, PeerPolicy};
use super::pattern::{IdPattern, Segment};
use super::rego::Gate;
use crate::config::schema::{Action, Config, Inbound, PolicyMode, Protocol, Rule};
use crate::identity::SpiffeId;

/// The name of the case that no rule matched.
pub const DEFAULT_RULE: &str = "default";

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It is let through.
    Allow,
    /// It is refused.
    Deny,
}

impl Verdict {
    /// The label value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }
}

/// A decision and its reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What the rules say.
    pub verdict: Verdict,
    /// The rule that says it: its name, `allow:<listener>` for a listener's own list, `default` if no rule matched.
    pub rule: Arc<str>,
    /// Whether the verdict is carried out (`policy.mode`). In audit mode a connection goes through whatever the verdict.
    pub mode: PolicyMode,
    /// What the rules in audit mode say by themselves, and which of them; none if none of them matched. No effect.
    pub audited: Option<(Arc<str>, Verdict)>,
}

impl Decision {
    /// Whether the connection goes through: allowed, or refused only in audit mode.
    pub fn admits(&self) -> bool {
        self.verdict == Verdict::Allow || self.mode == PolicyMode::Audit
    }

    /// The verdict there would be if the audited rules were enforced, where that is another one.
    pub fn would_change_to(&self) -> Option<Verdict> {
        match (self.verdict, &self.audited) {
            (Verdict::Allow, Some((_, Verdict::Deny))) => Some(Verdict::Deny),
            (Verdict::Deny, Some((_, Verdict::Allow))) if &*self.rule == DEFAULT_RULE => Some(Verdict::Allow),
            _ => None,
        }
    }
}

/// The four kinds of rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    EnforcedDeny,
    EnforcedAllow,
    AuditedDeny,
    AuditedAllow,
}

impl Kind {
    pub(super) const COUNT: usize = 4;
    pub(super) const ALL: [Self; Self::COUNT] =
        [Self::EnforcedDeny, Self::EnforcedAllow, Self::AuditedDeny, Self::AuditedAllow];

    pub(super) fn of(action: Action, mode: PolicyMode) -> Self {
        match (mode, action) {
            (PolicyMode::Enforce, Action::Deny) => Self::EnforcedDeny,
            (PolicyMode::Enforce, Action::Allow) => Self::EnforcedAllow,
            (PolicyMode::Audit, Action::Deny) => Self::AuditedDeny,
            (PolicyMode::Audit, Action::Allow) => Self::AuditedAllow,
        }
    }

    /// Its place in arrays by kind, in the order of [`Kind::ALL`].
    pub(super) fn place(self) -> usize {
        self as usize
    }

    pub(super) fn denies(self) -> bool {
        matches!(self, Self::EnforcedDeny | Self::AuditedDeny)
    }
}

/// The decision that the first matching rule of each kind makes; by kind, in the order of [`Kind::ALL`].
pub(super) fn conclude(found: [Option<&Arc<str>>; Kind::COUNT], default: &Arc<str>, mode: PolicyMode) -> Decision {
    let [deny, allow, audited_deny, audited_allow] = found;
    let (verdict, rule) = match (deny, allow) {
        (Some(rule), _) => (Verdict::Deny, rule),
        (None, Some(rule)) => (Verdict::Allow, rule),
        (None, None) => (Verdict::Deny, default),
    };
    let audited = match (audited_deny, audited_allow) {
        (Some(rule), _) => Some((Arc::clone(rule), Verdict::Deny)),
        (None, Some(rule)) => Some((Arc::clone(rule), Verdict::Allow)),
        (None, None) => None,
    };
    Decision { verdict, rule: Arc::clone(rule), mode, audited }
}

/// The first rule of each kind, by place in the order of the file; `NONE` where there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Firsts([u32; Kind::COUNT + 2]);

const NONE: u32 = u32::MAX;
/// The first enforced deny that speaks of every request.
const SHUT: usize = Kind::COUNT;
/// The first enforced allow, whatever it says of requests.
const OPEN: usize = Kind::COUNT + 1;

impl Default for Firsts {
    fn default() -> Self {
        Self([NONE; Kind::COUNT + 2])
    }
}

impl Firsts {
    fn only(rule: u32, kind: Kind, about_requests: bool) -> Self {
        let mut firsts = Self::default();
        let mut set = |place: usize| {
            if let Some(first) = firsts.0.get_mut(place) {
                *first = rule;
            }
        };
        // Of bytes that nobody reads, an allow about requests says nothing.
        if kind.denies() || !about_requests {
            set(kind.place());
        }
        match kind {
            Kind::EnforcedDeny if !about_requests => set(SHUT),
            Kind::EnforcedAllow => set(OPEN),
            _ => {}
        }
        firsts
    }

    fn join(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine = (*mine).min(theirs);
        }
    }
}

/// A place in the trie of patterns of one trust domain: so many segments have matched.
#[derive(Debug, Default)]
struct Node {
    /// Rules whose pattern ends here.
    here: Firsts,
    /// Rules whose pattern goes on with `**`, which takes one segment or more.
    rest: Firsts,
    one: Option<Box<Node>>,
    literal: HashMap<Box<str>, Node>,
}

impl Node {
    fn insert(&mut self, segments: &[Segment], firsts: &Firsts) {
        let Some((first, tail)) = segments.split_first() else { return self.here.join(firsts) };
        match first {
            Segment::Rest => self.rest.join(firsts),
            Segment::One => self.one.get_or_insert_default().insert(tail, firsts),
            Segment::Literal(text) => self.literal.entry(text.as_str().into()).or_default().insert(tail, firsts),
        }
    }

    /// Collects what matches `path`: the segments that are left, without a leading slash; none when none is left.
    /// Answers how many nodes were visited. As deep as the deepest pattern, not as deep as the path.
    fn walk(&self, path: Option<&str>, found: &mut Firsts) -> usize {
        let Some(path) = path else {
            found.join(&self.here);
            return 1;
        };
        found.join(&self.rest);
        let (segment, tail) = match path.split_once('/') {
            Some((segment, tail)) => (segment, Some(tail)),
            None => (path, None),
        };
        let one = self.one.as_ref().map_or(0, |node| node.walk(tail, found));
        let literal = self.literal.get(segment).map_or(0, |node| node.walk(tail, found));
        1 + one + literal
    }
}

/// For how many peers a listener remembers what it compiled for them.
const REMEMBERED_PEERS: NonZeroUsize = NonZeroUsize::new(256).unwrap();
/// What is larger than this for one peer, counted in paths of rules, is made anew for each connection.
const LARGEST_REMEMBERED: usize = 4096;

/// The rules of one inbound listener, compiled. A hot path holds this and never asks by name.
#[derive(Debug)]
pub struct ListenerPolicy {
    mode: PolicyMode,
    protocol: Protocol,
    /// By whole ID.
    exact: HashMap<SpiffeId, Firsts>,
    /// By trust domain, patterns that stand for more than one ID.
    patterns: HashMap<Box<str>, Node>,
    /// In the order of the file.
    names: Vec<Arc<str>>,
    default: Arc<str>,
    /// For requests; empty where none can be seen.
    rules: Vec<HttpRule>,
    header_names: Arc<HeaderNames>,
    /// Must allow, too, what the rules allow.
    gate: Option<Arc<Gate>>,
    peers: Mutex<LruCache<SpiffeId, Arc<PeerPolicy>>>,
    digest: [u8; 32],
}

impl ListenerPolicy {
    fn compile(config: &Config, listener: &Inbound, gate: Option<Gate>) -> Self {
        let mut compiled = Self {
            mode: config.policy.mode,
            protocol: listener.protocol,
            exact: HashMap::new(),
            patterns: HashMap::new(),
            names: Vec::new(),
            default: DEFAULT_RULE.into(),
            rules: Vec::new(),
            header_names: Arc::default(),
            gate: None,
            peers: Mutex::new(LruCache::new(REMEMBERED_PEERS)),
            digest: [0; 32],
        };
        let mut digest = RuleDigest::new(config.policy.mode);
        digest.text(listener.protocol.as_str());
        digest.json(&listener.http.escaped_slash);
        let mut header_names = Vec::new();
        if !listener.allow.is_empty() {
            let own = Rule {
                name: format!("allow:{}", listener.name),
                from: listener.allow.clone(),
                to: Vec::new(),
                action: Action::Allow,
                mode: PolicyMode::Enforce,
                http: Vec::new(),
            };
            compiled.add(&mut digest, &own);
        }
        for rule in config.policy.rules.iter().filter(|rule| rule.applies_to(listener)) {
            compiled.add(&mut digest, rule);
            header_names.extend(rule.http.iter().flat_map(|wanted| &wanted.headers).map(|header| header.name.clone()));
        }
        if let Some(gate) = gate {
            digest.text(&gate.rule);
            gate.texts().for_each(|text| digest.text(text));
            compiled.gate = Some(Arc::new(gate));
        }
        // A module may look at any.
        compiled.header_names = Arc::new(HeaderNames::new(header_names, compiled.gate.is_some()));
        compiled.digest = digest.finish();
        compiled
    }

    fn add(&mut self, digest: &mut RuleDigest, rule: &Rule) {
        digest.rule(rule);
        // More rules than that do not fit into a config file; one that did would be left out, not let in.
        let Ok(place) = u32::try_from(self.names.len()) else { return };
        let name: Arc<str> = rule.name.as_str().into();
        self.names.push(Arc::clone(&name));
        let firsts = Firsts::only(place, Kind::of(rule.action, rule.mode), !rule.http.is_empty());
        for pattern in &rule.from {
            match SpiffeId::parse(pattern.as_str()) {
                Ok(id) if pattern.is_exact() => self.exact.entry(id).or_default().join(&firsts),
                _ => {
                    let root = self.patterns.entry(pattern.domain().as_str().into()).or_default();
                    root.insert(pattern.segments(), &firsts);
                }
            }
        }
        if self.protocol.carries_http() {
            self.rules.push(HttpRule::new(name, rule.action, rule.mode, rule.from.clone(), &rule.http));
        }
    }

    fn firsts(&self, peer: &SpiffeId) -> Firsts {
        let mut found = self.exact.get(peer).copied().unwrap_or_default();
        if let Some(path) = peer.path().strip_prefix('/')
            && let Some(root) = self.patterns.get(peer.trust_domain_name())
        {
            root.walk(Some(path), &mut found);
        }
        found
    }

    /// Decides whether `peer` may use this listener for bytes that nobody reads: what a `tcp` listener carries, and
    /// what is no HTTP on a `detect` one.
    pub fn decide(&self, peer: &SpiffeId) -> Decision {
        let Firsts([deny, allow, audited_deny, audited_allow, ..]) = self.firsts(peer);
        let found = [deny, allow, audited_deny, audited_allow].map(|place| self.name(place));
        conclude(found, &self.default, self.mode)
    }

    /// Decides whether a handshake with `peer` may succeed: on a `tcp` listener as [`ListenerPolicy::decide`], else
    /// whether any request of it could get through. An allow here admits nothing yet; its rule is the first that could.
    pub fn door(&self, peer: &SpiffeId) -> Decision {
        if !self.protocol.carries_http() {
            return self.decide(peer);
        }
        let Firsts([.., shut, open]) = self.firsts(peer);
        conclude([self.name(shut), self.name(open), None, None], &self.default, self.mode)
    }

    /// Whether `peer` could get anything here at all: what the certificate verifier asks before it lets a handshake
    /// succeed.
    pub fn could_admit(&self, peer: &SpiffeId) -> bool {
        self.door(peer).admits()
    }

    /// What this listener carries.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// The names of the headers that some rule looks at, for [`HttpFacts`](super::HttpFacts).
    pub fn header_names(&self) -> &Arc<HeaderNames> {
        &self.header_names
    }

    /// The rules for the requests of one peer. Ask once for a connection, and again when the policy has changed; what
    /// was made for the last peers is remembered. On a `tcp` listener no request is admitted.
    pub fn for_peer(&self, peer: &SpiffeId) -> Arc<PeerPolicy> {
        if let Some(known) = self.remembered().get(peer) {
            return Arc::clone(known);
        }
        let speaking = self.rules.iter().filter(|rule| rule.from.iter().any(|pattern| pattern.matches(peer)));
        let made = Arc::new(PeerPolicy::compile(self.mode, &self.default, self.gate.clone(), speaking));
        if made.size() <= LARGEST_REMEMBERED {
            self.remembered().put(peer.clone(), Arc::clone(&made));
        }
        made
    }

    fn remembered(&self) -> MutexGuard<'_, LruCache<SpiffeId, Arc<PeerPolicy>>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether both decide alike and name the same rules, so that a reload has nothing to judge again.
    pub fn same_rules_as(&self, other: &Self) -> bool {
        self.digest == other.digest
    }

    fn name(&self, place: u32) -> Option<&Arc<str>> {
        usize::try_from(place).ok().and_then(|place| self.names.get(place))
    }
}

/// Everything that a listener's decisions depend on, in one SHA-256.
struct RuleDigest(aws_lc_rs::digest::Context);

impl RuleDigest {
    fn new(mode: PolicyMode) -> Self {
        let mut digest = Self(aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256));
        digest.0.update(&[u8::from(mode == PolicyMode::Audit)]);
        digest
    }

    fn text(&mut self, text: &str) {
        self.0.update(&(text.len() as u64).to_be_bytes());
        self.0.update(text.as_bytes());
    }

    /// A part of the config in the form of JSON, which tells all of it.
    fn json(&mut self, part: &impl serde::Serialize) {
        self.text(&serde_json::to_string(part).unwrap_or_else(|error| error.to_string()));
    }

    fn rule(&mut self, rule: &Rule) {
        self.text(&rule.name);
        self.0.update(&[u8::from(rule.action == Action::Deny), u8::from(rule.mode == PolicyMode::Audit)]);
        // The order within a rule says nothing.
        let mut patterns: Vec<&str> = rule.from.iter().map(IdPattern::as_str).collect();
        patterns.sort_unstable();
        patterns.dedup();
        self.0.update(&(patterns.len() as u64).to_be_bytes());
        for pattern in patterns {
            self.text(pattern);
        }
        // Here it does: it decides which route is named.
        self.json(&rule.http);
    }

    fn finish(self) -> [u8; 32] {
        self.0.finish().as_ref().try_into().unwrap_or_default()
    }
}

/// All rules, compiled into one index per inbound listener. The default has no listener and refuses everything.
#[derive(Debug, Default)]
pub struct Policy {
    listeners: HashMap<Box<str>, Arc<ListenerPolicy>>,
}

impl Policy {
    /// Compiles the rules of a config, and reads and compiles the modules that it names.
    ///
    /// # Errors
    /// A module that cannot be read or compiled, in words.
    pub fn load(config: &Config) -> Result<Self, String> {
        let mut listeners = HashMap::new();
        for listener in &config.inbound {
            let load = |files| Gate::load(&listener.name, files);
            let gate = listener.http.rego.as_ref().map(load).transpose();
            let gate = gate.map_err(|why| format!("inbound '{}': {why}", listener.name))?;
            let compiled = ListenerPolicy::compile(config, listener, gate);
            listeners.insert(listener.name.as_str().into(), Arc::new(compiled));
        }
        Ok(Self { listeners })
    }

    /// Compiles the rules of a config. Modules are not read: a listener that has one admits no request.
    pub fn compile(config: &Config) -> Self {
        let compile = |listener: &Inbound| {
            let gate = listener.http.rego.as_ref().map(|_| Gate::shut(&listener.name));
            (listener.name.as_str().into(), Arc::new(ListenerPolicy::compile(config, listener, gate)))
        };
        Self { listeners: config.inbound.iter().map(compile).collect() }
    }

    /// The rules of the inbound listener of that name.
    pub fn listener(&self, name: &str) -> Option<Arc<ListenerPolicy>> {
        self.listeners.get(name).cloned()
    }

    /// Decides whether `peer` may use the inbound listener of that name. A listener that is not there admits nobody.
    pub fn decide(&self, listener: &str, peer: &SpiffeId) -> Decision {
        match self.listeners.get(listener) {
            Some(rules) => rules.decide(peer),
            None => {
                Decision { verdict: Verdict::Deny, rule: DEFAULT_RULE.into(), mode: PolicyMode::Enforce, audited: None }
            }
        }
    }

    /// Whether any listener would let `peer` through. Costs one decision a listener at most.
    pub fn could_admit(&self, peer: &SpiffeId) -> bool {
        self.listeners.values().any(|rules| rules.could_admit(peer))
    }

    /// A digest of everything that decisions depend on: SHA-256, lower-case hex. Two policies with one digest decide
    /// alike.
    pub fn digest(&self) -> String {
        let mut listeners: Vec<_> = self.listeners.iter().collect();
        listeners.sort_unstable_by_key(|(name, _)| *name);
        let mut all = RuleDigest::new(PolicyMode::Enforce);
        for (name, rules) in listeners {
            all.text(name);
            all.0.update(&rules.digest);
        }
        crate::config::load::hex(&all.finish())
    }
}

#[cfg(test)]
mod tests;
