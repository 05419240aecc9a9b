//! Where identities come from: one narrow trait, three sources.
//!
//! A source yields whole sets, never differences. It never ends and never gives up: what goes wrong is an [`Event`],
//! and waiting and retrying are the source's own affair. Judging, choosing and keeping are the keeper's.

use std::future::Future;
use std::pin::Pin;

use rustls::pki_types::CertificateRevocationListDer;

use super::{Svid, TrustBundles};

/// A full set, as a source has it at one moment.
#[derive(Debug, Default)]
pub struct Update {
    /// All SVIDs, in the source's order. Those that break the specification are left out and named in `refused`.
    pub svids: Vec<Svid>,
    /// The bundles of all trust domains, the own one and the federated ones.
    pub bundles: TrustBundles,
    /// Revocation lists that came with the set (DER), to be joined with those from files.
    pub crls: Vec<CertificateRevocationListDer<'static>>,
    /// What was left out and why, in words for a log.
    pub refused: Vec<String>,
}

/// What a source has to say.
#[derive(Debug)]
pub enum Event {
    /// A full set, to take the place of the one before.
    Update(Update),
    /// The source cannot be reached or answers nonsense; what was there before stays until it expires. The source
    /// retries by itself.
    Unavailable {
        /// In words for a log: what was tried, what happened, what to look at.
        why: String,
    },
    /// The source is well and says that we have no identity (Workload API: PermissionDenied). It goes on asking.
    NoIdentity {
        /// In words for a log.
        why: String,
    },
}

/// A source of identities.
pub trait Source: Send + 'static {
    /// A word for logs and `/state`, such as `workload-api`.
    fn name(&self) -> &'static str;

    /// Waits for the next event. Cancel-safe: a dropped call loses no event that a later one would not repeat.
    fn next(&mut self) -> Pin<Box<dyn Future<Output = Event> + Send + '_>>;
}
