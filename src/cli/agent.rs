use std::io::IsTerminal;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

use super::Failure;
use crate::agent::AgentError;
use crate::config::Options;
use crate::exit::Exit;

/// The client libraries log what the agent itself says better.
const LOG_DEFAULT: &str = "warn,gambeson=info,kube_client=off,kube_runtime=off";
const LOG_VARIABLE: &str = "GAMBESON_LOG";

/// Run this node's agent: publish its key, mesh with the other nodes, keep the kernel in step
///
/// Runs until SIGTERM. Devices, routes and the guard stay when it ends, however it ends, and
/// the next agent takes them over without losing a packet. Logs go to standard error; set
/// GAMBESON_LOG, for example to gambeson=debug, for more.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  gambeson agent --cluster-cidr 10.244.0.0/16
  gambeson agent --kubeconfig /etc/rancher/k3s/k3s.yaml --cluster-cidr 10.42.0.0/16 --ip-masq
  gambeson agent --cluster-cidr 10.244.0.0/16,fd00:10:244::/48 --iface-regex '^(eth|ens)' \\
      --wireguard userspace

Exit codes:
  0  ended by SIGTERM             3  key store refused     6  a capability is missing
  1  anything else                4  UDP port taken        7  a device of ours is somebody else's
  2  wrong usage                  5  no TUN device")]
pub(super) struct Args {
    #[command(flatten)]
    options: Options,
}

/// The agent's surroundings are not usable.
#[derive(Debug, thiserror::Error)]
enum SetupError {
    #[error("{LOG_VARIABLE}: not a log filter; give one such as gambeson=debug")]
    Log(#[source] tracing_subscriber::filter::ParseError),
    #[error("cannot start the runtime")]
    Runtime(#[source] std::io::Error),
    #[error("cannot watch for signals")]
    Signals(#[source] std::io::Error),
}

pub(super) fn run(args: Args) -> Result<(), Failure> {
    gambeson_tunnel::keep_memory_private()?;
    log()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("gambeson-agent")
        .enable_all()
        .build()
        .map_err(SetupError::Runtime)?;
    let ended = runtime.block_on(async {
        let terminate = signal(SignalKind::terminate()).map_err(SetupError::Signals)?;
        let interrupt = signal(SignalKind::interrupt()).map_err(SetupError::Signals)?;
        let (seen, _) = watch::channel(None);
        let agent = crate::agent::run(args.options, seen, shutdown(terminate, interrupt));
        agent.await.map_err(|error: AgentError| Failure::new(error.exit(), error))
    });
    // Nothing that still runs may hold up the end.
    runtime.shutdown_background();
    ended
}

async fn shutdown(mut terminate: Signal, mut interrupt: Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

fn log() -> Result<(), Failure> {
    let filter = match std::env::var(LOG_VARIABLE) {
        Ok(filter) if !filter.is_empty() => EnvFilter::try_new(filter),
        _ => EnvFilter::try_new(LOG_DEFAULT),
    };
    let filter = filter.map_err(|e| Failure::new(Exit::Failure, SetupError::Log(e)))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    Ok(())
}
