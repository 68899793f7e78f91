//! Poly1305 (RFC 8439, 2.5) of two messages, eight blocks of each at a time: a lane has each eighth
//! block of one, and is multiplied by the power of r in the end that its place asks for.

use std::arch::x86_64::*;

use super::Tag;

/// Bytes of a block.
const BLOCK: usize = 16;
/// Blocks of a message in a row: half the lanes of a register, whose upper half is the other's.
const ROW: usize = 4;
/// Rows that are multiplied before their sum is reduced.
const ROWS: usize = 2;
/// Bytes of a message in all rows.
const GROUP: usize = ROWS * ROW * BLOCK;

/// Bits of the lower limbs and of the upper one.
const LOW: u64 = (1 << 44) - 1;
const HIGH: u64 = (1 << 42) - 1;

/// Numbers modulo 2^130 - 5, one in each lane: limbs of 44, 44 and 42 bits, the lowest first. Up
/// to 2^47 fit as a factor: `VPMADD52` takes 52 bits.
#[derive(Clone, Copy)]
struct Lanes([__m512i; 3]);

/// A factor, with what its upper limbs are as lower ones: 20 times as much, since 2^132 is 20.
#[derive(Clone, Copy)]
struct Factor {
    limbs: Lanes,
    wrapped: [__m512i; 2],
}

/// Sums of products, by limb: of their lower 52 bits, and of those above, which are worth 2^8 in
/// the next limb, or 2^10 above the highest one.
struct Products([(__m512i, __m512i); 3]);

/// The keys of two tags: what the lanes are multiplied by, and what is added in the end.
pub(super) struct Authenticator {
    /// The eighth and the fourth power of r, if another group follows.
    next: [Factor; ROWS],
    /// The eighth to the fifth, and the fourth to the first, in the end.
    last: [Factor; ROWS],
    s: [[u64; 2]; 2],
}

impl Authenticator {
    /// Of the keys, which are r and s.
    #[target_feature(enable = "avx512f,avx512ifma")]
    pub(super) fn new(keys: [[u64; 4]; 2]) -> Self {
        let [one, other] = keys.map(|[r0, r1, ..]| {
            let (r0, r1) = (r0 & 0x0fff_fffc_0fff_ffff, r1 & 0x0fff_fffc_0fff_fffc);
            [r0 & LOW, (r0 >> 44 | r1 << 20) & LOW, r1 >> 24]
        });
        let limb = |n: usize| _mm512_mask_blend_epi64(0xf0, splat(one[n]), splat(other[n]));
        let first = Lanes([limb(0), limb(1), limb(2)]);
        let second = product(first, &Factor::new(first));
        // 2 1 2 1, then 4 3 2 1, then 8 7 6 5, of each.
        let pairs = blend(0b1010_1010, second, first);
        let fours = blend(0b1100_1100, product(pairs, &Factor::new(second)), pairs);
        let fourth = Factor::new(fours.highest());
        let eights = product(fours, &fourth);
        let next = [Factor::new(eights.highest()), fourth];
        let s = keys.map(|[.., s0, s1]| [s0, s1]);
        Self { next, last: [Factor::new(eights), Factor::new(fours)], s }
    }

    /// The tags of two texts without other data, as in the AEAD: padded to whole blocks, with the
    /// lengths behind them (RFC 8439, 2.8).
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma")]
    pub(super) fn tags(&self, texts: [&[u8]; 2]) -> [Tag; 2] {
        // Blocks with the lengths; what is missing to whole groups is missing in front.
        let blocks = texts.map(|text| text.len().div_ceil(BLOCK) + 1);
        let groups = blocks[0].max(blocks[1]).div_ceil(GROUP / BLOCK);
        let place = |group: usize| {
            let behind = (groups - group) * GROUP;
            blocks.map(|blocks| (blocks * BLOCK) as isize - behind as isize)
        };
        let mut sum = Lanes([_mm512_setzero_si512(); 3]);
        for group in 0..groups - 1 {
            sum = multiply(add(sum, texts, place(group)), &self.next);
        }
        let sum = multiply(add(sum, texts, place(groups - 1)), &self.last);
        [finish(sum.total(0x0f), self.s[0]), finish(sum.total(0xf0), self.s[1])]
    }
}

