//! The crypto profile: declared once, and the only thing that rustls configurations are built from.

use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::aws_lc_rs::{self as provider, cipher_suite, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup, WebPkiSupportedAlgorithms};
use rustls::{CipherSuite, NamedGroup, ProtocolVersion, SignatureScheme, SupportedCipherSuite};
use webpki::aws_lc_rs as algorithms;

use super::flight::Picked;
use super::iana;
use super::record::Negotiated;
use crate::config::schema::{PostQuantum, SvidKeys, TlsConfig};
use crate::identity::KeyType;

/// TLS 1.3 suites that a profile may name: IANA name and the provider's implementation.
const SUITES: [(&str, SupportedCipherSuite); 2] = [
    ("TLS_AES_256_GCM_SHA384", cipher_suite::TLS13_AES_256_GCM_SHA384),
    ("TLS_CHACHA20_POLY1305_SHA256", cipher_suite::TLS13_CHACHA20_POLY1305_SHA256),
];

/// Groups that a profile may name.
const GROUPS: [(&str, &dyn SupportedKxGroup); 3] =
    [("X25519MLKEM768", kx_group::X25519MLKEM768), ("secp384r1", kx_group::SECP384R1), ("X25519", kx_group::X25519)];

/// What a certificate chain may be signed with, and what a peer may sign a handshake with.
///
/// The list for handshakes holds P-256 even where only P-384 is declared: a peer that is told it cannot sign sends no
/// certificate, or an alert without a cause, and its operator learns nothing. The verifier refuses the P-256 *key*
/// before any signature counts, and says why.
static P384: WebPkiSupportedAlgorithms = WebPkiSupportedAlgorithms {
    all: &[algorithms::ECDSA_P384_SHA384],
    mapping: &[
        (SignatureScheme::ECDSA_NISTP384_SHA384, &[algorithms::ECDSA_P384_SHA384]),
        (SignatureScheme::ECDSA_NISTP256_SHA256, &[algorithms::ECDSA_P256_SHA256]),
    ],
};
static P384_AND_P256: WebPkiSupportedAlgorithms = WebPkiSupportedAlgorithms {
    all: &[
        algorithms::ECDSA_P384_SHA384,
        algorithms::ECDSA_P256_SHA256,
        algorithms::ECDSA_P384_SHA256,
        algorithms::ECDSA_P256_SHA384,
    ],
    mapping: P384.mapping,
};

/// A declared profile with the two providers built from it.
#[derive(Clone, Debug)]
pub struct Profile {
    strict: Arc<CryptoProvider>,
    legacy: Arc<CryptoProvider>,
    suites: Vec<&'static str>,
    groups: Vec<&'static str>,
    keys: SvidKeys,
    /// Whether sessions may be resumed.
    pub resumption: bool,
    /// From accept (or the TCP connection to an upstream) to the finished handshake.
    pub handshake_timeout: Duration,
    /// Handshakes under way at once.
    pub max_handshakes: usize,
}

/// The declared profile cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProfileError(String);

impl std::fmt::Display for ProfileError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ProfileError {}

impl Profile {
    /// Builds the profile.
    ///
    /// # Errors
    /// A name outside what is allowed (with the list), or FIPS mode asked for and not there.
    pub fn from_config(config: &TlsConfig) -> Result<Self, ProfileError> {
        let suites = pick("tls.cipher_suites", &config.cipher_suites, &SUITES)?;
        let groups = match &config.groups {
            Some(names) => pick("tls.groups", names, &GROUPS)?,
            None => {
                let default: &[&str] = match config.post_quantum {
                    PostQuantum::Prefer => &["X25519MLKEM768", "secp384r1"],
                    PostQuantum::Require => &["X25519MLKEM768"],
                    PostQuantum::Off => &["secp384r1"],
                };
                pick("tls.groups", &default.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>(), &GROUPS)?
            }
        };
        let keys = config.svid_keys;
        let algorithms = match keys {
            SvidKeys::P384 => P384,
            SvidKeys::P256Allowed => P384_AND_P256,
        };
        let base = provider::default_provider();
        let strict = CryptoProvider {
            cipher_suites: suites.iter().map(|(_, suite)| *suite).collect(),
            kx_groups: groups.iter().map(|(_, group)| *group).collect(),
            signature_verification_algorithms: algorithms,
            ..base
        };
        let mut legacy = strict.clone();
        legacy.cipher_suites.push(cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384);
        // TLS 1.2 knows no group but secp384r1 in this profile, so X25519 goes where TLS 1.2 may be negotiated.
        legacy.kx_groups.retain(|group| group.name() != NamedGroup::X25519);
        if !legacy.kx_groups.iter().any(|group| group.name() == NamedGroup::secp384r1) {
            legacy.kx_groups.push(kx_group::SECP384R1);
        }
        let profile = Self {
            strict: Arc::new(strict),
            legacy: Arc::new(legacy),
            suites: suites.into_iter().map(|(name, _)| name).collect(),
            groups: groups.into_iter().map(|(name, _)| name).collect(),
            keys,
            resumption: config.resumption,
            handshake_timeout: config.handshake_timeout.0,
            max_handshakes: config.max_handshakes,
        };
        if config.fips && !profile.strict.fips() {
            return Err(ProfileError(
                "tls.fips: the profile does not run in FIPS mode: build with `--features fips` and declare neither \
                 TLS_CHACHA20_POLY1305_SHA256 nor X25519"
                    .into(),
            ));
        }
        Ok(profile)
    }

