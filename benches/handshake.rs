//! CPU time of one side of a full mTLS handshake over loopback TCP: the bare library beside ours, in one run.
//!
//! Each figure is the CPU time of the measured side's own thread; the other side runs on a thread of its own. See README.md here.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use portcullis::tls::{ClientTls, ServerTls, client, server};
use rustls::pki_types::ServerName;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use support::{CLIENT, Ca, Key, Leaf, SERVER, client_tls, profile, server_tls, thread_cpu};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Distinct clients before the server's memory is renewed: "first contact" means a chain never seen.
const CLIENTS: usize = 64;

#[derive(Clone)]
enum Server {
    Bare(Arc<ServerConfig>),
    Ours(Arc<ServerTls>),
}

#[derive(Clone)]
enum Client {
    Bare(Arc<ClientConfig>),
    Ours(Arc<ClientTls>),
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn bare_provider(keys: Key, group: &str) -> Arc<rustls::crypto::CryptoProvider> {
    let _ = keys;
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.cipher_suites = vec![rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384];
    provider.kx_groups.clear();
    provider.kx_groups.push(match group {
        "X25519MLKEM768" => rustls::crypto::aws_lc_rs::kx_group::X25519MLKEM768,
        "secp384r1" => rustls::crypto::aws_lc_rs::kx_group::SECP384R1,
        _ => rustls::crypto::aws_lc_rs::kx_group::X25519,
    });
    Arc::new(provider)
}

fn bare_server(ca: &Ca, leaf: &Leaf, keys: Key, group: &str) -> Arc<ServerConfig> {
    let provider = bare_provider(keys, group);
    let mut roots = RootCertStore::empty();
    roots.add(ca.der()).unwrap();
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build().unwrap();
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(leaf.chain.clone(), leaf.key.clone_key())
        .unwrap();
    Arc::new(config)
}

fn bare_client(ca: &Ca, leaf: &Leaf, keys: Key, group: &str, resume: bool) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.der()).unwrap();
    let mut config = ClientConfig::builder_with_provider(bare_provider(keys, group))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(leaf.chain.clone(), leaf.key.clone_key())
        .unwrap();
    if !resume {
        config.resumption = rustls::client::Resumption::disabled();
    }
    Arc::new(config)
}

async fn serve(stream: TcpStream, server: &Server, slots: &Semaphore) {
    stream.set_nodelay(true).unwrap();
    match server {
        Server::Bare(config) => {
            let deadline = Duration::from_secs(5);
            let accept = TlsAcceptor::from(Arc::clone(config)).accept(stream);
            let _connection = tokio::time::timeout(deadline, accept).await.unwrap().unwrap();
        }
        Server::Ours(tls) => {
            let deadline = Instant::now() + Duration::from_secs(5);
            let (record, connection) = server::accept(stream, Arc::clone(tls), slots, deadline).await;
            assert!(connection.is_some(), "{record:?}");
        }
    }
}

async fn call(at: SocketAddr, client: &Client, slots: &Semaphore) {
    let stream = TcpStream::connect(at).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    match client {
        Client::Bare(config) => {
            let mut tls = TlsConnector::from(Arc::clone(config)).connect(name, stream).await.unwrap();
            // Reading to the end takes the tickets in; the server closes without a word.
            let _ = tls.read(&mut [0; 1]).await;
        }
        Client::Ours(config) => {
            let deadline = Instant::now() + Duration::from_secs(5);
            let (record, connection) = client::connect(stream, name, Arc::clone(config), slots, deadline).await;
            assert!(connection.is_some(), "{record:?}");
        }
    }
}

