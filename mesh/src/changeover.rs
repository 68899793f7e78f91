//! `Mesh + Local + Observed + time -> Changes`: a pair whose transport changes keeps the old one
//! until the new one works.
//!
//! Both ends come to the same transport from the same two Nodes, but not at the same moment, and
//! neither knows when the other did. So each first takes packets from both ways, then sends by
//! the new one, then shuts the old one:
//!
//! ```text
//!        both Nodes say so     3 s, or the handshake             30 s later
//! send   old ------------------| new ------------------------------------>
//! take   old and new ---------------------------------------------| new
//! ```
//!
//! A way in clear is kept no longer than both nodes list it. Which way a pair uses now is read
//! from the kernel's routes, so that an agent that starts goes on where the last one stood.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::NodeName;
use crate::desired::{PEER_ROUTE_METRIC, RouteKey};
use crate::family::Family;
use crate::health::PeerState;
use crate::live;
use crate::node::{Local, Node, NodeRecord, Transport, annotation};
use crate::observed::{Observed, ObservedLink};
use crate::pair;
use crate::session::DeviceName;
use crate::topology::Mesh;

#[cfg(test)]
mod tests;

/// How long the other node may take to see both Nodes and take packets from the new way.
const SEEN_BY_ALL: Duration = Duration::from_secs(3);
/// How long WireGuard has for its first handshake; the pair is to be encrypted all the same.
const HANDSHAKE: Duration = Duration::from_secs(30);
/// How long the old way is still open after this node's packets left it.
const DRAIN: Duration = Duration::from_secs(30);
/// How often to look for the handshake, of which the kernel says nothing.
const LOOK: Duration = Duration::from_millis(200);

/// Pairs whose transport is changing, by the peer. All others use [`pair::transport`].
pub type Changes = BTreeMap<NodeName, Change>;

/// The transport of a pair, from one to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// The old one, which packets are still taken from.
    pub from: Transport,
    /// The new one, which packets are already taken from.
    pub to: Transport,
    /// Whether packets are sent by the new one.
    pub moved: bool,
}

impl Change {
    /// What packets are sent by.
    pub fn sends_by(self) -> Transport {
        if self.moved { self.to } else { self.from }
    }

    /// Whether a handshake is what it waits for.
    pub fn awaits_handshake(self) -> bool {
        !self.moved && self.to == Transport::Wireguard
    }
}

/// Remembers when what happened to the pairs that are changing.
#[derive(Debug, Default)]
pub struct Changeover {
    steps: BTreeMap<NodeName, Step>,
    /// Whether the other nodes could know, at the last look.
    announced: bool,
}

#[derive(Debug, Clone, Copy)]
struct Step {
    from: Transport,
    to: Transport,
    /// Since when the other node can know.
    since: Instant,
    /// Since when packets are sent by the new one.
    moved: Option<Instant>,
}

/// Whether other nodes can see what this one accepts: its own Node, as they read it, says so.
pub fn is_announced(local: &Local, own: &NodeRecord) -> bool {
    own.annotations.get(annotation::TRANSPORTS) == Some(&Transport::list(&local.transports))
}

impl Changeover {
    /// Goes on with every pair. `announced` is [`is_announced`]; before that no peer can follow,
    /// and none is left behind.
    pub fn follow(
        &mut self,
        mesh: &Mesh,
        local: &Local,
        observed: &Observed,
        announced: bool,
        now: Instant,
    ) -> Changes {
        self.announced = announced;
        let before = std::mem::take(&mut self.steps);
        for (name, node) in &mesh.peers {
            let Ok(to) = pair::transport(local, node) else { continue };
            let step = match before.get(name) {
                Some(step) if step.to == to => Some(*step),
                Some(step) => step.turn(to, now),
                None => in_use(node, observed).and_then(|from| Step::new(from, to, now)),
            };
            let Some(mut step) = step.filter(|step| may_stay(step.from, local, node)) else {
                continue;
            };
            if !announced {
                step.since = now;
            }
            if step.moved.is_none() && step.is_over(local, node, observed, now) {
                step.moved = Some(now);
            }
            if step.moved.is_none_or(|moved| now.duration_since(moved) < DRAIN) {
                self.steps.insert(name.clone(), step);
            }
        }
        self.steps.iter().map(|(name, step)| (name.clone(), step.change())).collect()
    }

    /// When to go on, while there is something to wait for but the API server.
    pub fn next_look(&self, now: Instant) -> Option<Duration> {
        let due = self.steps.values().filter_map(|step| match step.moved {
            Some(moved) => Some(moved + DRAIN),
            None if !self.announced => None,
            None if step.change().awaits_handshake() => Some(now + LOOK),
            None => Some(step.since + SEEN_BY_ALL),
        });
        due.min().map(|due| due.saturating_duration_since(now).max(LOOK))
    }
}

impl Step {
    fn new(from: Transport, to: Transport, since: Instant) -> Option<Self> {
        (from != to).then_some(Self { from, to, since, moved: None })
    }

    /// Another transport is wanted in the middle of a change: from what is sent by now.
    fn turn(self, to: Transport, now: Instant) -> Option<Self> {
        match self.change().sends_by() {
            // Back to where it never left; the other node may have.
            from if from == to => Some(Self { from: self.to, to, since: now, moved: Some(now) }),
            from => Self::new(from, to, now),
        }
    }

    fn change(self) -> Change {
        Change { from: self.from, to: self.to, moved: self.moved.is_some() }
    }

    /// Whether the other node takes packets from the new transport, as far as can be known.
    fn is_over(self, local: &Local, node: &Node, observed: &Observed, now: Instant) -> bool {
        let waited = now.duration_since(self.since);
        match self.to {
            Transport::Wireguard => has_session(local, node, observed) || waited >= HANDSHAKE,
            Transport::HostGw => waited >= SEEN_BY_ALL,
            Transport::Vxlan => waited >= SEEN_BY_ALL && has_devices(local, node, observed),
        }
    }
}

/// What the route to a node's pods leads through.
fn in_use(node: &Node, observed: &Observed) -> Option<Transport> {
    node.pod_cidrs.iter().find_map(|destination| {
        let key = RouteKey { destination: *destination, metric: PEER_ROUTE_METRIC };
        Transport::of(observed.routes.get(&key)?.next_hop)
    })
}

/// What is encrypted may stay whatever the nodes list; what is not, only while both do.
fn may_stay(transport: Transport, local: &Local, node: &Node) -> bool {
    let listed = local.transports.contains(&transport) && node.transports.contains(&transport);
    (transport.is_encrypted() || listed) && pair::is_possible(local, node, transport)
}

fn has_session(local: &Local, node: &Node, observed: &Observed) -> bool {
    live::sessions(local, node).any(|(keys, key)| {
        let peer = live::peer(local, observed, keys, &key);
        peer.is_some_and(|peer| PeerState::new(peer.handshake_age) == PeerState::Up)
    })
}

fn has_devices(local: &Local, node: &Node, observed: &Observed) -> bool {
    let pods = node.pod_cidrs.iter().map(Family::of_net);
    let families = pods.filter_map(|pods| pair::vxlan_family(local, node, pods));
    let is_up = |link: &ObservedLink| link.is_ours() && link.up;
    let mut devices = families.map(|family| observed.links.get(&DeviceName::Vxlan(family)));
    devices.all(|link| link.is_some_and(is_up))
}
