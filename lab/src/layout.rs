//! Names, addresses and paths of a lab. Everything follows from its options, so that a lab
//! can be taken down from its name alone.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use gambeson_mesh::family;
use gambeson_mesh::node::Transport;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::json;

use super::options::{Family, LabName, Options};

/// Below here each lab has a folder.
pub(super) const STATE_ROOT: &str = "/run/gambeson-lab";
/// Where network namespaces have their names.
pub(super) const NETNS_ROOT: &str = "/run/netns";
/// TCP port of the API server inside the lab.
pub(super) const API_PORT: u16 = 6443;
/// The underlay interface of every node.
pub const UNDERLAY_INTERFACE: &str = "eth0";
/// The interface of every pod.
pub(super) const POD_INTERFACE: &str = "eth0";

/// Folder of a lab.
pub fn state_dir(lab: &LabName) -> PathBuf {
    Path::new(STATE_ROOT).join(lab.as_str())
}

/// Name of the namespace with the bridge or router.
pub(super) fn hub_netns(lab: &LabName) -> String {
    format!("{lab}-hub")
}

/// Whether a namespace of this name can only belong to this lab.
pub(super) fn is_netns_of(lab: &LabName, netns: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let Some(rest) = netns.strip_prefix(lab.as_str()).and_then(|rest| rest.strip_prefix('-'))
    else {
        return false;
    };
    match rest.split('-').collect::<Vec<_>>().as_slice() {
        ["hub"] => true,
        ["node", node] => number(node),
        ["pod", node, pod] => number(node) && number(pod),
        _ => false,
    }
}

/// Position of a node, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeIndex(pub u8);

/// Position of a pod: its node's, and its own there, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PodIndex(pub NodeIndex, pub u8);

impl NodeIndex {
    /// `node-1`.
    pub fn name(self) -> String {
        format!("node-{}", self.0)
    }

    /// Name of the node's namespace.
    pub fn netns(self, lab: &LabName) -> String {
        format!("{lab}-node-{}", self.0)
    }
}

impl PodIndex {
    /// `pod-1-1`.
    pub fn name(self) -> String {
        format!("pod-{}-{}", self.0.0, self.1)
    }

    /// Name of the pod's namespace.
    pub fn netns(self, lab: &LabName) -> String {
        format!("{lab}-{}", self.name())
    }
}

impl Options {
    /// All nodes.
    pub fn node_indices(&self) -> impl Iterator<Item = NodeIndex> + use<> {
        (1..=self.nodes).map(NodeIndex)
    }

    /// All pods of one node.
    pub fn pod_indices(&self, node: NodeIndex) -> impl Iterator<Item = PodIndex> + use<> {
        (1..=self.pods_per_node).map(move |pod| PodIndex(node, pod))
    }

    /// Names of all namespaces, the hub first.
    pub fn netns_names(&self) -> Vec<String> {
        let mut names = vec![hub_netns(&self.name)];
        for node in self.node_indices() {
            names.push(node.netns(&self.name));
            names.extend(self.pod_indices(node).map(|pod| pod.netns(&self.name)));
        }
        names
    }

    /// Underlay addresses of a node, with the subnet they are in.
    pub fn underlay_addresses(&self, node: NodeIndex) -> Vec<IpNet> {
        self.underlay_subnet(node, node.0.into())
    }

    /// Addresses of the hub or router on a node's segment: the node's way to everything else.
    pub fn gateway_addresses(&self, node: NodeIndex) -> Vec<IpNet> {
        self.underlay_subnet(node, 254)
    }

    fn underlay_subnet(&self, node: NodeIndex, host: u16) -> Vec<IpNet> {
        let number = node.0;
        let (v4, v6) = if self.routed {
            let host = if host == 254 { 254 } else { 1 };
            (
                Ipv4Addr::new(10, 240, number, host),
                Ipv6Addr::new(0xfd00, 0x240, 0, number.into(), 0, 0, 0, host.into()),
            )
        } else {
            // Both are below 255: nodes end at 100.
            let host = u8::try_from(host).unwrap_or(u8::MAX);
            (
                Ipv4Addr::new(192, 168, 240, host),
                Ipv6Addr::new(0xfd00, 0x240, 0, 0, 0, 0, 0, host.into()),
            )
        };
        let v4 = Ipv4Net::new_assert(v4, 24).into();
        let v6 = Ipv6Net::new_assert(v6, 64).into();
        of_family(self.underlay, v4, v6)
    }

