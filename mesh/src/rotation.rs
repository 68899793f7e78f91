//! `key ring + Node + pairs + time -> next step` of replacing this node's key.
//!
//! ```text
//! keep     both keys are on disk                            (the agent, before all else)
//! stage    devices for the new key, every peer on them      (transport::desired)
//! say      next-public-key                                  peers make theirs
//! prove    a handshake with each peer under the new key     (live)
//! flip     each end sends by the new key as soon as it sees that
//! drain    nothing has come under the old key for 5 s
//! promote  public-key and key-generation are the new one's  peers drop the old one
//! retire   old devices, old key on disk and in memory
//! ```
//!
//! The key ring and the Node together say where it stands, so that a restart goes on. What is
//! kept here are times: what was received when, to tell a peer that still uses the old key,
//! which is waited for, from one that is away, which is not.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use gambeson_keys::{Generation, PublicKey};
use ipnet::IpNet;

use crate::NodeName;
use crate::live::{self, Keys, Pairs};
use crate::node::{Local, Node, NodeRecord, Transport, annotation};
use crate::observed::Observed;
use crate::pair;
use crate::topology::Mesh;

mod request;
#[cfg(test)]
mod tests;

pub use request::{Cause, REVOKE, Request, due_at, requested};

/// How long nothing may have come under the old key.
const DRAIN: Duration = Duration::from_secs(5);
/// A peer of which nothing was heard for this long is away. One that is not answers a probe at
/// the latest with WireGuard's passive keepalive after 10 s (section 6.5 of the paper), or after
/// 5 s more, where a handshake was lost.
const AWAY: Duration = Duration::from_secs(20);
/// A peer that is waited for longer than this holds the rotation up.
const PATIENCE: Duration = Duration::from_secs(15);
/// How often to look for what is about to happen, and at the counters meanwhile.
const LOOK: Duration = Duration::from_millis(200);
const COUNT: Duration = Duration::from_secs(1);
/// How often a peer is asked for a sign of life.
const PROBE: Duration = Duration::from_secs(2);

/// What a step works on.
#[derive(Debug, Clone, Copy)]
pub struct Sight<'a> {
    /// The peers.
    pub mesh: &'a Mesh,
    /// This node.
    pub local: &'a Local,
    /// Which sessions are live.
    pub pairs: &'a Pairs,
    /// What the devices have counted.
    pub observed: &'a Observed,
    /// This node's own Node, as others read it.
    pub own: &'a NodeRecord,
    /// The request that the newest key answers.
    pub answered: Option<&'a str>,
    /// Whether it was made so that the older one goes at once.
    pub revoke: bool,
    /// What is due without a request.
    pub due: Option<Cause>,
    /// Now.
    pub now: Instant,
}

/// What the agent has to do with its keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Task {
    /// Nothing.
    None,
    /// Make the next key, and keep both.
    Add(Request),
    /// Drop all but the newest.
    Retire,
}

/// Where a rotation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The Node does not say the next key yet.
    Say,
    /// Peers move to the new key.
    Move,
    /// The Node does not say yet that the new key is the one in use.
    Promote,
    /// The old key goes.
    Retire,
}

/// Why a peer is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// It has not completed a handshake with the new key.
    Handshake,
    /// It still sends under the old one, or did until just now.
    Drain,
}

/// A rotation under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Generation of the old key.
    pub from: Generation,
    /// Generation of the new one.
    pub to: Generation,
    /// Where it stands.
    pub step: Step,
    /// Whether the old key goes without waiting for anybody.
    pub revoke: bool,
    /// Since when this process knows of it.
    pub since: Instant,
    /// Peers with WireGuard.
    pub peers: usize,
    /// Those that have left the old key.
    pub moved: usize,
    /// Those that are waited for.
    pub waiting: BTreeMap<NodeName, Wait>,
    /// Those that do not answer, and are not waited for.
    pub away: BTreeSet<NodeName>,
    /// Whether some are waited for that should have moved by now.
    pub blocked: bool,
}

/// Moves through rotations of this node's key.
#[derive(Debug, Default)]
pub struct Rotation {
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    progress: Progress,
    tracks: BTreeMap<NodeName, Track>,
    /// Since when the Node has said the new key, as far as this process has seen.
    said: Option<Instant>,
    probed: Option<Instant>,
}

