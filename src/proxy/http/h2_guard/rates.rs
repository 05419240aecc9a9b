//! How many frames of each kind may come: token buckets that fill with time, and with what is written to the peer.

use tokio::time::Instant;

/// How many frames may come: `per_second` in the long run, `burst` at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// In frames per second.
    pub per_second: u32,
    /// In frames.
    pub burst: u32,
}

/// The rates of one connection.
#[derive(Clone, Copy, Debug)]
pub struct FrameLimits {
    /// SETTINGS, acknowledgements too.
    pub settings: Rate,
    /// PING, answers too. 64 bytes written earn one more.
    pub ping: Rate,
    /// PRIORITY.
    pub priority: Rate,
    /// WINDOW_UPDATE. 32 bytes written earn one more.
    pub window_update: Rate,
    /// RST_STREAM. 1,024 bytes written earn one more.
    pub rst_stream: Rate,
    /// GOAWAY, PUSH_PROMISE and types that are not in RFC 9113.
    pub other: Rate,
}

impl Default for FrameLimits {
    fn default() -> Self {
        Self {
            settings: Rate { per_second: 5, burst: 20 },
            ping: Rate { per_second: 200, burst: 1_000 },
            priority: Rate { per_second: 500, burst: 2_000 },
            window_update: Rate { per_second: 2_000, burst: 20_000 },
            rst_stream: Rate { per_second: 200, burst: 1_000 },
            other: Rate { per_second: 100, burst: 500 },
        }
    }
}

/// The kinds of frame that are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// SETTINGS.
    Settings,
    /// PING.
    Ping,
    /// PRIORITY.
    Priority,
    /// WINDOW_UPDATE.
    WindowUpdate,
    /// RST_STREAM.
    RstStream,
    /// GOAWAY, PUSH_PROMISE and types that are not in RFC 9113.
    Other,
}

impl Kind {
    /// Its name, as in RFC 9113.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Settings => "SETTINGS",
            Self::Ping => "PING",
            Self::Priority => "PRIORITY",
            Self::WindowUpdate => "WINDOW_UPDATE",
            Self::RstStream => "RST_STREAM",
            Self::Other => "other",
        }
    }

    /// The kind that a type counts as (RFC 9113 section 6). None: bounded by h2.
    pub(super) fn of(number: u8) -> Option<Self> {
        match number {
            // DATA, HEADERS and CONTINUATION.
            0 | 1 | 9 => None,
            2 => Some(Self::Priority),
            3 => Some(Self::RstStream),
            4 => Some(Self::Settings),
            6 => Some(Self::Ping),
            8 => Some(Self::WindowUpdate),
            _ => Some(Self::Other),
        }
    }
}

/// Tokens that come back with time.
#[derive(Debug)]
pub(super) struct Bucket {
    rate: Rate,
    /// In thousand millionths of a token.
    level: u64,
    at: Instant,
}

impl Bucket {
    const TOKEN: u64 = 1_000_000_000;

    pub(super) fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, level: Self::full(rate), at: now }
    }

    fn full(rate: Rate) -> u64 {
        u64::from(rate.burst) * Self::TOKEN
    }

    fn add(&mut self, level: u64) {
        self.level = self.level.saturating_add(level).min(Self::full(self.rate));
    }

    /// So many tokens from bytes written.
    pub(super) fn earn(&mut self, bytes: u64, each: u64) {
        self.add(bytes.saturating_mul(Self::TOKEN) / each);
    }

    /// Takes a token, if there is one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let passed = u64::try_from(now.saturating_duration_since(self.at).as_nanos()).unwrap_or(u64::MAX);
        self.at = now;
        self.add(passed.saturating_mul(u64::from(self.rate.per_second)));
        match self.level.checked_sub(Self::TOKEN) {
            Some(level) => {
                self.level = level;
                true
            }
            None => false,
        }
    }
}

#[derive(Debug)]
pub(super) struct Buckets {
    settings: Bucket,
    ping: Bucket,
    priority: Bucket,
    window_update: Bucket,
    rst_stream: Bucket,
    other: Bucket,
}

impl Buckets {
    pub(super) fn new(limits: &FrameLimits) -> Self {
        let now = Instant::now();
        Self {
            settings: Bucket::new(limits.settings, now),
            ping: Bucket::new(limits.ping, now),
            priority: Bucket::new(limits.priority, now),
            window_update: Bucket::new(limits.window_update, now),
            rst_stream: Bucket::new(limits.rst_stream, now),
            other: Bucket::new(limits.other, now),
        }
    }

    pub(super) fn take(&mut self, kind: Kind) -> bool {
        let bucket = match kind {
            Kind::Settings => &mut self.settings,
            Kind::Ping => &mut self.ping,
            Kind::Priority => &mut self.priority,
            Kind::WindowUpdate => &mut self.window_update,
            Kind::RstStream => &mut self.rst_stream,
            Kind::Other => &mut self.other,
        };
        bucket.take(Instant::now())
    }

    pub(super) fn earn(&mut self, written: usize) {
        let written = u64::try_from(written).unwrap_or(u64::MAX);
        self.ping.earn(written, 64);
        self.window_update.earn(written, 32);
        self.rst_stream.earn(written, 1024);
    }
}
