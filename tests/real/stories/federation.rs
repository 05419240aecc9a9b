//! Two trust domains that federate: proxy to proxy, proxy to go-spiffe, and what happens to a P-256 SVID where the
//! profile does not allow it.

use std::path::Path;
use std::sync::Arc;

use crate::harness::{echo, field, program};
use crate::spire::{
    Extra, Pair, SLOW, World, copy_of, event, from_agent, go, go_program, identity, listening, proxy, ready,
};
use crate::stories::whole;

/// Bytes go from one domain to the other, and the metrics say with what cryptography.
pub async fn two_domains(world: Arc<World>) {
    let backend = echo().await;
    let pair =
        Pair::start(&world.folder("federation"), &world.one, &world.two, backend.address, Extra::default()).await;
    whole(pair.way_in).await.unwrap();
    for (proxy, direction) in [(&pair.client, "outbound"), (&pair.server, "inbound")] {
        let labels = [
            ("direction", direction),
            ("version", "TLSv1.3"),
            ("cipher_suite", "TLS_AES_256_GCM_SHA384"),
            ("group", "X25519MLKEM768"),
            ("key_type", "ecdsa-p256"),
            ("compliant", "true"),
        ];
        proxy.metric_reaches("portcullis_tls_negotiated_total", &labels, 1.0).await;
        let metrics = proxy.metrics().await;
        assert_eq!(metrics.sum("portcullis_tls_negotiated_total", &[("compliant", "false")]), 0.0, "{metrics:?}");
        let state = proxy.state().await;
        let domains: Vec<&str> =
            state["bundles"].as_array().unwrap().iter().map(|b| b["trust_domain"].as_str().unwrap()).collect();
        assert_eq!(domains, ["one.example", "two.example"], "{state:#}");
    }
    assert_eq!(pair.client.state().await["identity"]["spiffe_id"], pair.client_id.as_str());
    assert_eq!(*backend.accepted.borrow(), 1);
    assert!(pair.client.stop().await.success());
    assert!(pair.server.stop().await.success());
}

/// With the default profile the proxy does not take SPIRE's P-256 SVID, is not ready, and says what to change.
pub async fn p256_is_refused(world: Arc<World>) {
    let folder = world.folder("p384");
    let own = copy_of(Path::new(program()), &folder, "proxy");
    world.two.entry("/p384", &own, &[]).await;
    let config = from_agent(&world.two).replace("tls: { svid_keys: p256-allowed }\n", "")
        + "inbound:\n  - name: api\n    listen: 127.0.0.1:0\n    to: 127.0.0.1:1\n    allow: [spiffe://one.example]\n";
    assert!(!config.contains("svid_keys"));
    let mut proxy = proxy(&folder, &own, "proxy", &config).await;
    let remedies = ["svid_keys: p256-allowed", "workload_x509_svid_key_type=\"ec-p384\"", "ca_key_type=\"ec-p384\""];
    let refused =
        identity(&proxy, SLOW, "the SVID to be refused", |i| i["counters"]["refused"].as_u64() >= Some(1)).await;
    assert_eq!(refused["state"], "absent", "{refused:#}");
    let (ready, waiting) = proxy.get("/readyz").await;
    assert!(ready == 503 && waiting.starts_with("waiting for: identity\n"), "{ready} {waiting}");
    let why = refused["why"].as_str().unwrap();
    assert!(remedies.iter().all(|remedy| why.contains(remedy)), "{why}");
    let said = |line: &str| field(line, "message").filter(|message| message.contains("an offered SVID is refused"));
    let logged = proxy.running.line("the refusal", said).await;
    assert!(remedies.iter().all(|remedy| logged.contains(remedy)), "{logged}");
    assert!(proxy.stop().await.success());
}

/// A go-spiffe client and a go-spiffe server with SPIRE's identities, each with a proxy on the other side.
pub async fn go_spiffe(world: Arc<World>) {
    let folder = world.folder("go");
    let backend = echo().await;
    let client = go_program("spiffe-client", &folder, "go-client");
    let server = go_program("spiffe-server", &folder, "go-server");
    let client_id = world.one.entry("/go/go-client", &client, &["-federatesWith", &world.two.id("")]).await;
    let server_id = world.two.entry("/go/go-server", &server, &["-federatesWith", &world.one.id("")]).await;
    let proxy_id = world.one.id("/go/client");
    let mut server = go(&server, &world.two, &["-listen", "127.0.0.1:0", "-allow", &proxy_id, "-timeout", "120s"]);
    let address = listening(&mut server).await;
    let extra = Extra {
        allow: vec![client_id],
        outbound: format!(
            "  - name: go\n    listen: 127.0.0.1:0\n    to: {address}\n    expect: {server_id}\n  - name: wrong\n    \
             listen: 127.0.0.1:0\n    to: {address}\n    expect: {}\n",
            world.two.id("/somebody-else")
        ),
        ..Extra::default()
    };
    let pair = Pair::start(&folder, &world.one, &world.two, backend.address, extra).await;

    let to = pair.server.address("api").await.to_string();
    let mut client =
        go(&client, &world.one, &["-addr", &to, "-expect", &pair.server_id, "-half-close", "-timeout", "25s"]);
    let seen = event(&mut client, "connection").await;
    assert!(seen["ok"] == true && seen["echo_matches"] == true, "{seen:#}");
    assert_eq!(seen["peer"], pair.server_id.as_str(), "{seen:#}");
    assert_eq!(seen["curve"], "X25519MLKEM768", "{seen:#}");
    assert_eq!(seen["cipher_suite"], "TLS_AES_256_GCM_SHA384", "{seen:#}");
    assert!(client.wait().await.success());

    whole(pair.client.address("go").await).await.unwrap();
    let seen = event(&mut server, "connection").await;
    assert_eq!((&seen["ok"], &seen["peer"]), (&true.into(), &proxy_id.as_str().into()), "{seen:#}");
    assert_eq!(seen["curve"], "X25519MLKEM768", "{seen:#}");

    // The same server under another name than its own is not spoken to.
    whole(pair.client.address("wrong").await).await.unwrap_err();
    let labels = [("direction", "outbound"), ("reason", "wrong_peer")];
    pair.client.metric_reaches("portcullis_tls_handshakes_total", &labels, 1.0).await;
    ready(&pair.client).await;
    assert_eq!(*backend.accepted.borrow(), 1);
}
