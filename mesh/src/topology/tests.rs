use super::*;
use crate::fixtures::{local, record, records};

#[test]
fn every_other_node_is_a_peer() {
    let nodes: Vec<_> = (1..=3).map(|i| record(&local(i, 0))).collect();
    let mesh = Topology::new().resolve(&local(1, 0), &records(&nodes));
    assert_eq!(mesh.peers.keys().collect::<Vec<_>>(), ["node-2", "node-3"]);
    assert_eq!(mesh.refused, BTreeMap::new());
}
