//! `portcullis explain`: what policy makes of a peer or of its request, and by which rule, without any traffic.

mod request;

use std::path::PathBuf;
use std::process::ExitCode;

pub use request::RequestArgs;

use super::{Failure, Outcome, Streams};
use crate::config::schema::{Inbound, PolicyMode, RuleTarget};
use crate::config::{LoadOptions, Loaded, load_with};
use crate::identity::{SpiffeId, SpiffeIdError};
use crate::policy::compiled::DEFAULT_RULE;
use crate::policy::{Decision, Policy, Verdict};
use request::Answered;

/// Arguments of `explain`. Exit code 0 if the peer or the request would be let through, 1 if not.
#[derive(Debug, clap::Args)]
#[command(after_help = "Where the listener carries HTTP, a request can be described with --method, --path, --host, \
                        --header and --grpc; what is left out is GET, / and no host. Without any of them the answer is \
                        whether the peer could get some request through.\n\nExit codes:\n  0  it would be let \
                        through\n  1  it would be refused, or the config is bad\n  2  the command was not understood, \
                        or there is no such listener")]
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
    /// The request.
    #[command(flatten)]
    pub request: RequestArgs,
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

/// What the answer is about, and the answer.
struct Judged {
    decision: Decision,
    /// None where the answer is about the connection.
    request: Option<Answered>,
}

/// Says what would become of the peer, or of its request.
///
/// # Errors
/// A bad config (1), or a listener that does not exist (2).
pub fn explain(args: &ExplainArgs, streams: &mut Streams<'_>) -> Outcome {
    let options = LoadOptions { identity_optional: true, ..LoadOptions::from_env() };
    let loaded = load_with(&args.config, &options)?;
    let listener = find(&loaded, &args.to)?;
    let asked = args.request.asked()?;
    let judged = match asked {
        Some(_) if !listener.protocol.carries_http() => {
            return Err(Failure::usage(format!(
                "'{}' carries bytes, so no request can be seen there; leave the request out, or say `protocol: http`",
                listener.name
            )));
        }
        Some(asked) => {
            let policy = Policy::load(&loaded.config).map_err(Failure::new)?;
            let answered = asked.judge(&policy, listener, &args.from);
            Judged { decision: answered.decision.clone(), request: Some(answered) }
        }
        None => {
            let rules = Policy::compile(&loaded.config).listener(&listener.name);
            let decision = rules.map(|rules| rules.door(&args.from));
            let decision = decision.ok_or_else(|| Failure::new("the listener is gone"))?;
            Judged { decision, request: None }
        }
    };
    match args.output {
        Output::Text => {
            for line in in_words(&loaded, listener, &args.from, &judged) {
                writeln!(streams.out, "{line}")?;
            }
        }
        Output::Json => writeln!(streams.out, "{:#}", in_json(&loaded, listener, &args.from, &judged))?,
    }
    let goes_through = judged.goes_through();
    Ok(if goes_through { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Judged {
    fn goes_through(&self) -> bool {
        self.decision.admits() && self.request.as_ref().is_none_or(|request| request.malformed.is_none())
    }
}

fn in_json(loaded: &Loaded, listener: &Inbound, from: &SpiffeId, judged: &Judged) -> serde_json::Value {
    let decision = &judged.decision;
    let rule_at = |rule: &str| loaded.place_of_rule(rule).map(|p| format!("{}:{}:{}", loaded.name, p.line, p.column));
    let mut answer = serde_json::json!({
        "from": from,
        "listener": listener.name,
        "protocol": listener.protocol,
        "admitted": judged.goes_through(),
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
    if let (Some(request), Some(answer)) = (&judged.request, answer.as_object_mut()) {
        answer.insert("request".into(), request.in_json());
    }
    answer
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
    let known: Vec<String> = inbound.iter().map(|l| format!("{} ({})", l.name, ports_of(l))).collect();
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    Err(Failure::usage(format!("there is no inbound listener '{shown}'; there are: {known}")))
}

fn ports_of(listener: &Inbound) -> String {
    let ports: Vec<String> = listener.ports().iter().map(u16::to_string).collect();
    if ports.is_empty() { listener.place() } else { ports.join(", ") }
}

fn in_words(loaded: &Loaded, listener: &Inbound, from: &SpiffeId, judged: &Judged) -> Vec<String> {
    let decision = &judged.decision;
    let rule = |name: &str| match loaded.place_of_rule(name) {
        Some(place) => format!("rule '{name}' ({}:{}:{})", loaded.name, place.line, place.column),
        None => format!("rule '{name}'"),
    };
    let head = if judged.goes_through() { "allowed" } else { "denied" };
    let mut lines = vec![format!("{head}: {from} → {} ({})", listener.name, listener.place())];
    if let Some(request) = &judged.request {
        lines.push(format!("  {}", request.in_words()));
        if let Some(why) = request.malformed {
            lines.push(format!("  it is refused with 400 before any rule is asked: {why}"));
            return lines;
        }
    }
    let about_requests = judged.request.is_none() && listener.protocol.carries_http();
    lines.push(match decision.verdict {
        Verdict::Allow if about_requests => {
            format!("  {} may let requests through; say --method and --path to ask about one", rule(&decision.rule))
        }
        Verdict::Allow => format!("  {} allows it", rule(&decision.rule)),
        Verdict::Deny if &*decision.rule == DEFAULT_RULE => format!(
            "  no rule matches, and what no rule allows is denied; to allow it, add the ID to `allow` of '{}' or a rule",
            listener.name
        ),
        Verdict::Deny if decision.rule.starts_with("rego:") => {
            "  the rules allow it, and the Rego module of the listener does not".to_owned()
        }
        Verdict::Deny => format!("  {} denies it, whatever other rules say", rule(&decision.rule)),
    });
    lines.extend(judged.request.iter().flat_map(Answered::details).map(|detail| format!("  {detail}")));
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
