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
//! # What a decision costs
//!
//! One look into a hash table for rules that name exact IDs, and one walk through a trie of path segments for patterns.
//! The walk follows at most one path for each different set of places where patterns have `*`
//! ([`MAX_WILDCARD_SHAPES`](super::pattern::MAX_WILDCARD_SHAPES), held at load) and is at most
//! [`MAX_SEGMENTS`](super::pattern::MAX_SEGMENTS) deep, whatever the number of rules. Nothing is allocated.

use std::collections::HashMap;
use std::sync::Arc;

use super::pattern::{IdPattern, Segment};
use crate::config::schema::{Action, Config, Inbound, PolicyMode};
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

/// The first rule of each kind, by place in the order of the file; `NONE` where there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Firsts([u32; 4]);

const NONE: u32 = u32::MAX;
const ENFORCED_DENY: usize = 0;
const ENFORCED_ALLOW: usize = 1;
const AUDITED_DENY: usize = 2;
const AUDITED_ALLOW: usize = 3;

impl Default for Firsts {
    fn default() -> Self {
        Self([NONE; 4])
    }
}

impl Firsts {
    fn only(rule: u32, action: Action, mode: PolicyMode) -> Self {
        let kind = match (mode, action) {
            (PolicyMode::Enforce, Action::Deny) => ENFORCED_DENY,
            (PolicyMode::Enforce, Action::Allow) => ENFORCED_ALLOW,
            (PolicyMode::Audit, Action::Deny) => AUDITED_DENY,
            (PolicyMode::Audit, Action::Allow) => AUDITED_ALLOW,
        };
        let mut firsts = Self::default();
        if let Some(first) = firsts.0.get_mut(kind) {
            *first = rule;
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

/// The rules of one inbound listener, compiled. A hot path holds this and never asks by name.
#[derive(Debug)]
pub struct ListenerPolicy {
    mode: PolicyMode,
    /// By whole ID.
    exact: HashMap<SpiffeId, Firsts>,
    /// By trust domain, patterns that stand for more than one ID.
    patterns: HashMap<Box<str>, Node>,
    /// In the order of the file.
    names: Vec<Arc<str>>,
    default: Arc<str>,
    digest: [u8; 32],
}

impl ListenerPolicy {
    fn compile(config: &Config, listener: &Inbound) -> Self {
        let mut compiled = Self {
            mode: config.policy.mode,
            exact: HashMap::new(),
            patterns: HashMap::new(),
            names: Vec::new(),
            default: DEFAULT_RULE.into(),
            digest: [0; 32],
        };
        let mut digest = RuleDigest::new(config.policy.mode);
        if !listener.allow.is_empty() {
            let name = format!("allow:{}", listener.name);
            compiled.add(&mut digest, &name, Action::Allow, PolicyMode::Enforce, &listener.allow);
        }
        for rule in config.policy.rules.iter().filter(|rule| rule.applies_to(listener)) {
            compiled.add(&mut digest, &rule.name, rule.action, rule.mode, &rule.from);
        }
        compiled.digest = digest.finish();
        compiled
    }

    fn add(&mut self, digest: &mut RuleDigest, name: &str, action: Action, mode: PolicyMode, from: &[IdPattern]) {
        digest.rule(name, action, mode, from);
        // More rules than that do not fit into a config file; one that did would be left out, not let in.
        let Ok(place) = u32::try_from(self.names.len()) else { return };
        self.names.push(name.into());
        let firsts = Firsts::only(place, action, mode);
        for pattern in from {
            match SpiffeId::parse(pattern.as_str()) {
                Ok(id) if pattern.is_exact() => self.exact.entry(id).or_default().join(&firsts),
                _ => {
                    let root = self.patterns.entry(pattern.domain().as_str().into()).or_default();
                    root.insert(pattern.segments(), &firsts);
                }
            }
        }
    }

    /// Decides whether `peer` may use this listener.
    pub fn decide(&self, peer: &SpiffeId) -> Decision {
        let mut found = self.exact.get(peer).copied().unwrap_or_default();
        if let Some(path) = peer.path().strip_prefix('/')
            && let Some(root) = self.patterns.get(peer.trust_domain_name())
        {
            root.walk(Some(path), &mut found);
        }
        let Firsts([deny, allow, audited_deny, audited_allow]) = found;
        let (verdict, rule) = match (self.name(deny), self.name(allow)) {
            (Some(rule), _) => (Verdict::Deny, rule),
            (None, Some(rule)) => (Verdict::Allow, rule),
            (None, None) => (Verdict::Deny, &self.default),
        };
        let audited = match (self.name(audited_deny), self.name(audited_allow)) {
            (Some(rule), _) => Some((Arc::clone(rule), Verdict::Deny)),
            (None, Some(rule)) => Some((Arc::clone(rule), Verdict::Allow)),
            (None, None) => None,
        };
        Decision { verdict, rule: Arc::clone(rule), mode: self.mode, audited }
    }

    /// Whether `peer` could get anything here at all: what the certificate verifier asks before it lets a handshake
    /// succeed.
    pub fn could_admit(&self, peer: &SpiffeId) -> bool {
        self.decide(peer).admits()
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

    fn rule(&mut self, name: &str, action: Action, mode: PolicyMode, from: &[IdPattern]) {
        self.text(name);
        self.0.update(&[u8::from(action == Action::Deny), u8::from(mode == PolicyMode::Audit)]);
        // The order within a rule says nothing.
        let mut patterns: Vec<&str> = from.iter().map(IdPattern::as_str).collect();
        patterns.sort_unstable();
        patterns.dedup();
        self.0.update(&(patterns.len() as u64).to_be_bytes());
        for pattern in patterns {
            self.text(pattern);
        }
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
    /// Compiles the rules of a config.
    pub fn compile(config: &Config) -> Self {
        let compile =
            |listener: &Inbound| (listener.name.as_str().into(), Arc::new(ListenerPolicy::compile(config, listener)));
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
