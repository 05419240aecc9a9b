//! The data path beside a bare tokio-rustls relay: throughput, CPU for each request, time to the first byte. See README.md here.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use support::bare::{client_config, server_config};
use support::{CLIENT, Ca, Key, Leaf, Node, SERVER, Workers};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

const GROUP: &str = "X25519MLKEM768";
/// What one round moves over all its connections together, bytes.
const ROUND: usize = 64 << 20;
/// The copy buffer of the bare relay: the best of 8, 16, 32, 64 and 128 KiB on this path.
const BARE_BUFFER: usize = 64 << 10;

struct World {
    ca: Ca,
    client: Leaf,
    server: Leaf,
    /// Plays the workloads and the clients.
    others: tokio::runtime::Runtime,
}

impl World {
    fn new() -> Self {
        let ca = Ca::new(Key::P384);
        let others = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        Self { client: ca.issue(CLIENT), server: ca.issue(SERVER), ca, others }
    }

    fn bare_server(&self) -> Arc<ServerConfig> {
        server_config(&self.ca, &self.server, GROUP)
    }

    fn bare_client(&self) -> Arc<ClientConfig> {
        client_config(&self.ca, &self.client, GROUP, true)
    }
}

/// A relay under test: TLS in, plaintext out, or the other way round.
struct Relay {
    workers: Workers,
    address: SocketAddr,
    _node: Option<Node>,
}

impl Relay {
    /// mTLS in, plaintext to `to`.
    fn inbound(world: &World, ours: bool, to: SocketAddr) -> Self {
        let workers = Workers::start();
        if ours {
            let yaml = format!("inbound:\n  - {{name: in, listen: '127.0.0.1:0', to: '{to}', allow: ['{CLIENT}']}}\n");
            let node = Node::start(&yaml, world.ca.identity(&world.server), &workers);
            return Self { address: node.address("in"), _node: Some(node), workers };
        }
        let acceptor = TlsAcceptor::from(world.bare_server());
        let address = workers.serve(move |stream| {
            let acceptor = acceptor.clone();
            async move {
                let Ok(mut tls) = acceptor.accept(stream).await else { return };
                let mut plain = TcpStream::connect(to).await.unwrap();
                plain.set_nodelay(true).unwrap();
                let _ = tokio::io::copy_bidirectional_with_sizes(&mut tls, &mut plain, BARE_BUFFER, BARE_BUFFER).await;
            }
        });
        Self { workers, address, _node: None }
    }

    /// Plaintext in, mTLS to `to`.
    fn outbound(world: &World, ours: bool, to: SocketAddr) -> Self {
        let workers = Workers::start();
        if ours {
            let yaml = format!("outbound:\n  - {{name: out, listen: '127.0.0.1:0', to: '{to}', expect: '{SERVER}'}}\n");
            let node = Node::start(&yaml, world.ca.identity(&world.client), &workers);
            return Self { address: node.address("out"), _node: Some(node), workers };
        }
        let connector = TlsConnector::from(world.bare_client());
        let address = workers.serve(move |mut stream| {
            let connector = connector.clone();
            async move {
                let upstream = TcpStream::connect(to).await.unwrap();
                upstream.set_nodelay(true).unwrap();
                let name = ServerName::try_from("localhost").unwrap();
                let Ok(mut tls) = connector.connect(name, upstream).await else { return };
                let _ = tokio::io::copy_bidirectional_with_sizes(&mut stream, &mut tls, BARE_BUFFER, BARE_BUFFER).await;
            }
        });
        Self { workers, address, _node: None }
    }
}

/// Swallows whatever comes and answers with one byte at its end.
fn sink(world: &World) -> SocketAddr {
    support::serve_on(&world.others, |mut stream| async move {
        let mut buffer = vec![0; 256 << 10];
        while stream.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
        let _ = stream.write_all(b"!").await;
    })
}

/// Sends as many bytes as it is asked for in its first eight.
fn spring(world: &World) -> SocketAddr {
    support::serve_on(&world.others, |mut stream| async move {
        let Ok(mut left) = stream.read_u64().await else { return };
        let block = vec![7; 256 << 10];
        while left > 0 {
            let count = usize::try_from(left).unwrap().min(block.len());
            if stream.write_all(&block[..count]).await.is_err() {
                return;
            }
            left -= count as u64;
        }
    })
}

async fn upload(world: &World, at: SocketAddr, bytes: usize) {
    let stream = TcpStream::connect(at).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let connector = TlsConnector::from(world.bare_client());
    let mut tls = connector.connect(ServerName::try_from("localhost").unwrap(), stream).await.unwrap();
    let block = vec![7; 64 << 10];
    let mut left = bytes;
    while left > 0 {
        let count = left.min(block.len());
        tls.write_all(&block[..count]).await.unwrap();
        left -= count;
    }
    tls.shutdown().await.unwrap();
    assert_eq!(tls.read_u8().await.unwrap(), b'!');
}

async fn download(world: &World, at: SocketAddr, bytes: usize) {
    let stream = TcpStream::connect(at).await.unwrap();
    let connector = TlsConnector::from(world.bare_client());
    let mut tls = connector.connect(ServerName::try_from("localhost").unwrap(), stream).await.unwrap();
    tls.write_u64(bytes as u64).await.unwrap();
    let mut buffer = vec![0; 64 << 10];
    let mut left = bytes;
    while left > 0 {
        left -= tls.read(&mut buffer).await.unwrap();
    }
}

