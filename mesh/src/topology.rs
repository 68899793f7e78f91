//! `{NodeRecord} + Local -> Mesh`: which peers are usable, and why the others are not.
//!
//! Two Nodes may publish the same endpoint and port. An endpoint is only a hint where to
//! send: the key decides who can read, and a node that leaves its address to a successor
//! must not keep the successor out for as long as its Node object lingers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use gambeson_keys::SecretId;

use crate::NodeName;
use crate::node::annotation::CONFIG_PERSISTENT_KEEPALIVE;
use crate::node::{
    Local, Node, NodeRecord, Refusal, Transport, annotation, persistent_keepalive, rotate,
};
use crate::observed::Observed;
use crate::pair;
use crate::preshared;

mod claims;
mod recovered;
#[cfg(test)]
mod tests;

use claims::Claims;
use recovered::Recovered;

/// The peers of this node, and the Nodes it refuses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mesh {
    /// Usable peers, this node excepted.
    pub peers: BTreeMap<NodeName, Node>,
    /// Nodes with something wrong. A peer that was good before stays in `peers` with its
    /// last good state, unless the pair has no way to talk.
    pub refused: BTreeMap<NodeName, Refusal>,
    /// Options that people set on a Node, this one or another, and that cannot be used. They
    /// count as not set and cost nothing else.
    pub ignored: BTreeMap<NodeName, Vec<Refusal>>,
    /// Seconds between keepalives that an operator set on this node's own Node.
    pub persistent_keepalive: Option<u16>,
}

/// Why a complete set of Nodes cannot be true, so that the former one is kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Implausible {
    /// A list without any Node, while this agent runs on one.
    #[error("the API server listed no Node at all; keeping the peers as they are")]
    Empty,
    /// A list without this node.
    #[error(
        "the API server's list lacks this node, {name}; keeping the peers as they are \
         (if the Node was deleted, restart its kubelet to register it again)"
    )]
    OwnNodeMissing {
        /// This node.
        name: NodeName,
    },
}

/// Whether a complete set of Nodes can be believed. An agent that runs on a Node knows of at
/// least one, and acting on less would take the whole mesh down.
///
/// # Errors
/// What is wrong; the caller keeps the records it had.
pub fn plausible(
    records: &BTreeMap<NodeName, NodeRecord>,
    own_name: &str,
) -> Result<(), Implausible> {
    if records.is_empty() {
        Err(Implausible::Empty)
    } else if !records.contains_key(own_name) {
        Err(Implausible::OwnNodeMissing { name: own_name.to_owned() })
    } else {
        Ok(())
    }
}

/// Addresses of Nodes that host-gw would send to, if the kernel reaches them without a router.
pub fn next_hops(local: &Local, records: &BTreeMap<NodeName, NodeRecord>) -> BTreeSet<IpAddr> {
    if !local.transports.contains(&Transport::HostGw) {
        return BTreeSet::new();
    }
    let others = records.values().filter(|record| record.name != local.name);
    let nodes = others.filter_map(|record| Node::parse(record, local).ok());
    let candidates = nodes.filter(|node| node.transports.contains(&Transport::HostGw));
    candidates.flat_map(|node| pair::next_hops(local, &node)).flatten().collect()
}

/// Remembers the last good state of every peer, so that a Node that turns bad keeps working
/// as it was and an incumbent cannot be pushed out by a claimant.
#[derive(Debug, Default)]
pub struct Topology {
    incumbents: BTreeMap<NodeName, Node>,
    /// Peers that a former agent left in the devices, until the Nodes are known.
    recovered: Vec<Recovered>,
    /// Whether the kernel has routes to peers that it does not tell enough of.
    partial: bool,
    /// Incumbents of whose generation only the parity is known.
    parity_only: BTreeSet<NodeName>,
}

impl Topology {
    /// Nothing known yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in what an agent that starts finds in the kernel. The peers there are incumbents:
    /// whoever holds a key or a pod CIDR keeps it over a restart. `known` are the secrets for
    /// preshared keys that this node knows, the oldest first.
    pub fn recover(&mut self, observed: &Observed, known: &[SecretId]) {
        self.recovered = recovered::recover(observed, known);
        let mut used = observed.routes.values().filter_map(|route| Transport::of(route.next_hop));
        self.partial = used.any(|transport| !transport.is_encrypted());
    }

    /// The peers that were found in the kernel, for as long as no Node is known. None where
    /// some are reached in clear: those have left no key there, and a mesh without them would
    /// take their routes away.
    pub fn recovered(&self) -> Mesh {
        let recovered = self.recovered.iter().filter(|_| !self.partial);
        let peers = recovered.map(Recovered::unnamed);
        Mesh { peers: peers.map(|node| (node.name.clone(), node)).collect(), ..Mesh::default() }
    }

