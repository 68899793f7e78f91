//! Writes what this node publishes, and only when the Node says something else.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use gambeson_mesh::node::{NodeRecord, annotation};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, info, warn};

use super::backoff::Backoff;
use super::connect::{Connector, RequestError};
use super::object::{Condition, NodeObject};
use super::store::{
    MESH_ENCRYPTED, MESH_READY, NETWORK_UNAVAILABLE, NodeStore, Nodes, ROTATION_BLOCKED,
};
use super::watch::Health;

/// Waits after a failure.
const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(15);
/// Waits before a patch that was accepted is sent again: the watch may be behind, or somebody
/// takes the values back each time, and then nobody gains by a fight.
const FIRST_REPEAT: Duration = Duration::from_secs(1);
const LONGEST_REPEAT: Duration = Duration::from_secs(60);
/// Reason in the conditions `NetworkUnavailable` and `MeshReady`.
const UP_REASON: &str = "GambesonIsUp";
/// Whom the API server names as the writer.
const FIELD_MANAGER: &str = "gambeson";

/// What this node wants its Node to say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Publication {
    /// Values by annotation name without the prefix; `None` removes the annotation.
    pub annotations: BTreeMap<String, Option<String>>,
    /// Whether the pod network is up, which is when the conditions are said:
    /// `NetworkUnavailable` is `False`, `MeshReady` is `True`, and `MeshEncrypted` is what is so.
    pub network_up: bool,
    /// Whether every path to another node is encrypted.
    pub encrypted: bool,
    /// What holds up the replacement of this node's key, if anything does.
    pub rotation_blocked: Option<String>,
}

/// The part of a [`Publication`] that the Node does not say yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    annotations: BTreeMap<String, Option<String>>,
    conditions: Vec<ConditionUp>,
}

/// A condition of a Node whose network is up.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ConditionUp {
    kind: &'static str,
    status: &'static str,
    reason: &'static str,
    message: Cow<'static, str>,
}

const UP: [ConditionUp; 2] = [
    ConditionUp {
        kind: NETWORK_UNAVAILABLE,
        status: "False",
        reason: UP_REASON,
        message: Cow::Borrowed("Gambeson is running on this node"),
    },
    ConditionUp {
        kind: MESH_READY,
        status: "True",
        reason: UP_REASON,
        message: Cow::Borrowed("the guard, the devices and the CNI configuration are in place"),
    },
];

const ENCRYPTED: ConditionUp = ConditionUp {
    kind: MESH_ENCRYPTED,
    status: "True",
    reason: "WireGuard",
    message: Cow::Borrowed("every path to another node is through WireGuard"),
};

const PLAINTEXT: ConditionUp = ConditionUp {
    kind: MESH_ENCRYPTED,
    status: "False",
    reason: "Plaintext",
    message: Cow::Borrowed(
        "pods' packets to or from some nodes travel in clear, as --transports there and here \
         allows; `gambeson status` names them",
    ),
};

const NOT_BLOCKED: ConditionUp = ConditionUp {
    kind: ROTATION_BLOCKED,
    status: "False",
    reason: "NothingWaits",
    message: Cow::Borrowed("no peer holds up the replacement of this node's key"),
};

impl ConditionUp {
    fn blocked(message: &str) -> Self {
        let message = Cow::Owned(message.to_owned());
        Self { kind: ROTATION_BLOCKED, status: "True", reason: "OldKeyInUse", message }
    }

    fn is_said_by(&self, condition: &Condition) -> bool {
        condition.kind == self.kind
            && condition.status == self.status
            && condition.reason.as_deref() == Some(self.reason)
            // Names in it change while the status does not.
            && (self.kind != ROTATION_BLOCKED || condition.message == self.message)
    }
}

