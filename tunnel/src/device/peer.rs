//! One peer: its session engine, where it is, and its counters.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use parking_lot::{Mutex, MutexGuard};
use zeroize::Zeroizing;

use super::{
    Batch, Datagram, Endpoint, FLUSH_LIMIT, HANDSHAKE_LEN, MAX_PACKET, Message, OVERHEAD, Opened,
    Outbox, PeerId, Sealed,
};
use crate::noise::{Identity, Noise, Tick};

/// A peer of the device.
pub(super) struct Peer {
    pub(super) id: PeerId,
    pub(super) key: [u8; 32],
    /// Whether its timers need ticks. Changed under the state's lock.
    awake: AtomicBool,
    state: Mutex<State>,
}

/// What changes with each packet of a peer, and its settings.
pub(super) struct State {
    /// `None` without a private key of ours, or if the peer's key is of low order.
    pub(super) noise: Option<Noise>,
    pub(super) preshared_key: Zeroizing<[u8; 32]>,
    pub(super) endpoint: Option<Endpoint>,
    /// Persistent keepalive, seconds; 0 is off.
    pub(super) keepalive: u16,
    /// When an authentic packet last went either way, on the device's clock, ms.
    pub(super) last_traffic: u64,
    pub(super) last_handshake: Option<SystemTime>,
    /// Bytes of authentic datagrams.
    pub(super) received: u64,
    pub(super) sent: u64,
}

impl Peer {
    pub(super) fn new(
        id: PeerId,
        key: [u8; 32],
        preshared_key: &[u8; 32],
        identity: Option<&Identity>,
    ) -> Self {
        let mut state = State {
            noise: None,
            preshared_key: Zeroizing::new(*preshared_key),
            endpoint: None,
            keepalive: 0,
            last_traffic: 0,
            last_handshake: None,
            received: 0,
            sent: 0,
        };
        state.set_identity(id, &key, identity);
        Self { id, key, awake: AtomicBool::new(false), state: Mutex::new(state) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    pub(super) fn is_awake(&self) -> bool {
        self.awake.load(Ordering::Relaxed)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.key))
    }
}

impl State {
    /// Seals one padded packet, or starts the handshake that it then waits for.
    pub(super) fn seal(&mut self, peer: &Peer, packet: &[u8], now: u64, outbox: &mut Outbox) {
        let Some(endpoint) = self.endpoint else { return };
        self.wake(peer);
        let Some(noise) = &mut self.noise else { return };
        let out = outbox.space(HANDSHAKE_LEN.max(packet.len() + OVERHEAD));
        match noise.seal(packet, out) {
            Sealed::Datagram(len) | Sealed::Initiation(len) => {
                outbox.commit(len, endpoint, Some(peer.id));
                self.count_sent(len, now);
            }
            Sealed::Waiting => {}
        }
    }

    /// Handles one message. The length of a packet at the end of `packets` is returned; it is
    /// not committed, since its source is still to be checked.
    pub(super) fn open(
        &mut self,
        peer: &Peer,
        message: Message,
        datagram: &Datagram<'_>,
        now: u64,
        packets: &mut Batch,
        outbox: &mut Outbox,
    ) -> Option<usize> {
        self.wake(peer);
        let noise = self.noise.as_mut()?;
        let len = HANDSHAKE_LEN.max(datagram.bytes.len());
        let out = match message {
            Message::Data { .. } => packets.space(len),
            _ => outbox.space(len),
        };
        let opened = noise.open(message, datagram.from.ip(), datagram.bytes, out);
        if matches!(opened, Opened::Refused | Opened::Cookie) {
            return None;
        }
        if noise.take_completed() {
            self.last_handshake = Some(SystemTime::now());
            tracing::debug!(peer = %peer, "handshake completed");
        }
        self.roam(peer, datagram.endpoint());
        self.received += datagram.bytes.len() as u64;
        self.last_traffic = now;
        match opened {
            Opened::Packet(len) => Some(len),
            Opened::Reply(len) => {
                outbox.commit(len, datagram.endpoint(), Some(peer.id));
                self.count_sent(len, now);
                None
            }
            _ => None,
        }
    }

