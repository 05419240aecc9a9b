//! Capabilities (capabilities(7)): those that the config needs are kept, the rest is given up.
//!
//! They are a thread's own; threads that are started later have those of the thread that starts them.

use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::config::Config;
use crate::config::address::Target;
use crate::config::schema::InboundMode;

/// Below this port one needs CAP_NET_BIND_SERVICE, where the kernel does not say otherwise.
const PRIVILEGED_BELOW: u16 = 1024;

/// What is left, and what is not.
pub(super) struct Kept {
    pub(super) kept: CapabilitySet,
    pub(super) given_up: CapabilitySet,
}

impl Kept {
    /// For `/state`: the names of those that are left.
    pub(super) fn shown(&self) -> Vec<String> {
        names(self.kept).into_iter().map(|name| format!("kept {name}")).collect()
    }
}

/// What a proxy with this config goes on needing. CAP_NET_BIND_SERVICE stays where a declared port asks for it, although the
/// listeners are bound by then: a reload may close such a port and open it again.
pub(super) fn needed(config: &Config, unprivileged_from: u16) -> CapabilitySet {
    let outbound = config.outbound.iter().filter_map(|outbound| match Target::parse(outbound.listen.as_deref()?) {
        Ok(Target::Tcp { port, .. }) => Some(port),
        _ => None,
    });
    let inbound = config.inbound.iter().filter_map(|inbound| Some(inbound.listen?.port()));
    let mut ports = inbound.chain(outbound).chain([config.admin.listen.port()]);
    let mut needed = CapabilitySet::empty();
    // Port 0 is the kernel's choice.
    if ports.any(|port| port != 0 && port < unprivileged_from) {
        needed |= CapabilitySet::NET_BIND_SERVICE;
    }
    // The watch reads the rules by it, where it was given.
    if config.intercept.is_some() {
        needed |= CapabilitySet::NET_ADMIN;
    }
    if marks_sockets(config) {
        // Before Linux 5.17 a mark needs the first; either will do for IP_TRANSPARENT (socket(7), ip(7)).
        needed |= CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW;
    }
    needed
}

/// Whether sockets of the proxy are transparent or carry a mark.
fn marks_sockets(config: &Config) -> bool {
    config.intercept.as_ref().is_some_and(|intercept| {
        let transparent = intercept.inbound.as_ref().is_some_and(|inbound| inbound.mode == InboundMode::Tproxy);
        transparent || intercept.proxy.mark.is_some()
    })
}

/// From which port on anybody may bind (ip(7), `ip_unprivileged_port_start`). Containers often have 0 here.
pub(super) fn unprivileged_from() -> u16 {
    let told = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    told.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(PRIVILEGED_BELOW)
}

/// Gives up all but `needed` in every set of this thread: effective, permitted, inheritable, ambient and, where we may, the
/// bounding set, which without new privileges (and without execve) gives nothing anyway.
///
/// # Errors
/// The kernel's, in words.
pub(super) fn keep_only(needed: CapabilitySet) -> Result<Kept, String> {
    let failed = |what: &'static str| move |error: Errno| format!("{what}: {error}");
    let had = rustix::thread::capabilities(None).map_err(failed("they cannot be read"))?;
    if had.effective.contains(CapabilitySet::SETPCAP) {
        shrink_bounding_set(needed).map_err(failed("the bounding set stays as it is"))?;
    }
    match rustix::thread::clear_ambient_capability_set() {
        // A kernel from before 4.3 has no such set.
        Ok(()) | Err(Errno::INVAL) => {}
        Err(error) => return Err(failed("the ambient set stays as it is")(error)),
    }
    let kept = had.permitted & needed;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).map_err(failed("they cannot be given up"))?;
    Ok(Kept { kept, given_up: had.permitted - kept })
}

