//! The names that IANA has given to what TLS negotiates, weak and obsolete things included. Label values come out of here,
//! so the sets are closed: whatever is not registered is `unknown`.

use rustls::CipherSuite;

/// What has no name.
pub const UNKNOWN: &str = "unknown";
/// No named group was used: a session resumed in TLS 1.2, a pre-shared key alone, RSA key exchange, a prime of the
/// server's own.
pub const NO_GROUP: &str = "none";

/// Registered since the library wrote its list, by number.
const LATER_SUITES: [(u16, &str); 21] = [
    (0x00C6, "TLS_SM4_GCM_SM3"),
    (0x00C7, "TLS_SM4_CCM_SM3"),
    (0x1306, "TLS_AEGIS_256_SHA512"),
    (0x1307, "TLS_AEGIS_128L_SHA256"),
    (0xC0B0, "TLS_ECCPWD_WITH_AES_128_GCM_SHA256"),
    (0xC0B1, "TLS_ECCPWD_WITH_AES_256_GCM_SHA384"),
    (0xC0B2, "TLS_ECCPWD_WITH_AES_128_CCM_SHA256"),
    (0xC0B3, "TLS_ECCPWD_WITH_AES_256_CCM_SHA384"),
    (0xC0B4, "TLS_SHA256_SHA256"),
    (0xC0B5, "TLS_SHA384_SHA384"),
    (0xC100, "TLS_GOSTR341112_256_WITH_KUZNYECHIK_CTR_OMAC"),
    (0xC101, "TLS_GOSTR341112_256_WITH_MAGMA_CTR_OMAC"),
    (0xC102, "TLS_GOSTR341112_256_WITH_28147_CNT_IMIT"),
    (0xC103, "TLS_GOSTR341112_256_WITH_KUZNYECHIK_MGM_L"),
    (0xC104, "TLS_GOSTR341112_256_WITH_MAGMA_MGM_L"),
    (0xC105, "TLS_GOSTR341112_256_WITH_KUZNYECHIK_MGM_S"),
    (0xC106, "TLS_GOSTR341112_256_WITH_MAGMA_MGM_S"),
    (0xD001, "TLS_ECDHE_PSK_WITH_AES_128_GCM_SHA256"),
    (0xD002, "TLS_ECDHE_PSK_WITH_AES_256_GCM_SHA384"),
    (0xD003, "TLS_ECDHE_PSK_WITH_AES_128_CCM_8_SHA256"),
    (0xD005, "TLS_ECDHE_PSK_WITH_AES_128_CCM_SHA256"),
];

/// The suites of TLS 1.3, which the library calls by names of its own.
const TLS13_SUITES: [(u16, &str); 5] = [
    (0x1301, "TLS_AES_128_GCM_SHA256"),
    (0x1302, "TLS_AES_256_GCM_SHA384"),
    (0x1303, "TLS_CHACHA20_POLY1305_SHA256"),
    (0x1304, "TLS_AES_128_CCM_SHA256"),
    (0x1305, "TLS_AES_128_CCM_8_SHA256"),
];

/// The groups 1 to 41 in their order. X25519 is written as everywhere else here.
const CURVES: [&str; 41] = [
    "sect163k1",
    "sect163r1",
    "sect163r2",
    "sect193r1",
    "sect193r2",
    "sect233k1",
    "sect233r1",
    "sect239k1",
    "sect283k1",
    "sect283r1",
    "sect409k1",
    "sect409r1",
    "sect571k1",
    "sect571r1",
    "secp160k1",
    "secp160r1",
    "secp160r2",
    "secp192k1",
    "secp192r1",
    "secp224k1",
    "secp224r1",
    "secp256k1",
    "secp256r1",
    "secp384r1",
    "secp521r1",
    "brainpoolP256r1",
    "brainpoolP384r1",
    "brainpoolP512r1",
    "X25519",
    "X448",
    "brainpoolP256r1tls13",
    "brainpoolP384r1tls13",
    "brainpoolP512r1tls13",
    "GC256A",
    "GC256B",
    "GC256C",
    "GC256D",
    "GC512A",
    "GC512B",
    "GC512C",
    "curveSM2",
];

