use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::{Generation, PrivateKey, PublicKey, SecretId, Secrets};

/// The private keys of this node by generation: one, or two while a rotation runs.
#[derive(Debug)]
pub struct KeyRing {
    keys: BTreeMap<Generation, Entry>,
    newest: Generation,
    answer: Answer,
    /// Of which preshared keys are made, the oldest first.
    secrets: Secrets,
}

/// What the newest key was made for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// The last request for a new key, which it answers.
    pub request: Option<String>,
    /// Whether the older key is to go at once.
    pub revoke: bool,
}

/// A key, and when it was made.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) key: PrivateKey,
    /// Seconds since the Unix epoch. Unknown where the file does not say.
    pub(crate) made: Option<u64>,
    /// Of which its sessions' preshared keys are made.
    pub(crate) secret: Option<SecretId>,
}

impl Entry {
    pub(crate) fn generate(secret: Option<SecretId>) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { key: PrivateKey::generate(), made: Some(now.as_secs()), secret }
    }
}

impl KeyRing {
    /// A ring of one key.
    pub fn new(generation: Generation, key: PrivateKey) -> Self {
        let entry = Entry { key, made: None, secret: None };
        Self::first(generation, entry, Answer::default(), Secrets::default())
    }

    pub(crate) fn first(
        generation: Generation,
        entry: Entry,
        answer: Answer,
        secrets: Secrets,
    ) -> Self {
        Self { keys: BTreeMap::from([(generation, entry)]), newest: generation, answer, secrets }
    }

    /// A ring of these keys, or `None` when there are none.
    pub(crate) fn from_parts(
        keys: BTreeMap<Generation, Entry>,
        answer: Answer,
        secrets: Secrets,
    ) -> Option<Self> {
        let newest = *keys.last_key_value()?.0;
        Some(Self { keys, newest, answer, secrets })
    }

    /// The private keys, oldest generation first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Generation, &Entry)> {
        self.keys.iter().map(|(generation, entry)| (*generation, entry))
    }

    /// The newest private key.
    pub(crate) fn newest_alone(&self) -> impl Iterator<Item = (Generation, &Entry)> {
        self.iter().filter(|(generation, _)| *generation == self.newest)
    }

    /// The private key of a generation.
    pub fn private(&self, generation: Generation) -> Option<&PrivateKey> {
        self.keys.get(&generation).map(|entry| &entry.key)
    }

    /// The public keys by generation.
    pub fn publics(&self) -> BTreeMap<Generation, PublicKey> {
        self.iter().map(|(generation, entry)| (generation, entry.key.public())).collect()
    }

    /// What the preshared keys of each key's sessions are made of, where they have some.
    pub fn secret_ids(&self) -> BTreeMap<Generation, SecretId> {
        self.iter().filter_map(|(generation, entry)| Some((generation, entry.secret?))).collect()
    }

    /// The cluster's secrets that this node knows, the oldest first.
    pub fn secrets(&self) -> &Secrets {
        &self.secrets
    }

    /// The newest generation: the only one, unless a rotation runs.
    pub fn newest(&self) -> Generation {
        self.newest
    }

    /// What the newest key was made for.
    pub fn answer(&self) -> &Answer {
        &self.answer
    }

    /// How old the newest key is, if that is known. One from the future is new: the clock was
    /// set back since.
    pub fn age(&self, now: SystemTime) -> Option<Duration> {
        let made = self.newest_alone().next()?.1.made?;
        let made = UNIX_EPOCH.checked_add(Duration::from_secs(made))?;
        Some(now.duration_since(made).unwrap_or_default())
    }

    /// The newest key, and one after it.
    pub(crate) fn add_next(
        &mut self,
        next: Generation,
        entry: Entry,
        (answer, secrets): (Answer, Secrets),
    ) {
        self.secrets = secrets;
        self.keep_newest();
        self.keys.insert(next, entry);
        self.newest = next;
        self.answer = answer;
    }

    pub(crate) fn set_secrets(&mut self, secrets: Secrets) {
        self.secrets = secrets;
    }

    /// Drops every key but the newest, from memory as well.
    pub(crate) fn keep_newest(&mut self) {
        let newest = self.newest;
        self.keys.retain(|generation, _| *generation == newest);
    }
}
