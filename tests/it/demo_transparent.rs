//! `demo --transparent` as root runs it: the whole story, and nothing left of it, however it ends.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::Signal;
use tokio::process::Command;

use crate::agent::open_to_all;
use crate::harness::{Running, program, soon, until};
use crate::netns::{APPLICATION, to_be_had, within_reach};

/// Tells the processes of one demo from all others.
const MARK: &str = "PORTCULLIS_TEST_MARK";

/// A demo whose temporary files would be in this folder, and whose processes carry its name.
fn demo(program: impl AsRef<std::ffi::OsStr>, dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(["demo", "--transparent"]).args(arguments).current_dir(dir);
    command.env("TMPDIR", dir).env(MARK, dir).env_remove("NO_COLOR").kill_on_drop(true);
    command
}

/// The processes that were started by a demo in this folder, directly or not.
fn processes(dir: &Path) -> Vec<String> {
    let mark = format!("{MARK}={}", dir.display());
    let marked = |environment: &[u8]| environment.split(|byte| *byte == 0).any(|entry| entry == mark.as_bytes());
    let all = std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    let marked = |pid: &String| std::fs::read(format!("/proc/{pid}/environ")).is_ok_and(|read| marked(&read));
    all.filter(|name| name.parse::<u32>().is_ok()).filter(marked).collect()
}

/// The network namespaces that these are in, by number.
fn networks(processes: &[String]) -> Vec<u64> {
    let network = |pid: &String| std::fs::metadata(format!("/proc/{pid}/ns/net")).ok();
    processes.iter().filter_map(network).map(|namespace| namespace.ino()).collect()
}

/// What can be seen of a demo from outside, but for its processes; it may have been in these network namespaces.
async fn traces(networks: &[u64]) -> Vec<String> {
    let names = |path: &str| {
        let entries = std::fs::read_dir(path).into_iter().flatten();
        entries.map(|entry| entry.unwrap().path()).collect::<Vec<_>>()
    };
    let demos = ["wire", "frontend", "records", "stranger"];
    let mut traces = names("/sys/class/net");
    traces.retain(|path| demos.iter().any(|name| path.ends_with(name)));
    traces.extend(names("/run/netns").into_iter().filter(|path| {
        let namespace = std::fs::metadata(path);
        namespace.is_ok_and(|namespace| networks.contains(&namespace.ino()))
    }));
    let mut traces: Vec<_> = traces.iter().map(|path| path.display().to_string()).collect();
    let tables = Command::new("nft").args(["list", "tables"]).output().await.unwrap();
    assert!(tables.status.success(), "{tables:?}");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let texts = [mounts, String::from_utf8(tables.stdout).unwrap()];
    let of_demo = |line: &&str| line.contains("portcullis-demo") || line.ends_with("inet portcullis");
    traces.extend(texts.iter().flat_map(|text| text.lines()).filter(of_demo).map(str::to_owned));
    traces
}

/// Holds that nothing is left of a demo in this folder.
async fn nothing_left(dir: &Path, networks: &[u64]) {
    until("the demo's processes to be gone", || async { processes(dir).is_empty().then_some(()) }).await;
    assert_eq!(traces(networks).await, Vec::<String>::new());
    assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0);
}

