//! The rules of captured traffic in real network namespaces: what nft(8) makes of them, what another hand undoes, what goes
//! where, and that nothing of anybody else's is touched. A listener that says its name stands for the proxy here.

mod connections;
mod pod;
mod traffic;

use std::path::Path;
use std::process::Command;

use portcullis::intercept::{self, Backend, InboundMode, ProxyOwner, Standing};

use crate::harness::program;
use pod::*;

#[test]
fn what_is_printed_is_what_is_applied_and_twice_is_as_once() {
    let Some(pod) = Pod::new() else { return };
    let Some(other) = Pod::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rules.nft");
    let mut many = plan();
    many.proxy = ProxyOwner { uid: Some(1), gid: Some(2), mark: Some(3) };
    many.outbound.as_mut().unwrap().skip_destinations =
        ["10.0.0.0/8", "10.64.0.0/11", "0.0.0.0/0", "2001:db8::/29", "::/0"].map(|net| net.parse().unwrap()).to_vec();
    for plan in [plan(), tproxy(false), tproxy(true), many] {
        std::fs::write(&file, intercept::nft_text(&plan)).unwrap();
        run(&format!("ip netns exec {} nft -f {}", other.pod, file.display()));
        pod.apply(&plan, Backend::Nftables);
        let first = pod.nft_list();
        assert_eq!(first, other.nft_list());
        pod.apply(&plan, Backend::Nftables);
        assert_eq!(first, pod.nft_list());
        // Whoever loads the text by hand has the same as we, and we know it.
        let without_routes = matches!(other.standing(&plan), Standing::Whole);
        assert!(
            without_routes || matches!(plan.inbound.unwrap().mode, InboundMode::Tproxy { preserve_source: true, .. })
        );
        for pod in [&pod, &other] {
            pod.inside(intercept::remove).unwrap();
            assert_eq!(pod.nft_list(), "");
        }
    }
}

#[test]
fn what_belongs_to_others_stays_and_nothing_of_ours_is_left() {
    let Some(pod) = Pod::new() else { return };
    let rules = |pod: &Pod| {
        ["iptables-legacy-save", "ip6tables-legacy-save", "ip rule", "ip -6 rule", "ip route show table all"]
            .map(|command| {
                let text = pod.in_pod(command);
                // Counters, times and link-local addresses change by themselves.
                let lines = text.lines().filter(|line| !line.starts_with(['#', ':']) && !line.contains("fe80:"));
                let lines = lines.map(str::to_owned);
                lines.collect::<Vec<_>>().join("\n")
            })
            .join("\n")
    };
    pod.in_pod("sh -ec 'nft add table inet other; nft add chain inet other out { type nat hook output priority -90\\; }; nft add rule inet other out tcp dport 1 accept'");
    pod.in_pod("iptables-legacy -t nat -A OUTPUT -p tcp --dport 2 -j ACCEPT");
    pod.in_pod("ip6tables-legacy -t nat -A OUTPUT -p tcp --dport 2 -j ACCEPT");
    // The tables of iptables are made by the first look at them.
    for table in ["mangle", "filter"] {
        pod.in_pod(&format!("sh -ec 'iptables-legacy -t {table} -S; ip6tables-legacy -t {table} -S'"));
    }
    pod.in_pod("ip rule add fwmark 0x77 lookup 77");
    let (nft, rest) = (pod.nft_list(), rules(&pod));
    for (plan, backend) in
        [(plan(), Backend::Nftables), (tproxy(true), Backend::Iptables), (tproxy(true), Backend::Nftables)]
    {
        pod.apply(&plan, backend);
        let with_ours = pod.nft_list();
        assert_eq!(with_ours.contains("table inet portcullis"), backend == Backend::Nftables);
        assert!(with_ours.starts_with(&nft), "{with_ours}");
        for line in rest.lines() {
            assert!(rules(&pod).contains(line), "{line}");
        }
    }
    for _ in 0..2 {
        pod.inside(intercept::remove).unwrap();
        assert_eq!((pod.nft_list(), rules(&pod)), (nft.clone(), rest.clone()));
    }
    pod.apply(&tproxy(true), Backend::Iptables);
    pod.inside(intercept::remove).unwrap();
    assert_eq!((pod.nft_list(), rules(&pod)), (nft, rest));
    assert_eq!(pod.standing(&plan()), Standing::Missing);
}

