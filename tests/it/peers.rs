//! The programs at either end, against each other with no sidecar between: what they hold against a proxy must be true of
//! them, and a machine on which they do not work shows here first. Between two Envoys as well, so that a difference is
//! ours.

use tokio::process::Command;

use crate::agent::{go, go_server};
use crate::envoy::Envoy;
use crate::envoy_http::{SCENARIOS, go_client};
use crate::harness::{Domain, tool};
use crate::pair::{Way, all_well, curl, http_origin, requests_seen};
use crate::testing::Spec;

#[tokio::test]
async fn http_clients_and_the_origin() {
    let (_origin, at) = http_origin().await;
    let address = at.to_string();
    for protocol in ["http/1.1", "h2"] {
        let lines = all_well(go("http-peer").args(["client", "-to", &address, "-protocol", protocol])).await;
        assert_eq!(lines.len(), 20);
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/client.py");
    for kind in ["stdlib", "httpx-h1", "httpx-h2"] {
        let mut client = Command::new(tool("PORTCULLIS_TEST_PYTHON", "python3"));
        client.env("PYTHONPATH", tool("PORTCULLIS_TEST_PYTHON_PACKAGES", ""));
        all_well(client.args([script, &address, kind])).await;
    }
    assert!(requests_seen(at).await > 300);
    let answer = Way::Plain(at).request("GET /a/../b//c%2e HTTP/1.1\r\nHost: a.example").await;
    assert_eq!(answer.json()["target"], "/a/../b//c%2e", "the origin cleans nothing up: {answer:?}");
}

#[tokio::test]
async fn grpc_and_websocket() {
    let (_origin, at) = crate::grpc::grpc_origin().await;
    assert_eq!(crate::grpc::cases(at, "all").await.len(), 14);
    assert_eq!(crate::grpc::cases(at, "status").await[0]["code"], 0);
    let (_origin, at) = go_server(go("websocket-peer").arg("server")).await;
    all_well(go("websocket-peer").args(["client", "-to", &at.to_string()])).await;
}

#[tokio::test]
async fn between_two_envoys() {
    let (_origin, at) = http_origin().await;
    let (_calls, calls_at) = crate::grpc::grpc_origin().await;
    let (_sockets, sockets_at) = go_server(go("websocket-peer").arg("server")).await;
    for (alpn, codec) in [("http/1.1", "http_protocol_options"), ("h2", "http2_protocol_options")] {
        for (kind, origin) in [("http", at), ("grpc", calls_at), ("websocket", sockets_at)] {
            let domain = Domain::new("a.example");
            let (client, server) = (domain.id("/client"), domain.id("/server"));
            let values = [("CURVES", "P-384"), ("ALLOW", &*client), ("ALPN", "h2, http/1.1")];
            let last = Envoy::start_with(&domain, "http-server.yaml", "/server", origin, &values).await;
            let values = [("CURVES", "P-384"), ("EXPECT", &*server), ("CODEC", codec), ("ALPN", alpn)];
            let first = Envoy::start_with(&domain, "http-client.yaml", "/client", last.address, &values).await;
            match kind {
                "http" => {
                    for protocol in ["http/1.1", "h2"] {
                        go_client(first.address, protocol, SCENARIOS).await;
                    }
                    if alpn == "h2" {
                        go_client(first.address, "h2", "trailers,duplex").await;
                    }
                    let answer = curl(&[&format!("http://{}/echo", first.address)]).await;
                    assert!(answer.body.contains(&format!("URI={client}")), "{answer:?}");
                }
                // Of a call that is cancelled at once, two Envoys sometimes deliver the answer all the same.
                "grpc" if alpn == "h2" => {
                    let cases = "empty_unary,large_unary,client_streaming,server_streaming,ping_pong,empty_stream,status_code_and_message";
                    assert_eq!(crate::grpc::cases(first.address, cases).await.len(), 7);
                }
                "websocket" if alpn != "h2" => {
                    all_well(go("websocket-peer").args(["client", "-to", &first.address.to_string()])).await;
                }
                _ => {}
            }
        }
    }
}

#[tokio::test]
async fn the_shim_carries_http_2_with_a_client_certificate() {
    let (_origin, at) = http_origin().await;
    let domain = Domain::new("a.example");
    let client = domain.id("/client");
    let values = [("CURVES", "P-384"), ("ALLOW", &*client), ("ALPN", "h2")];
    let envoy = Envoy::start_with(&domain, "http-server.yaml", "/server", at, &values).await;
    let own = domain.ca.issue(&Spec::leaf(&*client));
    let [certificate, key, authority] = domain.files("shim", &own);
    let mut shim = go("mtls-shim");
    shim.args(["-to", &envoy.address.to_string()]);
    let (_shim, address) =
        go_server(shim.arg("-cert").arg(certificate).arg("-key").arg(key).arg("-ca").arg(authority)).await;
    let answer = curl(&["--http2-prior-knowledge", &format!("http://{address}/echo")]).await;
    assert!(answer.status == 200 && answer.body.contains(&client), "{answer:?}");
}
