//! The device's own key pair, and what guards its handshakes.

use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use super::cookie::Gate;

/// The device's own key pair.
pub(crate) struct Identity {
    private: StaticSecret,
    public: PublicKey,
    /// Decides which handshake messages are worth a computation.
    pub(crate) gate: Gate,
}

impl Identity {
    /// From a private key, clamped as X25519 uses it.
    pub(crate) fn new(private: &[u8; 32]) -> Self {
        let private = StaticSecret::from(*clamp(private));
        let public = PublicKey::from(&private);
        Self { gate: Gate::new(public.as_bytes()), private, public }
    }

    pub(crate) fn public(&self) -> &[u8; 32] {
        self.public.as_bytes()
    }

    pub(crate) fn private(&self) -> &[u8; 32] {
        self.private.as_bytes()
    }

    pub(super) fn secret(&self) -> &StaticSecret {
        &self.private
    }

    /// Whether `private` is this identity's key.
    pub(crate) fn is(&self, private: &[u8; 32]) -> bool {
        *clamp(private) == *self.private.as_bytes()
    }
}

fn clamp(private: &[u8; 32]) -> Zeroizing<[u8; 32]> {
    let mut key = Zeroizing::new(*private);
    key[0] &= 248;
    key[31] = (key[31] & 127) | 64;
    key
}
