//! What is spoken inside TLS, by ALPN (RFC 7301).

/// Between two sidecars: HTTP/2 frames that may carry requests of HTTP/1, with their version in a header field.
const MESH: &[u8] = b"portcullis-h2";
const H2: &[u8] = b"h2";
const HTTP11: &[u8] = b"http/1.1";

/// What both sides agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alpn {
    /// Nothing: one of the sides named no protocol.
    None,
    /// HTTP/2 between two sidecars.
    Mesh,
    /// HTTP/2.
    H2,
    /// HTTP/1.1.
    Http11,
}

impl Alpn {
    pub(super) fn of(negotiated: Option<&[u8]>) -> Self {
        match negotiated {
            Some(MESH) => Self::Mesh,
            Some(H2) => Self::H2,
            Some(HTTP11) => Self::Http11,
            _ => Self::None,
        }
    }
}

/// What a client offers, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// Nothing: bytes are carried as they are.
    Nothing,
    /// For requests of HTTP/1.
    Http1,
    /// For requests of HTTP/2.
    Http2,
    /// For a connection that will become a tunnel.
    Tunnel,
}

impl Offer {
    /// All of them.
    pub(super) const ALL: [Self; 4] = [Self::Nothing, Self::Http1, Self::Http2, Self::Tunnel];

    pub(super) fn protocols(self) -> Vec<Vec<u8>> {
        let names: &[&[u8]] = match self {
            Self::Nothing => &[],
            Self::Http1 => &[MESH, HTTP11],
            Self::Http2 => &[MESH, H2],
            Self::Tunnel => &[HTTP11],
        };
        names.iter().map(|name| name.to_vec()).collect()
    }
}

/// What a server of HTTP takes, the best first.
pub(super) fn served() -> Vec<Vec<u8>> {
    [MESH, H2, HTTP11].iter().map(|name| name.to_vec()).collect()
}

/// Whether a server of HTTP and a client that offers these have something in common.
pub(super) fn shared<'a>(mut offered: impl Iterator<Item = &'a [u8]>) -> bool {
    offered.any(|name| [MESH, H2, HTTP11].contains(&name))
}
