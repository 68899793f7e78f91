//! Whether the agent's loop goes round.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// When the loop last went round.
#[derive(Debug, Clone)]
pub struct Rounds {
    longest: Duration,
    last: Arc<Mutex<Instant>>,
}

impl Rounds {
    /// Of a loop that starts now, and that hangs when it does not go round in this time.
    pub fn new(longest: Duration) -> Self {
        Self { longest, last: Arc::new(Mutex::new(Instant::now())) }
    }

    /// Notes that it went round.
    pub fn went_round(&self) {
        *self.last() = Instant::now();
    }

    /// Since when it has not gone round, where that is too long.
    pub fn hangs(&self) -> Option<Duration> {
        let since = self.last().elapsed();
        (since > self.longest).then_some(since)
    }

    fn last(&self) -> MutexGuard<'_, Instant> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(crate) fn stood_still_for(&self, time: Duration) {
        *self.last() = Instant::now().checked_sub(time).unwrap_or_else(Instant::now);
    }
}
