use super::*;
use crate::fixtures::{local, record};

#[test]
fn a_node_reads_what_another_publishes() {
    let (mut theirs, ours) = (local(2, 6), local(1, 0));
    theirs.keys.insert(Generation::new(7), crate::fixtures::key(77));
    let node = Node::parse(&record(&theirs), &ours).unwrap();
    assert_eq!(node.generation, Generation::new(6));
    assert_eq!(node.public_key, crate::fixtures::key(2));
    assert_eq!(node.next_public_key, Some(crate::fixtures::key(77)));
    assert_eq!(node.endpoints, theirs.endpoints);
    assert_eq!(node.port, DEFAULT_PORT);
    assert_eq!(node.mtu, Some(1420));
    assert_eq!(node.pod_cidrs, theirs.pod_cidrs);
    assert_eq!(node.transports, theirs.transports);
}
