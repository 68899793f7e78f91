//! Noise_IKpsk2: the two messages of a handshake (WireGuard paper, 5.4.2 and 5.4.3).

use rand_core::OsRng;
use x25519_dalek::{PublicKey, StaticSecret};

use super::crypto::{self, Key, agree, kdf};
use super::identity::Identity;
use super::indices::Index;
use super::message::{INITIATION, INITIATION_LEN, RESPONSE, RESPONSE_LEN, array, word};
use super::remote::Remote;

const CONSTRUCTION: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";

/// A TAI64N timestamp: seconds and nanoseconds, big-endian, so that later is greater.
pub(super) type Timestamp = [u8; 12];

/// What a handshake makes: a key for each direction, and both ends' names of the session.
pub(super) struct Agreed {
    pub(super) sealing: Key,
    pub(super) opening: Key,
    pub(super) ours: Index,
    pub(super) theirs: u32,
    pub(super) is_initiator: bool,
}

/// An initiation that waits for its response.
pub(super) struct Initiated {
    chain: Chain,
    ephemeral: StaticSecret,
    ours: Index,
}

/// An initiation that was read as far as its sender's key, which is not proven yet.
pub(crate) struct Claimed {
    chain: Chain,
    ephemeral: PublicKey,
    sender: u32,
    public: [u8; 32],
    timestamp: [u8; 28],
}

/// An initiation whose sender has the private key that it claims.
pub(super) struct Proven {
    chain: Chain,
    ephemeral: PublicKey,
    sender: u32,
    pub(super) timestamp: Timestamp,
}

/// The chaining key and the hash of everything said so far.
struct Chain {
    key: Key,
    hash: [u8; 32],
}

impl Chain {
    fn new(responder: &PublicKey) -> Self {
        let key = crypto::hash(&[CONSTRUCTION]);
        let hash = crypto::hash(&[&key, IDENTIFIER]);
        let hash = crypto::hash(&[&hash, responder.as_bytes()]);
        Self { key: Key::new(key), hash }
    }

    fn absorb(&mut self, bytes: &[u8]) {
        self.hash = crypto::hash(&[&self.hash, bytes]);
    }

    fn mix(&mut self, input: &[u8]) {
        let [chain] = kdf(&self.key, input);
        self.key = chain;
    }

    /// Mixes, and gives a key for one message.
    fn mix_for_key(&mut self, input: &[u8]) -> Key {
        let [chain, key] = kdf(&self.key, input);
        self.key = chain;
        key
    }

    fn mix_preshared(&mut self, preshared_key: &[u8; 32]) -> Key {
        let [chain, hash, key] = kdf(&self.key, preshared_key);
        self.key = chain;
        self.absorb(&*hash);
        key
    }

    fn seal(&mut self, key: &[u8; 32], plain: &[u8], out: &mut [u8]) -> Option<()> {
        crypto::seal_once(key, &self.hash, plain, out)?;
        self.absorb(out);
        Some(())
    }

    fn open<const N: usize>(&mut self, key: &[u8; 32], sealed: &[u8]) -> Option<[u8; N]> {
        let plain = crypto::open_once(key, &self.hash, sealed)?;
        self.absorb(sealed);
        Some(plain)
    }

    /// The initiator's sending key, and the responder's.
    fn split(self) -> [Key; 2] {
        kdf(&self.key, &[])
    }
}

impl Initiated {
    /// Writes an initiation without its MACs. `None` leaves nothing behind.
    pub(super) fn write(
        identity: &Identity,
        remote: &Remote,
        shared: &[u8; 32],
        timestamp: &Timestamp,
        ours: Index,
        out: &mut [u8],
    ) -> Option<Self> {
        let out = out.get_mut(..INITIATION_LEN)?;
        let mut chain = Chain::new(&remote.public);
        let ephemeral = StaticSecret::random_from_rng(OsRng);
        let public = PublicKey::from(&ephemeral);
        out[..4].copy_from_slice(&INITIATION.to_le_bytes());
        out[4..8].copy_from_slice(&ours.value().to_le_bytes());
        out[8..40].copy_from_slice(public.as_bytes());
        chain.absorb(public.as_bytes());
        chain.mix(public.as_bytes());
        let key = chain.mix_for_key(&*agree(&ephemeral, &remote.public)?);
        chain.seal(&key, identity.public(), &mut out[40..88])?;
        let key = chain.mix_for_key(shared);
        chain.seal(&key, timestamp, &mut out[88..116])?;
        Some(Self { chain, ephemeral, ours })
    }

