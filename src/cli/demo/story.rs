//! The story, chapter by chapter. Each chapter does something, looks at what the sidecars say of it, and ticks it off.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::intruders::{self, Got};
use super::journal::Journal;
use super::ledger::Thing;
use super::screen::Tone;
use super::telling::{Telling, short};
use super::workloads::{Caller, Frontend};
use super::world::{DOMAIN, Sidecar, World, id};
use crate::tls::reason::Reason;

const HANDSHAKES: &str = "portcullis_tls_handshakes_total";
const NEGOTIATED: &str = "portcullis_tls_negotiated_total";
const DURATION: &str = "portcullis_tls_handshake_duration_seconds";
const CONNECTIONS: &str = "portcullis_connections_total";
const OFFERED_WEAK: &str = "portcullis_tls_offered_weak_total";

/// A story under way.
pub(super) struct Story<'s, 'out> {
    pub(super) telling: Telling<'s, 'out, Thing>,
    pub(super) world: Arc<World>,
    /// What the sidecars log.
    pub(super) journal: Journal,
    /// The traffic, once it has begun.
    pub(super) frontend: Option<Frontend>,
}

impl Story<'_, '_> {
    /// Tells all of it but the summary.
    pub(super) async fn tell(&mut self) -> io::Result<()> {
        self.identities().await?;
        self.first_request().await?;
        self.requests().await?;
        self.traffic()?;
        self.telling.rest_until(0.10).await?;
        self.refusals().await?;
        self.telling.rest_until(0.25).await?;
        self.rotations().await?;
        self.telling.rest_until(0.45).await?;
        self.new_ca().await?;
        self.telling.rest_until(0.70).await?;
        self.policy().await?;
        self.telling.rest_until(0.85).await?;
        self.weak_offer().await?;
        self.telling.rest_until(1.0).await?;
        self.telling.no_failure(Thing::NoFailure)
    }

    async fn identities(&mut self) -> io::Result<()> {
        self.telling.screen.chapter("Workloads and their sidecars get identities")?;
        let world = Arc::clone(&self.world);
        let mut all = true;
        for sidecar in world.sidecars() {
            let state = self.telling.until(async || ready(&sidecar.state().await)).await?;
            all &= state.is_some();
            let Some((serial, key)) = state else { continue };
            let role = match sidecar.name {
                "records" => format!("mTLS {} -> {}", sidecar.listener, world.workload.address),
                "clinic" => format!("mTLS {} -> {}", sidecar.listener, world.clinic_service.address),
                _ => format!("plaintext {} -> mTLS", sidecar.listener),
            };
            let what = format!("/{:<9} {key} {} {role}", sidecar.name, short(&serial));
            self.telling.screen.tell(Tone::Plain, "SVID", &what)?;
        }
        let life = world.life.as_secs();
        let what = format!("each has an SVID of {life} s; /records admits only /frontend, /clinic only /web");
        self.telling.seen(Thing::Identities, all, "ready", &what)
    }

    async fn first_request(&mut self) -> io::Result<()> {
        self.telling.screen.chapter("The first request: plaintext on both ends, mTLS between")?;
        let world = Arc::clone(&self.world);
        self.telling.screen.tell(
            Tone::Plain,
            "request",
            "GET /records/1 from the frontend workload to its own sidecar",
        )?;
        let mut caller = match Caller::connect(world.frontend.listener).await {
            Ok(caller) => caller,
            Err(error) => return self.telling.screen.tell(Tone::Bad, "NO ANSWER", &error.to_string()),
        };
        let answer = caller.ask("/records/1").await.unwrap_or_else(|error| format!("none: {error}"));
        let known = answer.contains(&format!("\"{}\"", id("frontend")));
        self.telling.seen(Thing::Answer, known, "answer", &answer)?;
        let metrics = world.frontend.metrics().await;
        let outbound = [("direction", "outbound")];
        let one = |label: &str| {
            let names = metrics.by(NEGOTIATED, &outbound, label).into_keys().collect::<Vec<_>>();
            names.join(", ")
        };
        let version = one("version");
        let compliant = metrics.count(NEGOTIATED, &[("direction", "outbound"), ("compliant", "true")]) == 1;
        let hybrid = if one("group") == "X25519MLKEM768" { " (post-quantum hybrid)" } else { "" };
        let what = format!("{version}, {}, {}{hybrid}", one("cipher_suite"), one("group"));
        self.telling.seen(Thing::Profile, compliant && version == "TLSv1.3", "mTLS", &what)?;
        let state = world.frontend.state().await;
        let peer = state.pointer("/connections/listed/0/peer").and_then(Value::as_str).unwrap_or("nobody");
        let took = metrics.sum(&format!("{DURATION}_sum"), &outbound) * 1000.0;
        self.telling.screen.more(&format!("peer {peer}, {}, in {took:.2} ms", one("key_type")))
    }

