//! Settings of the device: what `wg set` changes and `wg show` reads.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;
use zeroize::Zeroizing;

use super::peer::Peer;
use super::tables::Tables;
use super::{Device, PeerId};
use crate::allowed_ips::AllowedIps;
use crate::batch::Outbox;
use crate::endpoint::Endpoint;
use crate::noise::{Identity, Indices};

/// Changes to a device. What is `None` stays as it is.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct DeviceUpdate {
    /// The private key; zeros remove it.
    pub private_key: Option<Zeroizing<[u8; 32]>>,
    /// UDP port, 0 for a random one.
    pub listen_port: Option<u16>,
    /// Mark of outgoing datagrams, 0 for none.
    pub fwmark: Option<u32>,
    /// Remove all peers first.
    pub replace_peers: bool,
    /// In order.
    pub peers: Vec<PeerUpdate>,
}

/// Changes to a peer, which is made if it does not exist.
#[derive(Clone, PartialEq, Eq)]
pub struct PeerUpdate {
    /// Its public key.
    pub public_key: [u8; 32],
    /// Remove it; nothing else counts.
    pub remove: bool,
    /// Do nothing if it does not exist.
    pub update_only: bool,
    /// Zeros remove it.
    pub preshared_key: Option<Zeroizing<[u8; 32]>>,
    /// Its address and port.
    pub endpoint: Option<SocketAddr>,
    /// Seconds, 0 for off.
    pub persistent_keepalive: Option<u16>,
    /// In order.
    pub allowed_ips: Vec<AllowedIpChange>,
}

/// A change to the allowed IPs of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AllowedIpChange {
    /// Remove all.
    Clear,
    /// Add one, taking it from another peer that has it.
    Add(IpNet),
    /// Remove one, if the peer has it.
    Remove(IpNet),
}

/// A peer as `wg show` prints it.
pub struct PeerStatus {
    /// Its public key.
    pub public_key: [u8; 32],
    /// Zeros if there is none.
    pub preshared_key: Zeroizing<[u8; 32]>,
    /// Where it was last heard from, or is configured to be.
    pub endpoint: Option<SocketAddr>,
    /// Seconds, 0 for off.
    pub persistent_keepalive: u16,
    /// When the newest session was made.
    pub last_handshake: Option<SystemTime>,
    /// Bytes of its authentic datagrams.
    pub received: u64,
    /// Bytes sent to it.
    pub sent: u64,
    /// In order of address.
    pub allowed_ips: Vec<IpNet>,
}

impl DeviceUpdate {
    /// Whether the device has a private key after this, and it may be a new one.
    pub(crate) fn sets_private_key(&self) -> bool {
        self.private_key.as_ref().is_some_and(|key| **key != [0; 32])
    }
}

impl PeerUpdate {
    /// No change to the peer with this key, other than that it exists.
    pub fn new(public_key: [u8; 32]) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            preshared_key: None,
            endpoint: None,
            persistent_keepalive: None,
            allowed_ips: Vec::new(),
        }
    }
}

impl fmt::Debug for DeviceUpdate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceUpdate")
            .field("private_key", &self.private_key.as_ref().map(|_| "<redacted>"))
            .field("listen_port", &self.listen_port)
            .field("fwmark", &self.fwmark)
            .field("replace_peers", &self.replace_peers)
            .field("peers", &self.peers)
            .finish()
    }
}

impl fmt::Debug for PeerUpdate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerUpdate")
            .field("public_key", &self.public_key)
            .field("remove", &self.remove)
            .field("update_only", &self.update_only)
            .field("preshared_key", &self.preshared_key.as_ref().map(|_| "<redacted>"))
            .field("endpoint", &self.endpoint)
            .field("persistent_keepalive", &self.persistent_keepalive)
            .field("allowed_ips", &self.allowed_ips)
            .finish()
    }
}

/// The settings behind the tables.
#[derive(Default)]
pub(super) struct Config {
    identity: Option<Arc<Identity>>,
    indices: Arc<Indices>,
    peers: BTreeMap<[u8; 32], Configured>,
    allowed_ips: BTreeMap<IpNet, [u8; 32]>,
    slots: Vec<Option<Arc<Peer>>>,
    free: Vec<PeerId>,
    peers_changed: bool,
    allowed_ips_changed: bool,
    last_publication: Publication,
}

/// When the tables were last made, and how long that took, which grows with the number of
/// peers: who adds thousands one by one must not pay for all of them each time.
#[derive(Default)]
struct Publication {
    end: Option<Instant>,
    took: Duration,
}

