use std::os::unix::fs::FileTypeExt;

use super::*;
use crate::authority::attest::Selectors;
use crate::authority::{AuthorityConfig, Options, serve};
use crate::clock::Clock;
use crate::identity::workload_api::der;
use crate::identity::{SpiffeId, TrustDomain};

fn authority() -> Authority {
    Authority::open(Options::new(TrustDomain::parse("lab.test").unwrap()), Clock::system()).unwrap()
}

fn entry(path: &str, hint: Option<&str>, selectors: Selectors) -> Entry {
    Entry {
        spiffe_id: SpiffeId::parse(&format!("spiffe://lab.test{path}")).unwrap(),
        selectors,
        dns: vec![],
        ttl: None,
        hint: hint.map(str::to_owned),
    }
}

fn us() -> Selectors {
    Selectors { uid: Some(rustix::process::geteuid().as_raw()), ..Selectors::default() }
}

/// hyper's handle as the service that tonic calls.
struct Http2(hyper::client::conn::http2::SendRequest<Body>);

impl tower_service::Service<http::Request<Body>> for Http2 {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }
    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// Opens a stream on a new connection.
async fn call<T: prost::Message + Default + 'static>(
    socket: &Path,
    method: &'static str,
    header: Option<&'static str>,
) -> Result<tonic::Streaming<T>, Status> {
    let io = UnixStream::connect(socket).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await.unwrap();
    tokio::spawn(connection);
    let mut request = Request::new(X509SvidRequest {});
    if let Some(header) = header {
        request.metadata_mut().insert(SECURITY_HEADER, header.parse().unwrap());
    }
    tonic::client::Grpc::with_origin(Http2(sender), "http://localhost".parse().unwrap())
        .server_streaming(
            request,
            http::uri::PathAndQuery::from_static(method),
            ProstCodec::<X509SvidRequest, T>::default(),
        )
        .await
        .map(Response::into_inner)
}

async fn first<T: prost::Message + Default + 'static>(
    socket: &Path,
    method: &'static str,
    header: Option<&'static str>,
) -> Result<T, Status> {
    let mut stream = call::<T>(socket, method, header).await?;
    Ok(stream.message().await?.expect("a message"))
}

#[tokio::test]
async fn what_is_served_and_what_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("made/agent.sock");
    let authority = authority();
    let theirs = Authority::open(Options::new(TrustDomain::parse("else.test").unwrap()), Clock::system()).unwrap();
    authority.set_foreign_bundle(theirs.trust_domain(), theirs.published().own_authorities().to_vec()).unwrap();
    let stranger = Selectors { uid: Some(12345), ..us() };
    let entries = vec![
        entry("/a", Some("same"), us()),
        entry("/not-ours", None, stranger),
        entry("/b", Some("same"), us()),
        entry(
            "/c",
            None,
            Selectors { path: Some(std::env::current_exe().unwrap()), pid: Some(std::process::id()), ..us() },
        ),
        entry("/other-program", None, Selectors { path: Some("/bin/true".into()), ..us() }),
    ];
    let server = WorkloadApiServer::bind(authority.clone(), &socket, 0o640, entries).unwrap();
    assert_eq!(std::fs::metadata(&socket).unwrap().mode() & 0o777, 0o640);
    let task = tokio::spawn(server.run(std::future::pending()));

    let told: X509SvidResponse = first(&socket, FETCH_X509_SVID, Some("true")).await.unwrap();
    let ids: Vec<_> = told.svids.iter().map(|s| s.spiffe_id.as_str()).collect();
    assert_eq!(ids, ["spiffe://lab.test/a", "spiffe://lab.test/c"], "the second of one hint is left out");
    assert_eq!(told.svids[0].hint, "same");
    assert_eq!(told.svids[0].bundle, der::join(authority.published().own_authorities()));
    let foreign: Vec<_> = told.federated_bundles.keys().cloned().collect();
    assert_eq!(foreign, ["spiffe://else.test"]);
    let same: X509SvidResponse = first(&socket, FETCH_X509_SVID, Some("true")).await.unwrap();
    assert_eq!(same.svids[0].x509_svid, told.svids[0].x509_svid, "callers of one entry share its SVID");

    let bundles: X509BundlesResponse = first(&socket, FETCH_X509_BUNDLES, Some("true")).await.unwrap();
    let domains: Vec<_> = bundles.bundles.keys().cloned().collect();
    assert_eq!(domains, ["spiffe://else.test", "spiffe://lab.test"]);

    for header in [None, Some("false"), Some("True"), Some("")] {
        let status = first::<X509SvidResponse>(&socket, FETCH_X509_SVID, header).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{header:?}");
        assert_eq!(status.message(), "security header missing from request");
    }
    for method in JWT_METHODS.into_iter().chain(["/SpiffeWorkloadAPI/FetchEverything", "/"]) {
        let status = first::<X509SvidResponse>(&socket, method, Some("true")).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unimplemented, "{method}");
    }
    task.abort();
    let _ = task.await;
    assert!(!socket.exists(), "the socket file goes with the server");
}

