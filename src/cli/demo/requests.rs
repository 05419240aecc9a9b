//! The chapter about HTTP and gRPC: what is asked, how it is judged, and how few handshakes it takes.

use std::io;
use std::sync::Arc;

use serde_json::Value;
use tokio::task::JoinSet;

use super::clinic::{SERVICE, call};
use super::ledger::Thing;
use super::screen::{Tone, grouped};
use super::story::Story;
use super::workloads::Caller;
use super::world::id;

const HANDSHAKES: &str = "portcullis_tls_handshakes_total";
const REQUESTS: &str = "portcullis_http_requests_total";
const DECISIONS: &str = "portcullis_authorization_decisions_total";

/// What metric and log name where no rule matched.
const NO_RULE: &str = "default";
/// Connections of the callers that ask all at once, and requests on each.
const CROWD: (u64, u64) = (4, 50);
/// Handshakes are few when each serves so many requests.
const FEW: u64 = 20;

/// How one request is to be judged.
struct Case<'a> {
    /// What is asked, for the reader.
    what: &'a str,
    /// The path as it must have been judged.
    path: &'a str,
    /// What must be answered.
    outcome: &'a str,
    /// What else there is to say of the outcome.
    note: &'a str,
    /// The rule that decides.
    rule: &'a str,
    admitted: bool,
}

/// The trace id of a `traceparent` (W3C Trace Context, section 3.2.2).
fn trace_of(traceparent: &str) -> &str {
    traceparent.split('-').nth(1).unwrap_or_default()
}

/// One field of what the workload says has arrived.
fn field(told: &str, name: &str) -> String {
    let told: Value = serde_json::from_str(told).unwrap_or_default();
    told.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
}

impl Story<'_, '_> {
    pub(super) async fn requests(&mut self) -> io::Result<()> {
        self.telling.screen.chapter(
            "HTTP and gRPC: each request is judged by itself; its rule as metric and log of /clinic have it",
        )?;
        let what = "/web may GET /patients/{id} and call Appointments/Book; nobody may /admin";
        self.telling.screen.tell(Tone::Plain, "rules", what)?;
        let traceparent = format!("00-{:032x}-{:016x}-01", fastrand::u128(1..), fastrand::u64(1..));
        let mut traces = Vec::new();
        self.http(&traceparent, &mut traces).await?;
        self.grpc(&traceparent, &mut traces).await?;

        let asked = self.world.clinic_service.asked();
        let admitted = ["/patients/42".to_owned(), format!("/{SERVICE}/Book")];
        let only = asked.len() == admitted.len() && admitted.iter().all(|path| asked.get(path) == Some(&1));
        let what = "the workload has seen the two that were allowed and none of the others";
        self.telling.seen(Thing::NotForwarded, only, "proof", what)?;
        self.trace(trace_of(&traceparent), &traces)?;
        self.crowd().await
    }

    async fn http(&mut self, traceparent: &str, traces: &mut Vec<String>) -> io::Result<()> {
        let case = Case {
            what: "GET /patients/42",
            path: "/patients/42",
            outcome: "200",
            note: "",
            rule: "read-patients",
            admitted: true,
        };
        let told = self.judged(&case, self.get("/patients/42", traceparent)).await?;
        let caller = told.as_ref().map(|told| field(told, "caller"));
        traces.extend(told.map(|told| field(&told, "traceparent")));
        if self.telling.ledger.tick(Thing::HttpAnswer, caller.as_deref() == Some(&id("web"))) {
            self.telling.screen.more(&format!("the workload was told who asks: URI={}", id("web")))?;
        }
        let admin = Case { what: "", path: "/admin", outcome: "403", note: "", rule: "no-admin", admitted: false };
        let mut all = Vec::new();
        for path in ["/admin", "/patients/../admin", "/patients/%2e%2e/%61dmin"] {
            let note = if path == "/admin" { "" } else { ", judged as /admin" };
            let case = Case { what: &format!("GET {path}"), note, ..admin };
            all.push(self.judged(&case, self.get(path, traceparent)).await?.is_some());
        }
        self.telling.ledger.tick(Thing::PathDenied, all.first() == Some(&true));
        self.telling.ledger.tick(Thing::Spelling, all.iter().all(|refused| *refused));
        Ok(())
    }

    async fn grpc(&mut self, traceparent: &str, traces: &mut Vec<String>) -> io::Result<()> {
        for (method, outcome, rule) in [("Book", "0 OK", "book"), ("Purge", "7 PERMISSION_DENIED", NO_RULE)] {
            let admitted = method == "Book";
            let what = format!("gRPC {SERVICE}/{method}");
            let case = Case { what: &what, path: &format!("/{SERVICE}/{method}"), outcome, note: "", rule, admitted };
            let address = self.world.web.listener;
            let asking = async move {
                let called = call(address, method, traceparent).await?;
                let outcome = match called.status {
                    Some(0) => "0 OK".to_owned(),
                    Some(7) => "7 PERMISSION_DENIED".to_owned(),
                    other => format!("{other:?}"),
                };
                Ok((outcome, called.text))
            };
            let told = self.judged(&case, asking).await?;
            let thing = if admitted { Thing::Called } else { Thing::CallDenied };
            self.telling.ledger.tick(thing, told.is_some());
            traces.extend(told.filter(|_| admitted).map(|told| field(&told, "traceparent")));
        }
        Ok(())
    }

