//! Policy routing: packets with our mark are delivered on this host, whatever their destination (rtnetlink(7)).
//!
//! A rule sends them to a table, in which one route calls every address local. Both carry a protocol number of ours, so
//! that what is ours is found again without a plan. The kernel's table `local` comes first and stays.

use rustix::io::Errno;

use super::expressions::nfproto;
use super::netlink::{ACK, Attributes, CREATE, DUMP_FLAG, EXCLUSIVE, Netlink, REPLACE, Request, attribute};
use super::rules::{Family, Routing};

const NEWROUTE: u16 = 24;
const DELROUTE: u16 = 25;
const GETROUTE: u16 = 26;
const NEWRULE: u16 = 32;
const DELRULE: u16 = 33;
const GETRULE: u16 = 34;
/// Who has made a rule or a route: a number that rt_protos of iproute2 gives to nobody.
const OURS: u8 = 211;
/// After the table `local` (0), before all that an administrator or a CNI usually has.
const PRIORITY: u32 = 100;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FRA_PROTOCOL: u16 = 21;
const FR_ACT_TO_TBL: u8 = 1;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_TABLE: u16 = 15;
const RTA_MARK: u16 = 16;
const RT_SCOPE_HOST: u8 = 254;
const RTN_LOCAL: u8 = 2;
const LOOPBACK: u32 = 1;
/// struct fib_rule_hdr.
const RULE_HEADER: usize = 12;

/// Makes what is wanted and removes what is not, of ours.
///
/// # Errors
/// What the kernel refuses, in words.
pub(super) fn apply(wanted: Option<Routing>) -> Result<(), (&'static str, Errno)> {
    let mut netlink = Netlink::open(None).map_err(|errno| ("a routing socket", errno))?;
    for family in Family::BOTH {
        for old in ours(&mut netlink, family).map_err(|errno| ("the list of routing rules", errno))? {
            if Some(old) != wanted {
                remove_one(&mut netlink, family, old)?;
            }
        }
        if let Some(routing) = wanted {
            match add(&mut netlink, family, routing) {
                // IPv6 is switched off, in the kernel or on the loopback interface: there is nothing to be routed.
                Err((_, Errno::AFNOSUPPORT | Errno::ACCESS)) if family == Family::V6 => {}
                done => done?,
            }
        }
    }
    Ok(())
}

/// What is missing, a line each.
///
/// # Errors
/// Why it cannot be read.
pub(super) fn differences(wanted: Option<Routing>) -> Result<Vec<String>, Errno> {
    let mut netlink = Netlink::open(None)?;
    let mut differences = Vec::new();
    for family in Family::BOTH {
        let found = ours(&mut netlink, family)?;
        let stray = found.iter().filter(|found| Some(**found) != wanted);
        differences.extend(
            stray.map(|old| format!("a routing rule for mark {:#x} ({family:?}) is not of the plan", old.mark)),
        );
        if let Some(routing) = wanted
            && !(found.contains(&routing) && delivered_here(&mut netlink, family, routing))
        {
            differences.push(format!("mark {:#x} is not routed here ({family:?})", routing.mark));
        }
    }
    Ok(differences)
}

fn add(netlink: &mut Netlink, family: Family, routing: Routing) -> Result<(), (&'static str, Errno)> {
    let route = one(NEWROUTE, CREATE | REPLACE | ACK, &route_header(family), &route(routing));
    netlink.transact(&route).map_err(|failed| ("a local route by the loopback interface", failed.errno))?;
    match netlink.transact(&one(NEWRULE, CREATE | EXCLUSIVE | ACK, &rule_header(family), &rule(routing))) {
        Err(failed) if failed.errno != Errno::EXIST => Err(("a routing rule", failed.errno)),
        _ => Ok(()),
    }
}

fn remove_one(netlink: &mut Netlink, family: Family, routing: Routing) -> Result<(), (&'static str, Errno)> {
    let gone = |errno: Errno| errno == Errno::SRCH || errno == Errno::NOENT;
    for request in [
        one(DELRULE, ACK, &rule_header(family), &rule(routing)),
        one(DELROUTE, ACK, &route_header(family), &route(routing)),
    ] {
        match netlink.transact(&request) {
            Err(failed) if !gone(failed.errno) => return Err(("the removal of a routing rule", failed.errno)),
            _ => {}
        }
    }
    Ok(())
}

/// The rules that have our protocol number.
fn ours(netlink: &mut Netlink, family: Family) -> Result<Vec<Routing>, Errno> {
    let mut found = Vec::new();
    let request = one(GETRULE, DUMP_FLAG, &rule_header(family), &Attributes::default());
    let done = netlink.dump(&request, |body| {
        let right_family = body.first() == Some(&nfproto(family));
        let body = body.get(RULE_HEADER..).unwrap_or_default();
        let ours = attribute(body, FRA_PROTOCOL).is_some_and(|protocol| protocol.value == [OURS]);
        let number = |kind| attribute(body, kind).and_then(|number| number.native());
        if let (true, Some(mark), Some(table)) = (right_family && ours, number(FRA_FWMARK), number(FRA_TABLE)) {
            found.push(Routing { mark, table });
        }
    });
    match done {
        // The kernel has no IPv6 at all.
        Err(Errno::AFNOSUPPORT | Errno::OPNOTSUPP) => Ok(Vec::new()),
        done => done.map(|()| found),
    }
}

/// Asks the kernel where a packet with the mark would go to. The addresses are those of documentation (RFC 5737, RFC 3849).
fn delivered_here(netlink: &mut Netlink, family: Family, routing: Routing) -> bool {
    let (address, bits): (&[u8], u8) = match family {
        Family::V4 => (&[192, 0, 2, 1], 32),
        Family::V6 => (&[0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], 128),
    };
    let header = [nfproto(family), bits, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let question = Attributes::default().bytes(RTA_DST, address).native(RTA_MARK, routing.mark);
    let mut local = false;
    // The type of the route is the eighth byte of struct rtmsg.
    let asked = netlink.dump(&one(GETROUTE, ACK, &header, &question), |body| local = body.get(7) == Some(&RTN_LOCAL));
    asked.is_ok() && local
}

fn one(kind: u16, flags: u16, header: &[u8], attributes: &Attributes) -> Request {
    let mut request = Request::default();
    request.message(kind, flags, header, attributes);
    request
}

fn rule_header(family: Family) -> [u8; RULE_HEADER] {
    [nfproto(family), 0, 0, 0, 0, 0, 0, FR_ACT_TO_TBL, 0, 0, 0, 0]
}

fn rule(routing: Routing) -> Attributes {
    Attributes::default()
        .native(FRA_PRIORITY, PRIORITY)
        .native(FRA_FWMARK, routing.mark)
        .native(FRA_FWMASK, u32::MAX)
        .native(FRA_TABLE, routing.table)
        .bytes(FRA_PROTOCOL, &[OURS])
}

/// struct rtmsg, with the number of the table in an attribute.
fn route_header(family: Family) -> [u8; 12] {
    [nfproto(family), 0, 0, 0, 0, OURS, RT_SCOPE_HOST, RTN_LOCAL, 0, 0, 0, 0]
}

fn route(routing: Routing) -> Attributes {
    Attributes::default().native(RTA_TABLE, routing.table).native(RTA_OIF, LOOPBACK)
}
