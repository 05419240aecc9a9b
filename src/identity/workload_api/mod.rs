//! The SPIFFE Workload API, as a source of identities.
//!
//! Owns the client ([`WorkloadApiSource`]), the address by which an agent is found ([`Address`]) and the protobuf
//! messages ([`pb`]), which our own authority's server uses as well. In: an agent's stream over a Unix socket or TCP.
//! Out: [`super::source::Event`]s. The messages are written by hand, so that a build needs no protobuf compiler and
//! revocation lists are not lost on the way.

mod address;
mod client;
pub mod der;
pub mod pb;
mod response;

pub use address::{Address, AddressError, ENDPOINT_VARIABLE};
pub use client::WorkloadApiSource;

/// The largest message that is accepted from an agent, in bytes; gRPC's usual limit.
pub const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;
/// The most SVIDs that are accepted in one message.
pub const MAX_SVIDS: usize = 100;
/// The most federated bundles that are accepted in one message.
pub const MAX_BUNDLES: usize = crate::identity::bundle::MAX_TRUST_DOMAINS;
/// The most revocation lists that are accepted in one message.
pub const MAX_CRLS: usize = 256;

#[cfg(test)]
mod tests;
