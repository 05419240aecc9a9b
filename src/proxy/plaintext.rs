//! Captured clients that speak no TLS, where a listener lets them in.
//!
//! In: a connection on a listener whose `plaintext` is `audit` or `allow`. Out: the same for a handshake if it begins with
//! TLS, or the bytes of a caller who has proven nothing and is admitted by that permission alone. They are carried unread.
//!
//! Whoever says nothing may speak a protocol in which the server speaks first, or be slow. It is let in as plaintext only
//! where `detect.on_timeout` is `opaque`, or where it was for a port of `detect.opaque_ports`.

use tokio::net::TcpStream;

use super::connection::{Connection, lone_deadlines};
use super::detect::{Detected, Outcome, Prefixed, read_until, tls_or_not};
use super::io::{abort, end_in_order};
use super::ledger::Fate;
use super::listener::{Client, Inbound, Shared};
use super::pace::Deadlines;
use super::record::{Cause, Event};
use super::registry::Known;
use super::state::InboundState;
use super::upstream::ToWorkload;
use crate::config::schema::OnDetectTimeout;
use crate::policy::{Admitted, Plaintext, Unproven};
use crate::tls::ReadAhead;
use crate::tls::record::Direction;

/// The bytes of somebody who has proven nothing. Dropped before both sides have finished, it is reset.
pub(super) struct Caller(Prefixed<TcpStream>);

impl Unproven for Caller {}

impl super::inbound::Carried for Caller {
    type Stream = Prefixed<TcpStream>;

    fn into_stream(self) -> Self::Stream {
        self.0
    }

    fn finished(stream: &Self::Stream) {
        end_in_order(stream.get_ref());
    }
}

/// What a client begins with.
pub(super) enum Begins {
    /// TLS, or what has to prove to be it.
    Tls(ReadAhead<TcpStream>),
    /// Anything else.
    Plaintext(Caller),
}

/// Looks at the first bytes, where the listener lets plaintext in. None where the connection ends here.
pub(super) async fn look(
    connection: &mut Connection,
    stream: TcpStream,
    client: Client,
    state: &InboundState,
) -> Option<Begins> {
    if state.plaintext.is_none() {
        return Some(Begins::Tls(ReadAhead::new(stream)));
    }
    let patience = state.detect.timeout.0;
    let (outcome, stream) = match read_until(stream, tls_or_not, patience, patience).await {
        Ok(read) => read,
        Err(error) => {
            connection.end(Cause::Reset, error.to_string());
            return None;
        }
    };
    let silent = stream.ahead().is_empty();
    match outcome {
        Outcome::Detected(Detected::Opaque) => {}
        Outcome::Closed if silent => {
            connection.end(Cause::Done, "closed before it said anything");
            return None;
        }
        Outcome::TimedOut if silent => {
            let speaks_late = client.original().is_some_and(|to| state.detect.opaque_ports.contains(&to.port()));
            if !speaks_late && state.detect.on_timeout == OnDetectTimeout::Refuse {
                connection.end(Cause::Protocol, "it said nothing in time; `detect.opaque_ports` may name the port");
                abort(stream.get_ref());
                return None;
            }
        }
        // The beginning of a TLS record: the handshake goes on to judge it, in its own time.
        _ => {
            let (ahead, stream) = stream.into_parts();
            return Some(Begins::Tls(ReadAhead::resumed(stream, ahead)));
        }
    }
    abort(stream.get_ref());
    Some(Begins::Plaintext(Caller(stream)))
}

/// Admits a caller by the listener's permission, and reaches the workload for it.
pub(super) async fn open(
    connection: &mut Connection,
    caller: Caller,
    listener: &Inbound,
    state: &InboundState,
    permission: &Plaintext,
    shared: &Shared,
) -> Option<(Admitted<Caller>, ToWorkload, Deadlines)> {
    let admitted = permission.admit(caller);
    connection.decided(Direction::Inbound, admitted.decision());
    tell(connection, shared, if permission.is_audited() { Fate::Audited } else { Fate::Allowed });
    connection.set_unproven();
    // Whatever was published since this connection took its state is looked at now that the registry knows what it is.
    let now = listener.state.load();
    if let Some(cause) = now.rejudge(connection.entry(), &Known::Unproven, &shared.clock) {
        connection.end(cause, "changed while it was opened");
        return None;
    }
    let deadlines = lone_deadlines(&state.limits, connection.entry());
    let workload = super::inbound::workload(connection, state).await?;
    Some((admitted, workload, deadlines))
}

/// Counts a plaintext connection, and its caller if it was captured.
pub(super) fn tell(connection: &Connection, shared: &Shared, fate: Fate) {
    let entry = connection.entry();
    shared.observer.event(entry.direction, &entry.listener, Event::Plaintext(fate));
    if let Client::Captured { from, to } = entry.client {
        shared.ledger.note(to.port(), from.ip(), fate);
    }
}
