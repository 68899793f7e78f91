//! What works and is probably not meant on this host, in words that say what helps. None of it
//! stops the agent: an operator may have reasons.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use serde_json::Value;

use crate::cni::install::CONFLIST_NAME;
use crate::config::Config;
use crate::underlay::{Choice, Underlay};

/// File names that container runtimes take for a CNI configuration (libcni).
const CONF_EXTENSIONS: [&str; 3] = ["conf", "conflist", "json"];
/// Plugins that call the next configuration, and so have to come before it.
const META_PLUGINS: [&str; 2] = ["multus", "multus-shim"];
/// Of a process: `user:role:type:level` where SELinux is in force.
const LABEL: &str = "/proc/self/attr/current";
const SELINUX_ENFORCES: &str = "/sys/fs/selinux/enforce";
/// The type that container runtimes give by default (container-selinux).
const CONTAINER_TYPE: &str = "container_t";

/// What somebody should look at on this host. `internal` are the addresses at which the rest of
/// the cluster reaches its Node.
pub(super) fn on_host(config: &Config, underlay: &Underlay, internal: &[IpAddr]) -> Vec<String> {
    [
        another_network(&config.cni_conf_dir),
        another_interface(&config.underlay, underlay, internal),
        selinux(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Says when SELinux is about to deny most of what an agent does.
pub(super) fn selinux() -> Option<String> {
    let label = fs::read_to_string(LABEL).ok()?;
    let enforces = fs::read_to_string(SELINUX_ENFORCES);
    confined(&label, enforces.is_ok_and(|value| value.trim() == "0"))
}

fn confined(label: &str, permissive: bool) -> Option<String> {
    let label = label.trim_end_matches(['\0', '\n']);
    let confined = label.split(':').nth(2) == Some(CONTAINER_TYPE) && !permissive;
    confined.then(|| {
        format!(
            "SELinux runs this agent as {label}, which may not write to the host's folders or \
             configure its network; give its pods the type spc_t (seLinuxOptions of the chart)"
        )
    })
}

/// A configuration that container runtimes prefer to ours: they take the first by name.
fn another_network(conf_dir: &Path) -> Option<String> {
    let entries = fs::read_dir(conf_dir).ok()?;
    let first = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let extension = path.extension().and_then(|extension| extension.to_str());
            extension.is_some_and(|extension| CONF_EXTENSIONS.contains(&extension))
        })
        .filter(|path| path.file_name().is_some_and(|name| name < CONFLIST_NAME))
        .filter(|path| !is_meta(path))
        .min()?;
    Some(format!(
        "{} comes before {CONFLIST_NAME}, so that container runtimes give pods its network and not \
         this one, encrypted or not; remove the other network, and then this file",
        first.display()
    ))
}

fn is_meta(path: &Path) -> bool {
    let Some(conf) = fs::read(path).ok().and_then(|b| serde_json::from_slice::<Value>(&b).ok())
    else {
        return false;
    };
    let plugin = conf["plugins"].get(0).unwrap_or(&conf);
    plugin["type"].as_str().is_some_and(|plugin| META_PLUGINS.contains(&plugin))
}

/// The interface of the default route, when other nodes know this one by another address. It is
/// how virtual machines with a NAT interface beside the real one get a mesh without a handshake.
fn another_interface(choice: &Choice, underlay: &Underlay, internal: &[IpAddr]) -> Option<String> {
    let published: Vec<IpAddr> = underlay.endpoints.addresses().collect();
    let chosen = *choice != Choice::default();
    if chosen || internal.is_empty() || internal.iter().any(|known| published.contains(known)) {
        return None;
    }
    let list = |addresses: &[IpAddr]| {
        addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    };
    Some(format!(
        "encrypted packets use {} with {}, by the default route, but the Node's InternalIP is {}; \
         if other nodes cannot reach the former, choose the interface with --iface, or by \
         --iface-can-reach with an address of another node",
        underlay.name,
        list(&published),
        list(internal)
    ))
}

#[cfg(test)]
mod tests {
    use gambeson_mesh::node::Endpoints;

    use super::*;

    #[test]
    fn selinux_is_named_where_it_confines() {
        let label = "system_u:system_r:container_t:s0:c1,c2\0";
        let said = confined(label, false).unwrap();
        assert!(said.contains("container_t:s0:c1,c2, which") && said.contains("spc_t"), "{said}");
        assert_eq!(confined(label, true), None);
        for free in ["system_u:system_r:spc_t:s0", "unconfined", "cri-containerd (enforce)", ""] {
            assert_eq!(confined(free, false), None, "{free}");
        }
    }

    #[test]
    fn a_configuration_that_runtimes_prefer_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let conf_dir = folder.path();
        let put = |name: &str, contents: &str| fs::write(conf_dir.join(name), contents).unwrap();
        assert_eq!(another_network(&conf_dir.join("absent")), None);
        put(CONFLIST_NAME, "{}");
        put("05-notes.txt", "");
        put("20-bridge.conflist", "{}");
        put("00-multus.conf", r#"{"type": "multus"}"#);
        put("01-multus.conflist", r#"{"plugins": [{"type": "multus-shim"}]}"#);
        assert_eq!(another_network(conf_dir), None);
        put("10-calico.conflist", r#"{"plugins": [{"type": "calico"}]}"#);
        let said = another_network(conf_dir).unwrap();
        assert!(said.contains("10-calico.conflist comes before 10-flannel.conflist"), "{said}");
        put("05-broken.conf", "{");
        assert!(another_network(conf_dir).unwrap().contains("05-broken.conf"));
    }

    #[test]
    fn an_interface_that_nobody_chose_is_compared_with_the_nodes_address() {
        let v4 = Some("10.0.2.15".parse().unwrap());
        let underlay = Underlay {
            addresses: Default::default(),
            name: "eth0".into(),
            index: 2,
            mtu: 1500,
            endpoints: Endpoints { v4, v6: None },
        };
        let internal: [IpAddr; 1] = ["192.168.56.11".parse().unwrap()];
        let said = another_interface(&Choice::default(), &underlay, &internal).unwrap();
        for part in ["eth0 with 10.0.2.15", "InternalIP is 192.168.56.11", "--iface"] {
            assert!(said.contains(part), "{said}");
        }
        let named = Choice { iface: vec!["eth0".into()], ..Choice::default() };
        assert_eq!(another_interface(&named, &underlay, &internal), None);
        assert_eq!(another_interface(&Choice::default(), &underlay, &[]), None);
        let both = [internal[0], "10.0.2.15".parse().unwrap()];
        assert_eq!(another_interface(&Choice::default(), &underlay, &both), None);
    }
}
