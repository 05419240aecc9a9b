use super::*;
use crate::config::schema::{OneOrMany, RuleTarget, Span};

const IDENTITY: &str = "identity: unix:///run/agent.sock\n";
const INBOUND: &str = "inbound: [{name: api, listen: '0.0.0.0:8443', to: '127.0.0.1:80', allow: ['spiffe://td']}]\n";

fn read(text: &str) -> Result<Loaded, ConfigErrors> {
    parse_with(text, "f.yaml", &LoadOptions::default())
}

/// The errors of a text, one line each.
fn errors(text: &str) -> String {
    match read(text) {
        Ok(_) => panic!("accepted: {text}"),
        Err(errors) => errors.to_string(),
    }
}

/// The errors of a text that stands below a good identity and one good listener.
fn below(text: &str) -> String {
    errors(&format!("{IDENTITY}{INBOUND}{text}"))
}

fn warnings(text: &str) -> Vec<String> {
    let loaded = read(&format!("{IDENTITY}{INBOUND}{text}")).unwrap();
    loaded.warnings.iter().map(|w| w.line("f.yaml")).collect()
}

#[test]
fn the_smallest_config_loads_as_the_design_writes_it() {
    let text = "\
identity: unix:///run/spire/sockets/agent.sock
labels: { service_name: referrals, environment: production, domain: clinical }
inbound:
  - name: api
    listen: 0.0.0.0:8443
    to: 127.0.0.1:8080
    allow: [spiffe://nhs.example/ns/gp/sa/frontend]
outbound:
  - name: records
    listen: 127.0.0.1:9001
    to: records.nhs.example:8443
    expect: spiffe://nhs.example/ns/records/sa/api
";
    let loaded = read(text).unwrap();
    assert_eq!(loaded.warnings, []);
    assert_eq!(loaded.digest.len(), 64);
    let config = loaded.config;
    assert_eq!(config.identity.workload_api.unwrap().address, "unix:///run/spire/sockets/agent.sock");
    assert_eq!(config.identity.withdraw_grace, Span::seconds(5));
    assert_eq!(config.labels.domain, "clinical");
    assert!(matches!(&config.outbound[0].expect, OneOrMany::One(id) if id.path() == "/ns/records/sa/api"));
    assert_eq!(config.tls.cipher_suites.len(), 2);
}

#[test]
fn a_written_config_reads_back_as_it_was() {
    let text = format!("{IDENTITY}{INBOUND}policy: {{rules: [{{name: r, from: ['spiffe://td/a'], to: [api, 8443]}}]}}");
    let config = read(&text).unwrap().config;
    assert_eq!(config.policy.rules[0].to, [RuleTarget::Listener("api".into()), RuleTarget::Port(8443)]);
    let written = serde_json::to_string(&config).unwrap();
    assert_eq!(read(&written).unwrap().config, config);
}

#[test]
fn what_yaml_and_the_schema_refuse_is_told_in_one_line_with_its_place() {
    for (text, expected) in [
        ("", "1:1: the file says nothing"),
        ("# only a comment\n---\n", "1:1: the file says nothing"),
        ("[]", "1:1: a map belongs here"),
        ("identity: 5", "1:1: found integer `5` where the address of a SPIFFE Workload API, or a map belongs"),
        ("identity: {workload_ap: 1}", "1:12: unknown key 'workload_ap'; allowed here: workload_api, files, "),
        ("identity:\n  files: {certificate: a, key: b}", "2:27: 'bundles' is missing; add it"),
        ("inbound: [{name: a, listen: 'localhost:80', to: x}]", "1:29: this is not an address to listen on; write"),
        ("inbound: [{name: a, listen: '1.2.3.4:80', legacy_tls12: yes}]", "1:57: this is not true or false; write"),
        ("inbound: [{name: a, allow: [spiffe://td, spiffe://TD]}]", "1:42: 'spiffe://TD' is not a SPIFFE ID or a"),
        ("outbound: [{expect: [spiffe://td/a, 'http://a']}]", "1:37: 'http://a' is not a SPIFFE ID: it does not start"),
        ("outbound: [{expect: 'http://a'}]", "1:21: 'http://a' is not a SPIFFE ID: it does not start with"),
        ("tls: {post_quantum: maybe}", "1:21: unknown value 'maybe'; allowed: prefer, require, off"),
        ("sandbox: strict", "1:10: unknown value 'strict'; allowed: off, prefer, require"),
        ("tls: {max_handshakes: -1}", "1:23: this is not a whole number from 0 up"),
        ("tls: {handshake_timeout: 5}", "1:26: '5' is not a length of time (time unit needed"),
        ("threads: 1\nthreads: 2", "2:1: the key 'threads' is written twice"),
        ("labels: {<<: {domain: a}}", "1:10: merge keys (<<) are not accepted"),
        ("policy: {rules: [{name: a, to: [99999]}]}", "1:33: 99999 is not a port"),
        ("policy: {rules: [{name: a, to: [x, -1]}]}", "1:36: -1 is not a port"),
        ("inbound:\n\t- x", "2:2: tabs disallowed"),
        ("labels: {service_name: [a]}", "1:24: one text belongs here"),
        ("labels: {service_name: ~}", "1:24: there is no value"),
        ("inbound: !!foo []", "1:16: unsupported tag"),
    ] {
        let line = errors(text);
        assert!(line.starts_with(&format!("f.yaml:{expected}")), "{text}\n{line}");
        assert_eq!(line.lines().count(), 1);
    }
}

#[test]
fn no_error_repeats_a_text_of_unknown_kind() {
    for text in [
        "inbound: \"hun\\nter2\"",
        "labels: hunter2",
        "threads: hunter2",
        "tls: [hunter2",
        "connections: {max: hunter2}",
    ] {
        assert!(!errors(text).contains("hunter2") && !errors(text).contains("hun"), "{}", errors(text));
    }
    let key = "identity: {files: {certificate: c, key: \"-----BEGIN PRIVATE KEY-----\\nhunter2\", bundles: {td: b}}}\n";
    let line = errors(&format!("{key}{INBOUND}"));
    assert_eq!(
        line,
        "f.yaml:1:41: the path of a file belongs here, not its contents; save them to a file and name that"
    );
}

#[test]
fn a_bomb_of_aliases_is_refused_quickly() {
    use std::fmt::Write as _;
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let alias = format!("*a{}", level - 1);
        let _ = writeln!(bomb, "a{level}: &a{level} [{}]", vec![alias; 10].join(", "));
    }
    let nested = format!("inbound: {}", "[".repeat(10_000));
    let documents = format!("{IDENTITY}---\n{IDENTITY}");
    let began = std::time::Instant::now();
    for text in [bomb.as_str(), &format!("labels:\n{}", bomb.replace("a", "  a")), &nested, &documents] {
        errors(text);
    }
    assert!(began.elapsed() < std::time::Duration::from_secs(5));
}

