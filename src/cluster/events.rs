//! Events on this Node, so that `kubectl describe node` says which peers are refused and
//! which options count as not set, and why, and what somebody should look at.

use gambeson_mesh::NodeName;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;
use tokio::sync::mpsc;
use tracing::debug;

use super::connect::{Connector, RequestError};
use super::object::beginning;

/// Namespace of Events about Nodes, which have none of their own.
const NAMESPACE: &str = "default";
/// Longest message that the API server takes, in bytes.
const MESSAGE_MAX: usize = 1024;
/// Notes that may wait; more are dropped, since status and metrics say the same.
const QUEUE: usize = 64;

/// Something a cluster's operator should find on the Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// UID of this Node.
    pub node_uid: String,
    /// What kind of thing it is.
    pub reason: Reason,
    /// What is wrong, and with which Node.
    pub message: String,
}

/// The reason of an Event, by which programs tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// A peer, or its newest state, is not used.
    PeerRefused,
    /// An option that somebody set on a Node cannot be used.
    OptionIgnored,
    /// What pods send to and from a peer travels in clear.
    PlaintextPeer,
    /// The replacement of this node's key goes on.
    KeyRotation,
    /// A peer still uses the key that is to be replaced.
    RotationBlocked,
    /// This node has a new key, and the old one is gone.
    KeyRotated,
    /// Something on this node works, and is probably not meant.
    NodeAdvice,
}

impl Reason {
    fn as_str(self) -> &'static str {
        match self {
            Self::PeerRefused => "PeerRefused",
            Self::OptionIgnored => "OptionIgnored",
            Self::PlaintextPeer => "PlaintextPeer",
            Self::KeyRotation => "KeyRotation",
            Self::RotationBlocked => "RotationBlocked",
            Self::KeyRotated => "KeyRotated",
            Self::NodeAdvice => "NodeAdvice",
        }
    }

    /// Kubernetes' type of the Event: a key that is replaced is no reason to worry.
    fn kind(self) -> &'static str {
        match self {
            Self::KeyRotation | Self::KeyRotated => "Normal",
            Self::PeerRefused
            | Self::OptionIgnored
            | Self::PlaintextPeer
            | Self::RotationBlocked
            | Self::NodeAdvice => "Warning",
        }
    }
}

/// Takes notes without ever waiting.
#[derive(Debug, Clone)]
pub struct Recorder(mpsc::Sender<Note>);

/// Turns notes into Events, in a task of its own. Best effort: what fails is dropped.
#[derive(Debug)]
pub struct EventWriter {
    connector: Connector,
    node: NodeName,
    notes: mpsc::Receiver<Note>,
}

impl Recorder {
    /// Hands a note to the writer, or drops it when too many wait.
    pub fn record(&self, note: Note) {
        if self.0.try_send(note).is_err() {
            debug!("too many Events are waiting; one was dropped");
        }
    }
}

impl EventWriter {
    /// A writer for the Node `node`, and the recorder that feeds it.
    pub fn new(connector: Connector, node: &str) -> (Self, Recorder) {
        let (sender, notes) = mpsc::channel(QUEUE);
        (Self { connector, node: node.to_owned(), notes }, Recorder(sender))
    }

    /// Writes until the recorder is gone.
    pub async fn run(mut self) {
        while let Some(note) = self.notes.recv().await {
            if let Err(error) = self.write(&note).await {
                debug!(%error, message = note.message, "the Event was not written");
            }
        }
    }

    async fn write(&self, note: &Note) -> Result<(), RequestError> {
        let api: Api<Event> = Api::namespaced(self.connector.client().await?, NAMESPACE);
        let event = event(&self.node, note, Timestamp::now());
        self.connector.in_time(api.create(&PostParams::default(), &event)).await?;
        Ok(())
    }
}

fn event(node: &str, note: &Note, now: Timestamp) -> Event {
    let message = beginning(&note.message, MESSAGE_MAX).to_owned();
    // A Node's name may be as long as an Event's: leave room for the suffix.
    let stem = beginning(node, 230);
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{stem}.{:x}", now.as_nanosecond())),
            namespace: Some(NAMESPACE.to_owned()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(node.to_owned()),
            uid: Some(note.node_uid.clone()),
            ..ObjectReference::default()
        },
        type_: Some(note.reason.kind().to_owned()),
        reason: Some(note.reason.as_str().to_owned()),
        message: Some(message),
        source: Some(EventSource {
            component: Some("gambeson".to_owned()),
            host: Some(node.to_owned()),
        }),
        reporting_component: Some("gambeson".to_owned()),
        reporting_instance: Some(node.to_owned()),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        count: Some(1),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_is_wrong_within_the_limits() {
        let note = Note {
            node_uid: "u".into(),
            reason: Reason::PeerRefused,
            message: "x".repeat(2 * MESSAGE_MAX),
        };
        let event = event(&"n".repeat(253), &note, Timestamp::UNIX_EPOCH);
        assert!(event.metadata.name.unwrap().len() <= 253);
        let message = event.message.unwrap();
        assert_eq!(message.len(), MESSAGE_MAX);
        assert_eq!(event.reason.as_deref(), Some("PeerRefused"));
        assert_eq!(event.involved_object.uid.as_deref(), Some("u"));
    }
}
