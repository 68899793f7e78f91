//! Handshake age to the state of a peer.
//!
//! ```text
//! handshake 0 s        120 s              180 s
//!           |-- up ------|-- up, renewing --|-- stale: keys no longer accepted --->
//!                        REKEY_AFTER_TIME   REJECT_AFTER_TIME
//! ```
//! (WireGuard paper, section 6.1.) A session is renewed only when there is something to
//! send, so a stale peer may merely be idle: it is no proof of a broken path.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Age at which the keys of a handshake are no longer accepted.
pub const REJECT_AFTER: Duration = Duration::from_secs(180);

/// Whether a peer has a working session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PeerState {
    /// The last handshake is recent enough that packets pass.
    Up,
    /// The last handshake is too old: the next packet needs a new one first.
    Stale,
    /// No handshake has ever completed.
    Never,
}

impl PeerState {
    /// The state for the time since the last completed handshake, if there was one.
    pub fn new(handshake_age: Option<Duration>) -> Self {
        match handshake_age {
            None => Self::Never,
            Some(age) if age > REJECT_AFTER => Self::Stale,
            Some(_) => Self::Up,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_up_until_its_keys_are_rejected() {
        let state = |seconds| PeerState::new(Some(Duration::from_secs(seconds)));
        assert_eq!(PeerState::new(None), PeerState::Never);
        assert_eq!(state(0), PeerState::Up);
        assert_eq!(state(180), PeerState::Up);
        assert_eq!(state(181), PeerState::Stale);
        // A clock that jumped forward ten years says "stale", not more.
        assert_eq!(state(10 * 365 * 86_400), PeerState::Stale);
    }
}
