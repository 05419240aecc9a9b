//! `portcullis redirect`: the rules that bring a workload's traffic to the proxy.
//!
//! Run once, by an init container or a systemd unit, before the proxy. It needs CAP_NET_ADMIN in the network namespace, and
//! CAP_SYS_ADMIN besides to enter another one.

#[cfg(feature = "ebpf")]
mod programs;
mod verify;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::ValueEnum;

use super::{Failure, Outcome, Streams};
use crate::config::{Config, load};
use crate::intercept::resolvers::resolvers_in_netns;
use crate::intercept::{self, Applied, Backend, InboundMode, Plan, Standing, Udp};

/// What `redirect` does.
#[derive(Debug, clap::Subcommand)]
pub enum RedirectCommand {
    /// Make the rules that the config declares under `intercept`. Connections that are open live on.
    Apply(ApplyArgs),
    /// Remove every rule that `apply` has made.
    Remove(RemoveArgs),
    /// Print the rules, without making any.
    Show(ShowArgs),
    /// Prove by traffic that nothing gets round the gate. Exit code 1 with what does.
    Verify(verify::VerifyArgs),
}

/// Where the config is.
#[derive(Debug, clap::Args)]
pub struct ConfigArgs {
    /// The config file.
    #[arg(short, long, value_name = "FILE", env = "PORTCULLIS_CONFIG")]
    pub config: PathBuf,
}

/// Arguments of `redirect apply`.
#[derive(Debug, clap::Args)]
pub struct ApplyArgs {
    /// The config file.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// The network namespace, if not this process's own: /run/netns/NAME or /proc/PID/ns/net.
    #[arg(long, value_name = "PATH")]
    pub netns: Option<PathBuf>,
    /// What the rules are written with.
    #[arg(long, value_enum, default_value_t = Mode::Auto)]
    pub mode: Mode,
    /// The cgroup whose processes are captured, if not this process's own.
    #[cfg(feature = "ebpf")]
    #[command(flatten)]
    pub cgroup: programs::CgroupArgs,
}

/// Arguments of `redirect remove`.
#[derive(Debug, clap::Args)]
pub struct RemoveArgs {
    /// The network namespace, if not this process's own: /run/netns/NAME or /proc/PID/ns/net.
    #[arg(long, value_name = "PATH")]
    pub netns: Option<PathBuf>,
    /// eBPF capture: the one cgroup to remove the programs from. Without it from every one in the network namespace.
    #[cfg(feature = "ebpf")]
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<PathBuf>,
}

/// Arguments of `redirect show`.
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// The config file.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// The form of the rules.
    #[arg(long, value_enum, default_value_t = Format::Nft)]
    pub format: Format,
}

/// What rules are written with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// nf_tables, and iptables where the kernel has none.
    Auto,
    /// nf_tables, over netlink. Needs no other program.
    Nft,
    /// The programs iptables-restore and ip6tables-restore.
    Iptables,
    /// nf_tables, and outbound eBPF programs, as the config must declare them.
    #[cfg(feature = "ebpf")]
    Ebpf,
}

/// How rules are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// As `nft -f` reads them.
    Nft,
    /// As `iptables-restore --noflush` and `ip6tables-restore --noflush` read them, one after the other.
    Iptables,
}

/// Does what a subcommand of `redirect` says.
///
/// # Errors
/// Why it could not.
pub fn redirect(command: &RedirectCommand, streams: &mut Streams<'_>) -> Outcome {
    match command {
        RedirectCommand::Apply(args) => apply(args, streams),
        RedirectCommand::Remove(args) => remove(args, streams),
        RedirectCommand::Show(args) => show(args, streams),
        RedirectCommand::Verify(args) => verify::verify(args, streams),
    }
}

