//! When the next pass may start: soon after a single event, rarely enough in a storm.
//!
//! ```text
//! event            event event event ...                     (one burst, one pass)
//!   |--15 ms-->pass  |--15 ms, and as long as the last pass took-->pass
//!
//! passes for kernel events that find nothing to do:  15, 30, 60 ... 400 ms apart
//! ```
//! The limit of 400 ms keeps the promise that damage is repaired within a second.

use std::time::{Duration, Instant};

/// Events within this time of the first are handled in one pass.
const COALESCE: Duration = Duration::from_millis(15);
/// Longest pause for the sake of the machine's load.
const LONGEST_PAUSE: Duration = Duration::from_millis(400);
/// After this long without a pass a storm is over.
const CALM: Duration = Duration::from_secs(1);

/// Decides when to look again.
#[derive(Debug, Default)]
pub(super) struct Pacer {
    last: Option<Last>,
    fruitless: u32,
}

#[derive(Debug, Clone, Copy)]
struct Last {
    ended: Instant,
    took: Duration,
}

/// What asks for a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cause {
    /// Something in the kernel changed, most often not ours.
    Kernel,
    /// A Node changed, somebody asks, or a timer says so.
    Wanted,
}

impl Pacer {
    /// Earliest start of a pass for an event that came at `now`.
    pub(super) fn due(&self, cause: Cause, now: Instant) -> Instant {
        let soon = now + COALESCE;
        let Some(last) = self.last else { return soon };
        let mut pause = last.took.min(LONGEST_PAUSE);
        if cause == Cause::Kernel && now.duration_since(last.ended) < CALM {
            let storm = COALESCE * 2_u32.saturating_pow(self.fruitless);
            pause = pause.max(storm.min(LONGEST_PAUSE));
        }
        soon.max(last.ended + pause)
    }

    /// A pass for `cause` ended; `useful` when it found something to do.
    pub(super) fn ended(&mut self, cause: Cause, started: Instant, now: Instant, useful: bool) {
        let calm = self.last.is_none_or(|last| started.duration_since(last.ended) >= CALM);
        let fruitless = cause == Cause::Kernel && !useful;
        self.fruitless = if fruitless && !calm { (self.fruitless + 1).min(8) } else { 0 };
        self.last = Some(Last { ended: now, took: now.duration_since(started) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_single_event_is_handled_at_once() {
        let mut pacer = Pacer::default();
        let start = Instant::now();
        assert_eq!(pacer.due(Cause::Wanted, start), start + COALESCE);
        pacer.ended(Cause::Wanted, start, start + ms(30), true);
        let later = start + ms(5000);
        assert_eq!(pacer.due(Cause::Kernel, later), later + COALESCE);
    }

    #[test]
    fn slow_passes_leave_the_machine_half_of_the_time() {
        let mut pacer = Pacer::default();
        let start = Instant::now();
        pacer.ended(Cause::Wanted, start, start + ms(200), true);
        assert_eq!(pacer.due(Cause::Wanted, start + ms(200)), start + ms(400));
        pacer.ended(Cause::Wanted, start, start + ms(9000), true);
        assert_eq!(pacer.due(Cause::Wanted, start + ms(9000)), start + ms(9400));
    }

    #[test]
    fn a_storm_of_foreign_events_is_slowed_down_but_damage_is_repaired_within_a_second() {
        let mut pacer = Pacer::default();
        let mut now = Instant::now();
        let mut passes = 0;
        let end = now + ms(10_000);
        while now < end {
            let start = pacer.due(Cause::Kernel, now);
            assert!(start - now <= LONGEST_PAUSE + COALESCE);
            now = start + ms(5);
            pacer.ended(Cause::Kernel, start, now, false);
            passes += 1;
        }
        assert!(passes < 40, "{passes} passes in 10 s");
        let due = pacer.due(Cause::Wanted, now);
        assert_eq!(due, now + COALESCE, "a Node change does not wait for the storm");
        pacer.ended(Cause::Kernel, due, due + ms(5), true);
        assert_eq!(pacer.due(Cause::Kernel, due + ms(5)), due + ms(5) + COALESCE);
    }
}
