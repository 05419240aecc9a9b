//! Portcullis: a zero-trust mTLS proxy.
//!
//! ```text
//! listener ─ Accepted ─ tls::server ─ Authenticated ─ policy ─ Admitted ─ proxy::tcp ─ upstream
//!                                          └ proxy::http ─ policy ─ Admitted, each request ─ pool ─ upstream
//! ```
//!
//! The rooms, from the outside in: [`cli`] → [`app`] → [`admin`], [`proxy`] → [`policy`], [`tls`] → [`identity`] →
//! [`config`]; [`telemetry`] and [`posture`] receive plain records, and [`sandbox`] locks the process in. The whole picture is in
//! ARCHITECTURE.md.

pub mod accelerate;
pub mod admin;
pub mod app;
pub mod authority;
pub mod cli;
pub mod clock;
pub mod config;
pub mod identity;
pub mod intercept;
pub mod policy;
pub mod posture;
pub mod proxy;
pub mod sandbox;
pub mod telemetry;
#[cfg(test)]
mod testing;
pub mod tls;
