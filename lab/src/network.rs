//! The underlay: namespaces, one L2 segment or a router, addresses. Made by `ip` in a few
//! batches.

use std::fs;
use std::io::{self, Write};
use std::iter;
use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Stdio};

use ipnet::IpNet;
use serde_json::Value;

use super::error::LabError;
use super::layout::{NodeIndex, UNDERLAY_INTERFACE, hub_netns};
use super::netns::Netns;
use super::options::Options;

const BRIDGE: &str = "br0";

/// Makes all namespaces and the underlay between them.
pub(super) fn build(options: &Options) -> Result<(), LabError> {
    make_namespaces(&options.netns_names())?;
    let hub = hub_netns(&options.name);
    ip(Some(&hub), hub_lines(options))?;
    if options.routed {
        Netns::named(&hub).run(forward)?.map_err(|source| LabError::Measure {
            what: format!("turn on forwarding in the namespace {hub}"),
            source,
        })?;
    }
    options.node_indices().try_for_each(|node| configure_node(options, node))
}

/// Makes the namespaces of one node and its pods again, and its cable.
pub(super) fn build_node(options: &Options, node: NodeIndex) -> Result<(), LabError> {
    let pods = options.pod_indices(node).map(|pod| pod.netns(&options.name));
    let names: Vec<String> = iter::once(node.netns(&options.name)).chain(pods).collect();
    make_namespaces(&names)?;
    let hub = hub_netns(&options.name);
    // Of the old cable, which goes with the old namespace, but only some time later.
    let _ = ip(Some(&hub), [format!("link delete {}", hub_port(node))]);
    ip(Some(&hub), cable_lines(options, node))?;
    configure_node(options, node)
}

fn make_namespaces(names: &[String]) -> Result<(), LabError> {
    ip(None, names.iter().map(|name| format!("netns add {name}")))?;
    for name in names {
        Netns::named(name).run(settle)?.map_err(|source| LabError::Measure {
            what: format!("change kernel settings of the namespace {name}"),
            source,
        })?;
    }
    Ok(())
}

fn configure_node(options: &Options, node: NodeIndex) -> Result<(), LabError> {
    ip(Some(&node.netns(&options.name)), node_lines(options, node))?;
    for pod in options.pod_indices(node) {
        ip(Some(&pod.netns(&options.name)), ["link set lo up".to_owned()])?;
    }
    Ok(())
}

/// Name of the hub's end of a node's cable.
pub(super) fn hub_port(node: NodeIndex) -> String {
    node.name()
}

fn hub_lines(options: &Options) -> Vec<String> {
    let mtu = options.underlay_mtu;
    let mut lines = vec!["link set lo up".to_owned()];
    if !options.routed {
        lines.push(format!(
            "link add {BRIDGE} mtu {mtu} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
        ));
        let addresses = options.gateway_addresses(NodeIndex(1));
        lines.extend(addresses.iter().map(|address| add_address(address, BRIDGE)));
        lines.push(format!("link set {BRIDGE} up"));
    }
    lines.extend(options.node_indices().flat_map(|node| cable_lines(options, node)));
    lines
}

fn cable_lines(options: &Options, node: NodeIndex) -> Vec<String> {
    let mtu = options.underlay_mtu;
    let (port, netns) = (hub_port(node), node.netns(&options.name));
    let mut lines = vec![format!(
        "link add {port} mtu {mtu} type veth peer name {UNDERLAY_INTERFACE} mtu {mtu} netns {netns}"
    )];
    if options.routed {
        let addresses = options.gateway_addresses(node);
        lines.extend(addresses.iter().map(|address| add_address(address, &port)));
    } else {
        lines.push(format!("link set {port} master {BRIDGE}"));
    }
    lines.push(format!("link set {port} up"));
    lines
}

fn node_lines(options: &Options, node: NodeIndex) -> Vec<String> {
    let mut lines = vec!["link set lo up".to_owned()];
    let addresses = options.underlay_addresses(node);
    lines.extend(addresses.iter().map(|address| add_address(address, UNDERLAY_INTERFACE)));
    lines.push(format!("link set {UNDERLAY_INTERFACE} up"));
    for gateway in options.gateway_addresses(node) {
        let everything = if gateway.addr().is_ipv6() { "::/0" } else { "0.0.0.0/0" };
        lines.push(format!("route add {everything} via {}", gateway.addr()));
    }
    lines
}

fn add_address(address: &IpNet, device: &str) -> String {
    let nodad = if matches!(address.addr(), IpAddr::V6(_)) { " nodad" } else { "" };
    format!("address add {address} dev {device}{nodad}")
}

/// Addresses are unique by construction, so none waits a second to find out; and any
/// program may send an echo request.
fn settle() -> io::Result<()> {
    for scope in ["all", "default"] {
        let base = Path::new("/proc/sys/net/ipv6/conf").join(scope);
        fs::write(base.join("accept_dad"), "0")?;
        fs::write(base.join("dad_transmits"), "0")?;
        fs::write(base.join("accept_ra"), "0")?;
    }
    fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")
}

fn forward() -> io::Result<()> {
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")
}

/// Runs lines as one batch of `ip`, in this namespace or the present one.
pub(super) fn ip(
    netns: Option<&str>,
    lines: impl IntoIterator<Item = String>,
) -> Result<(), LabError> {
    let mut command = Command::new("ip");
    if let Some(netns) = netns {
        command.args(["-n", netns]);
    }
    let run_error =
        |source| LabError::Program { program: "ip".to_owned(), package: "iproute2", source };
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(run_error)?;
    let mut batch = lines.into_iter().collect::<Vec<_>>().join("\n");
    batch.push('\n');
    if let Some(mut stdin) = child.stdin.take() {
        match stdin.write_all(batch.as_bytes()) {
            // It stops reading at the first line that fails, and says why.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(run_error(error));
            }
            _ => {}
        }
    }
    let output = child.wait_with_output().map_err(run_error)?;
    if output.status.success() {
        return Ok(());
    }
    Err(LabError::Ip {
        place: netns.unwrap_or("this namespace").to_owned(),
        message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// What `ip -json` with these arguments says in this namespace.
pub(super) fn ip_json(netns: &str, arguments: &[&str]) -> Result<Value, LabError> {
    let output = Command::new("ip")
        .args(["-json", "-n", netns])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| LabError::Program {
            program: "ip".to_owned(),
            package: "iproute2",
            source,
        })?;
    let answer = serde_json::from_slice(&output.stdout).ok().filter(|_| output.status.success());
    answer.ok_or_else(|| LabError::Ip {
        place: netns.to_owned(),
        message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}
