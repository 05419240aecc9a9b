//! Who may ask for what: rules about methods, hosts, paths, headers and gRPC calls against requests in every spelling, with
//! `explain` beside the proxy that runs; audit mode; and requests that are under way when policy changes.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::agent::{go, heard};
use crate::harness::{Running, portcullis, rest_of, soon};
use crate::pair::{Answer, Extra, Pair, Way, curl, http_origin, requests_seen};

const DECISIONS: &str = "portcullis_authorization_decisions_total";

const RULES: &str = "policy:
  rules:
    - name: read-patients
      from: ['spiffe://a.example/client', 'spiffe://a.example/clinician']
      to: [in]
      http:
        - methods: [GET, HEAD]
          paths: ['/patients/{id}', { exact: /health }, { prefix: /static }]
    - name: write-notes
      from: ['spiffe://a.example/clinician']
      to: [in]
      http:
        - methods: [POST]
          hosts: [records.nhs.example, '*.clinic.example']
          paths: ['/patients/{id}/notes']
          headers: [{ name: x-role, exact: clinician }, { name: x-audit, present: true }]
    - name: records-get
      from: ['spiffe://a.example/client']
      to: [in]
      http: [{ grpc: { service: nhs.records.v1.Records, method: Get } }]
    - name: auditor
      from: ['spiffe://a.example/auditor']
      to: [in]
    - name: nobody-deletes
      from: ['spiffe://a.example']
      to: [in]
      action: deny
      http: [{ methods: [DELETE] }]
";

/// A request of the table, and what must become of it: the rule, if that admits it; else the one that denies it.
struct Case {
    from: &'static str,
    method: &'static str,
    host: &'static str,
    path: &'static str,
    headers: &'static [&'static str],
    admitted: bool,
    rule: &'static str,
}

const fn case(
    from: &'static str,
    method: &'static str,
    path: &'static str,
    admitted: bool,
    rule: &'static str,
) -> Case {
    Case { from, method, host: "records.nhs.example", path, headers: &[], admitted, rule }
}

const NOTE: &[&str] = &["x-role: clinician", "x-audit: 17"];

