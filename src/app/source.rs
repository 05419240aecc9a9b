//! Which source of identities a config asks for.
