use super::*;
use crate::authority::config::Endpoint;
use crate::authority::{Options, SvidRequest};
use crate::clock::Clock;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn authority(domain: &str) -> Authority {
    Authority::open(Options::new(TrustDomain::parse(domain).unwrap()), Clock::system()).unwrap()
}

fn known(authority: &Authority, domain: &str) -> usize {
    authority.published().bundles.authorities(domain).map_or(0, <[_]>::len)
}

async fn eventually(what: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(15);
    while !what() {
        assert!(tokio::time::Instant::now() < deadline, "it does not come");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn places_are_read_or_refused_with_the_reason() {
    assert_eq!(Place::parse("/etc/b.json").unwrap(), Place::File("/etc/b.json".into()));
    let Place::Https(https) = Place::parse("https://[::1]:8443/bundle?x=1").unwrap() else { panic!() };
    assert_eq!((https.host.as_str(), https.port), ("::1", 8443));
    for (text, word) in [
        ("", "empty"),
        ("http://b.test/", "neither"),
        ("ftp://b.test/", "neither"),
        ("https://u:p@b.test/", "user information"),
        ("https://", "not a URL"),
    ] {
        let error = Place::parse(text).unwrap_err();
        assert!(error.contains(word), "{text}: {error}");
    }
    let endpoint = |change: &dyn Fn(&mut Endpoint)| {
        let mut endpoint =
            Endpoint { url: "https://b.test/".into(), ca_file: None, endpoint_spiffe_id: None, bootstrap: None };
        change(&mut endpoint);
        Place::from_config(&Federation::Endpoint(endpoint))
    };
    let id = || Some(SpiffeId::parse("spiffe://b.test/server").unwrap());
    assert!(endpoint(&|e| e.ca_file = Some("/ca".into())).is_ok());
    assert!(endpoint(&|e| e.endpoint_spiffe_id = id()).is_ok());
    assert!(endpoint(&|e| e.bootstrap = Some("/b".into())).unwrap_err().contains("needs"));
    assert!(
        endpoint(&|e| {
            e.endpoint_spiffe_id = id();
            e.ca_file = Some("/ca".into());
        })
        .unwrap_err()
        .contains("exclude")
    );
}

#[tokio::test]
async fn a_file_is_watched_and_nonsense_in_it_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("else.json");
    let (ours, theirs) = (authority("lab.test"), authority("else.test"));
    let places = [(theirs.trust_domain().clone(), Place::File(path.clone()))].into();
    load_files(&ours, &places);
    assert_eq!(known(&ours, "else.test"), 0);
    std::fs::write(&path, theirs.bundle_document().write().unwrap()).unwrap();
    load_files(&ours, &places);
    assert_eq!(known(&ours, "else.test"), 1);
    let _watch = watch(&ours, &places);
    theirs.prepare_ca().unwrap();
    std::fs::write(&path, theirs.bundle_document().write().unwrap()).unwrap();
    eventually(|| known(&ours, "else.test") == 2).await;
    std::fs::write(&path, "nonsense").unwrap();
    tokio::time::sleep(FILE_INTERVAL + Duration::from_millis(300)).await;
    assert_eq!(known(&ours, "else.test"), 2);
    std::fs::write(&path, r#"{"keys":[]}"#).unwrap();
    eventually(|| known(&ours, "else.test") == 0).await;
}

/// An https server that answers every request with one text and counts nothing.
async fn serve_https(authority: &Authority, id: &str, dns: &str, answer: String) -> u16 {
    let mut request = SvidRequest::new(SpiffeId::parse(id).unwrap());
    request.dns_names = vec![dns.to_owned()];
    let issued = authority.issue(&request).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(issued.key_pkcs8().to_vec()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(issued.chain().to_vec(), key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let (acceptor, answer) = (acceptor.clone(), answer.clone());
            tokio::spawn(async move {
                let Ok(mut tls) = acceptor.accept(tcp).await else { return };
                let mut request = vec![0; 4096];
                let _ = tls.read(&mut request).await;
                let _ = tls.write_all(answer.as_bytes()).await;
                let _ = tls.shutdown().await;
            });
        }
    });
    port
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}

fn spiffe(port: u16, id: &str) -> Https {
    let trust = ServerTrust::Spiffe(SpiffeId::parse(id).unwrap(), None);
    Https::parse(&format!("https://127.0.0.1:{port}/bundle"), trust).unwrap()
}

#[tokio::test]
async fn an_endpoint_is_trusted_by_its_spiffe_id_alone() {
    let (ours, theirs, strange) = (authority("lab.test"), authority("else.test"), authority("else.test"));
    let body = theirs.bundle_document().write().unwrap();
    let port = serve_https(&theirs, "spiffe://else.test/server", "any.test", ok(&body)).await;
    let good = spiffe(port, "spiffe://else.test/server");
    let error = fetch(&ours, &good).await.unwrap_err();
    assert!(error.contains("bootstrap"), "{error}");
    ours.set_foreign_bundle(theirs.trust_domain(), theirs.published().own_authorities().to_vec()).unwrap();
    assert_eq!(fetch(&ours, &good).await.unwrap().authorities, theirs.published().own_authorities());
    let error = fetch(&ours, &spiffe(port, "spiffe://else.test/other")).await.unwrap_err();
    assert!(error.contains("is expected"), "{error}");
    let port = serve_https(&strange, "spiffe://else.test/server", "any.test", ok(&body)).await;
    let error = fetch(&ours, &spiffe(port, "spiffe://else.test/server")).await.unwrap_err();
    assert!(error.contains("does not verify"), "{error}");
}

#[tokio::test]
async fn an_endpoint_is_trusted_by_web_cas_and_its_name() {
    let (ours, theirs) = (authority("lab.test"), authority("else.test"));
    let folder = tempfile::tempdir().unwrap();
    let ca_file = folder.path().join("ca.pem");
    let der =
        base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &theirs.published().own_authorities()[0]);
    std::fs::write(&ca_file, format!("-----BEGIN CERTIFICATE-----\n{der}\n-----END CERTIFICATE-----\n")).unwrap();
    let body = theirs.bundle_document().write().unwrap();
    let port = serve_https(&theirs, "spiffe://else.test/server", "localhost", ok(&body)).await;
    let web = |host: &str, file: &Path| {
        Https::parse(&format!("https://{host}:{port}/"), ServerTrust::Web(Some(file.to_owned()))).unwrap()
    };
    assert_eq!(fetch(&ours, &web("localhost", &ca_file)).await.unwrap().authorities.len(), 1);
    assert!(fetch(&ours, &web("127.0.0.1", &ca_file)).await.is_err(), "another name than the certificate's");
    std::fs::write(folder.path().join("empty.pem"), "").unwrap();
    let error = fetch(&ours, &web("localhost", &folder.path().join("empty.pem"))).await.unwrap_err();
    assert!(error.contains("no CA certificate"), "{error}");
    // The whole way, by the watch.
    let places = [(theirs.trust_domain().clone(), Place::Https(web("localhost", &ca_file)))].into();
    let _watch = watch(&ours, &places);
    eventually(|| known(&ours, "else.test") == 1).await;
}

#[tokio::test]
async fn answers_that_are_no_bundle_are_refused() {
    let (ours, theirs) = (authority("lab.test"), authority("else.test"));
    ours.set_foreign_bundle(theirs.trust_domain(), theirs.published().own_authorities().to_vec()).unwrap();
    let huge = format!("{{\"keys\":[],\"x\":\"{}\"}}", "y".repeat(MAX_DOCUMENT_BYTES));
    for (answer, word) in [
        ("HTTP/1.1 302 Found\r\nLocation: https://evil.test/\r\nContent-Length: 0\r\n\r\n".to_owned(), "302"),
        (ok("nonsense"), "not a SPIFFE bundle"),
        (ok(&huge), "length limit"),
        ("garbage\r\n\r\n".into(), "invalid HTTP"),
    ] {
        let port = serve_https(&theirs, "spiffe://else.test/server", "any.test", answer).await;
        let error = fetch(&ours, &spiffe(port, "spiffe://else.test/server")).await.unwrap_err();
        assert!(error.contains(word), "{word}: {error}");
    }
}
