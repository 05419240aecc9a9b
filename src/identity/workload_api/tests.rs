//! The client against our own authority's server, and against agents that misbehave.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use super::client::Timing;
use super::{Address, WorkloadApiSource};
use crate::authority::attest::Selectors;
use crate::authority::config::Entry;
use crate::authority::server::EntriesHandle;
use crate::authority::{Authority, Options, WorkloadApiServer};
use crate::clock::Clock;
use crate::identity::source::{Event, Source, Update};
use crate::identity::{SpiffeId, TrustDomain};

fn quick() -> Timing {
    Timing {
        connect: Duration::from_secs(2),
        first_message: Duration::from_secs(2),
        ping_interval: Duration::from_secs(300),
        ping_timeout: Duration::from_millis(300),
        backoff: (Duration::from_millis(10), Duration::from_millis(100)),
        ask_again: Duration::from_secs(300),
    }
}

fn authority(svid_ttl: u64) -> Authority {
    let options =
        Options { svid_ttl: Duration::from_secs(svid_ttl), ..Options::new(TrustDomain::parse("lab.test").unwrap()) };
    Authority::open(options, Clock::system()).unwrap()
}

fn entry(path: &str) -> Entry {
    Entry {
        spiffe_id: SpiffeId::parse(&format!("spiffe://lab.test{path}")).unwrap(),
        selectors: Selectors { uid: Some(rustix::process::geteuid().as_raw()), ..Selectors::default() },
        dns: vec![],
        ttl: None,
        hint: None,
    }
}

struct Agent {
    task: JoinHandle<()>,
    entries: EntriesHandle,
}

impl Agent {
    fn start(socket: &Path, authority: &Authority, entries: Vec<Entry>) -> Self {
        let server = WorkloadApiServer::bind(authority.clone(), socket, 0o600, entries).unwrap();
        let entries = server.entries();
        Self { task: tokio::spawn(server.run(std::future::pending())), entries }
    }

    async fn stop(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

struct Bench {
    _folder: tempfile::TempDir,
    socket: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        Self { _folder: folder, socket }
    }

    fn source(&self, timing: Timing) -> WorkloadApiSource {
        WorkloadApiSource::new(Address::Unix(self.socket.clone()), Clock::system()).with_timing(timing)
    }
}

async fn next(source: &mut WorkloadApiSource) -> Event {
    tokio::time::timeout(Duration::from_secs(20), source.next()).await.expect("an event")
}

async fn update(source: &mut WorkloadApiSource) -> Update {
    loop {
        if let Event::Update(update) = next(source).await {
            return update;
        }
    }
}

async fn unavailable(source: &mut WorkloadApiSource) -> String {
    loop {
        if let Event::Unavailable { why } = next(source).await {
            return why;
        }
    }
}

#[tokio::test]
async fn an_agent_that_comes_later_and_is_restarted_is_waited_for() {
    let bench = Bench::new();
    let mut source = bench.source(quick());
    let why = unavailable(&mut source).await;
    assert!(why.contains("there is no socket") && why.contains(bench.socket.to_str().unwrap()), "{why}");
    let first = authority(3600);
    let agent = Agent::start(&bench.socket, &first, vec![entry("/web")]);
    let told = update(&mut source).await;
    assert_eq!(told.svids[0].id().as_str(), "spiffe://lab.test/web");
    assert_eq!(told.bundles.authorities("lab.test").unwrap()[0].der, first.published().own_authorities()[0]);
    agent.stop().await;
    let why = unavailable(&mut source).await;
    assert!(why.contains("restarted") || why.contains("running"), "{why}");
    let second = authority(3600);
    let _agent = Agent::start(&bench.socket, &second, vec![entry("/web")]);
    let told = update(&mut source).await;
    assert_eq!(told.bundles.authorities("lab.test").unwrap()[0].der, second.published().own_authorities()[0]);
}

#[tokio::test]
async fn a_refusal_is_no_outage_and_an_entry_that_appears_is_found() {
    let bench = Bench::new();
    let agent = Agent::start(&bench.socket, &authority(3600), vec![]);
    let mut source = bench.source(quick());
    for _ in 0..2 {
        let Event::NoIdentity { why } = next(&mut source).await else { panic!("a refusal") };
        assert!(why.contains("no identity issued") && why.contains("selectors"), "{why}");
    }
    agent.entries.set(vec![entry("/late")]);
    assert_eq!(update(&mut source).await.svids[0].id().path(), "/late");
    agent.entries.set(vec![entry("/late"), entry("/later")]);
    assert_eq!(update(&mut source).await.svids.len(), 2);
    agent.entries.set(vec![]);
    assert!(matches!(next(&mut source).await, Event::NoIdentity { .. }));
}

#[tokio::test]
async fn rotations_of_svid_and_ca_are_streamed() {
    let bench = Bench::new();
    let authority = authority(4);
    let _agent = Agent::start(&bench.socket, &authority, vec![entry("/web")]);
    let mut source = bench.source(quick());
    let first = update(&mut source).await;
    let began = std::time::Instant::now();
    let second = update(&mut source).await;
    assert!(!second.svids[0].same_leaf(&first.svids[0]));
    let waited = began.elapsed().as_secs_f32();
    assert!((1.0..=3.5).contains(&waited), "{waited}");
    authority.prepare_ca().unwrap();
    assert_eq!(update(&mut source).await.bundles.authorities("lab.test").unwrap().len(), 2);
}

#[tokio::test]
async fn an_agent_that_accepts_and_never_answers_is_noticed() {
    let bench = Bench::new();
    let listener = UnixListener::bind(&bench.socket).unwrap();
    let held = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok(accepted) = listener.accept().await {
            held.push(accepted);
        }
    });
    let timing = Timing { first_message: Duration::from_millis(300), ..quick() };
    let mut source = bench.source(timing);
    let why = unavailable(&mut source).await;
    assert!(why.contains("no answer within 0.3 s") && why.contains("hang"), "{why}");
    held.abort();
}

