//! WireGuard state of a device: kernel devices through generic netlink, userspace devices
//! through their UAPI socket, one meaning for both.
//!
//! A prefix belongs to one peer of a device, and giving it to another peer moves it in one
//! step. So nothing here ever replaces a peer's prefixes, which would leave the peer without
//! any for a moment: prefixes are added, and one that must go moves to a scratch peer that is
//! removed with it.

mod kernel;
mod process;
#[cfg(test)]
mod tests;
mod userspace;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;

use gambeson_keys::{KeyRing, PrivateKey, PublicKey, Secrets};
use gambeson_mesh::desired::Implementation;
use gambeson_mesh::observed::{ObservedWireGuard, Preshared};
use gambeson_mesh::plan::WireGuardChange;
use gambeson_mesh::session::DeviceName;
use ipnet::IpNet;
use zeroize::Zeroizing;

use super::ApplyError;

pub(super) use process::{Tunnels, is_outdated, retire, start};

/// Prefixes of one peer in one request; a netlink message has room for about 180.
const PREFIXES_PER_ENTRY: usize = 64;

/// Reads a device, or gives `None` when nobody answers for it.
pub(super) async fn observe(
    device: DeviceName,
    implementation: Implementation,
    secrets: &Secrets,
) -> Result<Option<ObservedWireGuard>, ApplyError> {
    let found = match implementation {
        Implementation::Kernel => kernel::read(device).await?,
        Implementation::Userspace => userspace::read(device).await,
    };
    Ok(found.map(|found| found.state(secrets)))
}

/// A device as it was read.
#[derive(Debug, Default)]
struct Found {
    /// In which no preshared key has an origin yet.
    state: ObservedWireGuard,
    preshared_keys: BTreeMap<PublicKey, Zeroizing<[u8; 32]>>,
}

impl Found {
    /// With what each preshared key was made of.
    fn state(mut self, secrets: &Secrets) -> ObservedWireGuard {
        let own = self.state.public_key;
        for (key, peer) in &mut self.state.peers {
            let Some(preshared) = self.preshared_keys.get(key) else { continue };
            let origin = own.and_then(|own| secrets.origin(preshared, &own, key));
            peer.preshared = origin.map_or(Preshared::Foreign, Preshared::Of);
        }
        self.state
    }
}

/// A preshared key that a device reports; it says that there is none by zeros.
fn preshared_key(bytes: &[u8; 32]) -> Option<Zeroizing<[u8; 32]>> {
    bytes.iter().any(|byte| *byte != 0).then(|| Zeroizing::new(*bytes))
}

/// Changes a device. Peers are added and updated before others are removed.
pub(super) async fn configure(
    device: DeviceName,
    implementation: Implementation,
    change: &WireGuardChange,
    keys: &KeyRing,
) -> Result<(), ApplyError> {
    let secrets = keys.secrets();
    let key = match change.key {
        None => None,
        Some(generation) => {
            Some(keys.private(generation).ok_or(ApplyError::NoKey { device, generation })?)
        }
    };
    let current = observe(device, implementation, secrets).await?.unwrap_or_default();
    let own = key.map(PrivateKey::public).or(current.public_key);
    let update = Update {
        key,
        listen_port: change.listen_port,
        clear_fwmark: change.clear_fwmark,
        peers: entries(change, &current, (own, secrets), rand::random()),
    };
    let result = match implementation {
        Implementation::Kernel => kernel::write(device, &update).await,
        Implementation::Userspace => userspace::write(device, &update).await,
    };
    result.map_err(|source| match (source.raw_os_error(), change.listen_port) {
        (Some(nix::libc::EADDRINUSE), Some(port)) => ApplyError::PortTaken { device, port, source },
        _ => ApplyError::ConfigureWireGuard { device, source },
    })
}

/// A request to a device, carried out in order.
struct Update<'a> {
    key: Option<&'a PrivateKey>,
    listen_port: Option<u16>,
    clear_fwmark: bool,
    peers: Vec<PeerEntry>,
}

/// One peer in a request. Several may name the same peer.
#[derive(Debug, Clone, PartialEq, Eq)]
struct PeerEntry {
    key: [u8; 32],
    endpoint: Option<SocketAddr>,
    persistent_keepalive: Option<u16>,
    /// Zeros for none.
    preshared_key: Option<Zeroizing<[u8; 32]>>,
    add_allowed_ips: Vec<IpNet>,
    remove: bool,
}

impl PeerEntry {
    fn new(key: [u8; 32]) -> Self {
        Self {
            key,
            endpoint: None,
            persistent_keepalive: None,
            preshared_key: None,
            add_allowed_ips: Vec::new(),
            remove: false,
        }
    }

    fn removal(key: [u8; 32]) -> Self {
        Self { remove: true, ..Self::new(key) }
    }
}

/// The entries that turn `current` into what `change` says. `scratch` is the key of a peer
/// that does not exist.
fn entries(
    change: &WireGuardChange,
    current: &ObservedWireGuard,
    (own, secrets): (Option<PublicKey>, &Secrets),
    scratch: [u8; 32],
) -> Vec<PeerEntry> {
    let nothing = BTreeSet::new();
    let mut entries = Vec::new();
    let mut dropped = BTreeSet::new();
    for (key, peer) in &change.set_peers {
        let mut entry = PeerEntry::new(*key.as_bytes());
        entry.endpoint = peer.endpoint;
        entry.persistent_keepalive = peer.persistent_keepalive;
        entry.preshared_key = peer.preshared_key.map(|secret| {
            let secret = secret.and_then(|id| secrets.get(id));
            // A key that is missing is made up for by the next pass, which has it or says why.
            let made = own.zip(secret).map(|(own, secret)| secret.preshared_key(&own, key));
            made.unwrap_or_default()
        });
        let present = current.peers.get(key).map_or(&nothing, |p| &p.allowed_ips);
        let wanted = peer.allowed_ips.as_ref().unwrap_or(present);
        dropped.extend(present.difference(wanted).copied());
        let added: Vec<_> = wanted.difference(present).copied().collect();
        let mut chunks = added.chunks(PREFIXES_PER_ENTRY);
        entry.add_allowed_ips = chunks.next().unwrap_or_default().to_vec();
        entries.push(entry);
        entries.extend(chunks.map(|chunk| PeerEntry {
            add_allowed_ips: chunk.to_vec(),
            ..PeerEntry::new(*key.as_bytes())
        }));
    }
    for peer in change.set_peers.values() {
        for moved in peer.allowed_ips.iter().flatten() {
            dropped.remove(moved);
        }
    }
    let dropped: Vec<_> = dropped.into_iter().collect();
    for chunk in dropped.chunks(PREFIXES_PER_ENTRY) {
        entries.push(PeerEntry { add_allowed_ips: chunk.to_vec(), ..PeerEntry::new(scratch) });
        entries.push(PeerEntry::removal(scratch));
    }
    entries.extend(change.remove_peers.iter().map(|key| PeerEntry::removal(*key.as_bytes())));
    entries
}

/// A device's answer that makes no sense.
fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Time since a handshake. A clock that was set back since then makes it zero.
fn age(handshake: std::time::SystemTime, now: std::time::SystemTime) -> std::time::Duration {
    now.duration_since(handshake).unwrap_or_default()
}

/// A key that a device reports, or `None` for one that no peer of ours can have.
fn public_key(bytes: &[u8]) -> Option<PublicKey> {
    PublicKey::from_bytes(bytes.try_into().ok()?).ok()
}
