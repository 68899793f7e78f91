//! Says what changed: one log line per change of state, Events for refused peers, and the
//! status.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use gambeson_mesh::NodeName;
use gambeson_mesh::desired::{Implementation, NextHop, PEER_ROUTE_METRIC, RouteKey};
use gambeson_mesh::node::{Node, Refusal, Transport};
use gambeson_mesh::observed::ObservedPeer;
use gambeson_mesh::topology::Mesh;
use tracing::{debug, info, warn};

use self::rotation::RotationReport;
use super::reconciler::{Pass, View};
use crate::apply::GuardDrops;
use crate::cluster::{Note, Reason, Recorder};
use crate::status::{
    Admission, GuardStatus, PeerStatus, RefusedStatus, Status, UnderlayStatus, transport_name,
};

mod rotation;

/// How often it is said again what the agent waits for.
const REMIND: Duration = Duration::from_secs(60);

/// Changes that one log line names; the level DEBUG has all of them.
const CHANGES_SHOWN: usize = 8;

/// Most peers in clear for which Events are written; a condition says it for more.
const PLAINTEXT_EVENTS: usize = 16;

/// Compares each pass with the one before.
#[derive(Debug)]
pub(super) struct Reporter {
    events: Recorder,
    peers: BTreeSet<NodeName>,
    refused: BTreeMap<NodeName, Refusal>,
    /// Peers that are reached in clear, and how.
    plaintext: BTreeMap<NodeName, Transport>,
    warnings: BTreeSet<(Reason, String)>,
    rotation: RotationReport,
    problems: BTreeSet<String>,
    waiting: Option<(String, Instant)>,
    ready: bool,
    guard: GuardStatus,
    admission: Admission,
    admission_required: bool,
    /// Says how the data plane is while a pass has nothing newer to tell.
    last: Status,
}

impl Reporter {
    pub(super) fn new(node: &str, events: Recorder, admission_required: bool) -> Self {
        Self {
            events,
            peers: BTreeSet::new(),
            refused: BTreeMap::new(),
            plaintext: BTreeMap::new(),
            warnings: BTreeSet::new(),
            rotation: RotationReport::default(),
            problems: BTreeSet::new(),
            waiting: None,
            ready: false,
            guard: GuardStatus::default(),
            admission: Admission::default(),
            admission_required,
            last: Status::starting(node),
        }
    }

    /// Takes in newer counters of the guard.
    pub(super) fn set_drops(&mut self, drops: &GuardDrops) {
        self.guard = GuardStatus {
            out_packets: drops.out_packets,
            out_bytes: drops.out_bytes,
            in_packets: drops.in_packets,
            in_bytes: drops.in_bytes,
            ..self.guard
        };
    }

    /// Takes in whether the API server keeps agents to their own Nodes.
    pub(super) fn set_admission(&mut self, admission: Admission) {
        self.admission = admission;
    }

    /// Takes in when the guard was last seen whole.
    pub(super) fn set_guard_seen_whole(&mut self, seen: Option<SystemTime>) {
        let since_epoch = seen.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        self.guard.seen_whole = since_epoch.map(|time| time.as_secs());
    }

    /// Logs what changed since the last pass, and gives the status after this one.
    /// `troubles` are those of other parts of the agent.
    pub(super) fn report(&mut self, pass: &Pass, troubles: &[String], now: Instant) -> Status {
        if !pass.changes.is_empty() {
            let shown = pass.changes.iter().take(CHANGES_SHOWN);
            let what: Vec<&str> = shown.map(String::as_str).collect();
            info!(changes = pass.changes.len(), what = what.join(", "), "changed the kernel");
        }
        self.report_problems(&pass.problems);
        self.report_waiting(pass.waiting.as_deref(), now);
        if let Some(view) = &pass.view {
            self.report_peers(&view.mesh);
            self.report_refused(&view.mesh, &view.node_uid);
            self.report_plaintext(view);
            self.rotation.report(view, &self.events, now);
            self.report_warnings(warnings(pass, &view.mesh).collect(), &view.node_uid);
        }
        if pass.ready && !self.ready {
            info!("ready");
        }
        self.ready = pass.ready;
        self.last = self.status(pass, troubles, now);
        self.last.clone()
    }

