//! What rules know of a request, small enough to be kept for as long as the request lives.

use std::fmt;
use std::sync::Arc;

use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header};

use super::pattern::FieldName;
use crate::config::schema::EscapedSlash;
use crate::identity::{KeyType, SpiffeId};
use crate::policy::path::{NormalPath, PathError};

/// What a request is about (RFC 9112, section 3.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HttpTarget {
    /// A path.
    Path(NormalPath),
    /// `*`: the server as a whole, for OPTIONS.
    Server,
    /// A host and port, for CONNECT.
    Authority,
}

impl HttpTarget {
    /// What a request line or the pseudo-headers of HTTP/2 say. A CONNECT with a path (RFC 8441) is about that path.
    ///
    /// # Errors
    /// Why the path is refused.
    pub fn of(method: &Method, uri: &Uri, escaped: EscapedSlash) -> Result<Self, PathError> {
        let Some(written) = uri.path_and_query() else {
            return if method == Method::CONNECT { Ok(Self::Authority) } else { Err(PathError::NotAbsolute) };
        };
        match written.as_str() {
            "*" if method == Method::OPTIONS => Ok(Self::Server),
            // An absolute URI may leave the path out (RFC 9110, section 4.2.3).
            text if uri.authority().is_some() && !text.starts_with('/') => {
                NormalPath::parse(&format!("/{text}"), escaped).map(Self::Path)
            }
            _ => NormalPath::of(written, escaped).map(Self::Path),
        }
    }

    /// The path, if it is about one.
    pub fn path(&self) -> Option<&NormalPath> {
        match self {
            Self::Path(path) => Some(path),
            Self::Server | Self::Authority => None,
        }
    }
}

/// The names of the headers that the rules of a listener look at, or all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderNames {
    /// Sorted, without doubles.
    names: Vec<FieldName>,
    /// A module may look at any.
    all: bool,
}

impl HeaderNames {
    pub(crate) fn new(mut names: Vec<FieldName>, all: bool) -> Self {
        names.sort_unstable();
        names.dedup();
        Self { names, all }
    }

    fn contains(&self, name: &HeaderName) -> bool {
        self.all || self.names.iter().any(|wanted| same_field(name.as_str(), wanted.as_str()))
    }

    fn covers(&self, name: &FieldName) -> bool {
        self.all || self.names.binary_search(name).is_ok()
    }
}

/// Whether a header's name is that one for a workload that makes no difference between `-` and `_`.
pub(crate) fn same_field(name: &str, wanted: &str) -> bool {
    name.len() == wanted.len()
        && name.bytes().zip(wanted.bytes()).all(|(have, want)| have == want || (have == b'_' && want == b'-'))
}

/// TLS as it was negotiated with the peer. All texts are of closed sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsFacts {
    /// `TLSv1.3` or `TLSv1.2`.
    pub version: &'static str,
    /// IANA name of the suite.
    pub cipher_suite: &'static str,
    /// IANA name of the group.
    pub group: &'static str,
    /// The peer's key.
    pub key_type: KeyType,
    /// Whether the session was resumed.
    pub resumed: bool,
}

/// What is the same for all requests of a connection, for modules to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionFacts {
    /// The peer, proven.
    pub source: SpiffeId,
    /// Ourselves; none where a request is only thought of.
    pub destination: Option<SpiffeId>,
    /// TLS; none where a request is only thought of.
    pub tls: Option<TlsFacts>,
}

/// What rules know of a request. Cheap to clone: the parts are shared with the request. `Debug` shows no header's value.
#[derive(Clone)]
pub struct HttpFacts {
    pub(super) method: Method,
    pub(super) target: HttpTarget,
    host: Option<Authority>,
    pub(super) grpc: bool,
    /// Those that some rule looks at.
    headers: Option<Arc<[(HeaderName, HeaderValue)]>>,
    kept: Arc<HeaderNames>,
    connection: Option<Arc<ConnectionFacts>>,
}

