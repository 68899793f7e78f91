//! Growing waits between attempts, with jitter so that a cluster's agents do not come back
//! all at once.

use std::time::Duration;

use rand::Rng;

/// Waits that double from `first` to `most`. Each is drawn from its upper half.
///
/// ```text
/// failure   wait            failure   wait               success
///    |--[first/2, first]--|    |--[first, 2*first]--| ...   |  starts over
/// ```
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
}

impl Backoff {
    /// Starts at `first`, never above `most`.
    pub fn new(first: Duration, most: Duration) -> Self {
        Self { first, most, next: first }
    }

    /// How long to wait after one more failure.
    pub fn wait(&mut self) -> Duration {
        let wait = self.next;
        self.next = (wait * 2).min(self.most);
        wait.mul_f64(rand::rng().random_range(0.5..=1.0))
    }

    /// After a success: the next failure waits `first` again.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_its_limit_and_starts_over() {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(1));
        for most in [200, 400, 800, 1000, 1000] {
            let wait = backoff.wait();
            let most = Duration::from_millis(most);
            assert!(most / 2 <= wait && wait <= most, "{wait:?} of {most:?}");
        }
        backoff.reset();
        assert!(backoff.wait() <= Duration::from_millis(200));
    }
}
