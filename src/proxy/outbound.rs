//! From the workload: plaintext in, mTLS to a named upstream.

use std::sync::Arc;
use std::time::Instant;

use super::connection::{Connection, deadlines};
use super::inbound::refused;
use super::io::Plain;
use super::listener::{Accepted, Outbound, OutboundState, Shared};
use super::record::Cause;
use super::tcp::{Deadlines, Forward};
use super::upstream;
use crate::policy::Admitted;
use crate::tls::reason::Reason;
use crate::tls::record::Direction;
use crate::tls::{Authenticated, ReadAhead, client};

pub(super) async fn serve(accepted: Accepted, listener: Arc<Outbound>, shared: Arc<Shared>) {
    let mut connection = Connection::open(&shared, Direction::Outbound, &listener.name, accepted.client);
    let state = listener.state.load_full();
    let entry = Arc::clone(connection.entry());
    let opening = Box::pin(open(&mut connection, &listener, state, &shared));
    let opened = tokio::select! {
        biased;
        opened = opening => opened,
        _ = entry.until_stopped() => None,
    };
    let mut plain = accepted.io;
    let Some((admitted, deadlines)) = opened else {
        plain.abort();
        return;
    };
    forward(connection, admitted, &mut plain, deadlines, shared).await;
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
    for host in &state.to {
        let addresses = match host.resolve(state.connect_timeout).await {
            Ok(addresses) => addresses,
            Err(error) => {
                connection.end(Cause::Unreachable, format!("{}: {error}", host.as_str()));
                continue;
            }
        };
        for address in addresses {
            connection.upstream = Some(format!("{} ({address})", host.as_str()));
            let stream = match upstream::connect(address, state.connect_timeout).await {
                Ok(stream) => stream,
                Err(error) => {
                    connection.end(Cause::Unreachable, format!("{address}: {error}"));
                    continue;
                }
            };
            let deadline = Instant::now() + state.profile.handshake_timeout;
            let (record, authenticated) =
                client::connect(ReadAhead::new(stream), host.server_name(), Arc::clone(&tls), &state.slots, deadline)
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
        && let Some(cause) = now.rejudge(&peer, &shared.clock)
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
    plain: &mut Plain,
    deadlines: Deadlines,
    shared: Arc<Shared>,
) {
    let mut tls = admitted.into_subject().into_stream();
    let entry = Arc::clone(connection.entry());
    let end = Forward::new(&mut tls, plain, &entry, deadlines, |from_tls, from_plain| {
        connection.sent += from_plain;
        connection.received += from_tls;
        shared.observer.moved(Direction::Outbound, from_plain, from_tls);
    })
    .await;
    if end.cause != Cause::Done {
        plain.abort();
    }
    connection.end(end.cause, end.detail);
}