impl HttpFacts {
    /// Takes the facts out of a request whose hop-by-hop headers (RFC 9110, section 7.6.1) have been removed already:
    /// what is judged is what is forwarded. `host` is the effective one: `:authority`, the absolute URI's or `Host`.
    /// `names` are [`ListenerPolicy::header_names`](crate::policy::ListenerPolicy::header_names).
    pub fn new(parts: &Parts, host: Option<&Authority>, target: HttpTarget, names: &Arc<HeaderNames>) -> Self {
        let looked_at = names.all || !names.names.is_empty();
        let headers = looked_at.then(|| {
            let kept = parts.headers.iter().filter(|(name, _)| names.contains(name));
            kept.map(|(name, value)| (name.clone(), value.clone())).collect()
        });
        Self {
            method: parts.method.clone(),
            target,
            host: host.cloned(),
            grpc: is_grpc(&parts.method, &parts.headers),
            headers,
            kept: Arc::clone(names),
            connection: None,
        }
    }

    /// With what a module may know of the connection. Without it, a module admits nothing.
    pub fn with_connection(mut self, connection: Arc<ConnectionFacts>) -> Self {
        self.connection = Some(connection);
        self
    }

    /// The method.
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// What it is about.
    pub fn target(&self) -> &HttpTarget {
        &self.target
    }

    /// Whether it is a gRPC call: POST, and the content type says so.
    pub fn is_grpc(&self) -> bool {
        self.grpc
    }

    /// The host as rules compare it, in the case it was written in: without port and without a dot at the end. None if
    /// there is none, or one in percent-encoding, which servers read in different ways.
    pub fn host(&self) -> Option<&str> {
        let host = self.host.as_ref()?.host();
        let host = host.strip_suffix('.').unwrap_or(host);
        (!host.is_empty() && !host.contains('%')).then_some(host)
    }

    /// What a module may know of the connection.
    pub fn connection(&self) -> Option<&Arc<ConnectionFacts>> {
        self.connection.as_ref()
    }

    fn headers(&self) -> &[(HeaderName, HeaderValue)] {
        self.headers.as_deref().unwrap_or_default()
    }

    /// All headers; none if only some were kept.
    pub(crate) fn all_headers(&self) -> Option<&[(HeaderName, HeaderValue)]> {
        self.kept.all.then(|| self.headers())
    }

    /// The values of a header: whether each came under the very name, and the value. None if they were not kept.
    pub(super) fn values<'a>(
        &'a self,
        name: &'a FieldName,
    ) -> Option<impl Iterator<Item = (bool, &'a HeaderValue)> + Clone> {
        let headers = self.kept.covers(name).then_some(self.headers())?.iter();
        let same = headers.filter(|(have, _)| same_field(have.as_str(), name.as_str()));
        Some(same.map(|(have, value)| (have.as_str() == name.as_str(), value)))
    }
}

impl fmt::Debug for HttpFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpFacts")
            .field("method", &self.method)
            .field("host", &self.host())
            .field("path", &self.target.path().map(NormalPath::as_str))
            .field("grpc", &self.grpc)
            .finish_non_exhaustive()
    }
}

/// By the gRPC protocol over HTTP/2: POST, and a content type of `application/grpc`, alone or with `+…` or `;…`.
pub(crate) fn is_grpc(method: &Method, headers: &HeaderMap) -> bool {
    const TYPE: &[u8] = b"application/grpc";
    let mut types = headers.get_all(header::CONTENT_TYPE).iter().map(HeaderValue::as_bytes).peekable();
    method == Method::POST
        && types.peek().is_some()
        && types.all(|value| {
            value.split_at_checked(TYPE.len()).is_some_and(|(head, rest)| {
                head.eq_ignore_ascii_case(TYPE) && matches!(rest.first(), None | Some(b'+' | b';' | b' '))
            })
        })
}
