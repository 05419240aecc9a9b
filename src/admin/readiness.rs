//! What the proxy still waits for, by name.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A set of names that are waited for; ready when it is empty. Take the first tokens before anybody can ask.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<Waiting>>);

#[derive(Debug, Default)]
struct Waiting {
    /// Each token by its name and a number of its own, with why it is still there.
    tokens: BTreeMap<(&'static str, u64), String>,
    next: u64,
}

/// Keeps one name in the set until it drops.
#[derive(Debug)]
pub struct Token {
    key: (&'static str, u64),
    readiness: Readiness,
}

impl Readiness {
    /// Waits for `name` until the token drops. A name may be waited for several times over.
    pub fn wait_for(&self, name: &'static str) -> Token {
        let mut waiting = self.lock();
        let key = (name, waiting.next);
        waiting.next += 1;
        waiting.tokens.insert(key, String::new());
        Token { key, readiness: self.clone() }
    }

    /// What is waited for, each name once; nothing when ready.
    pub fn waiting_for(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.lock().tokens.keys().map(|(name, _)| *name).collect();
        names.dedup();
        names
    }

    /// Name and reason of everything that is waited for and has said why.
    pub fn reasons(&self) -> Vec<(&'static str, String)> {
        let given = |(key, why): (&(&'static str, u64), &String)| (!why.is_empty()).then(|| (key.0, why.clone()));
        self.lock().tokens.iter().filter_map(given).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Token {
    /// Says in words why this is still waited for; the latest words stand.
    pub fn because(&self, why: impl Into<String>) {
        if let Some(said) = self.readiness.lock().tokens.get_mut(&self.key) {
            *said = why.into();
        }
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        self.readiness.lock().tokens.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_every_token_is_gone_and_unready_again_with_a_new_one() {
        let readiness = Readiness::default();
        let one = readiness.wait_for("identity");
        let two = readiness.wait_for("identity");
        let three = readiness.wait_for("listeners");
        assert_eq!(readiness.waiting_for(), ["identity", "listeners"]);
        drop((one, three));
        assert_eq!(readiness.waiting_for(), ["identity"]);
        drop(two);
        assert!(readiness.waiting_for().is_empty());
        let _again = readiness.wait_for("drain");
        assert_eq!(readiness.waiting_for(), ["drain"]);
    }

    #[test]
    fn the_latest_reason_stands_until_its_token_is_gone() {
        let readiness = Readiness::default();
        let token = readiness.wait_for("identity");
        let _silent = readiness.wait_for("drain");
        assert!(readiness.reasons().is_empty());
        token.because("the agent is not there");
        token.because("the agent has no entry for us");
        assert_eq!(readiness.reasons(), [("identity", "the agent has no entry for us".to_owned())]);
        drop(token);
        assert!(readiness.reasons().is_empty());
    }
}
