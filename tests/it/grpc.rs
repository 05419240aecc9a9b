//! grpc-go's own interoperability cases through two sidecars: unary and all kinds of streams, deadlines, cancellation,
//! metadata, and status in trailers.

use serde_json::Value;

use crate::agent::{go, go_server};
use crate::harness::{Running, free_port};
use crate::pair::{Extra, Pair, all_well};

pub const CASES: [&str; 14] = [
    "empty_unary",
    "large_unary",
    "client_streaming",
    "server_streaming",
    "ping_pong",
    "empty_stream",
    "timeout_on_sleeping_server",
    "cancel_after_begin",
    "cancel_after_first_response",
    "custom_metadata",
    "status_code_and_message",
    "special_status_message",
    "unimplemented_method",
    "unimplemented_service",
];

pub async fn grpc_origin() -> (Running, std::net::SocketAddr) {
    go_server(&mut go("grpc-interop-server")).await
}

/// The cases that passed, with what they brought.
pub async fn cases(to: std::net::SocketAddr, names: &str) -> Vec<Value> {
    let to = to.to_string();
    let lines = all_well(go("grpc-interop-client").args(["-to", &to, "-cases", names])).await;
    lines.into_iter().filter(|line| line["event"] == "passed").collect()
}

#[tokio::test]
async fn all_standard_cases() {
    let (_origin, at) = grpc_origin().await;
    let mut pair = Pair::plain(at).await;
    // Each on a channel of its own: a failure then names the case.
    for case in CASES {
        assert_eq!(cases(pair.address, case).await.len(), 1, "{case}");
    }
    // And all on one channel, several times over.
    for _ in 0..3 {
        assert_eq!(cases(pair.address, "all").await.len(), CASES.len());
    }
    let line = pair.server.request("a call", |line| line["path"] == "/grpc.testing.TestService/EmptyCall").await;
    assert_eq!(
        (&line["method"], &line["status"], &line["grpc_status"]),
        (&"POST".into(), &200.into(), &0.into()),
        "{line}"
    );
    let line = pair.server.request("an unknown method", |line| line["grpc_status"] == 12).await;
    assert_eq!(line["cause"], "done", "an answer of the origin is no failure of ours: {line}");
    assert_eq!(pair.server.metrics().await.sum("portcullis_http_requests_in_flight", &[]), 0.0);
}

#[tokio::test]
async fn a_denied_call_is_permission_denied() {
    let (_origin, at) = grpc_origin().await;
    let policy = "policy:\n  rules:\n    - name: unary-only\n      from: ['spiffe://a.example/client']\n      to: [in]\n      http:\n        - grpc: { service: grpc.testing.TestService, method: EmptyCall }\n";
    let mut pair = Pair::start(at, Extra { server: policy, ruled: true, ..Extra::default() }).await;
    cases(pair.address, "empty_unary").await;
    let denied = &cases(pair.address, "status").await[0];
    assert_eq!((&denied["code"], &denied["status"]), (&7.into(), &"PermissionDenied".into()), "{denied}");
    let message = denied["message"].as_str().unwrap();
    assert!(!message.contains("spiffe://") && !message.contains("unary-only"), "no secrets: {message}");
    let line = pair.server.request("the denial", |line| line["cause"] == "denied").await;
    assert_eq!(line["path"], "/grpc.testing.TestService/UnaryCall", "{line}");
    assert_eq!(line["grpc_status"], 7, "{line}");
    // A stream as well, and the channel goes on.
    let denied = &cases(pair.address, "hold,empty_unary").await[0];
    assert_eq!(denied["code"], 7, "{denied}");
}

#[tokio::test]
async fn a_workload_that_is_gone_is_unavailable() {
    let nobody = ([127, 0, 0, 1], free_port().await).into();
    let pair = Pair::plain(nobody).await;
    let answer = &cases(pair.address, "status").await[0];
    assert_eq!(answer["code"], 14, "{answer}");
    assert!(pair.server.stop().await.success());
    let answer = &cases(pair.address, "status").await[0];
    assert_eq!(answer["code"], 14, "{answer}");
}
