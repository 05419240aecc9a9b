//! From the workload: plaintext in, mTLS to a named upstream. Bytes get a connection of their own, requests share some.
//! What is captured may pass through without, where the listener says so ([`super::passthrough`]).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use super::capture::{First, OutboundCapture};
use super::connection::{Connection, deadlines, lone_deadlines};
use super::detect::Prefixed;
use super::hold;
use super::http::{self, Spoken, Way};
use super::inbound::{Sniffing, refused, sniff};
use super::io::Plain;
use super::listener::{Accepted, Outbound, Shared};
use super::pace::Deadlines;
use super::passthrough::{self, Passed};
use super::record::Cause;
use super::registry::{Entry, Known};
use super::state::OutboundState;
use super::tcp::Forward;
use super::upstream::HostPort;
use crate::config::schema::Protocol;
use crate::policy::Admitted;
use crate::tls::reason::Reason;
use crate::tls::record::Direction;
use crate::tls::{Authenticated, Offer, ReadAhead, client};

pub(super) async fn serve(accepted: Accepted, listener: Arc<Outbound>, shared: Arc<Shared>) {
    let connection = opened(&accepted, &listener, &shared);
    mesh(connection, Prefixed::new(accepted.io), accepted.at, listener, shared).await;
}

/// Serves a captured connection, of which this was heard already.
pub(super) async fn serve_captured(
    accepted: Accepted,
    first: Option<First>,
    ahead: Vec<u8>,
    listener: Arc<Outbound>,
    capture: Arc<OutboundCapture>,
    shared: Arc<Shared>,
) {
    let mut connection = opened(&accepted, &listener, &shared);
    connection.set_heard(first);
    if let Some(cause) = capture.moved(connection.entry()) {
        connection.end(cause, "changed meanwhile");
        return accepted.io.abort();
    }
    let plain = Prefixed::with(ahead, accepted.io);
    let passing = listener.state.load().passing.clone();
    match passing {
        Some(passing) => {
            let still = move |entry: &Entry, passed: &Passed| capture.rejudge(entry, passed);
            passthrough::serve(connection, plain, passing, still, shared).await;
        }
        None => mesh(connection, plain, accepted.at, listener, shared).await,
    }
}

fn opened(accepted: &Accepted, listener: &Outbound, shared: &Arc<Shared>) -> Connection {
    let carries = listener.state.load().protocol.into();
    Connection::open(shared, Direction::Outbound, carries, &listener.name, accepted.client)
}

/// Over mTLS to whom the listener expects.
async fn mesh(
    mut connection: Connection,
    plain: Prefixed<Plain>,
    accepted_at: Instant,
    listener: Arc<Outbound>,
    shared: Arc<Shared>,
) {
    let entry = Arc::clone(connection.entry());
    let (state, _) = tokio::select! {
        biased;
        held = hold::usable(&listener.state, accepted_at, &shared.published) => held,
        _ = entry.until_stopped() => return plain.get_ref().abort(),
    };
    let sniffing = Box::pin(carried(&mut connection, plain, &state, &shared));
    let carried = tokio::select! {
        biased;
        carried = sniffing => carried,
        _ = entry.until_stopped() => None,
    };
    let Some((spoken, mut plain)) = carried else { return };
    if let Some(spoken) = spoken {
        entry.carries_requests();
        let deadlines = lone_deadlines(&state.limits, &entry);
        let limits = Arc::clone(&state.http_limits);
        drop(state);
        Box::pin(http::serve(plain, spoken, Way::Outbound(listener), connection, limits, deadlines, shared)).await;
        return;
    }
    let opening = Box::pin(open(&mut connection, &listener, state, &shared));
    let opened = tokio::select! {
        biased;
        opened = opening => opened,
        _ = entry.until_stopped() => None,
    };
    let Some((admitted, deadlines)) = opened else {
        plain.get_ref().abort();
        return;
    };
    forward(connection, admitted, &mut plain, deadlines, shared).await;
}

