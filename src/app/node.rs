//! One proxy with everything around it: keeper, metrics, admin server.
//!
//! In: a config and a source of identities. Out: a [`Node`] that serves on the data path's runtime and does everything
//! else on the runtime it was started from.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::{Proxy, interception};
use crate::accelerate::Acceleration;
use crate::admin::{Pulse, Readiness, Server, Sources};
use crate::clock::Clock;
use crate::config::Config;
use crate::identity::keeper::{Current, Keeper, KeeperOptions};
use crate::identity::source::Source;
use crate::policy::Decision;
use crate::posture::Register;
use crate::proxy::inherited::Inherited;
use crate::proxy::record::{Carries, ConnectionRecord, Event, Observer, RequestRecord};
use crate::sandbox::Sandbox;
use crate::telemetry::{Metrics, Traces, access};
use crate::tls::Profile;
use crate::tls::record::{Direction, HandshakeRecord};

/// How many open connections `/state` lists.
const LISTED: usize = 1000;

/// A proxy with its keeper, metrics and admin server. What runs beside the data path ends when it is dropped.
#[derive(Debug)]
pub struct Node {
    proxy: Arc<Proxy>,
    sight: Arc<Sight>,
    sandbox: Arc<Sandbox>,
    readiness: Readiness,
    admin: SocketAddr,
    _tasks: JoinSet<()>,
}

/// Metrics, access log and traces, fed by the data path.
#[derive(Debug)]
struct Sight {
    metrics: Metrics,
    access_log: AtomicBool,
    traces: Option<Traces>,
}

impl Observer for Sight {
    fn handshake(&self, record: &HandshakeRecord) {
        self.metrics.handshake(record);
    }
    fn decision(&self, direction: Direction, decision: &Decision) {
        self.metrics.decision(direction, decision);
    }
    fn opened(&self, direction: Direction, carries: Carries) {
        self.metrics.opened(direction, carries);
    }
    fn moved(&self, direction: Direction, carries: Carries, sent: u64, received: u64) {
        self.metrics.moved(direction, carries, sent, received);
    }
    fn closed(&self, record: &ConnectionRecord) {
        self.metrics.closed(record);
        if self.access_log.load(Ordering::Relaxed) {
            access::connection(record);
        }
    }
    fn event(&self, direction: Direction, listener: &Arc<str>, event: Event) {
        self.metrics.event(direction, listener, event);
    }
    fn request_begun(&self, direction: Direction) {
        self.metrics.request_begun(direction);
    }
    fn request(&self, record: &RequestRecord) {
        self.metrics.request(record);
        if self.access_log.load(Ordering::Relaxed) {
            access::request(record);
        }
        if let Some(traces) = &self.traces {
            traces.send(record);
        }
    }
    fn accept_failed(&self, _listener: &str, kind: &'static str) {
        self.metrics.accept_failed(kind);
    }
}

impl Node {
    /// Starts everything, on sockets that were `inherited` where there are such, and seals the `sandbox` before anything can
    /// be served. The listeners are bound when this returns; they serve once an identity has come.
    ///
    /// # Errors
    /// An address cannot be bound, the profile cannot be had, or the sandbox that the config requires; in words.
    pub async fn start(
        config: Config,
        source: Box<dyn Source>,
        clock: Clock,
        traffic: Handle,
        mut inherited: Inherited,
        mut sandbox: Sandbox,
        acceleration: Acceleration,
    ) -> Result<Self, String> {
        let readiness = Readiness::default();
        let waiting = readiness.wait_for("identity");
        let required = config.intercept.as_ref().is_some_and(|intercept| intercept.require_interception);
        let gate = interception::Gate::new(readiness.clone(), required);
        let server = match inherited.claim_tcp(config.admin.listen).map_err(|error| error.to_string())? {
            Some(listener) => Server::from_listener(listener),
            None => Server::bind(config.admin.listen).await,
        };
        let server = server.map_err(|error| error.to_string())?;
        let admin = server.local_addr();
        let options = KeeperOptions::from_config(&config.identity, config.tls.svid_keys);
        let (keeper, current) = Keeper::new(options, clock.clone());
        let profile = Profile::from_config(&config.tls).map_err(|error| error.to_string())?;
        let metrics = Metrics::new(&config.labels, config.telemetry.max_peers, profile.fips())
            .map_err(|error| format!("the metrics cannot be set up: {error}"))?;
        let traces = config.telemetry.traces.as_ref();
        let traces = traces.map(|declared| metrics.traces(declared, &config.labels)).transpose()?;
        let sight = Arc::new(Sight { metrics, access_log: config.telemetry.access_log.into(), traces });
        let observer = Arc::clone(&sight) as Arc<dyn Observer>;
        let register = {
            let sight = Arc::clone(&sight);
            Arc::new(Register::new(clock.clone(), move |kind, stands| sight.metrics.drift(kind, stands)))
        };
        let proxy = Proxy::start(config, current.clone(), observer, clock.clone(), traffic.clone(), &mut inherited);
        let proxy = proxy.map_err(|error| error.to_string())?;
        inherited.close_rest();
        // Without an identity, which the keeper is not looking for yet, nothing is served.
        sandbox.seal()?;
        let sandbox = Arc::new(sandbox);
        let mut tasks = JoinSet::new();
        tasks.spawn(keeper.run(source));
        tasks.spawn(Arc::clone(&proxy).follow());
        tasks.spawn(watch_identity(current.clone(), Arc::clone(&sight)));
        tasks.spawn(watch_serving(proxy.serving(), current, readiness.clone(), waiting));
        let (seen, last) = watch::channel(None);
        tasks.spawn(interception::watch(Arc::clone(&proxy), Arc::clone(&register), gate, clock, seen));
        tasks.spawn(server.run(Sources {
            readiness: readiness.clone(),
            metrics: {
                let (sight, proxy) = (Arc::clone(&sight), Arc::clone(&proxy));
                Box::new(move || {
                    sight.metrics.chain_memory(proxy.chain_memory());
                    sight.metrics.handshakes_in_progress(proxy.handshakes_in_progress());
                    sight.metrics.render()
                })
            },
            state: {
                let (proxy, readiness, sandbox) = (Arc::clone(&proxy), readiness.clone(), Arc::clone(&sandbox));
                Box::new(move || {
                    let mut state = state(&proxy, &readiness, &sandbox);
                    if let Some(fields) = state.as_object_mut() {
                        fields.insert("acceleration".into(), acceleration.report());
                        fields.insert("drift".into(), json!(register.standing()));
                        fields.insert("interception".into(), interception::state(&last.borrow()));
                    }
                    state
                })
            },
            alive: {
                let pulse = Pulse::new(traffic);
                Box::new(move || Box::pin(pulse.clone().alive()))
            },
        }));
        Ok(Self { proxy, sight, sandbox, readiness, admin, _tasks: tasks })
    }

