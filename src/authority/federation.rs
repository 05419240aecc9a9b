//! Other trust domains: fetches their bundles and keeps them up to date.
//!
//! In: places of SPIFFE bundle documents, files or https endpoints. Out: foreign bundles, set on the [`Authority`]. A
//! place that cannot be read or holds nonsense changes nothing: the bundle that was there before stays.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::Authority;
use super::bundle_document::{BundleDocument, MAX_DOCUMENT_BYTES};
use super::config::Federation;
use super::state::FileMark;
use crate::identity::svid::{LeafFacts, MAX_CHAIN, Usage};
use crate::identity::{SpiffeId, TrustBundles, TrustDomain};

/// How often a file is looked at.
const FILE_INTERVAL: Duration = Duration::from_secs(2);
/// From the first packet to the whole document.
const FETCH_TIMEOUT: Duration = Duration::from_secs(20);
/// How often an endpoint is asked that gives no hint (SPIFFE Trust Domain and Bundle specification, section 4.1.2:
/// minutes).
const DEFAULT_REFRESH: Duration = Duration::from_secs(300);
/// The bounds within which an endpoint's hint is followed.
const REFRESH: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(3600));
/// The first and the longest pause after a failure.
const RETRY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(120));
/// The largest file of web CAs that is read, in bytes.
const MAX_CA_FILE_BYTES: u64 = 4 * 1024 * 1024;
/// Where systems keep their web CAs, in the order in which they are looked for.
pub(crate) const SYSTEM_CA_FILES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Where a bundle document is, and what its server is trusted by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A file, watched for change.
    File(PathBuf),
    /// A bundle endpoint, asked again and again.
    Https(Https),
}

/// A bundle endpoint (SPIFFE Federation specification, section 5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Https {
    url: Uri,
    host: String,
    port: u16,
    trust: ServerTrust,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum ServerTrust {
    /// Web CAs from this file, or the system's.
    Web(Option<PathBuf>),
    /// This SPIFFE ID, proved by the bundle we have of its trust domain, at first by the one in the file.
    Spiffe(SpiffeId, Option<PathBuf>),
}

impl Place {
    /// Reads a path or an https URL.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, String> {
        Self::from_config(&Federation::Location(text.to_owned()))
    }

    /// Reads a declared place.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_config(federation: &Federation) -> Result<Self, String> {
        match federation {
            Federation::Location(text) if text.contains("://") => {
                Https::parse(text, ServerTrust::Web(None)).map(Self::Https)
            }
            Federation::Location(text) if text.is_empty() => Err("the place is empty".into()),
            Federation::Location(text) => Ok(Self::File(PathBuf::from(text))),
            Federation::Endpoint(endpoint) => {
                let trust = match (&endpoint.endpoint_spiffe_id, &endpoint.ca_file, &endpoint.bootstrap) {
                    (None, ca_file, None) => ServerTrust::Web(ca_file.clone()),
                    (Some(id), None, bootstrap) if !id.path().is_empty() => {
                        ServerTrust::Spiffe(id.clone(), bootstrap.clone())
                    }
                    (Some(_), None, _) => return Err("endpoint_spiffe_id has no path".into()),
                    (Some(_), Some(_), _) => {
                        return Err(
                            "ca_file and endpoint_spiffe_id exclude each other: web trust or SPIFFE trust".into()
                        );
                    }
                    (None, _, Some(_)) => return Err("bootstrap needs endpoint_spiffe_id".into()),
                };
                Https::parse(&endpoint.url, trust).map(Self::Https)
            }
        }
    }
}

