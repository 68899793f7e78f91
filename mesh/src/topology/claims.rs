//! Who owns which public key and which pod subnet.

use std::collections::BTreeMap;
use std::net::IpAddr;

use gambeson_keys::PublicKey;
use ipnet::IpNet;

use crate::NodeName;
use crate::node::{Local, Node, Refusal, annotation, excerpt, overlap};

/// Keys and subnets with one owner each. Subnets in it never overlap, so that the only one
/// that can overlap a prefix is the last that starts at or before the prefix's end.
#[derive(Debug)]
pub(super) struct Claims<'a> {
    local: &'a Local,
    keys: BTreeMap<PublicKey, NodeName>,
    subnets: BTreeMap<IpAddr, (IpNet, NodeName)>,
}

impl<'a> Claims<'a> {
    /// This node's own claims, which nobody takes.
    pub(super) fn new(local: &'a Local) -> Self {
        let subnet = |cidr: &IpNet| (cidr.network(), (*cidr, local.name.clone()));
        let subnets = local.pod_cidrs.iter().map(subnet).collect();
        Self { local, keys: BTreeMap::new(), subnets }
    }

    /// Gives a node what it asks for, all or nothing.
    pub(super) fn claim(&mut self, name: &NodeName, node: &Node) -> Result<(), Refusal> {
        self.check(node)?;
        for (_, key) in keys(node) {
            self.keys.insert(key, name.clone());
        }
        for cidr in &node.pod_cidrs {
            self.subnets.insert(cidr.network(), (*cidr, name.clone()));
        }
        Ok(())
    }

    /// Takes back what a node was given.
    pub(super) fn release(&mut self, node: &Node) {
        for (_, key) in keys(node) {
            self.keys.remove(&key);
        }
        for cidr in &node.pod_cidrs {
            self.subnets.remove(&cidr.network());
        }
    }

    fn check(&self, node: &Node) -> Result<(), Refusal> {
        for (annotation, key) in keys(node) {
            if self.local.keys.values().any(|own| *own == key) {
                let annotation = annotation::key(&self.local.prefix, annotation);
                return Err(Refusal::OwnKey { annotation });
            }
            if let Some(owner) = self.keys.get(&key) {
                let annotation = annotation::key(&self.local.prefix, annotation);
                return Err(Refusal::DuplicateKey { annotation, owner: excerpt(owner) });
            }
        }
        for cidr in &node.pod_cidrs {
            let before = self.subnets.range(..=cidr.broadcast()).next_back();
            if let Some((_, (other, owner))) = before.filter(|(_, (other, _))| overlap(other, cidr))
            {
                return Err(Refusal::Overlap { cidr: *cidr, other: *other, owner: excerpt(owner) });
            }
        }
        Ok(())
    }
}

fn keys(node: &Node) -> impl Iterator<Item = (&'static str, PublicKey)> {
    let next = node.next_public_key.map(|key| (annotation::NEXT_PUBLIC_KEY, key));
    std::iter::once((annotation::PUBLIC_KEY, node.public_key)).chain(next)
}
