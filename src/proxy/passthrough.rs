//! Captured connections that pass through to where they were for, without mTLS of ours: TLS that the workload speaks
//! itself, and, where the config says so, plaintext.
//!
//! In: a captured connection and what is declared for it ([`Passing`]). Out: its bytes at the original destination, moved
//! by [`super::splice`]. TLS is watched: nothing but the two hellos passes before it is known what the server has picked,
//! and where that lies below the declared profile, both sides are reset instead (`watch: enforce`).

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::connection::{Connection, lone_deadlines};
use super::detect::{Detected, Prefixed, detect};
use super::dialer::{Dial, Dialer, Dialled};
use super::io::{Plain, abort};
use super::listener::Shared;
use super::record::{Cause, Event, Watched};
use super::registry::Entry;
use super::splice::{Side, Splice};
use crate::config::schema::{Connections, Detect, Passthrough, PolicyMode};
use crate::policy::{Admitted, Passage, Passenger};
use crate::tls::Profile;
use crate::tls::flight::{CLIENT_HELLO, MAX_FLIGHT_BYTES, Picked, Piece, Pieces, Said, ServerFlight};
use crate::tls::hello;
use crate::tls::record::Direction;

/// How connections pass through: of one listener, or of those that no listener takes.
#[derive(Debug)]
pub struct Passing {
    /// What may.
    pub passage: Passage,
    /// What becomes of TLS whose server picks something below the profile.
    pub watch: PolicyMode,
    /// The profile.
    pub profile: Arc<Profile>,
    /// Whether TLS 1.2 as declared is within it.
    pub legacy_tls12: bool,
    /// Limits and timeouts.
    pub limits: Connections,
    /// How long the first bytes are waited for.
    pub detect: Arc<Detect>,
    /// How it is dialled.
    pub dialer: Dialer,
    /// How long the destination may take to accept.
    pub connect_timeout: Duration,
}

/// What is known of a connection that passes, to judge it again.
#[derive(Debug, Default)]
pub struct Passed {
    speaks_tls: OnceLock<bool>,
    picked: OnceLock<Picked>,
}

impl Passed {
    /// Whether what is declared now would still let it pass.
    pub(super) fn passes(&self, passing: &Passing) -> bool {
        let cut = |picked: &Picked| {
            passing.watch == PolicyMode::Enforce && !passing.profile.allows_picked(passing.legacy_tls12, picked)
        };
        passing.passage.decide(self.speaks_tls.get().copied()).admits() && !self.picked.get().is_some_and(cut)
    }
}

/// One side of a connection, with all that it said first.
struct Leg {
    io: TcpStream,
    said: Vec<u8>,
    /// How much of that has gone to the other side.
    passed: usize,
    /// Should the rules send it back to us, it is known by this.
    _dial: Option<Dial>,
}

impl Leg {
    fn new(io: TcpStream, said: Vec<u8>) -> Self {
        Self { io, said, passed: 0, _dial: None }
    }

    /// Hears more. Answers how much that was; nothing at the end.
    async fn hear(&mut self) -> io::Result<usize> {
        let mut buffer = [0; 4096];
        let count = self.io.read(&mut buffer).await?;
        self.said.extend_from_slice(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }

    /// Passes what was said up to there on to the other side.
    async fn pass(&mut self, to: &mut Leg, end: usize) -> io::Result<()> {
        to.io.write_all(self.said.get(self.passed..end).unwrap_or_default()).await?;
        self.passed = end;
        Ok(())
    }

    fn side(&self) -> Side<'_> {
        Side { socket: &self.io, ahead: self.said.get(self.passed..).unwrap_or_default().to_vec() }
    }
}

/// A client that asks to pass.
struct Client {
    leg: Leg,
    speaks_tls: Option<bool>,
}

impl Passenger for Client {
    fn speaks_tls(&self) -> Option<bool> {
        self.speaks_tls
    }
}

/// Why a connection ends here.
type End = (Cause, String);

/// Serves a captured connection that asks to pass through. `still` judges it again by what is declared now.
pub(super) async fn serve(
    mut connection: Connection,
    plain: Prefixed<Plain>,
    passing: Arc<Passing>,
    still: impl Fn(&Entry, &Passed) -> Option<Cause> + Send + Sync,
    shared: Arc<Shared>,
) {
    let entry = Arc::clone(connection.entry());
    let passed = Arc::new(Passed::default());
    let (ahead, plain) = plain.into_parts();
    let (Plain::Tcp(io), Some(to)) = (plain, entry.client.original()) else {
        connection.end(Cause::NotCaptured, "only captured TCP passes through");
        return;
    };
    let deadlines = lone_deadlines(&passing.limits, &entry);
    // What is needed only at the beginning is in a box: gone when the long part begins.
    let opening = Box::pin(open(&mut connection, Leg::new(io, ahead), to, &passed, &passing, &still, &shared));
    let opened = tokio::select! {
        biased;
        opened = opening => opened,
        _ = entry.until_stopped() => None,
    };
    drop(passing);
    if let Some((admitted, server)) = opened {
        forward(connection, admitted, server, deadlines, shared).await;
    }
}

