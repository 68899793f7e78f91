//! What starts a rotation.

use std::time::Duration;

use gambeson_keys::PublicKey;

use super::Sight;
use crate::NodeName;
use crate::node::{self, Node, NodeRecord, Transport};
use crate::pair;

/// A request that begins so retires the old key at once, whoever still uses it.
pub const REVOKE: &str = "revoke";

/// Why a node gets a new key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Somebody asked for it on the Node.
    Request,
    /// The key is as old as it may get.
    Age,
    /// The cluster has another secret for preshared keys.
    Secret,
    /// An older version of this program serves its devices.
    Upgrade,
}

/// A rotation to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Why.
    pub cause: Cause,
    /// What the Node asks for now, if anything: the new key answers it.
    pub text: Option<String>,
    /// Whether the old key is to go at once.
    pub revoke: bool,
}

/// What a Node asks for: nothing if it is too long, which the topology reports.
pub fn requested(own: &NodeRecord) -> Option<&str> {
    node::rotate(own, "").ok().flatten()
}

/// The rotation that is to start now.
pub(super) fn next(sight: &Sight<'_>) -> Option<Request> {
    wanted(sight).filter(|_| cannot_follow(sight).next().is_none())
}

/// Nodes that hold up the start of one that is wanted.
pub(super) fn held_up<'a>(sight: &Sight<'a>) -> impl Iterator<Item = &'a NodeName> {
    let is_wanted = wanted(sight).is_some();
    cannot_follow(sight).filter(move |_| is_wanted)
}

fn wanted(sight: &Sight<'_>) -> Option<Request> {
    let new = new_text(sight);
    let cause = if new.is_some() { Some(Cause::Request) } else { sight.due };
    let revoke = new.is_some_and(|text| text.starts_with(REVOKE));
    let text = new.or(sight.answered).map(str::to_owned);
    cause.map(|cause| Request { cause, text, revoke })
}

/// Flannel replaces a key in one place, and knows one port: it cannot follow.
fn cannot_follow<'a>(sight: &Sight<'a>) -> impl Iterator<Item = &'a NodeName> {
    let local = sight.local;
    let encrypted = |node: &&Node| pair::transport(local, node) == Ok(Transport::Wireguard);
    let flannels = sight.mesh.peers.values().filter(|node| node.flannel);
    flannels.filter(encrypted).map(|node| &node.name)
}

/// The age at which a key is replaced that may get this old: up to a tenth less, the same for the
/// same key.
pub fn due_at(every: Duration, key: &PublicKey) -> Duration {
    let earlier = u32::from(key.as_bytes()[0]) + 256 * u32::from(key.as_bytes()[1] % 4);
    every - every / 10 * earlier / 1024
}

/// Whether the old key may do harm: what asked for the new one, or has come since, says so.
pub(super) fn is_revoked(sight: &Sight<'_>) -> bool {
    sight.revoke || new_text(sight).is_some_and(|text| text.starts_with(REVOKE))
}

/// What the Node asks for and has not got yet.
fn new_text<'a>(sight: &Sight<'a>) -> Option<&'a str> {
    requested(sight.own).filter(|text| Some(*text) != sight.answered)
}