#[test]
fn all_errors_of_meaning_are_told_in_the_order_of_the_file() {
    let text = "\
identity: /run/agent.sock
inbound:
  - name: api
    listen: 0.0.0.0:8443
    to: 10.0.0.7:8080
    allow: [spiffe://td]
  - name: api
    listen: 127.0.0.1:8443
    to: 127.0.0.1
  - name: -x
    listen: 0.0.0.0:9000
    to: 127.0.0.1:9000
    allow: [spiffe://td]
outbound:
  - name: up
    listen: 0.0.0.0:9001
    to: [a:1, 'b:0']
    expect: []
  - name: up2
    listen: unix://relative
    to: unix:///x
    expect: spiffe://td
    connect_timeout: 0s
policy:
  rules:
    - {name: default, from: []}
    - {name: r, from: ['spiffe://td'], to: [nowhere, 1]}
    - {name: r, from: ['spiffe://td']}
connections: {max: 0, idle_timeout: 99y}
threads: 1000
";
    let told = errors(text);
    let expected = [
        "1:11: '/run/agent.sock' is not the address of a Workload API: it is neither unix:///path nor tcp://IP:PORT",
        "5:9: 10.0.0.7:8080 may be on another machine, and the way there is plaintext; use a loopback address, or say \
         `allow_remote_target: true`",
        "7:11: the name 'api' is taken by the listener on line 3; choose another",
        "8:13: 127.0.0.1:8443 is taken: 'api' listens on 0.0.0.0:8443; choose another port",
        "9:9: '127.0.0.1' is not a target: it has no port; write HOST:PORT or unix:///path",
        "10:11: '-x' is not a name; use 1 to 63 letters",
        "12:9: this listener would connect to itself; name the workload's own address",
        "16:13: other machines could use 0.0.0.0:9001, in plaintext and under this workload's identity; use a loopback",
        "17:15: 'b:0' is not an upstream address: port 0 cannot be connected to; write the real port",
        "18:13: nobody is expected, so nobody could be talked to; name the SPIFFE ID of the upstream",
        "20:13: 'unix://relative' is not an address to listen on: the path of a Unix socket is absolute",
        "21:9: an upstream is reached over TCP; write HOST:PORT",
        "22:13: spiffe://td is a trust domain, not a workload; name the upstream's whole SPIFFE ID",
        "23:22: a time of 0 would end everything at once; write a length such as 30s",
        "26:14: 'default' names the case that no rule matched; choose another name",
        "26:29: the rule speaks of nobody; list SPIFFE IDs or patterns",
        "27:45: there is no inbound listener 'nowhere'; there are: api, api, -x",
        "27:54: no inbound listener has port 1; there are: 8443, 8443, 9000",
        "28:14: the name 'r' is taken by the rule on line 27; choose another",
        "29:20: 0 is not a limit; write a number from 1 to 1000000",
        "and 2 more errors; correct these first",
    ];
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!(lines.len(), expected.len(), "{told}");
    for (line, expected) in lines.iter().zip(expected) {
        let text = line.strip_prefix("f.yaml:").unwrap().trim_start();
        assert!(text.starts_with(expected), "got  {line}\nwant {expected}");
    }
}

#[test]
fn an_identity_is_named_or_in_the_environment() {
    let with = |endpoint: Option<&str>, identity_optional| {
        let options = LoadOptions { endpoint: endpoint.map(Into::into), identity_optional };
        parse_with(INBOUND, "f.yaml", &options).map(|l| (l.config.identity.workload_api, l.warnings.len()))
    };
    let address = |text: &str| Some(crate::config::schema::WorkloadApi { address: text.into() });
    assert_eq!(with(Some("unix:///a"), false), Ok((address("unix:///a"), 0)));
    assert_eq!(with(None, true), Ok((None, 1)));
    let told = with(None, false).unwrap_err().to_string();
    assert!(told.contains("identity: unix:///") && told.contains("SPIFFE_ENDPOINT_SOCKET"), "{told}");
    let told = with(Some("nonsense"), false).unwrap_err().to_string();
    assert!(told.contains("SPIFFE_ENDPOINT_SOCKET is 'nonsense'"), "{told}");

    let two = "identity: {workload_api: {address: 'unix:///a'}, authority: {spiffe_id: 'spiffe://td/a'}}\n";
    let told = errors(&format!("{two}{INBOUND}"));
    assert_eq!(told, "f.yaml:1:61: several identity sources (workload_api, authority); keep one");
}

#[test]
fn the_profile_admits_nothing_beyond_itself() {
    let tls = |text: &str| below(&format!("tls: {text}"));
    let lists = "; allowed: TLS_AES_256_GCM_SHA384, TLS_CHACHA20_POLY1305_SHA256";
    assert!(tls("{cipher_suites: [TLS_AES_128_GCM_SHA256]}").ends_with(lists));
    assert!(tls("{cipher_suites: []}").contains("no cipher suite"));
    assert!(tls("{cipher_suites: [ECDHE-ECDSA-AES256-GCM-SHA384]}").contains("legacy_tls12: true"));
    assert!(tls("{groups: [secp256r1]}").ends_with("; allowed: X25519MLKEM768, secp384r1, X25519"));
    assert!(tls("{groups: [P-384, secp384r1]}").contains("twice"));
    assert!(tls("{groups: [X25519MLKEM768], post_quantum: off}").contains("contradict"));
    assert!(tls("{groups: [X25519MLKEM768, secp384r1], post_quantum: require}").contains("contradict"));
    assert!(tls("{groups: [secp384r1, X25519MLKEM768], post_quantum: prefer}").contains("contradict"));
    assert!(tls("{fips: true, groups: [X25519]}").contains("FIPS"));
    let legacy = "{name: b, listen: '0.0.0.0:1', to: '127.0.0.1:80', legacy_tls12: true, allow: ['spiffe://td']}";
    let told = errors(&format!("{IDENTITY}inbound: [{legacy}]\ntls: {{post_quantum: require}}"));
    assert!(told.contains("TLS 1.2 exchanges keys on secp384r1 only"), "{told}");

    let config = read(&format!("{IDENTITY}{INBOUND}tls: {{groups: [x25519, P-384], fips: true}}"));
    assert!(config.is_err());
    let config = read(&format!("{IDENTITY}{INBOUND}tls: {{groups: [x25519, P-384]}}")).unwrap().config;
    assert_eq!(config.tls.groups.unwrap(), ["X25519", "secp384r1"]);
    let config = read(&format!("{IDENTITY}{INBOUND}tls: {{fips: true}}")).unwrap().config;
    assert_eq!(config.tls.cipher_suites, ["TLS_AES_256_GCM_SHA384"]);
}

#[test]
fn what_is_legal_and_hardly_meant_is_a_warning() {
    let told = warnings("admin: {listen: '0.0.0.0:9902'}");
    assert!(told.len() == 1 && told[0].starts_with("f.yaml:3:17: the admin address"), "{told:?}");
    let lonely = INBOUND.replace(", allow: ['spiffe://td']", "");
    let loaded = read(&format!("{IDENTITY}{lonely}")).unwrap();
    assert_eq!(loaded.warnings[0].line("f"), "f:2:11: no rule admits anybody to 'api'; add `allow:` here or a rule");
    let rule = "policy: {rules: [{name: r, from: ['spiffe://td/**'], to: [8443]}]}";
    assert_eq!(read(&format!("{IDENTITY}{lonely}{rule}")).unwrap().warnings, []);
}

#[test]
fn the_cost_of_a_decision_is_bounded_at_load() {
    let pattern = |n: u32| {
        let segments: Vec<&str> = (0..7).map(|bit| if n >> bit & 1 == 1 { "*" } else { "a" }).collect();
        format!("'spiffe://td/{}'", segments.join("/"))
    };
    let config = |count: u32| {
        let list: Vec<String> = (0..count).map(pattern).collect();
        format!("{IDENTITY}{}", INBOUND.replace("'spiffe://td'", &list.join(", ")))
    };
    assert!(read(&config(64)).is_ok());
    assert!(errors(&config(128)).contains("different sets of places"));
}

#[test]
fn files_are_looked_at_apart_from_loading_and_relative_to_the_config() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let identity = "identity: {files: {certificate: c.pem, key: k.pem, bundles: {td: b.pem}}, crls: [r.pem]}\n";
    std::fs::write(at("f.yaml"), format!("{identity}{INBOUND}")).unwrap();
    std::fs::write(at("c.pem"), "x").unwrap();
    std::fs::write(at("b.pem"), "").unwrap();
    std::fs::write(at("k.pem"), "x").unwrap();
    std::fs::set_permissions(at("k.pem"), std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let loaded = load(&at("f.yaml")).unwrap();
    assert_eq!(loaded.config.identity.crls, [at("r.pem")]);
    let found = files::check_files(&loaded);
    let lines: Vec<String> = found.errors.iter().map(|f| f.line("f")).collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].starts_with("f:1:66: ") && lines[0].contains("b.pem: it is empty"), "{lines:?}");
    assert!(lines[1].contains("r.pem: No such file"), "{lines:?}");
    assert!(found.warnings.len() == 1 && found.warnings[0].what.contains("k.pem: every user"), "{found:?}");
}

