//! Who owns which public key, which pod subnet and which VXLAN device.

use std::collections::BTreeMap;
use std::net::IpAddr;

use gambeson_keys::PublicKey;
use ipnet::IpNet;

use crate::NodeName;
use crate::family::Family;
use crate::mac::Mac;
use crate::node::{Local, Node, Refusal, Vteps, annotation, excerpt, overlap};

/// Keys, subnets and devices with one owner each. Subnets in it never overlap, so that the only one
/// that can overlap a prefix is the last that starts at or before the prefix's end.
#[derive(Debug)]
pub(super) struct Claims<'a> {
    local: &'a Local,
    keys: BTreeMap<PublicKey, NodeName>,
    subnets: BTreeMap<IpAddr, (IpNet, NodeName)>,
    vteps: BTreeMap<(Family, Mac), NodeName>,
}

impl<'a> Claims<'a> {
    /// This node's own claims, which nobody takes.
    pub(super) fn new(local: &'a Local) -> Self {
        let subnet = |cidr: &IpNet| (cidr.network(), (*cidr, local.name.clone()));
        let subnets = local.pod_cidrs.iter().map(subnet).collect();
        let vteps = vteps(local.vteps).map(|(_, vtep)| (vtep, local.name.clone())).collect();
        Self { local, keys: BTreeMap::new(), subnets, vteps }
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
        for (_, vtep) in vteps(node.vteps) {
            self.vteps.insert(vtep, name.clone());
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
        for (_, vtep) in vteps(node.vteps) {
            self.vteps.remove(&vtep);
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
        for (annotation, vtep) in vteps(node.vteps) {
            if let Some(owner) = self.vteps.get(&vtep) {
                let annotation = annotation::key(&self.local.prefix, annotation);
                return Err(Refusal::DuplicateVtep { annotation, owner: excerpt(owner) });
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
    node.public_key.map(|key| (annotation::PUBLIC_KEY, key)).into_iter().chain(next)
}

/// The devices of a node, each the only one with its address on its underlay.
fn vteps(vteps: Vteps) -> impl Iterator<Item = (&'static str, (Family, Mac))> {
    let annotations = [(annotation::VTEP_MAC, Family::V4), (annotation::VTEP_MAC_V6, Family::V6)];
    annotations
        .into_iter()
        .filter_map(move |(annotation, family)| Some((annotation, (family, vteps.get(family)?))))
}