fn note(host: &'static str, headers: &'static [&'static str], admitted: bool) -> Case {
    let rule = if admitted { "write-notes" } else { "default" };
    Case { host, headers, ..case("/clinician", "POST", "/patients/7/notes", admitted, rule) }
}

fn table() -> Vec<Case> {
    let mut table = vec![
        case("/client", "GET", "/patients/7", true, "read-patients"),
        case("/client", "HEAD", "/patients/7", true, "read-patients"),
        case("/client", "GET", "/patients/7?all=1", true, "read-patients"),
        case("/clinician", "GET", "/patients/7", true, "read-patients"),
        case("/client", "POST", "/patients/7", false, "default"),
        case("/client", "OPTIONS", "/patients/7", false, "default"),
        case("/client", "GET", "/patients", false, "default"),
        case("/client", "GET", "/patients/", false, "default"),
        case("/client", "GET", "/patients/7/notes", false, "default"),
        case("/client", "GET", "/Patients/7", false, "default"),
        case("/client", "GET", "/health", true, "read-patients"),
        case("/client", "GET", "/health/", false, "default"),
        case("/client", "GET", "/healthy", false, "default"),
        case("/client", "GET", "/static", true, "read-patients"),
        case("/client", "GET", "/static/a/b.js", true, "read-patients"),
        case("/client", "GET", "/statically", false, "default"),
        case("/client", "GET", "/", false, "default"),
        case("/client", "DELETE", "/patients/7", false, "nobody-deletes"),
        case("/auditor", "GET", "/whatever/it/is", true, "auditor"),
        case("/auditor", "PATCH", "/whatever/it/is", true, "auditor"),
        case("/auditor", "DELETE", "/whatever/it/is", false, "nobody-deletes"),
        note("records.nhs.example", NOTE, true),
        note("RECORDS.nhs.example", NOTE, true),
        note("records.nhs.example:8080", NOTE, true),
        note("a.clinic.example", NOTE, true),
        note("a.b.clinic.example", NOTE, false),
        note("clinic.example", NOTE, false),
        note("evil.example", NOTE, false),
        note("records.nhs.example.evil.example", NOTE, false),
        note("records.nhs.example", &["x-role: clinician"], false),
        note("records.nhs.example", &["x-role: porter", "x-audit: 17"], false),
        note("records.nhs.example", &["x-role: Clinician", "x-audit: 17"], false),
        note("records.nhs.example", &["x-role: clinician", "x-role: porter", "x-audit: 17"], false),
    ];
    table.extend([
        Case { headers: NOTE, ..case("/client", "POST", "/patients/7/notes", false, "default") },
        // A gRPC call is what its content type says it is; the same path by another way of asking is no call.
        Case {
            headers: &["content-type: application/grpc"],
            ..case("/client", "POST", "/nhs.records.v1.Records/Get", true, "records-get")
        },
        Case {
            headers: &["content-type: application/grpc+proto"],
            ..case("/client", "POST", "/nhs.records.v1.Records/Get", true, "records-get")
        },
        Case {
            headers: &["content-type: application/grpc"],
            ..case("/client", "POST", "/nhs.records.v1.Records/Set", false, "default")
        },
        Case {
            headers: &["content-type: application/grpc"],
            ..case("/client", "POST", "/nhs.records.v1.RecordsX/Get", false, "default")
        },
    ]);
    table
}

impl Case {
    fn head(&self) -> String {
        let headers: String = self.headers.iter().map(|header| format!("\r\n{header}")).collect();
        let length = if self.method == "GET" || self.method == "HEAD" { "" } else { "\r\nContent-Length: 0" };
        format!("{} {} HTTP/1.1\r\nHost: {}{headers}{length}", self.method, self.path, self.host)
    }

    fn name(&self) -> String {
        format!("{} {} http://{}{} {:?}", self.from, self.method, self.host, self.path, self.headers)
    }

    fn is_grpc(&self) -> bool {
        self.headers.iter().any(|header| header.contains("application/grpc"))
    }

    /// What `explain` says: whether it would be admitted, and by which rule.
    async fn explained(&self, pair: &Pair) -> (bool, String) {
        let (config, from) = (pair.server.config.to_str().unwrap(), pair.domain.id(self.from));
        let asked = ["explain", "--config", config, "--from", &from, "--to", "in", "--output", "json"];
        let request = ["--method", self.method, "--path", self.path, "--host", self.host];
        let headers: Vec<&str> = self.headers.iter().flat_map(|header| ["--header", header]).collect();
        let (code, out, err) = portcullis(&[&asked[..], &request, &headers].concat()).await;
        assert!(err.is_empty(), "{}: {err}", self.name());
        let answer: Value = serde_json::from_str(&out).unwrap();
        let admitted = answer["admitted"].as_bool().unwrap();
        assert_eq!(code, i32::from(!admitted), "the exit code says the same");
        (admitted, answer["rule"].as_str().unwrap().to_owned())
    }
}

fn ruled(policy: &str) -> Extra<'_> {
    Extra { server: policy, ruled: true, ..Extra::default() }
}

async fn inbound(pair: &Pair, from: &str) -> Way {
    Way::Tls(pair.server.address("in").await, pair.peer(from, &["http/1.1"]))
}

