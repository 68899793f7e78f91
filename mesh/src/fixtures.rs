//! Nodes for tests.

use std::collections::{BTreeMap, BTreeSet};

use gambeson_keys::{Generation, PublicKey};
use ipnet::IpNet;

use crate::NodeName;
use crate::desired::{Implementation, Vxlan};
use crate::family::Family;
use crate::node::{DEFAULT_PORT, DEFAULT_PREFIX, Endpoints, Local, NodeRecord, Transport};

/// A key that is not a low-order point, different for each number.
pub(crate) fn key(number: u8) -> PublicKey {
    let mut bytes = [9; 32];
    bytes[0] = number;
    PublicKey::from_bytes(bytes).unwrap()
}

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// Node `i` of a dual-stack cluster on a dual-stack underlay, as its own agent sees it.
pub(crate) fn local(i: u8, generation: u64) -> Local {
    let pod_cidrs =
        BTreeSet::from([net(&format!("10.244.{i}.0/24")), net(&format!("fd00:10:244:{i:x}::/64"))]);
    let endpoints = Endpoints {
        v4: Some([192, 168, 240, i].into()),
        v6: Some(format!("fd00:240::{i:x}").parse().unwrap()),
    };
    Local {
        name: format!("node-{i}"),
        prefix: DEFAULT_PREFIX.to_owned(),
        vteps: Local::default_vteps(&pod_cidrs, endpoints),
        pod_cidrs,
        cluster_networks: BTreeSet::from([net("10.244.0.0/16"), net("fd00:10:244::/48")]),
        keys: BTreeMap::from([(Generation::new(generation), key(i))]),
        secrets: BTreeMap::new(),
        known_secrets: Vec::new(),
        promoted: false,
        endpoints,
        addresses: endpoints,
        port: DEFAULT_PORT,
        persistent_keepalive: None,
        underlay: "eth0".to_owned(),
        underlay_index: 2,
        underlay_mtu: 1500,
        implementation: Implementation::Kernel,
        transports: BTreeSet::from([Transport::Wireguard]),
        vxlan: Vxlan::default(),
        on_link: BTreeSet::new(),
        flannel: None,
        bridge: "cni0".to_owned(),
        masquerade: Family::ALL.into(),
    }
}

/// What the others see of a node.
pub(crate) fn record(local: &Local) -> NodeRecord {
    let published = local.annotations().into_iter();
    NodeRecord {
        name: local.name.clone(),
        uid: format!("uid-of-{}", local.name),
        created: 1_000,
        pod_cidrs: local.pod_cidrs.iter().map(IpNet::to_string).collect(),
        annotations: published.filter_map(|(name, value)| Some((name, value?))).collect(),
    }
}

/// Records by name.
pub(crate) fn records<'a>(
    nodes: impl IntoIterator<Item = &'a NodeRecord>,
) -> BTreeMap<NodeName, NodeRecord> {
    nodes.into_iter().map(|record| (record.name.clone(), record.clone())).collect()
}
