//! The `gambeson` binary; see the library for everything.

use std::process::ExitCode;

fn main() -> ExitCode {
    gambeson::cli::main()
}
