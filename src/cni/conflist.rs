//! The configuration list that makes pods use the plugin: ours, or an operator's with what
//! the agent needs in it.

use serde_json::{Map, Value};

/// File name of the plugin.
pub const PLUGIN_NAME: &str = "gambeson-cni";
/// The other name the plugin answers to, for configurations that Flannel wrote.
pub const FLANNEL_NAME: &str = "flannel";
/// The reference plugins that pods need.
pub const REFERENCE_PLUGINS: [&str; 5] = ["bridge", "host-local", "loopback", "portmap", "static"];
/// The bridge that the reference plugin makes when none is named.
pub const DEFAULT_BRIDGE: &str = "cni0";

/// The configuration where there is none yet.
pub(super) const DEFAULT: &str = r#"{
  "name": "cbr0",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "gambeson-cni",
      "delegate": {
        "hairpinMode": true,
        "isDefaultGateway": true
      }
    },
    {
      "type": "portmap",
      "capabilities": {
        "portMappings": true
      }
    }
  ]
}
"#;

/// What the file should hold, given what it holds. Everything that an operator has added to a
/// configuration with our plugin, or Flannel's, stays; anything else is replaced. In a
/// configuration to which nobody has added anything, the version of the CNI specification is
/// `version`.
///
/// # Errors
/// What is in it that cannot work with pods on `bridge`, the only link the guard trusts.
pub(super) fn wanted(
    present: Option<&[u8]>,
    bridge: &str,
    version: &str,
) -> Result<Vec<u8>, String> {
    let present = present.unwrap_or_default();
    let parsed = serde_json::from_slice(present).ok().filter(|list| plugin_in(list).is_some());
    let (before, bytes) = match parsed {
        Some(list) => (list, present),
        None => (serde_json::from_str(DEFAULT).unwrap_or_default(), DEFAULT.as_bytes()),
    };
    let mut list: Value = before.clone();
    let plugin = plugin_in(&list).and_then(|index| list["plugins"][index].as_object_mut());
    let Some(plugin) = plugin else { return Ok(bytes.to_vec()) };
    adjust(plugin, bridge)?;
    if is_default(&list, bridge) {
        list["cniVersion"] = version.into();
    }
    if list == before {
        return Ok(bytes.to_vec());
    }
    Ok(format!("{list:#}\n").into_bytes())
}

/// Whether it is a configuration list with our plugin, or Flannel's.
pub(super) fn has_our_plugin(list: &[u8]) -> bool {
    serde_json::from_slice(list).is_ok_and(|list| plugin_in(&list).is_some())
}

/// Whether it is ours for this bridge, but for the version.
fn is_default(list: &Value, bridge: &str) -> bool {
    let mut default: Value = serde_json::from_str(DEFAULT).unwrap_or_default();
    let adjusted = default["plugins"][0].as_object_mut().map(|plugin| adjust(plugin, bridge));
    default["cniVersion"] = list["cniVersion"].clone();
    adjusted == Some(Ok(())) && *list == default
}

/// Where our plugin, or Flannel's, is in the list.
fn plugin_in(list: &Value) -> Option<usize> {
    let is_ours = |plugin: &Value| {
        let name = plugin["type"].as_str();
        plugin.is_object() && (name == Some(PLUGIN_NAME) || name == Some(FLANNEL_NAME))
    };
    list["name"].as_str()?;
    list["plugins"].as_array()?.iter().position(is_ours)
}

fn adjust(plugin: &mut Map<String, Value>, bridge: &str) -> Result<(), String> {
    plugin.insert("type".to_owned(), PLUGIN_NAME.into());
    let delegate = plugin.entry("delegate").or_insert_with(|| Map::new().into());
    let Some(delegate) = delegate.as_object_mut() else {
        return Err("\"delegate\" is not an object".to_owned());
    };
    if let Some(other) = delegate.get("type").filter(|name| *name != "bridge") {
        return Err(format!(
            "\"delegate.type\" is {other}, but only pods on the bridge {bridge} pass the guard; \
             remove it"
        ));
    }
    match delegate.get("bridge") {
        Some(named) if named == bridge => {}
        None if bridge == DEFAULT_BRIDGE => {}
        None => _ = delegate.insert("bridge".to_owned(), bridge.into()),
        Some(named) => {
            return Err(format!(
                "\"delegate.bridge\" is {named}, but the agent's --bridge is {bridge}, and only \
                 pods on that pass the guard; give both the same name"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn merge(present: &Value, bridge: &str) -> Result<Value, String> {
        let bytes = wanted(Some(present.to_string().as_bytes()), bridge, "0.3.1")?;
        Ok(serde_json::from_slice(&bytes).unwrap())
    }

    #[test]
    fn without_a_file_there_is_the_default_with_the_bridge() {
        assert_eq!(wanted(None, DEFAULT_BRIDGE, "0.3.1").unwrap(), DEFAULT.as_bytes());
        let named: Value = serde_json::from_slice(&wanted(None, "br7", "0.3.1").unwrap()).unwrap();
        let mut expected: Value = serde_json::from_str(DEFAULT).unwrap();
        expected["plugins"][0]["delegate"]["bridge"] = "br7".into();
        assert_eq!(named, expected);
    }

    #[test]
    fn what_an_operator_added_stays() {
        let own = json!({
            "name": "cbr0", "cniVersion": "1.0.0", "disableCheck": true,
            "plugins": [
                { "type": "tuning", "sysctl": {} },
                { "type": "flannel", "delegate": { "vlan": 7 }, "ipam": { "dataDir": "/x" } },
                { "type": "bandwidth" },
            ],
        });
        let mut expected = own.clone();
        expected["plugins"][1]["type"] = "gambeson-cni".into();
        assert_eq!(merge(&own, "cni0").unwrap(), expected);
        expected["plugins"][1]["delegate"]["bridge"] = "br7".into();
        assert_eq!(merge(&own, "br7").unwrap(), expected);
        // What needs no change keeps its bytes.
        let text = format!("{expected}  \n\n");
        assert_eq!(wanted(Some(text.as_bytes()), "br7", "0.3.1").unwrap(), text.as_bytes());
    }

    #[test]
    fn what_is_no_configuration_of_ours_is_replaced() {
        for other in ["", "{", "{}", "[]", "7", r#"{"name":"x","plugins":[{"type":"calico"}]}"#] {
            assert_eq!(
                wanted(Some(other.as_bytes()), "cni0", "0.3.1").unwrap(),
                DEFAULT.as_bytes()
            );
        }
    }

    #[test]
    fn what_cannot_work_is_refused_by_its_key() {
        let with = |delegate: Value| json!({ "name": "n", "plugins": [{ "type": "gambeson-cni", "delegate": delegate }] });
        for (delegate, says) in [
            (
                json!({ "bridge": "br8" }),
                "\"delegate.bridge\" is \"br8\", but the agent's --bridge",
            ),
            (json!({ "bridge": 7 }), "\"delegate.bridge\" is 7"),
            (json!({ "type": "ptp" }), "\"delegate.type\" is \"ptp\""),
            (json!([]), "\"delegate\" is not an object"),
        ] {
            let error = merge(&with(delegate), "br7").unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
