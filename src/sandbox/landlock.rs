//! Landlock (landlock(7)): no file but those that are granted, no signal and no abstract Unix socket to the outside.
//!
//! In: [`Grants`]. Out: a thread, and all that it starts, that is confined to them. Ports are not restricted: a reload may add
//! any. Nor is connecting to Unix sockets by path, which the resolver's modules do wherever they please.

use landlock::{
    ABI, Access as _, AccessFs, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope, make_bitflags,
};

use super::paths::{Access, Grants};

/// The newest rules that are used; older kernels have fewer of them. The next one that would be of use, for connecting to
/// Unix sockets, is of [`ABI::V9`].
const RULES: ABI = ABI::V6;

/// In force.
pub(super) struct Walls {
    /// How much of it the kernel knows.
    pub(super) level: String,
    pub(super) pinned: Pinned,
}

/// Holds what a rule for `/proc/self` hangs on. The rule is one for an inode, and procfs makes another for the same directory
/// once nobody uses it and memory is short.
#[derive(Debug)]
pub(super) struct Pinned {
    _open: Option<PathFd>,
}

/// Confines this thread for good.
///
/// # Errors
/// Why not, and what to do.
pub(super) fn restrict(grants: &Grants) -> Result<Walls, String> {
    build(grants).map_err(|error| error.to_string()).and_then(|(status, pinned)| {
        let abi = match status.landlock {
            LandlockStatus::Available { effective_abi, kernel_abi } => {
                kernel_abi.map_or_else(|| effective_abi.to_string(), |abi| abi.to_string())
            }
            LandlockStatus::NotEnabled => {
                return Err("the kernel has it and it is not switched on; boot with landlock in `lsm=`".into());
            }
            LandlockStatus::NotImplemented => {
                return Err(
                    "this kernel has no Landlock; it is in Linux from 5.13 on, with CONFIG_SECURITY_LANDLOCK".into()
                );
            }
        };
        match status.ruleset {
            RulesetStatus::FullyEnforced => Ok(Walls { level: format!("kernel ABI {abi}"), pinned }),
            RulesetStatus::PartiallyEnforced => {
                Ok(Walls { level: format!("kernel ABI {abi}, which knows a part of what {RULES} does"), pinned })
            }
            RulesetStatus::NotEnforced => Err("the kernel took none of the rules".into()),
        }
    })
}

fn build(grants: &Grants) -> Result<(landlock::RestrictionStatus, Pinned), landlock::RulesetError> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(RULES))?
        .scope(Scope::from_all(RULES))?
        .create()?;
    let mut kept = None;
    for (path, access) in &grants.list {
        // What is gone by now needs no rule.
        let Ok(open) = PathFd::new(path) else { continue };
        rules = rules.add_rule(PathBeneath::new(&open, rights(*access)))?;
        if *access == Access::List {
            kept = Some(open);
        }
    }
    Ok((rules.restrict_self()?, Pinned { _open: kept }))
}

fn rights(access: Access) -> BitFlags<AccessFs> {
    match access {
        Access::Read => make_bitflags!(AccessFs::{ReadFile}),
        Access::List => make_bitflags!(AccessFs::{ReadFile | ReadDir}),
        Access::Bind => make_bitflags!(AccessFs::{MakeSock | RemoveFile}),
        Access::Keep => {
            make_bitflags!(AccessFs::{ReadFile | ReadDir | WriteFile | MakeReg | RemoveFile | Truncate})
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind::PermissionDenied;
    use std::path::Path;

    /// What the kernel here says of itself, asked past the code under test.
    fn kernel_has_it() -> bool {
        let strict = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
        strict.handle_access(AccessFs::ReadFile).is_ok_and(|rules| rules.create().is_ok())
    }

    fn denied<T: std::fmt::Debug>(outcome: std::io::Result<T>) {
        assert_eq!(outcome.unwrap_err().kind(), PermissionDenied);
    }

    #[test]
    fn a_confined_thread_does_in_each_directory_what_was_granted_and_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let at = |name: &str| root.join(name);
        for name in ["read", "bind", "keep", "none"] {
            std::fs::create_dir(at(name)).unwrap();
            std::fs::write(at(name).join("a"), name).unwrap();
        }
        let mut grants = Grants::default();
        grants.list.extend([
            (at("read"), Access::Read),
            (at("bind"), Access::Bind),
            (at("keep"), Access::Keep),
            (at("gone"), Access::Read),
            ("/proc/self".into(), Access::List),
        ]);
        let act = move || {
            let walls = match restrict(&grants) {
                Ok(walls) => walls,
                Err(why) => {
                    assert!(!kernel_has_it(), "{why}");
                    eprintln!("SKIPPED, nothing is confined here: {why}");
                    return;
                }
            };
            assert!(walls.level.starts_with("kernel ABI "), "{}", walls.level);
            let read = |name: &str| std::fs::read_to_string(root.join(name));
            assert_eq!(read("read/a").unwrap(), "read");
            denied(std::fs::write(root.join("read/b"), "b"));
            denied(std::fs::read_dir(root.join("read")));
            denied(std::fs::remove_file(root.join("read/a")));

            denied(read("none/a"));
            assert!(std::fs::metadata(root.join("none/a")).is_ok(), "to look is free");
            denied(read("bind/a"));

            let socket = std::os::unix::net::UnixListener::bind(root.join("bind/s")).unwrap();
            std::os::unix::net::UnixStream::connect(root.join("bind/s")).unwrap();
            drop(socket);
            std::fs::remove_file(root.join("bind/s")).unwrap();
            denied(std::os::unix::net::UnixListener::bind(root.join("read/s")));

            std::fs::write(root.join("keep/next"), "new").unwrap();
            std::fs::rename(root.join("keep/next"), root.join("keep/a")).unwrap();
            assert_eq!(read("keep/a").unwrap(), "new");
            std::fs::File::open(root.join("keep")).unwrap().sync_all().unwrap();

            assert!(std::fs::read_dir("/proc/self/fd").unwrap().count() > 2);
            std::fs::read_to_string("/proc/self/statm").unwrap();
            denied(std::fs::read_to_string(Path::new("/proc/1/status")));
            // And so it is for what this thread starts.
            denied(std::thread::spawn(move || std::fs::read(root.join("none/a"))).join().unwrap());
        };
        // On a thread of its own: it stays like that.
        std::thread::spawn(act).join().unwrap();
    }
}
