//! `portcullis authority` serves clients that nobody here wrote: go-spiffe gets SVIDs and bundles from it, only what the
//! caller is entitled to, and is told of every change on the open stream.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::Value;

use crate::agent::{Agent, domains, entry, event, go_path, heard, open_to_all, own_uid, run};
use crate::harness::{Running, until};

fn config(domain: &str, more: &str, entries: &str) -> String {
    format!("trust_domain: {domain}\n{more}entries:\n{entries}")
}

fn lab(entries: &str) -> String {
    config("lab.example", "", entries)
}

fn ids(update: &Value) -> Vec<&str> {
    update["svids"]
        .as_array()
        .map(|svids| svids.iter().map(|s| s["id"].as_str().unwrap()).collect())
        .unwrap_or_default()
}

/// A copy of the go-spiffe watcher that every user may run.
fn watcher_at(path: &Path) {
    std::fs::copy(go_path("spiffe-watch"), path).unwrap();
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
}

#[tokio::test]
async fn go_spiffe_gets_svids_and_bundles_in_each_of_its_ways() {
    let dir = tempfile::tempdir().unwrap();
    let entries = entry("spiffe://lab.example/web", &own_uid(), ", hint: internal, dns: [web.lab.example]")
        + &entry("spiffe://lab.example/second", &own_uid(), ", ttl: 10m");
    let agent = Agent::start(dir.path(), "lab", &lab(&entries)).await;
    for way in [&["-updates", "1"][..], &["-updates", "1", "-source"]] {
        let (code, lines) = run(&mut agent.go("spiffe-watch", way)).await;
        assert_eq!(code, 0, "{lines:?}");
        let update = event(&lines, "update");
        let svid = &update["svids"][0];
        assert_eq!(svid["id"], "spiffe://lab.example/web");
        assert_eq!(svid["hint"], "internal");
        assert_eq!(svid["key_type"], "ecdsa P-384", "{svid}");
        assert_eq!(svid["verified"], true, "{svid}");
        assert!(svid["signed_with"].as_str().unwrap().contains("SHA384"), "{svid}");
        assert_eq!(domains(update), ["lab.example"]);
        assert_eq!(update["bundles"][0]["authorities"], 1);
    }
    let (_, lines) = run(&mut agent.go("spiffe-watch", &["-updates", "1"])).await;
    assert_eq!(ids(event(&lines, "update")), ["spiffe://lab.example/web", "spiffe://lab.example/second"]);
    let (code, lines) = run(&mut agent.go("spiffe-watch", &["-updates", "1", "-bundles"])).await;
    assert_eq!(code, 0, "{lines:?}");
    assert_eq!(domains(event(&lines, "update")), ["lab.example"]);
    let (code, lines) = run(&mut agent.go("spiffe-watch", &["-raw", "-header", "true"])).await;
    let raw = event(&lines, "raw");
    assert_eq!((code, &raw["code"]), (0, &Value::from("OK")), "{raw}");
    assert_eq!(raw["svids"][0]["key_is_pkcs8"], true, "{raw}");
    assert_eq!((&raw["svids"][0]["chain"], &raw["svids"][0]["bundle"]), (&1.into(), &1.into()), "{raw}");
    agent.stop().await;
}

#[tokio::test]
async fn a_call_without_the_security_header_is_refused_and_jwt_is_not_offered() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path(), "lab", &lab(&entry("spiffe://lab.example/web", &own_uid(), ""))).await;
    let code_of = async |arguments: &[&str]| {
        let (_, lines) = run(agent.go("spiffe-watch", &["-raw"]).args(arguments)).await;
        event(&lines, "raw")["code"].as_str().unwrap().to_owned()
    };
    for rpc in ["FetchX509SVID", "FetchX509Bundles"] {
        assert_eq!(code_of(&["-rpc", rpc, "-header", "true"]).await, "OK", "{rpc}");
        assert_eq!(code_of(&["-rpc", rpc]).await, "InvalidArgument", "{rpc}");
        assert_eq!(code_of(&["-rpc", rpc, "-header", "false"]).await, "InvalidArgument", "{rpc}");
    }
    for rpc in ["FetchJWTSVID", "FetchJWTBundles", "ValidateJWTSVID"] {
        assert_eq!(code_of(&["-rpc", rpc, "-header", "true"]).await, "Unimplemented", "{rpc}");
    }
}

#[tokio::test]
async fn a_caller_that_no_entry_fits_is_refused_until_one_is_added() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = Agent::start(dir.path(), "lab", &lab(&entry("spiffe://lab.example/no", "pid: 1", ""))).await;
    let mut watcher = Running::start(&mut agent.go("spiffe-watch", &["-updates", "1"]));
    let refusal = heard(&mut watcher, "a refusal", |line| line["event"] == "error").await;
    assert_eq!(refusal["code"], "PermissionDenied", "{refusal}");
    agent.reload(&lab(&entry("spiffe://lab.example/web", &own_uid(), ""))).await;
    let update = heard(&mut watcher, "an SVID", |line| line["event"] == "update").await;
    assert_eq!(ids(&update), ["spiffe://lab.example/web"]);
    assert!(watcher.wait().await.success());
}

