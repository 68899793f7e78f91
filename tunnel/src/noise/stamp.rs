//! The timestamps of initiations: each greater than all before it (WireGuard paper, 5.1).

use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

use super::handshake::Timestamp;

/// Nanoseconds are cut to a multiple of this, 16.8 ms, as in the kernel: a precise time would
/// tell more of this host than a peer needs to know.
const GRAIN: u32 = 1 << 24;
/// TAI64's label of 1970 as UTC counts; TAI is 37 s ahead of it since 2017.
const EPOCH: u64 = (1 << 62) + 37;

/// A timestamp for an initiation. All peers' come from one row, so that a clock that is set
/// back does not make them refuse us.
pub(super) fn stamp() -> Timestamp {
    static LAST: Mutex<Duration> = Mutex::new(Duration::ZERO);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut last = LAST.lock();
    *last = cut(now).max(cut(*last + Duration::from_nanos(u64::from(GRAIN))));
    label(*last)
}

fn cut(time: Duration) -> Duration {
    Duration::new(time.as_secs(), time.subsec_nanos() & !(GRAIN - 1))
}

fn label(time: Duration) -> Timestamp {
    let mut label = [0; 12];
    label[..8].copy_from_slice(&(EPOCH + time.as_secs()).to_be_bytes());
    label[8..].copy_from_slice(&time.subsec_nanos().to_be_bytes());
    label
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_greater_than_the_one_before() {
        let stamps: Vec<_> = (0..200).map(|_| stamp()).collect();
        assert!(stamps.windows(2).all(|pair| pair[0] < pair[1]), "{stamps:?}");
    }

    #[test]
    fn labels_are_tai64n_and_cut() {
        let time = cut(Duration::new(1, 0x0234_5678));
        assert_eq!(label(time), [0x40, 0, 0, 0, 0, 0, 0, 38, 0x02, 0, 0, 0]);
    }
}
