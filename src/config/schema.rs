//! The types of the config file, with their defaults. The JSON schema is generated from these.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::identity::{SpiffeId, TrustDomain};
use crate::policy::pattern::IdPattern;

pub use super::accelerate::AccelerateMode;
pub use super::captured::Network;
pub use super::http::{
    EscapedSlash, ForwardClientCert, Forwarded, GrpcMatch, HeaderMatch, HttpMatch, InboundHttp, Protocol, RegoModules,
};
pub use super::intercept::{
    CapturedDestinations, CapturedPorts, InboundMode, Intercept, OutboundMode, Passthrough, Plaintext, Udp, Unmatched,
};
pub use super::sandbox::SandboxMode;
pub use super::traffic::{Detect, HttpLimits, OnDetectTimeout, OutboundHttp, Retries};
pub use super::values::{OneOrMany, Span};

/// The whole config file. Relative paths in it are relative to the file itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Portcullis config")]
pub struct Config {
    /// Where our SVID and trust bundles come from. A text is the address of a SPIFFE Workload API
    /// (`unix:///run/spire/sockets/agent.sock` or `tcp://127.0.0.1:8081`); without it SPIFFE_ENDPOINT_SOCKET is used.
    #[serde(default, deserialize_with = "super::values::identity")]
    #[schemars(schema_with = "super::values::identity_schema")]
    pub identity: IdentityConfig,
    /// Labels that every metric carries.
    #[serde(default)]
    pub labels: Labels,
    /// The crypto profile.
    #[serde(default)]
    pub tls: TlsConfig,
    /// Listeners towards the workload: mTLS in, plaintext to the workload.
    #[serde(default)]
    pub inbound: Vec<Inbound>,
    /// Listeners from the workload: plaintext in, mTLS to a named upstream.
    #[serde(default)]
    pub outbound: Vec<Outbound>,
    /// Who may do what, beyond the `allow` lists of the listeners.
    #[serde(default)]
    pub policy: PolicyConfig,
    /// Limits and timeouts of connections; listeners may override some.
    #[serde(default)]
    pub connections: Connections,
    /// Limits of HTTP, where listeners carry it.
    #[serde(default)]
    pub http: HttpLimits,
    /// How listeners with `protocol: detect` find out what is spoken.
    #[serde(default)]
    pub detect: Detect,
    /// Transparent interception; nothing is captured when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intercept: Option<Intercept>,
    /// The address of metrics, probes and state.
    #[serde(default)]
    pub admin: Admin,
    /// Logs, metrics and traces.
    #[serde(default)]
    pub telemetry: Telemetry,
    /// What the proxy takes from itself once it has started.
    #[serde(default)]
    pub sandbox: SandboxMode,
    /// Whether plaintext between proxy and workload is accelerated. Takes CAP_BPF and CAP_NET_ADMIN at the start.
    #[serde(default)]
    pub accelerate: AccelerateMode,
    /// How long open connections may go on after SIGTERM.
    #[serde(default = "drain_timeout")]
    pub drain_timeout: Span,
    /// Worker threads of the data path; the CPU quota decides when absent.
    #[serde(default)]
    #[schemars(range(min = 1, max = 256))]
    pub threads: Option<usize>,
}

fn drain_timeout() -> Span {
    Span::seconds(30)
}

/// Where the identity comes from: an address, or one of the three sources in full.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct IdentityConfig {
    /// SPIFFE Workload API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload_api: Option<WorkloadApi>,
    /// PEM files that another program keeps fresh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<IdentityFiles>,
    /// An authority of our own, in this process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<EmbeddedIdentity>,
    /// Choose the SVID with this SPIFFE ID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spiffe_id: Option<SpiffeId>,
    /// Choose the SVID with this hint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Revocation lists (PEM or DER files), watched for change.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub crls: Vec<PathBuf>,
    /// How long an identity that the source no longer names is still held, because SPIRE sends an incomplete set for a
    /// moment while a CA is tainted.
    #[serde(default = "withdraw_grace")]
    pub withdraw_grace: Span,
}

