//! What is in force and what is not, for `/state` and for the log.

use serde::Serialize;

use crate::config::schema::SandboxMode;

/// The sandbox, part by part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// What the config asks for.
    pub mode: SandboxMode,
    /// Nothing that is executed gives more privileges (PR_SET_NO_NEW_PRIVS).
    pub no_new_privs: Part,
    /// No core dumps, and no other process reads our memory (RLIMIT_CORE, PR_SET_DUMPABLE).
    pub core_dumps: Part,
    /// Only the capabilities that the config needs.
    pub capabilities: Part,
    /// Only the files that the config needs.
    pub landlock: Part,
    /// Only the system calls that a proxy makes.
    pub seccomp: Part,
}

/// One part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// Whether it holds.
    pub in_force: bool,
    /// Why not, if it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What exactly holds.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub detail: Vec<String>,
}

impl Part {
    pub(super) fn with(detail: Vec<String>) -> Self {
        Self { in_force: true, why: None, detail }
    }

    pub(super) fn missing(why: impl Into<String>) -> Self {
        Self { in_force: false, why: Some(why.into()), detail: Vec::new() }
    }

    pub(super) fn of(outcome: Result<(), String>) -> Self {
        outcome.map_or_else(Self::missing, |()| Self::with(Vec::new()))
    }
}

/// Why the filter is not there between the two steps; no lack yet.
const NOT_YET: &str = "not yet: it comes once the listeners are bound";

impl Report {
    pub(super) fn off() -> Self {
        Self { mode: SandboxMode::Off, ..Self::all(&Part::missing("sandbox: off")) }
    }

    /// Before anything is in force.
    pub(super) fn begin(mode: SandboxMode) -> Self {
        Self { mode, ..Self::all(&Part::missing(NOT_YET)) }
    }

    fn all(part: &Part) -> Self {
        Self {
            mode: SandboxMode::Off,
            no_new_privs: part.clone(),
            core_dumps: part.clone(),
            capabilities: part.clone(),
            landlock: part.clone(),
            seccomp: part.clone(),
        }
    }

    fn parts(&self) -> [(&'static str, &Part); 5] {
        [
            ("no_new_privs", &self.no_new_privs),
            ("core_dumps", &self.core_dumps),
            ("capabilities", &self.capabilities),
            ("landlock", &self.landlock),
            ("seccomp", &self.seccomp),
        ]
    }

    /// The parts that hold, by name.
    pub fn in_force(&self) -> Vec<&'static str> {
        self.parts().iter().filter(|(_, part)| part.in_force).map(|(name, _)| *name).collect()
    }

    /// A sentence for each part that could not be had.
    pub(super) fn missing(&self) -> Vec<String> {
        let parts = self.parts();
        let lacking = parts.iter().filter(|(_, part)| !part.in_force && part.why.as_deref() != Some(NOT_YET));
        lacking.map(|(name, part)| format!("{name}: {}", part.why.as_deref().unwrap_or_default())).collect()
    }

    /// Holds `require` against what there is.
    pub(super) fn demand(&self) -> Result<(), String> {
        let missing = self.missing();
        if self.mode != SandboxMode::Require || missing.is_empty() {
            return Ok(());
        }
        Err(format!("sandbox: require, but {}; mend that, or write `sandbox: prefer`", missing.join("; ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn require_refuses_what_prefer_only_tells_of() {
        for (mode, refused) in [(SandboxMode::Prefer, false), (SandboxMode::Require, true)] {
            let mut report = Report::begin(mode);
            assert_eq!(report.missing(), Vec::<String>::new(), "nothing has been tried yet");
            report.no_new_privs = Part::with(Vec::new());
            report.landlock = Part::missing("no such thing");
            assert_eq!(report.missing(), ["landlock: no such thing"]);
            assert_eq!(report.in_force(), ["no_new_privs"]);
            assert_eq!(report.demand().is_err(), refused);
        }
    }

    #[test]
    fn a_part_says_only_what_there_is_to_say() {
        let json = |part: &Part| serde_json::to_string(part).unwrap();
        assert_eq!(json(&Part::of(Ok(()))), r#"{"in_force":true}"#);
        assert_eq!(json(&Part::missing("no")), r#"{"in_force":false,"why":"no"}"#);
        assert_eq!(json(&Part::with(vec!["a".into()])), r#"{"in_force":true,"detail":["a"]}"#);
    }
}
