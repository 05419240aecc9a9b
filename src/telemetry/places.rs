//! Label values that come from outside, kept from growing without end.
//!
//! Peers, and rules and routes across reloads of the config, come and go for as long as the process lives. In: a name. Out:
//! the series to count it in, those of `other` for whatever has no place. Whoever is known costs one look under a shared
//! lock, because requests come here.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// What everything without a place of its own is counted under.
pub(super) const OTHER: &str = "other";
/// A name that was not seen for so long gives its place to one that has none.
pub(super) const KEPT: Duration = Duration::from_secs(3600);

/// Names that have series of their own: the first so many, and later ones in the places of those unseen for [`KEPT`].
/// `T` holds the series of one name, so that nobody looks them up by their labels again.
#[derive(Debug)]
pub(super) struct Places<T> {
    most: usize,
    /// What times are counted from.
    began: Instant,
    other: T,
    taken: RwLock<Taken<T>>,
}

#[derive(Debug)]
struct Taken<T> {
    places: HashMap<Arc<str>, Place<T>>,
    /// No place becomes free before this second.
    none_before: u64,
}

#[derive(Debug)]
struct Place<T> {
    /// The second it was last seen in.
    seen: AtomicU64,
    series: T,
}

impl<T: Default> Places<T> {
    pub(super) fn new(most: usize) -> Self {
        let taken = Taken { places: HashMap::new(), none_before: 0 };
        Self { most, began: Instant::now(), other: T::default(), taken: RwLock::new(taken) }
    }

    /// Calls `count` with the label value and the series for `name`. A name without a place gets a free one, or, if it
    /// `may_displace`, the place of whoever has had it unused for long; `forget` is then called with that one and has to
    /// remove its series from the registry. Neither is called while the other is, so that no series comes back after it
    /// was forgotten.
    pub(super) fn visit(
        &self,
        name: &str,
        may_displace: bool,
        now: Instant,
        forget: impl FnOnce(&str, &T),
        count: impl FnOnce(&str, &T),
    ) {
        if name == OTHER {
            return count(OTHER, &self.other);
        }
        let now = now.saturating_duration_since(self.began).as_secs();
        {
            let taken = self.taken.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(place) = taken.places.get(name) {
                // Written once a second at most: a line of cache that nobody writes costs the cores nothing.
                if place.seen.load(Ordering::Relaxed) < now {
                    place.seen.fetch_max(now, Ordering::Relaxed);
                }
                return count(name, &place.series);
            }
            if taken.places.len() >= self.most && (!may_displace || now < taken.none_before) {
                return count(OTHER, &self.other);
            }
        }
        let mut taken = self.taken.write().unwrap_or_else(PoisonError::into_inner);
        if !taken.places.contains_key(name) {
            if taken.places.len() >= self.most && may_displace {
                taken.free_one(now, forget);
            }
            if taken.places.len() >= self.most {
                return count(OTHER, &self.other);
            }
        }
        let new = || Place { seen: AtomicU64::new(now), series: T::default() };
        count(name, &taken.places.entry(name.into()).or_insert_with(new).series);
    }

    /// The series of `other`.
    pub(super) fn other(&self) -> &T {
        &self.other
    }
}

impl<T> Taken<T> {
    /// Frees the place that is longest unseen, if that is long enough.
    fn free_one(&mut self, now: u64, forget: impl FnOnce(&str, &T)) {
        let seen = |place: &Place<T>| place.seen.load(Ordering::Relaxed);
        let Some((name, oldest)) = self.places.iter().map(|(name, place)| (name, seen(place))).min_by_key(|(_, s)| *s)
        else {
            self.none_before = u64::MAX;
            return;
        };
        // Whoever is seen from here on is so later, so this holds until then and nobody has to search again.
        self.none_before = oldest.saturating_add(KEPT.as_secs());
        if now >= self.none_before {
            let name = Arc::clone(name);
            if let Some(gone) = self.places.remove(&name) {
                forget(&name, &gone.series);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was counted under which label, and who was forgotten.
    fn visit(places: &Places<()>, name: &str, may_displace: bool, now: Instant) -> (String, Option<String>) {
        let (mut label, mut forgotten) = (String::new(), None);
        let forget = |gone: &str, (): &()| forgotten = Some(gone.to_owned());
        places.visit(name, may_displace, now, forget, |name, ()| label = name.to_owned());
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
        assert_eq!(visit(&places, "a", true, later(6600)), ("a".into(), Some("b".into())));
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
        let places = Places::new(0);
        assert_eq!(visit(&places, "a", true, Instant::now()), (OTHER.into(), None));
        assert_eq!(visit(&places, "a", true, Instant::now() + 2 * KEPT), (OTHER.into(), None));
    }

    #[test]
    fn a_name_keeps_its_series_for_as_long_as_its_place() {
        let places: Places<AtomicU64> = Places::new(1);
        let now = Instant::now();
        let count = |name, now| {
            let mut after = 0;
            places.visit(name, true, now, |_, _| {}, |_, own| after = own.fetch_add(1, Ordering::Relaxed) + 1);
            after
        };
        assert_eq!((count("a", now), count("a", now), count("b", now)), (1, 2, 1));
        assert_eq!((count("b", now + 2 * KEPT), count("a", now + 2 * KEPT)), (1, 2));
        assert_eq!(places.other().load(Ordering::Relaxed), 2);
    }
}