fn throughput(c: &mut Criterion) {
    let world = World::new();
    for connections in [1, 16] {
        let mut group = c.benchmark_group(format!("throughput/{connections}"));
        group.sample_size(15).throughput(Throughput::Bytes(ROUND as u64)).measurement_time(Duration::from_secs(8));
        for (way, up) in [("upload", true), ("download", false)] {
            for (who, ours) in [("bare", false), ("portcullis", true)] {
                let relay = Relay::inbound(&world, ours, if up { sink(&world) } else { spring(&world) });
                let mut cpu = Duration::ZERO;
                let mut rounds = 0;
                group.bench_function(format!("{way}/{who}"), |b| {
                    b.iter_custom(|n| {
                        let (began, used) = (Instant::now(), relay.workers.cpu());
                        for _ in 0..n {
                            world.others.block_on(async {
                                let share = ROUND / connections;
                                let each = (0..connections).map(|_| async {
                                    if up {
                                        upload(&world, relay.address, share).await
                                    } else {
                                        download(&world, relay.address, share).await
                                    }
                                });
                                futures_util::future::join_all(each).await;
                            });
                        }
                        cpu += relay.workers.cpu() - used;
                        rounds += n;
                        began.elapsed()
                    });
                });
                if rounds > 0 {
                    println!(
                        "  {way}/{who}: {:.1} ms of the relay's CPU for each 64 MiB",
                        cpu.as_secs_f64() * 1e3 / rounds as f64
                    );
                }
            }
        }
        group.finish();
    }
}

/// HTTP/1.1 over kept-alive connections through two relays, carried as opaque bytes: CPU of both relays for each request.
fn requests(c: &mut Criterion) {
    const PER_ROUND: usize = 2_000;
    let world = World::new();
    let mut group = c.benchmark_group("two relays/HTTP request");
    group.sample_size(20).measurement_time(Duration::from_secs(8)).throughput(Throughput::Elements(PER_ROUND as u64));
    let workload = support::serve_on(&world.others, |mut stream| async move {
        let mut buffer = vec![0; 8 << 10];
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: 512\r\n\r\n{}", "x".repeat(512));
        while stream.read(&mut buffer).await.is_ok_and(|count| count > 0) {
            if stream.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    });
    for (who, ours) in [("bare", false), ("portcullis", true)] {
        let far = Relay::inbound(&world, ours, workload);
        let near = Relay::outbound(&world, ours, far.address);
        let mut streams: Vec<TcpStream> = world.others.block_on(async {
            futures_util::future::join_all((0..16).map(|_| async { TcpStream::connect(near.address).await.unwrap() }))
                .await
        });
        group.bench_function(format!("cpu/{who}"), |b| {
            b.iter_custom(|n| {
                let used = far.workers.cpu() + near.workers.cpu();
                for _ in 0..n {
                    world.others.block_on(async {
                        let each = streams.iter_mut().map(|stream| async {
                            let mut buffer = vec![0; 2048];
                            for _ in 0..PER_ROUND / 16 {
                                stream.write_all(b"GET /records/1 HTTP/1.1\r\nhost: records\r\n\r\n").await.unwrap();
                                let mut got = 0;
                                while got < 39 + 512 {
                                    got += stream.read(&mut buffer).await.unwrap();
                                }
                            }
                        });
                        futures_util::future::join_all(each).await;
                    });
                }
                far.workers.cpu() + near.workers.cpu() - used
            });
        });
    }
    group.finish();
}

/// From connect to the first byte back: straight, through one hop and through two. Full handshakes each time.
fn first_byte(c: &mut Criterion) {
    let world = World::new();
    let mut group = c.benchmark_group("connect to first byte");
    group.sample_size(40).measurement_time(Duration::from_secs(6));
    let workload = support::serve_on(&world.others, |mut stream| async move {
        let mut byte = [0];
        while stream.read_exact(&mut byte).await.is_ok() {
            if stream.write_all(&byte).await.is_err() {
                return;
            }
        }
    });
    let far = Relay::inbound(&world, true, workload);
    let near = Relay::outbound(&world, true, far.address);
    let one = |at: SocketAddr| {
        world.others.block_on(async move {
            let mut stream = TcpStream::connect(at).await.unwrap();
            stream.set_nodelay(true).unwrap();
            stream.write_all(b"?").await.unwrap();
            stream.read_u8().await.unwrap();
        });
    };
    let tls = client_config(&world.ca, &world.client, GROUP, false);
    group.bench_function("plain", |b| b.iter(|| one(workload)));
    group.bench_function("mTLS client to one sidecar", |b| {
        b.iter(|| {
            world.others.block_on(async {
                let stream = TcpStream::connect(far.address).await.unwrap();
                stream.set_nodelay(true).unwrap();
                let connector = TlsConnector::from(Arc::clone(&tls));
                let mut tls = connector.connect(ServerName::try_from("localhost").unwrap(), stream).await.unwrap();
                tls.write_all(b"?").await.unwrap();
                tls.read_u8().await.unwrap();
            });
        });
    });
    group.bench_function("two sidecars, sessions resumed", |b| b.iter(|| one(near.address)));
    let near_full = {
        let workers = Workers::start();
        let yaml = format!(
            "tls: {{resumption: false}}\noutbound:\n  - {{name: out, listen: '127.0.0.1:0', to: '{}', expect: '{SERVER}'}}\n",
            far.address
        );
        let node = Node::start(&yaml, world.ca.identity(&world.client), &workers);
        (node.address("out"), node, workers)
    };
    group.bench_function("two sidecars, full handshakes", |b| b.iter(|| one(near_full.0)));
    group.finish();
}

criterion_group!(benches, throughput, requests, first_byte);
criterion_main!(benches);