    /// The proxy.
    pub fn proxy(&self) -> &Arc<Proxy> {
        &self.proxy
    }

    /// What is waited for.
    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    /// The admin address, with the real port.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// The metrics' text.
    pub fn metrics(&self) -> String {
        self.sight.metrics.render().1
    }

    /// Sends the spans that still wait, as far as that is done in five seconds. For the end, after a drain.
    pub async fn flush(&self) {
        if let Some(traces) = &self.sight.traces {
            traces.flush().await;
        }
    }

    /// Takes a changed config, or says why not; then the old one goes on.
    ///
    /// # Errors
    /// What cannot be changed while running, or cannot be had; in words.
    pub fn reload(&self, config: Config) -> Result<(), String> {
        let before = self.proxy.config();
        let fixed = [
            ("identity", before.identity == config.identity),
            ("labels", before.labels == config.labels),
            ("admin", before.admin == config.admin),
            ("intercept", before.intercept == config.intercept),
            ("threads", before.threads == config.threads),
            ("sandbox", before.sandbox == config.sandbox),
            ("accelerate", before.accelerate == config.accelerate),
            ("tls.svid_keys", before.tls.svid_keys == config.tls.svid_keys),
            ("telemetry.max_peers", before.telemetry.max_peers == config.telemetry.max_peers),
            ("telemetry.traces", before.telemetry.traces == config.telemetry.traces),
            ("telemetry.log_format", before.telemetry.log_format == config.telemetry.log_format),
        ];
        let changed: Vec<_> = fixed.iter().filter(|(_, same)| !same).map(|(key, _)| *key).collect();
        let outcome = if changed.is_empty() {
            let access_log = config.telemetry.access_log;
            let permitted = self.sandbox.permits(&config).map_err(super::ApplyError);
            let applied = permitted.and_then(|()| self.proxy.apply(config));
            applied.map(|()| self.sight.access_log.store(access_log, Ordering::Relaxed))
        } else {
            let keys = changed.join(", ");
            Err(super::ApplyError(format!("{keys}: cannot be changed while running; restart to change it")))
        };
        self.sight.metrics.reloaded(outcome.is_ok());
        outcome.map_err(|error| error.to_string())
    }

    /// Counts a reload that failed before it came this far.
    pub fn reload_failed(&self) {
        self.sight.metrics.reloaded(false);
    }
}

/// Tells the metrics of every change of the identity.
async fn watch_identity(mut current: watch::Receiver<Current>, sight: Arc<Sight>) {
    loop {
        sight.metrics.identity(&current.borrow_and_update());
        if current.changed().await.is_err() {
            return;
        }
    }
}

