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

    /// Seals two texts in their places, each with its counter.
    pub(super) fn seal_two(
        &self,
        counters: [u64; 2],
        [one, other]: [&mut [u8]; 2],
    ) -> [Option<Tag>; 2] {
        match &self.wide {
            Some(key) if one.len() + other.len() >= LONG => {
                key.seal(counters, [one, other]).map(Some)
            }
            _ => [self.seal(counters[0], one), self.seal(counters[1], other)],
        }
    }

    /// Seals a text in its place.
    pub(super) fn seal(&self, counter: u64, text: &mut [u8]) -> Option<Tag> {
        if let Some(key) = self.wide.as_ref().filter(|_| text.len() >= LONG) {
            let [tag, _] = key.seal([counter; 2], [text, &mut []]);
            return Some(tag);
        }
        let tag = self.ring.seal_in_place_separate_tag(nonce(counter), Aad::empty(), text).ok()?;
        tag.as_ref().try_into().ok()
    }

    /// Opens two texts, as [`Cipher::open`] does.
    pub(super) fn open_two(
        &self,
        counters: [u64; 2],
        [one, other]: [&mut [u8]; 2],
    ) -> [Option<usize>; 2] {
        if let Some(key) = &self.wide
            && one.len() + other.len() >= LONG
            && let Some((text, tag)) = one.split_last_chunk_mut::<TAG>()
            && let Some((other_text, other_tag)) = other.split_last_chunk_mut::<TAG>()
        {
            let lens = [text.len(), other_text.len()];
            let are_tags = |[right, other_right]: [Tag; 2]| {
                [right.ct_eq(tag).into(), other_right.ct_eq(other_tag).into()]
            };
            let [is_authentic, other_is] = key.open(counters, [text, other_text], are_tags);
            return [is_authentic.then_some(lens[0]), other_is.then_some(lens[1])];
        }
        [self.open(counters[0], one), self.open(counters[1], other)]
    }

    /// Opens a text with its tag in its place. Returns the length of the text; `None` if it is not
    /// authentic, and then what is in its place is of no use.
    pub(super) fn open(&self, counter: u64, sealed: &mut [u8]) -> Option<usize> {
        let len = sealed.len().checked_sub(TAG)?;
        if let Some(key) = self.wide.as_ref().filter(|_| len >= LONG) {
            let (text, tag) = sealed.split_last_chunk_mut::<TAG>()?;
            let is_tag = |[right, _]: [Tag; 2]| [right.ct_eq(tag).into(), false];
            let [is_authentic, _] = key.open([counter; 2], [text, &mut []], is_tag);
            return is_authentic.then_some(len);
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
        let agree = |lens: [usize; 2]| {
            let (ring, wide) = (Cipher::of(&key, false)?, avx512::Key::new(&key)?);
            let [mut one, mut other] =
                lens.map(|len| (0..len).map(|n| n as u8).collect::<Vec<_>>());
            let [mut same, mut other_same] = [one.clone(), other.clone()];
            let counters = [u64::MAX - lens[0] as u64, lens[1] as u64];
            let tags = wide.seal(counters, [&mut one, &mut other]);
            let right =
                [ring.seal(counters[0], &mut same)?, ring.seal(counters[1], &mut other_same)?];
            let is_right = tags == right && (&one, &other) == (&same, &other_same);
            let opened = wide.open(counters, [&mut one, &mut other], |right| {
                [0, 1].map(|n| right[n] == tags[n])
            });
            Some(is_right && opened == [true; 2])
        };
        avx512::is_supported()
            && [[0, 1], [64, 0], [112, 113], [1440, 1440], [1472, 1473], [9000, 52], [52, 65_519]]
                .into_iter()
                .all(|lens| agree(lens) == Some(true))
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