/// What the workload speaks: HTTP in some form, or none for bytes.
async fn carried(
    connection: &mut Connection,
    plain: Prefixed<Plain>,
    state: &OutboundState,
    shared: &Shared,
) -> Option<(Option<Spoken>, Prefixed<Plain>)> {
    let original = connection.entry().client.original();
    let opaque = |to: SocketAddr| state.detect.opaque_ports.contains(&to.port());
    let server_first = state.server_first || original.is_some_and(opaque);
    let sniffing = match state.protocol {
        Protocol::Tcp => return Some((None, plain)),
        Protocol::Detect if server_first => return Some((None, plain)),
        Protocol::Detect => Sniffing::any(&state.detect),
        Protocol::Http => Sniffing::http(&state.limits, &state.http_limits),
    };
    let (spoken, plain) = sniff(connection, plain, sniffing, shared, Direction::Outbound).await?;
    Some((spoken, plain.joined()))
}

/// Finds the upstream: tries its addresses in order until one proves to be whom we expect.
async fn open(
    connection: &mut Connection,
    listener: &Outbound,
    state: Arc<OutboundState>,
    shared: &Arc<Shared>,
) -> Option<(Admitted<Authenticated>, Deadlines)> {
    let Some(tls) = state.tls.clone() else {
        connection.handshake(&refused(Direction::Outbound, Reason::NoIdentity, "we have no SVID that may be used"));
        return None;
    };
    connection.set_local(tls.identity().svid.id());
    let original = connection.entry().client.original().filter(|_| state.to.is_empty()).map(HostPort::literal);
    for host in state.to.iter().chain(&original) {
        let addresses = match host.resolve(state.connect_timeout).await {
            Ok(addresses) => addresses,
            Err(error) => {
                connection.end(Cause::Unreachable, format!("{}: {error}", host.as_str()));
                continue;
            }
        };
        for address in addresses {
            connection.upstream = Some(format!("{} ({address})", host.as_str()));
            let dialled = match state.dialer.upstream(address, state.connect_timeout).await {
                Ok(dialled) => dialled,
                Err(error) => {
                    connection.end(Cause::Unreachable, format!("{address}: {error}"));
                    continue;
                }
            };
            let deadline = Instant::now() + state.profile.handshake_timeout;
            let (record, authenticated) = client::connect(
                ReadAhead::new(dialled.stream),
                host.server_name(),
                Arc::clone(&tls),
                Offer::Nothing,
                &state.slots,
                deadline,
            )
            .await;
            connection.handshake(&record);
            if let Some(authenticated) = authenticated {
                return admit(connection, authenticated, listener, &state, shared);
            }
        }
    }
    None
}

fn admit(
    connection: &mut Connection,
    authenticated: Authenticated,
    listener: &Outbound,
    state: &Arc<OutboundState>,
    shared: &Arc<Shared>,
) -> Option<(Admitted<Authenticated>, Deadlines)> {
    let peer = Arc::clone(authenticated.peer());
    if connection.set_peer(&peer, state.limits.max_per_peer).is_err() {
        connection.end(Cause::Limit, "connections.max_per_peer is reached");
        return None;
    }
    let admitted = match state.expected.admit(authenticated) {
        Ok(admitted) => admitted,
        Err((_, decision)) => {
            connection.decided(Direction::Outbound, &decision);
            connection.end(Cause::Denied, format!("rule {}", decision.rule));
            return None;
        }
    };
    connection.decided(Direction::Outbound, admitted.decision());
    let now = listener.state.load();
    if !Arc::ptr_eq(&now, state)
        && let Some(cause) = now.rejudge(connection.entry(), &Known::Peer(peer.clone()), &shared.clock)
    {
        connection.end(cause, "changed during the handshake");
        return None;
    }
    let deadlines = deadlines(&state.limits, connection.entry(), &peer, &shared.clock);
    Some((admitted, deadlines))
}

async fn forward(
    mut connection: Connection,
    admitted: Admitted<Authenticated>,
    plain: &mut Prefixed<Plain>,
    deadlines: Deadlines,
    shared: Arc<Shared>,
) {
    let mut tls = admitted.into_subject().into_stream();
    let entry = Arc::clone(connection.entry());
    let carries = connection.carries();
    let end = Forward::new(&mut tls, plain, entry.stopper(), deadlines, |from_tls, from_plain| {
        connection.sent += from_plain;
        connection.received += from_tls;
        shared.observer.moved(Direction::Outbound, carries, from_plain, from_tls);
    })
    .await;
    if end.cause != Cause::Done {
        plain.get_ref().abort();
    }
    connection.end(end.cause, end.detail);
}
