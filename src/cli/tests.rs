use std::path::{Path, PathBuf};

use clap::CommandFactory;

use super::*;

/// Runs a command line, as a user writes it after `portcullis`. Answers exit code, stdout and stderr.
fn portcullis(arguments: &[&str]) -> (u8, String, String) {
    let arguments = std::iter::once("portcullis").chain(arguments.iter().copied());
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let command = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli.command,
        Err(error) if error.use_stderr() => return (2, String::new(), error.to_string()),
        Err(error) => return (0, error.to_string(), String::new()),
    };
    let code = match execute(command, &mut Streams { out: &mut out, err: &mut err }) {
        Ok(code) if code == ExitCode::SUCCESS => 0,
        Ok(_) => 1,
        Err(failure) => {
            writeln!(err, "{}", failure.message).unwrap();
            failure.code
        }
    };
    (code, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
}

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The configs that are shipped: those that name our schema in their first line.
fn shipped() -> Vec<PathBuf> {
    let files = ["config", "examples"].into_iter().flat_map(|directory| std::fs::read_dir(root(directory)).unwrap());
    let mut files: Vec<PathBuf> = files.map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| {
        file.extension().is_some_and(|e| e == "yaml")
            && std::fs::read_to_string(file).unwrap().lines().next().unwrap().ends_with("portcullis.schema.json")
    });
    files.sort();
    files
}

#[test]
fn the_arguments_are_well_formed() {
    Cli::command().debug_assert();
    assert_eq!(portcullis(&["--version"]).1.trim(), concat!("portcullis ", env!("CARGO_PKG_VERSION")));
    assert_eq!(portcullis(&["check"]).0, 2);
    assert_eq!(portcullis(&["run", "--confg", "x"]).0, 2);
    let (code, _, err) = portcullis(&["check", "/nowhere/f.yaml"]);
    assert_eq!((code, err.lines().count()), (1, 1));
}

#[test]
fn every_shipped_config_is_good() {
    let files = shipped();
    assert!(files.len() >= 7, "{files:?}");
    for file in &files {
        let (code, out, err) = portcullis(&["check", "--no-files", file.to_str().unwrap()]);
        assert_eq!((code, err.as_str()), (0, ""), "{}", file.display());
        assert!(out.contains(": ok\n"));
    }
}

#[test]
fn the_smallest_config_is_small() {
    let text = std::fs::read_to_string(root("config/sidecar.yaml")).unwrap();
    assert!(text.lines().filter(|line| !line.starts_with('#')).count() <= 15);
}

#[test]
fn the_schema_in_the_repository_is_current() {
    let written = std::fs::read_to_string(root("config/portcullis.schema.json")).unwrap_or_default();
    assert!(
        written == schema::text().unwrap(),
        "config/portcullis.schema.json is not what the types say; regenerate it with: \
         cargo run -- schema > config/portcullis.schema.json"
    );
}

#[test]
fn the_reference_shows_every_option_and_its_true_default() {
    let text = std::fs::read_to_string(root("config/reference.yaml")).unwrap();
    let schema: serde_json::Value = serde_json::from_str(&schema::text().unwrap()).unwrap();
    let definitions = schema["$defs"].as_object().unwrap().values();
    let mut keys = 0;
    for key in definitions.chain([&schema]).filter_map(|d| d["properties"].as_object()).flat_map(|p| p.keys()) {
        keys += 1;
        assert!(text.lines().any(|line| line.contains(&format!("{key}:"))), "{key} is not in the reference");
    }
    assert!(keys > 50);
    let of = |text: &str| crate::config::parse_with(text, "", &Default::default()).unwrap().config;
    let sidecar = std::fs::read_to_string(root("config/sidecar.yaml")).unwrap();
    let (mut reference, sidecar) = (of(&text), of(&sidecar));
    let traces = reference.telemetry.traces.take().unwrap();
    assert_eq!(traces, serde_json::from_value(serde_json::json!({ "endpoint": traces.endpoint })).unwrap());
    let intercept = serde_json::from_value(serde_json::json!({ "inbound": {}, "outbound": {} })).unwrap();
    assert_eq!(reference.intercept, Some(intercept));
    assert_eq!(reference.tls, sidecar.tls);
    assert_eq!(reference.connections, sidecar.connections);
    assert_eq!(reference.admin, sidecar.admin);
    assert_eq!(reference.http, sidecar.http);
    assert_eq!(reference.detect, sidecar.detect);
    assert_eq!(reference.telemetry, sidecar.telemetry);
    assert_eq!(reference.identity, sidecar.identity);
    assert_eq!(reference.drain_timeout, sidecar.drain_timeout);
    assert_eq!(reference.outbound[0].connect_timeout, sidecar.outbound[0].connect_timeout);
}

