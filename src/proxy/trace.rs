//! The place of a request in a distributed trace: W3C Trace Context, level 1.
//!
//! In: the headers of a request. Out: a [`TraceContext`] for its record, and the headers that the next one gets. Where no
//! traces are configured the headers pass untouched and none is begun; whoever sent one finds its id in our log all the same.

use http::header::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator};

use super::record::TraceContext;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// The most members of a `tracestate` (section 3.3.1.1).
const MOST_MEMBERS: usize = 32;
/// The most bytes of a `tracestate` that are passed on (section 3.3.1.5 asks for at least so many).
const MOST_BYTES: usize = 512;
/// A member longer than this is the first to go (section 3.3.1.5).
const LONG_MEMBER: usize = 128;

/// Which requests get a span: those whose caller says so, and of those that come without a trace a declared share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sampler(Option<u64>);

impl Sampler {
    /// No traces are configured: none is begun, and headers stay as they are.
    pub const OFF: Self = Self(None);

    /// Begins traces, of which the share `ratio` (0 to 1) is exported. The trace's id decides, as with OpenTelemetry's
    /// `TraceIdRatioBased`, so that everybody with the same ratio decides alike.
    pub fn ratio(ratio: f64) -> Self {
        // A NaN becomes 0.
        Self(Some((ratio.clamp(0.0, 1.0) * (1u64 << 63) as f64) as u64))
    }

    /// The place of a request that came with these headers. None only where nobody traces it.
    pub fn incoming(&self, headers: &HeaderMap) -> Option<TraceContext> {
        let caller = parent(headers);
        let Some(bound) = self.0 else {
            // No span of ours: the caller's stands for it.
            let caller = caller?;
            return Some(TraceContext {
                trace_id: caller.trace_id,
                span_id: caller.span_id,
                parent: None,
                sampled: false,
            });
        };
        let ids = RandomIdGenerator::default();
        let span_id = ids.new_span_id().to_bytes();
        Some(match caller {
            Some(caller) => TraceContext {
                trace_id: caller.trace_id,
                span_id,
                parent: Some(caller.span_id),
                sampled: caller.sampled,
            },
            None => {
                let trace_id = ids.new_trace_id().to_bytes();
                let [.., a, b, c, d, e, f, g, h] = trace_id;
                let sampled = u64::from_be_bytes([a, b, c, d, e, f, g, h]) >> 1 < bound;
                TraceContext { trace_id, span_id, parent: None, sampled }
            }
        })
    }

    /// Writes our place into the headers that go on: our span as the parent, and the `tracestate` that came with a valid
    /// parent, within its bounds. `trace` is what [`incoming`](Self::incoming) said of the same request.
    pub fn outgoing(&self, trace: Option<&TraceContext>, headers: &mut HeaderMap) {
        let (Some(_), Some(trace)) = (self.0, trace) else { return };
        if let Ok(value) = HeaderValue::from_bytes(&traceparent(trace)) {
            headers.insert(TRACEPARENT, value);
        }
        if trace.parent.is_some() {
            bound_state(headers);
        } else {
            headers.remove(TRACESTATE);
        }
    }
}

/// What a caller says of itself.
struct Parent {
    trace_id: [u8; 16],
    span_id: [u8; 8],
    sampled: bool,
}

/// The caller's place, if it names exactly one that can be read.
fn parent(headers: &HeaderMap) -> Option<Parent> {
    let mut values = headers.get_all(TRACEPARENT).iter();
    let (only, None) = (values.next()?, values.next()) else { return None };
    parse(only.as_bytes())
}

