//! What a lab should look like, checked before anything is made.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use gambeson_mesh::node::Transport;
use serde::{Deserialize, Serialize};

use crate::transports::{Transports, TransportsError};

/// Most nodes that a lab can have.
pub(super) const MAX_NODES: u8 = 100;
/// Most pods that a node of a lab can have.
pub(super) const MAX_PODS_PER_NODE: u8 = 100;

/// Folders in whose place every node has its own.
const HIDDEN: [&str; 3] = ["/run", "/var/run", "/var/lib"];

/// What a lab should look like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Prefix of everything that belongs to the lab.
    pub name: LabName,
    /// Number of nodes, from 1.
    pub nodes: u8,
    /// Number of pods on each node.
    pub pods_per_node: u8,
    /// Which WireGuard implementation each agent is told to use.
    pub wireguard: WireguardModes,
    /// Which transports each agent is told to accept.
    pub transports: Transports,
    /// Number of nodes, the last ones, on which a stand-in for Flannel runs at first.
    pub flannel_nodes: u8,
    /// Its backend, while there is one.
    pub flannel_backend: Transport,
    /// MTU of the underlay in bytes.
    pub underlay_mtu: u32,
    /// Address families of the underlay.
    pub underlay: Family,
    /// Address families of the pod network.
    pub pods: Family,
    /// Each node in a subnet of its own behind a router, instead of one L2 segment.
    pub routed: bool,
    /// The API server enforces the policies of the manifests.
    pub admission: bool,
    /// The `gambeson` program that is run as agent and CNI plugin.
    pub binary: PathBuf,
    /// The `gambeson-lab` program that is run as API server.
    pub lab_binary: PathBuf,
    /// Further arguments of every agent.
    pub agent_arguments: Vec<String>,
    /// Start the agents, attach the pods and wait until every pair of nodes has a path.
    pub start: bool,
}

impl Options {
    /// The defaults of `gambeson lab up`, for this program and the `gambeson-lab` beside it.
    pub fn new(name: LabName, binary: PathBuf) -> Self {
        Self {
            name,
            nodes: 3,
            pods_per_node: 2,
            wireguard: WireguardModes::default(),
            transports: Transports::default(),
            flannel_nodes: 0,
            flannel_backend: Transport::Vxlan,
            underlay_mtu: 1500,
            underlay: Family::V4,
            pods: Family::V4,
            routed: false,
            admission: true,
            lab_binary: binary.with_file_name("gambeson-lab"),
            binary,
            agent_arguments: Vec::new(),
            start: true,
        }
    }

    /// Checks what the types do not.
    pub(super) fn validate(&self) -> Result<(), OptionsError> {
        if !(1..=MAX_NODES).contains(&self.nodes) {
            return Err(OptionsError::Nodes(self.nodes));
        }
        if self.flannel_nodes > self.nodes {
            return Err(OptionsError::FlannelNodes(self.flannel_nodes, self.nodes));
        }
        if self.pods_per_node > MAX_PODS_PER_NODE {
            return Err(OptionsError::Pods(self.pods_per_node));
        }
        // WireGuard over IPv6 takes 80 bytes, and IPv6 needs 1280 inside.
        if !(1360..=65_535).contains(&self.underlay_mtu) {
            return Err(OptionsError::UnderlayMtu(self.underlay_mtu));
        }
        if HIDDEN.iter().any(|folder| self.binary.starts_with(folder)) {
            return Err(OptionsError::Hidden(self.binary.clone()));
        }
        let nodes: Vec<String> = (1..=self.nodes).map(|i| format!("node-{i}")).collect();
        let (modes, transports) = (&self.wireguard.by_node, &self.transports.by_node);
        let modes = modes.keys().map(|name| ("--wireguard", name));
        let mut named = modes.chain(transports.keys().map(|name| ("--transports", name)));
        match named.find(|(_, name)| !nodes.contains(name)) {
            Some((option, name)) => {
                let (name, nodes) = (name.clone(), self.nodes);
                Err(OptionsError::UnknownNode { option, name, nodes })
            }
            None => Ok(()),
        }
    }
}

/// An option that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// The number of nodes.
    #[error("a lab has 1 to {MAX_NODES} nodes, not {0}")]
    Nodes(u8),
    /// The number of nodes with Flannel.
    #[error("{0} nodes with Flannel are more than the {1} nodes of the lab")]
    FlannelNodes(u8, u8),
    /// The number of pods.
    #[error("a node of a lab has at most {MAX_PODS_PER_NODE} pods, not {0}")]
    Pods(u8),
    /// The MTU.
    #[error("the underlay MTU is 1360 to 65535 bytes, not {0}")]
    UnderlayMtu(u32),
    /// Where the program is.
    #[error("the lab's nodes have /run and /var/lib of their own and cannot see {}", .0.display())]
    Hidden(PathBuf),
    /// A node named that there is not.
    #[error("{option} names {name}, but the lab has only node-1 to node-{nodes}")]
    UnknownNode {
        /// Where it was given.
        option: &'static str,
        /// The name given.
        name: String,
        /// Number of nodes of the lab.
        nodes: u8,
    },
    /// The lab's name.
    #[error(
        "\"{0}\" cannot name a lab: 1 to 24 of a-z, 0-9 and -, starting with a letter and not \
         ending with -"
    )]
    Name(String),
    /// An address family.
    #[error("\"{0}\" is no address family: v4, v6 or dual")]
    Family(String),
    /// A WireGuard mode.
    #[error("\"{0}\" is no WireGuard mode: auto, kernel or userspace, or node-1=kernel,...")]
    Wireguard(String),
    /// A list of transports.
    #[error(transparent)]
    Transports(#[from] TransportsError),
}

