//! Envoy as the HTTP peer on the other side of the mTLS, in both directions, in HTTP/1.1 and in HTTP/2: requests, bodies,
//! trailers, streams, gRPC and WebSocket, with nothing between the two that only Portcullis knows.

use std::net::SocketAddr;

use crate::agent::{go, go_server};
use crate::envoy::Envoy;
use crate::harness::{Domain, Proxy};
use crate::pair::{Extra, Pair, Way, all_well, curl, http_origin, requests_seen};

/// What Envoy speaks inside TLS: ALPN, and its word for the codec.
const VERSIONS: [(&str, &str, &str); 2] =
    [("http/1.1", "http_protocol_options", "HTTP/1.1"), ("h2", "http2_protocol_options", "HTTP/2.0")];

/// Of Go's scenarios, those that do not ask Envoy for more than it does by default: it answers a full-duplex HTTP/1.1
/// exchange and an endless upload as it likes, and limits heads to 60 KiB.
pub const SCENARIOS: &str = "get,head,post,empty_post,chunked,expect_continue,statuses,keep_alive,parallel,streamed_response,big_upload,big_download,abort,cancel,headers";

/// Envoy before Portcullis: the domain, the server's sidecar, and where clients connect.
async fn envoy_first(origin: SocketAddr, alpn: &str, codec: &str, identity: &str) -> (Domain, Proxy, Envoy) {
    let domain = Domain::new("a.example");
    let extra = Extra { inbound: "http: { forward_client_cert: set }", ..Extra::default() };
    let server = Proxy::start(domain.path(), "server", &Pair::inbound(&domain, origin, extra)).await;
    server.ready().await;
    let expect = domain.id("/server");
    let values = [("CURVES", "X25519MLKEM768, P-384"), ("EXPECT", &*expect), ("CODEC", codec), ("ALPN", alpn)];
    let envoy = Envoy::start_with(&domain, "http-client.yaml", identity, server.address("in").await, &values).await;
    (domain, server, envoy)
}

/// Portcullis before Envoy. It takes whatever of both versions the client's sidecar offers, or one.
async fn envoy_last(origin: SocketAddr, alpn: &str, identity: &str) -> (Domain, Proxy, Envoy, SocketAddr) {
    let domain = Domain::new("a.example");
    let allow = domain.id("/client");
    let values = [("CURVES", "X25519MLKEM768, P-384"), ("ALLOW", &*allow), ("ALPN", alpn)];
    let envoy = Envoy::start_with(&domain, "http-server.yaml", identity, origin, &values).await;
    let client = Proxy::start(domain.path(), "client", &Pair::outbound(&domain, envoy.address, Extra::default())).await;
    client.ready().await;
    let address = client.address("out").await;
    (domain, client, envoy, address)
}

pub async fn go_client(to: SocketAddr, protocol: &str, scenarios: &str) {
    let to = to.to_string();
    let arguments = ["client", "-to", &to, "-protocol", protocol, "-scenarios", scenarios, "-big", "8388608"];
    all_well(go("http-peer").args(arguments)).await;
}

#[tokio::test]
async fn envoy_as_the_client() {
    let (_origin, at) = http_origin().await;
    for (alpn, codec, version) in VERSIONS {
        let (domain, mut server, envoy) = envoy_first(at, alpn, codec, "/client").await;
        for protocol in ["http/1.1", "h2"] {
            go_client(envoy.address, protocol, SCENARIOS).await;
        }
        if alpn == "h2" {
            go_client(envoy.address, "h2", "trailers,duplex").await;
        }
        let answer = curl(&[
            "-H",
            "x-forwarded-client-cert: URI=spiffe://a.example/admin",
            &format!("http://{}/echo", envoy.address),
        ])
        .await;
        let seen: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!(seen["protocol"], version, "the version that Envoy speaks: {seen}");
        let field = seen["headers"]["X-Forwarded-Client-Cert"].to_string();
        assert!(field.contains(&format!("URI={}", domain.id("/client"))) && !field.contains("/admin"), "{seen}");
        let line = server.request("a request", |_| true).await;
        assert_eq!(line["peer"], domain.id("/client"), "{line}");
        envoy.counts("ssl.versions.TLSv1.3").await;
    }
}

