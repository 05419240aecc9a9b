use http::Request;
use proptest::prelude::*;

use super::pattern::{FieldName, HostPattern, MethodName, PathKind, PathPattern};
use super::*;
use crate::config::schema::{Action, Config, EscapedSlash, PolicyMode};
use crate::identity::SpiffeId;
use crate::policy::{Decision, ListenerPolicy, NormalPath, Policy, Verdict};
use std::sync::Arc;

const PEER: &str = "spiffe://td/a";

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).unwrap()
}

fn config(protocol: &str, allow: &str, rules: &str) -> Config {
    let text = format!(
        "identity: unix:///a\ninbound:\n  - {{name: api, listen: '127.0.0.1:1', to: '127.0.0.1:2', \
         protocol: {protocol}, allow: [{allow}]}}\npolicy:\n  rules: {rules}\n"
    );
    crate::config::parse_with(&text, "", &Default::default()).unwrap_or_else(|e| panic!("{e}\n{text}")).config
}

/// The rules of an HTTP listener, written in YAML's flow style.
fn rules(rules: &str) -> Arc<ListenerPolicy> {
    Policy::compile(&config("http", "", rules)).listener("api").unwrap()
}

/// One rule for everybody of `td` with these matches.
fn rule(action: &str, matches: &str) -> Arc<ListenerPolicy> {
    rules(&format!("[{{name: it, from: ['spiffe://td'], action: {action}, http: {matches}}}]"))
}

/// The facts of a request, taken for these rules.
fn facts(rules: &ListenerPolicy, request: http::request::Builder) -> HttpFacts {
    let (parts, ()) = request.body(()).unwrap().into_parts();
    let target = HttpTarget::of(&parts.method, &parts.uri, EscapedSlash::Keep).unwrap();
    let host = parts.headers.get("host").map(|host| host.to_str().unwrap().parse().unwrap());
    HttpFacts::new(&parts, host.as_ref(), target, rules.header_names())
}

fn get(path: &str) -> http::request::Builder {
    Request::get(path).header("host", "records.nhs.example")
}

fn decide(rules: &ListenerPolicy, request: http::request::Builder) -> RequestDecision {
    rules.for_peer(&id(PEER)).decide(&facts(rules, request))
}

fn admits(rules: &ListenerPolicy, request: http::request::Builder) -> bool {
    decide(rules, request).decision.admits()
}

#[test]
fn paths_are_matched_by_segments_and_named_as_declared() {
    let rules = rules(
        "[{name: read, from: ['spiffe://td'], http: [{methods: [GET], paths: ['/patients/{id}', {exact: /health}, \
         {prefix: /static}, /, /a%3A]}, {grpc: {service: p.S, method: Get}}, {grpc: {service: p.T}}]}]"
            .replace("/a%3A", "'/a:'")
            .as_str(),
    );
    for (path, route) in [
        ("/patients/7", Some("/patients/{id}")),
        ("/patients/7?x=/../..", Some("/patients/{id}")),
        ("//patients/%37", Some("/patients/{id}")),
        ("/x/../patients/7;v=1", Some("/patients/{id}")),
        ("/patients/7%2F8", Some("/patients/{id}")),
        ("/patients", None),
        ("/patients/", None),
        ("/patients/7/", None),
        ("/patients/7/x", None),
        ("/Patients/7", None),
        ("/health", Some("/health")),
        ("/health/", None),
        ("/health;x", None),
        ("/static", Some("/static/*")),
        ("/static/", Some("/static/*")),
        ("/static/a/b;c", Some("/static/*")),
        ("/static;x/a", None),
        ("/staticx", None),
        ("/", Some("/")),
        ("/a:", Some("/a:")),
        ("/a%3a", Some("/a:")),
    ] {
        let decision = decide(&rules, get(path));
        assert_eq!(decision.decision.admits(), route.is_some(), "{path}");
        assert_eq!(&*decision.route, route.unwrap_or("*"), "{path}");
        assert_eq!(&*decision.decision.rule, if route.is_some() { "read" } else { "default" });
    }
    assert!(!admits(&rules, Request::head("/patients/7")));
    let grpc = |path: &str, kind: &str| decide(&rules, Request::post(path).header("content-type", kind));
    for (path, kind, route) in [
        ("/p.S/Get", "application/grpc", Some("/p.S/Get")),
        ("/p.S/Get", "Application/gRPC+proto", Some("/p.S/Get")),
        ("/p.S/Get", "application/grpc;x", Some("/p.S/Get")),
        ("/p.S/Get", "application/grpc-web", None),
        ("/p.S/Get", "application/json", None),
        ("/p.S/Put", "application/grpc", None),
        ("/p.T/Any", "application/grpc", Some("/p.T/*")),
        ("/p.T/Any/x", "application/grpc", None),
        ("/p.T/", "application/grpc", None),
    ] {
        let decision = grpc(path, kind);
        assert_eq!(decision.decision.admits().then_some(&*decision.route), route, "{path} {kind}");
    }
    assert!(!admits(&rules, Request::put("/p.S/Get").header("content-type", "application/grpc")));
}

