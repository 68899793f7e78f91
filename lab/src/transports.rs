//! Which transports agents are told to accept.

use std::collections::{BTreeMap, BTreeSet};

use gambeson_mesh::node::Transport;
use serde::{Deserialize, Serialize};

/// A list of transports that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is no list of transports: wireguard, host-gw, vxlan, with commas, or node-1=vxlan"
)]
pub struct TransportsError(String);

/// Transports of all nodes, and of some by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transports {
    /// Of nodes that are not named.
    pub default: BTreeSet<Transport>,
    /// Of nodes that are.
    pub by_node: BTreeMap<String, BTreeSet<Transport>>,
}

impl Default for Transports {
    fn default() -> Self {
        Self { default: BTreeSet::from([Transport::Wireguard]), by_node: BTreeMap::new() }
    }
}

impl Transports {
    /// From arguments such as `wireguard,vxlan` for all nodes and `node-1=vxlan` for one.
    ///
    /// # Errors
    /// [`TransportsError`].
    pub fn parse(arguments: &[String]) -> Result<Self, TransportsError> {
        let mut transports = Self::default();
        for argument in arguments {
            match argument.split_once('=') {
                Some((node, text)) => {
                    transports.by_node.insert(node.to_owned(), Self::list(text)?);
                }
                None => transports.default = Self::list(argument)?,
            }
        }
        Ok(transports)
    }

    /// The list of this node.
    pub fn of(&self, node: &str) -> &BTreeSet<Transport> {
        self.by_node.get(node).unwrap_or(&self.default)
    }

    /// A list such as `wireguard,vxlan`.
    ///
    /// # Errors
    /// [`TransportsError`].
    pub fn list(text: &str) -> Result<BTreeSet<Transport>, TransportsError> {
        let list: Option<_> = text.split(',').map(Transport::parse).collect();
        list.ok_or_else(|| TransportsError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_for_all_or_for_one() {
        let arguments = ["vxlan,wireguard", "node-2=host-gw"].map(str::to_owned);
        let transports = Transports::parse(&arguments).unwrap();
        let both = BTreeSet::from([Transport::Wireguard, Transport::Vxlan]);
        assert_eq!(transports.of("node-1"), &both);
        assert_eq!(transports.of("node-2"), &BTreeSet::from([Transport::HostGw]));
        let default = Transports::parse(&[]).unwrap();
        assert_eq!(default.of("node-1"), &BTreeSet::from([Transport::Wireguard]));
        for wrong in ["", "pigeon", "node-1=", "wireguard;vxlan"] {
            assert!(Transports::parse(&[wrong.to_owned()]).is_err(), "{wrong}");
        }
    }
}