    /// Resolves the complete set of Nodes. Nodes that are missing, or that were made again
    /// under another UID, are forgotten.
    ///
    /// Incumbents are served first. Between Nodes that were not known before, the one made
    /// first wins, then the one whose name sorts first.
    pub fn resolve(&mut self, local: &Local, records: &BTreeMap<NodeName, NodeRecord>) -> Mesh {
        self.name_recovered(local, records);
        let mut mesh = Mesh::default();
        let mut resolution = self.keep(local, records);
        let (mut known, mut unknown) = (Vec::new(), Vec::new());
        for (name, record) in records {
            if *name == local.name {
                let is_set = record.annotations.contains_key(CONFIG_PERSISTENT_KEEPALIVE);
                mesh.persistent_keepalive = local.persistent_keepalive;
                let mut ignored = Vec::new();
                match persistent_keepalive(record, &local.prefix) {
                    Ok(seconds) if is_set => mesh.persistent_keepalive = seconds,
                    Ok(_) => {}
                    Err(problem) => ignored.push(problem),
                }
                ignored.extend(rotate(record, &local.prefix).err());
                if !ignored.is_empty() {
                    mesh.ignored.insert(name.clone(), ignored);
                }
                continue;
            }
            match resolution.candidate(name, record) {
                Ok(node) if resolution.accepted.contains_key(name) => known.push((name, node)),
                Ok(node) => unknown.push((name, node)),
                Err(refusal) => _ = mesh.refused.insert(name.clone(), refusal),
            }
        }
        unknown.sort_by_key(|(name, node)| (node.created, *name));
        mesh.refused.extend(resolution.settle(known));
        mesh.refused.extend(resolution.settle(unknown));

        self.incumbents = resolution.accepted;
        self.parity_only = resolution.parity_only;
        for (name, node) in &self.incumbents {
            if !node.ignored.is_empty() {
                mesh.ignored.insert(name.clone(), node.ignored.clone());
            }
            if !preshared::is_protected(local, node) {
                mesh.refused.entry(name.clone()).or_insert(Refusal::NoPresharedKey);
            }
            match pair::transport(local, node) {
                Ok(_) => _ = mesh.peers.insert(name.clone(), node.clone()),
                Err(refusal) => _ = mesh.refused.entry(name.clone()).or_insert(refusal),
            }
        }
        mesh
    }

    /// Finds the Nodes of the peers that were found in the kernel, once.
    fn name_recovered(&mut self, local: &Local, records: &BTreeMap<NodeName, NodeRecord>) {
        let recovered = std::mem::take(&mut self.recovered);
        for (name, node) in recovered::incumbents(&recovered, local, records) {
            self.parity_only.insert(name.clone());
            self.incumbents.insert(name, node);
        }
    }

    /// The incumbents that are still there and do not claim what this node itself has.
    fn keep<'a>(
        &mut self,
        local: &'a Local,
        records: &BTreeMap<NodeName, NodeRecord>,
    ) -> Resolution<'a> {
        let mut claims = Claims::new(local);
        let mut accepted = BTreeMap::new();
        for (name, node) in std::mem::take(&mut self.incumbents) {
            let same = records.get(&name).is_some_and(|record| record.uid == node.uid);
            if same && name != local.name && claims.claim(&name, &node).is_ok() {
                accepted.insert(name, node);
            }
        }
        let parity_only = std::mem::take(&mut self.parity_only);
        Resolution { local, claims, accepted, parity_only }
    }
}

/// One resolution under way.
struct Resolution<'a> {
    local: &'a Local,
    claims: Claims<'a>,
    accepted: BTreeMap<NodeName, Node>,
    parity_only: BTreeSet<NodeName>,
}

impl Resolution<'_> {
    /// The newest state of a Node, as far as it can be judged alone.
    fn candidate(&self, name: &NodeName, record: &NodeRecord) -> Result<Node, Refusal> {
        let incumbent = self.accepted.get(name);
        let node = match (Node::parse(record, self.local), incumbent) {
            (Err(Refusal::NoKey), Some(_)) => return Err(Refusal::KeyGone),
            (parsed, _) => parsed?,
        };
        // One that never had a preshared key goes on without, and can get one so.
        let had_none = incumbent.is_some_and(|known| known.secret.or(known.next_secret).is_none());
        if !had_none && !preshared::is_protected(self.local, &node) {
            return Err(Refusal::NoPresharedKey);
        }
        match incumbent {
            Some(known)
                if node.generation < known.generation
                    && !node.flannel
                    && !self.parity_only.contains(name) =>
            {
                Err(Refusal::GenerationBack {
                    annotation: annotation::key(&self.local.prefix, annotation::KEY_GENERATION),
                    published: node.generation,
                    known: known.generation,
                })
            }
            _ => Ok(node),
        }
    }

    /// Accepts every candidate whose claims are free, and again while that frees something
    /// for another: one Node may hand a subnet to the next in the same set.
    fn settle(&mut self, mut candidates: Vec<(&NodeName, Node)>) -> BTreeMap<NodeName, Refusal> {
        loop {
            let (mut refused, mut waiting) = (BTreeMap::new(), Vec::new());
            let before = candidates.len();
            for (name, node) in candidates {
                match self.replace(name, &node) {
                    Ok(()) => {
                        self.parity_only.remove(name);
                        self.accepted.insert(name.clone(), node);
                    }
                    Err(refusal) => {
                        refused.insert(name.clone(), refusal);
                        waiting.push((name, node));
                    }
                }
            }
            if waiting.is_empty() || waiting.len() == before {
                return refused;
            }
            candidates = waiting;
        }
    }

    /// Gives a node its new claims in place of those it held, which it keeps on refusal.
    fn replace(&mut self, name: &NodeName, node: &Node) -> Result<(), Refusal> {
        let Some(held) = self.accepted.get(name) else { return self.claims.claim(name, node) };
        self.claims.release(held);
        self.claims.claim(name, node).inspect_err(|_| {
            // What was just released is free, so that this cannot fail.
            let _ = self.claims.claim(name, held);
        })
    }
}
