//! One peer: its session engine, where it is, and its counters.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use parking_lot::{Mutex, MutexGuard};

use super::{Datagram, Destination, Endpoint, FLUSH_LIMIT, MAX_PACKET, Outbox, PeerId, Source};
use crate::ip;
use crate::noise::{
    Claimed, DATA_HEADER, HANDSHAKE_LEN, Identity, Indices, Noise, OVERHEAD, Opened, Sealed, Tick,
};
use crate::offload::Split;

/// WireGuard pads the plaintext to a multiple of this many bytes.
const PADDING: usize = 16;

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
    pub(super) noise: Noise,
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

/// A packet to seal: one of those that a super-packet is cut into.
pub(super) struct Packet<'a> {
    of: Split<'a>,
    number: usize,
    len: usize,
    /// With its padding, which does not go beyond the MTU: a full-sized packet with padding would
    /// no longer fit the underlay.
    padded: usize,
}

impl<'a> Packet<'a> {
    /// What a super-packet is cut into, in order.
    pub(super) fn all(of: Split<'a>, mtu: usize) -> impl Iterator<Item = Self> {
        (0..of.count()).map(move |number| {
            let len = of.len(number);
            let padded = len.next_multiple_of(PADDING).min(mtu).max(len);
            Self { of, number, len, padded }
        })
    }

    fn ecn(&self) -> u8 {
        ip::ecn(self.of.bytes())
    }

    /// Writes it behind the place for the header.
    fn write(&self, out: &mut [u8]) {
        let (text, rest) = out[DATA_HEADER..].split_at_mut(self.len);
        self.of.write(self.number, text);
        // Stale bytes of an earlier batch must not leave as padding.
        rest[..self.padded - self.len].fill(0);
    }
}