    /// Sends what waited for a session.
    pub(super) fn flush(&mut self, peer: &Peer, outbox: &mut Outbox) {
        let (Some(endpoint), Some(noise)) = (self.endpoint, &mut self.noise) else { return };
        while noise.has_queued() && outbox.used() < FLUSH_LIMIT {
            let Some(len) = noise.seal_queued(outbox.space(MAX_PACKET + OVERHEAD)) else { return };
            outbox.commit(len, endpoint, Some(peer.id));
            self.sent += len as u64;
        }
    }

    /// Runs the timers.
    pub(super) fn tick(&mut self, peer: &Peer, now: u64, outbox: &mut Outbox) {
        let (Some(endpoint), Some(noise)) = (self.endpoint, &mut self.noise) else {
            return peer.awake.store(false, Ordering::Relaxed);
        };
        match noise.tick(outbox.space(HANDSHAKE_LEN)) {
            Tick::Send(len) => {
                outbox.commit(len, endpoint, Some(peer.id));
                return self.count_sent(len, now);
            }
            Tick::Idle if self.keepalive == 0 => {
                peer.awake.store(false, Ordering::Relaxed);
            }
            Tick::Idle | Tick::Nothing => {}
        }
        let interval = u64::from(self.keepalive) * 1000;
        if interval != 0 && now.saturating_sub(self.last_traffic) >= interval {
            self.greet(peer, now, outbox);
        }
    }

    /// Sends a keepalive, or an initiation if there is no session.
    pub(super) fn greet(&mut self, peer: &Peer, now: u64, outbox: &mut Outbox) {
        let Some(endpoint) = self.endpoint else { return };
        self.wake(peer);
        let Some(noise) = &mut self.noise else { return };
        // The interval counts from the attempt, so that an unreachable peer is not flooded.
        self.last_traffic = now;
        if let Some(len) = noise.keepalive(outbox.space(HANDSHAKE_LEN)) {
            outbox.commit(len, endpoint, Some(peer.id));
            self.count_sent(len, now);
        }
    }

    /// Starts a handshake at once, whatever there is.
    pub(super) fn rehandshake(&mut self, peer: &Peer, now: u64, outbox: &mut Outbox) {
        let Some(endpoint) = self.endpoint else { return };
        self.wake(peer);
        let Some(noise) = &mut self.noise else { return };
        if let Some(len) = noise.initiate(true, outbox.space(HANDSHAKE_LEN)) {
            outbox.commit(len, endpoint, Some(peer.id));
            self.count_sent(len, now);
        }
    }

    /// Whether there is a session to send with.
    pub(super) fn has_session(&self) -> bool {
        self.noise.as_ref().is_some_and(Noise::has_session)
    }

    /// Takes over the device's private key, a changed one or none.
    pub(super) fn set_identity(&mut self, id: PeerId, key: &[u8; 32], identity: Option<&Identity>) {
        match (identity, &mut self.noise) {
            (Some(identity), Some(noise)) => noise.set_identity(identity),
            (Some(identity), None) => {
                self.noise = Noise::new(identity, key, &self.preshared_key, id.index());
            }
            (None, _) => self.noise = None,
        }
    }

    pub(super) fn set_preshared_key(
        &mut self,
        peer: &Peer,
        preshared_key: &[u8; 32],
        identity: Option<&Identity>,
    ) {
        *self.preshared_key = *preshared_key;
        if let (Some(identity), Some(noise)) = (identity, &mut self.noise) {
            noise.set_preshared_key(identity, &peer.key, preshared_key, peer.id.index());
        }
    }

    pub(super) fn drop_sessions(&mut self, identity: Option<&Identity>) {
        if let (Some(identity), Some(noise)) = (identity, &mut self.noise) {
            noise.set_identity(identity);
        }
    }

    /// Follows a peer to the address that it sent an authentic message from.
    fn roam(&mut self, peer: &Peer, to: Endpoint) {
        if self.endpoint == Some(to) {
            return;
        }
        if self.endpoint.map(|endpoint| endpoint.address) != Some(to.address) {
            tracing::debug!(peer = %peer, address = %to.address, "endpoint changed");
        }
        self.endpoint = Some(to);
    }

    fn count_sent(&mut self, len: usize, now: u64) {
        self.sent += len as u64;
        self.last_traffic = now;
    }

    /// Lets the peer be ticked from now on.
    fn wake(&mut self, peer: &Peer) {
        if peer.is_awake() {
            return;
        }
        if let Some(noise) = &mut self.noise {
            noise.refresh();
            peer.awake.store(true, Ordering::Relaxed);
        }
    }
}
