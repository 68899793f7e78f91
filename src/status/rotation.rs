use std::fmt;

use gambeson_mesh::NodeName;
use serde::{Deserialize, Serialize};

/// A rotation of this node's key that is under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationStatus {
    /// Generation of the old key.
    pub from: u64,
    /// Generation of the new key.
    pub to: u64,
    /// `say`, `move`, `promote` or `retire`: what it waits for.
    pub step: String,
    /// For how many seconds this agent has known of it.
    pub seconds: u64,
    /// Peers with WireGuard.
    pub peers: usize,
    /// Those that have left the old key.
    pub moved: usize,
    /// Those that are waited for, and why.
    pub waiting: Vec<WaitingPeer>,
    /// Those that do not answer, and are not waited for.
    pub away: Vec<NodeName>,
    /// Whether peers are waited for that should have moved by now.
    pub blocked: bool,
}

/// A peer that has not left the old key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingPeer {
    /// Its name.
    pub name: NodeName,
    /// What it has not done.
    pub reason: String,
}

impl fmt::Display for RotationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, to, step, seconds, peers, moved, .. } = self;
        write!(f, "{from} to {to}, for {seconds} s: {step}, {moved} of {peers} peers moved")?;
        if !self.away.is_empty() {
            write!(f, ", {} away", self.away.len())?;
        }
        let blocked = if self.blocked { "blocked by" } else { "waits for" };
        for (index, WaitingPeer { name, reason }) in self.waiting.iter().enumerate() {
            let before = if index == 0 { blocked } else { "and" };
            write!(f, "\n                {before} {name}: {reason}")?;
        }
        Ok(())
    }
}
