use std::path::{Path, PathBuf};

use super::Failure;
use crate::cni::DEFAULT_BRIDGE;
use crate::cni::install::{self, FlannelName};
use crate::config::check_interface_name;
use crate::exit::Exit;

/// Install the CNI plugin and its configuration on this node.
///
/// The running program is copied as gambeson-cni, and the name flannel is linked to it unless
/// another program has that name. Reference plugins that the folder lacks are copied from
/// --plugins-dir. Files change in one step: a container runtime sees the old
/// one or the new one. The agent writes the same configuration itself, once the network of the
/// node is in place; --binary-only leaves that to it.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  gambeson install-cni
  gambeson install-cni --binary-only --cni-bin-dir /host/opt/cni/bin")]
pub(super) struct Args {
    /// Folder for the plugin
    #[arg(long, value_name = "DIR", env = "CNI_BIN_DIR", default_value = install::DEFAULT_BIN_DIR)]
    cni_bin_dir: PathBuf,

    /// Folder for the configuration
    #[arg(long, value_name = "DIR", env = "CNI_CONF_DIR", default_value = install::DEFAULT_CONF_DIR)]
    cni_conf_dir: PathBuf,

    /// Bridge that pods are attached to, as the agent's --bridge
    #[arg(long, value_name = "NAME", env = "GAMBESON_BRIDGE", default_value = DEFAULT_BRIDGE)]
    bridge: String,

    /// Folder with reference plugins, for those that the node lacks
    #[arg(long, value_name = "DIR", default_value = install::DEFAULT_PLUGINS_DIR)]
    plugins_dir: PathBuf,

    /// Install the plugin but not its configuration
    #[arg(long)]
    binary_only: bool,
}

pub(super) fn run(args: Args) -> Result<(), Failure> {
    check_interface_name("--bridge", &args.bridge)
        .map_err(|error| Failure::new(Exit::Usage, error))?;
    let bin_dir = &args.cni_bin_dir;
    // The name of the program may be gone or replaced by now; this is what is running.
    let flannel = install::write_binaries(Path::new("/proc/self/exe"), bin_dir)?;
    println!("installed {}", bin_dir.join(install::PLUGIN_NAME).display());
    let link = bin_dir.join(install::FLANNEL_NAME);
    match flannel {
        FlannelName::Ours => println!("linked {} to it", link.display()),
        FlannelName::Foreign => println!("left {} alone: it is another program", link.display()),
    }
    for name in install::lay_down_plugins(&args.plugins_dir, bin_dir)? {
        println!("installed {}, which was missing", bin_dir.join(name).display());
    }
    if !args.binary_only {
        let path = args.cni_conf_dir.join(install::CONFLIST_NAME);
        match install::write_conflist(&args.cni_conf_dir, &args.bridge)? {
            true => println!("wrote {}", path.display()),
            false => println!("{} is up to date", path.display()),
        }
    }
    Ok(())
}
