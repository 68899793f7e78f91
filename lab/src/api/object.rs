//! Objects as JSON: identity, defaults and validation.

use rand::Rng;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::resource::Resource;
use super::target::Subresource;

/// kube-apiserver's limit on all annotations of an object together, in bytes.
const ANNOTATIONS_LIMIT: usize = 256 * 1024;

/// `metadata.<field>` as text, or empty.
pub(super) fn metadata<'a>(object: &'a Value, field: &str) -> &'a str {
    object["metadata"][field].as_str().unwrap_or_default()
}

/// Now, as in `metadata.creationTimestamp`.
pub(crate) fn timestamp() -> String {
    k8s_openapi::jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Age of an RFC 3339 timestamp in whole seconds.
pub(super) fn age_seconds(timestamp: &str) -> Option<i64> {
    let then: k8s_openapi::jiff::Timestamp = timestamp.parse().ok()?;
    Some(k8s_openapi::jiff::Timestamp::now().as_second() - then.as_second())
}

/// Completes an object that is about to be created.
pub(super) fn prepare_create(
    resource: &Resource,
    namespace: &str,
    mut object: Value,
) -> Result<Value, ApiError> {
    if !object.is_object() {
        return Err(ApiError::bad_request("the body is not a JSON object"));
    }
    let kind = object["kind"].as_str().unwrap_or(resource.kind);
    if kind != resource.kind {
        let message = format!("{kind} in the body does not match {} in the path", resource.kind);
        return Err(ApiError::bad_request(message));
    }
    if !object["metadata"].is_object() {
        object["metadata"] = json!({});
    }
    let mut random = rand::rng();
    let metadata_map = &mut object["metadata"];
    if metadata_map["name"].as_str().unwrap_or_default().is_empty()
        && let Some(prefix) = metadata_map["generateName"].as_str()
    {
        let suffix: String =
            (0..5).map(|_| char::from(b'a' + random.random_range(0..26u8))).collect();
        metadata_map["name"] = format!("{prefix}{suffix}").into();
    }
    if resource.namespaced {
        metadata_map["namespace"] = namespace.into();
    }
    metadata_map["uid"] = uid(&mut random).into();
    metadata_map["creationTimestamp"] = timestamp().into();
    normalise(resource, &mut object);
    validate(resource, &object)?;
    Ok(object)
}

/// Completes an object that is about to replace `old`.
pub(super) fn prepare_update(
    resource: &Resource,
    subresource: Subresource,
    old: &Value,
    mut new: Value,
) -> Result<Value, ApiError> {
    let name = metadata(old, "name").to_owned();
    if !new["metadata"].is_object() {
        return Err(ApiError::invalid(resource, &name, "metadata: Required value"));
    }
    for field in ["name", "uid"] {
        let given = metadata(&new, field);
        if !given.is_empty() && given != metadata(old, field) {
            let why = format!(
                "Precondition failed: {field} in precondition: {given}, {field} in object meta: {}",
                metadata(old, field)
            );
            return Err(ApiError::conflict(resource, &name, &why));
        }
    }
    let given = metadata(&new, "resourceVersion");
    if !given.is_empty() && given != metadata(old, "resourceVersion") {
        let why = "the object has been modified; please apply your changes to the latest \
                   version and try again";
        return Err(ApiError::conflict(resource, &name, why));
    }
    for field in ["name", "namespace", "uid", "creationTimestamp", "resourceVersion"] {
        match old["metadata"].get(field) {
            Some(value) => new["metadata"][field] = value.clone(),
            None => remove(&mut new["metadata"], field),
        }
    }
    if resource.status {
        match subresource {
            Subresource::Main => copy(old, &mut new, "status"),
            Subresource::Status => copy(old, &mut new, "spec"),
        }
    }
    normalise(resource, &mut new);
    validate(resource, &new)?;
    Ok(new)
}

/// Makes empty maps absent and gives the object its type, so that equal objects are equal.
fn normalise(resource: &Resource, object: &mut Value) {
    object["kind"] = resource.kind.into();
    object["apiVersion"] = resource.api_version().into();
    for field in ["annotations", "labels"] {
        let emptied = object["metadata"]
            .get(field)
            .is_some_and(|v| v.is_null() || v.as_object().is_some_and(Map::is_empty));
        if emptied {
            remove(&mut object["metadata"], field);
        }
    }
    if resource.plural == "events" {
        complete_event(object);
    }
}

/// The two kinds of Event name the same things differently; readers of either find theirs.
fn complete_event(event: &mut Value) {
    for (old, new) in [
        ("message", "note"),
        ("involvedObject", "regarding"),
        ("reportingComponent", "reportingController"),
    ] {
        if event.get(old).is_none() {
            let value = event.get(new).cloned().unwrap_or_else(|| json!(""));
            event[old] = value;
        } else if event.get(new).is_none() {
            event[new] = event[old].clone();
        }
    }
}

fn validate(resource: &Resource, object: &Value) -> Result<(), ApiError> {
    let name = metadata(object, "name");
    if !is_subdomain(name) {
        let why = format!(
            "metadata.name: Invalid value: \"{name}\": a lowercase RFC 1123 subdomain must \
             consist of lower case alphanumeric characters, '-' or '.'"
        );
        return Err(ApiError::invalid(resource, name, &why));
    }
    for field in ["annotations", "labels"] {
        let Some(map) = object["metadata"].get(field) else { continue };
        let strings = map.as_object().is_some_and(|map| map.values().all(Value::is_string));
        if !strings {
            let message = format!(
                "{} in version \"{}\" cannot be handled as a {}: metadata.{field} must map \
                 strings to strings",
                resource.kind, resource.version, resource.kind
            );
            return Err(ApiError::bad_request(message));
        }
    }
    let size: usize = object["metadata"]["annotations"]
        .as_object()
        .map(|map| map.iter().map(|(k, v)| k.len() + v.as_str().map_or(0, str::len)).sum())
        .unwrap_or_default();
    if size > ANNOTATIONS_LIMIT {
        let why = format!(
            "metadata.annotations: Too long: may not be more than {ANNOTATIONS_LIMIT} bytes"
        );
        return Err(ApiError::invalid(resource, name, &why));
    }
    Ok(())
}

/// Whether this is a DNS subdomain as RFC 1123 has it. Events may also hold what client
/// libraries put into their names.
fn is_subdomain(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 253
        && name.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        })
}