/// Ready means that a connection is served, not that an identity is on its way to the listeners.
async fn watch_serving(
    mut serving: watch::Receiver<bool>,
    mut current: watch::Receiver<Current>,
    readiness: Readiness,
    waiting: crate::admin::Token,
) {
    let mut waiting = Some(waiting);
    loop {
        match (*serving.borrow_and_update(), waiting.is_some()) {
            (true, true) => waiting = None,
            (false, false) => waiting = Some(readiness.wait_for("identity")),
            _ => {}
        }
        {
            // Looked at even when nobody waits, or it would count as changed for ever.
            let now = current.borrow_and_update();
            if let Some(token) = &waiting {
                token.because(now.why.as_str());
            }
        }
        let changed = tokio::select! {
            changed = serving.changed() => changed,
            changed = current.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

/// The JSON of `/state`.
fn state(proxy: &Proxy, readiness: &Readiness, sandbox: &Sandbox) -> Value {
    let current = proxy.current();
    let profile = proxy.profile();
    let identity = current.identity.as_ref();
    let bundles: Vec<Value> = identity
        .map(|identity| {
            let domain = |(name, authorities): (&crate::identity::TrustDomain, &[crate::identity::Authority])| {
                json!({
                    "trust_domain": name.as_str(),
                    "authorities": authorities.iter().map(|a| json!({ "not_after": a.not_after })).collect::<Vec<_>>(),
                })
            };
            identity.bundles.iter().map(domain).collect()
        })
        .unwrap_or_default();
    let connections: Vec<Value> = proxy
        .registry()
        .snapshot(LISTED)
        .iter()
        .map(|entry| {
            json!({
                "listener": &*entry.listener,
                "direction": entry.direction,
                "client": entry.client.to_string(),
                "peer": entry.peer().map(|peer| peer.id().as_str()),
                "plaintext": entry.is_unproven(),
                "peer_not_after": entry.peer().map(|peer| peer.not_after()),
                "open_seconds": entry.opened.elapsed().as_secs(),
            })
        })
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "ready": readiness.waiting_for().is_empty(),
        "waiting_for": readiness.waiting_for(),
        "profile": {
            "cipher_suites": profile.suites(),
            "groups": profile.groups(),
            "svid_keys": profile.keys(),
            "resumption": profile.resumption,
            "fips": profile.fips(),
        },
        "identity": {
            "state": current.state,
            "why": current.why,
            "since": current.since,
            "generation": current.generation,
            "spiffe_id": identity.map(|identity| identity.svid.id().as_str()),
            "serial": identity.map(|identity| identity.svid.facts().serial.as_str()),
            "key_type": identity.map(|identity| identity.svid.facts().key_type.as_str()),
            "not_after": current.not_after,
            "rotation_overdue": current.rotation_overdue,
            "source_reachable": current.source_reachable,
            "refused": current.refused,
            "counters": current.counters,
        },
        "bundles": bundles,
        "listeners": proxy.listeners(),
        "sandbox": sandbox.report(),
        "plaintext": proxy.plaintext(),
        "connections": { "open": proxy.registry().len(), "listed": connections },
        "config": proxy.config(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::listener::Client;
    use crate::proxy::record::{HttpVersion, RequestCause, TraceContext};
    use std::time::{Duration, SystemTime};

    #[test]
    fn a_request_is_seen_in_every_way_that_is_configured() {
        let hole = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let text = format!(
            "identity: unix:///a\ninbound: [{{name: api, listen: '127.0.0.1:0', to: '127.0.0.1:1', allow: ['spiffe://td']}}]\n\
             telemetry: {{traces: {{endpoint: 'http://{}', queue: 1, max_batch: 1}}}}",
            hole.local_addr().unwrap()
        );
        let config = crate::config::parse(&text, "f.yaml").unwrap().config;
        let metrics = Metrics::new(&config.labels, 10, false).unwrap();
        let traces = metrics.traces(config.telemetry.traces.as_ref().unwrap(), &config.labels).unwrap();
        let sight = Sight { metrics, access_log: false.into(), traces: Some(traces) };
        let record = RequestRecord {
            listener: "api".into(),
            direction: Direction::Inbound,
            client: Client::Unix,
            peer: None,
            local: None,
            tls: None,
            upstream: None,
            rule: None,
            route: "*".into(),
            method: http::Method::GET,
            host: "".into(),
            path: "/".into(),
            version: HttpVersion::Http11,
            status: Some(200),
            grpc_status: None,
            bytes_sent: 0,
            bytes_received: 0,
            began: SystemTime::UNIX_EPOCH,
            duration: Duration::ZERO,
            attempts: 1,
            cause: RequestCause::Done,
            detail: String::new(),
            trace: Some(TraceContext { trace_id: [1; 16], span_id: [1; 8], parent: None, sampled: true }),
        };
        let observer: &dyn Observer = &sight;
        for _ in 0..10 {
            observer.request_begun(Direction::Inbound);
            observer.request(&record);
        }
        observer.event(Direction::Outbound, &"api".into(), Event::Retried);
        let text = sight.metrics.render().1;
        let value = |name: &str, has: &str| {
            let line = text.lines().find(|line| line.starts_with(name) && line.contains(has)).unwrap();
            line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
        };
        assert_eq!(value("portcullis_http_requests_total", "status_class=\"2xx\""), 10.0);
        assert_eq!(value("portcullis_http_requests_in_flight", "inbound"), 0.0);
        assert_eq!(value("portcullis_http_retries_total", "sent"), 1.0);
        // One is on its way, one waits.
        assert!(value("portcullis_spans_dropped_total", "queue_full") >= 8.0);
    }
}
