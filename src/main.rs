//! Arguments in, exit code out.

/// The system's allocator keeps what 5,000 connections once needed; this one gives it back (`benches/memory.rs`).
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> std::process::ExitCode {
    portcullis::cli::main(std::env::args_os())
}
