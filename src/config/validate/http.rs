//! Matches of requests and options of HTTP: where they can have an effect, and how many there may be.

use std::collections::BTreeSet;

use super::Checker;
use crate::config::positions::at;
use crate::config::schema::{Action, Config, HttpMatch, Inbound, InboundHttp, Rule};
use crate::policy::http::pattern::MAX_TEXT_BYTES;
use crate::policy::pattern::MAX_WILDCARD_SHAPES;

/// Matches of one rule.
const MAX_MATCHES: usize = 64;
/// Items of each list of one match.
const MAX_ITEMS: usize = 64;
/// Names of headers that the rules of one listener look at: their values are kept with each live request.
const MAX_HEADER_NAMES: usize = 32;

pub(super) fn check(c: &mut Checker<'_>, config: &Config) {
    for (index, rule) in config.policy.rules.iter().enumerate().filter(|(_, rule)| !rule.http.is_empty()) {
        where_it_applies(c, index, rule, &config.inbound);
        if rule.http.len() > MAX_MATCHES {
            let what = format!("{} matches are too many, at most {MAX_MATCHES}; make two rules of it", rule.http.len());
            c.error(at!["policy", "rules", index, "http"], what);
        }
        for (number, wanted) in rule.http.iter().enumerate() {
            one_match(c, index, number, wanted);
        }
    }
    for (index, listener) in config.inbound.iter().enumerate() {
        if !listener.protocol.carries_http() {
            if listener.http != InboundHttp::default() {
                let what = "options of HTTP on a listener that carries bytes; add `protocol: http` or remove them";
                c.error(at!["inbound", index, "http"], what);
            }
            continue;
        }
        if listener.http.rego.is_some() && !cfg!(feature = "rego") {
            let what = "this build has no Rego; remove it, or build with the feature `rego`";
            c.error(at!["inbound", index, "http", "rego"], what);
        }
        bounds(c, index, listener, config);
    }
}

/// A rule about requests has no good meaning where requests cannot be seen.
fn where_it_applies(c: &mut Checker<'_>, index: usize, rule: &Rule, inbound: &[Inbound]) {
    let targets = || inbound.iter().filter(|listener| rule.applies_to(listener));
    let opaque: Vec<&str> =
        targets().filter(|l| !l.protocol.carries_http()).map(|listener| listener.name.as_str()).collect();
    if opaque.is_empty() {
        return;
    }
    let names = opaque.join(", ");
    let at = at!["policy", "rules", index, "http"];
    if opaque.len() == targets().count() {
        let what = format!(
            "the rule speaks of requests and applies only to listeners that carry bytes ({names}); say `protocol: \
             http` there, or remove `http` here"
        );
        return c.error(at, what);
    }
    let effect = match rule.action {
        Action::Allow => "admits no connection",
        Action::Deny => "refuses every connection of these peers",
    };
    c.warn(at, format!("no request can be seen on {names}, where the rule {effect}; name other listeners under `to`"));
}

fn one_match(c: &mut Checker<'_>, index: usize, number: usize, wanted: &HttpMatch) {
    let here = at!["policy", "rules", index, "http", number];
    if wanted.is_empty() {
        c.error(here, "nothing is written, so it would match every request; say what it shall match, or remove `http`");
    }
    for (key, count) in [
        ("methods", wanted.methods.len()),
        ("hosts", wanted.hosts.len()),
        ("paths", wanted.paths.len()),
        ("headers", wanted.headers.len()),
    ] {
        let at = at!["policy", "rules", index, "http", number, key];
        if count > MAX_ITEMS {
            c.error(at, format!("{count} are too many, at most {MAX_ITEMS}; make two matches of it"));
        } else if count == 0 && c.places.has(at) {
            c.error(at, "an empty list would match nothing; write something or remove the key");
        }
    }
    if wanted.grpc.is_some() && !(wanted.methods.is_empty() && wanted.paths.is_empty()) {
        c.error(
            at!["policy", "rules", index, "http", number, "grpc"],
            "it stands for the method POST and for a path; remove `methods` and `paths` or make two matches of it",
        );
    }
    for (item, header) in wanted.headers.iter().enumerate() {
        let at = at!["policy", "rules", index, "http", number, "headers", item];
        match (&header.exact, header.present) {
            (Some(_), Some(_)) | (None, None) => c.error(at, "write one of `exact: value` and `present: true`"),
            (Some(value), None) if value.len() > MAX_TEXT_BYTES || http::HeaderValue::from_str(value).is_err() => {
                let what = format!("no header has such a value; write at most {MAX_TEXT_BYTES} visible characters");
                c.error(at, what);
            }
            (Some(value), None) if value.trim() != value => {
                c.error(at, "space around a value is no part of it; remove it");
            }
            _ => {}
        }
    }
}

/// What a decision costs is bounded by the number of wildcard shapes, and what is kept by the number of names.
fn bounds(c: &mut Checker<'_>, index: usize, listener: &Inbound, config: &Config) {
    let rules = config.policy.rules.iter().filter(|rule| rule.applies_to(listener));
    let matches: Vec<&HttpMatch> = rules.flat_map(|rule| &rule.http).collect();
    let shapes: BTreeSet<u32> = matches.iter().flat_map(|m| &m.paths).map(|path| path.wildcard_shape()).collect();
    if shapes.len() > MAX_WILDCARD_SHAPES {
        let what = format!(
            "the rules for '{}' put {{name}} in {} different sets of places of a path, and {MAX_WILDCARD_SHAPES} are \
             allowed; write paths of the same shape",
            listener.name,
            shapes.len()
        );
        c.error(at!["inbound", index], what);
    }
    let names: BTreeSet<&str> = matches.iter().flat_map(|m| &m.headers).map(|header| header.name.as_str()).collect();
    if names.len() > MAX_HEADER_NAMES {
        let what = format!(
            "the rules for '{}' look at {} different headers, and {MAX_HEADER_NAMES} are allowed; look at fewer",
            listener.name,
            names.len()
        );
        c.error(at!["inbound", index], what);
    }
}
