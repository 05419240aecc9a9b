//! Which source of identities a config asks for.

use crate::authority::EmbeddedSource;
use crate::clock::Clock;
use crate::config::schema::IdentityConfig;
use crate::identity::files::FilesSource;
use crate::identity::source::Source;
use crate::identity::workload_api::WorkloadApiSource;

/// Makes the source that `identity` names: files, the embedded authority, or the Workload API (at
/// SPIFFE_ENDPOINT_SOCKET where the config has no address).
///
/// # Errors
/// The address is missing or malformed, or the embedded authority cannot be opened; in words.
pub fn source_of(identity: &IdentityConfig, clock: &Clock) -> Result<Box<dyn Source>, String> {
    if let Some(files) = &identity.files {
        return Ok(Box::new(FilesSource::new(files)));
    }
    if let Some(embedded) = &identity.authority {
        let source = EmbeddedSource::from_config(embedded, clock.clone()).map_err(|error| error.to_string())?;
        return Ok(Box::new(source));
    }
    let source = WorkloadApiSource::from_config(identity.workload_api.as_ref(), clock.clone());
    source.map(|source| Box::new(source) as _).map_err(|error| error.to_string())
}
