//! Follows the requests of one connection: heads, bodies, chunks, trailers.
//!
//! In: the bytes that were not passed yet, with more at their end each time. Out: how many of them are judged good and
//! why it stopped there. Nothing is copied or allocated; a head or trailer section is passed when it is whole.

use memchr::memchr;

use super::head::{Body, Facts, MAX_LENGTH, field, forbidden_in_trailers};
use super::{GuardLimits, Refusal};

/// Why the scanner stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// It wants more bytes, or to be told what the last request became.
    More,
    /// The head that begins here is refused.
    Refused(Refusal),
    /// The body breaks its framing here.
    Broken(&'static str),
}

/// The state machine.
#[derive(Debug)]
pub(super) struct Scanner {
    limits: GuardLimits,
    state: State,
    /// Whole good heads so far.
    heads: u64,
    /// The request being read may make the connection another protocol's.
    may_switch: bool,
}

#[derive(Debug)]
enum State {
    Head(Head),
    /// So many bytes of a body to come.
    Length(u64),
    Chunk(Chunk),
    Trailers(Trailers),
    /// The request is over and nobody said yet whether it became a tunnel.
    Held,
    Tunnel,
}

/// Finds lines in bytes that grow, and looks at no byte twice.
#[derive(Debug, Default)]
struct Lines {
    /// Where the current line begins.
    line: usize,
    searched: usize,
}

#[derive(Debug)]
enum NoLine {
    TooLong,
    BareLf,
}

impl Lines {
    /// The next line without its CRLF, when it is whole. `allowed` is its greatest length with the CR.
    fn next<'a>(&mut self, bytes: &'a [u8], allowed: usize) -> Result<Option<&'a [u8]>, NoLine> {
        let found = memchr(b'\n', bytes.get(self.searched..).unwrap_or_default());
        let end = found.map_or(bytes.len(), |at| self.searched + at);
        // Judged before the end is seen, so that every way to cut the bytes ends the same.
        if end.saturating_sub(self.line) > allowed {
            return Err(NoLine::TooLong);
        }
        if found.is_none() {
            self.searched = end;
            return Ok(None);
        }
        let line = bytes.get(self.line..end).unwrap_or_default();
        self.line = end + 1;
        self.searched = end + 1;
        line.strip_suffix(b"\r").map(Some).ok_or(NoLine::BareLf)
    }
}

#[derive(Debug, Default)]
struct Head {
    lines: Lines,
    /// The one empty line that may come before (RFC 9112 section 2.2) was seen.
    blank: bool,
    /// Where the fields begin, once the request line was judged.
    fields_at: Option<usize>,
    fields: usize,
    facts: Facts,
}

impl Head {
    /// The head's length, how its body ends and whether it may switch protocols, when it is whole.
    fn feed(&mut self, bytes: &[u8], limits: &GuardLimits) -> Result<Option<(usize, Body, bool)>, Refusal> {
        const BARE_LF: Refusal = Refusal::bad("bare LF in a head");
        loop {
            let offset = self.lines.line;
            let Some(fields_at) = self.fields_at else {
                // Told at the first byte: whoever speaks another protocol may never send a line's end.
                match bytes.get(offset) {
                    Some(b'\r') if !self.blank => {}
                    Some(byte) if !crate::proxy::detect::is_token(*byte) => {
                        return Err(Refusal::bad("invalid method"));
                    }
                    _ => {}
                }
                let line = match self.lines.next(bytes, limits.max_request_line.saturating_add(1)) {
                    Ok(Some(line)) => line,
                    Ok(None) => return Ok(None),
                    Err(NoLine::TooLong) => return Err(Refusal { status: 414, reason: "request line too long" }),
                    Err(NoLine::BareLf) => return Err(BARE_LF),
                };
                if line.is_empty() {
                    self.blank = true;
                } else {
                    self.facts.request_line(line, offset)?;
                    self.fields_at = Some(self.lines.line);
                }
                continue;
            };
            let line = match self.lines.next(bytes, allowed(limits.max_header_bytes, offset - fields_at)) {
                Ok(Some(line)) => line,
                Ok(None) => return Ok(None),
                Err(NoLine::TooLong) => return Err(Refusal { status: 431, reason: "header section too large" }),
                Err(NoLine::BareLf) => return Err(BARE_LF),
            };
            if line.is_empty() {
                let (body, may_switch) = self.facts.end(bytes)?;
                return Ok(Some((self.lines.line, body, may_switch)));
            }
            self.fields += 1;
            if self.fields > limits.max_headers {
                return Err(Refusal { status: 431, reason: "too many header fields" });
            }
            self.facts.field(line, offset)?;
        }
    }
}

/// The greatest length, with the CR, of a line that begins `before` bytes into a section of at most `max` bytes.
fn allowed(max: usize, before: usize) -> usize {
    max.saturating_sub(before).saturating_sub(1)
}

#[derive(Debug, Default)]
struct Trailers {
    lines: Lines,
    fields: usize,
}

impl Trailers {
    /// The section's length, when it is whole.
    fn feed(&mut self, bytes: &[u8], limits: &GuardLimits) -> Result<Option<usize>, &'static str> {
        loop {
            let line = match self.lines.next(bytes, allowed(limits.max_trailer_bytes, self.lines.line)) {
                Ok(Some(line)) => line,
                Ok(None) => return Ok(None),
                Err(NoLine::TooLong) => return Err("trailer section too large"),
                Err(NoLine::BareLf) => return Err("bare LF in a trailer section"),
            };
            if line.is_empty() {
                return Ok(Some(self.lines.line));
            }
            self.fields += 1;
            if self.fields > limits.max_trailers {
                return Err("too many trailer fields");
            }
            if forbidden_in_trailers(field(line)?.name) {
                return Err("forbidden trailer field");
            }
        }
    }
}

