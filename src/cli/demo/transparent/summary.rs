//! The closing table: what the sidecars' `/metrics` say, and what only curl and the tap on the wire can count.

use std::io;

use super::super::ledger::Promise;
use super::super::screen::{Tone, grouped};
use super::super::summary::{CONNECTIONS, DECISIONS, HANDSHAKES, Side, counted, handshakes, note, wrapped};
use super::super::telling::Telling;
use super::promised::Shown;
use super::stage::{DENIES, Stage};
use super::tap::Passed;

/// What the sidecars tell, read while they run.
pub(super) struct Sides {
    records: Side,
    frontend: Side,
}

pub(super) async fn sides(stage: &Stage) -> Sides {
    Sides {
        records: Side { metrics: stage.records.metrics().await, direction: "inbound" },
        frontend: Side { metrics: stage.frontend.metrics().await, direction: "outbound" },
    }
}

/// Shows the table and ticks off what it confirms.
pub(super) fn show(telling: &mut Telling<'_, '_, Shown>, sides: &Sides, passed: Passed) -> io::Result<()> {
    let Sides { records, frontend } = sides;
    let inbound = [("direction", "inbound")];
    let refused = records.metrics.by(HANDSHAKES, &[("direction", "inbound"), ("result", "failure")], "reason");
    let (ended, carried) = (records.by(CONNECTIONS, "cause"), frontend.by(CONNECTIONS, "cause"));
    let rules = records.metrics.by(DECISIONS, &inbound, "rule");
    let (requests, failures) = telling.tally.as_ref().map_or((0, 0), |tally| tally.counts());

    let screen = &mut *telling.screen;
    handshakes(screen, records, frontend)?;
    for (name, what) in [
        ("connections, /frontend", counted(&carried)),
        ("connections, /records", counted(&ended)),
        ("refused by reason", counted(&refused)),
        ("requests decided by", counted(&rules)),
        ("curls under load", format!("{} answered, {failures} failed (curl's own word)", grouped(requests))),
        (
            "the wire",
            format!(
                "{} packets of TLS and {} answers in clear since the rules",
                grouped(passed.sealed),
                passed.answers
            ),
        ),
    ] {
        wrapped(screen, name, &what)?;
    }
    note(screen)?;
    let confirmed = ["denied", "not_tls"].iter().all(|reason| refused.contains_key(*reason))
        && ["read-records", DENIES].iter().all(|rule| rules.contains_key(*rule))
        && carried.contains_key("undeclared")
        && records.outside() + frontend.outside() == 0
        && records.rotations().min(frontend.rotations()) > 0
        && frontend.handshakes("false") > 0;
    let sealed = passed.sealed > 0 && passed.answers == 0;
    for (shown, confirmed) in [(Shown::NoAnswer, sealed), (Shown::ReadBack, confirmed)] {
        if !telling.ledger.tick(shown, confirmed) {
            telling.screen.tell(Tone::Bad, "NOT SEEN", shown.words())?;
        }
    }
    Ok(())
}