/// Passes bytes on between a client and an agent until it is told to hang: then it holds every connection open, accepts
/// new ones, and says nothing.
struct Middleman {
    hang: Arc<std::sync::atomic::AtomicBool>,
    task: JoinHandle<()>,
}

impl Middleman {
    fn start(front: &Path, back: &Path) -> Self {
        let hang = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (listener, back, hanging) = (UnixListener::bind(front).unwrap(), back.to_owned(), Arc::clone(&hang));
        let task = tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let (back, hanging) = (back.clone(), Arc::clone(&hanging));
                tokio::spawn(async move {
                    let hung = async {
                        while !hanging.load(std::sync::atomic::Ordering::Relaxed) {
                            tokio::time::sleep(Duration::from_millis(10)).await;
                        }
                    };
                    let mut agent = UnixStream::connect(&back).await.unwrap();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut agent) => return,
                        () = hung => {}
                    }
                    let _held = (client, agent);
                    std::future::pending::<()>().await;
                });
            }
        });
        Self { hang, task }
    }

    fn hang(&self, hang: bool) {
        self.hang.store(hang, std::sync::atomic::Ordering::Relaxed);
    }
}

impl Drop for Middleman {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test]
async fn an_agent_that_stops_answering_is_found_by_pings() {
    let bench = Bench::new();
    let back = bench.socket.with_extension("real");
    let _agent = Agent::start(&back, &authority(3600), vec![entry("/web")]);
    let middle = Middleman::start(&bench.socket, &back);
    let timing = Timing { ping_interval: Duration::from_millis(200), ..quick() };
    let mut source = bench.source(timing);
    update(&mut source).await;
    let quiet = tokio::time::timeout(Duration::from_millis(1200), source.next()).await;
    assert!(quiet.is_err(), "a quiet agent that answers pings is well: {quiet:?}");
    middle.hang(true);
    let why = unavailable(&mut source).await;
    assert!(why.contains("the connection broke"), "{why}");
    middle.hang(false);
    update(&mut source).await;
}

#[tokio::test]
async fn an_overdue_svid_is_asked_for_again_over_a_new_connection() {
    let bench = Bench::new();
    let back = bench.socket.with_extension("real");
    // Issued with 10 s behind it already, so 60 % of its life are over from the start.
    let _agent = Agent::start(&back, &authority(12), vec![entry("/web")]);
    let middle = Middleman::start(&bench.socket, &back);
    let timing = Timing { ask_again: Duration::from_secs(1), first_message: Duration::from_millis(300), ..quick() };
    let mut source = bench.source(timing);
    let first = update(&mut source).await;
    let again = update(&mut source).await;
    assert!(again.svids[0].same_leaf(&first.svids[0]), "the agent has no newer one yet");
    middle.hang(true);
    let why = unavailable(&mut source).await;
    assert!(why.contains("no answer within"), "{why}");
}

#[tokio::test]
async fn nonsense_and_refused_connections_are_told_in_words() {
    let bench = Bench::new();
    let listener = UnixListener::bind(&bench.socket).unwrap();
    let task = tokio::spawn(async move {
        loop {
            let (mut io, _) = listener.accept().await.unwrap();
            let _ = tokio::io::AsyncWriteExt::write_all(&mut io, b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let mut source = bench.source(quick());
    let why = unavailable(&mut source).await;
    assert!(why.contains("the connection broke"), "{why}");
    task.abort();
    let _ = task.await;
    // The file is still there, and nobody listens on it.
    let mut source = bench.source(quick());
    let why = unavailable(&mut source).await;
    assert!(why.contains("nobody listens on the socket"), "{why}");
    let mut source = WorkloadApiSource::new(Address::parse("tcp://127.0.0.1:1").unwrap(), Clock::system());
    assert!(unavailable(&mut source).await.contains("nobody listens there"));
}
