//! What a story promises to show, and what was really seen of it.
//!
//! A closed set: whatever no chapter has ticked off is missing, also when a chapter was never reached.

use std::collections::BTreeSet;

/// Something that a story promises to show.
pub(super) trait Promise: Copy + Ord + 'static {
    /// All of it, in the order of the story.
    const ALL: &'static [Self];
    /// In words, for the list of what was not seen.
    fn words(self) -> &'static str;
}

macro_rules! promises {
    ($( #[$doc:meta] )* $kind:ident: $( $name:ident = $words:literal; )*) => {
        $( #[$doc] )*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub(super) enum $kind { $( $name, )* }
        impl $crate::cli::demo::ledger::Promise for $kind {
            const ALL: &'static [Self] = &[$( Self::$name, )*];
            fn words(self) -> &'static str {
                match self { $( Self::$name => $words, )* }
            }
        }
    };
}
pub(super) use promises;

promises! {
    /// What the demo promises to show.
    Thing:
    Identities = "every sidecar has an SVID of the authority";
    Answer = "a request through both sidecars is answered to the caller that was proven";
    Profile = "TLS 1.3 within the declared profile between the sidecars";
    HttpAnswer = "a GET that a rule allows is answered to the caller that was proven";
    PathDenied = "a GET of a path that a rule denies is refused (403)";
    Spelling = "other spellings of that path are refused by the same rule";
    Called = "a gRPC call that a rule allows is answered (status 0)";
    CallDenied = "a gRPC call that no rule allows is refused (status 7)";
    NotForwarded = "the workload sees none of the requests that are refused";
    Trace = "the caller's trace id arrives at the workload";
    Shared = "many requests share few handshakes";
    Denied = "a valid identity that no rule admits is refused (denied)";
    Forged = "a certificate of another authority is refused (untrusted)";
    Foreign = "an identity of an unknown trust domain is refused (unknown_trust_domain)";
    Bare = "a TLS client without certificate is refused (no_certificate)";
    Plaintext = "plain HTTP is refused (not_tls)";
    NotDialled = "the workload is not dialled for any of those who were refused";
    Rotations = "the SVIDs of both workloads rotate at least twice";
    NewCa = "the CA is replaced with overlap and the old one is trusted no more";
    OnNewCa = "handshakes go on after the old CA is gone";
    Admitted = "a changed policy admits the stranger";
    ClosedAtOnce = "the policy changed back ends the live connection (policy_changed)";
    DeniedAgain = "and the stranger is denied again";
    Weak = "an offer of 3DES is refused and counted";
    NoFailure = "no request fails while all this happens";
    ReadBack = "the sidecars' own metrics tell the same";
}

/// What was seen so far.
#[derive(Debug)]
pub(super) struct Ledger<P>(BTreeSet<P>);

impl<P> Default for Ledger<P> {
    fn default() -> Self {
        Self(BTreeSet::new())
    }
}

impl<P: Promise> Ledger<P> {
    /// Ticks off what was really seen.
    pub(super) fn tick(&mut self, promise: P, seen: bool) -> bool {
        if seen {
            self.0.insert(promise);
        }
        seen
    }

    /// What was promised and not seen, in words.
    ///
    /// # Errors
    /// The list, if there is anything in it.
    pub(super) fn verdict(&self) -> Result<(), Vec<&'static str>> {
        let missing: Vec<_> = P::ALL.iter().filter(|promise| !self.0.contains(promise)).map(|p| p.words()).collect();
        if missing.is_empty() { Ok(()) } else { Err(missing) }
    }
}
