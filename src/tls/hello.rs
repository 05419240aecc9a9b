//! A look at the ClientHello: what does the peer offer that lies below the profile?
//!
//! A pure function over bytes that were received anyway; it decides nothing. In: the TLS records of a first flight.
//! Out: a closed set of words. Bounded: it never reads past the slice and keeps nothing.

/// The largest ClientHello that is read, in bytes with its record headers. Post-quantum ones are about 2 kB.
pub const MAX_HELLO_BYTES: usize = 12 * 1024;

/// Words for what lies below the profile.
pub const WEAK: &[&str] =
    &["SSLv3", "TLSv1.0", "TLSv1.1", "NULL", "EXPORT", "RC4", "DES", "3DES", "ANON", "RSA_KEY_EXCHANGE", "CBC"];

/// Whether the first bytes can be the beginning of a TLS handshake record (RFC 8446, section 5.1).
pub fn looks_like_tls(first: &[u8]) -> bool {
    match first {
        [] => true,
        [kind] => *kind == 0x16,
        [kind, major, ..] => *kind == 0x16 && *major == 0x03,
    }
}

/// What the ClientHello in `records` offers below the profile, in the order of [`WEAK`]. Nothing if it cannot be read:
/// the TLS library says what is wrong with it.
pub fn offered_weak(records: &[u8]) -> Vec<&'static str> {
    let Some(body) = handshake_body(records) else { return Vec::new() };
    let mut found = [false; WEAK.len()];
    let _ = scan(&body, &mut |word| {
        if let Some(slot) = WEAK.iter().position(|w| *w == word).and_then(|i| found.get_mut(i)) {
            *slot = true;
        }
    });
    WEAK.iter().zip(found).filter_map(|(word, is)| is.then_some(*word)).collect()
}

/// The record of a fatal alert in the clear (RFC 8446, section 6).
pub fn alert(description: rustls::AlertDescription) -> [u8; 7] {
    [0x15, 3, 1, 0, 2, 2, description.into()]
}

/// Whether the ClientHello in `records` is of a version before TLS 1.2, which knows no `supported_versions`.
pub fn is_too_old(records: &[u8]) -> bool {
    let legacy_version = handshake_body(records).and_then(|body| Reader(&body).u16());
    legacy_version.is_some_and(|version| (0x0300..0x0303).contains(&version))
}

/// The host that a ClientHello is for (RFC 6066, section 3), out of the body of its message: in lower case, without a dot
/// at the end.
pub fn server_name(body: &[u8]) -> Option<Box<str>> {
    let mut hello = Reader(body);
    hello.take(34)?;
    hello.vec8()?;
    hello.vec16()?;
    hello.vec8()?;
    let mut extensions = Reader(hello.vec16()?);
    while let (Some(kind), Some(data)) = (extensions.u16(), extensions.vec16()) {
        if kind == 0 {
            let mut names = Reader(Reader(data).vec16()?);
            while let (Some(kind), Some(name)) = (names.u8(), names.vec16()) {
                if kind == 0 {
                    let name = std::str::from_utf8(name).ok()?.trim_end_matches('.');
                    let good =
                        !name.is_empty() && name.len() <= 253 && name.bytes().all(|byte| byte.is_ascii_graphic());
                    return good.then(|| name.to_ascii_lowercase().into());
                }
            }
            return None;
        }
    }
    None
}

/// Joins the handshake message out of its records.
fn handshake_body(records: &[u8]) -> Option<Vec<u8>> {
    let mut rest = Reader(records);
    let mut message = Vec::with_capacity(records.len());
    while !rest.0.is_empty() {
        let header = rest.take(5)?;
        if header.first() != Some(&0x16) {
            break;
        }
        let length = usize::from(u16::from_be_bytes([*header.get(3)?, *header.get(4)?]));
        message.extend_from_slice(rest.take(length)?);
    }
    let mut reader = Reader(&message);
    if reader.u8()? != 1 {
        return None;
    }
    let length = reader.u24()?;
    reader.take(length).map(<[u8]>::to_vec)
}