/// A chunked body (RFC 9112 section 7.1). Stricter than the grammar: no white space after the size.
#[derive(Debug, Default)]
struct Chunk {
    part: Part,
    digits: u8,
    size: u64,
    /// Bytes of chunk extensions in this body.
    extensions: usize,
}

#[derive(Clone, Copy, Debug, Default)]
enum Part {
    #[default]
    Size,
    ExtensionName,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
}

impl Chunk {
    /// Takes one byte that is not data. True: the last chunk is over and the trailer section begins.
    fn take(&mut self, byte: u8, limits: &GuardLimits) -> Result<bool, &'static str> {
        self.part = match self.part {
            Part::Size => match (byte, char::from(byte).to_digit(16)) {
                (_, Some(digit)) if self.digits < 16 => {
                    self.digits += 1;
                    self.size = (self.size << 4) | u64::from(digit);
                    Part::Size
                }
                (_, Some(_)) => return Err("chunk size too large"),
                (b'\r' | b';', None) if self.digits == 0 => return Err("chunk without a size"),
                (b'\r' | b';', None) if self.size > MAX_LENGTH => return Err("chunk size too large"),
                (b'\r', None) => Part::SizeLf,
                (b';', None) => Part::ExtensionName,
                _ => return Err("invalid chunk size"),
            },
            Part::ExtensionName | Part::Extension => {
                self.extensions += usize::from(byte != b'\r');
                if self.extensions > limits.max_chunk_extensions {
                    return Err("chunk extensions too large");
                }
                match (self.part, byte) {
                    (Part::ExtensionName, byte) if crate::proxy::detect::is_token(byte) => Part::Extension,
                    (Part::ExtensionName, _) => return Err("invalid chunk extension"),
                    (_, b'\r') => Part::SizeLf,
                    (_, b' ' | b'\t' | 0x21..=0x7e) => Part::Extension,
                    _ => return Err("invalid chunk extension"),
                }
            }
            Part::SizeLf if byte == b'\n' && self.size == 0 => return Ok(true),
            Part::SizeLf if byte == b'\n' => Part::Data,
            Part::DataCr if byte == b'\r' => Part::DataLf,
            Part::DataLf if byte == b'\n' => {
                self.digits = 0;
                Part::Size
            }
            Part::SizeLf => return Err("bare CR after a chunk size"),
            Part::DataCr | Part::DataLf | Part::Data => return Err("chunk longer than its size"),
        };
        Ok(false)
    }
}

impl Scanner {
    pub(super) fn new(limits: GuardLimits) -> Self {
        Self { limits, state: State::Head(Head::default()), heads: 0, may_switch: false }
    }

    /// Whole good heads so far.
    pub(super) fn heads(&self) -> u64 {
        self.heads
    }

    /// Whether a head comes next or is being read.
    pub(super) fn in_head(&self) -> bool {
        matches!(self.state, State::Head(_))
    }

    /// Whether it waits to be told what the last request became.
    pub(super) fn is_held(&self) -> bool {
        matches!(self.state, State::Held)
    }

    /// Ends the wait: the last request became a tunnel, or stayed a request.
    pub(super) fn release(&mut self, tunnel: bool) {
        self.state = if tunnel { State::Tunnel } else { State::Head(Head::default()) };
    }

    /// Judges on. `bytes` begins at the first byte that was not passed before.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> (usize, Step) {
        let mut at = 0;
        loop {
            let rest = bytes.get(at..).unwrap_or_default();
            let Some(first) = rest.first() else { return (at, Step::More) };
            match &mut self.state {
                State::Head(head) => match head.feed(rest, &self.limits) {
                    Ok(None) => return (at, Step::More),
                    Err(refusal) => return (at, Step::Refused(refusal)),
                    Ok(Some((length, body, may_switch))) => {
                        at += length;
                        self.heads += 1;
                        self.may_switch = may_switch;
                        match body {
                            Body::Length(0) => self.over(),
                            Body::Length(length) => self.state = State::Length(length),
                            Body::Chunked => self.state = State::Chunk(Chunk::default()),
                        }
                    }
                },
                State::Length(left) => {
                    at += skip(left, rest);
                    if *left == 0 {
                        self.over();
                    }
                }
                State::Chunk(chunk @ Chunk { part: Part::Data, .. }) => {
                    at += skip(&mut chunk.size, rest);
                    if chunk.size == 0 {
                        chunk.part = Part::DataCr;
                    }
                }
                State::Chunk(chunk) => match chunk.take(*first, &self.limits) {
                    Err(reason) => return (at, Step::Broken(reason)),
                    Ok(last) => {
                        at += 1;
                        if last {
                            self.state = State::Trailers(Trailers::default());
                        }
                    }
                },
                State::Trailers(trailers) => match trailers.feed(rest, &self.limits) {
                    Ok(None) => return (at, Step::More),
                    Err(reason) => return (at, Step::Broken(reason)),
                    Ok(Some(length)) => {
                        at += length;
                        self.over();
                    }
                },
                State::Held => return (at, Step::More),
                State::Tunnel => return (bytes.len(), Step::More),
            }
        }
    }

    fn over(&mut self) {
        self.state = if self.may_switch { State::Held } else { State::Head(Head::default()) };
    }
}

/// Takes up to `left` bytes of data.
fn skip(left: &mut u64, bytes: &[u8]) -> usize {
    let count = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
    *left -= u64::try_from(count).unwrap_or(*left);
    count
}
