//! What the server says about itself, as far as kubectl and client libraries ask.

use axum::Json;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::resource::{RESOURCES, Resource};

/// The Kubernetes minor version that the server imitates.
const MINOR: &str = "33";

/// Answers a discovery path, or `None` when it is not one.
pub(super) fn answer(path: &str) -> Option<Response> {
    let segments: Vec<&str> = path.split('/').filter(|s| !s.is_empty()).collect();
    let document = match segments.as_slice() {
        ["healthz" | "livez" | "readyz"] => return Some("ok".into_response()),
        ["version"] => version(),
        ["api"] => json!({
            "kind": "APIVersions",
            "versions": ["v1"],
            "serverAddressByClientCIDRs": [],
        }),
        ["apis"] => json!({
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": groups().into_iter().map(group).collect::<Vec<_>>(),
        }),
        ["apis", name] if groups().contains(name) => {
            let mut document = group(name);
            document["kind"] = "APIGroup".into();
            document["apiVersion"] = "v1".into();
            document
        }
        ["api", "v1"] => resources("")?,
        ["apis", name, "v1"] => resources(name)?,
        // No schema is known for any type: an empty document in protobuf is no bytes at all.
        ["openapi", "v2"] => {
            let content_type = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
            return Some(([(header::CONTENT_TYPE, content_type)], Vec::new()).into_response());
        }
        ["openapi", "v3"] => {
            let path = |base: String| {
                let url = format!("/openapi/v3/{base}?hash=1");
                (base, json!({ "serverRelativeURL": url }))
            };
            let groups = groups().into_iter().map(|name| path(format!("apis/{name}/v1")));
            json!({ "paths": groups.chain([path("api/v1".to_owned())]).collect::<Map<_, _>>() })
        }
        ["openapi", "v3", "api", "v1"] => openapi(""),
        ["openapi", "v3", "apis", name, "v1"] if groups().contains(name) => openapi(name),
        _ => return None,
    };
    Some(Json(document).into_response())
}

fn version() -> Value {
    json!({
        "major": "1",
        "minor": MINOR,
        "gitVersion": format!("v1.{MINOR}.0-gambeson-lab"),
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "none",
        "compiler": "rustc",
        "platform": "linux/amd64",
    })
}

fn groups() -> Vec<&'static str> {
    let mut groups: Vec<_> = RESOURCES.iter().map(|r| r.group).filter(|g| !g.is_empty()).collect();
    groups.dedup();
    groups
}

fn group(name: &str) -> Value {
    let version = json!({ "groupVersion": format!("{name}/v1"), "version": "v1" });
    json!({ "name": name, "versions": [version], "preferredVersion": version })
}

fn resources(group: &str) -> Option<Value> {
    let of_group: Vec<_> = RESOURCES.iter().filter(|r| r.group == group).collect();
    let version = of_group.first()?.api_version();
    let entries: Vec<_> = of_group.into_iter().flat_map(entries).collect();
    Some(json!({
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": version,
        "resources": entries,
    }))
}

fn entries(resource: &Resource) -> Vec<Value> {
    let mut entries = vec![json!({
        "name": resource.plural,
        "singularName": resource.singular,
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
        "shortNames": resource.short,
    })];
    if resource.status {
        entries.push(json!({
            "name": format!("{}/status", resource.plural),
            "singularName": "",
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": ["get", "patch", "update"],
        }));
    }
    entries
}

/// Just enough for kubectl to see that validation is the server's business: every type has a
/// patch operation that takes `fieldValidation`.
fn openapi(group: &str) -> Value {
    let base = if group.is_empty() { "/api/v1".to_owned() } else { format!("/apis/{group}/v1") };
    let mut paths = Map::new();
    for resource in RESOURCES.iter().filter(|r| r.group == group) {
        let namespace = if resource.namespaced { "namespaces/{namespace}/" } else { "" };
        let path = format!("{base}/{namespace}{}/{{name}}", resource.plural);
        let operation = json!({
            "x-kubernetes-action": "patch",
            "x-kubernetes-group-version-kind":
                { "group": group, "version": resource.version, "kind": resource.kind },
            "parameters": [
                { "name": "fieldValidation", "in": "query", "schema": { "type": "string" } },
            ],
            "responses": { "200": { "description": "OK" } },
        });
        paths.insert(path, json!({ "patch": operation }));
    }
    json!({
        "openapi": "3.0.0",
        "info": { "title": "Kubernetes", "version": format!("v1.{MINOR}.0") },
        "paths": paths,
        "components": { "schemas": {} },
    })
}