#[test]
fn a_deny_holds_in_every_reading_of_a_path() {
    let rules = rules(
        "[{name: all, from: ['spiffe://td']}, {name: no, from: ['spiffe://td'], action: deny, \
         http: [{paths: [/admin, {prefix: /internal}, '/u/{id}/keys', /slash/]}, {grpc: {service: p.S}}]}]",
    );
    for path in [
        "/admin",
        "/admin/",
        "/admin;x=1",
        "/admin%3bx",
        "/%61dmin",
        "//admin",
        "/x/..//admin",
        "/internal",
        "/internal;a/b",
        "/internal/b",
        "/u;a/7;b/keys;c",
        "/u/7/keys/",
        "/slash",
        "/slash/",
        "/p.S/Get",
    ] {
        assert_eq!(&*decide(&rules, get(path)).decision.rule, "no", "{path}");
    }
    for path in ["/adminx", "/admin/x", "/internals", "/u/7/key", "/u//keys", "/ADMIN"] {
        assert_eq!(&*decide(&rules, get(path)).decision.rule, "all", "{path}");
    }
}

#[test]
fn hosts_are_compared_without_port_dot_and_case() {
    let allow = rule("allow", "[{hosts: [records.nhs.example, '*.labs.example', '[::1]']}]");
    for (host, expected) in [
        ("records.nhs.example", true),
        ("RECORDS.nhs.example.:8443", true),
        ("x.labs.example", true),
        ("x.y.labs.example", false),
        ("[0::1]:80", true),
        ("records.nhs.example.evil", false),
        ("[fe80::1%25eth0]", false),
    ] {
        assert_eq!(admits(&allow, Request::get("/").header("host", host)), expected, "{host}");
    }
    assert!(!admits(&allow, Request::get("/")), "no host");
    let deny = rules(
        "[{name: all, from: ['spiffe://td']}, {name: no, from: ['spiffe://td'], action: deny, \
         http: [{hosts: [admin.example]}]}]",
    );
    assert!(admits(&deny, Request::get("/").header("host", "a.example")));
    assert!(!admits(&deny, Request::get("/").header("host", "Admin.Example:1")));
    assert!(!admits(&deny, Request::get("/").header("host", "[fe80::1%25eth0]")), "servers differ");
    assert!(!admits(&deny, Request::get("/")), "a server without the name of a host has one of its own");
}

#[test]
fn headers_are_judged_closed() {
    // Headers of the request, and whether an allow and a deny about them hold.
    type Case<'a> = (&'a [(&'a str, &'a str)], bool, bool);
    let judge = |wanted: &str, cases: &[Case<'_>]| {
        let allow = rule("allow", &format!("[{{headers: [{wanted}]}}]"));
        let deny = rule("deny", &format!("[{{headers: [{wanted}]}}]"));
        for (headers, allows, denies) in cases {
            let request = || headers.iter().fold(get("/"), |request, (name, value)| request.header(*name, *value));
            assert_eq!(admits(&allow, request()), *allows, "{wanted}: {headers:?} allow");
            assert_eq!(&*decide(&deny, request()).decision.rule == "it", *denies, "{wanted}: {headers:?} deny");
        }
    };
    judge(
        "{name: x-tenant, exact: north}",
        &[
            (&[], false, false),
            (&[("X-Tenant", "north")], true, true),
            (&[("x-tenant", "North")], false, false),
            (&[("x-tenant", "north"), ("x-tenant", "north")], true, true),
            (&[("x-tenant", "north"), ("x-tenant", "south")], false, true),
            (&[("x-tenant", "south, north")], false, true),
            (&[("x-tenant", "north"), ("x_tenant", "south")], false, true),
            (&[("x_tenant", "north")], false, true),
        ],
    );
    judge(
        "{name: x_audit, present: true}",
        &[(&[], false, false), (&[("x-audit", "")], true, true), (&[("x_audit", "1")], false, true)],
    );
    judge(
        "{name: x-debug, present: false}",
        &[(&[], true, true), (&[("x-debug", "1")], false, false), (&[("x_debug", "1")], false, true)],
    );
}

