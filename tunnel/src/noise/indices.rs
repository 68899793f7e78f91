//! Our names of handshakes and sessions. They are random: consecutive ones would tell which
//! sessions are one peer's, wherever it moves to, and would be easy to guess.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use parking_lot::RwLock;
use rand_core::{OsRng, RngCore as _};

/// Which index is whose.
#[derive(Debug, Default)]
pub(crate) struct Indices(RwLock<HashMap<u32, u32, BuildHasherDefault<Plain>>>);

/// An index of ours, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Index {
    value: u32,
    indices: Arc<Indices>,
}

impl Indices {
    /// A new index for `owner`.
    pub(super) fn claim(self: &Arc<Self>, owner: u32) -> Index {
        let mut indices = self.0.write();
        loop {
            let value = OsRng.next_u32();
            if let Entry::Vacant(entry) = indices.entry(value) {
                entry.insert(owner);
                return Index { value, indices: Arc::clone(self) };
            }
        }
    }

    /// Whose index this is.
    pub(crate) fn owner(&self, index: u32) -> Option<u32> {
        self.0.read().get(&index).copied()
    }
}

impl Index {
    pub(super) fn value(&self) -> u32 {
        self.value
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        self.indices.0.write().remove(&self.value);
    }
}

/// The key itself: it is random already, and chosen by us.
#[derive(Debug, Default)]
pub(crate) struct Plain(u64);

impl Hasher for Plain {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.0 = self.0 << 8 | u64::from(*byte));
    }

    fn write_u32(&mut self, value: u32) {
        // The table takes its buckets from the low bits and its tags from the high ones.
        self.0 = u64::from(value) << 32 | u64::from(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_its_owners_until_it_is_dropped() {
        let indices = Arc::new(Indices::default());
        let (a, b) = (indices.claim(1), indices.claim(2));
        assert_eq!((indices.owner(a.value()), indices.owner(b.value())), (Some(1), Some(2)));
        let value = a.value();
        drop(a);
        assert_eq!(indices.owner(value), None);
    }

    #[test]
    fn indices_are_random() {
        let indices = Arc::new(Indices::default());
        let claimed: Vec<_> = (0..64).map(|_| indices.claim(0)).collect();
        let near = |pair: &[Index]| pair[0].value().abs_diff(pair[1].value()) < 1 << 16;
        assert!(!claimed.windows(2).any(near), "{claimed:?}");
    }
}
