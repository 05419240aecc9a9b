//! `portcullis demo --transparent`: the same story with curl, which knows of nothing.
//!
//! In: root, and a kernel that makes namespaces. Out: pods on a wire, rules, proxies and an authority, all of it in a cell
//! of its own that the kernel removes whole when its first process ends; lines for a person; and exit code 0 only if all
//! that was promised was really seen.

mod cell;
mod curl;
mod drift;
mod pods;
mod promised;
mod stage;
mod story;
mod summary;
mod tap;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Builder;

use self::curl::Curl;
use self::stage::Stage;
use self::story::Story;
use self::tap::Passed;
use super::ledger::Ledger;
use super::screen::{Screen, Style};
use super::telling::Telling;
use super::{DemoArgs, Stop, close, log_to, outcome_of, stopped, unread};
use crate::cli::{Failure, Outcome, Streams};

/// Shows the demo.
///
/// # Errors
/// What it needs and has not, or what it meant to show and could not.
pub(super) fn demo(args: &DemoArgs, streams: &mut Streams<'_>) -> Outcome {
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::new(
            "demo --transparent makes network namespaces, and needs root for that: sudo portcullis demo --transparent",
        ));
    }
    if !args.inside {
        return cell::run();
    }
    // Before the cell is furnished, because its files hide others.
    let log = log_to(args.log.as_deref())?;
    let folder = cell::furnish()?;
    let curl = Curl::find().ok_or_else(|| {
        Failure::new(
            "demo --transparent shows curl at work, and there is none in PATH: apt-get install curl, or the like",
        )
    })?;
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().map_err(Failure::new)?;
    let mut screen = Screen::new(streams.out, Style::of_stdout());
    let outcome = runtime.block_on(show(args, &mut screen, &folder, curl, log));
    // Nobody waits for what curl still does: it ends with us.
    runtime.shutdown_background();
    outcome
}

async fn show(args: &DemoArgs, screen: &mut Screen<'_>, folder: &Path, curl: Curl, log: Option<File>) -> Outcome {
    let mut stop = Stop::new()?;
    let told = tokio::select! {
        told = tell(args, screen, folder, curl, log) => told,
        () = stop.asked() => return stopped(screen),
    };
    outcome_of(told?)
}

type Verdict = Result<(), Vec<&'static str>>;

async fn tell(
    args: &DemoArgs,
    screen: &mut Screen<'_>,
    folder: &Path,
    curl: Curl,
    log: Option<File>,
) -> Result<Verdict, Failure> {
    let life = Duration::from_secs((args.seconds / 4).clamp(4, 6));
    let title = screen.bold("Portcullis demo, transparent");
    let line =
        format!("{title}: {} s; pods, rules and proxies in a cell of their own, and nothing is left", args.seconds);
    screen.line(&line).map_err(unread)?;
    let stage = Stage::build(folder, life).await.map_err(Failure::new)?;
    let mut ledger = Ledger::default();
    let total = Duration::from_secs(args.seconds);
    let mut story = Story {
        telling: Telling { screen: &mut *screen, ledger: &mut ledger, total, tally: None },
        stage: Arc::new(stage),
        curl,
        log,
        at_first: Passed::default(),
        traffic: None,
    };
    story.tell().await.map_err(unread)?;
    let verdict = ledger.verdict();
    close(screen, verdict.as_ref().err().map_or(0, Vec::len)).map_err(unread)?;
    Ok(verdict)
}
