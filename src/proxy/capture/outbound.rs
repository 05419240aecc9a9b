//! What is captured on its way from the workload: which listener takes it, and what becomes of what none takes.
//!
//! A listener takes what every key of its `capture` holds for; the first in the file does. Only where a listener before the
//! first that takes it anyway asks for the client's words are these read. What was said of a name is said by the client
//! alone: it picks the listener, and the listener's `expect` proves whom it leads to.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use tokio::sync::watch;

use super::first::{self, First, Wants};
use super::names::{Name, Names};
use super::{LOOP, NAME, OwnPorts, accept, ours, refuse};
use crate::config::schema::{CapturedDestinations, Detect, InboundMode, Passthrough};
use crate::policy::http::pattern::HostPattern;
use crate::proxy::connection::Connection;
use crate::proxy::detect::Prefixed;
use crate::proxy::listener::{Accepted, Listener, Outbound, Shared};
use crate::proxy::outbound;
use crate::proxy::passthrough::{self, Passed, Passing};
use crate::proxy::record::{Carries, Cause};
use crate::proxy::registry::Entry;
use crate::tls::record::Direction;

/// What is captured on its way from the workload.
#[derive(Debug)]
pub struct OutboundCapture {
    own: OwnPorts,
    declared: ArcSwapOption<Declared>,
    names: Names,
}

/// What is declared for connections that no listener takes, and for finding out whether one does.
#[derive(Debug)]
pub struct Terms {
    /// What becomes of those that none takes.
    pub unmatched: Arc<Passing>,
    /// How long a client's words are waited for, and on which ports they are not.
    pub detect: Arc<Detect>,
    /// The longest head of a request that is read, bytes.
    pub max_header_bytes: usize,
}

#[derive(Debug)]
struct Declared {
    listeners: Vec<Taking>,
    terms: Terms,
}

/// A listener and what it takes.
#[derive(Debug)]
struct Taking {
    keys: Keys,
    listener: Arc<Outbound>,
}

/// What a listener takes: all of these hold.
#[derive(Debug)]
struct Keys {
    written: CapturedDestinations,
    names: Vec<Arc<Name>>,
}

impl Keys {
    fn new(written: CapturedDestinations, known: &BTreeMap<Box<str>, Arc<Name>>) -> Self {
        let unknown = || Arc::new(Name::default());
        let names = written.names.iter().map(|name| known.get(name.as_str()).cloned().unwrap_or_else(unknown));
        Self { names: names.collect(), written }
    }

    /// Whether all of them hold.
    fn take(&self, to: SocketAddr, first: Option<&First>) -> bool {
        self.hold_for(to) && self.name(to) && self.are_said(first)
    }

    /// Whether address and port are its own, by what is written.
    fn hold_for(&self, to: SocketAddr) -> bool {
        let (addresses, ports) = (&self.written.addresses, &self.written.ports);
        (addresses.is_empty() || addresses.iter().any(|net| net.contains(to.ip())))
            && (ports.is_empty() || ports.contains(&to.port()))
    }

    /// Whether the address is one of its names'.
    fn name(&self, to: SocketAddr) -> bool {
        self.names.is_empty() || self.names.iter().any(|name| name.has(to.ip().to_canonical()))
    }

    /// Whether the client's words are those it asks for, if it asks for any.
    fn are_said(&self, first: Option<&First>) -> bool {
        let (hosts, names) = (&self.written.http_hosts, &self.written.sni);
        let matches = |patterns: &[HostPattern], said: &str| patterns.iter().any(|pattern| pattern.matches(said));
        let host = matches!(first, Some(First::Http { host: Some(host) }) if matches(hosts, host));
        let name = matches!(first, Some(First::Tls { server_name: Some(name) }) if matches(names, name));
        (hosts.is_empty() || host) && (names.is_empty() || name)
    }
}

