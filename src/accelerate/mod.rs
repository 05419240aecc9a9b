//! Plaintext between proxy and workload past TCP, by sockmap and sk_msg, where the kernel can be trusted with it.
//!
//! In: the config. Out: programs that are attached to the process's cgroup for as long as it lives, or what the kernel has
//! failed. They do nothing to bytes, so the data path knows nothing of them; a connection that they do not know goes by TCP.
//!
//! Before anything is attached, [`self_test`] puts sockets of this process into a table of the same kind and looks at what
//! applications rely on. Must be called with the privileges of the start, before the sandbox takes them.

#[cfg(all(feature = "ebpf", target_os = "linux"))]
pub mod programs;
#[cfg(all(feature = "ebpf", target_os = "linux"))]
pub mod self_test;

use serde_json::{Value, json};

use crate::config::Config;
use crate::config::address::Target;
use crate::config::schema::AccelerateMode;

/// What came of it.
#[derive(Debug)]
pub struct Acceleration {
    mode: AccelerateMode,
    /// Why there is none, a line for each reason.
    refused: Vec<String>,
    /// Ends with this value.
    #[cfg(all(feature = "ebpf", target_os = "linux"))]
    _attached: Option<programs::Attached>,
}

impl Acceleration {
    /// None.
    pub fn off() -> Self {
        Self::refused(AccelerateMode::Off, Vec::new())
    }

    fn refused(mode: AccelerateMode, refused: Vec<String>) -> Self {
        Self {
            mode,
            refused,
            #[cfg(all(feature = "ebpf", target_os = "linux"))]
            _attached: None,
        }
    }

    /// Starts what `config` asks for, if the kernel passes the test.
    ///
    /// # Errors
    /// Under `accelerate: require`, why it cannot be had.
    pub fn start(config: &Config) -> Result<Self, String> {
        let mode = config.accelerate;
        if mode == AccelerateMode::Off {
            return Ok(Self::off());
        }
        match attach(&plaintext_ports(config)) {
            Ok(attached) => Ok(attached.with(mode)),
            Err(refused) if mode == AccelerateMode::Require => {
                Err(format!("accelerate: require cannot be had: {}; write auto, or \"off\"", refused.join("; ")))
            }
            Err(refused) => Ok(Self::refused(mode, refused)),
        }
    }

    /// Says in the log, which starts later, what came of it.
    pub fn tell(&self) {
        match (self.mode, self.refused.as_slice()) {
            (AccelerateMode::Off, _) => {}
            (mode, []) => tracing::info!(mode = mode.as_str(), "plaintext is accelerated"),
            (mode, refused) => {
                tracing::warn!(mode = mode.as_str(), why = refused.join("; "), "plaintext is not accelerated");
            }
        }
    }

    /// For `/state`.
    pub fn report(&self) -> Value {
        let active = self.mode != AccelerateMode::Off && self.refused.is_empty();
        json!({ "mode": self.mode.as_str(), "active": active, "refused": self.refused })
    }

    #[cfg(all(feature = "ebpf", target_os = "linux"))]
    fn with(self, mode: AccelerateMode) -> Self {
        Self { mode, ..self }
    }
}

#[cfg(all(feature = "ebpf", target_os = "linux"))]
fn attach(ports: &[u16]) -> Result<Acceleration, Vec<String>> {
    let one = |why: String| vec![why];
    let programs = programs::Programs::load(ports).map_err(one)?;
    let failed: Vec<String> = self_test::failed(Some(&programs)).iter().map(ToString::to_string).collect();
    if !failed.is_empty() {
        return Err(failed);
    }
    let cgroup = crate::intercept::ebpf::Cgroup::own().map_err(|error| one(error.to_string()))?;
    let attached = programs.attach(&cgroup).map_err(one)?;
    Ok(Acceleration { _attached: Some(attached), ..Acceleration::off() })
}

#[cfg(not(all(feature = "ebpf", target_os = "linux")))]
fn attach(_: &[u16]) -> Result<Never, Vec<String>> {
    Err(vec!["this build has no eBPF (cargo feature `ebpf`)".to_owned()])
}

/// Nothing can be attached by a build without eBPF.
#[cfg(not(all(feature = "ebpf", target_os = "linux")))]
enum Never {}

#[cfg(not(all(feature = "ebpf", target_os = "linux")))]
impl Never {
    fn with(self, _: AccelerateMode) -> Acceleration {
        match self {}
    }
}

/// Where plaintext is served on this machine, by the proxy to its workload and the other way round. Captured connections of
/// unnamed ports are not among them.
fn plaintext_ports(config: &Config) -> Vec<u16> {
    let port = |text: &String| match Target::parse(text) {
        Ok(Target::Tcp { port, .. }) => Some(port),
        _ => None,
    };
    let inbound = config.inbound.iter().flat_map(|inbound| {
        let named = inbound.capture.iter().flat_map(|capture| capture.named()).copied();
        inbound.to.iter().filter_map(port).chain(named)
    });
    let outbound = config.outbound.iter().filter_map(|outbound| outbound.listen.as_ref().and_then(port));
    let captured = config.intercept.iter().filter_map(|intercept| Some(intercept.outbound.as_ref()?.port));
    let mut ports: Vec<u16> = inbound.chain(outbound).chain(captured).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

#[cfg(test)]
mod tests;