#[test]
fn files_that_cannot_be_a_config_are_refused_as_a_whole() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("f.yaml");
    let told = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        load(&file).unwrap_err().to_string()
    };
    assert!(told(b"a: b\nc: \xff").contains("line 2 is not UTF-8"));
    assert!(told(&vec![b'#'; MAX_FILE_BYTES as usize + 1]).contains("larger than 1048576 bytes"));
    assert!(load(&dir.path().join("absent")).unwrap_err().to_string().contains("absent: cannot be read: No such file"));
    assert!(load(dir.path()).is_err());
}

#[test]
fn a_bad_name_breaks_no_line_in_which_another_finding_tells_of_it() {
    let two = "inbound: [{name: \"a\\tb\\e[1m\", listen: '0.0.0.0:1', to: '127.0.0.1:80', allow: ['spiffe://td']}]\n\
               policy: {rules: [{name: r, from: ['spiffe://td'], to: [other]}]}\n";
    let said = errors(&format!("{IDENTITY}{two}"));
    assert!(said.contains("there is no inbound listener 'other'; there are: a\\tb"), "{said}");
    assert!(said.lines().all(|line| !line.chars().any(char::is_control)), "{said}");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(400))]

    /// Whatever is in a file, the answer is a config or lines that each name the file.
    #[test]
    fn no_text_breaks_the_reader(at in 0_usize..4_000, cut in 0_usize..60, with in "[ -~\\n\\t\\u{80}-\\u{2030}]{0,12}") {
        let good = include_str!("../../../config/reference.yaml");
        let start = (at.min(good.len())..=good.len()).find(|&i| good.is_char_boundary(i)).unwrap();
        let end = ((start + cut).min(good.len())..=good.len()).find(|&i| good.is_char_boundary(i)).unwrap();
        let text = format!("{}{with}{}", good.get(..start).unwrap(), good.get(end..).unwrap());
        if let Err(errors) = read(&text) {
            for line in errors.to_string().lines() {
                proptest::prop_assert!(line.starts_with("f.yaml:"), "{line}");
                proptest::prop_assert!(!line.chars().any(char::is_control));
            }
        }
    }
}

