//! Readiness, liveness, metrics and state: for probes, for Prometheus and for people.
//!
//! A small HTTP/1.1 server on loopback by default. In: [`Sources`], closures that answer at the moment they are asked. Out:
//! text and JSON. It reads only: no call changes anything.

mod pulse;
mod readiness;
mod secrets;
mod server;

pub use pulse::Pulse;
pub use readiness::{Readiness, Token};
pub use server::{Server, Sources};
