//! `TUN packets -> seal -> datagrams` and `datagrams -> open -> TUN packets`, without I/O.
//!
//! A [`Device`] is shared by the threads that move packets, the timer and the configuration
//! socket. Packets take a snapshot of the [`Tables`] once per batch and lock one peer per
//! run of its packets; the configuration has its own lock and publishes new tables.

mod config;
mod peer;
mod tables;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::{Mutex, MutexGuard, RwLock};

pub use config::{AllowedIpChange, DeviceUpdate, PeerStatus, PeerUpdate};
pub use tables::PeerId;

use crate::batch::{Batch, Destination, MAX_PACKET, Outbox};
use crate::endpoint::{Endpoint, Source};
use crate::ip;
use crate::noise::{COOKIE_LEN, Claimed, DATA_HEADER, Message, Verdict};
use config::Config;
use peer::{Packet, Peer, State};
use tables::Tables;

/// How often [`Device::tick`] is due.
pub const TICK: std::time::Duration = std::time::Duration::from_millis(250);

/// A WireGuard device: keys, peers, sessions and allowed IPs.
///
/// It starts down; packets and datagrams are dropped until [`Device::set_up`].
pub struct Device {
    config: Mutex<Config>,
    /// Whether the tables lack what the configuration has.
    stale: AtomicBool,
    tables: RwLock<Arc<Tables>>,
    up: AtomicBool,
    /// Of the TUN device, bytes.
    mtu: AtomicUsize,
    /// Milliseconds since the device was made, as of the last tick.
    clock: AtomicU64,
}

/// A received datagram.
#[derive(Debug)]
pub struct Datagram<'a> {
    /// The payload, which is opened in its place.
    pub bytes: &'a mut [u8],
    /// How it came, as its neighbours of one receive did.
    pub origin: &'a Origin,
}

/// How a datagram came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// Who sent it.
    pub from: SocketAddr,
    /// The address of ours that it was sent to, if known.
    pub to: Option<Source>,
    /// Its bits of explicit congestion notification.
    pub ecn: u8,
}

impl Device {
    /// A device without keys and peers, for a TUN device of this MTU in bytes.
    pub fn new(mtu: usize) -> Self {
        Self {
            config: Mutex::default(),
            stale: AtomicBool::new(false),
            tables: RwLock::default(),
            up: AtomicBool::new(false),
            mtu: AtomicUsize::new(mtu),
            clock: AtomicU64::new(0),
        }
    }

    /// Tells the MTU of the TUN device, bytes. Padding does not go beyond it.
    pub fn set_mtu(&self, mtu: usize) {
        self.mtu.store(mtu, Ordering::Relaxed);
    }

    /// Whether packets flow.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// Lets packets flow, or stops them and drops all sessions. Going up, peers with a
    /// persistent keepalive are greeted.
    pub fn set_up(&self, up: bool, outbox: &mut Outbox) {
        if self.up.swap(up, Ordering::Relaxed) == up {
            return;
        }
        let tables = self.tables();
        for peer in tables.peers() {
            let mut state = peer.lock();
            if !up {
                state.noise.drop_sessions();
            } else if state.keepalive != 0 {
                state.greet(peer, self.now(), outbox);
            }
        }
    }

    /// Seals packets from the TUN device for the peers that own their destinations.
    /// Packets without such a peer, or whose peer has no endpoint, are dropped.
    pub fn seal(&self, batch: &Batch, outbox: &mut Outbox) {
        if !self.is_up() {
            return;
        }
        let tables = self.tables();
        let now = self.now();
        let mtu = self.mtu.load(Ordering::Relaxed);
        let mut held = Held::default();
        let routed = batch.packets().filter_map(|packet| {
            let peer = ip::destination(packet.bytes()).and_then(|to| tables.route(to));
            if peer.is_none() {
                tracing::trace!("no peer for a packet");
            }
            Some((peer?, packet))
        });
        let mut packets = routed
            .flat_map(|(peer, packet)| Packet::all(packet, mtu).map(move |packet| (peer, packet)))
            .peekable();
        while let Some((peer, packet)) = packets.next() {
            let state = held.lock(peer);
            match packets.next_if(|(next, _)| next.id == peer.id) {
                Some((_, next)) => state.seal_two(peer, [&packet, &next], now, outbox),
                None => state.seal(peer, &packet, now, outbox),
            }
        }
    }

    /// Opens received datagrams in their places: packets for the TUN device go to `packets`, what
    /// waited for a session to `outbox`, and handshake messages to `handshakes`, for
    /// [`Device::answer`]. What is not authentic, or comes from an address that its peer does not own, is dropped.
    pub fn open<'d>(
        &self,
        datagrams: impl IntoIterator<Item = Datagram<'d>>,
        packets: &mut Vec<&'d [u8]>,
        outbox: &mut Outbox,
        mut handshakes: impl FnMut(Datagram<'d>),
    ) {
        if !self.is_up() {
            return;
        }
        let tables = self.tables();
        let now = self.now();
        let mut held = Held::default();
        let mut last = None;
        let mut datagrams = datagrams.into_iter().peekable();
        while let Some(mut datagram) = datagrams.next() {
            let receiver = match Message::of(datagram.bytes) {
                Some(Message::Data { receiver }) => receiver,
                Some(_) => {
                    handshakes(datagram);
                    continue;
                }
                None => continue,
            };
            let mut other = datagrams.next_if(
                |next| matches!(Message::of(next.bytes), Some(Message::Data { receiver: its }) if its == receiver),
            );
            // Neighbours are mostly of one session.
            let peer = match last {
                Some((index, peer)) if index == receiver => peer,
                _ => tables.by_index(receiver),
            };
            last = Some((receiver, peer));
            let Some(peer) = peer else { continue };
            let state = held.lock(peer);
            let lens = state.open(peer, receiver, &mut datagram, other.as_mut(), now);
            for (datagram, len) in std::iter::once(datagram).chain(other).zip(lens) {
                packets.extend(len.and_then(|len| packet_of(peer, &tables, datagram, len)));
            }
            state.flush(peer, now, outbox);
        }
    }

