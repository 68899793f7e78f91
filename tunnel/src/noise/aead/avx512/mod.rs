//! ChaCha20-Poly1305 with AVX-512 (F, BW, IFMA), of two messages at a time: together they fill the
//! registers, where one of 1,440 bytes would leave a quarter of them empty.

mod chacha20;
mod poly1305;

use std::arch::x86_64::{__m512i, _mm256_storeu_si256, _mm512_castsi512_si256};

use super::Tag;
use chacha20::Stream;
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

    /// Seals two texts in their places, each with its counter.
    pub(super) fn seal(&self, counters: [u64; 2], texts: [&mut [u8]; 2]) -> [Tag; 2] {
        // SAFETY: there is a key, so the processor has what is needed.
        unsafe { seal(&self.0, counters, texts) }
    }

    /// Opens two texts in their places, if `is_tag` says so of the tag that each should have.
    pub(super) fn open(
        &self,
        counters: [u64; 2],
        texts: [&mut [u8]; 2],
        are_tags: impl FnOnce([Tag; 2]) -> [bool; 2],
    ) -> [bool; 2] {
        // SAFETY: there is a key, so the processor has what is needed.
        unsafe { open(&self.0, counters, texts, are_tags) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
fn seal(key: &[u32; 8], counters: [u64; 2], [one, other]: [&mut [u8]; 2]) -> [Tag; 2] {
    let stream = Stream::new(key, counters, one);
    let pass = stream.pass(0);
    let authenticator = Authenticator::new(one_time_keys(&pass));
    stream.xor(&pass, [&mut *one, &mut *other]);
    authenticator.tags([one, other])
}

#[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
fn open(
    key: &[u32; 8],
    counters: [u64; 2],
    [one, other]: [&mut [u8]; 2],
    are_tags: impl FnOnce([Tag; 2]) -> [bool; 2],
) -> [bool; 2] {
    let stream = Stream::new(key, counters, one);
    let pass = stream.pass(0);
    let are_authentic = are_tags(Authenticator::new(one_time_keys(&pass)).tags([one, other]));
    if are_authentic.contains(&true) {
        stream.xor(&pass, [one, other]);
    }
    are_authentic
}

/// The keys of the tags: the first half of the first block of each (RFC 8439, 2.6).
#[target_feature(enable = "avx512f")]
fn one_time_keys([one, other, ..]: &[__m512i; 16]) -> [[u64; 4]; 2] {
    [one, other].map(|block| {
        let mut key = [0; 4];
        // SAFETY: 32 bytes, as many as the array has.
        unsafe { _mm256_storeu_si256(key.as_mut_ptr().cast(), _mm512_castsi512_si256(*block)) };
        key
    })
}