#[test]
fn what_was_not_kept_is_judged_closed() {
    let before = rule("allow", "[{methods: [GET]}]");
    let request = || get("/").header("x-a", "1");
    for (action, matches, rule) in [
        ("allow", "[{headers: [{name: x-a, exact: '1'}]}]", "default"),
        ("allow", "[{headers: [{name: x-b, present: false}]}]", "default"),
        ("deny", "[{headers: [{name: x-b, exact: '1'}]}]", "it"),
    ] {
        let after = super::tests::rule(action, matches);
        let decision = after.for_peer(&id(PEER)).decide(&facts(&before, request()));
        assert_eq!(&*decision.decision.rule, rule, "{action} {matches}");
    }
}

#[test]
fn connect_needs_a_rule_that_names_it() {
    let connect = || Request::connect("db.nhs.example:5432").header("host", "db.nhs.example:5432");
    for (rules, rule) in [
        ("[{name: all, from: ['spiffe://td']}]", "default"),
        ("[{name: any, from: ['spiffe://td'], http: [{hosts: [db.nhs.example]}]}]", "default"),
        ("[{name: it, from: ['spiffe://td'], http: [{methods: [CONNECT]}]}]", "it"),
        ("[{name: it, from: ['spiffe://td'], http: [{methods: [GET, CONNECT], hosts: [db.nhs.example]}]}]", "it"),
        ("[{name: it, from: ['spiffe://td'], http: [{methods: [CONNECT], hosts: [other]}]}]", "default"),
        ("[{name: it, from: ['spiffe://td'], http: [{methods: [CONNECT], paths: [/]}]}]", "default"),
    ] {
        let decision = decide(&super::tests::rules(rules), connect());
        assert_eq!((&*decision.decision.rule, &*decision.route), (rule, "*"), "{rules}");
    }
    let allowed = "{name: it, from: ['spiffe://td'], http: [{methods: [CONNECT]}]}";
    for (deny, denies) in [
        ("", true),
        (", http: [{paths: [/admin]}]", true),
        (", http: [{hosts: [db.nhs.example]}]", true),
        (", http: [{hosts: [other]}]", false),
        (", http: [{methods: [GET]}]", false),
    ] {
        let text = format!("[{allowed}, {{name: no, from: ['spiffe://td'], action: deny{deny}}}]");
        assert_eq!(!admits(&super::tests::rules(&text), connect()), denies, "{deny}");
    }
}

#[test]
fn the_server_as_a_whole_has_no_path() {
    let star = || Request::options("*").header("host", "a");
    assert!(admits(&rule("allow", "[{methods: [OPTIONS]}]"), star()));
    assert!(!admits(&rule("allow", "[{paths: [{prefix: /}]}]"), star()));
    let target =
        |method: &str, uri: &str| HttpTarget::of(&method.parse().unwrap(), &uri.parse().unwrap(), EscapedSlash::Keep);
    assert!(target("GET", "*").is_err());
    assert_eq!(target("GET", "http://h").unwrap().path().unwrap().as_str(), "/");
    assert_eq!(target("GET", "http://h?q").unwrap().path().unwrap().path_and_query().as_str(), "/?q");
    assert_eq!(target("GET", "http://h/a/../b?q").unwrap().path().unwrap().path_and_query().as_str(), "/b?q");
    assert!(target("GET", "h:80").is_err(), "only CONNECT is about a host");
}