impl Https {
    fn parse(url: &str, trust: ServerTrust) -> Result<Self, String> {
        let uri: Uri = url.parse().map_err(|e| format!("'{}' is not a URL: {e}", url.escape_debug()))?;
        if uri.scheme_str() != Some("https") {
            return Err(format!("'{}' is neither a file path nor an https URL", url.escape_debug()));
        }
        let authority = uri.authority().ok_or("the URL has no host")?;
        if authority.as_str().contains('@') {
            return Err("the URL has user information, which the specification forbids".into());
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = authority.port_u16().unwrap_or(443);
        Ok(Self { host, port, trust, url: uri })
    }
}

/// The tasks that keep foreign bundles up to date; dropping it ends them. The bundles stay.
#[derive(Debug)]
pub struct Federated(Vec<JoinHandle<()>>);

impl Drop for Federated {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

/// Reads the places that are files once, so that their bundles are there from the start. Failures are logged.
pub fn load_files(authority: &Authority, places: &BTreeMap<TrustDomain, Place>) {
    for (domain, place) in places {
        let path = match place {
            Place::File(path) => path,
            Place::Https(Https { trust: ServerTrust::Spiffe(_, Some(path)), .. }) => path,
            Place::Https(_) => continue,
        };
        if let Err(why) = read_file(path).and_then(|document| apply(authority, domain, document)) {
            complain(domain, &why);
        }
    }
}

/// Watches the places from now on. To be called from within a tokio runtime.
pub fn watch(authority: &Authority, places: &BTreeMap<TrustDomain, Place>) -> Federated {
    let tasks = places.iter().map(|(domain, place)| {
        let (authority, domain) = (authority.clone(), domain.clone());
        match place.clone() {
            Place::File(path) => tokio::spawn(watch_file(authority, domain, path)),
            Place::Https(https) => tokio::spawn(watch_https(authority, domain, https)),
        }
    });
    Federated(tasks.collect())
}

fn complain(domain: &TrustDomain, why: &str) {
    tracing::warn!(trust_domain = domain.as_str(), why, "a foreign bundle cannot be had; the one before stays");
}

/// Sets what a document says. Returns its hint.
fn apply(authority: &Authority, domain: &TrustDomain, document: BundleDocument) -> Result<Option<Duration>, String> {
    if document.authorities.is_empty() {
        // Section 4.1.3: the domain has taken back what it had published.
        tracing::warn!(trust_domain = domain.as_str(), "the foreign bundle is empty; the domain is trusted no more");
        authority.remove_foreign_bundle(domain).map_err(|e| e.to_string())?;
    } else {
        authority.set_foreign_bundle(domain, document.authorities).map_err(|e| e.to_string())?;
    }
    Ok(document.refresh_hint)
}

fn read_file(path: &Path) -> Result<BundleDocument, String> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_DOCUMENT_BYTES as u64 + 1).read_to_end(&mut bytes))
        .map_err(|e| format!("{}: {e}", path.display()))?;
    BundleDocument::read(&bytes).map_err(|why| format!("{}: {why}", path.display()))
}

async fn watch_file(authority: Authority, domain: TrustDomain, path: PathBuf) {
    let mut before = None;
    loop {
        let mark = FileMark::of(&path);
        // `None` is before the first look, `Some(None)` a missing file, so that it is complained of once.
        if before != Some(mark)
            && let Err(why) = read_file(&path).and_then(|document| apply(&authority, &domain, document))
        {
            complain(&domain, &why);
        }
        before = Some(mark);
        tokio::time::sleep(FILE_INTERVAL).await;
    }
}

async fn watch_https(authority: Authority, domain: TrustDomain, https: Https) {
    let mut retry = RETRY.0;
    loop {
        let fetched = tokio::time::timeout(FETCH_TIMEOUT, fetch(&authority, &https)).await;
        let result = match fetched {
            Err(_) => Err(format!("{}: no answer within {} s", https.url, FETCH_TIMEOUT.as_secs())),
            Ok(result) => result
                .and_then(|document| apply(&authority, &domain, document))
                .map_err(|why| format!("{}: {why}", https.url)),
        };
        let pause = match result {
            Ok(hint) => {
                retry = RETRY.0;
                hint.unwrap_or(DEFAULT_REFRESH).clamp(REFRESH.0, REFRESH.1)
            }
            Err(why) => {
                complain(&domain, &why);
                let pause = retry;
                retry = (retry * 2).min(RETRY.1);
                pause
            }
        };
        tokio::time::sleep(pause).await;
    }
}

async fn fetch(authority: &Authority, https: &Https) -> Result<BundleDocument, String> {
    let config = client_config(authority, &https.trust)?;
    let name = ServerName::try_from(https.host.clone()).map_err(|_| "the host is neither a DNS name nor an IP")?;
    let tcp = TcpStream::connect((https.host.as_str(), https.port)).await.map_err(|e| e.to_string())?;
    let tls = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await.map_err(|e| e.to_string())?;
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(64 * 1024)
        .handshake(TokioIo::new(tls))
        .await
        .map_err(|e| e.to_string())?;
    let exchange = async {
        let path = https.url.path_and_query().map_or("/", |p| p.as_str());
        let host = https.url.authority().map_or("", |a| a.as_str());
        let request = Request::get(path)
            .header(hyper::header::HOST, host)
            .header(hyper::header::ACCEPT, "application/json")
            .header(hyper::header::USER_AGENT, concat!("portcullis/", env!("CARGO_PKG_VERSION")))
            .body(Empty::<Bytes>::new())
            .map_err(|e| e.to_string())?;
        let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
        if response.status() != StatusCode::OK {
            // Redirects are not followed: the profile's trust is in this URL's server.
            return Err(format!("the endpoint answered {}", response.status()));
        }
        let body = Limited::new(response.into_body(), MAX_DOCUMENT_BYTES);
        let body = body.collect().await.map_err(|e| format!("the document cannot be read: {e}"))?;
        BundleDocument::read(&body.to_bytes())
    };
    tokio::pin!(connection);
    tokio::pin!(exchange);
    tokio::select! {
        done = &mut exchange => done,
        // The connection may end as soon as all has been read; what was read is judged all the same.
        ended = &mut connection => {
            ended.map_err(|e| e.to_string())?;
            exchange.await
        }
    }
}