impl Peer {
    pub(super) fn new(
        id: PeerId,
        key: [u8; 32],
        preshared_key: &[u8; 32],
        indices: Arc<Indices>,
        identity: Option<&Arc<Identity>>,
    ) -> Self {
        let state = State {
            noise: Noise::new(id.index(), indices, &key, preshared_key, identity),
            endpoint: None,
            keepalive: 0,
            last_traffic: 0,
            last_handshake: None,
            received: 0,
            sent: 0,
        };
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
    /// Seals a packet, or starts the handshake that it then waits for.
    pub(super) fn seal(&mut self, peer: &Peer, packet: &Packet<'_>, now: u64, outbox: &mut Outbox) {
        let Some(endpoint) = self.endpoint else { return };
        self.wake(peer);
        let out = outbox.space(HANDSHAKE_LEN.max(packet.padded + OVERHEAD));
        packet.write(out);
        match self.noise.seal(packet.padded, now, out) {
            Sealed::Datagram(len) => {
                outbox.commit(len, Destination::of_packet(endpoint, peer.id, packet.ecn()));
                self.count_sent(len, now);
            }
            Sealed::Initiation(len) => self.commit(peer, len, endpoint, now, outbox),
            Sealed::Waiting | Sealed::Refused => {}
        }
    }

    /// Seals two packets, which takes less than each by itself.
    pub(super) fn seal_two(
        &mut self,
        peer: &Peer,
        packets: [&Packet<'_>; 2],
        now: u64,
        outbox: &mut Outbox,
    ) {
        let lens = packets.map(|packet| packet.padded);
        if let Some(endpoint) = self.endpoint
            && self.noise.has_session(now)
        {
            self.wake(peer);
            let out = outbox.space(lens[0] + lens[1] + 2 * OVERHEAD);
            let (one, other) = out.split_at_mut(lens[0] + OVERHEAD);
            packets[0].write(one);
            packets[1].write(other);
            if let Some(lens) = self.noise.seal_two(lens, now, [one, other]) {
                for (len, packet) in lens.into_iter().zip(packets) {
                    outbox.commit(len, Destination::of_packet(endpoint, peer.id, packet.ecn()));
                    self.count_sent(len, now);
                }
                return;
            }
        }
        packets.into_iter().for_each(|packet| self.seal(peer, packet, now, outbox));
    }

    /// Opens a data message in its place, and another one to the same index. The lengths of the
    /// packets behind their headers are returned, whose sources are still to be checked.
    pub(super) fn open(
        &mut self,
        peer: &Peer,
        receiver: u32,
        datagram: &mut Datagram<'_>,
        other: Option<&mut Datagram<'_>>,
        now: u64,
    ) -> [Option<usize>; 2] {
        let Some(other) = other else {
            let opened = self.noise.open(receiver, datagram.bytes, now);
            return [self.opened(peer, &opened, datagram, now), None];
        };
        let messages = [&mut *datagram.bytes, &mut *other.bytes];
        let [first, second] = self.noise.open_two(receiver, messages, now);
        [self.opened(peer, &first, datagram, now), self.opened(peer, &second, other, now)]
    }

    fn opened(
        &mut self,
        peer: &Peer,
        opened: &Opened,
        datagram: &Datagram<'_>,
        now: u64,
    ) -> Option<usize> {
        self.heard(peer, opened, datagram, now);
        match *opened {
            Opened::Packet(len) => Some(len),
            _ => None,
        }
    }

    /// Answers an initiation that claims to be this peer's.
    pub(super) fn open_initiation(
        &mut self,
        peer: &Peer,
        claimed: Claimed,
        datagram: &Datagram<'_>,
        now: u64,
        outbox: &mut Outbox,
    ) {
        let opened = self.noise.open_initiation(claimed, now, outbox.space(HANDSHAKE_LEN));
        self.reply(peer, &opened, datagram, now, outbox);
    }

    /// Takes the response to an initiation of ours.
    pub(super) fn open_response(
        &mut self,
        peer: &Peer,
        receiver: u32,
        datagram: &Datagram<'_>,
        now: u64,
        outbox: &mut Outbox,
    ) {
        let out = outbox.space(HANDSHAKE_LEN);
        let opened = self.noise.open_response(receiver, datagram.bytes, now, out);
        self.reply(peer, &opened, datagram, now, outbox);
    }

    fn reply(
        &mut self,
        peer: &Peer,
        opened: &Opened,
        datagram: &Datagram<'_>,
        now: u64,
        outbox: &mut Outbox,
    ) {
        self.heard(peer, opened, datagram, now);
        if let Opened::Reply(len) = *opened {
            self.commit(peer, len, datagram.endpoint(), now, outbox);
        }
    }

    /// Takes note of an authentic message.
    fn heard(&mut self, peer: &Peer, opened: &Opened, datagram: &Datagram<'_>, now: u64) {
        if *opened == Opened::Refused {
            return;
        }
        self.wake(peer);
        if self.noise.take_completed() {
            self.last_handshake = Some(SystemTime::now());
            tracing::debug!(peer = %peer, "handshake completed");
        }
        self.roam(peer, datagram.endpoint());
        self.received += datagram.bytes.len() as u64;
        self.last_traffic = now;
    }

    /// Sends what waited for a session.
    pub(super) fn flush(&mut self, peer: &Peer, now: u64, outbox: &mut Outbox) {
        let Some(endpoint) = self.endpoint else { return };
        while self.noise.has_queued(now) && outbox.used() < FLUSH_LIMIT {
            let ecn = self.noise.queued().map_or(0, ip::ecn);
            let out = outbox.space(MAX_PACKET + OVERHEAD);
            if let Some(len) = self.noise.seal_queued(now, out) {
                outbox.commit(len, Destination::of_packet(endpoint, peer.id, ecn));
                self.count_sent(len, now);
            }
        }
    }

    /// Runs the timers.
    pub(super) fn tick(&mut self, peer: &Peer, now: u64, outbox: &mut Outbox) {
        let Some(endpoint) = self.endpoint else {
            return peer.awake.store(false, Ordering::Relaxed);
        };
        match self.noise.tick(now, outbox.space(HANDSHAKE_LEN)) {
            Tick::Send(len) => return self.commit(peer, len, endpoint, now, outbox),
            Tick::Retry(len) => {
                // Whatever it was sent from before, it does not hear us.
                let endpoint = Endpoint { source: None, ..endpoint };
                self.endpoint = Some(endpoint);
                return self.commit(peer, len, endpoint, now, outbox);
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
        // The interval counts from the attempt, so that an unreachable peer is not flooded.
        self.last_traffic = now;
        if let Some(len) = self.noise.keepalive(now, outbox.space(HANDSHAKE_LEN)) {
            self.commit(peer, len, endpoint, now, outbox);
        }
    }

    /// Starts a handshake at once, whatever there is.
    pub(super) fn rehandshake(&mut self, peer: &Peer, now: u64, outbox: &mut Outbox) {
        let Some(endpoint) = self.endpoint else { return };
        self.wake(peer);
        if let Some(len) = self.noise.initiate(true, now, outbox.space(HANDSHAKE_LEN)) {
            self.commit(peer, len, endpoint, now, outbox);
        }
    }

    /// Stops replying from `source`.
    pub(super) fn forget_source(&mut self, source: Source) {
        if let Some(endpoint) = &mut self.endpoint
            && endpoint.source == Some(source)
        {
            endpoint.source = None;
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

    /// Sends a message that carries no packet.
    fn commit(&mut self, peer: &Peer, len: usize, to: Endpoint, now: u64, outbox: &mut Outbox) {
        outbox.commit(len, Destination::of_handshake(to, Some(peer.id)));
        self.count_sent(len, now);
    }

    fn count_sent(&mut self, len: usize, now: u64) {
        self.sent += len as u64;
        self.last_traffic = now;
    }

    /// Lets the peer be ticked from now on.
    fn wake(&self, peer: &Peer) {
        if !peer.is_awake() {
            peer.awake.store(true, Ordering::Relaxed);
        }
    }
}
