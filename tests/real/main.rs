//! The end-to-end story against a real SPIRE server and agent: federation, rotation, outages, withdrawal, choice.
//!
//! `tests/real/run` starts it. The stories run at the same time against the same two trust domains, each with entries
//! and programs of its own; what would disturb the others (an agent that hangs, a server that is down) has a trust
//! domain of its own. Arguments are parts of story names; without any, all stories are told.
//!
//! Not a `#[test]` harness: the servers belong to all stories and must be ended with them, and a skip must be counted.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

#[path = "../it/harness.rs"]
mod harness;
#[path = "../../src/testing.rs"]
#[allow(clippy::wrong_self_convention)]
mod testing;

mod spire;
mod stories;

use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use spire::World;

/// How long one story may take before it has failed.
const LIMIT: Duration = Duration::from_secs(600);

type Told = Pin<Box<dyn Future<Output = ()> + Send>>;
type Story = (&'static str, fn(Arc<World>) -> Told);

/// All stories; the longest first, so that the whole takes no longer than it.
const STORIES: &[Story] = &[
    ("an outage of the agent and of the server", |world| Box::pin(stories::outage::agent_and_server(world))),
    ("rotation of SVIDs and of the CA under traffic", |world| Box::pin(stories::rotation::under_traffic(world))),
    ("two federated trust domains", |world| Box::pin(stories::federation::two_domains(world))),
    ("a P-256 SVID where the profile demands P-384", |world| Box::pin(stories::federation::p256_is_refused(world))),
    ("go-spiffe on the other side", |world| Box::pin(stories::federation::go_spiffe(world))),
    ("an entry deleted and made again", |world| Box::pin(stories::entries::deleted_and_made_again(world))),
    ("several SVIDs", |world| Box::pin(stories::entries::several(world))),
];

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let chosen: Vec<Story> = STORIES
        .iter()
        .filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str())))
        .copied()
        .collect();
    let missing = spire::missing();
    if !missing.is_empty() {
        for (name, _) in &chosen {
            println!("SKIPPED  {name}");
        }
        println!("\nSKIPPED because programs are missing:");
        for (program, remedy) in &missing {
            println!("  {program}: {remedy}");
        }
        return close(0, 0, chosen.len());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::select! {
            code = tell(chosen) => code,
            // Dropping everything ends the programs that were started.
            _ = tokio::signal::ctrl_c() => ExitCode::FAILURE,
        }
    })
}

async fn tell(chosen: Vec<Story>) -> ExitCode {
    if chosen.is_empty() {
        println!("no story has such a name");
        return ExitCode::FAILURE;
    }
    let world = match tokio::spawn(World::start()).await {
        Ok(world) => Arc::new(world),
        Err(error) => {
            println!("FAILED   SPIRE could not be set up: {}", why(error));
            return close(0, chosen.len(), 0);
        }
    };
    let mut running = tokio::task::JoinSet::new();
    for (name, story) in chosen {
        let world = Arc::clone(&world);
        running.spawn(async move {
            let began = Instant::now();
            let told = tokio::spawn(tokio::time::timeout(LIMIT, story(world))).await;
            let outcome = match told {
                Ok(Ok(())) => Ok(()),
                Ok(Err(_)) => Err(format!("not at its end after {} s", LIMIT.as_secs())),
                Err(error) => Err(why(error)),
            };
            (name, outcome, began.elapsed())
        });
    }
    let (mut passed, mut failed) = (0, 0);
    while let Some(ended) = running.join_next().await {
        let (name, outcome, took) = ended.unwrap();
        let seconds = took.as_secs();
        match outcome {
            Ok(()) => {
                passed += 1;
                println!("passed   {name} ({seconds} s)");
            }
            Err(why) => {
                failed += 1;
                println!("FAILED   {name} ({seconds} s): {why}");
            }
        }
    }
    if failed > 0 {
        println!("the logs of SPIRE and the configs are kept in {}", world.keep().display());
    }
    close(passed, failed, 0)
}

fn close(passed: usize, failed: usize, skipped: usize) -> ExitCode {
    println!("\ntests/real: {passed} passed, {failed} failed, {skipped} skipped");
    if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// What a task panicked of.
fn why(error: tokio::task::JoinError) -> String {
    match error.try_into_panic() {
        Ok(panic) => match panic.downcast::<String>() {
            Ok(text) => *text,
            Err(panic) => panic.downcast_ref::<&str>().map_or_else(|| "it panicked".into(), |text| (*text).to_owned()),
        },
        Err(error) => error.to_string(),
    }
}
