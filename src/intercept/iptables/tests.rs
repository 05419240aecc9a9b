use super::*;
use crate::intercept::chains::ruleset;
use crate::intercept::tests::{everything, transparent};

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
fn a_rule_that_has_lost_a_flag_is_another_one() {
    let flags = |line: &str| {
        let words = line.split(' ').skip(2).filter(|word| word.starts_with('-') && !["-m", "--comment"].contains(word));
        words.map(str::to_owned).collect::<Vec<_>>()
    };
    let mut seen = std::collections::BTreeSet::new();
    let mut by_user = everything();
    by_user.proxy.mark = None;
    for (plan, family) in
        [everything(), transparent(), by_user].iter().flat_map(|plan| Family::BOTH.map(|of| (plan, of)))
    {
        let ruleset = ruleset(plan);
        let text = text(&ruleset, family, &Present::default()).replace("-I ", "-A ").replace(" 1 -j", " -j");
        for line in text.lines().filter(|line| line.starts_with("-A PORTCULLIS_")) {
            // Comments have no flags in them.
            for flag in flags(line) {
                let takes = DECIDING.iter().find(|(known, _)| **known == flag);
                let values = takes.unwrap_or_else(|| panic!("{flag} is not compared: {line}")).1;
                let (before, after) = line.split_once(&format!(" {flag}")).unwrap();
                let rest: Vec<&str> = after.split(' ').skip(values + 1).collect();
                let without = [&[before], &rest[..]].concat().join(" ");
                let differences = compare(&ruleset, family, &text.replacen(line, &without, 1));
                assert_eq!(differences.len(), 1, "{line}\n{without}\n{differences:?}");
                seen.insert(flag);
            }
        }
    }
    // All that the rules have, and no flag is known that none has.
    assert_eq!(seen.len(), DECIDING.len(), "{seen:?}");
}

#[test]
fn marks_are_the_same_with_the_mask_that_the_save_programs_write() {
    let ruleset = ruleset(&transparent());
    let text = text(&ruleset, Family::V4, &Present::default()).replace("-I ", "-A ").replace(" 1 -j", " -j");
    let saved = |mask: &str| text.replace("--set-mark 0x1506", &format!("--set-xmark 0x1506/{mask}"));
    assert_eq!(compare(&ruleset, Family::V4, &saved("0xffffffff")), Vec::<String>::new());
    assert_eq!(compare(&ruleset, Family::V4, &saved("0xff")).len(), 1);
    let other = text.replace("-m connmark --mark", "-m mark --mark");
    assert_eq!(compare(&ruleset, Family::V4, &other).len(), 1);
}

#[test]
fn a_program_that_is_not_there_is_another_thing_than_one_that_fails() {
    assert!(matches!(run("portcullis-no-such-program", &[], ""), Err(Failed::Missing)));
    let Err(Failed::Other(why)) = run("sh", &["-c", "echo first >&2; echo second >&2; exit 3"], "") else { panic!() };
    assert_eq!(why, "sh: exit status: 3: first; second");
    assert_eq!(run("cat", &[], "to and fro").unwrap(), "to and fro");
}