#[test]
fn rules_of_other_peers_and_of_connections() {
    let text = "[{name: a, from: ['spiffe://td/a'], http: [{paths: [/a]}]}, {name: b, from: ['spiffe://td/b/**']}, \
                {name: not-c, from: ['spiffe://td/b/c'], action: deny, http: [{paths: [/secret]}]}, \
                {name: not-d, from: ['spiffe://td/b/d'], action: deny}, \
                {name: shadow, from: ['spiffe://td/e'], mode: audit, http: [{paths: [/a]}]}]";
    let of = |protocol: &str| Policy::compile(&config(protocol, "'spiffe://td/x'", text)).listener("api").unwrap();
    let (http, detect) = (of("http"), of("detect"));
    let peers = ["/a", "/b/x", "/b/c", "/b/d", "/e", "/x", "/y"].map(|path| id(&format!("spiffe://td{path}")));
    let doors = peers.each_ref().map(|peer| http.door(peer).rule.to_string());
    assert_eq!(doors, ["a", "b", "b", "not-d", "default", "allow:api", "default"]);
    assert_eq!(peers.each_ref().map(|peer| detect.could_admit(peer)), [true, true, true, false, false, true, false]);
    // Bytes that nobody reads.
    let opaque = peers.each_ref().map(|peer| detect.decide(peer).rule.to_string());
    assert_eq!(opaque, ["default", "b", "not-c", "not-d", "default", "allow:api", "default"]);
    assert_eq!(detect.decide(&peers[4]).audited, None);

    let at = |peer: &SpiffeId, path: &str| {
        let decision = http.for_peer(peer).decide(&facts(&http, get(path))).decision;
        (decision.verdict, decision.rule.to_string(), decision.audited.map(|(rule, _)| rule.to_string()))
    };
    use Verdict::{Allow, Deny};
    assert_eq!(at(&peers[0], "/a"), (Allow, "a".into(), None));
    assert_eq!(at(&peers[0], "/b"), (Deny, "default".into(), None));
    assert_eq!(at(&peers[2], "/secret"), (Deny, "not-c".into(), None));
    assert_eq!(at(&peers[2], "/else"), (Allow, "b".into(), None));
    assert_eq!(at(&peers[4], "/a"), (Deny, "default".into(), Some("shadow".into())));
    assert_eq!(at(&peers[5], "/any"), (Allow, "allow:api".into(), None));
    assert!(Arc::ptr_eq(&http.for_peer(&peers[0]), &http.for_peer(&peers[0])), "remembered");

    let tcp = config("tcp", "'spiffe://td/x'", "[]");
    let tcp = Policy::compile(&tcp).listener("api").unwrap();
    assert_eq!(&*tcp.door(&peers[5]).rule, "allow:api");
    assert!(!tcp.for_peer(&peers[5]).decide(&facts(&tcp, get("/"))).decision.admits());
}

#[test]
fn the_gate_opens_for_what_was_judged_and_nothing_else() {
    struct Asked(HttpFacts);
    impl crate::policy::HttpSubject for Asked {
        fn facts(&self) -> &HttpFacts {
            &self.0
        }
    }
    let rules = rule("allow", "[{paths: ['/p/{id}']}]");
    let peer = rules.for_peer(&id(PEER));
    let admitted = peer.admit_request(Asked(facts(&rules, get("/p/1")))).ok().unwrap();
    assert_eq!(&*admitted.decision().route, "/p/{id}");
    assert_eq!(admitted.into_subject().0.target().path().unwrap().as_str(), "/p/1");
    let (_, refused) = peer.admit_request(Asked(facts(&rules, get("/q")))).err().unwrap();
    assert_eq!(&*refused.decision.rule, "default");

    let mut open = config("http", "", "[]");
    open.policy.mode = PolicyMode::Audit;
    let open = Policy::compile(&open).listener("api").unwrap();
    let admitted = open.for_peer(&id(PEER)).admit_request(Asked(facts(&open, get("/q")))).ok().unwrap();
    assert_eq!(admitted.decision().decision.verdict, Verdict::Deny);
}

