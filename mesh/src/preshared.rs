//! `two keys -> the secret that their session's preshared key is made of`, the same at both ends.
//!
//! A key is bound to the secret that its node had when it was made, for good: another secret
//! takes another key. Where the keys of a session are bound to two secrets, the older one counts,
//! since a node that has followed still knows it. A secret that this node does not know is newer
//! than its own.

use gambeson_keys::{Generation, SecretId};

use crate::node::{Local, Node};

/// The secret of the session between these generations, if it has one.
pub(crate) fn of_session(
    local: &Local,
    node: &Node,
    (own, theirs): (Generation, Generation),
) -> Option<SecretId> {
    let mine = *local.secrets.get(&own)?;
    let theirs = if theirs == node.generation { node.secret? } else { node.next_secret? };
    let age = |secret| local.known_secrets.iter().position(|known| *known == secret);
    match (age(mine), age(theirs)) {
        (Some(ours), Some(other)) if other < ours => Some(theirs),
        _ => Some(mine),
    }
}

/// Whether a peer's sessions with this node have, or will soon have, a preshared key as far as
/// this node's own have one.
pub(crate) fn is_protected(local: &Local, node: &Node) -> bool {
    let required = !local.keys.is_empty()
        && local.keys.keys().all(|generation| local.secrets.contains_key(generation));
    !required || node.secret.or(node.next_secret).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{local, record};
    use crate::node::NodeRecord;

    const IDS: [SecretId; 3] =
        [SecretId::from_bytes([1; 8]), SecretId::from_bytes([2; 8]), SecretId::from_bytes([3; 8])];

    /// A node whose key is bound to the last of these, which it knows.
    fn with(i: u8, known: &[SecretId]) -> Local {
        let own = local(i, 0);
        let secrets = known.last().map(|id| (Generation::FIRST, *id)).into_iter().collect();
        Local { secrets, known_secrets: known.to_vec(), ..own }
    }

    fn seen(from: &Local, other: &Local) -> Option<SecretId> {
        let record: NodeRecord = record(other);
        let node = Node::parse(&record, from).unwrap();
        of_session(from, &node, (Generation::FIRST, Generation::FIRST))
    }

    #[test]
    fn both_ends_take_the_same_secret_while_they_follow_one_after_the_other() {
        let [one, two, _] = IDS;
        for (a, b, expected) in [
            (&[][..], &[][..], None),
            (&[one], &[], None),
            (&[one], &[one], Some(one)),
            (&[one, two], &[one], Some(one)),
            (&[one, two], &[one, two], Some(two)),
            (&[two], &[one, two], Some(two)),
        ] {
            let (a, b) = (with(1, a), with(2, b));
            assert_eq!((seen(&a, &b), seen(&b, &a)), (expected, expected), "{a:?} {b:?}");
        }
    }

    #[test]
    fn a_node_without_one_is_only_missed_where_all_keys_have_one() {
        let [one, ..] = IDS;
        let mut own = with(1, &[one]);
        let other = Node::parse(&record(&with(2, &[])), &own).unwrap();
        assert!(!is_protected(&own, &other));
        own.secrets.clear();
        assert!(is_protected(&own, &other));
    }
}