    fn traffic(&mut self) -> io::Result<()> {
        // A kept connection ends in order well before the SVIDs that it was made with.
        let keep = self.world.life / 5;
        let mut frontend = Frontend::start(self.world.frontend.listener, &id("frontend"), keep);
        // The connection of HTTP is its caller's own: it outlives every SVID of the sidecars.
        frontend.also(self.world.web.listener, &id("web"), "/patients");
        self.telling.tally = Some(Arc::clone(&frontend.tally));
        self.frontend = Some(frontend);
        let what = "goes on to the end: some 40 requests a second, connections kept and new";
        self.telling.screen.tell(Tone::Plain, "traffic", what)
    }

    /// How often the records sidecar has refused for this reason, by its own metric.
    async fn refused(records: &Sidecar, reason: Reason) -> u64 {
        let labels = [("direction", "inbound"), ("result", "failure"), ("reason", reason.as_str())];
        records.metrics().await.count(HANDSHAKES, &labels)
    }

    async fn refusals(&mut self) -> io::Result<()> {
        self.telling.screen.chapter("Who must not get in, and the reason as the metric of /records has it")?;
        let world = Arc::clone(&self.world);
        let records = world.records.listener;
        let roots = world.authority.subscribe().borrow().own_authorities().to_vec();
        let who = "/stranger: a valid SVID of this domain, no rule";
        self.refuse(Thing::Denied, Reason::Denied, who, intruders::plain_http(world.stranger.listener)).await?;
        let issued = |authority: &crate::authority::Authority, name: &str| {
            World::request(authority, name).and_then(|request| authority.issue(&request).map_err(|e| e.to_string()))
        };
        if let Ok(svid) = issued(&world.forger, "frontend") {
            let who = "a forged /frontend, signed by another authority";
            self.refuse(Thing::Forged, Reason::Untrusted, who, intruders::tls(records, &roots, Some(&svid))).await?;
        }
        if let Ok(svid) = issued(&world.elsewhere, "visitor") {
            let who = "a visitor of spiffe://elsewhere.example";
            let attempt = intruders::tls(records, &roots, Some(&svid));
            self.refuse(Thing::Foreign, Reason::UnknownTrustDomain, who, attempt).await?;
        }
        let who = "a TLS client without a certificate";
        self.refuse(Thing::Bare, Reason::NoCertificate, who, intruders::tls(records, &roots, None)).await?;
        self.refuse(Thing::Plaintext, Reason::NotTls, "plain HTTP", intruders::plain_http(records)).await?;
        let callers = world.workload.callers();
        let own = callers.get(&id("frontend")).copied().unwrap_or(0);
        let others: u64 = callers.values().sum::<u64>() - own;
        let what = format!("the workload was dialled {own} times for /frontend and {others} times for anybody else");
        self.telling.seen(Thing::NotDialled, own > 0 && others == 0, "proof", &what)
    }

