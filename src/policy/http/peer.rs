//! The rules of one listener for one peer, compiled over paths, and the decision about a request.

use std::collections::HashMap;
use std::sync::Arc;

use http::{HeaderValue, Method};

use super::NO_ROUTE;
use super::facts::{HttpFacts, HttpTarget};
use super::pattern::{FieldName, HostPattern, PathKind, PathPattern, Segment};
use crate::config::schema::{Action, HttpMatch, PolicyMode};
use crate::policy::compiled::{Decision, Kind, Verdict, conclude};
use crate::policy::path::without_parameters;
use crate::policy::pattern::IdPattern;
use crate::policy::rego::{Gate, ModuleReport};

/// A decision about a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestDecision {
    /// What becomes of it, and by which rule.
    pub decision: Decision,
    /// The path as the deciding rule declares it: `/patients/{id}`, `/static/*`, `/pkg.Service/Method`; `*` where no
    /// path decided. As many different ones as the config has, so it may stand in metric labels.
    pub route: Arc<str>,
    /// What the listener's modules said, where they were asked: about what the rules allow.
    pub modules: Option<ModuleReport>,
}

/// A rule of a listener, with what it says of requests made ready.
#[derive(Debug)]
pub(in crate::policy) struct HttpRule {
    pub(in crate::policy) name: Arc<str>,
    pub(in crate::policy) from: Vec<IdPattern>,
    kind: Kind,
    /// None speaks of every request.
    matches: Vec<(Arc<Condition>, Vec<Declared>)>,
}

/// A path as declared.
#[derive(Debug)]
struct Declared {
    segments: Vec<Segment>,
    below: bool,
    route: Arc<str>,
}

impl HttpRule {
    pub(in crate::policy) fn new(
        name: Arc<str>,
        action: Action,
        mode: PolicyMode,
        from: Vec<IdPattern>,
        http: &[HttpMatch],
    ) -> Self {
        let matches = http.iter().map(|wanted| {
            let grpc = wanted.grpc.as_ref().map(|grpc| PathPattern::of_grpc(&grpc.service, grpc.method.as_ref()));
            let paths = wanted.paths.iter().chain(&grpc).map(|path| Declared {
                segments: path.segments().to_vec(),
                below: path.kind() == PathKind::Prefix,
                route: path.route().into(),
            });
            (Arc::new(Condition::new(wanted)), paths.collect())
        });
        Self { name, from, kind: Kind::of(action, mode), matches: matches.collect() }
    }
}

/// What a match says besides paths.
#[derive(Debug, Default)]
struct Condition {
    methods: Vec<Method>,
    hosts: Vec<HostPattern>,
    headers: Vec<(FieldName, Wanted)>,
    grpc: bool,
}

#[derive(Debug)]
enum Wanted {
    Exact(Vec<u8>),
    Present(bool),
}

impl Condition {
    fn new(wanted: &HttpMatch) -> Self {
        let headers = wanted.headers.iter().map(|header| {
            let value = match &header.exact {
                Some(value) => Wanted::Exact(value.as_bytes().to_vec()),
                None => Wanted::Present(header.present.unwrap_or(true)),
            };
            (header.name.clone(), value)
        });
        Self {
            methods: wanted.methods.iter().map(|method| method.method().clone()).collect(),
            hosts: wanted.hosts.clone(),
            headers: headers.collect(),
            grpc: wanted.grpc.is_some(),
        }
    }

    fn takes_method(&self, method: &Method, denying: bool) -> bool {
        if self.methods.is_empty() { denying || method != Method::CONNECT } else { self.methods.contains(method) }
    }

    fn holds(&self, facts: &HttpFacts, denying: bool) -> bool {
        let host = || match facts.host() {
            Some(host) => self.hosts.iter().any(|wanted| wanted.matches(host)),
            None => denying,
        };
        self.takes_method(&facts.method, denying)
            && (self.hosts.is_empty() || host())
            && self.headers.iter().all(|(name, wanted)| wanted.holds(facts, name, denying))
            && (!self.grpc || denying || facts.grpc)
    }
}

