//! A TLS client that presents whatever certificate it is given, also where an honest library would not.
#![allow(dead_code)]

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::aws_lc_rs as provider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::{CertifiedKey, Signer, SigningKey};
use rustls::{ClientConfig, ClientConnection, NamedGroup, RootCertStore, SignatureAlgorithm, SignatureScheme};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::harness::soon;
use crate::testing::{Issued, TestCa};

/// What a client shows: a chain, and the key it signs with.
#[derive(Debug)]
pub struct Shown {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

impl From<&Issued> for Shown {
    fn from(issued: &Issued) -> Self {
        Self { chain: issued.chain.clone(), key: issued.key() }
    }
}

impl From<Issued> for Shown {
    fn from(issued: Issued) -> Self {
        Self::from(&issued)
    }
}

#[derive(Debug)]
struct Always(Arc<CertifiedKey>);

impl ResolvesClientCert for Always {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
    fn has_certs(&self) -> bool {
        true
    }
}

/// A key that claims a scheme of the server's choice where it has none of its own: otherwise the library would keep an
/// RSA certificate to itself.
#[derive(Debug)]
struct Pretending(Arc<dyn SigningKey>);

impl SigningKey for Pretending {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let pretended = || offered.first().map(|scheme| Box::new(Nonsense(*scheme)) as Box<dyn Signer>);
        self.0.choose_scheme(offered).or_else(pretended)
    }
    fn algorithm(&self) -> SignatureAlgorithm {
        self.0.algorithm()
    }
}

#[derive(Debug)]
struct Nonsense(SignatureScheme);

impl Signer for Nonsense {
    fn sign(&self, _: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        Ok(vec![0x30, 0])
    }
    fn scheme(&self) -> SignatureScheme {
        self.0
    }
}

/// A client that trusts `ca` and shows this, or no certificate. It never resumes.
pub fn presenting(ca: &TestCa, shown: Option<Shown>) -> Arc<ClientConfig> {
    trusting(Some(ca), shown)
}

/// The same; without a `ca` it trusts nobody.
pub fn trusting(ca: Option<&TestCa>, shown: Option<Shown>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(ca) => roots.add(ca.root()).unwrap(),
        None => roots.add(TestCa::new("nobody.example").root()).unwrap(),
    }
    let mut crypto = provider::default_provider();
    // The hybrid first, as current libraries do: then no HelloRetryRequest is needed.
    crypto.kx_groups.sort_by_key(|group| group.name() != NamedGroup::X25519MLKEM768);
    let builder = ClientConfig::builder_with_provider(Arc::new(crypto))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match shown {
        Some(Shown { chain, key }) => {
            let key = Arc::new(Pretending(provider::sign::any_supported_type(&key).unwrap()));
            builder.with_client_cert_resolver(Arc::new(Always(Arc::new(CertifiedKey::new(chain, key)))))
        }
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

pub fn server_name() -> ServerName<'static> {
    ServerName::try_from("localhost").unwrap()
}

/// The first flight of such a client: a whole ClientHello in its record.
pub fn client_hello(config: &Arc<ClientConfig>) -> Vec<u8> {
    let mut bytes = Vec::new();
    ClientConnection::new(Arc::clone(config), server_name()).unwrap().write_tls(&mut bytes).unwrap();
    bytes
}

/// Has a text come back through the proxy, and ends in order.
///
/// # Errors
/// What went wrong on the way.
pub async fn echoed<S: AsyncRead + AsyncWrite + Unpin>(stream: S, config: &Arc<ClientConfig>) -> io::Result<()> {
    let text = b"a good client is served";
    let talk = async {
        let mut stream = TlsConnector::from(Arc::clone(config)).connect(server_name(), stream).await?;
        stream.write_all(text).await?;
        stream.flush().await?;
        let mut back = vec![0; text.len()];
        stream.read_exact(&mut back).await?;
        assert_eq!(back, text);
        stream.shutdown().await?;
        assert_eq!(stream.read_to_end(&mut back).await?, 0);
        Ok(())
    };
    soon("an echo through TLS", talk).await
}

/// How a client that must be refused learns of it. It sends no data: an answer to that would be a reset, which takes the
/// alert with it.
pub async fn refusal(address: SocketAddr, config: &Arc<ClientConfig>) -> io::Error {
    let talk = async {
        let stream = TcpStream::connect(address).await?;
        let mut stream = TlsConnector::from(Arc::clone(config)).connect(server_name(), stream).await?;
        stream.read_u8().await
    };
    soon("a refusal", talk).await.expect_err("a client that should have been refused")
}
