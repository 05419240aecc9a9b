//! Captured connections that come before there is an identity: they are held for a while, not refused at once.
//!
//! In: a listener's state that cannot serve yet. Out: the one that can, or, when the time is over, one that still cannot.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::watch;

/// What a listener's connections are served with, as far as the wait for it goes.
pub(super) trait Holds {
    /// Whether there is an identity to serve with.
    fn is_usable(&self) -> bool;
    /// How long a connection may wait for one.
    fn hold(&self) -> Duration;
}

/// The state of a listener, and when the connection's other times begin: with the accept, or with the end of its wait.
/// `published` changes with every swap of states, after it.
pub(super) async fn usable<S: Holds>(
    state: &ArcSwap<S>,
    accepted_at: Instant,
    published: &watch::Sender<bool>,
) -> (Arc<S>, Instant) {
    let first = state.load_full();
    if first.is_usable() || first.hold().is_zero() {
        return (first, accepted_at);
    }
    let mut published = published.subscribe();
    let change = async {
        loop {
            // States are swapped before that is told: seen first and looked then, no change slips between.
            published.borrow_and_update();
            if state.load().is_usable() || published.changed().await.is_err() {
                return;
            }
        }
    };
    // How it ended is seen in the state.
    let _ = tokio::time::timeout_at((accepted_at + first.hold()).into(), change).await;
    (state.load_full(), Instant::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOLD: Duration = Duration::from_secs(10);

    #[derive(Debug)]
    struct State {
        usable: bool,
        hold: Duration,
    }

    impl Holds for State {
        fn is_usable(&self) -> bool {
            self.usable
        }
        fn hold(&self) -> Duration {
            self.hold
        }
    }

    fn now() -> Instant {
        tokio::time::Instant::now().into_std()
    }

    #[tokio::test(start_paused = true)]
    async fn who_comes_too_early_is_served_as_soon_as_there_is_an_identity() {
        let (published, began) = (watch::Sender::new(false), now());
        let state = Arc::new(ArcSwap::from_pointee(State { usable: false, hold: HOLD }));
        let held = {
            let (state, published) = (Arc::clone(&state), published.clone());
            tokio::spawn(async move { usable(&state, began, &published).await.0.usable })
        };
        tokio::time::sleep(Duration::from_secs(3)).await;
        // Published without an identity for this listener: it waits on.
        published.send_replace(false);
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(!held.is_finished());
        state.store(Arc::new(State { usable: true, hold: HOLD }));
        published.send_replace(true);
        assert!(held.await.unwrap());
        assert_eq!((now() - began).as_secs(), 6);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_held_for_longer_than_declared_and_nobody_at_all_where_nothing_is() {
        let (published, began) = (watch::Sender::new(false), now());
        let state = ArcSwap::from_pointee(State { usable: false, hold: HOLD });
        assert!(!usable(&state, began, &published).await.0.usable);
        assert_eq!(now() - began, HOLD);
        state.store(Arc::new(State { usable: false, hold: Duration::ZERO }));
        assert!(!usable(&state, began, &published).await.0.usable);
        assert_eq!(now() - began, HOLD);
    }
}
