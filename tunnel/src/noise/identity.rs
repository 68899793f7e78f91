//! The device's own key pair, and what guards its handshakes.

use std::net::SocketAddr;

use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use super::cookie::{Gate, Verdict};

/// The device's own key pair.
pub(crate) struct Identity {
    private: StaticSecret,
    public: PublicKey,
    gate: Gate,
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

    /// Decides whether an initiation or a response is worth a computation. `reply` receives a
    /// cookie of [`COOKIE_LEN`](super::COOKIE_LEN) bytes; `now` is the device's clock, ms.
    pub(crate) fn check(
        &self,
        from: SocketAddr,
        message: &[u8],
        now: u64,
        reply: &mut [u8],
    ) -> Verdict {
        self.gate.check(from, message, now, reply)
    }
}

fn clamp(private: &[u8; 32]) -> Zeroizing<[u8; 32]> {
    let mut key = Zeroizing::new(*private);
    key[0] &= 248;
    key[31] = (key[31] & 127) | 64;
    key
}