    async fn refuse(
        &mut self,
        thing: Thing,
        reason: Reason,
        who: &str,
        attempt: impl Future<Output = Got>,
    ) -> io::Result<()> {
        let world = Arc::clone(&self.world);
        let before = Self::refused(&world.records, reason).await;
        let got = attempt.await;
        let counted = async || (Self::refused(&world.records, reason).await > before).then_some(());
        let counted = self.telling.until(counted).await?.is_some();
        let nothing = matches!(got, Got::Nothing(_));
        let reason = self.telling.screen.bold(reason.as_str());
        self.telling.seen(thing, nothing && counted, "refused", &format!("{who:<50} {reason}"))?;
        if let Got::Something(what) = got {
            self.telling.screen.more(&format!("it got: {what:.60}"))?;
        }
        Ok(())
    }

    async fn rotations(&mut self) -> io::Result<()> {
        self.telling.screen.chapter("SVIDs rotate under load")?;
        // Those so far have gone by unshown; they are in the summary.
        self.world.rotations.take();
        let world = Arc::clone(&self.world);
        self.telling.rotations(&world.rotations, &[world.records.name, world.frontend.name]).await?;
        self.telling.tally("meanwhile")
    }

    async fn new_ca(&mut self) -> io::Result<()> {
        self.telling.screen.chapter("The CA is replaced under load")?;
        let world = Arc::clone(&self.world);
        let published = world.authority.subscribe();
        let active = || published.borrow().active_ca().unwrap_or("none").to_owned();
        let old = active();
        let made = world.authority.prepare_ca();
        let both = made.is_ok() && self.bundles_of(2).await?;
        let what = format!("a second CA is in every sidecar's bundle; {} signs on", short(&old));
        self.telling.screen.tell(Tone::Plain, "prepare", &what)?;
        let switched = world.authority.activate_ca().is_ok() && active() != old;
        let what = format!("{} -> {} signs now", short(&old), short(&active()));
        self.telling.screen.tell(Tone::Plain, "activate", &what)?;
        world.rotations.take();
        // Connections that were made with the old SVIDs must have ended before their CA goes.
        let grace = world.life / 5 + Duration::from_millis(800);
        let authority = world.authority.clone();
        let retired = tokio::spawn(async move { authority.retire_old_cas(grace).await });
        let rotated = self.telling.rotations(&world.rotations, &[world.records.name, world.frontend.name]).await?;
        let one = self.bundles_of(1).await? && retired.await.is_ok_and(|retired| retired.is_ok());
        let what = format!("{} is in no bundle any more", short(&old));
        self.telling.seen(Thing::NewCa, both && switched && rotated && one, "retired", &what)?;
        let full = [("direction", "inbound"), ("resumed", "false")];
        let name = format!("{DURATION}_count");
        let before = world.records.metrics().await.count(&name, &full);
        let more = async || {
            let now = world.records.metrics().await.count(&name, &full);
            (now > before).then_some(now - before)
        };
        let more = self.telling.until(more).await?;
        let what = "full handshakes go on between SVIDs of the new CA";
        self.telling.seen(Thing::OnNewCa, more.is_some(), "mTLS", what)?;
        self.telling.tally("meanwhile")
    }

    /// Waits until every sidecar has so many authorities of our trust domain.
    async fn bundles_of(&mut self, count: usize) -> io::Result<bool> {
        let world = Arc::clone(&self.world);
        let there = async || {
            for sidecar in world.sidecars() {
                if authorities(&sidecar.state().await) != count {
                    return None;
                }
            }
            Some(())
        };
        Ok(self.telling.until(there).await?.is_some())
    }