impl Publication {
    /// What has to be written, or `None` when the Node says it all. Annotations are written
    /// all together or not at all, so that a reader never sees half of a change.
    pub fn difference(
        &self,
        prefix: &str,
        own: &NodeRecord,
        said: &[Condition],
    ) -> Option<Difference> {
        let same = |(name, value): (&String, &Option<String>)| {
            own.annotations.get(name).map(String::as_str) == value.as_deref()
        };
        let mut annotations = BTreeMap::new();
        if !self.annotations.iter().all(same) {
            for (name, value) in &self.annotations {
                // Removing what is not there would be a change of its own to some servers.
                if value.is_some() || own.annotations.contains_key(name) {
                    annotations.insert(annotation::key(prefix, name), value.clone());
                }
            }
        }
        let is_said = |up: &ConditionUp| said.iter().any(|condition| up.is_said_by(condition));
        let encryption = if self.encrypted { ENCRYPTED } else { PLAINTEXT };
        // Nothing is said of it before the first time.
        let was_blocked = said.iter().any(|condition| condition.kind == ROTATION_BLOCKED);
        let rotation = match &self.rotation_blocked {
            Some(message) => Some(ConditionUp::blocked(message)),
            None => was_blocked.then_some(NOT_BLOCKED),
        };
        let all = UP.into_iter().chain([encryption]).chain(rotation);
        let conditions: Vec<_> = all.filter(|up| self.network_up && !is_said(up)).collect();
        let differs = !conditions.is_empty() || !annotations.is_empty();
        differs.then_some(Difference { annotations, conditions })
    }
}

impl Difference {
    /// The strategic-merge patch of `nodes/status` that writes it.
    pub fn patch(&self, now: Timestamp) -> Value {
        let mut patch = json!({});
        if !self.annotations.is_empty() {
            patch["metadata"] = json!({ "annotations": self.annotations });
        }
        if !self.conditions.is_empty() {
            let now = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
            let conditions = self.conditions.iter().map(|up| {
                json!({
                    "type": up.kind,
                    "status": up.status,
                    "reason": up.reason,
                    "message": up.message,
                    "lastTransitionTime": now,
                    "lastHeartbeatTime": now,
                })
            });
            patch["status"] = json!({ "conditions": conditions.collect::<Vec<_>>() });
        }
        patch
    }
}

/// Brings the Node to what was wanted last, in a task of its own.
#[derive(Debug)]
pub struct Publisher {
    connector: Connector,
    store: NodeStore,
    node: String,
    prefix: String,
    wanted: watch::Receiver<Option<Publication>>,
    health: Health,
}

impl Publisher {
    /// Publishes each value of `wanted` on the Node `node` as long as `store` shows that it
    /// says something else, and reports trouble on `health`.
    pub fn new(
        connector: Connector,
        store: NodeStore,
        node: &str,
        prefix: &str,
        wanted: watch::Receiver<Option<Publication>>,
        health: Health,
    ) -> Self {
        let (node, prefix) = (node.to_owned(), prefix.to_owned());
        Self { connector, store, node, prefix, wanted, health }
    }

    /// Publishes until nothing can be wanted any more.
    pub async fn run(mut self) {
        let mut changes = self.store.changes();
        let mut failures = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        let mut sent = Sent::default();
        loop {
            changes.mark_unchanged();
            let difference = self.difference();
            let now = Instant::now();
            let due = difference.as_ref().map(|difference| sent.due(difference, now));
            match (difference, due) {
                (Some(difference), Some(due)) if due <= now => match self.send(&difference).await {
                    Ok(()) => {
                        failures.reset();
                        self.recovered(&difference);
                        sent.record(difference, Instant::now());
                    }
                    Err(error) => {
                        self.report(&error);
                        sleep(failures.wait()).await;
                    }
                },
                (_, due) => tokio::select! {
                    _ = changes.changed() => {}
                    wanted = self.wanted.changed() => if wanted.is_err() { return },
                    () = sleep_until(due.unwrap_or(now + LONGEST_REPEAT)) => {}
                },
            }
        }
    }

    fn difference(&mut self) -> Option<Difference> {
        let nodes = self.store.nodes();
        let wanted = self.wanted.borrow_and_update();
        let own = Nodes::own(&nodes)?;
        wanted.as_ref()?.difference(&self.prefix, own, nodes.own_conditions())
    }

