//! What agents are told with `--transports`.

use std::collections::{BTreeMap, BTreeSet};

use gambeson_mesh::node::Transport;
use serde::{Deserialize, Serialize};

use crate::options::OptionsError;

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
    /// [`OptionsError::Transports`].
    pub fn parse(arguments: &[String]) -> Result<Self, OptionsError> {
        let mut transports = Self::default();
        for argument in arguments {
            let list = |text: &str| {
                let list: Option<_> = text.split(',').map(Transport::parse).collect();
                list.ok_or_else(|| OptionsError::Transports(argument.clone()))
            };
            match argument.split_once('=') {
                Some((node, text)) => {
                    transports.by_node.insert(node.to_owned(), list(text)?);
                }
                None => transports.default = list(argument)?,
            }
        }
        Ok(transports)
    }

    /// The list of this node.
    pub fn of(&self, node: &str) -> &BTreeSet<Transport> {
        self.by_node.get(node).unwrap_or(&self.default)
    }

    /// The argument of this node's agent.
    pub(super) fn argument(&self, node: &str) -> String {
        self.of(node).iter().map(|transport| transport.as_str()).collect::<Vec<_>>().join(",")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_for_all_or_for_one() {
        let arguments = ["vxlan,wireguard", "node-2=host-gw"].map(str::to_owned);
        let transports = Transports::parse(&arguments).unwrap();
        assert_eq!(transports.argument("node-1"), "wireguard,vxlan");
        assert_eq!(transports.argument("node-2"), "host-gw");
        assert_eq!(Transports::parse(&[]).unwrap().argument("node-1"), "wireguard");
        for wrong in ["", "pigeon", "node-1=", "wireguard;vxlan"] {
            assert!(Transports::parse(&[wrong.to_owned()]).is_err(), "{wrong}");
        }
    }
}
