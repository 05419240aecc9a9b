//! How captured traffic gets in: the rules that bring it to the proxy's capture ports without the workload's doing, and
//! where a captured connection was for.
//!
//! ```text
//! Plan ─ chains ─ Ruleset ─ expressions ─ nftables ─ netlink ─ kernel
//!                    ├ nft_text        ─ for review
//!                    └ iptables_text   ─ for review, and for kernels without nftables
//! ```
//!
//! In: what the config declares to be captured, as a [`Plan`]. Out: rules in the network namespace of the calling thread, or
//! what is wrong with those that are there; and the original destination of a connection. All that concerns rules blocks,
//! for milliseconds, and takes CAP_NET_ADMIN, reading too: the kernel shows nf_tables to nobody else. Whether they do what
//! they should is tried from outside ([`verify`]) and watched from inside ([`Watch`]).
//!
//! Rules live in one table of our own (`inet portcullis`), or in chains of our own (`PORTCULLIS_*`) with iptables; nothing
//! else is touched. They are replaced in one transaction: connections that are open stay as they are.

mod addresses;
mod arrivals;
mod chains;
mod changes;
pub mod declared;
#[cfg(all(feature = "ebpf", target_os = "linux"))]
pub mod ebpf;
mod expressions;
mod iptables;
mod iptables_text;
pub(crate) mod link;
mod netlink;
mod netns;
mod nft_text;
mod nftables;
mod original;
pub mod plan;
pub mod resolvers;
mod routing;
mod rules;
pub mod verify;
mod watch;

use rustix::io::Errno;

pub use arrivals::Arrivals;
pub use netns::in_netns;
pub use original::original_destination;
pub use plan::{InboundCapture, InboundMode, OutboundCapture, Plan, ProxyOwner, Udp, WORKLOAD_TOS};
pub use watch::{Finding, Seen, Watch};

use netlink::Failed;

/// Why rules could not be applied, removed or read: one line, with what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(String);

impl Error {
    fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }

    fn kernel(doing: &str, errno: Errno) -> Self {
        Self(match errno {
            Errno::PERM | Errno::ACCESS => format!(
                "{doing}: not permitted. This takes CAP_NET_ADMIN in the network namespace: run as root, or give the \
                 container the capability NET_ADMIN"
            ),
            Errno::NETDOWN => format!("{doing}: the loopback interface is down; set it up first (ip link set lo up)"),
            Errno::TIMEDOUT => format!("{doing}: the kernel did not answer in time; try again"),
            errno => format!("{doing}: {errno}"),
        })
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// What the rules are written with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// nf_tables, over netlink.
    Nftables,
    /// The program iptables-restore.
    Iptables,
}

/// What was applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    /// What the rules were written with.
    pub backend: Backend,
    /// How many chains there are.
    pub chains: usize,
    /// How many rules are in them.
    pub rules: usize,
}

/// Whether the rules of a plan are in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// All of them, and nothing else in their place.
    Whole,
    /// None of them.
    Missing,
    /// Some: what is wrong, a line each.
    Differs(Vec<String>),
}

/// Applies a plan in the network namespace of this thread, with nf_tables or, where the kernel has none, with iptables.
/// Rules of another plan of ours are replaced; applied twice, it is as if applied once.
///
/// # Errors
/// Why it could not.
pub fn apply(plan: &Plan) -> Result<Applied, Error> {
    let ruleset = prepare(plan)?;
    match nftables::apply(&ruleset) {
        Ok(()) => instead_of_iptables(&ruleset),
        Err(failed) if unsupported(failed.errno) => with_iptables(&ruleset).map_err(|why| {
            Error::new(format!("the kernel has not all of nf_tables ({}), and with iptables: {why}", failed.errno))
        }),
        Err(failed) => Err(refused(failed)),
    }
}

/// Applies a plan with one backend only, and takes away what the other has.
///
/// # Errors
/// Why it could not.
pub fn apply_with(plan: &Plan, backend: Backend) -> Result<Applied, Error> {
    let ruleset = prepare(plan)?;
    match backend {
        Backend::Nftables => {
            nftables::apply(&ruleset).map_err(refused)?;
            instead_of_iptables(&ruleset)
        }
        Backend::Iptables => {
            let applied = with_iptables(&ruleset)?;
            remove_nftables()?;
            Ok(applied)
        }
    }
}

