//! Merge patch (RFC 7386), strategic merge patch for the lists that matter, JSON patch
//! (RFC 6902).

use serde_json::{Map, Value};

use super::error::ApiError;

/// The kinds of patch a client may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PatchType {
    Json,
    Merge,
    Strategic,
}

impl PatchType {
    const ACCEPTED: &str = "application/json-patch+json, application/merge-patch+json, \
                            application/strategic-merge-patch+json";

    /// The kind of patch with this content type.
    pub(super) fn from_content_type(content_type: &str) -> Result<Self, ApiError> {
        match content_type.split(';').next().unwrap_or_default().trim() {
            "application/json-patch+json" => Ok(Self::Json),
            "application/merge-patch+json" => Ok(Self::Merge),
            "application/strategic-merge-patch+json" => Ok(Self::Strategic),
            other => Err(ApiError::unsupported_media(other, Self::ACCEPTED)),
        }
    }

    /// `object` with `patch` applied.
    pub(super) fn apply(self, object: &Value, patch: &Value) -> Result<Value, ApiError> {
        let mut result = object.clone();
        match self {
            Self::Json => json_patch(&mut result, patch)?,
            Self::Merge | Self::Strategic => {
                if !patch.is_object() {
                    return Err(ApiError::bad_request("the patch is not a JSON object"));
                }
                merge(&mut result, patch, self == Self::Strategic);
            }
        }
        Ok(result)
    }
}

fn merge(target: &mut Value, patch: &Value, strategic: bool) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if strategic && patch.get("$patch").and_then(Value::as_str) == Some("replace") {
        let rest = patch.iter().filter(|(key, _)| key.as_str() != "$patch");
        *target = Value::Object(rest.map(|(k, v)| (k.clone(), v.clone())).collect());
        return;
    }
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else { return };
    for (key, value) in patch {
        if strategic && key.starts_with("$setElementOrder/") {
            continue;
        }
        if value.is_null() {
            target.remove(key);
            continue;
        }
        let slot = target.entry(key.as_str()).or_insert(Value::Null);
        match (strategic, value, list_strategy(key)) {
            (true, Value::Array(items), Some(ListStrategy::ByKey(merge_key))) => {
                merge_list(slot, items, merge_key);
            }
            (true, Value::Array(items), Some(ListStrategy::Union)) => union(slot, items),
            _ => merge(slot, value, strategic),
        }
    }
}

