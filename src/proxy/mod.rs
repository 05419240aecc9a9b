//! The data path: accept, authenticate, admit, forward, record.
//!
//! In: listeners with their prebuilt TLS and compiled policy ([`listener`]). Out: bytes between identities that a rule
//! admitted, and one [`record::ConnectionRecord`] for each connection, written when it is dropped so that no path can
//! forget to. [`registry`] holds what is open, to be judged again whenever policy or trust change.

pub mod capture;
mod connection;
pub mod detect;
pub mod dialer;
mod hold;
pub mod http;
mod inbound;
pub mod inherited;
mod io;
pub mod ledger;
pub mod listener;
mod outbound;
pub mod pace;
pub mod passthrough;
mod plaintext;
pub mod proxy_protocol;
pub mod record;
pub mod registry;
pub mod splice;
pub mod state;
pub mod tcp;
pub mod trace;
pub mod upstream;

pub use listener::{Inbound, Listener, Outbound, Shared};
pub use state::{InboundState, OutboundState};
