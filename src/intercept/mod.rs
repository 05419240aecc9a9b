//! How captured traffic gets in: the rules that capture it, and where a captured connection was for.
//!
//! In: what the config declares to be captured. Out: rules in the kernel, and the original destination of a connection.

pub mod declared;
#[cfg(all(feature = "ebpf", target_os = "linux"))]
pub mod ebpf;
mod original;
pub mod plan;

pub use original::original_destination;
pub use plan::{Plan, WORKLOAD_TOS};