fn withdraw_grace() -> Span {
    Span::seconds(5)
}

impl Default for IdentityConfig {
    fn default() -> Self {
        Self {
            workload_api: None,
            files: None,
            authority: None,
            spiffe_id: None,
            hint: None,
            crls: Vec::new(),
            withdraw_grace: withdraw_grace(),
        }
    }
}

/// SPIFFE Workload API.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkloadApi {
    /// `unix:///path` or `tcp://IP:PORT` (SPIFFE Workload Endpoint specification, section 4).
    pub address: String,
}

/// PEM files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct IdentityFiles {
    /// Certificate chain, leaf first.
    pub certificate: PathBuf,
    /// Private key (PKCS#8 or SEC1).
    pub key: PathBuf,
    /// For each trust domain a PEM file of its CA certificates.
    pub bundles: std::collections::BTreeMap<TrustDomain, PathBuf>,
}

/// The embedded authority, in process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EmbeddedIdentity {
    /// The SPIFFE ID to issue to ourselves; its trust domain is the authority's.
    pub spiffe_id: SpiffeId,
    /// Life of an SVID.
    #[serde(default = "svid_ttl")]
    pub svid_ttl: Span,
    /// Where the CA key is kept (0600), shared by several processes of one machine; in memory only when absent.
    #[serde(default)]
    pub state_dir: Option<PathBuf>,
    /// Further trust domains, each with its SPIFFE bundle document (file path or https URL).
    #[serde(default)]
    pub federates_with: std::collections::BTreeMap<TrustDomain, String>,
}

fn svid_ttl() -> Span {
    Span::seconds(3600)
}

/// Labels of every metric.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Labels {
    /// Which service this proxy stands beside.
    #[serde(default)]
    pub service_name: String,
    /// Production, staging, …
    #[serde(default)]
    pub environment: String,
    /// The organisation's domain, such as clinical or finance.
    #[serde(default)]
    pub domain: String,
}

/// The crypto profile, declared once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// TLS 1.3 suites in order of preference (IANA or OpenSSL names).
    #[serde(default = "suites")]
    pub cipher_suites: Vec<String>,
    /// Key exchange groups in order of preference; from `post_quantum` when absent.
    #[serde(default)]
    pub groups: Option<Vec<String>>,
    /// The hybrid group X25519MLKEM768: first, alone, or not at all.
    #[serde(default)]
    pub post_quantum: PostQuantum,
    /// Which keys SVIDs may have, ours and the peers'.
    #[serde(default)]
    pub svid_keys: SvidKeys,
    /// Session resumption, bound to the generation of identity and policy.
    #[serde(default = "yes")]
    pub resumption: bool,
    /// Refuse to start unless the provider runs in FIPS mode.
    #[serde(default)]
    pub fips: bool,
    /// From the accepted connection to the finished handshake, all reads and writes together.
    #[serde(default = "handshake_timeout")]
    pub handshake_timeout: Span,
    /// How many handshakes may be under way at once, after their ClientHello has arrived.
    #[serde(default = "max_handshakes")]
    #[schemars(range(min = 1, max = 65536))]
    pub max_handshakes: usize,
}

fn suites() -> Vec<String> {
    vec!["TLS_AES_256_GCM_SHA384".into(), "TLS_CHACHA20_POLY1305_SHA256".into()]
}
fn yes() -> bool {
    true
}
fn handshake_timeout() -> Span {
    Span::seconds(5)
}
fn max_handshakes() -> usize {
    512
}

impl Default for TlsConfig {
    fn default() -> Self {
        Self {
            cipher_suites: suites(),
            groups: None,
            post_quantum: PostQuantum::default(),
            svid_keys: SvidKeys::default(),
            resumption: true,
            fips: false,
            handshake_timeout: handshake_timeout(),
            max_handshakes: max_handshakes(),
        }
    }
}