/// Admits the client, dials where it was for, and watches what becomes of its TLS. Where it ends here, the client is
/// reset.
async fn open(
    connection: &mut Connection,
    mut leg: Leg,
    to: SocketAddr,
    passed: &Arc<Passed>,
    passing: &Passing,
    still: &(impl Fn(&Entry, &Passed) -> Option<Cause> + Send + Sync),
    shared: &Shared,
) -> Option<(Admitted<Client>, Leg)> {
    let speaks_tls = match passing.passage.passes() {
        Passthrough::Tls => match speaks_tls(&mut leg, passing.detect.timeout.0).await {
            Ok(speaks_tls) => Some(speaks_tls),
            Err(error) => {
                connection.end(Cause::Reset, error.to_string());
                return None;
            }
        },
        Passthrough::Off | Passthrough::Any => None,
    };
    let mut admitted = match passing.passage.admit(Client { leg, speaks_tls }) {
        Ok(admitted) => admitted,
        Err((client, decision)) => {
            connection.decided(Direction::Outbound, &decision);
            connection.end(Cause::Denied, format!("rule {}: only TLS passes, and this is none", decision.rule));
            abort(&client.leg.io);
            return None;
        }
    };
    connection.decided(Direction::Outbound, admitted.decision());
    if let Some(speaks_tls) = speaks_tls {
        let _ = passed.speaks_tls.set(speaks_tls);
    }
    // Written down first and judged then, so that no change slips between.
    connection.set_passing(passed);
    let outcome = match changed(connection, passed, still) {
        Some(end) => Err(end),
        None => connect(connection, admitted.subject_mut(), to, passed, passing, shared).await,
    };
    // Again, by what was seen meanwhile.
    let outcome = outcome.and_then(|server| match changed(connection, passed, still) {
        Some(end) => {
            abort(&server.io);
            Err(end)
        }
        None => Ok(server),
    });
    match outcome {
        Ok(server) => Some((admitted, server)),
        Err((cause, detail)) => {
            connection.end(cause, detail);
            if cause != Cause::Handshake {
                abort(&admitted.subject().leg.io);
            }
            None
        }
    }
}

/// Why it ends, if by what is declared now it no longer passes.
fn changed(
    connection: &Connection,
    passed: &Passed,
    still: &(impl Fn(&Entry, &Passed) -> Option<Cause> + Send + Sync),
) -> Option<End> {
    still(connection.entry(), passed).map(|cause| (cause, "changed meanwhile".to_owned()))
}

/// Whether a client begins to speak TLS within that time.
async fn speaks_tls(leg: &mut Leg, within: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + within;
    loop {
        match detect(&leg.said) {
            Detected::More => {}
            found => return Ok(found == Detected::Tls),
        }
        match timeout_at(deadline, leg.hear()).await {
            Ok(Ok(0)) | Err(_) => return Ok(false),
            Ok(heard) => heard?,
        };
    }
}

/// Dials, and watches until the rest may pass unseen.
async fn connect(
    connection: &mut Connection,
    client: &mut Client,
    to: SocketAddr,
    passed: &Passed,
    passing: &Passing,
    shared: &Shared,
) -> Result<Leg, End> {
    connection.upstream = Some(to.to_string());
    let dialled = passing.dialer.upstream(to, passing.connect_timeout).await;
    let Dialled { stream, dial } = dialled.map_err(|error| (Cause::Unreachable, format!("{to}: {error}")))?;
    let mut server = Leg { _dial: dial, ..Leg::new(stream, Vec::new()) };
    let tls = match client.speaks_tls {
        Some(tls) => tls,
        None => first_word(&mut client.leg, &mut server, passing).await?,
    };
    let _ = passed.speaks_tls.set(tls);
    let listener = Arc::clone(&connection.entry().listener);
    let tell = |event| shared.observer.event(Direction::Outbound, &listener, event);
    if !tls {
        tell(Event::PassedPlaintext);
        return Ok(server);
    }
    let deadline = Instant::now() + passing.profile.handshake_timeout;
    let watching = watch(&mut client.leg, &mut server, |what| tell(Event::OfferedWeak(what)));
    let seen = timeout_at(deadline, watching)
        .await
        .unwrap_or_else(|_| Err(Unseen::Handshake("the hellos did not come in time".into())));
    let enforced = passing.watch == PolicyMode::Enforce;
    let (picked, ends) = match seen {
        Ok(picked) => (picked, (Cause::WeakTls, format!("the server picked {picked}"))),
        Err(Unseen::Handshake(why)) => {
            // There was nothing to see; what the server has said, an alert it may be, still reaches the client.
            if !enforced {
                return Ok(server);
            }
            let end = server.said.len();
            let _ = timeout_at(deadline, server.pass(&mut client.leg, end)).await;
            return Err((Cause::Handshake, why));
        }
        Err(Unseen::Unreadable(why)) => (Picked::UNKNOWN, (Cause::WeakTls, why.to_owned())),
        Err(Unseen::Broken(error)) => return Err((Cause::Reset, error.to_string())),
    };
    let compliant = passing.profile.allows_picked(passing.legacy_tls12, &picked);
    let watched = Watched { picked, compliant };
    connection.watched(watched);
    let _ = passed.picked.set(picked);
    tell(Event::PassedTls(watched));
    if !compliant && enforced {
        abort(&server.io);
        return Err(ends);
    }
    if !compliant {
        let (to, why) = (tracing::field::display(to), ends.1);
        tracing::warn!(listener = &*listener, to, "TLS of the workload lies below the profile and passes: {why}");
    }
    Ok(server)
}

