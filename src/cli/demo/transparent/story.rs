//! The story, chapter by chapter. Each does something, looks at what came of it on all sides, and ticks it off.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::Value;

use super::super::rotations::Rotations;
use super::super::screen::Tone;
use super::super::story::ready;
use super::super::summary::{CONNECTIONS, DECISIONS, HANDSHAKES, Side};
use super::super::telling::{Telling, short};
use super::super::world::id;
use super::curl::{Curl, Got, Traffic};
use super::pods::{APPLICATION, Pod};
use super::promised::Shown;
use super::stage::{DENIES, PORT, PROXY, Sidecar, Stage};
use super::summary;
use super::tap::Passed;

/// What is asked for in clear, what is asked for through the proxies, and what must never be heard of.
const IN_CLEAR: &str = "/records/1";
pub(super) const ALLOWED: &str = "/records/2";
pub(super) const NEVER: &str = "/records/99";

/// A story under way.
pub(super) struct Story<'s, 'out> {
    pub(super) telling: Telling<'s, 'out, Shown>,
    pub(super) stage: Arc<Stage>,
    pub(super) curl: Curl,
    /// Where the proxies log, if somebody wants to read it.
    pub(super) log: Option<File>,
    /// What had passed before there were rules.
    pub(super) at_first: Passed,
    /// The traffic, while there is some.
    pub(super) traffic: Option<Traffic>,
}

/// Where a refusal must be counted.
pub(super) struct Counted<'a> {
    pub(super) by: &'a Sidecar,
    pub(super) metric: &'a str,
    pub(super) labels: &'a [(&'a str, &'a str)],
}

impl Counted<'_> {
    async fn now(&self) -> u64 {
        self.by.metrics().await.count(self.metric, self.labels)
    }
}

pub(super) fn url(address: SocketAddr, path: &str) -> String {
    format!("http://{address}{path}")
}

/// One field of what the service says has arrived.
fn field<'a>(told: &'a Value, name: &str) -> &'a str {
    told.get(name).and_then(Value::as_str).unwrap_or_default()
}

impl Story<'_, '_> {
    /// Tells all of it.
    pub(super) async fn tell(&mut self) -> io::Result<()> {
        self.in_clear().await?;
        self.telling.rest_until(0.07).await?;
        self.rules_first().await?;
        self.telling.rest_until(0.16).await?;
        self.proxies().await?;
        self.traffic();
        self.telling.rest_until(0.30).await?;
        self.refusals().await?;
        self.telling.rest_until(0.45).await?;
        self.rotations().await?;
        self.telling.rest_until(0.70).await?;
        self.stop_traffic().await?;
        self.drift().await?;
        let sides = summary::sides(&self.stage).await;
        self.telling.rest_until(0.85).await?;
        self.killed().await?;
        self.telling.rest_until(1.0).await?;
        let passed = self.passed().await? - self.at_first;
        summary::show(&mut self.telling, &sides, passed)
    }

    pub(super) async fn ask(&self, from: &Pod, url: &str) -> Got {
        self.curl.ask(from, url).await.unwrap_or_else(|error| Got::Nothing(format!("no curl: {error}")))
    }

    async fn passed(&self) -> io::Result<Passed> {
        self.stage.tap.passed(&self.stage.wire.0).await
    }

    /// Whether the workload has heard of this path.
    fn heard(&self, path: &str) -> bool {
        self.stage.service.asked().contains_key(path)
    }

    async fn in_clear(&mut self) -> io::Result<()> {
        self.telling.screen.chapter("Pods without Portcullis: what curl says is read by everybody on the wire")?;
        let stage = Arc::clone(&self.stage);
        for (sidecar, what) in [
            (&stage.frontend, format!("curl, uid {APPLICATION}")),
            (&stage.records, format!("an HTTP service on port {PORT}, uid {APPLICATION}")),
            (&stage.stranger, "curl as well".into()),
        ] {
            self.pod(&sidecar.pod, &what)?;
        }
        self.pod(&stage.wire.0, "anybody on the wire, without rules or proxy")?;
        let url = url(stage.records.pod.at(PORT)[0], IN_CLEAR);
        let got = self.ask(&stage.frontend.pod, &url).await;
        let passed = self.passed().await?;
        self.telling.screen.tell(Tone::Plain, "answer", &format!("{:<45} {}", format!("curl {url}"), status(&got)))?;
        self.at_first = passed;
        let read = got.body().is_some() && passed.requests > 0 && passed.answers > 0;
        let what = format!("in clear: GET {IN_CLEAR} HTTP/1.1, and the answer; the service knows nobody");
        self.telling.seen(Shown::InClear, read, "the wire", &what)
    }

    fn pod(&mut self, pod: &Pod, what: &str) -> io::Result<()> {
        self.telling.screen.tell(Tone::Plain, "host", &format!("{:<9} {}, {:<12} {what}", pod.name, pod.v4, pod.v6))
    }

