//! The difference of one WireGuard device.

use std::time::Duration;

use gambeson_keys::PublicKey;

use super::{PeerChange, WireGuardChange};
use crate::desired::{WireGuardDevice, WireGuardPeer};
use crate::health::REJECT_AFTER;
use crate::observed::{ObservedPeer, ObservedWireGuard, Preshared};

/// What to set: key, port, and peers that are new or different.
pub(super) fn additions(
    desired: &WireGuardDevice,
    observed: &ObservedWireGuard,
) -> WireGuardChange {
    let mut change = WireGuardChange::default();
    if observed.public_key != Some(desired.public_key) {
        change.key = Some(desired.generation);
    }
    if observed.listen_port != desired.listen_port {
        change.listen_port = Some(desired.listen_port);
    }
    change.clear_fwmark = observed.fwmark != 0;
    for (key, peer) in &desired.peers {
        if let Some(difference) = peer_change(peer, observed.peers.get(key)) {
            change.set_peers.insert(*key, difference);
        }
    }
    change
}

/// Peers to remove.
pub(super) fn removals(desired: &WireGuardDevice, observed: &ObservedWireGuard) -> WireGuardChange {
    let surplus = |key: &&PublicKey| !desired.peers.contains_key(key);
    let remove_peers = observed.peers.keys().filter(surplus).copied().collect();
    WireGuardChange { remove_peers, ..WireGuardChange::default() }
}

/// Whether nothing is to be set or removed, endpoints aside: they follow the peers.
pub(super) fn is_configured(desired: &WireGuardDevice, observed: &ObservedWireGuard) -> bool {
    let mut change = additions(desired, observed);
    for (key, peer) in &mut change.set_peers {
        if observed.peers.contains_key(key) {
            peer.endpoint = None;
        }
    }
    change.set_peers.retain(|_, peer| !peer.is_empty());
    change.is_empty() && removals(desired, observed).is_empty()
}

fn peer_change(desired: &WireGuardPeer, observed: Option<&ObservedPeer>) -> Option<PeerChange> {
    let new = ObservedPeer::default();
    let peer = observed.unwrap_or(&new);
    let mut change = PeerChange::default();
    if observed.is_none() || endpoint_must_be_set(desired, peer) {
        change.endpoint = Some(desired.endpoint);
    }
    if peer.allowed_ips != desired.allowed_ips {
        change.allowed_ips = Some(desired.allowed_ips.clone());
    }
    // The kernel says 0 for "off".
    let keepalive = desired.persistent_keepalive.unwrap_or(0);
    if peer.persistent_keepalive.unwrap_or(0) != keepalive {
        change.persistent_keepalive = Some(keepalive);
    }
    let is_set = match (desired.secret, peer.preshared) {
        (None, Preshared::None) => true,
        (Some(wanted), Preshared::Of(secret)) => wanted == secret,
        _ => false,
    };
    change.preshared_key = (!is_set).then_some(desired.secret);
    (observed.is_none() || !change.is_empty()).then_some(change)
}

/// Roaming is followed while it works: a peer behind NAT sends from another address than it
/// publishes. The published endpoint is set again when it changes, and when the session
/// went stale, because the path it roamed to may be gone. What a former agent wrote nobody
/// knows, and a session that works is left alone.
fn endpoint_must_be_set(desired: &WireGuardPeer, peer: &ObservedPeer) -> bool {
    let published_is_new = peer.pinned_endpoint.is_some_and(|pinned| pinned != desired.endpoint);
    let is_stale = |age: Option<Duration>| age.is_none_or(|age| age > REJECT_AFTER);
    peer.endpoint != Some(desired.endpoint) && (published_is_new || is_stale(peer.handshake_age))
}
