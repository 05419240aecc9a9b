//! Notices that the content of a config file has changed.
//!
//! By looking, not by inotify: Kubernetes swaps a symbolic link two directories up, editors rename, configuration
//! management truncates and writes. A look each second at what the path leads to costs one system call and sees all of
//! these. A change counts once the content has been the same for two looks, so that a half-written file is not taken
//! for a config.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::load::{digest_hex, read_bounded};

/// How often the file is looked at.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long content must stay as it is to be believed.
const SETTLE: Duration = Duration::from_millis(100);
/// Clocks of file systems tick coarsely: a file written so lately may change again without its times showing it.
const RACY: Duration = Duration::from_secs(3);

/// A watcher of one file. Use it in `tokio::select!` beside SIGHUP:
///
/// ```no_run
/// # async fn f(path: &std::path::Path, mut hangup: tokio::signal::unix::Signal) {
/// # let loaded = portcullis::config::load(path).unwrap();
/// let mut watcher = portcullis::config::Watcher::new(path, &loaded.digest);
/// loop {
///     tokio::select! {
///         () = watcher.changed() => {}
///         _ = hangup.recv() => {}
///     }
///     // load, and keep the old config if the new one is bad
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct Watcher {
    path: PathBuf,
    digest: String,
    seen: Option<Stamp>,
    interval: Duration,
}

/// What tells one state of a file from another without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Watcher {
    /// Watches `path`; `digest` (hex SHA-256, from [`super::Loaded`]) is the content that is known already, so that a
    /// change between loading and watching is not lost.
    pub fn new(path: &Path, digest: &str) -> Self {
        Self { path: path.to_owned(), digest: digest.to_owned(), seen: None, interval: INTERVAL }
    }

    /// As [`Watcher::new`] with another interval between looks.
    pub fn with_interval(path: &Path, digest: &str, interval: Duration) -> Self {
        Self { interval, ..Self::new(path, digest) }
    }

    /// Says that this content is in use now, after a reload for another reason.
    pub fn known(&mut self, digest: &str) {
        digest.clone_into(&mut self.digest);
        self.seen = None;
    }

    /// Waits until the content differs from what is known, and takes it as known. A file that is away is waited for;
    /// one that can no longer be read counts as changed, once. Cancel-safe: nothing is taken as known before this returns.
    pub async fn changed(&mut self) {
        loop {
            tokio::time::sleep(self.interval).await;
            let Some(stamp) = self.look().await else { continue };
            let Some(digest) = self.digest().await else { continue };
            if digest == self.digest {
                // Not before the times can be trusted to show the next change.
                self.seen = (!stamp.is_racy()).then_some(stamp);
                continue;
            }
            tokio::time::sleep(SETTLE.min(self.interval)).await;
            if self.digest().await.as_ref() == Some(&digest) {
                self.digest = digest;
                return;
            }
        }
    }

    /// The file's stamp if it is another than the one seen last.
    async fn look(&self) -> Option<Stamp> {
        use std::os::unix::fs::MetadataExt;
        let meta = tokio::fs::metadata(&self.path).await.ok()?;
        let stamp = Stamp {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        };
        (self.seen.as_ref() != Some(&stamp)).then_some(stamp)
    }

    /// The digest of the content; none while there is no file.
    async fn digest(&self) -> Option<String> {
        let path = self.path.clone();
        let read = tokio::task::spawn_blocking(move || match read_bounded(&path) {
            Ok(bytes) => Some(digest_hex(&bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            // A file that cannot be read is a change too: loading it will say what is wrong.
            Err(e) => Some(e.to_string()),
        });
        read.await.ok()?
    }
}

impl Stamp {
    fn is_racy(&self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let latest = self.modified.0.max(self.changed.0);
        now.as_secs().saturating_add_signed(-latest) < RACY.as_secs() || latest > now.as_secs().cast_signed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_millis(20);

    async fn changes(watcher: &mut Watcher) -> bool {
        tokio::time::timeout(Duration::from_secs(5), watcher.changed()).await.is_ok()
    }

    async fn quiet(watcher: &mut Watcher) -> bool {
        tokio::time::timeout(Duration::from_millis(300), watcher.changed()).await.is_err()
    }

    #[tokio::test]
    async fn sees_rewriting_renaming_and_disappearing_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.yaml");
        std::fs::write(&file, "one").unwrap();
        let mut watcher = Watcher::with_interval(&file, &digest_hex(b"one"), QUICK);
        assert!(quiet(&mut watcher).await);

        std::fs::write(&file, "two").unwrap(); // same length, same inode
        assert!(changes(&mut watcher).await);
        assert!(quiet(&mut watcher).await);

        std::fs::write(&file, "two").unwrap(); // touched, not changed
        assert!(quiet(&mut watcher).await);

        std::fs::write(dir.path().join("new"), "three").unwrap();
        std::fs::rename(dir.path().join("new"), &file).unwrap();
        assert!(changes(&mut watcher).await);

        std::fs::remove_file(&file).unwrap();
        assert!(quiet(&mut watcher).await);
        std::fs::write(&file, "four").unwrap();
        assert!(changes(&mut watcher).await);

        let large = vec![b'#'; super::super::load::MAX_FILE_BYTES as usize + 1];
        std::fs::write(&file, large).unwrap(); // loading will say so
        assert!(changes(&mut watcher).await);
        assert!(quiet(&mut watcher).await);
    }

    #[tokio::test]
    async fn sees_a_change_from_before_it_began_and_one_that_was_cancelled() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.yaml");
        std::fs::write(&file, "new").unwrap();
        let mut watcher = Watcher::with_interval(&file, &digest_hex(b"old"), QUICK);
        for _ in 0..3 {
            let _ = tokio::time::timeout(Duration::from_millis(25), watcher.changed()).await;
            watcher.known(&digest_hex(b"old"));
        }
        assert!(changes(&mut watcher).await);
    }

    #[tokio::test]
    async fn survives_the_symlink_swap_of_kubernetes() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (version, text) in [("v1", "one"), ("v2", "two")] {
            std::fs::create_dir(at(version)).unwrap();
            std::fs::write(at(version).join("config.yaml"), text).unwrap();
        }
        std::os::unix::fs::symlink("v1", at("..data")).unwrap();
        std::os::unix::fs::symlink("..data/config.yaml", at("config.yaml")).unwrap();
        let mut watcher = Watcher::with_interval(&at("config.yaml"), &digest_hex(b"one"), QUICK);
        assert!(quiet(&mut watcher).await);
        std::os::unix::fs::symlink("v2", at("..data_tmp")).unwrap();
        std::fs::rename(at("..data_tmp"), at("..data")).unwrap();
        std::fs::remove_dir_all(at("v1")).unwrap();
        assert!(changes(&mut watcher).await);
        assert!(quiet(&mut watcher).await);
    }
}
