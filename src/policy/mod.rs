//! Who may do what.
//!
//! Owns patterns, compiled rules, decisions and the gate type. In: the config's rules, a peer's SPIFFE ID, and the facts
//! of a request where HTTP is carried. Out: a [`Decision`] that names the rule, and an [`Admitted`] where it admits.
//! Compiled once; what a decision costs does not grow with the number of rules.

pub mod admitted;
pub mod compiled;
pub mod http;
pub mod path;
pub mod pattern;
pub mod rego;

pub use self::http::{ConnectionFacts, HttpFacts, HttpTarget, PeerPolicy, RequestDecision};
pub use admitted::{Admitted, Expected, HttpSubject, Passage, Passenger, Plaintext, Subject, Unproven};
pub use compiled::{Decision, ListenerPolicy, Policy, Verdict};
pub use path::{NormalPath, PathError};
