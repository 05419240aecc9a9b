//! Holds the one current identity and its state.

use std::sync::Arc;

use super::Identity;

/// How good the current identity is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SvidState {
    /// None has come yet, or it was withdrawn.
    Absent,
    /// Valid, and the source is well.
    Fresh,
    /// Valid, but the source cannot be reached or the rotation is overdue.
    Stale,
    /// Past its end: nothing is done with it.
    Expired,
}

/// What the rest of the house sees: the identity if one may be used, and the state.
#[derive(Clone, Debug)]
pub struct Current {
    /// The identity, only while it may be used (fresh or stale).
    pub identity: Option<Arc<Identity>>,
    /// Its state.
    pub state: SvidState,
    /// In words, why the state is not fresh; empty when it is.
    pub why: String,
}
