use http::Request;

use super::*;
use crate::config::schema::{Config, EscapedSlash};
use crate::identity::KeyType;
use crate::policy::http::{ConnectionFacts, TlsFacts};
use crate::policy::{ListenerPolicy, Policy, RequestDecision, Verdict};

/// A directory with modules, and a listener that admits everybody of `td` and then asks them.
struct Place {
    directory: tempfile::TempDir,
    config: Config,
}

impl Place {
    fn new(module: &str, shadow: Option<&str>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let text = "identity: unix:///a\ninbound: [{name: api, listen: '127.0.0.1:1', to: '127.0.0.1:2', \
                    protocol: http, allow: ['spiffe://td']}]\n";
        let mut config = crate::config::parse_with(text, "", &Default::default()).unwrap().config;
        let write = |name: &str, text: &str| {
            let file = directory.path().join(name);
            std::fs::write(&file, format!("package portcullis.authz\n{text}")).unwrap();
            file
        };
        let shadow = shadow.map(|text| write("shadow.rego", text));
        config.inbound[0].http.rego = Some(RegoModules { module: write("module.rego", module), shadow });
        Self { directory, config }
    }

    fn load(&self) -> Result<Arc<ListenerPolicy>, String> {
        Policy::load(&self.config).map(|policy| policy.listener("api").unwrap())
    }
}

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).unwrap()
}

fn connection() -> Arc<ConnectionFacts> {
    Arc::new(ConnectionFacts {
        source: id("spiffe://td/ns/a"),
        destination: Some(id("spiffe://td/ns/b")),
        tls: Some(TlsFacts {
            version: "TLSv1.3",
            cipher_suite: "TLS_AES_256_GCM_SHA384",
            group: "X25519MLKEM768",
            key_type: KeyType::P384,
            resumed: false,
        }),
    })
}

fn facts(rules: &ListenerPolicy, request: http::request::Builder) -> HttpFacts {
    let (parts, ()) = request.body(()).unwrap().into_parts();
    let target = HttpTarget::of(&parts.method, &parts.uri, EscapedSlash::Refuse).unwrap();
    let host = parts.headers.get("host").map(|host| host.to_str().unwrap().parse().unwrap());
    HttpFacts::new(&parts, host.as_ref(), target, rules.header_names()).with_connection(connection())
}

fn decide(rules: &ListenerPolicy, request: http::request::Builder) -> RequestDecision {
    rules.for_peer(&id("spiffe://td/ns/a")).decide(&facts(rules, request))
}

fn module(text: &str) -> Arc<ListenerPolicy> {
    Place::new(text, None).load().unwrap()
}

#[test]
fn a_module_reads_what_is_documented() {
    let rules = module("allow := true");
    let request = Request::post("/p.S/%47et?token=1")
        .header("host", "Records.nhs.example:443")
        .header("Content-Type", "application/grpc")
        .header("x-a", "1")
        .header("x-a", "2");
    let read = input(&facts(&rules, request)).unwrap();
    let expected = json!({
        "source": { "spiffe_id": "spiffe://td/ns/a", "trust_domain": "td", "path": "/ns/a" },
        "destination": { "spiffe_id": "spiffe://td/ns/b", "trust_domain": "td", "path": "/ns/b" },
        "tls": { "version": "TLSv1.3", "cipher_suite": "TLS_AES_256_GCM_SHA384", "group": "X25519MLKEM768",
                 "key_type": "ecdsa-p384", "resumed": false },
        "request": {
            "method": "POST", "host": "records.nhs.example", "path": "/p.S/Get",
            "headers": { "host": "Records.nhs.example:443", "content-type": "application/grpc", "x-a": "1, 2" },
            "grpc": { "service": "p.S", "method": "Get" },
        },
    });
    assert_eq!(read, expected);
    let read = input(&facts(&rules, Request::connect("a:1"))).unwrap();
    assert_eq!(read["request"], json!({ "method": "CONNECT", "headers": {} }));
}

#[test]
fn a_module_narrows_what_the_rules_admit() {
    let rules = module(
        "default allow := false\nallow if {\n input.request.method == \"GET\"\n \
         startswith(input.request.path, \"/open/\")\n input.source.trust_domain == \"td\"\n}",
    );
    let allowed = decide(&rules, Request::get("/x/../open/1"));
    assert_eq!((allowed.decision.verdict, &*allowed.decision.rule), (Verdict::Allow, "allow:api"));
    let refused = decide(&rules, Request::get("/open/../1"));
    assert_eq!((refused.decision.verdict, &*refused.decision.rule), (Verdict::Deny, "rego:api"));
    assert_eq!(refused.modules.unwrap().module, Answer { allows: false, failure: None });
    // What the rules refuse is not asked about.
    let stranger = rules.for_peer(&id("spiffe://other/a")).decide(&facts(&rules, Request::get("/open/1")));
    assert_eq!((&*stranger.decision.rule, stranger.modules), ("default", None));
}

