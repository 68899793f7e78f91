//! Objects by key, one revision counter, and a history that watches resume from. Every
//! change is one line of a journal, so that a killed server comes back with the same
//! objects, resource versions and history.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use tokio::sync::broadcast;

use super::error::ApiError;
use super::object::{self, metadata};
use super::resource::Resource;
use super::target::Subresource;

/// How many past changes a watch can resume from.
const HISTORY: usize = 8192;

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The journal cannot be opened for writing.
    #[error("cannot open the journal {path}")]
    Open {
        /// The journal.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The journal cannot be read.
    #[error("cannot read the journal {path}")]
    Read {
        /// The journal.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// An object given to [`Store::seed`] was refused.
    #[error("cannot create {kind} {name}")]
    Seed {
        /// Kind of the object.
        kind: String,
        /// Its name.
        name: String,
        /// The API's refusal.
        #[source]
        source: Box<ApiError>,
    },
}

/// Identity of an object. Ordered by resource, so that a list is a range.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Key {
    /// Plural name. Both kinds of Event share one.
    pub(super) resource: String,
    pub(super) namespace: String,
    pub(super) name: String,
}

/// What happened to an object, as a watch event names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum ChangeType {
    Added,
    Modified,
    Deleted,
}

/// One change. `object` is the new state, or the last one of a deleted object.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Change {
    pub(super) revision: u64,
    #[serde(rename = "type")]
    pub(super) change: ChangeType,
    #[serde(flatten)]
    pub(super) key: Key,
    #[serde(serialize_with = "serialize_object", deserialize_with = "deserialize_object")]
    pub(super) object: Arc<Value>,
    #[serde(skip)]
    pub(super) previous: Option<Arc<Value>>,
}

/// All objects of the lab's cluster.
#[derive(Debug)]
pub struct Store {
    inner: Mutex<Inner>,
    changes: broadcast::Sender<Arc<Change>>,
}

#[derive(Debug, Default)]
struct Inner {
    revision: u64,
    objects: BTreeMap<Key, Arc<Value>>,
    history: VecDeque<Arc<Change>>,
    /// Changes up to this revision are no longer in the history.
    forgotten: u64,
    journal: Option<File>,
}

/// What a write has to pass, and whether it is for show.
pub(super) struct Admission<'a> {
    pub(super) judge: Judge<'a>,
    pub(super) dry_run: bool,
}

/// Of the object as it is, if it is, and as it would be.
type Judge<'a> = Box<dyn Fn(Option<&Value>, &Value) -> Result<(), ApiError> + 'a>;

impl Admission<'_> {
    /// Of what is there before the server starts.
    fn anything() -> Self {
        Self { judge: Box::new(|_, _| Ok(())), dry_run: false }
    }
}

/// A consistent list and the revision it was taken at.
pub(super) struct Listing {
    pub(super) revision: u64,
    pub(super) objects: Vec<Arc<Value>>,
}

/// Where a watch starts, and the changes from there on.
pub(super) struct Subscription {
    pub(super) listing: Listing,
    pub(super) backlog: Vec<Arc<Change>>,
    pub(super) changes: broadcast::Receiver<Arc<Change>>,
}

impl Store {
    /// An empty store that is not kept anywhere.
    pub fn in_memory() -> Self {
        Self { inner: Mutex::default(), changes: broadcast::channel(HISTORY).0 }
    }

