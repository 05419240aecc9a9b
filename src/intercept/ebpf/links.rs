//! The programs: loaded, attached to the cgroup, pinned, and looked at.

use std::fmt;
use std::os::fd::AsRawFd;
use std::path::Path;

use libbpf_rs::query::LinkTypeInfo;
use libbpf_rs::{ErrorKind, Link, MapCore, MapFlags, MapHandle, Object, ProgramMut};

use super::Cgroup;
use super::bytes::Bytes;
use super::object::{self, is_plan, one_line};
use super::pins::Pins;

static BYTECODE: &[u8] = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/ebpf/capture.bpf.o"));

/// A pin and the program behind it, in the order in which they are attached: those that redirect come last, so that
/// nothing is redirected before it can be handed over.
const LINKS: [(&str, &str); 6] = [
    ("sockops", "capture_sockops"),
    ("getsockopt", "capture_getsockopt"),
    ("getpeername4", "capture_getpeername4"),
    ("getpeername6", "capture_getpeername6"),
    ("connect4", "capture_connect4"),
    ("connect6", "capture_connect6"),
];
/// Maps of open connections and their pins. The next generation of programs takes them over, so a map whose meaning
/// changes gets another pin.
const SHARED: [(&str, &str); 2] = [("originals", "originals_1"), ("clients", "clients_1")];
/// The pin of what the programs were loaded with.
const PLAN: &str = "plan";

/// Loads, attaches and pins. A program that is attached already is replaced in its link, in one step.
pub(super) fn install(plan: &Bytes, cgroup: &Cgroup, pins: &Pins) -> Result<(), String> {
    let mut object = load(plan, pins)?;
    for (pin, name) in LINKS {
        let program = object.progs_mut().find(|program| program.name() == name);
        let program = program.ok_or_else(|| format!("the bytecode has no program {name}"))?;
        put(&program, pin, cgroup, pins).map_err(|why| format!("{}: {name}: {why}", cgroup.path().display()))?;
    }
    pins.replace(PLAN, |path| {
        let mut maps = object.maps_mut();
        let mut plan = maps.find(|map| is_plan(map.name())).ok_or("the bytecode has no plan")?;
        plan.pin(path).map_err(|error| one_line("the plan", &error))
    })?;
    let shared = SHARED.iter().map(|(_, pin)| *pin);
    pins.keep_only(&LINKS.iter().map(|(pin, _)| *pin).chain(shared).chain([PLAN]).collect::<Vec<_>>())
}

fn load(plan: &Bytes, pins: &Pins) -> Result<Object, String> {
    object::load(BYTECODE, plan, |map| match SHARED.iter().find(|(name, _)| map.name() == *name) {
        Some((_, pin)) => map.set_pin_path(pins.at(pin)),
        None => Ok(()),
    })
}

fn put(program: &ProgramMut<'_>, pin: &str, cgroup: &Cgroup, pins: &Pins) -> Result<(), String> {
    let path = pins.at(pin);
    if attached_to(&path)? == Some(cgroup.id) {
        let mut link = Link::open(&path).map_err(|error| one_line("its link", &error))?;
        return link.update_prog(program).map_err(|error| one_line("it cannot replace the last one", &error));
    }
    let mut link = program
        .attach_cgroup(cgroup.directory.as_raw_fd())
        .map_err(|error| one_line("it cannot be attached (Linux 5.15 is needed)", &error))?;
    pins.replace(pin, |path| link.pin(path).map_err(|error| one_line("its link", &error)))
}

/// What is wrong with a capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Nothing was applied to this cgroup in this network namespace.
    Nothing,
    /// A program, or what it was loaded with, has no pin any more: somebody has removed it.
    Missing(&'static str),
    /// A program is pinned, but not attached to the cgroup any more.
    Detached(&'static str),
    /// The programs were applied with something else than what is declared now.
    OtherPlan,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("no eBPF capture is applied to this cgroup in this network namespace"),
            Self::Missing(pin) => write!(f, "the pin '{pin}' of the eBPF capture is gone"),
            Self::Detached(pin) => write!(f, "the eBPF program '{pin}' is not attached to the cgroup any more"),
            Self::OtherPlan => f.write_str("the eBPF programs capture something else than what is declared"),
        }
    }
}

/// Compares what stands with what should.
pub(super) fn faults(plan: &Bytes, cgroup: &Cgroup, pins: &Pins) -> Result<Vec<Fault>, String> {
    let mut faults = Vec::new();
    for (pin, _) in LINKS {
        match attached_to(&pins.at(pin))? {
            None => faults.push(Fault::Missing(pin)),
            Some(id) if id != cgroup.id => faults.push(Fault::Detached(pin)),
            Some(_) => {}
        }
    }
    match read_plan(&pins.at(PLAN))? {
        None => faults.push(Fault::Missing(PLAN)),
        Some(found) if found != plan => faults.push(Fault::OtherPlan),
        Some(_) => {}
    }
    Ok(faults)
}

/// Detaches the programs that are pinned here, now and not when the kernel has come round to it. Those that redirect go
/// first: nothing is redirected without a way to tell where it was for.
pub(super) fn detach(directory: &Path) -> Result<(), String> {
    for (pin, _) in LINKS.iter().rev() {
        let path = directory.join(pin);
        if attached_to(&path)?.is_some_and(|cgroup| cgroup != 0) {
            let detached = Link::open(&path).and_then(|link| link.detach());
            detached.map_err(|error| one_line(&path.display().to_string(), &error))?;
        }
    }
    Ok(())
}

/// Whether a program has a pin here.
pub(super) fn any(pins: &Pins) -> bool {
    LINKS.iter().any(|(pin, _)| pins.at(pin).exists())
}

/// Whether a directory of pins belongs to a cgroup that is gone.
pub(super) fn is_dead(directory: &Path) -> bool {
    let [.., (last, _)] = LINKS;
    matches!(attached_to(&directory.join(last)), Ok(Some(0)))
}

fn read_plan(path: &Path) -> Result<Option<Vec<u8>>, String> {
    if !path.exists() {
        return Ok(None);
    }
    let fails = |error: libbpf_rs::Error| one_line(&path.display().to_string(), &error);
    let map = MapHandle::from_pinned_path(path).map_err(fails)?;
    map.lookup(&0_u32.to_ne_bytes(), MapFlags::ANY).map_err(fails)
}

/// The id of the cgroup that a pinned link is attached to, 0 once that is gone; nothing without a pin.
fn attached_to(path: &Path) -> Result<Option<u64>, String> {
    let fails = |error: libbpf_rs::Error| one_line(&path.display().to_string(), &error);
    let link = match Link::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(fails)?,
    };
    match link.info().map_err(fails)?.info {
        LinkTypeInfo::Cgroup(at) => Ok(Some(at.cgroup_id)),
        _ => Err(format!("{}: not the link of a cgroup: remove it", path.display())),
    }
}