const HTTP: &str =
    "inbound: [{name: api, listen: '0.0.0.0:8443', to: '127.0.0.1:80', protocol: http, allow: ['spiffe://td']}]\n";

/// One rule with these matches, in one line of the file.
fn matching(http: &str) -> String {
    format!("{IDENTITY}{HTTP}policy: {{rules: [{{name: r, from: ['spiffe://td'], http: {http}}}]}}\n")
}

#[test]
fn matches_of_requests_are_read_in_every_form() {
    let text = matching(
        "[{methods: [GET, M-SEARCH], hosts: [A.nhs.example, '*.b', '[::1]'], paths: ['/p/{id}', {exact: /h}, {prefix: /s}], \
         headers: [{name: X-Tenant, exact: north}, {name: x_audit, present: false}]}, {grpc: {service: a.B, method: C}}]",
    );
    let config = read(&text).unwrap().config;
    let [first, second] = config.policy.rules[0].http.as_slice() else { panic!() };
    assert_eq!(first.paths.iter().map(|path| path.route()).collect::<Vec<_>>(), ["/p/{id}", "/h", "/s/*"]);
    assert_eq!(first.headers[1].name.as_str(), "x-audit");
    assert_eq!(second.grpc.as_ref().unwrap().service.as_str(), "a.B");
    assert_eq!(config.inbound[0].http, Default::default());
    let written = serde_json::to_string(&config).unwrap();
    assert_eq!(read(&written).unwrap().config, config);
}

