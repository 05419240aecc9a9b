//! Bodies on their way through: counted, timed, never gathered.
//!
//! [`RequestBody`] goes from who asks towards the upstream, [`ReplyBody`] the other way. The reply owns the
//! [`Exchange`], so that a request's record is written when its response has ended, however it ends.

use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::HeaderMap;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use tokio::time::Sleep;

use super::downstream::Downstream;
use super::endpoint::Lease;
use super::exchange::Exchange;
use super::headers;
use crate::config::schema::Forwarded;
use crate::proxy::record::RequestCause;

/// Why a body was cut.
#[derive(Debug)]
pub(super) enum BodyError {
    /// The side it came from failed.
    Source(hyper::Error),
    /// It stood still for too long.
    Idle,
    /// The request was told to end.
    Stopped(RequestCause),
}

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source(error) => error.fmt(f),
            Self::Idle => f.write_str("the body stood still for too long"),
            Self::Stopped(cause) => write!(f, "told to end: {}", cause.as_str()),
        }
    }
}

impl Error for BodyError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Source(error) => Some(error),
            _ => None,
        }
    }
}

/// A timer that is armed only while nothing moves.
struct Still {
    after: Duration,
    moved: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Still {
    fn new(after: Duration) -> Self {
        Self { after, moved: None, timer: None }
    }

    fn moved(&mut self) {
        if self.timer.is_some() {
            self.moved = Some(Instant::now());
        }
    }

    /// Ready when nothing has moved for so long.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let after = self.after;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(after)));
        while timer.as_mut().poll(cx).is_ready() {
            let Some(next) = self.moved.take().and_then(|at| at.checked_add(after)).filter(|at| *at > Instant::now())
            else {
                return Poll::Ready(());
            };
            timer.as_mut().reset(next.into());
        }
        Poll::Pending
    }
}

/// What became of a request's body, for the record and for the answer.
#[derive(Debug, Default)]
pub(super) struct Meter {
    bytes: AtomicU64,
    fault: AtomicU8,
}

/// What was wrong with a request's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Its framing was broken.
    Framing,
    /// It stood still for too long.
    Idle,
    /// Who sent it went away.
    Gone,
}

impl Meter {
    pub(super) fn of(bytes: u64) -> Self {
        Self { bytes: bytes.into(), ..Self::default() }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(super) fn fault(&self) -> Option<Fault> {
        match self.fault.load(Ordering::Relaxed) {
            1 => Some(Fault::Framing),
            2 => Some(Fault::Idle),
            3 => Some(Fault::Gone),
            _ => None,
        }
    }

    fn note(&self, fault: Fault) {
        let code = match fault {
            Fault::Framing => 1,
            Fault::Idle => 2,
            Fault::Gone => 3,
        };
        self.fault.store(code, Ordering::Relaxed);
    }
}

/// A request's body towards the upstream.
pub(super) enum RequestBody {
    /// There is none.
    Empty,
    /// It streams.
    Stream(Box<Stream>),
}

pub(super) struct Stream {
    inner: Incoming,
    down: Arc<Downstream>,
    meter: Arc<Meter>,
    still: Still,
    /// What of its trailers goes on.
    forwarded: Forwarded,
}

impl RequestBody {
    /// The body, and where its numbers stand. It may stand still for `idle`.
    pub(super) fn new(
        inner: Incoming,
        down: &Arc<Downstream>,
        idle: Duration,
        forwarded: Forwarded,
    ) -> (Self, Option<Arc<Meter>>) {
        if inner.is_end_stream() {
            return (Self::Empty, None);
        }
        let meter = Arc::new(Meter::default());
        let (down, still) = (Arc::clone(down), Still::new(idle));
        let stream = Stream { inner, down, meter: Arc::clone(&meter), still, forwarded };
        (Self::Stream(Box::new(stream)), Some(meter))
    }

