//! ChaCha20 (RFC 8439, 2.3): a word of sixteen blocks in each register.

use std::arch::x86_64::*;

/// Bytes of a block.
const BLOCK: usize = 64;
/// Blocks of a pass: a register has a word of each.
const PASS: usize = 16;

/// Four words of all blocks of a pass.
type Row = [__m512i; 4];

/// The blocks that two messages of a key take: the first of each, which have the keys of their
/// tags, then those for the text of the one, then those for the other's.
pub(super) struct Stream<'k> {
    /// Not a copy, which would stay on the stack.
    key: &'k [u32; 8],
    /// Of each message: the last 64 bits of the nonce.
    counters: [u64; 2],
    /// Blocks for the first text.
    first: u32,
}

impl<'k> Stream<'k> {
    /// Of a key, and of two messages' counters and texts.
    pub(super) fn new(key: &'k [u32; 8], counters: [u64; 2], first: &[u8]) -> Self {
        Self { key, counters, first: first.len().div_ceil(BLOCK) as u32 }
    }

    /// The blocks of the pass of this number.
    #[target_feature(enable = "avx512f")]
    pub(super) fn pass(&self, number: u32) -> [__m512i; PASS] {
        let start = self.start(number);
        let [mut a, mut b, mut c, mut d] = start;
        for _ in 0..10 {
            [a, b, c, d] = quarter_rounds([a, b, c, d]);
            // Diagonals become columns.
            [a, b, c, d] = quarter_rounds([a, turned::<1>(b), turned::<2>(c), turned::<3>(d)]);
            (b, c, d) = (turned::<3>(b), turned::<2>(c), turned::<1>(d));
        }
        let [e, f, g, h] = start;
        transpose([sum(a, e), sum(b, f), sum(c, g), sum(d, h)])
    }

    #[target_feature(enable = "avx512f")]
    fn start(&self, number: u32) -> [Row; 4] {
        let splat = |word: u32| _mm512_set1_epi32(word as i32);
        let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let place = _mm512_add_epi32(lanes, splat(number * PASS as u32));
        // 0 and 1 are the first blocks of the two, and then each has those from 1 on.
        let is_text = _mm512_cmpgt_epu32_mask(place, splat(1));
        let is_second = _mm512_cmpge_epu32_mask(place, splat(2 + self.first));
        let in_first = _mm512_maskz_sub_epi32(is_text, place, splat(1));
        let block = _mm512_mask_sub_epi32(in_first, is_second, in_first, splat(self.first));
        let is_second = is_second | _mm512_cmpeq_epu32_mask(place, splat(1));
        let counter = |shift: u32| {
            let [one, other] = self.counters.map(|counter| (counter >> shift) as u32);
            _mm512_mask_blend_epi32(is_second, splat(one), splat(other))
        };
        let row = |[a, b, c, d]: [u32; 4]| [splat(a), splat(b), splat(c), splat(d)];
        let [k0, k1, k2, k3, k4, k5, k6, k7] = *self.key;
        [
            // "expand 32-byte k"
            row([0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574]),
            row([k0, k1, k2, k3]),
            row([k4, k5, k6, k7]),
            [block, splat(0), counter(0), counter(32)],
        ]
    }

    /// Encrypts or decrypts both texts, of which the first pass is there.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn xor(&self, pass: &[__m512i; PASS], [one, other]: [&mut [u8]; 2]) {
        let blocks = 2 + one.len().div_ceil(BLOCK) + other.len().div_ceil(BLOCK);
        let mut chunks = one.chunks_mut(BLOCK).chain(other.chunks_mut(BLOCK));
        for (block, chunk) in pass[2..].iter().zip(&mut chunks) {
            xor(chunk, *block);
        }
        for number in 1..blocks.div_ceil(PASS) {
            for (block, chunk) in self.pass(number as u32).iter().zip(&mut chunks) {
                xor(chunk, *block);
            }
        }
    }
}

