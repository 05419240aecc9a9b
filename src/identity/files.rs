//! The source for users of spiffe-helper, cert-manager or a Vault agent: PEM files that another program keeps fresh.
//!
//! In: the paths. Out: a full set whenever the files hold a new one that is whole: the key is that of the certificate
//! and each bundle can be read. Anything else is [`Event::Unavailable`], and what was there before stays.

use std::future::Future;
use std::pin::Pin;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::source::{Event, Source, Update};
use super::watched::{Content, Watched};
use super::{Svid, SvidError, TrustBundles, TrustDomain};
use crate::config::schema::IdentityFiles;

/// The largest certificate or bundle file that is read, in bytes.
pub const MAX_CERTIFICATE_FILE: usize = 1024 * 1024;
/// The largest key file that is read, in bytes.
pub const MAX_KEY_FILE: usize = 64 * 1024;

/// A set of PEM files, watched for change.
pub struct FilesSource {
    /// In the order of the files behind certificate and key.
    domains: Vec<TrustDomain>,
    watched: Watched,
    /// The permissions of the key file that a warning was given for.
    warned: Option<u32>,
}

impl FilesSource {
    /// A source of these files. They need not exist yet: they are waited for.
    pub fn new(files: &IdentityFiles) -> Self {
        let mut paths = vec![(files.certificate.clone(), MAX_CERTIFICATE_FILE), (files.key.clone(), MAX_KEY_FILE)];
        paths.extend(files.bundles.values().map(|path| (path.clone(), MAX_CERTIFICATE_FILE)));
        Self { domains: files.bundles.keys().cloned().collect(), watched: Watched::new(paths), warned: None }
    }

    async fn event(&mut self) -> Event {
        let domains = &self.domains;
        match self.watched.changed(|files| whole_set(files, domains)).await {
            Ok((update, key_file, mode)) => {
                if mode & 0o004 != 0 && self.warned != Some(mode) {
                    self.warned = Some(mode);
                    tracing::warn!(
                        "the private key {key_file} can be read by every user of this machine (mode {:o}): set it to 0600",
                        mode & 0o7777
                    );
                }
                Event::Update(update)
            }
            Err(why) => Event::Unavailable { why },
        }
    }
}

impl Source for FilesSource {
    fn name(&self) -> &'static str {
        "files"
    }

    fn next(&mut self) -> Pin<Box<dyn Future<Output = Event> + Send + '_>> {
        Box::pin(self.event())
    }
}

/// The set, the name of the key file and its permissions.
fn whole_set(files: Vec<Content>, domains: &[TrustDomain]) -> Result<(Update, String, u32), String> {
    let mut files = files.into_iter();
    let (Some(certificate), Some(key)) = (files.next(), files.next()) else {
        return Err("certificate and key are missing".into());
    };
    let chain = certificates(&certificate)?;
    let certificate = certificate.path.display();
    let key_file = key.path.display().to_string();
    let secret = PrivateKeyDer::from_pem_slice(&key.bytes)
        .map_err(|e| format!("{key_file}: no private key in PEM (PKCS#8 or SEC1, not encrypted): {e}"))?;
    let svid = Svid::new(chain, secret, None).map_err(|why| match why {
        SvidError::KeyMismatch(why) => format!(
            "{key_file}: this private key does not belong to the certificate in {certificate} ({why}); if they are being \
             replaced at this moment, this will pass"
        ),
        why => format!("{certificate}: {why}"),
    })?;
    let mut bundles = TrustBundles::empty();
    for (domain, file) in domains.iter().zip(files) {
        bundles.set(domain.clone(), certificates(&file)?).map_err(|why| format!("{}: {why}", file.path.display()))?;
    }
    Ok((Update { svids: vec![svid], bundles, ..Update::default() }, key_file, key.mode))
}

