//! A Node as the API server sends it, cut down to what Gambeson reads.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;

use gambeson_mesh::node::{NodeRecord, annotation};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;

/// Longest annotation value that is kept, in bytes. No valid value comes near it, and what is
/// cut off would be refused whole or in part: a 256 KiB value costs its sender a refusal, not
/// every agent 256 KiB.
const VALUE_MAX: usize = 512;
/// Most annotations of ours that are kept per Node. There are about a dozen.
const ANNOTATIONS_MAX: usize = 64;
/// Most pod CIDRs that are kept per Node. Kubernetes allows two.
const POD_CIDRS_MAX: usize = 8;
/// Most addresses that are kept of the agent's own Node.
const ADDRESSES_MAX: usize = 8;
/// Type of the address that the kubelet was given, or found.
const INTERNAL: &str = "InternalIP";
/// Type of the address at which the rest of the world reaches the Node.
const EXTERNAL: &str = "ExternalIP";

/// A Node with only the fields that Gambeson reads; images and the rest are never parsed.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct NodeObject {
    /// Standard metadata.
    #[serde(default)]
    pub metadata: ObjectMeta,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Spec {
    #[serde(default, rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(default, rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Status {
    #[serde(default)]
    conditions: Option<Vec<Condition>>,
    #[serde(default)]
    addresses: Option<Vec<Address>>,
}

#[derive(Debug, Clone, Deserialize)]
struct Address {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    address: String,
}

/// A condition of the Node, as far as it is compared.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Condition {
    /// For example `NetworkUnavailable`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    #[serde(default)]
    pub status: String,
    /// One word that says why.
    #[serde(default)]
    pub reason: Option<String>,
    /// The same for people.
    #[serde(default)]
    pub message: String,
}

impl NodeObject {
    /// Name of the Node; empty when the API server sent none.
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    /// The object's resource version as a number, where it is one.
    pub fn version(&self) -> Option<u64> {
        self.metadata.resource_version.as_deref().and_then(|v| v.parse().ok())
    }

    /// The conditions of these types that the Node has.
    pub fn conditions(&self, kinds: &[&str]) -> Vec<Condition> {
        let all = self.status.conditions.iter().flatten();
        all.filter(|condition| kinds.contains(&condition.kind.as_str())).cloned().collect()
    }

    /// Those addresses at which the rest of the cluster reaches the Node.
    pub fn internal_addresses(&self) -> Vec<IpAddr> {
        self.addresses(INTERNAL)
    }

    /// Those addresses at which the rest of the world reaches the Node.
    pub fn external_addresses(&self) -> Vec<IpAddr> {
        self.addresses(EXTERNAL)
    }

    fn addresses(&self, kind: &str) -> Vec<IpAddr> {
        let all = self.status.addresses.iter().flatten();
        let of_kind = all.filter(|address| address.kind == kind);
        of_kind.filter_map(|address| address.address.parse().ok()).take(ADDRESSES_MAX).collect()
    }

    /// What the mesh needs of this Node, with annotations below `prefix`, `config.<prefix>` and
    /// Flannel's prefix only.
    pub fn record(&self, prefix: &str) -> NodeRecord {
        let meta = &self.metadata;
        let created = meta.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second());
        NodeRecord {
            name: self.name().to_owned(),
            uid: meta.uid.clone().unwrap_or_default(),
            created,
            pod_cidrs: self.pod_cidrs(),
            annotations: annotations(meta.annotations.as_ref(), prefix),
        }
    }

    fn pod_cidrs(&self) -> Vec<String> {
        let listed = self.spec.pod_cidrs.iter().flatten();
        let mut cidrs: Vec<String> =
            listed.take(POD_CIDRS_MAX).map(|c| beginning(c, VALUE_MAX).to_owned()).collect();
        if cidrs.is_empty() {
            cidrs.extend(
                self.spec
                    .pod_cidr
                    .iter()
                    .filter(|c| !c.is_empty())
                    .map(|c| beginning(c, VALUE_MAX).to_owned()),
            );
        }
        cidrs
    }
}