/// Reads a `traceparent` (sections 3.2.2 and 4.3): version 00 to the letter, later versions as far as 00 goes.
fn parse(value: &[u8]) -> Option<Parent> {
    let [v, w, b'-', rest @ ..] = value.first_chunk::<55>()? else { return None };
    let [version] = hex(&[*v, *w])?;
    let more = value.get(55);
    if version == 0xff || more.is_some_and(|byte| version == 0 || *byte != b'-') {
        return None;
    }
    let (trace_id, rest) = rest.split_first_chunk::<32>()?;
    let [b'-', rest @ ..] = rest else { return None };
    let (span_id, rest) = rest.split_first_chunk::<16>()?;
    let [b'-', flags @ ..] = rest else { return None };
    let (trace_id, span_id, [flags]) = (hex(trace_id)?, hex(span_id)?, hex(flags)?);
    (trace_id != [0; 16] && span_id != [0; 8]).then_some(Parent { trace_id, span_id, sampled: flags & 1 == 1 })
}

/// Lowercase only (section 3.2.2).
fn hex<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let [high, low] = pair else { return None };
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(bytes)
}

/// Our own, version 00.
fn traceparent(trace: &TraceContext) -> [u8; 55] {
    let mut text = *b"00-................................-................-00";
    let digit = |nibble: u8| if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 };
    let bytes = trace.trace_id.iter().chain(&trace.span_id);
    let digits = bytes.flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]);
    for (place, digit) in text.iter_mut().filter(|place| **place == b'.').zip(digits) {
        *place = digit;
    }
    if let Some(last) = text.last_mut().filter(|_| trace.sampled) {
        *last = b'1';
    }
    text
}

/// Leaves a `tracestate` that is good and small as it came, shortens one that is too long, removes one that cannot be read.
fn bound_state(headers: &mut HeaderMap) {
    let mut values = headers.get_all(TRACESTATE).iter();
    let Some(first) = values.next() else { return };
    let mut all = Some((0, 0));
    let mut members = Vec::new();
    for member in std::iter::once(first).chain(values).flat_map(|value| value.as_bytes().split(|byte| *byte == b',')) {
        let member = member.trim_ascii();
        if member.is_empty() {
            continue;
        }
        // A list that cannot be read is no list: none of it is passed on. What it costs to read is bounded by the head.
        all = all.filter(|_| is_member(member)).map(|(count, length)| (count + 1, length + member.len() + 1));
        members.push(member);
    }
    match all {
        None | Some((0, _)) => {
            headers.remove(TRACESTATE);
        }
        Some((count, length)) => {
            let mut excess = (length - 1).saturating_sub(MOST_BYTES);
            if excess == 0 && count <= MOST_MEMBERS && headers.get_all(TRACESTATE).iter().count() == 1 {
                return;
            }
            // Long members go first, then those at the end, which are the oldest.
            members.retain(|member| {
                let goes = excess > 0 && member.len() > LONG_MEMBER;
                excess = if goes { excess.saturating_sub(member.len() + 1) } else { excess };
                !goes
            });
            members.truncate(MOST_MEMBERS);
            while members.iter().map(|member| member.len() + 1).sum::<usize>() > MOST_BYTES + 1 {
                members.pop();
            }
            match HeaderValue::from_bytes(&members.join(&b',')) {
                Ok(value) if !value.is_empty() => drop(headers.insert(TRACESTATE, value)),
                _ => drop(headers.remove(TRACESTATE)),
            }
        }
    }
}

/// Whether this is a list member `key=value` (section 3.3.1.3).
fn is_member(member: &[u8]) -> bool {
    let Some(at) = member.iter().position(|byte| *byte == b'=') else { return false };
    let (key, value) = member.split_at(at);
    let value = value.get(1..).unwrap_or_default();
    let inner = |b: &u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' | b'*' | b'/');
    let begins = |b: &u8| matches!(b, b'a'..=b'z' | b'0'..=b'9');
    let part = |part: &[u8], most| part.len() <= most && part.first().is_some_and(begins) && part.iter().all(inner);
    let key_good = match key.iter().position(|byte| *byte == b'@').map(|at| key.split_at(at)) {
        Some((tenant, system)) => part(tenant, 241) && part(system.get(1..).unwrap_or_default(), 14),
        None => part(key, 256),
    };
    key_good && (1..=256).contains(&value.len()) && value.iter().all(|b| matches!(b, b' '..=b'~' if *b != b'='))
}

#[cfg(test)]
mod tests;