impl Publication {
    /// Whether to make them again at once, and not when a packet needs them.
    fn is_cheap(&self) -> bool {
        self.end.is_none_or(|end| end.elapsed() >= 10 * self.took)
    }
}

struct Configured {
    peer: Arc<Peer>,
    allowed_ips: BTreeSet<IpNet>,
}

impl Device {
    /// Whether the device would have more peers than it can hold after `update`.
    pub(crate) fn has_room_for(&self, update: &DeviceUpdate) -> bool {
        let held = if update.replace_peers { 0 } else { self.config.lock().peers.len() };
        held + update.peers.iter().filter(|peer| !peer.remove).count() <= PeerId::MAX
    }

    /// Applies the part of an update that is not sockets. Settings that have their value
    /// already are left alone, so that applying the same twice disturbs no session.
    pub fn apply(&self, update: &DeviceUpdate, outbox: &mut Outbox) {
        let mut config = self.config.lock();
        if let Some(private_key) = &update.private_key {
            self.set_private_key(&mut config, private_key, outbox);
        }
        if update.replace_peers {
            config.clear();
        }
        for peer in &update.peers {
            self.apply_peer(&mut config, peer, outbox);
        }
        self.stale.store(true, Ordering::Release);
        if config.last_publication.is_cheap() {
            self.publish(&mut config);
        }
        self.greet_new(&config, update, outbox);
    }

    /// The private key, or zeros if there is none.
    pub fn private_key(&self) -> Zeroizing<[u8; 32]> {
        let config = self.config.lock();
        Zeroizing::new(config.identity.as_ref().map_or([0; 32], |identity| *identity.private()))
    }

    /// Whether there is a private key.
    pub fn has_private_key(&self) -> bool {
        self.config.lock().identity.is_some()
    }

    /// Calls `visit` for each peer, in order of public key.
    ///
    /// # Errors
    /// The first one of `visit`.
    pub fn visit_peers<E>(
        &self,
        mut visit: impl FnMut(&PeerStatus) -> Result<(), E>,
    ) -> Result<(), E> {
        let peers: Vec<_> = {
            let config = self.config.lock();
            let peers = config.peers.values();
            peers.map(|c| (Arc::clone(&c.peer), c.allowed_ips.iter().copied().collect())).collect()
        };
        for (peer, allowed_ips) in peers {
            let state = peer.lock();
            let status = PeerStatus {
                public_key: peer.key,
                preshared_key: state.noise.preshared_key().clone(),
                endpoint: state.endpoint.map(|endpoint| endpoint.address),
                persistent_keepalive: state.keepalive,
                last_handshake: state.last_handshake,
                received: state.received,
                sent: state.sent,
                allowed_ips,
            };
            drop(state);
            visit(&status)?;
        }
        Ok(())
    }

    fn set_private_key(&self, config: &mut Config, private_key: &[u8; 32], outbox: &mut Outbox) {
        let same = match &config.identity {
            Some(identity) => identity.is(private_key),
            None => *private_key == [0; 32],
        };
        if same {
            return;
        }
        let identity = (*private_key != [0; 32]).then(|| Arc::new(Identity::new(private_key)));
        if let Some(identity) = &identity {
            // A peer that is ourselves, as the kernel does.
            config.remove(identity.public());
        }
        config.identity = identity;
        for Configured { peer, .. } in config.peers.values() {
            let mut state = peer.lock();
            let had_session = state.noise.has_session(self.now());
            state.noise.set_identity(config.identity.as_ref());
            if had_session && self.is_up() {
                state.rehandshake(peer, self.now(), outbox);
            }
        }
    }

    fn apply_peer(&self, config: &mut Config, update: &PeerUpdate, outbox: &mut Outbox) {
        let key = &update.public_key;
        if config.identity.as_ref().is_some_and(|identity| identity.public() == key) {
            return;
        }
        if update.remove {
            return config.remove(key);
        }
        let exists = config.peers.contains_key(key);
        if !exists && update.update_only {
            return;
        }
        let preshared_key = update.preshared_key.as_deref().unwrap_or(&[0; 32]);
        let peer = config.peer(key, preshared_key);
        let mut state = peer.lock();
        if let Some(address) = update.endpoint {
            let endpoint = Endpoint::new(address);
            if state.endpoint.map(|endpoint| endpoint.address) != Some(endpoint.address) {
                state.endpoint = Some(endpoint);
            }
        }
        if let Some(preshared_key) = &update.preshared_key
            && state.noise.preshared_key() != preshared_key
        {
            let had_session = state.noise.has_session(self.now());
            state.noise.set_preshared_key(preshared_key);
            if had_session && self.is_up() {
                state.rehandshake(&peer, self.now(), outbox);
            }
        }
        drop(state);
        for change in &update.allowed_ips {
            config.change_allowed_ip(key, change);
        }
    }

