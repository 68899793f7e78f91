//! Keeps a [`NodeStore`] equal to the API server's Nodes, through whatever happens to it.
//!
//! ```text
//!   list ──plausible──> watch ──ends──> watch from where it ended
//!    ^  └─implausible: keep what is known, list again later
//!    ^──────5 s after a list that lacked Nodes, which are kept till then
//!    └──────410 Gone, or the watch cannot be resumed──┘
//! ```
//! Written on `list` and `watch` directly, because `kube::runtime::watcher` waits for ever on
//! a server that accepts a connection and never answers, and would resume for ever where the
//! server answers a resumption with status 410.

use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use gambeson_mesh::topology::Implausible;
use kube::Api;
use kube::api::{WatchEvent, WatchParams};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::backoff::Backoff;
use super::connect::{Connector, RequestError};
use super::object::NodeObject;
use super::store::NodeStore;

/// How long the server may keep a watch open, in seconds. Bounds how long a connection that
/// died silently goes unnoticed.
const WATCH_SECONDS: u32 = 120;
/// On top of that, before a watch that did not end counts as dead.
const WATCH_MARGIN: Duration = Duration::from_secs(5);
/// Waits after a failure.
const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// After this time a list that lacked Nodes is followed by a second one.
const SECOND_LOOK: Duration = Duration::from_secs(5);
/// A watch that ended sooner than this is not resumed at once.
const SHORT_WATCH: Duration = Duration::from_secs(1);

/// Why the Nodes cannot be followed at the moment.
#[derive(Debug, thiserror::Error)]
enum WatchError {
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error(transparent)]
    Implausible(#[from] Implausible),
    #[error("the list of Nodes carries no resourceVersion to watch from")]
    NoVersion,
}

/// `None` while all is well, else what is wrong.
pub type Health = watch::Sender<Option<String>>;

/// Follows the Nodes until the task is dropped.
#[derive(Debug)]
pub struct NodeWatch {
    connector: Connector,
    store: NodeStore,
    health: Health,
}

/// How a watch came to its end.
enum Ended {
    /// It can be resumed from this version.
    At(String),
    /// The server no longer has that version.
    Gone,
    /// It is time for a second look at what a list lacked.
    Unsure,
}

impl NodeWatch {
    /// A watch into `store` that reports trouble and recovery on `health`.
    pub fn new(connector: Connector, store: NodeStore, health: Health) -> Self {
        Self { connector, store, health }
    }

    /// Lists and watches for ever. Errors are waited out with a growing, jittered pause; what
    /// is known stays.
    pub async fn run(self) {
        let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        let mut version = None;
        loop {
            match self.follow(&mut version, &mut backoff).await {
                Ok(()) => {}
                Err(error) => {
                    self.report(&error);
                    sleep(backoff.wait()).await;
                }
            }
        }
    }

    /// Lists if there is no `version` to resume from, then watches until something is wrong.
    async fn follow(
        &self,
        version: &mut Option<String>,
        backoff: &mut Backoff,
    ) -> Result<(), WatchError> {
        let client = self.connector.client().await.map_err(RequestError::from)?;
        let api: Api<NodeObject> = Api::all(client);
        loop {
            let from = match version.take() {
                Some(version) => version,
                None => self.list(&api).await?,
            };
            let started = Instant::now();
            // Kept for a resumption in case the watch fails now.
            *version = Some(from.clone());
            let watch = self.watch(&api, from, backoff);
            let ended = if self.store.nodes().wants_second_look() {
                timeout(SECOND_LOOK, watch).await.unwrap_or(Ok(Ended::Unsure))
            } else {
                watch.await
            };
            let short = started.elapsed() < SHORT_WATCH;
            if !short {
                // The server was well again, also if no Node has changed in that time.
                backoff.reset();
            }
            match ended {
                Ok(Ended::At(at)) => *version = Some(at),
                Ok(Ended::Gone) => {
                    debug!("the API server has forgotten our resourceVersion; listing again");
                    *version = None;
                }
                Ok(Ended::Unsure) => {
                    debug!("the last list lacked Nodes; listing again");
                    *version = None;
                }
                Err(error) => {
                    if !resumable(&error) {
                        *version = None;
                    }
                    return Err(error.into());
                }
            }
            if short {
                sleep(backoff.wait()).await;
            }
        }
    }

    async fn list(&self, api: &Api<NodeObject>) -> Result<String, WatchError> {
        let (nodes, version) = self.connector.list(api).await?;
        let version = version.ok_or(WatchError::NoVersion)?;
        self.store.replace(&nodes, version.parse().ok())?;
        debug!(nodes = nodes.len(), version, "listed the Nodes");
        Ok(version)
    }

    async fn watch(
        &self,
        api: &Api<NodeObject>,
        mut version: String,
        backoff: &mut Backoff,
    ) -> Result<Ended, RequestError> {
        let params = WatchParams::default().timeout(WATCH_SECONDS);
        let events = match self.connector.in_time(api.watch(&params, &version)).await {
            Err(error) if error.code() == Some(410) => return Ok(Ended::Gone),
            events => events?,
        };
        let mut events = std::pin::pin!(events.into_stream());
        self.recovered();
        let idle = Duration::from_secs(u64::from(WATCH_SECONDS)) + WATCH_MARGIN;
        loop {
            let event = match timeout(idle, events.next()).await {
                Err(_) => return Err(RequestError::Timeout(idle)),
                Ok(None) => return Ok(Ended::At(version)),
                Ok(Some(event)) => event?,
            };
            backoff.reset();
            let newer = match &event {
                WatchEvent::Added(node) | WatchEvent::Modified(node) => {
                    self.store.apply(node);
                    node.metadata.resource_version.clone()
                }
                WatchEvent::Deleted(node) => {
                    self.store.delete(node);
                    node.metadata.resource_version.clone()
                }
                WatchEvent::Bookmark(bookmark) => Some(bookmark.metadata.resource_version.clone()),
                WatchEvent::Error(status) if status.code == 410 => return Ok(Ended::Gone),
                WatchEvent::Error(status) => {
                    return Err(kube::Error::Api(status.clone()).into());
                }
            };
            if let Some(newer) = newer.filter(|newer| is_newer(newer, &version)) {
                version = newer;
            }
        }
    }

    fn report(&self, error: &WatchError) {
        let text = format!("cannot follow the Nodes: {error}");
        let before = self.health.send_replace(Some(text.clone()));
        if before.is_none() {
            warn!("{text}; keeping the last known state, retrying");
        } else {
            debug!("still {text}");
        }
    }

    fn recovered(&self) {
        if self.health.send_replace(None).is_some() {
            info!("following the Nodes");
        }
    }
}

/// Whether a watch may go on from the same version after this error. After a refusal other
/// than "too busy" it is not known what the server still has: list again.
fn resumable(error: &RequestError) -> bool {
    match error {
        RequestError::Refused(source) => match source.as_ref() {
            kube::Error::Api(status) => status.code == 429 || (500..=503).contains(&status.code),
            kube::Error::SerdeError(_) => false,
            _ => true,
        },
        RequestError::Connect(_) | RequestError::Timeout(_) => true,
    }
}

/// A late event must not take the resumption point back.
fn is_newer(candidate: &str, current: &str) -> bool {
    match (candidate.parse::<u64>(), current.parse::<u64>()) {
        (Ok(candidate), Ok(current)) => candidate > current,
        _ => !candidate.is_empty(),
    }
}