/// The hybrid post-quantum group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PostQuantum {
    /// First in the order, others behind it.
    #[default]
    Prefer,
    /// The only one.
    Require,
    /// Not offered.
    Off,
}

/// Keys that SVIDs may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SvidKeys {
    /// ECDSA P-384 only.
    #[default]
    P384,
    /// ECDSA P-384 and P-256, because many SPIRE servers can issue nothing better.
    P256Allowed,
}

/// A listener towards the workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Inbound {
    /// Its name, unique in the file, in metrics and rules: letters, digits, `.`, `-`, `_`, at most 63.
    pub name: String,
    /// `IP:PORT` to listen on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<std::net::SocketAddr>,
    /// In place of `listen`: the ports whose captured connections it serves (see `intercept`), or `any`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capture: Option<CapturedPorts>,
    /// The workload: `HOST:PORT` or `unix:///path`. Where captured connections were for, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// What it carries.
    #[serde(default)]
    pub protocol: Protocol,
    /// What becomes of a captured client that speaks no TLS.
    #[serde(default)]
    pub plaintext: Plaintext,
    /// Peers that may connect: SPIFFE IDs, patterns by whole segments (`spiffe://td/ns/*/sa/web`), whole trust domains.
    /// Where requests are judged, they may send every request but CONNECT.
    #[serde(default)]
    pub allow: Vec<IdPattern>,
    /// Accept TLS 1.2 with ECDHE-ECDSA-AES256-GCM-SHA384 on P-384 as well.
    #[serde(default)]
    pub legacy_tls12: bool,
    /// The workload may be on another machine; it is then reached in plaintext.
    #[serde(default)]
    pub allow_remote_target: bool,
    /// Send the verified peer identity ahead of the bytes.
    #[serde(default)]
    pub proxy_protocol: ProxyProtocol,
    /// Options of HTTP, where the protocol is `http` or `detect`.
    #[serde(default)]
    pub http: InboundHttp,
    /// Overrides of `connections` for this listener.
    #[serde(default)]
    pub connections: ConnectionOverrides,
}

impl Inbound {
    /// The ports it is known by: its own, or those whose captured connections it serves.
    pub fn ports(&self) -> Vec<u16> {
        let captured = self.capture.iter().flat_map(|capture| capture.named()).copied();
        self.listen.iter().map(|listen| listen.port()).chain(captured).collect()
    }

    /// Where it takes connections, in words.
    pub fn place(&self) -> String {
        match (&self.listen, &self.capture) {
            (Some(listen), _) => listen.to_string(),
            (None, Some(capture)) => format!("captured, {capture}"),
            (None, None) => "nowhere".into(),
        }
    }

    /// Where it leads to, in words.
    pub fn leads_to(&self) -> &str {
        self.to.as_deref().unwrap_or("where it was for")
    }
}

impl Outbound {
    /// Where it takes connections, in words.
    pub fn place(&self) -> String {
        match (&self.listen, &self.capture) {
            (Some(listen), _) => listen.clone(),
            (None, Some(capture)) => format!("captured, {capture}"),
            (None, None) => "nowhere".into(),
        }
    }
}

/// PROXY protocol towards the workload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ProxyProtocol {
    /// Not sent.
    #[default]
    Off,
    /// Version 2, with TLVs for SPIFFE ID, TLS version and cipher suite.
    V2,
}

