//! Holds the one current identity and its state.
//!
//! One task consumes a [`Source`] and the revocation lists from files, chooses our SVID, judges it, watches the clock and
//! publishes a [`Current`]. What it holds fast to: a valid SVID is kept through any outage, an expired one is never used,
//! a new one takes its place only after it was proved to lead to an authority of its own trust domain, and what a source
//! no longer names is held for a short grace, because SPIRE sends an incomplete set for a moment while a CA is tainted.
//!
//! In: events of a source. Out: a `watch` of [`Current`].

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateRevocationListDer;
use tokio::sync::watch;
use tokio::time::Instant;

use super::chain::{date, verify_own_chain};
use super::choice::{Choice, Offer};
use super::crl::CrlFiles;
use super::current;
pub use super::current::{Counters, Current, SvidState};
use super::held::Held;
use super::source::{Event, Source, Update};
use super::{Identity, Svid, TrustBundles};
use crate::clock::Clock;
use crate::config::schema::{IdentityConfig, SvidKeys};

/// How often the wall clock is compared when nothing is near: it can jump.
const LOOK: Duration = Duration::from_secs(5);

/// What the operator declared about our identity.
#[derive(Clone, Debug)]
pub struct KeeperOptions {
    /// Which SVID is ours, if several come.
    pub choice: Choice,
    /// How long an identity that the source no longer names is held.
    pub withdraw_grace: Duration,
    /// Which keys our SVID may have.
    pub svid_keys: SvidKeys,
    /// Files of revocation lists. No identity is published before each of them has been read once: a list that is
    /// missing would let through whom it revokes.
    pub crls: Vec<std::path::PathBuf>,
}

impl KeeperOptions {
    /// What the config says.
    pub fn from_config(identity: &IdentityConfig, svid_keys: SvidKeys) -> Self {
        Self {
            choice: Choice::new(identity.spiffe_id.clone(), identity.hint.clone()),
            withdraw_grace: identity.withdraw_grace.0,
            svid_keys,
            crls: identity.crls.clone(),
        }
    }
}

/// What becomes of the identity when the grace is over.
#[derive(Debug)]
enum Withdrawal {
    /// The source says that there is none.
    NoIdentity(String),
    /// The source's set does not name it.
    Without(Offer),
}

/// Holds the one current identity. Made by [`Keeper::new`], set to work by [`Keeper::run`].
#[derive(Debug)]
pub struct Keeper {
    options: KeeperOptions,
    clock: Clock,
    out: watch::Sender<Current>,
    /// The latest full set.
    offer: Option<Offer>,
    /// What is trusted now, with all revocation lists.
    bundles: Arc<TrustBundles>,
    held: Option<Held>,
    generation: u64,
    withdrawal: Option<(Instant, Withdrawal)>,
    /// The lists from files; none before they were read.
    lists: Option<Vec<CertificateRevocationListDer<'static>>>,
    /// Why the files' lists are not those that there should be.
    lists_missing: Option<String>,
    /// Why the source cannot be reached.
    outage: Option<String>,
    /// Why there is no identity although the source is well.
    none: Option<String>,
    /// Why the offered SVID is not taken, and the first refusal's leaf, so that it is told once.
    refusal: Option<String>,
    told: Option<Arc<Svid>>,
    /// Why a part of the offered trust is not taken.
    trust_refusal: Option<String>,
    last_update: Option<u64>,
    last_rotation: Option<u64>,
    counters: Counters,
}

enum Occurrence {
    Source(Event),
    Lists(Result<Vec<CertificateRevocationListDer<'static>>, String>),
}

impl Keeper {
    /// A keeper that holds nothing yet, and where it will publish.
    pub fn new(options: KeeperOptions, clock: Clock) -> (Self, watch::Receiver<Current>) {
        let (out, published) = watch::channel(Current::default());
        let lists = options.crls.is_empty().then(Vec::new);
        let keeper = Self {
            options,
            clock,
            out,
            offer: None,
            bundles: Arc::new(TrustBundles::empty()),
            held: None,
            generation: 0,
            withdrawal: None,
            lists,
            lists_missing: None,
            outage: Some("the source has not answered yet".into()),
            none: None,
            refusal: None,
            told: None,
            trust_refusal: None,
            last_update: None,
            last_rotation: None,
            counters: Counters::default(),
        };
        (keeper, published)
    }

    /// Keeps the identity until the last receiver is gone or the future is dropped.
    pub async fn run(mut self, mut source: Box<dyn Source>) {
        let mut lists = CrlFiles::new(&self.options.crls);
        let out = self.out.clone();
        let mut unwatched = std::pin::pin!(out.closed());
        loop {
            let occurrence = {
                let mut next_event = source.next();
                let mut next_lists = std::pin::pin!(lists.next());
                loop {
                    self.settle();
                    tokio::select! {
                        event = &mut next_event => break Occurrence::Source(event),
                        lists = &mut next_lists => break Occurrence::Lists(lists),
                        () = &mut unwatched => return,
                        () = tokio::time::sleep(self.pause()) => {}
                    }
                }
            };
            match occurrence {
                Occurrence::Source(event) => self.on_event(event, source.name()),
                Occurrence::Lists(lists) => self.on_lists(lists),
            }
        }
    }

