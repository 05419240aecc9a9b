//! Log lines: text with colours on a terminal, JSON elsewhere, on stderr.
//!
//! Lines go through a bounded queue to a thread of their own: a stderr that blocks loses lines, which are counted, and never
//! holds up a connection. One event is one line, whatever texts of others it holds.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use tracing::Dispatch;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::{EnvFilter, Registry, layer::SubscriberExt, reload};

use crate::config::schema::{LogFormat, Telemetry};

/// Lines that may wait to be written.
const QUEUE: usize = 4096;
/// Bytes from which on waiting lines are left to the next write.
const AT_ONCE: usize = 32 * 1024;
/// The longest that [`Log::flush`] waits.
const FLUSH: Duration = Duration::from_secs(1);

/// A process has one log, and every proxy in it tells of its losses.
static LOST: OnceLock<Arc<AtomicU64>> = OnceLock::new();

/// How many lines the process's log has lost so far because stderr was too slow; none without a log.
pub(super) fn lines_lost() -> Option<u64> {
    LOST.get().map(|lost| lost.load(Ordering::Relaxed))
}

enum Message {
    Line(Vec<u8>),
    Flush(SyncSender<()>),
}

/// Which form lines have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Text { colours: bool },
    Json,
}

impl Form {
    fn of(format: LogFormat, terminal: bool) -> Self {
        match format {
            LogFormat::Json => Self::Json,
            LogFormat::Auto if !terminal => Self::Json,
            LogFormat::Auto | LogFormat::Text => Self::Text { colours: terminal },
        }
    }
}

/// Where log lines go.
#[derive(Clone)]
struct Lines {
    queue: SyncSender<Message>,
    lost: Arc<AtomicU64>,
    form: Form,
}

