//! The whole proxy, put together: one place that holds what is declared, what is current and what is listening.
//!
//! In: a [`Config`], the current identity (a `watch`) and an observer. Out: listeners that serve, on the runtime of the
//! data path. [`Proxy::apply`] takes a changed config, validated whole before anything changes; [`Proxy::follow`] swaps
//! what the listeners serve with whenever the identity changes, and has every live connection judged again.

mod captures;
mod interception;
pub mod node;
pub mod source;
mod states;

pub use node::Node;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use captures::Captures;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};

use crate::clock::Clock;
use crate::config::Config;
use crate::identity::Identity;
use crate::identity::keeper::Current;
use crate::policy::Policy;
use crate::proxy::inherited::Inherited;
use crate::proxy::ledger::Ledger;
use crate::proxy::listener::{Address, Inbound, Listener, Outbound, Shared};
use crate::proxy::record::{Cause, Observer};
use crate::proxy::registry::{Entry, Known, Registry};
use crate::proxy::trace::Sampler;
use crate::proxy::upstream::{HostPort, Target};
use crate::tls::record::Direction;
use crate::tls::{Profile, Trust};

/// A config that cannot be applied, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApplyError(pub String);

impl fmt::Display for ApplyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ApplyError {}

/// A listener that serves.
struct Running<L> {
    listener: Arc<L>,
    /// None where it serves what is captured.
    socket: Option<Socket>,
}

/// The socket of a listener.
struct Socket {
    declared: Address,
    bound: Address,
    stop: watch::Sender<bool>,
}

impl<L> Running<L> {
    fn declared(&self) -> Option<&Address> {
        self.socket.as_ref().map(|socket| &socket.declared)
    }

    /// Where it takes connections, in words.
    fn place(&self) -> String {
        self.socket.as_ref().map_or_else(|| "captured".into(), |socket| socket.bound.to_string())
    }
}

/// What is declared and what was built from it.
struct House {
    config: Config,
    profile: Arc<Profile>,
    policy: Arc<Policy>,
    slots: Arc<Semaphore>,
    trust: Option<Arc<Trust>>,
    identity: Option<Arc<Identity>>,
    generation: u64,
    inbound: BTreeMap<String, Running<Inbound>>,
    outbound: BTreeMap<String, Running<Outbound>>,
    captures: Captures,
}

impl House {
    /// Why a live connection ends, if it does, and how many of its requests were ended if it does not.
    fn rejudge(&self, entry: &Entry, known: &Known, clock: &Clock) -> (Option<Cause>, usize) {
        let cause = match (entry.direction, known) {
            (_, Known::Passing(passed)) => self.captures.rejudge(entry, passed),
            (Direction::Inbound, _) => match self.inbound.get(&*entry.listener) {
                Some(running) => {
                    let state = running.listener.state.load();
                    let cause = state.rejudge(entry, known, clock);
                    if let (None, Known::Peer(peer)) = (cause, known) {
                        return (None, state.rejudge_requests(entry, peer));
                    }
                    cause
                }
                None => Some(Cause::Drained),
            },
            (Direction::Outbound, _) => match self.outbound.get(&*entry.listener) {
                Some(running) => running.listener.state.load().rejudge(entry, known, clock),
                None => Some(Cause::Drained),
            },
        };
        (cause, 0)
    }
}

/// A proxy that runs.
pub struct Proxy {
    shared: Arc<Shared>,
    current: watch::Receiver<Current>,
    traffic: Handle,
    house: Mutex<House>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("shared", &self.shared).finish_non_exhaustive()
    }
}

/// One listener, for `/state` and for messages.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ListenerInfo {
    /// Its name.
    pub name: String,
    /// Which way.
    pub direction: Direction,
    /// Where it listens, with the real port.
    pub address: String,
    /// Whether it has what it needs to serve.
    pub serving: bool,
}