#[test]
fn a_reload_knows_what_changed_about_requests() {
    let base = rule("allow", "[{paths: [/a], headers: [{name: x, exact: '1'}]}]");
    assert!(base.same_rules_as(&rule("allow", "[{paths: [/a], headers: [{name: X, exact: '1'}]}]")));
    for other in [
        "[{paths: [/b], headers: [{name: x, exact: '1'}]}]",
        "[{paths: [{prefix: /a}], headers: [{name: x, exact: '1'}]}]",
        "[{paths: [/a], headers: [{name: x, exact: '2'}]}]",
        "[{paths: [/a], headers: [{name: x, present: true}]}]",
        "[{paths: [/a], hosts: [h], headers: [{name: x, exact: '1'}]}]",
        "[{paths: [/a], methods: [GET], headers: [{name: x, exact: '1'}]}]",
        "[{grpc: {service: a}}]",
    ] {
        assert!(!base.same_rules_as(&rule("allow", other)), "{other}");
    }
    let of = |config: &Config| Policy::compile(config).listener("api").unwrap();
    let (http, detect) = (config("http", "", "[]"), config("detect", "", "[]"));
    assert!(!of(&http).same_rules_as(&of(&detect)));
    let mut decoding = http.clone();
    decoding.inbound[0].http.escaped_slash = EscapedSlash::Decode;
    assert!(!of(&http).same_rules_as(&of(&decoding)));
}

#[test]
fn debug_shows_no_value_of_a_header() {
    let rules = rule("allow", "[{headers: [{name: authorization, present: true}]}]");
    let shown = format!("{:?}", facts(&rules, get("/a?token=1").header("authorization", "secret")));
    assert!(shown.contains("/a") && !shown.contains("secret") && !shown.contains("token"), "{shown}");
}

#[test]
fn the_cost_does_not_grow_with_the_number_of_rules() {
    use std::fmt::Write as _;
    let with = |count: usize| {
        let mut text = "[".to_owned();
        for n in 0..count {
            write!(
                text,
                "{{name: r{n}, from: ['spiffe://td'], http: [{{paths: ['/a/{{id}}/x{n}', /b/y{n}, {{prefix: /c{n}}}]}}]}},"
            )
            .unwrap();
        }
        rules(&(text + "]"))
    };
    let (few, many) = (with(10), with(2_000));
    for path in ["/a/1/x3", "/a/1/none", "/b/y3", "/c3/d/e", "/none"] {
        let visited = |rules: &ListenerPolicy| rules.for_peer(&id(PEER)).visited(&facts(rules, get(path)));
        assert_eq!(visited(&few), visited(&many), "{path}");
        assert_eq!(decide(&few, get(path)), decide(&many, get(path)));
    }
    let deep = format!("/a{}", "/z".repeat(2_000));
    assert!(many.for_peer(&id(PEER)).visited(&facts(&many, get(&deep))) <= 4);
}

/// A match and a rule without any index.
mod naive {
    use super::*;
    use crate::config::schema::{HttpMatch, Rule};

    fn path(pattern: &PathPattern, path: &str, denying: bool) -> bool {
        let matches = |path: &[&str]| {
            let wanted: Vec<&str> = match pattern.as_str() {
                "/" if pattern.kind() == PathKind::Prefix => vec![],
                text => text.split('/').skip(1).collect(),
            };
            let segment = |(wanted, have): (&&str, &&str)| {
                if wanted.starts_with('{') { !have.is_empty() } else { wanted == have }
            };
            let long_enough = if pattern.kind() == PathKind::Prefix {
                path.len() >= wanted.len()
            } else {
                path.len() == wanted.len()
            };
            long_enough && wanted.iter().zip(path).all(segment)
        };
        let segments: Vec<&str> = path.split('/').skip(1).collect();
        if matches(&segments) {
            return true;
        }
        if !denying {
            return false;
        }
        let stripped: Vec<&str> = segments.iter().map(|segment| segment.split(';').next().unwrap()).collect();
        let mut shorter = stripped.clone();
        if shorter.last() == Some(&"") {
            shorter.pop();
        }
        let mut longer = stripped.clone();
        longer.push("");
        matches(&stripped) || matches(&shorter) || matches(&longer)
    }