fn apply(args: &ApplyArgs, streams: &mut Streams<'_>) -> Outcome {
    let (plan, config) = plan(&args.config.config, args.netns.as_deref())?;
    if asks_nobody(&plan, &config) {
        writeln!(streams.err, "warning: no name server is known: DNS is refused; name `intercept.dns_servers`")?;
    }
    let by_cgroup = plan.outbound.as_ref().is_some_and(|outbound| outbound.by_cgroup);
    #[cfg(feature = "ebpf")]
    if args.mode == Mode::Ebpf && !by_cgroup {
        let what = "the config does not declare eBPF, and the proxy would miss the rules it declares; write \
                    `intercept: { outbound: { mode: ebpf } }`";
        return Err(Failure::new(what));
    }
    if args.mode == Mode::Iptables && by_cgroup {
        return Err(Failure::new("eBPF capture goes with nf_tables; leave `--mode iptables` out"));
    }
    #[cfg(feature = "ebpf")]
    let cgroup = by_cgroup.then(|| args.cgroup.open(&config)).transpose()?;
    #[cfg(not(feature = "ebpf"))]
    drop(config);
    let applied = inside(args.netns.as_deref(), || {
        let applied = match args.mode {
            Mode::Auto if !by_cgroup => intercept::apply(&plan),
            Mode::Iptables => intercept::apply_with(&plan, Backend::Iptables),
            _ => intercept::apply_with(&plan, Backend::Nftables),
        }?;
        // The rules first: they refuse what the programs do not capture yet.
        #[cfg(feature = "ebpf")]
        if let Some(cgroup) = &cgroup {
            intercept::ebpf::apply(&plan, cgroup)?;
        }
        // Of an earlier config, or of another cgroup. Until here they have kept the gate shut.
        #[cfg(feature = "ebpf")]
        intercept::ebpf::clear_others(cgroup.as_ref())?;
        // The kernel took them; this says that nobody else undid them in the same moment.
        Ok((applied, intercept::standing(&plan)?))
    })?;
    match applied {
        (applied, Standing::Whole) => writeln!(streams.out, "{}", told(&plan, applied))?,
        (_, Standing::Missing) => return Err(Failure::new("the rules were applied, and something has removed them")),
        (_, Standing::Differs(what)) => {
            return Err(Failure::new(format!(
                "the rules were applied, and something changes them: {}",
                what.join("; ")
            )));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn told(plan: &Plan, applied: Applied) -> String {
    let backend = match applied.backend {
        Backend::Nftables => "nf_tables",
        Backend::Iptables => "iptables",
    };
    let inbound = plan.inbound.as_ref().map(|inbound| {
        let how = match inbound.mode {
            InboundMode::Redirect => "redirect",
            InboundMode::Tproxy { preserve_source: false, .. } => "tproxy",
            InboundMode::Tproxy { preserve_source: true, .. } => "tproxy, with the client's address",
        };
        format!("; inbound to port {} by {how}", inbound.port)
    });
    let outbound = plan.outbound.as_ref().map(|outbound| {
        let how = if outbound.by_cgroup { " by eBPF" } else { "" };
        format!("; outbound to port {}{how}", outbound.port)
    });
    let Applied { chains, rules, .. } = applied;
    format!(
        "applied {rules} rules in {chains} chains by {backend}{}{}",
        inbound.unwrap_or_default(),
        outbound.unwrap_or_default()
    )
}

fn remove(args: &RemoveArgs, streams: &mut Streams<'_>) -> Outcome {
    #[cfg(feature = "ebpf")]
    inside(args.netns.as_deref(), || programs::remove(args.cgroup.as_deref()))?;
    inside(args.netns.as_deref(), intercept::remove)?;
    writeln!(streams.out, "removed: no rule of portcullis is left")?;
    Ok(ExitCode::SUCCESS)
}

fn show(args: &ShowArgs, streams: &mut Streams<'_>) -> Outcome {
    let (plan, _) = plan(&args.config.config, None)?;
    match args.format {
        Format::Nft => write!(streams.out, "{}", intercept::nft_text(&plan))?,
        Format::Iptables => {
            let (v4, v6) = intercept::iptables_text(&plan);
            write!(streams.out, "# IPv4\n{v4}\n# IPv6\n{v6}")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether name servers may be asked, and it is neither declared nor found which.
fn asks_nobody(plan: &Plan, config: &Config) -> bool {
    let declared = config.intercept.as_ref().is_some_and(|intercept| intercept.dns_servers.is_some());
    plan.outbound.is_some() && plan.udp == Udp::Dns && plan.dns_servers.is_empty() && !declared
}

/// What a config wants to have captured in a network namespace.
fn plan(config: &Path, netns: Option<&Path>) -> Result<(Plan, Config), Failure> {
    let loaded = load(config)?;
    match Plan::declared(&loaded.config, &resolvers_in_netns(netns)) {
        Some(plan) => Ok((plan, loaded.config)),
        None => Err(Failure::new(format!("{}: nothing is captured; declare it under `intercept`", config.display()))),
    }
}

fn inside<T: Send>(
    netns: Option<&Path>,
    work: impl FnOnce() -> Result<T, intercept::Error> + Send,
) -> Result<T, Failure> {
    match netns {
        None => work(),
        Some(path) => intercept::in_netns(path, work).and_then(|done| done),
    }
    .map_err(Failure::new)
}