/// The other groups.
const GROUPS: [(u16, &str); 16] = [
    (0x0100, "ffdhe2048"),
    (0x0101, "ffdhe3072"),
    (0x0102, "ffdhe4096"),
    (0x0103, "ffdhe6144"),
    (0x0104, "ffdhe8192"),
    (0x0200, "MLKEM512"),
    (0x0201, "MLKEM768"),
    (0x0202, "MLKEM1024"),
    (0x11EB, "SecP256r1MLKEM768"),
    (0x11EC, "X25519MLKEM768"),
    (0x11ED, "SecP384r1MLKEM1024"),
    (0x11EE, "curveSM2MLKEM768"),
    (0x6399, "X25519Kyber768Draft00"),
    (0x639A, "SecP256r1Kyber768Draft00"),
    (0xFF01, "arbitrary_explicit_prime_curves"),
    (0xFF02, "arbitrary_explicit_char2_curves"),
];

fn find(table: &[(u16, &'static str)], number: u16) -> Option<&'static str> {
    table.iter().find(|(known, _)| *known == number).map(|(_, name)| *name)
}

/// The name of a version of TLS or SSL, as metrics and logs have it.
pub fn version(number: u16) -> &'static str {
    match number {
        0x0300 => "SSLv3",
        0x0301 => "TLSv1.0",
        0x0302 => "TLSv1.1",
        0x0303 => "TLSv1.2",
        0x0304 => "TLSv1.3",
        _ => UNKNOWN,
    }
}

/// The name in the registry "TLS Cipher Suites".
pub fn cipher_suite(number: u16) -> &'static str {
    find(&TLS13_SUITES, number)
        .or_else(|| CipherSuite::from(number).as_str())
        .or_else(|| find(&LATER_SUITES, number))
        .unwrap_or(UNKNOWN)
}

/// The name in the registry "TLS Supported Groups".
pub fn group(number: u16) -> &'static str {
    let curve = usize::from(number).checked_sub(1).and_then(|at| CURVES.get(at).copied());
    curve.or_else(|| find(&GROUPS, number)).unwrap_or(UNKNOWN)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn the_names_are_those_of_the_registry() {
        for (number, name) in [
            (0x0000, "TLS_NULL_WITH_NULL_NULL"),
            (0x0003, "TLS_RSA_EXPORT_WITH_RC4_40_MD5"),
            (0x0005, "TLS_RSA_WITH_RC4_128_SHA"),
            (0x000A, "TLS_RSA_WITH_3DES_EDE_CBC_SHA"),
            (0x001B, "TLS_DH_anon_WITH_3DES_EDE_CBC_SHA"),
            (0x002F, "TLS_RSA_WITH_AES_128_CBC_SHA"),
            (0x009C, "TLS_RSA_WITH_AES_128_GCM_SHA256"),
            (0x1301, "TLS_AES_128_GCM_SHA256"),
            (0x1302, "TLS_AES_256_GCM_SHA384"),
            (0x1305, "TLS_AES_128_CCM_8_SHA256"),
            (0xC013, "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA"),
            (0xC02C, "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"),
            (0xC0AA, "TLS_PSK_DHE_WITH_AES_128_CCM_8"),
            (0xCCA8, "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256"),
            (0xD001, "TLS_ECDHE_PSK_WITH_AES_128_GCM_SHA256"),
            (0x0A0A, UNKNOWN),
            (0xFFFF, UNKNOWN),
        ] {
            assert_eq!(cipher_suite(number), name, "{number:#06x}");
        }
        for (number, name) in [
            (0, UNKNOWN),
            (1, "sect163k1"),
            (23, "secp256r1"),
            (24, "secp384r1"),
            (29, "X25519"),
            (41, "curveSM2"),
            (42, UNKNOWN),
            (256, "ffdhe2048"),
            (4588, "X25519MLKEM768"),
        ] {
            assert_eq!(group(number), name, "{number}");
        }
        assert_eq!((version(0x0300), version(0x0304), version(0x7F1C)), ("SSLv3", "TLSv1.3", UNKNOWN));
    }

    #[test]
    fn every_name_is_of_one_number() {
        for name in [cipher_suite, group] {
            let mut numbers = BTreeMap::new();
            for number in 0..=u16::MAX {
                let name = name(number);
                assert!(name == UNKNOWN || numbers.insert(name, number).is_none(), "{name} is of two numbers");
            }
            assert!(numbers.len() > 50);
        }
    }
}
