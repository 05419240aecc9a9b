//! `portcullis check`: whether configs are good, and what they mean.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::{Outcome, Streams};
use crate::config::schema::{Action, Config, Inbound, Passthrough, Plaintext, PolicyMode, Protocol};
use crate::config::{LoadOptions, check_files, load_with};

/// Arguments of `check`.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// Config files.
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Do not look for the files and sockets that the configs name: for a machine where they are not.
    #[arg(long)]
    pub no_files: bool,
}

/// Checks all files: `FILE: ok` and their meaning on stdout, errors and warnings on stderr. Exit code 1 if any is bad.
///
/// # Errors
/// If nothing can be written.
pub fn check(args: &CheckArgs, streams: &mut Streams<'_>) -> Outcome {
    let mut all_good = true;
    for file in &args.files {
        all_good &= check_one(file, args.no_files, streams)?;
    }
    Ok(if all_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn check_one(file: &Path, no_files: bool, streams: &mut Streams<'_>) -> std::io::Result<bool> {
    // Where a file is checked is often not where it will run, so the environment may lack what will be there.
    let options = LoadOptions { identity_optional: true, ..LoadOptions::from_env() };
    let loaded = match load_with(file, &options) {
        Ok(loaded) => loaded,
        Err(errors) => {
            writeln!(streams.err, "{errors}")?;
            return Ok(false);
        }
    };
    let files = if no_files { Default::default() } else { check_files(&loaded) };
    for error in &files.errors {
        writeln!(streams.err, "{}", error.line(&loaded.name))?;
    }
    for warning in loaded.warnings.iter().chain(&files.warnings) {
        writeln!(streams.err, "{}", warning.line_with(&loaded.name, "warning: "))?;
    }
    if !files.errors.is_empty() {
        return Ok(false);
    }
    writeln!(streams.out, "{}: ok", loaded.name)?;
    for line in meaning(&loaded.config) {
        writeln!(streams.out, "  {line}")?;
    }
    Ok(true)
}

/// What a config means, a line for the identity and one for each listener.
fn meaning(config: &Config) -> Vec<String> {
    let identity = &config.identity;
    let source = match (&identity.workload_api, &identity.files, &identity.authority) {
        (Some(api), ..) => format!("identity from the Workload API at {}", api.address),
        (_, Some(files), _) => format!("identity from {}", files.certificate.display()),
        (.., Some(authority)) => format!("identity {} from an authority of its own", authority.spiffe_id),
        _ => "identity from SPIFFE_ENDPOINT_SOCKET".to_owned(),
    };
    let audit = match config.policy.mode {
        PolicyMode::Enforce => "",
        PolicyMode::Audit => "; policy is only audited: every proven identity is let through",
    };
    let mut lines = vec![format!("{source}{audit}")];
    lines.extend(config.inbound.iter().map(|listener| inbound(listener, config)));
    lines.extend(config.outbound.iter().map(|listener| {
        let expected: Vec<&str> = listener.expect.as_slice().iter().map(|id| id.as_str()).collect();
        let to: Vec<&str> = listener.to.as_slice().iter().map(String::as_str).collect();
        let passes = match listener.passthrough {
            Passthrough::Off => None,
            Passthrough::Tls => Some("passes if the workload speaks TLS itself, which is watched"),
            Passthrough::Any => Some("passes, in clear if the workload speaks no TLS"),
        };
        if let Some(passes) = passes {
            return format!("outbound {}: {} → {passes}; no mTLS of ours", listener.name, listener.place());
        }
        format!(
            "outbound {}: {} → mTLS → {}, which must be {}{}",
            listener.name,
            listener.place(),
            if to.is_empty() { "where it was for".to_owned() } else { some(&to) },
            some(&expected),
            if listener.legacy_tls12 { " (TLS 1.2 too)" } else { "" }
        )
    }));
    lines
}

fn inbound(listener: &Inbound, config: &Config) -> String {
    let said_by = |action: Action| -> Vec<&str> {
        let rules = config.policy.rules.iter();
        rules
            .filter(|rule| rule.action == action && rule.mode == PolicyMode::Enforce && rule.applies_to(listener))
            // Who is denied some requests is not shut out; where requests cannot be seen, they are, and let in by none.
            .filter(|rule| rule.http.is_empty() || (action == Action::Allow) == listener.protocol.carries_http())
            .flat_map(|rule| rule.from.iter().map(|pattern| pattern.as_str()))
            .collect()
    };
    let mut allowed: Vec<&str> = listener.allow.iter().map(|pattern| pattern.as_str()).collect();
    for pattern in said_by(Action::Allow) {
        if !allowed.contains(&pattern) {
            allowed.push(pattern);
        }
    }
    let denied = said_by(Action::Deny);
    let who = if allowed.is_empty() { "nobody".to_owned() } else { some(&allowed) };
    let but = if denied.is_empty() { String::new() } else { format!(" but not {}", some(&denied)) };
    let legacy = if listener.legacy_tls12 { " (TLS 1.2 too)" } else { "" };
    let ruled = config.policy.rules.iter().any(|rule| rule.applies_to(listener) && !rule.http.is_empty());
    let carries = match listener.protocol {
        Protocol::Tcp => "",
        Protocol::Http if ruled => ", HTTP, some requests only",
        Protocol::Http => ", HTTP judged by request",
        Protocol::Detect => ", HTTP judged by request or bytes",
    };
    let plaintext = match listener.plaintext {
        Plaintext::Refuse => "",
        Plaintext::Audit => "; plaintext is only audited: everybody who speaks it is let through",
        Plaintext::Allow => "; and for everybody who speaks plaintext",
    };
    format!(
        "inbound {}: mTLS on {}{legacy} → {}{carries}, for {who}{but}{plaintext}",
        listener.name,
        listener.place(),
        listener.leads_to()
    )
}

/// The first few, and how many more.
fn some(texts: &[&str]) -> String {
    const SHOWN: usize = 3;
    let shown = texts.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
    match texts.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