/// A listener from the workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Outbound {
    /// Its name, unique in the file, in metrics and rules: letters, digits, `.`, `-`, `_`, at most 63.
    pub name: String,
    /// `IP:PORT` (loopback unless `allow_remote_clients`) or `unix:///path` to listen on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    /// In place of `listen`: which captured connections it serves (see `intercept`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capture: Option<CapturedDestinations>,
    /// What it carries.
    #[serde(default)]
    pub protocol: Protocol,
    /// The upstream's addresses, `HOST:PORT`, one or several, resolved by DNS. Connections that carry bytes try them in
    /// order; requests are spread over all of them. Where captured connections were for, when absent.
    #[serde(default)]
    pub to: OneOrMany<String>,
    /// The SPIFFE IDs that the upstream may have, exactly.
    #[serde(default)]
    pub expect: OneOrMany<SpiffeId>,
    /// In place of `expect`, for captured connections: what passes without mTLS of ours.
    #[serde(default)]
    pub passthrough: Passthrough,
    /// Offer TLS 1.2 with ECDHE-ECDSA-AES256-GCM-SHA384 on P-384 as well.
    #[serde(default)]
    pub legacy_tls12: bool,
    /// Other machines may use this plaintext listener.
    #[serde(default)]
    pub allow_remote_clients: bool,
    /// How long one address may take to accept.
    #[serde(default = "connect_timeout")]
    pub connect_timeout: Span,
    /// Options of HTTP, where the protocol is `http` or `detect`.
    #[serde(default)]
    pub http: OutboundHttp,
    /// Overrides of `connections` for this listener.
    #[serde(default)]
    pub connections: ConnectionOverrides,
}

fn connect_timeout() -> Span {
    Span::seconds(3)
}

/// Rules beyond the listeners' `allow` lists.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyConfig {
    /// `audit` decides, counts and logs, and lets every proven peer through.
    #[serde(default)]
    pub mode: PolicyMode,
    /// Rules; deny wins over allow, nothing else is admitted.
    #[serde(default)]
    pub rules: Vec<Rule>,
}

/// Whether a decision is carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PolicyMode {
    /// It is.
    #[default]
    Enforce,
    /// It is only counted and logged.
    Audit,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Its name, unique, in metrics, logs and `explain`: letters, digits, `.`, `-`, `_`, at most 63.
    pub name: String,
    /// Whom it speaks of: SPIFFE IDs, patterns, whole trust domains.
    pub from: Vec<IdPattern>,
    /// Inbound listeners by name or by port; all of them when absent.
    #[serde(default)]
    pub to: Vec<RuleTarget>,
    /// What it says.
    #[serde(default)]
    pub action: Action,
    /// `audit`: the rule has no effect; what it would have said is counted and logged.
    #[serde(default)]
    pub mode: PolicyMode,
    /// Which requests it speaks of, on listeners that carry HTTP: those that one of these matches; all of them when
    /// absent, for an `allow` all but CONNECT.
    #[serde(default)]
    pub http: Vec<HttpMatch>,
}

/// What a rule applies to: an inbound listener by its name or by its port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum RuleTarget {
    /// An inbound listener's port.
    Port(u16),
    /// An inbound listener's name.
    Listener(String),
}

impl RuleTarget {
    /// Whether it means this listener.
    pub fn matches(&self, listener: &Inbound) -> bool {
        match self {
            Self::Port(port) => listener.ports().contains(port),
            Self::Listener(name) => listener.name == *name,
        }
    }
}

impl Rule {
    /// Whether the rule speaks of this listener.
    pub fn applies_to(&self, listener: &Inbound) -> bool {
        self.to.is_empty() || self.to.iter().any(|target| target.matches(listener))
    }
}

/// What a rule says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Admit.
    #[default]
    Allow,
    /// Refuse, whatever other rules say.
    Deny,
}

/// Limits and timeouts of connections.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Connections {
    /// Close a connection after so long without a byte in either direction.
    pub idle_timeout: Span,
    /// Close a connection so long after one side has finished, if the other is silent.
    pub half_closed_timeout: Span,
    /// Close a connection at this age; never when absent.
    pub max_age: Option<Span>,
    /// Open connections of the whole process, those in a handshake included.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max: usize,
    /// Open connections of one peer identity.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_per_peer: usize,
    /// What becomes of a connection whose peer's SVID has expired.
    pub on_peer_expiry: OnPeerExpiry,
}

impl Default for Connections {
    fn default() -> Self {
        Self {
            idle_timeout: Span::seconds(3600),
            half_closed_timeout: Span::seconds(60),
            max_age: None,
            max: 20_000,
            max_per_peer: 10_000,
            on_peer_expiry: OnPeerExpiry::Close,
        }
    }
}

