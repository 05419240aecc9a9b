//! h2spec, whole, against both listeners: in plaintext with prior knowledge, and through TLS with a client certificate.

use std::net::SocketAddr;

use tokio::process::Command;

use crate::agent::{go, go_path, go_server};
use crate::harness::soon;
use crate::pair::{Pair, curl, http_origin};
use crate::testing::Spec;

/// Runs all of it: how many cases there were, and which failed with what came instead.
async fn h2spec(at: SocketAddr, report: &std::path::Path) -> (usize, Vec<String>) {
    let mut command = Command::new(go_path("h2spec"));
    command.args(["-h", "127.0.0.1", "-p", &at.port().to_string(), "-P", "/echo", "-o", "5", "-j"]).arg(report);
    command.kill_on_drop(true).stdin(std::process::Stdio::null());
    // A case that fails waits for its whole time.
    let run = tokio::time::timeout(std::time::Duration::from_secs(300), command.output());
    let said = run.await.expect("h2spec to end").unwrap();
    let text = std::fs::read_to_string(report).unwrap_or_else(|error| panic!("{error}: {said:?}"));
    let mut cases = text.split("<testcase ").skip(1).peekable();
    assert!(cases.peek().is_some(), "{said:?}");
    let (mut total, mut failed) = (0, Vec::new());
    for case in cases {
        total += 1;
        let case = case.split("</testcase>").next().unwrap();
        let attribute =
            |name: &str| case.split_once(&format!("{name}=\"")).map_or("", |(_, rest)| rest.split('"').next().unwrap());
        if case.contains("<error") || case.contains("<failure") {
            let came = case.split_once('>').map_or("", |(_, rest)| rest).trim();
            failed.push(format!("{} {}:\n{came}", attribute("package"), attribute("classname")));
        }
    }
    (total, failed)
}

fn passed((total, failed): (usize, Vec<String>)) {
    assert!(failed.is_empty(), "{} of {total} failed:\n\n{}", failed.len(), failed.join("\n\n"));
    assert_eq!(total, 145, "h2spec 2.2.1 has so many");
}

#[tokio::test]
async fn the_plaintext_listener() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    passed(h2spec(pair.address, &pair.domain.path().join("report.xml")).await);
    assert_eq!(curl(&["--http2-prior-knowledge", &format!("http://{}/echo", pair.address)]).await.status, 200);
}

#[tokio::test]
async fn the_tls_listener() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    let own = pair.domain.ca.issue(&Spec::leaf(pair.domain.id("/client")));
    let [certificate, key, authority] = pair.domain.files("h2spec", &own);
    let mut shim = go("mtls-shim");
    shim.args(["-to", &pair.server.address("in").await.to_string(), "-alpn", "h2"]);
    let (_shim, address) =
        go_server(shim.arg("-cert").arg(certificate).arg("-key").arg(key).arg("-ca").arg(authority)).await;
    let url = format!("http://{address}/echo");
    assert_eq!(soon("a request", curl(&["--http2-prior-knowledge", &url])).await.status, 200);
    passed(h2spec(address, &pair.domain.path().join("report.xml")).await);
    assert_eq!(curl(&["--http2-prior-knowledge", &url]).await.status, 200);
}
