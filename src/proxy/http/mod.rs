//! HTTP through the gate: each request is admitted by itself, carried, and leaves one record.
//!
//! In: a connection on which HTTP is spoken ([`serve`]), of a proven peer or of the local workload. Out: its requests, on
//! connections that a [`Pool`] lends. Two guards stand before the parser and refuse what is not one unambiguous request.
//!
//! ```text
//! downstream (guard, hyper's server) ─ service (one host, one path, policy) ─ send (pool, lease) ─ upstream
//!                                        └ exchange: the request's record, written when its response has ended
//! ```

mod answer;
mod body;
mod budget;
mod dial;
mod downstream;
mod endpoint;
mod exchange;
pub mod h1_guard;
pub mod h2_guard;
pub mod headers;
mod linger;
pub mod live;
mod message;
mod pool;
mod pools;
mod prepare;
mod send;
mod service;
mod tunnel;
mod watch;

pub(super) use downstream::{Spoken, Way, serve};
pub(super) use linger::Lingering;
pub(super) use pool::WORKLOAD_TIMEOUT;
pub use pool::{Mesh, Pool};
pub use pools::{ByAddress, Pools};
