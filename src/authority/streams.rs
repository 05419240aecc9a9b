//! What a caller is told and when: the Workload API's streams.
//!
//! In: who calls, the entries, what the authority publishes. Out: full sets, pushed whenever something in them changes.
//! A stream holds at most one message that its reader has not taken; a reader that takes none for long is let go.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::attest::{Caller, Peer};
use super::config::Entry;
use super::{Authority, AuthorityError, IssuedSvid, Published, SvidRequest};
use crate::identity::workload_api::pb::{X509BundlesResponse, X509Svid, X509SvidResponse};
use crate::identity::workload_api::{MAX_SVIDS, der};

/// How long a reader may leave a message lying before its stream is ended.
const SLOW_READER: Duration = Duration::from_secs(60);
/// How often a stream looks at the wall clock and at whether its caller still lives.
const LOOK: Duration = Duration::from_secs(5);
/// The most streams that are open at once.
pub(super) const MAX_STREAMS: usize = 4096;

/// The stream that tonic sends.
pub(super) type Pushed<T> = ReceiverStream<Result<T, Status>>;

/// What all streams share.
#[derive(Debug)]
pub(super) struct Desk {
    authority: Authority,
    entries: watch::Sender<Arc<[Entry]>>,
    issued: Mutex<HashMap<SvidRequest, Arc<IssuedSvid>>>,
    streams: Arc<Semaphore>,
}

/// What a caller is entitled to at one moment.
pub(super) struct Entitled {
    svids: Vec<Arc<IssuedSvid>>,
    published: Arc<Published>,
}

impl Desk {
    pub(super) fn new(authority: Authority, entries: Vec<Entry>) -> Self {
        Self {
            authority,
            entries: watch::Sender::new(entries.into()),
            issued: Mutex::default(),
            streams: Arc::new(Semaphore::new(MAX_STREAMS)),
        }
    }

    /// Replaces the entries; open streams are told at once.
    pub(super) fn set_entries(&self, entries: Vec<Entry>) {
        let wanted: HashSet<_> = entries.iter().map(Entry::request).collect();
        self.lock().retain(|request, _| wanted.contains(request));
        self.entries.send_replace(entries.into());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<SvidRequest, Arc<IssuedSvid>>> {
        self.issued.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The SVID of an entry, a new one if there is none that is good. All callers of an entry share it, as with SPIRE.
    fn svid(&self, request: &SvidRequest, published: &Published) -> Result<Arc<IssuedSvid>, AuthorityError> {
        let now = self.authority.clock().now();
        let mut issued = self.lock();
        if let Some(svid) = issued.get(request).filter(|s| !s.due(now) && !published.disowns(s)) {
            return Ok(Arc::clone(svid));
        }
        let svid = Arc::new(self.authority.issue(request)?);
        issued.insert(request.clone(), Arc::clone(&svid));
        Ok(svid)
    }

    /// The entries that fit a caller, in order. Of several with one hint the first counts, as with SPIRE.
    fn fitting(entries: &[Entry], caller: &Caller) -> Vec<SvidRequest> {
        let mut hints = HashSet::new();
        let mut fitting: Vec<SvidRequest> = Vec::new();
        for entry in entries.iter().filter(|e| e.selectors.fit(caller)) {
            let request = entry.request();
            if request.hint.as_ref().is_some_and(|hint| !hints.insert(hint.clone())) || fitting.contains(&request) {
                continue;
            }
            if fitting.len() >= MAX_SVIDS {
                tracing::warn!(%caller, "more than {MAX_SVIDS} entries fit a caller; the rest is left out");
                break;
            }
            fitting.push(request);
        }
        fitting
    }

    fn entitled(&self, peer: &Peer, entries: &[Entry], published: Arc<Published>) -> Result<Entitled, Status> {
        let caller = peer.attest().map_err(|_| Status::permission_denied("the caller is gone"))?;
        let requests = Self::fitting(entries, &caller);
        if requests.is_empty() {
            tracing::debug!(%caller, "no entry fits a caller");
            // SPIRE's words, which people search for.
            return Err(Status::permission_denied("no identity issued"));
        }
        let svids =
            requests.iter().map(|request| self.svid(request, &published)).collect::<Result<Vec<_>, _>>().map_err(
                |error| {
                    tracing::error!(%error, %caller, "an SVID cannot be issued");
                    Status::unavailable("no SVID can be issued at the moment")
                },
            )?;
        Ok(Entitled { svids, published })
    }

    /// Opens a stream whose messages `compose` makes.
    pub(super) fn open<T: Send + 'static>(
        self: &Arc<Self>,
        peer: Peer,
        compose: impl Composer<T>,
    ) -> Result<Pushed<T>, Status> {
        let permit = Arc::clone(&self.streams)
            .try_acquire_owned()
            .map_err(|_| Status::resource_exhausted("too many streams are open"))?;
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(Arc::clone(self).push(peer, compose, sender, permit));
        Ok(ReceiverStream::new(receiver))
    }

    async fn push<T: Send + 'static>(
        self: Arc<Self>,
        peer: Peer,
        mut compose: impl Composer<T>,
        sender: mpsc::Sender<Result<T, Status>>,
        _permit: OwnedSemaphorePermit,
    ) {
        let mut entries = self.entries.subscribe();
        let mut published = self.authority.subscribe();
        loop {
            // Room first and the message second, so that what is sent is never older than the reader's readiness.
            let Ok(Ok(room)) = tokio::time::timeout(SLOW_READER, sender.reserve()).await else {
                return;
            };
            let current = entries.borrow_and_update().clone();
            let view = published.borrow_and_update().clone();
            let wake = match self.entitled(&peer, &current, view) {
                Ok(entitled) => {
                    let wake = entitled.svids.iter().map(|s| s.renew_at()).min();
                    match compose.message(&entitled) {
                        Some(message) => room.send(Ok(message)),
                        None => drop(room),
                    }
                    wake.unwrap_or_else(Instant::now).min(Instant::now() + LOOK)
                }
                Err(status) => {
                    room.send(Err(status));
                    return;
                }
            };
            tokio::select! {
                () = tokio::time::sleep_until(wake) => {}
                _ = entries.changed() => {}
                _ = published.changed() => {}
                () = sender.closed() => return,
            }
        }
    }
}

