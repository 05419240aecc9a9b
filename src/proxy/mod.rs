//! The data path: accept, authenticate, admit, forward, record.

pub mod record;
