//! A Rego module beside the rules of a listener.
//!
//! In: modules that the config names, and the facts of requests that the rules have admitted. Out: whether the module
//! allows them too, and where a shadow module would have said something else. A module can only narrow what the rules
//! admit. It is compiled once; what goes wrong while it is asked is a refusal and is reported, never an answer.
//!
//! # What a module is asked
//!
//! `data.portcullis.authz.allow`, in Rego v1. `true` allows, everything else refuses, undefined too. Its `input`:
//!
//! ```json
//! {
//!   "source": { "spiffe_id": "spiffe://td/ns/a", "trust_domain": "td", "path": "/ns/a" },
//!   "destination": { "spiffe_id": "spiffe://td/ns/b", "trust_domain": "td", "path": "/ns/b" },
//!   "tls": { "version": "TLSv1.3", "cipher_suite": "TLS_AES_256_GCM_SHA384", "group": "X25519MLKEM768",
//!            "key_type": "ecdsa-p384", "resumed": false },
//!   "request": { "method": "POST", "host": "records.nhs.example", "path": "/p.S/Get",
//!                "headers": { "content-type": "application/grpc" },
//!                "grpc": { "service": "p.S", "method": "Get" } }
//! }
//! ```
//!
//! The path is the one that rules read ([`NormalPath::judged`](super::NormalPath::judged)), `*` for OPTIONS of the
//! server as a whole and absent for CONNECT. The host is in lower case, without port, and absent where it cannot be
//! compared. Names of headers are in lower case; several values of one are joined by `, `; octets that are no UTF-8 are
//! replaced. `grpc` is absent unless it is a gRPC call. The query is not shown.
//!
//! # Bounds
//!
//! A module file has at most [`MAX_MODULE_BYTES`], and is asked for at most [`TIME_LIMIT`]. Functions whose result can
//! be made as large as a request wishes (`numbers.range`, `bits.lsh`) are refused when the module is loaded, and so is a
//! call of a function that does not exist. There is no way out of it: no network, no files, no environment.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::http::{HttpFacts, HttpTarget};
use crate::config::files::in_words;
use crate::config::schema::RegoModules;
use crate::identity::SpiffeId;
use engine::Module;

/// The largest module file, in bytes.
pub const MAX_MODULE_BYTES: u64 = 1024 * 1024;
/// The longest time that one module may take for one request.
pub const TIME_LIMIT: Duration = Duration::from_millis(10);
/// What a module is asked for.
pub const ENTRY_POINT: &str = "data.portcullis.authz.allow";

/// Why a module gave no answer. A request is refused then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ModuleFailure {
    /// It took longer than [`TIME_LIMIT`].
    Time,
    /// An error while it was evaluated.
    Evaluation,
    /// The facts of the connection are not known, or not all headers: they were taken under rules without a module.
    NoFacts,
    /// It was not loaded.
    NotLoaded,
}

impl ModuleFailure {
    /// The label value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Time => "time",
            Self::Evaluation => "evaluation",
            Self::NoFacts => "no_facts",
            Self::NotLoaded => "not_loaded",
        }
    }
}

/// What one module said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Whether it allows the request.
    pub allows: bool,
    /// Why it gave no answer, if so.
    pub failure: Option<ModuleFailure>,
}

impl Answer {
    fn failed(failure: ModuleFailure) -> Self {
        Self { allows: false, failure: Some(failure) }
    }
}

/// What the modules of a listener said about a request that the rules had admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleReport {
    /// The module's answer, which counts.
    pub module: Answer,
    /// The shadow module's answer, which does not; none if there is no such module.
    pub shadow: Option<Answer>,
}

impl ModuleReport {
    /// Whether the request would have fared otherwise, had the shadow module been asked alone.
    pub fn shadow_differs(&self) -> bool {
        self.shadow.is_some_and(|shadow| shadow.allows != self.module.allows)
    }
}

/// The modules of one listener.
#[derive(Debug)]
pub(super) struct Gate {
    /// The rule that refusals name.
    pub(super) rule: Arc<str>,
    /// None where modules have not been loaded: nothing is allowed then.
    loaded: Option<(Module, Option<Module>)>,
}

