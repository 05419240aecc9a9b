//! Which files a proxy needs, worked out from its config.
//!
//! In: a config and where it was read. Out: [`Grants`], the directories that stay open and for what. Directories, because
//! files are replaced: by renaming, or by Kubernetes swapping a symbolic link; a rule for a file would be one for the file
//! that is gone. Nothing is opened here. Landlock does not restrict stat(2) and readlink(2), nor connecting to a Unix socket,
//! so looking for changes and reaching sockets needs no grant.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::authority::SYSTEM_CA_FILES;
use crate::config::Config;
use crate::config::address::{Target, workload_api};

/// What is done with a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Access {
    /// Files in it are read.
    Read,
    /// So are they, and directories are listed.
    List,
    /// Unix sockets are made and removed in it.
    Bind,
    /// Files in it are read, made, replaced and removed.
    Keep,
}

impl Access {
    fn includes(self, other: Self) -> bool {
        self == other || (other == Self::Read && matches!(self, Self::Keep | Self::List))
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::List => "list",
            Self::Bind => "bind",
            Self::Keep => "keep",
        }
    }
}

/// How the proxy uses a path that the config names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// A file, read again whenever it changes.
    Read,
    /// A Unix socket of somebody else.
    Connect,
    /// A Unix socket of ours.
    Bind,
    /// A directory of ours.
    Keep,
}

/// A path that the config names.
#[derive(Debug)]
struct Named {
    key: String,
    path: PathBuf,
    used: Use,
}

/// What stays open.
#[derive(Clone, Debug, Default)]
pub(super) struct Grants {
    pub(super) list: BTreeSet<(PathBuf, Access)>,
    /// What is granted otherwise than one would want, and why: a line each.
    pub(super) notes: Vec<String>,
}

impl Grants {
    /// All that a proxy with this config, read from `file`, needs.
    pub(super) fn of(config: &Config, file: &Path) -> Self {
        let mut grants = Self::default();
        grants.add(&Named { key: "the config".into(), path: file.to_owned(), used: Use::Read });
        for named in named(config) {
            grants.add(&named);
        }
        grants.add_system(config);
        grants.without_repetition()
    }

    /// Without what something above it grants as well.
    fn without_repetition(self) -> Self {
        let above = |(path, access): &(PathBuf, Access)| {
            self.list
                .iter()
                .any(|(open, has)| (open, has) != (path, access) && has.includes(*access) && path.starts_with(open))
        };
        let list = self.list.iter().filter(|grant| !above(grant)).cloned().collect();
        Self { list, notes: self.notes }
    }

    fn add(&mut self, named: &Named) {
        for need in needs(named) {
            self.notes.extend(need.note.map(|note| format!("{}: {note}", named.key)));
            self.list.extend(need.grant);
        }
    }

    /// What libraries read: figures of our own process, the resolver's files, and the modules that it loads.
    fn add_system(&mut self, config: &Config) {
        self.list.insert(("/proc/self".into(), Access::List));
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for file in REPLACED {
            self.list.extend(resolver_file(Path::new(file), &mounts));
        }
        let system = FIXED.iter().map(Path::new).filter(|path| path.exists());
        self.list.extend(system.filter_map(|path| Some((path.canonicalize().ok()?, Access::Read))));
        let endpoints = config.identity.authority.iter().flat_map(|authority| authority.federates_with.values());
        if endpoints.into_iter().any(|place| place.contains("://")) {
            for file in SYSTEM_CA_FILES.iter().map(Path::new).filter(|file| file.exists()) {
                self.add(&Named { key: "web CAs".into(), path: file.to_owned(), used: Use::Read });
            }
        }
    }

    /// Whether all that another config names lies within this. Rules of Landlock can only be narrowed.
    ///
    /// # Errors
    /// The first path that does not, with what to do.
    pub(super) fn cover(&self, config: &Config) -> Result<(), String> {
        for named in named(config) {
            let outside = |(path, access): &(PathBuf, Access)| {
                !self.list.iter().any(|(open, has)| has.includes(*access) && path.starts_with(open))
            };
            if needs(&named).into_iter().filter_map(|need| need.grant).any(|grant| outside(&grant)) {
                return Err(format!(
                    "{}: {} lies outside the directories that the sandbox left open at start; restart to open it, or \
                     put it beside what is in use",
                    named.key,
                    named.path.display()
                ));
            }
        }
        Ok(())
    }

    /// For `/state`: the kernel's `level`, then each directory.
    pub(super) fn shown(&self, level: &str) -> Vec<String> {
        let each = self.list.iter().map(|(path, access)| format!("{} {}", access.as_str(), path.display()));
        std::iter::once(level.to_owned()).chain(each).collect()
    }
}

/// Read by getaddrinfo(3), and replaced while we run.
const REPLACED: [&str; 2] = ["/etc/resolv.conf", "/etc/hosts"];
/// Read by getaddrinfo(3) and, for the modules that nsswitch.conf(5) names, by dlopen(3).
const FIXED: [&str; 8] = [
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/ld.so.cache",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
];

/// A file of the resolver. In a container it is a mount of its own and written in place, so it alone is enough. On a host it
/// is replaced by renaming, and a resolver that cannot read the new one asks nobody: there its directory stays readable.
fn resolver_file(file: &Path, mounts: &str) -> Vec<(PathBuf, Access)> {
    let Ok(real) = file.canonicalize() else { return Vec::new() };
    // proc_pid_mountinfo(5): the fifth field is where it is mounted.
    let alone = mounts.lines().filter_map(|line| line.split(' ').nth(4)).any(|at| Path::new(at) == real);
    let paths = if alone { vec![real] } else { directories(file, &real) };
    paths.into_iter().map(|path| (path, Access::Read)).collect()
}