/// What was received of a peer.
#[derive(Debug, Clone)]
struct Track {
    /// Bytes by session.
    received: BTreeMap<Keys, u64>,
    /// When a session of the old key last received something.
    old: Instant,
    /// When any session did.
    any: Instant,
    /// Since when there is a live session of the new key.
    proven: Option<Instant>,
}

impl Rotation {
    /// Goes on, and says what has to be done with the keys.
    pub fn follow(&mut self, sight: &Sight<'_>) -> Task {
        let mut generations = sight.local.keys.keys().copied();
        let (Some(old), new) = (generations.next(), generations.next()) else {
            return Task::None;
        };
        match new {
            Some(new) => self.go_on(sight, old, new),
            None => {
                self.running = None;
                let is_ready = says_only(sight, old) && has_room(sight, old);
                let request = request::next(sight).filter(|_| is_ready);
                request.map_or(Task::None, Task::Add)
            }
        }
    }

    /// Nodes that hold up the start of a rotation that is wanted: Flannel drives them, and they
    /// cannot follow.
    pub fn held_up<'a>(&self, sight: &Sight<'a>) -> impl Iterator<Item = &'a NodeName> {
        request::held_up(sight).filter(|_| self.running.is_none())
    }

    /// Whether the Node is to say that the new key is the one in use.
    pub fn is_promoted(&self) -> bool {
        self.progress()
            .is_some_and(|progress| matches!(progress.step, Step::Promote | Step::Retire))
    }

    /// The rotation under way.
    pub fn progress(&self) -> Option<&Progress> {
        self.running.as_ref().map(|running| &running.progress)
    }

    /// When to look again, while one is under way.
    pub fn next_look(&self, now: Instant) -> Option<Duration> {
        self.running.as_ref().map(|running| running.next_look(now))
    }

    /// Addresses of peers to send a packet to, each time they are due: the answer shows that a
    /// peer is there, and under which key it sends.
    pub fn probes(&mut self, sight: &Sight<'_>) -> Vec<IpAddr> {
        let Some(running) = &mut self.running else { return Vec::new() };
        let is_due = running.probed.is_none_or(|last| sight.now.duration_since(last) >= PROBE);
        if !is_due || running.progress.step != Step::Move {
            return Vec::new();
        }
        running.probed = Some(sight.now);
        let Progress { waiting, away, .. } = &running.progress;
        let asked = waiting.keys().chain(away);
        let nodes = asked.filter_map(|name| sight.mesh.peers.get(name));
        nodes.filter_map(|node| node.pod_cidrs.first().map(IpNet::network)).collect()
    }

    fn go_on(&mut self, sight: &Sight<'_>, old: Generation, new: Generation) -> Task {
        let running = match self.running.take() {
            Some(running) if running.progress.to == new => running,
            _ => Running::new(old, new, sight.now),
        };
        let running = self.running.insert(running);
        running.progress.revoke = request::is_revoked(sight);
        running.look_at_peers(sight);
        running.progress.step = running.step(sight);
        match running.progress.step {
            // Whoever came back in between is waited for again.
            Step::Retire if running.may_end() => Task::Retire,
            _ => Task::None,
        }
    }
}

impl Running {
    fn new(from: Generation, to: Generation, since: Instant) -> Self {
        let progress = Progress {
            from,
            to,
            step: Step::Say,
            revoke: false,
            since,
            peers: 0,
            moved: 0,
            waiting: BTreeMap::new(),
            away: BTreeSet::new(),
            blocked: false,
        };
        Self { progress, tracks: BTreeMap::new(), said: None, probed: None }
    }

    fn step(&mut self, sight: &Sight<'_>) -> Step {
        let Progress { to, step, revoke, .. } = self.progress;
        if published_generation(sight.own).is_some_and(|published| published >= to) {
            self.said.get_or_insert(sight.now);
            return Step::Retire;
        }
        // Once it was decided, the Node may say so at any moment: there is no way back.
        if step == Step::Promote || revoke {
            return Step::Promote;
        }
        let next = sight.own.annotations.get(annotation::NEXT_PUBLIC_KEY);
        if next != sight.local.keys.get(&to).map(PublicKey::to_string).as_ref() {
            self.said = None;
            return Step::Say;
        }
        let said = *self.said.get_or_insert(sight.now);
        self.progress.blocked =
            !self.progress.waiting.is_empty() && sight.now.duration_since(said) >= PATIENCE;
        if self.may_end() { Step::Promote } else { Step::Move }
    }