#[test]
fn check_says_what_a_config_means_and_what_is_wrong() {
    let file = root("config/sidecar.yaml");
    let (code, out, _) = portcullis(&["check", "--no-files", file.to_str().unwrap()]);
    assert_eq!(code, 0);
    let expected = format!(
        "{}: ok\n  identity from the Workload API at unix:///run/spire/sockets/agent.sock\n  inbound api: mTLS on \
         0.0.0.0:8443 → 127.0.0.1:8080, for spiffe://nhs.example/ns/gp/sa/frontend\n  outbound records: 127.0.0.1:9001 \
         → mTLS → records.nhs.example:8443, which must be spiffe://nhs.example/ns/records/sa/api\n",
        file.display()
    );
    assert_eq!(out, expected);

    let api = root("examples/http-api.yaml");
    let (_, out, _) = portcullis(&["check", "--no-files", api.to_str().unwrap()]);
    let gp = "spiffe://nhs.example/ns/gp/sa/frontend";
    let who = format!(", HTTP, some requests only, for {gp}, spiffe://nhs.example/ns/wards/**\n");
    assert!(out.contains(&who), "each once, and who is denied some requests is not shut out: {out}");

    let dir = tempfile::tempdir().unwrap();
    let clear = dir.path().join("clear.yaml");
    let text = "identity: unix:///a\nintercept: { outbound: { unmatched: passthrough } }\noutbound:\n\
                - { name: web, capture: { ports: [80, 443], sni: ['*.a.example'] }, passthrough: tls }\n";
    std::fs::write(&clear, text).unwrap();
    let (_, out, err) = portcullis(&["check", "--no-files", clear.to_str().unwrap()]);
    let web = "outbound web: captured, ports 80, 443; sni *.a.example → passes if the workload speaks TLS itself, which is \
               watched; no mTLS of ours\n";
    assert!(out.contains(web) && err.contains("clear.yaml:2:37: warning: plaintext to wherever"), "{out}{err}");

    let bad = dir.path().join("bad.yaml");
    std::fs::write(&bad, "inbound: []\nthreads: 0\n").unwrap();
    let (code, out, err) = portcullis(&["check", bad.to_str().unwrap(), "--no-files", file.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert_eq!(out, expected, "a bad file does not hide a good one");
    assert!(err.contains("bad.yaml:1:1: no listener; ") && err.contains("bad.yaml:2:10: 0 is not a limit; "), "{err}");
    assert!(err.lines().all(|line| line.contains("bad.yaml:")), "{err}");

    let files = root("examples/pem-files.yaml");
    let (code, _, err) = portcullis(&["check", files.to_str().unwrap()]);
    assert!(code == 1 && err.contains("pem-files.yaml:6:18: /run/identity/svid.pem: No such file"), "{err}");
}

#[test]
fn explain_names_rule_place_and_verdict() {
    let file = root("examples/audit-migration.yaml");
    let explain = |from: &str, to: &str, more: &[&str]| {
        let mut arguments = vec!["explain", "--config", file.to_str().unwrap(), "--from", from, "--to", to];
        arguments.extend(more);
        portcullis(&arguments)
    };
    let (code, out, _) = explain("spiffe://nhs.example/ns/batch/sa/nightly", "orders", &[]);
    assert_eq!(code, 0);
    assert!(out.starts_with("allowed: spiffe://nhs.example/ns/batch/sa/nightly → orders (0.0.0.0:8443)\n"), "{out}");
    assert!(out.contains("rule 'everybody-here' (") && out.contains("audit-migration.yaml:18:7) allows it"), "{out}");
    assert!(out.contains("rule 'not-from-batch' (") && out.contains("would deny it; that would change the"), "{out}");

    let (code, out, _) = explain("spiffe://labs.example/x", "8443", &[]);
    assert!(code == 1 && out.starts_with("denied: ") && out.contains("no rule matches"), "{out}");

    let (code, out, _) = explain("spiffe://nhs.example/ns/pharmacy/sa/a", "orders", &["--output", "json"]);
    let answer: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(code, 0);
    assert_eq!(answer["admitted"], true);
    assert_eq!((&answer["verdict"], &answer["rule"]), (&"allow".into(), &"everybody-here".into()));
    assert_eq!((&answer["audited"]["rule"], &answer["audited"]["verdict"]), (&"the-few".into(), &"allow".into()));
    assert_eq!(answer["would_change_to"], serde_json::Value::Null);

    let (code, _, err) = explain("spiffe://nhs.example/a", "nowhere", &[]);
    assert_eq!((code, err.trim()), (2, "portcullis: there is no inbound listener 'nowhere'; there are: orders (8443)"));
    assert_eq!(explain("spiffe://nhs.example", "orders", &[]).0, 2);

    let sidecar = root("config/sidecar.yaml");
    let outbound = ["explain", "-c", sidecar.to_str().unwrap(), "--from", "spiffe://a/b", "--to", "records"];
    let (code, _, err) = portcullis(&outbound);
    assert!(code == 2 && err.contains("is an outbound listener"), "{err}");
}

#[test]
fn completions_and_man_pages_come_from_the_same_words() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(portcullis(&["completions", shell]).1.contains("explain"), "{shell}");
    }
    assert!(portcullis(&["man"]).1.contains(".TH portcullis 1"));
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(portcullis(&["man", "--out", dir.path().to_str().unwrap()]).0, 0);
    assert!(dir.path().join("portcullis-explain.1").exists());
}

