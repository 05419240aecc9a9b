//! A request between its two connections: what it says, apart from the version that either side speaks.

use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Method, Request, Uri, Version, header};

use super::body::RequestBody;
use super::endpoint::Line;
use super::headers;
use crate::proxy::record::HttpVersion;

/// What a request asks to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Becomes {
    /// Nothing else: a request.
    Request,
    /// A WebSocket (RFC 6455).
    WebSocket,
    /// A tunnel (RFC 9110, section 9.3.6).
    Tunnel,
}

/// A request's head.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) method: Method,
    /// None for CONNECT.
    pub(super) path: Option<PathAndQuery>,
    /// The host it is for, with its port.
    pub(super) authority: Option<Authority>,
    /// Without `Host`.
    pub(super) headers: HeaderMap,
    /// What it came in.
    pub(super) version: HttpVersion,
    pub(super) becomes: Becomes,
}

/// Why a request has no one host that it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadHost(pub(super) &'static str);

impl Head {
    /// The host that a request is for, by RFC 9112, section 3.2 and RFC 9113, section 8.3.1: `:authority` or the absolute
    /// URI's, and `Host`. Both, if both are there, must be the same, because nobody knows which of them is read.
    pub(super) fn authority(parts: &Parts) -> Result<Option<Authority>, BadHost> {
        let mut hosts = parts.headers.get_all(header::HOST).iter();
        let host = hosts.next();
        if hosts.next().is_some() {
            return Err(BadHost("more than one Host"));
        }
        let host = match host {
            Some(value) if value.is_empty() => None,
            Some(value) => match Authority::from_maybe_shared(hyper::body::Bytes::copy_from_slice(value.as_bytes())) {
                Ok(host) if !host.as_str().contains('@') => Some(host),
                _ => return Err(BadHost("Host is not a host")),
            },
            None => None,
        };
        match (parts.uri.authority(), host) {
            (Some(uri), _) if uri.as_str().contains('@') => Err(BadHost("user information in the authority")),
            (Some(uri), Some(host)) if parts.method != Method::CONNECT && !same_authority(uri, &host) => {
                Err(BadHost("Host differs from the authority"))
            }
            (Some(uri), _) => Ok(Some(uri.clone())),
            (None, host) => Ok(host),
        }
    }

    /// The request for this connection, as its version has it.
    pub(super) fn onto(self, line: &Line<'_>, body: RequestBody) -> Option<Request<RequestBody>> {
        let Self { method, path, authority, mut headers, version, becomes } = self;
        let mut uri = http::uri::Parts::default();
        let http_version = match line {
            Line::Http1(_) => {
                let host = authority.as_ref().map_or("", |authority| authority.as_str());
                // RFC 9112, section 3.2: an empty one where there is none.
                headers.insert(header::HOST, HeaderValue::from_str(host).ok()?);
                if headers.contains_key(header::TE) {
                    headers.insert(header::CONNECTION, HeaderValue::from_static("te"));
                }
                if becomes == Becomes::WebSocket {
                    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
                    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
                }
                if path.is_none() {
                    uri.authority = authority;
                }
                uri.path_and_query = path;
                Version::HTTP_11
            }
            Line::Http2(connection) => {
                if connection.mesh && version != HttpVersion::Http2 {
                    headers.insert(headers::VERSION, HeaderValue::from_static(version.as_str()));
                }
                let scheme = if connection.proof.is_some() { Scheme::HTTPS } else { Scheme::HTTP };
                if path.is_some() {
                    uri.scheme = Some(scheme);
                }
                uri.path_and_query = path;
                // A URI with a scheme needs an authority; HTTP/1.0 may come without one.
                uri.authority = authority.or_else(|| Some(Authority::from_static("unknown.invalid")));
                Version::HTTP_2
            }
        };
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = Uri::from_parts(uri).ok()?;
        *request.version_mut() = http_version;
        *request.headers_mut() = headers;
        Some(request)
    }
}

impl Head {
    /// What [`Head::onto`] made, undone: the request never left.
    pub(super) fn off(request: Request<RequestBody>, version: HttpVersion, becomes: Becomes) -> (Self, RequestBody) {
        let (mut parts, body) = request.into_parts();
        let authority = match parts.headers.remove(header::HOST) {
            Some(host) => Authority::from_maybe_shared(hyper::body::Bytes::copy_from_slice(host.as_bytes())).ok(),
            None => parts.uri.authority().cloned(),
        };
        for name in [header::CONNECTION, header::UPGRADE, headers::VERSION] {
            parts.headers.remove(name);
        }
        let path = parts.uri.path_and_query().filter(|_| parts.method != Method::CONNECT).cloned();
        (Self { method: parts.method, path, authority, headers: parts.headers, version, becomes }, body)
    }
}

/// Host and port of both are the same; case says nothing.
fn same_authority(a: &Authority, b: &Authority) -> bool {
    a.as_str().eq_ignore_ascii_case(b.as_str())
}

/// What a request of HTTP/1 asks to become. Other protocols than WebSocket are not asked for any further, h2c among them
/// (RFC 9113, section 3.1): the request is answered as if it had not asked (RFC 9110, section 7.8).
pub(super) fn becomes<B>(request: &Request<B>) -> Becomes {
    let says = |name: header::HeaderName, wanted: &str| {
        request
            .headers()
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|token| token.trim().eq_ignore_ascii_case(wanted))
    };
    let websocket = request.version() == Version::HTTP_11
        && request.method() == Method::GET
        && says(header::UPGRADE, "websocket")
        && says(header::CONNECTION, "upgrade");
    if websocket { Becomes::WebSocket } else { Becomes::Request }
}
