//! The chapter about rules that are gone: the proxy notices, the other pod's gate holds, and the rules come back.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;

use super::super::screen::Tone;
use super::super::story::ready;
use super::super::summary::HANDSHAKES;
use super::promised::Shown;
use super::stage::{PORT, Sidecar};
use super::story::{ALLOWED, Counted, NEVER, Story, url};

const DRIFT: &str = "portcullis_drift";
/// As it stands in the metrics.
const SERIES: &str = "portcullis_drift{kind=\"interception\"}";

/// Whether the metric says that the interception has drifted.
async fn drifted(sidecar: &Sidecar) -> bool {
    sidecar.metrics().await.count(DRIFT, &[("kind", "interception")]) == 1
}

/// What a sidecar says of a drift of its interception that stands.
fn evidence(state: &Value) -> Option<String> {
    let drifts = state.pointer("/drift")?.as_array()?;
    let drift = drifts.iter().find(|drift| drift.pointer("/kind").is_some_and(|kind| kind == "interception"))?;
    Some(drift.pointer("/evidence/0").and_then(Value::as_str).unwrap_or_default().to_owned())
}

impl Story<'_, '_> {
    pub(super) async fn drift(&mut self) -> io::Result<()> {
        self.telling.screen.chapter("Somebody removes the rules of /frontend")?;
        let stage = Arc::clone(&self.stage);
        let frontend = &stage.frontend;
        let [v4, _] = stage.records.pod.at(PORT);
        let said = frontend.remove().await.unwrap_or_else(|why| why);
        self.telling.screen.tell(Tone::Plain, "drift", &format!("portcullis redirect remove: {said}"))?;
        let removed = Instant::now();
        let noticed = async || {
            let state = frontend.state().await;
            let evidence = evidence(&state).filter(|_| ready(&state).is_none())?;
            drifted(frontend).await.then_some(evidence)
        };
        let noticed = self.telling.until(noticed).await?;
        let what = format!("/frontend after {:.1} s: not ready; {SERIES} 1", removed.elapsed().as_secs_f64());
        self.telling.seen(Shown::Drift, noticed.is_some(), "noticed", &what)?;
        if let Some(evidence) = noticed {
            self.telling.screen.more(&format!("{evidence:.78}"))?;
        }
        let labels = [("direction", "inbound"), ("result", "failure"), ("reason", "not_tls")];
        let counted = Counted { by: &stage.records, metric: HANDSHAKES, labels: &labels };
        self.refused(Shown::OtherGate, &frontend.pod, &url(v4, NEVER), "not_tls", Some(counted)).await?;
        self.telling.screen.more("curl spoke in clear, and the gate of /records let none of it through")?;
        self.healed(v4).await
    }

    async fn healed(&mut self, address: SocketAddr) -> io::Result<()> {
        let stage = Arc::clone(&self.stage);
        let frontend = &stage.frontend;
        let said = frontend.apply().await.unwrap_or_else(|why| why);
        let said = said.split(';').next().unwrap_or_default();
        self.telling.screen.tell(Tone::Good, "healed", &format!("portcullis redirect apply: {said}"))?;
        let over = async || {
            let state = frontend.state().await;
            (evidence(&state).is_none() && ready(&state).is_some() && !drifted(frontend).await).then_some(())
        };
        let over = self.telling.until(over).await?.is_some();
        let url = url(address, ALLOWED);
        let answered = over && self.ask(&frontend.pod, &url).await.body().is_some();
        self.telling.seen(Shown::Healed, answered, "answer", &format!("{:<45} 200", format!("curl {url}")))?;
        self.telling.screen.more(&format!("{SERIES} {}", u8::from(!over)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_drift_of_the_interception_counts() {
        let state =
            serde_json::json!({ "drift": [{ "kind": "other" }, { "kind": "interception", "evidence": ["gone"] }] });
        assert_eq!(evidence(&state).as_deref(), Some("gone"));
        for none in
            [serde_json::json!({ "drift": [{ "kind": "other" }] }), serde_json::json!({ "drift": [] }), Value::Null]
        {
            assert_eq!(evidence(&none), None);
        }
    }
}