    /// The provider for a listener or upstream.
    pub(super) fn provider(&self, legacy_tls12: bool) -> Arc<CryptoProvider> {
        Arc::clone(if legacy_tls12 { &self.legacy } else { &self.strict })
    }

    /// Protocol versions for a listener or upstream.
    pub(super) fn versions(legacy_tls12: bool) -> &'static [&'static rustls::SupportedProtocolVersion] {
        static STRICT: [&rustls::SupportedProtocolVersion; 1] = [&rustls::version::TLS13];
        static LEGACY: [&rustls::SupportedProtocolVersion; 2] = [&rustls::version::TLS13, &rustls::version::TLS12];
        if legacy_tls12 { &LEGACY } else { &STRICT }
    }

    /// Signature algorithms for handshakes and chains.
    pub(super) fn algorithms(&self) -> WebPkiSupportedAlgorithms {
        self.strict.signature_verification_algorithms
    }

    /// Which keys SVIDs may have.
    pub fn keys(&self) -> SvidKeys {
        self.keys
    }

    /// Whether a key of this type is declared.
    pub fn allows_key(&self, key: KeyType) -> bool {
        key == KeyType::P384 || (key == KeyType::P256 && self.keys == SvidKeys::P256Allowed)
    }

    /// IANA names of the TLS 1.3 suites, in order of preference.
    pub fn suites(&self) -> &[&'static str] {
        &self.suites
    }

    /// IANA names of the groups, in order of preference.
    pub fn groups(&self) -> &[&'static str] {
        &self.groups
    }

    /// Whether the provider runs in FIPS mode with this profile.
    pub fn fips(&self) -> bool {
        self.strict.fips()
    }

    /// Whether what was negotiated lies within the declared profile: computed from the names alone, so that it tells
    /// the truth about the configuration that really served.
    pub fn is_compliant(&self, legacy_tls12: bool, negotiated: &Negotiated) -> bool {
        let crypto = match negotiated.version {
            "TLSv1.3" => {
                self.suites.contains(&negotiated.cipher_suite)
                    && (self.groups.contains(&negotiated.group) || (legacy_tls12 && negotiated.group == "secp384r1"))
            }
            "TLSv1.2" => {
                legacy_tls12
                    && negotiated.cipher_suite == "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"
                    && matches!(negotiated.group, "secp384r1" | "none")
            }
            _ => false,
        };
        let signature = match negotiated.signature {
            "ecdsa_secp384r1_sha384" | "none" => true,
            "ecdsa_secp256r1_sha256" => self.keys == SvidKeys::P256Allowed,
            _ => false,
        };
        crypto && signature && self.allows_key(negotiated.peer_key)
    }
}

impl Profile {
    /// Whether what the server of a watched connection has picked lies within the declared profile. By names alone, as
    /// above; its certificate is not seen.
    pub fn allows_picked(&self, legacy_tls12: bool, picked: &Picked) -> bool {
        match picked.version {
            "TLSv1.3" => self.suites.contains(&picked.cipher_suite) && self.groups.contains(&picked.group),
            "TLSv1.2" => {
                legacy_tls12
                    && picked.cipher_suite == "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"
                    && matches!(picked.group, "secp384r1" | iana::NO_GROUP)
            }
            _ => false,
        }
    }
}

