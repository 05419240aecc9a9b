//! What this story promises to show.

use super::super::ledger::promises;

promises! {
    /// What the demo promises to show of transparent interception.
    Shown:
    InClear = "without rules curl is answered, and the wire carries it in clear";
    Rules = "the rules are made in every pod before any proxy runs";
    ShutV4 = "with rules and without proxy curl is refused over IPv4";
    ShutV6 = "with rules and without proxy curl is refused over IPv6";
    NothingBefore = "and neither the workload nor the wire sees any of it";
    Identities = "every proxy has an SVID of the authority";
    AnswerV4 = "the same curl is answered over IPv4, at the address it asked, and it is proven who asks";
    AnswerV6 = "the same curl is answered over IPv6, at the address it asked, and it is proven who asks";
    Profile = "TLS 1.3 within the declared profile between the pods";
    Sealed = "the wire carries nothing in clear";
    PathDenied = "a path that a rule denies is refused (403)";
    Denied = "a pod whose identity no rule admits is refused (denied)";
    Plaintext = "plaintext of somebody without proxy is refused (not_tls)";
    Undeclared = "a destination that nobody has declared is refused (undeclared)";
    Unheard = "the workload hears of none of those who were refused";
    Rotations = "the SVIDs of both pods rotate under load";
    NoFailure = "no request fails while they do";
    Drift = "the proxy notices that its rules are gone, and is not ready";
    OtherGate = "curl without rules is refused at the other pod's gate";
    Healed = "the rules are made again, the drift is over, and curl is answered";
    ShutAgain = "with its proxy killed curl is refused";
    ShutBehind = "with the service's proxy killed somebody without proxy is refused";
    NothingAfter = "and neither the workload nor the wire sees any of it, as before";
    NoAnswer = "no answer of the service is in clear on the wire once there are rules";
    ReadBack = "the sidecars' own metrics tell the same";
}
