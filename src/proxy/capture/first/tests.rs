use bytes_of::*;
use tokio::io::{AsyncWriteExt, duplex};

use super::*;

const ALL: Wants = Wants { server_name: true, host: true };
const WITHIN: Duration = Duration::from_secs(1);

/// Bytes that clients say.
mod bytes_of {
    use std::sync::Arc;

    use super::*;

    /// The ClientHello of a real client.
    pub(super) fn tls(name: &str) -> Vec<u8> {
        let roots = rustls::RootCertStore::empty();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = rustls::pki_types::ServerName::try_from(name.to_owned()).unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    /// What a real client says before it hears anything.
    pub(super) async fn http2(uri: &str) -> Vec<u8> {
        let (near, mut far) = duplex(64 * 1024);
        let (mut send, connection) = h2::client::handshake(near).await.unwrap();
        let request = http::Request::get(uri).header("x-long", "y".repeat(300)).body(()).unwrap();
        let _response = send.send_request(request, true).unwrap();
        let mut connection = pin!(connection);
        let mut said = Vec::new();
        std::future::poll_fn(|cx| {
            let _ = connection.as_mut().poll(cx);
            let mut buffer = vec![0; 64 * 1024];
            let mut read = ReadBuf::new(&mut buffer);
            while Pin::new(&mut far).poll_read(cx, &mut read).is_ready() && !read.filled().is_empty() {
                said.extend_from_slice(read.filled());
                read.clear();
                let _ = connection.as_mut().poll(cx);
            }
            Poll::Ready(())
        })
        .await;
        said
    }
}

async fn heard(bytes: &[u8], wants: Wants) -> First {
    let (mut near, mut far) = duplex(64 * 1024);
    near.write_all(bytes).await.unwrap();
    let (first, seen) = read(&mut far, wants, WITHIN, 4096).await.unwrap();
    assert!(bytes.starts_with(&seen), "what was read is given on as it was");
    drop(near);
    // The same byte by byte, with a pause after each.
    let (mut near, mut far) = duplex(1);
    let feed = async {
        for byte in bytes {
            near.write_all(&[*byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        std::future::pending::<()>().await;
    };
    let slow = tokio::select! {
        slow = read(&mut far, wants, WITHIN, 4096) => slow.unwrap(),
        () = feed => unreachable!(),
    };
    assert_eq!(slow.0, first, "{}", bytes.escape_ascii());
    first
}

fn http(host: &str) -> First {
    First::Http { host: Some(host.into()) }
}

#[tokio::test(start_paused = true)]
async fn the_host_of_a_request_is_found_where_it_stands() {
    for (request, host) in [
        ("GET / HTTP/1.1\r\nHost: records.example\r\n\r\n", "records.example"),
        ("GET / HTTP/1.1\r\nAccept: */*\r\nhOST:\tRecords.Example.:8080 \r\n\r\nbody", "records.example"),
        ("\r\nGET / HTTP/1.1\nHost: records.example\n\n", "records.example"),
        ("GET http://records.example/x HTTP/1.1\r\nHost: other.example\r\n\r\n", "records.example"),
        ("CONNECT records.example:443 HTTP/1.1\r\nHost: other.example\r\n\r\n", "records.example"),
        ("GET / HTTP/1.1\r\nHost: [fd00::1]:80\r\n\r\n", "[fd00::1]"),
        ("GET / HTTP/1.1\r\nHost: 192.0.2.1\r\n\r\n", "192.0.2.1"),
    ] {
        assert_eq!(heard(request.as_bytes(), ALL).await, http(host), "{request}");
    }
    for request in [
        "GET / HTTP/1.0\r\nAccept: */*\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: \r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: never.ends",
        &format!("GET / HTTP/1.1\r\nX: {}\r\nHost: too.late\r\n\r\n", "x".repeat(5000)),
    ] {
        assert_eq!(heard(request.as_bytes(), ALL).await, First::Http { host: None }, "{request}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_host_of_http2_is_found_behind_its_compression() {
    for uri in ["http://records.example/x", "http://Records.example:8080/"] {
        assert_eq!(heard(&http2(uri).await, ALL).await, http("records.example"));
    }
    let mut cut = http2("http://records.example/x").await;
    cut.truncate(cut.len() - 1);
    assert_eq!(heard(&cut, ALL).await, First::Http { host: None });
    let bad = [&PREFACE[..], &[0, 0, 1, 1, 0, 0, 0, 0, 1, 0x82], &[0, 0, 1, 0, 0, 0, 0, 0, 1, 0]].concat();
    assert_eq!(heard(&bad, ALL).await, First::Http { host: None });
    let endless = [&PREFACE[..], &[0, 0, 0, 4, 0, 0, 0, 0, 0].repeat(1000)].concat();
    assert_eq!(heard(&endless, ALL).await, First::Http { host: None });
}

#[tokio::test(start_paused = true)]
async fn the_server_name_of_tls_is_found_however_it_is_cut() {
    let hello = tls("Records.example");
    let expected = First::Tls { server_name: Some("records.example".into()) };
    assert_eq!(heard(&hello, ALL).await, expected);
    let message = &hello[5..];
    for size in [1, 40, 700] {
        let cut: Vec<u8> = message
            .chunks(size)
            .flat_map(|chunk| [&[22, 3, 1][..], &u16::try_from(chunk.len()).unwrap().to_be_bytes(), chunk].concat())
            .collect();
        assert_eq!(heard(&cut, ALL).await, expected, "{size}");
    }
    assert_eq!(heard(&tls("192.0.2.1"), ALL).await, First::Tls { server_name: None });
    assert_eq!(heard(&hello[..200], ALL).await, First::Tls { server_name: None });
}

#[tokio::test(start_paused = true)]
async fn nothing_is_read_for_what_nobody_asks() {
    let host = Wants { host: true, ..Wants::default() };
    let name = Wants { server_name: true, ..Wants::default() };
    assert_eq!(heard(&tls("records.example")[..20], host).await, First::Tls { server_name: None });
    assert_eq!(heard(b"GET / HTTP/1.1\r\n", name).await, First::Http { host: None });
    assert_eq!(heard(b"EHLO mail.example\r\n", ALL).await, First::Other);
    let (_near, mut far) = duplex(1);
    assert_eq!(read(&mut far, ALL, WITHIN, 4096).await.unwrap(), (First::Silent, Vec::new()));
}