    fn holds(wanted: &HttpMatch, request: &Asked, denying: bool) -> bool {
        let method = wanted.methods.is_empty() || wanted.methods.iter().any(|m| m.method() == request.method);
        let host = wanted.hosts.is_empty() || wanted.hosts.iter().any(|host| host.matches(&request.host));
        let paths = wanted.paths.is_empty() || wanted.paths.iter().any(|p| path(p, request.normal.judged(), denying));
        let header = wanted.headers.iter().all(|header| {
            let values: Vec<&str> = request.tenants.iter().map(String::as_str).collect();
            match (&header.exact, denying) {
                (Some(exact), true) => values.contains(&exact.as_str()),
                (Some(exact), false) => !values.is_empty() && values.iter().all(|value| value == exact),
                (None, _) => values.is_empty() != header.present.unwrap(),
            }
        });
        method && host && paths && header
    }

    /// The first matching rule of this kind, and its first matching path.
    fn first(config: &Config, request: &Asked, action: Action, mode: PolicyMode) -> Option<(String, String)> {
        let denying = action == Action::Deny;
        let speaks = |rule: &&Rule| {
            rule.action == action && rule.mode == mode && rule.from.iter().any(|from| from.matches(&id(PEER)))
        };
        config.policy.rules.iter().filter(speaks).find_map(|rule| {
            if rule.http.is_empty() {
                return Some((rule.name.clone(), "*".to_owned()));
            }
            let wanted = rule.http.iter().find(|wanted| holds(wanted, request, denying))?;
            let declared = wanted.paths.iter().find(|p| path(p, request.normal.judged(), denying));
            Some((rule.name.clone(), declared.map_or("*".to_owned(), PathPattern::route)))
        })
    }

    pub(super) fn decide(config: &Config, request: &Asked) -> RequestDecision {
        let first = |action, mode| first(config, request, action, mode);
        let (deny, allow) = (first(Action::Deny, PolicyMode::Enforce), first(Action::Allow, PolicyMode::Enforce));
        let (verdict, (rule, route)) = match (deny, allow) {
            (Some(deny), _) => (Verdict::Deny, deny),
            (None, Some(allow)) => (Verdict::Allow, allow),
            (None, None) => (Verdict::Deny, ("default".to_owned(), "*".to_owned())),
        };
        let audited = first(Action::Deny, PolicyMode::Audit).map(|(rule, _)| (rule.into(), Verdict::Deny));
        let audited =
            audited.or_else(|| first(Action::Allow, PolicyMode::Audit).map(|(rule, _)| (rule.into(), Verdict::Allow)));
        let decision = Decision { verdict, rule: rule.into(), mode: config.policy.mode, audited };
        RequestDecision { decision, route: route.into(), modules: None }
    }
}

/// A request as the property tests make it.
#[derive(Clone, Debug)]
struct Asked {
    method: http::Method,
    host: String,
    normal: NormalPath,
    tenants: Vec<String>,
}

impl Asked {
    fn builder(&self, path: &str) -> http::request::Builder {
        let request = Request::builder().method(&self.method).uri(path).header("host", &self.host);
        self.tenants.iter().fold(request, |request, tenant| request.header("x-tenant", tenant))
    }
}

fn any_plain_path() -> impl Strategy<Value = String> {
    let segment = prop_oneof![4 => Just("a"), 3 => Just("b"), 1 => Just("a;x"), 1 => Just("b:")];
    (prop::collection::vec(segment, 0..5), any::<bool>()).prop_map(|(segments, slash)| {
        let slash = if slash && !segments.is_empty() { "/" } else { "" };
        format!("/{}{slash}", segments.join("/"))
    })
}

fn any_pattern() -> impl Strategy<Value = PathPattern> {
    let segment = prop_oneof![4 => Just("a"), 2 => Just("b"), 1 => Just("b:"), 2 => Just("{x}")];
    (prop::collection::vec(segment, 0..5), any::<bool>(), any::<bool>()).prop_map(|(segments, prefix, slash)| {
        let slash = if slash && !prefix && !segments.is_empty() { "/" } else { "" };
        let kind = if prefix { PathKind::Prefix } else { PathKind::Template };
        PathPattern::parse(&format!("/{}{slash}", segments.join("/")), kind).unwrap()
    })
}

