//! Our table in the kernel: replaced as a whole, read back, removed (linux/netfilter/nf_tables.h).
//!
//! In: a [`Ruleset`]. Out: one batch, which the kernel takes whole or not at all. Chains and objects that are there stay,
//! so connections keep their translation and their timeouts; only the rules in them are replaced.

use rustix::io::Errno;
use rustix::net::netlink::NETFILTER;

use super::expressions::{NFT_OBJECT_CT_TIMEOUT, expressions, nfproto};
use super::netlink::{
    ACK, APPEND, Attribute, Attributes, CREATE, DUMP_FLAG, Failed, Netlink, Request, attribute, attributes,
};
use super::rules::{Base, Chain, Hook, Kind, Rule, Ruleset, TABLE, TCP, Timeout};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NEWTABLE: u16 = message(0);
const GETTABLE: u16 = message(1);
const DELTABLE: u16 = message(2);
const NEWCHAIN: u16 = message(3);
const GETCHAIN: u16 = message(4);
const DELCHAIN: u16 = message(5);
const NEWRULE: u16 = message(6);
const GETRULE: u16 = message(7);
const DELRULE: u16 = message(8);
const GETGEN: u16 = message(16);
const NEWOBJ: u16 = message(18);

const NFNL_BATCH_GENID: u16 = 1;
const NFTA_GEN_ID: u16 = 1;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_FLAGS: u16 = 2;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_RULE_USERDATA: u16 = 7;
const NFTA_OBJ_TABLE: u16 = 1;
const NFTA_OBJ_NAME: u16 = 2;
const NFTA_OBJ_TYPE: u16 = 3;
const NFTA_OBJ_DATA: u16 = 4;
const NF_ACCEPT: u32 = 1;
/// A comment in the data that nft(8) keeps with a rule.
const NFTNL_UDATA_RULE_COMMENT: u8 = 0;
/// CTA_TIMEOUT_TCP_FIN_WAIT and CTA_TIMEOUT_TCP_CLOSE_WAIT; other states keep the system's values.
const HALF_CLOSED_STATES: [u16; 2] = [4, 5];
const NFPROTO_INET: u8 = 1;
/// The family, the version of nfnetlink (0), and nothing (struct nfgenmsg).
const HEADER: [u8; 4] = [NFPROTO_INET, 0, 0, 0];
/// That a dump was changed under our eyes, and is read again, so often at most.
const TRIES: usize = 5;

const fn message(number: u16) -> u16 {
    NFNL_SUBSYS_NFTABLES << 8 | number
}

/// What the kernel has of our table.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    /// Its flags, if it is there. Other than zero: dormant, or owned by a process.
    table: Option<u32>,
    chains: Vec<FoundChain>,
    /// The chain's name and the expressions, in order.
    rules: Vec<(String, Vec<u8>)>,
}

#[derive(Debug, PartialEq, Eq)]
struct FoundChain {
    name: String,
    base: Option<FoundBase>,
}

#[derive(Debug, PartialEq, Eq)]
struct FoundBase {
    kind: String,
    hook: Option<u32>,
    priority: Option<u32>,
    policy: Option<u32>,
}

impl FoundChain {
    fn is(&self, chain: &Chain) -> bool {
        self.name == chain.name && self.base == chain.base.map(found_base)
    }
}

fn found_base(base: Base) -> FoundBase {
    FoundBase {
        kind: kind(base.kind).to_owned(),
        hook: Some(hook(base.hook)),
        priority: Some(base.priority.cast_unsigned()),
        policy: Some(NF_ACCEPT),
    }
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Filter => "filter",
        Kind::Nat => "nat",
        Kind::Route => "route",
    }
}

fn hook(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Output => 3,
        Hook::Postrouting => 4,
    }
}

/// Replaces what is in our table by these rules.
///
/// # Errors
/// Why the kernel refuses; nothing is changed then.
pub(super) fn apply(ruleset: &Ruleset) -> Result<(), Failed> {
    let mut netlink = Netlink::open(Some(NETFILTER))?;
    for _ in 1..TRIES {
        match attempt(&mut netlink, ruleset) {
            Err(failed) if matches!(failed.errno, Errno::RESTART | Errno::INTR) => {}
            done => return done,
        }
    }
    attempt(&mut netlink, ruleset)
}

