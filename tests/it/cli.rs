//! The commands as a user runs them: exit codes, errors with file, line and column, and what is generated.

use std::path::{Path, PathBuf};

use tokio::net::TcpListener;
use tokio::process::Command;

use crate::harness::{Domain, Proxy, Running, echo, inbound_listener, output, portcullis, program, succeeds};

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The YAML files of a folder of the repository.
fn yaml(folder: &str) -> Vec<PathBuf> {
    let files = std::fs::read_dir(root(folder)).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = files.filter(|file| file.extension().is_some_and(|end| end == "yaml")).collect();
    files.sort();
    files
}

/// Whether it is the proxy's config, as its first line says to editors; the authority has one of its own.
fn is_proxy_config(file: &Path) -> bool {
    std::fs::read_to_string(file).unwrap().lines().next().unwrap().ends_with("portcullis.schema.json")
}

#[tokio::test]
async fn check_accepts_every_config_that_is_shipped() {
    let files = [yaml("config"), yaml("examples")].concat();
    let (proxy, others): (Vec<_>, Vec<_>) = files.iter().partition(|file| is_proxy_config(file));
    assert!(proxy.len() >= 7, "{proxy:?}");
    assert_eq!(others, [&root("examples/authority.yaml")]);
    for file in &proxy {
        let file = file.to_str().unwrap();
        let (code, out, err) = portcullis(&["check", "--no-files", file]).await;
        assert_eq!((code, err.as_str()), (0, ""), "{file}");
        assert!(out.starts_with(&format!("{file}: ok\n")), "{out}");
    }
    // All at once; one bad file among them makes the whole bad, and the others are reported all the same.
    let mut arguments = vec!["check", "--no-files"];
    arguments.extend(proxy.iter().map(|file| file.to_str().unwrap()));
    assert_eq!(portcullis(&arguments).await.1.matches(": ok\n").count(), proxy.len());
    arguments.insert(2, "/nowhere/at/all.yaml");
    let (code, out, err) = portcullis(&arguments).await;
    assert_eq!((code, out.matches(": ok\n").count()), (1, proxy.len()));
    assert!(err.starts_with("/nowhere/at/all.yaml: ") && err.lines().count() == 1, "{err}");
}

#[tokio::test]
async fn errors_name_file_line_and_column() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bad.yaml");
    let name = file.to_str().unwrap();
    let good = "identity: unix:///run/agent.sock\ninbound:\n  - name: in\n    listen: 127.0.0.1:8443\n    to: 127.0.0.1:80\n    allow: [spiffe://a.example/x]\n";
    for (text, lines) in [
        (good.replace("allow", "alow"), vec!["6:5: unknown key 'alow'"]),
        (good.replace("to: 127.0.0.1:80", "to: 192.0.2.1:80"), vec!["5:9: 192.0.2.1:80 may be on another machine"]),
        (good.replace("spiffe://a.example/x", "spiffe://a.example/x*"), vec!["6:13: 'spiffe://a.example/x*'"]),
        (format!("{good}tls: {{ cipher_suites: [TLS_AES_128_GCM_SHA256] }}\n"), vec!["7:24: cipher suite"]),
        (format!("{good}tls: {{ groups: [secp256r1] }}\n"), vec!["7:17: group 'secp256r1' is outside the profile"]),
        (
            format!("{good}connections: {{ max: 0 }}\ndrain_timeout: 11000d\n"),
            vec!["7:21: 0 is not", "8:16: longer than"],
        ),
        ("inbound: [\n".to_owned(), vec!["1:10: unclosed bracket '['"]),
        (String::new(), vec!["1:1: the file says nothing"]),
    ] {
        std::fs::write(&file, &text).unwrap();
        for command in [&["check", "--no-files", name][..], &["run", "--config", name]] {
            let (code, out, err) = portcullis(command).await;
            assert_eq!((code, out.as_str()), (1, ""), "{text}");
            assert_eq!(err.lines().count(), lines.len(), "one line for each error: {err}");
            for (line, expected) in err.lines().zip(&lines) {
                assert!(line.starts_with(&format!("{name}:{expected}")), "{line}\n{expected}");
            }
        }
    }
}

#[tokio::test]
async fn check_looks_for_the_files_that_a_config_names() {
    let domain = Domain::new("a.example");
    let config =
        domain.identity("/server") + &inbound_listener("in", ([127, 0, 0, 1], 80).into(), &domain.id("/x"), "");
    let file = domain.path().join("server.yaml");
    std::fs::write(&file, config).unwrap();
    let name = file.to_str().unwrap();
    let (code, out, err) = portcullis(&["check", name]).await;
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("inbound in: mTLS on 127.0.0.1:0 → 127.0.0.1:80, for spiffe://a.example/x"), "{out}");
    std::fs::remove_file(domain.path().join("server.key")).unwrap();
    let (code, _, err) = portcullis(&["check", name]).await;
    assert_eq!(code, 1);
    assert!(err.starts_with(&format!("{name}:4:10: ")) && err.contains("server.key"), "{err}");
    assert_eq!(portcullis(&["check", "--no-files", name]).await.0, 0);
}