/// Removes all that [`apply`] may have made in the network namespace of this thread. That there is nothing is fine.
///
/// # Errors
/// Why it could not.
pub fn remove() -> Result<(), Error> {
    remove_nftables()?;
    iptables::remove()?;
    routing::apply(None).map_err(|(what, errno)| Error::kernel(what, errno))
}

/// Compares what is in force in the network namespace of this thread with a plan, rule by rule.
///
/// # Errors
/// Why it cannot be read.
pub fn standing(plan: &Plan) -> Result<Standing, Error> {
    let ruleset = chains::ruleset(plan);
    let found = match nftables::differences(&ruleset) {
        Ok(Some(found)) => Some(found),
        Err(errno) if !unsupported(errno) => return Err(Error::kernel("reading our table of nf_tables", errno)),
        Ok(None) | Err(_) => iptables::differences(&ruleset)?,
    };
    judged(&ruleset, found)
}

/// The same without another program: rules that were made with iptables are not seen, and count as missing. A proxy that
/// has locked itself in would be ended for starting one.
fn standing_in_nftables(plan: &Plan) -> Result<Standing, Error> {
    let ruleset = chains::ruleset(plan);
    let found = nftables::differences(&ruleset);
    judged(&ruleset, found.map_err(|errno| Error::kernel("reading our table of nf_tables", errno))?)
}

fn judged(ruleset: &rules::Ruleset, found: Option<Vec<String>>) -> Result<Standing, Error> {
    let Some(mut differences) = found else { return Ok(Standing::Missing) };
    let routing = routing::differences(ruleset.routing);
    differences.extend(routing.map_err(|errno| Error::kernel("reading the routing rules", errno))?);
    Ok(if differences.is_empty() { Standing::Whole } else { Standing::Differs(differences) })
}

/// The rules of a plan as nft(8) reads and shows them.
pub fn nft_text(plan: &Plan) -> String {
    nft_text::text(&chains::ruleset(plan))
}

/// The rules of a plan as iptables-restore and ip6tables-restore read them, with `--noflush`.
pub fn iptables_text(plan: &Plan) -> (String, String) {
    let ruleset = chains::ruleset(plan);
    let text = |family| iptables_text::text(&ruleset, family, &iptables_text::Present::default());
    (text(rules::Family::V4), text(rules::Family::V6))
}

/// Routing comes first: a rule that marks packets would else lead them out.
fn prepare(plan: &Plan) -> Result<rules::Ruleset, Error> {
    let ruleset = chains::ruleset(plan);
    routing::apply(ruleset.routing).map_err(|(what, errno)| Error::kernel(what, errno))?;
    Ok(ruleset)
}

fn with_iptables(ruleset: &rules::Ruleset) -> Result<Applied, Error> {
    iptables::apply(ruleset)?;
    Ok(applied(ruleset, Backend::Iptables))
}

fn instead_of_iptables(ruleset: &rules::Ruleset) -> Result<Applied, Error> {
    iptables::remove()?;
    Ok(applied(ruleset, Backend::Nftables))
}

fn applied(ruleset: &rules::Ruleset, backend: Backend) -> Applied {
    let rules = ruleset.chains.iter().map(|chain| chain.rules.len()).sum();
    Applied { backend, chains: ruleset.chains.len(), rules }
}

fn remove_nftables() -> Result<(), Error> {
    match nftables::remove() {
        Err(failed) if !unsupported(failed.errno) => {
            Err(Error::kernel("removing our table of nf_tables", failed.errno))
        }
        _ => Ok(()),
    }
}

/// What a kernel says that lacks nf_tables, or an expression of a rule.
fn unsupported(errno: Errno) -> bool {
    matches!(errno, Errno::OPNOTSUPP | Errno::PROTONOSUPPORT | Errno::NOENT | Errno::AFNOSUPPORT)
}

fn refused(failed: Failed) -> Error {
    let place = failed.message.map(|number| format!(" (message {number})")).unwrap_or_default();
    Error::kernel(&format!("applying the rules with nf_tables{place}"), failed.errno)
}

#[cfg(test)]
mod tests;