#[tokio::test]
async fn strangers_get_nothing_and_learn_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let entries = vec![entry("/a", None, Selectors { gid: Some(12345), ..us() })];
    let server = WorkloadApiServer::bind(authority(), &socket, 0o600, entries).unwrap();
    let handle = server.entries();
    let task = tokio::spawn(server.run(std::future::pending()));
    for method in [FETCH_X509_SVID, FETCH_X509_BUNDLES] {
        let status = first::<X509SvidResponse>(&socket, method, Some("true")).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::PermissionDenied);
        assert_eq!(status.message(), "no identity issued");
    }
    // An open stream learns of changes, and ends when its last entry goes.
    handle.set(vec![entry("/a", None, us())]);
    let mut stream = call::<X509SvidResponse>(&socket, FETCH_X509_SVID, Some("true")).await.unwrap();
    assert_eq!(stream.message().await.unwrap().unwrap().svids.len(), 1);
    handle.set(vec![entry("/a", None, us()), entry("/b", None, us())]);
    assert_eq!(stream.message().await.unwrap().unwrap().svids.len(), 2);
    handle.set(vec![]);
    assert_eq!(stream.message().await.unwrap_err().code(), tonic::Code::PermissionDenied);
    task.abort();
}

#[tokio::test]
async fn a_reader_that_reads_nothing_costs_one_message_and_gets_the_newest() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let authority = authority();
    let server = WorkloadApiServer::bind(authority.clone(), &socket, 0o600, vec![entry("/a", None, us())]).unwrap();
    let handle = server.entries();
    let task = tokio::spawn(server.run(std::future::pending()));
    let mut stream = call::<X509SvidResponse>(&socket, FETCH_X509_SVID, Some("true")).await.unwrap();
    stream.message().await.unwrap().unwrap();
    // Far more than fits into a stream's window of flow control.
    let entries = |n: usize| (0..n).map(|i| entry(&format!("/e{i}"), None, us())).collect::<Vec<_>>();
    for round in 0..200 {
        handle.set(entries(20 + round % 2));
        tokio::task::yield_now().await;
    }
    handle.set(entries(7));
    let mut messages = 0;
    loop {
        messages += 1;
        let told = stream.message().await.unwrap().unwrap();
        if told.svids.len() == 7 {
            break;
        }
    }
    assert!(messages < 100, "{messages} messages were kept for a reader that did not read");
    task.abort();
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert!(std::fs::symlink_metadata(&socket).unwrap().file_type().is_socket());
    let bind = |path: &Path| WorkloadApiServer::bind(authority(), path, 0o600, vec![]);
    let living = bind(&socket).unwrap();
    let error = bind(&socket).unwrap_err();
    assert!(error.to_string().contains("another server answers"), "{error}");
    drop(living);
    let file = folder.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let error = bind(&file).unwrap_err();
    assert!(error.to_string().contains("not a socket"), "{error}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
}

#[tokio::test]
async fn the_program_follows_its_config_file_and_keeps_the_bundle_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let uid = rustix::process::geteuid().as_raw();
    let text = |entries: &str, more: &str| {
        format!(
            "trust_domain: lab.test\nsocket: {}\nstate_dir: {}\nbundle_file: {}\n{more}\nentries: [{entries}]\n",
            path("s").display(),
            path("state").display(),
            path("out/bundle.json").display()
        )
    };
    let one = |name: &str| format!("{{ spiffe_id: spiffe://lab.test/{name}, selectors: {{ uid: {uid} }} }}");
    let file = path("authority.yaml");
    std::fs::write(&file, text(&one("a"), "")).unwrap();
    let config = AuthorityConfig::load(&file).unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(serve(config, Some(file.clone()), Clock::system(), async {
        let _ = stopped.await;
    }));
    while !path("s").exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let read_bundle = || {
        crate::authority::bundle_document::BundleDocument::read(&std::fs::read(path("out/bundle.json")).unwrap())
            .unwrap()
    };
    assert_eq!(read_bundle().authorities.len(), 1);
    let mut stream = call::<X509SvidResponse>(&path("s"), FETCH_X509_SVID, Some("true")).await.unwrap();
    assert_eq!(stream.message().await.unwrap().unwrap().svids.len(), 1);
    // A bad file changes nothing, a change that needs a restart neither.
    std::fs::write(&file, "colour: red").unwrap();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    std::fs::write(&file, text(&one("b"), "svid_ttl: 10m")).unwrap();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    // A good one is followed, with a foreign bundle.
    let theirs = Authority::open(Options::new(TrustDomain::parse("else.test").unwrap()), Clock::system()).unwrap();
    std::fs::write(path("else.json"), theirs.bundle_document().write().unwrap()).unwrap();
    let more = format!("federates_with: {{ else.test: {} }}", path("else.json").display());
    std::fs::write(&file, text(&format!("{}, {}", one("a"), one("b")), &more)).unwrap();
    loop {
        let told = stream.message().await.unwrap().unwrap();
        let ids: Vec<_> = told.svids.iter().map(|s| s.spiffe_id.clone()).collect();
        assert!(ids[0].ends_with("/a"), "{ids:?}");
        if ids.len() == 2 && told.federated_bundles.len() == 1 {
            break;
        }
    }
    // Another process of the same state directory rotates: the bundle file follows.
    let options = Options { state_dir: Some(path("state")), ..Options::new(TrustDomain::parse("lab.test").unwrap()) };
    Authority::open(options, Clock::system()).unwrap().prepare_ca().unwrap();
    while read_bundle().authorities.len() != 2 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stop.send(()).unwrap();
    running.await.unwrap().unwrap();
    assert!(!path("s").exists());
}
