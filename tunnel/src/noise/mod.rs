//! The handshakes and the sessions of one peer, as in the
//! [paper](https://www.wireguard.com/papers/wireguard.pdf) (of 2020-06-01), and as in Linux
//! where the paper is silent.
//!
//! [`Identity`] is the device's, [`Noise`] is a peer's. Nothing here knows of sockets or
//! clocks: datagrams and the device's time, in ms, are passed in.

mod aead;
mod bucket;
mod cookie;
mod crypto;
mod erase;
mod handshake;
mod identity;
mod indices;
mod message;
mod remote;
mod replay;
mod session;
mod stamp;
#[cfg(test)]
mod tests;
mod timers;

use std::collections::VecDeque;
use std::sync::Arc;

use zeroize::Zeroizing;

pub(crate) use aead::allow_avx512;
pub(crate) use cookie::Verdict;
pub(crate) use handshake::Claimed;
pub(crate) use identity::Identity;
pub(crate) use indices::Indices;
pub(crate) use message::{COOKIE_LEN, DATA_HEADER, INITIATION_LEN as HANDSHAKE_LEN, Message};

use crate::ip;
use bucket::{Bucket, Rate};
use cookie::Jar;
use crypto::{Key, agree};
use handshake::{Initiated, Timestamp};
use remote::Remote;
use session::{Received, Session, Sessions};
use timers::{Due, Timers};

/// What sealing adds to a packet, bytes.
pub(crate) const OVERHEAD: usize = DATA_HEADER + aead::TAG;

/// How many packets wait for a session, as in the kernel (`MAX_STAGED_PACKETS`).
const WAITING: usize = 128;
/// Initiations that a peer may have answered. The kernel takes 50 a second; the burst is what
/// a clock of 250 ms needs.
const INITIATIONS: Rate = Rate { per_second: 50, burst: 13 };

/// The handshake and the sessions with one peer.
pub(crate) struct Noise {
    /// Whose our indices are.
    owner: u32,
    indices: Arc<Indices>,
    remote: Remote,
    local: Option<Local>,
    /// Of the newest initiation that was taken. It outlives keys and sessions: an older one is
    /// a replay.
    newest: Timestamp,
    initiations: Bucket,
    initiated: Option<Initiated>,
    jar: Jar,
    sessions: Sessions,
    /// Packets without a session, the oldest first.
    waiting: VecDeque<Vec<u8>>,
    timers: Timers,
    /// A new session is to be made at the next tick.
    is_due: bool,
    /// A handshake was completed since [`Noise::take_completed`].
    completed: bool,
}

/// Our side of all handshakes with the peer.
struct Local {
    identity: Arc<Identity>,
    /// What only both static keys give.
    shared: Key,
}

/// What became of a packet to send. Lengths are of the output buffer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Sealed {
    Datagram(usize),
    /// The packet waits for a session; this many bytes of handshake go first.
    Initiation(usize),
    /// The packet waits for the session that is being made.
    Waiting,
    /// Nothing can be sent to this peer.
    Refused,
}

/// What became of a received message. Lengths are of the output buffer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// A packet for the TUN device. The source address is not checked yet.
    Packet(usize),
    /// Nothing for the TUN device: an empty message, or one that holds no whole IP packet.
    Keepalive,
    /// A handshake message that this one is to be answered with.
    Reply(usize),
    /// Not authentic, replayed, or of no use.
    Refused,
}

/// What a tick asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Tick {
    /// Send this many bytes of the output buffer.
    Send(usize),
    /// The same, and the peer has not been heard: the way to it may be another one now.
    Retry(usize),
    Nothing,
    /// No session and no attempt to get one: ticks are no longer needed.
    Idle,
}

impl Noise {
    /// An engine for the peer with this public key. Nothing can be sent without an identity,
    /// nor if the key is a point of low order, with which a handshake would prove nothing.
    pub(crate) fn new(
        owner: u32,
        indices: Arc<Indices>,
        peer: &[u8; 32],
        preshared_key: &[u8; 32],
        identity: Option<&Arc<Identity>>,
    ) -> Self {
        let mut noise = Self {
            owner,
            indices,
            remote: Remote::new(peer, preshared_key),
            local: None,
            newest: Timestamp::default(),
            initiations: Bucket::full(INITIATIONS, 0),
            initiated: None,
            jar: Jar::default(),
            sessions: Sessions::default(),
            waiting: VecDeque::new(),
            timers: Timers::default(),
            is_due: false,
            completed: false,
        };
        noise.set_identity(identity);
        noise
    }

    /// Takes over a private key of the device, or none, and drops the sessions.
    pub(crate) fn set_identity(&mut self, identity: Option<&Arc<Identity>>) {
        self.drop_sessions();
        self.local = identity.and_then(|identity| {
            let shared = agree(identity.secret(), &self.remote.public)?;
            Some(Local { identity: Arc::clone(identity), shared })
        });
    }

