//! Asking agents, through their Nodes, for new keys, and seeing how that goes.

use std::collections::BTreeMap;

use gambeson_mesh::NodeName;
use gambeson_mesh::node::annotation;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use super::connect::{Connector, RequestError};
use super::object::NodeObject;
use super::store::{CONDITIONS, ROTATION_BLOCKED};

/// What a Node says of its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotated {
    /// Generation of the key in use, if its agent has published one.
    pub generation: Option<u64>,
    /// Whether it publishes the next key beside that.
    pub under_way: bool,
    /// What holds that up, if anything does.
    pub blocked: Option<String>,
}

/// What every Node says of its key.
///
/// # Errors
/// [`RequestError`], when the API server does not answer.
pub async fn rotations(
    connector: &Connector,
    prefix: &str,
) -> Result<BTreeMap<NodeName, Rotated>, RequestError> {
    let api: Api<NodeObject> = Api::all(connector.client().await?);
    let (nodes, _) = connector.list(&api).await?;
    Ok(nodes.iter().map(|node| (node.name().to_owned(), rotated(node, prefix))).collect())
}

fn rotated(node: &NodeObject, prefix: &str) -> Rotated {
    let annotations = node.record(prefix).annotations;
    let blocked = node.conditions(&CONDITIONS).into_iter();
    let mut blocked = blocked.filter(|c| c.kind == ROTATION_BLOCKED && c.status == "True");
    Rotated {
        generation: annotations.get(annotation::KEY_GENERATION).and_then(|text| text.parse().ok()),
        under_way: annotations.contains_key(annotation::NEXT_PUBLIC_KEY),
        blocked: blocked.next().map(|condition| condition.message),
    }
}

/// Sets the request for a new key on a Node. Gives what the Node said before its agent saw that.
///
/// # Errors
/// [`RequestError`], when the API server refuses or does not answer.
pub async fn ask_for_rotation(
    connector: &Connector,
    prefix: &str,
    node: &str,
    request: &str,
) -> Result<Rotated, RequestError> {
    let api: Api<NodeObject> = Api::all(connector.client().await?);
    let name = annotation::key(prefix, annotation::CONFIG_ROTATE);
    let patch = Patch::Merge(json!({ "metadata": { "annotations": { name: request } } }));
    let node = connector.in_time(api.patch(node, &PatchParams::default(), &patch)).await?;
    Ok(rotated(&node, prefix))
}
