//! The eBPF part of `redirect`: whose processes are captured, and the programs beside the rules.

use std::path::{Path, PathBuf};

use crate::cli::Failure;
use crate::config::Config;
use crate::intercept::ebpf::{self, Cgroup};
use crate::intercept::verify::{Attempt, Finding, Verdict};
use crate::intercept::{Error, Plan};

/// Which cgroup.
#[derive(Debug, clap::Args)]
pub struct CgroupArgs {
    /// eBPF capture: the cgroup's directory. Without it the config's, or the one this process is in.
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
}

impl CgroupArgs {
    /// The one that is meant.
    pub(super) fn open(&self, config: &Config) -> Result<Cgroup, Failure> {
        let outbound = config.intercept.as_ref().and_then(|intercept| intercept.outbound.as_ref());
        let declared = outbound.and_then(|outbound| outbound.cgroup.as_ref());
        match self.cgroup.as_ref().or(declared) {
            Some(path) => Cgroup::open(path),
            None => Cgroup::own(),
        }
        .map_err(Failure::new)
    }
}

/// Removes the programs from a cgroup, or all that are in the network namespace.
pub(super) fn remove(cgroup: Option<&Path>) -> Result<(), Error> {
    match cgroup {
        Some(path) => ebpf::remove(&Cgroup::open(path)?).map(|_| ()),
        None => ebpf::clear_others(None).map(|_| ()),
    }
}

/// Whether the programs stand as declared.
pub(super) fn finding(plan: &Plan, cgroup: &Cgroup) -> Finding {
    let (verdict, detail) = match ebpf::standing(plan, cgroup) {
        Ok(faults) if faults.is_empty() => {
            (Verdict::Holds, format!("the kernel has all of them, for {}", cgroup.path().display()))
        }
        Ok(faults) => {
            let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
            (Verdict::Differs, faults.join("; "))
        }
        Err(why) => (Verdict::Unproven, why.to_string()),
    };
    let remedy =
        (verdict == Verdict::Differs).then(|| "run `portcullis redirect apply` for the same cgroup".to_owned());
    Finding { attempt: Attempt::Programs, family: None, verdict, detail, remedy }
}
