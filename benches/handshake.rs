//! What one side of an mTLS handshake computes: the bare library beside ours, in one run. See README.md here.
//!
//! Both sides run on one thread and talk through memory, so that no system call blurs the picture; a side's figure is
//! the time spent in its own polls.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]

mod support;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use portcullis::tls::{ClientTls, ServerTls, client, server};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use support::bare::{client_config, server_config};
use support::{CLIENT, Ca, Key, Leaf, SERVER, client_tls, profile, server_tls};
use tokio::io::{AsyncReadExt, DuplexStream};
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

async fn serve(stream: DuplexStream, server: &Server, slots: &Semaphore) {
    match server {
        Server::Bare(config) => {
            let accept = TlsAcceptor::from(Arc::clone(config)).accept(stream);
            // A client of ours is done, and gone, before the last flight of tickets is written.
            let _connection = tokio::time::timeout(Duration::from_secs(5), accept).await.unwrap();
        }
        Server::Ours(tls) => {
            let deadline = Instant::now() + Duration::from_secs(5);
            let (record, connection) = server::accept(stream, Arc::clone(tls), slots, deadline).await;
            assert!(connection.is_some(), "{record:?}");
        }
    }
}

async fn call(stream: DuplexStream, client: &Client, slots: &Semaphore) {
    let name = ServerName::try_from("localhost").unwrap();
    match client {
        Client::Bare(config) => {
            let mut tls = TlsConnector::from(Arc::clone(config)).connect(name, stream).await.unwrap();
            // Reading to the end takes the tickets in; the server closes without a word.
            let _ = tls.read(&mut [0; 1]).await;
        }
        Client::Ours(config) => {
            let deadline = Instant::now() + Duration::from_secs(5);
            let (record, connection) =
                client::connect(stream, name, Arc::clone(config), portcullis::tls::Offer::Nothing, slots, deadline)
                    .await;
            assert!(connection.is_some(), "{record:?}");
        }
    }
}

/// Sums up the time spent in a future's polls.
struct Metered<'a, F>(F, &'a mut Duration);

impl<F: Future + Unpin> Future for Metered<'_, F> {
    type Output = F::Output;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let began = Instant::now();
        let polled = Pin::new(&mut self.0).poll(cx);
        *self.1 += began.elapsed();
        polled
    }
}

/// Runs `count` handshakes; `server` and `client` are asked for each round's parties. Answers the time of the server's
/// side and of the client's.
fn run(count: u64, server: impl Fn(u64) -> Server, client: impl Fn(u64) -> Client) -> (Duration, Duration) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let slots = Semaphore::new(64);
    let mut used = (Duration::ZERO, Duration::ZERO);
    for round in 0..count {
        let (server, client) = (server(round), client(round));
        let (near, far) = tokio::io::duplex(64 * 1024);
        runtime.block_on(async {
            let serving = Metered(Box::pin(serve(far, &server, &slots)), &mut used.0);
            let calling = Metered(Box::pin(call(near, &client, &slots)), &mut used.1);
            tokio::join!(serving, calling);
        });
    }
    used
}

fn handshakes(c: &mut Criterion) {
    for (name, keys) in [("p384", Key::P384), ("p256", Key::P256)] {
        for group in ["X25519MLKEM768", "secp384r1", "X25519"] {
            let ca = Ca::new(keys);
            let leaf = ca.issue(SERVER);
            let strangers: Vec<Leaf> = (0..CLIENTS).map(|_| ca.issue(CLIENT)).collect();
            let identity = ca.identity(&leaf);
            let bare = Server::Bare(server_config(&ca, &leaf, group));
            let callers: Vec<Client> =
                strangers.iter().map(|leaf| Client::Bare(client_config(&ca, leaf, group, false))).collect();
            let caller = |round: u64| callers[usize::try_from(round).unwrap() % CLIENTS].clone();
            let mut suite = c.benchmark_group(format!("{}/{group}", name));
            suite.sample_size(20).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(4));
            suite.bench_function("server/bare", |b| {
                b.iter_custom(|n| run(n, |_| bare.clone(), caller).0);
            });
            suite.bench_function("server/first contact", |b| {
                let profile = profile(keys, group, true);
                let fresh = std::cell::RefCell::new(server_tls(&profile, &identity));
                b.iter_custom(|n| {
                    let server = |round: u64| {
                        if round.is_multiple_of(CLIENTS as u64) {
                            fresh.replace(server_tls(&profile, &identity));
                        }
                        Server::Ours(Arc::clone(&fresh.borrow()))
                    };
                    run(n, server, caller).0
                });
            });
            suite.bench_function("server/remembered chain", |b| {
                let tls = server_tls(&profile(keys, group, true), &identity);
                b.iter_custom(|n| run(n, |_| Server::Ours(Arc::clone(&tls)), |_| callers[0].clone()).0);
            });
            suite.bench_function("server/resumed", |b| {
                let tls = server_tls(&profile(keys, group, true), &identity);
                let caller = Client::Bare(client_config(&ca, &strangers[0], group, true));
                b.iter_custom(|n| run(n, |_| Server::Ours(Arc::clone(&tls)), |_| caller.clone()).0);
            });
            suite.bench_function("client/bare", |b| {
                b.iter_custom(|n| run(n, |_| bare.clone(), caller).1);
            });
            suite.bench_function("client/remembered chain", |b| {
                let own = ca.identity(&strangers[0]);
                let ours = Client::Ours(client_tls(&profile(keys, group, false), &own));
                b.iter_custom(|n| run(n, |_| bare.clone(), |_| ours.clone()).1);
            });
            suite.finish();
        }
    }
}

criterion_group!(benches, handshakes);
criterion_main!(benches);
