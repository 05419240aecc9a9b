//! Applied, applied again, broken, removed: what stands when, and what is left.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use portcullis::intercept::ebpf::{self, Cgroup, Fault};

use super::gate::{Gate, SERVER, Went, plan, plan_with, servers};
use crate::harness::{succeeds, until};
use crate::netns::ROOT;

const CGROUP: &str = "PORTCULLIS_TEST_EBPF_CGROUP";

/// The process of the test below.
#[test]
#[ignore = "started by another test"]
fn applies_in_a_process_of_its_own() {
    let cgroup = std::env::var_os(CGROUP).expect(CGROUP);
    ebpf::apply(&plan(), &Cgroup::open(cgroup.as_ref()).unwrap()).unwrap();
}

#[tokio::test]
async fn the_end_of_who_applied_it_does_not_open_the_gate() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::open(parts).await;
    gate.proxy().await;
    let mut loader = gate.pod.command(ROOT, std::env::current_exe().unwrap());
    loader
        .args(["--exact", "ebpf::lifetime::applies_in_a_process_of_its_own", "--ignored"])
        .env(CGROUP, &gate.cgroup.0);
    assert!(succeeds(&mut loader, "").await.contains("1 passed"));
    for to in servers() {
        assert_eq!(gate.ask(to).await.unwrap().went, Went::ToProxy(to));
    }
    assert_eq!(gate.faults(plan()).await, []);
}

#[tokio::test]
async fn nothing_passes_while_the_proxy_is_down() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::open(parts).await;
    for to in servers() {
        assert_eq!(gate.ask(to).await.unwrap().went, Went::Direct);
    }
    gate.apply(plan()).await.unwrap();
    for to in servers() {
        assert_eq!(gate.ask(to).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
}

#[tokio::test]
async fn applied_twice_is_applied_once_and_removed_leaves_nothing() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::closed(parts, plan()).await;
    let (links, [to, _]) = (gate.links(), servers());
    assert_eq!(links.len(), 6);
    let open = gate.inside(ROOT, move || std::net::TcpStream::connect(to).unwrap()).await;
    gate.apply(plan()).await.unwrap();
    assert_eq!(gate.links(), links);
    assert_eq!(gate.faults(plan()).await, []);
    // What was open is as it was.
    assert_eq!(open.peer_addr().unwrap(), to);
    assert_eq!(super::gate::hear(&open.into()).unwrap().went, Went::ToProxy(to));

    assert_eq!(gate.remove().await, Ok(true));
    assert_eq!(gate.pins(), None);
    for to in servers() {
        assert_eq!(gate.ask(to).await.unwrap().went, Went::Direct);
    }
    until("the links to be gone", || async { gate.links().is_empty().then_some(()) }).await;
    assert_eq!(gate.remove().await, Ok(false));
    assert_eq!(gate.faults(plan()).await, [Fault::Nothing]);
}