enum ListStrategy {
    ByKey(&'static str),
    Union,
}

/// `patchStrategy` and `patchMergeKey` of the Kubernetes types that are served.
fn list_strategy(field: &str) -> Option<ListStrategy> {
    match field {
        "conditions" | "addresses" => Some(ListStrategy::ByKey("type")),
        "taints" => Some(ListStrategy::ByKey("key")),
        "ownerReferences" => Some(ListStrategy::ByKey("uid")),
        "podCIDRs" | "finalizers" => Some(ListStrategy::Union),
        _ => None,
    }
}

fn merge_list(slot: &mut Value, items: &[Value], key: &str) {
    if !slot.is_array() {
        *slot = Value::Array(Vec::new());
    }
    let Value::Array(list) = slot else { return };
    if items.iter().any(|item| item["$patch"] == "replace") {
        list.clear();
    }
    for item in items {
        let position = list.iter().position(|old| old.get(key) == item.get(key));
        match (item["$patch"].as_str(), position) {
            (Some("replace"), _) => {}
            (Some("delete"), Some(position)) => {
                list.remove(position);
            }
            (Some("delete"), None) => {}
            (_, Some(position)) => merge(&mut list[position], item, true),
            (_, None) => list.push(item.clone()),
        }
    }
}

fn union(slot: &mut Value, items: &[Value]) {
    if !slot.is_array() {
        *slot = Value::Array(Vec::new());
    }
    let Value::Array(list) = slot else { return };
    for item in items {
        if !list.contains(item) {
            list.push(item.clone());
        }
    }
}

fn json_patch(target: &mut Value, patch: &Value) -> Result<(), ApiError> {
    let Some(operations) = patch.as_array() else {
        return Err(ApiError::bad_request("a JSON patch is an array of operations"));
    };
    operations.iter().try_for_each(|operation| json_operation(target, operation))
}

fn json_operation(target: &mut Value, operation: &Value) -> Result<(), ApiError> {
    let path = operation["path"].as_str().unwrap_or_default();
    let fail = |why: &str| ApiError::bad_request(format!("JSON patch at {path}: {why}"));
    let (parent, last) = path.rsplit_once('/').ok_or_else(|| fail("not a JSON pointer"))?;
    let last = last.replace("~1", "/").replace("~0", "~");
    if operation["op"] == "test" {
        return match target.pointer(path) {
            Some(value) if *value == operation["value"] => Ok(()),
            _ => Err(fail("the test failed")),
        };
    }
    let parent = target.pointer_mut(parent).ok_or_else(|| fail("no such parent"))?;
    let value = operation["value"].clone();
    match (operation["op"].as_str(), parent) {
        (Some("add"), Value::Object(map)) => {
            map.insert(last, value);
        }
        (Some("replace"), Value::Object(map)) => {
            *map.get_mut(&last).ok_or_else(|| fail("nothing to replace"))? = value;
        }
        (Some("remove"), Value::Object(map)) => {
            map.remove(&last).ok_or_else(|| fail("nothing to remove"))?;
        }
        (Some("add"), Value::Array(list)) if last == "-" => list.push(value),
        (Some(op @ ("add" | "replace" | "remove")), Value::Array(list)) => {
            let index: usize = last.parse().map_err(|_| fail("not an index"))?;
            if index > list.len() || (op != "add" && index == list.len()) {
                return Err(fail("index out of range"));
            }
            match op {
                "add" => list.insert(index, value),
                "replace" => list[index] = value,
                _ => {
                    list.remove(index);
                }
            }
        }
        _ => return Err(fail("operation not supported")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node() -> Value {
        json!({
            "metadata": {"annotations": {"a": "1", "b": "2"}},
            "status": {"conditions": [
                {"type": "Ready", "status": "True", "reason": "KubeletReady"},
                {"type": "NetworkUnavailable", "status": "True"},
            ], "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]},
        })
    }

    #[test]
    fn null_removes_an_annotation_in_both_kinds_of_merge() {
        let patch = json!({"metadata": {"annotations": {"a": null, "c": "3"}}});
        for kind in [PatchType::Merge, PatchType::Strategic] {
            let patched = kind.apply(&node(), &patch).unwrap();
            assert_eq!(patched["metadata"]["annotations"], json!({"b": "2", "c": "3"}));
        }
    }

    #[test]
    fn strategic_merges_conditions_by_type_and_merge_replaces_them() {
        let patch = json!({"status": {"conditions": [
            {"type": "NetworkUnavailable", "status": "False", "reason": "GambesonIsUp"},
            {"type": "New", "status": "True"},
        ]}});
        let strategic = PatchType::Strategic.apply(&node(), &patch).unwrap();
        assert_eq!(
            strategic["status"]["conditions"],
            json!([
                {"type": "Ready", "status": "True", "reason": "KubeletReady"},
                {"type": "NetworkUnavailable", "status": "False", "reason": "GambesonIsUp"},
                {"type": "New", "status": "True"},
            ])
        );
        let merged = PatchType::Merge.apply(&node(), &patch).unwrap();
        assert_eq!(merged["status"]["conditions"], patch["status"]["conditions"]);
    }

    #[test]
    fn strategic_directives_delete_and_replace() {
        let patch = json!({"status": {
            "$setElementOrder/conditions": [{"type": "Ready"}],
            "conditions": [{"type": "NetworkUnavailable", "$patch": "delete"}],
            "addresses": [{"$patch": "replace"}, {"type": "Hostname", "address": "n"}],
        }});
        let patched = PatchType::Strategic.apply(&node(), &patch).unwrap();
        assert_eq!(patched["status"]["conditions"].as_array().unwrap().len(), 1);
        assert_eq!(patched["status"]["addresses"], json!([{"type": "Hostname", "address": "n"}]));
        assert!(patched["status"].get("$setElementOrder/conditions").is_none());
    }

    #[test]
    fn json_patch_adds_tests_and_removes() {
        let patch = json!([
            {"op": "test", "path": "/metadata/annotations/a", "value": "1"},
            {"op": "add", "path": "/metadata/annotations/x~1y", "value": "z"},
            {"op": "remove", "path": "/status/conditions/0"},
        ]);
        let patched = PatchType::Json.apply(&node(), &patch).unwrap();
        assert_eq!(patched["metadata"]["annotations"]["x/y"], "z");
        assert_eq!(patched["status"]["conditions"][0]["type"], "NetworkUnavailable");
        let bad = json!([{"op": "remove", "path": "/status/conditions/7"}]);
        assert!(PatchType::Json.apply(&node(), &bad).is_err());
    }

    #[test]
    fn unknown_content_types_are_refused() {
        assert!(PatchType::from_content_type("application/apply-patch+yaml").is_err());
        let with_charset = "application/merge-patch+json; charset=utf-8";
        assert_eq!(PatchType::from_content_type(with_charset), Ok(PatchType::Merge));
    }
}
