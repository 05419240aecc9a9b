//! Those who must not get in, each with what they try. What the refused sidecar says of it is read from its metrics.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::authority::IssuedSvid;

/// How long anybody waits to be refused.
const PATIENCE: Duration = Duration::from_secs(5);
const REQUEST: &[u8] = b"GET /records/1 HTTP/1.1\r\nHost: records\r\nConnection: close\r\n\r\n";
/// A suite of the incident that the profile answers: TLS_RSA_WITH_3DES_EDE_CBC_SHA.
const TRIPLE_DES: u16 = 0x000A;

/// What somebody got who should have got nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Got {
    /// Nothing; how it ended, in words.
    Nothing(String),
    /// Bytes of the workload, or silence where a refusal belongs.
    Something(String),
}

/// Speaks plain HTTP to an address.
pub(super) async fn plain_http(address: SocketAddr) -> Got {
    bounded(async { Ok(exchange(TcpStream::connect(address).await?, REQUEST).await) }).await
}

/// Speaks TLS to an address, with a certificate or without one, and trusts these authorities as any TLS client would.
pub(super) async fn tls(address: SocketAddr, roots: &[CertificateDer<'static>], own: Option<&IssuedSvid>) -> Got {
    bounded(async {
        let connector = TlsConnector::from(Arc::new(client(roots, own).map_err(io::Error::other)?));
        let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
        let stream = connector.connect(name, TcpStream::connect(address).await?).await?;
        Ok(exchange(stream, REQUEST).await)
    })
    .await
}

/// Sends a ClientHello that offers TLS 1.0 to 1.2 and nothing but 3DES with RSA key exchange.
pub(super) async fn triple_des(address: SocketAddr) -> Got {
    bounded(async { Ok(exchange(TcpStream::connect(address).await?, &old_hello()).await) }).await
}

async fn bounded(attempt: impl Future<Output = io::Result<Got>>) -> Got {
    match tokio::time::timeout(PATIENCE, attempt).await {
        Ok(Ok(got)) => got,
        Ok(Err(error)) => Got::Nothing(in_words(&error)),
        Err(_) => Got::Something("no refusal in time".into()),
    }
}

async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &[u8]) -> Got {
    let mut answer = Vec::new();
    let told = async {
        stream.write_all(request).await?;
        stream.flush().await?;
        (&mut stream).take(64 * 1024).read_to_end(&mut answer).await
    }
    .await;
    let alert = matches!(answer.as_slice(), [0x15, 3, _, 0, 2, ..]);
    match told {
        _ if alert => Got::Nothing("a TLS alert".into()),
        _ if !answer.is_empty() => Got::Something(String::from_utf8_lossy(&answer).into_owned()),
        Ok(_) => Got::Nothing("closed".into()),
        Err(error) => Got::Nothing(in_words(&error)),
    }
}

fn in_words(error: &io::Error) -> String {
    let text = error.to_string();
    match text.strip_prefix("received fatal alert: ") {
        Some(alert) => format!("alert {alert}"),
        None => text,
    }
}

fn client(roots: &[CertificateDer<'static>], own: Option<&IssuedSvid>) -> Result<ClientConfig, rustls::Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone())?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(store);
    match own {
        None => Ok(builder.with_no_client_auth()),
        Some(svid) => {
            let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(svid.key_pkcs8().to_vec()));
            builder.with_client_auth_cert(svid.chain().to_vec(), key)
        }
    }
}

/// A ClientHello by RFC 5246, section 7.4.1.2, in one record.
fn old_hello() -> Vec<u8> {
    // supported_versions: TLS 1.2, 1.1, 1.0; signature_algorithms: rsa_pkcs1_sha1, ecdsa_sha1.
    let extensions = [0, 43, 0, 7, 6, 3, 3, 3, 2, 3, 1, 0, 13, 0, 6, 0, 4, 2, 1, 2, 3];
    let mut body = vec![0x03, 0x03];
    body.extend([0x5a; 32]);
    body.push(0);
    body.extend([0, 2]);
    body.extend(TRIPLE_DES.to_be_bytes());
    body.extend([1, 0]);
    body.extend(u16::try_from(extensions.len()).unwrap_or(0).to_be_bytes());
    body.extend(extensions);
    let framed = |mut head: Vec<u8>, body: Vec<u8>| {
        head.extend(u16::try_from(body.len()).unwrap_or(0).to_be_bytes());
        head.extend(body);
        head
    };
    framed(vec![0x16, 0x03, 0x01], framed(vec![1, 0], body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_hello_offers_what_it_says() {
        let weak = crate::tls::hello::offered_weak(&old_hello());
        assert_eq!(weak, ["TLSv1.0", "TLSv1.1", "3DES", "RSA_KEY_EXCHANGE"]);
    }
}
