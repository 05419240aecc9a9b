use proptest::prelude::*;

use super::*;

/// What follows is written for the byte order of the machines that are built for.
#[cfg(target_endian = "little")]
#[test]
fn a_message_is_a_header_and_attributes_padded_to_four_bytes() {
    let inner = Attributes::default().u32(2, 16).bytes(1, &[6]);
    let attributes = Attributes::default().text(1, "meta").nested(2, &inner);
    let mut request = Request::default();
    request.message(0x0a06, CREATE | ACK, &[1, 0, 0, 0], &attributes);
    let expected = [
        [52, 0, 0, 0, 0x06, 0x0a, 0x05, 0x04, 1, 0, 0, 0, 0, 0, 0, 0].as_slice(),
        &[1, 0, 0, 0],
        &[9, 0, 1, 0, b'm', b'e', b't', b'a', 0, 0, 0, 0],
        &[20, 0, 2, 0x80, 8, 0, 2, 0, 0, 0, 0, 16, 5, 0, 1, 0, 6, 0, 0, 0],
    ]
    .concat();
    assert_eq!(request.as_bytes(), expected);
}

#[test]
fn what_was_written_is_read_back() {
    let inner = Attributes::default().u32(3, 0x0102_0304).native(4, 5);
    let mut request = Request::default();
    request.message(7, 0, &[9, 9], &Attributes::default().text(1, "abc").nested(2, &inner).bytes(5, &[]));
    request.message(8, ACK, &[], &Attributes::default());
    let read: Vec<_> = messages(request.as_bytes()).collect();
    assert_eq!(read.iter().map(|m| (m.kind, m.sequence, m.flags)).collect::<Vec<_>>(), [(7, 1, 1), (8, 2, 5)]);
    let body = &read[0].body[4..];
    assert_eq!(attribute(body, 1).and_then(|name| name.text()), Some("abc"));
    let nested = attribute(body, 2).unwrap();
    assert!(nested.nested);
    assert_eq!(attribute(nested.value, 3).and_then(|number| number.u32()), Some(0x0102_0304));
    assert_eq!(attribute(nested.value, 4).and_then(|number| number.native()), Some(5));
    assert_eq!(attribute(body, 5).map(|empty| empty.value), Some([].as_slice()));
    assert_eq!(attribute(body, 6), None);
}

#[test]
fn an_attribute_that_claims_too_much_or_too_little_ends_the_list() {
    let good = Attributes::default().u32(1, 1);
    for length in [0_u16, 3, 9, u16::MAX] {
        let mut bytes = good.as_bytes().to_vec();
        bytes.extend(length.to_ne_bytes());
        bytes.extend([2, 0, 0, 0, 0, 0]);
        assert_eq!(attributes(&bytes).count(), 1, "{length}");
    }
}

#[test]
fn an_acknowledgement_is_no_error() {
    assert_eq!(error_of(&0_i32.to_ne_bytes()), None);
    assert_eq!(error_of(&(-2_i32).to_ne_bytes()), Some(Errno::NOENT));
    assert_eq!(error_of(&[]), None);
}

#[test]
fn what_the_kernel_refuses_says_which_message() {
    // Anybody may open the socket and ask for what does not exist: a routing message of an unknown kind.
    let mut netlink = Netlink::open(None).unwrap();
    let mut request = Request::default();
    request.message(0x0fff, ACK, &[0; 4], &Attributes::default());
    let failed = netlink.transact(&request).unwrap_err();
    assert!(failed.message == Some(1) && failed.errno != Errno::TIMEDOUT, "{failed:?}");
}

#[test]
fn a_number_that_is_no_error_is_a_broken_answer() {
    let of = |code: i32| error_of(&code.to_ne_bytes());
    assert_eq!((of(0), of(-1), of(-4095).is_some()), (None, Some(Errno::PERM), true));
    for code in [1, -4096, i32::MIN, i32::MAX] {
        assert_eq!(of(code), Some(Errno::PROTO), "{code}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn any_bytes_are_read_to_an_end(bytes in prop::collection::vec(any::<u8>(), 0..600), length in 0u16..80) {
        let mut bytes = bytes;
        // Likely lengths, or hardly anything would get past the first header.
        for at in (0..bytes.len().saturating_sub(2)).step_by(20) {
            bytes[at..at + 2].copy_from_slice(&length.to_ne_bytes());
        }
        prop_assert!(messages(&bytes).count() <= bytes.len() / HEADER);
        for message in messages(&bytes) {
            error_of(message.body);
            prop_assert!(attributes(message.body).count() <= bytes.len() / ATTRIBUTE_HEADER);
            for attribute in attributes(message.body) {
                let _ = (attribute.u32(), attribute.native(), attribute.text());
                attributes(attribute.value).for_each(drop);
            }
        }
    }
}