impl Wanted {
    fn holds(&self, facts: &HttpFacts, name: &FieldName, denying: bool) -> bool {
        let Some(mut values) = facts.values(name) else { return denying };
        match self {
            Self::Exact(wanted) if denying => values.any(|(_, value)| has_item(value, wanted)),
            Self::Exact(wanted) => {
                values.clone().any(|(very_name, _)| very_name)
                    && values.all(|(_, value)| value.as_bytes() == wanted.as_slice())
            }
            // An absence is certain only if no similar name is there either.
            Self::Present(present) => {
                let there = values.any(|(very_name, _)| very_name || denying == *present);
                there == *present
            }
        }
    }
}

/// Whether a value is the wanted one, or has it as an item (RFC 9110, section 5.6.1).
fn has_item(value: &HeaderValue, wanted: &[u8]) -> bool {
    let value = value.as_bytes();
    value == wanted || value.split(|byte| *byte == b',').any(|item| item.trim_ascii() == wanted)
}

/// One path of one match of one rule.
#[derive(Debug)]
struct Entry {
    rule: Arc<str>,
    route: Arc<str>,
    condition: Arc<Condition>,
}

/// Entries by kind, each in the order of the file.
#[derive(Debug, Default)]
struct Entries([Vec<u32>; Kind::COUNT]);

impl Entries {
    fn add(&mut self, kind: Kind, entry: u32) {
        if let Some(list) = self.0.get_mut(kind.place()) {
            list.push(entry);
        }
    }
}

/// A place in the trie of paths: so many segments have matched.
#[derive(Debug, Default)]
struct Node {
    /// Entries whose path ends here.
    here: Entries,
    /// Entries whose path is a prefix that ends here.
    below: Entries,
    one: Option<Box<Node>>,
    literal: HashMap<Box<str>, Node>,
}

impl Node {
    fn at(&mut self, segments: &[Segment]) -> &mut Self {
        match segments.split_first() {
            None => self,
            // No pattern of a path has a segment for the rest.
            Some((Segment::One | Segment::Rest, tail)) => self.one.get_or_insert_default().at(tail),
            Some((Segment::Literal(text), tail)) => self.literal.entry(text.as_str().into()).or_default().at(tail),
        }
    }
}

/// The rules of one listener for one peer. Made once for a connection; decides each of its requests.
#[derive(Debug)]
pub struct PeerPolicy {
    mode: PolicyMode,
    default: Arc<str>,
    no_route: Arc<str>,
    gate: Option<Arc<Gate>>,
    entries: Vec<Entry>,
    /// Whatever the path.
    anywhere: Entries,
    paths: Node,
    /// What can match a CONNECT, which has no path.
    connect: Entries,
}

