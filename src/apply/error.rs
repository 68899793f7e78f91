use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;

use gambeson_keys::Generation;
use gambeson_mesh::desired::{RouteKey, Rule, VtepEntry};
use gambeson_mesh::session::DeviceName;
use ipnet::IpNet;

use crate::exit::Exit;
use crate::supervisor::AskError;

/// Why the kernel could not be read or changed. Each names its object; the operator's
/// remedy follows where errno tells what it is.
#[expect(missing_docs, reason = "fields are named by their types")]
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// No route-netlink socket.
    #[error("cannot open a netlink socket{}", hint(source))]
    Connect { source: io::Error },
    /// A link could not be looked up.
    #[error("cannot read link {name}{}", hint(source))]
    ReadLink { name: String, source: io::Error },
    /// A link could not be renamed.
    #[error("cannot rename a link between {device} and {name}{}", hint(source))]
    Rename { device: DeviceName, name: String, source: io::Error },
    /// A link of Flannel's could not be removed.
    #[error("cannot remove link {name}{}", hint(source))]
    DeleteForeign { name: String, source: io::Error },
    /// A link that was to be changed is not there.
    #[error("link {device} does not exist any more; it is made again in the next pass")]
    LinkGone { device: DeviceName },
    /// A link with one of our names was made by somebody else.
    #[error(
        "link {device} was not made by gambeson (it lacks the alias `gambeson`) and is left \
         alone; rename or delete it (`ip link delete {device}`)"
    )]
    ForeignLink { device: DeviceName },
    /// A link could not be made.
    #[error("cannot make link {device}{}", hint(source))]
    AddLink { device: DeviceName, source: io::Error },
    /// This kernel cannot make links of type `wireguard`.
    #[error(
        "cannot make link {device}: this kernel has no WireGuard; load it (`modprobe wireguard`) \
         or use `--wireguard userspace`"
    )]
    NoWireGuard { device: DeviceName, source: io::Error },
    /// This kernel cannot make links of type `vxlan`.
    #[error("cannot make link {device}: this kernel has no VXLAN; load it (`modprobe vxlan`)")]
    NoVxlan { device: DeviceName, source: io::Error },
    /// Another VXLAN device has the network identifier and the port.
    #[error(
        "cannot make link {device}: another VXLAN device has VNI {vni} on UDP port {port}, as \
         Flannel's flannel.{vni} has (`ip -d link show type vxlan`); delete it, or give \
         net-conf.json another Backend.VNI or Port, the same on every node"
    )]
    VniTaken { device: DeviceName, vni: u32, port: u16, source: io::Error },
    /// The tables of a VXLAN device could not be read.
    #[error("cannot read the neighbours of {device}{}", hint(source))]
    ReadTables { device: DeviceName, source: io::Error },
    /// An entry of a VXLAN device's tables could not be set.
    #[error("cannot set {}{}", entry_of(*device, *entry), hint(source))]
    PutEntry { device: DeviceName, entry: VtepEntry, source: io::Error },
    /// An entry of a VXLAN device's tables could not be removed.
    #[error("cannot delete {}{}", entry_of(*device, *entry), hint(source))]
    DeleteEntry { device: DeviceName, entry: VtepEntry, source: io::Error },
    /// The userspace device's program could not be started.
    #[error("cannot start `{program} tunnel {device}`{}", hint(source))]
    StartTunnel { device: DeviceName, program: String, source: io::Error },
    /// The userspace device's program failed.
    #[error("`gambeson tunnel {device}` failed with {status}: {message}")]
    Tunnel { device: DeviceName, status: ExitStatus, message: String },
    /// The userspace device's program did not get ready.
    #[error("`gambeson tunnel {device}` did not get ready within {seconds} s and was ended")]
    TunnelHangs { device: DeviceName, seconds: u64 },
    /// A link could not be removed.
    #[error("cannot delete link {device}{}", hint(source))]
    DeleteLink { device: DeviceName, source: io::Error },
    /// A link could not be given our alias.
    #[error("cannot set the alias of {device} to `gambeson`{}", hint(source))]
    MarkLink { device: DeviceName, source: io::Error },
    /// An MTU was refused.
    #[error("cannot set the MTU of {device} to {mtu}{}", hint(source))]
    SetMtu { device: DeviceName, mtu: u32, source: io::Error },
    /// A supervisor did not start, or end, the process of a userspace device.
    #[error("cannot have {device} served")]
    Supervisor { device: DeviceName, source: AskError },
    /// A link did not come up.
    #[error("cannot bring {device} up{}", hint(source))]
    SetUp { device: DeviceName, source: io::Error },
    /// Kernel WireGuard binds its UDP port when the link comes up.
    #[error(
        "UDP port {port} of {device} is taken by another program; find it with `ss -lunp sport = \
         :{port}` or choose another base port"
    )]
    PortTaken { device: DeviceName, port: u16, source: io::Error },
    /// Addresses could not be read.
    #[error("cannot read the addresses of {link}{}", hint(source))]
    ReadAddresses { link: String, source: io::Error },
    /// An address could not be added.
    #[error("cannot add address {address} to {device}{}", address_hint(*address, source))]
    AddAddress { device: DeviceName, address: IpNet, source: io::Error },
    /// An address could not be removed.
    #[error("cannot remove address {address} from {device}{}", hint(source))]
    DeleteAddress { device: DeviceName, address: IpNet, source: io::Error },
    /// Routes could not be read.
    #[error("cannot read the routing table{}", hint(source))]
    ReadRoutes { source: io::Error },
    /// A route could not be added or replaced.
    #[error("cannot add route {} metric {}{}", .key.destination, .key.metric, hint(source))]
    PutRoute { key: RouteKey, source: io::Error },
    /// Somebody else has a route with this destination and metric.
    #[error(
        "route {} metric {} exists and was not made by gambeson (protocol {protocol}); it is left \
         alone, delete it (`ip route delete {} metric {}`)",
        .key.destination, .key.metric, .key.destination, .key.metric
    )]
    ForeignRoute { key: RouteKey, protocol: u8 },
    /// A route could not be removed.
    #[error("cannot delete route {} metric {}{}", .key.destination, .key.metric, hint(source))]
    DeleteRoute { key: RouteKey, source: io::Error },
    /// Policy routing rules could not be read.
    #[error("cannot read the policy routing rules{}", hint(source))]
    ReadRules { source: io::Error },
    /// A policy routing rule could not be added.
    #[error(
        "cannot add the policy routing rule {} to {}{}",
        .rule.step.priority(), .rule.destination, hint(source)
    )]
    AddRule { rule: Rule, source: io::Error },
    /// A policy routing rule could not be removed.
    #[error(
        "cannot delete the policy routing rule {} to {}{}",
        .rule.step.priority(), .rule.destination, hint(source)
    )]
    DeleteRule { rule: Rule, source: io::Error },
    /// A kernel setting could not be read.
    #[error("cannot read {}{}", path.display(), hint(source))]
    ReadSysctl { path: PathBuf, source: io::Error },
    /// A kernel setting could not be written.
    #[error("cannot set {} to {value}{}", path.display(), sysctl_hint(source))]
    WriteSysctl { path: PathBuf, value: String, source: io::Error },
    /// The program `nft` could not be run.
    #[error("cannot run `nft`{}", nft_hint(source))]
    StartNft { source: io::Error },
    /// `nft` refused something.
    #[error("`nft` failed to {operation}{}{}: {message}", denied_hint(message), kernel_hint())]
    Nft { operation: &'static str, message: String },
    /// `nft` did not end.
    #[error("`nft` did not {operation} within {seconds} s and was ended; see what holds it up")]
    NftHangs { operation: &'static str, seconds: u64 },
    /// What `nft` printed is not what it documents.
    #[error("cannot understand what `nft` printed for table inet gambeson")]
    ParseNft { source: serde_json::Error },
    /// The kernel does not say how often its ruleset was changed.
    #[error("cannot read the generation of the nftables ruleset{}", hint(source))]
    ReadGeneration { source: io::Error },
    /// Somebody else changes the ruleset all the time.
    #[error(
        "table inet gambeson was written, but other programs changed the nftables ruleset at the \
         same time, {attempts} times in a row, so that it is not known to be whole; `nft monitor` \
         shows who"
    )]
    Disturbed { attempts: usize },
    /// The guard's counters are not there.
    #[error("table inet gambeson has no counter {name}; it is made again in the next pass")]
    NoCounter { name: &'static str },
    /// A link name that has a meaning of its own in a ruleset.
    #[error("link name {name:?} cannot be used in firewall rules; rename the link")]
    LinkName { name: String },
    /// A device's private key is not in the key store.
    #[error("device {device} needs the key of generation {generation}, which is not in the store")]
    NoKey { device: DeviceName, generation: Generation },
    /// A WireGuard device could not be read.
    #[error("cannot read the WireGuard state of {device}{}", hint(source))]
    ReadWireGuard { device: DeviceName, source: io::Error },
    /// A WireGuard device could not be changed.
    #[error("cannot configure WireGuard on {device}{}", hint(source))]
    ConfigureWireGuard { device: DeviceName, source: io::Error },
    /// Kernel events cannot be subscribed to.
    #[error("cannot subscribe to {what} events of the kernel{}", hint(source))]
    Subscribe { what: &'static str, source: io::Error },
    /// The event socket failed.
    #[error("cannot read events of the kernel")]
    Events { source: io::Error },
}

impl ApplyError {
    /// The exit code for an agent that cannot go on without what failed, or `None` when
    /// another pass may succeed.
    pub fn exit(&self) -> Option<Exit> {
        match self {
            Self::PortTaken { .. } => Some(Exit::PortTaken),
            Self::ForeignLink { .. } => Some(Exit::ForeignDevice),
            Self::Tunnel { status, .. } => tunnel_exit(*status),
            Self::Connect { source }
            | Self::AddLink { source, .. }
            | Self::MarkLink { source, .. }
            | Self::DeleteLink { source, .. }
            | Self::SetMtu { source, .. }
            | Self::SetUp { source, .. }
            | Self::AddAddress { source, .. }
            | Self::DeleteAddress { source, .. }
            | Self::PutRoute { source, .. }
            | Self::DeleteRoute { source, .. }
            | Self::AddRule { source, .. }
            | Self::DeleteRule { source, .. }
            | Self::ReadWireGuard { source, .. }
            | Self::ConfigureWireGuard { source, .. }
            | Self::PutEntry { source, .. }
            | Self::DeleteEntry { source, .. }
            | Self::Subscribe { source, .. }
            | Self::ReadGeneration { source }
                if is_denied(source) =>
            {
                Some(Exit::NoPermission)
            }
            Self::Nft { message, .. } if message.contains(DENIED) => Some(Exit::NoPermission),
            _ => None,
        }
    }
}

/// The exit codes of `gambeson tunnel` that tell what to do.
fn tunnel_exit(status: ExitStatus) -> Option<Exit> {
    [Exit::PortTaken, Exit::NoTun, Exit::NoPermission, Exit::ForeignDevice]
        .into_iter()
        .find(|exit| Some(*exit as i32) == status.code())
}

/// How `nft` reports a missing capability.
const DENIED: &str = "Operation not permitted";
const CAPABILITY: &str =
    " (needs the capability CAP_NET_ADMIN: run as root, or add NET_ADMIN to the container)";

fn denied_hint(message: &str) -> &'static str {
    if message.contains(DENIED) { CAPABILITY } else { "" }
}

