//! The names of suites and groups that the crypto profile knows, and nothing beyond it.
//!
//! In: a name as a user writes it, in the IANA or the OpenSSL form. Out: the IANA name. TLS 1.2's only suite is not
//! listed in a config; a listener's `legacy_tls12: true` implies it.

use super::schema::{PostQuantum, TlsConfig};

/// AES in TLS 1.3.
pub const TLS13_AES: &str = "TLS_AES_256_GCM_SHA384";
/// ChaCha20 in TLS 1.3; not approved by FIPS.
pub const TLS13_CHACHA: &str = "TLS_CHACHA20_POLY1305_SHA256";
/// The one suite of TLS 1.2 (OpenSSL: `ECDHE-ECDSA-AES256-GCM-SHA384`).
pub const TLS12_SUITE: &str = "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384";
/// The hybrid post-quantum group.
pub const HYBRID: &str = "X25519MLKEM768";
/// The approved curve (OpenSSL: `P-384`).
pub const P384: &str = "secp384r1";
/// The curve that must be asked for; not approved by FIPS.
pub const X25519: &str = "X25519";

/// The suites that `tls.cipher_suites` may name, IANA form.
pub const CIPHER_SUITES: &[&str] = &[TLS13_AES, TLS13_CHACHA];
/// The groups that `tls.groups` may name, IANA form.
pub const GROUPS: &[&str] = &[HYBRID, P384, X25519];

/// The IANA name of a TLS 1.3 suite of the profile; none for every other. OpenSSL writes these two alike.
pub fn cipher_suite(name: &str) -> Option<&'static str> {
    CIPHER_SUITES.iter().find(|suite| suite.eq_ignore_ascii_case(name)).copied()
}

/// The IANA name of the TLS 1.2 suite if `name` is one of its two names.
pub fn tls12_suite(name: &str) -> Option<&'static str> {
    [TLS12_SUITE, "ECDHE-ECDSA-AES256-GCM-SHA384"]
        .iter()
        .any(|suite| suite.eq_ignore_ascii_case(name))
        .then_some(TLS12_SUITE)
}

/// The IANA name of a group of the profile; none for every other. OpenSSL also writes `P-384` and ignores case.
pub fn group(name: &str) -> Option<&'static str> {
    if name.eq_ignore_ascii_case("P-384") {
        return Some(P384);
    }
    GROUPS.iter().find(|group| group.eq_ignore_ascii_case(name)).copied()
}

/// The groups that a declared profile means, in order of preference, IANA names.
pub fn effective_groups(tls: &TlsConfig) -> Vec<&'static str> {
    match (&tls.groups, tls.post_quantum) {
        (Some(groups), _) => groups.iter().filter_map(|name| group(name)).collect(),
        (None, PostQuantum::Prefer) => vec![HYBRID, P384],
        (None, PostQuantum::Require) => vec![HYBRID],
        (None, PostQuantum::Off) => vec![P384],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_give_the_iana_name_and_nothing_else_has_one() {
        assert_eq!(cipher_suite("TLS_AES_256_GCM_SHA384"), Some(TLS13_AES));
        assert_eq!(tls12_suite("ECDHE-ECDSA-AES256-GCM-SHA384"), Some(TLS12_SUITE));
        assert_eq!(tls12_suite(TLS12_SUITE), Some(TLS12_SUITE));
        assert_eq!(group("P-384"), Some(P384));
        assert_eq!(group("x25519mlkem768"), Some(HYBRID));
        for name in ["TLS_AES_128_GCM_SHA256", "AES256-SHA", "", "secp256r1", "P-256", "SecP256r1MLKEM768"] {
            assert_eq!((cipher_suite(name), group(name)), (None, None), "{name}");
        }
    }

    #[test]
    fn groups_follow_post_quantum_unless_written() {
        let with = |post_quantum, groups: Option<&[&str]>| {
            let groups = groups.map(|g| g.iter().map(|&s| s.to_owned()).collect());
            effective_groups(&TlsConfig { post_quantum, groups, ..TlsConfig::default() })
        };
        assert_eq!(with(PostQuantum::Prefer, None), [HYBRID, P384]);
        assert_eq!(with(PostQuantum::Require, None), [HYBRID]);
        assert_eq!(with(PostQuantum::Off, None), [P384]);
        assert_eq!(with(PostQuantum::Prefer, Some(&["P-384", "x25519"])), [P384, X25519]);
    }
}
