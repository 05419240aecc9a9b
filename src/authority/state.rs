//! The directory in which the CAs outlive the process.
//!
//! In: a set of CAs. Out: the same after a restart, and for other processes of this machine. One file holds everything
//! and is replaced atomically, so that a crash leaves the old set or the new one and never half of each; a directory or
//! file that others may read is refused.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use super::AuthorityError;
use super::ca::{Ca, CaFacts, fill_random, hex};
use super::ca_set::{CaSet, MAX_CAS, Phase, Slot};
use crate::identity::TrustDomain;

/// The largest state file that is read, in bytes.
const MAX_STATE_BYTES: u64 = 256 * 1024;
/// How long another process may hold the lock before we give up.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const STATE_FILE: &str = "authority.json";
const LOCK_FILE: &str = "lock";

/// The file as it is written. Private keys are zeroed when it drops.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    trust_domain: TrustDomain,
    sequence: u64,
    longest_svid_ttl: u64,
    authorities: Vec<DocumentSlot>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DocumentSlot {
    phase: Phase,
    made: u64,
    #[serde(default)]
    needed_until: u64,
    #[serde(default)]
    tainted: bool,
    /// DER in base64.
    certificate: String,
    /// PKCS#8 DER in base64; absent for an old CA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    private_key: Option<String>,
}

impl Drop for DocumentSlot {
    fn drop(&mut self) {
        self.private_key.zeroize();
    }
}

/// By which a file is seen to be another one than before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileMark {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl FileMark {
    /// Nothing if there is no such file.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        fs::metadata(path).ok().map(|m| Self::from(&m))
    }
}

impl From<&fs::Metadata> for FileMark {
    fn from(m: &fs::Metadata) -> Self {
        Self { inode: m.ino(), size: m.size(), modified: (m.mtime(), m.mtime_nsec()) }
    }
}

/// The directory in which the CAs are kept.
#[derive(Clone, Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
}

/// Makes the directory if it is missing, before a sandbox that has to know it.
///
/// # Errors
/// It cannot be made, or others may look into it.
pub(crate) fn make_state_dir(path: &Path) -> Result<(), AuthorityError> {
    StateDir::open(path).map(drop)
}

/// Held while the state is changed; other processes wait.
pub(crate) struct DirLock {
    _file: File,
}