/// Finds each name in the table, in the order of the names. OpenSSL writes the TLS 1.3 suites as IANA does.
fn pick<T: Copy, const N: usize>(
    key: &str,
    names: &[String],
    table: &[(&'static str, T); N],
) -> Result<Vec<(&'static str, T)>, ProfileError> {
    let allowed = || table.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    if names.is_empty() {
        return Err(ProfileError(format!("{key}: at least one is needed; allowed are {}", allowed())));
    }
    let mut picked: Vec<(&'static str, T)> = Vec::with_capacity(names.len());
    for name in names {
        let Some(entry) = table.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)) else {
            return Err(ProfileError(format!("{key}: '{name}' is outside the profile; allowed are {}", allowed())));
        };
        if picked.iter().all(|(known, _)| known != &entry.0) {
            picked.push(*entry);
        }
    }
    Ok(picked)
}

/// The name of a version as metrics and logs have it.
pub(super) fn version_name(version: Option<ProtocolVersion>) -> &'static str {
    match version {
        Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
        Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
        _ => "unknown",
    }
}

/// The IANA name of a suite.
pub(super) fn suite_name(suite: Option<CipherSuite>) -> &'static str {
    match suite {
        Some(CipherSuite::TLS13_AES_256_GCM_SHA384) => "TLS_AES_256_GCM_SHA384",
        Some(CipherSuite::TLS13_CHACHA20_POLY1305_SHA256) => "TLS_CHACHA20_POLY1305_SHA256",
        Some(CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384) => "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
        _ => "unknown",
    }
}

/// The IANA name of a group. A session resumed in TLS 1.2 has none of its own.
pub(super) fn group_name(group: Option<NamedGroup>) -> &'static str {
    match group {
        Some(NamedGroup::X25519MLKEM768) => "X25519MLKEM768",
        Some(NamedGroup::secp384r1) => "secp384r1",
        Some(NamedGroup::X25519) => "X25519",
        Some(_) => "unknown",
        None => "none",
    }
}

/// The IANA name of a signature scheme; `none` when nothing was signed (resumption).
pub(super) fn scheme_name(scheme: Option<SignatureScheme>) -> &'static str {
    match scheme {
        Some(SignatureScheme::ECDSA_NISTP384_SHA384) => "ecdsa_secp384r1_sha384",
        Some(SignatureScheme::ECDSA_NISTP256_SHA256) => "ecdsa_secp256r1_sha256",
        Some(_) => "unknown",
        None => "none",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(change: impl FnOnce(&mut TlsConfig)) -> Result<Profile, ProfileError> {
        let mut config = TlsConfig::default();
        change(&mut config);
        Profile::from_config(&config)
    }

    #[test]
    fn the_default_is_the_table_of_the_design() {
        let profile = with(|_| ()).unwrap();
        assert_eq!(profile.suites(), ["TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"]);
        assert_eq!(profile.groups(), ["X25519MLKEM768", "secp384r1"]);
        let suites: Vec<_> = profile.provider(false).cipher_suites.iter().map(|s| s.suite()).collect();
        assert_eq!(suites, [CipherSuite::TLS13_AES_256_GCM_SHA384, CipherSuite::TLS13_CHACHA20_POLY1305_SHA256]);
        let legacy: Vec<_> = profile.provider(true).cipher_suites.iter().map(|s| s.suite()).collect();
        assert_eq!(legacy.last(), Some(&CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384));
        assert_eq!(legacy.len(), 3);
    }

    #[test]
    fn anything_else_is_refused_with_the_list() {
        let error = with(|c| c.cipher_suites = vec!["TLS_RSA_WITH_3DES_EDE_CBC_SHA".into()]).unwrap_err();
        assert!(error.to_string().contains("TLS_AES_256_GCM_SHA384, TLS_CHACHA20_POLY1305_SHA256"), "{error}");
        let error = with(|c| c.groups = Some(vec!["secp256r1".into()])).unwrap_err();
        assert!(error.to_string().contains("X25519MLKEM768, secp384r1, X25519"), "{error}");
    }

    #[test]
    fn post_quantum_decides_the_groups_and_tls12_never_gets_x25519() {
        assert_eq!(with(|c| c.post_quantum = PostQuantum::Require).unwrap().groups(), ["X25519MLKEM768"]);
        assert_eq!(with(|c| c.post_quantum = PostQuantum::Off).unwrap().groups(), ["secp384r1"]);
        let profile = with(|c| c.groups = Some(vec!["X25519".into()])).unwrap();
        let groups: Vec<_> = profile.provider(true).kx_groups.iter().map(|g| g.name()).collect();
        assert_eq!(groups, [NamedGroup::secp384r1]);
    }
}
