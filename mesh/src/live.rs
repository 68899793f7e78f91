//! `Mesh + Local + Observed -> Sessions in use`: the newest live session of each pair.
//!
//! While a key is replaced, a pair has a session for each pair of keys, on devices of their own
//! ([`crate::session`]). A session is live once its handshake has completed; packets go by the
//! newest that is, by the own generation and then by the peer's. Nothing else decides, so that
//! neither end has to agree on anything with the other: what either sends by, the other has.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use gambeson_keys::{Generation, PublicKey};

use crate::NodeName;
use crate::node::{Local, Node};
use crate::observed::{Observed, ObservedPeer};
use crate::session::Session;
use crate::topology::Mesh;

#[cfg(test)]
mod tests;

/// How often to look for a handshake, of which the kernel says nothing.
const LOOK: Duration = Duration::from_millis(200);
/// How long that goes on for one pair; after it, whatever wakes the agent tells as well.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a pair whose sessions are gone is woken: the other end does not know that they are.
const WAKING: Duration = Duration::from_secs(30);

/// A session by the generations of its keys. The greater is the newer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Keys {
    /// Of this node's key.
    pub own: Generation,
    /// Of the peer's.
    pub theirs: Generation,
}

/// What is known of a pair's sessions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pair {
    /// Those with a completed handshake.
    pub live: BTreeSet<Keys>,
    /// Whether there were some, and the devices that had them are gone.
    pub lost: bool,
}

/// The pairs by the peer's name.
pub type Pairs = BTreeMap<NodeName, Pair>;

/// Every session that a pair has, with the peer's key.
pub fn sessions<'a>(
    local: &'a Local,
    node: &'a Node,
) -> impl Iterator<Item = (Keys, PublicKey)> + 'a {
    let own = local.keys.keys();
    own.flat_map(move |own| {
        peer_keys(node).map(move |(theirs, key)| (Keys { own: *own, theirs }, key))
    })
}

fn peer_keys(node: &Node) -> impl Iterator<Item = (Generation, PublicKey)> {
    let next = node.generation.next().zip(node.next_public_key);
    node.public_key.map(|key| (node.generation, key)).into_iter().chain(next)
}

/// The session that packets go by: the newest live one, or before there is any the one whose
/// keys both Nodes say are in use.
pub fn used(local: &Local, node: &Node, pair: Option<&Pair>) -> Option<Keys> {
    let has_key = |keys: &&Keys| local.keys.contains_key(&keys.own);
    let newest = pair.and_then(|pair| pair.live.iter().rfind(has_key).copied());
    newest.or_else(|| Some(Keys { own: local.current_key()?.0, theirs: node.generation }))
}

/// The peer as the device of a session has it, if that device has our key.
pub fn peer<'a>(
    local: &Local,
    observed: &'a Observed,
    keys: Keys,
    key: &PublicKey,
) -> Option<&'a ObservedPeer> {
    let device = Session::between(keys.own, keys.theirs).device();
    let link = observed.links.get(&device).filter(|link| link.is_ours())?;
    let state = link.wireguard.as_ref()?;
    let has_key = state.public_key.as_ref() == local.keys.get(&keys.own);
    state.peers.get(key).filter(|_| has_key)
}

/// Remembers since when the pairs wait for a handshake.
#[derive(Debug, Default)]
pub struct Liveness {
    waiting: BTreeMap<NodeName, Instant>,
    /// Peers that had a session.
    met: BTreeSet<NodeName>,
    /// Since when the sessions of a peer are gone.
    lost: BTreeMap<NodeName, Instant>,
}

impl Liveness {
    /// Reads off the devices which sessions are live.
    pub fn follow(
        &mut self,
        mesh: &Mesh,
        local: &Local,
        observed: &Observed,
        now: Instant,
    ) -> Pairs {
        self.met.retain(|name| mesh.peers.contains_key(name));
        self.lost.retain(|name, _| mesh.peers.contains_key(name));
        self.waiting.retain(|name, _| mesh.peers.contains_key(name));
        let peers = mesh.peers.iter();
        peers.map(|(name, node)| (name.clone(), self.pair(local, node, observed, now))).collect()
    }

    fn pair(&mut self, local: &Local, node: &Node, observed: &Observed, now: Instant) -> Pair {
        let name = &node.name;
        let is_live = |(keys, key): &(Keys, PublicKey)| {
            peer(local, observed, *keys, key).is_some_and(|peer| peer.handshake_age.is_some())
        };
        let live = sessions(local, node).filter(is_live).map(|(keys, _)| keys).collect();
        let mut pair = Pair { live, lost: false };
        if !pair.live.is_empty() {
            self.met.insert(name.clone());
            self.lost.remove(name);
        } else if self.met.contains(name) {
            let since = *self.lost.entry(name.clone()).or_insert(now);
            pair.lost = now.duration_since(since) < WAKING;
        }
        let used = used(local, node, Some(&pair));
        if pair.lost || sessions(local, node).any(|(keys, _)| Some(keys) > used) {
            self.waiting.entry(name.clone()).or_insert(now);
        } else {
            self.waiting.remove(name);
        }
        pair
    }

    /// When to look again, while there is a handshake to wait for.
    pub fn next_look(&self, now: Instant) -> Option<Duration> {
        let mut waiting = self.waiting.values();
        waiting.any(|since| now.duration_since(*since) < PATIENCE).then_some(LOOK)
    }
}
