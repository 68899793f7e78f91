//! Any Node object whatever: no panic, and no effect on the others.

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::*;
use crate::observed::Observed;
use crate::plan::Plan;
use crate::transport::{self, Paths};

/// Half right and half anything, so that the checks behind the first are reached too.
fn any_value() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        "[A-Za-z0-9+/]{43}=",
        "[0-9]{1,20}",
        "[0-9]{1,3}\\.[0-9]{1,3}\\.[0-9]{1,3}\\.[0-9]{1,3}",
        "[0-9a-f:]{2,39}",
        "(wireguard|vxlan|host-gw|,)*",
        (0_u8..4).prop_map(|i| key(i).to_string()),
        Just("x".repeat(256 * 1024)),
    ]
}

fn any_cidr() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        (0_u8..8, 14_u8..33).prop_map(|(i, length)| format!("10.244.{i}.0/{length}")),
        (0_u8..8, 0_u8..129).prop_map(|(i, length)| format!("fd00:10:244:{i}::/{length}")),
    ]
}

fn any_record() -> impl Strategy<Value = NodeRecord> {
    let names = prop_oneof![
        Just("public-key".to_owned()),
        Just("key-generation".to_owned()),
        Just("next-public-key".to_owned()),
        Just("endpoint".to_owned()),
        Just("endpoint-v6".to_owned()),
        Just("port".to_owned()),
        Just("transports".to_owned()),
        Just("mtu".to_owned()),
        Just("config/endpoint".to_owned()),
        Just("config/persistent-keepalive".to_owned()),
        any::<String>(),
    ];
    let annotations = btree_map(names, any_value(), 0..6);
    (0_u8..8, any::<bool>(), any::<String>(), any::<i64>(), vec(any_cidr(), 0..3), annotations)
        .prop_map(|(i, based, uid, created, pod_cidrs, annotations)| {
            let mut hostile = record(&local(i, 0));
            hostile.name = format!("hostile-{i}");
            (hostile.uid, hostile.created) = (uid, created);
            if !based {
                hostile.annotations.clear();
            }
            hostile.annotations.extend(annotations);
            if !pod_cidrs.is_empty() {
                hostile.pod_cidrs = pod_cidrs;
            }
            hostile
        })
}

proptest! {
    #[test]
    fn no_node_object_panics(sets in vec(vec(any_record(), 0..6), 1..4)) {
        let own = local(1, 0);
        let mut topology = Topology::new();
        for nodes in sets {
            let mesh = topology.resolve(&own, &records(&nodes));
            for refusal in mesh.refused.values() {
                let message = refusal.to_string();
                prop_assert!(message.len() < 2_000);
                prop_assert!(!message.chars().any(char::is_control));
            }
            let desired = transport::desired(&mesh, &own, &Paths::default());
            for device in desired.devices.values() {
                let mut owned = std::collections::BTreeSet::new();
                for prefix in device.peers.values().flat_map(|peer| &peer.allowed_ips) {
                    prop_assert!(owned.insert(*prefix));
                    prop_assert!(own.cluster_networks.iter().any(|n| n.contains(prefix)));
                }
            }
            let _ = Plan::new(&desired, &Observed::default());
        }
    }

    #[test]
    fn a_newcomer_never_changes_what_an_incumbent_has(
        hostile in vec(any_record(), 1..6),
        changed in vec(any_record(), 1..6),
    ) {
        let good: Vec<_> = (2..5).map(|i| record(&local(i, 0))).collect();
        let mut topology = Topology::new();
        let before = resolve(&mut topology, &good);
        for others in [hostile, changed] {
            let all: Vec<_> = good.iter().chain(&others).cloned().collect();
            let mesh = resolve(&mut topology, &all);
            for (name, node) in &before.peers {
                prop_assert_eq!(mesh.peers.get(name), Some(node));
                prop_assert!(!mesh.refused.contains_key(name));
            }
        }
    }

    #[test]
    fn a_refused_node_never_changes_what_a_stranger_gets(hostile in any_record()) {
        let good: Vec<_> = (2..5).map(|i| record(&local(i, 0))).collect();
        let without = resolve(&mut Topology::new(), &good);
        let all: Vec<_> = good.into_iter().chain([hostile.clone()]).collect();
        let mut mesh = resolve(&mut Topology::new(), &all);
        if Node::parse(&hostile, &local(1, 0)).is_err() {
            prop_assert!(mesh.refused.remove(&hostile.name).is_some());
            prop_assert_eq!(mesh, without);
        }
    }

    #[test]
    fn the_order_of_equals_does_not_matter_and_resolving_again_changes_nothing(
        nodes in vec(any_record(), 0..6),
    ) {
        let mut topology = Topology::new();
        let first = resolve(&mut topology, &nodes);
        let again = resolve(&mut topology, &nodes);
        prop_assert_eq!(first.peers, again.peers);
    }

    #[test]
    fn accepted_claims_never_overlap(sets in vec(vec(any_record(), 0..8), 1..4)) {
        let mut topology = Topology::new();
        for nodes in sets {
            let mesh = resolve(&mut topology, &nodes);
            let cidrs: Vec<_> = mesh.peers.values().flat_map(|node| &node.pod_cidrs).collect();
            for (i, a) in cidrs.iter().enumerate() {
                prop_assert!(cidrs[i + 1..].iter().all(|b| !crate::node::overlap(a, b)));
                prop_assert!(local(1, 0).pod_cidrs.iter().all(|b| !crate::node::overlap(a, b)));
            }
        }
    }
}