    /// The store that this journal describes; the file is made when it does not exist. A
    /// last line that was cut short by a crash is dropped.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let open_error = |source| StoreError::Open { path: path.to_owned(), source };
        let mut file = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .open(path)
            .map_err(open_error)?;
        let mut inner = Inner::default();
        let mut good = 0;
        let mut reader = BufReader::new(&mut file);
        let mut line = String::new();
        loop {
            line.clear();
            let read = reader
                .read_line(&mut line)
                .map_err(|source| StoreError::Read { path: path.to_owned(), source })?;
            let Ok(change) = serde_json::from_str::<Change>(&line) else { break };
            good += read as u64;
            inner.record(change);
        }
        file.set_len(good).map_err(open_error)?;
        inner.journal = Some(file);
        Ok(Self { inner: Mutex::new(inner), changes: broadcast::channel(HISTORY).0 })
    }

    /// Creates objects before the server starts.
    pub fn seed(&self, objects: impl IntoIterator<Item = Value>) -> Result<(), StoreError> {
        for object in objects {
            let kind = object["kind"].as_str().unwrap_or_default().to_owned();
            let name = metadata(&object, "name").to_owned();
            let namespace = metadata(&object, "namespace").to_owned();
            let resource = super::resource::RESOURCES.iter().find(|r| r.kind == kind);
            resource
                .ok_or_else(ApiError::unknown_path)
                .and_then(|resource| {
                    self.create(resource, &namespace, &Admission::anything(), object)
                })
                .map_err(|error| StoreError::Seed { kind, name, source: Box::new(error) })?;
        }
        Ok(())
    }

    pub(super) fn get(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
    ) -> Result<Arc<Value>, ApiError> {
        let key = Key::new(resource, namespace, name);
        let object = self.lock().objects.get(&key).cloned();
        object.ok_or_else(|| ApiError::not_found(resource, name))
    }

    pub(super) fn list(&self, resource: &Resource, namespace: &str) -> Listing {
        self.lock().list(resource, namespace)
    }

    /// Creates an object; its namespace comes from the path.
    pub(super) fn create(
        &self,
        resource: &Resource,
        namespace: &str,
        admission: &Admission<'_>,
        object: Value,
    ) -> Result<Arc<Value>, ApiError> {
        let object = object::prepare_create(resource, namespace, object)?;
        let name = metadata(&object, "name").to_owned();
        let key = Key::new(resource, namespace, &name);
        let mut inner = self.lock();
        if inner.objects.contains_key(&key) {
            return Err(ApiError::already_exists(resource, &name));
        }
        (admission.judge)(None, &object)?;
        if admission.dry_run {
            return Ok(Arc::new(object));
        }
        self.commit(&mut inner, key, ChangeType::Added, object)
    }

    /// Replaces an object with what `change` makes of it. Nothing happens when the result
    /// is the same as before.
    pub(super) fn update(
        &self,
        (resource, namespace, name): (&Resource, &str, &str),
        subresource: Subresource,
        admission: &Admission<'_>,
        change: impl FnOnce(&Value) -> Result<Value, ApiError>,
    ) -> Result<Arc<Value>, ApiError> {
        let key = Key::new(resource, namespace, name);
        let mut inner = self.lock();
        let Some(old) = inner.objects.get(&key).cloned() else {
            return Err(ApiError::not_found(resource, name));
        };
        let new = object::prepare_update(resource, subresource, &old, change(&old)?)?;
        (admission.judge)(Some(&old), &new)?;
        if new == *old {
            return Ok(old);
        }
        if admission.dry_run {
            return Ok(Arc::new(new));
        }
        self.commit(&mut inner, key, ChangeType::Modified, new)
    }

    pub(super) fn delete(
        &self,
        (resource, namespace, name): (&Resource, &str, &str),
        preconditions: &Value,
    ) -> Result<Arc<Value>, ApiError> {
        let key = Key::new(resource, namespace, name);
        let mut inner = self.lock();
        let Some(old) = inner.objects.get(&key).cloned() else {
            return Err(ApiError::not_found(resource, name));
        };
        for field in ["uid", "resourceVersion"] {
            let wanted = preconditions[field].as_str().unwrap_or_default();
            if !wanted.is_empty() && wanted != metadata(&old, field) {
                let why = format!("Precondition failed: {field} is not {wanted}");
                return Err(ApiError::conflict(resource, name, &why));
            }
        }
        self.commit(&mut inner, key, ChangeType::Deleted, old.as_ref().clone())
    }

    /// Everything that happened after `from`, then everything that happens. Without `from`
    /// the watch starts now, with the listing as its initial state.
    pub(super) fn subscribe(
        &self,
        resource: &Resource,
        namespace: &str,
        from: Option<u64>,
    ) -> Result<Subscription, ApiError> {
        let inner = self.lock();
        let listing = inner.list(resource, namespace);
        let backlog = match from {
            None => Vec::new(),
            Some(from) if from < inner.forgotten || from > inner.revision => {
                return Err(ApiError::expired(from, inner.forgotten));
            }
            Some(from) => inner
                .history
                .iter()
                .filter(|c| c.revision > from && c.key.is_in(resource, namespace))
                .cloned()
                .collect(),
        };
        Ok(Subscription { listing, backlog, changes: self.changes.subscribe() })
    }

    fn commit(
        &self,
        inner: &mut Inner,
        key: Key,
        change: ChangeType,
        mut object: Value,
    ) -> Result<Arc<Value>, ApiError> {
        let revision = inner.revision + 1;
        object["metadata"]["resourceVersion"] = revision.to_string().into();
        let object = Arc::new(object);
        let change = Change { revision, change, key, object: Arc::clone(&object), previous: None };
        if let Some(journal) = &mut inner.journal {
            let written = serde_json::to_vec(&change)
                .map_err(io::Error::from)
                .and_then(|line| journal.write_all(&[line.as_slice(), b"\n"].concat()));
            written.map_err(|e| ApiError::internal(format!("cannot write the journal: {e}")))?;
        }
        let change = inner.record(change);
        // An error only says that nobody watches.
        let _ = self.changes.send(change);
        Ok(object)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn record(&mut self, mut change: Change) -> Arc<Change> {
        self.revision = change.revision;
        change.previous = match change.change {
            ChangeType::Deleted => self.objects.remove(&change.key),
            _ => self.objects.insert(change.key.clone(), Arc::clone(&change.object)),
        };
        let change = Arc::new(change);
        self.history.push_back(Arc::clone(&change));
        if self.history.len() > HISTORY {
            self.forgotten = self.history.pop_front().map_or(0, |c| c.revision);
        }
        change
    }

    fn list(&self, resource: &Resource, namespace: &str) -> Listing {
        let start = Key::new(resource, namespace, "");
        let objects = self
            .objects
            .range(start..)
            .take_while(|(key, _)| key.is_in(resource, namespace))
            .map(|(_, object)| Arc::clone(object))
            .collect();
        Listing { revision: self.revision, objects }
    }
}

