//! What the proxy still waits for, by name.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A set of names that are waited for; ready when it is empty.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<&'static str, usize>>>);

/// Keeps one name in the set until it drops.
#[derive(Debug)]
pub struct Token {
    name: &'static str,
    readiness: Readiness,
}

impl Readiness {
    /// Waits for `name` until the token drops.
    pub fn wait_for(&self, name: &'static str) -> Token {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_default() += 1;
        Token { name, readiness: self.clone() }
    }

    /// What is waited for; nothing when ready.
    pub fn waiting_for(&self) -> Vec<&'static str> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        let mut names = self.readiness.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = names.get_mut(self.name) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                names.remove(self.name);
            }
        }
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
}
