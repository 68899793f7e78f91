//! A watch: initial state, backlog, then changes as they happen, one JSON document a line.

use std::collections::VecDeque;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use futures::stream;
use serde_json::{Value, json};
use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, sleep_until};

use super::error::ApiError;
use super::fault::{Effect, Faults, Request};
use super::resource::Resource;
use super::selector::Selector;
use super::store::{Change, ChangeType, Store};
use super::table::Format;

/// How often a watch that allows bookmarks gets one.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(10);
/// Watches end after this time when the client names none, as kube-apiserver's do.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1800);

/// What the client asked for.
pub(super) struct Parameters {
    pub(super) resource: &'static Resource,
    pub(super) namespace: String,
    pub(super) selector: Selector,
    /// `None` or 0: start with the present state as ADDED events.
    pub(super) from: Option<u64>,
    pub(super) send_initial_events: bool,
    pub(super) bookmarks: bool,
    pub(super) timeout: Option<Duration>,
    pub(super) format: Format,
    pub(super) request: Request,
}

/// Starts a watch. Fails with 410 when the history does not reach back far enough.
pub(super) fn start(
    store: &Store,
    faults: Arc<Faults>,
    parameters: Parameters,
) -> Result<Body, ApiError> {
    let initial = parameters.send_initial_events || parameters.from.is_none_or(|from| from == 0);
    let from = if initial { None } else { parameters.from };
    let subscription = store.subscribe(parameters.resource, &parameters.namespace, from)?;
    let now = Instant::now();
    let mut watch = Watch {
        lines: VecDeque::new(),
        held: None,
        revision: subscription.listing.revision,
        changes: subscription.changes,
        faults_changed: faults.subscribe(),
        deadline: now + parameters.timeout.unwrap_or(DEFAULT_TIMEOUT),
        bookmark_at: now + BOOKMARK_INTERVAL,
        headers_sent: false,
        ended: false,
        parameters,
        faults,
    };
    if initial {
        for object in subscription.listing.objects {
            if watch.parameters.selector.matches(&object) {
                watch.push("ADDED", &object);
            }
        }
        if watch.parameters.send_initial_events {
            watch.push_bookmark(true);
        }
    }
    for change in subscription.backlog {
        watch.change(&change);
    }
    watch.check_faults();
    let lines = stream::unfold(watch, async |mut watch| {
        let line = watch.next().await?;
        Some((Ok::<_, std::convert::Infallible>(line), watch))
    });
    Ok(Body::from_stream(lines))
}

struct Watch {
    parameters: Parameters,
    faults: Arc<Faults>,
    /// Ready to be sent, with the earliest time for each.
    lines: VecDeque<(Instant, String)>,
    /// Waits for its successor to overtake it.
    held: Option<(Instant, String)>,
    revision: u64,
    changes: broadcast::Receiver<Arc<Change>>,
    faults_changed: watch::Receiver<()>,
    deadline: Instant,
    bookmark_at: Instant,
    headers_sent: bool,
    ended: bool,
}

impl Watch {
    async fn next(&mut self) -> Option<String> {
        loop {
            let silent = self.is_silent();
            let ready_at = self.lines.front().map(|(at, _)| *at).filter(|_| !silent);
            if ready_at.is_some_and(|at| at <= Instant::now()) {
                return self.lines.pop_front().map(|(_, line)| line);
            }
            if self.ended && ready_at.is_none() {
                return None;
            }
            tokio::select! {
                () = wait_until(ready_at) => {}
                changed = self.faults_changed.changed(), if !self.ended => {
                    if changed.is_ok() {
                        self.check_faults();
                    }
                }
                change = self.changes.recv(), if !self.ended => match change {
                    Ok(change) => self.receive(&change),
                    Err(broadcast::error::RecvError::Lagged(_)) => {
                        self.fail(&ApiError::expired(self.revision, self.revision));
                    }
                    Err(broadcast::error::RecvError::Closed) => self.ended = true,
                },
                () = wait_until(self.parameters.bookmarks.then_some(self.bookmark_at)),
                    if !self.ended => self.periodic_bookmark(),
                () = sleep_until(self.deadline), if !self.ended => self.ended = true,
            }
        }
    }

    fn receive(&mut self, change: &Change) {
        self.revision = change.revision;
        if change.key.is_in(self.parameters.resource, &self.parameters.namespace) {
            self.change(change);
        }
    }

    /// An object that enters the selection was added, one that leaves it was deleted.
    fn change(&mut self, change: &Change) {
        let selector = &self.parameters.selector;
        let before = change.previous.as_ref().is_some_and(|old| selector.matches(old));
        let after = change.change != ChangeType::Deleted && selector.matches(&change.object);
        let event = match (before, after) {
            (false, false) => return,
            (false, true) => "ADDED",
            (true, true) => "MODIFIED",
            (true, false) => "DELETED",
        };
        self.push(event, &Arc::clone(&change.object));
    }

    fn push(&mut self, event: &str, object: &Value) {
        let object =
            self.parameters.format.watched(self.parameters.resource, object, !self.headers_sent);
        self.headers_sent = true;
        let line = line(event, &object);
        let take = |effect: fn(&Effect) -> bool| self.faults.take(&self.parameters.request, effect);
        let delay = match take(|e| matches!(e, Effect::Delay { .. })) {
            Some(Effect::Delay { milliseconds }) => Duration::from_millis(milliseconds),
            _ => Duration::ZERO,
        };
        let copies = if take(|e| *e == Effect::Duplicate).is_some() { 2 } else { 1 };
        let at = Instant::now() + delay;
        if self.held.is_none() && take(|e| *e == Effect::Reorder).is_some() {
            self.held = Some((at, line));
            return;
        }
        for _ in 0..copies {
            self.lines.push_back((at, line.clone()));
        }
        self.lines.extend(self.held.take());
    }

    fn push_bookmark(&mut self, initial_end: bool) {
        let resource = self.parameters.resource;
        let mut metadata = json!({ "resourceVersion": self.revision.to_string() });
        if initial_end {
            metadata["annotations"] = json!({ "k8s.io/initial-events-end": "true" });
        }
        let object = json!({
            "kind": resource.kind,
            "apiVersion": resource.api_version(),
            "metadata": metadata,
        });
        let object = self.parameters.format.watched(resource, &object, false);
        self.lines.push_back((Instant::now(), line("BOOKMARK", &object)));
    }

    fn periodic_bookmark(&mut self) {
        self.bookmark_at = Instant::now() + BOOKMARK_INTERVAL;
        // Only when nothing waits may the bookmark say that all is known.
        if self.lines.is_empty() && self.held.is_none() && self.changes.is_empty() {
            self.push_bookmark(false);
        }
    }

    fn check_faults(&mut self) {
        let request = &self.parameters.request;
        match self.faults.take(request, |e| matches!(e, Effect::Gone | Effect::Cut)) {
            Some(Effect::Gone) => self.fail(&ApiError::expired(self.revision, self.revision)),
            Some(_) => {
                self.lines.clear();
                self.ended = true;
            }
            None => {}
        }
    }

    fn fail(&mut self, error: &ApiError) {
        self.lines.push_back((Instant::now(), line("ERROR", &error.status())));
        self.ended = true;
    }

    fn is_silent(&self) -> bool {
        self.faults.applies(&self.parameters.request, &Effect::Hang)
    }
}

async fn wait_until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => pending().await,
    }
}

fn line(event: &str, object: &Value) -> String {
    format!("{}\n", json!({ "type": event, "object": object }))
}
