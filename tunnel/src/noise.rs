//! The handshake and the sessions of one peer. The only file that names boringtun.
//!
//! What boringtun leaves to its caller is done here: buffers are checked before it would
//! panic on them, counters past the protocol's limit and points of low order are refused,
//! and a changed preshared key neither drops the session nor forgets the newest handshake
//! seen (which would let an old one be replayed).

use std::net::IpAddr;
use std::sync::Arc;

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

/// What sealing adds to a packet, bytes.
pub(crate) const OVERHEAD: usize = 32;
/// The longest handshake message, bytes.
pub(crate) const HANDSHAKE_LEN: usize = 148;
/// The length of a cookie reply, bytes.
pub(crate) const COOKIE_LEN: usize = 64;

const DATA: u8 = 4;
/// Data messages with this counter or a higher one are refused (WireGuard paper, 6.1).
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// Handshake messages per second that are answered without asking for a cookie. One costs
/// about 250 us, so that a flood of them takes a tenth of a core.
const HANDSHAKES_PER_SECOND: u64 = 400;

/// The device's own key pair and what guards its handshakes.
pub(crate) struct Identity {
    private: StaticSecret,
    public: PublicKey,
    limiter: RateLimiter,
    /// boringtun checks each message again per peer. The device's limiter has counted it
    /// already, so this one never says no.
    unlimited: Arc<RateLimiter>,
}

/// What the limiter says of a datagram.
pub(crate) enum Admission {
    /// Well-formed, and if it is a handshake, made by somebody who knows our public key.
    Admitted(Message),
    /// We are under load: answer with this many bytes of the reply buffer.
    Cookie(usize),
    /// Not for us.
    Refused,
}

/// A datagram's type and our index in it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Message {
    Initiation,
    Response { receiver: u32 },
    Cookie { receiver: u32 },
    Data { receiver: u32 },
}

impl Identity {
    /// From a private key, clamped as X25519 uses it.
    pub(crate) fn new(private: &[u8; 32]) -> Self {
        let private = StaticSecret::from(*clamp(private));
        let public = PublicKey::from(&private);
        Self {
            limiter: RateLimiter::new(&public, HANDSHAKES_PER_SECOND),
            unlimited: Arc::new(RateLimiter::new(&public, u64::MAX)),
            private,
            public,
        }
    }

    pub(crate) fn public(&self) -> &[u8; 32] {
        self.public.as_bytes()
    }

    pub(crate) fn private(&self) -> &[u8; 32] {
        self.private.as_bytes()
    }

    /// Whether `private` is this identity's key.
    pub(crate) fn is(&self, private: &[u8; 32]) -> bool {
        *clamp(private) == *self.private.as_bytes()
    }

    /// Begins a new second of the load limit, if the last one is over.
    pub(crate) fn reset_load(&self) {
        self.limiter.reset_count();
    }

    /// Checks form, first MAC and load. `reply` receives a cookie of [`COOKIE_LEN`] bytes.
    pub(crate) fn admit(&self, from: IpAddr, datagram: &[u8], reply: &mut [u8]) -> Admission {
        if reply.len() < COOKIE_LEN {
            return Admission::Refused;
        }
        match self.limiter.verify_packet(Some(from), datagram, reply) {
            Ok(Packet::HandshakeInit(_)) => Admission::Admitted(Message::Initiation),
            Ok(Packet::HandshakeResponse(message)) => {
                Admission::Admitted(Message::Response { receiver: message.receiver_idx })
            }
            Ok(Packet::PacketCookieReply(message)) => {
                Admission::Admitted(Message::Cookie { receiver: message.receiver_idx })
            }
            Ok(Packet::PacketData(message)) => {
                Admission::Admitted(Message::Data { receiver: message.receiver_idx })
            }
            Err(TunnResult::WriteToNetwork(cookie)) => Admission::Cookie(cookie.len()),
            Err(_) => Admission::Refused,
        }
    }

    /// The public key of whoever made this initiation.
    pub(crate) fn initiator(&self, datagram: &[u8]) -> Option<[u8; 32]> {
        if is_low_order(datagram.get(8..40)?) {
            return None;
        }
        match Tunn::parse_incoming_packet(datagram) {
            Ok(Packet::HandshakeInit(message)) => {
                parse_handshake_anon(&self.private, &self.public, &message)
                    .ok()
                    .map(|half| half.peer_static_public)
            }
            _ => None,
        }
    }
}