fn client_config(authority: &Authority, trust: &ServerTrust) -> Result<rustls::ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_details(Arc::clone(&provider), authority.clock().provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?;
    Ok(match trust {
        ServerTrust::Web(file) => builder.with_root_certificates(web_roots(file.as_deref())?).with_no_client_auth(),
        ServerTrust::Spiffe(id, _) => {
            let bundles = authority.published().bundles.clone();
            if bundles.authorities(id.trust_domain_name()).is_none() {
                return Err(format!(
                    "there is no bundle of '{}' yet to prove the endpoint by; give it one as `bootstrap`",
                    id.trust_domain_name()
                ));
            }
            let verifier = SpiffeServer { id: id.clone(), bundles, provider };
            builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth()
        }
    })
}

fn web_roots(file: Option<&Path>) -> Result<RootCertStore, String> {
    let path = match file {
        Some(path) => path.to_owned(),
        None => std::env::var_os("SSL_CERT_FILE")
            .map(PathBuf::from)
            .or_else(|| SYSTEM_CA_FILES.iter().map(PathBuf::from).find(|p| p.exists()))
            .ok_or("the system has no web CAs where they are looked for; name a `ca_file`")?,
    };
    let fail = |e: &dyn std::fmt::Display| format!("CA file {}: {e}", path.display());
    let mut pem = Vec::new();
    std::fs::File::open(&path)
        .and_then(|file| file.take(MAX_CA_FILE_BYTES + 1).read_to_end(&mut pem))
        .map_err(|e| fail(&e))?;
    if pem.len() as u64 > MAX_CA_FILE_BYTES {
        return Err(fail(&"it is too large"));
    }
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|e| fail(&e))?;
        // System stores hold certificates that no verifier can use; what a user names must be usable.
        match roots.add(certificate) {
            Err(e) if file.is_some() => return Err(fail(&e)),
            _ => {}
        }
    }
    if roots.is_empty() { Err(fail(&"it holds no CA certificate")) } else { Ok(roots) }
}

/// Judges a bundle endpoint's server by profile `https_spiffe`: a valid SVID with exactly the expected SPIFFE ID, by the
/// bundle of that ID's own trust domain. Host names do not matter (SPIFFE Federation specification, section 5.2.2).
#[derive(Debug)]
struct SpiffeServer {
    id: SpiffeId,
    bundles: TrustBundles,
    provider: Arc<rustls::crypto::CryptoProvider>,
}

impl ServerCertVerifier for SpiffeServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let refused = |why: String| rustls::Error::General(why);
        if intermediates.len() >= MAX_CHAIN {
            return Err(refused("the server's chain is too long".into()));
        }
        let facts = LeafFacts::read(end_entity).map_err(|e| refused(e.to_string()))?;
        if facts.id != self.id {
            return Err(refused(format!("the server is {}, and {} is expected", facts.id, self.id)));
        }
        if !facts.may_be(Usage::Server) {
            return Err(CertificateError::InvalidPurpose.into());
        }
        let seconds = now.as_secs();
        let anchors: Vec<_> = self
            .bundles
            .authorities(self.id.trust_domain_name())
            .unwrap_or_default()
            .iter()
            .filter(|a| a.not_before <= seconds && seconds <= a.not_after)
            .map(|a| a.anchor.clone())
            .collect();
        let leaf = webpki::EndEntityCert::try_from(end_entity).map_err(|e| refused(e.to_string()))?;
        leaf.verify_for_usage(
            self.provider.signature_verification_algorithms.all,
            &anchors,
            intermediates,
            now,
            webpki::KeyUsage::server_auth(),
            None,
            None,
        )
        .map_err(|e| refused(format!("the server's SVID does not verify: {e}")))?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests;
