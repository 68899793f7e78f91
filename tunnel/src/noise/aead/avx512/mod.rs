//! ChaCha20-Poly1305 with AVX-512 (F, BW, IFMA): one pass over a packet of up to 1,472 bytes where
//! ring's AVX2 makes six, and eight blocks of Poly1305 at a time.

mod chacha20;
mod poly1305;

use std::arch::x86_64::{__m512i, _mm256_storeu_si256, _mm512_castsi512_si256};

use super::Tag;
use chacha20::{AT_ONCE, BLOCK, Stream};
use poly1305::Authenticator;

/// Whether this processor has what is needed.
pub(super) fn is_supported() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512ifma")
}

/// A key, on a processor that has what is needed.
pub(super) struct Key([u32; 8]);

impl Key {
    /// `None` on other processors.
    pub(super) fn new(key: &[u8; 32]) -> Option<Self> {
        let words = key.as_chunks::<4>().0;
        let word = |n: usize| words.get(n).map_or(0, |word| u32::from_le_bytes(*word));
        is_supported().then(|| Self(std::array::from_fn(word)))
    }

    /// Seals a text in its place.
    pub(super) fn seal(&self, counter: u64, text: &mut [u8]) -> Tag {
        // SAFETY: there is a key, so the processor has what is needed.
        unsafe { seal(&self.0, counter, text) }
    }

    /// Opens a text in its place, if `is_tag` says so of the tag that it should have.
    pub(super) fn open(
        &self,
        counter: u64,
        text: &mut [u8],
        is_tag: impl Fn(&Tag) -> bool,
    ) -> bool {
        // SAFETY: there is a key, so the processor has what is needed.
        unsafe { open(&self.0, counter, text, is_tag) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
fn seal(key: &[u32; 8], counter: u64, text: &mut [u8]) -> Tag {
    let stream = Stream::new(key, counter);
    let first = stream.blocks(0, 1 + text.len().div_ceil(BLOCK));
    encrypt(&stream, &first, text);
    Authenticator::new(one_time_key(&first[0])).tag(text)
}

#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
fn open(key: &[u32; 8], counter: u64, text: &mut [u8], is_tag: impl Fn(&Tag) -> bool) -> bool {
    let stream = Stream::new(key, counter);
    let first = stream.blocks(0, 1 + text.len().div_ceil(BLOCK));
    let is_authentic = is_tag(&Authenticator::new(one_time_key(&first[0])).tag(text));
    if is_authentic {
        encrypt(&stream, &first, text);
    }
    is_authentic
}

/// Encrypts or decrypts a text, of which the first blocks of the stream are there: all but the very
/// first, which is the key of the tag (RFC 8439, 2.6).
#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
fn encrypt(stream: &Stream, first: &[__m512i; AT_ONCE], text: &mut [u8]) {
    let (head, rest) = text.split_at_mut(text.len().min((AT_ONCE - 1) * BLOCK));
    chacha20::xor(head, &first[1..]);
    for (chunk, number) in rest.chunks_mut(AT_ONCE * BLOCK).zip(1..) {
        let blocks = stream.blocks(number * AT_ONCE as u32, chunk.len().div_ceil(BLOCK));
        chacha20::xor(chunk, &blocks);
    }
}

/// The key of the tag: the first half of a block.
#[target_feature(enable = "avx512f")]
fn one_time_key(block: &__m512i) -> [u64; 4] {
    let mut key = [0; 4];
    // SAFETY: 32 bytes, as many as the array has.
    unsafe { _mm256_storeu_si256(key.as_mut_ptr().cast(), _mm512_castsi512_si256(*block)) };
    key
}
