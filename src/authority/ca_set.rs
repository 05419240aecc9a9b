//! The set of CAs with their phases.
//!
//! A CA is *prepared* (published, so that everybody trusts it before it signs), *active* (signs) and *old* (signs no
//! more and stays published until the last SVID it signed has expired). In: the time of day. Out: a changed set.

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::AuthorityError;
use super::ca::{Ca, CaFacts, CaId};
use crate::identity::TrustDomain;

/// The most CAs that are published at once. Rotation by hand beyond it is refused.
pub(crate) const MAX_CAS: usize = 16;

/// Added to the time for which an old CA stays published: other processes of the same state directory notice a rotation
/// only after a moment, and may sign with the old CA until then.
const OLD_CA_SLACK: u64 = 30;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Phase {
    Prepared,
    Active,
    Old,
}

/// One CA in its phase. Times are seconds since the Unix epoch.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) phase: Phase,
    pub(crate) id: CaId,
    pub(crate) der: CertificateDer<'static>,
    /// Gone once the CA is old: a key that signs no more is not kept.
    pub(super) ca: Option<Arc<Ca>>,
    pub(super) made: u64,
    pub(super) not_after: u64,
    /// When the last SVID it signed has expired; only meaningful while old.
    pub(super) needed_until: u64,
    /// Its SVIDs are to be replaced at once.
    pub(crate) tainted: bool,
}

/// All CAs of the trust domain.
#[derive(Clone, Debug)]
pub(crate) struct CaSet {
    pub(crate) slots: Vec<Slot>,
    /// Counts up with every change of what is published.
    pub(crate) sequence: u64,
    /// The longest life that any SVID was issued with, in seconds.
    pub(crate) longest_ttl: u64,
}

impl CaSet {
    pub(crate) fn new(
        domain: &TrustDomain,
        now: u64,
        ca_ttl: Duration,
        longest_ttl: u64,
    ) -> Result<Self, AuthorityError> {
        let slot = Slot::generate(domain, now, ca_ttl, Phase::Active)?;
        Ok(Self { slots: vec![slot], sequence: 1, longest_ttl })
    }

    pub(crate) fn active(&self) -> Option<(&CaId, &Arc<Ca>)> {
        let slot = self.slots.iter().find(|s| s.phase == Phase::Active)?;
        Some((&slot.id, slot.ca.as_ref()?))
    }

    fn active_slot(&self) -> Option<&Slot> {
        self.slots.iter().find(|s| s.phase == Phase::Active)
    }

    fn has_prepared(&self, now: u64) -> bool {
        self.slots.iter().any(|s| s.phase == Phase::Prepared && s.not_after > now)
    }

    /// The thresholds are SPIRE's: the next CA is published at half life and signs for the last sixth, or earlier where
    /// a full SVID would not fit into a sixth.
    fn due(&self, now: u64) -> Due {
        let Some(active) = self.active_slot().filter(|s| s.not_after > now) else { return Due::Replace };
        let life = active.not_after.saturating_sub(active.made);
        let left = active.not_after.saturating_sub(now);
        let hand_over = (life / 6).max(self.longest_ttl.min(life / 3));
        if left <= hand_over {
            Due::Replace
        } else if left <= life / 2 && !self.has_prepared(now) {
            Due::Prepare
        } else if self.slots.iter().any(|s| s.over(now)) {
            Due::Prune
        } else {
            Due::Nothing
        }
    }

    /// Whether [`CaSet::advance`] would change anything.
    pub(crate) fn is_due(&self, now: u64) -> bool {
        !matches!(self.due(now), Due::Nothing)
    }

    /// Does what the time of day asks for. True if anything changed.
    pub(crate) fn advance(&mut self, domain: &TrustDomain, now: u64, ca_ttl: Duration) -> Result<bool, AuthorityError> {
        let due = self.due(now);
        match due {
            Due::Nothing => return Ok(false),
            Due::Prune => {}
            Due::Prepare => self.prepare(domain, now, ca_ttl)?,
            Due::Replace => {
                // Overdue after a long sleep: there is no time left to publish the new CA before it signs.
                if !self.has_prepared(now) {
                    self.prepare(domain, now, ca_ttl)?;
                }
                self.activate(now)?;
            }
        }
        self.slots.retain(|s| !s.over(now));
        Ok(true)
    }

    /// Publishes a new CA that does not sign yet; one that is there already stays.
    pub(crate) fn prepare(&mut self, domain: &TrustDomain, now: u64, ca_ttl: Duration) -> Result<(), AuthorityError> {
        self.slots.retain(|s| !s.over(now));
        if self.has_prepared(now) {
            return Ok(());
        }
        if self.slots.len() >= MAX_CAS {
            return Err(AuthorityError::TooManyCas);
        }
        self.slots.push(Slot::generate(domain, now, ca_ttl, Phase::Prepared)?);
        Ok(())
    }

