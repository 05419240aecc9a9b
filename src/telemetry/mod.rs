//! What people see of the proxy: metrics, logs, the access log and traces.
//!
//! In: plain records, through [`crate::proxy::record::Observer`], and the keeper's state. Out: the text of `/metrics`,
//! lines on stderr and spans to a collector. It keeps nothing of a connection, and every label set is bounded.

pub mod access;
pub mod log;
pub mod metrics;
mod places;
mod process;
mod traces;

pub use metrics::Metrics;
pub use traces::Traces;
