//! Figures of our own process, read from the kernel when somebody asks for the metrics.

use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::{Counter, Gauge, IntGauge, Opts, Registry};

use super::metrics::keep;

/// Gauges and counters of the process.
#[derive(Debug)]
pub(super) struct Process {
    resident: IntGauge,
    descriptors: IntGauge,
    descriptors_most: Gauge,
    cpu: Counter,
    /// What `cpu` has been told so far, seconds.
    cpu_told: Mutex<f64>,
}

impl Process {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let whole = |name: &str, help: &str| keep(registry, IntGauge::new(name, help));
        let started = keep(
            registry,
            Gauge::new("process_start_time_seconds", "When the process started, seconds since the Unix epoch."),
        )?;
        started.set(unix_now());
        let cpu = Opts::new("process_cpu_seconds_total", "CPU time used so far, user and system.");
        Ok(Self {
            resident: whole("process_resident_memory_bytes", "Resident memory.")?,
            descriptors: whole("process_open_fds", "Open file descriptors.")?,
            // Not whole: a limit that is not there is the infinite one.
            descriptors_most: keep(
                registry,
                Gauge::new("process_max_fds", "File descriptors that may be open at once."),
            )?,
            cpu: keep(registry, Counter::with_opts(cpu))?,
            cpu_told: Mutex::default(),
        })
    }

    /// Reads our own figures; a kernel that does not tell leaves the last ones.
    pub(super) fn refresh(&self) {
        let page = i64::try_from(rustix::param::page_size()).unwrap_or(4096);
        if let Ok(text) = std::fs::read_to_string("/proc/self/statm")
            && let Some(pages) = text.split(' ').nth(1).and_then(|pages| pages.parse::<i64>().ok())
        {
            self.resident.set(pages.saturating_mul(page));
        }
        if let Some(open) = open_descriptors() {
            self.descriptors.set(i64::try_from(open).unwrap_or(i64::MAX));
        }
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        self.descriptors_most.set(limit.map_or(f64::INFINITY, |limit| limit as f64));
        let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        let used = used.tv_sec as f64 + used.tv_nsec as f64 / 1e9;
        // Two scrapes at once must not tell the same seconds twice.
        let mut told = self.cpu_told.lock().unwrap_or_else(PoisonError::into_inner);
        self.cpu.inc_by((used - *told).max(0.0));
        *told = told.max(used);
    }
}

/// How many descriptors are open. The sandbox keeps the list from a process that is not root, but not the number, which
/// Linux gives as the size of the list since 6.2.
fn open_descriptors() -> Option<u64> {
    const LIST: &str = "/proc/self/fd";
    match std::fs::read_dir(LIST) {
        // One of them is the descriptor that the list is read with.
        Ok(entries) => u64::try_from(entries.count().saturating_sub(1)).ok(),
        Err(_) => std::fs::metadata(LIST).ok().map(|list| list.len()).filter(|open| *open > 0),
    }
}

/// Seconds since the Unix epoch.
pub(super) fn unix_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_of_this_process() {
        let process = Process::new(&Registry::new()).unwrap();
        process.refresh();
        assert!(process.resident.get() > 1024 * 1024);
        assert!(process.descriptors.get() >= 3);
        assert!(process.descriptors_most.get() >= process.descriptors.get() as f64);
        let before = process.cpu.get();
        assert!(before > 0.0);
        process.refresh();
        assert!(process.cpu.get() >= before && process.cpu.get() < before + 60.0);
    }
}