    /// Takes another preshared key. Sessions stay as they are, as in the kernel; the next
    /// handshake is under the new one.
    pub(crate) fn set_preshared_key(&mut self, preshared_key: &[u8; 32]) {
        self.remote.preshared_key = Key::new(*preshared_key);
    }

    /// Zeros for none.
    pub(crate) fn preshared_key(&self) -> &Zeroizing<[u8; 32]> {
        &self.remote.preshared_key
    }

    /// Drops sessions, handshakes and what waits for them.
    pub(crate) fn drop_sessions(&mut self) {
        self.sessions = Sessions::default();
        self.initiated = None;
        self.waiting = VecDeque::new();
        self.timers = Timers::default();
        self.is_due = false;
    }

    /// Seals a packet in its place, padded by the caller, or keeps it for the session to come.
    /// It is `len` bytes behind [`DATA_HEADER`] in `out`, which must have room for [`OVERHEAD`]
    /// more, and hold at least [`HANDSHAKE_LEN`].
    pub(crate) fn seal(&mut self, len: usize, now: u64, out: &mut [u8]) -> Sealed {
        if self.local.is_none() {
            return Sealed::Refused;
        }
        if let Some(len) = self.send(len, now, out) {
            return Sealed::Datagram(len);
        }
        let Some(packet) = out.get(DATA_HEADER..DATA_HEADER + len) else { return Sealed::Refused };
        if self.waiting.len() >= WAITING {
            self.waiting.pop_front();
        }
        self.waiting.push_back(packet.to_vec());
        match self.initiate(false, now, out) {
            Some(len) => Sealed::Initiation(len),
            None => Sealed::Waiting,
        }
    }

    /// Seals two packets, each as [`Noise::seal`] does. `None` without a session for them.
    pub(crate) fn seal_two(
        &mut self,
        lens: [usize; 2],
        now: u64,
        outs: [&mut [u8]; 2],
    ) -> Option<[usize; 2]> {
        self.local.as_ref()?;
        let session = self.sessions.current_mut(now)?;
        let sealed = session.seal_two(lens, outs)?;
        self.is_due |= session.is_old(now);
        self.timers.sent(now, true);
        Some(sealed)
    }

    /// Whether packets wait, and there is a session for them.
    pub(crate) fn has_queued(&self, now: u64) -> bool {
        !self.waiting.is_empty() && self.has_session(now)
    }

    /// The next packet that waits.
    pub(crate) fn queued(&self) -> Option<&[u8]> {
        self.waiting.front().map(Vec::as_slice)
    }

    /// The next packet that waited, sealed, now that there may be a session. With too short an
    /// `out` it is dropped.
    pub(crate) fn seal_queued(&mut self, now: u64, out: &mut [u8]) -> Option<usize> {
        let packet = self.waiting.pop_front()?;
        out.get_mut(DATA_HEADER..DATA_HEADER + packet.len())?.copy_from_slice(&packet);
        self.send(packet.len(), now, out)
    }

    /// Opens a data message in its place: the packet is behind [`DATA_HEADER`].
    pub(crate) fn open(&mut self, receiver: u32, datagram: &mut [u8], now: u64) -> Opened {
        let received = self.sessions.open(receiver, datagram, now);
        received.map_or(Opened::Refused, |received| self.received(&received, datagram, now))
    }

    /// Opens two data messages to one index, each as [`Noise::open`] does.
    pub(crate) fn open_two(
        &mut self,
        receiver: u32,
        [one, other]: [&mut [u8]; 2],
        now: u64,
    ) -> [Opened; 2] {
        let [first, second] = self.sessions.open_two(receiver, [&mut *one, &mut *other], now);
        [(first, one), (second, other)].map(|(received, datagram)| {
            received.map_or(Opened::Refused, |received| self.received(&received, datagram, now))
        })
    }

    fn received(&mut self, received: &Received, datagram: &[u8], now: u64) -> Opened {
        if received.is_first {
            self.established();
        }
        self.timers.received(now, received.len > 0);
        if let Some(session) = self.sessions.current(now)
            && session.is_initiator()
            && self.timers.is_last_minute(session.age(now))
        {
            self.is_due = true;
        }
        let text = datagram.get(DATA_HEADER..DATA_HEADER + received.len);
        text.and_then(ip::len).map_or(Opened::Keepalive, Opened::Packet)
    }

    /// Answers an initiation that claims to be this peer's. `out` must hold [`HANDSHAKE_LEN`].
    pub(crate) fn open_initiation(&mut self, claimed: Claimed, now: u64, out: &mut [u8]) -> Opened {
        self.answer(claimed, now, out).map_or(Opened::Refused, Opened::Reply)
    }

