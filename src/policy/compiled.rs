//! Rules as compiled, and the decision.

use std::sync::Arc;

use crate::config::schema::PolicyMode;
use crate::identity::SpiffeId;

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It is let through.
    Allow,
    /// It is refused.
    Deny,
}

/// A decision and its reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What the rules say.
    pub verdict: Verdict,
    /// The rule that says it: its name, `allow:<listener>` for a listener's own list, `default` if no rule matched.
    pub rule: Arc<str>,
    /// Whether the verdict is carried out. In audit mode a connection goes through whatever the verdict.
    pub mode: PolicyMode,
}

impl Decision {
    /// Whether the connection goes through: allowed, or refused only in audit mode.
    pub fn admits(&self) -> bool {
        self.verdict == Verdict::Allow || self.mode == PolicyMode::Audit
    }
}

/// All rules, compiled into one index per listener.
#[derive(Debug, Default)]
pub struct Policy {}

impl Policy {
    /// Decides whether `peer` may use the inbound listener of that name.
    pub fn decide(&self, _listener: &str, _peer: &SpiffeId) -> Decision {
        Decision { verdict: Verdict::Deny, rule: "default".into(), mode: PolicyMode::Enforce }
    }
}

/// One listener's rules.
#[derive(Debug, Default)]
pub struct ListenerPolicy {
    naive: Vec<super::pattern::IdPattern>,
}

impl ListenerPolicy {
    /// Decides about one peer.
    pub fn decide(&self, peer: &SpiffeId) -> Decision {
        let allow = self.naive.iter().any(|p| p.matches(peer));
        Decision::new(if allow { Verdict::Allow } else { Verdict::Deny }, "default".into(), PolicyMode::Enforce)
    }
}

impl Decision {
    /// A decision.
    pub fn new(verdict: Verdict, rule: Arc<str>, mode: PolicyMode) -> Self {
        Self { verdict, rule, mode }
    }
}

impl Policy {
    /// Compiles.
    pub fn compile(_: &crate::config::Config) -> Self {
        Self {}
    }
    /// One listener's rules.
    pub fn listener(&self, _: &str) -> Option<Arc<ListenerPolicy>> {
        None
    }
}
