//! A cluster of agents over an API server that may be late, and a data path that may be cut.
//! After each single change of a kernel, every packet that can arrive must.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use gambeson_keys::{Generation, PublicKey, SecretId};
use ipnet::IpNet;
use proptest::prelude::Rng as _;
use proptest::test_runner::TestRng;

use crate::NodeName;
use crate::desired::{NextHop, PEER_ROUTE_METRIC, RouteKey};
use crate::fixtures::{local, record};
use crate::live::Liveness;
use crate::node::{Local, NodeRecord, annotation};
use crate::observed::{Observed, ObservedPeer};
use crate::plan::Plan;
use crate::rotation::{Cause, Rotation, Sight, Task};
use crate::session::DeviceName;
use crate::sim;
use crate::topology::Topology;
use crate::transport::{self, Paths};

/// Time between two looks of everybody.
pub(super) const TICK: Duration = Duration::from_millis(200);
/// Bytes of a handshake's messages, and of a packet.
const HANDSHAKE: u64 = 148;
const PACKET: u64 = 100;

/// What may go wrong, each as one of so many times; 0 is never.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Odds {
    /// A crash at each step of a pass.
    pub(super) crash: u32,
    /// An agent that is gone comes back, at each tick.
    pub(super) restart: u32,
    /// An event of the watch is late by another tick.
    pub(super) late: u32,
    /// A handshake is lost.
    pub(super) lost: u32,
}

/// One node: what outlives its agent, and the agent.
pub(super) struct Machine {
    pub(super) own: Local,
    pub(super) answered: Option<String>,
    pub(super) revoke: bool,
    /// The secret in the node's file.
    pub(super) secret: Option<SecretId>,
    pub(super) observed: Observed,
    /// Sessions by device and both keys, with a number that both ends have.
    sessions: BTreeMap<(DeviceName, PublicKey, PublicKey), u64>,
    agent: Option<Agent>,
    pub(super) api: bool,
    /// Whether its pods send, or only answer.
    pub(super) sends: bool,
}

struct Agent {
    topology: Topology,
    liveness: Liveness,
    rotation: Rotation,
    /// Nodes as the watch has told, none before the first list.
    records: Option<BTreeMap<NodeName, NodeRecord>>,
    found: bool,
}

pub(super) struct World {
    pub(super) machines: Vec<Machine>,
    pub(super) api: BTreeMap<NodeName, NodeRecord>,
    /// Pairs whose data path is cut.
    pub(super) cut: BTreeSet<(usize, usize)>,
    pub(super) odds: Odds,
    pub(super) now: Instant,
    rng: TestRng,
    next_session: u64,
    /// Packets must arrive from now on.
    pub(super) strict: bool,
}

fn key(node: usize, generation: Generation) -> PublicKey {
    let mut bytes = [9; 32];
    bytes[0] = u8::try_from(node).unwrap();
    bytes[1..9].copy_from_slice(&generation.number().to_le_bytes());
    PublicKey::from_bytes(bytes).unwrap()
}

impl Machine {
    fn new(index: usize, generation: u64) -> Self {
        let number = u8::try_from(index + 1).unwrap();
        let generation = Generation::new(generation);
        let keys = BTreeMap::from([(generation, key(index, generation))]);
        Self {
            own: Local { keys, ..local(number, 0) },
            answered: None,
            revoke: false,
            secret: None,
            observed: Observed::default(),
            sessions: BTreeMap::new(),
            agent: None,
            api: true,
            sends: true,
        }
    }

    pub(super) fn crash(&mut self) {
        self.agent = None;
    }

    pub(super) fn rotation(&self) -> Option<&Rotation> {
        self.agent.as_ref().map(|agent| &agent.rotation)
    }

    fn peers(&self, device: DeviceName) -> Option<(PublicKey, &BTreeMap<PublicKey, ObservedPeer>)> {
        let state = self.observed.links.get(&device)?.wireguard.as_ref()?;
        Some((state.public_key?, &state.peers))
    }

    /// The session by which packets to these pods leave: device, own key and peer's key.
    fn way_to(&self, pods: &IpNet) -> Option<(DeviceName, PublicKey, PublicKey)> {
        let route = RouteKey { destination: *pods, metric: PEER_ROUTE_METRIC };
        let NextHop::Device(device) = self.observed.routes.get(&route)?.next_hop else {
            return None;
        };
        let (own, peers) = self.peers(device)?;
        let (theirs, _) = peers.iter().find(|(_, peer)| peer.allowed_ips.contains(pods))?;
        Some((device, own, *theirs))
    }