/// Name of a lab: part of namespace, file and process names, and so kept simple.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabName(String);

impl LabName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for LabName {
    type Err = OptionsError;

    fn from_str(name: &str) -> Result<Self, OptionsError> {
        let valid = (1..=24).contains(&name.len())
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && !name.ends_with('-')
            && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        if valid { Ok(Self(name.to_owned())) } else { Err(OptionsError::Name(name.to_owned())) }
    }
}

impl TryFrom<String> for LabName {
    type Error = OptionsError;

    fn try_from(name: String) -> Result<Self, OptionsError> {
        name.parse()
    }
}

impl From<LabName> for String {
    fn from(name: LabName) -> Self {
        name.0
    }
}

impl fmt::Display for LabName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Address families of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both.
    Dual,
}

impl Family {
    /// Whether IPv4 is in use.
    pub fn has_v4(self) -> bool {
        self != Self::V6
    }

    /// Whether IPv6 is in use.
    pub fn has_v6(self) -> bool {
        self != Self::V4
    }
}

impl FromStr for Family {
    type Err = OptionsError;

    fn from_str(family: &str) -> Result<Self, OptionsError> {
        match family {
            "v4" => Ok(Self::V4),
            "v6" => Ok(Self::V6),
            "dual" => Ok(Self::Dual),
            other => Err(OptionsError::Family(other.to_owned())),
        }
    }
}

/// What an agent is told with `--wireguard`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WireguardMode {
    /// The kernel's where it can be had, else userspace.
    #[default]
    Auto,
    /// The kernel's.
    Kernel,
    /// `gambeson tunnel`.
    Userspace,
}

impl WireguardMode {
    /// The word the agent takes.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kernel => "kernel",
            Self::Userspace => "userspace",
        }
    }
}

impl FromStr for WireguardMode {
    type Err = OptionsError;

    fn from_str(mode: &str) -> Result<Self, OptionsError> {
        match mode {
            "auto" => Ok(Self::Auto),
            "kernel" => Ok(Self::Kernel),
            "userspace" => Ok(Self::Userspace),
            other => Err(OptionsError::Wireguard(other.to_owned())),
        }
    }
}

/// One mode for all nodes, or some nodes by name: `kernel` or `node-1=kernel,node-2=userspace`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireguardModes {
    /// Nodes that are not named.
    pub default: WireguardMode,
    /// Nodes that are.
    pub by_node: BTreeMap<String, WireguardMode>,
}

impl WireguardModes {
    /// The same mode everywhere.
    pub fn all(mode: WireguardMode) -> Self {
        Self { default: mode, by_node: BTreeMap::new() }
    }

    /// The mode of this node.
    pub fn of(&self, node: &str) -> WireguardMode {
        self.by_node.get(node).copied().unwrap_or(self.default)
    }
}

impl FromStr for WireguardModes {
    type Err = OptionsError;

    fn from_str(text: &str) -> Result<Self, OptionsError> {
        let mut modes = Self::default();
        for term in text.split(',') {
            match term.split_once('=') {
                Some((node, mode)) => {
                    modes.by_node.insert(node.to_owned(), mode.parse()?);
                }
                None => modes.default = term.parse()?,
            }
        }
        Ok(modes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["gambeson", "a", "lab-2"] {
            assert!(good.parse::<LabName>().is_ok(), "{good}");
        }
        for bad in ["", "../x", "A", "2lab", "lab-", "lab_1", "a b", &"x".repeat(25)] {
            assert!(bad.parse::<LabName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn modes_are_one_for_all_or_by_node() {
        let modes: WireguardModes = "node-1=kernel,node-2=userspace".parse().unwrap();
        assert_eq!(modes.of("node-1"), WireguardMode::Kernel);
        assert_eq!(modes.of("node-2"), WireguardMode::Userspace);
        assert_eq!(modes.of("node-3"), WireguardMode::Auto);
        assert!("node-1=quantum".parse::<WireguardModes>().is_err());
        let mut options = Options::new("lab".parse().unwrap(), PathBuf::from("/bin/true"));
        assert_eq!(options.validate(), Ok(()));
        options.wireguard = "node-4=kernel".parse().unwrap();
        assert!(options.validate().is_err());
        options.wireguard = WireguardModes::default();
        options.transports = Transports::parse(&["node-4=vxlan".to_owned()]).unwrap();
        let error = options.validate().unwrap_err().to_string();
        assert!(error.contains("--transports names node-4"), "{error}");
    }

    #[test]
    fn impossible_labs_are_refused() {
        let possible = Options::new("lab".parse().unwrap(), PathBuf::from("/bin/true"));
        for impossible in [
            Options { nodes: 0, ..possible.clone() },
            Options { nodes: 101, ..possible.clone() },
            Options { pods_per_node: 101, ..possible.clone() },
            Options { underlay_mtu: 1200, ..possible.clone() },
            Options { binary: PathBuf::from("/run/gambeson"), ..possible.clone() },
        ] {
            assert!(impossible.validate().is_err());
        }
    }
}