#[tokio::test]
async fn what_is_not_understood_is_exit_code_two() {
    for arguments in [
        &[][..],
        &["fly"],
        &["run"],
        &["check"],
        &["run", "--confg", "x"],
        &["completions", "cobol"],
        &["status", "--admin", "nowhere"],
        &["explain", "--config", "x", "--from", "spiffe://a.example", "--to", "in"],
        &["explain", "--config", "x", "--from", "spiffe://a.example/x*", "--to", "in"],
    ] {
        let (code, out, err) = portcullis(arguments).await;
        assert_eq!((code, out.as_str()), (2, ""), "{arguments:?}");
        assert!(!err.is_empty());
    }
    let sidecar = root("config/sidecar.yaml");
    for (to, words) in [("records", "is an outbound listener"), ("nowhere", "there are: api (8443)")] {
        let asked = ["explain", "--config", sidecar.to_str().unwrap(), "--from", "spiffe://a.example/x", "--to", to];
        let (code, _, err) = portcullis(&asked).await;
        assert!(code == 2 && err.contains(words), "{err}");
    }
}

#[tokio::test]
async fn status_tells_of_a_running_proxy_and_fails_until_it_is_ready() {
    let domain = Domain::new("a.example");
    let workload = echo().await;
    let listener = inbound_listener("in", workload.address, &domain.id("/client"), "");
    let absent = "identity: { workload_api: { address: 'unix:///nowhere/agent.sock' } }\n";
    let waiting = Proxy::start(domain.path(), "waiting", &format!("{absent}{listener}")).await;
    let admin = waiting.admin.to_string();
    let (code, out, err) = portcullis(&["status", "--admin", &admin]).await;
    assert_eq!((code, err.as_str()), (1, ""));
    assert!(out.contains("not ready, waiting for: identity") && out.contains("inbound in: "), "{out}");
    let ready = Proxy::start(domain.path(), "ready", &format!("{}{listener}", domain.identity("/server"))).await;
    ready.ready().await;
    let admin = ready.admin.to_string();
    let (code, out, _) = portcullis(&["status", "--admin", &admin]).await;
    assert!(code == 0 && out.contains("ready\n") && out.contains(&domain.id("/server")), "{out}");
    let (code, out, _) = portcullis(&["status", "--admin", &admin, "--output", "json"]).await;
    let state: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &state["ready"]), (0, &serde_json::json!(true)));
    ready.stop().await;
    let (code, out, err) = portcullis(&["status", "--admin", &admin]).await;
    assert!(code == 1 && out.is_empty() && err.contains("cannot ask the proxy"), "{err}");
    assert_eq!(err.lines().count(), 1, "{err}");
}

