//! The proxy's own sandbox: what it takes from itself, so that whoever takes over the process gets little with it.
//!
//! In: the config. Out: a process without privileges to gain, core dumps, capabilities that it does not use, files that the
//! config does not name and system calls that a proxy does not make; and a [`Report`] of what is in force. In two steps,
//! because of what each rule holds for: [`Sandbox::enter`] before there are threads (capabilities and Landlock are a
//! thread's own, and pass to those that it starts), [`Sandbox::seal`] for all threads once the listeners are bound.

mod capabilities;
mod landlock;
mod paths;
mod report;
mod seccomp;

use std::path::Path;

use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::CapabilitySet;

use crate::config::Config;
use crate::config::schema::SandboxMode;
use paths::Grants;

pub use report::{Part, Report};

/// What is in force in this process. It cannot be widened again, only left by a restart.
#[derive(Debug)]
pub struct Sandbox {
    report: Report,
    /// Worth a line each in the log, which starts later than the sandbox.
    warnings: Vec<String>,
    walls: Option<Walls>,
    /// Capabilities that were there and are gone.
    given_up: CapabilitySet,
    /// From which port on none is needed; not to be read again from within.
    unprivileged_from: u16,
}

/// The files that are left.
#[derive(Debug)]
struct Walls {
    grants: Grants,
    /// Keeps the rule for `/proc/self` alive.
    _pinned: landlock::Pinned,
}

impl Sandbox {
    /// None: for a process that is no proxy alone, such as `demo`.
    pub fn off() -> Self {
        Self {
            report: Report::off(),
            warnings: Vec::new(),
            walls: None,
            given_up: CapabilitySet::empty(),
            unprivileged_from: 0,
        }
    }

    /// The first step, with what `config` asks for; `file` is where it was read. To be called before the process has
    /// threads: what is set here holds for this thread and those that it starts.
    ///
    /// # Errors
    /// Under `sandbox: require`, what cannot be had and why.
    pub fn enter(config: &Config, file: &Path) -> Result<Self, String> {
        // What the kernel told the process at its start is read on first use, and panics where it can no longer be read.
        let _ = rustix::param::page_size();
        let mode = config.sandbox;
        if mode == SandboxMode::Off {
            return Ok(Self::off());
        }
        // Read once, at the first question, from prctl(2) or `/proc/self/auxv`: both are out of reach from within.
        let _ = rustix::param::page_size();
        let grants = Grants::of(config, file);
        // Asked for with every scrape. It is read once, by means that are out of reach afterwards for any user but root,
        // and the library that reads it panics without them.
        let _ = rustix::param::page_size();
        let mut sandbox = Self { report: Report::begin(mode), warnings: grants.notes.clone(), ..Self::off() };
        sandbox.report.no_new_privs = Part::of(rustix::thread::set_no_new_privs(true).map_err(|e| e.to_string()));
        sandbox.report.core_dumps = Part::of(no_core_dumps());
        match alone() {
            Ok(()) => {
                sandbox.give_up_capabilities(config);
                sandbox.give_up_files(grants);
            }
            Err(why) => {
                sandbox.report.capabilities = Part::missing(why.clone());
                sandbox.report.landlock = Part::missing(why);
            }
        }
        sandbox.report.demand()?;
        Ok(sandbox)
    }

    fn give_up_files(&mut self, grants: Grants) {
        match landlock::restrict(&grants) {
            Ok(walls) => {
                self.report.landlock = Part::with(grants.shown(&walls.level));
                self.walls = Some(Walls { grants, _pinned: walls.pinned });
            }
            Err(why) => self.report.landlock = Part::missing(why),
        }
    }

    fn give_up_capabilities(&mut self, config: &Config) {
        self.unprivileged_from = capabilities::unprivileged_from();
        let needed = capabilities::needed(config, self.unprivileged_from);
        match capabilities::keep_only(needed) {
            Ok(kept) => {
                self.report.capabilities = Part::with(kept.shown());
                self.given_up = kept.given_up;
                if capabilities::overrode_permissions(kept.given_up) {
                    self.warnings.extend(paths::unreachable(config));
                }
            }
            Err(why) => self.report.capabilities = Part::missing(why),
        }
    }

    /// The second step: the filter of system calls, for all threads. To be called once, when all is bound and nothing is
    /// served yet. Says in the log what is in force.
    ///
    /// # Errors
    /// Under `sandbox: require`, that there is no filter and why.
    pub fn seal(&mut self) -> Result<(), String> {
        if self.report.mode == SandboxMode::Off {
            return Ok(());
        }
        self.report.seccomp = Part::of(seccomp::filter_all_threads());
        for warning in &self.warnings {
            tracing::warn!("sandbox: {warning}");
        }
        for missing in self.report.missing() {
            tracing::warn!("sandbox: {missing}; the proxy runs without it");
        }
        tracing::info!(mode = self.report.mode.as_str(), in_force = self.report.in_force().join(" "), "sandbox");
        self.report.demand()
    }

    /// Whether a changed config can work within what is left.
    ///
    /// # Errors
    /// What it needs that was given up, in words.
    pub fn permits(&self, config: &Config) -> Result<(), String> {
        if let Some(walls) = &self.walls {
            walls.grants.cover(config)?;
        }
        let needed = capabilities::needed(config, self.unprivileged_from) & self.given_up;
        if needed.is_empty() {
            return Ok(());
        }
        let names = capabilities::names(needed).join(", ");
        Err(format!("a port that it names needs {names}, which the sandbox gave up at start; restart to change it"))
    }

    /// What is in force, for `/state`.
    pub fn report(&self) -> &Report {
        &self.report
    }
}

/// Whether no thread is left out of what holds for this one only, such as a library's.
fn alone() -> Result<(), String> {
    let threads = std::fs::read_dir("/proc/self/task").map_err(|error| format!("/proc/self/task: {error}"))?.count();
    if threads == 1 { Ok(()) } else { Err(format!("it would hold for one of the {threads} threads that run already")) }
}

/// No memory of ours, which holds private keys, in a file or in a crash reporter. The limit alone would do for files only:
/// core(5) has it that pipes take no notice of it. Not being dumpable does for both and, proc(5) and ptrace(2), keeps other
/// processes of the same user from reading our memory. What it hides is `/proc/PID/{exe,environ,maps,fd,…}` from all but
/// those with CAP_SYS_PTRACE; the directory keeps its owner, which SPIRE's agent compares with the caller's, and `stat`,
/// `status`, `cgroup` and `mountinfo` stay readable.
fn no_core_dumps() -> Result<(), String> {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, none).map_err(|error| format!("the limit cannot be set: {error}"))?;
    // Read once, out of a file that a process without privileges does not see any more after this.
    let _ = rustix::param::page_size();
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|error| format!("PR_SET_DUMPABLE is refused: {error}"))
}