#[tokio::test]
async fn an_entry_that_goes_away_ends_the_stream_of_its_caller() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = Agent::start(dir.path(), "lab", &lab(&entry("spiffe://lab.example/web", &own_uid(), ""))).await;
    let mut watcher = Running::start(&mut agent.go("spiffe-watch", &["-timeout", "25s"]));
    heard(&mut watcher, "an SVID", |line| line["event"] == "update").await;
    agent.reload(&lab(&entry("spiffe://lab.example/other", "pid: 1", ""))).await;
    let refusal = heard(&mut watcher, "a refusal", |line| line["event"] == "error").await;
    assert_eq!(refusal["code"], "PermissionDenied", "{refusal}");
}

#[tokio::test]
async fn selectors_of_user_and_group() {
    let dir = tempfile::tempdir().unwrap();
    open_to_all(dir.path());
    let program = dir.path().join("watcher");
    watcher_at(&program);
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let entries = entry("spiffe://lab.example/uid", &format!("uid: {uid}"), "")
        + &entry("spiffe://lab.example/gid", &format!("gid: {gid}"), "")
        + &entry("spiffe://lab.example/both", &format!("uid: {uid}, gid: {gid}"), "")
        + &entry("spiffe://lab.example/other-uid", "uid: 65534", "")
        + &entry("spiffe://lab.example/other-gid", "gid: 65534", "")
        + &entry("spiffe://lab.example/mixed", &format!("uid: {uid}, gid: 65534"), "");
    let agent = Agent::start(dir.path(), "lab", &lab(&entries)).await;
    let seen = async |user: Option<(u32, u32)>| {
        let mut command = tokio::process::Command::new(&program);
        command.arg("-socket").arg(&agent.socket).args(["-updates", "1", "-timeout", "20s"]);
        if let Some((uid, gid)) = user {
            command.uid(uid).gid(gid);
        }
        let (_, lines) = run(&mut command).await;
        ids(event(&lines, "update")).iter().map(|id| id.rsplit('/').next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(seen(None).await, ["uid", "gid", "both"]);
    // Only root can be somebody else.
    if uid == 0 {
        assert_eq!(seen(Some((65534, 65534))).await, ["other-uid", "other-gid"]);
        assert_eq!(seen(Some((65534, gid))).await, ["gid", "other-uid"]);
        assert_eq!(seen(Some((uid, 65534))).await, ["uid", "other-gid", "mixed"]);
    }
}

#[tokio::test]
async fn selectors_of_process_and_executable() {
    let dir = tempfile::tempdir().unwrap();
    let [one, other] = ["one", "other"].map(|name| dir.path().join(name));
    watcher_at(&one);
    watcher_at(&other);
    let by_path = entry("spiffe://lab.example/path", &format!("path: {}", one.display()), "");
    let mut agent = Agent::start(dir.path(), "lab", &lab(&by_path)).await;
    let start = |program: &Path| {
        let mut command = tokio::process::Command::new(program);
        command.arg("-socket").arg(&agent.socket).args(["-timeout", "25s"]);
        Running::start(&mut command)
    };
    let (mut fits, mut differs) = (start(&one), start(&other));
    let update = heard(&mut fits, "an SVID", |line| line["event"] == "update").await;
    assert_eq!(ids(&update), ["spiffe://lab.example/path"]);
    let refusal = heard(&mut differs, "a refusal", |line| line["event"] == "error").await;
    assert_eq!(refusal["code"], "PermissionDenied");

    // The other way round by process ID, and with a second selector that does not fit.
    let pid = differs.child.id().unwrap();
    let by_pid = entry("spiffe://lab.example/pid", &format!("pid: {pid}"), "")
        + &entry("spiffe://lab.example/both", &format!("pid: {pid}, path: {}", one.display()), "");
    agent.reload(&lab(&by_pid)).await;
    let update = heard(&mut differs, "an SVID", |line| line["event"] == "update").await;
    assert_eq!(ids(&update), ["spiffe://lab.example/pid"]);
    let refusal = heard(&mut fits, "a refusal", |line| line["event"] == "error").await;
    assert_eq!(refusal["code"], "PermissionDenied");
}

#[tokio::test]
async fn svids_of_a_few_seconds_rotate_on_the_stream() {
    let dir = tempfile::tempdir().unwrap();
    let entries = entry("spiffe://lab.example/web", &own_uid(), ", ttl: 2s");
    let agent = Agent::start(dir.path(), "lab", &lab(&entries)).await;
    let (code, lines) = run(&mut agent.go("spiffe-watch", &["-updates", "4"])).await;
    assert_eq!(code, 0, "{lines:?}");
    let of = |name: &str| lines.iter().map(|u| u["svids"][0][name].clone()).collect::<Vec<_>>();
    let serials: std::collections::HashSet<_> = of("serial").iter().map(Value::to_string).collect();
    assert_eq!(serials.len(), 4, "{lines:?}");
    assert!(lines.iter().all(|line| line["event"] == "update"), "one stream carried them all: {lines:?}");
    assert!(of("verified").iter().all(|verified| *verified == true), "{lines:?}");
    let ends: Vec<_> = of("not_after_unix").iter().map(|end| end.as_i64().unwrap()).collect();
    assert!(ends.is_sorted() && ends.first() < ends.last(), "{ends:?}");
}

async fn bundle(agent: &Agent) -> Value {
    let (_, lines) = run(&mut agent.go("spiffe-watch", &["-updates", "1", "-bundles"])).await;
    event(&lines, "update")["bundles"].clone()
}

#[tokio::test]
async fn a_ca_outlives_a_restart_in_its_state_directory_and_only_there() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let entries = entry("spiffe://lab.example/web", &own_uid(), "");
    let kept = config("lab.example", &format!("state_dir: {}\n", state.display()), &entries);
    let first = Agent::start(dir.path(), "kept", &kept).await;
    let (ca, before) = (first.ca.clone(), bundle(&first).await);
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&state), 0o700);
    let files: Vec<_> = std::fs::read_dir(&state).unwrap().map(|file| file.unwrap().path()).collect();
    assert!(!files.is_empty());
    for file in files {
        assert_eq!(mode(&file), 0o600, "{}", file.display());
    }
    first.stop().await;
    let second = Agent::start(dir.path(), "kept", &kept).await;
    assert_eq!(second.ca, ca);
    assert_eq!(bundle(&second).await, before);
    second.stop().await;

    let memory = lab(&entries);
    let first = Agent::start(dir.path(), "memory", &memory).await;
    let (ca, before) = (first.ca.clone(), bundle(&first).await);
    first.stop().await;
    let second = Agent::start(dir.path(), "memory", &memory).await;
    assert_ne!(second.ca, ca);
    assert_ne!(bundle(&second).await, before);
}

