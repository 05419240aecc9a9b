//! What the benches share: a throwaway authority, identities, and the CPU time of this thread.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use portcullis::app::Proxy;
use portcullis::clock::Clock;
use portcullis::config::schema::{Config, PostQuantum, SvidKeys, TlsConfig};
use portcullis::identity::keeper::Current;
use portcullis::identity::{Identity, Svid, TrustBundles, TrustDomain};
use portcullis::policy::{Decision, Expected, Policy};
use portcullis::proxy::inherited::Inherited;
use portcullis::proxy::record::{Carries, ConnectionRecord, Event, Observer, RequestRecord};
use portcullis::tls::record::{Direction, HandshakeRecord};
use portcullis::tls::{ClientTls, Profile, ServerTls, Trust};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

pub mod bare;

#[path = "../../src/testing.rs"]
pub mod testing;
pub use testing::Key;

pub const SERVER: &str = "spiffe://bench.example/server";
pub const CLIENT: &str = "spiffe://bench.example/client";

/// A certificate chain with its key.
pub struct Leaf {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

/// An authority with keys of one kind, and leaves of the same kind.
pub struct Ca {
    ca: testing::TestCa,
    keys: Key,
}

impl Ca {
    pub fn new(keys: Key) -> Self {
        let ca = testing::TestCa::root_with("bench.example", &testing::Spec::authority("bench.example").key(keys));
        Self { ca, keys }
    }

    pub fn der(&self) -> CertificateDer<'static> {
        self.ca.root()
    }

    pub fn issue(&self, id: &str) -> Leaf {
        let issued = self.ca.issue(&testing::Spec::leaf(id).key(self.keys).dns("localhost"));
        Leaf { chain: issued.chain.clone(), key: issued.key() }
    }

    /// Writes a leaf and the bundle as PEM files; answers the `identity:` part of a config.
    pub fn write_files(&self, dir: &std::path::Path, leaf: &Leaf) -> String {
        use std::os::unix::fs::OpenOptionsExt;
        let pem = |kind: &str, der: &[u8]| {
            use base64::Engine;
            let text = base64::engine::general_purpose::STANDARD.encode(der);
            let lines: Vec<&str> = text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
            format!("-----BEGIN {kind}-----\n{}\n-----END {kind}-----\n", lines.join("\n"))
        };
        let write = |name: &str, text: String| {
            let path = dir.join(name);
            let mut file = std::fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&path);
            std::io::Write::write_all(file.as_mut().unwrap(), text.as_bytes()).unwrap();
            path.display().to_string()
        };
        let certificate = write("own.crt", leaf.chain.iter().map(|cert| pem("CERTIFICATE", cert)).collect());
        let key = write("own.key", pem("PRIVATE KEY", leaf.key.secret_der()));
        let bundle = write("bundle.pem", pem("CERTIFICATE", &self.der()));
        format!(
            "identity: {{files: {{certificate: {certificate}, key: {key}, bundles: {{bench.example: {bundle}}}}}}}\n"
        )
    }

    pub fn identity(&self, leaf: &Leaf) -> Arc<Identity> {
        let mut bundles = TrustBundles::empty();
        bundles.set(TrustDomain::parse("bench.example").unwrap(), vec![self.der()]).unwrap();
        Arc::new(Identity {
            svid: Arc::new(Svid::new(leaf.chain.clone(), leaf.key.clone_key(), None).unwrap()),
            bundles: Arc::new(bundles),
            generation: 1,
        })
    }
}

/// A profile for one kind of keys and one group.
pub fn profile(keys: Key, group: &str, resumption: bool) -> Arc<Profile> {
    let config = TlsConfig {
        groups: Some(vec![group.to_owned()]),
        post_quantum: PostQuantum::Off,
        svid_keys: if keys == Key::P384 { SvidKeys::P384 } else { SvidKeys::P256Allowed },
        resumption,
        ..TlsConfig::default()
    };
    Arc::new(Profile::from_config(&config).unwrap())
}

pub fn config_yaml() -> Config {
    portcullis::config::parse(
        &format!("identity: unix:///run/x.sock\ninbound:\n  - {{name: in, listen: '127.0.0.1:1', to: '127.0.0.1:2', allow: ['{CLIENT}']}}\n"),
        "bench",
    )
    .unwrap()
    .config
}

