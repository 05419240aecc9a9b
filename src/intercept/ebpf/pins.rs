//! Where programs and maps are pinned: `/sys/fs/bpf/portcullis/<cgroup>-<netns>/`, a directory for each capture.
//!
//! A pin keeps a link, and with it a program, in the kernel when the process that made it has ended. The BPF file system
//! must outlive that process, too.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::mount::MountFlags;

use super::{Cgroup, links};

/// Where the BPF file system is mounted on every machine (bpf(2)).
pub(super) const BPFFS: &str = "/sys/fs/bpf";
/// BPF_FS_MAGIC (linux/magic.h).
const MAGIC: u32 = 0xcafe_4a11;

/// The directory of one capture. Nobody else of us changes it meanwhile.
#[derive(Debug)]
pub(super) struct Pins {
    directory: PathBuf,
    /// Ends with this value (flock(2)).
    _lock: File,
}

impl Pins {
    /// Finds it or makes it; where no BPF file system is mounted, mounts one. What is left of captures whose cgroup is
    /// gone is removed on the way.
    pub(super) fn make(bpffs: &Path, cgroup: &Cgroup, netns: u64) -> Result<Self, String> {
        if !is_bpffs(bpffs)? {
            mount(bpffs)?;
        }
        let ours = bpffs.join("portcullis");
        make_directory(&ours)?;
        let lock = lock(&ours)?;
        let directory = ours.join(name(cgroup, netns));
        sweep(&ours, &directory);
        make_directory(&directory)?;
        Ok(Self { directory, _lock: lock })
    }

    /// Finds it.
    pub(super) fn find(bpffs: &Path, cgroup: &Cgroup, netns: u64) -> Result<Option<Self>, String> {
        let ours = bpffs.join("portcullis");
        let directory = ours.join(name(cgroup, netns));
        if !directory.exists() {
            return Ok(None);
        }
        Ok(Some(Self { directory, _lock: lock(&ours)? }))
    }

    /// The path of a pin.
    pub(super) fn at(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Lets `pin` make a pin and puts it in the place of the one before.
    pub(super) fn replace(&self, name: &str, pin: impl FnOnce(&Path) -> Result<(), String>) -> Result<(), String> {
        // Dots are reserved in this file system.
        let next = self.at(&format!("{name}_next"));
        // Of an attempt that was cut off.
        remove(&next)?;
        pin(&next)?;
        std::fs::rename(&next, self.at(name)).map_err(|error| format!("{}: {error}", next.display()))
    }

    /// Removes all other pins: those of an earlier version.
    pub(super) fn keep_only(&self, names: &[&str]) -> Result<(), String> {
        for path in files(&self.directory)? {
            if !path.file_name().is_some_and(|name| names.iter().any(|kept| name == *kept)) {
                remove(&path)?;
            }
        }
        Ok(())
    }

    /// Detaches and removes everything.
    pub(super) fn clear(self) -> Result<(), String> {
        clear(&self.directory)
    }
}

/// Detaches and removes the captures of this network namespace, but not that of `keep`. How many there were.
pub(super) fn clear_others(bpffs: &Path, keep: Option<&Cgroup>, netns: u64) -> Result<usize, String> {
    let ours = bpffs.join("portcullis");
    let (kept, ending) = (keep.map(|cgroup| name(cgroup, netns)), format!("-{netns}"));
    let _lock = lock(&ours)?;
    let mut cleared = 0;
    for directory in files(&ours)? {
        let of = directory.file_name().and_then(|name| name.to_str()).filter(|name| name.ends_with(&ending));
        if of.is_some_and(|name| kept.as_deref() != Some(name)) {
            clear(&directory)?;
            cleared += 1;
        }
    }
    Ok(cleared)
}

/// Whether there may be captures. Who may not look there has made none, and none of them opens the gate.
pub(super) fn any(bpffs: &Path) -> bool {
    std::fs::read_dir(bpffs.join("portcullis")).is_ok_and(|mut entries| entries.next().is_some())
}

fn name(cgroup: &Cgroup, netns: u64) -> String {
    format!("{}-{netns}", cgroup.id)
}

fn files(directory: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir(directory).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    entries.map_err(|error: std::io::Error| format!("{}: {error}", directory.display()))
}

fn remove(path: &Path) -> Result<(), String> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(format!("{}: {error}", path.display())),
        _ => Ok(()),
    }
}

fn clear(directory: &Path) -> Result<(), String> {
    links::detach(directory)?;
    for file in files(directory)? {
        remove(&file)?;
    }
    std::fs::remove_dir(directory).map_err(|error| format!("{}: {error}", directory.display()))
}

fn sweep(ours: &Path, but: &Path) {
    let Ok(entries) = std::fs::read_dir(ours) else { return };
    for directory in entries.flatten().map(|entry| entry.path()).filter(|path| path != but) {
        if links::is_dead(&directory)
            && let Err(why) = clear(&directory)
        {
            tracing::warn!(%why, "what is left of a capture whose cgroup is gone cannot be removed");
        }
    }
}

fn is_bpffs(path: &Path) -> Result<bool, String> {
    let found = rustix::fs::statfs(path).map_err(|error| {
        format!("{}: {error}: this kernel has no BPF file system, or /sys is not mounted here", path.display())
    })?;
    Ok(u32::try_from(found.f_type) == Ok(MAGIC))
}

/// A mount lives as long as the mount namespace, and everything pinned in it too. In the namespace of a container that
/// ends, as an init container does, the gate would open with it.
fn mount(path: &Path) -> Result<(), String> {
    let name = path.display();
    if !in_first_namespaces() {
        return Err(format!(
            "{name}: no BPF file system is mounted here, and one mounted in a container ends with it: mount it on the host \
             (mount -t bpf bpf /sys/fs/bpf) and pass it in as a volume"
        ));
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("bpf", path, "bpf", flags, Some(c"mode=0700"))
        .map_err(|error| format!("{name}: a BPF file system cannot be mounted: {error}"))
}

/// Whether this process lives where the machine's first process does. Mounts have numbers, which no two mount namespaces
/// share (proc_pid_mountinfo(5)).
fn in_first_namespaces() -> bool {
    /// PROC_PID_INIT_INO (linux/nsfs.h).
    const FIRST_PIDS: u64 = 0xefff_fffc;
    let first_mount = |process: &str| {
        let mounts = std::fs::read_to_string(format!("/proc/{process}/mountinfo")).ok()?;
        mounts.split(' ').next().map(str::to_owned)
    };
    let pids = std::fs::metadata("/proc/self/ns/pid").is_ok_and(|namespace| namespace.ino() == FIRST_PIDS);
    pids && first_mount("1").is_some_and(|first| Some(first) == first_mount("self"))
}

fn make_directory(path: &Path) -> Result<(), String> {
    match std::fs::create_dir(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(format!("{}: {error}", path.display())),
        _ => Ok(()),
    }
}

fn lock(path: &Path) -> Result<File, String> {
    let fails = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let directory = File::open(path).map_err(|error| fails(&error))?;
    rustix::fs::flock(&directory, FlockOperation::LockExclusive).map_err(|error| fails(&error))?;
    Ok(directory)
}
