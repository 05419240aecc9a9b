use proptest::prelude::*;

use super::*;
use crate::intercept::chains::ruleset;
use crate::intercept::netlink::messages;
use crate::intercept::tests::{everything, transparent};

#[test]
fn a_replacement_is_one_batch_in_which_everything_comes_before_its_use() {
    let ruleset = ruleset(&everything());
    let stray = FoundChain { name: "stray".to_owned(), base: None };
    let moved = FoundChain { name: "output_nat".to_owned(), base: None };
    let request = replacement(&ruleset, &[stray, moved], 7);
    let kinds: Vec<u16> = messages(request.as_bytes()).map(|message| message.kind).collect();
    let mut shape = kinds.clone();
    shape.dedup();
    assert_eq!(
        shape,
        [NFNL_MSG_BATCH_BEGIN, NEWTABLE, DELRULE, DELCHAIN, NEWOBJ, NEWCHAIN, NEWRULE, NEWTABLE, NFNL_MSG_BATCH_END]
    );
    let count = |kind| kinds.iter().filter(|k| **k == kind).count();
    assert_eq!((count(DELCHAIN), count(NEWOBJ), count(NEWCHAIN)), (2, 2, ruleset.chains.len()));
    assert_eq!(count(NEWRULE), ruleset.chains.iter().map(|chain| chain.rules.len()).sum::<usize>());
}

#[test]
fn chains_that_stand_are_not_deleted() {
    let ruleset = ruleset(&everything());
    let found: Vec<FoundChain> = ruleset
        .chains
        .iter()
        .map(|chain| FoundChain { name: chain.name.to_owned(), base: chain.base.map(found_base) })
        .collect();
    let request = replacement(&ruleset, &found, 7);
    assert!(!messages(request.as_bytes()).any(|message| message.kind == DELCHAIN));
}

#[test]
fn a_chain_is_read_as_it_is_written() {
    for chain in ruleset(&everything()).chains {
        let read = found_chain(chain_attributes(&chain).as_bytes()).unwrap();
        assert!(read.is(&chain), "{read:?}");
    }
}

#[test]
fn every_difference_is_told() {
    let ruleset = ruleset(&transparent());
    let whole = || Found {
        table: Some(0),
        chains: ruleset
            .chains
            .iter()
            .map(|chain| FoundChain { name: chain.name.to_owned(), base: chain.base.map(found_base) })
            .collect(),
        rules: ruleset
            .chains
            .iter()
            .flat_map(|chain| {
                chain.rules.iter().map(|rule| (chain.name.to_owned(), expressions(rule).as_bytes().to_vec()))
            })
            .collect(),
    };
    let told = |found: &Found| compare(&ruleset, found, found.table.unwrap());
    assert_eq!(told(&whole()), Vec::<String>::new());

    let mut found = whole();
    found.table = Some(1);
    assert_eq!(told(&found), ["table portcullis has flags 0x1: it is dormant or not ours"]);
    let mut found = whole();
    found.rules.swap(0, 1);
    assert_eq!(told(&found), ["rule 1 of chain from_proxy is another"]);
    let mut found = whole();
    found.rules.remove(0);
    assert!(told(&found)[0].starts_with("chain from_proxy has"), "{:?}", told(&found));
    let mut found = whole();
    // One expression more: the rest of the rule would be skipped by it.
    let more =
        expressions(&Rule { matches: Vec::new(), actions: vec![super::super::rules::Action::Return], comment: "" });
    found.rules[0].1.splice(0..0, more.as_bytes().iter().copied());
    assert_eq!(told(&found), ["rule 1 of chain from_proxy is another"]);
    let mut found = whole();
    found.chains.retain(|chain| chain.name != "output_nat");
    assert_eq!(told(&found), ["chain output_nat is missing"]);
    let mut found = whole();
    found.chains.iter_mut().for_each(|chain| {
        if let Some(base) = &mut chain.base {
            base.priority = Some(7);
        }
    });
    assert_eq!(told(&found).len(), ruleset.chains.iter().filter(|chain| chain.base.is_some()).count());
    let mut found = whole();
    found.chains.push(FoundChain { name: "stray".to_owned(), base: None });
    assert_eq!(told(&found), ["chain stray is not ours"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn any_rule_of_the_kernel_is_answered(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        which in any::<prop::sample::Index>(),
    ) {
        let rules: Vec<Rule> = ruleset(&transparent()).chains.into_iter().flat_map(|chain| chain.rules).collect();
        let rule = which.get(&rules);
        let mut bytes = expressions(rule).as_bytes().to_vec();
        for (at, byte) in &edits {
            let at = at.index(bytes.len());
            bytes[at] = *byte;
        }
        if bytes == expressions(rule).as_bytes() {
            prop_assert!(same(rule, &bytes));
        }
        same(rule, &bytes);
        found_chain(&bytes);
    }
}
