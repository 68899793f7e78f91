//! `Observed -> [Recovered] -> incumbents`: what an agent that starts finds in the devices
//! that another one left behind. The kernel is the memory, so that a restart changes no claim.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use gambeson_keys::{Generation, PublicKey, SecretId};
use ipnet::IpNet;

use crate::NodeName;
use crate::desired::{NextHop, PEER_ROUTE_METRIC, RouteKey};
use crate::node::{DEFAULT_PORT, Endpoints, Local, Node, NodeRecord, Transport, Vteps};
use crate::node::{annotation, pod_cidrs};
use crate::observed::{Observed, ObservedPeer, Preshared};
use crate::session::Session;

/// Longest text that is tried as a key or an address, in bytes.
const LONGEST: usize = 64;

/// A peer as a device carries it. Which Node it is, the kernel does not know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Recovered {
    /// The one that packets go to.
    public_key: PublicKey,
    session: Session,
    /// The last handshake of that.
    handshake_age: Option<Duration>,
    /// Another of its keys, while it replaces one, and its last handshake.
    other_key: Option<(PublicKey, Option<Duration>)>,
    pod_cidrs: BTreeSet<IpNet>,
    endpoint: SocketAddr,
    persistent_keepalive: Option<u16>,
    /// Of which secret each of its keys' preshared keys are made, where they have some.
    secrets: BTreeMap<PublicKey, SecretId>,
    /// Of its routes, in bytes.
    mtu: Option<u32>,
}

/// Every peer of our devices. Keys that have the same prefixes are those of one node.
/// `known` are the secrets that this node knows, the oldest first: a session has the older one of
/// its keys' secrets, so that a key's own is the newest of those of its sessions.
pub(super) fn recover(observed: &Observed, known: &[SecretId]) -> Vec<Recovered> {
    let age = |secret: SecretId| known.iter().position(|known| *known == secret);
    let mut found: BTreeMap<BTreeSet<IpNet>, (bool, Recovered)> = BTreeMap::new();
    for (device, link) in observed.links.iter().filter(|(_, link)| link.is_ours()) {
        let Some(session) = device.session() else { continue };
        let peers = link.wireguard.iter().flat_map(|wireguard| &wireguard.peers);
        for (key, peer) in peers.filter(|(_, peer)| !peer.allowed_ips.is_empty()) {
            let Some(endpoint) = peer.endpoint else { continue };
            let routes: Vec<_> = routes(observed, peer).collect();
            let used = routes.iter().any(|route| route.next_hop == NextHop::Device(*device));
            let recovered = Recovered {
                public_key: *key,
                session,
                handshake_age: peer.handshake_age,
                other_key: None,
                pod_cidrs: peer.allowed_ips.clone(),
                endpoint,
                persistent_keepalive: peer.persistent_keepalive,
                secrets: match peer.preshared {
                    Preshared::Of(secret) => BTreeMap::from([(*key, secret)]),
                    Preshared::None | Preshared::Foreign => BTreeMap::new(),
                },
                mtu: routes.iter().filter_map(|route| route.mtu).min(),
            };
            let known = found.remove(&peer.allowed_ips);
            let merged = match known {
                Some(known) => merge(known, (used, recovered), age),
                None => (used, recovered),
            };
            found.insert(peer.allowed_ips.clone(), merged);
        }
    }
    found.into_values().map(|(_, recovered)| recovered).collect()
}

/// Two sessions with the same node: the one that packets go by, with what the other one adds.
fn merge(
    known: (bool, Recovered),
    other: (bool, Recovered),
    age: impl Fn(SecretId) -> Option<usize>,
) -> (bool, Recovered) {
    let ((used, mut first), (_, second)) =
        if other.0 && !known.0 { (other, known) } else { (known, other) };
    // The same key twice, on devices of two keys of ours, tells nothing more.
    let differs = |recovered: &Recovered| {
        recovered.session.peer_parity() != first.session.peer_parity()
            && recovered.public_key != first.public_key
    };
    let second_key = differs(&second).then_some((second.public_key, second.handshake_age));
    // One that was left by a crash, before it was removed, has the older handshake.
    let others = [first.other_key, second_key, second.other_key].into_iter().flatten();
    let others = others.filter(|(key, _)| *key != first.public_key);
    first.other_key = others.min_by_key(|(_, age)| age.unwrap_or(Duration::MAX));
    for (key, secret) in second.secrets {
        let newest = first.secrets.entry(key).or_insert(secret);
        if age(secret) > age(*newest) {
            *newest = secret;
        }
    }
    (used, first)
}

fn routes<'a>(
    observed: &'a Observed,
    peer: &'a ObservedPeer,
) -> impl Iterator<Item = &'a crate::desired::Route> {
    let key =
        |destination: &IpNet| RouteKey { destination: *destination, metric: PEER_ROUTE_METRIC };
    peer.allowed_ips.iter().filter_map(move |destination| observed.routes.get(&key(destination)))
}