    fn next_look(&self, now: Instant) -> Duration {
        let Progress { step, waiting, .. } = &self.progress;
        let handshake = waiting.values().any(|wait| *wait == Wait::Handshake);
        if *step != Step::Move || (handshake && !self.progress.blocked) {
            return LOOK;
        }
        // When the last peer will have been quiet for long enough, if nothing comes.
        let quiet = self.tracks.values().filter_map(Track::quiet_since).max();
        let left = quiet.map_or(COUNT, |since| (since + DRAIN).saturating_duration_since(now));
        left.clamp(LOOK, COUNT)
    }

    fn may_end(&self) -> bool {
        self.progress.revoke || self.progress.waiting.is_empty()
    }

    fn look_at_peers(&mut self, sight: &Sight<'_>) {
        let wireguard = |node: &&Node| {
            pair::transport(sight.local, node) == Ok(Transport::Wireguard) && !node.flannel
        };
        let nodes: Vec<_> = sight.mesh.peers.values().filter(wireguard).collect();
        self.tracks.retain(|name, _| nodes.iter().any(|node| node.name == *name));
        let progress = &mut self.progress;
        (progress.peers, progress.moved) = (nodes.len(), 0);
        progress.waiting.clear();
        progress.away.clear();
        // Before the Node says the new key nobody is asked for a sign of life.
        let asked = self.said.unwrap_or(sight.now);
        for node in nodes {
            let track = Track::go_on(self.tracks.remove(&node.name), node, progress.to, sight);
            match track.wait(sight.now) {
                None => progress.moved += 1,
                Some(_) if sight.now.duration_since(track.any.max(asked)) >= AWAY => {
                    progress.away.insert(node.name.clone());
                }
                Some(wait) => _ = progress.waiting.insert(node.name.clone(), wait),
            }
            self.tracks.insert(node.name.clone(), track);
        }
    }
}

impl Track {
    fn go_on(before: Option<Self>, node: &Node, to: Generation, sight: &Sight<'_>) -> Self {
        let now = sight.now;
        let sessions = live::sessions(sight.local, node);
        let counted = sessions.filter_map(|(keys, key)| {
            Some((keys, live::peer(sight.local, sight.observed, keys, &key)?.rx_bytes))
        });
        let received: BTreeMap<_, _> = counted.collect();
        let live = sight.pairs.get(&node.name).and_then(|pair| pair.live.last());
        let is_proven = live.is_some_and(|keys| keys.own == to);
        let Some(before) = before else {
            return Self { received, old: now, any: now, proven: is_proven.then_some(now) };
        };
        // Sessions come and go with the peer's own keys: each counter by itself.
        let grown = |(keys, bytes): (&Keys, &u64)| {
            (before.received.get(keys).copied().unwrap_or(0) < *bytes).then_some(*keys)
        };
        let grown: Vec<_> = received.iter().filter_map(grown).collect();
        Self {
            old: if grown.iter().any(|keys| keys.own != to) { now } else { before.old },
            any: if grown.is_empty() { before.any } else { now },
            proven: is_proven.then(|| before.proven.unwrap_or(now)),
            received,
        }
    }

    /// What is still to happen before the peer has left the old key.
    fn wait(&self, now: Instant) -> Option<Wait> {
        let Some(quiet) = self.quiet_since() else { return Some(Wait::Handshake) };
        (now.duration_since(quiet) < DRAIN).then_some(Wait::Drain)
    }

    /// Since when nothing has come under the old key, once there is a session of the new one.
    fn quiet_since(&self) -> Option<Instant> {
        self.proven.map(|proven| proven.max(self.old))
    }
}

/// Whether the devices that the next key will have are gone, if a former one had them: under
/// another key they would still tell of the handshakes of before.
fn has_room(sight: &Sight<'_>, newest: Generation) -> bool {
    let devices = sight.observed.links.keys().filter_map(|device| device.session());
    devices.into_iter().all(|session| session.own_parity() == newest.parity())
}

fn published_generation(own: &NodeRecord) -> Option<Generation> {
    let text = own.annotations.get(annotation::KEY_GENERATION)?;
    text.parse().ok().map(Generation::new)
}

/// Whether the Node says this key and no other: what was done before has been seen by others.
fn says_only(sight: &Sight<'_>, generation: Generation) -> bool {
    let says = |name: &str| sight.own.annotations.get(name);
    published_generation(sight.own) == Some(generation)
        && says(annotation::NEXT_PUBLIC_KEY).is_none()
        && says(annotation::PUBLIC_KEY)
            == sight.local.keys.get(&generation).map(PublicKey::to_string).as_ref()
}
