use std::path::PathBuf;

use super::Failure;
use crate::agent::{Removal, RemovalError, remove};
use crate::cni::install;
use crate::config::{DEFAULT_KEY_FILE, DEFAULT_SOCKET};
use crate::exit::Exit;

/// Remove from this node what agents have set up
///
/// The CNI configuration, devices, tunnels and routes to other nodes go. What keeps packets of
/// the cluster networks from leaving in clear stays, so that pods that still run here reach
/// nobody; --allow-plaintext removes that too. The private keys stay, for an agent that comes
/// back. No agent may run meanwhile.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  gambeson uninstall
  gambeson uninstall --allow-plaintext
  gambeson uninstall --allow-plaintext --to-flannel")]
pub(super) struct Args {
    /// Also remove the guard, the unreachable routes and the policy routing rules
    #[arg(long)]
    allow_plaintext: bool,

    /// Also give the VXLAN devices and their routes to Flannel, without a packet lost
    ///
    /// flanneld finds them as it would have left them. Pairs of nodes that use something else
    /// lose packets until it runs: have the agents accept vxlan alone before.
    #[arg(long, requires = "allow_plaintext")]
    to_flannel: bool,

    /// Unix socket of the agent, to see that none runs
    #[arg(long, env = "GAMBESON_SOCKET", value_name = "FILE", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,

    /// Folder of the CNI configuration list, as the agent's
    #[arg(
        long,
        env = "GAMBESON_CNI_CONF_DIR",
        value_name = "DIR",
        default_value = install::DEFAULT_CONF_DIR
    )]
    cni_conf_dir: PathBuf,

    /// This node's private keys, as the agent's; they stay
    #[arg(
        long,
        env = "GAMBESON_KEY_FILE",
        value_name = "FILE",
        default_value = DEFAULT_KEY_FILE
    )]
    key_file: PathBuf,

    /// Folder of the tunnel supervisors, as the agent's
    #[arg(long, env = "GAMBESON_TUNNEL_DIR", value_name = "DIR", hide_short_help = true)]
    tunnel_dir: Option<PathBuf>,
}

pub(super) fn run(args: Args) -> Result<(), Failure> {
    let allow_plaintext = args.allow_plaintext;
    let keys = args.key_file.display().to_string();
    let removal = Removal {
        allow_plaintext,
        to_flannel: args.to_flannel,
        socket: args.socket,
        cni_conf_dir: args.cni_conf_dir,
        key_file: args.key_file,
        tunnel_dir: args.tunnel_dir,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let removed = runtime.block_on(remove(removal)).map_err(|error| {
        let exit = match &error {
            RemovalError::Preflight(error) => error.exit(),
            _ => Exit::Failure,
        };
        Failure::new(exit, error)
    })?;
    for what in &removed {
        println!("{what}");
    }
    if removed.is_empty() {
        println!("nothing to remove");
    }
    println!("{keys} stays");
    if !allow_plaintext {
        println!(
            "the guard stays: this host sends nothing to the cluster networks until \
             `gambeson uninstall --allow-plaintext`"
        );
    }
    Ok(())
}
