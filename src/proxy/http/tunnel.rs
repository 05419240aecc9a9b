//! What a request became: bytes both ways, after 101 (WebSocket) or an accepted CONNECT.
//!
//! The gate has admitted the request that opened it; a change of policy, bundles or expiry ends it.

use std::sync::Arc;
use std::time::Duration;

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;

use super::endpoint::Lease;
use super::exchange::Exchange;
use crate::proxy::pace::Deadlines;
use crate::proxy::record::{Cause, RequestCause};
use crate::proxy::registry::Entry;
use crate::proxy::tcp::Forward;

/// How long both sides may take to leave HTTP behind.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(5);

/// Two sides that are about to become a tunnel.
pub(super) struct Tunnel {
    pub(super) down: OnUpgrade,
    pub(super) up: OnUpgrade,
    pub(super) exchange: Box<Exchange>,
    pub(super) lease: Lease,
    pub(super) idle: Duration,
    pub(super) half_closed: Duration,
}

impl Tunnel {
    /// Carries bytes until either side has enough. `entry` is the connection that the tunnel has taken over, if it has.
    /// Answers how that connection ended.
    pub(super) async fn run(self, entry: Option<&Arc<Entry>>) -> Option<(Cause, String)> {
        let Self { down, up, mut exchange, lease: _lease, idle, half_closed } = self;
        let both = async { tokio::try_join!(down, up) };
        let (down, up) = match tokio::time::timeout(UPGRADE_TIMEOUT, both).await {
            Ok(Ok(both)) => both,
            Ok(Err(error)) => {
                exchange.end(RequestCause::UpstreamReset, error.to_string());
                return None;
            }
            Err(_) => {
                exchange.end(RequestCause::Timeout, "the upgrade did not come about");
                return None;
            }
        };
        let (mut down, mut up) = (TokioIo::new(down), TokioIo::new(up));
        let (mut sent, mut received) = (0, 0);
        let deadlines = Deadlines { idle, half_closed, max_age: None, peer_expiry: None };
        let stop = |waker: &std::task::Waker| {
            let ended = entry.and_then(|entry| entry.poll_stopped(waker));
            ended.or_else(|| exchange.poll_stopped(waker).map(|_| Cause::PolicyChanged))
        };
        let end = Forward::new(&mut down, &mut up, stop, deadlines, |from_down, from_up| {
            sent += from_down;
            received += from_up;
        })
        .await;
        exchange.tunnelled(sent, received);
        let cause = match end.cause {
            Cause::Done => RequestCause::Done,
            Cause::PolicyChanged => RequestCause::PolicyChanged,
            Cause::Idle | Cause::HalfClosed => RequestCause::BodyTimeout,
            Cause::Reset | Cause::Truncated | Cause::TlsError => RequestCause::ClientReset,
            _ => RequestCause::ConnectionEnded,
        };
        exchange.end(cause, end.detail.clone());
        Some((end.cause, end.detail))
    }
}