#[tokio::test]
async fn explain_and_the_running_proxy_agree_on_every_request() {
    let (_origin, at) = http_origin().await;
    let mut pair = Pair::start(at, ruled(RULES)).await;
    let mut reached = 0;
    for case in table() {
        let name = case.name();
        let answer = inbound(&pair, case.from).await.request(&case.head()).await;
        let line = pair.server.request(&name, |_| true).await;
        // A call is refused in gRPC's way, where its client speaks HTTP/2 at least.
        let refused = answer.status == 403 || case.is_grpc() && answer.header("grpc-status") == Some("7");
        assert!(if case.admitted { answer.status == 200 } else { refused }, "{name}: {answer:?}");
        assert_eq!(line["rule"], case.rule, "{name}: {line}");
        assert_eq!(line["cause"], if case.admitted { "done" } else { "denied" }, "{name}: {line}");
        if !case.admitted {
            let told = format!("{}{}", answer.head, answer.body);
            assert!(!told.contains("spiffe://") && !told.contains("read-patients"), "{name}: {told}");
        }
        assert_eq!(case.explained(&pair).await, (case.admitted, case.rule.to_owned()), "explain: {name}");
        reached += u64::from(case.admitted);
        assert_eq!(requests_seen(at).await, reached, "{name}: the workload hears of admitted requests only");
    }
    // Somebody for whom there is no rule at all may be refused in the handshake or at the request.
    let answer = inbound(&pair, "/stranger").await.request("GET /health HTTP/1.1\r\nHost: a.example").await;
    assert!([0, 403].contains(&answer.status), "{answer:?}");
    let labels = [("direction", "inbound"), ("rule", "nobody-deletes"), ("decision", "deny"), ("mode", "enforce")];
    pair.server.metric_reaches(DECISIONS, &labels, 2.0).await;
    let metrics = pair.server.metrics().await;
    let routes: Vec<_> =
        metrics.matching("portcullis_http_requests_total", &[]).map(|(labels, _)| labels["route"].clone()).collect();
    assert!(routes.iter().any(|route| route == "/patients/{id}"), "{routes:?}");
    assert!(!routes.iter().any(|route| route.contains("whatever") || route.contains('7')), "{routes:?}");
}

/// Everything is admitted but `/admin` and what is below it.
const NOT_ADMIN: &str = "policy:
  rules:
    - { name: all, from: ['spiffe://a.example/client'], to: [in] }
    - name: not-admin
      from: ['spiffe://a.example']
      to: [in]
      action: deny
      http: [{ paths: [{ prefix: /admin }] }]
";

const WALKS_ROUND: &[&str] = &[
    "/admin",
    "/admin/",
    "/admin?x",
    "/admin/users",
    "//admin",
    "///admin//users",
    "/./admin",
    "/a/../admin",
    "/a/./../admin/",
    "/a/b/../../admin",
    "/a//../admin",
    "/a/%2e%2e/admin",
    "/a/%2E%2e/admin",
    "/a/.%2e/admin",
    "/%2e/admin",
    "/%61dmin",
    "/%61%64%6d%69%6e",
    "/a/../%61dmin",
    "/admin/../admin",
    "/../admin",
    "/a/../../admin",
    "/admin%2fusers",
    "/admin%2Fusers",
    "/a%2f..%2fadmin",
    "/a/..%2fadmin",
    "/%2fadmin",
    "/a/..\\admin",
    "/a\\..\\admin",
    "/%5cadmin",
    "/a/..%5cadmin",
    "/admin%00",
    "/a/../admin%20/..%00",
    "/%2561dmin/../admin",
    "/admin;x=1",
    "/admin;x=1/users",
    "/a/..;/admin",
    "/;/admin",
    "/a/../admin#x",
    "/a#/../admin",
    "http://a.example/admin",
    "http://a.example/a/../admin",
    "http://a.example//admin",
];

#[tokio::test]
async fn no_spelling_walks_round_a_rule() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::start(at, ruled(NOT_ADMIN)).await;
    for way in pair.ways().await {
        for path in WALKS_ROUND {
            let answer = way.request(&format!("GET {path} HTTP/1.1\r\nHost: a.example")).await;
            assert!([400, 403].contains(&answer.status), "{} {path}: {answer:?}", way.name());
        }
    }
    // In HTTP/2, where the path is a field of its own.
    for path in WALKS_ROUND.iter().filter(|path| path.starts_with('/') && !path.contains('#')) {
        let url = format!("http://{}{path}", pair.address);
        let answer = curl(&["--http2-prior-knowledge", "--path-as-is", &url]).await;
        assert!([400, 403].contains(&answer.status), "h2 {path}: {answer:?}");
    }
    assert_eq!(requests_seen(at).await, 0, "none of them reached the workload");
}