impl Key {
    fn new(resource: &Resource, namespace: &str, name: &str) -> Self {
        Self {
            resource: resource.plural.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }

    /// Whether a list of this resource in this namespace, or in all when empty, has the object.
    pub(super) fn is_in(&self, resource: &Resource, namespace: &str) -> bool {
        self.resource == resource.plural && (namespace.is_empty() || self.namespace == namespace)
    }
}

fn serialize_object<S: Serializer>(object: &Arc<Value>, to: S) -> Result<S::Ok, S::Error> {
    object.as_ref().serialize(to)
}

fn deserialize_object<'de, D: Deserializer<'de>>(from: D) -> Result<Arc<Value>, D::Error> {
    Value::deserialize(from).map(Arc::new)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn nodes() -> &'static Resource {
        Resource::find("", "v1", "nodes").unwrap()
    }

    fn node(name: &str) -> Value {
        json!({"kind": "Node", "metadata": {"name": name}})
    }

    fn annotate(store: &Store, name: &str, value: &str) -> Arc<Value> {
        let change = |old: &Value| {
            let mut new = old.clone();
            new["metadata"]["annotations"] = json!({"a": value});
            Ok(new)
        };
        let admission = Admission::anything();
        store.update((nodes(), "", name), Subresource::Main, &admission, change).unwrap()
    }

    #[test]
    fn a_watch_resumes_where_it_ended() {
        let store = Store::in_memory();
        store.seed([node("node-1"), node("node-2")]).unwrap();
        let from = store.list(nodes(), "").revision;
        annotate(&store, "node-1", "x");
        store.delete((nodes(), "", "node-2"), &Value::Null).unwrap();
        let subscription = store.subscribe(nodes(), "", Some(from)).unwrap();
        let seen: Vec<_> =
            subscription.backlog.iter().map(|c| (c.change, c.key.name.as_str())).collect();
        assert_eq!(seen, [(ChangeType::Modified, "node-1"), (ChangeType::Deleted, "node-2")]);
        assert!(store.subscribe(nodes(), "", Some(from + 100)).is_err());
    }

    #[test]
    fn writing_the_same_again_changes_nothing() {
        let store = Store::in_memory();
        store.seed([node("node-1")]).unwrap();
        let first = annotate(&store, "node-1", "x");
        assert_eq!(annotate(&store, "node-1", "x"), first);
        assert_eq!(store.list(nodes(), "").revision, 2);
    }

    #[test]
    fn a_store_opened_again_goes_on_where_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let store = Store::open(&path).unwrap();
        store.seed([node("node-1"), node("node-2")]).unwrap();
        annotate(&store, "node-1", "x");
        let before = store.get(nodes(), "", "node-1").unwrap();
        drop(store);
        // A crash in the middle of a line.
        OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"{\"revision\":4,")
            .unwrap();

        let store = Store::open(&path).unwrap();
        assert_eq!(store.get(nodes(), "", "node-1").unwrap(), before);
        assert_eq!(store.list(nodes(), "").revision, 3);
        assert_eq!(store.subscribe(nodes(), "", Some(1)).unwrap().backlog.len(), 2);
        annotate(&store, "node-1", "y");
        drop(store);
        assert_eq!(Store::open(&path).unwrap().list(nodes(), "").revision, 4);
    }

    #[test]
    fn history_that_is_gone_is_said_to_be() {
        let store = Store::in_memory();
        store.seed([node("node-1")]).unwrap();
        for i in 0..=HISTORY {
            annotate(&store, "node-1", &i.to_string());
        }
        let error = store.subscribe(nodes(), "", Some(1)).err().unwrap();
        assert_eq!(error.status()["code"], 410);
    }
}
