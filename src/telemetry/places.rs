//! Label values that come from outside, kept from growing without end.
//!
//! Peers, and rules across reloads of the config, come and go for as long as the process lives. In: a name. Out: the label
//! value to count it under, `other` for whatever has no place.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lru::LruCache;

/// What everything without a place of its own is counted under.
pub(super) const OTHER: &str = "other";
/// A name that was not seen for so long gives its place to one that has none.
pub(super) const KEPT: Duration = Duration::from_secs(3600);

/// Names that have series of their own: the first so many, and later ones in the places of those unseen for [`KEPT`].
#[derive(Debug)]
pub(super) struct Places {
    most: usize,
    /// When each was last seen, the longest unseen last.
    taken: Mutex<LruCache<Arc<str>, Instant>>,
}

impl Places {
    pub(super) fn new(most: usize) -> Self {
        Self { most, taken: Mutex::new(LruCache::unbounded()) }
    }

    /// Calls `count` with the label value for `name`. A name without a place gets a free one, or, if it `may_displace`, the
    /// place of whoever has had it unused for long; `forget` is then called with that one and has to remove its series.
    /// Both are called under one lock, so that no series comes back after it was forgotten.
    pub(super) fn visit(
        &self,
        name: &str,
        may_displace: bool,
        now: Instant,
        forget: impl FnOnce(&str),
        count: impl FnOnce(&str),
    ) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(seen) = taken.get_mut(name) {
            *seen = now;
            return count(name);
        }
        let unused = |seen: &Instant| now.saturating_duration_since(*seen) >= KEPT;
        if taken.len() >= self.most
            && may_displace
            && taken.peek_lru().is_some_and(|(_, seen)| unused(seen))
            && let Some((gone, _)) = taken.pop_lru()
        {
            forget(&gone);
        }
        if taken.len() < self.most {
            taken.put(name.into(), now);
            count(name);
        } else {
            count(OTHER);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was counted under which label, and who was forgotten.
    fn visit(places: &Places, name: &str, may_displace: bool, now: Instant) -> (String, Option<String>) {
        let (mut label, mut forgotten) = (String::new(), None);
        places.visit(name, may_displace, now, |gone| forgotten = Some(gone.to_owned()), |name| label = name.to_owned());
        (label, forgotten)
    }

    #[test]
    fn whoever_is_unseen_for_long_gives_its_place_and_whoever_comes_often_keeps_it() {
        let places = Places::new(2);
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(visit(&places, "a", true, start), ("a".into(), None));
        assert_eq!(visit(&places, "b", true, start), ("b".into(), None));
        assert_eq!(visit(&places, "c", true, later(60)), (OTHER.into(), None));
        assert_eq!(visit(&places, "b", true, later(3000)), ("b".into(), None));
        assert_eq!(visit(&places, "c", true, later(3600)), ("c".into(), Some("a".into())));
        assert_eq!(visit(&places, "a", true, later(3601)), (OTHER.into(), None));
    }

    #[test]
    fn only_who_may_displace_does() {
        let places = Places::new(1);
        let start = Instant::now();
        let long_after = start + 2 * KEPT;
        visit(&places, "a", true, start);
        assert_eq!(visit(&places, "stranger", false, long_after), (OTHER.into(), None));
        assert_eq!(visit(&places, "friend", true, long_after), ("friend".into(), Some("a".into())));
    }

    #[test]
    fn without_places_all_share_one() {
        assert_eq!(visit(&Places::new(0), "a", true, Instant::now()), (OTHER.into(), None));
    }
}
