//! `portcullis demo`: everything on one machine with nothing set up.
//!
//! Owns a story in chapters: an authority, workloads with a sidecar each, real traffic over TCP, HTTP and gRPC, those
//! who are refused, rotation, a changed policy, and a closing table. In: how long. Out: lines for a person, and exit code 0 only if all
//! that it shows was really seen. Sockets are on loopback, nothing is written to disk, and all of it goes with the
//! process.

mod clinic;
mod intruders;
mod journal;
mod ledger;
mod requests;
mod rotations;
mod scrape;
mod screen;
mod story;
mod summary;
mod telling;
mod transparent;
mod workloads;
mod world;

use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::{Builder, Handle};
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::journal::Journal;
use self::ledger::Ledger;
use self::screen::{Screen, Style, Tone};
use self::story::Story;
use self::telling::{Telling, short};
use self::world::{DOMAIN, World};
use super::{Failure, Outcome, Streams};
use crate::clock::Clock;

/// Arguments of `demo`.
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// How long to show it, in seconds.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(5..=86_400))]
    pub seconds: u64,
    /// Leave it running, and print what to try.
    #[arg(long)]
    pub keep: bool,
    /// Write the sidecars' logs to this file (JSON lines); they are not shown otherwise.
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Show it with curl, which knows of nothing, in network namespaces that stand for pods. Needs root.
    #[arg(long, conflicts_with = "keep")]
    pub transparent: bool,
    /// This is the first process of the demo's own namespaces.
    #[arg(long, hide = true, requires = "transparent")]
    pub inside: bool,
}

/// Shows the demo.
///
/// # Errors
/// What it meant to show and could not.
pub fn demo(args: &DemoArgs, streams: &mut Streams<'_>) -> Outcome {
    if args.transparent {
        return transparent::demo(args, streams);
    }
    let journal = Journal::start(log_to(args.log.as_deref())?).map_err(Failure::new)?;
    super::give_memory_back();
    let traffic = super::run::traffic_runtime(super::run::threads_by_quota())?;
    let control = Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("control")
        .enable_all()
        .build()
        .map_err(Failure::new)?;
    let mut screen = Screen::new(streams.out, Style::of_stdout());
    let outcome = control.block_on(show(args, &mut screen, &journal, traffic.handle()));
    traffic.shutdown_background();
    control.shutdown_background();
    outcome
}

fn log_to(path: Option<&std::path::Path>) -> Result<Option<File>, Failure> {
    let create = |path: &std::path::Path| {
        File::create(path).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
    };
    path.map(create).transpose()
}

/// A reader who is gone has not seen everything, so that is no success; but there is nobody to tell.
fn unread(error: std::io::Error) -> Failure {
    Failure { code: 1, ..Failure::from(error) }
}

/// Somebody may ask us to stop.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> Result<Self, Failure> {
        let of = |kind| signal(kind).map_err(Failure::new);
        Ok(Self { terminate: of(SignalKind::terminate())?, interrupt: of(SignalKind::interrupt())? })
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

fn stopped(screen: &mut Screen<'_>) -> Outcome {
    screen.rest().map_err(unread)?;
    Err(Failure::new("stopped before the story was over"))
}

async fn show(args: &DemoArgs, screen: &mut Screen<'_>, journal: &Journal, traffic: &Handle) -> Outcome {
    let mut stop = Stop::new()?;
    let told = tokio::select! {
        told = tell(args, screen, journal, traffic) => Some(told?),
        () = stop.asked() => None,
    };
    let Some((world, mut frontend, verdict)) = told else {
        return stopped(screen);
    };
    if args.keep {
        invite(screen, &world).map_err(unread)?;
        stop.asked().await;
        frontend.stop().await;
        let (requests, failures) = frontend.tally.counts();
        let tone = if failures == 0 { Tone::Good } else { Tone::Bad };
        let what = format!("{} requests in all, {failures} failures", screen::grouped(requests));
        screen.line("").map_err(unread)?;
        screen.tell(tone, "stopped", &what).map_err(unread)?;
    }
    world.drain().await;
    outcome_of(verdict)
}

