//! The metrics of what passes through without mTLS of ours.

use std::time::Instant;

use prometheus::{IntCounterVec, Opts, Registry};

use super::{MOST_NAMES, keep};
use crate::proxy::record::Watched;
use crate::telemetry::places::{OTHER, Places};

/// The most combinations of version, suite and group that have series of their own: a server chooses them.
const MOST_PICKED: usize = 512;

/// What passes through.
#[derive(Debug)]
pub(super) struct Passed {
    tls: IntCounterVec,
    picked: Places<()>,
    plaintext: IntCounterVec,
    listeners: Places<()>,
}

impl Passed {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let counters =
            |name: &str, help: &str, labels: &[&str]| keep(registry, IntCounterVec::new(Opts::new(name, help), labels));
        Ok(Self {
            tls: counters(
                "passthrough_tls_total",
                "Connections of TLS that the workload speaks itself, by what its server has picked; unknown where that \
                 could not be read.",
                &["version", "cipher_suite", "group", "compliant"],
            )?,
            picked: Places::new(MOST_PICKED),
            plaintext: counters(
                "passthrough_plaintext_total",
                "Connections that left in clear, by the listener that lets them; captured where none takes them.",
                &["listener"],
            )?,
            listeners: Places::new(MOST_NAMES),
        })
    }

    /// A server has picked this.
    pub(super) fn tls(&self, watched: Watched) {
        let picked = watched.picked;
        let compliant = if watched.compliant { "true" } else { "false" };
        let name = format!("{picked} {compliant}");
        self.picked.visit(
            &name,
            false,
            Instant::now(),
            |_, ()| (),
            |place, ()| {
                let labels = match place {
                    OTHER => [OTHER, OTHER, OTHER, compliant],
                    _ => [picked.version, picked.cipher_suite, picked.group, compliant],
                };
                self.tls.with_label_values(&labels).inc();
            },
        );
    }

    /// Something left in clear.
    pub(super) fn plaintext(&self, listener: &str) {
        let forget = |gone: &str, (): &()| {
            // Each that has a place was counted.
            let _ = self.plaintext.remove_label_values(&[gone]);
        };
        self.listeners.visit(listener, true, Instant::now(), forget, |listener, ()| {
            self.plaintext.with_label_values(&[listener]).inc();
        });
    }
}
