use proptest::prelude::*;

use super::*;

fn vec16(bytes: &[u8]) -> Vec<u8> {
    [&u16::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat()
}

fn handshake(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    [&[kind][..], &length[1..], body].concat()
}

fn records(kind: u8, payload: &[u8], size: usize) -> Vec<u8> {
    payload.chunks(size).flat_map(|chunk| [&[kind, 3, 3][..], &vec16(chunk)].concat()).collect()
}

fn hello(version: u16, random: [u8; 32], suite: u16, extensions: &[(u16, &[u8])]) -> Vec<u8> {
    let mut body = version.to_be_bytes().to_vec();
    body.extend(random);
    body.push(0);
    body.extend(suite.to_be_bytes());
    body.push(0);
    if !extensions.is_empty() {
        let all: Vec<u8> =
            extensions.iter().flat_map(|(kind, data)| [&kind.to_be_bytes()[..], &vec16(data)].concat()).collect();
        body.extend(vec16(&all));
    }
    handshake(message::SERVER_HELLO, &body)
}

const TLS13: (u16, &[u8]) = (43, &[3, 4]);

/// What each server says, and what it has picked by that.
fn servers() -> Vec<(Vec<u8>, Picked)> {
    let picked = |version, cipher_suite, group| Picked { version, cipher_suite, group };
    let certificate = handshake(message::CERTIFICATE, &[7; 5000]);
    let done = handshake(message::SERVER_HELLO_DONE, &[]);
    let curve = |group: u16| {
        let [high, low] = group.to_be_bytes();
        handshake(message::SERVER_KEY_EXCHANGE, &[3, high, low, 1, 4])
    };
    let cbc = hello(0x0303, [7; 32], 0xC013, &[(23, &[])]);
    vec![
        (
            hello(0x0303, [7; 32], 0x1302, &[TLS13, (51, &[0x11, 0xEC, 0, 2, 1, 1])]),
            picked("TLSv1.3", "TLS_AES_256_GCM_SHA384", "X25519MLKEM768"),
        ),
        (hello(0x0303, [7; 32], 0x1301, &[(41, &[0, 0]), TLS13]), picked("TLSv1.3", "TLS_AES_128_GCM_SHA256", "none")),
        (
            [cbc.clone(), certificate.clone(), curve(23), done.clone()].concat(),
            picked("TLSv1.2", "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA", "secp256r1"),
        ),
        (
            [hello(0x0301, [7; 32], 0xC013, &[]), certificate.clone(), curve(24), done.clone()].concat(),
            picked("TLSv1.0", "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA", "secp384r1"),
        ),
        (
            [hello(0x0303, [7; 32], 0x009C, &[]), certificate, done.clone()].concat(),
            picked("TLSv1.2", "TLS_RSA_WITH_AES_128_GCM_SHA256", "none"),
        ),
        (hello(0x0300, [7; 32], 0x0005, &[]), picked("SSLv3", "TLS_RSA_WITH_RC4_128_SHA", "none")),
        (hello(0x0302, [7; 32], 0x0033, &[]), picked("TLSv1.1", "TLS_DHE_RSA_WITH_AES_128_CBC_SHA", "none")),
        (
            [
                hello(0x0303, [7; 32], 0xC035, &[]),
                handshake(message::SERVER_KEY_EXCHANGE, &[0, 2, b'h', b'i', 3, 0, 29, 1, 4]),
                done,
            ]
            .concat(),
            picked("TLSv1.2", "TLS_ECDHE_PSK_WITH_AES_128_CBC_SHA", "X25519"),
        ),
        (
            [cbc, handshake(message::NEW_SESSION_TICKET, &[1, 2, 3])].concat(),
            picked("TLSv1.2", "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA", "none"),
        ),
        (hello(0x0303, [7; 32], 0x0A0A, &[(43, &[0x7F, 0x1C])]), picked("unknown", "unknown", "none")),
    ]
}

#[test]
fn what_a_server_has_picked_is_read_however_it_is_cut() {
    for (flight, picked) in servers() {
        for size in [1, 3, 50, 1000, MAX_RECORD] {
            let bytes = records(record::HANDSHAKE, &flight, size);
            assert_eq!(ServerFlight::default().look(&bytes), Said::Picked(picked), "{size}");
            let mut server = ServerFlight::default();
            let said: Vec<Said> = (0..=bytes.len()).map(|end| server.look(&bytes[..end])).collect();
            let first = said.iter().position(|said| *said != Said::More).unwrap();
            assert_eq!(said[first], Said::Picked(picked), "{size}");
        }
    }
}

#[test]
fn a_resumed_session_before_tls_1_3_has_no_group() {
    let hello = records(record::HANDSHAKE, &hello(0x0303, [7; 32], 0xC02C, &[]), 100);
    let bytes = [hello, vec![record::CHANGE_CIPHER_SPEC, 3, 3, 0, 1, 1]].concat();
    let picked =
        Picked { version: "TLSv1.2", cipher_suite: "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", group: iana::NO_GROUP };
    assert_eq!(ServerFlight::default().look(&bytes), Said::Picked(picked));
}

#[test]
fn a_server_asks_for_another_hello_once() {
    let retry = records(record::HANDSHAKE, &hello(0x0303, RETRY, 0x1302, &[TLS13, (51, &[0, 24])]), 100);
    let change = vec![record::CHANGE_CIPHER_SPEC, 3, 3, 0, 1, 1];
    let second = records(record::HANDSHAKE, &hello(0x0303, [7; 32], 0x1302, &[TLS13, (51, &[0, 24, 0, 1, 1])]), 100);
    let mut server = ServerFlight::default();
    assert_eq!(server.look(&retry), Said::Retry);
    assert_eq!(server.taken(), retry.len());
    let bytes = [&retry[..], &change, &second].concat();
    let picked = Picked { version: "TLSv1.3", cipher_suite: "TLS_AES_256_GCM_SHA384", group: "secp384r1" };
    assert_eq!(server.look(&bytes), Said::Picked(picked));
    let mut server = ServerFlight::default();
    assert_eq!(server.look(&retry), Said::Retry);
    assert!(matches!(server.look(&[&retry[..], &retry].concat()), Said::Broken(_)));
}

#[test]
fn what_is_no_answer_to_a_hello_is_said_to_be_none() {
    let good = hello(0x0303, [7; 32], 0xC02C, &[]);
    let alert = |level, what| vec![record::ALERT, 3, 3, 0, 2, level, what];
    assert_eq!(ServerFlight::default().look(&alert(2, 40)), Said::Refused(40));
    let warned = [alert(1, 112), records(record::HANDSHAKE, &good, 100)].concat();
    assert_eq!(ServerFlight::default().look(&warned), Said::More);
    for bytes in [
        b"HTTP/1.1 400 Bad Request\r\n".to_vec(),
        records(record::APPLICATION_DATA, b"secret", 100),
        records(record::CHANGE_CIPHER_SPEC, &[1], 1),
        records(record::HANDSHAKE, &handshake(message::SERVER_KEY_EXCHANGE, &[3, 0, 23]), 100),
        records(record::HANDSHAKE, &[good.clone(), good.clone()].concat(), 100),
        records(record::HANDSHAKE, &handshake(message::SERVER_HELLO, &[3, 3, 7]), 100),
        vec![record::HANDSHAKE, 3, 3, 0, 0],
        vec![record::HANDSHAKE, 3, 3, 0xFF, 0xFF],
        [&records(record::HANDSHAKE, &good, 9)[..14], &records(record::APPLICATION_DATA, b"x", 1)].concat(),
        records(record::HANDSHAKE, &[message::SERVER_HELLO, 0xFF, 0xFF, 0xFF], 100),
    ] {
        assert!(matches!(ServerFlight::default().look(&bytes), Said::Broken(_)), "{}", bytes.escape_ascii());
    }
}

#[test]
fn a_server_that_never_comes_to_the_point_is_left() {
    let hello = records(record::HANDSHAKE, &hello(0x0303, [7; 32], 0xC02C, &[]), 100);
    let certificates = records(record::HANDSHAKE, &handshake(message::CERTIFICATE, &[7; 16_000]), MAX_RECORD);
    let bytes = [hello, certificates.repeat(6)].concat();
    assert!(matches!(ServerFlight::default().look(&bytes), Said::Broken(_)));
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let _ = ServerFlight::default().look(&bytes);
        let mut pieces = Pieces::default();
        while !matches!(pieces.next(&bytes), Piece::More | Piece::Broken(_)) {}
        prop_assert!(pieces.taken() <= bytes.len());
    }

    #[test]
    fn good_flights_with_a_wrong_byte_are_answered_the_same_whole_and_in_pieces(
        server in any::<proptest::sample::Index>(),
        size in 1usize..400,
        at in any::<proptest::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let (flight, _) = server.get(&servers()).clone();
        let mut bytes = records(record::HANDSHAKE, &flight, size);
        *at.get_mut(bytes.as_mut_slice()) = byte;
        let whole = ServerFlight::default().look(&bytes);
        let mut server = ServerFlight::default();
        let piecewise = (0..=bytes.len()).map(|end| server.look(&bytes[..end])).find(|said| *said != Said::More);
        prop_assert_eq!(piecewise.unwrap_or(Said::More), whole);
    }
}
