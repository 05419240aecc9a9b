//! The crypto profile: only what it knows, and no contradiction.

use super::Checker;
use crate::config::positions::at;
use crate::config::profile_names as names;
use crate::config::schema::{Config, PostQuantum};

pub(super) fn check(c: &mut Checker<'_>, config: &mut Config) {
    suites(c, config);
    groups(c, config);
    if config.tls.fips && !cfg!(feature = "fips") {
        c.warn(at!["tls", "fips"], "this build has no FIPS module and will not start; build with `--features fips`");
    }
}

fn suites(c: &mut Checker<'_>, config: &mut Config) {
    let tls = &mut config.tls;
    let written = c.places.has(at!["tls", "cipher_suites"]);
    let mut suites: Vec<String> = Vec::new();
    for (index, name) in tls.cipher_suites.iter().enumerate() {
        let at = at!["tls", "cipher_suites", index];
        match names::cipher_suite(name) {
            Some(suite) if suites.iter().any(|s| s == suite) => {
                c.error(at, format!("{suite} is listed twice; keep one"));
            }
            Some(names::TLS13_CHACHA) if tls.fips && written => {
                c.error(at, format!("{} is not approved by FIPS; remove it or `fips`", names::TLS13_CHACHA));
            }
            // The default list follows `fips`.
            Some(names::TLS13_CHACHA) if tls.fips => {}
            Some(suite) => suites.push(suite.to_owned()),
            None if names::tls12_suite(name).is_some() => c.error(
                at,
                "the TLS 1.2 suite is not listed here; write `legacy_tls12: true` on the listener that needs it",
            ),
            None => c.error(
                at,
                format!(
                    "cipher suite '{}' is outside the profile; allowed: {}",
                    name.escape_debug(),
                    names::CIPHER_SUITES.join(", ")
                ),
            ),
        }
    }
    if tls.cipher_suites.is_empty() {
        let what = format!("no cipher suite; list some of {}", names::CIPHER_SUITES.join(", "));
        c.error(at!["tls", "cipher_suites"], what);
    }
    tls.cipher_suites = suites;
}

fn groups(c: &mut Checker<'_>, config: &mut Config) {
    let tls = &mut config.tls;
    if let Some(listed) = &tls.groups {
        let mut groups: Vec<String> = Vec::new();
        for (index, name) in listed.iter().enumerate() {
            let at = at!["tls", "groups", index];
            match names::group(name) {
                Some(group) if groups.iter().any(|g| g == group) => {
                    c.error(at, format!("{group} is listed twice; keep one"));
                }
                Some(names::X25519) if tls.fips => {
                    c.error(at, "X25519 by itself is not approved by FIPS; remove it or `fips`");
                }
                Some(group) => groups.push(group.to_owned()),
                None => c.error(
                    at,
                    format!(
                        "group '{}' is outside the profile; allowed: {}",
                        name.escape_debug(),
                        names::GROUPS.join(", ")
                    ),
                ),
            }
        }
        let at = at!["tls", "groups"];
        if listed.is_empty() {
            c.error(at, format!("no group; remove the key or list some of {}", names::GROUPS.join(", ")));
        } else if groups.len() == listed.len() {
            // `prefer` is the default: it contradicts a list only where somebody wrote it.
            let written = c.places.has(at!["tls", "post_quantum"]);
            let first = groups.first().is_some_and(|g| g == names::HYBRID);
            let contradiction = match tls.post_quantum {
                PostQuantum::Off if groups.iter().any(|g| g == names::HYBRID) => {
                    Some("`post_quantum: off` and a list of groups with X25519MLKEM768")
                }
                PostQuantum::Require if groups.len() > 1 || !first => {
                    Some("`post_quantum: require` and a list of groups beyond X25519MLKEM768")
                }
                PostQuantum::Prefer if written && !first => {
                    Some("`post_quantum: prefer` and a list of groups that does not begin with X25519MLKEM768")
                }
                _ => None,
            };
            if let Some(both) = contradiction {
                c.error(at, format!("{both} contradict each other; keep one of the two"));
            }
        }
        tls.groups = Some(groups);
    }
    // TLS 1.2 knows no hybrid group: it would be a way around the demand.
    if !names::effective_groups(tls).contains(&names::P384) {
        let what = "TLS 1.2 exchanges keys on secp384r1 only, which `tls` excludes here; remove `legacy_tls12` or \
                    admit secp384r1";
        for (index, listener) in config.inbound.iter().enumerate() {
            if listener.legacy_tls12 {
                c.error(at!["inbound", index, "legacy_tls12"], what);
            }
        }
        for (index, listener) in config.outbound.iter().enumerate() {
            if listener.legacy_tls12 {
                c.error(at!["outbound", index, "legacy_tls12"], what);
            }
        }
    }
}
