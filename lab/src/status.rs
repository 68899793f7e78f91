//! What a lab consists of at this moment.

use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

use super::instance::Lab;
use super::report::{BAD, GOOD, new_table};

/// `gambeson lab status --json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LabStatus {
    /// Version of this document's form.
    pub schema: u32,
    /// The lab's name.
    pub name: String,
    /// URL of the API server on the host's loopback address.
    pub api: String,
    /// Whether the API server runs.
    pub api_up: bool,
    /// All nodes.
    pub nodes: Vec<NodeStatus>,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Name of its network namespace.
    pub netns: String,
    /// Underlay addresses.
    pub ip: Vec<IpAddr>,
    /// The agent, if it runs.
    pub agent_pid: Option<i32>,
    /// The processes behind its userspace devices.
    pub tunnel_pids: Vec<i32>,
    /// Its pods.
    pub pods: Vec<PodStatus>,
}

/// One pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PodStatus {
    /// Its name.
    pub name: String,
    /// Name of its network namespace.
    pub netns: String,
    /// Its addresses.
    pub ip: Vec<IpAddr>,
}

impl Lab {
    /// What the lab consists of at this moment.
    pub fn status(&self) -> LabStatus {
        let api_up = self.state().api.as_ref().is_some_and(|api| api.process.is_alive());
        let nodes = self.nodes().into_iter().map(|node| NodeStatus {
            name: node.name(),
            netns: node.netns().name().to_owned(),
            ip: node.addresses(),
            agent_pid: node.agent().map(|agent| agent.pid),
            tunnel_pids: node.tunnels().iter().map(|tunnel| tunnel.pid).collect(),
            pods: node
                .pods()
                .iter()
                .map(|pod| PodStatus {
                    name: pod.name(),
                    netns: pod.netns().name().to_owned(),
                    ip: pod.addresses(),
                })
                .collect(),
        });
        LabStatus {
            schema: 1,
            name: self.options().name.to_string(),
            api: self.api_url(),
            api_up,
            nodes: nodes.collect(),
        }
    }
}

impl fmt::Display for LabStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let api = if self.api_up { GOOD } else { BAD };
        writeln!(f, "lab {}, API server {} {api}", self.name, self.api)?;
        let mut table = new_table(&["node", "underlay", "agent", "tunnels", "pods"]);
        for node in &self.nodes {
            let agent = node.agent_pid.map_or_else(|| BAD.to_owned(), |pid| pid.to_string());
            let pods = node.pods.iter().map(|pod| format!("{}  {}", pod.name, join(&pod.ip, " ")));
            table.add_row([
                node.name.clone(),
                join(&node.ip, "\n"),
                agent,
                join(&node.tunnel_pids, "\n"),
                join(&pods.collect::<Vec<_>>(), "\n"),
            ]);
        }
        write!(f, "{table}")
    }
}

fn join(items: &[impl ToString], separator: &str) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(separator)
}
