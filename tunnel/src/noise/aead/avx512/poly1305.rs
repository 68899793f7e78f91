//! Poly1305 (RFC 8439, 2.5), eight blocks at a time: lane n has each eighth block, and is
//! multiplied by the power of r in the end that its place asks for.

use std::arch::x86_64::*;

use super::Tag;

/// Bytes of a block.
const BLOCK: usize = 16;
/// Lanes, which have a block each.
const LANES: usize = 8;
/// Bytes of a block for each lane.
const GROUP: usize = LANES * BLOCK;

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

/// The key of one tag: what the lanes are multiplied by, and what is added in the end.
pub(super) struct Authenticator {
    /// By the eighth power of r, if another group follows.
    next: Factor,
    /// By the eighth to the first, in the end.
    last: Factor,
    s: [u64; 2],
}

impl Authenticator {
    /// Of a key, which is r and s.
    #[target_feature(enable = "avx512f,avx512ifma")]
    pub(super) fn new([r0, r1, s0, s1]: [u64; 4]) -> Self {
        let (r0, r1) = (r0 & 0x0fff_fffc_0fff_ffff, r1 & 0x0fff_fffc_0fff_fffc);
        let limbs = [r0 & LOW, (r0 >> 44 | r1 << 20) & LOW, r1 >> 24];
        let first = Lanes(limbs.map(|limb| splat(limb)));
        let second = multiply(first, &Factor::new(first));
        let square = Factor::new(second);
        let fourth = Factor::new(multiply(second, &square));
        // 2 1 2 1 2 1 2 1, then 4 3 2 1 4 3 2 1, then 8 7 6 5 4 3 2 1.
        let pairs = blend(0b1010_1010, second, first);
        let fours = blend(0b1100_1100, multiply(pairs, &square), pairs);
        let eights = blend(0b1111_0000, multiply(fours, &fourth), fours);
        let first_lane = |limb| _mm512_permutexvar_epi64(_mm512_setzero_si512(), limb);
        let next = Factor::new(Lanes(eights.0.map(first_lane)));
        Self { next, last: Factor::new(eights), s: [s0, s1] }
    }

    /// The tag of a text without other data, as in the AEAD: padded to whole blocks, with the
    /// lengths behind it (RFC 8439, 2.8).
    #[target_feature(enable = "avx512f,avx512ifma")]
    pub(super) fn tag(&self, text: &[u8]) -> Tag {
        let blocks = text.len().div_ceil(BLOCK) + 1;
        let groups = blocks.div_ceil(LANES);
        // The first group has the odd blocks behind lanes without any.
        let odd = blocks - (groups - 1) * LANES;
        let is_one = groups == 1;
        let (head, rest) = text.split_at(if is_one { 0 } else { (odd * BLOCK).min(text.len()) });
        let (middle, tail) = rest.split_at((groups.saturating_sub(2) * GROUP).min(rest.len()));
        let mut sum = Lanes([_mm512_setzero_si512(); 3]);
        let mut empty = LANES - odd;
        if !is_one {
            sum = multiply(add(sum, &padded(head, empty), empty), &self.next);
            empty = 0;
        }
        for group in middle.as_chunks::<GROUP>().0 {
            sum = multiply(add(sum, group, 0), &self.next);
        }
        let mut group = padded(tail, empty);
        group[GROUP - 8..].copy_from_slice(&(text.len() as u64).to_le_bytes());
        sum = multiply(add(sum, &group, empty), &self.last);
        finish(sum.0.map(|limb| _mm512_reduce_add_epi64(limb) as u64), self.s)
    }
}

/// Bytes behind so many lanes without any, with zeros behind them.
fn padded(bytes: &[u8], empty: usize) -> [u8; GROUP] {
    let mut group = [0; GROUP];
    let room = group.get_mut(empty * BLOCK..).unwrap_or_default();
    if let Some(room) = room.get_mut(..bytes.len()) {
        room.copy_from_slice(bytes);
    }
    group
}

/// Adds a block to each lane, but for the first `empty` ones.
#[inline]
#[target_feature(enable = "avx512f")]
fn add(Lanes(sum): Lanes, group: &[u8; GROUP], empty: usize) -> Lanes {
    let at = group.as_ptr();
    // SAFETY: twice 64 bytes, as many as the group has.
    let (a, b) =
        unsafe { (_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(GROUP / 2).cast())) };
    let lower = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), b);
    let upper = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15), b);
    // A block is a number with a one above its highest bit.
    let one = _mm512_maskz_set1_epi64((0xff_u32 << empty) as u8, 1 << 40);
    let middle = _mm512_or_si512(_mm512_srli_epi64::<44>(lower), _mm512_slli_epi64::<20>(upper));
    Lanes([
        _mm512_add_epi64(sum[0], _mm512_and_si512(lower, splat(LOW))),
        _mm512_add_epi64(sum[1], _mm512_and_si512(middle, splat(LOW))),
        _mm512_add_epi64(sum[2], _mm512_or_si512(_mm512_srli_epi64::<24>(upper), one)),
    ])
}

/// The product of each lane. The lowest limb of the result has at most 44 bits, the highest 42,
/// and the middle one is below 2^44 + 2^8.
#[inline]
#[target_feature(enable = "avx512f,avx512ifma")]
fn multiply(Lanes([a0, a1, a2]): Lanes, by: &Factor) -> Lanes {
    let (Lanes([b0, b1, b2]), [w1, w2]) = (by.limbs, by.wrapped);
    let products = |x, y, z| {
        let zero = _mm512_setzero_si512();
        // Sums of the products' lower 52 bits and of those above, which are worth 2^8 in the next
        // limb, or 2^10 above the highest one.
        let lower = _mm512_madd52lo_epu64(zero, a0, x);
        let lower = _mm512_madd52lo_epu64(_mm512_madd52lo_epu64(lower, a1, y), a2, z);
        let upper = _mm512_madd52hi_epu64(zero, a0, x);
        let upper = _mm512_madd52hi_epu64(_mm512_madd52hi_epu64(upper, a1, y), a2, z);
        (lower, upper)
    };
    let ((c0, u0), (c1, u1), (c2, u2)) =
        (products(b0, w2, w1), products(b1, b0, w2), products(b2, b1, b0));
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
                let tag = unsafe { Authenticator::new([1, 0, 0, 0]).tag(&text) };
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
        ) {
            if !super::super::is_supported() {
                return Ok(());
            }
            let text: Vec<u8> = blocks.iter().flat_map(|block| block.to_le_bytes()).collect();
            let text = &text[..text.len().saturating_sub(cut)];
            // SAFETY: the processor has what is needed.
            prop_assert_eq!(unsafe { Authenticator::new(words).tag(text) }, right(&words, text));
        }
    }
}
