//! A session: a key for each direction, counters, and an age (WireGuard paper, 5.4.6).

use super::OVERHEAD;
use super::aead::{Cipher, Tag};
use super::erase::Erased;
use super::handshake::Agreed;
use super::indices::Index;
use super::message::{DATA, DATA_HEADER, array};
use super::replay::Replay;

/// No message is sent or taken with this counter or a higher one.
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// The initiator makes a new session after this many messages.
const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
/// A session is of no use from this age on, ms.
pub(super) const REJECT_AFTER_TIME: u64 = 180_000;
/// The initiator makes a new session at this age, when it sends, ms.
const REKEY_AFTER_TIME: u64 = 120_000;
/// How many sessions stay open behind the current one.
const PREVIOUS: usize = 3;

/// One session.
pub(super) struct Session {
    ours: Index,
    theirs: u32,
    sealing: Erased<Cipher>,
    opening: Erased<Cipher>,
    /// Of the next message.
    counter: u64,
    replay: Replay,
    /// On the device's clock, ms.
    born: u64,
    is_initiator: bool,
}

impl Session {
    pub(super) fn new(agreed: Agreed, now: u64) -> Option<Self> {
        Some(Self {
            sealing: Erased::new(Cipher::new(&agreed.sealing)?),
            opening: Erased::new(Cipher::new(&agreed.opening)?),
            ours: agreed.ours,
            theirs: agreed.theirs,
            counter: 0,
            replay: Replay::new(),
            born: now,
            is_initiator: agreed.is_initiator,
        })
    }

    /// Whether it may be used at all.
    pub(super) fn is_alive(&self, now: u64) -> bool {
        self.age(now) < REJECT_AFTER_TIME
    }

    pub(super) fn age(&self, now: u64) -> u64 {
        now.saturating_sub(self.born)
    }

    pub(super) fn is_initiator(&self) -> bool {
        self.is_initiator
    }

    /// Whether whoever initiated it should make another one, as it is about to send.
    pub(super) fn is_old(&self, now: u64) -> bool {
        self.counter >= REKEY_AFTER_MESSAGES
            || (self.is_initiator && self.age(now) >= REKEY_AFTER_TIME)
    }

    /// Whether a message to this index is for it.
    fn is_named(&self, index: u32, now: u64) -> bool {
        self.ours.value() == index && self.is_alive(now)
    }

    /// Seals the `len` bytes that are behind the place for the header in `out`, which has room
    /// for [`OVERHEAD`] more.
    pub(super) fn seal(&mut self, len: usize, out: &mut [u8]) -> Option<usize> {
        let (counter, text, tag) = self.begin(len, out)?;
        *tag = self.sealing.get().seal(counter, text)?;
        Some(len + OVERHEAD)
    }

    /// Seals two packets, as [`Session::seal`] does one.
    pub(super) fn seal_two(
        &mut self,
        lens: [usize; 2],
        [out, other_out]: [&mut [u8]; 2],
    ) -> Option<[usize; 2]> {
        let (counter, text, tag) = self.begin(lens[0], out)?;
        let (other_counter, other_text, other_tag) = self.begin(lens[1], other_out)?;
        let counters = [counter, other_counter];
        let [one, other] = self.sealing.get().seal_two(counters, [text, other_text]);
        (*tag, *other_tag) = (one?, other?);
        Some(lens.map(|len| len + OVERHEAD))
    }

    /// Writes the header of the next message. Returns its counter, its text and the place for its
    /// tag.
    fn begin<'o>(
        &mut self,
        len: usize,
        out: &'o mut [u8],
    ) -> Option<(u64, &'o mut [u8], &'o mut Tag)> {
        let counter = self.counter;
        if counter >= REJECT_AFTER_MESSAGES {
            return None;
        }
        let out = out.get_mut(..len + OVERHEAD)?;
        let (header, body) = out.split_at_mut(DATA_HEADER);
        let (text, tag) = body.split_last_chunk_mut()?;
        header[..4].copy_from_slice(&DATA.to_le_bytes());
        header[4..8].copy_from_slice(&self.theirs.to_le_bytes());
        header[8..].copy_from_slice(&counter.to_le_bytes());
        self.counter += 1;
        Some((counter, text, tag))
    }

    /// Opens two messages in their places, as [`Session::open`] does one.
    fn open_two(&mut self, [one, other]: [&mut [u8]; 2]) -> [Option<usize>; 2] {
        if let (Some(counter), Some(other_counter)) = (self.counter(one), self.counter(other))
            && let Some(sealed) = one.get_mut(DATA_HEADER..)
            && let Some(other_sealed) = other.get_mut(DATA_HEADER..)
        {
            let counters = [counter, other_counter];
            let [len, other_len] = self.opening.get().open_two(counters, [sealed, other_sealed]);
            // In this order: they may have one counter.
            let len = len.filter(|_| self.replay.accept(counter));
            return [len, other_len.filter(|_| self.replay.accept(other_counter))];
        }
        [self.open(one), self.open(other)]
    }

    /// The counter of a message that is worth opening.
    fn counter(&self, datagram: &[u8]) -> Option<u64> {
        let counter = u64::from_le_bytes(array(datagram, 8)?);
        (counter < REJECT_AFTER_MESSAGES && self.replay.is_new(counter)).then_some(counter)
    }

    /// Opens a message in its place. Returns how many bytes of plaintext follow the header.
    fn open(&mut self, datagram: &mut [u8]) -> Option<usize> {
        let counter = self.counter(datagram)?;
        let len = self.opening.get().open(counter, datagram.get_mut(DATA_HEADER..)?)?;
        self.replay.accept(counter).then_some(len)
    }
}