/// Success only if nothing is missing.
fn outcome_of(verdict: Result<(), Vec<&'static str>>) -> Outcome {
    verdict.map(|()| ExitCode::SUCCESS).map_err(|missing| {
        let lines: Vec<_> = missing.iter().map(|what| format!("portcullis: demo: not seen: {what}")).collect();
        Failure { code: 1, message: lines.join("\n") }
    })
}

type Told = (Arc<World>, workloads::Frontend, Result<(), Vec<&'static str>>);

/// Tells the whole story and answers what is still running, and what was not seen.
async fn tell(args: &DemoArgs, screen: &mut Screen<'_>, journal: &Journal, traffic: &Handle) -> Result<Told, Failure> {
    let total = Duration::from_secs(args.seconds);
    let life = Duration::from_secs((args.seconds / 4).clamp(4, 6));
    let mut ledger = Ledger::default();
    let title = screen.bold("Portcullis demo");
    let disk = match &args.log {
        Some(path) => format!("logs go to {}", path.display()),
        None => "nothing is written to disk".to_owned(),
    };
    let seconds = args.seconds;
    let line = format!("{title}: {seconds} s, all in this process and on loopback; {disk}");
    screen.line(&line).map_err(unread)?;
    screen.chapter("An authority").map_err(unread)?;
    let authority = world::open(DOMAIN, life, Clock::system()).map_err(Failure::new)?;
    let ca = authority.subscribe().borrow().active_ca().unwrap_or_default().to_owned();
    let what = format!("CA {} for spiffe://{DOMAIN}, P-384, key in memory only", short(&ca));
    screen.tell(Tone::Plain, "authority", &what).map_err(unread)?;
    let world = Arc::new(World::start(authority, life, traffic).await.map_err(Failure::new)?);
    let mut story = Story {
        telling: Telling { screen: &mut *screen, ledger: &mut ledger, total, tally: None },
        world: Arc::clone(&world),
        journal: journal.clone(),
        frontend: None,
    };
    let told = story.tell().await;
    let frontend = story.frontend.take();
    told.map_err(unread)?;
    let Some(mut frontend) = frontend else { return Err(Failure::new("the demo's traffic did not begin")) };
    if !args.keep {
        frontend.stop().await;
        // The table is read once the last connections have ended and are counted.
        let open = world.frontend.node.proxy().registry();
        let _ = tokio::time::timeout(Duration::from_secs(2), open.until_empty()).await;
    }
    summary::show(screen, &mut ledger, &world, &frontend.tally).await.map_err(unread)?;
    let verdict = ledger.verdict();
    close(screen, verdict.as_ref().err().map_or(0, Vec::len)).map_err(unread)?;
    Ok((world, frontend, verdict))
}

fn close(screen: &mut Screen<'_>, missing: usize) -> std::io::Result<()> {
    screen.line("")?;
    if missing > 0 {
        return screen.tell(Tone::Bad, "NOT SEEN", &format!("{missing} of the things above; see the end"));
    }
    screen.line("All of it was real: these sockets, certificates and handshakes were of this machine, just now.")?;
    let next = screen.faint("Next: README.md, and `portcullis run --config FILE` beside a workload of yours.");
    screen.line(&next)
}

/// What to try while it runs.
fn invite(screen: &mut Screen<'_>, world: &World) -> std::io::Result<()> {
    screen.line("")?;
    let heading = screen.bold("It goes on until Ctrl-C. To try:");
    screen.line(&heading)?;
    let lines = [
        (format!("curl http://{}/records/7", world.frontend.listener), "as /frontend, through both sidecars"),
        (format!("curl http://{}/records/7", world.stranger.listener), "as /stranger: denied"),
        (format!("curl http://{}/patients/42", world.web.listener), "HTTP, as /web: allowed"),
        (format!("curl http://{}/admin", world.web.listener), "HTTP, as /web: 403"),
        (format!("curl -k https://{}/records/7", world.records.listener), "without a certificate: refused"),
    ];
    for (line, what) in lines {
        let what = screen.faint(&format!("# {what}"));
        screen.line(&format!("   {line:<46} {what}"))?;
    }
    for sidecar in world.sidecars() {
        let admin = sidecar.node.admin();
        let what = screen.faint(&format!("# and /state, /readyz, /livez of /{}", sidecar.name));
        screen.line(&format!("   {:<46} {what}", format!("curl http://{admin}/metrics")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