impl StateDir {
    /// Makes the directory (0700) if it is missing and checks that only we may look into it.
    pub(crate) fn open(path: &Path) -> Result<Self, AuthorityError> {
        let fail = |why: String| AuthorityError::State { path: path.to_owned(), why };
        if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            fs::create_dir_all(parent).map_err(|e| fail(format!("its parent cannot be made: {e}")))?;
        }
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(fail(format!("it cannot be made: {e}"))),
        }
        let meta = fs::metadata(path).map_err(|e| fail(format!("it cannot be looked at: {e}")))?;
        if !meta.is_dir() {
            return Err(fail("it is not a directory".into()));
        }
        check_private(&meta).map_err(|why| fail(format!("{why}; `chmod 700` it and look who had access")))?;
        Ok(Self { path: path.to_owned() })
    }

    fn file(&self) -> PathBuf {
        self.path.join(STATE_FILE)
    }

    pub(crate) fn mark(&self) -> Option<FileMark> {
        FileMark::of(&self.file())
    }

    /// Waits for the lock, for a short time only.
    pub(crate) fn lock(&self) -> Result<DirLock, AuthorityError> {
        let path = self.path.join(LOCK_FILE);
        let fail = |why: String| AuthorityError::State { path: path.clone(), why };
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|e| fail(format!("it cannot be opened: {e}")))?;
        let began = std::time::Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(DirLock { _file: file }),
                Err(fs::TryLockError::WouldBlock) if began.elapsed() < LOCK_PATIENCE => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(fs::TryLockError::WouldBlock) => {
                    return Err(fail("another process holds it and does not let go".into()));
                }
                Err(fs::TryLockError::Error(e)) => return Err(fail(format!("it cannot be locked: {e}"))),
            }
        }
    }

    /// The CAs as they were written down; nothing if none were yet.
    pub(crate) fn load(&self, domain: &TrustDomain) -> Result<Option<CaSet>, AuthorityError> {
        let path = self.file();
        let fail = |why: String| AuthorityError::State { path: path.clone(), why };
        let file = match OpenOptions::new().read(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(fail(format!("it cannot be opened: {e}"))),
        };
        let meta = file.metadata().map_err(|e| fail(format!("it cannot be looked at: {e}")))?;
        if !meta.is_file() {
            return Err(fail("it is not a regular file".into()));
        }
        check_private(&meta).map_err(|why| {
            fail(format!("{why}; the CA key may be known to others: move the file away to get a new CA"))
        })?;
        let mut bytes = Zeroizing::new(Vec::new());
        // Room for all of it at once, because a vector that grows leaves unzeroed copies behind.
        bytes.reserve_exact(usize::try_from(meta.len().min(MAX_STATE_BYTES)).unwrap_or(0).saturating_add(1));
        file.take(MAX_STATE_BYTES + 1).read_to_end(&mut bytes).map_err(|e| fail(format!("it cannot be read: {e}")))?;
        if bytes.len() as u64 > MAX_STATE_BYTES {
            return Err(fail(format!("it is larger than {MAX_STATE_BYTES} bytes")));
        }
        let document: Document =
            serde_json::from_slice(&bytes).map_err(|e| fail(format!("it is not a state file: {e}")))?;
        if document.version != 1 {
            return Err(fail(format!("it has version {}, and this program knows 1", document.version)));
        }
        if document.trust_domain != *domain {
            return Err(fail(format!(
                "it belongs to trust domain '{}', not to '{}'",
                document.trust_domain.as_str(),
                domain.as_str()
            )));
        }
        CaSet::try_from(&document).map(Some).map_err(|e| fail(e.to_string()))
    }

    /// Writes the CAs down: a new file (0600) that takes the old one's place once it is on the disk.
    pub(crate) fn save(&self, domain: &TrustDomain, set: &CaSet) -> Result<(), AuthorityError> {
        let path = self.file();
        let document = set.document(domain)?;
        let mut bytes = Zeroizing::new(Vec::with_capacity(16 * 1024));
        serde_json::to_writer_pretty(&mut *bytes, &document)
            .map_err(|e| AuthorityError::State { path: path.clone(), why: e.to_string() })?;
        write_atomic(&path, &bytes, 0o600)
            .map_err(|e| AuthorityError::State { path: path.clone(), why: format!("it cannot be written: {e}") })
    }
}

/// Refuses what others may read or write, and what is another user's.
fn check_private(meta: &fs::Metadata) -> Result<(), String> {
    let mode = meta.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(format!("its mode is {mode:04o}, so others than its owner have access"));
    }
    let us = rustix::process::geteuid().as_raw();
    if meta.uid() != us {
        return Err(format!("it belongs to uid {}, and we are uid {us}", meta.uid()));
    }
    Ok(())
}

/// Writes beside the target, syncs, renames over it and syncs the directory.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> std::io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut random = [0_u8; 8];
    fill_random(&mut random).map_err(std::io::Error::other)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = folder.join(format!(".{name}.{}", hex(&random)));
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(bytes)?;
        // The umask may have taken bits away.
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(folder)?.sync_all()
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

impl CaSet {
    fn document(&self, domain: &TrustDomain) -> Result<Document, AuthorityError> {
        let authorities = self
            .slots
            .iter()
            .map(|slot| {
                let private_key = match &slot.ca {
                    Some(ca) => Some(STANDARD.encode(&*ca.key_pkcs8()?)),
                    None => None,
                };
                Ok(DocumentSlot {
                    phase: slot.phase,
                    made: slot.made,
                    needed_until: slot.needed_until,
                    tainted: slot.tainted,
                    certificate: STANDARD.encode(&slot.der),
                    private_key,
                })
            })
            .collect::<Result<_, AuthorityError>>()?;
        Ok(Document {
            version: 1,
            trust_domain: domain.clone(),
            sequence: self.sequence,
            longest_svid_ttl: self.longest_ttl,
            authorities,
        })
    }
}

impl TryFrom<&Document> for CaSet {
    type Error = AuthorityError;

