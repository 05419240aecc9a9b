//! Certificates in a row: the Workload API's form of chains and bundles.

use rustls::pki_types::CertificateDer;

use crate::identity::svid::MAX_CERT_BYTES;

/// Splits concatenated DER certificates without reading them. An empty text is an empty list.
///
/// # Errors
/// More than `max` of them, one larger than [`MAX_CERT_BYTES`], or bytes that are no DER SEQUENCE.
pub fn split(mut bytes: &[u8], max: usize) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut certificates = Vec::new();
    while !bytes.is_empty() {
        if certificates.len() >= max {
            return Err(format!("more than {max} certificates in a row"));
        }
        let size = sequence_size(bytes)
            .filter(|size| *size <= MAX_CERT_BYTES)
            .ok_or_else(|| format!("certificate {} of the row is not DER, or oversized", certificates.len()))?;
        let (one, rest) = bytes
            .split_at_checked(size)
            .ok_or_else(|| format!("certificate {} of the row is cut off", certificates.len()))?;
        certificates.push(CertificateDer::from(one.to_vec()));
        bytes = rest;
    }
    Ok(certificates)
}

/// Header and content of the SEQUENCE at the start, in bytes. Lengths are in their shortest form, as DER asks
/// (X.690, section 10.1).
fn sequence_size(bytes: &[u8]) -> Option<usize> {
    const SEQUENCE: u8 = 0x30;
    match *bytes {
        [SEQUENCE, length, ..] if length < 0x80 => Some(2 + usize::from(length)),
        [SEQUENCE, 0x81, length, ..] if length >= 0x80 => Some(3 + usize::from(length)),
        [SEQUENCE, 0x82, high, low, ..] if high > 0 => Some(4 + usize::from(u16::from_be_bytes([high, low]))),
        _ => None,
    }
}

/// Puts certificates in a row.
pub fn join<'a>(certificates: impl IntoIterator<Item = &'a CertificateDer<'static>>) -> Vec<u8> {
    certificates.into_iter().flat_map(|c| c.iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sequence(content: usize) -> CertificateDer<'static> {
        let mut der = vec![0x30];
        match content {
            0..0x80 => der.push(content as u8),
            0x80..0x100 => der.extend([0x81, content as u8]),
            _ => der.extend([0x82, (content >> 8) as u8, content as u8]),
        }
        der.extend(vec![7; content]);
        der.into()
    }

    proptest! {
        #[test]
        fn what_was_joined_is_split(sizes in proptest::collection::vec(0..3000_usize, 0..6)) {
            let certificates: Vec<_> = sizes.iter().map(|n| sequence(*n)).collect();
            prop_assert_eq!(split(&join(&certificates), 6).unwrap(), certificates);
        }

        #[test]
        fn any_bytes_are_split_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(certificates) = split(&bytes, 600) {
                prop_assert_eq!(join(&certificates), bytes);
            }
        }
    }

    #[test]
    fn limits_hold() {
        let two = join(&[sequence(5), sequence(200)]);
        assert!(split(&two, 1).unwrap_err().contains("more than 1"));
        assert!(split(&two[..two.len() - 1], 2).unwrap_err().contains("cut off"));
        assert!(split(&sequence(MAX_CERT_BYTES), 1).unwrap_err().contains("oversized"));
        for bad in
            [&[0x31, 0][..], &[0x30], &[0x30, 0x80, 0, 0], &[0x30, 0x81, 5], &[0x30, 0x82, 0, 200], &[0x30, 0x83]]
        {
            assert!(split(bad, 1).is_err(), "{bad:?}");
        }
        assert!(split(&[], 0).unwrap().is_empty());
    }
}