impl Proxy {
    /// Binds the listeners of a config, or claims the sockets that were `inherited` for them, and begins to serve on `traffic`, as far as `current` allows.
    ///
    /// # Errors
    /// The profile cannot be had, a target cannot be read, or an address cannot be bound.
    pub fn start(
        config: Config,
        current: watch::Receiver<Current>,
        observer: Arc<dyn Observer>,
        clock: Clock,
        traffic: Handle,
        inherited: &mut Inherited,
    ) -> Result<Arc<Self>, ApplyError> {
        let profile = profile_of(&config)?;
        let captures = {
            let _runtime = traffic.enter();
            Captures::bind(&config, inherited)?
        };
        let shared = Arc::new(Shared {
            published: watch::Sender::new(false),
            dials: Arc::default(),
            ledger: Ledger::new(clock.clone()),
            observer,
            registry: Arc::new(Registry::default()),
            clock,
            places: Arc::new(Semaphore::new(config.connections.max.min(Semaphore::MAX_PERMITS))),
            tracing: config.telemetry.traces.as_ref().map_or(Sampler::OFF, |traces| Sampler::ratio(traces.ratio)),
        });
        let house = House {
            slots: Arc::new(Semaphore::new(profile.max_handshakes)),
            profile,
            policy: Arc::default(),
            trust: None,
            identity: None,
            generation: 0,
            inbound: BTreeMap::new(),
            outbound: BTreeMap::new(),
            captures,
            config: config.clone(),
        };
        let proxy = Arc::new(Self { shared, current, traffic, house: Mutex::new(house) });
        proxy.apply_on(config, inherited)?;
        proxy.house().captures.start(&proxy.shared, &proxy.traffic);
        Ok(proxy)
    }