/// The blocks of a group of each text, which begins at this byte of it, with the sum so far.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn add(Lanes(sum): Lanes, texts: [&[u8]; 2], at: [isize; 2]) -> [Lanes; ROWS] {
    let blocks = |n: usize| whole(texts[n], at[n]).unwrap_or_else(|| part(texts[n], at[n]));
    let ([a, b], [c, d]) = (blocks(0), blocks(1));
    let Lanes(first) = row(a, c);
    let limb = |n: usize| _mm512_add_epi64(sum[n], first[n]);
    [Lanes([limb(0), limb(1), limb(2)]), row(b, d)]
}

/// Blocks of a message, and which of them there are.
type Blocks = (__m512i, u8);

/// A group that is within a text.
#[inline]
#[target_feature(enable = "avx512f")]
fn whole(text: &[u8], at: isize) -> Option<[Blocks; ROWS]> {
    let group = text.get(usize::try_from(at).ok()?..)?.first_chunk::<GROUP>()?.as_ptr();
    // SAFETY: 64 bytes of each half.
    let [one, other] = unsafe {
        [_mm512_loadu_si512(group.cast()), _mm512_loadu_si512(group.add(GROUP / 2).cast())]
    };
    Some([(one, 0x0f), (other, 0x0f)])
}

/// A group that is not: what is before a text is no block, and behind it is its length.
#[target_feature(enable = "avx512f,avx512bw")]
fn part(text: &[u8], at: isize) -> [Blocks; ROWS] {
    const BYTES: isize = (ROW * BLOCK) as isize;
    let row = |at: isize| {
        let before = at.saturating_neg().clamp(0, BYTES);
        let until = (text.len() as isize - at).clamp(0, BYTES);
        let from = |place: isize| u64::MAX.checked_shl(place as u32).unwrap_or(0);
        let mask = from(before) & !from(until);
        let row = match mask {
            // What is far from a text may be no memory, which takes long to find out.
            0 => _mm512_setzero_si512(),
            // SAFETY: the mask has what is in the slice, and nothing else is read.
            _ => unsafe { _mm512_maskz_loadu_epi8(mask, text.as_ptr().wrapping_offset(at).cast()) },
        };
        let is_last = at + BYTES - BLOCK as isize >= text.len() as isize;
        let row = _mm512_mask_set1_epi64(row, u8::from(is_last) << 7, text.len() as i64);
        let ones = 0x0f_u8 << (before / BLOCK as isize);
        (row, ones & 0x0f)
    };
    [row(at), row(at + BYTES)]
}

/// Blocks of both messages, as numbers.
#[inline]
#[target_feature(enable = "avx512f")]
fn row((a, ones): Blocks, (b, other_ones): Blocks) -> Lanes {
    let lower = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), b);
    let upper = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15), b);
    // A block is a number with a one above its highest bit.
    let one = _mm512_maskz_set1_epi64(ones | other_ones << ROW, 1 << 40);
    let middle = _mm512_or_si512(_mm512_srli_epi64::<44>(lower), _mm512_slli_epi64::<20>(upper));
    Lanes([
        _mm512_and_si512(lower, splat(LOW)),
        _mm512_and_si512(middle, splat(LOW)),
        _mm512_or_si512(_mm512_srli_epi64::<24>(upper), one),
    ])
}

/// The sum of the rows' products in each lane, reduced.
#[inline]
#[target_feature(enable = "avx512f,avx512ifma")]
fn multiply([one, other]: [Lanes; ROWS], by: &[Factor; ROWS]) -> Lanes {
    reduce(add_product(add_product(Products::none(), other, &by[1]), one, &by[0]))
}

/// The product of each lane, reduced.
#[inline]
#[target_feature(enable = "avx512f,avx512ifma")]
fn product(one: Lanes, other: &Factor) -> Lanes {
    reduce(add_product(Products::none(), one, other))
}

