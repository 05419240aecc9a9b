//! HTTP on the data path.
//!
//! In: a plaintext stream between identities that a rule admitted. Out: the same stream, on which a violation of the
//! protocol's framing or a flood ends before the library that parses it. [`h1_guard`] is for HTTP/1, [`h2_guard`] for
//! HTTP/2.

pub mod h1_guard;
pub mod h2_guard;