    async fn rules_first(&mut self) -> io::Result<()> {
        self.telling.screen.chapter("The rules come first: no proxy runs yet, and nothing passes any more")?;
        let stage = Arc::clone(&self.stage);
        let mut all = true;
        for sidecar in stage.sidecars() {
            let (tone, said) = match sidecar.apply().await {
                Ok(said) => (Tone::Good, said),
                Err(said) => (Tone::Bad, said),
            };
            all &= tone == Tone::Good;
            let said = said.split(';').next().unwrap_or_default();
            let what = format!("/{:<9} portcullis redirect apply: {said}", sidecar.pod.name);
            self.telling.screen.tell(tone, "rules", &what)?;
        }
        self.telling.ledger.tick(Shown::Rules, all);
        let before = self.passed().await?;
        for (shown, address) in [Shown::ShutV4, Shown::ShutV6].into_iter().zip(stage.records.pod.at(PORT)) {
            self.refused(shown, &stage.frontend.pod, &url(address, NEVER), "", None).await?;
        }
        self.nothing(Shown::NothingBefore, before).await
    }

    /// Shows that nothing that was asked for since has passed anywhere.
    async fn nothing(&mut self, shown: Shown, before: Passed) -> io::Result<()> {
        let passed = self.passed().await? - before;
        let nothing = passed == Passed::default() && !self.heard(NEVER);
        self.telling.seen(shown, nothing, "proof", "the service heard nothing of it, and nothing of it was on the wire")
    }

    async fn proxies(&mut self) -> io::Result<()> {
        self.telling.screen.chapter("The proxies start, and the very same curl works: it is sealed on the way")?;
        let stage = Arc::clone(&self.stage);
        let mut all = true;
        for sidecar in stage.sidecars() {
            all &= self.start(sidecar).await?;
        }
        self.telling.ledger.tick(Shown::Identities, all);
        let before = self.passed().await?;
        for (shown, address) in [Shown::AnswerV4, Shown::AnswerV6].into_iter().zip(stage.records.pod.at(PORT)) {
            self.answered(shown, address).await?;
        }
        let side = Side { metrics: stage.frontend.metrics().await, direction: "outbound" };
        let one = |label| side.by("portcullis_tls_negotiated_total", label).into_keys().collect::<Vec<_>>().join(", ");
        let (version, group) = (one("version"), one("group"));
        let hybrid = if group == "X25519MLKEM768" { " (post-quantum hybrid)" } else { "" };
        let what = format!("{version}, {}, {group}{hybrid}", one("cipher_suite"));
        let within = version == "TLSv1.3" && side.outside() == 0;
        self.telling.seen(Shown::Profile, within, "mTLS", &what)?;
        let passed = self.passed().await? - before;
        let sealed = passed.clear() == 0 && passed.sealed > 0;
        self.telling.seen(Shown::Sealed, sealed, "the wire", "records of TLS, and nothing in clear")
    }

    /// Starts a proxy and waits until it is ready.
    async fn start(&mut self, sidecar: &Sidecar) -> io::Result<bool> {
        sidecar.start(self.log.as_ref()).await.map_err(io::Error::other)?;
        let Some((serial, key)) = self.telling.until(async || ready(&sidecar.state().await)).await? else {
            let what = format!("the proxy of /{} is not ready: {:.100}", sidecar.pod.name, sidecar.last_words());
            self.telling.screen.tell(Tone::Bad, "NOT SEEN", &what)?;
            return Ok(false);
        };
        let what = format!("/{:<9} {key} {} portcullis run, uid {PROXY}", sidecar.pod.name, short(&serial));
        self.telling.screen.tell(Tone::Plain, "SVID", &what)?;
        Ok(true)
    }

    /// Asks as the frontend, and shows what the service says of it.
    async fn answered(&mut self, shown: Shown, address: SocketAddr) -> io::Result<()> {
        let stage = Arc::clone(&self.stage);
        let url = url(address, ALLOWED);
        let got = self.ask(&stage.frontend.pod, &url).await;
        let told: Value = serde_json::from_str(got.body().unwrap_or_default()).unwrap_or_default();
        let (at, caller) = (field(&told, "at"), field(&told, "caller"));
        let proven = at == address.to_string() && caller == id("frontend");
        self.telling.seen(shown, proven, "answer", &format!("{:<45} {}", format!("curl {url}"), status(&got)))?;
        if proven {
            self.telling.screen.more(&format!("asked at {at} by {caller}"))?;
        }
        Ok(())
    }

    fn traffic(&mut self) {
        let stage = Arc::clone(&self.stage);
        let urls = stage.records.pod.at(PORT).map(|address| url(address, ALLOWED));
        let traffic = Traffic::start(&self.curl, &stage.frontend.pod, urls, &id("frontend"));
        self.telling.tally = Some(Arc::clone(&traffic.tally));
        self.traffic = Some(traffic);
    }

    async fn stop_traffic(&mut self) -> io::Result<()> {
        if let Some(mut traffic) = self.traffic.take() {
            traffic.stop().await;
        }
        self.telling.no_failure(Shown::NoFailure)
    }