pub fn server_tls(profile: &Arc<Profile>, identity: &Arc<Identity>) -> Arc<ServerTls> {
    let trust = Arc::new(Trust::new(Arc::clone(&identity.bundles), Arc::clone(profile), Clock::system()).unwrap());
    let policy = Policy::compile(&config_yaml()).listener("in").unwrap();
    Arc::new(
        ServerTls::new(
            profile,
            identity,
            &trust,
            &policy,
            &Clock::system(),
            portcullis::tls::server::Accepts { serves: portcullis::tls::server::Serves::Bytes, legacy_tls12: false },
            1,
        )
        .unwrap(),
    )
}

pub fn client_tls(profile: &Arc<Profile>, identity: &Arc<Identity>) -> Arc<ClientTls> {
    let trust = Arc::new(Trust::new(Arc::clone(&identity.bundles), Arc::clone(profile), Clock::system()).unwrap());
    let expected = Arc::new(Expected::new("out", &[SERVER.parse().unwrap()]));
    Arc::new(ClientTls::new(profile, identity, &trust, &expected, &Clock::system(), false).unwrap())
}

/// A runtime of one worker thread whose CPU time can be read: what is under test runs here and nothing else does.
pub struct Workers {
    runtime: tokio::runtime::Runtime,
    threads: Arc<Mutex<Vec<i32>>>,
}

impl Workers {
    pub fn start() -> Self {
        let threads: Arc<Mutex<Vec<i32>>> = Arc::default();
        let started = Arc::clone(&threads);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .on_thread_start(move || started.lock().unwrap().push(rustix::thread::gettid().as_raw_nonzero().get()))
            .build()
            .unwrap();
        Self { runtime, threads }
    }

    pub fn handle(&self) -> tokio::runtime::Handle {
        self.runtime.handle().clone()
    }

    /// CPU time of all its threads so far.
    pub fn cpu(&self) -> Duration {
        let of = |thread: &i32| {
            let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).unwrap_or_default();
            text.split(' ').next().and_then(|nanos| nanos.parse().ok()).unwrap_or(0)
        };
        Duration::from_nanos(self.threads.lock().unwrap().iter().map(of).sum())
    }

    pub fn serve<F, S>(&self, serve: S) -> SocketAddr
    where
        S: Fn(TcpStream) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        serve_on(&self.runtime, serve)
    }
}

/// Accepts on a free port and serves each connection as a task.
pub fn serve_on<F, S>(runtime: &tokio::runtime::Runtime, serve: S) -> SocketAddr
where
    S: Fn(TcpStream) -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            stream.set_nodelay(true).unwrap();
            tokio::spawn(serve(stream));
        }
    });
    address
}

/// A proxy of ours whose data path runs on given workers.
pub struct Node {
    proxy: Arc<Proxy>,
    _current: watch::Sender<Current>,
}

impl Node {
    pub fn start(yaml: &str, identity: Arc<Identity>, workers: &Workers) -> Self {
        let config =
            portcullis::config::parse(&format!("identity: unix:///run/x.sock\n{yaml}"), "bench").unwrap().config;
        let current = Current { identity: Some(identity), ..Current::default() };
        let (sender, receiver) = watch::channel(current);
        let proxy =
            Proxy::start(config, receiver, Arc::new(Blind), Clock::system(), workers.handle(), &mut Inherited::none())
                .unwrap();
        Self { proxy, _current: sender }
    }

    pub fn address(&self, name: &str) -> SocketAddr {
        self.proxy.listeners().iter().find(|listener| listener.name == name).unwrap().address.parse().unwrap()
    }
}

/// Sees nothing: the data path alone is measured.
struct Blind;

impl Observer for Blind {
    fn handshake(&self, _: &HandshakeRecord) {}
    fn decision(&self, _: Direction, _: &Decision) {}
    fn opened(&self, _: Direction, _: Carries) {}
    fn moved(&self, _: Direction, _: Carries, _: u64, _: u64) {}
    fn closed(&self, _: &ConnectionRecord) {}
    fn accept_failed(&self, _: &str, _: &'static str) {}
    fn event(&self, _: Direction, _: &Arc<str>, _: Event) {}
    fn request_begun(&self, _: Direction) {}
    fn request(&self, _: &RequestRecord) {}
}
