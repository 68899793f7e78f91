use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rand_core::{OsRng, RngCore as _};
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

use crate::PublicKey;

/// Characters of a key in base64.
pub(crate) const ENCODED: usize = 44;

/// An X25519 private key. Wiped from memory on drop, never printed.
pub struct PrivateKey {
    secret: StaticSecret,
    public: PublicKey,
}

impl PrivateKey {
    /// A new key from the operating system's random generator, clamped as `wg genkey` does,
    /// so that a device gives back the same bytes.
    pub fn generate() -> Self {
        loop {
            let mut bytes = Zeroizing::new([0_u8; 32]);
            OsRng.fill_bytes(bytes.as_mut());
            bytes[0] &= 0b1111_1000;
            bytes[31] = (bytes[31] & 0b0111_1111) | 0b0100_0000;
            // A clamped scalar never gives a low-order point; the loop spares a panic.
            if let Some(key) = Self::from_bytes(&bytes) {
                return key;
            }
        }
    }

    /// The key with these bytes, or `None` for all zeros, which WireGuard reads as "no key".
    pub(crate) fn from_bytes(bytes: &[u8; 32]) -> Option<Self> {
        if bytes.iter().all(|b| *b == 0) {
            return None;
        }
        let secret = StaticSecret::from(*bytes);
        let public = x25519_dalek::PublicKey::from(&secret);
        Some(Self { public: PublicKey::from_bytes(public.to_bytes()).ok()?, secret })
    }

    /// The key in strict base64, or `None` for anything else.
    pub(crate) fn decode(text: &str) -> Option<Self> {
        let bytes = decode(text)?;
        Self::from_bytes(&bytes)
    }

    /// The public key that belongs to it.
    pub fn public(&self) -> PublicKey {
        self.public
    }

    /// The 32 secret bytes, for the device that is to use them.
    pub fn as_bytes(&self) -> &[u8; 32] {
        self.secret.as_bytes()
    }
}

/// 32 secret bytes from strict base64, or `None` for anything else.
pub(crate) fn decode(text: &str) -> Option<Zeroizing<[u8; 32]>> {
    if text.len() != ENCODED {
        return None;
    }
    // The decoder wants room for the 33 bytes that 44 characters could hold.
    let mut buffer = Zeroizing::new([0_u8; 33]);
    let length = STANDARD.decode_slice(text, buffer.as_mut()).ok()?;
    let mut bytes = Zeroizing::new([0_u8; 32]);
    if length != bytes.len() {
        return None;
    }
    bytes.copy_from_slice(&buffer[..32]);
    Some(bytes)
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey(redacted, public {})", self.public)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7748 section 6.1, Alice.
    #[test]
    fn derives_the_public_key_of_rfc_7748() {
        let private = PrivateKey::decode("dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=").unwrap();
        assert_eq!(private.public().to_string(), "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=");
    }

    #[test]
    fn generated_keys_are_clamped_and_differ() {
        let (a, b) = (PrivateKey::generate(), PrivateKey::generate());
        assert_ne!(a.as_bytes(), b.as_bytes());
        assert_ne!(a.public(), b.public());
        for key in [a, b] {
            assert_eq!(key.as_bytes()[0] & 7, 0);
            assert_eq!(key.as_bytes()[31] & 0xc0, 0x40);
        }
    }

    #[test]
    fn debug_tells_nothing_secret() {
        let key = PrivateKey::generate();
        let shown = format!("{key:?} {key:#?}");
        assert!(!shown.contains(&STANDARD.encode(key.as_bytes())));
        assert!(shown.contains("redacted"));
    }

    #[test]
    fn refuses_what_is_not_strict_base64_of_a_key() {
        for text in [
            "",
            "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
            "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCp=",
            "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCoA",
            "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LA==",
            " wdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=",
        ] {
            assert!(PrivateKey::decode(text).is_none(), "{text}");
        }
    }
}