    fn answer(&mut self, claimed: Claimed, now: u64, out: &mut [u8]) -> Option<usize> {
        let proven = claimed.prove(&self.local.as_ref()?.shared)?;
        if proven.timestamp <= self.newest || !self.initiations.take(INITIATIONS, now) {
            return None;
        }
        self.newest = proven.timestamp;
        let index = self.indices.claim(self.owner);
        let agreed = proven.respond(&self.remote, index, out)?;
        self.jar.sign(&self.remote, out.get_mut(..message::RESPONSE_LEN)?, now);
        self.sessions.offer(Session::new(agreed, now)?);
        self.timers.received(now, false);
        self.timers.sent(now, false);
        Some(message::RESPONSE_LEN)
    }

    /// Takes the response to our initiation, and answers it with an empty message: only then
    /// may the peer send. `out` must hold [`OVERHEAD`].
    pub(crate) fn open_response(
        &mut self,
        receiver: u32,
        datagram: &[u8],
        now: u64,
        out: &mut [u8],
    ) -> Opened {
        if self.complete(receiver, datagram, now).is_none() {
            return Opened::Refused;
        }
        self.timers.received(now, false);
        self.established();
        self.send(0, now, out).map_or(Opened::Keepalive, Opened::Reply)
    }

    fn complete(&mut self, receiver: u32, datagram: &[u8], now: u64) -> Option<()> {
        let local = self.local.as_ref()?;
        let initiated = self.initiated.as_ref().filter(|initiated| initiated.is(receiver))?;
        let response = initiated.read_response(&local.identity, &self.remote, datagram)?;
        let agreed = self.initiated.take()?.agreed(response);
        self.sessions.begin(Session::new(agreed, now)?);
        Some(())
    }

    /// Takes a cookie for our next handshake message. It says nothing about who sent it.
    pub(crate) fn open_cookie(&mut self, datagram: &[u8], now: u64) {
        self.jar.take(&self.remote, datagram, now);
    }

    /// Timers: retransmission, rekeying, passive keepalive, expiry. `out` must hold
    /// [`HANDSHAKE_LEN`].
    pub(crate) fn tick(&mut self, now: u64, out: &mut [u8]) -> Tick {
        self.sessions.expire(now);
        match self.timers.due(now) {
            Some(Due::Retry) => {
                return self.write_initiation(now, out).map_or(Tick::Nothing, Tick::Retry);
            }
            Some(Due::Unheard) => {
                return self.initiate(false, now, out).map_or(Tick::Nothing, Tick::Retry);
            }
            Some(Due::Keepalive) => {
                if let Some(len) = self.send(0, now, out) {
                    return Tick::Send(len);
                }
            }
            Some(Due::GiveUp) => {
                self.initiated = None;
                self.waiting.clear();
            }
            None => {}
        }
        if std::mem::take(&mut self.is_due)
            && let Some(len) = self.initiate(false, now, out)
        {
            return Tick::Send(len);
        }
        match self.timers.is_idle() && self.sessions.is_empty() {
            true => Tick::Idle,
            false => Tick::Nothing,
        }
    }

    /// An initiation; `None` when one was sent just now and `force` is not set.
    pub(crate) fn initiate(&mut self, force: bool, now: u64, out: &mut [u8]) -> Option<usize> {
        let may_go = self.timers.want(now);
        if may_go || force { self.write_initiation(now, out) } else { None }
    }

    fn write_initiation(&mut self, now: u64, out: &mut [u8]) -> Option<usize> {
        let Local { identity, shared } = self.local.as_ref()?;
        let index = self.indices.claim(self.owner);
        let stamp = stamp::stamp();
        let initiated = Initiated::write(identity, &self.remote, shared, &stamp, index, out)?;
        self.jar.sign(&self.remote, out.get_mut(..HANDSHAKE_LEN)?, now);
        self.initiated = Some(initiated);
        self.timers.initiation_sent(now);
        self.is_due = false;
        Some(HANDSHAKE_LEN)
    }

    /// A keepalive, or an initiation when there is no session to keep. `out` must hold
    /// [`HANDSHAKE_LEN`].
    pub(crate) fn keepalive(&mut self, now: u64, out: &mut [u8]) -> Option<usize> {
        self.send(0, now, out).or_else(|| self.initiate(false, now, out))
    }

    /// Whether there is a session to send with.
    pub(crate) fn has_session(&self, now: u64) -> bool {
        self.sessions.current(now).is_some()
    }

    /// Whether a handshake was completed since the last call.
    pub(crate) fn take_completed(&mut self) -> bool {
        std::mem::take(&mut self.completed)
    }

    /// Seals with the session that there is, and remembers to make another in time.
    /// Seals what is in place, as in [`Noise::seal`], if there is a session.
    fn send(&mut self, len: usize, now: u64, out: &mut [u8]) -> Option<usize> {
        let session = self.sessions.current_mut(now)?;
        let sealed = session.seal(len, out)?;
        self.is_due |= session.is_old(now);
        self.timers.sent(now, len > 0);
        Some(sealed)
    }

    fn established(&mut self) {
        self.completed = true;
        self.timers.completed();
    }
}
