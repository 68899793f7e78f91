use proptest::prelude::*;

use super::*;

/// Both implementations, where there are two.
fn both(key: &[u8; 32]) -> Option<[Cipher; 2]> {
    is_wide_right().then(|| [false, true].map(|is_wide| Cipher::of(key, is_wide).unwrap()))
}

#[test]
fn it_is_right_wherever_the_processor_has_it() {
    #[cfg(target_arch = "x86_64")]
    assert_eq!(is_wide_right(), avx512::is_supported());
    assert!(!allow_avx512(false));
    assert!(Cipher::new(&[1; 32]).unwrap().wide.is_none());
    assert_eq!(allow_avx512(true), is_wide_right());
}

#[test]
fn messages_of_each_length_are_rings() {
    let Some([ring, wide]) = both(&[7; 32]) else { return };
    for len in (0..3000).chain([9000, 65_519]) {
        let plain: Vec<u8> = (0..len).map(|n| (n * 7 + len) as u8).collect();
        let (mut one, mut other) = (plain.clone(), plain.clone());
        let counter = len as u64 * 0x0012_3456_789a;
        let tags = [ring.seal(counter, &mut one), wide.seal(counter, &mut other)];
        assert_eq!((&one, tags[0]), (&other, tags[1]), "{len}");
        one.extend(tags[0].unwrap());
        assert_eq!(wide.open(counter, &mut one), Some(plain.len()));
        assert_eq!(one[..len], plain);
    }
}

#[test]
fn two_messages_of_any_lengths_are_rings() {
    let Some([ring, wide]) = both(&[9; 32]) else { return };
    for len in 0..2500_usize {
        let lens = [len, (len * 7919) % 2600];
        let plain = lens.map(|len| (0..len).map(|n| (n * 5 + len) as u8).collect::<Vec<_>>());
        let counters = [len as u64 * 0x0012_3456_789a, !(len as u64)];
        let (mut one, mut other) = (plain.clone(), plain.clone());
        let [a, b] = &mut one;
        let tags = [ring.seal(counters[0], a), ring.seal(counters[1], b)];
        let [a, b] = &mut other;
        assert_eq!(wide.seal_two(counters, [a, b]), tags, "{lens:?}");
        assert!(one == other, "{lens:?}");
        for (sealed, tag) in other.iter_mut().zip(tags) {
            sealed.extend(tag.unwrap());
        }
        let [a, b] = &mut other;
        assert_eq!(wide.open_two(counters, [a, b]), lens.map(Some));
        assert!(other.iter().zip(&plain).all(|(opened, plain)| opened.starts_with(plain)));
    }
}

proptest! {
    #[test]
    fn one_damaged_message_of_two_is_refused(
        counters in any::<[u64; 2]>(),
        texts in any::<[u8; 2]>().prop_flat_map(|[a, b]| {
            let bytes = |len: u8| prop::collection::vec(any::<u8>(), usize::from(len) * 8);
            [bytes(a), bytes(b)]
        }),
        which in 0usize..2,
        damage in any::<prop::sample::Index>(),
        bit in 0u8..8,
    ) {
        let Some(ciphers) = both(&[3; 32]) else { return Ok(()) };
        let mut sealed = texts.clone();
        let [a, b] = &mut sealed;
        let tags = ciphers[1].seal_two(counters, [a, b]);
        for (text, tag) in sealed.iter_mut().zip(tags) {
            text.extend(tag.unwrap());
        }
        let at = damage.index(sealed[which].len());
        sealed[which][at] ^= 1 << bit;
        for cipher in ciphers {
            let mut opened = sealed.clone();
            let [a, b] = &mut opened;
            let lens = cipher.open_two(counters, [a, b]);
            prop_assert_eq!(lens[which], None);
            prop_assert_eq!(lens[1 - which], Some(texts[1 - which].len()));
            prop_assert!(opened[1 - which].starts_with(&texts[1 - which]));
        }
    }

    #[test]
    fn what_is_damaged_is_refused_and_the_rest_is_rings(
        key in any::<[u8; 32]>(),
        counter in any::<u64>(),
        text in prop::collection::vec(any::<u8>(), 0..4000),
        damage in any::<prop::sample::Index>(),
        bit in 0u8..8,
    ) {
        let Some([ring, wide]) = both(&key) else { return Ok(()) };
        let mut sealed = text.clone();
        let tag = wide.seal(counter, &mut sealed).unwrap();
        sealed.extend(tag);
        let mut of_the_tag = sealed.clone();
        of_the_tag[text.len() + damage.index(TAG)] ^= 1 << bit;
        prop_assert_eq!(wide.open(counter, &mut of_the_tag), None);
        let mut damaged = sealed.clone();
        damaged[damage.index(sealed.len())] ^= 1 << bit;
        for cipher in [&ring, &wide] {
            prop_assert_eq!(cipher.open(counter, &mut damaged.clone()), None);
            prop_assert_eq!(cipher.open(counter.wrapping_add(1), &mut sealed.clone()), None);
            let mut opened = sealed.clone();
            prop_assert_eq!(cipher.open(counter, &mut opened), Some(text.len()));
            prop_assert_eq!(&opened[..text.len()], &text);
        }
    }
}
