//! Meaning: what a file says that YAML and the schema cannot judge.
//!
//! In: a config as read, and where everything stands. Out: findings with places; all of them, not only the first. What
//! can be said in two ways (names of suites, the identity's address) is brought into one form here.

mod http;
mod identity;
mod intercept;
mod limits;
mod listeners;
mod profile;
mod rules;
mod traffic;

use super::load::{Finding, LoadOptions};
use super::positions::{Positions, Step};
use super::schema::Config;

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) errors: Vec<Finding>,
    pub(super) warnings: Vec<Finding>,
}

/// Findings under way, with the places to point at.
struct Checker<'a> {
    places: &'a Positions,
    found: Findings,
}

impl Checker<'_> {
    fn error(&mut self, path: &[Step<'_>], what: impl Into<String>) {
        let place = Some(self.places.at(path));
        self.found.errors.push(Finding { place, what: one_line(what.into()) });
    }

    fn warn(&mut self, path: &[Step<'_>], what: impl Into<String>) {
        let place = Some(self.places.at(path));
        self.found.warnings.push(Finding { place, what: one_line(what.into()) });
    }
}

/// A finding may tell of names that hold anything: what could break a line or move a cursor is written out.
fn one_line(what: String) -> String {
    if !what.chars().any(char::is_control) {
        return what;
    }
    let escaped = |c: char| if c.is_control() { c.escape_debug().to_string() } else { c.to_string() };
    what.chars().map(escaped).collect()
}

/// Judges a config and brings it into one form.
pub(super) fn validate(config: &mut Config, places: &Positions, options: &LoadOptions) -> Findings {
    let mut checker = Checker { places, found: Findings::default() };
    identity::check(&mut checker, config, options);
    profile::check(&mut checker, config);
    listeners::check(&mut checker, config);
    intercept::check(&mut checker, config);
    rules::check(&mut checker, config);
    http::check(&mut checker, config);
    limits::check(&mut checker, config);
    traffic::check(&mut checker, config);
    let mut found = checker.found;
    found.warnings.sort_by_key(|finding| finding.place);
    found
}

/// Names stand in metric labels, Kubernetes labels and log lines.
fn name_problem(name: &str) -> Option<String> {
    let word = |b: u8| b.is_ascii_alphanumeric();
    let good = !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(|b| word(b) || matches!(b, b'.' | b'-' | b'_'))
        && name.bytes().next().is_some_and(word)
        && name.bytes().next_back().is_some_and(word);
    (!good).then(|| {
        format!(
            "'{}' is not a name; use 1 to 63 letters, digits, '.', '-', '_', with a letter or digit at both ends",
            name.escape_debug()
        )
    })
}
