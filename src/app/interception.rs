//! The watch over the interception: looks at intervals, and says what it saw to the register of drifts, to readiness and
//! to `/state`.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::sync::watch;

use super::Proxy;
use crate::admin::{Readiness, Token};
use crate::clock::Clock;
use crate::intercept::resolvers::{RESOLV_CONF, resolvers};
use crate::intercept::{Plan, Seen, Watch};
use crate::posture::{Kind, Register};

const REMEDY: &str = "run `portcullis redirect apply` with this config in this network namespace";

/// What was seen last, and when in seconds since the Unix epoch; none before the first look.
pub(super) type Last = Option<(Seen, u64)>;

/// Looks until the captures stop. Nothing to be done where nothing is to be captured.
pub(super) async fn watch(
    proxy: Arc<Proxy>,
    register: Arc<Register>,
    mut gate: Gate,
    clock: Clock,
    last: watch::Sender<Last>,
) {
    let Some(intercept) = proxy.config().intercept else { return };
    let mut watch = Watch::new(proxy.arrivals());
    let mut stop = proxy.captures_stop();
    loop {
        // Listeners may come and go, and with them what is declared.
        let Some(plan) = Plan::declared(&proxy.config(), &resolvers(Path::new(RESOLV_CONF))) else { return };
        let seen = tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => return,
            seen = watch.look(&plan) => seen,
        };
        judge(&seen, last.borrow().is_none(), &register, &mut gate);
        last.send_replace(Some((seen, clock.now())));
        tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => return,
            () = watch.pause(intercept.check_interval.0) => {}
        }
    }
}

fn judge(seen: &Seen, first: bool, register: &Register, gate: &mut Gate) {
    match seen.whole() {
        Some(true) => {
            register.clear(Kind::Interception);
            gate.open();
        }
        Some(false) => {
            gate.close(&seen.broken().join("; "));
            register.raise(Kind::Interception, seen.broken(), REMEDY);
        }
        // Neither a drift nor the end of one.
        None => gate.close(&format!("nothing shows that traffic is captured: {}", seen.not_checked().join("; "))),
    }
    if first {
        match (seen.whole(), seen.not_checked().join("; ")) {
            (None, why) => tracing::warn!(why, "nothing shows whether traffic is captured"),
            (Some(_), not_checked) => tracing::info!(not_checked, "the interception is watched"),
        }
    }
}

/// Keeps the proxy from being ready, where the config asks for it.
pub(super) struct Gate {
    readiness: Readiness,
    required: bool,
    waiting: Option<Token>,
}

impl Gate {
    /// Closed until the first look, if it is ever to be closed.
    pub(super) fn new(readiness: Readiness, required: bool) -> Self {
        let waiting = required.then(|| readiness.wait_for(Kind::Interception.as_str()));
        Self { readiness, required, waiting }
    }

    fn open(&mut self) {
        self.waiting = None;
    }

    fn close(&mut self, why: &str) {
        if self.required {
            let name = Kind::Interception.as_str();
            self.waiting.get_or_insert_with(|| self.readiness.wait_for(name)).because(why);
        }
    }
}

/// What `/state` says of it.
pub(super) fn state(last: &Last) -> Value {
    let Some((seen, at)) = last else { return Value::Null };
    json!({ "checked": at, "whole": seen.whole(), "findings": seen })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::Finding;

    fn seen(rules: Finding) -> Seen {
        let unknown = Finding::NotChecked("no such address".into());
        Seen { rules, owner: Finding::Holds("us".into()), own_address_ipv4: unknown.clone(), own_address_ipv6: unknown }
    }

    #[test]
    fn readiness_follows_what_is_seen_only_where_it_is_required() {
        let register = Register::new(Clock::system(), |_, _| ());
        for required in [true, false] {
            let readiness = Readiness::default();
            let mut gate = Gate::new(readiness.clone(), required);
            assert_eq!(readiness.waiting_for().is_empty(), !required);
            judge(&seen(Finding::Holds("all".into())), true, &register, &mut gate);
            assert!(readiness.waiting_for().is_empty() && register.standing().is_empty());
            judge(&seen(Finding::Broken("gone".into())), false, &register, &mut gate);
            assert_eq!(register.standing()[0].evidence, ["gone"]);
            let reasons = readiness.reasons();
            assert_eq!(
                reasons.first().map(|(name, why)| (*name, &**why)),
                required.then_some(("interception", "gone"))
            );
            // That nothing can be seen any more mends nothing.
            judge(&seen(Finding::NotChecked("blind".into())), false, &register, &mut gate);
            assert_eq!((register.standing().len(), readiness.waiting_for().is_empty()), (1, !required));
            judge(&seen(Finding::Holds("all".into())), false, &register, &mut gate);
            assert!(readiness.waiting_for().is_empty() && register.standing().is_empty());
        }
    }

    #[test]
    fn the_state_has_a_verdict_for_each_finding() {
        assert_eq!(state(&None), Value::Null);
        let state = state(&Some((seen(Finding::Broken("gone".into())), 7)));
        assert_eq!((&state["checked"], &state["whole"]), (&json!(7), &json!(false)));
        assert_eq!(state["findings"]["rules"], json!({ "verdict": "broken", "detail": "gone" }));
        assert_eq!(state["findings"]["own_address_ipv6"]["verdict"], "not_checked");
    }
}