#[tokio::test]
async fn envoy_as_the_server() {
    let (_origin, at) = http_origin().await;
    for alpn in ["h2, http/1.1", "h2", "http/1.1"] {
        let (domain, mut client, envoy, address) = envoy_last(at, alpn, "/server").await;
        for protocol in ["http/1.1", "h2"] {
            go_client(address, protocol, SCENARIOS).await;
        }
        for version in ["--http1.1", "--http2-prior-knowledge"] {
            let answer = curl(&[version, &format!("http://{address}/echo")]).await;
            assert_eq!(answer.status, 200, "{alpn} {version}: {answer:?}");
            // What Envoy has verified: it sees the sidecar, and no field that only sidecars understand reaches it.
            assert!(answer.body.contains(&format!("URI={}", domain.id("/client"))), "{alpn} {version}: {answer:?}");
            let seen: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
            let names = seen["headers"].as_object().unwrap().keys().map(|name| name.to_lowercase());
            assert!(!names.into_iter().any(|name| name.starts_with("portcullis")), "{alpn} {version}: {seen}");
        }
        let line = client.request("a request", |_| true).await;
        assert_eq!(line["peer"], domain.id("/server"), "{line}");
        envoy.counts("ssl.versions.TLSv1.3").await;
    }
}

#[tokio::test]
async fn grpc_with_envoy_in_both_places() {
    let (_origin, at) = crate::grpc::grpc_origin().await;
    let (_domain, _server, envoy) = envoy_first(at, "h2", "http2_protocol_options", "/client").await;
    assert_eq!(crate::grpc::cases(envoy.address, "all").await.len(), 14);
    let (_domain, _client, _envoy, address) = envoy_last(at, "h2, http/1.1", "/server").await;
    assert_eq!(crate::grpc::cases(address, "all").await.len(), 14);
}

#[tokio::test]
async fn websocket_with_envoy_in_both_places() {
    let (_origin, at) = go_server(go("websocket-peer").arg("server")).await;
    let (_domain, _server, envoy) = envoy_first(at, "http/1.1", "http_protocol_options", "/client").await;
    all_well(go("websocket-peer").args(["client", "-to", &envoy.address.to_string()])).await;
    let (_domain, _client, _envoy, address) = envoy_last(at, "http/1.1", "/server").await;
    all_well(go("websocket-peer").args(["client", "-to", &address.to_string()])).await;
}

#[tokio::test]
async fn an_envoy_that_is_somebody_else_gets_nothing() {
    let (_origin, at) = http_origin().await;
    let request = "GET /echo HTTP/1.1\r\nHost: a.example";
    for (alpn, codec, _) in VERSIONS {
        let (_domain, server, envoy) = envoy_first(at, alpn, codec, "/other").await;
        let answer = Way::Plain(envoy.address).request(request).await;
        assert!([403, 502, 503].contains(&answer.status), "{answer:?}");
        let denied = [("direction", "inbound"), ("reason", "denied")];
        server.metric_reaches("portcullis_tls_handshakes_total", &denied, 1.0).await;
    }
    let (_domain, client, _envoy, address) = envoy_last(at, "h2, http/1.1", "/other").await;
    let answer = Way::Plain(address).request(request).await;
    assert!([502, 503].contains(&answer.status) && answer.header("portcullis-reason").is_some(), "{answer:?}");
    let wrong = [("direction", "outbound"), ("reason", "wrong_peer")];
    client.metric_reaches("portcullis_tls_handshakes_total", &wrong, 1.0).await;
    assert_eq!(requests_seen(at).await, 0);
}
