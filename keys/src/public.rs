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
}

impl PublicKey {
    /// Checks the bytes.
    ///
    /// # Errors
    /// [`PublicKeyError::LowOrder`].
    pub fn from_bytes(bytes: [u8; 32]) -> Result<Self, PublicKeyError> {
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