    fn on_event(&mut self, event: Event, source: &str) {
        match event {
            Event::Update(update) => {
                self.outage = None;
                self.last_update = Some(self.clock.now());
                self.on_update(update, source);
            }
            Event::NoIdentity { why } => {
                self.outage = None;
                if self.held.is_some() {
                    self.withdraw_later(Withdrawal::NoIdentity(why));
                } else {
                    if self.none.as_ref() != Some(&why) {
                        tracing::warn!("{source} has no identity for us yet: {why}");
                    }
                    (self.offer, self.refusal, self.none) = (None, None, Some(why));
                }
            }
            Event::Unavailable { why } => {
                if self.outage.as_ref() != Some(&why) {
                    tracing::warn!("{source} cannot be used: {why}");
                }
                if self.outage.is_none() {
                    self.counters.outages += 1;
                }
                self.outage = Some(why);
            }
        }
    }

    fn on_update(&mut self, update: Update, source: &str) {
        let offer = Offer::new(update);
        for problem in offer.news(self.offer.as_ref()) {
            tracing::warn!("{source}: {problem}");
        }
        let ours = self.held.as_ref().map(|held| held.svid().id());
        // What was left out may have been ours: then it is refused, not withdrawn.
        if ours.is_some() && self.options.choice.among(&offer, ours).is_empty() && offer.refused().is_empty() {
            self.withdraw_later(Withdrawal::Without(offer));
            return;
        }
        self.withdrawal = None;
        self.none = None;
        self.offer = Some(offer);
        self.weigh();
    }

    fn on_lists(&mut self, lists: Result<Vec<CertificateRevocationListDer<'static>>, String>) {
        match lists {
            Ok(lists) => {
                (self.lists, self.lists_missing) = (Some(lists), None);
                self.weigh();
            }
            Err(why) => {
                tracing::warn!("revocation lists cannot be read: {why}");
                self.lists_missing = Some(why);
            }
        }
    }

    /// Starts the grace; one that runs is not prolonged, so that no stream of incomplete sets can hold an identity.
    fn withdraw_later(&mut self, what: Withdrawal) {
        let until = match &self.withdrawal {
            Some((until, _)) => *until,
            None => {
                tracing::info!("the source does not name our identity: held for {:?}", self.options.withdraw_grace);
                Instant::now() + self.options.withdraw_grace
            }
        };
        self.withdrawal = Some((until, what));
    }

    fn withdraw(&mut self, what: Withdrawal) {
        let was = self.held.as_ref().map(|held| held.svid().id().clone());
        self.offer = match what {
            Withdrawal::NoIdentity(why) => {
                self.none = Some(why);
                None
            }
            Withdrawal::Without(offer) => Some(offer),
        };
        self.held = None;
        (self.refusal, self.told) = (None, None);
        self.weigh();
        let now = self.held.as_ref().map(|held| held.svid().id());
        if now.is_none() || now != was.as_ref() {
            self.counters.withdrawn += 1;
            if let Some(was) = was {
                tracing::warn!("our identity {was} was withdrawn");
            }
        }
    }

    /// Takes what can be taken of the latest set: trust in any case, our SVID if it stands the test.
    fn weigh(&mut self) {
        // Before the revocation lists are there nobody can be judged, so there is nothing to publish.
        let Some(lists) = &self.lists else { return };
        let Some(offer) = self.offer.take() else { return };
        let mut bundles = offer.bundles().clone();
        let all_lists = offer.crls().iter().chain(lists).cloned().collect();
        self.trust_refusal = None;
        if let Err(why) = bundles.set_crls(all_lists) {
            // The lists that are held were read once; without any, revoked peers would get through.
            self.trust_refusal = Some(format!("the offered revocation lists are not taken: {why}"));
            let _ = bundles.set_crls(self.bundles.crls().to_vec());
        }
        if !bundles.same_as(&self.bundles) {
            self.bundles = Arc::new(bundles);
            self.counters.trust_changes += 1;
        }
        self.take_svid(&offer);
        self.offer = Some(offer);
        self.bring_trust_up_to_date();
    }

    fn take_svid(&mut self, offer: &Offer) {
        let ours = self.held.as_ref().map(|held| held.svid().id());
        let candidates = self.options.choice.among(offer, ours);
        self.refusal = None;
        let mut first_refused = None;
        for svid in candidates {
            match self.judge(&svid) {
                Ok(until) => return self.take(svid, until),
                Err(why) => {
                    self.refusal.get_or_insert(why);
                    first_refused.get_or_insert(svid);
                }
            }
        }
        let Some(svid) = first_refused else {
            self.refusal = Some(self.options.choice.missing_in(offer));
            return;
        };
        if !self.told.as_ref().is_some_and(|told| told.same_leaf(&svid)) {
            tracing::warn!("an offered SVID is refused: {}", self.refusal.as_deref().unwrap_or_default());
            self.counters.refused += 1;
            self.told = Some(svid);
        }
    }

