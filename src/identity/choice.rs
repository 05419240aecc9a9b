//! Which of several SVIDs is ours.

use std::sync::Arc;

use rustls::pki_types::CertificateRevocationListDer;

use super::source::Update;
use super::{KeyType, SpiffeId, Svid, TrustBundles};
use crate::config::schema::SvidKeys;

/// How our SVID is chosen: by SPIFFE ID, by hint, by both, or the first one (SPIFFE Workload API specification, section
/// 5.3: the first is the default identity; section 5.2.1: of repeated hints the first).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    id: Option<SpiffeId>,
    hint: Option<String>,
}

/// A full set of a source, ready to be chosen from.
#[derive(Debug)]
pub(super) struct Offer {
    svids: Vec<Arc<Svid>>,
    bundles: TrustBundles,
    crls: Vec<CertificateRevocationListDer<'static>>,
    refused: Vec<String>,
}

impl Choice {
    /// The SVID with this SPIFFE ID, this hint or both; the first one if neither is given.
    pub fn new(id: Option<SpiffeId>, hint: Option<String>) -> Self {
        Self { id, hint }
    }

    /// Those that are ours, the better ones first. An identity that we have is kept as long as the set names it: its
    /// place in the set is not its name. Of several with one hint the first is the one.
    pub(super) fn among(&self, offer: &Offer, have: Option<&SpiffeId>) -> Vec<Arc<Svid>> {
        let fits = |svid: &&Arc<Svid>| {
            self.id.as_ref().is_none_or(|id| svid.id() == id)
                && self.hint.as_deref().is_none_or(|hint| svid.hint() == Some(hint))
        };
        let fitting = offer.svids.iter().filter(fits);
        match (&self.id, &self.hint, have) {
            // All of one SPIFFE ID are the same identity; any good one will do.
            (Some(_), _, _) => fitting.cloned().collect(),
            (None, None, Some(have)) => fitting.filter(|svid| svid.id() == have).cloned().collect(),
            (None, _, _) => fitting.take(1).cloned().collect(),
        }
    }

    /// That none fits, and which there are.
    pub(super) fn missing_in(&self, offer: &Offer) -> String {
        let wanted = match (&self.id, &self.hint) {
            (Some(id), Some(hint)) => format!("SPIFFE ID {id} and hint '{}'", hint.escape_debug()),
            (Some(id), None) => format!("SPIFFE ID {id}"),
            (None, Some(hint)) => format!("hint '{}'", hint.escape_debug()),
            (None, None) => "any SPIFFE ID".into(),
        };
        let mut there: Vec<String> = offer
            .svids
            .iter()
            .map(|svid| match svid.hint() {
                Some(hint) => format!("{} (hint '{}')", svid.id(), hint.escape_debug()),
                None => svid.id().to_string(),
            })
            .collect();
        there.extend(offer.refused.iter().map(|why| format!("one that was refused ({why})")));
        if there.is_empty() {
            there.push("none at all".into());
        }
        format!("the source offers no SVID with {wanted}, but {}", there.join(", "))
    }

    /// Whether our own SVID may have the key that it has.
    ///
    /// # Errors
    /// That it may not, and the remedy.
    pub(super) fn key_allowed(svid: &Svid, keys: SvidKeys) -> Result<(), String> {
        let allowed = match svid.facts().key_type {
            KeyType::P384 => true,
            KeyType::P256 => keys == SvidKeys::P256Allowed,
            KeyType::Rsa | KeyType::Other => false,
        };
        if allowed {
            return Ok(());
        }
        let (id, key) = (svid.id(), svid.facts().key_type.as_str());
        let way_out = match svid.facts().key_type {
            KeyType::P256 => ", or allow P-256 with `svid_keys: p256-allowed`",
            _ => "",
        };
        Err(format!(
            "{id} has a key of type {key}, and the profile demands ecdsa-p384: SPIRE 1.14 and later issue such keys with \
             ca_key_type=\"ec-p384\" in the server's configuration and workload_x509_svid_key_type=\"ec-p384\" in the \
             agent's{way_out}"
        ))
    }
}

impl Offer {
    pub(super) fn new(update: Update) -> Self {
        let Update { svids, bundles, crls, refused } = update;
        Self { svids: svids.into_iter().map(Arc::new).collect(), bundles, crls, refused }
    }

    pub(super) fn bundles(&self) -> &TrustBundles {
        &self.bundles
    }

    pub(super) fn crls(&self) -> &[CertificateRevocationListDer<'static>] {
        &self.crls
    }

    /// What the source itself left out, and why.
    pub(super) fn refused(&self) -> &[String] {
        &self.refused
    }

    fn repeated_hint(&self) -> Option<&str> {
        let mut seen = std::collections::BTreeSet::new();
        self.svids
            .iter()
            .filter_map(|svid| svid.hint())
            .filter(|hint| !hint.is_empty())
            .find(|hint| !seen.insert(*hint))
    }

    /// What an operator should know of this set that the one before did not have.
    pub(super) fn news(&self, before: Option<&Self>) -> Vec<String> {
        let mut news = Vec::new();
        if let Some(hint) = self.repeated_hint()
            && before.and_then(Self::repeated_hint) != Some(hint)
        {
            news.push(format!("several SVIDs have the hint '{}'; the first one is taken", hint.escape_debug()));
        }
        let known = before.map(Self::refused).unwrap_or_default();
        news.extend(self.refused.iter().filter(|why| !known.contains(why)).map(|why| format!("left out: {why}")));
        news
    }
}
