//! Where requests are sent: an upstream's addresses, their connections, and which of them a request gets.
//!
//! A pool belongs to one state of its listener, so what is in it is of one upstream, one generation of our SVID and one
//! set of expected peers; it is retired when that state is swapped. In: a request and what it needs. Out: a connection
//! lent to it, and the upstream's answer.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::Semaphore;

use super::budget::Budget;
use super::dial;
use super::endpoint::{At, Endpoint, Lease, Speaks, Taken};
use crate::config::schema::{Connections, OutboundHttp};
use crate::policy::Expected;
use crate::proxy::dialer::Dialer;
use crate::proxy::listener::Shared;
use crate::proxy::record::{Event, RequestCause};
use crate::proxy::upstream::{HostPort, Target};
use crate::tls::record::Direction;
use crate::tls::{ClientTls, Profile};

/// How long a list of addresses is used before the names are resolved again.
const RESOLVED_FOR: Duration = Duration::from_secs(10);
/// Requests on one HTTP/2 connection before another one is opened.
const FULL: usize = 100;
/// How long the workload may take to accept.
pub(in crate::proxy) const WORKLOAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How often idle connections are looked at.
const SWEEP: Duration = Duration::from_secs(15);

/// What a request needs of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// For a request of HTTP/1.
    Http1,
    /// For a request of HTTP/2.
    Http2,
    /// An HTTP/1 connection that will become a tunnel.
    Tunnel,
}

/// Where a pool's connections lead.
#[derive(Debug)]
pub(super) enum Route {
    /// In plaintext to the workload.
    Workload { target: Target, dialer: Dialer, connect_timeout: Duration },
    /// Through the gate to an upstream.
    Mesh(Box<Mesh>),
}

/// What a mesh upstream is dialled with.
#[derive(Debug)]
pub struct Mesh {
    /// As declared; requests are spread over all their addresses.
    pub hosts: Vec<HostPort>,
    /// Prebuilt TLS; none while there is no identity that may be used.
    pub tls: Option<Arc<ClientTls>>,
    /// Whom we expect there.
    pub expected: Arc<Expected>,
    /// The profile.
    pub profile: Arc<Profile>,
    /// Places for handshakes.
    pub slots: Arc<Semaphore>,
    /// Limits and timeouts.
    pub limits: Connections,
    /// How its addresses are dialled.
    pub dialer: Dialer,
    /// How long one address may take to accept.
    pub connect_timeout: Duration,
}

/// Why a request got no answer from an upstream.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) cause: RequestCause,
    pub(super) detail: String,
    /// The pool was retired meanwhile; its successor may serve.
    pub(super) retired: bool,
    /// The connection had served before and was closed by the other side.
    pub(super) stale: bool,
    /// The other side said that it has not processed the request (RFC 9113, section 8.7).
    pub(super) refused: bool,
}

impl Failed {
    pub(super) fn new(cause: RequestCause, detail: impl Into<String>) -> Self {
        Self { cause, detail: detail.into(), retired: false, stale: false, refused: false }
    }

    pub(super) fn unreachable(error: &io::Error, detail: String) -> Self {
        let timed_out = error.kind() == io::ErrorKind::TimedOut;
        Self::new(if timed_out { RequestCause::Timeout } else { RequestCause::Unreachable }, detail)
    }

    /// The time that its caller gives it is over.
    pub(super) fn out_of_time() -> Self {
        Self::new(RequestCause::Timeout, "no answer within the request's time")
    }

    /// Whether the address is not to blame.
    pub(super) fn blameless(&self) -> bool {
        let own = matches!(
            self.cause,
            RequestCause::BadRequest
                | RequestCause::PolicyChanged
                | RequestCause::ConnectionEnded
                | RequestCause::Overloaded
                | RequestCause::ClientReset
        );
        own || self.retired || self.stale
    }

    /// Whether another try could end better.
    pub(super) fn worth_retry(&self) -> bool {
        matches!(self.cause, RequestCause::Unreachable | RequestCause::UpstreamReset) || self.retired
    }

    pub(super) fn retired() -> Self {
        Self { retired: true, ..Self::new(RequestCause::Unreachable, "the upstream's configuration changed") }
    }
}

/// An upstream.
#[derive(Debug)]
pub struct Pool {
    pub(super) shared: Arc<Shared>,
    pub(super) listener: Arc<str>,
    pub(super) route: Route,
    pub(super) options: OutboundHttp,
    /// As declared, for records.
    pub(super) name: Arc<str>,
    pub(super) budget: Budget,
    endpoints: ArcSwap<Vec<Arc<Endpoint>>>,
    resolved: Mutex<Option<Instant>>,
    resolving: tokio::sync::Mutex<()>,
    retired: AtomicBool,
}

