//! Arguments in, exit code out.

fn main() -> std::process::ExitCode {
    portcullis::cli::main(std::env::args_os())
}
