//! Takes away what agents left on a node, the walls last and only when that is asked for.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use gambeson_keys::{Generation, KeyRing, PrivateKey};
use gambeson_mesh::plan::Plan;

use super::words::describe;
use super::{AgentError, preflight};
use crate::apply::{ApplyError, Kernel, Scope};
use crate::cni::install::InstallError;
use crate::cni::link::Places;

/// What is to be removed, and where an agent has put it.
#[derive(Debug, Clone)]
pub struct Removal {
    /// Also what keeps packets from leaving in clear.
    pub allow_plaintext: bool,
    /// VXLAN devices and their routes are Flannel's from now on.
    pub to_flannel: bool,
    /// Where an agent that runs would answer.
    pub socket: PathBuf,
    /// Folder of the CNI configuration list.
    pub cni_conf_dir: PathBuf,
    /// Private keys, which stay.
    pub key_file: PathBuf,
    /// Folder of the tunnel supervisors, if any.
    pub tunnel_dir: Option<PathBuf>,
}

/// Why something was not removed.
#[derive(Debug, thiserror::Error)]
pub enum RemovalError {
    /// An agent would put everything back.
    #[error(
        "an agent runs on this node and would put everything back (it answers on {}); end it \
         first: `helm uninstall gambeson -n kube-system`, or `systemctl disable --now gambeson`",
        .0.display()
    )]
    AgentRuns(PathBuf),
    /// It may not change the network.
    #[error(transparent)]
    Preflight(#[from] AgentError),
    /// The CNI configuration stays, and so does everything else.
    #[error("nothing was removed but perhaps a part of the CNI configuration")]
    Cni(#[from] InstallError),
    /// The kernel could not be read.
    #[error("the CNI configuration was removed and nothing else")]
    Read(#[source] ApplyError),
    /// A part stays.
    #[error("not everything could be removed; try again")]
    Part(#[source] ApplyError),
}

/// Removes everything and says what it was. The CNI configuration goes first, so that no pod
/// is started meanwhile.
///
/// # Errors
/// [`RemovalError`]; the guard goes last, and stays when anything before it does.
pub async fn remove(removal: Removal) -> Result<Vec<String>, RemovalError> {
    preflight::net_admin()?;
    if agent_runs(&removal.socket) {
        return Err(RemovalError::AgentRuns(removal.socket));
    }
    let mut removed = Vec::new();
    let Removal { cni_conf_dir, socket, key_file, .. } = &removal;
    let places = Places::of_agent(cni_conf_dir, socket, key_file);
    removed.extend(places.take_back()?.map(|path| format!("- {}", path.display())));

    let scope = Scope { tunnel_dir: removal.tunnel_dir, ..Scope::default() };
    let mut kernel = Kernel::connect(scope).await.map_err(RemovalError::Read)?;
    if removal.to_flannel {
        let given = kernel.hand_back_to_flannel().await.map_err(RemovalError::Part)?;
        removed.extend(given);
    }
    let observed = kernel.observe().await.map_err(RemovalError::Read)?;
    let plan = Plan::removal(&observed, removal.allow_plaintext);
    // Nothing that is removed needs a key.
    let keys = KeyRing::new(Generation::FIRST, PrivateKey::generate());
    let errors = kernel.execute(&plan, &keys).await;
    if let Some(error) = errors.into_iter().next() {
        return Err(RemovalError::Part(error));
    }
    removed.extend(plan.actions.iter().map(describe));
    if removal.allow_plaintext {
        let tables = kernel.remove_firewall().await.map_err(RemovalError::Part)?;
        removed.extend(tables.into_iter().map(|what| format!("- {what}")));
    }
    Ok(removed)
}

/// Whether something listens where an agent would. A socket that a killed one left refuses.
fn agent_runs(socket: &Path) -> bool {
    let refused = |error: &io::Error| {
        matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
    };
    UnixStream::connect(socket).map_or_else(|error| !refused(&error), |_| true)
}
