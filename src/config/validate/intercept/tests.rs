use crate::config::parse;

const CAPTURED: &str = "inbound: [{ name: a, capture: any, allow: ['spiffe://td'] MORE }]\n";

/// What is said of a captured inbound listener with these options, under these options of `intercept`.
fn said(intercept: &str, more: &str) -> Vec<String> {
    let listener = CAPTURED.replace(" MORE", more);
    match parse(&format!("identity: unix:///a\nintercept: {intercept}\n{listener}"), "f.yaml") {
        Ok(loaded) => loaded.warnings.iter().map(|warning| format!("warning: {}", warning.what)).collect(),
        Err(errors) => errors.to_string().lines().map(str::to_owned).collect(),
    }
}

#[test]
fn a_source_is_preserved_only_where_there_is_one() {
    let preserving = "{ inbound: { mode: tproxy, preserve_source: true } }";
    assert_eq!(said(preserving, ""), [""; 0]);
    for (intercept, more, expected) in [
        ("{ inbound: { preserve_source: true } }", "", "needs `mode: tproxy`"),
        (preserving, ", protocol: detect", "no one source address"),
        (preserving, ", to: '127.0.0.1:80'", "remove `to`"),
        (
            "{ inbound: { mode: tproxy, preserve_source: true }, proxy: { uid: null, mark: 5 } }",
            "",
            "name the proxy's `uid` or `gid`",
        ),
        ("{ inbound: { mark: 5 }, proxy: { mark: 5 } }", "", "a mark of its own"),
        ("{ inbound: { table: 254 } }", "", "that table is the system's"),
    ] {
        let said = said(intercept, more).join("\n");
        assert!(said.contains(expected), "{intercept} {more}: {said}");
    }
    // A mark beside a user or group is fine, and alone it is where no source is preserved.
    for intercept in [
        "{ inbound: { mode: tproxy, preserve_source: true }, proxy: { gid: 7, mark: 5 } }",
        "{ inbound: { mode: tproxy }, proxy: { mark: 5 } }",
    ] {
        assert_eq!(said(intercept, ""), [""; 0], "{intercept}");
    }
    // Listeners with an address of their own preserve nothing, and may carry requests.
    let own = "identity: unix:///a\nintercept: { inbound: { mode: tproxy, preserve_source: true } }\n\
               inbound: [{ name: a, listen: '0.0.0.0:1', to: '127.0.0.1:80', protocol: http, allow: ['spiffe://td'] }]";
    parse(own, "f.yaml").unwrap();
}

#[test]
fn plaintext_is_let_in_only_where_nobody_can_claim_to_be_somebody() {
    let captured = "{ inbound: {} }";
    assert_eq!(said(captured, ", plaintext: audit"), [""; 0]);
    let warned = said(captured, ", plaintext: allow").join("\n");
    assert!(warned.starts_with("warning: ") && warned.contains("no rule is asked"), "{warned}");
    for more in [
        ", plaintext: audit, proxy_protocol: v2",
        ", plaintext: audit, protocol: http, http: { forward_client_cert: set }",
    ] {
        let said = said(captured, more).join("\n");
        assert!(said.contains("could claim any identity"), "{more}: {said}");
    }
    let own = "identity: unix:///a\ninbound: [{ name: a, listen: '0.0.0.0:1', to: '127.0.0.1:80', plaintext: allow }]";
    let said = parse(own, "f.yaml").unwrap_err().to_string();
    assert!(said.contains("only captured connections may be plaintext"), "{said}");
}
