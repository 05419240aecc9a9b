//! Towards the workload: mTLS in, plaintext to the workload.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;

use super::connection::{Connection, deadlines};
use super::io::Plain;
use super::listener::{Accepted, Inbound, InboundState, Shared};
use super::proxy_protocol;
use super::record::Cause;
use super::tcp::Forward;
use crate::config::schema::ProxyProtocol;
use crate::policy::Admitted;
use crate::tls::reason::Reason;
use crate::tls::record::{Direction, Failure, HandshakeRecord};
use crate::tls::{Authenticated, ReadAhead, server};

/// How long the workload may take to accept.
const WORKLOAD_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) async fn serve(accepted: Accepted, listener: Arc<Inbound>, shared: Arc<Shared>) {
    let mut connection = Connection::open(&shared, Direction::Inbound, &listener.name, accepted.client);
    let state = listener.state.load_full();
    let entry = Arc::clone(connection.entry());
    // The handshake's state is large and short-lived: in a box it is gone when the long part begins.
    let opening = Box::pin(open(&mut connection, accepted.client, accepted.io, accepted.at, &listener, state, &shared));
    let opened = tokio::select! {
        biased;
        opened = opening => opened,
        // Told to end while opening, by a drain.
        _ = entry.until_stopped() => None,
    };
    let Some((admitted, plain, deadlines)) = opened else { return };
    forward(connection, admitted, plain, deadlines, shared).await;
}

/// Authenticates, admits, and only then dials the workload.
async fn open(
    connection: &mut Connection,
    client: super::listener::Client,
    io: Plain,
    accepted_at: std::time::Instant,
    listener: &Inbound,
    state: Arc<InboundState>,
    shared: &Arc<Shared>,
) -> Option<(Admitted<Authenticated>, Plain, super::tcp::Deadlines)> {
    let Plain::Tcp(stream) = io else { return None };
    let Some(tls) = state.tls.clone() else {
        connection.handshake(&refused(Direction::Inbound, Reason::NoIdentity, "we have no SVID that may be used"));
        super::io::abort(&stream);
        return None;
    };
    connection.set_local(tls.identity().svid.id());
    let server = stream.local_addr().ok();
    let deadline = accepted_at + state.profile.handshake_timeout;
    let (record, authenticated) = server::accept(ReadAhead::new(stream), tls, &state.slots, deadline).await;
    connection.handshake(&record);
    let Some(authenticated) = authenticated else {
        if let Some(claimed) = &record.claimed {
            connection.decided(Direction::Inbound, &state.policy.decide(claimed));
        }
        return None;
    };
    let peer = Arc::clone(authenticated.peer());
    let negotiated = *authenticated.negotiated();
    if connection.set_peer(&peer, state.limits.max_per_peer).is_err() {
        connection.end(Cause::Limit, "connections.max_per_peer is reached");
        return None;
    }
    let admitted = match state.policy.admit(authenticated) {
        Ok(admitted) => admitted,
        Err((_, decision)) => {
            connection.decided(Direction::Inbound, &decision);
            connection.end(Cause::Denied, format!("rule {}", decision.rule));
            return None;
        }
    };
    connection.decided(Direction::Inbound, admitted.decision());
    // Whatever was published since this connection took its state is looked at now that the registry knows the peer.
    let now = listener.state.load();
    if !Arc::ptr_eq(&now, &state)
        && let Some(cause) = now.rejudge(&peer, &shared.clock)
    {
        connection.end(cause, "changed during the handshake");
        return None;
    }
    connection.upstream = Some(state.to.to_string());
    let mut plain = match state.to.connect(WORKLOAD_TIMEOUT).await {
        Ok(plain) => plain,
        Err(error) => {
            connection.end(Cause::Unreachable, format!("{}: {error}", state.to));
            return None;
        }
    };
    if state.proxy_protocol == ProxyProtocol::V2 {
        let header = proxy_protocol::header(&client, server, peer.id(), &negotiated);
        if let Err(error) = tokio::time::timeout(WORKLOAD_TIMEOUT, plain.write_all(&header))
            .await
            .unwrap_or(Err(std::io::ErrorKind::TimedOut.into()))
        {
            connection.end(Cause::Unreachable, format!("{}: {error}", state.to));
            return None;
        }
    }
    let deadlines = deadlines(&state.limits, connection.entry(), &peer, &shared.clock);
    Some((admitted, plain, deadlines))
}

async fn forward(
    mut connection: Connection,
    admitted: Admitted<Authenticated>,
    mut plain: Plain,
    deadlines: super::tcp::Deadlines,
    shared: Arc<Shared>,
) {
    let mut tls = admitted.into_subject().into_stream();
    let entry = Arc::clone(connection.entry());
    let end = Forward::new(&mut tls, &mut plain, &entry, deadlines, |from_tls, from_plain| {
        connection.sent += from_tls;
        connection.received += from_plain;
        shared.observer.moved(Direction::Inbound, from_tls, from_plain);
    })
    .await;
    if end.cause != Cause::Done {
        plain.abort();
    }
    connection.end(end.cause, end.detail);
}

/// The record of a handshake that was refused before its first byte.
pub(super) fn refused(direction: Direction, reason: Reason, detail: &str) -> HandshakeRecord {
    HandshakeRecord {
        direction,
        took: Duration::ZERO,
        computing: Duration::ZERO,
        negotiated: None,
        peer: None,
        claimed: None,
        failure: Some(Failure::new(reason, detail)),
        offered_weak: Vec::new(),
    }
}
