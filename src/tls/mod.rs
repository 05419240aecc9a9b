//! How identity is proven.
//!
//! Owns everything that touches rustls: the profile, the verifiers with their memory of chains, tickets, the server and
//! client handshakes and the record that each leaves. In: [`crate::identity::Identity`], the declared profile and an
//! accepted socket. Out: an `Authenticated` connection and a [`record::HandshakeRecord`], or a refusal with a
//! [`reason::Reason`].

pub mod reason;
pub mod record;