#[inline]
#[target_feature(enable = "avx512f,avx512ifma")]
fn add_product(to: Products, Lanes([a0, a1, a2]): Lanes, by: &Factor) -> Products {
    let (Lanes([b0, b1, b2]), [w1, w2]) = (by.limbs, by.wrapped);
    let by = [[b0, w2, w1], [b1, b0, w2], [b2, b1, b0]];
    let limb = |n: usize| {
        let ([x, y, z], (lower, upper)) = (by[n], to.0[n]);
        let lower = _mm512_madd52lo_epu64(lower, a0, x);
        let lower = _mm512_madd52lo_epu64(_mm512_madd52lo_epu64(lower, a1, y), a2, z);
        let upper = _mm512_madd52hi_epu64(upper, a0, x);
        (lower, _mm512_madd52hi_epu64(_mm512_madd52hi_epu64(upper, a1, y), a2, z))
    };
    Products([limb(0), limb(1), limb(2)])
}

/// What products are modulo 2^130 - 5: the lowest limb has at most 44 bits, the highest 42, and the
/// middle one is below 2^44 + 2^8.
#[inline]
#[target_feature(enable = "avx512f")]
fn reduce(Products([(c0, u0), (c1, u1), (c2, u2)]): Products) -> Lanes {
    let carry = _mm512_add_epi64(_mm512_srli_epi64::<44>(c0), _mm512_slli_epi64::<8>(u0));
    let (c0, c1) = (_mm512_and_si512(c0, splat(LOW)), _mm512_add_epi64(c1, carry));
    let carry = _mm512_add_epi64(_mm512_srli_epi64::<44>(c1), _mm512_slli_epi64::<8>(u1));
    let (c1, c2) = (_mm512_and_si512(c1, splat(LOW)), _mm512_add_epi64(c2, carry));
    let carry = _mm512_add_epi64(_mm512_srli_epi64::<42>(c2), _mm512_slli_epi64::<10>(u2));
    let c2 = _mm512_and_si512(c2, splat(HIGH));
    // 2^130 is 5.
    let carry = _mm512_add_epi64(carry, _mm512_slli_epi64::<2>(carry));
    let c0 = _mm512_add_epi64(c0, carry);
    let c1 = _mm512_add_epi64(c1, _mm512_srli_epi64::<44>(c0));
    Lanes([_mm512_and_si512(c0, splat(LOW)), c1, c2])
}

impl Products {
    #[target_feature(enable = "avx512f")]
    fn none() -> Self {
        Self([(_mm512_setzero_si512(), _mm512_setzero_si512()); 3])
    }
}

impl Lanes {
    /// The first lane of each message, in all of its lanes.
    #[target_feature(enable = "avx512f")]
    fn highest(self) -> Self {
        let limb = |n: usize| _mm512_permutex_epi64::<0>(self.0[n]);
        Self([limb(0), limb(1), limb(2)])
    }

    /// The sum of the lanes of a message.
    #[target_feature(enable = "avx512f")]
    fn total(self, of: u8) -> [u64; 3] {
        let limb = |n: usize| _mm512_mask_reduce_add_epi64(of, self.0[n]) as u64;
        [limb(0), limb(1), limb(2)]
    }
}

impl Factor {
    #[target_feature(enable = "avx512f")]
    fn new(limbs: Lanes) -> Self {
        let twenty = |x| _mm512_add_epi64(_mm512_slli_epi64::<4>(x), _mm512_slli_epi64::<2>(x));
        Self { limbs, wrapped: [twenty(limbs.0[1]), twenty(limbs.0[2])] }
    }
}

/// Lanes of `one` where the mask has a zero, and of `other` where it has a one.
#[target_feature(enable = "avx512f")]
fn blend(mask: u8, Lanes(one): Lanes, Lanes(other): Lanes) -> Lanes {
    let limb = |n: usize| _mm512_mask_blend_epi64(mask, one[n], other[n]);
    Lanes([limb(0), limb(1), limb(2)])
}

#[inline]
#[target_feature(enable = "avx512f")]
fn splat(value: u64) -> __m512i {
    _mm512_set1_epi64(value as i64)
}

