//! Who may do what.
//!
//! Owns patterns, compiled rules and decisions. In: the config's rules and a peer's SPIFFE ID. Out: a [`Decision`] that
//! names the rule. Compiled once; what a decision costs does not grow with the number of rules.

pub mod compiled;
pub mod pattern;

pub use compiled::{Decision, ListenerPolicy, Policy, Verdict};
