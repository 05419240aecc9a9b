//! What `status` tells of, in the order in which it does.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

/// One subject.
pub(super) struct Section {
    /// Its heading.
    pub(super) title: &'static str,
    /// The keys of the state that it speaks of.
    pub(super) keys: &'static [&'static str],
    /// What there is to say, a line each; nothing if the subject is none of this proxy's.
    pub(super) in_words: fn(&Value) -> Vec<String>,
}

pub(super) const SECTIONS: &[Section] = &[
    Section { title: "proxy", keys: &["version", "ready", "waiting_for"], in_words: proxy },
    Section { title: "identity", keys: &["identity"], in_words: identity },
    Section { title: "listeners", keys: &["listeners"], in_words: listeners },
    Section { title: "plaintext", keys: &["plaintext"], in_words: plaintext },
    Section { title: "interception", keys: &["interception"], in_words: interception },
    Section { title: "drift", keys: &["drift"], in_words: drift },
    Section { title: "sandbox", keys: &["sandbox"], in_words: sandbox },
    Section { title: "acceleration", keys: &["acceleration"], in_words: acceleration },
];

fn proxy(state: &Value) -> Vec<String> {
    let version = format!("version {}", text(&state["version"]));
    let waiting: Vec<&str> = list(&state["waiting_for"]).iter().map(text).collect();
    match state["ready"] == true {
        true => vec!["ready".into(), version],
        false => vec![format!("not ready, waiting for: {}", waiting.join(", ")), version],
    }
}

fn identity(state: &Value) -> Vec<String> {
    let identity = &state["identity"];
    let id = identity["spiffe_id"].as_str().unwrap_or("none yet");
    let mut lines = vec![format!("{id} ({})", text(&identity["state"]))];
    if let Some(until) = identity["not_after"].as_u64() {
        lines.push(format!("expires {}", when(until)));
    }
    if identity["rotation_overdue"] == true {
        lines.push("its rotation is overdue: look at the identity source".into());
    }
    if let Some(why) = identity["why"].as_str().filter(|why| !why.is_empty()) {
        lines.push(why.to_owned());
    }
    lines
}

fn listeners(state: &Value) -> Vec<String> {
    let line = |listener: &Value| {
        let serving = if listener["serving"] == true { "serving" } else { "not serving" };
        let [direction, name, address] = ["direction", "name", "address"].map(|key| text(&listener[key]));
        format!("{direction} {name}: {address}, {serving}")
    };
    list(&state["listeners"]).iter().map(line).collect()
}

/// Callers of a port that are named; the others are in the JSON.
const SHOWN: usize = 3;

fn plaintext(state: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    for port in list(&state["plaintext"]) {
        let which = port["port"].as_u64().map_or_else(|| "other ports".to_owned(), |port| format!("port {port}"));
        let listener = port["listener"].as_str().unwrap_or("no listener");
        let declared = text(&port["plaintext"]);
        lines
            .push(format!("{which} ({listener}, plaintext: {declared}): safe to go strict? {}", text(&port["answer"])));
        let callers = list(&port["callers"]);
        for caller in callers.iter().take(SHOWN) {
            let count = |key: &str| caller[key].as_u64().unwrap_or(0);
            let last = caller["last_seen"].as_u64().map(when).unwrap_or_default();
            let (through, refused) = (count("let_through"), count("refused"));
            lines
                .push(format!("  {}: {through} let through, {refused} refused, last {last}", text(&caller["address"])));
        }
        if callers.len() > SHOWN {
            lines.push(format!("  and {} more callers; --output json names them", callers.len() - SHOWN));
        }
    }
    lines
}

fn interception(state: &Value) -> Vec<String> {
    let interception = &state["interception"];
    let Some(findings) = interception["findings"].as_object() else { return Vec::new() };
    let whole = match interception["whole"].as_bool() {
        Some(true) => "whole, as far as it can be seen",
        Some(false) => "broken: run `portcullis redirect verify`",
        None => "nothing shows whether it is whole",
    };
    let finding = |(what, finding): (&String, &Value)| {
        let verdict = text(&finding["verdict"]).replace('_', " ");
        format!("{}: {verdict}: {}", what.replace('_', " "), text(&finding["detail"]))
    };
    std::iter::once(whole.to_owned()).chain(findings.iter().map(finding)).collect()
}

fn drift(state: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    for drift in list(&state["drift"]) {
        let since = drift["since"].as_u64().map(when).unwrap_or_default();
        lines.push(format!("{} since {since}: {}", text(&drift["kind"]), text(&drift["remedy"])));
        lines.extend(list(&drift["evidence"]).iter().map(|evidence| format!("  {}", text(evidence))));
    }
    lines
}

fn sandbox(state: &Value) -> Vec<String> {
    let Some(sandbox) = state["sandbox"].as_object() else { return Vec::new() };
    let (mut held, mut missing) = (Vec::new(), Vec::new());
    for (name, part) in sandbox.iter().filter(|(_, part)| part.is_object()) {
        match part["in_force"] == true {
            true => held.push(name.as_str()),
            false => missing.push(format!("without {name}: {}", text(&part["why"]))),
        }
    }
    let held = (!held.is_empty()).then(|| format!("in force: {}", held.join(", ")));
    held.into_iter().chain(missing).collect()
}

fn acceleration(state: &Value) -> Vec<String> {
    let acceleration = &state["acceleration"];
    let refused = list(&acceleration["refused"]).iter().map(|why| format!("refused: {}", text(why)));
    let active = (acceleration["active"] == true).then(|| "plaintext goes past TCP".to_owned());
    active.into_iter().chain(refused).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("unknown")
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A time for a person: the moment, and how far it is from now.
fn when(seconds: u64) -> String {
    // Beyond the year 9999 there is nothing to print.
    let at = UNIX_EPOCH + Duration::from_secs(seconds.min(253_402_300_799));
    let apart = |span: Duration| humantime::format_duration(Duration::from_secs(span.as_secs())).to_string();
    let distance = match at.duration_since(SystemTime::now()) {
        Ok(left) => format!("in {}", apart(left)),
        Err(past) => format!("{} ago", apart(past.duration())),
    };
    format!("{} ({distance})", humantime::format_rfc3339_seconds(at))
}
