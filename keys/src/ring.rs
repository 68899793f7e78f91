use std::collections::BTreeMap;

use crate::{Generation, PrivateKey, PublicKey};

/// The private keys of this node by generation: one, or two while a rotation runs.
#[derive(Debug)]
pub struct KeyRing {
    current: Generation,
    keys: BTreeMap<Generation, PrivateKey>,
}

impl KeyRing {
    /// A ring of one key.
    pub fn new(generation: Generation, key: PrivateKey) -> Self {
        Self { current: generation, keys: BTreeMap::from([(generation, key)]) }
    }

    /// A ring of these keys, or `None` when there are none.
    pub(crate) fn from_keys(keys: BTreeMap<Generation, PrivateKey>) -> Option<Self> {
        let current = *keys.first_key_value()?.0;
        Some(Self { current, keys })
    }

    /// The private keys, oldest generation first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Generation, &PrivateKey)> {
        self.keys.iter().map(|(generation, key)| (*generation, key))
    }

    /// The private key of a generation.
    pub fn private(&self, generation: Generation) -> Option<&PrivateKey> {
        self.keys.get(&generation)
    }

    /// The public keys by generation.
    pub fn publics(&self) -> BTreeMap<Generation, PublicKey> {
        self.keys.iter().map(|(generation, key)| (*generation, key.public())).collect()
    }

    /// The generation in use: the oldest, because a newer one replaces it only by its removal.
    pub fn current(&self) -> Generation {
        self.current
    }
}