/// Runs `count` handshakes; `servers` and `clients` are asked for each round's parties. Answers the CPU time of the
/// server's thread and of the client's.
fn run(
    count: u64,
    server: impl Fn(u64) -> Server + Send + 'static,
    client: impl Fn(u64) -> Client,
) -> (Duration, Duration) {
    let (tell, told) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        runtime().block_on(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            tell.send(listener.local_addr().unwrap()).unwrap();
            let slots = Semaphore::new(64);
            let mut used = Duration::ZERO;
            for round in 0..count {
                let server = server(round);
                let began = thread_cpu();
                let (stream, _) = listener.accept().await.unwrap();
                serve(stream, &server, &slots).await;
                used += thread_cpu() - began;
            }
            used
        })
    });
    let at = told.recv().unwrap();
    let mut used = Duration::ZERO;
    runtime().block_on(async {
        let slots = Semaphore::new(64);
        for round in 0..count {
            let client = client(round);
            let began = thread_cpu();
            call(at, &client, &slots).await;
            used += thread_cpu() - began;
        }
    });
    (thread.join().unwrap(), used)
}

fn handshakes(c: &mut Criterion) {
    for (name, keys) in [("p384", Key::P384), ("p256", Key::P256)] {
        for group in ["X25519MLKEM768", "secp384r1", "X25519"] {
            let ca = Ca::new(keys);
            let leaf = ca.issue(SERVER);
            let strangers: Vec<Leaf> = (0..CLIENTS).map(|_| ca.issue(CLIENT)).collect();
            let identity = ca.identity(&leaf);
            let bare = Server::Bare(bare_server(&ca, &leaf, keys, group));
            let callers: Vec<Client> =
                strangers.iter().map(|leaf| Client::Bare(bare_client(&ca, leaf, keys, group, false))).collect();
            let caller = |round: u64| callers[usize::try_from(round).unwrap() % CLIENTS].clone();
            let mut suite = c.benchmark_group(format!("{}/{group}", name));
            suite.sample_size(20).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(4));
            suite.bench_function("server/bare", |b| {
                b.iter_custom(|n| {
                    let bare = bare.clone();
                    run(n, move |_| bare.clone(), caller).0
                });
            });
            suite.bench_function("server/first contact", |b| {
                b.iter_custom(|n| {
                    let (profile, identity) = (profile(keys, group, true), Arc::clone(&identity));
                    let current = std::sync::Mutex::new(None);
                    run(
                        n,
                        move |round| {
                            let mut current = current.lock().unwrap();
                            if round % CLIENTS as u64 == 0 || current.is_none() {
                                *current = Some(server_tls(&profile, &identity));
                            }
                            Server::Ours(Arc::clone(current.as_ref().unwrap()))
                        },
                        caller,
                    )
                    .0
                });
            });
            suite.bench_function("server/remembered chain", |b| {
                let tls = server_tls(&profile(keys, group, true), &identity);
                b.iter_custom(|n| {
                    let tls = Arc::clone(&tls);
                    run(n, move |_| Server::Ours(Arc::clone(&tls)), |_| callers[0].clone()).0
                });
            });
            suite.bench_function("server/resumed", |b| {
                let tls = server_tls(&profile(keys, group, true), &identity);
                let caller = Client::Bare(bare_client(&ca, &strangers[0], keys, group, true));
                b.iter_custom(|n| {
                    let tls = Arc::clone(&tls);
                    run(n, move |_| Server::Ours(Arc::clone(&tls)), |_| caller.clone()).0
                });
            });
            suite.bench_function("client/bare", |b| {
                b.iter_custom(|n| {
                    let bare = bare.clone();
                    run(n, move |_| bare.clone(), caller).1
                });
            });
            suite.bench_function("client/remembered chain", |b| {
                let own = ca.identity(&strangers[0]);
                let ours = Client::Ours(client_tls(&profile(keys, group, false), &own));
                b.iter_custom(|n| {
                    let bare = bare.clone();
                    run(n, move |_| bare.clone(), |_| ours.clone()).1
                });
            });
            suite.finish();
        }
    }
}

criterion_group!(benches, handshakes);
criterion_main!(benches);
