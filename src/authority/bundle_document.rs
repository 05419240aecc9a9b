//! SPIFFE bundle documents: how one trust domain tells another its CAs.
//!
//! A JWK set with the CAs in `x5c` (SPIFFE Trust Domain and Bundle specification, section 4; X509-SVID specification,
//! section 6). In: JSON. Out: certificates (DER). Keys for other uses are passed over, as the specification asks.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use crate::identity::bundle::MAX_AUTHORITIES;

/// The largest document that is read, in bytes.
pub const MAX_DOCUMENT_BYTES: usize = 1024 * 1024;
/// The most keys of all uses that a document may hold.
const MAX_KEYS: usize = 1024;
const X509_USE: &str = "x509-svid";

/// A SPIFFE bundle document, as far as it concerns X509-SVIDs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BundleDocument {
    /// The CA certificates (DER). None at all means that the trust domain has taken back all it had published.
    pub authorities: Vec<CertificateDer<'static>>,
    /// Counts up with every change of the document.
    pub sequence: Option<u64>,
    /// How often its publisher would like to be asked.
    pub refresh_hint: Option<Duration>,
}

#[derive(Serialize, Deserialize)]
struct Wire {
    keys: Vec<WireKey>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    spiffe_sequence: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    spiffe_refresh_hint: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct WireKey {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kty: Option<String>,
    #[serde(default, rename = "use", skip_serializing_if = "Option::is_none")]
    usage: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    crv: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    x: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    y: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    x5c: Vec<String>,
}

impl BundleDocument {
    /// Reads a document.
    ///
    /// # Errors
    /// What is wrong with it, in words. Certificates are not judged here.
    pub fn read(json: &[u8]) -> Result<Self, String> {
        if json.len() > MAX_DOCUMENT_BYTES {
            return Err(format!("the document is larger than {MAX_DOCUMENT_BYTES} bytes"));
        }
        let wire: Wire =
            serde_json::from_slice(json).map_err(|e| format!("the document is not a SPIFFE bundle: {e}"))?;
        if wire.keys.len() > MAX_KEYS {
            return Err(format!("the document holds more than {MAX_KEYS} keys"));
        }
        let mut authorities = Vec::new();
        for (index, key) in wire.keys.iter().enumerate() {
            // Section 4.2.1 and 4.2.2: keys without kty or with a use that is not known are passed over.
            if key.kty.is_none() || key.usage.as_deref() != Some(X509_USE) {
                continue;
            }
            let [certificate] = key.x5c.as_slice() else {
                return Err(format!("key {index} has {} values in x5c, and exactly one belongs there", key.x5c.len()));
            };
            let der = STANDARD.decode(certificate).map_err(|e| format!("x5c of key {index} is not base64: {e}"))?;
            authorities.push(CertificateDer::from(der));
        }
        if authorities.len() > MAX_AUTHORITIES {
            return Err(format!("the document holds more than {MAX_AUTHORITIES} authorities"));
        }
        Ok(Self {
            authorities,
            sequence: wire.spiffe_sequence,
            refresh_hint: wire.spiffe_refresh_hint.map(Duration::from_secs),
        })
    }

    /// Writes the document, with a newline at its end.
    ///
    /// # Errors
    /// An authority that is no certificate, or whose key is not ECDSA on P-256 or P-384.
    pub fn write(&self) -> Result<String, String> {
        let keys = self.authorities.iter().map(|der| WireKey::from_certificate(der)).collect::<Result<_, _>>()?;
        let wire = Wire {
            keys,
            spiffe_sequence: self.sequence,
            spiffe_refresh_hint: self.refresh_hint.map(|hint| hint.as_secs()),
        };
        let mut text = serde_json::to_string_pretty(&wire).map_err(|e| e.to_string())?;
        text.push('\n');
        Ok(text)
    }
}

impl WireKey {
    fn from_certificate(der: &CertificateDer<'_>) -> Result<Self, String> {
        let (_, cert) = x509_parser::parse_x509_certificate(der).map_err(|e| format!("not a certificate: {e}"))?;
        // An uncompressed point: 0x04, x, y.
        let point = &cert.public_key().subject_public_key.data;
        let (curve, size) = match point.len() {
            97 => ("P-384", 48),
            65 => ("P-256", 32),
            _ => return Err("the authority's key is not ECDSA on P-256 or P-384".into()),
        };
        let (Some((4, coordinates)), true) = (point.split_first().map(|(t, c)| (*t, c)), size > 0) else {
            return Err("the authority's key is not an uncompressed point".into());
        };
        let (x, y) = coordinates.split_at_checked(size).ok_or("the authority's key is cut off")?;
        Ok(Self {
            kty: Some("EC".into()),
            usage: Some(X509_USE.into()),
            crv: Some(curve.into()),
            x: Some(URL_SAFE_NO_PAD.encode(x)),
            y: Some(URL_SAFE_NO_PAD.encode(y)),
            x5c: vec![STANDARD.encode(der)],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::ca::Ca;
    use crate::identity::TrustDomain;

    #[test]
    fn what_is_written_is_read_back() {
        let domain = TrustDomain::parse("lab.test").unwrap();
        let ca = |ttl| Ca::generate(&domain, 1_800_000_000, ttl).unwrap().der;
        let document = BundleDocument {
            authorities: vec![ca(60), ca(600)],
            sequence: Some(7),
            refresh_hint: Some(Duration::from_secs(300)),
        };
        let text = document.write().unwrap();
        assert_eq!(BundleDocument::read(text.as_bytes()).unwrap(), document);
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["keys"][0]["kty"], "EC");
        assert_eq!(json["keys"][0]["crv"], "P-384");
        assert_eq!(json["keys"][0]["use"], "x509-svid");
        assert_eq!(json["keys"][0]["x"].as_str().unwrap().len(), 64);
        assert_eq!(json["spiffe_sequence"], 7);
    }

    #[test]
    fn keys_for_other_uses_are_passed_over() {
        let text = r#"{"keys":[
            {"kty":"EC","use":"jwt-svid","kid":"a","crv":"P-256","x":"AA","y":"AA"},
            {"kty":"EC","use":"something-new","x5c":["!"]},
            {"use":"x509-svid","x5c":["AAAA"]},
            {"kty":"RSA","use":"x509-svid","n":"AA","e":"AQAB","x5c":["AAAA"]}],
            "spiffe_refresh_hint": 60, "later": true}"#;
        let document = BundleDocument::read(text.as_bytes()).unwrap();
        assert_eq!(document.authorities, [CertificateDer::from(vec![0, 0, 0])]);
        assert_eq!(document.refresh_hint, Some(Duration::from_secs(60)));
    }

    #[test]
    fn a_bundle_may_be_empty_and_nonsense_may_not() {
        assert_eq!(BundleDocument::read(br#"{"keys":[]}"#).unwrap(), BundleDocument::default());
        for (text, word) in [
            ("", "not a SPIFFE bundle"),
            ("{}", "not a SPIFFE bundle"),
            (r#"{"keys":[{"kty":"EC","use":"x509-svid"}]}"#, "0 values in x5c"),
            (r#"{"keys":[{"kty":"EC","use":"x509-svid","x5c":["AAAA","AAAA"]}]}"#, "2 values in x5c"),
            (r#"{"keys":[{"kty":"EC","use":"x509-svid","x5c":["%"]}]}"#, "not base64"),
        ] {
            let error = BundleDocument::read(text.as_bytes()).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
        assert!(BundleDocument::read(&vec![b' '; MAX_DOCUMENT_BYTES + 1]).is_err());
    }
}