fn annotations(all: Option<&BTreeMap<String, String>>, prefix: &str) -> BTreeMap<String, String> {
    let ours = |key: &str| {
        let (domain, name) = key.split_once('/')?;
        if domain == prefix {
            Some(name.to_owned())
        } else if domain.strip_prefix("config.") == Some(prefix) {
            Some(format!("{}{name}", annotation::CONFIG))
        } else if domain == annotation::FLANNEL_PREFIX {
            Some(format!("{}{name}", annotation::FLANNEL))
        } else {
            None
        }
    };
    all.into_iter()
        .flatten()
        .filter_map(|(key, value)| Some((ours(key)?, beginning(value, VALUE_MAX).to_owned())))
        .take(ANNOTATIONS_MAX)
        .collect()
}

/// The longest beginning of `text` that fits in `most` bytes.
pub(super) fn beginning(text: &str, most: usize) -> &str {
    let fits = |end: &usize| text.is_char_boundary(*end);
    let end = (0..=most.min(text.len())).rev().find(fits).unwrap_or(0);
    &text[..end]
}

impl kube::Resource for NodeObject {
    type DynamicType = ();
    type Scope = <Node as kube::Resource>::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        Node::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        Node::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        <Node as kube::Resource>::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        Node::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(value: serde_json::Value) -> NodeObject {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn keeps_only_what_the_mesh_reads() {
        let object = node(json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {
                "name": "node-1", "uid": "u-1", "resourceVersion": "7",
                "creationTimestamp": "2024-01-02T03:04:05Z",
                "labels": {"a": "b"},
                "annotations": {
                    "gambeson.io/port": "51820",
                    "config.gambeson.io/endpoint": "192.0.2.1",
                    "evil-gambeson.io/port": "1",
                    "config.other.io/endpoint": "192.0.2.9",
                    "gambeson.io": "no slash",
                },
            },
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00::/64"]},
            "status": {
                "images": [{"names": ["x"]}],
                "conditions": [{"type": "NetworkUnavailable", "status": "False", "reason": "A"}],
                "addresses": [
                    {"type": "Hostname", "address": "node-1"},
                    {"type": "InternalIP", "address": "192.0.2.1"},
                    {"type": "InternalIP", "address": "not one"},
                    {"type": "ExternalIP", "address": "192.0.2.9"},
                ],
            },
        }));
        let record = object.record("gambeson.io");
        assert_eq!(record.created, 1_704_164_645);
        assert_eq!(record.pod_cidrs, ["10.244.1.0/24", "fd00::/64"]);
        let annotations: Vec<_> = record.annotations.keys().map(String::as_str).collect();
        assert_eq!(annotations, ["config/endpoint", "port"]);
        assert_eq!(object.version(), Some(7));
        assert_eq!(object.conditions(&["NetworkUnavailable"])[0].reason.as_deref(), Some("A"));
        assert_eq!(object.internal_addresses(), ["192.0.2.1".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn the_old_field_stands_in_for_a_missing_list() {
        let object = node(json!({"spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": null}}));
        assert_eq!(object.record("gambeson.io").pod_cidrs, ["10.244.1.0/24"]);
        assert!(node(json!({})).record("gambeson.io").pod_cidrs.is_empty());
    }

    #[test]
    fn huge_and_numerous_annotations_are_cut() {
        let huge = "é".repeat(128 * 1024);
        let mut annotations = serde_json::Map::new();
        annotations.insert("gambeson.io/public-key".into(), huge.into());
        for n in 0..1000 {
            annotations.insert(format!("gambeson.io/x{n}"), "v".into());
        }
        let record = node(json!({"metadata": {"annotations": annotations}})).record("gambeson.io");
        assert_eq!(record.annotations.len(), ANNOTATIONS_MAX);
        assert!(record.annotations.values().all(|v| v.len() <= VALUE_MAX));
    }
}
