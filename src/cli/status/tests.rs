use super::*;
use crate::admin::{Readiness, Server, Sources};
use serde_json::json;

/// Runs the command against an admin server with this state: exit code, output, complaint.
fn run(state: Value, output: Output) -> (String, Result<ExitCode, Failure>) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(Server::bind("127.0.0.1:0".parse().unwrap())).unwrap();
    let admin = server.local_addr();
    runtime.spawn(server.run(Sources {
        readiness: Readiness::default(),
        metrics: Box::new(|| ("text/plain", String::new())),
        state: Box::new(move || state.clone()),
        alive: Box::new(|| Box::pin(async { true })),
    }));
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let outcome = status(&StatusArgs { admin, output }, &mut Streams { out: &mut out, err: &mut err });
    (String::from_utf8(out).unwrap(), outcome)
}

fn state(ready: bool) -> Value {
    json!({
        "version": "1.2.3",
        "ready": ready,
        "waiting_for": if ready { json!([]) } else { json!(["identity"]) },
        "identity": { "state": "fresh", "spiffe_id": "spiffe://td/a", "not_after": 1_800_000_000_u64, "why": "" },
        "listeners": [{ "name": "api\u{1b}[2J", "direction": "inbound", "address": "captured", "serving": ready }],
        "plaintext": [{
            "port": 8080, "listener": "api", "plaintext": "audit", "answer": "no: 5 let through",
            "callers": (0..5).map(|n| json!({
                "address": format!("10.0.0.{n}"), "let_through": 1, "refused": 0, "last_seen": 1_700_000_000_u64
            })).collect::<Vec<_>>(),
        }],
        "interception": {
            "checked": 1, "whole": false,
            "findings": { "own_address_ipv4": { "verdict": "not_checked", "detail": "this host has none" } },
        },
        "drift": [{ "kind": "interception", "since": 1_700_000_000_u64, "evidence": ["it is gone"], "remedy": "apply" }],
        "sandbox": { "mode": "prefer", "seccomp": { "in_force": true }, "landlock": { "in_force": false, "why": "old" } },
        "acceleration": { "mode": "auto", "active": false, "refused": ["splice: nothing was read"] },
        "config": { "anything": "else" },
    })
}

#[test]
fn a_ready_proxy_is_told_of_in_words_and_one_that_waits_fails() {
    let (out, outcome) = run(state(true), Output::Text);
    assert_eq!(outcome, Ok(ExitCode::SUCCESS));
    for expected in [
        "proxy\n  ready\n",
        "spiffe://td/a (fresh)",
        "expires 2027-01-15T08:00:00Z (in ",
        "inbound api [2J: captured, serving",
        "port 8080 (api, plaintext: audit): safe to go strict? no: 5 let through",
        "10.0.0.0: 1 let through, 0 refused, last 2023-11-14T22:13:20Z (",
        "and 2 more callers",
        "broken: run `portcullis redirect verify`\n  own address ipv4: not checked: this host has none",
        "interception since 2023-11-14T22:13:20Z (",
        "    it is gone\n",
        "in force: seccomp\n  without landlock: old\n",
        "refused: splice: nothing was read",
    ] {
        assert!(out.contains(expected), "{expected}: {out}");
    }
    let (out, outcome) = run(state(false), Output::Text);
    assert_eq!(outcome, Ok(ExitCode::FAILURE));
    assert!(out.contains("not ready, waiting for: identity") && out.contains("not serving"), "{out}");
}

#[test]
fn a_program_gets_the_same_parts_of_the_state_as_they_are() {
    let (out, outcome) = run(state(false), Output::Json);
    assert_eq!(outcome, Ok(ExitCode::FAILURE));
    let mut expected = state(false);
    expected.as_object_mut().unwrap().remove("config");
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap(), expected);
}

#[test]
fn whatever_is_no_proxy_is_said_with_what_to_do() {
    let (out, outcome) = run(json!({ "hello": 1 }), Output::Text);
    let failure = outcome.unwrap_err();
    assert!(out.is_empty() && failure.code == 1 && failure.message.contains("is no portcullis"), "{failure:?}");
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let args = StatusArgs { admin: gone, output: Output::Text };
    let failure = status(&args, &mut Streams { out: &mut out, err: &mut err }).unwrap_err();
    let said = &failure.message;
    assert!(failure.code == 1 && said.contains("refused") && said.contains("portcullis run"), "{said}");
}

#[tokio::test(start_paused = true)]
async fn a_proxy_that_does_not_answer_is_not_waited_for_without_end() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let why = state_of(silent.local_addr().unwrap()).await.unwrap_err();
    assert!(why.contains("no answer within 5 seconds"), "{why}");
}
