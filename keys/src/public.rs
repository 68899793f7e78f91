use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

/// An X25519 public key that is safe to use with a peer: 32 bytes, not a low-order point.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey([u8; 32]);

/// Why a text or byte string is not a usable public key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PublicKeyError {
    /// Not the strict base64 of 32 bytes: 44 characters, padded, no spare bits.
    #[error("not the base64 of 32 bytes (44 characters, as `wg pubkey` prints)")]
    Encoding,
    /// A point of low order, with which every shared secret is known.
    #[error("a low-order point, which is never a real node's key")]
    LowOrder,
    /// A second spelling of a key: not below 2^255 - 19. No key generator makes one, and
    /// accepting it would let two different texts mean the same key.
    #[error("not the canonical form of an X25519 key, so no key generator made it")]
    NotCanonical,
}

/// The u-coordinates of order 1, 2, 4 and 8 on Curve25519 and its twist, as every encoding
/// below 2^255 spells them. X25519 ignores the top bit (RFC 7748 section 5), so that bit is
/// masked before comparing. Source: <https://cr.yp.to/ecdh.html#validate>.
const LOW_ORDER: [[u8; 32]; 7] = [
    [0; 32],
    with_ends(0x01, 0x00, 0x00),
    [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4,
        0x6a, 0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49,
        0xb8, 0x00,
    ],
    [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef,
        0x5b, 0x04, 0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f,
        0x11, 0x57,
    ],
    with_ends(0xec, 0xff, 0x7f),
    with_ends(0xed, 0xff, 0x7f),
    with_ends(0xee, 0xff, 0x7f),
];

const fn with_ends(first: u8, middle: u8, last: u8) -> [u8; 32] {
    let mut bytes = [middle; 32];
    bytes[0] = first;
    bytes[31] = last;
    bytes
}

/// Whether X25519 with this point gives a shared secret that everybody knows, whatever the
/// private key. The top bit is ignored, as X25519 does.
fn is_low_order(point: &[u8; 32]) -> bool {
    let mut masked = *point;
    masked[31] &= 0x7f;
    LOW_ORDER.contains(&masked)
}

impl PublicKey {
    /// Checks the bytes.
    ///
    /// # Errors
    /// [`PublicKeyError::LowOrder`] and [`PublicKeyError::NotCanonical`].
    pub fn from_bytes(bytes: [u8; 32]) -> Result<Self, PublicKeyError> {
        if is_low_order(&bytes) {
            return Err(PublicKeyError::LowOrder);
        }
        let mut masked = bytes;
        masked[31] &= 0x7f;
        let below_prime =
            masked[0] < 0xed || masked[31] != 0x7f || masked[1..31].iter().any(|b| *b != 0xff);
        if masked != bytes || !below_prime {
            return Err(PublicKeyError::NotCanonical);
        }
        Ok(Self(bytes))
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl FromStr for PublicKey {
    type Err = PublicKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() != 44 {
            return Err(PublicKeyError::Encoding);
        }
        let bytes = STANDARD.decode(text).map_err(|_| PublicKeyError::Encoding)?;
        Self::from_bytes(bytes.try_into().map_err(|_| PublicKeyError::Encoding)?)
    }
}

impl TryFrom<String> for PublicKey {
    type Error = PublicKeyError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> Self {
        key.to_string()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: &str = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";

    fn encode(bytes: [u8; 32]) -> String {
        STANDARD.encode(bytes)
    }

    #[test]
    fn reads_what_it_prints() {
        let key: PublicKey = KEY.parse().unwrap();
        assert_eq!(key.to_string(), KEY);
        assert_eq!(format!("{key:?}"), format!("PublicKey({KEY})"));
    }

    #[test]
    fn refuses_low_order_points_with_and_without_the_top_bit() {
        for mut bytes in LOW_ORDER {
            assert_eq!(encode(bytes).parse::<PublicKey>(), Err(PublicKeyError::LowOrder));
            bytes[31] |= 0x80;
            assert_eq!(encode(bytes).parse::<PublicKey>(), Err(PublicKeyError::LowOrder));
        }
    }

    #[cfg(feature = "private")]
    #[test]
    fn every_listed_point_gives_a_known_secret() {
        let secret = x25519_dalek::StaticSecret::from([7; 32]);
        for mut bytes in LOW_ORDER {
            for high in [0, 0x80] {
                bytes[31] = (bytes[31] & 0x7f) | high;
                let point = x25519_dalek::PublicKey::from(bytes);
                assert!(is_low_order(&bytes), "{bytes:x?}");
                assert!(!secret.diffie_hellman(&point).was_contributory(), "{bytes:x?}");
            }
        }
        assert!(!is_low_order(x25519_dalek::PublicKey::from(&secret).as_bytes()));
    }

    #[test]
    fn refuses_a_second_spelling_of_a_key() {
        let mut bytes = *KEY.parse::<PublicKey>().unwrap().as_bytes();
        bytes[31] |= 0x80;
        assert_eq!(PublicKey::from_bytes(bytes), Err(PublicKeyError::NotCanonical));
        // 2^255 - 1 is 18 above the prime.
        let above = with_ends(0xff, 0xff, 0x7f);
        assert_eq!(PublicKey::from_bytes(above), Err(PublicKeyError::NotCanonical));
        let largest = with_ends(0xeb, 0xff, 0x7f);
        assert!(PublicKey::from_bytes(largest).is_ok());
    }

    #[test]
    fn refuses_lax_base64_and_wrong_lengths() {
        for text in [
            String::new(),
            KEY[..43].to_owned(),
            format!("{KEY}="),
            format!("{KEY}\n"),
            format!(" {}", &KEY[..43]),
            // The same 32 bytes with a spare bit set in the last character.
            KEY.replace("mo=", "mp="),
            KEY.replace('/', "_"),
            STANDARD.encode([9_u8; 31]),
            STANDARD.encode([9_u8; 33]),
            STANDARD.encode(vec![9_u8; 256 * 1024]),
            "\u{1f512}".repeat(11),
        ] {
            assert_eq!(text.parse::<PublicKey>(), Err(PublicKeyError::Encoding), "{text:.60}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_back_or_refused(text in "[A-Za-z0-9+/]{43}=") {
            if let Ok(key) = text.parse::<PublicKey>() {
                prop_assert_eq!(key.to_string(), text);
            }
        }

        #[test]
        fn no_text_panics(text in any::<String>()) {
            let _ = text.parse::<PublicKey>();
        }
    }
}
