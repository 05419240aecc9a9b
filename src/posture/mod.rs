//! Declared against actual: what differs now, since when, and what to do about it.
//!
//! In: whoever compares says what differs ([`Register::raise`]) and what does no longer ([`Register::clear`]), as often as
//! it looks. Out: the drifts that stand, and one call and one log line for each edge. Nothing here compares anything.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::clock::Clock;

/// Lines of evidence that are kept of one drift.
const MOST_EVIDENCE: usize = 16;

/// What can differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The rules that capture traffic are not the declared ones, or do not capture.
    Interception,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 1] = [Self::Interception];

    /// As in metrics and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Interception => "interception",
        }
    }
}

/// Something that is not as declared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Drift {
    /// What.
    pub kind: Kind,
    /// When it was first seen, seconds since the Unix epoch.
    pub since: u64,
    /// What was seen last, a line each.
    pub evidence: Vec<String>,
    /// What to do.
    pub remedy: &'static str,
}

/// Hears of a drift when it begins (true) and when it is over (false).
type OnEdge = Box<dyn Fn(Kind, bool) + Send + Sync>;

/// The drifts that stand, at most one of a kind.
pub struct Register {
    clock: Clock,
    standing: Mutex<BTreeMap<Kind, Drift>>,
    on_edge: OnEdge,
}

impl fmt::Debug for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Register").field("standing", &self.standing()).finish_non_exhaustive()
    }
}

impl Register {
    /// With nothing in it.
    pub fn new(clock: Clock, on_edge: impl Fn(Kind, bool) + Send + Sync + 'static) -> Self {
        Self { clock, standing: Mutex::default(), on_edge: Box::new(on_edge) }
    }

    /// Something is not as declared. If that is known already, only the evidence is renewed.
    pub fn raise(&self, kind: Kind, mut evidence: Vec<String>, remedy: &'static str) {
        evidence.truncate(MOST_EVIDENCE);
        let mut standing = self.lock();
        if let Some(drift) = standing.get_mut(&kind) {
            drift.evidence = evidence;
            drift.remedy = remedy;
            return;
        }
        tracing::error!(kind = kind.as_str(), evidence = evidence.join("; "), remedy, "drift");
        standing.insert(kind, Drift { kind, since: self.clock.now(), evidence, remedy });
        (self.on_edge)(kind, true);
    }

    /// All of a kind is as declared.
    pub fn clear(&self, kind: Kind) {
        let mut standing = self.lock();
        if let Some(drift) = standing.remove(&kind) {
            let lasted = self.clock.now().saturating_sub(drift.since);
            tracing::info!(kind = kind.as_str(), lasted_seconds = lasted, "drift is over");
            (self.on_edge)(kind, false);
        }
    }

    /// What stands now.
    pub fn standing(&self) -> Vec<Drift> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Kind, Drift>> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::clock::SteppedClock;

    #[test]
    fn a_drift_has_two_edges_however_often_it_is_seen() {
        let edges = Arc::new(Mutex::new(Vec::new()));
        let time = SteppedClock::starting_at(1000);
        let heard = Arc::clone(&edges);
        let register = Register::new(time.clock(), move |kind, stands| heard.lock().unwrap().push((kind, stands)));
        register.clear(Kind::Interception);
        register.raise(Kind::Interception, vec!["the table is missing".into()], "apply it");
        time.jump(7);
        register.raise(Kind::Interception, vec!["a rule is missing".into(); 100], "apply it again");
        let standing = register.standing();
        let [drift] = &standing[..] else { panic!("{standing:?}") };
        assert_eq!((drift.since, drift.evidence.len(), drift.remedy), (1000, MOST_EVIDENCE, "apply it again"));
        assert_eq!(drift.evidence[0], "a rule is missing");
        register.clear(Kind::Interception);
        register.clear(Kind::Interception);
        assert!(register.standing().is_empty());
        register.raise(Kind::Interception, Vec::new(), "");
        assert_eq!(register.standing()[0].since, 1007);
        let edges = edges.lock().unwrap().clone();
        assert_eq!(edges, [true, false, true].map(|stands| (Kind::Interception, stands)));
    }
}