    /// Whether a response names this initiation.
    pub(super) fn is(&self, index: u32) -> bool {
        self.ours.value() == index
    }

    /// Reads the response to it. An initiation whose response is not authentic goes on waiting.
    pub(super) fn read_response(
        &self,
        identity: &Identity,
        remote: &Remote,
        message: &[u8],
    ) -> Option<Chained> {
        let theirs = word(message, 4)?;
        let public = PublicKey::from(array::<32>(message, 12)?);
        let mut chain = Chain { key: self.chain.key.clone(), hash: self.chain.hash };
        chain.absorb(public.as_bytes());
        chain.mix(public.as_bytes());
        chain.mix(&*agree(&self.ephemeral, &public)?);
        chain.mix(&*agree(identity.secret(), &public)?);
        let key = chain.mix_preshared(&remote.preshared_key);
        let [] = chain.open(&key, message.get(44..60)?)?;
        Some(Chained { chain, theirs })
    }

    pub(super) fn agreed(self, response: Chained) -> Agreed {
        let [sealing, opening] = response.chain.split();
        Agreed { sealing, opening, ours: self.ours, theirs: response.theirs, is_initiator: true }
    }
}

/// A response that is authentic.
pub(super) struct Chained {
    chain: Chain,
    theirs: u32,
}

impl Claimed {
    /// Reads whose initiation this is. Anybody who knows our public key can make one that
    /// names somebody else.
    pub(crate) fn read(identity: &Identity, message: &[u8]) -> Option<Self> {
        let sender = word(message, 4)?;
        let ephemeral = PublicKey::from(array::<32>(message, 8)?);
        let mut chain = Chain::new(&PublicKey::from(*identity.public()));
        chain.absorb(ephemeral.as_bytes());
        chain.mix(ephemeral.as_bytes());
        let key = chain.mix_for_key(&*agree(identity.secret(), &ephemeral)?);
        let public = chain.open(&key, message.get(40..88)?)?;
        Some(Self { chain, ephemeral, sender, public, timestamp: array(message, 88)? })
    }

    /// The public key that its sender claims.
    pub(crate) fn public(&self) -> &[u8; 32] {
        &self.public
    }

    /// Proves it with the secret that only both static keys give.
    pub(super) fn prove(mut self, shared: &[u8; 32]) -> Option<Proven> {
        let key = self.chain.mix_for_key(shared);
        let timestamp = self.chain.open(&key, &self.timestamp)?;
        let Self { chain, ephemeral, sender, .. } = self;
        Some(Proven { chain, ephemeral, sender, timestamp })
    }
}

impl Proven {
    /// Writes the response, without its MACs.
    pub(super) fn respond(self, remote: &Remote, ours: Index, out: &mut [u8]) -> Option<Agreed> {
        let out = out.get_mut(..RESPONSE_LEN)?;
        let mut chain = self.chain;
        let ephemeral = StaticSecret::random_from_rng(OsRng);
        let public = PublicKey::from(&ephemeral);
        out[..4].copy_from_slice(&RESPONSE.to_le_bytes());
        out[4..8].copy_from_slice(&ours.value().to_le_bytes());
        out[8..12].copy_from_slice(&self.sender.to_le_bytes());
        out[12..44].copy_from_slice(public.as_bytes());
        chain.absorb(public.as_bytes());
        chain.mix(public.as_bytes());
        chain.mix(&*agree(&ephemeral, &self.ephemeral)?);
        chain.mix(&*agree(&ephemeral, &remote.public)?);
        let key = chain.mix_preshared(&remote.preshared_key);
        chain.seal(&key, &[], &mut out[44..60])?;
        let [opening, sealing] = chain.split();
        Some(Agreed { sealing, opening, ours, theirs: self.sender, is_initiator: false })
    }
}