fn any_match() -> impl Strategy<Value = crate::config::schema::HttpMatch> {
    use crate::config::schema::{HeaderMatch, HttpMatch};
    let methods = prop::sample::subsequence(vec!["GET", "PUT"], 0..2);
    let hosts = prop::sample::subsequence(vec!["h.td", "*.td"], 0..2);
    let header = prop_oneof![Just((Some("n"), None)), Just((None, Some(true))), Just((None, Some(false))),];
    (methods, hosts, prop::collection::vec(any_pattern(), 0..3), prop::option::weighted(0.3, header)).prop_map(
        |(methods, hosts, paths, header)| HttpMatch {
            methods: methods.into_iter().map(|m| MethodName::parse(m).unwrap()).collect(),
            hosts: hosts.into_iter().map(|h| HostPattern::parse(h).unwrap()).collect(),
            paths,
            headers: header
                .map(|(exact, present)| HeaderMatch {
                    name: FieldName::parse("x-tenant").unwrap(),
                    exact: exact.map(str::to_owned),
                    present,
                })
                .into_iter()
                .collect(),
            grpc: None,
        },
    )
}

fn any_config() -> impl Strategy<Value = Config> {
    use crate::policy::pattern::IdPattern;
    let rule = (
        prop::sample::select(vec!["spiffe://td", "spiffe://td/a", "spiffe://td/*", "spiffe://td/b"]),
        prop_oneof![2 => Just(Action::Allow), 1 => Just(Action::Deny)],
        prop_oneof![2 => Just(PolicyMode::Enforce), 1 => Just(PolicyMode::Audit)],
        prop::collection::vec(any_match(), 0..3),
    );
    prop::collection::vec(rule, 0..6).prop_map(|rules| {
        let mut config = config("http", "", "[]");
        for (number, (from, action, mode, http)) in rules.into_iter().enumerate() {
            let from = vec![IdPattern::parse(from).unwrap()];
            config.policy.rules.push(crate::config::schema::Rule {
                name: format!("r{number}"),
                from,
                to: vec![],
                action,
                mode,
                http,
            });
        }
        config
    })
}

fn any_request() -> impl Strategy<Value = Asked> {
    (
        prop_oneof![Just(http::Method::GET), Just(http::Method::PUT), Just(http::Method::POST)],
        prop::sample::select(vec!["h.td", "x.td", "td"]),
        any_plain_path(),
        prop::collection::vec(prop_oneof![Just("n".to_owned()), Just("s".to_owned())], 0..3),
    )
        .prop_map(|(method, host, path, tenants)| Asked {
            method,
            host: host.to_owned(),
            normal: NormalPath::parse(&path, EscapedSlash::Keep).unwrap(),
            tenants,
        })
}

/// Another spelling of a plain path: characters encoded, slashes doubled, segments put in and taken back.
fn respelled(path: &str, seed: &[u8]) -> String {
    let mut seed = seed.iter().copied().cycle();
    let mut out = String::new();
    for c in path.chars() {
        match (c, seed.next().unwrap() % 8) {
            ('/', 0) => out += "//",
            ('/', 1) => out += "/./",
            ('/', 2) => out += "/%2e/",
            ('/', 3) => out += "/z/../",
            ('/', 4) => out += "/y;q/%2E./",
            (c, 0 | 1) if c != '/' && c != ';' => out += &format!("%{:02x}", u32::from(c)),
            (c, _) => out.push(c),
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn the_index_is_the_definition_and_no_spelling_walks_round_it(
        config in any_config(),
        requests in prop::collection::vec((any_request(), prop::collection::vec(any::<u8>(), 1..12)), 1..12),
    ) {
        let rules = Policy::compile(&config).listener("api").unwrap();
        for (request, seed) in &requests {
            let plain = request.normal.as_str();
            let decision = decide(&rules, request.builder(plain));
            prop_assert_eq!(&decision, &naive::decide(&config, request), "{}", plain);
            let spelled = respelled(plain, seed);
            prop_assert_eq!(&decide(&rules, request.builder(&spelled)), &decision, "{} for {}", spelled, plain);
            // Who gets any request through gets through the door.
            prop_assert!(!decision.decision.admits() || rules.could_admit(&id(PEER)));
        }
    }
}