#[tokio::test]
async fn a_path_is_forwarded_in_the_form_that_was_judged() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::start(at, ruled(NOT_ADMIN)).await;
    for way in pair.ways().await {
        for (sent, forwarded) in [
            ("/public", "/public"),
            ("/admin/../public", "/public"),
            ("/a/./b//c/../d/", "/a/b/d/"),
            ("/%7Euser/%41", "/~user/A"),
            ("/caf%c3%a9", "/caf%C3%A9"),
            ("/administer", "/administer"),
            // The query is no part of it, and stays as it is.
            ("/a?next=/../admin&x=%2f%61//", "/a?next=/../admin&x=%2f%61//"),
            ("/a/?", "/a/?"),
            ("http://b.example/x", "/x"),
            ("http://b.example", "/"),
        ] {
            let answer = way.request(&format!("GET {sent} HTTP/1.1\r\nHost: b.example")).await;
            assert_eq!(answer.status, 200, "{} {sent}: {answer:?}", way.name());
            let seen = answer.json();
            assert_eq!(seen["target"], forwarded, "{} {sent}", way.name());
            assert_eq!(seen["host"], "b.example", "{} {sent}", way.name());
        }
    }
}

#[tokio::test]
async fn an_escaped_slash_is_what_the_listener_says() {
    let (_origin, at) = http_origin().await;
    for (setting, admitted) in [("keep", Some("/a%2Fb")), ("decode", Some("/a/b")), ("refuse", None)] {
        let extra = format!("http: {{ escaped_slash: {setting} }}");
        let pair = Pair::start(at, Extra { inbound: &extra, ..ruled(NOT_ADMIN) }).await;
        let way = inbound(&pair, "/client").await;
        let before = requests_seen(at).await;
        let answer = way.request("GET /a%2fb HTTP/1.1\r\nHost: a.example").await;
        match admitted {
            Some(target) => assert_eq!(answer.json()["target"], target, "{setting}: {answer:?}"),
            None => assert_eq!(answer.status, 400, "{setting}: {answer:?}"),
        }
        // Whatever it is, it is no way round.
        for path in ["/admin%2fusers", "/a%2f..%2fadmin", "/a/..%2fadmin", "/%2fadmin", "/%2e%2e%2fadmin"] {
            let answer = way.request(&format!("GET {path} HTTP/1.1\r\nHost: a.example")).await;
            let target = answer.json()["target"].as_str().unwrap_or_default().to_owned();
            // Kept, it is a character of one segment, which is not `admin`.
            let kept =
                setting == "keep" && answer.status == 200 && target.split('/').all(|s| s != "admin" && s != "..");
            assert!([400, 403].contains(&answer.status) || kept, "{setting} {path}: {answer:?}");
        }
        if setting != "keep" {
            assert_eq!(requests_seen(at).await, before + u64::from(admitted.is_some()), "{setting}");
        }
    }
}

#[tokio::test]
async fn the_host_of_a_rule_is_the_host_that_the_workload_sees() {
    let (_origin, at) = http_origin().await;
    let policy = "policy:\n  rules: [{ name: a-only, from: ['spiffe://a.example/client'], to: [in], http: [{ hosts: [a.example] }] }]\n";
    let pair = Pair::start(at, ruled(policy)).await;
    for way in pair.ways().await {
        let fate = async |head: &str| way.request(head).await.status;
        assert_eq!(fate("GET / HTTP/1.1\r\nHost: a.example").await, 200);
        assert_eq!(fate("GET / HTTP/1.1\r\nHost: b.example").await, 403);
        assert!(
            [400, 403].contains(&fate("GET http://b.example/ HTTP/1.1\r\nHost: a.example").await),
            "{}",
            way.name()
        );
        // The target's own host counts (RFC 9112, section 3.2.2); two different ones may be refused.
        let answer = way.request("GET http://a.example/ HTTP/1.1\r\nHost: b.example").await;
        assert!(answer.status == 400 || answer.json()["host"] == "a.example", "{}: {answer:?}", way.name());
        assert!([400, 403].contains(&fate("GET / HTTP/1.1\r\nHost: a.example@b.example").await), "{}", way.name());
    }
}