#[test]
fn matches_that_mean_nothing_are_refused_where_they_stand() {
    for (http, said) in [
        (
            "[{}]",
            "f.yaml:3:58: nothing is written, so it would match every request; say what it shall match, or remove `http`",
        ),
        ("[{methods: [get]}]", "'get' is not a method, they are case-sensitive; write GET"),
        ("[{methods: []}]", "an empty list would match nothing; write something or remove the key"),
        (
            "[{hosts: ['a:80']}]",
            "f.yaml:3:67: 'a:80' is not a host or a pattern of them: ports are not compared; leave the port out",
        ),
        (
            "[{paths: [patients]}]",
            "'patients' is not a path pattern: it does not begin with '/'; write such as /patients/{id}",
        ),
        ("[{paths: ['/a/*']}]", "no '*' here; write {name} for one segment, or `{ prefix: /path }`"),
        ("[{paths: [{exact: /a, prefix: /b}]}]", "a path says either `exact` or `prefix`; write one of them"),
        ("[{paths: [{regex: /a}]}]", "unknown key 'regex'; allowed here: exact, prefix"),
        ("[{path: [/a]}]", "unknown key 'path'; allowed here: methods, hosts, paths, headers, grpc"),
        ("[{headers: [{name: 'a b', present: true}]}]", "'a b' is not the name of a header; write such as x-tenant"),
        ("[{headers: [{name: Host, exact: a}]}]", "the host is no header here; write it under `hosts:`"),
        ("[{headers: [{name: a}]}]", "write one of `exact: value` and `present: true`"),
        ("[{headers: [{name: a, exact: b, present: true}]}]", "write one of `exact: value` and `present: true`"),
        ("[{headers: [{name: a, exact: ' b'}]}]", "space around a value is no part of it; remove it"),
        (
            "[{headers: [{name: a, exact: \"b\\n\"}]}]",
            "no header has such a value; write at most 1024 visible characters",
        ),
        ("[{grpc: {service: a/b}}]", "'a/b' is not a name of gRPC; write such as `service: nhs.records.v1.Records`"),
        ("[{methods: [GET], grpc: {service: a}}]", "it stands for the method POST and for a path; remove"),
    ] {
        let errors = errors(&matching(http));
        assert!(errors.contains(said), "{http}: {errors}");
        assert!(errors.starts_with("f.yaml:3:"), "{errors}");
    }
    let many = vec!["{methods: [GET]}"; 65].join(", ");
    assert!(errors(&matching(&format!("[{many}]"))).contains("65 matches are too many, at most 64; make two rules"));
    let many = (0..65).map(|n| format!("/p{n}")).collect::<Vec<_>>().join(", ");
    assert!(errors(&matching(&format!("[{{paths: [{many}]}}]"))).contains("65 are too many, at most 64; make two"));
    let shapes = (0..65_u32).map(|bits| {
        let path: String = (0..7).map(|bit| if bits >> bit & 1 == 1 { "/{x}" } else { "/a" }).collect();
        format!("{{paths: ['{path}']}}")
    });
    let (first, second): (Vec<String>, Vec<String>) = (shapes.clone().take(64).collect(), shapes.skip(64).collect());
    let text = matching(&format!("[{}]", first.join(", ")));
    assert!(read(&text).is_ok());
    let more = format!("}}, {{name: r2, from: ['spiffe://td'], http: [{}]}}]}}", second.join(", "));
    let text = text.replace("}]}\n", &format!("{more}\n"));
    assert!(
        errors(&text).contains("in 65 different sets of places of a path, and 64 are allowed"),
        "{}",
        errors(&text)
    );
}

