use std::path::{Path, PathBuf};
use std::process::exit;
use std::thread;

use nix::sys::signal::{SigSet, Signal};
use tracing::info;
use tracing_subscriber::EnvFilter;

use super::Failure;
use crate::exit::Exit;
use crate::supervisor::{self, DEFAULT_DIR};

/// Serve userspace WireGuard devices for the agent of this node.
///
/// This is what a pod of the DaemonSet gambeson-tunnel runs: the devices live in its processes,
/// so that they outlive the agent's pods. The agent finds it with --tunnel-dir.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gambeson tunnel-supervisor --name \"$POD_UID\"
  gambeson tunnel-supervisor --name \"$POD_UID\" --check")]
pub(super) struct Args {
    /// Name of this supervisor, which no other on this node has
    #[arg(long, value_name = "NAME", env = "POD_UID")]
    name: String,
    /// Folder of the supervisors' sockets
    #[arg(long, value_name = "DIR", env = "GAMBESON_TUNNEL_DIR", default_value = DEFAULT_DIR)]
    tunnel_dir: PathBuf,
    /// Fail with the reason unless this supervisor runs and no older one serves a device
    #[arg(long)]
    check: bool,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let Args { name, tunnel_dir, check } = args;
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        let message = format!("--name: \"{name}\" is not a name; give letters, digits and '-'");
        return Err(Failure::new(Exit::Usage, message));
    }
    if *check {
        return supervisor::check(tunnel_dir, name)
            .map_err(|error| Failure::new(Exit::CheckFailed, error));
    }
    let level = std::env::var("GAMBESON_LOG").unwrap_or_else(|_| "info".to_owned());
    let filter = EnvFilter::try_new(level).map_err(|error| Failure::new(Exit::Usage, error))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    end_when_told()?;
    // The name of the program may be gone or replaced by now; this is what is running.
    Ok(supervisor::serve(tunnel_dir, name, Path::new("/proc/self/exe"))?)
}

/// The first process of a container is not ended by a signal that it does not handle.
fn end_when_told() -> Result<(), Failure> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if let Ok(signal) = signals.wait() {
            info!(%signal, "ending, and with the pod its devices");
            exit(0);
        }
    })?;
    Ok(())
}
