//! The gate as a type: an [`Admitted`] is made here, out of a proven peer and a decision, and nowhere else; for plaintext
//! that is let in and for what passes through, which prove nothing, out of what is declared for them.

use std::sync::Arc;

use super::{Decision, HttpFacts, ListenerPolicy, PeerPolicy, RequestDecision, Verdict};
use crate::config::schema::{self, Passthrough, PolicyMode, Unmatched};
use crate::identity::SpiffeId;

/// Something whose SPIFFE ID has been proven.
pub trait Subject {
    /// The proven ID.
    fn spiffe_id(&self) -> &SpiffeId;
}

/// Bytes of somebody who has proven nothing.
pub trait Unproven {}

/// Something that asks to pass through as it is, without mTLS of ours.
pub trait Passenger {
    /// Whether it speaks TLS itself, as far as that is known.
    fn speaks_tls(&self) -> Option<bool>;
}

/// A request whose facts have been taken.
pub trait HttpSubject {
    /// The facts.
    fn facts(&self) -> &HttpFacts;
}

/// Something that a rule admitted: a connection, or with a [`RequestDecision`] a request. Forwarding takes this and
/// nothing else.
#[derive(Debug)]
pub struct Admitted<T, D = Decision> {
    subject: T,
    decision: D,
}

impl<T, D> Admitted<T, D> {
    /// The decision that admitted it.
    pub fn decision(&self) -> &D {
        &self.decision
    }

    /// What was admitted, for a look.
    pub fn subject(&self) -> &T {
        &self.subject
    }

    /// What was admitted, while it is made ready.
    pub fn subject_mut(&mut self) -> &mut T {
        &mut self.subject
    }

    /// What was admitted, to work with.
    pub fn into_subject(self) -> T {
        self.subject
    }
}

impl ListenerPolicy {
    /// Admits a proven peer, or gives it back with the decision that refused it.
    ///
    /// # Errors
    /// The subject and the decision.
    pub fn admit<T: Subject>(&self, subject: T) -> Result<Admitted<T>, (T, Decision)> {
        let decision = self.decide(subject.spiffe_id());
        if decision.admits() { Ok(Admitted { subject, decision }) } else { Err((subject, decision)) }
    }
}

impl PeerPolicy {
    /// Admits a request, or gives it back with the decision that refused it.
    ///
    /// # Errors
    /// The subject and the decision.
    pub fn admit_request<T: HttpSubject>(
        &self,
        subject: T,
    ) -> Result<Admitted<T, RequestDecision>, (T, RequestDecision)> {
        let decision = self.decide(subject.facts());
        if decision.decision.admits() { Ok(Admitted { subject, decision }) } else { Err((subject, decision)) }
    }
}

/// What may pass through to where it was for, by the word of the config alone: nobody proves an identity there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passage {
    passes: Passthrough,
    rule: Arc<str>,
}

impl Passage {
    /// What the outbound listener of that name lets pass.
    pub fn of_listener(listener: &str, passes: Passthrough) -> Self {
        Self { passes, rule: format!("passthrough:{listener}").into() }
    }

    /// What passes that no listener takes.
    pub fn of_unmatched(unmatched: Unmatched) -> Self {
        let passes = match unmatched {
            Unmatched::Refuse => Passthrough::Off,
            Unmatched::Tls => Passthrough::Tls,
            Unmatched::Passthrough => Passthrough::Any,
        };
        Self { passes, rule: "unmatched".into() }
    }

    /// What passes.
    pub fn passes(&self) -> Passthrough {
        self.passes
    }

    /// The decision about what speaks TLS, or not, or is silent as yet.
    pub fn decide(&self, speaks_tls: Option<bool>) -> Decision {
        let passes = match self.passes {
            Passthrough::Off => false,
            Passthrough::Tls => speaks_tls == Some(true),
            Passthrough::Any => true,
        };
        let verdict = if passes { Verdict::Allow } else { Verdict::Deny };
        Decision { verdict, rule: Arc::clone(&self.rule), mode: PolicyMode::Enforce, audited: None }
    }