/// The directory in which a file is named and the one where it really is.
fn directories(file: &Path, real: &Path) -> Vec<PathBuf> {
    [file, real].iter().filter_map(|path| path.parent()?.canonicalize().ok()).collect()
}

/// All paths of a config but its own.
fn named(config: &Config) -> Vec<Named> {
    let mut all = Vec::new();
    let mut add = |key: String, path: &Path, used| all.push(Named { key, path: path.to_owned(), used });
    let identity = &config.identity;
    if let Some(files) = &identity.files {
        add("identity.files.certificate".into(), &files.certificate, Use::Read);
        add("identity.files.key".into(), &files.key, Use::Read);
        for (domain, bundle) in &files.bundles {
            add(format!("identity.files.bundles.{}", domain.as_str()), bundle, Use::Read);
        }
    }
    for list in &identity.crls {
        add("identity.crls".into(), list, Use::Read);
    }
    if let Some(authority) = &identity.authority {
        if let Some(directory) = &authority.state_dir {
            add("identity.authority.state_dir".into(), directory, Use::Keep);
        }
        for document in authority.federates_with.values().filter(|place| !place.contains("://")) {
            add("identity.authority.federates_with".into(), Path::new(document), Use::Read);
        }
    }
    if let Some(Ok(Target::Unix(socket))) = identity.workload_api.as_ref().map(|api| workload_api(&api.address)) {
        add("identity.workload_api".into(), &socket, Use::Connect);
    }
    for inbound in &config.inbound {
        if let Some(Ok(Target::Unix(socket))) = inbound.to.as_deref().map(Target::parse) {
            add(format!("inbound '{}', to", inbound.name), &socket, Use::Connect);
        }
        if let Some(rego) = &inbound.http.rego {
            for module in std::iter::once(&rego.module).chain(&rego.shadow) {
                add(format!("inbound '{}', http.rego", inbound.name), module, Use::Read);
            }
        }
    }
    for outbound in &config.outbound {
        if let Some(Ok(Target::Unix(socket))) = outbound.listen.as_deref().map(Target::parse) {
            add(format!("outbound '{}', listen", outbound.name), &socket, Use::Bind);
        }
    }
    all
}

/// A grant, or why there can be none that is better.
struct Need {
    grant: Option<(PathBuf, Access)>,
    note: Option<String>,
}

impl Need {
    fn plain(path: PathBuf, access: Access) -> Self {
        Self { grant: Some((path, access)), note: None }
    }
}

fn needs(named: &Named) -> Vec<Need> {
    let path = std::path::absolute(&named.path).unwrap_or_else(|_| named.path.clone());
    match named.used {
        Use::Connect => Vec::new(),
        Use::Keep => path.canonicalize().map(|real| Need::plain(real, Access::Keep)).into_iter().collect(),
        // Where it is not there, binding says so.
        Use::Bind => {
            let directory = path.parent().and_then(|directory| directory.canonicalize().ok());
            directory.map(|directory| Need::plain(directory, Access::Bind)).into_iter().collect()
        }
        Use::Read => {
            let real = path.canonicalize().ok();
            let mut all = vec![readable(&path)];
            all.extend(real.filter(|real| *real != path).map(|real| readable(&real)));
            all
        }
    }
}

/// The directory of a file that is read; the nearest one there is, if it is still to be made. Never the root: that would be no
/// wall at all.
fn readable(file: &Path) -> Need {
    let shown = file.display();
    let wanted = file.parent().unwrap_or(file);
    let nearest = wanted.ancestors().find_map(|directory| directory.canonicalize().ok());
    let there = wanted.exists();
    match nearest {
        Some(directory) if directory != Path::new("/") => {
            let note = (!there).then(|| {
                format!(
                    "{} is not there yet, so all of {} stays readable; make it before the proxy starts",
                    wanted.display(),
                    directory.display()
                )
            });
            Need { grant: Some((directory, Access::Read)), note }
        }
        _ if there && file.exists() => Need {
            grant: Some((file.to_owned(), Access::Read)),
            note: Some(format!(
                "{shown} stays readable as it is, not if it is replaced; give it a directory of its own"
            )),
        },
        _ => Need {
            grant: None,
            note: Some(format!("{shown} will not be readable when it comes; make its directory and restart")),
        },
    }
}

/// What of a config is out of reach for the permissions of this process's user: a line each. Of use after capabilities have
/// been given up that override them.
pub(super) fn unreachable(config: &Config) -> Vec<String> {
    let refused = |path: &Path, mode| rustix::fs::access(path, mode) == Err(rustix::io::Errno::ACCESS);
    let all = named(config).into_iter().filter(|named| match named.used {
        Use::Read => refused(&named.path, rustix::fs::Access::READ_OK),
        Use::Connect => refused(&named.path, rustix::fs::Access::WRITE_OK),
        Use::Keep => refused(&named.path, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK),
        Use::Bind => named
            .path
            .parent()
            .is_some_and(|directory| refused(directory, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)),
    });
    all.map(|named| {
        format!(
            "{}: {} is out of reach without CAP_DAC_OVERRIDE, which was given up; change its owner or mode, or run as \
             a user who has access",
            named.key,
            named.path.display()
        )
    })
    .collect()
}

#[cfg(test)]
mod tests;
