//! A new agent with the devices of a former one: a restart changes no claim.

use super::*;
use crate::desired::Desired;
use crate::plan::{Action, Plan};
use crate::sim;
use crate::transport::{self, Paths};

/// The kernel of node 1 in a mesh with these Nodes.
fn kernel(nodes: &[NodeRecord]) -> Observed {
    let own = local(1, 0);
    let desired =
        transport::desired(&resolve(&mut Topology::new(), nodes), &own, &Paths::default());
    let mut observed = Observed::default();
    sim::apply(&Plan::new(&desired, &observed), &desired, &mut observed);
    observed
}

/// What a new agent makes of the Nodes as they are now.
fn restarted(observed: &Observed, nodes: &[NodeRecord]) -> (Topology, Mesh) {
    let mut topology = Topology::new();
    topology.recover(observed, &[]);
    let mesh = resolve(&mut topology, nodes);
    (topology, mesh)
}

/// What a new agent would do to peers and routes, a pinned endpoint aside.
fn changes(observed: &Observed, mesh: &Mesh) -> Vec<Action> {
    let desired: Desired = transport::desired(mesh, &local(1, 0), &Paths::default());
    let mut actions = Plan::new(&desired, observed).actions;
    for action in &mut actions {
        let Action::ConfigureWireGuard { change, .. } = action else { continue };
        change.set_peers.values_mut().for_each(|peer| peer.endpoint = None);
        change.set_peers.retain(|_, peer| !peer.is_empty());
    }
    actions.retain(
        |action| !matches!(action, Action::ConfigureWireGuard { change, .. } if change.is_empty()),
    );
    actions
}

fn nodes() -> [NodeRecord; 3] {
    [record(&local(2, 0)), record(&local(3, 1)), record(&local(4, 6))]
}

#[test]
fn a_restart_changes_nothing() {
    let observed = kernel(&nodes());
    let (_, mesh) = restarted(&observed, &nodes());
    assert_eq!(mesh, resolve(&mut Topology::new(), &nodes()));
    assert_eq!(changes(&observed, &mesh), []);
}

// The lower name and the elder Node lose to whoever had the key.
#[test]
fn a_forged_key_does_not_push_out_its_holder_over_a_restart() {
    let good = nodes();
    let observed = kernel(&good);
    for (thief, victim) in [(0, 1), (0, 2), (1, 2), (2, 1)] {
        let mut bad = good.clone();
        let stolen = good[victim].annotations["public-key"].clone();
        set(&mut bad[thief], "public-key", &stolen);
        bad[thief].created = 1;
        let (mut topology, mesh) = restarted(&observed, &bad);
        assert_eq!(mesh.refused.keys().collect::<Vec<_>>(), [&good[thief].name]);
        assert_eq!(changes(&observed, &mesh), [], "{thief} steals from {victim}");
        let healed = resolve(&mut topology, &good);
        assert_eq!(healed, resolve(&mut Topology::new(), &good));
    }
}

#[test]
fn a_bad_node_is_kept_over_a_restart() {
    let good = nodes();
    let observed = kernel(&good);
    for (name, value) in [
        ("public-key", "garbage"),
        ("key-generation", "-1"),
        ("endpoint", "127.0.0.1"),
        ("port", "0"),
        ("mtu", "9"),
        ("transports", ","),
    ] {
        for bad in 0..good.len() {
            let mut nodes = good.clone();
            set(&mut nodes[bad], name, value);
            let (mut topology, mesh) = restarted(&observed, &nodes);
            assert_eq!(changes(&observed, &mesh), [], "{name}={value}");
            assert!(mesh.refused.contains_key(&good[bad].name));
            assert_eq!(names(&mesh), ["node-2", "node-3", "node-4"]);
            let healed = resolve(&mut topology, &good);
            assert_eq!(healed, resolve(&mut Topology::new(), &good));
        }
    }
    let bare = good.clone().map(|record| NodeRecord { annotations: BTreeMap::new(), ..record });
    let homeless = good.map(|record| NodeRecord { pod_cidrs: Vec::new(), ..record });
    for nodes in [bare, homeless] {
        let (_, mesh) = restarted(&observed, &nodes);
        assert_eq!(changes(&observed, &mesh), []);
        assert_eq!(mesh.refused.len(), 3);
    }
}

#[test]
fn a_typing_error_in_an_option_costs_the_option_only() {
    let good = nodes();
    let observed = kernel(&good);
    for name in ["config/persistent-keepalive", "config/endpoint", "config/endpoint-v6"] {
        let mut bad = good.clone();
        set(&mut bad[0], name, "25s");
        for mesh in [restarted(&observed, &bad).1, resolve(&mut Topology::new(), &bad)] {
            assert_eq!(mesh.refused, BTreeMap::new());
            assert_eq!(changes(&observed, &mesh), []);
            let problem = mesh.ignored["node-2"][0].to_string();
            let key = name.replace("config/", "config.gambeson.io/");
            assert!(problem.contains(&key) && problem.contains("kubectl annotate"), "{problem}");
        }
    }
}

#[test]
fn a_copied_node_does_not_take_the_place_of_the_first() {
    let good = nodes();
    let observed = kernel(&good);
    let copy = NodeRecord { name: "a-copy".to_owned(), created: 2_000, ..good[0].clone() };
    let (_, mesh) = restarted(&observed, &[&good[..], &[copy]].concat());
    assert_eq!(changes(&observed, &mesh), []);
    assert_eq!(mesh.refused.keys().collect::<Vec<_>>(), ["a-copy"]);
}

#[test]
fn what_changed_while_no_agent_ran_is_followed() {
    let good = nodes();
    let observed = kernel(&good);
    // A new key, also of a Node that was made again and starts at generation 0.
    for (node, generation) in [(0, 1), (1, 0), (2, 7)] {
        let mut nodes = good.clone();
        set(&mut nodes[node], "public-key", &key(99).to_string());
        set(&mut nodes[node], "key-generation", &generation.to_string());
        let (_, mesh) = restarted(&observed, &nodes);
        assert_eq!(mesh, resolve(&mut Topology::new(), &nodes), "{node}");
    }
    let (_, mesh) = restarted(&observed, &good[1..]);
    assert_eq!(names(&mesh), ["node-3", "node-4"]);
}

#[test]
fn before_the_nodes_are_known_the_peers_of_the_kernel_stay() {
    let observed = kernel(&nodes());
    let mut topology = Topology::new();
    topology.recover(&observed, &[]);
    let mesh = topology.recovered();
    assert_eq!(changes(&observed, &mesh), []);
    let first = "(10.244.2.0/24, fd00:10:244:2::/64)";
    assert_eq!(names(&mesh)[0], first);
    assert_eq!(resolve(&mut topology, &nodes()), resolve(&mut Topology::new(), &nodes()));
}