#[test]
fn requests_are_spoken_of_only_where_they_can_be_seen() {
    let rule = "policy: {rules: [{name: r, from: ['spiffe://td'], http: [{methods: [GET]}]}]}\n";
    let said = below(rule);
    assert!(said.contains("only to listeners that carry bytes (api); say `protocol: http` there, or remove"), "{said}");
    let two = format!(
        "{IDENTITY}inbound:\n  - {{name: a, listen: '0.0.0.0:1', to: '127.0.0.1:80', allow: ['spiffe://td']}}\n  \
         - {{name: b, listen: '0.0.0.0:2', to: '127.0.0.1:80', protocol: detect}}\n{rule}"
    );
    let loaded = read(&two).unwrap();
    let warnings: Vec<&str> = loaded.warnings.iter().map(|w| w.what.as_str()).collect();
    let expected = "no request can be seen on a, where the rule admits no connection; name other listeners under `to`";
    assert_eq!(warnings, [expected]);

    let options = "inbound: [{name: a, listen: '0.0.0.0:1', to: '127.0.0.1:80', http: {escaped_slash: keep}}]\n";
    let said = errors(&format!("{IDENTITY}{options}"));
    assert!(said.contains("options of HTTP on a listener that carries bytes; add `protocol: http`"), "{said}");
}