    pub(super) fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Self::Stream(this) = self.get_mut() else { return Poll::Ready(None) };
        match Pin::new(&mut this.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                this.still.moved();
                this.down.touch();
                if let Some(data) = frame.data_ref() {
                    this.meter.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
                    return Poll::Ready(Some(Ok(frame)));
                }
                // Some workloads read trailers as if they were headers.
                Poll::Ready(Some(Ok(match frame.into_trailers() {
                    Ok(mut trailers) => {
                        headers::remove_hop_by_hop(&mut trailers);
                        headers::remove_claims(&mut trailers, this.forwarded, this.down.is_inbound());
                        Frame::trailers(trailers)
                    }
                    Err(frame) => frame,
                })))
            }
            Poll::Ready(Some(Err(error))) => {
                this.meter.note(if is_framing(&error) { Fault::Framing } else { Fault::Gone });
                Poll::Ready(Some(Err(BodyError::Source(error))))
            }
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => this.still.poll(cx).map(|()| {
                this.meter.note(Fault::Idle);
                Some(Err(BodyError::Idle))
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Stream(this) => this.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Stream(this) => this.inner.size_hint(),
        }
    }
}

/// Whether a body failed because its bytes were not HTTP, and not because the connection did.
fn is_framing(error: &hyper::Error) -> bool {
    if error.is_parse() {
        return true;
    }
    let mut source = error.source();
    while let Some(inner) = source {
        if let Some(io) = inner.downcast_ref::<std::io::Error>() {
            return matches!(io.kind(), std::io::ErrorKind::InvalidData | std::io::ErrorKind::InvalidInput);
        }
        source = inner.source();
    }
    false
}

/// A response's body towards who asked.
pub(super) enum ReplyBody {
    /// An answer of our own.
    Own(Option<Bytes>, #[allow(dead_code, reason = "it ends with the answer")] Option<Box<Exchange>>),
    /// What the upstream answers.
    Upstream(Box<Upstream>),
}

/// The upstream's body with everything that ends with it.
pub(super) struct Upstream {
    body: Incoming,
    exchange: Box<Exchange>,
    lease: Lease,
    still: Still,
}

impl ReplyBody {
    pub(super) fn upstream(body: Incoming, exchange: Box<Exchange>, lease: Lease, idle: Duration) -> Self {
        Self::Upstream(Box::new(Upstream { body, exchange, lease, still: Still::new(idle) }))
    }
}

impl Upstream {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(cause) = self.exchange.poll_stopped(cx.waker()) {
            self.exchange.end(cause, "judged again");
            return Poll::Ready(Some(Err(BodyError::Stopped(cause))));
        }
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                self.still.moved();
                self.exchange.down.touch();
                if let Some(data) = frame.data_ref() {
                    self.exchange.received += data.len() as u64;
                } else if let Some(trailers) = frame.trailers_ref() {
                    self.exchange.grpc_trailers(trailers);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                self.exchange.upstream_broke(&error);
                Poll::Ready(Some(Err(BodyError::Source(error))))
            }
            Poll::Ready(None) => {
                self.exchange.end(RequestCause::Done, "");
                Poll::Ready(None)
            }
            Poll::Pending => self.still.poll(cx).map(|()| {
                self.exchange.end(RequestCause::BodyTimeout, "the response stood still for too long");
                Some(Err(BodyError::Idle))
            }),
        }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        // Whoever writes a body of known length asks no further than its last byte.
        if self.body.is_end_stream() {
            self.exchange.end(RequestCause::Done, "");
        }
        self.lease.release(self.body.is_end_stream());
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Own(bytes, _) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Upstream(upstream) => upstream.poll(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own(bytes, _) => bytes.is_none(),
            Self::Upstream(upstream) => upstream.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own(bytes, _) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Upstream(upstream) => upstream.body.size_hint(),
        }
    }
}

/// gRPC's status in a header or trailer section.
pub(super) fn grpc_status(fields: &HeaderMap) -> Option<u16> {
    fields.get("grpc-status")?.to_str().ok()?.parse().ok().filter(|status| *status <= 16)
}
