//! The messages of `workload.proto` (SPIFFE Workload API), written by hand.
//!
//! Field numbers are the specification's. The JWT calls have no messages here: our server answers them with
//! Unimplemented and our client never makes them.

use std::collections::BTreeMap;

use zeroize::Zeroize;

/// The metadata key that every request carries (SPIFFE Workload Endpoint specification, section 3), with the value
/// `true`: it keeps a browser or a fooled HTTP client from talking to the endpoint.
pub const SECURITY_HEADER: &str = "workload.spiffe.io";
/// Streams the caller's X509-SVIDs with all bundles.
pub const FETCH_X509_SVID: &str = "/SpiffeWorkloadAPI/FetchX509SVID";
/// Streams the bundles alone.
pub const FETCH_X509_BUNDLES: &str = "/SpiffeWorkloadAPI/FetchX509Bundles";
/// The calls of the JWT-SVID profile.
pub const JWT_METHODS: [&str; 3] =
    ["/SpiffeWorkloadAPI/FetchJWTSVID", "/SpiffeWorkloadAPI/FetchJWTBundles", "/SpiffeWorkloadAPI/ValidateJWTSVID"];

/// Asks for the caller's X509-SVIDs.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct X509SvidRequest {}

/// The caller's X509-SVIDs, always the full set.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct X509SvidResponse {
    /// The SVIDs, the default one first.
    #[prost(message, repeated, tag = "1")]
    pub svids: Vec<X509Svid>,
    /// Revocation lists (DER).
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub crl: Vec<Vec<u8>>,
    /// Bundles of foreign trust domains by the trust domain's SPIFFE ID; each is certificates (DER) in a row.
    #[prost(btree_map = "string, bytes", tag = "3")]
    pub federated_bundles: BTreeMap<String, Vec<u8>>,
}

/// One X509-SVID with its key, which is zeroed when the message drops and is left out of debug output.
#[derive(Clone, PartialEq, Eq, prost::Message)]
#[prost(skip_debug)]
pub struct X509Svid {
    /// The SPIFFE ID.
    #[prost(string, tag = "1")]
    pub spiffe_id: String,
    /// The chain, leaf first: certificates (DER) in a row.
    #[prost(bytes = "vec", tag = "2")]
    pub x509_svid: Vec<u8>,
    /// The private key (PKCS#8 DER).
    #[prost(bytes = "vec", tag = "3")]
    pub x509_svid_key: Vec<u8>,
    /// The bundle of the SVID's own trust domain: certificates (DER) in a row.
    #[prost(bytes = "vec", tag = "4")]
    pub bundle: Vec<u8>,
    /// The operator's hint; empty for none.
    #[prost(string, tag = "5")]
    pub hint: String,
}

impl Drop for X509Svid {
    fn drop(&mut self) {
        self.x509_svid_key.zeroize();
    }
}

impl std::fmt::Debug for X509Svid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("X509Svid").field("spiffe_id", &self.spiffe_id).field("hint", &self.hint).finish_non_exhaustive()
    }
}

/// Asks for the bundles.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct X509BundlesRequest {}

/// All bundles that the caller may judge peers by.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct X509BundlesResponse {
    /// Revocation lists (DER).
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub crl: Vec<Vec<u8>>,
    /// Bundles by the trust domain's SPIFFE ID; each is certificates (DER) in a row.
    #[prost(btree_map = "string, bytes", tag = "2")]
    pub bundles: BTreeMap<String, Vec<u8>>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    #[test]
    fn the_wire_form_is_the_specifications() {
        let message = X509SvidResponse {
            svids: vec![X509Svid {
                spiffe_id: "a".into(),
                x509_svid: vec![1],
                x509_svid_key: vec![2],
                bundle: vec![3],
                hint: "h".into(),
            }],
            crl: vec![vec![4]],
            federated_bundles: [("f".to_owned(), vec![5])].into(),
        };
        // Tag and length by hand: field << 3 | 2, then the length.
        let expected = [
            0x0a, 15, 0x0a, 1, b'a', 0x12, 1, 1, 0x1a, 1, 2, 0x22, 1, 3, 0x2a, 1, b'h', // svids
            0x12, 1, 4, // crl
            0x1a, 6, 0x0a, 1, b'f', 0x12, 1, 5, // federated_bundles
        ];
        assert_eq!(message.encode_to_vec(), expected);
        assert_eq!(X509SvidResponse::decode(&expected[..]).unwrap(), message);
        let bundles = X509BundlesResponse { crl: vec![vec![4]], bundles: [("f".to_owned(), vec![5])].into() };
        assert_eq!(bundles.encode_to_vec(), [0x0a, 1, 4, 0x12, 6, 0x0a, 1, b'f', 0x12, 1, 5]);
    }

    #[test]
    fn a_key_is_not_printed() {
        let mut svid = X509Svid::default();
        svid.x509_svid_key = vec![0xAB; 3];
        let text = format!("{:?}", X509SvidResponse { svids: vec![svid], ..X509SvidResponse::default() });
        assert!(!text.contains("171") && !text.contains("ab"), "{text}");
    }
}