/// What one listener sets differently.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ConnectionOverrides {
    /// See `connections.idle_timeout`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<Span>,
    /// See `connections.half_closed_timeout`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub half_closed_timeout: Option<Span>,
    /// See `connections.max_age`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_age: Option<Span>,
    /// See `connections.max_per_peer`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_per_peer: Option<usize>,
    /// See `connections.on_peer_expiry`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_peer_expiry: Option<OnPeerExpiry>,
}

impl Connections {
    /// These limits with a listener's overrides laid over them.
    pub fn with(&self, over: &ConnectionOverrides) -> Self {
        Self {
            idle_timeout: over.idle_timeout.unwrap_or(self.idle_timeout),
            half_closed_timeout: over.half_closed_timeout.unwrap_or(self.half_closed_timeout),
            max_age: over.max_age.or(self.max_age),
            max: self.max,
            max_per_peer: over.max_per_peer.unwrap_or(self.max_per_peer),
            on_peer_expiry: over.on_peer_expiry.unwrap_or(self.on_peer_expiry),
        }
    }
}

/// What becomes of a connection whose peer's SVID has expired.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnPeerExpiry {
    /// Closed, with the reason on record.
    #[default]
    Close,
    /// Kept; the next handshake needs a fresh SVID all the same.
    Keep,
}

/// Metrics, probes and state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    /// `IP:PORT`; port 0 picks a free one.
    pub listen: std::net::SocketAddr,
}

impl Default for Admin {
    fn default() -> Self {
        Self { listen: std::net::SocketAddr::from(([127, 0, 0, 1], 9902)) }
    }
}

/// Logs, metrics and traces.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Telemetry {
    /// How many peer identities get a series of their own in `portcullis_peer_info`; the rest share `other`.
    #[schemars(range(max = 10_000))]
    pub max_peers: usize,
    /// One line when a connection ends, and one when a request does.
    pub access_log: bool,
    /// Form of all log lines.
    pub log_format: LogFormat,
    /// `error`, `warn`, `info`, `debug` or a filter such as `portcullis::proxy=debug,info`.
    pub log_level: String,
    /// Where spans of requests go. Without it none are made, and headers of traces pass untouched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traces: Option<Traces>,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self { max_peers: 100, access_log: true, log_format: LogFormat::Auto, log_level: "info".into(), traces: None }
    }
}

/// Spans of requests, sent to a collector by OTLP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Traces {
    /// The collector: `http://127.0.0.1:4317`, for `http` usually port 4318. Plaintext, so one on this machine, or behind
    /// an outbound listener. Headers that it wants, such as a key, come from OTEL_EXPORTER_OTLP_HEADERS.
    pub endpoint: String,
    /// How OTLP is carried.
    #[serde(default)]
    pub protocol: TraceProtocol,
    /// The share of requests that get a span, of those that come without a trace. Of others the caller decides.
    #[serde(default = "trace_ratio")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub ratio: f64,
    /// How long the collector may take over one batch before its spans are given up.
    #[serde(default = "trace_timeout")]
    pub timeout: Span,
    /// How many spans may wait; more are dropped, and counted.
    #[serde(default = "trace_queue")]
    #[schemars(range(min = 1, max = 65_536))]
    pub queue: usize,
    /// The most spans in one batch.
    #[serde(default = "trace_batch")]
    #[schemars(range(min = 1, max = 65_536))]
    pub max_batch: usize,
}

fn trace_ratio() -> f64 {
    0.1
}

fn trace_timeout() -> Span {
    Span::seconds(5)
}

fn trace_queue() -> usize {
    2048
}

fn trace_batch() -> usize {
    512
}

/// How OTLP is carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TraceProtocol {
    /// gRPC.
    #[default]
    Grpc,
    /// Protobuf over HTTP.
    Http,
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    #[default]
    Auto,
    /// Text.
    Text,
    /// JSON.
    Json,
}
