//! Whether the data path's runtime still moves.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::Instant;

/// How long one question waits for an answer. Probes of Kubernetes give up after a second.
const WAIT: Duration = Duration::from_millis(500);
/// A runtime that has run nothing for so long is dead. A loaded one is slow, and killing it would only move its load to the
/// next.
const DEAD_AFTER: Duration = Duration::from_secs(10);

/// Asks another runtime to run an empty task, one at a time.
#[derive(Clone, Debug)]
pub struct Pulse {
    runtime: Handle,
    /// Since when a task waits to be run.
    waiting: Arc<watch::Sender<Option<Instant>>>,
}

impl Pulse {
    /// Of that runtime. Nothing is done before the first question.
    pub fn new(runtime: Handle) -> Self {
        Self { runtime, waiting: Arc::new(watch::Sender::new(None)) }
    }

    /// Whether the runtime is alive: true at once if it answers, true after half a second if it is slow, and false once it
    /// has not answered for ten seconds.
    pub async fn alive(self) -> bool {
        let mut answered = self.waiting.subscribe();
        let mut since = Instant::now();
        self.waiting.send_if_modified(|waiting| match waiting {
            Some(before) => {
                since = *before;
                false
            }
            None => {
                *waiting = Some(since);
                let waiting = Arc::clone(&self.waiting);
                self.runtime.spawn(async move { waiting.send_replace(None) });
                true
            }
        });
        tokio::time::timeout(WAIT, answered.wait_for(Option::is_none)).await.is_ok() || since.elapsed() < DEAD_AFTER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_runtime_that_moves_answers_at_once_and_again() {
        let pulse = Pulse::new(Handle::current());
        for _ in 0..3 {
            let began = Instant::now();
            assert!(pulse.clone().alive().await);
            assert!(began.elapsed() < WAIT);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_runtime_that_stands_is_slow_first_and_dead_later_and_alive_when_it_moves_again() {
        // Nobody drives it.
        let stands = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let pulse = Pulse::new(stands.handle().clone());
        assert!(pulse.clone().alive().await);
        tokio::time::advance(Duration::from_secs(5)).await;
        assert!(pulse.clone().alive().await);
        tokio::time::advance(Duration::from_secs(5)).await;
        assert!(!pulse.clone().alive().await);
        std::thread::spawn(move || stands.block_on(tokio::task::yield_now())).join().unwrap();
        assert!(pulse.clone().alive().await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_runtime_that_is_gone_is_dead() {
        let gone = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let pulse = Pulse::new(gone.handle().clone());
        gone.shutdown_background();
        pulse.clone().alive().await;
        tokio::time::advance(DEAD_AFTER).await;
        assert!(!pulse.alive().await);
    }
}