fn copy(from: &Value, to: &mut Value, field: &str) {
    match from.get(field) {
        Some(value) => to[field] = value.clone(),
        None => remove(to, field),
    }
}

fn remove(object: &mut Value, field: &str) {
    if let Some(map) = object.as_object_mut() {
        map.remove(field);
    }
}

/// A random version 4 UUID.
fn uid(random: &mut impl Rng) -> String {
    let mut bytes: [u8; 16] = random.random();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes() -> &'static Resource {
        Resource::find("", "v1", "nodes").unwrap()
    }

    fn node() -> Value {
        let body = json!({"metadata": {"name": "node-1"}, "spec": {"podCIDR": "10.0.0.0/24"}});
        prepare_create(nodes(), "", body).unwrap()
    }

    #[test]
    fn create_gives_identity_and_type() {
        let node = node();
        assert_eq!(node["kind"], "Node");
        assert_eq!(node["apiVersion"], "v1");
        assert_eq!(metadata(&node, "uid").len(), 36);
        assert_eq!(age_seconds(metadata(&node, "creationTimestamp")).unwrap() / 5, 0);
    }

    #[test]
    fn the_status_subresource_cannot_change_the_spec_and_the_reverse() {
        let old = node();
        let mut new = old.clone();
        new["spec"]["podCIDR"] = "10.9.9.0/24".into();
        new["status"]["phase"] = "odd".into();
        let status = prepare_update(nodes(), Subresource::Status, &old, new.clone()).unwrap();
        assert_eq!(status["spec"]["podCIDR"], "10.0.0.0/24");
        assert_eq!(status["status"]["phase"], "odd");
        let main = prepare_update(nodes(), Subresource::Main, &old, new).unwrap();
        assert_eq!(main["spec"]["podCIDR"], "10.9.9.0/24");
        assert!(main.get("status").is_none());
    }

    #[test]
    fn bad_objects_are_refused() {
        let refuse = |body: Value| prepare_create(nodes(), "", body).unwrap_err().status();
        assert_eq!(refuse(json!({"metadata": {"name": "Node_1"}}))["code"], 422);
        assert_eq!(refuse(json!({"metadata": {}}))["code"], 422);
        assert_eq!(refuse(json!({"kind": "Pod", "metadata": {"name": "a"}}))["code"], 400);
        let number = json!({"metadata": {"name": "a", "annotations": {"a": 1}}});
        assert_eq!(refuse(number)["code"], 400);
        let long = "x".repeat(ANNOTATIONS_LIMIT);
        let huge = json!({"metadata": {"name": "a", "annotations": {"a": long}}});
        assert_eq!(refuse(huge)["code"], 422);
    }

    #[test]
    fn a_stale_resource_version_conflicts() {
        let mut old = node();
        old["metadata"]["resourceVersion"] = "7".into();
        let mut new = old.clone();
        new["metadata"]["resourceVersion"] = "6".into();
        let error = prepare_update(nodes(), Subresource::Main, &old, new).unwrap_err();
        assert_eq!(error.status()["reason"], "Conflict");
    }
}