#[test]
fn only_true_allows_and_errors_refuse() {
    for (text, failure) in [
        ("allow := \"true\"", None),
        ("allow := 1", None),
        ("allow if input.request.nothing", None),
        ("default allow := true\nallow := false if input.request.method == \"GET\"", None),
        ("default allow := true\nallow if startswith(input.request.method, 1)", Some(ModuleFailure::Evaluation)),
        ("allow if not startswith(input.request.method, 1)", Some(ModuleFailure::Evaluation)),
        ("allow := true if input.request\nallow := false if input.source", Some(ModuleFailure::Evaluation)),
        (
            "n := [x | some a in d; some b in d; some c in d; some e in d; some f in d; x := a + b + c + e + f]\n\
             d := [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]\nallow if count(n) > 0",
            Some(ModuleFailure::Time),
        ),
    ] {
        let decision = decide(&module(text), Request::get("/"));
        assert!(!decision.decision.admits(), "{text}");
        assert_eq!(decision.modules.unwrap().module.failure, failure, "{text}");
    }
}

#[test]
fn without_facts_or_modules_nothing_is_allowed() {
    let place = Place::new("allow := true", None);
    let rules = place.load().unwrap();
    assert!(decide(&rules, Request::get("/")).decision.admits());
    let (parts, ()) = Request::get("/").body(()).unwrap().into_parts();
    let target = HttpTarget::of(&parts.method, &parts.uri, EscapedSlash::Refuse).unwrap();
    let unknown = HttpFacts::new(&parts, None, target, rules.header_names());
    let decision = rules.for_peer(&id("spiffe://td/a")).decide(&unknown);
    assert_eq!(decision.modules.unwrap().module.failure, Some(ModuleFailure::NoFacts));
    let mut before = place.config.clone();
    before.inbound[0].http.rego = None;
    let before = Policy::compile(&before).listener("api").unwrap();
    let kept = facts(&before, Request::get("/").header("x-a", "1"));
    let decision = rules.for_peer(&id("spiffe://td/a")).decide(&kept);
    assert_eq!(decision.modules.unwrap().module.failure, Some(ModuleFailure::NoFacts), "headers may be missing");
    let unread = Policy::compile(&place.config).listener("api").unwrap();
    let decision = decide(&unread, Request::get("/"));
    assert_eq!(decision.modules.unwrap().module.failure, Some(ModuleFailure::NotLoaded));
    assert_eq!((decision.decision.admits(), &*decision.decision.rule), (false, "rego:api"));
}

#[test]
fn a_shadow_module_changes_nothing_and_is_reported() {
    let rules = Place::new("allow := true", Some("allow if input.request.method == \"GET\"")).load().unwrap();
    for (request, differs) in [(Request::get("/"), false), (Request::put("/"), true)] {
        let decision = decide(&rules, request);
        assert!(decision.decision.admits());
        assert_eq!(decision.modules.unwrap().shadow_differs(), differs);
    }
    let rules = Place::new("allow := false", Some("allow := true")).load().unwrap();
    let decision = decide(&rules, Request::get("/"));
    assert!(!decision.decision.admits() && decision.modules.unwrap().shadow_differs());
}

#[test]
fn a_bad_module_is_refused_when_it_is_loaded() {
    for (text, said) in [
        ("allow := ", "module.rego: "),
        ("allow if nothing.like_that(input)", "nothing.like_that"),
        ("allow if http.send({\"method\": \"GET\", \"url\": \"http://a\"})", "http.send"),
        ("deny := true", "it has no data.portcullis.authz.allow"),
        ("allow if count(numbers.range(1, input.n)) > 0", "numbers.range could take any time"),
        ("allow if count(numbers\n . \"range\"(1, input.n)) > 0", "numbers.range could take any time"),
        ("allow if bits[\"lsh\"](1, input.n) > 0", "bits.lsh could take any time"),
    ] {
        let why = Place::new(text, None).load().unwrap_err();
        assert!(why.starts_with("inbound 'api': ") && why.contains(said) && !why.contains('\n'), "{text}: {why}");
    }
    assert!(Place::new("# my_numbers.ranged and numbers are fine\nallow := true", None).load().is_ok());
    let place = Place::new("allow := true", None);
    let file = place.directory.path().join("module.rego");
    std::fs::write(&file, vec![b'#'; 1024 * 1024 + 1]).unwrap();
    assert!(check(&file).unwrap_err().ends_with("it is larger than 1048576 bytes; make it smaller"));
    std::fs::remove_file(&file).unwrap();
    assert!(check(&file).unwrap_err().ends_with("No such file or directory; put it there and make it readable"));
}

#[test]
fn a_reload_knows_that_a_module_has_changed() {
    let of = |module: &str, shadow: Option<&str>| Place::new(module, shadow).load().unwrap();
    let first = of("allow := true", None);
    assert!(first.same_rules_as(&of("allow := true", None)));
    assert!(!first.same_rules_as(&of("allow := false", None)));
    assert!(!first.same_rules_as(&of("allow := true", Some("allow := true"))));
}
