//! The Nodes as last known, kept through outages and refused lists.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gambeson_mesh::NodeName;
use gambeson_mesh::node::NodeRecord;
use gambeson_mesh::topology::{Implausible, plausible};
use tokio::sync::watch;

use super::object::{Condition, NodeObject};

/// Deleted Nodes whose last version is remembered, in case an older event comes late.
const DELETED_MAX: usize = 1024;

/// The Nodes of the cluster, shared between the task that watches them and those that read.
#[derive(Debug, Clone)]
pub struct NodeStore {
    state: Arc<Mutex<Nodes>>,
    revision: watch::Sender<u64>,
}

/// Types of the conditions that agents write on their own Nodes.
pub(super) const CONDITIONS: [&str; 4] =
    [NETWORK_UNAVAILABLE, MESH_READY, MESH_ENCRYPTED, ROTATION_BLOCKED];
pub(super) const NETWORK_UNAVAILABLE: &str = "NetworkUnavailable";
pub(super) const MESH_READY: &str = "MeshReady";
pub(super) const MESH_ENCRYPTED: &str = "MeshEncrypted";
pub(super) const ROTATION_BLOCKED: &str = "RotationBlocked";

/// What is known of the cluster's Nodes.
#[derive(Debug, Default)]
pub struct Nodes {
    own_name: NodeName,
    prefix: String,
    records: BTreeMap<NodeName, NodeRecord>,
    own_status: OwnStatus,
    /// Resource version of the last list. Events at or below it are late.
    listed_at: u64,
    /// Resource version of the last event of each Node since then, of deleted ones too: what
    /// is at or below it is a duplicate, late, or out of order.
    seen: BTreeMap<NodeName, u64>,
    listed: bool,
    /// Nodes that the last list lacked for the first time, and that are kept until the next.
    doubtful: BTreeSet<NodeName>,
}

/// What the agent reads of its own Node alone.
#[derive(Debug, Default, PartialEq, Eq)]
struct OwnStatus {
    conditions: Vec<Condition>,
    addresses: Vec<IpAddr>,
    external: Vec<IpAddr>,
}

impl NodeStore {
    /// An empty store of the agent on `own_name`, for annotations below `prefix`.
    pub fn new(own_name: &str, prefix: &str) -> Self {
        let nodes =
            Nodes { own_name: own_name.to_owned(), prefix: prefix.to_owned(), ..Nodes::default() };
        Self { state: Arc::new(Mutex::new(nodes)), revision: watch::Sender::new(0) }
    }

    /// The Nodes as they are now. Not to be held across an await.
    pub fn nodes(&self) -> MutexGuard<'_, Nodes> {
        // A panic while the lock was held cannot leave half a change: each is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes whenever the Nodes do.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Replaces everything by a complete list as of `version`, unless it is implausible. A Node
    /// that was known and that the list lacks is kept until the next list lacks it too: the
    /// deletion of a Node is an event, and a list without one may be a server's mistake.
    ///
    /// # Errors
    /// [`Implausible`]; what was known is kept.
    pub fn replace(&self, listed: &[NodeObject], version: Option<u64>) -> Result<(), Implausible> {
        let changed = self.nodes().replace(listed, version)?;
        self.announce(changed);
        Ok(())
    }

    /// Takes in a Node that was added or modified.
    pub fn apply(&self, node: &NodeObject) {
        let changed = self.nodes().apply(node);
        self.announce(changed);
    }

    /// Forgets a Node that was deleted.
    pub fn delete(&self, node: &NodeObject) {
        let changed = self.nodes().delete(node);
        self.announce(changed);
    }

    fn announce(&self, changed: bool) {
        if changed {
            self.revision.send_modify(|revision| *revision += 1);
        }
    }
}

impl OwnStatus {
    fn of(node: &NodeObject) -> Self {
        Self {
            conditions: node.conditions(&CONDITIONS),
            addresses: node.internal_addresses(),
            external: node.external_addresses(),
        }
    }
}

impl Nodes {
    /// Every Node by name.
    pub fn records(&self) -> &BTreeMap<NodeName, NodeRecord> {
        &self.records
    }

    /// The agent's own Node, once it is known.
    pub fn own(&self) -> Option<&NodeRecord> {
        self.records.get(&self.own_name)
    }

    /// Any Node but the agent's own, the same as long as there is one.
    pub fn another(&self) -> Option<&NodeName> {
        self.records.keys().find(|name| **name != self.own_name)
    }