    /// What is open.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.shared.registry
    }

    /// The current identity and its state.
    pub fn current(&self) -> Current {
        self.current.borrow().clone()
    }

    /// The config in force.
    pub fn config(&self) -> Config {
        self.house().config.clone()
    }

    /// The profile in force.
    pub fn profile(&self) -> Arc<Profile> {
        Arc::clone(&self.house().profile)
    }

    /// How often a chain was remembered and how often not, in this generation of trust.
    pub fn chain_memory(&self) -> (u64, u64) {
        self.house().trust.as_ref().map_or((0, 0), |trust| trust.memory_counts())
    }

    /// How many handshakes hold one of the places that `tls.max_handshakes` allows.
    pub fn handshakes_in_progress(&self) -> usize {
        let house = self.house();
        house.profile.max_handshakes.saturating_sub(house.slots.available_permits())
    }

    /// All listeners.
    pub fn listeners(&self) -> Vec<ListenerInfo> {
        let house = self.house();
        let inbound = house.inbound.iter().map(|(name, running)| ListenerInfo {
            name: name.clone(),
            direction: Direction::Inbound,
            address: running.place(),
            serving: running.listener.state.load().tls.is_some(),
        });
        let outbound = house.outbound.iter().map(|(name, running)| ListenerInfo {
            name: name.clone(),
            direction: Direction::Outbound,
            address: running.place(),
            serving: running.listener.state.load().tls.is_some(),
        });
        inbound.chain(outbound).collect()
    }

    /// Whether every listener has what it needs to serve. Told after the listeners have it, never before.
    pub fn serving(&self) -> watch::Receiver<bool> {
        self.shared.published.subscribe()
    }

    fn house(&self) -> std::sync::MutexGuard<'_, House> {
        self.house.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a config in place of the one in force. Everything that can fail is done first; then listeners that are
    /// gone are closed, new ones begin, and those that stayed keep their sockets and connections.
    ///
    /// # Errors
    /// What cannot be had; nothing has changed then.
    pub fn apply(self: &Arc<Self>, config: Config) -> Result<(), ApplyError> {
        self.apply_on(config, &mut Inherited::none())
    }

    fn apply_on(self: &Arc<Self>, config: Config, inherited: &mut Inherited) -> Result<(), ApplyError> {
        let _runtime = self.traffic.enter();
        let mut house = self.house();
        let profile = profile_of(&config)?;
        let policy = Arc::new(Policy::load(&config).map_err(ApplyError)?);
        for inbound in &config.inbound {
            let target = inbound.to.as_deref().map(Target::parse).transpose();
            target.map_err(|why| ApplyError(format!("inbound '{}': {why}", inbound.name)))?;
        }
        for outbound in &config.outbound {
            for to in outbound.to.as_slice() {
                HostPort::parse(to).map_err(|why| ApplyError(format!("outbound '{}': {why}", outbound.name)))?;
            }
        }
        let inbound: Vec<(String, Option<Address>)> =
            config.inbound.iter().map(|i| (i.name.clone(), i.listen.map(Address::Tcp))).collect();
        let outbound = config
            .outbound
            .iter()
            .map(|o| {
                let address = o.listen.as_deref().map(Address::parse).transpose().map_err(ApplyError)?;
                Ok((o.name.clone(), address))
            })
            .collect::<Result<Vec<_>, ApplyError>>()?;
        // An address that moves from one listener to another is free only once the old one is closed; binding with
        // SO_REUSEADDR does not help there, so such a swap is refused here and works in two steps.
        let new_inbound = bind_new(&inbound, &house.inbound, inherited)?;
        let new_outbound = bind_new(&outbound, &house.outbound, inherited)?;
        let same_profile = house.config.tls == config.tls;
        if !same_profile {
            house.profile = profile;
            house.slots = Arc::new(Semaphore::new(house.profile.max_handshakes));
            house.trust = None;
        }
        resize(&self.shared.places, house.config.connections.max, config.connections.max);
        house.policy = policy;
        house.config = config;
        let mut gone = Vec::new();
        house.inbound.retain(|name, running| keep(&inbound, name, running, &mut gone));
        house.outbound.retain(|name, running| keep(&outbound, name, running, &mut gone));
        // The state of these is never swapped again, so nobody may finish a handshake by it.
        self.shared.registry.stop_all(Cause::Drained, |entry| {
            entry.peer().is_none() && gone.iter().any(|name| **name == *entry.listener)
        });
        let identity = self.current.borrow().identity.clone();
        self.renew_trust(&mut house, identity.as_ref());
        for New { name, socket } in new_inbound {
            let Some(state) = house.inbound_state(&name, identity.as_ref(), &self.shared) else { continue };
            let serving = Arc::new(Inbound { name: name.as_str().into(), state: ArcSwap::from_pointee(state) });
            let run = |listener, stop| Arc::clone(&serving).run(listener, Arc::clone(&self.shared), stop);
            let socket = socket.map(|socket| self.spawn(socket, run));
            house.inbound.insert(name, Running { listener: serving, socket });
        }
        for New { name, socket } in new_outbound {
            let Some(state) = house.outbound_state(&name, identity.as_ref(), &self.shared) else { continue };
            let serving = Arc::new(Outbound { name: name.as_str().into(), state: ArcSwap::from_pointee(state) });
            let run = |listener, stop| Arc::clone(&serving).run(listener, Arc::clone(&self.shared), stop);
            let socket = socket.map(|socket| self.spawn(socket, run));
            house.outbound.insert(name, Running { listener: serving, socket });
        }
        house.declare_captures(&self.shared);
        self.publish(&mut house, identity);
        Ok(())
    }

    /// Starts a listener; a patient one once connections can be served.
    fn spawn<F>(&self, socket: NewSocket, run: impl FnOnce(Listener, watch::Receiver<bool>) -> F) -> Socket
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let NewSocket { declared, listener, patient } = socket;
        let bound = listener.local_address().unwrap_or_else(|_| declared.clone());
        let (stop_sender, mut stop) = watch::channel(false);
        let run = run(listener, stop.clone());
        let mut serving = self.serving();
        self.traffic.spawn(async move {
            if patient {
                tokio::select! {
                    _ = serving.wait_for(|serving| *serving) => {}
                    _ = stop.wait_for(|stop| *stop) => {}
                }
            }
            run.await;
        });
        Socket { declared, bound, stop: stop_sender }
    }

    /// Follows the identity for ever: every change is published as it comes.
    pub async fn follow(self: Arc<Self>) {
        let mut current = self.current.clone();
        loop {
            let identity = current.borrow_and_update().identity.clone();
            {
                let mut house = self.house();
                let generation = |identity: &Option<Arc<Identity>>| identity.as_ref().map(|i| i.generation);
                if generation(&house.identity) != generation(&identity) {
                    self.publish(&mut house, identity);
                }
            }
            if current.changed().await.is_err() {
                return;
            }
        }
    }

    /// A generation of trust of its own for bundles that differ from those in force.
    fn renew_trust(&self, house: &mut House, identity: Option<&Arc<Identity>>) {
        let Some(identity) = identity else { return };
        if house.trust.as_ref().is_some_and(|trust| trust.bundles().same_as(&identity.bundles)) {
            return;
        }
        let trust = Trust::new(Arc::clone(&identity.bundles), Arc::clone(&house.profile), self.shared.clock.clone());
        house.trust = trust
            .map(Arc::new)
            .map_err(|why| tracing::error!(%why, "the trust bundles cannot be used; nothing is served until they can"))
            .ok();
    }

    /// Swaps what every listener serves with, then judges every live connection by it.
    fn publish(&self, house: &mut House, identity: Option<Arc<Identity>>) {
        let _runtime = self.traffic.enter();
        house.generation += 1;
        self.renew_trust(house, identity.as_ref());
        house.identity = identity.clone();
        let names: Vec<String> = house.inbound.keys().cloned().collect();
        for name in names {
            if let Some(state) = house.inbound_state(&name, identity.as_ref(), &self.shared)
                && let Some(running) = house.inbound.get(&name)
            {
                running.listener.state.swap(Arc::new(state)).retire();
            }
        }
        let names: Vec<String> = house.outbound.keys().cloned().collect();
        for name in names {
            if let Some(state) = house.outbound_state(&name, identity.as_ref(), &self.shared)
                && let Some(running) = house.outbound.get(&name)
            {
                running.listener.state.swap(Arc::new(state)).retire();
            }
        }
        let mut requests = 0;
        let ended = self.shared.registry.rejudge(|entry, known| {
            let (cause, ended) = known.map_or((None, 0), |known| house.rejudge(entry, known, &self.shared.clock));
            requests += ended;
            // Also of those whose peer is not known yet, or never will be: requests of a workload, a wait for an identity.
            cause.or_else(|| house.captures.moved(entry))
        });
        if ended > 0 || requests > 0 {
            tracing::info!(ended, requests, "live connections and requests were judged again and ended");
        }
        let serving = house.inbound.values().all(|running| running.listener.state.load().tls.is_some())
            && house.outbound.values().all(|running| running.listener.state.load().tls.is_some());
        self.shared.published.send_replace(serving);
    }

    /// Stops accepting, waits up to `timeout` for open connections to end, then ends the rest. Answers how many those
    /// were.
    pub async fn drain(&self, timeout: Duration) -> usize {
        let stops: Vec<watch::Sender<bool>> = {
            let house = self.house();
            let inbound = house.inbound.values().filter_map(|running| running.socket.as_ref());
            let sockets = inbound.chain(house.outbound.values().filter_map(|running| running.socket.as_ref()));
            sockets.map(|socket| socket.stop.clone()).chain([house.captures.stop()]).collect()
        };
        for stop in &stops {
            stop.send_replace(true);
        }
        // Sockets are closed, and the files of Unix sockets removed, before the process may end.
        let closed = async {
            for stop in &stops {
                stop.closed().await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(1), closed).await;
        self.shared.registry.drain();
        let _ = tokio::time::timeout(timeout, self.shared.registry.until_empty()).await;
        let left = self.shared.registry.len();
        // What is left, and the connections that were kept to send requests on.
        self.shared.registry.stop_all(Cause::Drained, |_| true);
        // Their tasks need a moment to write their records.
        let _ = tokio::time::timeout(Duration::from_secs(2), self.shared.registry.until_gone()).await;
        left
    }
}