#[test]
fn where_spans_go_is_judged_before_any_is_sent() {
    let traces = |text: &str| format!("telemetry: {{traces: {{{text}}}}}");
    for (text, expected) in [
        ("", "'endpoint' is missing"),
        (
            "endpoint: 'https://127.0.0.1:4317'",
            "this is not a plain URL of a collector; write such as http://127.0.0.1:4317",
        ),
        ("endpoint: '127.0.0.1:4317'", "not a plain URL"),
        ("endpoint: 'http://127.0.0.1'", "no port"),
        ("endpoint: 'http://user@127.0.0.1:4317'", "write such as"),
        ("endpoint: 'http://127.0.0.1:4317/v1/traces'", "gRPC has no path"),
        (
            "protocol: http, endpoint: 'http://127.0.0.1:4318/v1?key=secret'",
            "not a URL; write such as http://127.0.0.1:4318",
        ),
        ("protocol: thrift, endpoint: 'http://127.0.0.1:4317'", "thrift"),
        ("ratio: 1.5, endpoint: 'http://127.0.0.1:4317'", "1.5 is not a share"),
        ("ratio: -0.1, endpoint: 'http://127.0.0.1:4317'", "-0.1 is not a share"),
        ("ratio: .nan, endpoint: 'http://127.0.0.1:4317'", "is not a share"),
        ("queue: 0, endpoint: 'http://127.0.0.1:4317'", "0 is not a limit"),
        ("max_batch: 100000, endpoint: 'http://127.0.0.1:4317'", "100000 is too much"),
        ("timeout: 0s, endpoint: 'http://127.0.0.1:4317'", "a time of 0"),
    ] {
        let errors = below(&traces(text));
        assert!(errors.contains(expected), "{text}: {errors}");
    }
    for local in
        ["'http://127.0.0.1:4317'", "'http://[::1]:4317/'", "'http://localhost:4318/v1/traces', protocol: http"]
    {
        assert_eq!(warnings(&traces(&format!("endpoint: {local}"))), [""; 0], "{local}");
    }
    let warned = warnings(&traces("endpoint: 'http://collector.example:4317'"));
    assert!(matches!(warned.as_slice(), [one] if one.contains("another machine in plaintext")), "{warned:?}");
    let config = read(&format!("{IDENTITY}{INBOUND}{}", traces("endpoint: 'http://127.0.0.1:4317'"))).unwrap().config;
    let declared = config.telemetry.traces.unwrap();
    assert_eq!(
        (declared.ratio, declared.timeout, declared.queue, declared.max_batch),
        (0.1, Span::seconds(5), 2048, 512)
    );
}

#[test]
fn no_listener_may_be_called_what_stands_for_none() {
    for listener in [
        "inbound:\n  - {name: captured, listen: '127.0.0.1:1', to: '127.0.0.1:2'}\n",
        "outbound:\n  - {name: captured, listen: '127.0.0.1:1', to: '127.0.0.1:2', expect: spiffe://td/a}\n",
    ] {
        let told = errors(&format!("identity: unix:///run/x.sock\n{listener}"));
        assert!(told.contains("the name 'captured' stands in records for captured connections"), "{told}");
    }
}