/// The sessions of a peer.
#[derive(Default)]
pub(super) struct Sessions {
    /// What we send with.
    current: Option<Box<Session>>,
    /// What was sent with before, the newest first, for messages that are under way. When both
    /// ends initiate at once, there are two.
    previous: Vec<Session>,
    /// What we have answered an initiation with, until the peer uses it.
    next: Option<Box<Session>>,
}

/// A message that was opened.
pub(super) struct Received {
    /// Of the plaintext, bytes.
    pub(super) len: usize,
    /// It is the first one of a new session.
    pub(super) is_first: bool,
}

impl Received {
    fn later(len: usize) -> Self {
        Self { len, is_first: false }
    }
}

impl Sessions {
    /// What to send with.
    pub(super) fn current(&self, now: u64) -> Option<&Session> {
        self.current.as_deref().filter(|session| session.is_alive(now))
    }

    pub(super) fn current_mut(&mut self, now: u64) -> Option<&mut Session> {
        self.current.as_deref_mut().filter(|session| session.is_alive(now))
    }

    /// Opens two messages in their places, as [`Sessions::open`] does one, with the session that
    /// both name.
    pub(super) fn open_two(
        &mut self,
        receiver: u32,
        [one, other]: [&mut [u8]; 2],
        now: u64,
    ) -> [Option<Received>; 2] {
        match self.used(receiver, now) {
            Some(session) => session.open_two([one, other]).map(|len| len.map(Received::later)),
            None => [self.open(receiver, one, now), self.open(receiver, other, now)],
        }
    }

    /// Opens a message in its place, with the session that it names. The first one of a session
    /// that we have answered with makes it the current one.
    pub(super) fn open(
        &mut self,
        receiver: u32,
        datagram: &mut [u8],
        now: u64,
    ) -> Option<Received> {
        if let Some(session) = self.used(receiver, now) {
            return session.open(datagram).map(Received::later);
        }
        let next = self.next.as_deref_mut().filter(|session| session.is_named(receiver, now));
        let len = next?.open(datagram)?;
        if let Some(session) = self.next.take() {
            self.switch(session);
        }
        Some(Received { len, is_first: true })
    }

    /// The session of this index, if it is in use already.
    fn used(&mut self, receiver: u32, now: u64) -> Option<&mut Session> {
        let current = self.current.as_deref_mut();
        let mut used = current.into_iter().chain(&mut self.previous);
        used.find(|session| session.is_named(receiver, now))
    }

    /// Takes a session whose initiation we made: the response proves that the peer has it.
    pub(super) fn begin(&mut self, session: Session) {
        self.switch(Box::new(session));
        // The peer initiated one meanwhile, and may use it already.
        if let Some(session) = self.next.take() {
            self.keep(session);
        }
    }

    fn switch(&mut self, to: Box<Session>) {
        if let Some(session) = self.current.replace(to) {
            self.keep(session);
        }
    }

    /// Keeps a session open for what is under way.
    fn keep(&mut self, session: Box<Session>) {
        self.previous.truncate(PREVIOUS - 1);
        self.previous.insert(0, *session);
    }

    /// Takes a session that we have answered an initiation with.
    pub(super) fn offer(&mut self, session: Session) {
        self.next = Some(Box::new(session));
    }

    /// Erases what is too old for use.
    pub(super) fn expire(&mut self, now: u64) {
        self.previous.retain(|session| session.is_alive(now));
        for session in [&mut self.current, &mut self.next] {
            session.take_if(|session| !session.is_alive(now));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.current.is_none() && self.previous.is_empty() && self.next.is_none()
    }
}
