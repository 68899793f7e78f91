//! Kernel devices, through wireguard-control. Its calls block, so they run on threads for
//! that purpose, and its known limits end here: it makes a link that is missing, gives a peer
//! that spans several messages as several peers, and reads without looking at sequence flags.

use std::collections::BTreeMap;
use std::io;
use std::time::SystemTime;

use gambeson_keys::PublicKey;
use gambeson_mesh::observed::{ObservedPeer, ObservedWireGuard};
use gambeson_mesh::session::DeviceName;
use ipnet::IpNet;
use nix::libc::{ENODEV, EOPNOTSUPP};
use wireguard_control::{
    Backend, Device, DeviceUpdate, InterfaceName, Key, PeerConfigBuilder, PeerInfo,
};

use super::{Found, PeerEntry, Update, age, invalid, preshared_key, public_key};
use crate::apply::ApplyError;

/// Peers in one request. It is split into messages below this.
const PEERS_PER_REQUEST: usize = 128;

pub(super) async fn read(device: DeviceName) -> Result<Option<Found>, ApplyError> {
    let name = interface(device).map_err(|source| ApplyError::ReadWireGuard { device, source })?;
    match blocking(move || Device::get(&name, Backend::Kernel)).await {
        Ok(device) => Ok(Some(found(&device, SystemTime::now()))),
        // The link went since it was seen.
        Err(error) if matches!(error.raw_os_error(), Some(ENODEV | EOPNOTSUPP)) => Ok(None),
        Err(source) => Err(ApplyError::ReadWireGuard { device, source }),
    }
}

pub(super) async fn write(device: DeviceName, update: &Update<'_>) -> io::Result<()> {
    let name = interface(device)?;
    let mut first = DeviceUpdate::new();
    if let Some(key) = update.key {
        first = first.set_private_key(Key(*key.as_bytes()));
    }
    if let Some(port) = update.listen_port {
        first = first.set_listen_port(port);
    }
    if update.clear_fwmark {
        first = first.unset_fwmark();
    }
    let mut chunks = update.peers.chunks(PEERS_PER_REQUEST);
    let mut requests = vec![with_peers(first, chunks.next().unwrap_or_default())];
    requests.extend(chunks.map(|chunk| with_peers(DeviceUpdate::new(), chunk)));
    blocking(move || requests.into_iter().try_for_each(|r| r.apply(&name, Backend::Kernel))).await
}

fn with_peers(update: DeviceUpdate, peers: &[PeerEntry]) -> DeviceUpdate {
    peers.iter().fold(update, |update, peer| update.add_peer(builder(peer)))
}

fn builder(peer: &PeerEntry) -> PeerConfigBuilder {
    let mut builder = PeerConfigBuilder::new(&Key(peer.key));
    if let Some(endpoint) = peer.endpoint {
        builder = builder.set_endpoint(endpoint);
    }
    if let Some(seconds) = peer.persistent_keepalive {
        builder = builder.set_persistent_keepalive_interval(seconds);
    }
    if let Some(key) = &peer.preshared_key {
        builder = builder.set_preshared_key(Key(**key));
    }
    for network in &peer.add_allowed_ips {
        builder = builder.add_allowed_ip(network.addr(), network.prefix_len());
    }
    if peer.remove { builder.remove() } else { builder }
}

fn found(device: &Device, now: SystemTime) -> Found {
    let state = ObservedWireGuard {
        public_key: device.public_key.as_ref().and_then(|key| public_key(key.as_bytes())),
        listen_port: device.listen_port.unwrap_or(0),
        fwmark: device.fwmark.unwrap_or(0),
        peers: merge_peers(&device.peers, now),
    };
    let preshared_keys = device.peers.iter().filter_map(|peer| {
        let preshared = preshared_key(&peer.config.preshared_key.as_ref()?.0)?;
        Some((public_key(peer.config.public_key.as_bytes())?, preshared))
    });
    Found { state, preshared_keys: preshared_keys.collect() }
}

/// Each peer once. The kernel repeats a peer whose prefixes do not fit in one message, with
/// its key and the other prefixes only.
pub(super) fn merge_peers(
    peers: &[PeerInfo],
    now: SystemTime,
) -> BTreeMap<PublicKey, ObservedPeer> {
    let mut merged = BTreeMap::new();
    for peer in peers {
        let Some(key) = public_key(peer.config.public_key.as_bytes()) else { continue };
        let allowed_ips = peer.config.allowed_ips.iter();
        let prefixes = allowed_ips.filter_map(|ip| IpNet::new(ip.address, ip.cidr).ok());
        let entry = merged.entry(key).or_insert_with(|| peer_of(peer, now));
        entry.allowed_ips.extend(prefixes.map(|network| network.trunc()));
    }
    merged
}

fn peer_of(peer: &PeerInfo, now: SystemTime) -> ObservedPeer {
    ObservedPeer {
        endpoint: peer.config.endpoint,
        persistent_keepalive: peer.config.persistent_keepalive_interval.filter(|s| *s != 0),
        handshake_age: peer.stats.last_handshake_time.map(|time| age(time, now)),
        rx_bytes: peer.stats.rx_bytes,
        tx_bytes: peer.stats.tx_bytes,
        ..ObservedPeer::default()
    }
}

fn interface(device: DeviceName) -> io::Result<InterfaceName> {
    device.as_str().parse().map_err(|_| invalid("not a link name"))
}

async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(call).await.map_err(io::Error::other)?
}
