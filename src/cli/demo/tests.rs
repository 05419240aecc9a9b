//! The verdict fails whenever anything was not seen, numbers are read from metrics as they stand there, and plain
//! output holds no escape codes. The whole story runs in `tests/it/demo.rs`.

use super::ledger::{Ledger, Promise, Thing};
use super::outcome_of;
use super::scrape::Metrics;
use super::screen::{Screen, Style, Tone, grouped};
use super::summary::Http;

#[test]
fn the_verdict_names_what_was_not_seen_whichever_it_is() {
    assert_eq!(Ledger::<Thing>::default().verdict().unwrap_err().len(), Thing::ALL.len());
    for missing in Thing::ALL {
        let mut ledger = Ledger::default();
        for thing in Thing::ALL {
            assert_eq!(ledger.tick(*thing, thing != missing), thing != missing);
        }
        assert_eq!(ledger.verdict(), Err(vec![missing.words()]));
        let failure = outcome_of(ledger.verdict()).unwrap_err();
        assert_eq!(failure.code, 1);
        assert_eq!(failure.message, format!("portcullis: demo: not seen: {}", missing.words()));
        assert!(ledger.tick(*missing, true));
        assert_eq!(outcome_of(ledger.verdict()), Ok(std::process::ExitCode::SUCCESS));
    }
}

const SCRAPE: &str = "\
# TYPE h histogram
h_bucket{a=\"x\",le=\"0.001\"} 50
h_bucket{a=\"x\",le=\"0.002\"} 90
h_bucket{a=\"x\",le=\"0.004\"} 100
h_bucket{a=\"x\",le=\"+Inf\"} 100
h_bucket{a=\"y\",le=\"0.001\"} 0
h_bucket{a=\"y\",le=\"+Inf\"} 0
n_total{a=\"x\",b=\"1\"} 3
n_total{a=\"x\",b=\"2\"} 0
n_total{a=\"y\",b=\"1\"} 4
plain 1.5
";

#[test]
fn metrics_read_back() {
    let metrics = Metrics::parse(SCRAPE);
    assert_eq!(metrics.count("n_total", &[("a", "x")]), 3);
    assert_eq!(metrics.count("n_total", &[]), 7);
    assert_eq!(metrics.by("n_total", &[("a", "x")], "b").into_iter().collect::<Vec<_>>(), [("1".to_owned(), 3)]);
    assert!(metrics.sum("plain", &[]) > 1.4);
    let near = |q: f64, expected: f64| (metrics.quantile("h", &[("a", "x")], q).unwrap() - expected).abs() < 1e-9;
    assert!(near(0.5, 0.001) && near(0.7, 0.0015) && near(0.99, 0.0038));
    assert_eq!(metrics.quantile("h", &[("a", "y")], 0.5), None);
}

const CLINIC: &str = "\
http_requests_total{direction=\"inbound\",status_class=\"2xx\"} 9
http_requests_total{direction=\"inbound\",status_class=\"4xx\"} 3
http_requests_total{direction=\"outbound\",status_class=\"5xx\"} 1
grpc_requests_total{direction=\"inbound\",grpc_status=\"0\"} 1
grpc_requests_total{direction=\"inbound\",grpc_status=\"7\"} 1
authorization_decisions_total{direction=\"inbound\",rule=\"read-patients\"} 8
authorization_decisions_total{direction=\"inbound\",rule=\"book\"} 1
authorization_decisions_total{direction=\"inbound\",rule=\"no-admin\"} 3
authorization_decisions_total{direction=\"inbound\",rule=\"default\"} 1
tls_handshakes_total{direction=\"inbound\",result=\"success\"} 1
";

#[test]
fn the_clinics_metrics_confirm_the_story_only_whole() {
    let confirms = |lines: &[&str]| {
        let text: String = lines.iter().map(|line| format!("portcullis_{line}\n")).collect();
        Http::of(&Metrics::parse(&text)).confirms()
    };
    let lines: Vec<_> = CLINIC.lines().collect();
    assert!(confirms(&lines));
    for missing in lines.iter().filter(|line| !line.contains("outbound")) {
        let rest: Vec<_> = lines.iter().copied().filter(|line| line != missing).collect();
        assert!(!confirms(&rest), "{missing}");
    }
    let failed = "http_requests_total{direction=\"inbound\",status_class=\"5xx\"} 1";
    assert!(!confirms(&[lines.as_slice(), &[failed]].concat()));
}

fn told(style: Style) -> String {
    let mut out = Vec::new();
    let mut screen = Screen::new(&mut out, style);
    screen.chapter("One").unwrap();
    screen.progress(0.5, "half").unwrap();
    screen.tell(Tone::Good, "seen", "this").unwrap();
    screen.progress(0.6, "more").unwrap();
    screen.rest().unwrap();
    String::from_utf8(out).unwrap()
}

#[test]
fn escape_codes_are_for_terminals_only() {
    let plain = told(Style::default());
    assert!(plain.contains("1. One\n") && plain.contains("seen      this\n"), "{plain}");
    assert!(!plain.contains('\x1b') && !plain.contains('\r') && !plain.contains("half"));
    let terminal = told(Style { colour: true, progress: true });
    assert!(terminal.contains("\x1b[1m1. One\x1b[0m") && terminal.contains("half"));
    let no_colour = told(Style { colour: false, progress: true });
    assert!(!no_colour.replace("\r\x1b[2K", "").contains('\x1b'));
}

#[test]
fn thousands_are_apart() {
    assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
}
