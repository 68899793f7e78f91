//! ChaCha20-Poly1305 (RFC 8439) of messages: ring's, and a wider one of our own for long messages
//! where the processor has AVX-512.
//!
//! The wide one is used if it agrees with ring when the first key is made.

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use subtle::ConstantTimeEq as _;

#[cfg(not(target_arch = "x86_64"))]
use none as avx512;

/// Bytes that sealing adds.
pub(super) const TAG: usize = 16;
/// Shorter texts are ring's: what the wide one prepares does not pay for them.
const LONG: usize = 384;

/// A tag.
pub(super) type Tag = [u8; TAG];

static IS_WIDE_ALLOWED: AtomicBool = AtomicBool::new(true);

/// Allows the wide implementation to keys that are made from now on, or forbids it. Says whether
/// it is used.
pub(crate) fn allow_avx512(is_allowed: bool) -> bool {
    IS_WIDE_ALLOWED.store(is_allowed, Ordering::Relaxed);
    is_allowed && is_wide_right()
}

/// A key for messages of one direction, which have numbers.
pub(super) struct Cipher {
    ring: LessSafeKey,
    /// For long texts.
    wide: Option<avx512::Key>,
}

impl Cipher {
    /// Of a key. `None` is never seen: keys are of one length.
    pub(super) fn new(key: &[u8; 32]) -> Option<Self> {
        let is_wide = IS_WIDE_ALLOWED.load(Ordering::Relaxed) && is_wide_right();
        Self::of(key, is_wide)
    }

    fn of(key: &[u8; 32], is_wide: bool) -> Option<Self> {
        Some(Self { ring: ring_key(key)?, wide: is_wide.then(|| avx512::Key::new(key)).flatten() })
    }

    /// Seals a text in its place.
    pub(super) fn seal(&self, counter: u64, text: &mut [u8]) -> Option<Tag> {
        if let Some(key) = self.wide.as_ref().filter(|_| text.len() >= LONG) {
            return Some(key.seal(counter, text));
        }
        let tag = self.ring.seal_in_place_separate_tag(nonce(counter), Aad::empty(), text).ok()?;
        tag.as_ref().try_into().ok()
    }

    /// Opens a text with its tag in its place. Returns the length of the text; `None` if it is not
    /// authentic, and then what is in its place is of no use.
    pub(super) fn open(&self, counter: u64, sealed: &mut [u8]) -> Option<usize> {
        let len = sealed.len().checked_sub(TAG)?;
        if let Some(key) = self.wide.as_ref().filter(|_| len >= LONG) {
            let (text, tag) = sealed.split_last_chunk_mut::<TAG>()?;
            return key.open(counter, text, |right| right.ct_eq(tag).into()).then_some(len);
        }
        self.ring.open_in_place(nonce(counter), Aad::empty(), sealed).ok()?;
        Some(len)
    }
}

/// A key of ring's.
pub(super) fn ring_key(key: &[u8; 32]) -> Option<LessSafeKey> {
    UnboundKey::new(&CHACHA20_POLY1305, key).ok().map(LessSafeKey::new)
}

/// The nonce of a counter: 32 zero bits, then the counter.
pub(super) fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[NONCE_LEN - 8..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

/// Whether the processor has what the wide implementation needs, and it agrees with ring.
fn is_wide_right() -> bool {
    static IS_RIGHT: OnceLock<bool> = OnceLock::new();
    *IS_RIGHT.get_or_init(|| {
        let key = std::array::from_fn(|n| n as u8);
        let agrees = |len: usize| {
            let (ring, wide) = (Cipher::of(&key, false)?, avx512::Key::new(&key)?);
            let mut text: Vec<u8> = (0..len).map(|n| n as u8).collect();
            let mut same = text.clone();
            let counter = u64::MAX - len as u64;
            let tag = wide.seal(counter, &mut text);
            let right = ring.seal(counter, &mut same)? == tag && same == text;
            Some(right && wide.open(counter, &mut text, |right| *right == tag))
        };
        avx512::is_supported()
            && [0, 1, 64, 112, 113, 1440, 1472, 1473, 9000, 65_519]
                .into_iter()
                .all(|len| agrees(len) == Some(true))
    })
}

/// Where there is no AVX-512.
#[cfg(not(target_arch = "x86_64"))]
mod none {
    use super::Tag;

    /// There is none.
    pub(super) enum Key {}

    pub(super) fn is_supported() -> bool {
        false
    }

    impl Key {
        pub(super) fn new(_: &[u8; 32]) -> Option<Self> {
            None
        }

        pub(super) fn seal(&self, _: u64, _: &mut [u8]) -> Tag {
            match *self {}
        }

        pub(super) fn open(&self, _: u64, _: &mut [u8], _: impl Fn(&Tag) -> bool) -> bool {
            match *self {}
        }
    }
}
