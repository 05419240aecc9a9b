//! An object of bytecode: opened, given its plan, loaded.

use std::ffi::OsStr;

use libbpf_rs::{Object, ObjectBuilder, OpenMapMut, PrintLevel};

/// Loads `bytecode` with `plan` as its read-only data, which the kernel freezes before it verifies the programs. Each map
/// can be prepared before it is made.
///
/// # Errors
/// Why the kernel does not take it, in words, on one line.
pub(crate) fn load(
    bytecode: &[u8],
    plan: &[u8],
    prepare: impl Fn(&mut OpenMapMut<'_>) -> libbpf_rs::Result<()>,
) -> Result<Object, String> {
    // Otherwise the library writes to standard error.
    libbpf_rs::set_print(Some((PrintLevel::Warn, |_, said| tracing::debug!(said = said.trim_end(), "libbpf"))));
    let fails = |error: libbpf_rs::Error| one_line("the eBPF programs cannot be loaded", &error);
    // Of its own, because what is built in need not be aligned.
    let aligned = bytecode.to_vec();
    let mut object = ObjectBuilder::default().open_memory(&aligned).map_err(fails)?;
    for mut map in object.maps_mut() {
        if is_plan(map.name()) {
            map.set_initial_value(plan).map_err(fails)?;
        }
        prepare(&mut map).map_err(fails)?;
    }
    object.load().map_err(fails)
}

/// Whether a map is the read-only data of an object.
pub(crate) fn is_plan(map: &OsStr) -> bool {
    map.to_string_lossy().ends_with(".rodata")
}

/// An error and its causes.
pub(crate) fn one_line(what: &str, error: &libbpf_rs::Error) -> String {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    causes.fold(what.to_owned(), |line, cause| line + ": " + &cause.to_string())
}