/// Which of the client's words decide who of these takes it.
fn wants<'a>(all: impl Iterator<Item = &'a Keys>, to: SocketAddr) -> Wants {
    let mut wants = Wants::default();
    let candidates = all.filter(|keys| keys.hold_for(to) && keys.name(to));
    for keys in candidates.take_while(|keys| keys.written.wants_bytes()) {
        wants.host |= !keys.written.http_hosts.is_empty();
        wants.server_name |= !keys.written.sni.is_empty();
    }
    wants
}

impl Declared {
    /// Which of the client's words decide who takes it.
    fn wants(&self, to: SocketAddr) -> Wants {
        if self.terms.detect.opaque_ports.contains(&to.port()) {
            // The server speaks first there: nothing of the client decides.
            return Wants::default();
        }
        wants(self.listeners.iter().map(|taking| &taking.keys), to)
    }

    fn listener(&self, to: SocketAddr, first: Option<&First>) -> Option<&Arc<Outbound>> {
        self.listeners.iter().find(|taking| taking.keys.take(to, first)).map(|taking| &taking.listener)
    }

    /// Why a live connection ends, if its listener is no longer the first that takes it. That a name of its listener has
    /// other addresses by now ends nothing.
    fn moved(&self, entry: &Entry) -> Option<Cause> {
        // Of which nothing is written down, that was not picked yet: it will be asked for then.
        let (to, first) = (entry.client.original()?, entry.heard()?);
        let is_its = |taking: &Taking| taking.listener.name == entry.listener;
        let taken = self.listeners.iter().find(|taking| {
            let keys = &taking.keys;
            keys.take(to, first) || (is_its(taking) && keys.hold_for(to) && keys.are_said(first))
        });
        let stays = taken.map_or(*entry.listener == *NAME, is_its);
        (!stays).then_some(Cause::PolicyChanged)
    }

    /// Whether a live connection that passes through would still do so; the cause if not.
    fn rejudge(&self, entry: &Entry, passed: &Passed) -> Option<Cause> {
        let passes = if *entry.listener == *NAME {
            passed.passes(&self.terms.unmatched)
        } else {
            let taking = self.listeners.iter().find(|taking| taking.listener.name == entry.listener);
            let passing = taking.and_then(|taking| taking.listener.state.load().passing.clone());
            passing.is_some_and(|passing| passed.passes(&passing))
        };
        self.moved(entry).or((!passes).then_some(Cause::PolicyChanged))
    }
}

impl OutboundCapture {
    /// Nothing is taken yet.
    pub fn new(own: OwnPorts) -> Self {
        Self { own, declared: ArcSwapOption::empty(), names: Names::default() }
    }

    /// Which listener takes which destinations from now on, in the order of the file.
    pub fn declare(&self, listeners: Vec<(CapturedDestinations, Arc<Outbound>)>, terms: Terms) {
        let texts = listeners.iter().flat_map(|(what, _)| what.names.iter().map(String::as_str));
        let known = self.names.declare(texts);
        let taking = |(written, listener)| Taking { keys: Keys::new(written, &known), listener };
        let listeners = listeners.into_iter().map(taking).collect();
        self.declared.store(Some(Arc::new(Declared { listeners, terms })));
    }

    /// Why a live connection ends, if its listener is no longer the one that takes it.
    pub fn moved(&self, entry: &Entry) -> Option<Cause> {
        self.declared.load().as_ref().and_then(|declared| declared.moved(entry))
    }

    /// Whether a live connection that passes through would still do so; the cause if not.
    pub fn rejudge(&self, entry: &Entry, passed: &Passed) -> Option<Cause> {
        self.declared.load().as_ref().and_then(|declared| declared.rejudge(entry, passed))
    }

    /// Resolves the declared names until `stop`.
    pub async fn follow_names(self: Arc<Self>, stop: watch::Receiver<bool>) {
        self.names.follow(stop).await;
    }

