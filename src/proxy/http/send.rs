//! Sending a cleared request: an address, a connection, the wait for the response's head; and once more where that is
//! safe.
//!
//! What never left may always be sent again. What did may be only if its method is idempotent (RFC 9110, section 9.2.2)
//! and it has no body. Both are bounded by a number, by the budget, and by the request's own time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{Method, Response};
use hyper::body::Incoming;

use super::body::RequestBody;
use super::budget::backoff;
use super::endpoint::{Endpoint, Lease, Line};
use super::exchange::Exchange;
use super::message::{Becomes, Head};
use super::pool::{Failed, Pool, Want};
use crate::policy::http::HttpFacts;
use crate::policy::{Admitted, HttpSubject, RequestDecision};
use crate::proxy::record::{Event, HttpVersion, RequestCause};

/// A request that rules are to judge.
pub(super) struct Judged {
    pub(super) facts: HttpFacts,
    pub(super) head: Head,
    pub(super) body: RequestBody,
}

impl HttpSubject for Judged {
    fn facts(&self) -> &HttpFacts {
        &self.facts
    }
}

/// A request that may be sent: nothing else is.
pub(super) struct Cleared {
    head: Head,
    body: RequestBody,
    /// Whether a rule admitted it; if not, only an upstream that is expected may get it.
    by_rule: bool,
}

impl Cleared {
    /// A rule admitted it.
    pub(super) fn by_rule(admitted: Admitted<Judged, RequestDecision>) -> Self {
        let Judged { head, body, .. } = admitted.into_subject();
        Self { head, body, by_rule: true }
    }

    /// It goes to an upstream whose identity is expected.
    pub(super) fn for_expected(head: Head, body: RequestBody) -> Self {
        Self { head, body, by_rule: false }
    }
}

/// An answer, and the connection that it comes on.
pub(super) struct Sent {
    pub(super) response: Response<Incoming>,
    pub(super) lease: Lease,
    pub(super) becomes: Becomes,
}

/// What a try came to.
enum Try {
    Answered(Response<Incoming>, Lease),
    /// It never left: here it is again.
    Unsent(Failed, Head, RequestBody),
    /// It left, or went with what it was on.
    Lost(Failed),
}

/// Sends a request and waits for the head of its response.
pub(super) async fn send(
    exchange: &mut Exchange,
    pool: &Arc<Pool>,
    cleared: Cleared,
    patience: Option<Duration>,
) -> Result<Sent, Failed> {
    let Cleared { mut head, mut body, by_rule } = cleared;
    if by_rule != pool.is_workload() {
        return Err(Failed::new(RequestCause::Denied, "not cleared for this upstream"));
    }
    let deadline = patience.and_then(|patience| Instant::now().checked_add(patience));
    let becomes = head.becomes;
    let want = match (becomes, head.version) {
        (Becomes::WebSocket, _) => Want::Tunnel,
        (Becomes::Tunnel, HttpVersion::Http10 | HttpVersion::Http11) => Want::Tunnel,
        (_, HttpVersion::Http2) => Want::Http2,
        _ => Want::Http1,
    };
    let retries = &pool.options.retries;
    pool.budget.request();
    let mut pool = Arc::clone(pool);
    let mut failed_at: Option<Arc<Endpoint>> = None;
    let mut again = 0;
    let mut fresh = false;
    loop {
        let left = again < retries.attempts;
        let idempotent = idempotent(&head.method);
        let copy = (left && body.is_empty() && becomes == Becomes::Request).then(|| head.clone());
        // What is rare is in a box: what a request carries about with it is moved several times.
        let endpoint = match pool.pick_now(failed_at.as_ref()) {
            Some(endpoint) => Ok(endpoint),
            None => Box::pin(pool.pick(failed_at.as_ref())).await,
        };
        let outcome = match endpoint {
            Ok(endpoint) => {
                let outcome = attempt(exchange, &pool, &endpoint, want, fresh, head, body, deadline).await;
                let well = match &outcome {
                    Try::Answered(response, _) => !matches!(response.status().as_u16(), 502..=504),
                    Try::Unsent(failed, ..) | Try::Lost(failed) => failed.blameless(),
                };
                pool.served(&endpoint, well);
                failed_at = Some(endpoint);
                outcome
            }
            Err(failed) => Try::Unsent(failed, head, body),
        };
        let failed;
        (failed, head, body) = match outcome {
            Try::Answered(response, lease) => {
                let worth = retries.statuses.contains(&response.status().as_u16());
                match copy {
                    Some(copy) if worth && idempotent && may_retry(exchange, &pool) => (
                        Failed::new(RequestCause::UpstreamReset, "a status worth another try"),
                        copy,
                        RequestBody::Empty,
                    ),
                    _ => return Ok(Sent { response, lease, becomes }),
                }
            }
            // The successor of a pool that was retired meanwhile is no second try.
            Try::Unsent(failed, head, body) if failed.retired && again < 3 => match exchange.down.pool() {
                Some(next) if !Arc::ptr_eq(&next, &pool) => {
                    pool = next;
                    (failed, head, body)
                }
                _ => return Err(failed),
            },
            // That a connection had gone stale is no failure of the upstream, and costs it nothing: the budget is for those.
            Try::Unsent(failed, head, body) if left && failed.stale => {
                told(exchange, &pool, Event::Retried);
                (failed, head, body)
            }
            Try::Unsent(failed, head, body) if left && failed.worth_retry() && may_retry(exchange, &pool) => {
                (failed, head, body)
            }
            Try::Lost(failed) => match copy {
                Some(copy) if (idempotent || failed.refused) && failed.worth_retry() && may_retry(exchange, &pool) => {
                    (failed, copy, RequestBody::Empty)
                }
                _ => return Err(failed),
            },
            Try::Unsent(failed, ..) => return Err(failed),
        };
        again += 1;
        fresh = failed.stale;
        // A connection that had gone stale says nothing about the address: no wait for that.
        if !failed.stale && !failed.retired {
            let wait = backoff(again, retries.backoff.0, retries.max_backoff.0);
            if deadline.is_some_and(|deadline| Instant::now() + wait >= deadline) {
                return Err(failed);
            }
            tokio::time::sleep(wait).await;
        }
    }
}

