use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::desired::{FAIL_CLOSED_METRIC, Implementation, Sysctl};
use crate::fixtures::{key, local, net, record, records};
use crate::node::NodeRecord;
use crate::session::DeviceName;
use crate::topology::Topology;
use crate::transport::{self, Paths};

fn desired(local: &Local, others: &[NodeRecord]) -> Desired {
    transport::desired(&Topology::new().resolve(local, &records(others)), local, &Paths::default())
}

fn device_name(number: u8) -> DeviceName {
    DeviceName::parse(&format!("gambeson{number}")).unwrap()
}

#[test]
fn a_single_node_is_ready_for_its_first_peer() {
    for (generation, number) in [(0, 0), (1, 2)] {
        let desired = desired(&local(1, generation), &[]);
        let (name, device) = desired.devices.first_key_value().unwrap();
        assert_eq!((*name, desired.devices.len()), (device_name(number), 1));
        assert_eq!(device.listen_port, 51820 + 2 * u16::from(number));
        assert_eq!(device.mtu, 1420);
        assert_eq!(
            device.addresses,
            BTreeSet::from([net("10.244.1.0/32"), net("fd00:10:244:1::/128")])
        );
        assert_eq!(device.implementation, Implementation::Kernel);
        assert!(device.peers.is_empty());
        assert_eq!(desired.sysctls[&Sysctl::RpFilter(*name)], "2");
    }
}

#[test]
fn every_cluster_network_fails_closed() {
    let desired = desired(&local(1, 0), &[]);
    for text in ["10.244.0.0/16", "fd00:10:244::/48"] {
        let key = RouteKey { destination: net(text), metric: FAIL_CLOSED_METRIC };
        assert_eq!(desired.routes[&key].next_hop, NextHop::Unreachable);
        assert!(desired.ruleset.cluster_networks.contains(&net(text)));
    }
    let trusted: Vec<_> = desired.ruleset.trusted_links.iter().map(String::as_str).collect();
    assert_eq!(trusted, ["cni0", "gambeson0", "gambeson1", "gambeson2", "gambeson3", "lo"]);
    assert_eq!(desired.sysctls[&Sysctl::Ipv4Forward], "1");
    assert_eq!(desired.sysctls[&Sysctl::Ipv6Forward], "1");
}

#[test]
fn only_families_in_use_are_forwarded() {
    let mut own = local(1, 0);
    own.cluster_networks.retain(|network| network.network().is_ipv6());
    own.pod_cidrs.retain(|network| network.network().is_ipv6());
    let desired = desired(&own, &[]);
    assert!(!desired.sysctls.contains_key(&Sysctl::Ipv4Forward));
    assert_eq!(desired.sysctls[&Sysctl::Ipv6Forward], "1");
}

#[test]
fn one_tunnel_carries_both_families() {
    let desired = desired(&local(1, 0), &[record(&local(2, 1))]);
    let device = &desired.devices[&device_name(1)];
    let peer = &device.peers[&key(2)];
    assert_eq!(peer.endpoint, "192.168.240.2:51824".parse().unwrap());
    assert_eq!(peer.allowed_ips, local(2, 1).pod_cidrs);
    for (text, source) in
        [("10.244.2.0/24", "10.244.1.0"), ("fd00:10:244:2::/64", "fd00:10:244:1::")]
    {
        let key = RouteKey { destination: net(text), metric: PEER_ROUTE_METRIC };
        let route = &desired.routes[&key];
        assert_eq!(route.next_hop, NextHop::Device(device_name(1)));
        assert_eq!(route.mtu, Some(1420));
        assert_eq!(route.source, Some(source.parse().unwrap()));
    }
}

#[test]
fn ipv6_is_used_where_ipv4_is_not_common() {
    let mut other = local(2, 0);
    other.endpoints.v4 = None;
    let desired = desired(&local(1, 0), &[record(&other)]);
    let endpoint = desired.devices[&device_name(0)].peers[&key(2)].endpoint;
    assert_eq!(endpoint, "[fd00:240::2]:51820".parse().unwrap());
}

#[test]
fn a_route_has_the_smaller_mtu_of_the_pair() {
    let mut other = local(2, 0);
    other.underlay_mtu = 1400;
    let mut own = local(1, 0);
    own.underlay_mtu = 9000;
    own.endpoints.v6 = None;
    let desired = desired(&own, &[record(&other), record(&local(3, 0))]);
    assert_eq!(desired.devices[&device_name(0)].mtu, 8940);
    let mtu =
        |text| desired.routes[&RouteKey { destination: net(text), metric: PEER_ROUTE_METRIC }].mtu;
    assert_eq!(mtu("10.244.2.0/24"), Some(1320));
    assert_eq!(mtu("10.244.3.0/24"), Some(1420));
}