fn profile_of(config: &Config) -> Result<Arc<Profile>, ApplyError> {
    Profile::from_config(&config.tls).map(Arc::new).map_err(|error| ApplyError(error.to_string()))
}

/// A listener that has its socket, if it is to have one, and nothing else yet.
struct New {
    name: String,
    socket: Option<NewSocket>,
}

struct NewSocket {
    declared: Address,
    listener: Listener,
    /// Whether nothing is accepted before it can be served: another process may be serving on the same socket.
    patient: bool,
}

/// Binds the listeners that are new or have moved, unless their sockets are there.
fn bind_new<L>(
    declared: &[(String, Option<Address>)],
    running: &BTreeMap<String, Running<L>>,
    inherited: &mut Inherited,
) -> Result<Vec<New>, ApplyError> {
    declared
        .iter()
        .filter(|(name, address)| running.get(name).is_none_or(|running| running.declared() != address.as_ref()))
        .map(|(name, address)| {
            let Some(address) = address else { return Ok(New { name: name.clone(), socket: None }) };
            let explain = |error: std::io::Error| ApplyError(format!("listener '{name}': {error}"));
            let (listener, bound) = match inherited.claim(address).map_err(explain)? {
                Some(listener) => (listener, false),
                None => (Listener::bind(address).map_err(explain)?, true),
            };
            let socket = NewSocket { declared: address.clone(), listener, patient: !bound };
            Ok(New { name: name.clone(), socket: Some(socket) })
        })
        .collect()
}

/// Whether a running listener stays; one that does not is told to stop, and its name written down.
fn keep<L>(declared: &[(String, Option<Address>)], name: &str, running: &Running<L>, gone: &mut Vec<String>) -> bool {
    let stays = declared.iter().any(|(other, address)| other == name && address.as_ref() == running.declared());
    if !stays {
        if let Some(socket) = &running.socket {
            let _ = socket.stop.send(true);
        }
        gone.push(name.to_owned());
    }
    stays
}

/// Gives or takes places for connections. Places in use are taken once they are free.
fn resize(places: &Arc<Semaphore>, before: usize, after: usize) {
    if after > before {
        places.add_permits(after - before);
    } else if before > after {
        let excess = before - after;
        let forgotten = places.forget_permits(excess);
        if forgotten < excess
            && let Ok(rest) = u32::try_from(excess - forgotten)
        {
            let places = Arc::clone(places);
            tokio::spawn(async move {
                if let Ok(permits) = places.acquire_many_owned(rest).await {
                    permits.forget();
                }
            });
        }
    }
}

#[cfg(test)]
mod tests;
