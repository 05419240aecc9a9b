//! The addresses of the DNS names that listeners capture, resolved beside the data path.
//!
//! In: the names as declared. Out: whether an address is one of a name's. A name that was never resolved has none. An
//! address counts for a while after it was last in an answer, because answers differ from one to the next and a
//! workload may have got another one than the proxy; a resolver that fails takes nothing away.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

/// How often names are resolved.
const EVERY: Duration = Duration::from_secs(10);
/// How long one resolution may take.
const WITHIN: Duration = Duration::from_secs(5);
/// Resolutions at once.
const AT_ONCE: usize = 16;
/// Addresses of one name; the one that was not in an answer for longest gives way.
const MOST: usize = 64;
/// How long an address counts after it was last in an answer.
const COUNTS_FOR: Duration = Duration::from_secs(300);

/// A name and its addresses.
#[derive(Debug, Default)]
pub(super) struct Name {
    text: Box<str>,
    known: RwLock<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// With the time each was last in an answer.
    addresses: Vec<(IpAddr, Instant)>,
    /// Whether it was told that there is none.
    failing: bool,
}

impl Name {
    fn new(text: &str) -> Arc<Self> {
        Arc::new(Self { text: text.into(), known: RwLock::default() })
    }

    /// Whether this is one of its addresses.
    pub(super) fn has(&self, address: IpAddr) -> bool {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.addresses.iter().any(|(one, _)| *one == address)
    }

    /// Takes an answer.
    fn answered(&self, addresses: impl Iterator<Item = IpAddr>, now: Instant) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.failing = false;
        for address in addresses.take(MOST).map(|address| address.to_canonical()) {
            known.addresses.retain(|(one, _)| *one != address);
            known.addresses.push((address, now));
        }
        known.addresses.retain(|(_, seen)| now.duration_since(*seen) < COUNTS_FOR);
        let excess = known.addresses.len().saturating_sub(MOST);
        known.addresses.drain(..excess);
    }

    /// Takes a failure: what was known stays. Answers whether it is the first in a row.
    fn failed(&self) -> bool {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        !std::mem::replace(&mut known.failing, true)
    }
}

/// All names that are declared.
#[derive(Debug, Default)]
pub(super) struct Names {
    known: Mutex<BTreeMap<Box<str>, Arc<Name>>>,
    declared: Notify,
}

impl Names {
    /// Those of a new config; of one that was there before the addresses stay.
    pub(super) fn declare<'a>(&self, names: impl Iterator<Item = &'a str>) -> BTreeMap<Box<str>, Arc<Name>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let declared: BTreeMap<_, _> =
            names.map(|text| (text.into(), known.get(text).map_or_else(|| Name::new(text), Arc::clone))).collect();
        *known = declared.clone();
        drop(known);
        self.declared.notify_one();
        declared
    }

    /// Resolves them, at once after each declaration and then again and again, until `stop`.
    pub(super) async fn follow(&self, mut stop: watch::Receiver<bool>) {
        loop {
            let round = async {
                self.resolve().await;
                let _ = tokio::time::timeout(EVERY, self.declared.notified()).await;
            };
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => return,
                () = round => {}
            }
        }
    }

    async fn resolve(&self) {
        let names: Vec<_> = self.known.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        let mut under_way = JoinSet::new();
        for name in names {
            if under_way.len() >= AT_ONCE {
                under_way.join_next().await;
            }
            under_way.spawn(async move {
                let found = tokio::time::timeout(WITHIN, tokio::net::lookup_host((&*name.text, 0))).await;
                let found = found.unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time")));
                match found {
                    Ok(addresses) => name.answered(addresses.map(|address| address.ip()), Instant::now()),
                    Err(error) if name.failed() => {
                        tracing::warn!(name = &*name.text, %error, "a captured name cannot be resolved");
                    }
                    Err(_) => {}
                }
            });
        }
        while under_way.join_next().await.is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    #[test]
    fn an_address_counts_for_a_while_after_it_was_last_in_an_answer() {
        let (name, began) = (Name::new("records.example"), Instant::now());
        assert!(!name.has(address(1)), "a name that was never resolved has no address");
        name.answered([address(1), address(2)].into_iter(), began);
        name.answered(["::ffff:192.0.2.3".parse().unwrap()].into_iter(), began + COUNTS_FOR / 2);
        assert!([1, 2, 3].iter().all(|last| name.has(address(*last))));
        name.answered([address(2)].into_iter(), began + COUNTS_FOR);
        assert_eq!([1, 2, 3].map(|last| name.has(address(last))), [false, true, true]);
    }

    #[test]
    fn a_failing_resolver_takes_nothing_away_and_is_told_of_once() {
        let name = Name::new("records.example");
        name.answered([address(1)].into_iter(), Instant::now());
        assert!(name.failed());
        assert!(!name.failed());
        assert!(name.has(address(1)));
    }

    #[test]
    fn there_are_at_most_so_many_and_the_oldest_give_way() {
        let (name, began) = (Name::new("records.example"), Instant::now());
        name.answered((0..200).map(address), began);
        name.answered((200..=255).map(address), began + Duration::from_secs(1));
        let known = (0..=255).filter(|last| name.has(address(*last))).count();
        assert_eq!(known, MOST);
        assert!((200..=255).all(|last| name.has(address(last))));
    }

    #[tokio::test]
    async fn names_are_resolved_once_declared_and_keep_their_addresses_across_declarations() {
        let names = Arc::new(Names::default());
        let stop = watch::Sender::new(false);
        let following = tokio::spawn({
            let (names, stop) = (Arc::clone(&names), stop.subscribe());
            async move { names.follow(stop).await }
        });
        let declared = names.declare(["localhost"].into_iter());
        let localhost = &declared["localhost"];
        while !localhost.has([127, 0, 0, 1].into()) && !localhost.has("::1".parse().unwrap()) {
            tokio::task::yield_now().await;
        }
        let again = names.declare(["localhost", "other.invalid"].into_iter());
        assert!(Arc::ptr_eq(localhost, &again["localhost"]));
        stop.send_replace(true);
        following.await.unwrap();
    }
}
