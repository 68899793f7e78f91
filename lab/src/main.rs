//! The `gambeson-lab` program; see the library for everything.

use std::process::ExitCode;

fn main() -> ExitCode {
    gambeson_lab::cli::main()
}