    fn peer_mut(&mut self, device: DeviceName, peer: &PublicKey) -> Option<&mut ObservedPeer> {
        self.observed.links.get_mut(&device)?.wireguard.as_mut()?.peers.get_mut(peer)
    }

    /// The secret that the newest key is bound to.
    fn bound(&self) -> Option<SecretId> {
        let newest = self.own.keys.keys().last().unwrap();
        self.own.secrets.get(newest).copied()
    }

    fn grow_older(&mut self) {
        let states = self.observed.links.values_mut().filter_map(|link| link.wireguard.as_mut());
        for peer in states.flat_map(|state| state.peers.values_mut()) {
            peer.handshake_age = peer.handshake_age.map(|age| age + TICK);
        }
    }

    /// Sessions end with their device, its key, or the peer on it.
    fn forget_sessions(&mut self) {
        let observed = &self.observed;
        self.sessions.retain(|(device, own, theirs), _| {
            let state = observed.links.get(device).and_then(|link| link.wireguard.as_ref());
            state.is_some_and(|state| {
                state.public_key == Some(*own) && state.peers.contains_key(theirs)
            })
        });
    }
}

impl World {
    pub(super) fn new(generations: &[u64], odds: Odds, rng: TestRng) -> Self {
        let machines = generations.iter().enumerate();
        let machines: Vec<_> = machines.map(|(index, g)| Machine::new(index, *g)).collect();
        let api = machines.iter().map(|m| (m.own.name.clone(), record(&m.own))).collect();
        let now = Instant::now();
        let cut = BTreeSet::new();
        let mut world = Self {
            machines,
            api,
            cut,
            odds: Odds::default(),
            now,
            rng,
            next_session: 0,
            strict: false,
        };
        world.run(Duration::from_secs(4));
        world.strict = true;
        world.odds = odds;
        world
    }

    pub(super) fn chance(&mut self, odds: u32) -> bool {
        odds > 0 && self.rng.next_u32().is_multiple_of(odds)
    }

