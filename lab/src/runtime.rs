//! Pods: a container runtime's part of CNI. The configuration list that the agent wrote is
//! executed plugin by plugin, each with the result of the one before.

use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::error::{LabError, file_error};
use super::layout::POD_INTERFACE;
use super::netns::{Environment, Netns};
use super::network::ip_json;
use super::state::PodState;

/// Where a node's own plugins are, as seen on the node. As `/opt` it outlives a boot.
pub const BIN_DIR: &str = "/var/lib/lab/cni/bin";
/// Where the reference plugins are.
pub(super) const REFERENCE_PLUGINS: &str = "/usr/lib/cni";
/// Where a node's CNI configuration is, as seen on the node. As `/etc` it outlives a boot.
pub const CONF_DIR: &str = "/var/lib/lab/cni/net.d";

/// A configuration list, as it lies in a CNI configuration folder.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfList {
    path: PathBuf,
    document: Value,
}

impl ConfList {
    /// The first list of the node in alphabetical order, as runtimes choose it. `None` when
    /// there is none yet, or one that leads nowhere.
    pub fn first_on(node: &Environment) -> Result<Option<Self>, LabError> {
        let folder = node.host_path(Path::new(CONF_DIR));
        let Ok(entries) = fs::read_dir(folder) else { return Ok(None) };
        let mut paths: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "conflist"))
            .collect();
        paths.sort();
        let Some(path) = paths.into_iter().next() else { return Ok(None) };
        // Where it leads to on the node.
        let path = fs::read_link(&path).map_or(path, |target| node.host_path(&target));
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(file_error("read", &path))?,
        };
        let document = serde_json::from_slice(&bytes).map_err(|error| {
            LabError::CniConfiguration { path: path.clone(), reason: error.to_string() }
        })?;
        Ok(Some(Self { path, document }))
    }

    /// ADD: gives the pod its interface.
    pub(super) fn add(&self, node: &Environment, pod: &Netns) -> Result<PodState, LabError> {
        let mut result = Value::Null;
        for plugin in self.plugins()? {
            result = self.execute("ADD", plugin, &result, node, pod)?;
        }
        let addresses = result["ips"].as_array().into_iter().flatten();
        let addresses: Vec<IpAddr> = addresses
            .filter_map(|entry| entry["address"].as_str()?.split('/').next()?.parse().ok())
            .collect();
        if addresses.is_empty() {
            return Err(self.unusable(format!("ADD of {} gave no address: {result}", pod.name())));
        }
        Ok(PodState { addresses, mtu: interface_mtu(pod)? })
    }

    /// DEL: takes it away again, in the reverse order. Every plugin gets its turn.
    pub(super) fn delete(&self, node: &Environment, pod: &Netns) -> Result<(), LabError> {
        let plugins = self.plugins()?;
        let results: Vec<_> = plugins
            .iter()
            .rev()
            .map(|plugin| self.execute("DEL", plugin, &Value::Null, node, pod))
            .collect();
        results.into_iter().try_for_each(|result| result.map(|_| ()))
    }

    fn plugins(&self) -> Result<&Vec<Value>, LabError> {
        let plugins = self.document["plugins"].as_array();
        plugins.ok_or_else(|| self.unusable("it has no list of plugins".to_owned()))
    }

    fn execute(
        &self,
        command: &'static str,
        plugin: &Value,
        previous: &Value,
        node: &Environment,
        pod: &Netns,
    ) -> Result<Value, LabError> {
        let kind = plugin["type"].as_str().unwrap_or_default();
        let fail = |message: String| LabError::Cni {
            command,
            pod: pod.name().to_owned(),
            plugin: kind.to_owned(),
            message,
        };
        let mut configuration = plugin.clone();
        configuration["name"] = self.document["name"].clone();
        configuration["cniVersion"] = self.document["cniVersion"].clone();
        if !previous.is_null() {
            configuration["prevResult"] = previous.clone();
        }
        let wanted = plugin["capabilities"].as_object().into_iter().flatten();
        for (capability, _) in wanted.filter(|(_, on)| **on == true) {
            configuration["runtimeConfig"][capability] = json!([]);
        }
        let program = find_plugin(kind, node)
            .ok_or_else(|| fail(format!("not found in {BIN_DIR} and {REFERENCE_PLUGINS}")))?;
        let mut child = node.spawn(
            Command::new(program)
                .env("CNI_COMMAND", command)
                .env("CNI_CONTAINERID", pod.name())
                .env("CNI_NETNS", pod.path())
                .env("CNI_IFNAME", POD_INTERFACE)
                .env("CNI_PATH", format!("{BIN_DIR}:{REFERENCE_PLUGINS}"))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped()),
        )?;
        if let Some(mut stdin) = child.stdin.take() {
            // A plugin that does not read its configuration says why it failed.
            let _ = stdin.write_all(configuration.to_string().as_bytes());
        }
        let output = child.wait_with_output().map_err(|error| fail(error.to_string()))?;
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        if output.status.success() {
            return Ok(answer);
        }
        let said = [&answer["msg"], &answer["details"]];
        let said: Vec<_> =
            said.iter().filter_map(|v| v.as_str()).filter(|s| !s.is_empty()).collect();
        let stderr = String::from_utf8_lossy(&output.stderr);
        Err(fail(if said.is_empty() { stderr.trim().to_owned() } else { said.join(": ") }))
    }

    fn unusable(&self, reason: String) -> LabError {
        LabError::CniConfiguration { path: self.path.clone(), reason }
    }
}

/// Path of a plugin as seen on the node.
fn find_plugin(kind: &str, node: &Environment) -> Option<PathBuf> {
    let own = Path::new(BIN_DIR).join(kind);
    if node.host_path(&own).symlink_metadata().is_ok() {
        return Some(own);
    }
    let reference = Path::new(REFERENCE_PLUGINS).join(kind);
    reference.exists().then_some(reference)
}

/// MTU of a pod's interface in bytes.
pub(super) fn interface_mtu(pod: &Netns) -> Result<u32, LabError> {
    let links = ip_json(pod.name(), &["link", "show", "dev", POD_INTERFACE])?;
    let mtu = links[0]["mtu"].as_u64().and_then(|mtu| mtu.try_into().ok());
    mtu.ok_or_else(|| LabError::Ip {
        place: pod.name().to_owned(),
        message: format!("{POD_INTERFACE} has no MTU"),
    })
}