    /// Sets keepalives, at the end: a peer that gets one is greeted at once, and its answer
    /// must find it.
    fn greet_new(&self, config: &Config, update: &DeviceUpdate, outbox: &mut Outbox) {
        for update in &update.peers {
            let (Some(keepalive), Some(Configured { peer, .. })) =
                (update.persistent_keepalive, config.peers.get(&update.public_key))
            else {
                continue;
            };
            let mut state = peer.lock();
            let before = std::mem::replace(&mut state.keepalive, keepalive);
            if before == 0 && keepalive != 0 && self.is_up() {
                state.greet(peer, self.now(), outbox);
            }
        }
    }

    /// Makes the tables what the configuration says.
    pub(super) fn publish(&self, config: &mut Config) {
        let start = Instant::now();
        let mut tables = Tables {
            identity: config.identity.clone(),
            indices: Arc::clone(&config.indices),
            ..self.tables.read().share()
        };
        if std::mem::take(&mut config.peers_changed) {
            tables.slots = Arc::new(config.slots.clone());
            tables.keys = Arc::new(config.ids());
        }
        if std::mem::take(&mut config.allowed_ips_changed) {
            let owners = config.allowed_ips.iter().filter_map(|(prefix, key)| {
                config.peers.get(key).map(|configured| (*prefix, configured.peer.id))
            });
            tables.allowed_ips = Arc::new(AllowedIps::new(owners));
        }
        *self.tables.write() = Arc::new(tables);
        self.stale.store(false, Ordering::Release);
        config.last_publication = Publication { end: Some(Instant::now()), took: start.elapsed() };
    }
}

impl Config {
    /// The peer with this key, made with this preshared key if need be.
    fn peer(&mut self, key: &[u8; 32], preshared_key: &[u8; 32]) -> Arc<Peer> {
        if let Some(configured) = self.peers.get(key) {
            return Arc::clone(&configured.peer);
        }
        let id = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            PeerId(u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX))
        });
        let indices = Arc::clone(&self.indices);
        let peer = Arc::new(Peer::new(id, *key, preshared_key, indices, self.identity.as_ref()));
        if let Some(slot) = self.slots.get_mut(id.index() as usize) {
            *slot = Some(Arc::clone(&peer));
        }
        let configured = Configured { peer: Arc::clone(&peer), allowed_ips: BTreeSet::new() };
        self.peers.insert(*key, configured);
        self.peers_changed = true;
        peer
    }

    fn remove(&mut self, key: &[u8; 32]) {
        let Some(configured) = self.peers.remove(key) else { return };
        if let Some(slot) = self.slots.get_mut(configured.peer.id.index() as usize) {
            *slot = None;
            self.free.push(configured.peer.id);
        }
        for prefix in &configured.allowed_ips {
            self.allowed_ips.remove(prefix);
        }
        self.peers_changed = true;
        self.allowed_ips_changed = true;
    }

    fn clear(&mut self) {
        self.peers.clear();
        self.allowed_ips.clear();
        self.slots.clear();
        self.free.clear();
        self.peers_changed = true;
        self.allowed_ips_changed = true;
    }

    fn change_allowed_ip(&mut self, key: &[u8; 32], change: &AllowedIpChange) {
        let Some(configured) = self.peers.get_mut(key) else { return };
        match change {
            AllowedIpChange::Clear => {
                for prefix in std::mem::take(&mut configured.allowed_ips) {
                    self.allowed_ips.remove(&prefix);
                    self.allowed_ips_changed = true;
                }
            }
            AllowedIpChange::Add(prefix) => {
                let prefix = prefix.trunc();
                if !configured.allowed_ips.insert(prefix) {
                    return;
                }
                self.allowed_ips_changed = true;
                if let Some(previous) = self.allowed_ips.insert(prefix, *key)
                    && let Some(previous) = self.peers.get_mut(&previous)
                {
                    previous.allowed_ips.remove(&prefix);
                }
            }
            AllowedIpChange::Remove(prefix) => {
                let prefix = prefix.trunc();
                if configured.allowed_ips.remove(&prefix) {
                    self.allowed_ips.remove(&prefix);
                    self.allowed_ips_changed = true;
                }
            }
        }
    }

    fn ids(&self) -> HashMap<[u8; 32], PeerId> {
        self.peers.iter().map(|(key, configured)| (*key, configured.peer.id)).collect()
    }
}