impl Gate {
    /// Reads and compiles the modules.
    pub(super) fn load(listener: &str, files: &RegoModules) -> Result<Self, String> {
        let module = read(&files.module)?;
        let shadow = files.shadow.as_deref().map(read).transpose()?;
        Ok(Self { loaded: Some((module, shadow)), ..Self::shut(listener) })
    }

    /// A gate that allows nothing, in place of modules that have not been loaded.
    pub(super) fn shut(listener: &str) -> Self {
        Self { rule: format!("rego:{listener}").into(), loaded: None }
    }

    /// The texts of the modules, for a digest.
    pub(super) fn texts(&self) -> impl Iterator<Item = &str> {
        self.loaded.iter().flat_map(|(module, shadow)| std::iter::once(module).chain(shadow)).map(Module::text)
    }

    pub(super) fn ask(&self, facts: &HttpFacts) -> ModuleReport {
        let Some((module, shadow)) = &self.loaded else {
            return ModuleReport { module: Answer::failed(ModuleFailure::NotLoaded), shadow: None };
        };
        let Some(input) = input(facts) else {
            let nothing = Answer::failed(ModuleFailure::NoFacts);
            return ModuleReport { module: nothing, shadow: shadow.as_ref().map(|_| nothing) };
        };
        let shadow = shadow.as_ref().map(|shadow| shadow.ask(input.clone()));
        ModuleReport { module: module.ask(input), shadow }
    }
}

/// Looks at a module file as loading does.
///
/// # Errors
/// What is wrong with it, in words.
pub fn check(file: &std::path::Path) -> Result<(), String> {
    read(file).map(drop)
}

