//! When to send a handshake, a passive keepalive, or to give up: as in the kernel
//! (drivers/net/wireguard/timers.c; WireGuard paper, 6). Times are on the device's clock, ms.

use rand_core::{OsRng, RngCore as _};

use super::session::REJECT_AFTER_TIME;

/// An initiation is sent again after this long, and none sooner after another.
const REKEY_TIMEOUT: u64 = 5_000;
/// An initiation that nobody wants any more is given up after this long.
const REKEY_ATTEMPT_TIME: u64 = 90_000;
/// Who has received and not sent for this long says that it is there.
const KEEPALIVE_TIMEOUT: u64 = 10_000;
/// Added to the times of handshakes, so that two ends do not keep starting at once.
const JITTER: u64 = 334;
/// The initiator of a session makes another one at this age, when it receives.
const LAST_MINUTE: u64 = REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT;

/// The timers of a peer. One that is not set is `None`.
#[derive(Debug, Default)]
pub(super) struct Timers {
    retransmit: Option<u64>,
    /// When somebody last wanted the session that is being made.
    wanted: u64,
    last_initiation: Option<u64>,
    keepalive: Option<u64>,
    /// Something more has come since the keepalive was set.
    another_keepalive: bool,
    /// When to take the peer for one that does not hear us.
    unheard: Option<u64>,
    /// A new session was asked for because this one is about to end.
    is_last_minute: bool,
}

/// What a timer asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// The last initiation had no answer.
    Retry,
    /// What was sent had no answer.
    Unheard,
    Keepalive,
    /// Nobody has wanted the session for too long.
    GiveUp,
}

impl Timers {
    /// Takes the next timer that is due.
    pub(super) fn due(&mut self, now: u64) -> Option<Due> {
        let is_due = |timer: &mut u64| *timer <= now;
        if self.retransmit.take_if(is_due).is_some() {
            if now.saturating_sub(self.wanted) < REKEY_ATTEMPT_TIME {
                return Some(Due::Retry);
            }
            self.keepalive = None;
            return Some(Due::GiveUp);
        }
        if self.unheard.take_if(is_due).is_some() {
            return Some(Due::Unheard);
        }
        if self.keepalive.take_if(is_due).is_some() {
            if std::mem::take(&mut self.another_keepalive) {
                self.keepalive = Some(now + KEEPALIVE_TIMEOUT);
            }
            return Some(Due::Keepalive);
        }
        None
    }

    /// Whether none is set.
    pub(super) fn is_idle(&self) -> bool {
        self.retransmit.is_none() && self.keepalive.is_none() && self.unheard.is_none()
    }

    /// Somebody wants a session. Says whether an initiation may go now.
    pub(super) fn want(&mut self, now: u64) -> bool {
        self.wanted = now;
        self.last_initiation.is_none_or(|last| now.saturating_sub(last) >= REKEY_TIMEOUT)
    }

    pub(super) fn initiation_sent(&mut self, now: u64) {
        self.last_initiation = Some(now);
        self.retransmit = Some(now + REKEY_TIMEOUT + jitter());
        self.sent(now, false);
    }

    /// A handshake is complete at both ends.
    pub(super) fn completed(&mut self) {
        self.retransmit = None;
        self.is_last_minute = false;
    }

    /// Something authentic was sent.
    pub(super) fn sent(&mut self, now: u64, is_data: bool) {
        self.keepalive = None;
        self.another_keepalive = false;
        if is_data {
            self.unheard.get_or_insert_with(|| now + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT + jitter());
        }
    }

    /// Something authentic was received.
    pub(super) fn received(&mut self, now: u64, is_data: bool) {
        self.unheard = None;
        if is_data {
            self.another_keepalive = self.keepalive.is_some();
            self.keepalive.get_or_insert(now + KEEPALIVE_TIMEOUT);
        }
    }

    /// Whether the initiator of a session of this age, which it receives by, should make another
    /// one. It says so once.
    pub(super) fn is_last_minute(&mut self, age: u64) -> bool {
        age >= LAST_MINUTE && !std::mem::replace(&mut self.is_last_minute, true)
    }
}

fn jitter() -> u64 {
    u64::from(OsRng.next_u32()) % JITTER
}