impl Pool {
    /// For requests to the workload.
    pub fn workload(shared: &Arc<Shared>, listener: &str, target: Target, dialer: Dialer) -> Arc<Self> {
        let name = target.to_string();
        let options = OutboundHttp {
            max_http1_connections: 4096,
            retries: crate::config::schema::Retries { attempts: 1, ..Default::default() },
            // There is one address: to eject it would be to close the listener.
            eject_after: u32::MAX,
            ..Default::default()
        };
        let route = Route::Workload { target, dialer, connect_timeout: WORKLOAD_TIMEOUT };
        let pool = Self::new(shared, listener, route, options, &name);
        pool.endpoints.store(Arc::new(vec![Arc::new(Endpoint::new(At::Workload, pool.options.max_http1_connections))]));
        pool
    }

    /// For requests to a mesh upstream.
    pub fn mesh(shared: &Arc<Shared>, listener: &str, mesh: Mesh, options: OutboundHttp) -> Arc<Self> {
        let names: Vec<&str> = mesh.hosts.iter().map(HostPort::as_str).collect();
        let name = names.join(", ");
        Self::new(shared, listener, Route::Mesh(Box::new(mesh)), options, &name)
    }

    fn new(shared: &Arc<Shared>, listener: &str, route: Route, options: OutboundHttp, name: &str) -> Arc<Self> {
        let pool = Arc::new(Self {
            shared: Arc::clone(shared),
            listener: listener.into(),
            route,
            budget: Budget::new(options.retries.budget),
            options,
            name: name.into(),
            endpoints: ArcSwap::default(),
            resolved: Mutex::default(),
            resolving: tokio::sync::Mutex::new(()),
            retired: AtomicBool::new(false),
        });
        let swept = Arc::downgrade(&pool);
        if tokio::runtime::Handle::try_current().is_ok() {
            tokio::spawn(async move {
                loop {
                    tokio::time::sleep(SWEEP).await;
                    let Some(pool) = swept.upgrade() else { return };
                    pool.endpoints.load().iter().for_each(|endpoint| endpoint.sweep());
                }
            });
        }
        pool
    }

    /// Whether the connections that HTTP/1 requests get are plaintext ones to the workload.
    pub(super) fn is_workload(&self) -> bool {
        matches!(self.route, Route::Workload { .. })
    }

    /// No new connection comes out of it, and those that are idle are closed. Called when its listener's state is
    /// swapped, before live connections are judged again.
    pub(in crate::proxy) fn retire(&self) {
        self.retired.store(true, Ordering::SeqCst);
        self.endpoints.store(Arc::default());
    }

