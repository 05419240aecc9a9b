//! Log lines: text with colours on a terminal, JSON elsewhere, on stderr.
//!
//! Lines go through a bounded queue to a thread of their own: a stderr that blocks loses lines, which are counted, and never
//! holds up a connection.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::{EnvFilter, Registry, layer::SubscriberExt, reload};

use crate::config::schema::{LogFormat, Telemetry};

/// Lines that may wait to be written.
const QUEUE: usize = 4096;

enum Message {
    Line(Vec<u8>),
    Flush(SyncSender<()>),
}

/// Where log lines go.
#[derive(Clone)]
struct Lines {
    queue: SyncSender<Message>,
    lost: Arc<AtomicU64>,
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.queue.try_send(Message::Line(line.to_vec())).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

fn write_all(lines: &Receiver<Message>, lost: &AtomicU64, mut out: impl Write) {
    let mut told = 0;
    loop {
        match lines.recv_timeout(Duration::from_secs(1)) {
            Ok(Message::Line(line)) => drop(out.write_all(&line)),
            Ok(Message::Flush(done)) => {
                let _ = out.flush();
                let _ = done.try_send(());
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let now = lost.load(Ordering::Relaxed);
        if now > told {
            let _ = writeln!(out, "portcullis: {} log lines were lost because stderr is too slow", now - told);
            told = now;
        }
    }
}

/// The log of a process, once it is set up.
#[derive(Clone)]
pub struct Log {
    filter: reload::Handle<EnvFilter, Registry>,
    queue: SyncSender<Message>,
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Log")
    }
}

impl Log {
    /// Sets the process's log up.
    ///
    /// # Errors
    /// The filter cannot be read, or the process has a log already.
    pub fn start(telemetry: &Telemetry) -> Result<Self, String> {
        let (queue, lines) = sync_channel(QUEUE);
        let lost = Arc::new(AtomicU64::new(0));
        let writer = Lines { queue: queue.clone(), lost: Arc::clone(&lost) };
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || write_all(&lines, &lost, io::stderr()))
            .map_err(|error| format!("the log's thread cannot be started: {error}"))?;
        let (filter, handle) = reload::Layer::new(filter_of(telemetry)?);
        let terminal = io::stderr().is_terminal();
        let json = match telemetry.log_format {
            LogFormat::Auto => !terminal,
            LogFormat::Text => false,
            LogFormat::Json => true,
        };
        let registry = tracing_subscriber::registry().with(filter);
        let set = if json {
            let layer = tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(writer);
            tracing::subscriber::set_global_default(registry.with(layer))
        } else {
            let layer = tracing_subscriber::fmt::layer().with_ansi(terminal).with_writer(writer);
            tracing::subscriber::set_global_default(registry.with(layer))
        };
        set.map_err(|error| error.to_string())?;
        Ok(Self { filter: handle, queue })
    }

    /// Takes the level of a changed config.
    pub fn reload(&self, telemetry: &Telemetry) {
        if let Ok(filter) = filter_of(telemetry) {
            let _ = self.filter.reload(filter);
        }
    }

    /// Waits until all lines so far are written, one second at most.
    pub fn flush(&self) {
        let (done, wait) = sync_channel(1);
        if self.queue.try_send(Message::Flush(done)).is_ok() {
            let _ = wait.recv_timeout(Duration::from_secs(1));
        }
    }
}

fn filter_of(telemetry: &Telemetry) -> Result<EnvFilter, String> {
    EnvFilter::try_new(&telemetry.log_level)
        .map_err(|error| format!("telemetry.log_level '{}': {error}", telemetry.log_level))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::record::{Cause, ConnectionRecord};
    use crate::tls::record::Direction;

    #[test]
    fn a_line_of_the_access_log_is_one_line_of_json_whatever_the_peer_sent() {
        let (queue, lines) = sync_channel(16);
        let writer = Lines { queue, lost: Arc::default() };
        let layer = tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(writer);
        let record = ConnectionRecord {
            listener: "api".into(),
            direction: Direction::Inbound,
            client: "127.0.0.1:1".into(),
            upstream: None,
            peer: None,
            local: None,
            rule: None,
            tls: None,
            handshake_failure: Some(crate::tls::reason::Reason::NotTls),
            bytes_sent: 1,
            bytes_received: 2,
            duration: Duration::from_millis(5),
            cause: Cause::Handshake,
            detail: "first bytes: \"\n{\"cause\":\"done\"}\u{1b}[31m".into(),
        };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            crate::telemetry::access::write(&record);
        });
        let Ok(Message::Line(line)) = lines.try_recv() else { panic!("no line") };
        let text = String::from_utf8(line).unwrap();
        assert_eq!(text.trim_end().lines().count(), 1);
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["cause"], "handshake_failed");
        assert_eq!(json["reason"], "not_tls");
        assert_eq!(json["detail"], record.detail);
    }

    #[test]
    fn a_blocked_writer_loses_lines_and_never_blocks() {
        let (queue, lines) = sync_channel(2);
        let lost = Arc::new(AtomicU64::new(0));
        let mut writer = Lines { queue, lost: Arc::clone(&lost) };
        for _ in 0..5 {
            writer.write_all(b"line\n").unwrap();
        }
        assert_eq!(lost.load(Ordering::Relaxed), 3);
        drop(writer);
        let mut out = Vec::new();
        write_all(&lines, &lost, &mut out);
        assert!(String::from_utf8(out).unwrap().contains("3 log lines were lost"));
    }
}
