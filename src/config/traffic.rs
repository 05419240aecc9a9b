//! The part of the config that speaks of traffic: limits of HTTP, detection, and how an outbound listener treats its
//! requests.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::http::Forwarded;
use super::values::Span;

/// Limits of HTTP, the same for every listener.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HttpLimits {
    /// Header fields of one request; more are answered with 431.
    #[schemars(range(min = 1, max = 1000))]
    pub max_headers: usize,
    /// Bytes of a request's head, the request line included; more are answered with 431.
    #[schemars(range(min = 256, max = 1_048_576))]
    pub max_header_bytes: usize,
    /// Bytes of the request line; more are answered with 414.
    #[schemars(range(min = 64, max = 65_536))]
    pub max_request_line: usize,
    /// From a request's first byte to the end of its head; slower ones are answered with 408.
    pub header_timeout: Span,
    /// How long a request's body may stand still. gRPC calls, whose streams may be silent for long, have
    /// `connections.idle_timeout` instead.
    pub body_idle_timeout: Span,
    /// Requests under way at once on one HTTP/2 connection.
    #[schemars(range(min = 1, max = 10_000))]
    pub max_concurrent_streams: u32,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            max_headers: 100,
            max_header_bytes: 32 * 1024,
            max_request_line: 8 * 1024,
            header_timeout: Span::seconds(10),
            body_idle_timeout: Span::seconds(60),
            max_concurrent_streams: 256,
        }
    }
}

/// How a `detect` listener finds out what is spoken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Detect {
    /// How long the first bytes are waited for.
    pub timeout: Span,
    /// What becomes of a connection on which nothing came in that time.
    pub on_timeout: OnDetectTimeout,
    /// Ports, of listeners or of what they lead to, on which the server speaks first: nothing is waited for there, and
    /// bytes are carried as they are. Where captured clients may speak plaintext, silence for `timeout` is plaintext.
    pub opaque_ports: Vec<u16>,
}

impl Default for Detect {
    fn default() -> Self {
        Self { timeout: Span::seconds(1), on_timeout: OnDetectTimeout::Refuse, opaque_ports: Vec::new() }
    }
}

/// What becomes of a connection whose protocol was not seen in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnDetectTimeout {
    /// It is closed.
    #[default]
    Refuse,
    /// Its bytes are carried as they are, if a rule admits the peer for that.
    Opaque,
}

/// How an outbound listener treats its requests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OutboundHttp {
    /// From a request's head to the head of its response. gRPC calls carry their own deadline, which is kept instead.
    pub request_timeout: Span,
    /// Sending once more what failed.
    pub retries: Retries,
    /// What `Forwarded` and `X-Forwarded-*` become.
    pub forwarded: Forwarded,
    /// HTTP/2 connections to one address; a second one is opened when the first is full.
    #[schemars(range(min = 1, max = 64))]
    pub max_http2_connections: usize,
    /// HTTP/1 connections to one address.
    #[schemars(range(min = 1, max = 10_000))]
    pub max_http1_connections: usize,
    /// An address gets no requests for a while after so many failures in a row.
    #[schemars(range(min = 1, max = 1000))]
    pub eject_after: u32,
    /// For how long; doubled each time, up to ten times this.
    pub eject_for: Span,
}

impl Default for OutboundHttp {
    fn default() -> Self {
        Self {
            request_timeout: Span::seconds(60),
            retries: Retries::default(),
            forwarded: Forwarded::Keep,
            max_http2_connections: 4,
            max_http1_connections: 256,
            eject_after: 5,
            eject_for: Span::seconds(10),
        }
    }
}

/// Sending once more what failed. A request that never left is always fit for it; one that did only if its method is
/// idempotent (RFC 9110, section 9.2.2) and it has no body.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retries {
    /// How often one request may be sent again; 0 for never.
    #[schemars(range(max = 10))]
    pub attempts: u32,
    /// The share of requests that may be sent again, from 0 to 1; beside it ten in ten seconds are always allowed.
    pub budget: f64,
    /// Answers of an upstream that count as a failure worth another try, such as 503.
    pub statuses: Vec<u16>,
    /// The first wait is a random time up to this; each further one up to twice as long as the one before.
    pub backoff: Span,
    /// The longest wait.
    pub max_backoff: Span,
}

impl Default for Retries {
    fn default() -> Self {
        Self {
            attempts: 2,
            budget: 0.2,
            statuses: Vec::new(),
            backoff: Span(std::time::Duration::from_millis(25)),
            max_backoff: Span(std::time::Duration::from_millis(250)),
        }
    }
}