/// The handshake and the sessions with one peer.
pub(crate) struct Noise {
    tunn: Tunn,
    retired: Option<Box<Retired>>,
    /// Packets wait inside for a session.
    queued: bool,
    /// Our index of the session that we answered last and the peer has not used yet.
    unconfirmed: Option<u32>,
    /// A handshake was completed since [`Noise::take_completed`].
    completed: bool,
}

/// The engine under the preshared key before this one.
struct Retired {
    tunn: Tunn,
    /// Its session is the one to send with.
    sending: bool,
    /// The newest handshake it has seen is not known to its successor yet.
    guarding: bool,
}

/// What became of a packet to send. Lengths are of the output buffer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Sealed {
    Datagram(usize),
    /// The packet waits for a session; this many bytes of handshake go first.
    Initiation(usize),
    /// The packet waits for the session that is being made.
    Waiting,
}

/// What became of a received message. Lengths are of the output buffer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// A packet for the TUN device. The source address is not checked yet.
    Packet(usize),
    /// An empty message.
    Keepalive,
    /// A handshake message that this one is to be answered with.
    Reply(usize),
    /// A cookie for the next handshake message. Says nothing about who sent it.
    Cookie,
    /// Not authentic, replayed, or of no use.
    Refused,
}

/// What a tick asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Tick {
    /// Send this many bytes of the output buffer.
    Send(usize),
    Nothing,
    /// No session and no attempt to get one: ticks are no longer needed.
    Idle,
}

impl Noise {
    /// An engine for the peer with this public key, or `None` when the key is a point of
    /// low order, with which a handshake would prove nothing. The upper 24 bits of our
    /// session indices are `index`.
    pub(crate) fn new(
        identity: &Identity,
        peer: &[u8; 32],
        preshared_key: &[u8; 32],
        index: u32,
    ) -> Option<Self> {
        if is_low_order(peer) {
            return None;
        }
        let tunn = new_tunn(identity, peer, preshared_key, index);
        Some(Self { tunn, retired: None, queued: false, unconfirmed: None, completed: false })
    }

    /// Brings the engine's clock up to date. It is needed before the first message after a
    /// pause without ticks, or timers would start in the past.
    pub(crate) fn refresh(&mut self) {
        let mut scratch = [0; HANDSHAKE_LEN];
        let _ = self.tunn.update_timers(&mut scratch);
    }

    /// Seals a packet, padded by the caller. `out` must hold the packet and [`OVERHEAD`],
    /// and at least [`HANDSHAKE_LEN`]; with less, the packet waits for ever.
    pub(crate) fn seal(&mut self, packet: &[u8], out: &mut [u8]) -> Sealed {
        if out.len() < HANDSHAKE_LEN.max(packet.len() + OVERHEAD) {
            return Sealed::Waiting;
        }
        if let Some(retired) = self.retired.as_mut().filter(|retired| retired.sending) {
            if retired.tunn.time_since_last_handshake().is_some()
                && let TunnResult::WriteToNetwork(datagram) = retired.tunn.encapsulate(packet, out)
            {
                return Sealed::Datagram(datagram.len());
            }
            retired.sending = false;
        }
        match self.tunn.encapsulate(packet, out) {
            TunnResult::WriteToNetwork(datagram) if datagram[0] == DATA => {
                Sealed::Datagram(datagram.len())
            }
            TunnResult::WriteToNetwork(datagram) => {
                self.queued = true;
                Sealed::Initiation(datagram.len())
            }
            _ => {
                self.queued = true;
                Sealed::Waiting
            }
        }
    }

    /// Whether packets wait for a session.
    pub(crate) fn has_queued(&self) -> bool {
        self.queued
    }

    /// The next packet that waited, sealed, now that there may be a session.
    pub(crate) fn seal_queued(&mut self, out: &mut [u8]) -> Option<usize> {
        if !self.has_session() || out.len() < crate::batch::MAX_PACKET + OVERHEAD {
            return None;
        }
        match self.tunn.decapsulate(None, &[], out) {
            TunnResult::WriteToNetwork(datagram) => Some(datagram.len()),
            _ => {
                self.queued = false;
                None
            }
        }
    }