#[tokio::test]
async fn curl_that_knows_of_nothing_tells_the_whole_story_and_nothing_is_left() {
    if !to_be_had() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let done = soon("the demo", demo(program(), dir.path(), &["--seconds", "6"]).output()).await.unwrap();
    let (out, err) = (String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap());
    assert!(done.status.success(), "{out}{err}");
    assert_eq!(err, "");
    let told: Vec<_> = out.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_digit())).collect();
    assert_eq!(told.len(), 8, "{out}");
    for (number, chapter) in told.iter().enumerate() {
        assert!(chapter.starts_with(&format!("{}. ", number + 1)), "{out}");
    }
    let lines_with = |words: &[&str]| out.lines().filter(|line| words.iter().all(|word| line.contains(word))).count();
    for (words, times) in [
        (&["the wire", "in clear: GET /records/1"][..], 1),
        (&["s  rules     /", "redirect apply: applied"], 3),
        (&["refused", "frontend: 10.77.0.2:8080/records/99", "(7) refused"], 1),
        (&["refused", "frontend: [fd00:77::2]:8080/records/99", "(7) refused"], 2),
        (&["answer", "curl http://10.77.0.2:8080/records/2", "200"], 2),
        (&["asked at 10.77.0.2:8080 by spiffe://demo.portcullis.example/frontend"], 1),
        (&["asked at [fd00:77::2]:8080 by spiffe://demo.portcullis.example/frontend"], 1),
        (&["mTLS", "TLSv1.3, "], 1),
        (&["refused", "frontend: 10.77.0.2:8080/admin", " 403 ", "no-admin"], 1),
        (&["refused", "stranger: [fd00:77::2]:8080", "denied"], 1),
        (&["refused", "outsider: 10.77.0.2:8080", "not_tls"], 1),
        (&["refused", "frontend: 10.77.0.3:8080", "undeclared"], 1),
        (&["rotated", "/records"], 1),
        (&["noticed", "/frontend", "portcullis_drift{kind=\"interception\"} 1"], 1),
        (&["kill -9"], 2),
        (&["refused", "outsider: 10.77.0.2:8080", "(7) refused"], 1),
        (&["proof", "the service heard nothing of it, and nothing of it was on the wire"], 2),
        (&["packets of TLS and 0 answers in clear"], 1),
    ] {
        let found = lines_with(words);
        assert!(found == times || (found > times && words.contains(&"rotated")), "{found} of {words:?}: {out}");
    }
    assert!(out.contains(" answered, 0 failed ") && !out.contains("NOT SEEN"), "{out}");
    assert!(!out.contains(['\x1b', '\r']), "no escape codes in a pipe");
    assert!(out.lines().all(|line| line.len() <= 98), "{out}");
    nothing_left(dir.path(), &[]).await;
}

#[tokio::test]
async fn cut_short_by_any_signal_it_leaves_nothing() {
    if !to_be_had() {
        return;
    }
    for (signal, code) in [(Signal::INT, Some(1)), (Signal::TERM, Some(1)), (Signal::KILL, None)] {
        let dir = tempfile::tempdir().unwrap();
        let mut demo = Running::start(&mut demo(program(), dir.path(), &["--seconds", "30"]));
        demo.line("the last proxy", |line| line.contains("/stranger  ecdsa").then_some(())).await;
        let running = processes(dir.path());
        // The command, the first process of its cell, and three proxies.
        assert!(running.len() >= 5, "{running:?}");
        let networks = networks(&running);
        let others: BTreeSet<_> = networks.iter().collect();
        assert!(others.len() >= 5, "the command's, the cell's and one for each pod: {others:?}");
        assert_eq!(traces(&networks).await, Vec::<String>::new(), "nothing is seen of it while it runs, either");
        demo.signal(signal);
        if code.is_some() {
            demo.line("why it ended", |line| line.contains("stopped before the story was over").then_some(())).await;
        }
        assert_eq!(demo.wait().await.code(), code, "{signal:?}");
        nothing_left(dir.path(), &networks).await;
    }
}

#[tokio::test]
async fn what_it_lacks_is_said_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    open_to_all(dir.path());
    let program = within_reach(Path::new(program()), dir.path());
    let said = async |command: &mut Command| {
        let done = soon("the refusal", command.output()).await.unwrap();
        assert_eq!((done.status.code(), done.stdout.len()), (Some(1), 0));
        String::from_utf8(done.stderr).unwrap()
    };
    let mut command = demo(&program, dir.path(), &[]);
    if rustix::process::geteuid().is_root() {
        command.uid(APPLICATION).gid(APPLICATION);
    }
    let line = "portcullis: demo --transparent makes network namespaces, and needs root for that: sudo portcullis demo \
                --transparent\n";
    assert_eq!(said(&mut command).await, line);
    if !to_be_had() {
        return;
    }
    let line = said(demo(&program, dir.path(), &[]).env("PATH", dir.path())).await;
    assert!(
        line.starts_with("portcullis: demo --transparent shows curl at work") && line.lines().count() == 1,
        "{line}"
    );
}