#[tokio::test]
async fn connect_is_refused() {
    let (_origin, at) = http_origin().await;
    let pair = Pair::plain(at).await;
    for way in pair.ways().await {
        for target in ["a.example:443", &at.to_string()] {
            let answer = Answer::parse(
                &way.send(format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n").as_bytes()).await,
            );
            assert!([400, 403, 405].contains(&answer.status), "{} {target}: {answer:?}", way.name());
        }
    }
    assert_eq!(requests_seen(at).await, 0);
}

/// A workload that lets a CONNECT become an echo, whatever it names.
async fn tunneller() -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                assert!(head.starts_with(b"CONNECT db.example:5432 HTTP/1.1\r\n"), "{}", head.escape_ascii());
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    address
}

#[tokio::test]
async fn connect_is_carried_where_a_rule_names_it() {
    let workload = tunneller().await;
    let policy = "policy:
  rules:
    - { name: tunnel, from: ['spiffe://a.example/client'], to: [in], http: [{ methods: [CONNECT], hosts: [db.example] }] }
";
    let mut pair = Pair::start(workload, ruled(policy)).await;
    for way in pair.ways().await {
        let mut stream = way.connect().await;
        let head = "CONNECT db.example:5432 HTTP/1.1\r\nHost: db.example:5432\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(soon("the answer", stream.read_u8()).await.unwrap());
        }
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{}: {}", way.name(), answer.escape_ascii());
        // Nothing of it is HTTP any more.
        let bytes = b"\0\x01 GET / HTTP/1.1\r\nno head\n\n";
        stream.write_all(bytes).await.unwrap();
        stream.flush().await.unwrap();
        let mut back = vec![0; bytes.len()];
        soon("an echo", stream.read_exact(&mut back)).await.unwrap();
        assert_eq!(back, bytes, "{}", way.name());
        drop(stream);
        let record = pair.server.request("the tunnel", |line| line["status"] == 200).await;
        assert_eq!((&record["rule"], &record["method"]), (&"tunnel".into(), &"CONNECT".into()), "{record}");
        let other = "CONNECT other.example:5432 HTTP/1.1\r\nHost: other.example:5432\r\n\r\n";
        assert_eq!(Answer::parse(&way.send(other.as_bytes()).await).status, 403, "{}", way.name());
    }
}

#[tokio::test]
async fn a_rule_in_audit_mode_counts_and_does_nothing() {
    let (_origin, at) = http_origin().await;
    let policy = "policy:
  rules:
    - { name: all, from: ['spiffe://a.example/client'], to: [in], http: [{ paths: [{ prefix: /open }] }] }
    - name: no-deletes
      from: ['spiffe://a.example']
      to: [in]
      action: deny
      mode: audit
      http: [{ methods: [DELETE] }]
    - name: soon-open
      from: ['spiffe://a.example/client']
      to: [in]
      mode: audit
      http: [{ paths: [{ prefix: /soon }] }]
";
    let pair = Pair::start(at, ruled(policy)).await;
    let way = inbound(&pair, "/client").await;
    for (method, path, status) in
        [("GET", "/open/a", 200), ("DELETE", "/open/a", 200), ("GET", "/soon/a", 403), ("GET", "/never", 403)]
    {
        let answer = way.request(&format!("{method} {path} HTTP/1.1\r\nHost: a.example\r\nContent-Length: 0")).await;
        assert_eq!(answer.status, status, "{method} {path}: {answer:?}");
    }
    for (rule, decision, mode, count) in [
        ("no-deletes", "deny", "audit", 1.0),
        ("soon-open", "allow", "audit", 1.0),
        ("all", "allow", "enforce", 2.0),
        ("default", "deny", "enforce", 2.0),
    ] {
        let labels = [("direction", "inbound"), ("rule", rule), ("decision", decision), ("mode", mode)];
        assert_eq!(pair.server.metrics().await.sum(DECISIONS, &labels), count, "{rule}");
    }
}