#[test]
fn a_family_without_an_address_of_ours_gets_no_route() {
    let mut own = local(1, 0);
    own.pod_cidrs.retain(|cidr| cidr.network().is_ipv4());
    let desired = desired(&own, &[record(&local(2, 0))]);
    let routes: Vec<_> =
        desired.routes.keys().filter(|key| key.metric == PEER_ROUTE_METRIC).collect();
    assert_eq!(routes.len(), 1);
}

#[test]
fn a_keepalive_set_on_either_node_counts_for_both() {
    let mut ours = record(&local(1, 0));
    let mut theirs = record(&local(2, 0));
    let keepalive = |ours: &NodeRecord, theirs: &NodeRecord| {
        let desired = desired(&local(1, 0), &[ours.clone(), theirs.clone()]);
        desired.devices[&device_name(0)].peers[&key(2)].persistent_keepalive
    };
    let set = |record: &mut NodeRecord, value: &str| {
        record.annotations.insert("config/persistent-keepalive".to_owned(), value.to_owned());
    };
    assert_eq!(keepalive(&ours, &theirs), None);
    set(&mut ours, "25");
    assert_eq!(keepalive(&ours, &theirs), Some(25));
    set(&mut theirs, "10");
    assert_eq!(keepalive(&ours, &theirs), Some(10));
    set(&mut theirs, "off");
    assert_eq!(keepalive(&ours, &theirs), Some(25));
}

#[test]
fn a_rotating_peer_is_on_two_devices_and_routed_through_the_key_in_use() {
    let mut other = local(2, 6);
    other.keys.insert(Generation::new(7), key(77));
    let desired = desired(&local(1, 0), &[record(&other)]);
    assert!(desired.devices[&device_name(0)].peers.contains_key(&key(2)));
    assert!(desired.devices[&device_name(1)].peers.contains_key(&key(77)));
    let through: BTreeSet<_> =
        desired.routes.values().filter_map(|route| route.next_hop.device()).collect();
    assert_eq!(through, BTreeSet::from([device_name(0)]));
}

/// Two nodes anywhere in a rotation.
fn any_node(i: u8) -> impl Strategy<Value = Local> {
    (0_u64..8, any::<bool>(), 1_u16..=65529, any::<bool>(), any::<bool>()).prop_map(
        move |(generation, rotating, port, v4, v6)| {
            let mut node = local(i, generation);
            if rotating {
                node.keys.insert(Generation::new(generation + 1), key(100 + i));
            }
            node.port = port;
            node.endpoints.v4 = node.endpoints.v4.filter(|_| v4 || !v6);
            node.endpoints.v6 = node.endpoints.v6.filter(|_| v6);
            node
        },
    )
}

proptest! {
    /// Wherever I have you, you have me: same port pair, reversed device, and no device
    /// gives one prefix to two peers.
    #[test]
    fn sessions_are_symmetric(a in any_node(1), b in any_node(2), c in any_node(3)) {
        let all = [record(&a), record(&b), record(&c)];
        let (mine, yours) = (desired(&a, &all), desired(&b, &all));
        for device in mine.devices.values() {
            let mut owned = BTreeSet::new();
            for peer in device.peers.values() {
                prop_assert!(peer.allowed_ips.iter().all(|prefix| owned.insert(*prefix)));
            }
        }
        let sessions = |from: &Desired, to: &Local| {
            let keys: BTreeSet<_> = to.keys.values().copied().collect();
            let mut found = Vec::new();
            for (name, device) in &from.devices {
                for (key, peer) in device.peers.iter().filter(|(key, _)| keys.contains(key)) {
                    let name = name.as_str();
                    found.push((name, device.public_key, *key, device.listen_port, peer.endpoint.port()));
                }
            }
            found
        };
        let reversed = |name: &str| match name {
            "gambeson1" => "gambeson2",
            "gambeson2" => "gambeson1",
            same => same,
        }.to_owned();
        let there: BTreeSet<_> = sessions(&mine, &b).into_iter()
            .map(|(name, own, theirs, port, remote)| (reversed(name), theirs, own, remote, port)).collect();
        let back: BTreeSet<_> = sessions(&yours, &a).into_iter()
            .map(|(name, own, theirs, port, remote)| (name.to_owned(), own, theirs, port, remote)).collect();
        let reachable = a.endpoints.reachable_from(b.endpoints).is_some();
        prop_assert_eq!(there.len(), if reachable { a.keys.len() * b.keys.len() } else { 0 });
        prop_assert_eq!(there, back);
    }
}
