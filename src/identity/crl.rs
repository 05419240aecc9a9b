//! Revocation lists from files (`identity.crls`), watched for change.
//!
//! In: paths of PEM files (one list or several) or DER files (one). Out: all lists together whenever they changed, each
//! read to its last entry. SPIRE fills the CRL field of its Workload API never (up to 1.15), so that files are the
//! usual way.

use std::path::PathBuf;

use rustls::pki_types::CertificateRevocationListDer;
use rustls::pki_types::pem::PemObject;

use super::bundle::check_crl;
use super::watched::{Content, Watched};

/// The largest file of revocation lists that is read, in bytes.
pub const MAX_CRL_FILE: usize = 16 * 1024 * 1024;

/// Files of revocation lists, watched for change.
pub struct CrlFiles {
    watched: Watched,
}

impl CrlFiles {
    /// Watches these files; none is fine, and then nothing ever comes.
    pub fn new(paths: &[PathBuf]) -> Self {
        Self { watched: Watched::new(paths.iter().map(|path| (path.clone(), MAX_CRL_FILE)).collect()) }
    }

    /// Waits until the files hold other lists than before. Cancel-safe.
    ///
    /// # Errors
    /// A file cannot be read as revocation lists; the reason names it. Said once, and after lists that were good only if
    /// it stands for a second.
    pub async fn next(&mut self) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
        self.watched
            .changed(|files| {
                let mut lists = Vec::new();
                for file in &files {
                    lists.extend(lists_of(file)?);
                }
                Ok(lists)
            })
            .await
    }
}

fn lists_of(file: &Content) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    let shown = file.path.display();
    if check_crl(&file.bytes).is_ok() {
        return Ok(vec![CertificateRevocationListDer::from(file.bytes.to_vec())]);
    }
    let lists = CertificateRevocationListDer::pem_slice_iter(&file.bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| format!("{shown}: broken PEM: {e}"))?;
    if lists.is_empty() {
        return Err(format!("{shown}: no revocation list, neither DER nor PEM"));
    }
    for list in &lists {
        check_crl(list).map_err(|e| format!("{shown}: a revocation list that cannot be read: {e}"))?;
    }
    Ok(lists)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::testing::TestCa;

    type Lists = Result<Vec<CertificateRevocationListDer<'static>>, String>;

    async fn next(files: &mut CrlFiles) -> Option<Lists> {
        tokio::time::timeout(Duration::from_secs(10), files.next()).await.ok()
    }

    #[tokio::test(start_paused = true)]
    async fn pem_and_der_are_watched() {
        let dir = tempfile::tempdir().unwrap();
        let paths = [dir.path().join("a.pem"), dir.path().join("b.crl")];
        let (one, two) = (TestCa::new("nhs.example"), TestCa::new("gp.example"));
        let (first, second, third) = (one.crl(&[]), two.crl(&[]), one.crl(&[&one.svid("/web")]));
        let mut files = CrlFiles::new(&paths);
        let why = next(&mut files).await.unwrap().unwrap_err();
        assert!(why.contains("a.pem") && why.contains("No such file"), "{why}");
        std::fs::write(&paths[0], first.1.clone() + &second.1).unwrap();
        let why = next(&mut files).await.unwrap().unwrap_err();
        assert!(why.contains("b.crl"), "{why}");
        std::fs::write(&paths[1], &third.0).unwrap();
        assert_eq!(next(&mut files).await.unwrap().unwrap(), [first.0.clone(), second.0.clone(), third.0.clone()]);
        assert!(next(&mut files).await.is_none());
        std::fs::remove_file(&paths[0]).unwrap();
        std::fs::write(&paths[0], &second.1).unwrap();
        assert_eq!(next(&mut files).await.unwrap().unwrap(), [second.0, third.0]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_no_list() {
        let ca = TestCa::new("nhs.example");
        let (der, pem) = ca.crl(&[&ca.svid("/web")]);
        for bad in
            [b"".to_vec(), ca.pem().into_bytes(), pem.into_bytes()[..100].to_vec(), der[..der.len() - 1].to_vec()]
        {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("list.crl");
            std::fs::write(&path, &bad).unwrap();
            let why = next(&mut CrlFiles::new(&[path])).await.unwrap().unwrap_err();
            assert!(why.contains("list.crl"), "{why}");
        }
        assert!(next(&mut CrlFiles::new(&[])).await.is_none());
    }
}
