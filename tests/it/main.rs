//! End-to-end tests: the real binary, real sockets, and peers that nobody here wrote.
//!
//! `tests/run` sets up what they need and runs them all.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod attempts;
mod client;
mod harness;
mod load;
mod mesh;
mod netns;
mod pair;
mod seen;
#[path = "../../src/testing.rs"]
mod testing;
mod wire;

mod agent;
mod authority;
mod basics;
mod bypass;
mod captured;
mod cli;
mod demo;
mod demo_transparent;
#[cfg(feature = "ebpf")]
mod ebpf;
mod envoy;
mod envoy_http;
mod floods;
mod grpc;
mod h2spec;
mod hostile;
mod http;
mod http_policy;
mod hygiene;
mod interception;
mod openssl;
mod operations;
mod passthrough;
mod peers;
mod pods;
mod policy;
mod postgres;
mod redirect;
mod redirect_rules;
mod resilience;
mod restart;
mod rotation;
mod sandbox;
mod sight;
mod spiffe;
mod traces;
mod transparent;
mod websocket;