/// `ERESTART`: somebody has changed rules between our look at them and the batch, which then does nothing.
fn attempt(netlink: &mut Netlink, ruleset: &Ruleset) -> Result<(), Failed> {
    let generation = generation(netlink)?;
    let chains = chains(netlink)?;
    netlink.transact(&replacement(ruleset, &chains, generation))
}

/// The number of the rules of this network namespace, all tables together. Each change makes it another.
fn generation(netlink: &mut Netlink) -> Result<u32, Errno> {
    let mut request = Request::default();
    request.message(GETGEN, ACK, &HEADER, &Attributes::default());
    let mut generation = None;
    netlink
        .dump(&request, |body| {
            let body = body.get(HEADER.len()..).unwrap_or_default();
            generation = attribute(body, NFTA_GEN_ID).and_then(|id| id.u32());
        })
        .map_err(without_nftables)?;
    generation.ok_or(Errno::BADMSG)
}

fn replacement(ruleset: &Ruleset, found: &[FoundChain], generation: u32) -> Request {
    let mut request = Request::default();
    begin(&mut request, &Attributes::default().u32(NFNL_BATCH_GENID, generation));
    request.message(NEWTABLE, CREATE, &HEADER, &table().u32(NFTA_TABLE_FLAGS, 0));
    // Of the whole table. Jumps are gone with the rules, so chains can go too.
    request.message(DELRULE, 0, &HEADER, &Attributes::default().text(NFTA_RULE_TABLE, TABLE));
    for chain in found.iter().filter(|found| !ruleset.chains.iter().any(|chain| found.is(chain))) {
        request.message(DELCHAIN, 0, &HEADER, &chain_name(&chain.name));
    }
    for timeout in &ruleset.timeouts {
        request.message(NEWOBJ, CREATE, &HEADER, &timeout_object(timeout));
    }
    for chain in &ruleset.chains {
        request.message(NEWCHAIN, CREATE, &HEADER, &chain_attributes(chain));
    }
    for chain in &ruleset.chains {
        for rule in &chain.rules {
            request.message(NEWRULE, CREATE | APPEND, &HEADER, &rule_attributes(chain.name, rule));
        }
    }
    // The last one that can ask for it: kernels before 6.10 do not acknowledge the end of a batch.
    request.message(NEWTABLE, CREATE | ACK, &HEADER, &table());
    end(&mut request);
    request
}

/// Removes our table and all in it. That there is none is fine.
///
/// # Errors
/// Why the kernel refuses.
pub(super) fn remove() -> Result<(), Failed> {
    let mut netlink = Netlink::open(Some(NETFILTER))?;
    let mut request = Request::default();
    begin(&mut request, &Attributes::default());
    // What exists can be removed whether it was there or not, in one batch.
    request.message(NEWTABLE, CREATE, &HEADER, &table());
    request.message(DELTABLE, ACK, &HEADER, &table());
    end(&mut request);
    netlink.transact(&request)
}

/// What is missing or different in the kernel, a line each; none if the table is not there.
///
/// # Errors
/// Why it cannot be read.
pub(super) fn differences(ruleset: &Ruleset) -> Result<Option<Vec<String>>, Errno> {
    let mut netlink = Netlink::open(Some(NETFILTER))?;
    let found = again(|| find(&mut netlink))?;
    Ok(found.table.map(|flags| compare(ruleset, &found, flags)))
}

