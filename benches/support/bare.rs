//! The bare library: what any program would write with tokio-rustls alone.

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs as provider};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::{Ca, Leaf};

fn only(group: &str) -> Arc<CryptoProvider> {
    let mut only = provider::default_provider();
    only.cipher_suites = vec![provider::cipher_suite::TLS13_AES_256_GCM_SHA384];
    only.kx_groups = vec![match group {
        "X25519MLKEM768" => provider::kx_group::X25519MLKEM768,
        "secp384r1" => provider::kx_group::SECP384R1,
        _ => provider::kx_group::X25519,
    }];
    Arc::new(only)
}

fn roots(ca: &Ca) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(ca.der()).unwrap();
    roots
}

pub fn server_config(ca: &Ca, leaf: &Leaf, group: &str) -> Arc<ServerConfig> {
    let provider = only(group);
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots(ca)), Arc::clone(&provider)).build().unwrap();
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(leaf.chain.clone(), leaf.key.clone_key())
        .unwrap();
    Arc::new(config)
}

pub fn client_config(ca: &Ca, leaf: &Leaf, group: &str, resume: bool) -> Arc<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(only(group))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots(ca))
        .with_client_auth_cert(leaf.chain.clone(), leaf.key.clone_key())
        .unwrap();
    if !resume {
        config.resumption = rustls::client::Resumption::disabled();
    }
    Arc::new(config)
}