    /// The status of a GET by the web workload, and the body.
    fn get(&self, path: &str, traceparent: &str) -> impl Future<Output = io::Result<(String, String)>> + use<> {
        let (address, path, traceparent) = (self.world.web.listener, path.to_owned(), traceparent.to_owned());
        async move {
            let mut caller = Caller::connect(address).await?;
            let (status, body) = caller.request(&path, &[("traceparent", &traceparent)]).await?;
            Ok((status.as_u16().to_string(), body))
        }
    }

    /// Does it and shows it. The body, if all was as it must be: the answer, the metric of the rule, and the line in the
    /// log of the sidecar that judged.
    async fn judged(
        &mut self,
        case: &Case<'_>,
        asking: impl Future<Output = io::Result<(String, String)>>,
    ) -> io::Result<Option<String>> {
        let world = Arc::clone(&self.world);
        let (word, decision) = if case.admitted { ("allowed", "allow") } else { ("refused", "deny") };
        let labels = [("direction", "inbound"), ("rule", case.rule), ("decision", decision)];
        let before = world.clinic.metrics().await.count(DECISIONS, &labels);
        let (outcome, body) = asking.await.unwrap_or_else(|error| (format!("nothing: {error}"), String::new()));
        let journal = self.journal.clone();
        let confirmed = async || {
            let line = journal.request("clinic", "inbound", case.path)?;
            let logged = line.get("rule").is_some_and(|rule| rule == case.rule);
            let counted = world.clinic.metrics().await.count(DECISIONS, &labels) > before;
            (logged && counted).then_some(())
        };
        let confirmed = self.telling.until(confirmed).await?.is_some();
        if outcome == case.outcome && confirmed {
            let tone = if case.admitted { Tone::Good } else { Tone::Refused };
            let rule = self.telling.screen.bold(case.rule);
            let no_rule = if case.rule == NO_RULE { ": no rule" } else { "" };
            let outcome = format!("{outcome}{}", case.note);
            self.telling.screen.tell(tone, word, &format!("{:<34} {outcome:<22} {rule}{no_rule}", case.what))?;
            return Ok(Some(body));
        }
        let log = if confirmed { "" } else { ", and not by that rule" };
        let what = format!("{}: {} by {}; it got {outcome:.40}{log}", case.what, case.outcome, case.rule);
        self.telling.screen.tell(Tone::Bad, "NOT SEEN", &what)?;
        Ok(None)
    }

    fn trace(&mut self, sent: &str, arrived: &[String]) -> io::Result<()> {
        let carried = arrived.len() == 2 && arrived.iter().all(|traceparent| trace_of(traceparent) == sent);
        let line = self.journal.request("clinic", "inbound", "/patients/42").unwrap_or_default();
        let logged = line.get("trace_id").and_then(Value::as_str);
        let what = format!("{sent}, the caller's, came through and is in the log");
        self.telling.seen(Thing::Trace, carried && logged == Some(sent), "trace", &what)
    }

    /// Many callers at once, to show what their requests have in common.
    async fn crowd(&mut self) -> io::Result<()> {
        let address = self.world.web.listener;
        let mut callers = JoinSet::new();
        for caller in 0..CROWD.0 {
            callers.spawn(async move {
                let mut sender = Caller::connect(address).await?;
                for number in 0..CROWD.1 {
                    sender.ask(&format!("/patients/{}", caller * CROWD.1 + number)).await?;
                }
                io::Result::Ok(())
            });
        }
        let mut all = true;
        while let Some(done) = callers.join_next().await {
            all &= matches!(done, Ok(Ok(())));
        }
        let world = Arc::clone(&self.world);
        let counted = async || {
            let metrics = world.clinic.metrics().await;
            let requests = metrics.count(REQUESTS, &[("direction", "inbound")]);
            let handshakes = metrics.count(HANDSHAKES, &[("direction", "inbound"), ("result", "success")]);
            (requests >= CROWD.0 * CROWD.1 && handshakes > 0).then_some((requests, handshakes))
        };
        let (requests, handshakes) = self.telling.until(counted).await?.unwrap_or_default();
        let few = all && handshakes > 0 && requests >= handshakes * FEW;
        let plural = if handshakes == 1 { "" } else { "s" };
        let what = format!("{} requests, HTTP and gRPC, over {handshakes} handshake{plural} so far", grouped(requests));
        self.telling.seen(Thing::Shared, few, "mTLS", &what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_id_is_the_second_part() {
        assert_eq!(
            trace_of("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
            "4bf92f3577b34da6a3ce929d0e0e4736"
        );
        assert_eq!((trace_of(""), trace_of("00")), ("", ""));
    }

    #[test]
    fn what_the_workload_says_is_read_or_empty() {
        assert_eq!(field(r#"{"caller":"a","path":null}"#, "caller"), "a");
        assert_eq!((field(r#"{"path":null}"#, "path"), field("no json", "path")), (String::new(), String::new()));
    }
}