#[test]
fn explain_judges_a_request_as_it_would_come() {
    let file = root("examples/http-authorization.yaml");
    let explain = |from: &str, more: &[&str]| {
        let mut arguments = vec!["explain", "--config", file.to_str().unwrap(), "--to", "records", "--from", from];
        arguments.extend(more);
        portcullis(&arguments)
    };
    let ward = "spiffe://nhs.example/ns/wards/sa/a";
    let (code, out, _) = explain(ward, &["--path", "/x/..//patients/%37?y", "--host", "A.Example:1"]);
    assert_eq!(code, 0);
    assert!(out.starts_with("allowed: ") && out.contains("request as judged: GET /patients/7 on A.Example\n"), "{out}");
    assert!(out.contains("rule 'wards-read' (") && out.contains("route in metrics: /patients/{id}\n"), "{out}");

    let (code, out, _) = explain(ward, &["--path", "/patients/7", "--header", "x-tenant: south"]);
    assert!(code == 0 && out.contains("'only-the-north'") && out.contains("would deny it; that would change"), "{out}");
    let (code, out, _) = explain(ward, &["--path", "/static/../admin/x", "--method", "GET"]);
    assert!(code == 1 && out.contains("rule 'no-admin-pages' ("), "{out}");
    let (code, out, _) = explain(ward, &["--path", "/patients/..%2fadmin"]);
    assert!(code == 1 && out.contains("refused with 400 before any rule is asked: an encoded slash"), "{out}");
    let (code, out, _) = explain(ward, &["--method", "CONNECT", "--host", "db:1"]);
    assert!(code == 1 && out.contains("request as judged: CONNECT on db\n"), "{out}");
    let (code, out, _) = explain(ward, &[]);
    assert!(code == 0 && out.contains("may let requests through; say --method and --path"), "{out}");
    assert_eq!(explain("spiffe://other.example/a", &[]).0, 1);

    let call = ["--grpc", "nhs.records.v1.Results/Report", "--output", "json"];
    let (code, out, _) = explain("spiffe://labs.example/a", &call);
    let answer: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &answer["admitted"], &answer["rule"]), (0, &true.into(), &"labs-report".into()));
    let request = serde_json::json!({
        "method": "POST", "path": "/nhs.records.v1.Results/Report", "host": null,
        "route": "/nhs.records.v1.Results/Report", "malformed": null, "module": null, "shadow": null,
    });
    assert_eq!(answer["request"], request);
    let (code, out, _) = explain(ward, &["--path", "/a\\b", "--output", "json"]);
    let answer: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &answer["admitted"]), (1, &false.into()));
    assert_eq!(answer["request"]["malformed"], "a backslash");

    assert_eq!(explain(ward, &["--grpc", "a/b", "--path", "/"]).0, 2);
    assert_eq!(explain(ward, &["--grpc", "a"]).0, 2);
    assert_eq!(explain(ward, &["--header", "x"]).0, 2);
    let tcp = root("examples/audit-migration.yaml");
    let asked = ["explain", "-c", tcp.to_str().unwrap(), "--from", ward, "--to", "orders", "--path", "/"];
    let (code, _, err) = portcullis(&asked);
    assert!(code == 2 && err.contains("'orders' carries bytes, so no request can be seen there"), "{err}");
}