    /// Answers a handshake message, if it is worth it. It may take 200 us, so it has a thread of
    /// its own, and data messages do not wait for it.
    pub fn answer(&self, datagram: Datagram<'_>, outbox: &mut Outbox) {
        if !self.is_up() {
            return;
        }
        let tables = self.tables();
        let Some(identity) = tables.identity.as_deref() else { return };
        let now = self.now();
        let Some(message) = Message::of(datagram.bytes) else { return };
        if matches!(message, Message::Initiation | Message::Response { .. }) {
            let reply = outbox.space(COOKIE_LEN);
            match identity.gate.check(datagram.origin.from, datagram.bytes, now, reply) {
                Verdict::Answer => {}
                Verdict::Cookie(len) => {
                    return outbox
                        .commit(len, Destination::of_handshake(datagram.endpoint(), None));
                }
                Verdict::Drop => return,
            }
        }
        match message {
            Message::Initiation => {
                let Some(claimed) = Claimed::read(identity, datagram.bytes) else { return };
                let Some(peer) = tables.by_key(claimed.public()) else { return };
                peer.lock().open_initiation(peer, claimed, &datagram, now, outbox);
            }
            Message::Response { receiver } => {
                let Some(peer) = tables.by_index(receiver) else { return };
                let mut state = peer.lock();
                state.open_response(peer, receiver, &datagram, now, outbox);
                state.flush(peer, now, outbox);
            }
            Message::Cookie { receiver } => {
                let Some(peer) = tables.by_index(receiver) else { return };
                peer.lock().noise.open_cookie(datagram.bytes, now);
            }
            Message::Data { .. } => {}
        }
    }

    /// Runs the timers of all peers that are not idle. Due every [`TICK`]; `uptime` is the
    /// time since the device was made, by a monotonic clock.
    pub fn tick(&self, uptime: std::time::Duration, outbox: &mut Outbox) {
        let now = u64::try_from(uptime.as_millis()).unwrap_or(u64::MAX);
        self.clock.store(now, Ordering::Relaxed);
        let tables = self.tables();
        if !self.is_up() {
            return;
        }
        for peer in tables.peers().filter(|peer| peer.is_awake()) {
            peer.lock().tick(peer, now, outbox);
        }
    }

    /// Stops replying from addresses that `keep` refuses. It is asked for each peer that has
    /// been heard, with that peer's address.
    pub(crate) fn keep_sources(&self, keep: impl Fn(IpAddr, Source) -> bool) {
        for peer in self.tables().peers() {
            let Some(Endpoint { address, source: Some(source) }) = peer.lock().endpoint else {
                continue;
            };
            if !keep(address.ip(), source) {
                tracing::debug!(peer = %peer, source = %source.ip, "not replying from there");
                peer.lock().forget_source(source);
            }
        }
    }

    /// Stops replying from `source` to a peer, because that address has gone away.
    pub(crate) fn forget_source(&self, peer: PeerId, source: Source) {
        if let Some(peer) = self.tables().by_id(peer) {
            peer.lock().forget_source(source);
        }
    }

    fn tables(&self) -> Arc<Tables> {
        if self.stale.load(Ordering::Acquire)
            && let Some(mut config) = self.config.try_lock()
        {
            self.publish(&mut config);
        }
        Arc::clone(&self.tables.read())
    }

    fn now(&self) -> u64 {
        self.clock.load(Ordering::Relaxed)
    }
}

/// The packet in an opened message, if its source is the peer's.
fn packet_of<'d>(
    peer: &Peer,
    tables: &Tables,
    Datagram { bytes, origin }: Datagram<'d>,
    len: usize,
) -> Option<&'d [u8]> {
    let packet = bytes.get_mut(DATA_HEADER..DATA_HEADER + len)?;
    if origin.ecn == ip::CE {
        ip::set_congested(packet);
    }
    // The owner of the source over ALL peers: a shorter prefix of this peer does not let it speak
    // for the owner of a longer one.
    let owner = ip::source(packet).and_then(|from| tables.allowed(from));
    if owner != Some(peer.id) {
        tracing::trace!(peer = %peer, "dropped a packet with a foreign source");
        return None;
    }
    Some(packet)
}

/// Stop sending what waited for a session once this much is in the outbox, bytes.
const FLUSH_LIMIT: usize = 4 << 20;

impl Datagram<'_> {
    fn endpoint(&self) -> Endpoint {
        Endpoint { source: self.origin.to, ..Endpoint::new(self.origin.from) }
    }
}

/// The lock of the peer that the last packet was for: kept while its neighbours are for the
/// same peer.
#[derive(Default)]
struct Held<'t>(Option<(PeerId, MutexGuard<'t, State>)>);

impl<'t> Held<'t> {
    fn lock(&mut self, peer: &'t Peer) -> &mut State {
        if !matches!(&self.0, Some((id, _)) if *id == peer.id) {
            // Never two at a time: another thread may hold them the other way round.
            self.0 = None;
        }
        &mut self.0.get_or_insert_with(|| (peer.id, peer.lock())).1
    }
}