    fn judge(&self, svid: &Svid) -> Result<u64, String> {
        Choice::key_allowed(svid, self.options.svid_keys)?;
        verify_own_chain(svid, &self.bundles, self.clock.unix_time())
    }

    fn take(&mut self, svid: Arc<Svid>, until: u64) {
        (self.refusal, self.told) = (None, None);
        if let Some(held) = &mut self.held
            && held.svid().chain() == svid.chain()
        {
            held.until = until;
            return;
        }
        let now = self.clock.now();
        if self.held.as_ref().is_none_or(|held| !held.svid().same_leaf(&svid)) {
            self.last_rotation = Some(now);
            if self.held.is_some() {
                self.counters.rotations += 1;
            }
            tracing::info!(spiffe_id = %svid.id(), serial = %svid.facts().serial, "took an SVID valid until {}", date(until));
        }
        self.generation += 1;
        let identity = Identity { svid, bundles: Arc::clone(&self.bundles), generation: self.generation };
        self.held = Some(Held::new(identity, until, now));
    }

    /// Puts changed bundles or revocation lists into the identity that is held.
    fn bring_trust_up_to_date(&mut self) {
        if let Some(held) = &mut self.held
            && !Arc::ptr_eq(&held.identity.bundles, &self.bundles)
        {
            self.generation += 1;
            held.trust(Arc::clone(&self.bundles), self.generation);
        }
    }

    /// Looks at both clocks, draws the consequences and publishes.
    fn settle(&mut self) {
        if self.withdrawal.as_ref().is_some_and(|(until, _)| *until <= Instant::now())
            && let Some((_, what)) = self.withdrawal.take()
        {
            self.withdraw(what);
        } else if self.refusal.is_some()
            && self.withdrawal.is_none()
            && let Some(offer) = self.offer.take()
        {
            // It may have been for a time that has come by now.
            self.take_svid(&offer);
            self.offer = Some(offer);
        }
        let now = self.clock.now();
        if let Some(held) = &mut self.held {
            let passed = held.look(now);
            self.counters.overdue += u64::from(passed.overdue);
            self.counters.expired += u64::from(passed.expired);
            if passed.overdue {
                tracing::warn!("{}", held.complaints(now).join("; "));
            }
        }
        self.publish(now);
    }

    fn publish(&self, now: u64) {
        let held = self.held.as_ref();
        let mut reasons = held.map(|held| held.complaints(now)).unwrap_or_default();
        reasons.extend(self.outage.clone());
        if held.is_none() {
            reasons.extend(self.none.clone());
        }
        let refusals = || self.refusal.iter().chain(&self.trust_refusal).cloned();
        reasons.extend(refusals());
        match &self.lists_missing {
            Some(why) => reasons.push(format!("revocation lists cannot be read: {why}")),
            None if self.lists.is_none() => reasons.push("waiting for the revocation lists".into()),
            None => {}
        }
        let state = match held {
            None => SvidState::Absent,
            Some(held) if held.expired => SvidState::Expired,
            Some(_) if reasons.is_empty() => SvidState::Fresh,
            Some(_) => SvidState::Stale,
        };
        let usable = matches!(state, SvidState::Fresh | SvidState::Stale);
        let left_out = self.offer.iter().flat_map(|offer| offer.refused().iter().cloned());
        current::publish(
            &self.out,
            Current {
                identity: held.filter(|_| usable).map(|held| Arc::clone(&held.identity)),
                state,
                why: reasons.join("; "),
                since: now,
                generation: self.generation,
                not_after: held.map(|held| held.until),
                last_update: self.last_update,
                last_rotation: self.last_rotation,
                rotation_overdue: held.is_some_and(|held| held.overdue),
                source_reachable: self.outage.is_none(),
                refused: refusals().chain(left_out).collect(),
                counters: self.counters,
            },
        );
    }

    /// Until the clocks are looked at again.
    fn pause(&self) -> Duration {
        let nearest = self.held.as_ref().and_then(|held| held.next_change(self.clock.now()));
        // Wall clock and timer do not tick together: from near it is looked at more often than it ticks.
        let by_clock = match nearest {
            Some(0..=1) => Duration::from_millis(200),
            Some(2..=5) => Duration::from_secs(1),
            _ if self.refusal.is_some() => Duration::from_secs(1),
            _ => LOOK,
        };
        let grace = self.withdrawal.as_ref().map(|(until, _)| until.saturating_duration_since(Instant::now()));
        grace.map_or(by_clock, |grace| grace.min(by_clock))
    }
}

#[cfg(test)]
mod tests;
