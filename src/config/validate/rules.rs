//! Rules of policy: names, targets, and a bound on what a decision may cost.

use std::collections::{BTreeMap, BTreeSet};

use super::{Checker, name_problem};
use crate::config::positions::{Place, at};
use crate::config::schema::{Action, Config, Inbound, PolicyMode, Rule, RuleTarget};
use crate::policy::pattern::MAX_WILDCARD_SHAPES;

pub(super) fn check(c: &mut Checker<'_>, config: &Config) {
    let mut names: BTreeMap<&str, Place> = BTreeMap::new();
    for (index, rule) in config.policy.rules.iter().enumerate() {
        let at = at!["policy", "rules", index, "name"];
        if let Some(problem) = name_problem(&rule.name) {
            c.error(at, problem);
        } else if rule.name == "default" {
            c.error(at, "'default' names the case that no rule matched; choose another name");
        } else if let Some(place) = names.get(rule.name.as_str()) {
            let what = format!("the name '{}' is taken by the rule on line {}; choose another", rule.name, place.line);
            c.error(at, what);
        } else {
            names.insert(&rule.name, c.places.at(at));
        }
        if rule.from.is_empty() {
            c.error(at!["policy", "rules", index, "from"], "the rule speaks of nobody; list SPIFFE IDs or patterns");
        }
        targets(c, index, rule, &config.inbound);
    }
    for (index, listener) in config.inbound.iter().enumerate() {
        somebody(c, index, listener, config);
        shapes(c, index, listener, config);
    }
}

fn targets(c: &mut Checker<'_>, index: usize, rule: &Rule, inbound: &[Inbound]) {
    if inbound.is_empty() {
        c.warn(at!["policy", "rules", index], "there is no inbound listener that this rule could apply to");
        return;
    }
    for (i, target) in rule.to.iter().enumerate() {
        if inbound.iter().any(|listener| target.matches(listener)) {
            continue;
        }
        let what = match target {
            RuleTarget::Listener(name) => format!(
                "there is no inbound listener '{}'; there are: {}",
                name.escape_debug(),
                inbound.iter().map(|l| l.name.as_str()).collect::<Vec<_>>().join(", ")
            ),
            RuleTarget::Port(port) => format!(
                "no inbound listener has port {port}; there are: {}",
                inbound.iter().flat_map(Inbound::ports).map(|port| port.to_string()).collect::<Vec<_>>().join(", ")
            ),
        };
        c.error(at!["policy", "rules", index, "to", i], what);
    }
}

/// A listener that admits nobody is legal and hardly ever meant.
fn somebody(c: &mut Checker<'_>, index: usize, listener: &Inbound, config: &Config) {
    let admitting = config
        .policy
        .rules
        .iter()
        .filter(|rule| rule.action == Action::Allow && rule.mode == PolicyMode::Enforce && rule.applies_to(listener))
        .any(|rule| rule.http.is_empty() || listener.protocol.carries_http());
    if listener.allow.is_empty() && !admitting && config.policy.mode == PolicyMode::Enforce {
        let what = format!("no rule admits anybody to '{}'; add `allow:` here or a rule", listener.name);
        c.warn(at!["inbound", index], what);
    }
}

/// The cost of a decision is bounded by the number of wildcard shapes, so that one is bounded too.
fn shapes(c: &mut Checker<'_>, index: usize, listener: &Inbound, config: &Config) {
    let mut shapes: BTreeMap<&str, BTreeSet<u32>> = BTreeMap::new();
    let rules = config.policy.rules.iter().filter(|rule| rule.applies_to(listener));
    for pattern in listener.allow.iter().chain(rules.flat_map(|rule| &rule.from)).filter(|p| !p.is_exact()) {
        shapes.entry(pattern.domain().as_str()).or_default().insert(pattern.wildcard_shape());
    }
    for (domain, shapes) in shapes {
        if shapes.len() > MAX_WILDCARD_SHAPES {
            let what = format!(
                "the rules for '{}' put '*' in {} different sets of places in trust domain {domain}, and \
                 {MAX_WILDCARD_SHAPES} are allowed; write patterns of the same shape",
                listener.name,
                shapes.len()
            );
            c.error(at!["inbound", index], what);
        }
    }
}
