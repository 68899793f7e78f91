//! `{NodeRecord} + Local -> Mesh`: which peers are usable, and why the others are not.

use std::collections::BTreeMap;

use crate::NodeName;
use crate::node::{Local, Node, NodeRecord};

/// The peers of this node, and the Nodes it refuses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mesh {
    /// Usable peers, this node excepted.
    pub peers: BTreeMap<NodeName, Node>,
    /// Nodes with something wrong. A peer that was good before stays in `peers` with its
    /// last good state.
    pub refused: BTreeMap<NodeName, Refusal>,
}

/// Why a Node, or its newest state, is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("placeholder")]
pub struct Refusal;

/// Remembers the last good state of every peer, so that a Node that turns bad keeps working
/// as it was and an incumbent cannot be pushed out by a claimant.
#[derive(Debug, Default)]
pub struct Topology {
    incumbents: BTreeMap<NodeName, Node>,
}

impl Topology {
    /// Nothing known yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Resolves the complete set of Nodes. Nodes that are missing are forgotten.
    pub fn resolve(&mut self, _local: &Local, _records: &BTreeMap<NodeName, NodeRecord>) -> Mesh {
        Mesh { peers: self.incumbents.clone(), refused: BTreeMap::new() }
    }
}
