//! What is known of the other end before a handshake.

use x25519_dalek::PublicKey;

use super::cookie::{cookie_key, mac1_key};
use super::crypto::Key;

/// The other end's public key, what follows from it, and the secret shared beforehand.
pub(super) struct Remote {
    pub(super) public: PublicKey,
    /// Of the first MAC of messages to it.
    pub(super) mac1_key: [u8; 32],
    /// Of its cookie replies.
    pub(super) cookie_key: [u8; 32],
    /// Zeros for none.
    pub(super) preshared_key: Key,
}

impl Remote {
    pub(super) fn new(public: &[u8; 32], preshared_key: &[u8; 32]) -> Self {
        Self {
            public: PublicKey::from(*public),
            mac1_key: mac1_key(public),
            cookie_key: cookie_key(public),
            preshared_key: Key::new(*preshared_key),
        }
    }
}
