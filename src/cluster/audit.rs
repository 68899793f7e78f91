//! What the API server says of the whole mesh: whether every Node takes part in it, and
//! whether agents are kept to their own Nodes.

use std::collections::BTreeMap;

use gambeson_mesh::node::annotation;
use kube::Api;

use super::admission::ask;
use super::connect::{Connector, RequestError};
use super::object::NodeObject;
use super::store::{CONDITIONS, MESH_ENCRYPTED, MESH_READY};
use crate::status::Admission;

/// What was looked at, and what is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Audit {
    /// Number of Nodes.
    pub nodes: usize,
    /// Whether agents are kept to their own Nodes.
    pub admission: Admission,
    /// What is wrong, and what helps.
    pub findings: Vec<String>,
}

/// Asks the API server. `own` is the Node that the token in use is bound to, if to any.
///
/// # Errors
/// [`RequestError`], when it does not answer.
pub async fn audit(
    connector: &Connector,
    prefix: &str,
    own: Option<&str>,
) -> Result<Audit, RequestError> {
    let api: Api<NodeObject> = Api::all(connector.client().await?);
    let (nodes, _) = connector.list(&api).await?;
    let mut findings = judge(&nodes, prefix);
    let other = nodes.iter().map(NodeObject::name).find(|name| Some(*name) != own);
    let admission = match other {
        Some(other) => ask(connector, prefix, other).await?,
        None => Admission::Alone,
    };
    if admission == Admission::Missing {
        findings.push(Admission::MISSING.to_owned());
    }
    Ok(Audit { nodes: nodes.len(), admission, findings })
}

fn judge(nodes: &[NodeObject], prefix: &str) -> Vec<String> {
    let mut findings = Vec::new();
    let mut owners: BTreeMap<String, &str> = BTreeMap::new();
    for node in nodes {
        let name = node.name();
        let Some(key) = node.record(prefix).annotations.remove(annotation::PUBLIC_KEY) else {
            findings.push(format!(
                "Node {name} publishes no key: see whether the DaemonSet gambeson has a pod there"
            ));
            continue;
        };
        if let Some(owner) = owners.insert(key, name) {
            findings.push(format!(
                "Nodes {owner} and {name} publish the same key: remove /var/lib/gambeson on the \
                 one that is a clone"
            ));
        }
        let conditions = node.conditions(&CONDITIONS);
        for kind in [MESH_READY, MESH_ENCRYPTED] {
            let status = conditions.iter().find(|c| c.kind == kind).map(|c| c.status.as_str());
            if status != Some("True") {
                findings.push(format!(
                    "Node {name} has the condition {kind}={}: see `gambeson status` there",
                    status.unwrap_or("(none)")
                ));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str, key: &str, encrypted: &str) -> NodeObject {
        serde_json::from_value(json!({
            "metadata": { "name": name, "annotations": { "gambeson.io/public-key": key } },
            "status": { "conditions": [
                { "type": "MeshReady", "status": "True" },
                { "type": "MeshEncrypted", "status": encrypted },
            ]},
        }))
        .unwrap()
    }

    #[test]
    fn every_node_has_to_take_part() {
        let mut nodes = vec![node("a", "A", "True"), node("b", "B", "True")];
        assert_eq!(judge(&nodes, "gambeson.io"), Vec::<String>::new());
        nodes.push(node("c", "A", "False"));
        nodes.push(NodeObject::default());
        let findings = judge(&nodes, "gambeson.io").join("\n");
        for part in [
            "Nodes a and c publish the same key",
            "Node c has the condition MeshEncrypted=False",
            "publishes no key",
        ] {
            assert!(findings.contains(part), "{findings}");
        }
        assert_eq!(findings.lines().count(), 3, "{findings}");
    }
}
