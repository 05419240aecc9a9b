//! How identity is proven.
//!
//! Owns everything that touches rustls: the profile, the verifiers with their memory of chains, tickets, the server and
//! client handshakes and the record that each leaves. In: [`crate::identity::Identity`], the declared profile and an
//! accepted socket. Out: an `Authenticated` connection and a [`record::HandshakeRecord`], or a refusal with a
//! [`reason::Reason`].

mod alpn;
pub mod client;
pub mod flight;
pub mod hello;
pub mod iana;
mod outcome;
mod probe;
pub mod profile;
mod read_ahead;
pub mod reason;
pub mod record;
pub mod server;
mod sessions;
pub mod tickets;
pub mod trust;
mod verifier;

pub use alpn::{Alpn, Offer};
pub use client::ClientTls;
pub use outcome::Authenticated;
pub use profile::Profile;
pub use read_ahead::ReadAhead;
pub use server::ServerTls;
pub use trust::{Peer, Trust};

#[cfg(test)]
mod tests;