/// A quarter round of each column (RFC 8439, 2.1), step by step, so that none waits for itself.
#[inline]
#[target_feature(enable = "avx512f")]
fn quarter_rounds([mut a, mut b, mut c, mut d]: [Row; 4]) -> [Row; 4] {
    a = sum(a, b);
    d = rotate::<16>(d, a);
    c = sum(c, d);
    b = rotate::<12>(b, c);
    a = sum(a, b);
    d = rotate::<8>(d, a);
    c = sum(c, d);
    b = rotate::<7>(b, c);
    [a, b, c, d]
}

/// The words of a row that are so many columns further.
#[inline]
#[target_feature(enable = "avx512f")]
fn turned<const BY: usize>(row: Row) -> Row {
    [row[BY % 4], row[(BY + 1) % 4], row[(BY + 2) % 4], row[(BY + 3) % 4]]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn sum([a, b, c, d]: Row, [e, f, g, h]: Row) -> Row {
    [_mm512_add_epi32(a, e), _mm512_add_epi32(b, f), _mm512_add_epi32(c, g), _mm512_add_epi32(d, h)]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn rotate<const BITS: i32>([a, b, c, d]: Row, [e, f, g, h]: Row) -> Row {
    [
        _mm512_rol_epi32::<BITS>(_mm512_xor_si512(a, e)),
        _mm512_rol_epi32::<BITS>(_mm512_xor_si512(b, f)),
        _mm512_rol_epi32::<BITS>(_mm512_xor_si512(c, g)),
        _mm512_rol_epi32::<BITS>(_mm512_xor_si512(d, h)),
    ]
}

/// Words of sixteen blocks, as sixteen blocks.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(words: [Row; 4]) -> [__m512i; PASS] {
    // Of each four words: the same four of blocks 0, 4, 8, 12; of 1, 5, 9, 13; and so on.
    let mut fours = [[_mm512_setzero_si512(); 4]; 4];
    for (four, [a, b, c, d]) in fours.iter_mut().zip(words) {
        let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
        let (above, below) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
        *four = [
            _mm512_unpacklo_epi64(ab, cd),
            _mm512_unpackhi_epi64(ab, cd),
            _mm512_unpacklo_epi64(above, below),
            _mm512_unpackhi_epi64(above, below),
        ];
    }
    let mut blocks = [_mm512_setzero_si512(); PASS];
    for n in 0..4 {
        let [a, b, c, d] = [fours[0][n], fours[1][n], fours[2][n], fours[3][n]];
        let halves = [
            _mm512_shuffle_i32x4::<0x44>(a, b),
            _mm512_shuffle_i32x4::<0x44>(c, d),
            _mm512_shuffle_i32x4::<0xee>(a, b),
            _mm512_shuffle_i32x4::<0xee>(c, d),
        ];
        blocks[n] = _mm512_shuffle_i32x4::<0x88>(halves[0], halves[1]);
        blocks[n + 4] = _mm512_shuffle_i32x4::<0xdd>(halves[0], halves[1]);
        blocks[n + 8] = _mm512_shuffle_i32x4::<0x88>(halves[2], halves[3]);
        blocks[n + 12] = _mm512_shuffle_i32x4::<0xdd>(halves[2], halves[3]);
    }
    blocks
}

/// Encrypts up to a block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn xor(text: &mut [u8], block: __m512i) {
    if let Some(text) = text.first_chunk_mut::<BLOCK>() {
        let at = text.as_mut_ptr().cast();
        // SAFETY: 64 bytes, as many as a block has.
        return unsafe { _mm512_storeu_si512(at, _mm512_xor_si512(_mm512_loadu_si512(at), block)) };
    }
    let mask = (1 << text.len()) - 1;
    let at = text.as_mut_ptr().cast();
    // SAFETY: the mask has the bytes of the slice, and no other is read or written.
    unsafe {
        let plain = _mm512_maskz_loadu_epi8(mask, at);
        _mm512_mask_storeu_epi8(at, mask, _mm512_xor_si512(plain, block));
    }
}
