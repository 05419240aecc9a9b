//! Whether anything gets round the gate: `redirect verify` tries it, and a proxy that runs watches over it. Pods are network
//! namespaces; rules come and go by our own hand and by another's.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::harness::{Domain, Proxy, output, program, succeeds, until};
use crate::netns::{Net, PROXY, Pod, ROOT, hand_over, within_reach};

/// Every attempt of `redirect verify` that is of one family.
const ATTEMPTS: [&str; 8] = [
    "proxy",
    "outbound_tcp",
    "outbound_tcp_dns",
    "outbound_udp",
    "outbound_udp_dns",
    "inbound_tcp",
    "inbound_udp",
    "own_address",
];
const DRIFT: &str = "portcullis_drift";
const DETECTED: &str = "portcullis_drift_detected_total";
const INTERCEPTION: [(&str, &str); 1] = [("kind", "interception")];

struct Captured {
    pod: Pod,
    domain: Domain,
    config: String,
    file: PathBuf,
    _net: Net,
}

impl Captured {
    /// A pod with a config that captures, and no rules yet. None, and loudly, where there are no namespaces.
    #[track_caller]
    fn new(options: &str) -> Option<impl Future<Output = Self>> {
        let net = Net::new()?;
        let options = options.to_owned();
        Some(async move {
            let pod = net.pod("pod").await;
            let domain = Domain::new("a.example");
            let config = format!(
                "{}intercept:\n  inbound: {{}}\n  outbound: {{}}\n  dns_servers: [10.77.0.53]\n{options}inbound:\n  - \
                 name: any\n    capture: any\n    allow: ['{}']\n",
                domain.identity("/server"),
                domain.id("/client")
            );
            let file = domain.path().join("rules.yaml");
            std::fs::write(&file, &config).unwrap();
            Self { pod, domain, config, file, _net: net }
        })
    }

    async fn redirect(&self, what: &str) {
        let mut command = self.pod.command(ROOT, program());
        command.args(["redirect", what]);
        if what == "apply" {
            command.arg("--config").arg(&self.file);
        }
        succeeds(&mut command, "").await;
    }

    /// Another hand.
    async fn nft(&self, words: &str) {
        succeeds(self.pod.command(ROOT, "nft").args(words.split(' ')), "").await;
    }

    async fn verify(&self, user: u32, more: &[&str]) -> (i32, Vec<Value>) {
        let program = within_reach(Path::new(program()), self.domain.path());
        let mut command = self.pod.command(user, program);
        command.args(["redirect", "verify", "--output", "json", "--config"]).arg(&self.file).args(more);
        let answer = output(&mut command, "").await;
        let told: Value = serde_json::from_slice(&answer.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&answer.stderr)));
        let code = answer.status.code().unwrap();
        assert_eq!(told["proven"], code == 0, "{told}");
        (code, told["findings"].as_array().unwrap().clone())
    }
}

/// The verdict and the detail of one attempt.
fn of<'a>(findings: &'a [Value], attempt: &str, family: &str) -> (&'a str, &'a str) {
    let found = findings
        .iter()
        .find(|finding| finding["attempt"] == attempt && (finding["family"] == family || finding["family"].is_null()));
    let found = found.unwrap_or_else(|| panic!("{attempt} {family}: {findings:?}"));
    (found["verdict"].as_str().unwrap(), found["detail"].as_str().unwrap())
}

fn all_hold(findings: &[Value]) {
    assert_eq!(findings.len(), 1 + 2 * ATTEMPTS.len(), "{findings:?}");
    for (attempt, family) in ATTEMPTS.iter().flat_map(|attempt| [(attempt, "IPv4"), (attempt, "IPv6")]) {
        assert_eq!(of(findings, attempt, family).0, "holds", "{attempt} {family}: {findings:?}");
    }
    assert_eq!(of(findings, "rules", "").0, "holds", "{findings:?}");
}