/// Finds the Node of each recovered peer: by its pod CIDRs, which nobody but the control plane
/// assigns, then by its key, then by its endpoint; between equals the Node made first. The
/// best fit of all is served first, and each Node is one peer.
pub(super) fn incumbents(
    recovered: &[Recovered],
    local: &Local,
    records: &BTreeMap<NodeName, NodeRecord>,
) -> BTreeMap<NodeName, Node> {
    let claimants: Vec<_> = records
        .values()
        .filter(|record| record.name != local.name)
        .map(|record| Claimant::new(record, local))
        .collect();
    let mut fits = fits(recovered, &claimants);
    fits.sort();
    let mut incumbents = BTreeMap::new();
    let mut served = BTreeSet::new();
    for fit in fits {
        let record = claimants[fit.claimant].record;
        if !served.contains(&fit.recovered) && !incumbents.contains_key(&record.name) {
            served.insert(fit.recovered);
            incumbents.insert(record.name.clone(), recovered[fit.recovered].node(record));
        }
    }
    incumbents
}

/// What of a Node's record may tell that it is a recovered peer.
struct Claimant<'a> {
    record: &'a NodeRecord,
    pod_cidrs: BTreeSet<IpNet>,
    keys: BTreeSet<PublicKey>,
    endpoints: BTreeSet<IpAddr>,
}

impl<'a> Claimant<'a> {
    fn new(record: &'a NodeRecord, local: &Local) -> Self {
        let text = |name| record.annotations.get(name).filter(|text| text.len() <= LONGEST);
        let keys = [annotation::PUBLIC_KEY, annotation::NEXT_PUBLIC_KEY];
        let endpoints = [annotation::ENDPOINT, annotation::ENDPOINT_V6];
        Self {
            record,
            pod_cidrs: pod_cidrs(record, &local.cluster_networks).unwrap_or_default(),
            keys: keys.into_iter().filter_map(|name| text(name)?.parse().ok()).collect(),
            endpoints: endpoints.into_iter().filter_map(|name| text(name)?.parse().ok()).collect(),
        }
    }
}

/// How well a Node fits a recovered peer. The best sorts first.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Fit<'a> {
    by: Reverse<(bool, bool, bool)>,
    created: i64,
    name: &'a str,
    recovered: usize,
    claimant: usize,
}

fn fits<'a>(recovered: &[Recovered], claimants: &[Claimant<'a>]) -> Vec<Fit<'a>> {
    let (mut by_cidr, mut by_key) = (BTreeMap::new(), BTreeMap::new());
    for (index, peer) in recovered.iter().enumerate() {
        by_cidr.extend(peer.pod_cidrs.iter().map(|cidr| (*cidr, index)));
        by_key.extend(peer.keys().map(|key| (key, index)));
    }
    let mut fits = Vec::new();
    for (claimant, Claimant { record, pod_cidrs, keys, endpoints }) in claimants.iter().enumerate()
    {
        let by_cidr = pod_cidrs.iter().filter_map(|cidr| by_cidr.get(cidr));
        let by_key = keys.iter().filter_map(|key| by_key.get(key));
        let candidates: BTreeSet<usize> = by_cidr.chain(by_key).copied().collect();
        fits.extend(candidates.into_iter().map(|index| {
            let peer = &recovered[index];
            Fit {
                by: Reverse((
                    !peer.pod_cidrs.is_disjoint(pod_cidrs),
                    peer.keys().any(|key| keys.contains(&key)),
                    endpoints.contains(&peer.endpoint.ip()),
                )),
                created: record.created,
                name: &record.name,
                recovered: index,
                claimant,
            }
        }));
    }
    fits
}

impl Recovered {
    fn keys(&self) -> impl Iterator<Item = PublicKey> {
        [self.public_key].into_iter().chain(self.other_key.map(|(key, _)| key))
    }

    /// As long as no Node tells more: named by its prefixes, which no Node can be.
    pub(super) fn unnamed(&self) -> Node {
        let cidrs: Vec<_> = self.pod_cidrs.iter().map(IpNet::to_string).collect();
        self.node(&NodeRecord { name: format!("({})", cidrs.join(", ")), ..NodeRecord::default() })
    }

    fn node(&self, record: &NodeRecord) -> Node {
        let (endpoint, port) = (self.endpoint.ip(), self.endpoint.port());
        let endpoints = match endpoint {
            IpAddr::V4(v4) => Endpoints { v4: Some(v4), v6: None },
            IpAddr::V6(v6) => Endpoints { v4: None, v6: Some(v6) },
        };
        // Of the generations, the devices tell the parities. The key that packets go to is the
        // newer of two, or they would not.
        let parity = self.session.peer_parity();
        let (generation, public_key, next_public_key) = match self.other_key {
            Some((older, _)) => (1 - parity, older, Some(self.public_key)),
            None => (parity, self.public_key, None),
        };
        Node {
            name: record.name.clone(),
            uid: record.uid.clone(),
            created: record.created,
            pod_cidrs: self.pod_cidrs.clone(),
            generation: Generation::new(generation.into()),
            public_key: Some(public_key),
            next_public_key,
            secret: self.secrets.get(&public_key).copied(),
            next_secret: next_public_key.and_then(|key| self.secrets.get(&key)).copied(),
            endpoints,
            port: self.session.reversed().base_port(port).unwrap_or(DEFAULT_PORT),
            transports: BTreeSet::from([Transport::Wireguard]),
            mtu: self.mtu,
            persistent_keepalive: self.persistent_keepalive,
            vteps: Vteps::default(),
            flannel: false,
            ignored: Vec::new(),
        }
    }
}