impl Write for Lines {
    /// Takes one event, as the formatter gives it.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = match self.form {
            Form::Json => event.to_vec(),
            Form::Text { .. } => one_line(event),
        };
        if self.queue.try_send(Message::Line(line)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        Ok(event.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The text formatter escapes terminal sequences but lets line breaks of a message through, and with them forged lines.
fn one_line(event: &[u8]) -> Vec<u8> {
    let event = event.strip_suffix(b"\n").unwrap_or(event);
    let mut line = Vec::with_capacity(event.len() + 1);
    for byte in event {
        match byte {
            b'\n' => line.extend(b"\\n"),
            b'\r' => line.extend(b"\\r"),
            other => line.push(*other),
        }
    }
    line.push(b'\n');
    line
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

fn write_all(lines: &Receiver<Message>, lost: &AtomicU64, form: Form, mut out: impl Write) {
    let mut told = 0;
    let mut next = None;
    loop {
        let message = match next.take() {
            Some(message) => Ok(message),
            None => lines.recv_timeout(Duration::from_secs(1)),
        };
        match message {
            Ok(Message::Line(mut text)) => {
                // One system call for all that waits: under load it would otherwise cost more than the line.
                while text.len() < AT_ONCE {
                    match lines.try_recv() {
                        Ok(Message::Line(line)) => text.extend(line),
                        Ok(flush) => {
                            next = Some(flush);
                            break;
                        }
                        Err(_) => break,
                    }
                }
                let _ = out.write_all(&text);
            }
            Ok(Message::Flush(done)) => {
                let _ = out.flush();
                let _ = done.try_send(());
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let now = lost.load(Ordering::Relaxed);
        if now > told {
            let _ = out.write_all(loss(form, now - told).as_bytes());
            told = now;
        }
    }
}

/// The line that tells of lost ones, in the form of all others.
fn loss(form: Form, lines: u64) -> String {
    let message = format!("{lines} log lines were lost because stderr is too slow");
    let now = humantime::format_rfc3339_micros(SystemTime::now());
    let target = module_path!();
    match form {
        Form::Text { .. } => format!("{now}  WARN {target}: {message}\n"),
        Form::Json => {
            let line = serde_json::json!({
                "timestamp": now.to_string(),
                "level": "WARN",
                "message": message,
                "lost": lines,
                "target": target,
            });
            format!("{line}\n")
        }
    }
}

/// What takes events and makes lines of them.
fn dispatch(filter: reload::Layer<EnvFilter, Registry>, lines: Lines) -> Dispatch {
    let registry = tracing_subscriber::registry().with(filter);
    match lines.form {
        Form::Json => {
            Dispatch::new(registry.with(tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(lines)))
        }
        Form::Text { colours } => {
            Dispatch::new(registry.with(tracing_subscriber::fmt::layer().with_ansi(colours).with_writer(lines)))
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
        let (queue, waiting) = sync_channel(QUEUE);
        let lost = Arc::new(AtomicU64::new(0));
        let form = Form::of(telemetry.log_format, io::stderr().is_terminal());
        let (filter, handle) = reload::Layer::new(filter_of(telemetry)?);
        let lines = Lines { queue: queue.clone(), lost: Arc::clone(&lost), form };
        tracing::dispatcher::set_global_default(dispatch(filter, lines)).map_err(|error| error.to_string())?;
        let counted = Arc::clone(&lost);
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || write_all(&waiting, &counted, form, io::stderr()))
            .map_err(|error| format!("the log's thread cannot be started: {error}"))?;
        let _ = LOST.set(lost);
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
        flush(&self.queue, FLUSH);
    }
}

/// A queue that is full is given time as well: the last lines before an end are those that matter.
fn flush(queue: &SyncSender<Message>, most: Duration) {
    let deadline = Instant::now() + most;
    let (done, wait) = sync_channel(1);
    let mut request = Message::Flush(done);
    while let Err(TrySendError::Full(again)) = queue.try_send(request) {
        if Instant::now() >= deadline {
            return;
        }
        request = again;
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = wait.recv_timeout(deadline.saturating_duration_since(Instant::now()));
}

fn filter_of(telemetry: &Telemetry) -> Result<EnvFilter, String> {
    EnvFilter::try_new(&telemetry.log_level)
        .map_err(|error| format!("telemetry.log_level '{}': {error}", telemetry.log_level))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::schema::PolicyMode;
    use crate::identity::{KeyType, SpiffeId};
    use crate::proxy::listener::Client;
    use crate::proxy::record::{
        Carries, Cause, ConnectionRecord, HttpVersion, RequestCause, RequestRecord, TraceContext,
    };
    use crate::tls::reason::Reason;
    use crate::tls::record::{Direction, Negotiated};

    const TEXT: Form = Form::Text { colours: false };

    /// What a peer would send to write into our log.
    const HOSTILE: &str = "first bytes: \"\r\n{\"cause\":\"done\"}\u{1b}[31m\u{202e}\0\u{7f}\u{9b}2J";

    /// The lines that come of what `happens`.
    fn lines_of(form: Form, level: &str, happens: impl FnOnce(&reload::Handle<EnvFilter, Registry>)) -> Vec<String> {
        let (queue, waiting) = sync_channel(64);
        let lines = Lines { queue, lost: Arc::default(), form };
        let (filter, handle) = reload::Layer::new(EnvFilter::new(level));
        tracing::dispatcher::with_default(&dispatch(filter, lines), || happens(&handle));
        let texts = std::iter::from_fn(|| match waiting.try_recv() {
            Ok(Message::Line(line)) => Some(String::from_utf8(line).unwrap()),
            _ => None,
        });
        texts.collect()
    }

    fn refused() -> ConnectionRecord {
        ConnectionRecord {
            listener: "api".into(),
            direction: Direction::Inbound,
            carries: Carries::Tcp,
            client: "127.0.0.1:1".into(),
            upstream: None,
            peer: None,
            local: None,
            rule: None,
            tls: None,
            watched: None,
            handshake_failure: Some(Reason::NotTls),
            bytes_sent: 1,
            bytes_received: 2,
            duration: Duration::from_millis(5),
            cause: Cause::Handshake,
            detail: HOSTILE.into(),
        }
    }

    fn served() -> ConnectionRecord {
        ConnectionRecord {
            upstream: Some("127.0.0.1:8080".into()),
            peer: Some(SpiffeId::parse("spiffe://td.example/web").unwrap()),
            local: Some(SpiffeId::parse("spiffe://td.example/api").unwrap()),
            rule: Some(("allow:api".into(), PolicyMode::Enforce)),
            tls: Some(Negotiated {
                version: "TLSv1.3",
                cipher_suite: "TLS_AES_256_GCM_SHA384",
                group: "X25519MLKEM768",
                signature: "ecdsa_secp384r1_sha384",
                peer_key: KeyType::P384,
                resumed: false,
                compliant: true,
            }),
            handshake_failure: None,
            cause: Cause::Done,
            detail: String::new(),
            ..refused()
        }
    }

    #[test]
    fn the_access_log_in_json_is_flat_and_its_names_are_these() {
        let lines = lines_of(Form::Json, "info", |_| crate::telemetry::access::connection(&served()));
        let [line] = lines.as_slice() else { panic!("{lines:?}") };
        let mut json: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).unwrap();
        let timestamp = json.remove("timestamp").unwrap();
        assert!(humantime::parse_rfc3339(timestamp.as_str().unwrap()).is_ok(), "{timestamp}");
        let expected = serde_json::json!({
            "level": "INFO", "target": "portcullis::access", "message": "connection done",
            "listener": "api", "direction": "inbound", "client": "127.0.0.1:1", "upstream": "127.0.0.1:8080",
            "peer": "spiffe://td.example/web", "local": "spiffe://td.example/api",
            "rule": "allow:api", "mode": "enforce",
            "tls_version": "TLSv1.3", "cipher_suite": "TLS_AES_256_GCM_SHA384", "group": "X25519MLKEM768",
            "signature": "ecdsa_secp384r1_sha384", "key_type": "ecdsa-p384", "resumed": false, "compliant": true,
            "bytes_sent": 1, "bytes_received": 2, "duration_seconds": 0.005, "cause": "done",
        });
        assert_eq!(serde_json::Value::Object(json), expected);
    }

    fn asked() -> RequestRecord {
        let connection = served();
        RequestRecord {
            listener: "api".into(),
            direction: Direction::Inbound,
            client: Client::Tcp("127.0.0.1:1".parse().unwrap()),
            peer: connection.peer,
            local: connection.local,
            tls: connection.tls,
            upstream: Some("127.0.0.1:8080".into()),
            rule: Some(("read-patients".into(), PolicyMode::Enforce)),
            route: "/patients/{id}".into(),
            method: http::Method::GET,
            host: "records.nhs.example".into(),
            path: "/patients/7".into(),
            version: HttpVersion::Http11,
            status: Some(200),
            grpc_status: None,
            bytes_sent: 0,
            bytes_received: 12,
            began: SystemTime::UNIX_EPOCH,
            duration: Duration::from_millis(5),
            attempts: 1,
            cause: RequestCause::Done,
            detail: String::new(),
            trace: Some(TraceContext { trace_id: [0xab; 16], span_id: [1; 8], parent: None, sampled: true }),
        }
    }

    #[test]
    fn a_request_s_line_in_json_is_flat_and_its_names_are_these() {
        let lines = lines_of(Form::Json, "info", |_| {
            crate::telemetry::access::request(&asked());
            let nobody = RequestRecord { rule: None, status: None, trace: None, grpc_status: Some(14), ..asked() };
            crate::telemetry::access::request(&RequestRecord { cause: RequestCause::Denied, ..nobody });
        });
        let [line, refused] = lines.as_slice() else { panic!("{lines:?}") };
        let mut json: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).unwrap();
        json.remove("timestamp").unwrap();
        let expected = serde_json::json!({
            "level": "INFO", "target": "portcullis::access", "message": "request done",
            "listener": "api", "direction": "inbound", "client": "127.0.0.1:1", "upstream": "127.0.0.1:8080",
            "peer": "spiffe://td.example/web", "local": "spiffe://td.example/api",
            "rule": "read-patients", "mode": "enforce", "route": "/patients/{id}", "method": "GET",
            "host": "records.nhs.example", "path": "/patients/7", "protocol": "HTTP/1.1", "status": 200,
            "tls_version": "TLSv1.3", "cipher_suite": "TLS_AES_256_GCM_SHA384", "group": "X25519MLKEM768",
            "bytes_sent": 0, "bytes_received": 12, "duration_seconds": 0.005, "attempts": 1, "cause": "done",
            "trace_id": "abababababababababababababababab", "span_id": "0101010101010101",
        });
        assert_eq!(serde_json::Value::Object(json), expected);
        let refused: serde_json::Map<String, serde_json::Value> = serde_json::from_str(refused).unwrap();
        assert_eq!(refused["message"], "request refused");
        assert_eq!(refused["grpc_status"], 14);
        assert!(["rule", "mode", "status", "trace_id", "span_id", "detail"].iter().all(|f| !refused.contains_key(*f)));
    }

    #[test]
    fn a_request_s_line_is_one_line_whatever_was_asked_for() {
        let hostile = RequestRecord {
            host: HOSTILE.into(),
            path: HOSTILE.into(),
            detail: HOSTILE.into(),
            method: http::Method::from_bytes(b"!#$%&'*+-.^_`|~").unwrap(),
            ..asked()
        };
        for form in [TEXT, Form::Text { colours: true }, Form::Json] {
            let lines = lines_of(form, "info", |_| crate::telemetry::access::request(&hostile));
            let [line] = lines.as_slice() else { panic!("{lines:?}") };
            let line = line.strip_suffix('\n').unwrap();
            assert_eq!(line.lines().count(), 1, "{line:?}");
            match form {
                Form::Json => {
                    let json: serde_json::Value = serde_json::from_str(line).unwrap();
                    assert!(["host", "path", "detail"].iter().all(|field| json[field] == HOSTILE), "{line:?}");
                    assert_eq!(json["cause"], "done");
                }
                Form::Text { .. } => {
                    for sequence in ["\u{1b}[31m\u{202e}", "\u{9b}", "\u{202e}", "\r", "\0", "\u{7f}", r#" cause":"#] {
                        assert!(!line.contains(sequence), "{sequence:?} in {line:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_line_of_the_access_log_is_one_line_of_json_whatever_the_peer_sent() {
        let lines = lines_of(Form::Json, "info", |_| crate::telemetry::access::connection(&refused()));
        let [line] = lines.as_slice() else { panic!("{lines:?}") };
        assert_eq!(line.trim_end().lines().count(), 1);
        assert!(!line.trim_end().chars().any(|c| c.is_ascii_control() && c != '\u{7f}'), "{line:?}");
        let json: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(json["cause"], "handshake_failed");
        assert_eq!(json["reason"], "not_tls");
        assert_eq!(json["detail"], HOSTILE);
    }

    #[test]
    fn a_line_of_the_access_log_is_one_line_of_text_whatever_the_peer_sent() {
        for form in [TEXT, Form::Text { colours: true }] {
            let lines = lines_of(form, "info", |_| crate::telemetry::access::connection(&refused()));
            let [line] = lines.as_slice() else { panic!("{lines:?}") };
            let line = line.strip_suffix('\n').unwrap();
            // Colours are ours, and only ours.
            for sequence in ["\u{1b}[31m\u{202e}", "\u{9b}", "\u{202e}", "\n", "\r", "\0", "\u{7f}"] {
                assert!(!line.contains(sequence), "{sequence:?} in {line:?}");
            }
            assert!(line.contains("handshake_failed") && line.contains("not_tls"), "{line}");
        }
        let plain = lines_of(TEXT, "info", |_| crate::telemetry::access::connection(&refused())).concat();
        assert!(!plain.trim_end().chars().any(char::is_control), "{plain:?}");
        assert!(plain.contains(r#"cause="handshake_failed""#), "{plain}");
    }

    #[test]
    fn a_message_with_line_breaks_is_one_line_too() {
        let why = "nobody is there\n2026-01-01T00:00:00.000000Z  INFO portcullis: all is well";
        for form in [TEXT, Form::Json] {
            let lines = lines_of(form, "info", |_| {
                tracing::warn!("the agent says: {why}");
                tracing::warn!(%why, "the agent says");
            });
            assert_eq!(lines.len(), 2);
            assert!(lines.iter().all(|line| line.trim_end().lines().count() == 1 && line.ends_with('\n')), "{lines:?}");
        }
    }

    #[test]
    fn the_level_can_be_changed_while_running() {
        let lines = lines_of(TEXT, "info", |level| {
            tracing::debug!("one");
            level.reload(EnvFilter::new("debug")).unwrap();
            tracing::debug!("two");
            level.reload(EnvFilter::new("debug,portcullis::access=off")).unwrap();
            crate::telemetry::access::connection(&served());
        });
        assert!(matches!(lines.as_slice(), [line] if line.contains("two")), "{lines:?}");
    }

    #[test]
    fn text_with_colours_on_a_terminal_and_json_elsewhere() {
        assert_eq!(Form::of(LogFormat::Auto, true), Form::Text { colours: true });
        assert_eq!(Form::of(LogFormat::Auto, false), Form::Json);
        assert_eq!(Form::of(LogFormat::Text, false), TEXT);
        assert_eq!(Form::of(LogFormat::Json, true), Form::Json);
    }

    #[test]
    fn a_blocked_writer_loses_lines_and_never_blocks() {
        for form in [TEXT, Form::Json] {
            let (queue, waiting) = sync_channel(2);
            let lost = Arc::new(AtomicU64::new(0));
            let mut lines = Lines { queue, lost: Arc::clone(&lost), form };
            for _ in 0..5 {
                lines.write_all(b"{}\n").unwrap();
            }
            assert_eq!(lost.load(Ordering::Relaxed), 3);
            drop(lines);
            let mut out = Vec::new();
            write_all(&waiting, &lost, form, &mut out);
            let out = String::from_utf8(out).unwrap();
            assert!(out.contains("3 log lines were lost"), "{out}");
            if form == Form::Json {
                assert!(out.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()), "{out}");
            }
        }
    }

    #[test]
    fn lines_that_wait_are_written_at_once_and_in_order() {
        struct Writes(Vec<Vec<u8>>);
        impl Write for Writes {
            fn write(&mut self, text: &[u8]) -> io::Result<usize> {
                self.0.push(text.to_vec());
                Ok(text.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                self.0.push(b"flushed".to_vec());
                Ok(())
            }
        }
        let (queue, waiting) = sync_channel(100);
        let (done, flushed) = sync_channel(1);
        let long = vec![b'x'; AT_ONCE];
        for message in [
            Message::Line(b"1\n".to_vec()),
            Message::Line(b"2\n".to_vec()),
            Message::Flush(done),
            Message::Line(long.clone()),
            Message::Line(b"3\n".to_vec()),
        ] {
            queue.try_send(message).ok().unwrap();
        }
        drop(queue);
        let mut writes = Writes(Vec::new());
        write_all(&waiting, &AtomicU64::new(0), TEXT, &mut writes);
        assert_eq!(writes.0, [b"1\n2\n".to_vec(), b"flushed".to_vec(), long, b"3\n".to_vec()]);
        flushed.try_recv().unwrap();
    }

    #[test]
    fn a_flush_waits_for_a_full_queue_and_gives_up_on_one_that_stays_full() {
        let (queue, waiting) = sync_channel(1);
        queue.try_send(Message::Line(b"last\n".to_vec())).unwrap();
        flush(&queue, Duration::from_millis(20));
        let writer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            let mut out = Vec::new();
            write_all(&waiting, &AtomicU64::new(0), TEXT, &mut out);
            out
        });
        flush(&queue, Duration::from_secs(10));
        drop(queue);
        assert_eq!(writer.join().unwrap(), b"last\n");
    }
}