    fn try_from(document: &Document) -> Result<Self, Self::Error> {
        let bad = |why: &str| AuthorityError::Crypto(why.to_owned());
        if document.authorities.len() > MAX_CAS {
            return Err(AuthorityError::TooManyCas);
        }
        let mut slots = Vec::with_capacity(document.authorities.len());
        for written in &document.authorities {
            let der: CertificateDer<'static> =
                STANDARD.decode(&written.certificate).map_err(|_| bad("a certificate in it is not base64"))?.into();
            let facts = CaFacts::read(&der)?;
            let ca = match (&written.private_key, written.phase) {
                (_, Phase::Old) => None,
                (None, _) => return Err(bad("a CA that is to sign has no private key")),
                (Some(text), _) => {
                    let key = Zeroizing::new(STANDARD.decode(text).map_err(|_| bad("a key in it is not base64"))?);
                    Some(Arc::new(Ca::load(der.clone(), &key)?))
                }
            };
            slots.push(Slot {
                phase: written.phase,
                id: facts.id,
                der,
                ca,
                made: written.made,
                not_after: facts.not_after,
                needed_until: written.needed_until,
                tainted: written.tainted,
            });
        }
        if slots.iter().filter(|s| s.phase == Phase::Active).count() != 1 {
            return Err(bad("it does not hold exactly one active CA"));
        }
        Ok(Self { slots, sequence: document.sequence, longest_ttl: document.longest_svid_ttl })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const NOW: u64 = 1_800_000_000;
    const TTL: Duration = Duration::from_secs(600);

    fn domain() -> TrustDomain {
        TrustDomain::parse("lab.test").unwrap()
    }

    fn phases(set: &CaSet) -> Vec<Phase> {
        set.slots.iter().map(|s| s.phase).collect()
    }

    #[test]
    fn an_old_ca_keeps_no_key() {
        let mut set = CaSet::new(&domain(), NOW, TTL, 60).unwrap();
        set.prepare(&domain(), NOW, TTL).unwrap();
        set.activate(NOW).unwrap();
        assert!(matches!(set.activate(NOW), Err(AuthorityError::NothingPrepared)));
        let document = set.document(&domain()).unwrap();
        let keys: Vec<_> = document.authorities.iter().map(|a| a.private_key.is_some()).collect();
        assert_eq!(keys, [false, true]);
    }

    #[test]
    fn what_was_saved_is_loaded_and_nobody_else_may_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/state");
        let dir = StateDir::open(&path).unwrap();
        let mode = |p: &Path| fs::metadata(p).unwrap().mode() & 0o777;
        assert_eq!(mode(&path), 0o700);
        assert!(dir.load(&domain()).unwrap().is_none());
        let mut set = CaSet::new(&domain(), NOW, TTL, 60).unwrap();
        set.prepare(&domain(), NOW, TTL).unwrap();
        dir.save(&domain(), &set).unwrap();
        assert_eq!(mode(&dir.file()), 0o600);
        let again = dir.load(&domain()).unwrap().unwrap();
        assert_eq!(phases(&again), phases(&set));
        assert_eq!(again.slots[0].der, set.slots[0].der);
        assert_eq!(again.slots[0].not_after, set.slots[0].not_after);

        let error = dir.load(&TrustDomain::parse("other.test").unwrap()).unwrap_err().to_string();
        assert!(error.contains("belongs to trust domain 'lab.test'"), "{error}");

        fs::set_permissions(dir.file(), fs::Permissions::from_mode(0o640)).unwrap();
        let error = dir.load(&domain()).unwrap_err().to_string();
        assert!(error.contains("mode is 0640"), "{error}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let error = StateDir::open(&path).unwrap_err().to_string();
        assert!(error.contains("mode is 0755"), "{error}");
    }

    #[test]
    fn nonsense_in_the_file_is_refused_with_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&folder.path().join("s")).unwrap();
        for text in [
            "",
            "{}",
            "[1]",
            r#"{"version":2,"trust_domain":"lab.test","sequence":1,"longest_svid_ttl":1,"authorities":[]}"#,
        ] {
            write_atomic(&dir.file(), text.as_bytes(), 0o600).unwrap();
            let error = dir.load(&domain()).unwrap_err().to_string();
            assert!(error.contains("authority.json"), "{error}");
        }
        let large = vec![b' '; usize::try_from(MAX_STATE_BYTES).unwrap() + 2];
        write_atomic(&dir.file(), &large, 0o600).unwrap();
        assert!(dir.load(&domain()).unwrap_err().to_string().contains("larger than"));
    }

    #[test]
    fn the_lock_is_not_waited_for_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&folder.path().join("s")).unwrap();
        let held = dir.lock().unwrap();
        assert!(dir.lock().is_err());
        drop(held);
        assert!(dir.lock().is_ok());
    }
}