    fn report_problems(&mut self, problems: &[String]) {
        let problems: BTreeSet<String> = problems.iter().cloned().collect();
        for problem in problems.difference(&self.problems) {
            warn!(error = problem, "not done, will be tried again");
        }
        for problem in self.problems.difference(&problems) {
            info!(error = problem, "solved");
        }
        self.problems = problems;
    }

    fn report_waiting(&mut self, waiting: Option<&str>, now: Instant) {
        self.waiting = match (waiting, self.waiting.take()) {
            (None, Some((before, _))) => {
                debug!("no longer waiting for {before}");
                None
            }
            (None, None) => None,
            (Some(waiting), Some((before, said)))
                if before == waiting && now.duration_since(said) < REMIND =>
            {
                Some((before, said))
            }
            (Some(waiting), _) => {
                info!("waiting for {waiting}");
                Some((waiting.to_owned(), now))
            }
        };
    }

    fn report_peers(&mut self, mesh: &Mesh) {
        for (name, node) in &mesh.peers {
            if self.peers.insert(name.clone()) {
                let cidrs: Vec<_> = node.pod_cidrs.iter().map(ToString::to_string).collect();
                info!(peer = name, pod_cidrs = cidrs.join(","), "peer joined");
            }
        }
        self.peers.retain(|name| {
            let stays = mesh.peers.contains_key(name);
            if !stays {
                info!(peer = name, "peer left");
            }
            stays
        });
    }

    fn report_refused(&mut self, mesh: &Mesh, node_uid: &str) {
        for (name, refusal) in &mesh.refused {
            if self.refused.get(name) == Some(refusal) {
                continue;
            }
            if is_joining(refusal) {
                info!(peer = name, "peer is not there yet: it {refusal}");
                continue;
            }
            let kept = mesh.peers.contains_key(name);
            warn!(peer = name, reason = %refusal, kept, "peer refused");
            self.events.record(Note {
                node_uid: node_uid.to_owned(),
                reason: Reason::PeerRefused,
                message: format!("Peer {name} is refused: {refusal}"),
            });
        }
        for (name, refusal) in &self.refused {
            let solved = !mesh.refused.contains_key(name) && mesh.peers.contains_key(name);
            if solved && !is_joining(refusal) {
                info!(peer = name, "peer is no longer refused");
            }
        }
        self.refused.clone_from(&mesh.refused);
    }

    /// Each pair by itself, until there are so many that nobody would read them all.
    fn report_plaintext(&mut self, view: &View) {
        let peers = view.mesh.peers.iter();
        let transports = peers.filter_map(|(name, node)| {
            let (transport, _) = path(node, view)?;
            (!transport.is_encrypted()).then(|| (name.clone(), transport))
        });
        let plaintext: BTreeMap<_, _> = transports.collect();
        for (name, transport) in &plaintext {
            if self.plaintext.get(name) == Some(transport) {
                continue;
            }
            warn!(peer = name, %transport, "pods' packets to and from this peer are not encrypted");
            if plaintext.len() <= PLAINTEXT_EVENTS {
                self.events.record(Note {
                    node_uid: view.node_uid.clone(),
                    reason: Reason::PlaintextPeer,
                    message: format!(
                        "Pods' packets to and from {name} travel in clear ({transport}), as \
                         --transports of both nodes allows"
                    ),
                });
            }
        }
        for name in self.plaintext.keys().filter(|name| !plaintext.contains_key(*name)) {
            if view.mesh.peers.contains_key(name) {
                info!(peer = name, "pods' packets to and from this peer are encrypted now");
            }
        }
        self.plaintext = plaintext;
    }

    fn report_warnings(&mut self, warnings: BTreeSet<(Reason, String)>, node_uid: &str) {
        for (reason, warning) in warnings.difference(&self.warnings) {
            warn!("{warning}");
            self.events.record(Note {
                node_uid: node_uid.to_owned(),
                reason: *reason,
                message: warning.clone(),
            });
        }
        self.warnings = warnings;
    }

