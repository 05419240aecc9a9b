//! The cgroup whose processes are captured.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::intercept::Error;

/// CGROUP2_SUPER_MAGIC (linux/magic.h).
const MAGIC: u32 = 0x6367_7270;

/// A cgroup of version 2, opened.
#[derive(Debug)]
pub struct Cgroup {
    pub(crate) directory: File,
    /// Its inode number, by which the kernel knows it (bpf_get_current_cgroup_id, bpf-helpers(7)).
    pub(super) id: u64,
    path: PathBuf,
}

impl Cgroup {
    /// Opens one by its directory.
    ///
    /// # Errors
    /// If it is none of version 2.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let name = path.display();
        let fails = |error: &dyn std::fmt::Display| Error::new(format!("{name}: {error}"));
        let directory = File::open(path).map_err(|error| fails(&error))?;
        let kind = rustix::fs::fstatfs(&directory).map_err(|error| fails(&error))?.f_type;
        if u32::try_from(kind) != Ok(MAGIC) {
            return Err(fails(&"not a directory of cgroup version 2; its file system is often at /sys/fs/cgroup"));
        }
        let id = directory.metadata().map_err(|error| fails(&error))?.ino();
        Ok(Self { directory, id, path: path.to_owned() })
    }

    /// The one that this process is in.
    ///
    /// # Errors
    /// If there is none of version 2, or if it surely is the wrong one: in a cgroup namespace of its own a container sees
    /// no other's cgroup, so the workload in the next container is not below what it sees.
    pub fn own() -> Result<Self, Error> {
        let read = |path: &str| std::fs::read_to_string(path).map_err(|error| Error::new(format!("{path}: {error}")));
        if !in_first_namespace() {
            return Err(Error::new(
                "this process has a cgroup namespace of its own, in which the workload's cgroup is not to be seen: mount \
                 the host's /sys/fs/cgroup and name the pod's directory in it with --cgroup",
            ));
        }
        let located = locate(&read("/proc/self/cgroup")?, &read("/proc/self/mountinfo")?);
        Self::open(&located.map_err(Error::new)?)
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The first cgroup namespace has a number of its own (PROC_CGROUP_INIT_INO, linux/nsfs.h).
fn in_first_namespace() -> bool {
    const FIRST: u64 = 0xefff_fffb;
    std::fs::metadata("/proc/self/ns/cgroup").is_ok_and(|namespace| namespace.ino() == FIRST)
}

/// Where the directory is, from what cgroups(7) and proc_pid_mountinfo(5) describe.
fn locate(cgroups: &str, mounts: &str) -> Result<PathBuf, String> {
    let none = "this machine has no cgroup of version 2: name one with --cgroup, or capture by redirect rules";
    let cgroup = cgroups.lines().find_map(|line| line.strip_prefix("0::")).ok_or(none)?;
    let mounted = mounts.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let (root, at) = (before.next()?, before.next()?);
        (after.split(' ').next() == Some("cgroup2")).then_some((root, at))
    });
    let mut below = mounted.filter_map(|(root, at)| {
        let inside = Path::new(cgroup).strip_prefix(root).ok()?;
        Some(Path::new(at).join(inside))
    });
    below.next_back().ok_or_else(|| format!("the cgroup {cgroup} is not below any mounted one: name one with --cgroup"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "9:name=systemd:/\n0::/system.slice/app.service\n";

    #[test]
    fn the_own_cgroup_is_found_where_it_is_mounted() {
        let mounts = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(locate(HYBRID, mounts).unwrap(), Path::new("/sys/fs/cgroup/unified/system.slice/app.service"));
    }

    #[test]
    fn a_mount_of_a_part_is_counted_from_that_part() {
        let mounts = "41 31 0:38 /system.slice /mnt rw - cgroup2 none rw\n";
        assert_eq!(locate(HYBRID, mounts).unwrap(), Path::new("/mnt/app.service"));
    }

    #[test]
    fn without_a_mount_that_holds_it_there_is_no_guess() {
        for mounts in
            ["", "41 31 0:38 /user.slice /mnt rw - cgroup2 none rw\n", "41 31 0:38 / /a rw - cgroup cgroup rw\n"]
        {
            assert!(locate(HYBRID, mounts).unwrap_err().contains("--cgroup"), "{mounts}");
        }
        assert!(locate("4:memory:/x\n", "").unwrap_err().contains("--cgroup"));
    }

    #[test]
    fn a_directory_that_is_no_cgroup_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Cgroup::open(dir.path()).unwrap_err().to_string().contains("not a directory of cgroup version 2"));
        assert!(Cgroup::open(&dir.path().join("none")).is_err());
    }
}