#[tokio::test]
async fn another_plan_takes_over_without_a_connection_that_gets_round() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::closed(parts, plan()).await;
    let (ended, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let [to, _] = servers();
    let (stop, count) = (Arc::clone(&ended), Arc::clone(&asked));
    let asking = gate.inside(ROOT, move || {
        while !stop.load(Ordering::Relaxed) {
            assert_eq!(super::gate::ask_from_here(to).unwrap().went, Went::ToProxy(to));
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    let changing = async {
        for port in 0..20 {
            let before = asked.load(Ordering::Relaxed);
            let other = plan_with(|outbound| outbound.skip_ports = vec![90 + port]);
            assert_ne!(gate.faults(other.clone()).await, []);
            gate.apply(other.clone()).await.unwrap();
            assert_eq!(gate.faults(other).await, []);
            until("connections go on", || async { (asked.load(Ordering::Relaxed) > before + 2).then_some(()) }).await;
        }
        ended.store(true, Ordering::Relaxed);
    };
    tokio::join!(asking, changing);
    assert_eq!(gate.faults(plan()).await, [Fault::OtherPlan]);
    let skipped = plan_with(|outbound| outbound.skip_ports = vec![SERVER]);
    gate.apply(skipped).await.unwrap();
    assert_eq!(gate.ask(to).await.unwrap().went, Went::Direct);
}

#[tokio::test]
async fn what_another_hand_has_broken_is_told_and_mended() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::closed(parts, plan()).await;
    let pins = gate.pins().unwrap();
    let [v4, v6] = servers();
    for broken in ["connect6", "sockops", "getsockopt", "plan"] {
        std::fs::remove_file(pins.join(broken)).unwrap();
        assert_eq!(gate.faults(plan()).await, [Fault::Missing(broken)]);
        gate.apply(plan()).await.unwrap();
        assert_eq!(gate.faults(plan()).await, []);
        assert_eq!(gate.ask(v6).await.unwrap().went, Went::ToProxy(v6), "{broken}");
    }
    libbpf_rs::Link::open(pins.join("connect4")).unwrap().detach().unwrap();
    assert_eq!(gate.faults(plan()).await, [Fault::Detached("connect4")]);
    gate.apply(plan()).await.unwrap();
    assert_eq!(gate.faults(plan()).await, []);
    assert_eq!(gate.ask(v4).await.unwrap().went, Went::ToProxy(v4));
    assert_eq!(gate.links().len(), 6);
}

#[tokio::test]
async fn an_attempt_that_fails_leaves_nothing_and_takes_nothing_away() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::open(parts).await;
    gate.proxy().await;
    let too_many = plan_with(|outbound| outbound.skip_uids = (0..1000).collect());
    let why = gate.apply(too_many.clone()).await.unwrap_err().to_string();
    assert!(why.contains("1001 users") && !why.contains('\n'), "{why}");
    assert_eq!(gate.pins(), None);
    gate.apply(plan()).await.unwrap();
    gate.apply(too_many).await.unwrap_err();
    let [to, _] = servers();
    assert_eq!(gate.ask(to).await.unwrap().went, Went::ToProxy(to));

    let cgroup = gate.cgroup.opened();
    let unprivileged = gate.pod.run(1, move || ebpf::apply(&plan(), &cgroup)).await.unwrap_err().to_string();
    assert!(!unprivileged.contains('\n'), "{unprivileged}");
    assert_eq!(gate.faults(plan()).await, []);
}

#[tokio::test]
async fn captures_of_other_cgroups_in_the_same_network_namespace_alone_are_cleared() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::closed(parts, plan()).await;
    let elsewhere = gate.net.pod("elsewhere").await;
    let [other, far] = [(); 2].map(|()| super::gate::OwnCgroup::below(&gate.cgroup));
    for (pod, cgroup) in [(&gate.pod, other.opened()), (&elsewhere, far.opened())] {
        pod.run(ROOT, move || ebpf::apply(&plan(), &cgroup)).await.unwrap();
    }
    let pins = || [&*gate.cgroup, &other, &far].map(|cgroup| super::gate::pins_of(&cgroup.0).is_some());
    assert_eq!(pins(), [true; 3]);
    let kept = gate.cgroup.opened();
    assert_eq!(gate.pod.run(ROOT, move || ebpf::clear_others(Some(&kept))).await, Ok(1));
    assert_eq!(pins(), [true, false, true]);
    assert_eq!(gate.faults(plan()).await, []);
    assert_eq!(gate.pod.run(ROOT, || ebpf::clear_others(None)).await, Ok(1));
    assert_eq!(pins(), [false, false, true]);
    let [to, _] = servers();
    assert_eq!(gate.ask(to).await.unwrap().went, Went::Direct);
    assert_eq!(elsewhere.run(ROOT, || ebpf::clear_others(None)).await, Ok(1));
    assert_eq!(pins(), [false; 3]);
}

#[tokio::test]
async fn what_is_left_of_a_cgroup_that_is_gone_is_swept_away() {
    let Some(parts) = Gate::net() else { return };
    let gate = Gate::open(parts).await;
    gate.proxy().await;
    let child = super::gate::OwnCgroup::below(&gate.cgroup);
    let (opened, path) = (child.opened(), child.0.clone());
    gate.pod.run(ROOT, move || ebpf::apply(&plan(), &opened)).await.unwrap();
    let pins = super::gate::pins_of(&path).unwrap();
    assert!(pins.join("connect4").exists());
    drop(child);
    assert!(!path.exists());
    // The kernel detaches the programs of a cgroup that is gone a little later.
    until("it to be swept away", || async {
        gate.apply(plan()).await.unwrap();
        (!pins.exists()).then_some(())
    })
    .await;
    let [to, _] = servers();
    assert_eq!(gate.ask(to).await.unwrap().went, Went::ToProxy(to));
}
