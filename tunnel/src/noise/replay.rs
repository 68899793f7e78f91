//! Which counters of a session have been seen: a sliding window (RFC 6479).

/// Words of 64 counters; the newest one is being filled.
const WORDS: usize = 128;
/// How far behind the greatest counter one may be, as in the kernel
/// (`COUNTER_WINDOW_SIZE`, drivers/net/wireguard/messages.h).
pub(super) const WINDOW: u64 = (WORDS as u64 - 1) * 64;

/// The window.
pub(super) struct Replay {
    greatest: u64,
    words: [u64; WORDS],
}

impl Replay {
    pub(super) fn new() -> Self {
        Self { greatest: 0, words: [0; WORDS] }
    }

    /// Whether a message with this counter is worth opening.
    pub(super) fn is_new(&self, counter: u64) -> bool {
        counter > self.greatest
            || (self.greatest - counter < WINDOW && self.words[slot(counter)] & bit(counter) == 0)
    }

    /// Marks the counter of a message that is authentic, and says whether it was new.
    pub(super) fn accept(&mut self, counter: u64) -> bool {
        if !self.is_new(counter) {
            return false;
        }
        if counter > self.greatest {
            let (from, to) = (self.greatest / 64, counter / 64);
            // Beyond a whole round each word would be cleared again.
            let words = (to - from).min(WORDS as u64);
            (0..words).for_each(|n| self.words[slot((to - n) * 64)] = 0);
            self.greatest = counter;
        }
        self.words[slot(counter)] |= bit(counter);
        true
    }
}

fn slot(counter: u64) -> usize {
    (counter / 64) as usize % WORDS
}

fn bit(counter: u64) -> u64 {
    1 << (counter % 64)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_window_is_the_kernels() {
        let mut replay = Replay::new();
        assert!(replay.accept(WINDOW + 5));
        assert!(replay.accept(6));
        assert!(!replay.accept(5));
        assert!(!replay.accept(6));
        assert_eq!(WINDOW, 8192 - 64);
    }

    proptest! {
        #[test]
        fn each_counter_passes_once_and_none_from_before_the_window(
            start in prop::sample::select(vec![0u64, 63, 64, 1 << 40, u64::MAX - (1 << 14)]),
            steps in prop::collection::vec((any::<bool>(), 0u64..20_000), 1..200),
        ) {
            let (mut replay, mut seen, mut greatest) = (Replay::new(), HashSet::new(), 0);
            for (forward, step) in steps {
                let counter = match forward {
                    true => start.max(greatest).saturating_add(step % 200),
                    false => greatest.saturating_sub(step),
                };
                let expected = !seen.contains(&counter)
                    && (counter > greatest || greatest - counter < WINDOW);
                prop_assert_eq!(replay.is_new(counter), expected);
                prop_assert_eq!(replay.accept(counter), expected);
                seen.insert(counter);
                greatest = greatest.max(counter);
            }
        }
    }
}