impl PeerPolicy {
    pub(in crate::policy) fn compile<'a>(
        mode: PolicyMode,
        default: &Arc<str>,
        gate: Option<Arc<Gate>>,
        rules: impl Iterator<Item = &'a HttpRule>,
    ) -> Self {
        let mut policy = Self {
            mode,
            default: Arc::clone(default),
            no_route: NO_ROUTE.into(),
            gate,
            entries: Vec::new(),
            anywhere: Entries::default(),
            paths: Node::default(),
            connect: Entries::default(),
        };
        let always = Arc::new(Condition::default());
        for rule in rules {
            if rule.matches.is_empty() {
                policy.add(rule, &always, &[]);
            }
            for (condition, paths) in &rule.matches {
                policy.add(rule, condition, paths);
            }
        }
        policy
    }

    fn add(&mut self, rule: &HttpRule, condition: &Arc<Condition>, paths: &[Declared]) {
        let denying = rule.kind.denies();
        let no_route = Arc::clone(&self.no_route);
        // For an allow, what is said of paths must hold; a CONNECT has none.
        if condition.takes_method(&Method::CONNECT, denying) && (denying || paths.is_empty()) {
            let Some(entry) = self.entry(rule, &no_route, condition) else { return };
            self.connect.add(rule.kind, entry);
            if paths.is_empty() {
                self.anywhere.add(rule.kind, entry);
            }
        } else if paths.is_empty() {
            let Some(entry) = self.entry(rule, &no_route, condition) else { return };
            self.anywhere.add(rule.kind, entry);
        }
        for path in paths {
            let Some(entry) = self.entry(rule, &path.route, condition) else { return };
            let segments = match path.segments.split_last() {
                // A deny holds with the slash at the end and without.
                Some((Segment::Literal(last), before)) if denying && last.is_empty() => before,
                _ => &path.segments,
            };
            let node = self.paths.at(segments);
            if path.below { node.below.add(rule.kind, entry) } else { node.here.add(rule.kind, entry) }
        }
    }

    /// Makes an entry. More than can be counted do not fit into a config file.
    fn entry(&mut self, rule: &HttpRule, route: &Arc<str>, condition: &Arc<Condition>) -> Option<u32> {
        let place = u32::try_from(self.entries.len()).ok()?;
        self.entries.push(Entry {
            rule: Arc::clone(&rule.name),
            route: Arc::clone(route),
            condition: Arc::clone(condition),
        });
        Some(place)
    }

    /// How many entries were compiled: what this takes in memory.
    pub(in crate::policy) fn size(&self) -> usize {
        self.entries.len()
    }

    /// Decides about one request.
    pub fn decide(&self, facts: &HttpFacts) -> RequestDecision {
        let mut search = Search { policy: self, facts, found: [None; Kind::COUNT], visited: 0 };
        match &facts.target {
            HttpTarget::Path(path) => {
                search.look(&self.anywhere, Reading::Literal);
                let path = path.judged();
                search.walk(&self.paths, Some(path.strip_prefix('/').unwrap_or(path)), Reading::Literal);
            }
            HttpTarget::Authority => search.look(&self.connect, Reading::Literal),
            HttpTarget::Server => search.look(&self.anywhere, Reading::Literal),
        }
        let found = search.found.map(|place| place.and_then(|place| self.entries.get(usize::try_from(place).ok()?)));
        let mut decision = conclude(found.map(|entry| entry.map(|entry| &entry.rule)), &self.default, self.mode);
        let [deny, allow, ..] = found;
        let route = deny.or(allow).map_or(&self.no_route, |entry| &entry.route);
        // What the rules refuse is refused; of the rest, the module may refuse some.
        let gate = self.gate.as_ref().filter(|_| decision.verdict == Verdict::Allow);
        let modules = gate.map(|gate| {
            let report = gate.ask(facts);
            if !report.module.allows {
                decision = Decision { verdict: Verdict::Deny, rule: Arc::clone(&gate.rule), ..decision.clone() };
            }
            report
        });
        RequestDecision { decision, route: Arc::clone(route), modules }
    }
}

/// How the path has been read so far.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// As it is.
    Literal,
    /// With something left out, which only a deny may do.
    Shortened,
}

struct Search<'a> {
    policy: &'a PeerPolicy,
    facts: &'a HttpFacts,
    /// The first entry of each kind so far.
    found: [Option<u32>; Kind::COUNT],
    visited: usize,
}

impl Search<'_> {
    /// The segments that are left, without a leading slash; none when none is left.
    fn walk(&mut self, node: &Node, path: Option<&str>, reading: Reading) {
        self.visited += 1;
        self.look(&node.below, reading);
        let Some(path) = path else { return self.look(&node.here, reading) };
        if path.is_empty() {
            self.look(&node.here, Reading::Shortened);
        }
        let (segment, tail) = match path.split_once('/') {
            Some((segment, tail)) => (segment, Some(tail)),
            None => (path, None),
        };
        if let Some(one) = node.one.as_ref().filter(|_| !segment.is_empty()) {
            self.walk(one, tail, reading);
        }
        // No literal of a pattern has parameters.
        let (name, parameters) = without_parameters(segment);
        if let Some(literal) = node.literal.get(name) {
            self.walk(literal, tail, if parameters { Reading::Shortened } else { reading });
        }
    }

    fn look(&mut self, entries: &Entries, reading: Reading) {
        for (kind, (list, found)) in Kind::ALL.into_iter().zip(entries.0.iter().zip(&mut self.found)) {
            if reading == Reading::Shortened && !kind.denies() {
                continue;
            }
            let before = found.unwrap_or(u32::MAX);
            for &place in list.iter().take_while(|place| **place < before) {
                let entry = usize::try_from(place).ok().and_then(|place| self.policy.entries.get(place));
                if entry.is_some_and(|entry| entry.condition.holds(self.facts, kind.denies())) {
                    *found = Some(place);
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
impl PeerPolicy {
    /// The nodes that the decision about a path visits.
    pub(super) fn visited(&self, facts: &HttpFacts) -> usize {
        let mut search = Search { policy: self, facts, found: [None; Kind::COUNT], visited: 0 };
        let path = facts.target.path().map(crate::policy::NormalPath::judged);
        search.walk(&self.paths, path.and_then(|path| path.strip_prefix('/')), Reading::Literal);
        search.visited
    }
}