    async fn refusals(&mut self) -> io::Result<()> {
        self.telling.screen.chapter("Who must not get through, and the reason as the metrics have it")?;
        let stage = Arc::clone(&self.stage);
        let [v4, v6] = stage.records.pod.at(PORT);
        let (frontend, stranger, outsider) = (&stage.frontend, &stage.stranger, &stage.wire.0);
        self.denied_path(v4).await?;
        let failed = |reason| [("direction", "inbound"), ("result", "failure"), ("reason", reason)];
        let denied = Counted { by: &stage.records, metric: HANDSHAKES, labels: &failed("denied") };
        self.refused(Shown::Denied, &stranger.pod, &url(v6, NEVER), "denied", Some(denied)).await?;
        let plain = Counted { by: &stage.records, metric: HANDSHAKES, labels: &failed("not_tls") };
        self.refused(Shown::Plaintext, outsider, &url(v4, NEVER), "not_tls", Some(plain)).await?;
        let labels = [("direction", "outbound"), ("cause", "undeclared")];
        let undeclared = Counted { by: frontend, metric: CONNECTIONS, labels: &labels };
        let elsewhere = url(stranger.pod.at(PORT)[0], NEVER);
        self.refused(Shown::Undeclared, &frontend.pod, &elsewhere, "undeclared", Some(undeclared)).await?;
        let unheard = !self.heard(NEVER) && !self.heard("/admin");
        self.telling.seen(Shown::Unheard, unheard, "proof", "the service has heard of none of these")
    }

    /// A request of the one who is admitted, for what nobody is.
    async fn denied_path(&mut self, address: SocketAddr) -> io::Result<()> {
        let stage = Arc::clone(&self.stage);
        let labels = [("direction", "inbound"), ("rule", DENIES), ("decision", "deny")];
        let counted = Counted { by: &stage.records, metric: DECISIONS, labels: &labels };
        let before = counted.now().await;
        let url = url(address, "/admin");
        let got = self.ask(&stage.frontend.pod, &url).await;
        let more = async || (counted.now().await > before).then_some(());
        let more = self.telling.until(more).await?.is_some();
        let denied = more && matches!(got, Got::Answer { status: 403, .. });
        let rule = self.telling.screen.bold(DENIES);
        let what = asked(&stage.frontend.pod, &url, &status(&got), &rule);
        self.telling.seen(Shown::PathDenied, denied, "refused", &what)
    }

    /// Asks, and shows that there is no answer and that the refusal is counted where it should be.
    pub(super) async fn refused(
        &mut self,
        shown: Shown,
        from: &Pod,
        url: &str,
        reason: &str,
        counted: Option<Counted<'_>>,
    ) -> io::Result<()> {
        let before = match &counted {
            Some(counted) => counted.now().await,
            None => 0,
        };
        let got = self.ask(from, url).await;
        let more = match &counted {
            Some(counted) => self.telling.until(async || (counted.now().await > before).then_some(())).await?.is_some(),
            None => true,
        };
        let refused = more && matches!(got, Got::Nothing(_));
        let reason = self.telling.screen.bold(reason);
        self.telling.seen(shown, refused, "refused", &asked(from, url, &status(&got), &reason))?;
        if !refused {
            self.telling.screen.more(&format!("{} asked for {url} and got: {:.40}", from.name, status(&got)))?;
        }
        Ok(())
    }

    async fn rotations(&mut self) -> io::Result<()> {
        self.telling.screen.chapter("SVIDs rotate while curl goes on")?;
        let stage = Arc::clone(&self.stage);
        let both = [&stage.records, &stage.frontend];
        let rotations = Rotations::watch(both.map(|sidecar| (sidecar.pod.name, sidecar.admin())));
        let rotated = self.telling.rotations(&rotations, &both.map(|sidecar| sidecar.pod.name)).await?;
        if !self.telling.ledger.tick(Shown::Rotations, rotated) {
            self.telling.screen.tell(Tone::Bad, "NOT SEEN", "a rotation of both")?;
        }
        self.telling.tally("meanwhile")
    }

    async fn killed(&mut self) -> io::Result<()> {
        self.telling.screen.chapter("The proxies are killed: the gate stays shut")?;
        let stage = Arc::clone(&self.stage);
        let [v4, v6] = stage.records.pod.at(PORT);
        let before = self.passed().await?;
        stage.frontend.kill()?;
        self.telling.screen.tell(Tone::Plain, "kill -9", "the proxy of /frontend, and curl is tried again")?;
        self.refused(Shown::ShutAgain, &stage.frontend.pod, &url(v6, NEVER), "", None).await?;
        stage.records.kill()?;
        self.telling.screen.tell(Tone::Plain, "kill -9", "the proxy of /records, and the outsider tries")?;
        self.refused(Shown::ShutBehind, &stage.wire.0, &url(v4, NEVER), "", None).await?;
        self.nothing(Shown::NothingAfter, before).await
    }
}

/// A line of what was asked for, and what came of it.
fn asked(from: &Pod, url: &str, outcome: &str, reason: &str) -> String {
    let from = format!("{}:", from.name);
    let url = url.trim_start_matches("http://");
    format!("{from:<9} {url:<30} {outcome:<20} {reason}")
}

fn status(got: &Got) -> String {
    match got {
        Got::Answer { status, .. } => status.to_string(),
        Got::Nothing(why) => why.clone(),
    }
}
