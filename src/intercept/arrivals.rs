//! Probes that are on their way to our own capture port.
//!
//! In: from where and for where a probe of ours will come, told before it is sent. Out: whether it has come. A
//! connection that was not told of is nobody's probe.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// The probes that are waited for. Whoever sends them decides how many there are: two at a time.
#[derive(Debug, Default)]
pub struct Arrivals(Mutex<HashMap<(SocketAddr, SocketAddr), oneshot::Sender<()>>>);

/// One probe that is waited for; forgotten when it drops.
#[derive(Debug)]
pub struct Awaited<'a> {
    key: (SocketAddr, SocketAddr),
    arrivals: &'a Arrivals,
    arrived: oneshot::Receiver<()>,
}

impl Arrivals {
    /// A probe will come from this address of ours, and was for that one.
    pub fn expect(&self, from: SocketAddr, to: SocketAddr) -> Awaited<'_> {
        let (tell, arrived) = oneshot::channel();
        self.lock().insert((from, to), tell);
        Awaited { key: (from, to), arrivals: self, arrived }
    }

    /// Whether a captured connection is a probe of ours. Then it needs no answer.
    pub fn arrived(&self, from: SocketAddr, to: SocketAddr) -> bool {
        let awaited = self.lock().remove(&(from, to));
        // Whether its sender still waits does not matter.
        awaited.map(|tell| tell.send(())).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(SocketAddr, SocketAddr), oneshot::Sender<()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Awaited<'_> {
    /// Waits until it has come.
    pub async fn come(&mut self) {
        // Only an arrival takes the sender away.
        let _ = (&mut self.arrived).await;
    }
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        self.arrivals.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_was_told_of_is_a_probe_and_only_once() {
        let arrivals = Arrivals::default();
        let (from, to) = ("192.0.2.1:5000".parse().unwrap(), "192.0.2.1:80".parse().unwrap());
        assert!(!arrivals.arrived(from, to));
        let mut awaited = arrivals.expect(from, to);
        assert!(!arrivals.arrived(to, from) && !arrivals.arrived(from, from));
        assert!(arrivals.arrived(from, to));
        awaited.come().await;
        assert!(!arrivals.arrived(from, to));
        drop((awaited, arrivals.expect(from, to)));
        assert!(!arrivals.arrived(from, to) && arrivals.lock().is_empty());
    }
}