/// The kernel says where its capabilities end: PR_CAPBSET_READ knows none beyond (EINVAL).
fn shrink_bounding_set(needed: CapabilitySet) -> Result<(), Errno> {
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match rustix::thread::capability_is_in_bounding_set(capability) {
            Ok(true) if !needed.contains(capability) => {
                rustix::thread::remove_capability_from_bounding_set(capability)?;
            }
            Ok(_) => {}
            Err(Errno::INVAL) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether files were within reach by these that are not by the permissions of the user.
pub(super) fn overrode_permissions(given_up: CapabilitySet) -> bool {
    given_up.intersects(CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH)
}

/// As capabilities(7) names them.
pub(super) fn names(set: CapabilitySet) -> Vec<String> {
    set.iter_names().map(|(name, _)| format!("CAP_{name}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(rest: &str) -> Config {
        let text = format!("identity: unix:///a\n{rest}");
        crate::config::parse(&text, "f.yaml").unwrap().config
    }

    fn inbound(listen: &str) -> Config {
        config(&format!("inbound: [{{name: a, listen: '{listen}', to: '127.0.0.1:1', allow: ['spiffe://td']}}]"))
    }

    fn outbound(listen: &str) -> Config {
        config(&format!("outbound: [{{name: a, listen: '{listen}', to: 'a:1', expect: 'spiffe://td/a'}}]"))
    }

    fn captured(mode: &str) -> Config {
        config(&format!(
            "intercept: {{inbound: {{{mode}}}}}\ninbound: [{{name: a, capture: [80], allow: ['spiffe://td']}}]"
        ))
    }

    #[test]
    fn only_low_ports_and_what_is_captured_need_capabilities() {
        let low = CapabilitySet::NET_BIND_SERVICE;
        for (config, unprivileged_from, expected) in [
            (inbound("0.0.0.0:8443"), 1024, CapabilitySet::empty()),
            (inbound("0.0.0.0:443"), 1024, low),
            (inbound("0.0.0.0:443"), 0, CapabilitySet::empty()),
            (inbound("0.0.0.0:443"), 80, CapabilitySet::empty()),
            (inbound("0.0.0.0:0"), 1024, CapabilitySet::empty()),
            (outbound("127.0.0.1:25"), 1024, low),
            (outbound("unix:///run/a.sock"), 1024, CapabilitySet::empty()),
            (captured("mode: redirect"), 1024, CapabilitySet::NET_ADMIN),
            (captured("mode: tproxy"), 1024, CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW),
            (
                config(
                    "outbound: [{name: a, listen: '127.0.0.1:2000', to: 'a:1', expect: 'spiffe://td/a'}]\nadmin: {listen: '127.0.0.1:99'}",
                ),
                1024,
                low,
            ),
        ] {
            assert_eq!(needed(&config, unprivileged_from), expected, "{:?}", config.admin);
        }
    }

    #[test]
    fn a_thread_gives_up_what_is_not_needed_and_cannot_get_it_back() {
        std::thread::spawn(|| {
            let had = rustix::thread::capabilities(None).unwrap();
            let needed = CapabilitySet::NET_BIND_SERVICE;
            let kept = keep_only(needed).unwrap();
            assert_eq!(kept.kept, had.permitted & needed);
            assert_eq!(kept.kept | kept.given_up, had.permitted);
            let now = rustix::thread::capabilities(None).unwrap();
            assert_eq!((now.effective, now.permitted, now.inheritable), (kept.kept, kept.kept, CapabilitySet::empty()));
            if had.effective.contains(CapabilitySet::SETPCAP) {
                assert!(!rustix::thread::capability_is_in_bounding_set(CapabilitySet::SYS_ADMIN).unwrap());
                assert!(rustix::thread::capability_is_in_bounding_set(needed).unwrap());
                assert!(rustix::thread::set_capabilities(None, had).is_err());
            }
            // A second time there is nothing to give up and nothing to complain of.
            assert_eq!(keep_only(needed).unwrap().given_up, CapabilitySet::empty());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn names_are_those_of_the_manual() {
        assert_eq!(names(CapabilitySet::NET_BIND_SERVICE), ["CAP_NET_BIND_SERVICE"]);
        assert!(overrode_permissions(CapabilitySet::DAC_OVERRIDE | CapabilitySet::KILL));
        assert!(!overrode_permissions(CapabilitySet::KILL));
    }
}