#[cfg(feature = "rego")]
#[test]
fn explain_and_check_ask_the_module_too() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.yaml");
    let config = "identity: {authority: {spiffe_id: 'spiffe://td/b'}}\ninbound: [{name: api, listen: '127.0.0.1:1', \
                  to: '127.0.0.1:2', protocol: http, allow: ['spiffe://td'], http: {rego: {module: authz.rego, \
                  shadow: next.rego}}}]\n";
    std::fs::write(&file, config).unwrap();
    let module = "package portcullis.authz\nallow if input.request.path == \"/open\"";
    std::fs::write(dir.path().join("authz.rego"), module).unwrap();
    std::fs::write(dir.path().join("next.rego"), "package portcullis.authz\nallow := true").unwrap();
    let explain = |path: &str| {
        let file = file.to_str().unwrap();
        portcullis(&["explain", "-c", file, "--from", "spiffe://td/a", "--to", "api", "--path", path])
    };
    let (code, out, _) = explain("/open");
    assert!(code == 0 && out.contains("the Rego module, without facts of TLS and of ourselves, allows it"), "{out}");
    let (code, out, _) = explain("/shut");
    assert!(code == 1 && out.contains("the rules allow it, and the Rego module of the listener does not"), "{out}");
    assert!(out.contains("the shadow module allows it"), "{out}");
    assert_eq!(portcullis(&["check", file.to_str().unwrap()]).0, 0);

    std::fs::write(dir.path().join("next.rego"), "package portcullis.authz\nallow := nothing.known(1)").unwrap();
    let (code, _, err) = portcullis(&["check", file.to_str().unwrap()]);
    assert!(code == 1 && err.contains("config.yaml:2:") && err.contains("next.rego: "), "{err}");
    let (code, _, err) = explain("/open");
    assert!(code == 1 && err.contains("inbound 'api': ") && err.contains("nothing.known"), "{err}");
}

#[test]
fn the_pod_of_the_examples_applies_the_rules_before_all_else_and_no_other_container_may_touch_them() {
    let text = std::fs::read_to_string(root("examples/kubernetes/pod.yaml")).unwrap();
    let pod: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
    let [redirect, proxy] = pod["spec"]["initContainers"].as_array().unwrap().as_slice() else { panic!("{pod}") };
    let capabilities = |container: &serde_json::Value| container["securityContext"]["capabilities"].clone();
    assert_eq!(capabilities(redirect), serde_json::json!({ "drop": ["ALL"], "add": ["NET_ADMIN"] }));
    assert_eq!(proxy["restartPolicy"], "Always");
    let file = root("examples/kubernetes/portcullis.yaml");
    let config = crate::config::load(&file).unwrap().config;
    let intercept = config.intercept.as_ref().unwrap();
    let user = |container: &serde_json::Value| container["securityContext"]["runAsUser"].as_u64();
    assert_eq!(user(proxy), intercept.proxy.uid.map(u64::from));
    let mounted = format!("/etc/portcullis/{}", file.file_name().unwrap().to_str().unwrap());
    for (container, command) in [(redirect, vec!["redirect", "apply"]), (proxy, vec!["run"])] {
        let arguments = [command, vec!["--config", &mounted]].concat();
        assert_eq!(container["args"], serde_json::json!(arguments));
        assert!(Cli::try_parse_from([vec!["portcullis"], arguments].concat()).is_ok());
    }
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
        assert_eq!(proxy[probe]["httpGet"]["port"], config.admin.listen.port(), "{probe}");
    }
    for workload in pod["spec"]["containers"].as_array().unwrap() {
        assert_eq!(capabilities(workload), serde_json::json!({ "drop": ["ALL"] }));
        assert!(user(workload).is_some() && user(workload) != user(proxy));
    }
    let unit = std::fs::read_to_string(root("examples/systemd/portcullis-redirect.service")).unwrap();
    let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/local/bin/")).unwrap();
    assert!(Cli::try_parse_from(start.split(' ')).is_ok(), "{start}");
}