/// Makes a stream's messages; nothing if there is nothing new.
pub(super) trait Composer<T>: Send + 'static {
    fn message(&mut self, entitled: &Entitled) -> Option<T>;
}

/// Composes `FetchX509SVID`.
#[derive(Default)]
pub(super) struct Svids {
    told: Option<(Vec<Arc<IssuedSvid>>, u64)>,
}

impl Composer<X509SvidResponse> for Svids {
    fn message(&mut self, entitled: &Entitled) -> Option<X509SvidResponse> {
        let generation = entitled.published.generation;
        let same = |told: &[Arc<IssuedSvid>]| {
            told.len() == entitled.svids.len() && told.iter().zip(&entitled.svids).all(|(a, b)| Arc::ptr_eq(a, b))
        };
        if self.told.as_ref().is_some_and(|(told, g)| *g == generation && same(told)) {
            return None;
        }
        let own = der::join(entitled.published.own_authorities());
        let mut response = X509SvidResponse::default();
        for issued in &entitled.svids {
            let mut svid = X509Svid::default();
            svid.spiffe_id = issued.id().as_str().to_owned();
            svid.x509_svid = der::join(issued.chain());
            svid.x509_svid_key = issued.key_pkcs8().to_vec();
            svid.bundle.clone_from(&own);
            svid.hint = issued.hint().unwrap_or_default().to_owned();
            response.svids.push(svid);
        }
        response.federated_bundles = bundles(&entitled.published);
        if let Some(first) = entitled.svids.first() {
            response.federated_bundles.remove(&format!("spiffe://{}", first.id().trust_domain_name()));
        }
        self.told = Some((entitled.svids.clone(), generation));
        Some(response)
    }
}

/// Composes `FetchX509Bundles`.
#[derive(Default)]
pub(super) struct Bundles {
    told: Option<u64>,
}

impl Composer<X509BundlesResponse> for Bundles {
    fn message(&mut self, entitled: &Entitled) -> Option<X509BundlesResponse> {
        let generation = entitled.published.generation;
        if self.told.replace(generation) == Some(generation) {
            return None;
        }
        Some(X509BundlesResponse { crl: Vec::new(), bundles: bundles(&entitled.published) })
    }
}

/// All bundles, ours among them, by the trust domain's SPIFFE ID.
fn bundles(published: &Published) -> BTreeMap<String, Vec<u8>> {
    let row = |ders: &mut dyn Iterator<Item = &CertificateDer<'static>>| der::join(ders);
    published
        .bundles
        .iter()
        .map(|(domain, authorities)| {
            (format!("spiffe://{}", domain.as_str()), row(&mut authorities.iter().map(|a| &a.der)))
        })
        .collect()
}