    async fn send(&self, difference: &Difference) -> Result<(), RequestError> {
        let api: Api<NodeObject> = Api::all(self.connector.client().await?);
        let patch = Patch::Strategic(difference.patch(Timestamp::now()));
        let params =
            PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        self.connector.in_time(api.patch_status(&self.node, &params, &patch)).await?;
        Ok(())
    }

    fn report(&self, error: &RequestError) {
        let text = match error.code() {
            Some(403) => format!(
                "not allowed to publish on Node {}: {error}; grant patch on nodes/status",
                self.node
            ),
            _ => format!("cannot publish on Node {}: {error}", self.node),
        };
        let before = self.health.send_replace(Some(text.clone()));
        if before.is_none() {
            warn!("{text}; retrying");
        } else {
            debug!("still {text}");
        }
    }

    fn recovered(&self, difference: &Difference) {
        self.health.send_replace(None);
        if !difference.annotations.is_empty() {
            info!(node = self.node, "published the annotations");
        }
        if !difference.conditions.is_empty() {
            info!(node = self.node, "published that the network is up");
        }
    }
}

/// What was written last, and when the same may be written again.
#[derive(Debug)]
struct Sent {
    last: Option<(Difference, Instant)>,
    repeats: Backoff,
    not_before: Option<Instant>,
}

impl Default for Sent {
    fn default() -> Self {
        let repeats = Backoff::new(FIRST_REPEAT, LONGEST_REPEAT);
        Self { last: None, repeats, not_before: None }
    }
}

impl Sent {
    fn due(&self, difference: &Difference, now: Instant) -> Instant {
        match (&self.last, self.not_before) {
            (Some((last, _)), Some(not_before)) if last == difference => not_before,
            _ => now,
        }
    }

