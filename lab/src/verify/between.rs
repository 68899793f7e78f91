//! How nodes say that they send to each other.

use std::collections::BTreeMap;

use crate::instance::Lab;
use crate::node::Node;

/// Transport by the names of the sending and the receiving node, and whether it encrypts.
pub(super) struct Transports(BTreeMap<(String, String), (String, bool)>);

impl Transports {
    /// As the agents say. One that cannot be asked says nothing.
    pub(super) fn of(lab: &Lab) -> Self {
        let mut transports = BTreeMap::new();
        for node in lab.nodes() {
            let Ok(status) = node.status() else { continue };
            for peer in status.peers {
                let encrypted = peer.is_encrypted();
                transports.insert((node.name(), peer.name), (peer.transport, encrypted));
            }
        }
        Self(transports)
    }

    /// How one node sends to another, if it says so.
    pub(super) fn name(&self, from: &str, to: &str) -> Option<&str> {
        let known = self.0.get(&(from.to_owned(), to.to_owned()));
        known.map(|(name, _)| name.as_str())
    }

    /// Whether a node says that it sends to another in clear. What is not known is not.
    pub(super) fn in_clear(&self, from: Node<'_>, to: Node<'_>) -> bool {
        self.0.get(&(from.name(), to.name())).is_some_and(|(_, encrypted)| !encrypted)
    }
}
