//! What packets look up: a snapshot that is replaced whole.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::peer::Peer;
use crate::allowed_ips::AllowedIps;
use crate::noise::{Identity, Indices};

/// A peer's place in the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub(super) u32);

impl PeerId {
    /// At most this many peers (the kernel's limit).
    pub(super) const MAX: usize = 1 << 20;

    pub(crate) fn index(self) -> u32 {
        self.0
    }
}

/// An immutable snapshot. The parts are shared with the next one where nothing changed.
#[derive(Default)]
pub(super) struct Tables {
    pub(super) identity: Option<Arc<Identity>>,
    pub(super) indices: Arc<Indices>,
    pub(super) allowed_ips: Arc<AllowedIps<PeerId>>,
    /// By [`PeerId`].
    pub(super) slots: Arc<Vec<Option<Arc<Peer>>>>,
    pub(super) keys: Arc<HashMap<[u8; 32], PeerId>>,
}

impl Tables {
    /// The same parts again.
    pub(super) fn share(&self) -> Self {
        Self {
            identity: self.identity.clone(),
            indices: Arc::clone(&self.indices),
            allowed_ips: Arc::clone(&self.allowed_ips),
            slots: Arc::clone(&self.slots),
            keys: Arc::clone(&self.keys),
        }
    }

    pub(super) fn peers(&self) -> impl Iterator<Item = &Peer> {
        self.slots.iter().flatten().map(Arc::as_ref)
    }

    pub(super) fn by_id(&self, id: PeerId) -> Option<&Peer> {
        self.slots.get(id.0 as usize)?.as_deref()
    }

    /// The peer that a session index of ours belongs to.
    pub(super) fn by_index(&self, index: u32) -> Option<&Peer> {
        self.by_id(PeerId(self.indices.owner(index)?))
    }

    pub(super) fn by_key(&self, key: &[u8; 32]) -> Option<&Peer> {
        self.by_id(*self.keys.get(key)?)
    }

    /// Who owns `address`.
    pub(super) fn allowed(&self, address: IpAddr) -> Option<PeerId> {
        self.allowed_ips.lookup(address)
    }

    /// The peer to which packets for `destination` go.
    pub(super) fn route(&self, destination: IpAddr) -> Option<&Peer> {
        self.by_id(self.allowed(destination)?)
    }
}

impl fmt::Debug for Tables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tables").field("peers", &self.keys.len()).finish_non_exhaustive()
    }
}