    /// Admits what passes, or gives it back with the decision that refused it.
    ///
    /// # Errors
    /// The subject and the decision.
    pub fn admit<T: Passenger>(&self, subject: T) -> Result<Admitted<T>, (T, Decision)> {
        let decision = self.decide(subject.speaks_tls());
        if decision.admits() { Ok(Admitted { subject, decision }) } else { Err((subject, decision)) }
    }
}

/// The permission of a listener to let plaintext in, of whoever it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plaintext(Decision);

impl Plaintext {
    /// What is declared for the inbound listener of that name; none where plaintext is refused.
    pub fn declared(listener: &str, plaintext: schema::Plaintext) -> Option<Self> {
        let (verdict, mode) = match plaintext {
            schema::Plaintext::Refuse => return None,
            schema::Plaintext::Audit => (Verdict::Deny, PolicyMode::Audit),
            schema::Plaintext::Allow => (Verdict::Allow, PolicyMode::Enforce),
        };
        Some(Self(Decision { verdict, rule: format!("plaintext:{listener}").into(), mode, audited: None }))
    }

    /// Whether it is let through only for as long as the real verdict is not carried out.
    pub fn is_audited(&self) -> bool {
        self.0.mode == PolicyMode::Audit
    }

    /// Admits bytes of nobody in particular, by the rule `plaintext:<listener>`.
    pub fn admit<T: Unproven>(&self, subject: T) -> Admitted<T> {
        Admitted { subject, decision: self.0.clone() }
    }
}

/// The identities that an upstream may have: exactly these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    ids: Box<[SpiffeId]>,
    rule: Arc<str>,
}

impl Expected {
    /// For the outbound listener of that name.
    pub fn new(listener: &str, ids: &[SpiffeId]) -> Self {
        Self { ids: ids.into(), rule: format!("expect:{listener}").into() }
    }

    /// Whether the ID is one of them.
    pub fn contains(&self, id: &SpiffeId) -> bool {
        self.ids.contains(id)
    }

    /// The name under which it stands in records: `expect:<listener>`.
    pub fn rule(&self) -> &Arc<str> {
        &self.rule
    }

    /// The decision about an upstream.
    pub fn decide(&self, id: &SpiffeId) -> Decision {
        let verdict = if self.contains(id) { Verdict::Allow } else { Verdict::Deny };
        Decision { verdict, rule: Arc::clone(&self.rule), mode: PolicyMode::Enforce, audited: None }
    }

    /// Admits a proven upstream, or gives it back with the decision that refused it.
    ///
    /// # Errors
    /// The subject and the decision.
    pub fn admit<T: Subject>(&self, subject: T) -> Result<Admitted<T>, (T, Decision)> {
        let decision = self.decide(subject.spiffe_id());
        if decision.admits() { Ok(Admitted { subject, decision }) } else { Err((subject, decision)) }
    }
}

impl std::fmt::Display for Expected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, id) in self.ids.iter().enumerate() {
            if index > 0 {
                f.write_str(" or ")?;
            }
            id.fmt(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bytes;
    impl Unproven for Bytes {}

    #[test]
    fn plaintext_is_let_in_only_where_that_is_declared_and_audited_as_what_would_be_refused() {
        assert_eq!(Plaintext::declared("api", schema::Plaintext::Refuse), None);
        let decision = |plaintext| Plaintext::declared("api", plaintext).unwrap().admit(Bytes).decision().clone();
        let (audit, allow) = (decision(schema::Plaintext::Audit), decision(schema::Plaintext::Allow));
        assert_eq!((audit.verdict, audit.mode, &*audit.rule), (Verdict::Deny, PolicyMode::Audit, "plaintext:api"));
        assert_eq!((allow.verdict, allow.mode, &*allow.rule), (Verdict::Allow, PolicyMode::Enforce, "plaintext:api"));
        assert!(audit.admits() && allow.admits());
    }
}
