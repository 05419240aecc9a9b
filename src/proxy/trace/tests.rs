use super::*;
use opentelemetry::trace::{SpanKind, TraceId};
use opentelemetry_sdk::trace::{Sampler as Reference, SamplingDecision, ShouldSample};

/// The example of the specification.
const EXAMPLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn headers(of: &[(&'static str, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in of {
        headers.append(*name, HeaderValue::from_str(value).unwrap());
    }
    headers
}

fn state_of(headers: &HeaderMap) -> Vec<&str> {
    headers.get_all(TRACESTATE).iter().map(|value| value.to_str().unwrap()).collect()
}

/// What goes on of a `tracestate` that came with a valid parent.
fn passed_on(states: &[&str]) -> Vec<String> {
    let mut headers = headers(&[("traceparent", EXAMPLE)]);
    for state in states {
        headers.append(TRACESTATE, HeaderValue::from_str(state).unwrap());
    }
    let trace = Sampler::ratio(0.0).incoming(&headers);
    Sampler::ratio(0.0).outgoing(trace.as_ref(), &mut headers);
    state_of(&headers).into_iter().map(str::to_owned).collect()
}

#[test]
fn a_caller_s_trace_goes_on_with_our_span() {
    let mut headers = headers(&[("traceparent", EXAMPLE), ("tracestate", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE")]);
    let sampler = Sampler::ratio(0.0);
    let trace = sampler.incoming(&headers).unwrap();
    assert_eq!(u128::from_be_bytes(trace.trace_id), 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
    assert_eq!(trace.parent, Some(0x00f0_67aa_0ba9_02b7_u64.to_be_bytes()));
    assert!(trace.sampled, "the caller's word counts, not the ratio");
    sampler.outgoing(Some(&trace), &mut headers);
    let on = parse(headers[TRACEPARENT].as_bytes()).unwrap();
    assert_eq!((on.trace_id, on.span_id, on.sampled), (trace.trace_id, trace.span_id, true));
    assert_ne!(Some(on.span_id), trace.parent);
    assert_eq!(state_of(&headers), ["rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"]);
    // Once more, for a retry.
    let before = headers.clone();
    sampler.outgoing(Some(&trace), &mut headers);
    assert_eq!(before, headers);
}

#[test]
fn what_is_not_a_traceparent_to_the_letter_is_none() {
    assert!(parse(EXAMPLE.as_bytes()).is_some());
    let good = EXAMPLE.as_bytes();
    for cut in 0..good.len() {
        assert!(parse(&good[..cut]).is_none(), "{cut}");
    }
    for (at, bytes) in [(0, " "), (2, "_"), (3, "A"), (35, "_"), (36, "G"), (52, " "), (53, "0x"), (54, "F")] {
        let mut bad = good.to_vec();
        bad[at..at + bytes.len()].copy_from_slice(bytes.as_bytes());
        assert!(parse(&bad).is_none(), "{}", String::from_utf8_lossy(&bad));
    }
    for bad in [
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
        "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01.more",
    ] {
        assert!(parse(bad.as_bytes()).is_none(), "{bad}");
    }
    // Versions to come are read as far as 00 goes, and answered in 00.
    for later in [
        "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-09-what-the-future-holds",
    ] {
        assert!(parse(later.as_bytes()).is_some_and(|parent| parent.sampled), "{later}");
    }
    assert!(!parse(b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-02").unwrap().sampled);
}

#[test]
fn whoever_names_no_parent_or_two_begins_a_new_trace_without_a_state() {
    let other = "00-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-bbbbbbbbbbbbbbbb-01";
    let of = [
        vec![("tracestate", "a=1")],
        vec![("traceparent", "nonsense"), ("tracestate", "a=1")],
        vec![("traceparent", EXAMPLE), ("traceparent", EXAMPLE), ("tracestate", "a=1")],
        vec![("traceparent", EXAMPLE), ("traceparent", other), ("tracestate", "a=1")],
    ];
    for mut headers in of.map(|of| headers(&of)) {
        let sampler = Sampler::ratio(1.0);
        let trace = sampler.incoming(&headers).unwrap();
        assert!(trace.parent.is_none() && trace.sampled);
        assert_ne!(u128::from_be_bytes(trace.trace_id), 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        sampler.outgoing(Some(&trace), &mut headers);
        assert_eq!(headers.get_all(TRACEPARENT).iter().count(), 1);
        assert_eq!(parse(headers[TRACEPARENT].as_bytes()).unwrap().trace_id, trace.trace_id);
        assert!(state_of(&headers).is_empty());
    }
    let ids = [(); 100].map(|()| Sampler::ratio(0.5).incoming(&HeaderMap::new()).unwrap().trace_id);
    assert_eq!(ids.iter().collect::<std::collections::HashSet<_>>().len(), 100);
}

#[test]
fn without_traces_headers_pass_untouched_and_the_caller_s_id_is_known() {
    let before = headers(&[("traceparent", EXAMPLE), ("tracestate", "not a list"), ("tracestate", "a=1")]);
    let trace = Sampler::OFF.incoming(&before).unwrap();
    assert_eq!(trace.span_id, 0x00f0_67aa_0ba9_02b7_u64.to_be_bytes());
    assert!(!trace.sampled && trace.parent.is_none());
    let mut after = before.clone();
    Sampler::OFF.outgoing(Some(&trace), &mut after);
    assert_eq!(before, after);
    assert_eq!(Sampler::OFF.incoming(&HeaderMap::new()), None);
    assert_eq!(Sampler::default(), Sampler::OFF);
}

#[test]
fn roots_are_sampled_as_opentelemetry_does() {
    for ratio in [0.0, 1e-9, 0.1, 0.5, 0.999, 1.0] {
        let reference = Reference::TraceIdRatioBased(ratio);
        let mut sampled = 0;
        for _ in 0..2000 {
            let trace = Sampler::ratio(ratio).incoming(&HeaderMap::new()).unwrap();
            let id = TraceId::from_bytes(trace.trace_id);
            let expected = reference.should_sample(None, id, "", &SpanKind::Server, &[], &[]).decision;
            assert_eq!(trace.sampled, expected == SamplingDecision::RecordAndSample, "{ratio} {id}");
            sampled += u32::from(trace.sampled);
        }
        let share = f64::from(sampled) / 2000.0;
        assert!((share - ratio).abs() < 0.1, "{share} of {ratio}");
    }
    assert_eq!(Sampler::ratio(f64::NAN), Sampler::ratio(0.0));
    assert_eq!(Sampler::ratio(7.0), Sampler::ratio(1.0));
}

#[test]
fn a_tracestate_stays_within_its_bounds() {
    assert_eq!(passed_on(&["a=1 , b=2"]), ["a=1 , b=2"], "what is good stays as it came");
    assert_eq!(passed_on(&["a=1", "", " b@c=2,,"]), ["a=1,b@c=2"], "several headers are one list");
    assert!(passed_on(&[""]).is_empty());
    for bad in ["a", "=1", "A=1", "a=", "a=b=c", "a=1,_b=2", "a@=1", "@b=1", "a@b@c=1", "a=1;b"] {
        let expected: &[&str] = if bad == "a=1;b" { &["a=1;b"] } else { &[] };
        assert_eq!(passed_on(&[bad]), expected, "{bad}");
    }
    let many: Vec<String> = (0..40).map(|n| format!("k{n}=v")).collect();
    assert_eq!(passed_on(&[&many.join(",")]), [many[..32].join(",")]);
    // Long members go first, then the last ones; never more than 512 bytes.
    let (long, middle) = (format!("long={}", "x".repeat(200)), format!("m={}", "y".repeat(100)));
    let state = format!("first=1,{long},a{middle},b{middle},c{middle},d{middle}");
    assert_eq!(passed_on(&[&state]), [format!("first=1,a{middle},b{middle},c{middle},d{middle}")]);
    let state = ["a", "b", "c", "d", "e", "f"].map(|key| format!("{key}{middle}")).join(",");
    let passed = passed_on(&[&state]);
    assert_eq!(passed, [["a", "b", "c", "d"].map(|key| format!("{key}{middle}")).join(",")]);
    assert!(passed[0].len() <= MOST_BYTES);
    let just = format!("a={},b={}", "x".repeat(250), "y".repeat(257));
    assert!(passed_on(&[&just]).is_empty(), "a value of 257 is too long");
    let just = format!("a={},b={}", "x".repeat(251), "y".repeat(256));
    assert_eq!(just.len(), MOST_BYTES);
    assert_eq!(passed_on(&[&just]), [just]);
}

proptest::proptest! {
    #[test]
    fn what_we_write_can_be_read(trace_id: [u8; 16], span_id: [u8; 8], sampled: bool) {
        let trace = TraceContext { trace_id, span_id, parent: None, sampled };
        let read = parse(&traceparent(&trace)).map(|parent| (parent.trace_id, parent.span_id, parent.sampled));
        let good = trace_id != [0; 16] && span_id != [0; 8];
        proptest::prop_assert_eq!(read, good.then_some((trace_id, span_id, sampled)));
    }

    #[test]
    fn no_header_does_harm(parent: Vec<u8>, states: Vec<Vec<u8>>) {
        let mut headers = headers(&[("traceparent", EXAMPLE)]);
        for state in states {
            let Ok(value) = HeaderValue::from_bytes(&state) else { continue };
            headers.append(TRACESTATE, value);
        }
        let _ = parse(&parent);
        let sampler = Sampler::ratio(0.5);
        let trace = sampler.incoming(&headers);
        sampler.outgoing(trace.as_ref(), &mut headers);
        let left: Vec<_> = headers.get_all(TRACESTATE).iter().collect();
        proptest::prop_assert!(left.len() <= 1 && left.iter().all(|value| value.len() <= MOST_BYTES));
    }
}
