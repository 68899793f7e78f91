//! BLAKE2s, HKDF, X25519 and ChaCha20-Poly1305 as WireGuard uses them (paper, 5.4).

use std::array;

use blake2::digest::consts::U16;
use blake2::digest::{Digest as _, FixedOutput as _, Mac, Update};
use blake2::{Blake2s256, Blake2sMac};
use hmac::SimpleHmac;
use ring::aead::Aad;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use super::aead::{TAG, nonce, ring_key};

/// A secret that is erased when it is dropped.
pub(super) type Key = Zeroizing<[u8; 32]>;

pub(super) fn hash(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Blake2s256::new();
    parts.iter().for_each(|part| Update::update(&mut hash, part));
    hash.finalize().into()
}

/// Keyed BLAKE2s of 16 bytes; keys are of 16 or 32.
pub(super) fn mac(key: &[u8], parts: &[&[u8]]) -> [u8; 16] {
    keyed(key, parts).map_or([0; 16], |mac| mac.finalize_fixed().into())
}

/// Whether `tag` is that [`mac`], told in constant time.
pub(super) fn is_mac(key: &[u8], parts: &[&[u8]], tag: &[u8]) -> bool {
    keyed(key, parts).is_some_and(|mac| mac.verify_slice(tag).is_ok())
}

fn keyed(key: &[u8], parts: &[&[u8]]) -> Option<Blake2sMac<U16>> {
    let mut mac = <Blake2sMac<U16> as Mac>::new_from_slice(key).ok()?;
    parts.iter().for_each(|part| Update::update(&mut mac, part));
    Some(mac)
}

/// HKDF (RFC 5869) with HMAC-BLAKE2s: `N` keys from a chaining key and an input.
pub(super) fn kdf<const N: usize>(chain: &[u8; 32], input: &[u8]) -> [Key; N] {
    let secret = hmac(chain, &[input]);
    let mut previous = Zeroizing::new(Vec::with_capacity(32));
    let mut number = 0;
    array::from_fn(|_| {
        number += 1;
        let output = hmac(&secret, &[&previous, &[number]]);
        previous.clear();
        previous.extend_from_slice(&*output);
        output
    })
}

fn hmac(key: &[u8; 32], parts: &[&[u8]]) -> Key {
    // HMAC takes a key of any length.
    let Ok(mut hmac) = <SimpleHmac<Blake2s256> as Mac>::new_from_slice(key) else {
        return Key::default();
    };
    parts.iter().for_each(|part| Update::update(&mut hmac, part));
    Zeroizing::new(hmac.finalize_fixed().into())
}

/// A shared secret, or `None` if the point is of low order, so that everybody knows it.
pub(super) fn agree(private: &StaticSecret, public: &PublicKey) -> Option<Key> {
    let shared = private.diffie_hellman(public);
    shared.was_contributory().then(|| Zeroizing::new(*shared.as_bytes()))
}

/// Seals `plain` with a key that is used once. `out` has room for it and [`TAG`] bytes.
pub(super) fn seal_once(key: &[u8; 32], aad: &[u8], plain: &[u8], out: &mut [u8]) -> Option<()> {
    let (text, tag) = out.split_at_mut_checked(plain.len())?;
    text.copy_from_slice(plain);
    let sealed = ring_key(key)?.seal_in_place_separate_tag(nonce(0), Aad::from(aad), text).ok()?;
    tag.get_mut(..TAG)?.copy_from_slice(sealed.as_ref());
    Some(())
}

/// Opens what [`seal_once`] has sealed: `N` bytes.
pub(super) fn open_once<const N: usize>(
    key: &[u8; 32],
    aad: &[u8],
    sealed: &[u8],
) -> Option<[u8; N]> {
    let mut buffer = Zeroizing::new(sealed.to_vec());
    let plain = ring_key(key)?.open_in_place(nonce(0), Aad::from(aad), &mut buffer).ok()?;
    (&*plain).try_into().ok()
}
