//! PROXY protocol version 2 towards the workload, with the verified identity in TLVs.
//!
//! By the PROXY protocol specification of HAProxy (2020/03/05), section 2.2. In: the two addresses and what the
//! handshake proved. Out: the header's bytes. TLVs: `PP2_TYPE_SSL` (0x20) with `PP2_SUBTYPE_SSL_VERSION` (0x21) and
//! `PP2_SUBTYPE_SSL_CIPHER` (0x23), and the SPIFFE ID in [`TLV_SPIFFE_ID`].

use std::net::SocketAddr;

use super::listener::Client;
use crate::identity::SpiffeId;
use crate::tls::record::Negotiated;

/// The TLV that carries the peer's SPIFFE ID, out of the range for custom use (section 2.2.8).
pub const TLV_SPIFFE_ID: u8 = 0xE0;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const TLV_SSL: u8 = 0x20;
const SUB_VERSION: u8 = 0x21;
const SUB_CIPHER: u8 = 0x23;
/// PP2_CLIENT_SSL, PP2_CLIENT_CERT_CONN and PP2_CLIENT_CERT_SESS: TLS, with a certificate.
const CLIENT_FLAGS: u8 = 0x01 | 0x02 | 0x04;

/// The header for one connection.
pub fn header(client: &Client, server: Option<SocketAddr>, peer: &SpiffeId, negotiated: &Negotiated) -> Vec<u8> {
    let mut body = Vec::with_capacity(256);
    let server = client.original().or(server);
    let family = match (client.address(), server) {
        (Some(SocketAddr::V4(from)), Some(SocketAddr::V4(to))) => {
            body.extend(from.ip().octets());
            body.extend(to.ip().octets());
            body.extend(from.port().to_be_bytes());
            body.extend(to.port().to_be_bytes());
            0x11
        }
        (Some(SocketAddr::V6(from)), Some(SocketAddr::V6(to))) => {
            body.extend(from.ip().octets());
            body.extend(to.ip().octets());
            body.extend(from.port().to_be_bytes());
            body.extend(to.port().to_be_bytes());
            0x21
        }
        _ => 0x00,
    };
    tlv(&mut body, TLV_SPIFFE_ID, peer.as_str().as_bytes());
    let mut ssl = vec![CLIENT_FLAGS];
    ssl.extend(0u32.to_be_bytes());
    tlv(&mut ssl, SUB_VERSION, negotiated.version.as_bytes());
    tlv(&mut ssl, SUB_CIPHER, negotiated.cipher_suite.as_bytes());
    tlv(&mut body, TLV_SSL, &ssl);
    let mut header = SIGNATURE.to_vec();
    header.extend([0x21, family]);
    header.extend(length(&body).to_be_bytes());
    header.extend(body);
    header
}

/// A SPIFFE ID has at most 2,048 bytes and the rest is of fixed size: every length fits.
fn length(bytes: &[u8]) -> u16 {
    u16::try_from(bytes.len()).unwrap_or(u16::MAX)
}

fn tlv(out: &mut Vec<u8>, kind: u8, value: &[u8]) {
    out.push(kind);
    out.extend(length(value).to_be_bytes());
    out.extend(value);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::KeyType;

    #[test]
    fn a_header_reads_back() {
        let peer = SpiffeId::parse("spiffe://a.example/x").unwrap();
        let negotiated = Negotiated {
            version: "TLSv1.3",
            cipher_suite: "TLS_AES_256_GCM_SHA384",
            group: "secp384r1",
            signature: "ecdsa_secp384r1_sha384",
            peer_key: KeyType::P384,
            resumed: false,
            compliant: true,
        };
        let client = Client::Tcp("10.0.0.1:1000".parse().unwrap());
        let bytes = header(&client, Some("10.0.0.2:443".parse().unwrap()), &peer, &negotiated);
        assert_eq!(&bytes[..12], b"\x0D\x0A\x0D\x0A\x00\x0D\x0A\x51\x55\x49\x54\x0A");
        assert_eq!(&bytes[12..14], [0x21, 0x11]);
        assert_eq!(usize::from(u16::from_be_bytes([bytes[14], bytes[15]])), bytes.len() - 16);
        assert_eq!(&bytes[16..28], [10, 0, 0, 1, 10, 0, 0, 2, 3, 232, 1, 187]);
        assert_eq!(&bytes[28..31], [TLV_SPIFFE_ID, 0, 20]);
        assert_eq!(&bytes[31..51], peer.as_str().as_bytes());
        assert_eq!(bytes[51], TLV_SSL);
    }
}