#[tokio::test]
async fn a_state_directory_that_others_may_read_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    std::fs::set_permissions(&state, PermissionsExt::from_mode(0o755)).unwrap();
    let path = dir.path().join("authority.yaml");
    let text = format!(
        "trust_domain: lab.example\nsocket: {}\nstate_dir: {}\n",
        dir.path().join("s.sock").display(),
        state.display()
    );
    std::fs::write(&path, text).unwrap();
    let mut command = tokio::process::Command::new(crate::harness::program());
    let mut running = Running::start(command.arg("authority").arg("--config").arg(&path));
    running.line("the reason", |line| line.contains("authority state").then_some(())).await;
    assert!(!running.wait().await.success());
}

#[tokio::test]
async fn a_bundle_file_that_a_reload_names_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = Agent::start(dir.path(), "lab", &lab(&entry("spiffe://lab.example/web", &own_uid(), ""))).await;
    for name in ["one.json", "other.json"] {
        let file = dir.path().join(name);
        let more = format!("bundle_file: {}\n", file.display());
        agent.reload(&config("lab.example", &more, &entry("spiffe://lab.example/web", &own_uid(), ""))).await;
        until("the bundle file", async || {
            let document: Value = serde_json::from_slice(&std::fs::read(&file).ok()?).ok()?;
            (document["keys"].as_array()?.len() == 1).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn two_authorities_federate_by_their_bundle_files() {
    let dir = tempfile::tempdir().unwrap();
    let file = |domain: &str| dir.path().join(format!("{domain}.json"));
    let federated = |own: &str, other: &str| {
        let more =
            format!("bundle_file: {}\nfederates_with: {{ {other}: {} }}\n", file(own).display(), file(other).display());
        config(own, &more, &entry(&format!("spiffe://{own}/web"), &own_uid(), ""))
    };
    // The first one starts before the other's file exists, and finds it when it comes.
    let a = Agent::start(dir.path(), "a", &federated("a.example", "b.example")).await;
    let mut watcher = Running::start(&mut a.go("spiffe-watch", &["-timeout", "29s"]));
    let update = heard(&mut watcher, "an SVID", |line| line["event"] == "update").await;
    assert_eq!(domains(&update), ["a.example"]);
    let b = Agent::start(dir.path(), "b", &federated("b.example", "a.example")).await;
    heard(&mut watcher, "the other's bundle", |line| domains(line) == ["a.example", "b.example"]).await;
    let of_a = until("both bundles", async || {
        let bundles = bundle(&a).await;
        (bundles.as_array()?.len() == 2).then_some(bundles)
    })
    .await;
    assert_eq!(bundle(&b).await, of_a, "both know the same two bundles");
    for (agent, domain) in [(&a, "a.example"), (&b, "b.example")] {
        let (_, lines) = run(&mut agent.go("spiffe-watch", &["-raw", "-header", "true"])).await;
        let other = if domain == "a.example" { "spiffe://b.example" } else { "spiffe://a.example" };
        assert_eq!(event(&lines, "raw")["federated_bundles"], serde_json::json!({ other: 1 }));
    }
}