    pub(super) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.tick();
        }
    }

    /// Runs until `holds`, or gives up after `limit`.
    pub(super) fn run_until(&mut self, limit: Duration, holds: impl Fn(&Self) -> bool) -> Duration {
        let start = self.now;
        while !holds(self) {
            assert!(self.now - start < limit, "not within {limit:?}:\n{}", self.describe());
            self.tick();
        }
        self.now - start
    }

    pub(super) fn request(&mut self, index: usize, text: &str) {
        let record = self.api.get_mut(&self.machines[index].own.name).unwrap();
        record.annotations.insert(annotation::CONFIG_ROTATE.to_owned(), text.to_owned());
    }

    /// Whether a node has this key alone, and its Node says so.
    pub(super) fn has_settled(&self, index: usize, generation: u64) -> bool {
        let machine = &self.machines[index];
        let generation = Generation::new(generation);
        let said = &self.api[&machine.own.name].annotations;
        machine.own.keys.keys().eq([&generation])
            && said.get(annotation::KEY_GENERATION) == Some(&generation.to_string())
            && !said.contains_key(annotation::NEXT_PUBLIC_KEY)
            && machine.observed.links.len() <= 2
    }

    pub(super) fn tick(&mut self) {
        self.now += TICK;
        for machine in &mut self.machines {
            machine.grow_older();
        }
        for index in 0..self.machines.len() {
            self.deliver_events(index);
            self.pass(index);
        }
        self.shake_hands();
        for (from, to) in self.pairs() {
            if self.machines[from].sends {
                self.send(from, to);
            }
        }
    }

    fn pairs(&self) -> Vec<(usize, usize)> {
        let all = 0..self.machines.len();
        all.clone().flat_map(|a| all.clone().map(move |b| (a, b))).filter(|(a, b)| a != b).collect()
    }

    fn is_cut(&self, a: usize, b: usize) -> bool {
        self.cut.contains(&(a.min(b), a.max(b)))
    }

    fn deliver_events(&mut self, index: usize) {
        if self.machines[index].agent.is_none() && self.odds.restart > 0 {
            let back = self.chance(self.odds.restart);
            if !back {
                return;
            }
        }
        let names: Vec<_> = self.api.keys().cloned().collect();
        let late: Vec<bool> = names.iter().map(|_| self.chance(self.odds.late)).collect();
        let machine = &mut self.machines[index];
        let agent = machine.agent.get_or_insert_with(|| Agent {
            topology: Topology::new(),
            liveness: Liveness::default(),
            rotation: Rotation::default(),
            records: None,
            found: false,
        });
        if machine.api {
            let known = agent.records.get_or_insert_with(|| self.api.clone());
            for (name, _) in names.iter().zip(late).filter(|(_, late)| !late) {
                known.insert(name.clone(), self.api[name].clone());
            }
        }
    }

    /// One pass of an agent, in the order of the real one. It may end at each step.
    fn pass(&mut self, index: usize) {
        let now = self.now;
        let Some(mut agent) = self.machines[index].agent.take() else { return };
        let machine = &mut self.machines[index];
        if !agent.found {
            agent.topology.recover(&machine.observed, &machine.own.known_secrets);
            agent.found = true;
        }
        let own_name = machine.own.name.clone();
        let own = agent.records.as_ref().map(|records| records[&own_name].clone());
        machine.own.promoted = false;
        let mesh = match &agent.records {
            Some(records) => agent.topology.resolve(&machine.own, records),
            None => agent.topology.recovered(),
        };
        if own.is_none() && mesh.peers.is_empty() {
            machine.agent = Some(agent);
            return;
        }
        let pairs = agent.liveness.follow(&mesh, &machine.own, &machine.observed, now);
        let mut probed = Vec::new();
        if let Some(own) = &own {
            let sight = Sight {
                mesh: &mesh,
                local: &machine.own,
                pairs: &pairs,
                observed: &machine.observed,
                own,
                answered: machine.answered.as_deref(),
                revoke: machine.revoke,
                due: (machine.secret != machine.bound()).then_some(Cause::Secret),
                now,
            };
            let task = agent.rotation.follow(&sight);
            probed = agent.rotation.probes(&sight);
            machine.carry_out(index, task);
            machine.own.promoted = machine.own.keys.len() > 1 && agent.rotation.is_promoted();
        }
        if self.chance(self.odds.crash) {
            return;
        }
        let machine = &self.machines[index];
        let desired = transport::desired(&mesh, &machine.own, &Paths { pairs, ..Paths::default() });
        let plan = Plan::new(&desired, &machine.observed);
        let keys = machine.own.keys.clone();
        for action in &plan.actions {
            let machine = &mut self.machines[index];
            sim::step(action, &keys, &mut machine.observed);
            machine.forget_sessions();
            self.check();
            if self.chance(self.odds.crash) {
                return;
            }
        }
        let machine = &self.machines[index];
        if own.is_some() && machine.api {
            let said = self.api.get_mut(&own_name).unwrap();
            for (name, value) in machine.own.annotations() {
                match value {
                    Some(value) => _ = said.annotations.insert(name, value),
                    None => _ = said.annotations.remove(&name),
                }
            }
        }
        for address in probed {
            let has = |m: &Machine| m.own.pod_cidrs.iter().any(|cidr| cidr.contains(&address));
            let other = self.machines.iter().position(has).unwrap();
            self.send(index, other);
            self.send(other, index);
        }
        if !self.chance(self.odds.crash) {
            self.machines[index].agent = Some(agent);
        }
    }

    /// WireGuard makes a session where both ends know each other, and either has a reason to.
    fn shake_hands(&mut self) {
        for (a, b) in self.pairs() {
            if self.is_cut(a, b) {
                continue;
            }
            let wanted: Vec<_> = DeviceName::all()
                .filter_map(|device| Some((device, self.machines[a].peers(device)?)))
                .flat_map(|(device, (own, peers))| {
                    let theirs = peers.iter().filter(|(_, peer)| {
                        peer.handshake_age.is_none() && peer.persistent_keepalive.is_some()
                    });
                    theirs.map(move |(key, _)| (device, own, *key)).collect::<Vec<_>>()
                })
                .collect();
            for session in wanted {
                if self.answers(b, a, session) && !self.chance(self.odds.lost) {
                    self.begin(a, b, session);
                }
            }
        }
    }

    /// Whether `b` has this end of the session of another node.
    fn answers(&self, b: usize, a: usize, session: (DeviceName, PublicKey, PublicKey)) -> bool {
        let (device, own, theirs) = session;
        let there = self.machines[a].peers(device).and_then(|(_, peers)| peers.get(&theirs));
        let device = DeviceName::Session(device.session().unwrap().reversed());
        let Some((key, peers)) = self.machines[b].peers(device) else { return false };
        let here = peers.get(&own).filter(|_| key == theirs);
        there.zip(here).is_some_and(|(there, here)| there.preshared == here.preshared)
    }

    fn begin(
        &mut self,
        a: usize,
        b: usize,
        (device, own, theirs): (DeviceName, PublicKey, PublicKey),
    ) {
        self.next_session += 1;
        let reversed = DeviceName::Session(device.session().unwrap().reversed());
        for (end, session) in [(a, (device, own, theirs)), (b, (reversed, theirs, own))] {
            let machine = &mut self.machines[end];
            machine.sessions.insert(session, self.next_session);
            let peer = machine.peer_mut(session.0, &session.2).unwrap();
            peer.handshake_age = Some(Duration::ZERO);
            peer.rx_bytes += HANDSHAKE;
        }
    }

    /// A packet from one node's pods to another's. It arrives if both ends have the session, or
    /// can make it.
    fn send(&mut self, from: usize, to: usize) {
        if self.is_cut(from, to) {
            return;
        }
        let pods = *self.machines[to].own.pod_cidrs.first().unwrap();
        let Some(way) = self.machines[from].way_to(&pods) else {
            assert!(!self.strict, "{from} has no way to {to}\n{}", self.describe());
            return;
        };
        if !self.answers(to, from, way) {
            assert!(!self.strict, "{to} cannot take what {from} sends\n{}", self.describe());
            return;
        }
        let (device, own, theirs) = way;
        let reversed = DeviceName::Session(device.session().unwrap().reversed());
        let known = self.machines[from].sessions.get(&way).copied();
        if known.is_none() {
            self.begin(from, to, way);
        } else if self.machines[to].sessions.get(&(reversed, theirs, own)) != known.as_ref() {
            assert!(!self.strict, "{from} uses a session that {to} lost\n{}", self.describe());
            return;
        }
        self.machines[to].peer_mut(reversed, &own).unwrap().rx_bytes += PACKET;
    }

    /// Whether every pair that can reach each other has a session that both have.
    fn check(&mut self) {
        if !self.strict {
            return;
        }
        for machine in &self.machines {
            assert!(machine.own.keys.len() <= 2, "{}", self.describe());
        }
        for (from, to) in self.pairs() {
            if self.is_cut(from, to) {
                continue;
            }
            let pods = *self.machines[to].own.pod_cidrs.first().unwrap();
            let way = self.machines[from].way_to(&pods);
            let arrives = way.is_some_and(|way| self.answers(to, from, way));
            assert!(arrives, "{from} does not reach {to} by {way:?}\n{}", self.describe());
        }
    }

    fn describe(&self) -> String {
        let machines = self.machines.iter().map(|machine| {
            let generations: Vec<_> = machine.own.keys.keys().map(|g| g.number()).collect();
            let links: Vec<_> = machine.observed.links.keys().map(|name| name.as_str()).collect();
            let progress = machine.rotation().and_then(Rotation::progress);
            let said = &self.api[&machine.own.name].annotations;
            format!("{} {generations:?} {links:?}\n  {progress:?}\n  {said:?}\n", machine.own.name)
        });
        machines.collect()
    }
}

impl Machine {
    fn carry_out(&mut self, index: usize, task: Task) {
        match task {
            Task::None => {}
            Task::Add(request) => {
                let next = self.own.keys.keys().last().unwrap().next().unwrap();
                self.own.keys.insert(next, key(index, next));
                if let Some(secret) = self.secret {
                    self.own.secrets.insert(next, secret);
                    self.own.known_secrets.retain(|known| *known != secret);
                    self.own.known_secrets.push(secret);
                }
                (self.answered, self.revoke) = (request.text, request.revoke);
            }
            Task::Retire => {
                self.own.keys.pop_first();
                let keys = &self.own.keys;
                self.own.secrets.retain(|generation, _| keys.contains_key(generation));
            }
        }
    }
}
