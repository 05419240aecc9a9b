//! `portcullis redirect verify`: whether anything gets round the gate.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;

use super::{ConfigArgs, inside, plan};
use crate::cli::{Failure, Outcome, Streams};
use crate::intercept::verify::{Finding, Verdict, proven, verify as attempt_all};

/// Arguments of `redirect verify`.
#[derive(Debug, clap::Args)]
pub struct VerifyArgs {
    /// The config file.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// The network namespace, if not this process's own: /run/netns/NAME or /proc/PID/ns/net.
    #[arg(long, value_name = "PATH")]
    pub netns: Option<PathBuf>,
    /// The user whose traffic is tried, by number: one of the workload's. Nobody (65534) if absent.
    #[arg(long = "as", value_name = "UID")]
    pub user: Option<u32>,
    /// Do not fail because something cannot be told for want of a capability.
    #[arg(long)]
    pub lenient: bool,
    /// The cgroup whose processes are captured, if not this process's own.
    #[cfg(feature = "ebpf")]
    #[command(flatten)]
    pub cgroup: super::programs::CgroupArgs,
    /// The form of the answer.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// How findings are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A line each.
    Text,
    /// One object.
    Json,
}

/// Tries to get round the gate, and says what came of it.
///
/// # Errors
/// Something passes, or cannot be told; or why nothing could be tried.
pub(super) fn verify(args: &VerifyArgs, streams: &mut Streams<'_>) -> Outcome {
    let (plan, config) = plan(&args.config.config, args.netns.as_deref())?;
    #[cfg_attr(not(feature = "ebpf"), expect(unused_mut, reason = "another finding comes with eBPF"))]
    let mut findings = inside(args.netns.as_deref(), || Ok(attempt_all(&plan, args.user)))?;
    #[cfg(feature = "ebpf")]
    if plan.outbound.as_ref().is_some_and(|outbound| outbound.by_cgroup) {
        let cgroup = args.cgroup.open(&config)?;
        findings.insert(0, inside(args.netns.as_deref(), || Ok(super::programs::finding(&plan, &cgroup)))?);
    }
    #[cfg(not(feature = "ebpf"))]
    drop(config);
    let fine = proven(&findings, args.lenient);
    match args.output {
        Output::Text => {
            for finding in &findings {
                writeln!(streams.out, "{}", line(finding))?;
            }
        }
        Output::Json => {
            let answer = serde_json::json!({ "proven": fine, "findings": findings });
            writeln!(streams.out, "{}", serde_json::to_string_pretty(&answer).map_err(Failure::new)?)?;
        }
    }
    if fine {
        return Ok(ExitCode::SUCCESS);
    }
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    Err(Failure::new(format!(
        "not proven: {} of {} attempts pass round the gate, {} differ from what is declared, {} cannot be told",
        count(Verdict::Passes),
        findings.len(),
        count(Verdict::Differs),
        count(Verdict::Unproven)
    )))
}

fn line(finding: &Finding) -> String {
    let verdict = match finding.verdict {
        Verdict::Holds => "holds",
        Verdict::Passes => "passes",
        Verdict::Differs => "differs",
        Verdict::Unproven => "unproven",
    };
    let family = finding.family.map(|family| format!(", {family}")).unwrap_or_default();
    let remedy = finding.remedy.as_ref().map(|remedy| format!("; {remedy}")).unwrap_or_default();
    format!("{verdict:<8}  {}{family}: {}{remedy}", finding.attempt.as_str(), finding.detail)
}