fn read(file: &std::path::Path) -> Result<Module, String> {
    use std::io::Read;
    let refuse = |what: String| format!("{}: {what}", file.display());
    let mut bytes = Vec::new();
    std::fs::File::open(file)
        .and_then(|open| open.take(MAX_MODULE_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|error| refuse(format!("{}; put it there and make it readable", in_words(&error))))?;
    if bytes.len() as u64 > MAX_MODULE_BYTES {
        return Err(refuse(format!("it is larger than {MAX_MODULE_BYTES} bytes; make it smaller")));
    }
    let text = String::from_utf8(bytes).map_err(|_| refuse("it is not UTF-8; save it as UTF-8 text".into()))?;
    Module::compile(text).map_err(refuse)
}

/// What a module may read; none without the facts of the connection and all headers, for an absence must be certain.
fn input(facts: &HttpFacts) -> Option<Value> {
    let (connection, kept) = (facts.connection()?, facts.all_headers()?);
    let identity =
        |id: &SpiffeId| json!({ "spiffe_id": id.as_str(), "trust_domain": id.trust_domain_name(), "path": id.path() });
    let mut request = Map::new();
    request.insert("method".into(), facts.method().as_str().into());
    if let Some(host) = facts.host() {
        request.insert("host".into(), host.to_ascii_lowercase().into());
    }
    match facts.target() {
        HttpTarget::Path(path) => drop(request.insert("path".into(), path.judged().into())),
        HttpTarget::Server => drop(request.insert("path".into(), "*".into())),
        HttpTarget::Authority => {}
    }
    let mut headers = Map::new();
    for (name, value) in kept {
        let value = String::from_utf8_lossy(value.as_bytes());
        match headers.get_mut(name.as_str()) {
            Some(Value::String(before)) => {
                before.push_str(", ");
                before.push_str(&value);
            }
            _ => drop(headers.insert(name.as_str().into(), value.into())),
        }
    }
    request.insert("headers".into(), headers.into());
    let grpc = facts.target().path().filter(|_| facts.is_grpc()).and_then(|path| path.judged().strip_prefix('/'));
    if let Some((service, method)) = grpc.and_then(|path| path.split_once('/')) {
        request.insert("grpc".into(), json!({ "service": service, "method": method }));
    }
    let mut input = Map::new();
    input.insert("source".into(), identity(&connection.source));
    if let Some(destination) = &connection.destination {
        input.insert("destination".into(), identity(destination));
    }
    if let Some(tls) = &connection.tls {
        let tls = json!({
            "version": tls.version,
            "cipher_suite": tls.cipher_suite,
            "group": tls.group,
            "key_type": tls.key_type.as_str(),
            "resumed": tls.resumed,
        });
        input.insert("tls".into(), tls);
    }
    input.insert("request".into(), request.into());
    Some(input.into())
}

#[cfg(feature = "rego")]
mod engine {
    //! Modules in the interpreter.

    use std::num::NonZeroU32;

    use regorus::languages::rego::compiler::Compiler;
    use regorus::utils::limits::ExecutionTimerConfig;
    use regorus::{Engine, LimitError};

    use super::{Answer, ENTRY_POINT, ModuleFailure, TIME_LIMIT};

    /// Functions whose result a request could make as large as it wishes.
    const UNBOUNDED: [(&str, &str); 3] = [("numbers", "range"), ("numbers", "range_step"), ("bits", "lsh")];

    /// One module, compiled. Each question is put to a copy, which shares what does not change.
    pub(super) struct Module {
        engine: Engine,
        text: String,
    }

    impl std::fmt::Debug for Module {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Module").finish_non_exhaustive()
        }
    }

    impl Module {
        pub(super) fn compile(text: String) -> Result<Self, String> {
            if let Some((room, function)) = UNBOUNDED.into_iter().find(|(room, name)| calls(&text, room, name)) {
                return Err(format!("{room}.{function} could take any time and memory; do without it"));
            }
            let mut engine = Engine::new();
            // An error of a function is an error, not undefined: `not f(x)` would hold.
            engine.set_strict_builtin_errors(true);
            engine.set_gather_prints(true);
            engine.set_execution_timer_config(ExecutionTimerConfig {
                limit: TIME_LIMIT,
                check_interval: NonZeroU32::MIN,
            });
            engine.add_policy("module".into(), text.clone()).map_err(|error| one_line(&error))?;
            let policy = engine.compile_with_entrypoint(&ENTRY_POINT.into()).map_err(|error| {
                format!("it has no {ENTRY_POINT} ({}); write `package portcullis.authz` and `allow`", one_line(&error))
            })?;
            // The interpreter finds out about unknown functions only when it meets them; this compiler does at once.
            Compiler::compile_from_policy(&policy, &[ENTRY_POINT]).map_err(|error| one_line(&error))?;
            Ok(Self { engine, text })
        }

        pub(super) fn text(&self) -> &str {
            &self.text
        }

        pub(super) fn ask(&self, input: serde_json::Value) -> Answer {
            let mut engine = self.engine.clone();
            engine.set_input(input.into());
            match engine.eval_rule(ENTRY_POINT.into()) {
                Ok(answer) => Answer { allows: answer == regorus::Value::Bool(true), failure: None },
                Err(error) => Answer::failed(match error.downcast_ref() {
                    Some(LimitError::TimeLimitExceeded { .. }) => ModuleFailure::Time,
                    _ => ModuleFailure::Evaluation,
                }),
            }
        }
    }

    /// Whether `room.name` may be called: by the words alone, so that no way of writing it is missed.
    fn calls(text: &str, room: &str, name: &str) -> bool {
        let word = |c: char| c.is_alphanumeric() || c == '_';
        text.match_indices(room).any(|(at, _)| {
            let before = text.get(..at).unwrap_or_default();
            let rest = text.get(at + room.len()..).unwrap_or_default();
            let rest = rest.trim_start_matches(|c: char| c.is_whitespace() || matches!(c, '.' | '[' | '"' | '`'));
            !before.ends_with(word) && rest.strip_prefix(name).is_some_and(|rest| !rest.starts_with(word))
        })
    }

    fn one_line(error: &dyn std::fmt::Display) -> String {
        let text = error.to_string();
        text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(300).collect()
    }
}

#[cfg(not(feature = "rego"))]
mod engine {
    //! A build without Rego has no module.

    /// There is none.
    #[derive(Debug)]
    pub(super) enum Module {}

    impl Module {
        pub(super) fn compile(_: String) -> Result<Self, String> {
            Err("this build has no Rego; build with the feature `rego`".into())
        }

        pub(super) fn text(&self) -> &str {
            match *self {}
        }

        pub(super) fn ask(&self, _: serde_json::Value) -> super::Answer {
            match *self {}
        }
    }
}

#[cfg(test)]
#[cfg(feature = "rego")]
mod tests;
