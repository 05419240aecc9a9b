//! Who speaks plaintext to captured ports: what an operator reads before a port goes strict.
//!
//! In: each plaintext connection, let through or refused. Out: for each port its callers and the answer whether plaintext
//! can be refused there. All of it is bounded: callers of a port, and ports that no listener names.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;

use crate::clock::Clock;
use crate::config::schema::Plaintext;

/// Callers of one port that are remembered; whoever was seen least recently gives way.
const MOST_CALLERS: usize = 64;
/// Ports that no listener names and that have a page of their own.
const MOST_UNNAMED: usize = 64;
/// A port is safe when nobody spoke plaintext for so long. Seconds: a day, so that nightly jobs have shown themselves.
const WINDOW: u64 = 24 * 3600;

/// What became of a plaintext connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    /// `plaintext: allow`.
    Allowed,
    /// `plaintext: audit`.
    Audited,
    /// `plaintext: refuse`.
    Refused,
}

impl Fate {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Allowed, Self::Audited, Self::Refused];

    /// The word in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Audited => "audited",
            Self::Refused => "refused",
        }
    }
}

/// Counts and times, seconds since the Unix epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Connections that were let through.
    pub let_through: u64,
    /// Connections that were refused.
    pub refused: u64,
    /// When the first one came.
    pub first_seen: Option<u64>,
    /// When the last one came.
    pub last_seen: Option<u64>,
}

impl Tally {
    fn add(&mut self, fate: Fate, now: u64) {
        match fate {
            Fate::Refused => self.refused += 1,
            Fate::Allowed | Fate::Audited => self.let_through += 1,
        }
        self.first_seen.get_or_insert(now);
        self.last_seen = Some(now);
    }

    fn merge(&mut self, other: &Self) {
        self.let_through += other.let_through;
        self.refused += other.refused;
        self.first_seen = self.first_seen.into_iter().chain(other.first_seen).min();
        self.last_seen = self.last_seen.max(other.last_seen);
    }
}

/// Whether plaintext can be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Safe {
    /// Nobody spoke plaintext for a day, or it is refused already.
    Yes,
    /// Nobody spoke plaintext, but it is watched for less than a day.
    SoFar,
    /// Somebody spoke plaintext within a day: was let through, or was refused while the port was strict.
    No,
}

/// One port's page.
#[derive(Clone, Debug, Default)]
struct Page {
    named: bool,
    /// Since when it is watched.
    since: u64,
    all: Tally,
    last_let_through: Option<(u64, IpAddr)>,
    last_refused: Option<(u64, IpAddr)>,
    callers: BTreeMap<IpAddr, Tally>,
    /// Of callers that have given way.
    others: Tally,
}

impl Page {
    fn new(since: u64, named: bool) -> Self {
        Self { named, since, ..Self::default() }
    }

    fn note(&mut self, caller: IpAddr, fate: Fate, now: u64) {
        self.all.add(fate, now);
        match fate {
            Fate::Refused => self.last_refused = Some((now, caller)),
            Fate::Allowed | Fate::Audited => self.last_let_through = Some((now, caller)),
        }
        if self.callers.len() >= MOST_CALLERS && !self.callers.contains_key(&caller) {
            // Of those that were only refused first: a crowd of them must not hide who is let through.
            let age = |tally: &Tally| (tally.let_through > 0, tally.last_seen);
            let least = self.callers.iter().min_by_key(|(_, tally)| age(tally)).map(|(address, _)| *address);
            if let Some(gone) = least.and_then(|address| self.callers.remove(&address)) {
                self.others.merge(&gone);
            }
        }
        self.callers.entry(caller).or_default().add(fate, now);
    }

    fn merge(&mut self, other: &Self) {
        self.all.merge(&other.all);
        self.others.merge(&other.all);
        self.last_let_through = self.last_let_through.max(other.last_let_through);
        self.last_refused = self.last_refused.max(other.last_refused);
    }
}

/// Every port's page.
#[derive(Debug)]
pub struct Ledger {
    clock: Clock,
    began: u64,
    pages: Mutex<Pages>,
}

#[derive(Debug)]
struct Pages {
    ports: BTreeMap<u16, Page>,
    /// Of ports without a page of their own.
    rest: Page,
}

/// What is known of one port.
#[derive(Clone, Debug, Serialize)]
pub struct Port {
    /// The port; none for all that have no page of their own.
    pub port: Option<u16>,
    /// The listener that takes it.
    pub listener: Option<String>,
    /// What is declared for plaintext there.
    pub plaintext: Plaintext,
    /// Whether plaintext can be refused.
    pub safe_to_go_strict: Safe,
    /// The same in words, with since when.
    pub answer: String,
    /// Since when it is watched, seconds since the Unix epoch.
    pub watched_since: u64,
    /// All its plaintext connections.
    pub connections: Tally,
    /// Its callers, those seen last first.
    pub callers: Vec<Caller>,
    /// Of callers that were forgotten to make room.
    pub other_callers: Tally,
}

