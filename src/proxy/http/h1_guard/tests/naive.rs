//! A second reader of HTTP/1, to be compared with. It knows no limits and no CONNECT.

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Served {
    pub(super) method: String,
    pub(super) target: String,
    /// None: the body broke its framing or ended early.
    pub(super) body: Option<Vec<u8>>,
}

/// A second reader of HTTP/1, plain and slow, with the whole connection before it. The requests up to the first that
/// is bad or not whole, and how many bytes the whole ones are; a request whose body is bad or not whole is the last one,
/// without its body.
pub(super) fn naive(bytes: &[u8]) -> (Vec<Served>, usize) {
    let mut all = Vec::new();
    let mut at = 0;
    loop {
        let rest = bytes[at..].strip_prefix(b"\r\n").unwrap_or(&bytes[at..]);
        let Some(end) = rest.windows(4).position(|four| four == b"\r\n\r\n") else { return (all, at) };
        let (head, after) = (&rest[..end], &rest[end + 4..]);
        let Some((served, body)) = head_of(head) else { return (all, at) };
        let body = match body {
            None => chunked(after),
            Some(length) => {
                usize::try_from(length).ok().and_then(|length| Some((after.get(..length)?.to_vec(), length)))
            }
        };
        let Some((body, length)) = body else {
            all.push(served);
            return (all, at);
        };
        all.push(Served { body: Some(body), ..served });
        at = bytes.len() - after.len() + length;
    }
}

fn lines_of(bytes: &[u8]) -> Option<Vec<String>> {
    // Latin 1, so that every byte is one character.
    let text: String = bytes.iter().map(|byte| char::from(*byte)).collect();
    let lines: Vec<String> = text.split("\r\n").map(str::to_owned).collect();
    let clean = |line: &String| line.chars().all(|c| c == '\t' || (c >= ' ' && c != '\u{7f}'));
    lines.iter().all(clean).then_some(lines)
}

fn is_token(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c))
}

fn field(line: &str) -> Option<(String, &str)> {
    let (name, value) = line.split_once(':')?;
    is_token(name).then(|| (name.to_ascii_lowercase(), value.trim_matches([' ', '\t'])))
}

fn is_authority(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (text, None),
    };
    let good_port = port.is_none_or(|port| port.len() <= 5 && !port.starts_with('+') && port.parse::<u16>().is_ok());
    let literal = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let good_host = match literal {
        Some(literal) => literal.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            (1..=255).contains(&host.len()) && host.chars().all(|c| c.is_ascii_alphanumeric() || "-._~".contains(c))
        }
    };
    good_port && good_host
}

/// The request, and its length unless it is chunked.
fn head_of(head: &[u8]) -> Option<(Served, Option<u64>)> {
    let lines = lines_of(head)?;
    let [method, target, version] = lines[0].split(' ').collect::<Vec<_>>()[..] else { return None };
    let visible = target.chars().all(|c| ('!'..='~').contains(&c) && !"#\"<>`".contains(c));
    let authority = ["http://", "https://"]
        .iter()
        .find(|scheme| target.to_ascii_lowercase().starts_with(**scheme))
        .map(|scheme| target.split_at(scheme.len()).1.split(['/', '?']).next().unwrap().to_owned());
    let form = target.starts_with('/') || (target == "*" && method == "OPTIONS") || authority.is_some();
    // The sender below makes no CONNECT, and a mutation that does is not worth a reader.
    if !is_token(method) || method == "CONNECT" || !visible || !form || !["HTTP/1.0", "HTTP/1.1"].contains(&version) {
        return None;
    }
    let fields: Vec<_> = lines[1..].iter().map(|line| field(line)).collect::<Option<_>>()?;
    let all =
        |wanted: &str| fields.iter().filter(|(name, _)| name == wanted).map(|(_, value)| *value).collect::<Vec<_>>();
    let (hosts, lengths, codings) = (all("host"), all("content-length"), all("transfer-encoding"));
    let host_good = match hosts[..] {
        [] => version == "HTTP/1.0",
        [host] => is_authority(host) && authority.as_ref().is_none_or(|it| it.eq_ignore_ascii_case(host)),
        _ => false,
    };
    if !host_good || !authority.is_none_or(|authority| is_authority(&authority)) {
        return None;
    }
    let served = Served { method: method.to_owned(), target: target.to_owned(), body: None };
    match (&lengths[..], &codings[..]) {
        ([], []) => Some((served, Some(0))),
        ([length], []) if length.chars().all(|c| c.is_ascii_digit()) => {
            Some((served, Some(length.parse().ok().filter(|length| i64::try_from(*length).is_ok())?)))
        }
        ([], [coding]) if coding.eq_ignore_ascii_case("chunked") && version == "HTTP/1.1" => Some((served, None)),
        _ => None,
    }
}

fn chunked(bytes: &[u8]) -> Option<(Vec<u8>, usize)> {
    let mut body = Vec::new();
    let mut rest = bytes;
    loop {
        let end = rest.windows(2).position(|two| two == b"\r\n")?;
        let line = &lines_of(&rest[..end])?[0];
        let (size, extension) =
            line.split_once(';').map_or((line.as_str(), None), |(size, extension)| (size, Some(extension)));
        if !(1..=16).contains(&size.len()) || !size.chars().all(|c| c.is_ascii_hexdigit()) {
            return None;
        }
        if extension.is_some_and(|it| !it.is_ascii() || !it.starts_with(|c| is_token(&String::from(c)))) {
            return None;
        }
        let size = usize::try_from(u64::from_str_radix(size, 16).unwrap()).unwrap();
        rest = &rest[end + 2..];
        if size == 0 {
            break;
        }
        body.extend(rest.get(..size)?);
        rest = rest.get(size..)?.strip_prefix(b"\r\n")?;
    }
    let end = match rest.strip_prefix(b"\r\n") {
        Some(_) => 2,
        None => rest.windows(4).position(|four| four == b"\r\n\r\n")? + 4,
    };
    let bad = "age authorization cache-control connection content-encoding content-length content-location content-range \
        content-type cookie date expect expires forwarded host keep-alive location max-forwards pragma \
        proxy-authenticate proxy-authorization proxy-connection range retry-after set-cookie te trailer \
        transfer-encoding upgrade vary via";
    for line in lines_of(&rest[..end - 2])?.iter().filter(|line| !line.is_empty()) {
        let (name, _) = field(line)?;
        if bad.split_whitespace().any(|it| it == name) || name.starts_with("if-") || name.starts_with("x-forwarded-") {
            return None;
        }
    }
    Some((body, bytes.len() - rest.len() + end))
}
