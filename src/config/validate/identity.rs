//! Exactly one source of identity, and well-formed.

use super::Checker;
use crate::config::address;
use crate::config::load::LoadOptions;
use crate::config::positions::at;
use crate::config::schema::{Config, WorkloadApi};

pub(super) fn check(c: &mut Checker<'_>, config: &mut Config, options: &LoadOptions) {
    let identity = &mut config.identity;
    let sources = [
        identity.workload_api.as_ref().map(|_| "workload_api"),
        identity.files.as_ref().map(|_| "files"),
        identity.authority.as_ref().map(|_| "authority"),
    ];
    let named: Vec<&str> = sources.into_iter().flatten().collect();
    match named.as_slice() {
        [] => match &options.endpoint {
            Some(address) => {
                if let Err(why) = address::workload_api(address) {
                    c.error(
                        at!["identity"],
                        format!(
                            "the file names no identity source, and SPIFFE_ENDPOINT_SOCKET is '{}': {why}",
                            address.escape_debug()
                        ),
                    );
                }
                identity.workload_api = Some(WorkloadApi { address: address.clone() });
            }
            None => {
                let what = "no identity source; write `identity: unix:///path/to/agent.sock` or set \
                            SPIFFE_ENDPOINT_SOCKET";
                if options.identity_optional {
                    c.warn(at!["identity"], what);
                } else {
                    c.error(at!["identity"], what);
                }
            }
        },
        [_] => {
            if let Some(api) = &identity.workload_api
                && let Err(why) = address::workload_api(&api.address)
            {
                let what = format!("'{}' is not the address of a Workload API: {why}", api.address.escape_debug());
                c.error(at!["identity", "workload_api", "address"], what);
            }
        }
        several => {
            let what = format!("several identity sources ({}); keep one", several.join(", "));
            c.error(at!["identity", several.last().copied().unwrap_or_default()], what);
        }
    }
    let no_path = "this is a trust domain, not a workload; a workload's SPIFFE ID has a path";
    if identity.spiffe_id.as_ref().is_some_and(|id| id.path().is_empty()) {
        c.error(at!["identity", "spiffe_id"], no_path);
    }
    if identity.spiffe_id.is_some() && identity.hint.is_some() {
        c.error(at!["identity", "hint"], "an SVID is chosen by `spiffe_id` or by `hint`; keep one");
    }
    if let Some(files) = &identity.files {
        if files.bundles.is_empty() {
            let what = "no trust bundle; name a PEM file of CA certificates for at least one trust domain";
            c.error(at!["identity", "files", "bundles"], what);
        }
        for (key, file) in [("certificate", &files.certificate), ("key", &files.key)] {
            check_path(c, at!["identity", "files", key], file);
        }
        for (domain, file) in &files.bundles {
            check_path(c, at!["identity", "files", "bundles", domain.as_str()], file);
        }
    }
    for (index, file) in identity.crls.iter().enumerate() {
        check_path(c, at!["identity", "crls", index], file);
    }
    if let Some(authority) = &identity.authority {
        if authority.spiffe_id.path().is_empty() {
            c.error(at!["identity", "authority", "spiffe_id"], no_path);
        }
        if let Some(directory) = &authority.state_dir {
            check_path(c, at!["identity", "authority", "state_dir"], directory);
        }
        for (domain, document) in &authority.federates_with {
            let at = at!["identity", "authority", "federates_with", domain.as_str()];
            if domain.as_str() == authority.spiffe_id.trust_domain_name() {
                c.error(at, "this is the authority's own trust domain; name others only");
            }
            let secure = document.starts_with("https://");
            if document.is_empty() || (document.contains("://") && !secure) {
                c.error(at, "a bundle document is a file path or an https:// URL; write one of these");
            }
        }
    }
}

/// A path that holds a line end is a pasted certificate or key. It is not repeated, because it may be secret.
fn check_path(c: &mut Checker<'_>, at: &[crate::config::positions::Step<'_>], file: &std::path::Path) {
    let text = file.to_string_lossy();
    if text.is_empty() || text.contains(|ch: char| ch.is_control()) || text.contains("-----BEGIN") {
        c.error(at, "the path of a file belongs here, not its contents; save them to a file and name that");
    }
}