/// Reduces the sum of all lanes, and adds s modulo 2^128. No branch depends on them.
fn finish([mut h0, mut h1, mut h2]: [u64; 3], [s0, s1]: [u64; 2]) -> Tag {
    // Limbs of eight products: what is above 2^130 is at most 8, and each of it counts 5.
    h1 += h0 >> 44;
    h2 += h1 >> 44;
    (h0, h1, h2) = ((h0 & LOW) + (h2 >> 42) * 5, h1 & LOW, h2 & HIGH);
    h1 += h0 >> 44;
    h2 += h1 >> 44;
    (h0, h1) = (h0 & LOW, h1 & LOW);
    // It is below twice 2^130 - 5: less that, if the difference is not negative.
    let g0 = h0 + 5;
    let g1 = h1 + (g0 >> 44);
    let g2 = (h2 + (g1 >> 44)).wrapping_sub(1 << 42);
    let is_less = (g2 >> 63).wrapping_neg();
    let choose = |h: u64, g: u64| u128::from((h & is_less) | (g & !is_less));
    let (h0, h1, h2) = (choose(h0, g0 & LOW), choose(h1, g1 & LOW), choose(h2, g2));
    let s = u128::from(s0) | u128::from(s1) << 64;
    (h0 | h1 << 44 | h2 << 88).wrapping_add(s).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use poly1305::Poly1305;
    use poly1305::universal_hash::KeyInit as _;
    use proptest::prelude::*;

    use super::*;

    /// Of another implementation.
    fn right(key: &[u64; 4], text: &[u8]) -> Tag {
        let bytes: Vec<u8> = key.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut message = text.to_vec();
        message.resize(text.len().next_multiple_of(BLOCK) + 8, 0);
        message.extend((text.len() as u64).to_le_bytes());
        let key = poly1305::Key::from_slice(&bytes);
        Poly1305::new(key).compute_unpadded(&message).as_slice().try_into().unwrap()
    }

    /// With r = 1 a tag is the sum of all blocks, here just below, at and above multiples of 2^130.
    #[test]
    fn sums_around_multiples_of_the_modulus_are_reduced() {
        if !super::super::is_supported() {
            return;
        }
        for multiple in 1..=3_u128 {
            for less in -6..=12_i128 {
                // Each block counts 2^128 more, and the last one is the length.
                let count = 2 * multiple;
                let rest = 0_u128.wrapping_sub((16 * count) << 64).wrapping_sub(less as u128);
                let mut blocks = vec![u128::MAX; count as usize - 2];
                blocks.extend([rest + (count - 2), 0]);
                let text: Vec<u8> = blocks.iter().flat_map(|block| block.to_le_bytes()).collect();
                // SAFETY: the processor has what is needed.
                let [tag, other] =
                    unsafe { Authenticator::new([[1, 0, 0, 0]; 2]).tags([&text, &[]]) };
                assert_eq!(other, [0; 16]);
                assert_eq!(tag, right(&[1, 0, 0, 0], &text), "{multiple} times 2^130 less {less}");
                let sum = (5 * multiple).wrapping_sub(less as u128);
                let is_small = less <= 5 * multiple as i128 && sum < 30;
                assert!(!is_small || u128::from_le_bytes(tag) == sum, "{multiple} {less}");
            }
        }
    }

    proptest! {
        #[test]
        fn tags_are_right_at_the_edges_of_the_field(
            words in prop::array::uniform4(prop::sample::select(vec![
                0, 1, 2, 5, LOW, HIGH, 1 << 43, 1 << 63, u64::MAX - 4, u64::MAX - 1, u64::MAX,
            ])),
            blocks in prop::collection::vec(prop::sample::select(vec![
                0u128, 1, 4, 5, u128::MAX, u128::MAX - 4, u128::MAX - 5, 1 << 127, (1 << 88) - 1,
            ]), 0..40),
            cut in 0usize..16,
            other in prop::collection::vec(any::<u8>(), 0..700),
        ) {
            if !super::super::is_supported() {
                return Ok(());
            }
            let text: Vec<u8> = blocks.iter().flat_map(|block| block.to_le_bytes()).collect();
            let text = &text[..text.len().saturating_sub(cut)];
            let other = &other[..other.len().min(text.len() + 100)];
            let keys = [words, words.map(u64::reverse_bits)];
            for (keys, texts) in [(keys, [text, other]), ([keys[1], keys[0]], [other, text])] {
                // SAFETY: the processor has what is needed.
                let tags = unsafe { Authenticator::new(keys).tags(texts) };
                prop_assert_eq!(tags[0], right(&keys[0], texts[0]));
                prop_assert_eq!(tags[1], right(&keys[1], texts[1]));
            }
        }
    }
}