#[tokio::test]
async fn version_and_help() {
    let version = format!("portcullis {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(portcullis(&["--version"]).await, (0, version, String::new()));
    let (code, help, _) = portcullis(&["--help"]).await;
    assert_eq!(code, 0);
    for command in ["run", "demo", "check", "explain", "status", "authority", "completions", "man", "schema"] {
        assert!(help.lines().any(|line| line.trim_start().starts_with(command)), "{command}");
        let (code, help, _) = portcullis(&[command, "--help"]).await;
        assert!(code == 0 && help.contains("Usage: portcullis"), "{command}");
    }
    assert!(help.contains("Exit codes:"));
}

#[tokio::test]
async fn completions_are_scripts_that_their_shells_accept() {
    for (shell, mark) in [("bash", "complete -F"), ("zsh", "#compdef portcullis"), ("fish", "complete -c portcullis")] {
        let (code, script, err) = portcullis(&["completions", shell]).await;
        assert_eq!((code, err.as_str()), (0, ""), "{shell}");
        assert!(script.contains(mark) && script.contains("explain") && script.contains("authority"), "{shell}");
        if shell == "bash" {
            // The one shell that every test machine has completes for us.
            let ask = format!(
                "{script}\nCOMP_WORDS=(portcullis expl); COMP_CWORD=1; _portcullis portcullis expl portcullis; echo \"${{COMPREPLY[@]}}\"\n"
            );
            assert_eq!(succeeds(&mut Command::new("bash"), &ask).await.trim(), "explain");
        }
    }
}

#[tokio::test]
async fn the_man_pages_render() {
    let (code, page, _) = portcullis(&["man"]).await;
    assert_eq!(code, 0);
    assert!(page.contains(".TH portcullis 1"), "{page}");
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(portcullis(&["man", "--out", dir.path().to_str().unwrap()]).await.0, 0);
    for name in ["portcullis.1", "portcullis-run.1", "portcullis-explain.1", "portcullis-authority.1"] {
        assert!(std::fs::read_to_string(dir.path().join(name)).unwrap().contains(".SH NAME"), "{name}");
    }
    // Without groff on the machine the source above has to do.
    if Command::new("groff").arg("--version").output().await.is_ok() {
        let shown = output(Command::new("groff").args(["-man", "-Tascii", "-ww", "-P-cbou"]), &page).await;
        let (text, complaints) = (String::from_utf8_lossy(&shown.stdout), String::from_utf8_lossy(&shown.stderr));
        assert!(shown.status.success() && complaints.is_empty(), "{complaints}");
        assert!(text.contains("NAME") && text.contains("Zero-trust mTLS"), "{text}");
    }
    let (code, _, err) = portcullis(&["man", "--out", "/nowhere/at/all"]).await;
    assert!(code == 1 && err.contains("/nowhere/at/all"), "{err}");
}

#[tokio::test]
async fn the_schema_is_the_one_in_the_repository() {
    let (code, schema, _) = portcullis(&["schema"]).await;
    assert_eq!(code, 0);
    assert!(
        schema == std::fs::read_to_string(root("config/portcullis.schema.json")).unwrap(),
        "regenerate it: cargo run -- schema > config/portcullis.schema.json"
    );
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    let domain = Domain::new("a.example");
    let identity = domain.identity("/server");
    let listener = inbound_listener("in", ([127, 0, 0, 1], 80).into(), &domain.id("/x"), "");
    let file = domain.path().join("server.yaml");
    for (config, words) in [
        (
            format!(
                "{identity}{}admin: {{ listen: '127.0.0.1:0' }}\n",
                listener.replace("127.0.0.1:0", &address.to_string())
            ),
            "listener 'in'",
        ),
        (format!("{identity}{listener}admin: {{ listen: '{address}' }}\n"), "set admin.listen to a free one"),
    ] {
        std::fs::write(&file, config).unwrap();
        let (code, out, err) = portcullis(&["run", "--config", file.to_str().unwrap()]).await;
        assert_eq!((code, out.as_str()), (1, ""));
        let last = err.lines().last().unwrap();
        assert!(
            last.starts_with("portcullis: ") && last.contains(words) && last.contains(&address.to_string()),
            "{err}"
        );
        assert!(last.contains("in use"), "{err}");
    }
}

#[tokio::test]
async fn run_finds_its_config_and_its_agent_in_the_environment() {
    let domain = Domain::new("a.example");
    let listener = inbound_listener("in", ([127, 0, 0, 1], 80).into(), &domain.id("/x"), "");
    let file = domain.path().join("server.yaml");
    std::fs::write(&file, format!("{listener}admin: {{ listen: '127.0.0.1:0' }}\n")).unwrap();
    let (code, _, err) = portcullis(&["run", "--config", file.to_str().unwrap()]).await;
    assert!(code == 1 && err.contains("SPIFFE_ENDPOINT_SOCKET"), "{err}");
    let socket = format!("unix://{}/agent.sock", domain.path().display());
    let mut command = Command::new(program());
    command.arg("run").env("PORTCULLIS_CONFIG", &file).env("SPIFFE_ENDPOINT_SOCKET", &socket);
    let mut running = Running::start(&mut command);
    running.line("the start", |line| line.contains("\"started\"").then_some(())).await;
    running.line("the agent that is not there", |line| line.contains("agent.sock").then_some(())).await;
    // One signal ends it, though it has never had an identity.
    running.signal(rustix::process::Signal::INT);
    assert_eq!(running.wait().await.code(), Some(0));
}

#[tokio::test]
async fn the_authority_refuses_a_bad_config() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("authority.yaml");
    let name = file.to_str().unwrap();
    let good = format!("trust_domain: a.example\nsocket: {}/agent.sock\n", dir.path().display());
    for (text, words) in [
        (format!("{good}socket_mod: '0600'\n"), vec![":3:1", "socket_mod"]),
        (
            format!("{good}entries: [{{ spiffe_id: 'spiffe://b.example/x', selectors: {{ uid: 0 }} }}]\n"),
            vec!["b.example"],
        ),
        (good.replace("a.example", "A.example"), vec![":1:15"]),
        ("entries: [".to_owned(), vec![name]),
    ] {
        std::fs::write(&file, &text).unwrap();
        let (code, out, err) = portcullis(&["authority", "--config", name]).await;
        assert_eq!((code, out.as_str()), (1, ""), "{text}{err}");
        assert!(words.iter().all(|word| err.contains(word)) && err.contains(name), "{text}{err}");
    }
    let (code, _, err) = portcullis(&["authority", "--config", "/nowhere/at/all.yaml"]).await;
    assert!(code == 1 && err.contains("/nowhere/at/all.yaml"), "{err}");
}