    /// Serves until `stop`.
    pub async fn run(self: Arc<Self>, listener: Listener, shared: Arc<Shared>, stop: watch::Receiver<bool>) {
        accept(listener, Direction::Outbound, shared, stop, move |accepted, shared| {
            Arc::clone(&self).serve(accepted, shared)
        })
        .await;
    }

    async fn serve(self: Arc<Self>, accepted: Accepted, shared: Arc<Shared>) {
        match self.own.original(&accepted, InboundMode::Redirect) {
            Err(why) => refuse(accepted, Direction::Outbound, Cause::NotCaptured, why, &shared),
            Ok(original) => self.take(accepted.captured(original), original, shared).await,
        }
    }

    /// Serves what was captured on its way to `original`.
    pub(crate) async fn take(self: Arc<Self>, mut accepted: Accepted, original: SocketAddr, shared: Arc<Shared>) {
        if ours(&accepted, &shared).is_some() {
            return refuse(accepted, Direction::Outbound, Cause::Loop, LOOP.into(), &shared);
        }
        let Some(mut declared) = self.declared.load_full() else {
            return refuse(accepted, Direction::Outbound, Cause::Undeclared, "nothing is declared yet".into(), &shared);
        };
        let wants = declared.wants(original);
        let (first, ahead) = if wants.any() {
            match self.hear(&mut accepted, wants, &declared.terms, &shared).await {
                Ok((first, ahead)) => {
                    declared = self.declared.load_full().unwrap_or(declared);
                    if declared.wants(original) != wants {
                        let why = "other words decide by now than those that it was asked for".into();
                        return refuse(accepted, Direction::Outbound, Cause::PolicyChanged, why, &shared);
                    }
                    (Some(first), ahead)
                }
                Err(why) => return refuse(accepted, Direction::Outbound, Cause::Reset, why, &shared),
            }
        } else {
            (None, Vec::new())
        };
        match declared.listener(original, first.as_ref()) {
            Some(listener) => {
                let listener = Arc::clone(listener);
                drop(declared);
                outbound::serve_captured(accepted, first, ahead, listener, self, shared).await;
            }
            None => self.unmatched(accepted, first, ahead, declared, shared).await,
        }
    }

    /// Hears what decides. Registered meanwhile, so that nobody who is still heard is forgotten.
    async fn hear(
        &self,
        accepted: &mut Accepted,
        wants: Wants,
        terms: &Terms,
        shared: &Arc<Shared>,
    ) -> Result<(First, Vec<u8>), String> {
        let registration = shared.registry.register(Direction::Outbound, NAME.into(), accepted.client);
        let hearing = first::read(&mut accepted.io, wants, terms.detect.timeout.0, terms.max_header_bytes);
        tokio::select! {
            biased;
            heard = hearing => heard.map_err(|error| error.to_string()),
            cause = registration.entry().until_stopped() => Err(cause.as_str().to_owned()),
        }
    }

    /// What becomes of what no listener takes.
    async fn unmatched(
        self: Arc<Self>,
        accepted: Accepted,
        first: Option<First>,
        ahead: Vec<u8>,
        declared: Arc<Declared>,
        shared: Arc<Shared>,
    ) {
        let mut connection =
            Connection::open(&shared, Direction::Outbound, Carries::Tcp, &NAME.into(), accepted.client);
        connection.set_heard(first);
        let passing = Arc::clone(&declared.terms.unmatched);
        drop(declared);
        if passing.passage.passes() == Passthrough::Off {
            let original = accepted.client.original().map(|original| original.to_string());
            connection.decided(Direction::Outbound, &passing.passage.decide(None));
            connection.end(
                Cause::Undeclared,
                format!("no outbound listener captures {}", original.as_deref().unwrap_or("it")),
            );
            connection.upstream = original;
            accepted.io.abort();
            return;
        }
        let plain = Prefixed::with(ahead, accepted.io);
        let still = move |entry: &Entry, passed: &Passed| self.rejudge(entry, passed);
        passthrough::serve(connection, plain, passing, still, shared).await;
    }
}

#[cfg(test)]
mod tests;