    pub(super) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::SeqCst)
    }

    /// The addresses, resolved anew when the list is old. A stale list serves on while that is under way.
    async fn endpoints(self: &Arc<Self>) -> Result<Arc<Vec<Arc<Endpoint>>>, Failed> {
        let Route::Mesh(mesh) = &self.route else { return Ok(self.endpoints.load_full()) };
        let resolved = *self.resolved.lock().unwrap_or_else(PoisonError::into_inner);
        match resolved {
            Some(at) if at.elapsed() < RESOLVED_FOR => {}
            Some(_) => {
                let pool = Arc::clone(self);
                // Said before it is done, so that one request starts it and not all.
                *self.resolved.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                tokio::spawn(async move {
                    if let Route::Mesh(mesh) = &pool.route {
                        let _ = pool.resolve(mesh).await;
                    }
                });
            }
            None => {
                let _one = self.resolving.lock().await;
                if self.endpoints.load().is_empty() {
                    self.resolve(mesh).await?;
                }
            }
        }
        Ok(self.endpoints.load_full())
    }

    async fn resolve(&self, mesh: &Mesh) -> Result<(), Failed> {
        let mut found: Vec<At> = Vec::new();
        let mut why = Failed::new(RequestCause::Unreachable, "the name has no address");
        for host in &mesh.hosts {
            match host.resolve(mesh.connect_timeout).await {
                Ok(addresses) => {
                    for address in addresses {
                        let at = At::Address(address, host.server_name());
                        if !found.contains(&at) {
                            found.push(at);
                        }
                    }
                }
                Err(error) => why = Failed::unreachable(&error, format!("{}: {error}", host.as_str())),
            }
        }
        if found.is_empty() {
            return Err(why);
        }
        let before = self.endpoints.load_full();
        let list: Vec<Arc<Endpoint>> = found
            .into_iter()
            .map(|at| {
                let known = before.iter().find(|endpoint| endpoint.at == at);
                known.map_or_else(|| Arc::new(Endpoint::new(at, self.options.max_http1_connections)), Arc::clone)
            })
            .collect();
        if !self.is_retired() {
            self.endpoints.store(Arc::new(list));
        }
        *self.resolved.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        Ok(())
    }

    /// The address for the next request: of two taken at random the one with fewer requests under way. Ejected ones are
    /// passed over as long as there are others, and so is the one that just failed.
    pub(super) async fn pick(self: &Arc<Self>, not: Option<&Arc<Endpoint>>) -> Result<Arc<Endpoint>, Failed> {
        let all = self.endpoints().await?;
        if self.is_retired() {
            return Err(Failed::retired());
        }
        choose(&all, not)
    }

    /// [`Pool::pick`] where nothing need be waited for; none where something must.
    pub(super) fn pick_now(&self, not: Option<&Arc<Endpoint>>) -> Option<Arc<Endpoint>> {
        if let Route::Mesh(_) = &self.route {
            let resolved = *self.resolved.lock().unwrap_or_else(PoisonError::into_inner);
            resolved.filter(|at| at.elapsed() < RESOLVED_FOR)?;
        }
        // A retired pool has none.
        choose(&self.endpoints.load(), not).ok()
    }

    /// A connection to this address that suits the request: one that is open, or a new one. A `fresh` one is no HTTP/1
    /// connection that has been idle: where one of those has gone stale, others have.
    pub(super) async fn lease(
        self: &Arc<Self>,
        endpoint: &Arc<Endpoint>,
        want: Want,
        fresh: bool,
    ) -> Result<Lease, Failed> {
        let shared = match want {
            Want::Tunnel => false,
            Want::Http2 => true,
            Want::Http1 => !self.is_workload() && endpoint.speaks() != Speaks::Plain,
        };
        loop {
            match self.open(endpoint, want, fresh) {
                Taken::Lease(lease) => return Ok(lease),
                Taken::None if !shared => return dial::dial(self, endpoint, want).await,
                Taken::None => {
                    // What comes of this dial serves many, so one dials and the others wait for it.
                    let _one = endpoint.dialling.lock().await;
                    match self.open(endpoint, want, fresh) {
                        Taken::Lease(lease) => return Ok(lease),
                        Taken::None => return dial::dial(self, endpoint, want).await,
                        Taken::Full => {}
                    }
                }
                Taken::Full => {
                    let mut freed = std::pin::pin!(endpoint.freed());
                    // Hears of what is freed from here on, also before it is waited for.
                    freed.as_mut().enable();
                    match self.open(endpoint, want, fresh) {
                        Taken::Lease(lease) => return Ok(lease),
                        Taken::None => {}
                        Taken::Full => freed.await,
                    }
                }
            }
        }
    }

    /// [`Pool::lease`] of a connection that is open.
    pub(super) fn lease_now(&self, endpoint: &Arc<Endpoint>, want: Want, fresh: bool) -> Option<Lease> {
        match self.open(endpoint, want, fresh) {
            Taken::Lease(lease) => Some(lease),
            Taken::None | Taken::Full => None,
        }
    }

    /// A connection that is open and has room.
    fn open(&self, endpoint: &Arc<Endpoint>, want: Want, fresh: bool) -> Taken {
        let (full, most) = (FULL, self.options.max_http2_connections);
        let idle = || if fresh { None } else { endpoint.take1() }.map_or(Taken::None, Taken::Lease);
        match want {
            Want::Tunnel => Taken::None,
            Want::Http2 => endpoint.take2(false, full, most),
            Want::Http1 if self.is_workload() => idle(),
            Want::Http1 => match endpoint.take2(true, full, most) {
                Taken::None => idle(),
                taken => taken,
            },
        }
    }

    /// Takes down how a request at this address went.
    pub(super) fn served(&self, endpoint: &Endpoint, well: bool) {
        let event = if well {
            endpoint.succeeded().then_some(Event::Restored)
        } else {
            let ejected = endpoint.failed(self.options.eject_after, self.options.eject_for.0);
            ejected.then_some(Event::Ejected)
        };
        if let Some(event) = event {
            self.shared.observer.event(Direction::Outbound, &self.listener, event);
        }
    }
}

/// Of two addresses taken at random the one with fewer requests under way.
fn choose(all: &[Arc<Endpoint>], not: Option<&Arc<Endpoint>>) -> Result<Arc<Endpoint>, Failed> {
    if let [only] = all {
        return Ok(Arc::clone(only));
    }
    let fit: Vec<&Arc<Endpoint>> =
        all.iter().filter(|endpoint| endpoint.fit() && not.is_none_or(|not| !Arc::ptr_eq(endpoint, not))).collect();
    // Where none is fit, any may be: better a doubtful address than none.
    let candidates = if fit.is_empty() { all.iter().collect() } else { fit };
    let first = fastrand::usize(..candidates.len().max(1));
    let second = (first + 1 + fastrand::usize(..candidates.len().saturating_sub(1).max(1))) % candidates.len().max(1);
    let chosen = match (candidates.get(first), candidates.get(second)) {
        (Some(a), Some(b)) if b.in_flight() < a.in_flight() => b,
        (Some(a), _) => a,
        _ => return Err(Failed::new(RequestCause::Unreachable, "the upstream has no address")),
    };
    Ok(Arc::clone(chosen))
}
