//! What a request path names.

use super::resource::Resource;

/// A resource type or an object, as named by a request path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) resource: &'static Resource,
    /// Empty for cluster-scoped resources and for lists over all namespaces.
    pub(super) namespace: String,
    pub(super) name: Option<String>,
    pub(super) subresource: Subresource,
}

/// Which part of an object a request is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subresource {
    Main,
    Status,
}

impl Target {
    /// Parses `/api/v1/...` or `/apis/<group>/<version>/...`.
    pub(super) fn parse(path: &str) -> Option<Self> {
        let segments: Vec<&str> = path.split('/').filter(|s| !s.is_empty()).collect();
        let (group, version, rest) = match segments.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return None,
        };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if is_namespaced(group, version, rest) => {
                (*namespace, rest)
            }
            rest => ("", rest),
        };
        let (plural, name, subresource) = match rest {
            [plural] => (*plural, None, Subresource::Main),
            [plural, name] => (*plural, Some(*name), Subresource::Main),
            [plural, name, "status"] => (*plural, Some(*name), Subresource::Status),
            _ => return None,
        };
        let resource = Resource::find(group, version, plural)?;
        if subresource == Subresource::Status && !resource.status {
            return None;
        }
        if name.is_some() && resource.namespaced == namespace.is_empty() {
            return None;
        }
        Some(Self {
            resource,
            namespace: namespace.to_owned(),
            name: name.map(str::to_owned),
            subresource,
        })
    }
}

fn is_namespaced(group: &str, version: &str, rest: &[&str]) -> bool {
    rest.first()
        .and_then(|plural| Resource::find(group, version, plural))
        .is_some_and(|resource| resource.namespaced)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(path: &str) -> Option<(&'static str, String, Option<String>, Subresource)> {
        let target = Target::parse(path)?;
        Some((target.resource.plural, target.namespace, target.name, target.subresource))
    }

    #[test]
    fn paths_name_resources_as_in_kubernetes() {
        let none = String::new;
        assert_eq!(parse("/api/v1/nodes"), Some(("nodes", none(), None, Subresource::Main)));
        assert_eq!(
            parse("/api/v1/nodes/node-1/status"),
            Some(("nodes", none(), Some("node-1".into()), Subresource::Status))
        );
        assert_eq!(
            parse("/apis/events.k8s.io/v1/namespaces/default/events"),
            Some(("events", "default".into(), None, Subresource::Main))
        );
        assert_eq!(
            parse("/api/v1/namespaces/default"),
            Some(("namespaces", none(), Some("default".into()), Subresource::Main))
        );
        for unknown in ["/", "/api/v1/bananas", "/api/v2/nodes", "/api/v1/events/x", "/api/v1"] {
            assert_eq!(parse(unknown), None, "{unknown}");
        }
    }
}