    /// The cluster networks.
    pub fn cluster_cidrs(&self) -> Vec<IpNet> {
        let v4 = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16).into();
        let v6 = Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0), 48).into();
        of_family(self.pods, v4, v6)
    }

    /// `spec.podCIDRs` of a node.
    pub fn pod_cidrs(&self, node: NodeIndex) -> Vec<IpNet> {
        let v4 = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, node.0, 0), 24).into();
        let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x244, node.0.into(), 0, 0, 0, 0);
        of_family(self.pods, v4, Ipv6Net::new_assert(v6, 64).into())
    }

    /// First addresses of a node's pod CIDRs: where its pods send what is not for their bridge.
    pub fn pod_gateways(&self, node: NodeIndex) -> Vec<IpAddr> {
        let first = |net: IpNet| match net.network() {
            IpAddr::V4(base) => IpAddr::V4(Ipv4Addr::from_bits(base.to_bits() + 1)),
            IpAddr::V6(base) => IpAddr::V6(Ipv6Addr::from_bits(base.to_bits() + 1)),
        };
        self.pod_cidrs(node).into_iter().map(first).collect()
    }

    /// Address of the API server as a node sees it.
    pub fn api_url(&self, node: NodeIndex) -> String {
        match self.gateway_addresses(node).first().map(IpNet::addr) {
            Some(IpAddr::V6(address)) => format!("http://[{address}]:{API_PORT}"),
            Some(IpAddr::V4(address)) => format!("http://{address}:{API_PORT}"),
            None => String::new(),
        }
    }

    /// Whether the stand-in for Flannel drives this node at first.
    pub(super) fn runs_flannel(&self, node: NodeIndex) -> bool {
        node.0 + self.flannel_nodes > self.nodes
    }

    /// The net-conf.json of a node that accepts these transports.
    pub(super) fn net_conf(&self, transports: &BTreeSet<Transport>) -> String {
        let flannel = (self.flannel_nodes > 0).then_some(self.flannel_backend);
        let kind = flannel.unwrap_or(Transport::Wireguard);
        let mut conf = json!({ "Backend": { "Type": kind, "Transports": transports } });
        for network in self.cluster_cidrs() {
            match network {
                IpNet::V4(_) => conf["Network"] = network.to_string().into(),
                IpNet::V6(_) => conf["IPv6Network"] = network.to_string().into(),
            }
            conf[if network.addr().is_ipv4() { "EnableIPv4" } else { "EnableIPv6" }] = true.into();
        }
        conf.to_string()
    }

    /// The inner MTU that a node should find, in bytes, unless it is told other transports
    /// than all are.
    pub fn pod_mtu(&self) -> u32 {
        self.mtu_with(&self.transports.default)
    }

    /// The inner MTU that this node should find, in bytes.
    pub fn pod_mtu_of(&self, node: NodeIndex) -> u32 {
        self.mtu_with(self.transports.of(&node.name()))
    }

    fn mtu_with(&self, transports: &BTreeSet<Transport>) -> u32 {
        let v6 = self.underlay.has_v6();
        let family = if v6 { family::Family::V6 } else { family::Family::V4 };
        let overheads = transports.iter().map(|transport| transport.overhead(family));
        self.underlay_mtu - overheads.max().unwrap_or_default()
    }

    /// Folder of the lab.
    pub fn state_dir(&self) -> PathBuf {
        state_dir(&self.name)
    }

    /// Folder of a node; its `run` is `/run` there.
    pub fn node_dir(&self, node: NodeIndex) -> PathBuf {
        self.state_dir().join(node.name())
    }
}

fn of_family<T>(family: Family, v4: T, v6: T) -> Vec<T> {
    match family {
        Family::V4 => vec![v4],
        Family::V6 => vec![v6],
        Family::Dual => vec![v4, v6],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options::new("lab".parse().unwrap(), PathBuf::from("/bin/true"))
    }

    #[test]
    fn only_exact_names_belong_to_a_lab() {
        let lab: LabName = "a".parse().unwrap();
        for ours in ["a-hub", "a-node-1", "a-node-12", "a-pod-1-2"] {
            assert!(is_netns_of(&lab, ours), "{ours}");
        }
        for other in ["a", "ab-hub", "a-node-", "a-node-1-hub", "a-pod-1", "a-b-hub", "node-1"] {
            assert!(!is_netns_of(&lab, other), "{other}");
        }
        assert!(options().netns_names().iter().all(|n| is_netns_of(&options().name, n)));
    }

    #[test]
    fn addresses_follow_the_contract() {
        let flat = Options { underlay: Family::Dual, pods: Family::Dual, ..options() };
        let text = |nets: Vec<IpNet>| nets.iter().map(ToString::to_string).collect::<Vec<_>>();
        let node = NodeIndex(2);
        assert_eq!(text(flat.underlay_addresses(node)), ["192.168.240.2/24", "fd00:240::2/64"]);
        assert_eq!(text(flat.pod_cidrs(node)), ["10.244.2.0/24", "fd00:10:244:2::/64"]);
        assert_eq!(flat.pod_gateways(node)[0].to_string(), "10.244.2.1");
        assert_eq!(flat.api_url(node), "http://192.168.240.254:6443");
        assert_eq!(flat.pod_mtu(), 1420);
        let routed = Options { routed: true, underlay: Family::V6, ..options() };
        assert_eq!(text(routed.underlay_addresses(node)), ["fd00:240:0:2::1/64"]);
        assert_eq!(routed.api_url(node), "http://[fd00:240:0:2::fe]:6443");
        assert_eq!(options().pod_mtu(), 1440);
    }
}