    fn record(&mut self, difference: Difference, now: Instant) {
        let calm = |at: &Instant| now.duration_since(*at) > 2 * LONGEST_REPEAT;
        if self.last.as_ref().is_none_or(|(last, at)| *last != difference || calm(at)) {
            self.repeats.reset();
        }
        self.not_before = Some(now + self.repeats.wait());
        self.last = Some((difference, now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publication() -> Publication {
        Publication {
            annotations: BTreeMap::from([
                ("port".to_owned(), Some("51820".to_owned())),
                ("mtu".to_owned(), Some("1440".to_owned())),
                ("next-public-key".to_owned(), None),
            ]),
            network_up: true,
            encrypted: true,
            rotation_blocked: None,
        }
    }

    fn record(annotations: &[(&str, &str)]) -> NodeRecord {
        let annotations =
            annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        NodeRecord { annotations, ..NodeRecord::default() }
    }

    fn up() -> Vec<Condition> {
        let condition = |up: &ConditionUp| Condition {
            kind: up.kind.into(),
            status: up.status.into(),
            reason: Some(up.reason.into()),
            message: String::new(),
        };
        UP.iter().chain([&ENCRYPTED]).map(condition).collect()
    }

    #[test]
    fn a_path_in_clear_is_said_once() {
        let own = record(&[("port", "51820"), ("mtu", "1440")]);
        let plain = Publication { encrypted: false, ..publication() };
        let difference = plain.difference("gambeson.io", &own, &up()).unwrap();
        let now = "2024-01-02T03:04:05Z".parse().unwrap();
        let conditions = &difference.patch(now)["status"]["conditions"];
        assert_eq!(
            (&conditions[0]["type"], &conditions[0]["status"], &conditions[1]),
            (&json!("MeshEncrypted"), &json!("False"), &Value::Null)
        );
        let mut said = up();
        let said_last = said.last_mut().unwrap();
        (said_last.status, said_last.reason) = ("False".into(), Some("Plaintext".into()));
        assert_eq!(plain.difference("gambeson.io", &own, &said), None);
    }

    #[test]
    fn a_rotation_that_is_held_up_is_said_until_it_is_not() {
        let own = record(&[("port", "51820"), ("mtu", "1440")]);
        let conditions = |blocked: Option<&str>, said: &[Condition]| {
            let rotation_blocked = blocked.map(str::to_owned);
            let wanted = Publication { rotation_blocked, ..publication() };
            let difference = wanted.difference("gambeson.io", &own, said)?;
            let now = "2024-01-02T03:04:05Z".parse().unwrap();
            let condition = difference.patch(now)["status"]["conditions"][0].take();
            assert_eq!(condition["type"], "RotationBlocked");
            Some((condition["status"].clone(), condition["message"].clone()))
        };
        assert_eq!(conditions(None, &up()), None);
        let blocked = conditions(Some("by b"), &up());
        assert_eq!(blocked, Some(("True".into(), "by b".into())));
        let said = Condition {
            kind: ROTATION_BLOCKED.into(),
            status: "True".into(),
            reason: Some("OldKeyInUse".into()),
            message: "by b".into(),
        };
        let said: Vec<_> = up().into_iter().chain([said]).collect();
        assert_eq!(conditions(Some("by b"), &said), None);
        assert_eq!(conditions(Some("by c"), &said), Some(("True".into(), "by c".into())));
        assert_eq!(conditions(None, &said).unwrap().0, "False");
    }

    #[test]
    fn nothing_to_write_in_the_steady_state() {
        let own = record(&[("port", "51820"), ("mtu", "1440"), ("config/endpoint", "192.0.2.1")]);
        assert_eq!(publication().difference("gambeson.io", &own, &up()), None);
    }

    #[test]
    fn one_change_writes_all_annotations_in_one_patch() {
        let own = record(&[("port", "51820"), ("mtu", "1400"), ("next-public-key", "old")]);
        let difference = publication().difference("gambeson.io", &own, &up()).unwrap();
        let now = "2024-01-02T03:04:05.678Z".parse().unwrap();
        assert_eq!(
            difference.patch(now),
            json!({ "metadata": { "annotations": {
                "gambeson.io/port": "51820",
                "gambeson.io/mtu": "1440",
                "gambeson.io/next-public-key": null,
            }}})
        );
    }

    #[test]
    fn a_fight_over_a_value_calms_down() {
        let difference = publication().difference("gambeson.io", &record(&[]), &[]).unwrap();
        let other = Publication { network_up: false, ..publication() };
        let other = other.difference("gambeson.io", &record(&[]), &[]).unwrap();
        let mut sent = Sent::default();
        let mut now = Instant::now();
        assert_eq!(sent.due(&difference, now), now, "the first at once");
        for most in [1, 2, 4, 8, 16, 32, 60, 60] {
            sent.record(difference.clone(), now);
            assert_eq!(sent.due(&other, now), now, "something else at once");
            let due = sent.due(&difference, now);
            let most = Duration::from_secs(most);
            assert!(now + most / 2 <= due && due <= now + most);
            now = due;
        }
        now += 3 * LONGEST_REPEAT;
        sent.record(difference.clone(), now);
        assert!(sent.due(&difference, now) <= now + FIRST_REPEAT, "a calm time later");
    }

    #[test]
    fn the_condition_is_written_once_ready() {
        let own = record(&[("port", "51820"), ("mtu", "1440")]);
        let difference = publication().difference("gambeson.io", &own, &[]).unwrap();
        let now = "2024-01-02T03:04:05.678Z".parse().unwrap();
        let condition = &difference.patch(now)["status"]["conditions"][0];
        assert_eq!(condition["lastTransitionTime"], "2024-01-02T03:04:05Z");
        assert_eq!(condition["reason"], "GambesonIsUp");
        // One that somebody changed is written again, and no other.
        let mut said = up();
        said[2].status = "False".into();
        let difference = publication().difference("gambeson.io", &own, &said).unwrap();
        let conditions = &difference.patch(now)["status"]["conditions"];
        assert_eq!(conditions.as_array().unwrap().len(), 1);
        assert_eq!(conditions[0]["type"], "MeshEncrypted");
        let waiting = Publication { network_up: false, ..publication() };
        assert_eq!(waiting.difference("gambeson.io", &own, &[]), None);
    }
}