    fn status(&self, pass: &Pass, troubles: &[String], now: Instant) -> Status {
        let mut status = Status {
            guard: self.guard,
            admission: self.admission,
            admission_required: self.admission_required,
            ready: pass.ready,
            waiting: pass.waiting.clone(),
            errors: pass.problems.iter().chain(troubles).cloned().collect(),
            ..self.last.clone()
        };
        let Some(view) = &pass.view else { return status };
        let View { local, underlay, mesh, .. } = view;
        let wanted = local.transports.contains(&Transport::Wireguard);
        status.implementation =
            wanted.then(|| implementation_name(local.implementation).to_owned());
        if let Some((generation, key)) = local.current_key() {
            status.set_key(generation, key);
        }
        status.rotation = view.rotation.as_ref().map(|progress| rotation::status(progress, now));
        status.mtu = Some(local.inner_mtu());
        status.underlay = Some(UnderlayStatus {
            interface: underlay.name.clone(),
            mtu: underlay.mtu,
            endpoints: underlay.endpoints.addresses().collect(),
        });
        status.peers = mesh.peers.values().map(|node| peer_status(node, view)).collect();
        status.refused = mesh
            .refused
            .iter()
            .map(|(name, refusal)| RefusedStatus {
                name: name.clone(),
                reason: refusal.to_string(),
                kept: mesh.peers.contains_key(name),
            })
            .collect();
        let admission = (self.admission == Admission::Missing).then_some(Admission::MISSING);
        let admission = admission.into_iter().map(str::to_owned);
        let warnings = warnings(pass, mesh).map(|(_, warning)| warning);
        status.warnings = admission.chain(warnings).collect();
        status
    }
}

fn warnings(pass: &Pass, mesh: &Mesh) -> impl Iterator<Item = (Reason, String)> {
    let ignored = mesh.ignored.iter().flat_map(|(name, problems)| {
        problems.iter().map(move |problem| format!("Node {name}: {problem}; it counts as not set"))
    });
    let advice = pass.advice.iter().cloned();
    let ignored = ignored.map(|warning| (Reason::OptionIgnored, warning));
    ignored.chain(advice.map(|warning| (Reason::NodeAdvice, warning)))
}

/// What every Node goes through when it joins, and nobody has to look at.
fn is_joining(refusal: &Refusal) -> bool {
    matches!(refusal, Refusal::NoKey | Refusal::NoPodCidr)
}

fn implementation_name(implementation: Implementation) -> &'static str {
    match implementation {
        Implementation::Kernel => "kernel",
        Implementation::Userspace => "userspace",
    }
}

fn peer_status(node: &Node, view: &View) -> PeerStatus {
    let path = path(node, view);
    let device = path.and_then(|(_, next_hop)| next_hop.device());
    // A device has one of them.
    let keys = || [node.public_key, node.next_public_key].into_iter().flatten();
    let configured = device
        .and_then(|name| view.desired.devices.get(&name))
        .and_then(|device| keys().find_map(|key| device.peers.get(&key)));
    let observed = device
        .and_then(|name| view.observed.links.get(&name))
        .and_then(|link| link.wireguard.as_ref())
        .and_then(|wireguard| keys().find_map(|key| wireguard.peers.get(&key)));
    let seen = |value: fn(&ObservedPeer) -> u64| observed.map_or(0, value);
    let own_mtu = view.local.inner_mtu();
    let link = match path {
        Some((_, NextHop::Node { .. })) => Some(view.underlay.name.clone()),
        _ => device.map(|name| name.to_string()),
    };
    let unknown = || "-".to_owned();
    PeerStatus {
        name: node.name.clone(),
        pod_cidrs: node.pod_cidrs.iter().copied().collect(),
        endpoint: observed.and_then(|p| p.endpoint).or(configured.map(|p| p.endpoint)),
        transport: path.map_or_else(unknown, |(transport, _)| {
            transport_name(transport, view.local.implementation).to_owned()
        }),
        device: link.unwrap_or_else(unknown),
        key_generation: node.generation.number(),
        handshake_age_seconds: observed.and_then(|p| p.handshake_age).map(|age| age.as_secs()),
        rx_bytes: seen(|p| p.rx_bytes),
        tx_bytes: seen(|p| p.tx_bytes),
        mtu: node.mtu.map_or(own_mtu, |theirs| theirs.min(own_mtu)),
    }
}

/// How packets to a node's pods travel, and where the route leads.
fn path(node: &Node, view: &View) -> Option<(Transport, NextHop)> {
    node.pod_cidrs.iter().find_map(|destination| {
        let key = RouteKey { destination: *destination, metric: PEER_ROUTE_METRIC };
        let next_hop = view.desired.routes.get(&key)?.next_hop;
        Some((Transport::of(next_hop)?, next_hop))
    })
}
