//! How objects are shown: as they are, or as the Table that `kubectl get` prints.

use serde_json::{Value, json};

use super::object::{age_seconds, metadata};
use super::resource::Resource;

/// What the client accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Json,
    Table(RowObject),
}

/// What each row of a Table carries beside its cells (`includeObject`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowObject {
    None,
    Metadata,
    Object,
}

impl Format {
    /// From the `Accept` header and the `includeObject` parameter.
    pub(super) fn negotiate(accept: &str, include_object: Option<&str>) -> Self {
        let first = accept.split(',').next().unwrap_or_default();
        if !first.split(';').any(|part| part.trim() == "as=Table") {
            return Self::Json;
        }
        Self::Table(match include_object {
            Some("None") => RowObject::None,
            Some("Object") => RowObject::Object,
            _ => RowObject::Metadata,
        })
    }

    pub(super) fn object(self, resource: &Resource, object: &Value) -> Value {
        match self {
            Self::Json => present(resource, object),
            Self::Table(rows) => {
                table(resource, metadata(object, "resourceVersion"), &[object], rows, true)
            }
        }
    }

    pub(super) fn list(self, resource: &Resource, revision: u64, objects: &[&Value]) -> Value {
        let revision = revision.to_string();
        match self {
            Self::Json => json!({
                "kind": format!("{}List", resource.kind),
                "apiVersion": resource.api_version(),
                "metadata": { "resourceVersion": revision },
                "items": objects.iter().map(|o| present(resource, o)).collect::<Vec<_>>(),
            }),
            Self::Table(rows) => table(resource, &revision, objects, rows, true),
        }
    }

    /// The object of a watch event. Only the first Table of a watch names its columns.
    pub(super) fn watched(self, resource: &Resource, object: &Value, first: bool) -> Value {
        match self {
            Self::Json => present(resource, object),
            Self::Table(rows) => {
                table(resource, metadata(object, "resourceVersion"), &[object], rows, first)
            }
        }
    }
}

/// Both kinds of Event are one object, which appears as the kind that was asked for.
fn present(resource: &Resource, object: &Value) -> Value {
    let mut object = object.clone();
    object["apiVersion"] = resource.api_version().into();
    object
}

struct Column {
    name: &'static str,
    /// Shown only with `-o wide`.
    wide: bool,
    cell: fn(&Value) -> Value,
}

const fn column(name: &'static str, wide: bool, cell: fn(&Value) -> Value) -> Column {
    Column { name, wide, cell }
}

static NODE_COLUMNS: &[Column] = &[
    column("Name", false, name),
    column("Status", false, ready),
    column("Roles", false, |_| "<none>".into()),
    column("Age", false, age),
    column("Version", false, |o| text(&o["status"]["nodeInfo"]["kubeletVersion"])),
    column("Internal-IP", true, |o| address(o, "InternalIP")),
    column("Pod-CIDRs", true, pod_cidrs),
    column("OS-Image", true, |o| text(&o["status"]["nodeInfo"]["osImage"])),
    column("Kernel-Version", true, |o| text(&o["status"]["nodeInfo"]["kernelVersion"])),
];

static EVENT_COLUMNS: &[Column] = &[
    column("Last Seen", false, age),
    column("Type", false, |o| text(&o["type"])),
    column("Reason", false, |o| text(&o["reason"])),
    column("Object", false, involved),
    column("Message", false, |o| text(&o["message"])),
];

static OTHER_COLUMNS: &[Column] = &[column("Name", false, name), column("Age", false, age)];

fn table(
    resource: &Resource,
    revision: &str,
    objects: &[&Value],
    row_object: RowObject,
    with_columns: bool,
) -> Value {
    let columns = match resource.kind {
        "Node" => NODE_COLUMNS,
        "Event" => EVENT_COLUMNS,
        _ => OTHER_COLUMNS,
    };
    let definitions: Vec<_> = columns
        .iter()
        .map(|column| {
            json!({
                "name": column.name,
                "type": "string",
                "format": if column.name == "Name" { "name" } else { "" },
                "description": "",
                "priority": i32::from(column.wide),
            })
        })
        .collect();
    let rows: Vec<_> = objects
        .iter()
        .map(|object| {
            let cells: Vec<_> = columns.iter().map(|column| (column.cell)(object)).collect();
            json!({ "cells": cells, "object": row_content(resource, object, row_object) })
        })
        .collect();
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": { "resourceVersion": revision },
        "columnDefinitions": if with_columns { definitions } else { Vec::new() },
        "rows": rows,
    })
}

fn row_content(resource: &Resource, object: &Value, row_object: RowObject) -> Value {
    match row_object {
        RowObject::None => Value::Null,
        RowObject::Object => present(resource, object),
        RowObject::Metadata => json!({
            "kind": "PartialObjectMetadata",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": object["metadata"],
        }),
    }
}

fn text(value: &Value) -> Value {
    value.as_str().filter(|text| !text.is_empty()).unwrap_or("<none>").into()
}

fn name(object: &Value) -> Value {
    text(&object["metadata"]["name"])
}

/// In the two largest units that matter, roughly as kubectl prints it.
fn age(object: &Value) -> Value {
    let Some(seconds) = age_seconds(metadata(object, "creationTimestamp")) else {
        return "<unknown>".into();
    };
    match seconds {
        ..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
    .into()
}

fn ready(node: &Value) -> Value {
    let conditions = node["status"]["conditions"].as_array();
    let ready = conditions.into_iter().flatten().find(|c| c["type"] == "Ready");
    let mut status = match ready.map(|c| &c["status"]) {
        Some(status) if status == "True" => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if node["spec"]["unschedulable"] == true {
        status.push_str(",SchedulingDisabled");
    }
    status.into()
}

fn address(node: &Value, kind: &str) -> Value {
    let addresses = node["status"]["addresses"].as_array();
    let address = addresses.into_iter().flatten().find(|a| a["type"] == kind);
    address.map_or_else(|| "<none>".into(), |a| text(&a["address"]))
}

fn pod_cidrs(node: &Value) -> Value {
    let cidrs = node["spec"]["podCIDRs"].as_array().into_iter().flatten();
    text(&cidrs.filter_map(Value::as_str).collect::<Vec<_>>().join(",").into())
}

fn involved(event: &Value) -> Value {
    let object = &event["involvedObject"];
    let kind = object["kind"].as_str().unwrap_or_default().to_lowercase();
    format!("{kind}/{}", object["name"].as_str().unwrap_or_default()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubectl_gets_a_table_and_programs_get_objects() {
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";
        assert_eq!(Format::negotiate(kubectl, None), Format::Table(RowObject::Metadata));
        assert_eq!(Format::negotiate("application/json", None), Format::Json);
        let nodes = Resource::find("", "v1", "nodes").unwrap();
        let node = json!({
            "metadata": {"name": "node-1", "creationTimestamp": "2020-01-01T00:00:00Z"},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        });
        let table = Format::negotiate(kubectl, None).list(nodes, 7, &[&node]);
        assert_eq!(table["rows"][0]["cells"][0], "node-1");
        assert_eq!(table["rows"][0]["cells"][1], "Ready");
        assert_eq!(table["metadata"]["resourceVersion"], "7");
    }
}