#[test]
fn what_another_hand_has_undone_is_noticed_and_mended() {
    let Some(pod) = Pod::new() else { return };
    let plan = tproxy(true);
    assert_eq!(pod.standing(&plan), Standing::Missing);
    pod.apply(&plan, Backend::Nftables);
    // How nft(8) names a rule of a chain that says this.
    let rule = |chain: &str, said: &str| {
        let list = pod.in_pod(&format!("nft -a list chain inet portcullis {chain}"));
        let line = list.lines().find(|line| line.contains(said)).unwrap().to_owned();
        format!("rule inet portcullis {chain} handle {}", line.split("handle ").nth(1).unwrap())
    };
    let damages: [&dyn Fn() -> String; 17] = [
        &|| "nft flush chain inet portcullis output_nat".to_owned(),
        &|| "nft flush table inet portcullis".to_owned(),
        &|| "nft insert rule inet portcullis output_nat accept".to_owned(),
        &|| "nft add rule inet portcullis prerouting_filter accept".to_owned(),
        &|| "nft add chain inet portcullis stray".to_owned(),
        &|| "nft add table inet portcullis { flags dormant\\; }".to_owned(),
        &|| "nft chain inet portcullis prerouting_filter { policy drop\\; }".to_owned(),
        &|| format!("nft delete {}", rule("output_nat", "15001")),
        &|| format!("nft replace {} meta l4proto tcp redirect to :15002", rule("output_nat", "15001")),
        &|| format!("nft replace {} meta skuid 1000 goto from_proxy", rule("output_nat", "skuid 1337")),
        &|| format!("nft replace {} meta skuid 1337 return", rule("output_nat", "skuid 1337")),
        &|| format!("nft replace {} meta l4proto tcp accept", rule("prerouting_filter", "reject")),
        &|| format!("nft replace {} ip daddr 10.99.0.0/16 return", rule("output_filter", "10.99.0.3")),
        &|| "ip rule del fwmark 0x1506".to_owned(),
        &|| "ip -6 rule del fwmark 0x1506".to_owned(),
        &|| "ip route flush table 1506".to_owned(),
        &|| "ip -6 route flush table 1506".to_owned(),
    ];
    for damage in damages {
        let damage = damage();
        pod.in_pod(&format!("sh -ec '{damage}'"));
        let standing = pod.standing(&plan);
        assert!(matches!(&standing, Standing::Differs(what) if !what.is_empty()), "{damage}: {standing:?}");
        pod.apply(&plan, Backend::Nftables);
    }
    pod.in_pod("nft delete table inet portcullis");
    assert_eq!(pod.standing(&plan), Standing::Missing);
    // A plan that is not the one applied is a difference too.
    pod.apply(&plan, Backend::Nftables);
    assert!(matches!(pod.standing(&self::plan()), Standing::Differs(_)));
}

#[test]
fn iptables_rules_that_another_hand_has_undone_are_noticed_and_mended() {
    let Some(pod) = Pod::new() else { return };
    for damage in [
        "iptables-legacy -t nat -F OUTPUT",
        "iptables-legacy -t nat -I OUTPUT -j ACCEPT",
        "ip6tables-legacy -t mangle -F PORTCULLIS_PREROUTING",
        "ip6tables-legacy -t filter -D PORTCULLIS_OUTPUT 1",
        "iptables-legacy -t nat -R PORTCULLIS_FROM_PROXY 1 -j RETURN",
    ] {
        pod.apply(&plan(), Backend::Iptables);
        pod.in_pod(damage);
        assert!(matches!(pod.standing(&plan()), Standing::Differs(_)), "{damage}");
        pod.inside(intercept::remove).unwrap();
    }
    for damage in [
        "iptables-legacy -t mangle -R PORTCULLIS_OUTPUT 1 -p tcp -m mark --mark 0x1506 -m conntrack --ctstate NEW -j CONNMARK --set-mark 0x1507",
        "ip6tables-legacy -t mangle -R PORTCULLIS_OUTPUT 2 -m conntrack --ctdir REPLY -j MARK --set-mark 0x1506",
    ] {
        pod.apply(&tproxy(true), Backend::Iptables);
        assert_eq!(pod.standing(&tproxy(true)), Standing::Whole);
        pod.in_pod(damage);
        assert!(matches!(pod.standing(&tproxy(true)), Standing::Differs(_)), "{damage}");
        pod.inside(intercept::remove).unwrap();
    }
}

