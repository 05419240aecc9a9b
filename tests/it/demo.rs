//! The demo as a user runs it: the whole story to its end, cut short by Ctrl-C, and kept running.

use std::time::Duration;

use rustix::process::Signal;
use tokio::process::Command;

use crate::harness::{Metrics, Running, get, program, soon};

/// In an empty folder of its own, which is also where temporary files would go.
fn demo(dir: &std::path::Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.arg("demo").args(arguments).current_dir(dir).env("TMPDIR", dir).env_remove("NO_COLOR");
    command.kill_on_drop(true);
    command
}

fn left_behind(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[tokio::test]
async fn the_demo_tells_its_whole_story_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let done = soon("the demo", demo(dir.path(), &["--seconds", "6"]).output()).await.unwrap();
    let (out, err) = (String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap());
    assert!(done.status.success(), "{out}{err}");
    assert_eq!(err, "");
    let told: Vec<_> = out.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_digit())).collect();
    assert_eq!(told.len(), 10, "{out}");
    for (number, chapter) in told.iter().enumerate() {
        assert!(chapter.starts_with(&format!("{}. ", number + 1)), "{out}");
    }
    for reason in ["denied", "untrusted", "unknown_trust_domain", "no_certificate", "not_tls", "no_shared_version"] {
        let refused = |line: &str| line.contains(" refused ") && line.ends_with(&format!(" {reason}"));
        assert!(out.lines().any(refused), "{reason}: {out}");
    }
    for text in ["\"caller\":\"spiffe://demo.portcullis.example/frontend\"", ": policy_changed\n", "TLSv1.3"] {
        assert!(out.contains(text), "{text}: {out}");
    }
    for (word, asked, outcome, rule) in [
        ("allowed", "GET /patients/42", "200", "read-patients"),
        ("refused", "GET /admin", "403", "no-admin"),
        ("refused", "GET /patients/../admin", "403, judged as /admin", "no-admin"),
        ("refused", "GET /patients/%2e%2e/%61dmin", "403, judged as /admin", "no-admin"),
        ("allowed", "gRPC clinic.v1.Appointments/Book", "0 OK", "book"),
        ("refused", "gRPC clinic.v1.Appointments/Purge", "7 PERMISSION_DENIED", "default: no rule"),
    ] {
        let line = format!("{word:<9} {asked:<34} {outcome:<22} {rule}");
        assert!(out.lines().any(|told| told.ends_with(&line)), "{line}: {out}");
    }
    for text in [
        ", the caller's, came through and is in the log",
        "206 requests, HTTP and gRPC, over ",
        "gRPC by status        0 1, 7 1\n",
    ] {
        assert!(out.contains(text), "{text}: {out}");
    }
    assert!(out.contains(" answered, 0 failed ") && !out.contains("NOT SEEN"), "{out}");
    assert!(!out.contains(['\x1b', '\r']), "no escape codes in a pipe");
    assert!(out.lines().all(|line| line.len() <= 98), "{out}");
    assert_eq!(left_behind(dir.path()), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn ctrl_c_ends_it_and_is_no_success() {
    let dir = tempfile::tempdir().unwrap();
    let mut demo = Running::start(&mut demo(dir.path(), &["--seconds", "600"]));
    demo.line("the first answer", |line| line.contains(" answer ").then_some(())).await;
    demo.signal(Signal::INT);
    demo.line("why it ended", |line| line.contains("stopped before the story was over").then_some(())).await;
    assert_eq!(demo.wait().await.code(), Some(1));
    assert_eq!(left_behind(dir.path()), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn kept_running_it_serves_what_it_prints_until_ctrl_c() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("sidecars.log");
    let mut demo = Running::start(&mut demo(dir.path(), &["--seconds", "5", "--keep", "--log", "sidecars.log"]));
    let host = |line: &str| line.trim().strip_prefix("curl http://")?.split('/').next()?.parse().ok();
    let frontend = demo.line("a line to try", |line| line.contains("as /frontend").then(|| host(line))?).await;
    let web = demo.line("a line about HTTP", |line| line.contains("HTTP, as /web").then(|| host(line))?).await;
    let admin = demo.line("the metrics", |line| line.contains("/metrics").then(|| host(line))?).await;
    let (status, answer) = soon("an answer", get(frontend, "/records/7")).await.unwrap();
    assert_eq!(status, 200);
    assert!(answer.contains("/records/7"), "{answer}");
    for (path, status, what) in [("/patients/42", 200, "/web\""), ("/admin", 403, "Forbidden"), ("/", 403, "Forbidden")]
    {
        let answer = soon(path, get(web, path)).await.unwrap();
        assert!(answer.0 == status && answer.1.contains(what), "{path}: {answer:?}");
    }
    let metrics = Metrics::parse(&soon("the metrics", get(admin, "/metrics")).await.unwrap().1);
    let done = [("direction", "inbound"), ("result", "success")];
    assert!(metrics.sum("portcullis_tls_handshakes_total", &done) >= 1.0);
    demo.signal(Signal::INT);
    let ended = tokio::time::timeout(Duration::from_secs(20), demo.wait()).await.unwrap();
    assert!(ended.success(), "{:?}", demo.heard());
    assert_eq!(left_behind(dir.path()), std::slice::from_ref(&log));
    let log = std::fs::read_to_string(log).unwrap();
    for text in ["\"peer\":\"spiffe://demo.portcullis.example/frontend\"", "\"rule\":\"no-admin\"", "\"grpc_status\":7"]
    {
        assert!(log.contains(text), "{text}");
    }
}