fn scan(body: &[u8], found: &mut dyn FnMut(&'static str)) -> Option<()> {
    let mut hello = Reader(body);
    let legacy_version = hello.u16()?;
    hello.take(32)?;
    hello.vec8()?;
    let mut suites = Reader(hello.vec16()?);
    while let Some(suite) = suites.u16() {
        weak_suite(suite, found);
    }
    hello.vec8()?;
    let mut versions_named = false;
    if let Some(extensions) = hello.vec16() {
        let mut extensions = Reader(extensions);
        while let (Some(kind), Some(data)) = (extensions.u16(), extensions.vec16()) {
            if kind == 43 {
                versions_named = true;
                let mut versions = Reader(Reader(data).vec8()?);
                while let Some(version) = versions.u16() {
                    weak_version(version, found);
                }
            }
        }
    }
    if !versions_named {
        weak_version(legacy_version, found);
    }
    Some(())
}

fn weak_version(version: u16, found: &mut dyn FnMut(&'static str)) {
    match version {
        0x0300 => found("SSLv3"),
        0x0301 => found("TLSv1.0"),
        0x0302 => found("TLSv1.1"),
        _ => {}
    }
}

/// Classes of the IANA TLS cipher suite registry that lie below the profile.
fn weak_suite(suite: u16, found: &mut dyn FnMut(&'static str)) {
    match suite {
        0x0000..=0x0002 | 0x002C..=0x002E | 0x003B | 0xC001 | 0xC006 | 0xC00B | 0xC010 | 0xC015 => found("NULL"),
        _ => {}
    }
    match suite {
        0x0003 | 0x0006 | 0x0008 | 0x000B | 0x000E | 0x0011 | 0x0014 | 0x0017 | 0x0019 | 0x0026..=0x002B => {
            found("EXPORT")
        }
        _ => {}
    }
    match suite {
        0x0003..=0x0005
        | 0x0017
        | 0x0018
        | 0x0020
        | 0x0024
        | 0x008A
        | 0x008E
        | 0x0092
        | 0xC002
        | 0xC007
        | 0xC00C
        | 0xC011
        | 0xC016
        | 0xC033 => found("RC4"),
        _ => {}
    }
    match suite {
        0x0008 | 0x0009 | 0x000B | 0x000C | 0x000E | 0x000F | 0x0011 | 0x0012 | 0x0014 | 0x0015 | 0x0019 | 0x001A
        | 0x001E | 0x0022 => found("DES"),
        _ => {}
    }
    match suite {
        0x000A
        | 0x000D
        | 0x0010
        | 0x0013
        | 0x0016
        | 0x001B
        | 0x001F
        | 0x0023
        | 0x008B
        | 0x008F
        | 0x0093
        | 0xC003
        | 0xC008
        | 0xC00D
        | 0xC012
        | 0xC017
        | 0xC01A..=0xC01C
        | 0xC034 => found("3DES"),
        _ => {}
    }
    match suite {
        0x0017..=0x001B | 0x0034 | 0x003A | 0x006C | 0x006D | 0x00A6 | 0x00A7 | 0xC015..=0xC019 => found("ANON"),
        _ => {}
    }
    match suite {
        0x0001..=0x000A
        | 0x002F
        | 0x0035
        | 0x003B..=0x003D
        | 0x0041
        | 0x0084
        | 0x0096
        | 0x009C
        | 0x009D
        | 0x00BA
        | 0x00C0
        | 0xC09C
        | 0xC09D
        | 0xC0A0
        | 0xC0A1 => found("RSA_KEY_EXCHANGE"),
        _ => {}
    }
    match suite {
        0x002F..=0x003A
        | 0x003C..=0x0046
        | 0x0067..=0x006D
        | 0x0084..=0x0089
        | 0x0096..=0x009B
        | 0x00BA..=0x00C5
        | 0xC003..=0xC005
        | 0xC008..=0xC00A
        | 0xC00D..=0xC00F
        | 0xC012..=0xC014
        | 0xC017..=0xC019
        | 0xC01A..=0xC02A
        | 0xC034..=0xC038
        | 0xC072..=0xC079 => found("CBC"),
        _ => {}
    }
}

/// Reads big-endian numbers and vectors (RFC 8446, section 3) off the front of a slice.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }
    pub(super) fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }
    pub(super) fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }
    pub(super) fn u24(&mut self) -> Option<usize> {
        match self.take(3)? {
            [a, b, c] => Some(usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c)),
            _ => None,
        }
    }
    pub(super) fn vec8(&mut self) -> Option<&'a [u8]> {
        let n = self.u8()?;
        self.take(usize::from(n))
    }
    pub(super) fn vec16(&mut self) -> Option<&'a [u8]> {
        let n = self.u16()?;
        self.take(usize::from(n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A ClientHello with these suites and, if any, these supported_versions.
    fn hello(suites: &[u16], versions: &[u16]) -> Vec<u8> {
        let mut body = vec![0x03, 0x03];
        body.extend([7; 32]);
        body.push(0);
        body.extend(u16::try_from(suites.len() * 2).unwrap().to_be_bytes());
        suites.iter().for_each(|s| body.extend(s.to_be_bytes()));
        body.extend([1, 0]);
        let mut extensions = Vec::new();
        if !versions.is_empty() {
            let list: Vec<u8> = versions.iter().flat_map(|v| v.to_be_bytes()).collect();
            extensions.extend(43u16.to_be_bytes());
            extensions.extend(u16::try_from(list.len() + 1).unwrap().to_be_bytes());
            extensions.push(u8::try_from(list.len()).unwrap());
            extensions.extend(list);
        }
        body.extend(u16::try_from(extensions.len()).unwrap().to_be_bytes());
        body.extend(extensions);
        let mut message = vec![1, 0];
        message.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
        message.extend(body);
        let mut record = vec![0x16, 3, 1];
        record.extend(u16::try_from(message.len()).unwrap().to_be_bytes());
        record.extend(message);
        record
    }

    #[test]
    fn names_what_the_incident_enabled() {
        let weak = offered_weak(&hello(&[0x1302, 0x000A, 0xC02C], &[0x0304, 0x0303, 0x0301]));
        assert_eq!(weak, ["TLSv1.0", "3DES", "RSA_KEY_EXCHANGE"]);
    }

    #[test]
    fn versions_before_tls_1_2_are_too_old() {
        let mut old = hello(&[0xC02C], &[]);
        assert!(!is_too_old(&old));
        // Behind the headers of record and message.
        old[9..11].copy_from_slice(&[3, 2]);
        assert!(is_too_old(&old));
        assert!(!is_too_old(&old[..20]));
    }

    #[test]
    fn the_profile_itself_is_not_weak() {
        assert!(offered_weak(&hello(&[0x1302, 0x1303, 0xC02C], &[0x0304, 0x0303])).is_empty());
    }

    #[test]
    fn a_hello_in_many_records_is_read_whole_and_every_prefix_is_quiet() {
        let whole = hello(&[0x0005], &[]);
        let message = &whole[5..];
        let mut split = Vec::new();
        for chunk in message.chunks(7) {
            split.extend([0x16, 3, 1, 0, u8::try_from(chunk.len()).unwrap()]);
            split.extend(chunk);
        }
        assert_eq!(offered_weak(&split), ["RC4", "RSA_KEY_EXCHANGE"]);
        for end in 0..whole.len() {
            assert!(offered_weak(&whole[..end]).is_empty(), "prefix of {end} bytes");
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = offered_weak(&bytes);
            let _ = looks_like_tls(&bytes);
        }
    }
}
