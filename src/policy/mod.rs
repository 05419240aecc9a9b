//! Who may do what.
//!
//! Owns patterns, compiled rules, decisions and the gate type. In: the config's rules and a peer's SPIFFE ID. Out: a
//! [`Decision`] that names the rule, and an [`Admitted`] where it admits. Compiled once; what a decision costs does not
//! grow with the number of rules.

pub mod admitted;
pub mod compiled;
pub mod pattern;

pub use admitted::{Admitted, Expected, Subject};
pub use compiled::{Decision, ListenerPolicy, Policy, Verdict};