/// Whether a request may be sent again although it may have arrived.
fn idempotent(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE)
}

fn may_retry(exchange: &Exchange, pool: &Pool) -> bool {
    let allowed = pool.budget.try_retry(Instant::now());
    told(exchange, pool, if allowed { Event::Retried } else { Event::RetryRefused });
    allowed
}

fn told(exchange: &Exchange, pool: &Pool, event: Event) {
    exchange.down.shared.observer.event(exchange.down.direction(), &pool.listener, event);
}

#[allow(clippy::too_many_arguments, reason = "one call, and what is moved into it comes back out of it")]
async fn attempt(
    exchange: &mut Exchange,
    pool: &Arc<Pool>,
    endpoint: &Arc<Endpoint>,
    want: Want,
    fresh: bool,
    head: Head,
    body: RequestBody,
    deadline: Option<Instant>,
) -> Try {
    let leased = match pool.lease_now(endpoint, want, fresh) {
        Some(lease) => Ok(Ok(lease)),
        None => {
            let dialling = Box::pin(pool.lease(endpoint, want, fresh));
            within(exchange, deadline, dialling).await
        }
    };
    let mut lease = match leased {
        Ok(Ok(lease)) => lease,
        Ok(Err(failed)) | Err(failed) => return Try::Unsent(failed, head, body),
    };
    exchange.proof = lease.proof().cloned();
    let used_before = lease.used_before();
    let (version, becomes) = (head.version, head.becomes);
    let Some(line) = lease.line() else {
        return Try::Unsent(Failed::new(RequestCause::Unreachable, "no connection"), head, body);
    };
    if matches!(line, Line::Http1(_)) && exchange.grpc && version == HttpVersion::Http2 {
        let failed = Failed::new(RequestCause::Unreachable, "gRPC needs HTTP/2, which the upstream does not speak");
        return Try::Lost(failed);
    }
    let Some(request) = head.onto(&line, body) else {
        return Try::Lost(Failed::new(RequestCause::BadRequest, "the request cannot be put into this version of HTTP"));
    };
    exchange.attempts += 1;
    let answered = match line {
        Line::Http1(sender) => {
            let sent = std::pin::pin!(sender.try_send_request(request));
            within(exchange, deadline, sent).await
        }
        Line::Http2(connection) => {
            let mut sender = connection.sender.clone();
            let sent = std::pin::pin!(sender.try_send_request(request));
            within(exchange, deadline, sent).await
        }
    };
    match answered {
        Ok(Ok(response)) => Try::Answered(response, lease),
        // The other side may see that the caller's time is over before our own timer tells.
        Ok(Err(_)) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => Try::Lost(Failed::out_of_time()),
        Ok(Err(mut error)) => {
            let unsent = error.take_message();
            let error = error.into_error();
            let mut failed = Failed::new(RequestCause::UpstreamReset, describe(&error));
            let reset = reset_of(&error);
            // A stream that was reset says that its connection lives.
            failed.stale = used_before && reset.is_none();
            failed.refused = reset == Some(h2::Reason::REFUSED_STREAM);
            match unsent {
                Some(request) => {
                    failed.cause = RequestCause::Unreachable;
                    let (head, body) = Head::off(request, version, becomes);
                    Try::Unsent(failed, head, body)
                }
                None => Try::Lost(failed),
            }
        }
        Err(failed) => Try::Lost(failed),
    }
}

/// Why the other side reset the request's stream, if that is what happened.
fn reset_of(error: &hyper::Error) -> Option<h2::Reason> {
    let error = std::error::Error::source(error)?.downcast_ref::<h2::Error>()?;
    error.reason().filter(|_| error.is_reset() && error.is_remote())
}

fn describe(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Waits, but not past the deadline, and not when the request is told to end.
async fn within<F: Future + Unpin>(
    exchange: &Exchange,
    deadline: Option<Instant>,
    mut future: F,
) -> Result<F::Output, Failed> {
    let watched = std::future::poll_fn(|cx| {
        if let std::task::Poll::Ready(output) = std::pin::Pin::new(&mut future).poll(cx) {
            return std::task::Poll::Ready(Ok(output));
        }
        match exchange.poll_stopped(cx.waker()) {
            Some(cause) => std::task::Poll::Ready(Err(Failed::new(cause, "judged again"))),
            None => std::task::Poll::Pending,
        }
    });
    match deadline {
        None => watched.await,
        Some(deadline) => {
            tokio::time::timeout_at(deadline.into(), watched).await.unwrap_or_else(|_| Err(Failed::out_of_time()))
        }
    }
}