#[tokio::test]
async fn verify_names_what_passes_and_is_content_with_nothing_less_than_all() {
    let Some(captured) = Captured::new("") else { return };
    let captured = captured.await;

    let (code, findings) = captured.verify(ROOT, &[]).await;
    assert_eq!((code, of(&findings, "rules", "").0), (1, "differs"));
    for family in ["IPv4", "IPv6"] {
        for attempt in ATTEMPTS.iter().filter(|attempt| **attempt != "proxy") {
            assert_eq!(of(&findings, attempt, family).0, "passes", "{attempt} {family}: {findings:?}");
        }
    }
    assert_eq!(captured.verify(ROOT, &["--lenient"]).await.0, 1);

    captured.redirect("apply").await;
    let (code, findings) = captured.verify(ROOT, &[]).await;
    all_hold(&findings);
    assert_eq!((code, of(&findings, "inbound_tcp", "IPv6").1), (0, "refused"));
    assert_eq!(captured.verify(ROOT, &["--as", "2000"]).await.0, 0);

    let proxy = captured.pod.proxy(&captured.domain, &captured.config).await;
    proxy.ready().await;
    let (code, findings) = captured.verify(ROOT, &[]).await;
    all_hold(&findings);
    assert_eq!((code, of(&findings, "outbound_tcp", "IPv4").1), (0, "taken by the proxy"));
    assert!(proxy.stop().await.success());

    // A hole for one user is seen only as that user.
    captured.nft("insert rule inet portcullis output_nat meta skuid 2000 return").await;
    let (code, findings) = captured.verify(ROOT, &["--as", "2000"]).await;
    assert_eq!((code, of(&findings, "outbound_tcp", "IPv6").0), (1, "passes"), "{findings:?}");
    let (code, findings) = captured.verify(ROOT, &[]).await;
    assert_eq!((code, of(&findings, "outbound_tcp", "IPv6").0), (1, "holds"), "{findings:?}");
    captured.redirect("apply").await;

    captured.nft("flush chain inet portcullis prerouting_nat").await;
    let (code, findings) = captured.verify(ROOT, &[]).await;
    assert_eq!((code, of(&findings, "rules", "").0), (1, "differs"));
    for family in ["IPv4", "IPv6"] {
        assert_eq!(of(&findings, "inbound_tcp", family).0, "passes", "{findings:?}");
        assert_eq!(of(&findings, "outbound_tcp", family).0, "holds", "{findings:?}");
    }
    // Nothing is left of the other host.
    let links = succeeds(captured.pod.command(ROOT, "ip").args(["-o", "link"]), "").await;
    assert!(!links.contains("pcl-"), "{links}");
}

#[tokio::test]
async fn verify_without_a_capability_says_what_it_cannot_tell() {
    let Some(captured) = Captured::new("") else { return };
    let captured = captured.await;
    captured.redirect("apply").await;
    hand_over(captured.domain.path(), PROXY);
    // The proxy's own user: whatever the workload could do it cannot try.
    let (code, findings) = captured.verify(PROXY, &[]).await;
    assert_eq!(code, 1);
    assert_eq!(of(&findings, "own_address", "IPv6").0, "holds", "{findings:?}");
    assert_eq!(of(&findings, "outbound_tcp", "IPv4").0, "unproven", "{findings:?}");
    let (verdict, why) = of(&findings, "inbound_tcp", "IPv4");
    assert!(verdict == "unproven" && why.contains("CAP_SYS_ADMIN"), "{why}");
    assert_eq!(captured.verify(PROXY, &["--lenient"]).await.0, 0);
    // Leniency does not forgive what is seen to pass.
    captured.redirect("remove").await;
    let (code, findings) = captured.verify(PROXY, &["--lenient"]).await;
    assert_eq!((code, of(&findings, "own_address", "IPv4").0), (1, "passes"), "{findings:?}");
}

