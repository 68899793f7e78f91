//! ChaCha20 (RFC 8439, 2.3): a row of four blocks in each register.

use std::arch::x86_64::*;

/// Bytes of a block.
pub(super) const BLOCK: usize = 64;
/// Blocks in a set, which takes four registers.
const SET: usize = 4;
/// Sets of a pass: with four registers each, and of 32 some to spare.
const SETS: usize = 6;
/// Blocks of a pass.
pub(super) const AT_ONCE: usize = SET * SETS;

/// The blocks of a key and a nonce.
pub(super) struct Stream {
    /// By row, the same in each block but for the block's number.
    rows: [__m512i; 4],
}

impl Stream {
    /// Of a key and a message's counter, which is the last 64 bits of the nonce.
    #[target_feature(enable = "avx512f")]
    pub(super) fn new(key: &[u32; 8], counter: u64) -> Self {
        let [k0, k1, k2, k3, k4, k5, k6, k7] = key.map(|word| word as i32);
        let row = |a, b, c, d| _mm512_broadcast_i32x4(_mm_setr_epi32(a, b, c, d));
        let rows = [
            // "expand 32-byte k"
            row(0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574),
            row(k0, k1, k2, k3),
            row(k4, k5, k6, k7),
            row(0, 0, counter as i32, (counter >> 32) as i32),
        ];
        Self { rows }
    }

    /// The first `count` blocks from this number on, at most [`AT_ONCE`]; what follows them is of
    /// no use.
    #[target_feature(enable = "avx512f")]
    pub(super) fn blocks(&self, number: u32, count: usize) -> [__m512i; AT_ONCE] {
        let mut out = [_mm512_setzero_si512(); AT_ONCE];
        match count.div_ceil(SET) {
            0 | 1 => self.sets::<1>(number, &mut out),
            2 => self.sets::<2>(number, &mut out),
            3 => self.sets::<3>(number, &mut out),
            4 => self.sets::<4>(number, &mut out),
            5 => self.sets::<5>(number, &mut out),
            _ => self.sets::<SETS>(number, &mut out),
        }
        out
    }

    #[target_feature(enable = "avx512f")]
    fn sets<const N: usize>(&self, number: u32, out: &mut [__m512i; AT_ONCE]) {
        let mut start = [self.rows; N];
        for (rows, set) in start.iter_mut().zip(0..) {
            let block = |n| (number + set * SET as u32 + n) as i32;
            let [a, b, c, d] = [0, 1, 2, 3].map(block);
            let numbers = _mm512_setr_epi32(a, 0, 0, 0, b, 0, 0, 0, c, 0, 0, 0, d, 0, 0, 0);
            rows[3] = _mm512_add_epi32(rows[3], numbers);
        }
        let mut state = start;
        for _ in 0..10 {
            quarter_rounds(&mut state);
            for [_, b, c, d] in &mut state {
                // Diagonals become columns.
                *b = _mm512_shuffle_epi32::<0x39>(*b);
                *c = _mm512_shuffle_epi32::<0x4e>(*c);
                *d = _mm512_shuffle_epi32::<0x93>(*d);
            }
            quarter_rounds(&mut state);
            for [_, b, c, d] in &mut state {
                *b = _mm512_shuffle_epi32::<0x93>(*b);
                *c = _mm512_shuffle_epi32::<0x4e>(*c);
                *d = _mm512_shuffle_epi32::<0x39>(*d);
            }
        }
        for ((state, start), out) in state.iter().zip(&start).zip(out.as_chunks_mut::<SET>().0) {
            let row = |n: usize| _mm512_add_epi32(state[n], start[n]);
            *out = transpose([row(0), row(1), row(2), row(3)]);
        }
    }
}

/// A quarter round of each column of each block (RFC 8439, 2.1). Step by step over all sets, so
/// that none waits for itself.
#[inline]
#[target_feature(enable = "avx512f")]
fn quarter_rounds<const N: usize>(state: &mut [[__m512i; 4]; N]) {
    for [a, b, _, _] in state.iter_mut() {
        *a = _mm512_add_epi32(*a, *b);
    }
    for [a, _, _, d] in state.iter_mut() {
        *d = _mm512_rol_epi32::<16>(_mm512_xor_si512(*d, *a));
    }
    for [_, _, c, d] in state.iter_mut() {
        *c = _mm512_add_epi32(*c, *d);
    }
    for [_, b, c, _] in state.iter_mut() {
        *b = _mm512_rol_epi32::<12>(_mm512_xor_si512(*b, *c));
    }
    for [a, b, _, _] in state.iter_mut() {
        *a = _mm512_add_epi32(*a, *b);
    }
    for [a, _, _, d] in state.iter_mut() {
        *d = _mm512_rol_epi32::<8>(_mm512_xor_si512(*d, *a));
    }
    for [_, _, c, d] in state.iter_mut() {
        *c = _mm512_add_epi32(*c, *d);
    }
    for [_, b, c, _] in state.iter_mut() {
        *b = _mm512_rol_epi32::<7>(_mm512_xor_si512(*b, *c));
    }
}

/// Rows of four blocks, as four blocks.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose([a, b, c, d]: [__m512i; 4]) -> [__m512i; SET] {
    let halves = [
        _mm512_shuffle_i32x4::<0x44>(a, b),
        _mm512_shuffle_i32x4::<0x44>(c, d),
        _mm512_shuffle_i32x4::<0xee>(a, b),
        _mm512_shuffle_i32x4::<0xee>(c, d),
    ];
    [
        _mm512_shuffle_i32x4::<0x88>(halves[0], halves[1]),
        _mm512_shuffle_i32x4::<0xdd>(halves[0], halves[1]),
        _mm512_shuffle_i32x4::<0x88>(halves[2], halves[3]),
        _mm512_shuffle_i32x4::<0xdd>(halves[2], halves[3]),
    ]
}

/// Encrypts a text with as many blocks as it has.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn xor(text: &mut [u8], blocks: &[__m512i]) {
    for (text, block) in text.chunks_mut(BLOCK).zip(blocks) {
        let mask = u64::MAX >> (BLOCK - text.len());
        let at = text.as_mut_ptr().cast();
        // SAFETY: the mask has the bytes of the slice, and no other is read or written.
        unsafe {
            let plain = _mm512_maskz_loadu_epi8(mask, at);
            _mm512_mask_storeu_epi8(at, mask, _mm512_xor_si512(plain, *block));
        }
    }
}
