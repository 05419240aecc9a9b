//! The part of the config that speaks of HTTP: matches of rules, and options of listeners.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::policy::http::pattern::{FieldName, GrpcName, HostPattern, MethodName, PathPattern};

/// What a listener carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Bytes. The gate is at the connection.
    #[default]
    Tcp,
    /// HTTP/1 and HTTP/2. The gate is at each request.
    Http,
    /// What the first bytes say: HTTP as under `http`, everything else as under `tcp`.
    Detect,
}

impl Protocol {
    /// The word in the config.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Http => "http",
            Self::Detect => "detect",
        }
    }

    /// Whether requests can be seen there.
    pub fn carries_http(self) -> bool {
        self != Self::Tcp
    }
}

/// One kind of request. A request matches if everything that is written here holds, and of each list one item.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HttpMatch {
    /// Methods, as in `[GET, HEAD]`; every method when absent, for an `allow` all but CONNECT.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub methods: Vec<MethodName>,
    /// Hosts without port; `*.nhs.example` stands for one label before the rest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<HostPattern>,
    /// Paths: `/patients/{id}`, where `{id}` stands for one segment, `{ exact: /health }` or `{ prefix: /static }`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<PathPattern>,
    /// Headers, all of which must hold.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<HeaderMatch>,
    /// A gRPC service or one method of it; stands in place of methods and paths.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc: Option<GrpcMatch>,
}

impl HttpMatch {
    /// Whether nothing is written, so that it would match everything.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A header that a request must have, or must not have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HeaderMatch {
    /// Its name; `-` and `_` are the same, because many workloads make no difference.
    pub name: FieldName,
    /// Its whole value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exact: Option<String>,
    /// `true`: it is there, whatever its value; `false`: it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub present: Option<bool>,
}

/// A gRPC service or one method of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GrpcMatch {
    /// The service with its package: `nhs.records.v1.Records`.
    pub service: GrpcName,
    /// One method of it; all of them when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<GrpcName>,
}

/// HTTP options of a listener towards the workload.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct InboundHttp {
    /// What becomes of `%2F` in a path, before rules read it and in what is forwarded.
    pub escaped_slash: EscapedSlash,
    /// `x-forwarded-client-cert` towards the workload. What a peer sends under that name is removed in any case.
    pub forward_client_cert: ForwardClientCert,
    /// `forwarded` and `x-forwarded-*` towards the workload.
    pub forwarded: Forwarded,
    /// A Rego module that must allow, too, what the rules allow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rego: Option<RegoModules>,
}

/// What becomes of `%2F` in a path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EscapedSlash {
    /// The request is refused with 400.
    #[default]
    Refuse,
    /// It stays as it is, a part of its segment: for workloads that take it for no slash.
    Keep,
    /// It becomes a slash.
    Decode,
}

/// `x-forwarded-client-cert` towards the workload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ForwardClientCert {
    /// Not sent.
    #[default]
    Off,
    /// The verified peer in Envoy's format, `URI` and `Hash`.
    Set,
}

/// `forwarded` (RFC 7239) and `x-forwarded-*` towards the workload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Forwarded {
    /// Removed.
    #[default]
    Remove,
    /// What the peer sent is kept and ours is added.
    Append,
    /// What the peer sent is kept as it is.
    Keep,
}

/// Rego modules of a listener. Each is read and compiled when the config is loaded, and again with every reload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RegoModules {
    /// The module: `data.portcullis.authz.allow` must be true for a request that the rules have admitted.
    pub module: PathBuf,
    /// Another one that is only asked; where its answer differs, that is counted and logged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shadow: Option<PathBuf>,
}