/// What the guard uses of nf_tables is in kernels from this one on.
const OLDEST_KERNEL: (u32, u32) = (5, 13);

fn kernel_hint() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease");
    release.map(|release| hint_for_release(release.trim())).unwrap_or_default()
}

fn hint_for_release(release: &str) -> String {
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse().ok());
    let (major, minor) = OLDEST_KERNEL;
    match (numbers.next(), numbers.next()) {
        (Some(first), Some(second)) if (first, second) < OLDEST_KERNEL => {
            format!(" (this kernel is {release}; the guard needs {major}.{minor} or newer)")
        }
        _ => String::new(),
    }
}

fn is_denied(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::EPERM)
}

/// What an operator can do about an errno of the kernel.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(nix::libc::EPERM) => CAPABILITY,
        Some(nix::libc::EOPNOTSUPP) => " (not supported by this kernel)",
        _ => "",
    }
}

fn entry_of(device: DeviceName, entry: VtepEntry) -> String {
    match entry {
        VtepEntry::Neighbour { gateway, .. } => format!("the neighbour {gateway} of {device}"),
        VtepEntry::Forwarding { mac, .. } => format!("where {device} sends what is for {mac}"),
    }
}

fn address_hint(address: IpNet, error: &io::Error) -> &'static str {
    match (address, error.raw_os_error()) {
        (IpNet::V6(_), Some(nix::libc::EACCES | nix::libc::EPERM)) => {
            " (IPv6 may be disabled: see the sysctl net.ipv6.conf.<device>.disable_ipv6; else the \
             capability CAP_NET_ADMIN is missing)"
        }
        (IpNet::V6(_), Some(nix::libc::EOPNOTSUPP | nix::libc::EAFNOSUPPORT)) => {
            " (this kernel has IPv6 switched off)"
        }
        _ => hint(error),
    }
}

fn sysctl_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            " (run as root; in a container mount the host's /proc/sys/net at /host/proc/sys/net, give \
             --proc-sys /host/proc/sys, and have no AppArmor profile that denies it)"
        }
        _ => "",
    }
}

fn nft_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => " (install the package nftables)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_kernel_is_named_where_nft_fails() {
        for old in ["4.18.0-553.el8_10.x86_64", "5.12.19", "5.4.0-200-generic"] {
            let said = hint_for_release(old);
            assert!(said.contains(old) && said.contains("5.13 or newer"), "{said}");
        }
        for new in ["5.13.0", "6.1.0-40-amd64", "10.0.1", "unknown", ""] {
            assert_eq!(hint_for_release(new), "", "{new}");
        }
    }
}