    /// Those conditions of the agent's own Node that agents write.
    pub fn own_conditions(&self) -> &[Condition] {
        &self.own_status.conditions
    }

    /// Those addresses of the agent's own Node at which the rest of the cluster reaches it.
    pub fn own_addresses(&self) -> &[IpAddr] {
        &self.own_status.addresses
    }

    /// Those addresses of the agent's own Node at which the rest of the world reaches it.
    pub fn own_external_addresses(&self) -> &[IpAddr] {
        &self.own_status.external
    }

    /// Whether a list has been received since the agent started.
    pub fn listed(&self) -> bool {
        self.listed
    }

    /// Whether another list has to tell if Nodes are gone.
    pub fn wants_second_look(&self) -> bool {
        !self.doubtful.is_empty()
    }

    fn replace(
        &mut self,
        listed: &[NodeObject],
        version: Option<u64>,
    ) -> Result<bool, Implausible> {
        let mut records: BTreeMap<_, _> = listed
            .iter()
            .map(|node| node.record(&self.prefix))
            .filter(|record| !record.name.is_empty())
            .map(|record| (record.name.clone(), record))
            .collect();
        // Before this agent's own Node is known it acts on nothing, and a list without it is
        // simply the truth: the kubelet has not registered it yet.
        if self.own().is_some() {
            plausible(&records, &self.own_name)?;
        }
        let doubted = std::mem::take(&mut self.doubtful);
        for (name, record) in &self.records {
            if !records.contains_key(name) && !doubted.contains(name) {
                records.insert(name.clone(), record.clone());
                self.doubtful.insert(name.clone());
            }
        }
        let own = listed.iter().find(|node| node.name() == self.own_name);
        let own = own.map(OwnStatus::of).unwrap_or_default();
        let changed = !self.listed || records != self.records || own != self.own_status;
        self.records = records;
        self.own_status = own;
        self.listed = true;
        self.listed_at = version.unwrap_or_default();
        self.seen.clear();
        Ok(changed)
    }

    fn apply(&mut self, node: &NodeObject) -> bool {
        let record = node.record(&self.prefix);
        if record.name.is_empty() || !self.is_news(node) {
            return false;
        }
        let mut changed = false;
        if record.name == self.own_name {
            let own = OwnStatus::of(node);
            changed |= own != self.own_status;
            self.own_status = own;
        }
        self.doubtful.remove(&record.name);
        if self.records.get(&record.name) != Some(&record) {
            self.records.insert(record.name.clone(), record);
            changed = true;
        }
        changed
    }

    fn delete(&mut self, node: &NodeObject) -> bool {
        if !self.is_news(node) {
            return false;
        }
        // A Node that was made again under the same name is not the one that was deleted.
        let uid = node.metadata.uid.as_deref().unwrap_or_default();
        if self.records.get(node.name()).is_none_or(|known| known.uid != uid) {
            return false;
        }
        if node.name() == self.own_name {
            self.own_status = OwnStatus::default();
        }
        self.doubtful.remove(node.name());
        self.records.remove(node.name()).is_some()
    }