    /// Lets the prepared CA sign; the active one becomes old.
    pub(crate) fn activate(&mut self, now: u64) -> Result<(), AuthorityError> {
        if !self.has_prepared(now) {
            return Err(AuthorityError::NothingPrepared);
        }
        let needed_until = now.saturating_add(self.longest_ttl).saturating_add(OLD_CA_SLACK);
        for slot in &mut self.slots {
            match slot.phase {
                Phase::Active => {
                    slot.phase = Phase::Old;
                    slot.needed_until = needed_until.min(slot.not_after);
                    slot.ca = None;
                }
                Phase::Prepared => slot.phase = Phase::Active,
                Phase::Old => {}
            }
        }
        Ok(())
    }

    /// Marks all old CAs, so that SVIDs they signed are replaced at once.
    pub(crate) fn taint_old(&mut self) -> bool {
        let mut changed = false;
        for slot in self.slots.iter_mut().filter(|s| s.phase == Phase::Old && !s.tainted) {
            slot.tainted = true;
            changed = true;
        }
        changed
    }

    /// Publishes the marked CAs no more.
    pub(crate) fn drop_tainted(&mut self) -> bool {
        let before = self.slots.len();
        self.slots.retain(|s| !s.tainted);
        self.slots.len() != before
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Nothing,
    Prune,
    Prepare,
    Replace,
}

impl Slot {
    fn generate(domain: &TrustDomain, now: u64, ttl: Duration, phase: Phase) -> Result<Self, AuthorityError> {
        let ca = Ca::generate(domain, now, ttl.as_secs())?;
        let facts = CaFacts::read(&ca.der)?;
        Ok(Self {
            phase,
            id: facts.id,
            der: ca.der.clone(),
            made: now,
            not_after: facts.not_after,
            needed_until: 0,
            tainted: false,
            ca: Some(Arc::new(ca)),
        })
    }

    fn over(&self, now: u64) -> bool {
        match self.phase {
            Phase::Old => self.needed_until <= now,
            Phase::Prepared => self.not_after <= now,
            // The active one is replaced, never just dropped.
            Phase::Active => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000;
    const TTL: Duration = Duration::from_secs(600);

    fn domain() -> TrustDomain {
        TrustDomain::parse("lab.test").unwrap()
    }

    fn phases(set: &CaSet) -> Vec<Phase> {
        set.slots.iter().map(|s| s.phase).collect()
    }

    #[test]
    fn a_new_ca_is_published_before_it_signs_and_the_old_one_stays_until_its_last_svid_is_over() {
        let mut set = CaSet::new(&domain(), NOW, TTL, 60).unwrap();
        let first = set.slots[0].id.clone();
        assert!(!set.is_due(NOW + 299));
        assert!(set.advance(&domain(), NOW + 300, TTL).unwrap());
        assert_eq!(phases(&set), [Phase::Active, Phase::Prepared]);
        assert_eq!(set.active().unwrap().0, &first);
        assert!(!set.is_due(NOW + 499));
        assert!(set.advance(&domain(), NOW + 500, TTL).unwrap());
        assert_eq!(phases(&set), [Phase::Old, Phase::Active]);
        assert_ne!(set.active().unwrap().0, &first);
        assert!(!set.is_due(NOW + 589), "an SVID of 60 s may have been signed a moment before");
        assert!(set.advance(&domain(), NOW + 590, TTL).unwrap());
        assert_eq!(phases(&set), [Phase::Active]);
    }

    #[test]
    fn after_a_long_sleep_a_new_ca_signs_at_once() {
        let mut set = CaSet::new(&domain(), NOW, TTL, 60).unwrap();
        assert!(set.advance(&domain(), NOW + 10_000, TTL).unwrap());
        assert_eq!(phases(&set), [Phase::Active]);
        assert!(set.active().unwrap().1.not_after > NOW + 10_000);
    }

    #[test]
    fn rotation_by_hand_is_bounded() {
        let mut set = CaSet::new(&domain(), NOW, TTL, 60).unwrap();
        for _ in 1..MAX_CAS {
            set.prepare(&domain(), NOW, TTL).unwrap();
            set.activate(NOW).unwrap();
        }
        assert!(matches!(set.prepare(&domain(), NOW, TTL), Err(AuthorityError::TooManyCas)));
        assert!(set.taint_old() && set.drop_tainted());
        assert_eq!(phases(&set), [Phase::Active]);
    }
}