fn compare(ruleset: &Ruleset, found: &Found, flags: u32) -> Vec<String> {
    let mut differences = Vec::new();
    if flags != 0 {
        differences.push(format!("table {TABLE} has flags {flags:#x}: it is dormant or not ours"));
    }
    for chain in &ruleset.chains {
        let name = chain.name;
        match found.chains.iter().find(|found| found.name == name) {
            None => differences.push(format!("chain {name} is missing")),
            Some(found) if !found.is(chain) => differences.push(format!("chain {name} has another hook or policy")),
            Some(_) => {}
        }
        let rules: Vec<&[u8]> =
            found.rules.iter().filter(|(chain, _)| chain == name).map(|(_, rule)| rule.as_slice()).collect();
        if rules.len() != chain.rules.len() {
            differences.push(format!("chain {name} has {} rules instead of {}", rules.len(), chain.rules.len()));
        } else if let Some((number, _)) =
            (1..).zip(chain.rules.iter().zip(rules)).find(|(_, (rule, found))| !same(rule, found))
        {
            differences.push(format!("rule {number} of chain {name} is another"));
        }
    }
    let stray = found.chains.iter().filter(|found| !ruleset.chains.iter().any(|chain| found.name == chain.name));
    differences.extend(stray.map(|chain| format!("chain {} is not ours", chain.name)));
    differences
}

/// Whether the kernel's expressions are those of the rule. It tells more of some of them than it was told, and in its own
/// order; nothing that it was told may be missing.
fn same(rule: &Rule, found: &[u8]) -> bool {
    let ours = expressions(rule);
    let mut found = attributes(found);
    attributes(ours.as_bytes()).all(|ours| found.next().is_some_and(|found| holds(found, ours)))
        && found.next().is_none()
}

fn holds(found: Attribute<'_>, ours: Attribute<'_>) -> bool {
    if found.kind != ours.kind {
        return false;
    }
    if !ours.nested {
        return found.value == ours.value;
    }
    attributes(ours.value).all(|ours| attributes(found.value).any(|found| holds(found, ours)))
}