    /// Whether an event is newer than all that is known of its Node. Versions that are not
    /// numbers cannot be compared, and are believed.
    fn is_news(&mut self, node: &NodeObject) -> bool {
        let Some(version) = node.version() else { return true };
        let seen = self.seen.get(node.name()).copied().unwrap_or(self.listed_at);
        if version <= seen {
            return false;
        }
        self.seen.insert(node.name().to_owned(), version);
        if self.seen.len() > self.records.len() + DELETED_MAX {
            let Self { seen, records, .. } = self;
            seen.retain(|name, _| records.contains_key(name));
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str, version: u64, port: &str) -> NodeObject {
        serde_json::from_value(json!({
            "metadata": {
                "name": name, "uid": format!("uid-{name}"), "resourceVersion": version.to_string(),
                "annotations": {"gambeson.io/port": port},
            },
        }))
        .unwrap()
    }

    fn store() -> NodeStore {
        let store = NodeStore::new("a", "gambeson.io");
        store.replace(&[node("a", 1, "1"), node("b", 2, "2")], Some(10)).unwrap();
        store
    }

    fn names(store: &NodeStore) -> Vec<String> {
        store.nodes().records().keys().cloned().collect()
    }

    #[test]
    fn a_list_replaces_everything_but_what_it_lacks_for_the_first_time() {
        let store = store();
        let listed = [node("a", 11, "7"), node("c", 12, "1")];
        store.replace(&listed, Some(12)).unwrap();
        assert_eq!(names(&store), ["a", "b", "c"]);
        assert_eq!(store.nodes().records()["a"].annotations["port"], "7");
        assert!(store.nodes().wants_second_look());
        store.replace(&listed, Some(13)).unwrap();
        assert_eq!(names(&store), ["a", "c"]);
        assert!(!store.nodes().wants_second_look());
    }

    #[test]
    fn what_a_list_lacked_may_come_back_or_be_deleted() {
        let store = store();
        store.replace(&[node("a", 1, "1")], Some(12)).unwrap();
        store.replace(&[node("a", 1, "1"), node("b", 2, "2")], Some(13)).unwrap();
        assert!(!store.nodes().wants_second_look());
        store.replace(&[node("a", 1, "1")], Some(14)).unwrap();
        store.apply(&node("b", 15, "2"));
        assert!(!store.nodes().wants_second_look());
        store.replace(&[node("a", 1, "1")], Some(16)).unwrap();
        store.delete(&node("b", 17, ""));
        assert_eq!(names(&store), ["a"]);
        assert!(!store.nodes().wants_second_look());
    }

    #[test]
    fn a_list_that_would_take_the_network_down_is_refused() {
        let store = store();
        assert_eq!(store.replace(&[], Some(20)), Err(Implausible::Empty));
        let listed = [node("b", 2, "2")];
        let refused = Implausible::OwnNodeMissing { name: "a".into() };
        assert_eq!(store.replace(&listed, Some(20)), Err(refused));
        assert_eq!(names(&store), ["a", "b"]);
    }

    #[test]
    fn before_anything_is_known_any_list_is_believed() {
        let store = NodeStore::new("a", "gambeson.io");
        assert!(!store.nodes().listed());
        store.replace(&[], Some(1)).unwrap();
        assert!(store.nodes().listed());
        store.replace(&[node("b", 2, "2")], Some(2)).unwrap();
        store.apply(&node("a", 3, "1"));
        assert!(store.nodes().own().is_some());
    }

    #[test]
    fn late_duplicate_and_reordered_events_change_nothing() {
        let store = store();
        let changes = store.changes();
        store.apply(&node("b", 9, "old"));
        store.apply(&node("b", 12, "new"));
        store.apply(&node("b", 11, "reordered"));
        store.apply(&node("b", 12, "duplicate"));
        assert_eq!(store.nodes().records()["b"].annotations["port"], "new");
        store.delete(&node("b", 13, ""));
        store.apply(&node("b", 12, "late"));
        store.delete(&node("b", 13, ""));
        assert_eq!(names(&store), ["a"]);
        assert_eq!(*changes.borrow(), 3, "list, change, delete");
    }

    #[test]
    fn events_of_different_nodes_may_come_in_any_order() {
        let store = store();
        store.apply(&node("b", 12, "new"));
        store.apply(&node("a", 11, "new"));
        for name in ["a", "b"] {
            assert_eq!(store.nodes().records()[name].annotations["port"], "new");
        }
    }

    #[test]
    fn what_is_remembered_of_deleted_nodes_is_bounded() {
        let store = store();
        for n in 0..3 * DELETED_MAX as u64 {
            store.apply(&node(&format!("n{n}"), 2 * n + 20, ""));
            store.delete(&node(&format!("n{n}"), 2 * n + 21, ""));
        }
        assert!(store.nodes().seen.len() <= DELETED_MAX + 3);
        assert_eq!(names(&store), ["a", "b"]);
    }

    #[test]
    fn deleting_the_former_holder_of_a_name_keeps_the_new_one() {
        let store = store();
        let mut former = node("b", 14, "");
        former.metadata.uid = Some("another".into());
        store.delete(&former);
        assert_eq!(names(&store), ["a", "b"]);
    }

    #[test]
    fn only_real_changes_are_announced() {
        let store = store();
        let mut changes = store.changes();
        changes.mark_unchanged();
        store.apply(&node("b", 15, "2"));
        store.replace(&[node("a", 1, "1"), node("b", 2, "2")], Some(16)).unwrap();
        assert!(!changes.has_changed().unwrap());
        store.apply(&node("b", 17, "3"));
        assert!(changes.has_changed().unwrap());
    }
}
