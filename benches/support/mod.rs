//! What the benches share: a throwaway authority, identities, and the CPU time of this thread.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::time::Duration;

use portcullis::clock::Clock;
use portcullis::config::schema::{Config, PostQuantum, SvidKeys, TlsConfig};
use portcullis::identity::{Identity, Svid, TrustBundles, TrustDomain};
use portcullis::policy::{Expected, Policy};
use portcullis::tls::{ClientTls, Profile, ServerTls, Trust};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

#[path = "../../src/testing.rs"]
pub mod testing;
pub use testing::Key;

pub const SERVER: &str = "spiffe://bench.example/server";
pub const CLIENT: &str = "spiffe://bench.example/client";

/// A certificate chain with its key.
pub struct Leaf {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

/// An authority with keys of one kind, and leaves of the same kind.
pub struct Ca {
    ca: testing::TestCa,
    keys: Key,
}

impl Ca {
    pub fn new(keys: Key) -> Self {
        let ca = testing::TestCa::root_with("bench.example", &testing::Spec::authority("bench.example").key(keys));
        Self { ca, keys }
    }

    pub fn der(&self) -> CertificateDer<'static> {
        self.ca.root()
    }

    pub fn issue(&self, id: &str) -> Leaf {
        let issued = self.ca.issue(&testing::Spec::leaf(id).key(self.keys).dns("localhost"));
        Leaf { chain: issued.chain.clone(), key: issued.key() }
    }

    pub fn identity(&self, leaf: &Leaf) -> Arc<Identity> {
        let mut bundles = TrustBundles::empty();
        bundles.set(TrustDomain::parse("bench.example").unwrap(), vec![self.der()]).unwrap();
        Arc::new(Identity {
            svid: Arc::new(Svid::new(leaf.chain.clone(), leaf.key.clone_key(), None).unwrap()),
            bundles: Arc::new(bundles),
            generation: 1,
        })
    }
}

/// A profile for one kind of keys and one group.
pub fn profile(keys: Key, group: &str, resumption: bool) -> Arc<Profile> {
    let config = TlsConfig {
        groups: Some(vec![group.to_owned()]),
        post_quantum: PostQuantum::Off,
        svid_keys: if keys == Key::P384 { SvidKeys::P384 } else { SvidKeys::P256Allowed },
        resumption,
        ..TlsConfig::default()
    };
    Arc::new(Profile::from_config(&config).unwrap())
}

pub fn config_yaml() -> Config {
    portcullis::config::parse(
        &format!("identity: unix:///run/x\ninbound:\n  - {{name: in, listen: '127.0.0.1:1', to: '127.0.0.1:2', allow: ['{CLIENT}']}}\n"),
        "bench",
    )
    .unwrap()
    .config
}

pub fn server_tls(profile: &Arc<Profile>, identity: &Arc<Identity>) -> Arc<ServerTls> {
    let trust = Arc::new(Trust::new(Arc::clone(&identity.bundles), Arc::clone(profile), Clock::system()).unwrap());
    let policy = Policy::compile(&config_yaml()).listener("in").unwrap();
    Arc::new(ServerTls::new(profile, identity, &trust, &policy, &Clock::system(), false, 1).unwrap())
}

pub fn client_tls(profile: &Arc<Profile>, identity: &Arc<Identity>) -> Arc<ClientTls> {
    let trust = Arc::new(Trust::new(Arc::clone(&identity.bundles), Arc::clone(profile), Clock::system()).unwrap());
    let expected = Arc::new(Expected::new("out", &[SERVER.parse().unwrap()]));
    Arc::new(ClientTls::new(profile, identity, &trust, &expected, &Clock::system(), false).unwrap())
}

/// CPU time of this thread so far.
pub fn thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap(), u32::try_from(time.tv_nsec).unwrap())
}
