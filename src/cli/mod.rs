//! The command line: one file per subcommand, exit codes typed.

mod agent;
mod audit;
mod cni;
mod failure;
mod install_cni;
mod lab;
mod rotate;
mod status;
mod tunnel;
mod tunnel_supervisor;
mod uninstall;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use nix::sys::signal::SigSet;

pub use failure::Failure;

/// A WireGuard-first encrypted mesh overlay for Kubernetes.
#[derive(Debug, Parser)]
#[command(name = "gambeson", version = crate::VERSION, propagate_version = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Agent(Box<agent::Args>),
    Audit(audit::Args),
    Tunnel(tunnel::Args),
    Cni(cni::Args),
    InstallCni(install_cni::Args),
    Lab(lab::Args),
    Rotate(rotate::Args),
    Status(status::Args),
    TunnelSupervisor(tunnel_supervisor::Args),
    Uninstall(uninstall::Args),
}

/// Whoever started this process may have blocked signals, and a mask is inherited.
pub fn unblock_signals() {
    if let Err(error) = SigSet::empty().thread_set_mask() {
        eprintln!("gambeson: cannot unblock signals: {error}");
    }
}

/// Runs the command line of this process. By the file names `gambeson-cni` and `flannel` the
/// binary is the CNI plugin; by the file name `gambeson-tunnel` it is `gambeson tunnel`.
pub fn main() -> ExitCode {
    unblock_signals();
    if cni::invoked_as_plugin() {
        return cni::run(&cni::Args {});
    }
    let result = match Cli::parse_from(tunnel::arguments()).command {
        Command::Agent(args) => agent::run(*args),
        Command::Audit(args) => audit::run(&args),
        Command::Tunnel(args) => tunnel::run(args),
        Command::Cni(args) => return cni::run(&args),
        Command::InstallCni(args) => install_cni::run(args),
        Command::Lab(args) => lab::run(&args),
        Command::Rotate(args) => rotate::run(args),
        Command::Status(args) => status::run(args),
        Command::TunnelSupervisor(args) => tunnel_supervisor::run(&args),
        Command::Uninstall(args) => uninstall::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
