//! What people see of the proxy: metrics, logs and the access log.
//!
//! In: plain records, through [`crate::proxy::record::Observer`], and the keeper's state. Out: the text of `/metrics` and
//! lines on stderr. It keeps nothing of a connection, and every label set is bounded.

pub mod access;
pub mod log;
pub mod metrics;
mod places;
mod process;

pub use metrics::Metrics;
