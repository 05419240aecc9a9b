//! `portcullis explain`: what policy makes of a peer, and by which rule, without any traffic.

use std::path::PathBuf;
use std::process::ExitCode;

use super::{Failure, Outcome, Streams};
use crate::config::schema::{Inbound, PolicyMode, RuleTarget};
use crate::config::{LoadOptions, Loaded, load_with};
use crate::identity::{SpiffeId, SpiffeIdError};
use crate::policy::compiled::DEFAULT_RULE;
use crate::policy::{Decision, Policy, Verdict};

/// Arguments of `explain`. Exit code 0 if the peer would be let through, 1 if not.
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit codes:\n  0  the peer would be let through\n  1  it would be refused, or the config is \
                        bad\n  2  the command was not understood, or there is no such listener")]
pub struct ExplainArgs {
    /// The config file.
    #[arg(short, long, value_name = "FILE", env = "PORTCULLIS_CONFIG")]
    pub config: PathBuf,
    /// The peer's SPIFFE ID.
    #[arg(long, value_name = "ID", value_parser = workload)]
    pub from: SpiffeId,
    /// The inbound listener, by name or port.
    #[arg(long, value_name = "LISTENER")]
    pub to: String,
    /// For whom the answer is.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}

/// For whom an answer is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For a person.
    #[default]
    Text,
    /// For a program.
    Json,
}

fn workload(text: &str) -> Result<SpiffeId, SpiffeIdError> {
    SpiffeId::parse_workload(text)
}

/// Says what would become of the peer.
///
/// # Errors
/// A bad config (1), or a listener that does not exist (2).
pub fn explain(args: &ExplainArgs, streams: &mut Streams<'_>) -> Outcome {
    let options = LoadOptions { identity_optional: true, ..LoadOptions::from_env() };
    let loaded = load_with(&args.config, &options)?;
    let listener = find(&loaded, &args.to)?;
    let decision = Policy::compile(&loaded.config).decide(&listener.name, &args.from);
    match args.output {
        Output::Text => {
            for line in in_words(&loaded, listener, &args.from, &decision) {
                writeln!(streams.out, "{line}")?;
            }
        }
        Output::Json => {
            let rule_at =
                |rule: &str| loaded.place_of_rule(rule).map(|p| format!("{}:{}:{}", loaded.name, p.line, p.column));
            let answer = serde_json::json!({
                "from": args.from,
                "listener": listener.name,
                "admitted": decision.admits(),
                "verdict": decision.verdict,
                "mode": decision.mode,
                "rule": &*decision.rule,
                "rule_at": rule_at(&decision.rule),
                "audited": decision.audited.as_ref().map(|(rule, verdict)| serde_json::json!({
                    "rule": &**rule,
                    "rule_at": rule_at(rule),
                    "verdict": verdict,
                })),
                "would_change_to": decision.would_change_to(),
            });
            writeln!(streams.out, "{answer:#}")?;
        }
    }
    Ok(if decision.admits() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn find<'a>(loaded: &'a Loaded, to: &str) -> Result<&'a Inbound, Failure> {
    let target = to.parse().map_or_else(|_| RuleTarget::Listener(to.to_owned()), RuleTarget::Port);
    let inbound = &loaded.config.inbound;
    // A listener may be named like a port.
    let by_name = inbound.iter().find(|listener| listener.name == to);
    if let Some(listener) = by_name.or_else(|| inbound.iter().find(|listener| target.matches(listener))) {
        return Ok(listener);
    }
    let shown = to.escape_debug();
    if let Some(outbound) = loaded.config.outbound.iter().find(|listener| listener.name == to) {
        let expected: Vec<&str> = outbound.expect.as_slice().iter().map(|id| id.as_str()).collect();
        return Err(Failure::usage(format!(
            "'{shown}' is an outbound listener, where rules do not apply: its upstream must be {}; name an inbound one",
            expected.join(" or ")
        )));
    }
    let known: Vec<String> = inbound.iter().map(|l| format!("{} ({})", l.name, l.listen.port())).collect();
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    Err(Failure::usage(format!("there is no inbound listener '{shown}'; there are: {known}")))
}

fn in_words(loaded: &Loaded, listener: &Inbound, from: &SpiffeId, decision: &Decision) -> Vec<String> {
    let rule = |name: &str| match loaded.place_of_rule(name) {
        Some(place) => format!("rule '{name}' ({}:{}:{})", loaded.name, place.line, place.column),
        None => format!("rule '{name}'"),
    };
    let head = if decision.admits() { "allowed" } else { "denied" };
    let mut lines = vec![format!("{head}: {from} → {} ({})", listener.name, listener.listen)];
    lines.push(match decision.verdict {
        Verdict::Allow => format!("  {} allows it", rule(&decision.rule)),
        Verdict::Deny if &*decision.rule == DEFAULT_RULE => format!(
            "  no rule matches, and what no rule allows is denied; to allow it, add the ID to `allow` of '{}' or a rule",
            listener.name
        ),
        Verdict::Deny => format!("  {} denies it, whatever other rules say", rule(&decision.rule)),
    });
    if decision.mode == PolicyMode::Audit && decision.verdict == Verdict::Deny {
        lines.push("  it is let through all the same, because `policy.mode` is audit".to_owned());
    }
    if let Some((name, verdict)) = &decision.audited {
        let says = if *verdict == Verdict::Allow { "allow" } else { "deny" };
        let consequence = match decision.would_change_to() {
            Some(_) => "that would change the outcome",
            None => "the outcome would be the same",
        };
        lines.push(format!("  {} is in audit mode and would {says} it; {consequence}", rule(name)));
    }
    lines
}