fn again<T>(mut read: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    for _ in 1..TRIES {
        match read() {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
    read()
}

fn find(netlink: &mut Netlink) -> Result<Found, Errno> {
    let mut found = Found { table: flags(netlink)?, ..Found::default() };
    if found.table.is_none() {
        return Ok(found);
    }
    found.chains = chains(netlink)?;
    let mut request = Request::default();
    request.message(GETRULE, DUMP_FLAG, &HEADER, &Attributes::default().text(NFTA_RULE_TABLE, TABLE));
    netlink.dump(&request, |body| {
        let body = body.get(HEADER.len()..).unwrap_or_default();
        // Kernels before 4.9 do not heed the table in the question.
        if attribute(body, NFTA_RULE_TABLE).and_then(|name| name.text()) == Some(TABLE) {
            let chain = attribute(body, NFTA_RULE_CHAIN).and_then(|name| name.text()).unwrap_or_default();
            let expressions = attribute(body, NFTA_RULE_EXPRESSIONS).map(|list| list.value.to_vec());
            found.rules.push((chain.to_owned(), expressions.unwrap_or_default()));
        }
    })?;
    Ok(found)
}

/// A question to a subsystem that the kernel lacks is an invalid argument to it (nfnetlink_rcv_msg); ours are valid.
fn without_nftables(errno: Errno) -> Errno {
    if errno == Errno::INVAL { Errno::OPNOTSUPP } else { errno }
}

/// The flags of our table, if it is there.
fn flags(netlink: &mut Netlink) -> Result<Option<u32>, Errno> {
    let mut request = Request::default();
    request.message(GETTABLE, DUMP_FLAG, &HEADER, &Attributes::default());
    let mut flags = None;
    netlink
        .dump(&request, |body| {
            let body = body.get(HEADER.len()..).unwrap_or_default();
            if attribute(body, NFTA_TABLE_NAME).and_then(|name| name.text()) == Some(TABLE) {
                flags = Some(attribute(body, NFTA_TABLE_FLAGS).and_then(|flags| flags.u32()).unwrap_or_default());
            }
        })
        .map_err(without_nftables)?;
    Ok(flags)
}

fn chains(netlink: &mut Netlink) -> Result<Vec<FoundChain>, Errno> {
    let mut request = Request::default();
    request.message(GETCHAIN, DUMP_FLAG, &HEADER, &Attributes::default());
    let mut chains = Vec::new();
    netlink.dump(&request, |body| chains.extend(found_chain(body.get(HEADER.len()..).unwrap_or_default())))?;
    Ok(chains)
}

fn found_chain(body: &[u8]) -> Option<FoundChain> {
    if attribute(body, NFTA_CHAIN_TABLE)?.text()? != TABLE {
        return None;
    }
    let base = attribute(body, NFTA_CHAIN_HOOK).map(|hook| FoundBase {
        kind: attribute(body, NFTA_CHAIN_TYPE).and_then(|kind| kind.text()).unwrap_or_default().to_owned(),
        hook: attribute(hook.value, 1).and_then(|number| number.u32()),
        priority: attribute(hook.value, 2).and_then(|priority| priority.u32()),
        policy: attribute(body, NFTA_CHAIN_POLICY).and_then(|policy| policy.u32()),
    });
    Some(FoundChain { name: attribute(body, NFTA_CHAIN_NAME)?.text()?.to_owned(), base })
}

/// Whether some table of any family has a chain whose name begins so: the nf_tables variant of iptables makes such.
pub(super) fn has_chain_like(prefix: &str) -> bool {
    let Ok(mut netlink) = Netlink::open(Some(NETFILTER)) else { return false };
    let mut request = Request::default();
    // NFPROTO_UNSPEC.
    request.message(GETCHAIN, DUMP_FLAG, &[0; 4], &Attributes::default());
    let mut found = false;
    let done = netlink.dump(&request, |body| {
        let name = attribute(body.get(HEADER.len()..).unwrap_or_default(), NFTA_CHAIN_NAME);
        found |= name.and_then(|name| name.text()).is_some_and(|name| name.starts_with(prefix));
    });
    found || matches!(done, Err(Errno::INTR))
}

/// What a batch is for: struct nfgenmsg with the subsystem in place of the resource, in network byte order.
fn batch_header() -> [u8; 4] {
    let [high, low] = NFNL_SUBSYS_NFTABLES.to_be_bytes();
    [0, 0, high, low]
}

fn begin(request: &mut Request, attributes: &Attributes) {
    request.message(NFNL_MSG_BATCH_BEGIN, 0, &batch_header(), attributes);
}

fn end(request: &mut Request) {
    request.message(NFNL_MSG_BATCH_END, 0, &batch_header(), &Attributes::default());
}

fn table() -> Attributes {
    Attributes::default().text(NFTA_TABLE_NAME, TABLE)
}

fn chain_name(name: &str) -> Attributes {
    Attributes::default().text(NFTA_CHAIN_TABLE, TABLE).text(NFTA_CHAIN_NAME, name)
}

fn chain_attributes(chain: &Chain) -> Attributes {
    let name = chain_name(chain.name);
    let Some(base) = chain.base else { return name };
    let place = Attributes::default().u32(1, hook(base.hook)).u32(2, base.priority.cast_unsigned());
    name.nested(NFTA_CHAIN_HOOK, &place).u32(NFTA_CHAIN_POLICY, NF_ACCEPT).text(NFTA_CHAIN_TYPE, kind(base.kind))
}

fn rule_attributes(chain: &str, rule: &Rule) -> Attributes {
    let attributes = Attributes::default()
        .text(NFTA_RULE_TABLE, TABLE)
        .text(NFTA_RULE_CHAIN, chain)
        .nested(NFTA_RULE_EXPRESSIONS, &expressions(rule));
    let comment = [rule.comment.as_bytes(), &[0]].concat();
    match u8::try_from(comment.len()) {
        Ok(length) if length > 1 => {
            attributes.bytes(NFTA_RULE_USERDATA, &[&[NFTNL_UDATA_RULE_COMMENT, length], comment.as_slice()].concat())
        }
        _ => attributes,
    }
}

fn timeout_object(timeout: &Timeout) -> Attributes {
    let mut values = Attributes::default();
    for state in HALF_CLOSED_STATES {
        values = values.u32(state, timeout.half_closed);
    }
    let family = u16::from(nfproto(timeout.family)).to_be_bytes();
    let data = Attributes::default().bytes(1, &family).bytes(2, &[TCP]).nested(3, &values);
    Attributes::default()
        .text(NFTA_OBJ_TABLE, TABLE)
        .text(NFTA_OBJ_NAME, &timeout.name)
        .u32(NFTA_OBJ_TYPE, NFT_OBJECT_CT_TIMEOUT)
        .nested(NFTA_OBJ_DATA, &data)
}

#[cfg(test)]
mod tests;