    async fn policy(&mut self) -> io::Result<()> {
        self.telling.screen.chapter("A policy drifts and is healed, under a live connection")?;
        let world = Arc::clone(&self.world);
        let records = &world.records;
        let reload = |names: &[&str]| world.admitting(names).and_then(|config| records.node.reload(config));
        if let Err(why) = reload(&["frontend", "stranger"]) {
            return self.telling.screen.tell(Tone::Bad, "NOT SEEN", &why);
        }
        let what = "declared: allow /frontend; reloaded with: allow /frontend, /stranger";
        self.telling.screen.tell(Tone::Refused, "drift", what)?;
        let mut caller = match Caller::connect(world.stranger.listener).await {
            Ok(caller) => caller,
            Err(error) => return self.telling.screen.tell(Tone::Bad, "NOT SEEN", &error.to_string()),
        };
        let answer = caller.ask("/records/2").await.unwrap_or_else(|error| format!("none: {error}"));
        let named = answer.contains(&format!("\"{}\"", id("stranger")));
        self.telling.seen(Thing::Admitted, named, "answer", &answer)?;
        let labels = [("direction", "inbound"), ("cause", "policy_changed")];
        let before = records.metrics().await.count(CONNECTIONS, &labels);
        let healed = Instant::now();
        if let Err(why) = reload(&["frontend"]) {
            return self.telling.screen.tell(Tone::Bad, "NOT SEEN", &why);
        }
        self.telling.screen.tell(Tone::Good, "healed", "reloaded as declared: allow /frontend")?;
        let ended = caller.ended(self.telling.end_of_patience().saturating_duration_since(Instant::now())).await;
        let took = healed.elapsed().as_secs_f64() * 1000.0;
        let counted = async || (records.metrics().await.count(CONNECTIONS, &labels) > before).then_some(());
        let counted = self.telling.until(counted).await?.is_some();
        let cause = self.telling.screen.bold("policy_changed");
        let what = format!("the stranger's live connection ended {took:.1} ms after that: {cause}");
        self.telling.seen(Thing::ClosedAtOnce, ended && counted, "closed", &what)?;
        let who = "/stranger tries again";
        self.refuse(Thing::DeniedAgain, Reason::Denied, who, intruders::plain_http(world.stranger.listener)).await?;
        let note = self.telling.screen.faint("(The policy alone: comparing the whole posture is not in this build.)");
        self.telling.screen.more(&note)
    }

    async fn weak_offer(&mut self) -> io::Result<()> {
        self.telling.screen.chapter("Somebody offers the cryptography of the past")?;
        let world = Arc::clone(&self.world);
        let labels = [("direction", "inbound"), ("what", "3DES")];
        let reasons = [Reason::NoSharedVersion, Reason::NoSharedSuite];
        let refusals = async || {
            let metrics = world.records.metrics().await;
            let count =
                |reason: Reason| metrics.count(HANDSHAKES, &[("direction", "inbound"), ("reason", reason.as_str())]);
            (metrics.count(OFFERED_WEAK, &labels), reasons.map(count))
        };
        let (_, before) = refusals().await;
        let got = intruders::triple_des(world.records.listener).await;
        let refused = async || {
            let (weak, now) = refusals().await;
            let which = reasons.iter().zip(now.iter().zip(before)).find(|(_, (now, before))| *now > before);
            which.filter(|_| weak > 0).map(|(reason, _)| (*reason, weak))
        };
        let refused = self.telling.until(refused).await?;
        let reason = self.telling.screen.bold(refused.map_or("nothing", |(reason, _)| reason.as_str()));
        let what = format!("{:<50} {reason}", "TLS 1.0 to 1.2 with TLS_RSA_WITH_3DES_EDE_CBC_SHA");
        let nothing = matches!(got, Got::Nothing(_));
        self.telling.seen(Thing::Weak, nothing && refused.is_some(), "refused", &what)?;
        let weak = refused.map_or(0, |(_, weak)| weak);
        self.telling.screen.more(&format!("{OFFERED_WEAK}{{direction=\"inbound\",what=\"3DES\"}} {weak}"))
    }
}

/// The serial and key type, once a sidecar is ready.
pub(super) fn ready(state: &Value) -> Option<(String, String)> {
    state.pointer("/ready")?.as_bool().filter(|ready| *ready)?;
    let text = |pointer| state.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
    Some((text("/identity/serial")?, text("/identity/key_type")?))
}

/// How many authorities a sidecar has of our trust domain.
fn authorities(state: &Value) -> usize {
    let bundles = state.pointer("/bundles").and_then(Value::as_array);
    let ours = bundles.into_iter().flatten().find(|b| b.pointer("/trust_domain").is_some_and(|name| name == DOMAIN));
    ours.and_then(|bundle| bundle.pointer("/authorities")?.as_array()).map_or(0, Vec::len)
}
