//! Who may send which request.
//!
//! In: the rules that apply to a listener, one peer, and the facts of one request. Out: a [`RequestDecision`], which is
//! the [`Decision`](super::Decision) of the rules and the route that may stand in metric labels.
//!
//! # What matches
//!
//! A rule without `http:` speaks of every request, a rule with it of those that one of its matches describes. Deny wins,
//! the first rule of the file is named, and audit is as for connections: see [`super::compiled`]. Where a fact can be
//! read in two ways, an `allow` holds only if it holds in every reading, and a `deny` holds if it holds in any:
//!
//! | fact | `allow` | `deny` |
//! |---|---|---|
//! | CONNECT | only if `methods` names it, and nothing is said of paths that it has not | unless `methods` says others; paths do not count |
//! | no host, or one with `%` in it | no match with `hosts` holds | every one does, as far as hosts go |
//! | header, `exact` | every value is that one, and one bears the very name | any value is that one, or any item of a list in it, also under a name that differs by `_` for `-` |
//! | header, `present: true` | under the very name | also under a name that differs by `_` for `-` |
//! | header, `present: false` | under neither name | unless under the very name |
//! | header that was not kept, because the rules were others then | does not hold | holds |
//! | path parameters, `/a;x` | only `{name}` and prefixes take them | also what would match without them |
//! | a slash at the end of the path | as written | with or without |
//! | gRPC | POST with the content type `application/grpc`, alone or with `+…` or `;…` | whatever method and content type |
//!
//! Paths are case-sensitive, and so is the method: who admits GET has not admitted HEAD.
//!
//! # What a decision costs
//!
//! One walk through a trie of the paths that rules name for this very peer, and then a look at those rules whose path
//! has matched. The walk follows one path for each different set of places of `{name}`
//! ([`MAX_WILDCARD_SHAPES`](super::pattern::MAX_WILDCARD_SHAPES), held at load). Nothing is allocated.

mod facts;
pub mod pattern;
mod peer;

pub use facts::{ConnectionFacts, HeaderNames, HttpFacts, HttpTarget, TlsFacts};
pub(crate) use facts::{is_grpc, same_field};
pub use peer::{PeerPolicy, RequestDecision};

pub(super) use peer::HttpRule;

/// The route of a decision that no path decided.
pub const NO_ROUTE: &str = "*";

#[cfg(test)]
mod tests;
