//! Who we are and whom we trust.
//!
//! Owns SPIFFE IDs, X509-SVIDs, trust bundles, the sources they come from and the keeper that holds the one current
//! [`Identity`]. In: what a [`source::Source`] yields. Out: a `watch` of [`keeper::Current`], from which the `tls` room
//! builds its configurations. Private keys live here and in rustls signing keys, nowhere else.

pub mod bundle;
pub mod chain;
pub mod choice;
pub mod crl;
mod current;
pub mod files;
mod held;
pub mod keeper;
pub mod source;
pub mod spiffe_id;
pub mod svid;
mod watched;
pub mod workload_api;

use std::sync::Arc;

pub use bundle::{Authority, TrustBundles};
pub use spiffe_id::{SpiffeId, SpiffeIdError, TrustDomain};
pub use svid::{KeyType, Svid, SvidError};

/// The one current identity: our SVID and the bundles that others are judged by. Immutable; a change makes a new one.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Our own SVID.
    pub svid: Arc<Svid>,
    /// The trust bundles, each domain by itself, with the revocation lists.
    pub bundles: Arc<TrustBundles>,
    /// Counts up by one with every change of SVID, bundles or revocation lists.
    pub generation: u64,
}