/// Whether the connection begins as TLS does, with the word of its client. Whichever side speaks first is heard.
async fn first_word(client: &mut Leg, server: &mut Leg, passing: &Passing) -> Result<bool, End> {
    let mut deadline = Instant::now() + passing.limits.idle_timeout.0;
    loop {
        match detect(&client.said) {
            Detected::Tls => return Ok(true),
            Detected::More if server.said.is_empty() => {}
            _ => return Ok(false),
        }
        let silent = client.said.is_empty();
        let heard = tokio::select! {
            biased;
            heard = client.hear() => heard,
            // Its first word, or its end.
            heard = server.hear() => heard.map(|_| 0),
            () = tokio::time::sleep_until(deadline) => {
                if silent {
                    return Err((Cause::Idle, String::new()));
                }
                Ok(0)
            }
        };
        match heard {
            Ok(0) => return Ok(false),
            Ok(_) if silent => deadline = Instant::now() + passing.detect.timeout.0,
            Ok(_) => {}
            Err(error) => return Err((Cause::Reset, error.to_string())),
        }
    }
}

/// Why it was not seen what a server has picked.
enum Unseen {
    /// It has picked nothing: the handshake ended before.
    Handshake(String),
    /// What was said is no TLS that can be understood.
    Unreadable(&'static str),
    /// A socket failed.
    Broken(io::Error),
}

impl From<io::Error> for Unseen {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

/// Lets the hellos pass and nothing else, until it is known what the server has picked. What either side says besides
/// waits, early data of TLS 1.3 among it.
async fn watch(client: &mut Leg, server: &mut Leg, offered_weak: impl Fn(&'static str)) -> Result<Picked, Unseen> {
    let mut pieces = Pieces::default();
    client_hello(client, &mut pieces, hello::MAX_HELLO_BYTES).await?;
    hello::offered_weak(client.said.get(..pieces.taken()).unwrap_or_default()).into_iter().for_each(offered_weak);
    client.pass(server, pieces.taken()).await?;
    let mut flight = ServerFlight::default();
    loop {
        match flight.look(&server.said) {
            Said::Picked(picked) => return Ok(picked),
            Said::Broken(why) => return Err(Unseen::Unreadable(why)),
            Said::Refused(alert) => return Err(Unseen::Handshake(format!("the server refused: alert {alert}"))),
            Said::Retry => {
                server.pass(client, flight.taken()).await?;
                client_hello(client, &mut pieces, MAX_FLIGHT_BYTES).await?;
                client.pass(server, pieces.taken()).await?;
            }
            Said::More => {
                if server.hear().await? == 0 {
                    return Err(Unseen::Handshake("the server closed before it had picked anything".into()));
                }
            }
        }
    }
}

/// Hears a client until its ClientHello is whole.
async fn client_hello(client: &mut Leg, pieces: &mut Pieces, most: usize) -> Result<(), Unseen> {
    loop {
        match pieces.next(&client.said) {
            Piece::Message { kind: CLIENT_HELLO, .. } if !pieces.is_inside() => return Ok(()),
            Piece::More if client.said.len() > most => {
                return Err(Unseen::Unreadable("a ClientHello that is too long"));
            }
            Piece::More => {
                if client.hear().await? == 0 {
                    return Err(Unseen::Handshake("the client closed within its hello".into()));
                }
            }
            // Behind a retry: compatibility of TLS 1.3, and early data of before, which the server throws away.
            Piece::ChangeCipherSpec | Piece::ApplicationData if client.passed > 0 => {}
            Piece::Alert { description, .. } => {
                return Err(Unseen::Handshake(format!("the client refused: alert {description}")));
            }
            _ => return Err(Unseen::Unreadable("the client's first message is no ClientHello")),
        }
    }
}

async fn forward(
    mut connection: Connection,
    admitted: Admitted<Client>,
    server: Leg,
    deadlines: super::pace::Deadlines,
    shared: Arc<Shared>,
) {
    let client = admitted.into_subject().leg;
    let entry = Arc::clone(connection.entry());
    let carries = connection.carries();
    let mut moved = |sent: u64, received: u64| {
        connection.sent += sent;
        connection.received += received;
        shared.observer.moved(Direction::Outbound, carries, sent, received);
    };
    moved(client.passed as u64, server.passed as u64);
    let end = Splice::new(client.side(), server.side(), entry.stopper(), deadlines, &mut moved).await;
    if end.cause != Cause::Done {
        abort(&client.io);
        abort(&server.io);
    }
    connection.end(end.cause, end.detail);
}