#[tokio::test]
async fn audit_for_all_admits_requests_that_no_rule_does() {
    let (_origin, at) = http_origin().await;
    let policy = NOT_ADMIN.replacen("policy:\n", "policy:\n  mode: audit\n", 1);
    let mut pair = Pair::start(at, ruled(&policy)).await;
    let way = inbound(&pair, "/client").await;
    assert_eq!(way.request("GET /admin HTTP/1.1\r\nHost: a.example").await.status, 200);
    let line = pair.server.request("the request", |line| line["path"] == "/admin").await;
    assert_eq!((&line["rule"], &line["mode"]), (&"not-admin".into(), &"audit".into()), "{line}");
    // Not one that is no request.
    assert_eq!(way.request("GET /a%2fadmin HTTP/1.1\r\nHost: a.example").await.status, 400);
    pair.server.reloaded(&pair.server_config.replace("mode: audit", "mode: enforce")).await;
    assert_eq!(way.request("GET /admin HTTP/1.1\r\nHost: a.example").await.status, 403);
}

/// Admits `/held` in two ways, so that one can be taken away.
const HELD: &str = "policy:
  rules:
    - { name: held, from: ['spiffe://a.example/client'], to: [in], http: [{ paths: [{ prefix: /held }] }] }
    - { name: rest, from: ['spiffe://a.example/client'], to: [in], http: [{ paths: [{ prefix: /echo }] }] }
    - { name: calls, from: ['spiffe://a.example/client'], to: [in], http: [{ grpc: { service: grpc.testing.TestService } }] }
";

/// A response that stays open, its first piece taken.
async fn held(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /held/one HTTP/1.1\r\nHost: a.example\r\n\r\n").await.unwrap();
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("held") {
        seen.push(soon("the first piece", stream.read_u8()).await.unwrap());
    }
    assert!(seen.starts_with(b"HTTP/1.1 200"));
    stream
}

#[tokio::test]
async fn a_change_of_policy_ends_a_long_response_and_no_other() {
    let (mut origin, at) = http_origin().await;
    let mut pair = Pair::start(at, ruled(HELD)).await;
    let mut long = held(pair.address).await;
    // A change that leaves it admitted leaves it alone.
    pair.server.reloaded(&pair.server_config.replace("/echo", "/elsewhere")).await;
    assert_eq!(pair.server.metrics().await.sum("portcullis_http_requests_in_flight", &[]), 1.0);
    pair.server.reloaded(&pair.server_config.replace("prefix: /held", "prefix: /never")).await;
    let rest = rest_of(&mut long).await;
    // In chunks, the end of the body is told; this one must not be.
    assert!(!rest.as_ref().is_ok_and(|rest| rest.ends_with(b"0\r\n\r\n")), "{rest:?}");
    heard(&mut origin, "the end at the workload", |line| line["event"] == "canceled").await;
    let line = pair.server.request("its end", |line| line["cause"] == "policy_changed").await;
    assert_eq!((&line["path"], &line["rule"]), (&"/held/one".into(), &"held".into()), "{line}");
    // Over the same sidecars, and likely the same connection between them.
    let way = Way::Plain(pair.address);
    assert_eq!(way.request("GET /held/two HTTP/1.1\r\nHost: a.example").await.status, 403);
    assert_eq!(way.request("GET /echo HTTP/1.1\r\nHost: a.example").await.status, 200);
}

#[tokio::test]
async fn a_change_of_policy_ends_a_grpc_stream_with_a_status() {
    let (_origin, at) = crate::grpc::grpc_origin().await;
    let mut pair = Pair::start(at, ruled(HELD)).await;
    let mut call = go("grpc-interop-client");
    let mut call = Running::start(call.args(["-cases", "hold", "-to", &pair.address.to_string()]));
    heard(&mut call, "an open stream", |line| line["event"] == "open").await;
    pair.server.reloaded(&pair.server_config.replace("grpc.testing.TestService", "grpc.testing.Other")).await;
    let ended = heard(&mut call, "its end", |line| line["event"] == "passed").await;
    assert!(ended["code"].as_u64().unwrap() != 0, "{ended}");
    pair.server.request("its end", |line| line["cause"] == "policy_changed").await;
}
