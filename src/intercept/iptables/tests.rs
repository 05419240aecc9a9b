use super::*;
use crate::intercept::chains::ruleset;
use crate::intercept::tests::everything;

const SAVED: &str = "\
# Generated
*nat
:OUTPUT ACCEPT [0:0]
:PORTCULLIS_OUTPUT - [0:0]
:KUBE-SERVICES - [0:0]
-A OUTPUT -j PORTCULLIS_OUTPUT
-A OUTPUT -m comment --comment \"a -j PORTCULLIS_OTHER\" -j KUBE-SERVICES
-A PORTCULLIS_OUTPUT -d 192.0.2.9/32 ! -p tcp -m comment --comment \"with -j DROP in it\" -j REDIRECT --to-ports 15001
COMMIT
*filter
:PORTCULLIS_OUTPUT - [0:0]
-A PORTCULLIS_OUTPUT -j RETURN
COMMIT
";

#[test]
fn chains_and_jumps_of_ours_are_found_in_what_was_saved() {
    let present = present(SAVED);
    let owned = |parts: &[&str]| parts.iter().map(ToString::to_string).collect::<Vec<_>>();
    let chains: Vec<_> = present.chains.iter().map(|(table, chain)| vec![table.clone(), chain.clone()]).collect();
    assert_eq!(chains, [owned(&["filter", "PORTCULLIS_OUTPUT"]), owned(&["nat", "PORTCULLIS_OUTPUT"])]);
    let jumps: Vec<_> = present.jumps.iter().map(|(a, b, c)| vec![a.clone(), b.clone(), c.clone()]).collect();
    assert_eq!(jumps, [owned(&["nat", "OUTPUT", "PORTCULLIS_OUTPUT"])]);
}

#[test]
fn what_decides_is_compared_and_comments_are_not() {
    let rule = essence(SAVED, "nat", "PORTCULLIS_OUTPUT");
    assert_eq!(rule, [["! -p tcp", "--to-ports 15001", "-d 192.0.2.9", "-j REDIRECT"]]);
    assert_eq!(essence(SAVED, "filter", "PORTCULLIS_OUTPUT"), [["-j RETURN"]]);
    assert_eq!(essence(SAVED, "mangle", "PORTCULLIS_OUTPUT"), Vec::<Vec<String>>::new());
}

#[test]
fn our_own_text_has_no_difference_and_a_change_is_told() {
    let ruleset = ruleset(&everything());
    for family in Family::BOTH {
        let text = text(&ruleset, family, &Present::default()).replace("-I ", "-A ").replace(" 1 -j", " -j");
        assert_eq!(compare(&ruleset, family, &text), Vec::<String>::new());
        let other = text.replace("--to-ports 15001", "--to-ports 15002");
        assert_eq!(compare(&ruleset, family, &other).len(), 1, "{:?}", compare(&ruleset, family, &other));
        let behind = text.replace("-A OUTPUT -j", "-A OUTPUT -j ACCEPT\n-A OUTPUT -j");
        assert_eq!(compare(&ruleset, family, &behind).len(), 2, "{:?}", compare(&ruleset, family, &behind));
    }
}

#[test]
fn a_program_that_is_not_there_is_another_thing_than_one_that_fails() {
    assert!(matches!(run("portcullis-no-such-program", &[], ""), Err(Failed::Missing)));
    let Err(Failed::Other(why)) = run("sh", &["-c", "echo first >&2; echo second >&2; exit 3"], "") else { panic!() };
    assert_eq!(why, "sh: exit status: 3: first; second");
    assert_eq!(run("cat", &[], "to and fro").unwrap(), "to and fro");
}
