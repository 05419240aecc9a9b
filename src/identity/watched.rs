//! Files that other programs replace: looked at each second, read when they changed.
//!
//! Looking instead of being notified, because it is the one way that works alike with renames, with the symbolic links
//! that Kubernetes swaps, with network file systems and with files that do not exist yet. A look is one `stat` a file.
//! In: paths. Out: all contents together, whenever they are something new.

use std::fs::{File, Metadata};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aws_lc_rs::digest;
use tokio::time::Instant;
use zeroize::Zeroizing;

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(1);
/// How many looks after a change read again whatever `stat` says: a file can change twice within the grain of its time.
const RESTLESS: u8 = 2;

/// What a file held.
pub(super) struct Content {
    pub(super) path: PathBuf,
    /// Zeroed when dropped: it may be a key.
    pub(super) bytes: Zeroizing<Vec<u8>>,
    /// The permission bits.
    pub(super) mode: u32,
}

/// All that `stat` says that changes with the content, or with the permission to read it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    place: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    mode: u32,
}

#[derive(Clone, Default)]
struct Seen {
    stamps: Vec<Option<Stamp>>,
    restless: u8,
}

type Reading = Vec<Result<Content, String>>;
type Digest = [u8; 32];

/// A set of files that belong together.
pub(super) struct Watched {
    /// Each with the most bytes that it may have.
    files: Vec<(PathBuf, usize)>,
    seen: Seen,
    reported: Option<(Digest, Result<(), ()>)>,
    /// A bad set that waits for a second look.
    doubtful: Option<Digest>,
    next_look: Option<Instant>,
}

impl Watched {
    pub(super) fn new(files: Vec<(PathBuf, usize)>) -> Self {
        Self { files, seen: Seen::default(), reported: None, doubtful: None, next_look: None }
    }

    /// Waits until the files hold something else than before (at first: at all) and judges it. A bad set that follows a
    /// good one is reported if it still stands a second later, because files are often written one after the other; it
    /// is reported once. A bad set that becomes the same good one again is reported as good. Cancel-safe.
    ///
    /// # Errors
    /// What a file that cannot be read, or `judge`, had to say.
    pub(super) async fn changed<T>(&mut self, judge: impl Fn(Vec<Content>) -> Result<T, String>) -> Result<T, String> {
        if self.files.is_empty() {
            std::future::pending::<()>().await;
        }
        loop {
            if let Some(next) = self.next_look {
                tokio::time::sleep_until(next).await;
            }
            // A network file system can hang: never on a thread that others need.
            let (files, seen) = (self.files.clone(), self.seen.clone());
            let looked = tokio::task::spawn_blocking(move || look(&files, seen)).await;
            self.next_look = Some(Instant::now() + PERIOD);
            // No answer only when the runtime goes down.
            let Ok((seen, reading)) = looked else { continue };
            self.seen = seen;
            let Some(reading) = reading else { continue };
            let digest = digest_of(&reading);
            if self.reported.is_some_and(|(reported, _)| reported == digest) {
                self.doubtful = None;
                continue;
            }
            let judged = reading.into_iter().collect::<Result<Vec<_>, _>>().and_then(&judge);
            let stood_good = self.reported.is_some_and(|(_, verdict)| verdict.is_ok());
            if judged.is_err() && stood_good && self.doubtful != Some(digest) {
                self.doubtful = Some(digest);
                continue;
            }
            self.doubtful = None;
            self.reported = Some((digest, judged.as_ref().map(drop).map_err(drop)));
            return judged;
        }
    }
}

/// Looks at the files and reads all of them if one may have changed.
fn look(files: &[(PathBuf, usize)], before: Seen) -> (Seen, Option<Reading>) {
    let mut stamps = stamps(files);
    let moved = stamps != before.stamps;
    if !moved && before.restless == 0 {
        return (before, None);
    }
    let mut reading = Vec::new();
    // Old and new files mixed in one reading would be a mismatch that nobody wrote.
    for _ in 0..3 {
        reading = files.iter().map(|(path, limit)| read(path, *limit)).collect();
        let now = self::stamps(files);
        if now == stamps {
            break;
        }
        stamps = now;
    }
    let unreadable = stamps.iter().zip(&reading).any(|(stamp, read)| stamp.is_some() && read.is_err());
    let restless = if moved || unreadable { RESTLESS } else { before.restless.saturating_sub(1) };
    (Seen { stamps, restless }, Some(reading))
}

fn stamps(files: &[(PathBuf, usize)]) -> Vec<Option<Stamp>> {
    files.iter().map(|(path, _)| std::fs::metadata(path).ok().map(|m| stamp(&m))).collect()
}

fn stamp(of: &Metadata) -> Stamp {
    Stamp {
        place: (of.dev(), of.ino()),
        size: of.size(),
        modified: (of.mtime(), of.mtime_nsec()),
        changed: (of.ctime(), of.ctime_nsec()),
        mode: of.mode(),
    }
}

fn read(path: &Path, limit: usize) -> Result<Content, String> {
    let shown = path.display();
    let failed = |e: std::io::Error| format!("{shown}: {e}");
    // Before it is opened: opening a FIFO waits for a writer.
    let metadata = std::fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        return Err(format!("{shown}: not a regular file"));
    }
    let size = usize::try_from(metadata.len()).ok().filter(|size| *size <= limit);
    let Some(size) = size else { return Err(format!("{shown}: larger than {limit} bytes")) };
    // Of its full size from the start: a buffer that grows leaves copies of a key behind.
    let mut bytes = Zeroizing::new(vec![0; size + 1]);
    let mut file = File::open(path).map_err(failed)?;
    let mut filled = 0;
    while let Some(free) = bytes.get_mut(filled..).filter(|free| !free.is_empty()) {
        match file.read(free) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(failed(e)),
        }
    }
    if filled > size {
        return Err(format!("{shown}: grew while it was read"));
    }
    bytes.truncate(filled);
    Ok(Content { path: path.into(), bytes, mode: metadata.mode() })
}

fn digest_of(reading: &[Result<Content, String>]) -> Digest {
    let mut context = digest::Context::new(&digest::SHA256);
    for file in reading {
        let (kind, bytes) = match file {
            Ok(content) => (0, content.bytes.as_slice()),
            Err(why) => (1, why.as_bytes()),
        };
        context.update(&[kind]);
        context.update(&(bytes.len() as u64).to_be_bytes());
        context.update(bytes);
    }
    let mut digest = [0; 32];
    digest.copy_from_slice(context.finish().as_ref());
    digest
}