    /// Handles a message that [`Identity::admit`] let through. `out` must be as long as the
    /// datagram and at least [`HANDSHAKE_LEN`]; with less, the message is refused.
    pub(crate) fn open(
        &mut self,
        message: Message,
        from: IpAddr,
        datagram: &[u8],
        out: &mut [u8],
    ) -> Opened {
        if out.len() < HANDSHAKE_LEN.max(datagram.len()) {
            return Opened::Refused;
        }
        match message {
            Message::Initiation => self.open_initiation(from, datagram, out),
            Message::Response { .. } => self.open_response(from, datagram, out),
            Message::Cookie { .. } => match self.tunn.decapsulate(Some(from), datagram, out) {
                TunnResult::Done => Opened::Cookie,
                _ => Opened::Refused,
            },
            Message::Data { receiver } => self.open_data(receiver, from, datagram, out),
        }
    }

    /// Timers: retransmission, rekeying, passive keepalive, expiry. Due every 250 ms at
    /// least. `out` must hold [`HANDSHAKE_LEN`].
    pub(crate) fn tick(&mut self, out: &mut [u8]) -> Tick {
        if out.len() < HANDSHAKE_LEN {
            return Tick::Nothing;
        }
        if let Some(retired) = &mut self.retired {
            let mut scratch = [0; HANDSHAKE_LEN];
            // Only its sessions' age matters; it must not start handshakes of its own.
            let _ = retired.tunn.update_timers(&mut scratch);
            if !retired.guarding && retired.tunn.time_since_last_handshake().is_none() {
                self.retired = None;
            }
        }
        match self.tunn.update_timers(out) {
            TunnResult::WriteToNetwork(datagram) => Tick::Send(datagram.len()),
            TunnResult::Err(WireGuardError::ConnectionExpired) => {
                self.queued = false;
                Tick::Idle
            }
            _ => Tick::Nothing,
        }
    }

    /// An initiation; `None` when one is under way and `force` is not set.
    pub(crate) fn initiate(&mut self, force: bool, out: &mut [u8]) -> Option<usize> {
        match self.tunn.format_handshake_initiation(out, force) {
            TunnResult::WriteToNetwork(datagram) => Some(datagram.len()),
            _ => None,
        }
    }

    /// A keepalive, or an initiation when there is no session to keep.
    pub(crate) fn keepalive(&mut self, out: &mut [u8]) -> Option<usize> {
        if out.len() < HANDSHAKE_LEN {
            return None;
        }
        if !self.has_session() {
            return self.initiate(false, out);
        }
        match self.tunn.encapsulate(&[], out) {
            TunnResult::WriteToNetwork(datagram) => Some(datagram.len()),
            _ => None,
        }
    }

    /// Whether there is a session to send with.
    pub(crate) fn has_session(&self) -> bool {
        self.tunn.time_since_last_handshake().is_some()
    }

    /// Whether a handshake was completed since the last call.
    pub(crate) fn take_completed(&mut self) -> bool {
        std::mem::take(&mut self.completed)
    }

    /// Takes over a new private key of the device (or the same one) and drops the sessions.
    pub(crate) fn set_identity(&mut self, identity: &Identity) {
        self.drop_sessions(identity);
        self.retired = self.retired.take().filter(|retired| retired.guarding);
        if let Some(retired) = &mut self.retired {
            retired.sending = false;
        }
    }

    /// Takes another preshared key. Until a handshake under the new one is done, the session
    /// under the old one stays in use, as in the kernel.
    pub(crate) fn set_preshared_key(
        &mut self,
        identity: &Identity,
        peer: &[u8; 32],
        preshared_key: &[u8; 32],
        index: u32,
    ) {
        let fresh = new_tunn(identity, peer, preshared_key, index);
        let tunn = std::mem::replace(&mut self.tunn, fresh);
        // The engine before the last one guards against replays until the peer has made a
        // handshake; its place is not given up for a newer session.
        if !self.retired.as_ref().is_some_and(|retired| retired.guarding) {
            self.retired = Some(Box::new(Retired { tunn, sending: true, guarding: true }));
        }
        self.queued = false;
        self.unconfirmed = None;
        self.refresh();
    }

