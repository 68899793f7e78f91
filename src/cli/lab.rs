//! `gambeson lab`: the program `gambeson-lab`, which is not part of a production node.

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use super::Failure;
use crate::exit::Exit;

const PROGRAM: &str = "gambeson-lab";

/// Make a cluster of network namespaces on this machine, with real agents and pods.
///
/// Runs `gambeson-lab`, which is looked for beside this program and then in PATH.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true, disable_version_flag = true)]
pub(super) struct Args {
    /// What `gambeson-lab` takes; `gambeson lab --help` says what that is
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Becomes `gambeson-lab`; returns only when it cannot.
pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let this = env::current_exe()?;
    let beside = this.with_file_name(PROGRAM);
    let program = if beside.exists() { beside.clone() } else { PROGRAM.into() };
    let error = Command::new(program).args(&args.arguments).exec();
    if error.kind() == io::ErrorKind::NotFound {
        return Err(Failure::new(
            Exit::Failure,
            format!(
                "`gambeson lab` is a program of its own, {PROGRAM}, which is neither beside this \
                 one ({}) nor in PATH: build it with `cargo build --release -p {PROGRAM}`",
                beside.display()
            ),
        ));
    }
    Err(Failure::new(Exit::Failure, format!("cannot run {PROGRAM}: {error}")))
}
