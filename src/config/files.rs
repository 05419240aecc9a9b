//! The files that a config names: where they are, and whether they can be read.
//!
//! Apart from loading, because a proxy that starts before its files exist waits for them, while `check` says so at once.

use std::path::{Path, PathBuf};

use super::address::{Target, workload_api};
use super::load::{Finding, Loaded};
use super::positions::{Positions, Step, at};
use super::schema::Config;

/// Relative paths are relative to the config file, so that the file means the same from everywhere.
pub(super) fn anchor_paths(config: &mut Config, directory: &Path) {
    let anchor = |path: &mut PathBuf| *path = directory.join(&path);
    for rego in config.inbound.iter_mut().filter_map(|listener| listener.http.rego.as_mut()) {
        anchor(&mut rego.module);
        rego.shadow.iter_mut().for_each(anchor);
    }
    let identity = &mut config.identity;
    if let Some(files) = &mut identity.files {
        anchor(&mut files.certificate);
        anchor(&mut files.key);
        files.bundles.values_mut().for_each(anchor);
    }
    identity.crls.iter_mut().for_each(anchor);
    if let Some(authority) = &mut identity.authority {
        if let Some(state) = &mut authority.state_dir {
            anchor(state);
        }
        for document in authority.federates_with.values_mut().filter(|d| !d.contains("://")) {
            *document = directory.join(&document).to_string_lossy().into_owned();
        }
    }
}

/// What was found out about the files that a config names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileFindings {
    /// Files without which the proxy does not become ready.
    pub errors: Vec<Finding>,
    /// Sockets that are not there (yet), and keys that too many can read.
    pub warnings: Vec<Finding>,
}

/// Looks at every file and socket that a config names. Reads nothing but the first byte, and Rego modules whole.
pub fn check_files(loaded: &Loaded) -> FileFindings {
    let mut look = Look { places: &loaded.positions, found: FileFindings::default() };
    let identity = &loaded.config.identity;
    if let Some(files) = &identity.files {
        look.file(at!["identity", "files", "certificate"], &files.certificate);
        look.file(at!["identity", "files", "key"], &files.key);
        look.key_mode(at!["identity", "files", "key"], &files.key);
        for (domain, file) in &files.bundles {
            look.file(at!["identity", "files", "bundles", domain.as_str()], file);
        }
    }
    for (index, file) in identity.crls.iter().enumerate() {
        look.file(at!["identity", "crls", index], file);
    }
    if let Some(authority) = &identity.authority {
        if let Some(directory) = &authority.state_dir {
            // The authority makes its own directory, but not the way to it.
            if !directory.is_dir() {
                look.directory(at!["identity", "authority", "state_dir"], directory.parent().unwrap_or(directory));
            }
        }
        for (domain, document) in authority.federates_with.iter().filter(|(_, d)| !d.contains("://")) {
            let at = at!["identity", "authority", "federates_with", domain.as_str()];
            look.file(at, Path::new(document));
        }
    }
    if let Some(Ok(Target::Unix(socket))) = identity.workload_api.as_ref().map(|api| workload_api(&api.address)) {
        look.socket(at!["identity"], &socket, "the proxy will wait for the agent");
    }
    for (index, listener) in loaded.config.inbound.iter().enumerate() {
        if let Some(Ok(Target::Unix(socket))) = listener.to.as_deref().map(Target::parse) {
            look.socket(at!["inbound", index, "to"], &socket, "connections fail until the workload listens");
        }
    }
    for (index, listener) in loaded.config.inbound.iter().enumerate() {
        let Some(rego) = &listener.http.rego else { continue };
        look.module(at!["inbound", index, "http", "rego", "module"], &rego.module);
        if let Some(shadow) = &rego.shadow {
            look.module(at!["inbound", index, "http", "rego", "shadow"], shadow);
        }
    }
    for (index, listener) in loaded.config.outbound.iter().enumerate() {
        if let Some(Ok(Target::Unix(socket))) = listener.listen.as_deref().map(Target::parse)
            && let Some(directory) = socket.parent()
        {
            look.directory(at!["outbound", index, "listen"], directory);
        }
    }
    let mut found = look.found;
    found.errors.sort_by_key(|finding| finding.place);
    found.warnings.sort_by_key(|finding| finding.place);
    found
}

struct Look<'a> {
    places: &'a Positions,
    found: FileFindings,
}

impl Look<'_> {
    fn finding(&self, at: &[Step<'_>], what: String) -> Finding {
        Finding { place: Some(self.places.at(at)), what }
    }

    fn file(&mut self, at: &[Step<'_>], file: &Path) {
        use std::io::Read;
        let mut first = [0; 1];
        let problem = match std::fs::File::open(file).and_then(|mut open| open.read(&mut first)) {
            Ok(1..) => return,
            Ok(_) => "it is empty; fill it".to_owned(),
            Err(e) => format!("{}; put it there and make it readable", in_words(&e)),
        };
        let finding = self.finding(at, format!("{}: {problem}", file.display()));
        self.found.errors.push(finding);
    }

    fn module(&mut self, at: &[Step<'_>], file: &Path) {
        if let Err(what) = crate::policy::rego::check(file) {
            let finding = self.finding(at, what);
            self.found.errors.push(finding);
        }
    }

    fn key_mode(&mut self, at: &[Step<'_>], file: &Path) {
        use std::os::unix::fs::PermissionsExt;
        if std::fs::metadata(file).is_ok_and(|m| m.permissions().mode() & 0o007 != 0) {
            let what = format!("{}: every user of this machine can get at this key; chmod 0600", file.display());
            let finding = self.finding(at, what);
            self.found.warnings.push(finding);
        }
    }

    fn directory(&mut self, at: &[Step<'_>], directory: &Path) {
        if !directory.is_dir() {
            let what = format!("{}: there is no such directory; create it", directory.display());
            let finding = self.finding(at, what);
            self.found.errors.push(finding);
        }
    }

    fn socket(&mut self, at: &[Step<'_>], socket: &Path, meanwhile: &str) {
        use std::os::unix::fs::FileTypeExt;
        let problem = match std::fs::metadata(socket) {
            Ok(meta) if meta.file_type().is_socket() => return,
            Ok(_) => format!("it is not a socket; {meanwhile}"),
            Err(e) => format!("{}; {meanwhile}", in_words(&e)),
        };
        let finding = self.finding(at, format!("{}: {problem}", socket.display()));
        self.found.warnings.push(finding);
    }
}

/// The system's words without its number.
pub(crate) fn in_words(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split_once(" (os error").map_or(text.as_str(), |(words, _)| words).to_owned()
}