    fn drop_sessions(&mut self, identity: &Identity) {
        let limiter = || Some(Arc::clone(&identity.unlimited));
        self.tunn.set_static_private(identity.private.clone(), identity.public, limiter());
        if let Some(retired) = &mut self.retired {
            retired.tunn.set_static_private(identity.private.clone(), identity.public, limiter());
        }
        self.unconfirmed = None;
    }

    fn open_initiation(&mut self, from: IpAddr, datagram: &[u8], out: &mut [u8]) -> Opened {
        if is_low_order(&datagram[8..40]) {
            return Opened::Refused;
        }
        if let Some(retired) = self.retired.as_mut().filter(|retired| retired.guarding) {
            // It refuses a handshake that is not newer than the newest it has seen. Its
            // answer, under the old preshared key, is of no use.
            if !matches!(
                retired.tunn.decapsulate(Some(from), datagram, out),
                TunnResult::WriteToNetwork(_)
            ) {
                return Opened::Refused;
            }
        }
        match self.tunn.decapsulate(Some(from), datagram, out) {
            TunnResult::WriteToNetwork(response) => {
                let len = response.len();
                self.unconfirmed = word(response, 4);
                if let Some(retired) = &mut self.retired {
                    retired.guarding = false;
                }
                Opened::Reply(len)
            }
            _ => Opened::Refused,
        }
    }

    fn open_response(&mut self, from: IpAddr, datagram: &[u8], out: &mut [u8]) -> Opened {
        if is_low_order(&datagram[12..44]) {
            return Opened::Refused;
        }
        match self.tunn.decapsulate(Some(from), datagram, out) {
            TunnResult::WriteToNetwork(keepalive) => {
                let len = keepalive.len();
                self.established();
                Opened::Reply(len)
            }
            _ => Opened::Refused,
        }
    }

    fn open_data(
        &mut self,
        receiver: u32,
        from: IpAddr,
        datagram: &[u8],
        out: &mut [u8],
    ) -> Opened {
        let counter = datagram.get(8..16).and_then(|bytes| bytes.try_into().ok());
        if counter.is_none_or(|bytes| u64::from_le_bytes(bytes) >= REJECT_AFTER_MESSAGES) {
            return Opened::Refused;
        }
        let opened = opened_data(self.tunn.decapsulate(Some(from), datagram, out));
        if opened == Opened::Refused {
            return match &mut self.retired {
                Some(retired) => opened_data(retired.tunn.decapsulate(Some(from), datagram, out)),
                None => Opened::Refused,
            };
        }
        if self.unconfirmed == Some(receiver) {
            self.established();
        }
        opened
    }

    fn established(&mut self) {
        self.completed = true;
        self.unconfirmed = None;
        if let Some(retired) = &mut self.retired {
            retired.sending = false;
        }
    }
}

fn opened_data(result: TunnResult<'_>) -> Opened {
    match result {
        TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
            Opened::Packet(packet.len())
        }
        TunnResult::Done => Opened::Keepalive,
        _ => Opened::Refused,
    }
}

/// Persistent keepalive is left to the device, so that a change of it needs no new engine.
fn new_tunn(identity: &Identity, peer: &[u8; 32], preshared_key: &[u8; 32], index: u32) -> Tunn {
    let preshared_key = (*preshared_key != [0; 32]).then_some(*preshared_key);
    Tunn::new(
        identity.private.clone(),
        PublicKey::from(*peer),
        preshared_key,
        None,
        index,
        Some(Arc::clone(&identity.unlimited)),
    )
}

fn clamp(private: &[u8; 32]) -> Zeroizing<[u8; 32]> {
    let mut key = Zeroizing::new(*private);
    key[0] &= 248;
    key[31] = (key[31] & 127) | 64;
    key
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

/// Whether X25519 with this point gives a shared secret that everybody knows.
fn is_low_order(point: &[u8]) -> bool {
    point.try_into().map_or(true, gambeson_keys::is_low_order)
}
