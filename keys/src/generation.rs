use std::fmt;

use serde::{Deserialize, Serialize};

/// Number of a node's key: grows by one with each rotation and never goes back.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Generation(u64);

impl Generation {
    /// The first generation of a node.
    pub const FIRST: Self = Self(0);

    /// A generation by number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Its number.
    pub const fn number(self) -> u64 {
        self.0
    }

    /// 0 for even generations, 1 for odd ones.
    pub const fn parity(self) -> u8 {
        if self.0.is_multiple_of(2) { 0 } else { 1 }
    }

    /// The next generation, or `None` at the end of the range.
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
