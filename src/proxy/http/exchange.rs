//! One request from its head to the end of its response, and the record it leaves.

use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant, SystemTime};

use http::HeaderMap;
use http::request::Parts;

use super::body::{Fault, Meter, grpc_status};
use super::downstream::{Downstream, Way};
use super::endpoint::Proof;
use super::h1_guard::Ticket;
use super::headers;
use super::live::Live;
use crate::config::schema::PolicyMode;
use crate::policy::HttpFacts;
use crate::policy::http::is_grpc;
use crate::proxy::record::{HttpVersion, RequestCause, RequestRecord, TraceContext};
use crate::tls::record::Direction;

/// A request under way. Whoever drops it writes its record.
pub(super) struct Exchange {
    pub(super) down: Arc<Downstream>,
    key: Option<usize>,
    live: Option<Arc<Live>>,
    began: Instant,
    at: SystemTime,
    pub(super) method: http::Method,
    pub(super) version: HttpVersion,
    pub(super) grpc: bool,
    pub(super) host: Box<str>,
    pub(super) path: Box<str>,
    pub(super) proof: Option<Arc<Proof>>,
    pub(super) upstream: Option<Arc<str>>,
    pub(super) rule: Option<(Arc<str>, PolicyMode)>,
    pub(super) route: Arc<str>,
    pub(super) status: Option<u16>,
    grpc_status: Option<u16>,
    pub(super) meter: Option<Arc<Meter>>,
    pub(super) received: u64,
    pub(super) attempts: u32,
    pub(super) trace: Option<TraceContext>,
    /// Tells the guard when the request is over.
    pub(super) ticket: Option<Ticket>,
    end: Option<(RequestCause, String)>,
}

impl Exchange {
    /// A request whose head has come.
    pub(super) fn begin(down: &Arc<Downstream>, parts: &Parts, version: HttpVersion) -> Box<Self> {
        down.shared.observer.request_begun(down.direction());
        down.touch();
        Box::new(Self {
            down: Arc::clone(down),
            key: None,
            live: None,
            began: Instant::now(),
            at: SystemTime::now(),
            method: parts.method.clone(),
            version,
            grpc: is_grpc(&parts.method, &parts.headers),
            host: Box::default(),
            path: Box::default(),
            proof: None,
            upstream: None,
            rule: None,
            route: Arc::clone(&down.no_route),
            status: None,
            grpc_status: None,
            meter: None,
            received: 0,
            attempts: 0,
            trace: None,
            ticket: None,
            end: None,
        })
    }

    /// Registers it, so that it is judged again whenever policy changes. To be done before it is judged at first.
    pub(super) fn register(&mut self, facts: Option<HttpFacts>) {
        let (key, live) = self.down.entry.requests().register(facts);
        (self.key, self.live) = (Some(key), Some(live));
    }

    /// Why it was told to end, if it was, and wakes the task when it comes to that.
    pub(super) fn poll_stopped(&self, waker: &Waker) -> Option<RequestCause> {
        self.live.as_ref()?.poll_stopped(waker)
    }

    /// It has ended. The first cause stays.
    pub(super) fn end(&mut self, cause: RequestCause, detail: impl Into<String>) {
        if self.end.is_none() {
            self.end = Some((cause, detail.into()));
        }
    }

    /// What its caller waits for at most.
    pub(super) fn patience(&self, headers: &HeaderMap, otherwise: Option<Duration>) -> Option<Duration> {
        if self.grpc { headers::grpc_timeout(headers) } else { otherwise }
    }

    /// Tells the guard whether what comes next on the connection is another request.
    pub(super) fn settle(&self, tunnel: bool) {
        match &self.ticket {
            Some(ticket) if tunnel => ticket.tunnel(),
            Some(ticket) => ticket.not_tunnel(),
            None => {}
        }
    }

    /// Takes note of the response's head.
    pub(super) fn answered(&mut self, status: u16, headers: &HeaderMap) {
        self.status = Some(status);
        if self.grpc {
            self.grpc_status = grpc_status(headers);
        }
    }

    pub(super) fn grpc_trailers(&mut self, trailers: &HeaderMap) {
        if self.grpc {
            self.grpc_status = grpc_status(trailers).or(self.grpc_status);
        }
    }

    pub(super) fn set_grpc_status(&mut self, status: u16) {
        self.grpc_status = Some(status);
    }

    /// The upstream broke off in the middle of its response.
    pub(super) fn upstream_broke(&mut self, error: &hyper::Error) {
        self.end(RequestCause::UpstreamReset, error.to_string());
    }

    /// Bytes that a tunnel carried.
    pub(super) fn tunnelled(&mut self, sent: u64, received: u64) {
        self.meter = Some(Arc::new(Meter::of(sent)));
        self.received = received;
    }

    /// What was wrong with the request's body, if anything was.
    pub(super) fn fault(&self) -> Option<Fault> {
        self.meter.as_ref()?.fault()
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let down = &self.down;
        if let Some(key) = self.key {
            down.entry.requests().remove(key);
        }
        let (cause, detail) = self.end.take().unwrap_or_else(|| {
            if down.entry.stopped().is_some() {
                (RequestCause::ConnectionEnded, String::new())
            } else {
                (RequestCause::ClientReset, String::new())
            }
        });
        let sent = self.meter.as_ref().map_or(0, |meter| meter.bytes());
        down.moved(sent, self.received);
        let (peer, local, tls) = match (&down.way, &self.proof) {
            (Way::Inbound(inbound), _) => {
                (Some(inbound.peer.id().clone()), Some(inbound.local.clone()), Some(inbound.negotiated))
            }
            (Way::Outbound(_), Some(proof)) => {
                (Some(proof.peer.id().clone()), Some(proof.local.clone()), Some(proof.negotiated))
            }
            (Way::Outbound(_), None) => (None, None, None),
        };
        let record = RequestRecord {
            listener: Arc::clone(&down.entry.listener),
            direction: down.direction(),
            client: down.entry.client,
            peer,
            local,
            tls,
            upstream: self.upstream.take(),
            rule: self.rule.take(),
            route: Arc::clone(&self.route),
            method: std::mem::take(&mut self.method),
            host: std::mem::take(&mut self.host),
            path: std::mem::take(&mut self.path),
            version: self.version,
            status: self.status,
            grpc_status: self.grpc_status,
            bytes_sent: sent,
            bytes_received: self.received,
            began: self.at,
            duration: self.began.elapsed(),
            attempts: self.attempts,
            cause,
            detail,
            trace: self.trace,
        };
        down.shared.observer.request(&record);
    }
}

impl Downstream {
    /// Whether its requests go to the workload.
    pub(super) fn is_inbound(&self) -> bool {
        matches!(self.way, Way::Inbound(_))
    }

    /// Which way its requests go.
    pub(super) fn direction(&self) -> Direction {
        match self.way {
            Way::Inbound(_) => Direction::Inbound,
            Way::Outbound(_) => Direction::Outbound,
        }
    }
}
