use super::*;
use crate::clock::SteppedClock;
use std::sync::Arc;

const NOW: u64 = 1_800_000_000;

fn ledger() -> (Ledger, Arc<SteppedClock>) {
    let clock = SteppedClock::starting_at(NOW);
    (Ledger::new(clock.clock()), clock)
}

fn address(last: u32) -> IpAddr {
    std::net::Ipv4Addr::from(0x0a00_0000 + last).into()
}

fn report(ledger: &Ledger, plaintext: Plaintext) -> Vec<Port> {
    ledger.report(|_| Some(("api".into(), plaintext)))
}

#[tokio::test(start_paused = true)]
async fn a_port_is_safe_once_nothing_was_let_through_for_a_day() {
    let (ledger, clock) = ledger();
    ledger.declare(&[80].into(), false);
    let answer = || {
        let ports = report(&ledger, Plaintext::Audit);
        assert_eq!(ports.len(), 1);
        (ports[0].safe_to_go_strict, ports[0].answer.clone())
    };
    clock.jump(3600);
    let (safe, why) = answer();
    assert!(safe == Safe::SoFar && why.starts_with("so far") && why.contains("1h"), "{why}");
    ledger.note(80, address(1), Fate::Audited);
    clock.jump(90);
    let (safe, why) = answer();
    assert!(safe == Safe::No && why == "no: 1 let through, the last one 1m ago from 10.0.0.1", "{why}");
    clock.jump(WINDOW as i64);
    let (safe, why) = answer();
    assert!(safe == Safe::Yes && why.starts_with("yes"), "{why}");
}

#[tokio::test(start_paused = true)]
async fn who_was_refused_within_a_day_stands_in_the_way_of_a_port_that_is_strict_no_longer() {
    let (ledger, clock) = ledger();
    ledger.declare(&[80].into(), false);
    clock.jump(3 * WINDOW as i64);
    for last in 1..=500 {
        ledger.note(80, address(last), Fate::Refused);
    }
    let answer = |plaintext| {
        let port = report(&ledger, plaintext).remove(0);
        (port.safe_to_go_strict, port.answer)
    };
    assert_eq!(answer(Plaintext::Refuse), (Safe::Yes, "strict already; 500 refused".into()));
    clock.jump(90);
    ledger.declare(&[80].into(), false);
    let (safe, why) = answer(Plaintext::Audit);
    assert!(safe == Safe::No && why == "no: 500 refused, the last one 1m ago from 10.0.1.244", "{why}");
    // Whom it would hurt now is told first.
    ledger.note(80, address(1), Fate::Audited);
    let (safe, why) = answer(Plaintext::Audit);
    assert!(safe == Safe::No && why == "no: 1 let through, the last one 0s ago from 10.0.0.1", "{why}");
    clock.jump(WINDOW as i64);
    assert_eq!(answer(Plaintext::Audit), (Safe::Yes, "yes: no plaintext connection for 24 hours".into()));
}

#[tokio::test(start_paused = true)]
async fn who_was_refused_at_a_port_that_gave_way_stands_in_the_way_of_all_others() {
    let (ledger, clock) = ledger();
    ledger.declare(&[].into(), true);
    clock.jump(3 * WINDOW as i64);
    for port in 1000..1000 + MOST_UNNAMED as u16 {
        ledger.note(port, address(1), Fate::Refused);
    }
    ledger.note(5432, address(2), Fate::Audited);
    let rest = report(&ledger, Plaintext::Audit).pop().unwrap();
    assert_eq!((rest.port, rest.safe_to_go_strict), (None, Safe::No), "{}", rest.answer);
}

#[tokio::test(start_paused = true)]
async fn callers_are_counted_with_their_times_and_forgotten_ones_leave_their_counts() {
    let (ledger, clock) = ledger();
    ledger.declare(&[80].into(), false);
    ledger.note(80, address(0), Fate::Allowed);
    clock.jump(1);
    ledger.note(80, address(0), Fate::Refused);
    let mapped: IpAddr = "::ffff:10.0.0.0".parse().unwrap();
    ledger.note(80, mapped, Fate::Refused);
    let port = &report(&ledger, Plaintext::Allow)[0];
    let expected = Tally { let_through: 1, refused: 2, first_seen: Some(NOW), last_seen: Some(NOW + 1) };
    assert_eq!((port.callers.len(), port.callers[0].connections), (1, expected));
    // A crowd that is refused does not push out whoever was let through.
    for last in 1..1000 {
        clock.jump(1);
        ledger.note(80, address(last), Fate::Refused);
    }
    let port = &report(&ledger, Plaintext::Allow)[0];
    assert_eq!(port.callers.len(), MOST_CALLERS);
    assert_eq!(port.callers[0].address, address(999));
    assert!(port.callers.iter().any(|caller| caller.address == address(0)));
    assert_eq!(port.other_callers.refused, 999 - (MOST_CALLERS as u64 - 1));
    assert_eq!(port.connections.refused, 2 + 999);
}

#[tokio::test(start_paused = true)]
async fn ports_that_nobody_names_are_bounded_and_those_that_let_through_come_first() {
    let (ledger, _clock) = ledger();
    ledger.declare(&[80].into(), true);
    for port in 1000..2000 {
        ledger.note(port, address(1), Fate::Refused);
    }
    ledger.note(5432, address(2), Fate::Audited);
    ledger.note(80, address(3), Fate::Audited);
    let ports = report(&ledger, Plaintext::Audit);
    assert_eq!(ports.len(), 1 + MOST_UNNAMED + 1);
    for port in [80, 5432] {
        assert_eq!(ports.iter().find(|p| p.port == Some(port)).unwrap().safe_to_go_strict, Safe::No);
    }
    let rest = ports.last().unwrap();
    assert_eq!((rest.port, rest.connections.refused), (None, 1000 - (MOST_UNNAMED as u64 - 1)));
    ledger.declare(&[80].into(), false);
    assert_eq!(report(&ledger, Plaintext::Audit).iter().filter(|port| port.port.is_some()).count(), 1);
}