fn certificates(file: &Content) -> Result<Vec<CertificateDer<'static>>, String> {
    let shown = file.path.display();
    let found = CertificateDer::pem_slice_iter(&file.bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| format!("{shown}: broken PEM: {e}"))?;
    if found.is_empty() { Err(format!("{shown}: no certificate in PEM")) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::time::Duration;

    use super::*;
    use crate::testing::{Issued, Spec, TestCa};

    struct Folder {
        dir: tempfile::TempDir,
        source: FilesSource,
    }

    impl Folder {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let source = FilesSource::new(&declared(dir.path()));
            Self { dir, source }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        /// As a careful program does it: a new file takes the old one's name.
        fn put(&self, name: &str, content: impl AsRef<[u8]>) {
            let new = self.path("new");
            std::fs::write(&new, content).unwrap();
            std::fs::rename(&new, self.path(name)).unwrap();
        }

        fn put_all(&self, ca: &TestCa, issued: &Issued) {
            self.put("bundle.pem", ca.pem());
            self.put("key.pem", issued.key_pem());
            self.put("cert.pem", issued.chain_pem());
        }

        /// The next event; none if there is none within some looks.
        async fn next(&mut self) -> Option<Event> {
            tokio::time::timeout(Duration::from_secs(10), self.source.next()).await.ok()
        }

        async fn update(&mut self) -> Update {
            match self.next().await {
                Some(Event::Update(update)) => update,
                other => panic!("no update but {other:?}"),
            }
        }

        async fn unavailable(&mut self) -> String {
            match self.next().await {
                Some(Event::Unavailable { why }) => why,
                other => panic!("not unavailable but {other:?}"),
            }
        }

        async fn silence(&mut self) {
            let event = self.next().await;
            assert!(event.is_none(), "{event:?}");
        }
    }

    fn declared(dir: &Path) -> IdentityFiles {
        IdentityFiles {
            certificate: dir.join("cert.pem"),
            key: dir.join("key.pem"),
            bundles: [(TrustDomain::parse("nhs.example").unwrap(), dir.join("bundle.pem"))].into(),
        }
    }

    fn leaf_of(update: &Update) -> &[u8] {
        update.svids[0].chain()[0].as_ref()
    }

    #[tokio::test(start_paused = true)]
    async fn absent_files_are_waited_for() {
        let ca = TestCa::new("nhs.example");
        let issued = ca.intermediate().svid("/web");
        let mut folder = Folder::new();
        let why = folder.unavailable().await;
        assert!(why.contains("cert.pem") && why.contains("No such file"), "{why}");
        folder.silence().await;
        folder.put_all(&ca, &issued);
        let update = folder.update().await;
        assert_eq!(leaf_of(&update), issued.der().as_ref());
        assert_eq!(update.svids[0].chain().len(), 2);
        assert_eq!(update.bundles.authorities("nhs.example").unwrap()[0].der, ca.root());
        folder.silence().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_renewed_set_is_one_update() {
        let ca = TestCa::new("nhs.example");
        let mut folder = Folder::new();
        folder.put_all(&ca, &ca.svid("/web"));
        folder.update().await;
        let next = ca.svid("/web");
        folder.put_all(&ca, &next);
        assert_eq!(leaf_of(&folder.update().await), next.der().as_ref());
        folder.silence().await;
        // Written again with the same content: no news.
        folder.put_all(&ca, &next);
        folder.silence().await;
        // Only the bundle.
        let other = TestCa::new("nhs.example");
        folder.put("bundle.pem", ca.pem() + &other.pem());
        assert_eq!(folder.update().await.bundles.authorities("nhs.example").unwrap().len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_of_another_certificate_is_refused_once_and_the_old_set_stays() {
        let ca = TestCa::new("nhs.example");
        let (first, second) = (ca.svid("/web"), ca.svid("/web"));
        let mut folder = Folder::new();
        folder.put_all(&ca, &first);
        folder.update().await;
        folder.put("cert.pem", second.chain_pem());
        let why = folder.unavailable().await;
        assert!(why.contains("key.pem") && why.contains("cert.pem"), "{why}");
        folder.silence().await;
        folder.put("key.pem", second.key_pem());
        assert_eq!(leaf_of(&folder.update().await), second.der().as_ref());
        // And back to the one before.
        folder.put("cert.pem", first.chain_pem());
        folder.unavailable().await;
        folder.put("cert.pem", second.chain_pem());
        assert_eq!(leaf_of(&folder.update().await), second.der().as_ref());
    }

    #[tokio::test(start_paused = true)]
    async fn files_written_one_after_the_other_alarm_nobody() {
        let ca = TestCa::new("nhs.example");
        let next = ca.svid("/web");
        let mut folder = Folder::new();
        folder.put_all(&ca, &ca.svid("/web"));
        folder.update().await;
        folder.put("cert.pem", next.chain_pem());
        // One look falls in between.
        let between = tokio::time::timeout(Duration::from_millis(1500), folder.source.next()).await;
        assert!(between.is_err(), "{between:?}");
        folder.put("key.pem", next.key_pem());
        assert_eq!(leaf_of(&folder.update().await), next.der().as_ref());
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_vanishes_and_comes_back() {
        let ca = TestCa::new("nhs.example");
        let issued = ca.svid("/web");
        let mut folder = Folder::new();
        folder.put_all(&ca, &issued);
        folder.update().await;
        std::fs::remove_file(folder.path("key.pem")).unwrap();
        let why = folder.unavailable().await;
        assert!(why.contains("key.pem"), "{why}");
        folder.put("key.pem", issued.key_pem());
        assert_eq!(leaf_of(&folder.update().await), issued.der().as_ref());
    }

    #[tokio::test(start_paused = true)]
    async fn kubernetes_swaps_a_symbolic_link() {
        let ca = TestCa::new("nhs.example");
        let dir = tempfile::tempdir().unwrap();
        let write = |version: &str, issued: &Issued| {
            let folder = dir.path().join(version);
            std::fs::create_dir(&folder).unwrap();
            std::fs::write(folder.join("cert.pem"), issued.chain_pem()).unwrap();
            std::fs::write(folder.join("key.pem"), issued.key_pem()).unwrap();
            std::fs::write(folder.join("bundle.pem"), ca.pem()).unwrap();
            std::os::unix::fs::symlink(version, dir.path().join("..data_tmp")).unwrap();
            std::fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).unwrap();
        };
        let (first, second) = (ca.svid("/web"), ca.svid("/web"));
        write("..2026_1", &first);
        for name in ["cert.pem", "key.pem", "bundle.pem"] {
            std::os::unix::fs::symlink(format!("..data/{name}"), dir.path().join(name)).unwrap();
        }
        let source = FilesSource::new(&declared(dir.path()));
        let mut folder = Folder { dir: tempfile::tempdir().unwrap(), source };
        assert_eq!(leaf_of(&folder.update().await), first.der().as_ref());
        write("..2026_2", &second);
        std::fs::remove_dir_all(dir.path().join("..2026_1")).unwrap();
        assert_eq!(leaf_of(&folder.update().await), second.der().as_ref());
        folder.silence().await;
    }

    #[tokio::test(start_paused = true)]
    async fn each_way_to_be_broken_names_the_file() {
        let ca = TestCa::new("nhs.example");
        let issued = ca.svid("/web");
        let whole = issued.chain_pem();
        let bad_leaf = ca.issue(&Spec::leaf("https://nhs.example/web"));
        for (name, content, words) in [
            ("cert.pem", String::new(), "no certificate in PEM"),
            ("cert.pem", issued.key_pem(), "no certificate in PEM"),
            ("cert.pem", whole.replace("-----END", ""), "broken PEM"),
            ("cert.pem", bad_leaf.chain_pem(), "does not start with spiffe://"),
            ("cert.pem", whole.clone() + &"#".repeat(MAX_CERTIFICATE_FILE), "larger than"),
            ("key.pem", String::new(), "no private key"),
            ("key.pem", issued.key_pem().replace("PRIVATE", "ENCRYPTED PRIVATE"), "not encrypted"),
            ("key.pem", "x".repeat(MAX_KEY_FILE + 1), "larger than"),
            ("bundle.pem", String::new(), "no certificate in PEM"),
            ("bundle.pem", whole.clone(), "not say CA"),
        ] {
            let mut folder = Folder::new();
            folder.put_all(&ca, &issued);
            folder.put(name, &content);
            let why = folder.unavailable().await;
            assert!(why.contains(name) && why.contains(words), "{name} {words}: {why}");
        }
        let mut folder = Folder::new();
        std::fs::create_dir(folder.path("cert.pem")).unwrap();
        let why = folder.unavailable().await;
        assert!(why.contains("not a regular file"), "{why}");
    }

    #[tokio::test(start_paused = true)]
    async fn reasons_never_show_the_key() {
        let ca = TestCa::new("nhs.example");
        let (issued, other) = (ca.svid("/web"), ca.svid("/web"));
        let mut folder = Folder::new();
        folder.put_all(&ca, &issued);
        folder.put("key.pem", other.key_pem());
        let why = folder.unavailable().await;
        assert!(other.key_pem().lines().skip(1).all(|line| line.starts_with('-') || !why.contains(line)), "{why}");
    }
}