#[test]
fn the_command_applies_shows_and_removes() {
    let Some(pod) = Pod::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("portcullis.yaml");
    let text = |intercept: &str| {
        format!(
            "identity: unix:///run/agent.sock\n{intercept}inbound: [{{ name: in, listen: '0.0.0.0:8443', to: '127.0.0.1:80', allow: [spiffe://a.example/x] }}]\n"
        )
    };
    std::fs::write(&config, text("intercept: { inbound: {}, outbound: {}, dns_servers: [10.99.0.1] }\n")).unwrap();
    let namespace = Pod::path(&pod.pod);
    let redirect = |before: &[&str], arguments: &[&str]| {
        let words = [before, &[program(), "redirect"], arguments].concat();
        let output = Command::new(words[0]).args(&words[1..]).env("PORTCULLIS_CONFIG", &config).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let netns = ["--netns", namespace.to_str().unwrap()];
    for mode in [&[][..], &["--mode", "nft"]] {
        let (code, out, err) = redirect(&[], &[&["apply"], &netns[..], mode].concat());
        assert_eq!((code, err.as_str(), out.lines().count()), (Some(0), "", 1), "{out}");
        assert!(
            out.ends_with("chains by nf_tables; inbound to port 15006 by redirect; outbound to port 15001\n"),
            "{out}"
        );
    }
    let applied = pod.nft_list();
    assert!(applied.contains("tcp dport 8443 return"), "a listener of its own is not captured: {applied}");
    let shown = redirect(&[], &["show"]);
    assert_eq!((shown.0, shown.2.as_str()), (Some(0), ""));
    pod.inside(intercept::remove).unwrap();
    std::fs::write(dir.path().join("rules"), shown.1).unwrap();
    pod.in_pod(&format!("nft -f {}", dir.path().join("rules").display()));
    assert_eq!(pod.nft_list(), applied);

    let (code, out, err) = redirect(&[], &[&["apply"], &netns[..], &["--mode", "iptables"]].concat());
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert!(out.contains("by iptables"), "{out}");
    assert_eq!(pod.nft_list(), "");
    let v6 = redirect(&[], &["show", "--format", "iptables"]).1;
    std::fs::write(dir.path().join("rules"), v6.split("# IPv6\n").nth(1).unwrap()).unwrap();
    pod.in_pod(&format!("ip6tables-legacy-restore --test --noflush {}", dir.path().join("rules").display()));

    for _ in 0..2 {
        let (code, out, err) = redirect(&[], &[&["remove"], &netns[..]].concat());
        assert_eq!((code, out.as_str(), err.as_str()), (Some(0), "removed: no rule of portcullis is left\n", ""));
        assert!(!pod.in_pod("iptables-legacy-save").contains("PORTCULLIS"));
    }

    // The namespace has no file of its own yet, and its name servers are not those of this process.
    std::fs::write(&config, text("intercept: { outbound: {} }\n")).unwrap();
    let own = Path::new("/etc/netns").join(&pod.pod);
    std::fs::create_dir_all(&own).unwrap();
    for (servers, asked, warned) in [("", false, true), ("nameserver 10.99.0.53\n", true, false)] {
        std::fs::write(own.join("resolv.conf"), servers).unwrap();
        let (code, _, err) = redirect(&[], &[&["apply"], &netns[..]].concat());
        let warning = "warning: no name server is known: DNS is refused; name `intercept.dns_servers`\n";
        assert_eq!((code, err.as_str()), (Some(0), if warned { warning } else { "" }));
        let rules = pod.nft_list();
        assert_eq!((rules.contains("10.99.0.53"), rules.contains("dport 53 ")), (asked, asked), "{rules}");
    }
    std::fs::remove_dir_all(own).unwrap();
    pod.inside(intercept::remove).unwrap();

    let powerless = ["ip", "netns", "exec", &pod.pod, "setpriv", "--bounding-set=-all", "--inh-caps=-all"];
    for command in ["apply", "remove"] {
        let (code, out, err) = redirect(&powerless, &[command]);
        assert_eq!((code, out.as_str(), err.lines().count()), (Some(1), "", 1), "{err}");
        assert!(err.contains("CAP_NET_ADMIN in the network namespace: run as root"), "{err}");
    }
    assert_eq!(pod.nft_list(), "");
    let (code, _, err) = redirect(&[], &["apply", "--netns", "/nonexistent"]);
    assert_eq!(code, Some(1));
    assert!(err.starts_with("portcullis: cannot open the network namespace /nonexistent: "), "{err}");
    std::fs::write(&config, text("")).unwrap();
    let (code, _, err) = redirect(&[], &["show"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("nothing is captured; declare it under `intercept`"), "{err}");
}