async fn drifts(proxy: &Proxy, stands: f64, detected: f64) {
    until("the drift to be told", || async {
        let metrics = proxy.metrics().await;
        let now = (metrics.sum(DRIFT, &INTERCEPTION), metrics.sum(DETECTED, &INTERCEPTION));
        (now == (stands, detected)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_proxy_without_capabilities_sees_that_its_rules_are_gone_and_that_they_are_back() {
    let Some(captured) = Captured::new("  check_interval: 200ms\n  require_interception: true\n") else { return };
    let captured = captured.await;
    let mut proxy = captured.pod.proxy(&captured.domain, &captured.config).await;
    drifts(&proxy, 1.0, 1.0).await;
    let (status, text) = proxy.get("/readyz").await;
    assert!(status == 503 && text.contains("interception: a connection to 10.77.0.1 was not captured"), "{text}");

    captured.redirect("apply").await;
    proxy.ready().await;
    drifts(&proxy, 0.0, 1.0).await;
    let state = proxy.state().await;
    let findings = &state["interception"]["findings"];
    assert_eq!((&state["interception"]["whole"], state["drift"].as_array().unwrap().len()), (&Value::Bool(true), 0));
    for own in ["own_address_ipv4", "own_address_ipv6"] {
        assert_eq!(findings[own]["verdict"], "holds", "{findings}");
    }
    assert_eq!(findings["rules"]["verdict"], "not_checked", "{findings}");
    // Probes are no connections of anybody.
    let refused = proxy.metrics().await.sum("portcullis_connections_total", &[("direction", "inbound")]);
    assert_eq!(refused, 0.0);

    captured.nft("flush ruleset").await;
    drifts(&proxy, 1.0, 2.0).await;
    let told = until("the drift in the state", || async { proxy.state().await["drift"].get(0).cloned() }).await;
    assert_eq!(told["kind"], "interception");
    assert!(told["remedy"].as_str().unwrap().contains("redirect apply"), "{told}");
    assert_eq!(proxy.get("/readyz").await.0, 503);
    captured.redirect("apply").await;
    proxy.ready().await;
    drifts(&proxy, 0.0, 2.0).await;
    proxy.running.line("the end of the drift", |line| line.contains("drift is over").then_some(())).await;
    assert!(proxy.stop().await.success());
}

#[tokio::test]
async fn a_proxy_that_may_read_the_rules_hears_of_a_single_one_at_once() {
    let Some(captured) = Captured::new("  check_interval: 1h\n") else { return };
    let captured = captured.await;
    captured.redirect("apply").await;
    let dir = captured.domain.path();
    hand_over(dir, PROXY);
    let program = within_reach(Path::new(program()), dir);
    let mut command = captured.pod.command(ROOT, "setpriv");
    command.args(["--reuid", "1337", "--regid", "1337", "--clear-groups"]);
    command.args(["--inh-caps", "+net_admin", "--ambient-caps", "+net_admin", "--"]).arg(program);
    let proxy = Proxy::start_within(&captured.pod, dir, "proxy", &captured.config, command).await;
    until("the first look", || async {
        (proxy.state().await["interception"]["findings"]["rules"]["verdict"] == "holds").then_some(())
    })
    .await;
    captured.nft("flush chain inet portcullis prerouting_nat").await;
    drifts(&proxy, 1.0, 1.0).await;
    let drift = proxy.state().await["drift"][0].clone();
    assert!(drift["evidence"][0].as_str().unwrap().contains("prerouting_nat"), "{drift}");
    // Nobody asked for it to count.
    proxy.ready().await;
    captured.redirect("apply").await;
    drifts(&proxy, 0.0, 1.0).await;
    assert!(proxy.stop().await.success());
}

#[tokio::test]
async fn rules_that_know_the_proxy_by_another_user_are_drift() {
    let options = "  check_interval: 200ms\n  require_interception: true\n  proxy: { uid: 1338 }\n";
    let Some(captured) = Captured::new(options) else { return };
    let captured = captured.await;
    captured.redirect("apply").await;
    let proxy = captured.pod.proxy(&captured.domain, &captured.config).await;
    drifts(&proxy, 1.0, 1.0).await;
    let (_, text) = proxy.get("/readyz").await;
    assert!(text.contains("this process is user 1337") && text.contains("intercept.proxy names neither"), "{text}");
    assert!(proxy.stop().await.success());
}
