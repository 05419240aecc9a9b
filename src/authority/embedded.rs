//! The embedded authority as a source of identities for our own proxy: nothing to set up, nothing over a wire.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::federation::{self, Federated, Place};
use super::{Authority, AuthorityError, IssuedSvid, Options, Published, SvidRequest};
use crate::clock::Clock;
use crate::config::schema::EmbeddedIdentity;
use crate::identity::TrustDomain;
use crate::identity::source::{Event, Source, Update};

/// How often the authority is asked whether the time of day wants something, and after how long a failure is tried
/// again.
const TICK: Duration = Duration::from_secs(1);

/// A [`Source`] that has an authority in the same process issue one SPIFFE ID.
#[derive(Debug)]
pub struct EmbeddedSource {
    authority: Authority,
    request: SvidRequest,
    published: watch::Receiver<Arc<Published>>,
    current: Option<IssuedSvid>,
    /// The generation that was yielded last.
    yielded: u64,
    /// Not before this moment after a failure.
    retry: Option<Instant>,
    /// Foreign trust domains, and the tasks that keep them up to date, which run from the first call of `next` on.
    places: BTreeMap<TrustDomain, Place>,
    federated: Option<Federated>,
}

impl EmbeddedSource {
    /// A source for one ID of an authority.
    ///
    /// # Errors
    /// A request that the authority would refuse.
    pub fn new(authority: Authority, request: SvidRequest) -> Result<Self, AuthorityError> {
        authority.check_request(&request)?;
        let published = authority.subscribe();
        Ok(Self {
            authority,
            request,
            published,
            current: None,
            yielded: 0,
            retry: None,
            places: BTreeMap::new(),
            federated: None,
        })
    }

    /// Opens the authority that a config declares and makes a source for its one ID.
    ///
    /// # Errors
    /// See [`Authority::open`] and [`EmbeddedSource::new`].
    pub fn from_config(config: &EmbeddedIdentity, clock: Clock) -> Result<Self, AuthorityError> {
        let mut options = Options::new(config.spiffe_id.trust_domain());
        options.svid_ttl = config.svid_ttl.0;
        options.state_dir.clone_from(&config.state_dir);
        let places = config
            .federates_with
            .iter()
            .map(|(domain, text)| Ok((domain.clone(), Place::parse(text)?)))
            .collect::<Result<BTreeMap<_, _>, String>>()
            .map_err(|why| AuthorityError::Invalid(format!("federates_with: {why}")))?;
        let authority = Authority::open(options, clock)?;
        federation::load_files(&authority, &places);
        let source = Self::new(authority, SvidRequest::new(config.spiffe_id.clone()))?;
        Ok(Self { places, ..source })
    }

    /// The authority behind it, for rotation by hand.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// The next event if there is one now; otherwise until when to wait.
    fn step(&mut self) -> Result<Event, Instant> {
        if let Some(retry) = self.retry {
            if Instant::now() < retry {
                return Err(retry);
            }
            self.retry = None;
        }
        if let Err(error) = self.authority.maintain() {
            // What is in memory goes on; if its CA runs out, issuing fails and says so.
            tracing::warn!(%error, "the embedded authority cannot be maintained");
        }
        let published = self.published.borrow_and_update().clone();
        let now = self.authority.clock().now();
        let good = self.current.as_ref().filter(|svid| !svid.due(now) && !published.disowns(svid));
        if let Some(svid) = good
            && self.yielded == published.generation
        {
            return Err(svid.renew_at().min(Instant::now() + TICK));
        }
        let svid = match good {
            Some(svid) => svid,
            None => match self.authority.issue(&self.request) {
                Ok(issued) => self.current.insert(issued),
                Err(error) => return Ok(self.failed(&error)),
            },
        };
        match svid.to_svid() {
            Ok(svid) => {
                self.yielded = published.generation;
                Ok(Event::Update(Update {
                    svids: vec![svid],
                    bundles: published.bundles.clone(),
                    crls: Vec::new(),
                    refused: Vec::new(),
                }))
            }
            Err(error) => Ok(self.failed(&error)),
        }
    }

    fn failed(&mut self, error: &dyn std::error::Error) -> Event {
        self.retry = Some(Instant::now() + TICK);
        Event::Unavailable { why: format!("the embedded authority issues no SVID: {error}") }
    }
}

impl Source for EmbeddedSource {
    fn name(&self) -> &'static str {
        "authority"
    }

    fn next(&mut self) -> Pin<Box<dyn Future<Output = Event> + Send + '_>> {
        Box::pin(async move {
            if self.federated.is_none() && !self.places.is_empty() {
                self.federated = Some(federation::watch(&self.authority, &self.places));
            }
            loop {
                match self.step() {
                    Ok(event) => return event,
                    Err(until) => {
                        tokio::select! {
                            () = tokio::time::sleep_until(until) => {}
                            // The sender lives in `self.authority`, so this never fails at once for ever.
                            _ = self.published.changed() => {}
                        }
                    }
                }
            }
        })
    }
}