/// One caller of a port.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Caller {
    /// Its address.
    pub address: IpAddr,
    /// Its connections.
    #[serde(flatten)]
    pub connections: Tally,
}

impl Ledger {
    /// Nothing seen yet.
    pub fn new(clock: Clock) -> Self {
        let began = clock.now();
        let pages = Pages { ports: BTreeMap::new(), rest: Page::new(began, false) };
        Self { clock, began, pages: Mutex::new(pages) }
    }

    /// The ports that listeners name from now on, and whether one takes all others. Ports that nobody takes are forgotten.
    pub fn declare(&self, named: &BTreeSet<u16>, any: bool) {
        let now = self.clock.now();
        let mut pages = self.pages();
        pages.ports.retain(|port, page| {
            page.named = named.contains(port);
            page.named || any
        });
        for port in named {
            pages.ports.entry(*port).or_insert_with(|| Page::new(now, true));
        }
        let Pages { ports, rest } = &mut *pages;
        while ports.values().filter(|page| !page.named).count() > MOST_UNNAMED {
            let unnamed = ports.iter().find(|(_, page)| !page.named).map(|(port, _)| *port);
            match unnamed.and_then(|port| ports.remove(&port)) {
                Some(page) => rest.merge(&page),
                None => break,
            }
        }
    }

    /// A plaintext connection to `port`.
    pub fn note(&self, port: u16, caller: IpAddr, fate: Fate) {
        let now = self.clock.now();
        let mut pages = self.pages();
        let page = pages.page(port, fate, self.began);
        page.note(caller.to_canonical(), fate, now);
    }

    /// Every port, that of all others last. `declared` tells which listener takes a port, none for any other one.
    pub fn report(&self, declared: impl Fn(Option<u16>) -> Option<(String, Plaintext)>) -> Vec<Port> {
        let now = self.clock.now();
        let pages = self.pages();
        let rest = (pages.rest.all.last_seen.is_some()).then_some((None, &pages.rest));
        let ports = pages.ports.iter().map(|(port, page)| (Some(*port), page)).chain(rest);
        ports.map(|(port, page)| page.report(port, declared(port), now)).collect()
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pages {
    fn page(&mut self, port: u16, fate: Fate, began: u64) -> &mut Page {
        let Self { ports, rest } = self;
        if !ports.contains_key(&port) && ports.values().filter(|page| !page.named).count() >= MOST_UNNAMED {
            // Whoever knocks at many ports must not hide one that lets plaintext through.
            let least = |(_, page): &(&u16, &Page)| !page.named && page.all.let_through == 0;
            let gone = ports.iter().find(least).map(|(port, _)| *port).filter(|_| fate != Fate::Refused);
            match gone.and_then(|port| ports.remove(&port)) {
                Some(page) => rest.merge(&page),
                None => return rest,
            }
        }
        ports.entry(port).or_insert_with(|| Page::new(began, false))
    }
}

impl Page {
    fn report(&self, port: Option<u16>, declared: Option<(String, Plaintext)>, now: u64) -> Port {
        let (listener, plaintext) = declared.map_or((None, Plaintext::Refuse), |(name, p)| (Some(name), p));
        let (safe, answer) = self.answer(plaintext, now);
        let mut callers: Vec<Caller> = self
            .callers
            .iter()
            .map(|(address, connections)| Caller { address: *address, connections: *connections })
            .collect();
        callers.sort_by_key(|caller| std::cmp::Reverse(caller.connections.last_seen));
        Port {
            port,
            listener,
            plaintext,
            safe_to_go_strict: safe,
            answer,
            watched_since: self.since,
            connections: self.all,
            callers,
            other_callers: self.others,
        }
    }

    fn answer(&self, plaintext: Plaintext, now: u64) -> (Safe, String) {
        let ago = |at: u64| humantime::format_duration(rounded(now.saturating_sub(at)));
        if plaintext == Plaintext::Refuse {
            let refused = self.all.refused;
            let counted = if refused == 0 { String::new() } else { format!("; {refused} refused") };
            return (Safe::Yes, format!("strict already{counted}"));
        }
        // Who was refused while the port was strict would be refused again, so that counts like what was let through.
        let seen = [
            (self.last_let_through, self.all.let_through, "let through"),
            (self.last_refused, self.all.refused, "refused"),
        ];
        for (last, count, what) in seen {
            if let Some((at, caller)) = last.filter(|(at, _)| now.saturating_sub(*at) < WINDOW) {
                return (Safe::No, format!("no: {count} {what}, the last one {} ago from {caller}", ago(at)));
            }
        }
        if now.saturating_sub(self.since) >= WINDOW {
            return (Safe::Yes, "yes: no plaintext connection for 24 hours".into());
        }
        let (since, what) = (ago(self.since), "wait for whoever calls once a day");
        (Safe::SoFar, format!("so far: no plaintext connection since it is watched, {since}; {what}"))
    }
}

/// To what a person wants to read: seconds below a minute, minutes above.
fn rounded(seconds: u64) -> Duration {
    Duration::from_secs(if seconds < 60 { seconds } else { seconds - seconds % 60 })
}

#[cfg(test)]
mod tests;
