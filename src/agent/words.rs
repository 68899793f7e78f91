//! Plans and errors in words, for the log and the status.

use gambeson_mesh::desired::{RouteKey, VtepEntry};
use gambeson_mesh::observed::{ForeignRoute, ForwardDrop};
use gambeson_mesh::plan::{Action, Plan};
use gambeson_mesh::rotation::{Progress, Wait};

/// What of somebody else's is in the way, by name, with what helps. Devices with our names
/// are an error of their own.
pub(super) fn obstacles(plan: &Plan) -> impl Iterator<Item = String> {
    let blocked = plan.blocked.iter().map(|ForwardDrop { family, table, chain }| {
        format!(
            "the firewall chain {family} {table} {chain} drops what pods send to other nodes \
             (policy drop), which no rule of gambeson can prevent; accept the cluster networks in \
             it, or give --iptables-forward-rules=false if it does already"
        )
    });
    let overruled = plan.overruled.iter().map(|(foreign, ours)| {
        let ForeignRoute { key: RouteKey { destination, metric }, protocol, leads } = foreign;
        format!(
            "route {destination} metric {metric} ({leads}, protocol {protocol}) was not made by \
             gambeson and takes the packets to the pods in {ours}; it is left alone, delete it \
             (`ip route delete {destination} metric {metric}`)"
        )
    });
    blocked.chain(overruled)
}

/// Most peers that a message names.
pub(super) const NAMED: usize = 8;

/// Why the Node's condition says that it is blocked, while it is.
pub(super) fn blocked(progress: &Progress) -> String {
    let mut names: Vec<_> = progress
        .waiting
        .iter()
        .map(|(name, wait)| format!("{name} ({})", reason(*wait)))
        .take(NAMED)
        .collect();
    let more = progress.waiting.len().saturating_sub(NAMED);
    names.extend((more > 0).then(|| format!("{more} more")));
    format!(
        "key generation {} is still used by {}; see whether the agent there runs and reaches the \
         API server; the rotation goes on by itself when it does",
        progress.from,
        names.join(", ")
    )
}

/// What a peer has not done yet.
pub(super) fn reason(wait: Wait) -> &'static str {
    match wait {
        Wait::Handshake => "no handshake with the new key yet",
        Wait::Drain => "sends with the old key",
    }
}

/// A change in a few words, for the log.
pub(super) fn describe(action: &Action) -> String {
    match action {
        Action::SetRuleset(_) => "guard".to_owned(),
        Action::AcceptForwarded(drop) => format!("accept in {} {}", drop.family, drop.table),
        Action::SetSysctl(sysctl, value) => format!("{} = {value}", sysctl.path()),
        Action::AddLink { device, .. } => format!("+ link {device}"),
        Action::MarkLink(device) => format!("{device} alias"),
        Action::DeleteLink(device) => format!("- link {device}"),
        Action::SetLinkMtu { device, mtu } => format!("{device} mtu {mtu}"),
        Action::SetLinkUp(device) => format!("{device} up"),
        Action::AddAddress { device, address } => format!("+ {address} on {device}"),
        Action::DeleteAddress { device, address } => format!("- {address} on {device}"),
        Action::ConfigureWireGuard { device, change } => {
            let (set, removed) = (change.set_peers.len(), change.remove_peers.len());
            format!("{device} peers +{set} -{removed}")
        }
        Action::PutEntry { device, entry: VtepEntry::Neighbour { gateway, .. } } => {
            format!("+ {gateway} behind {device}")
        }
        Action::PutEntry { device, entry: VtepEntry::Forwarding { mac, node } } => {
            format!("+ {mac} at {node} on {device}")
        }
        Action::DeleteEntry { device, entry: VtepEntry::Neighbour { gateway, .. } } => {
            format!("- {gateway} behind {device}")
        }
        Action::DeleteEntry { device, entry: VtepEntry::Forwarding { mac, .. } } => {
            format!("- {mac} on {device}")
        }
        Action::PutRoute(key, _) => format!("+ route {}", key.destination),
        Action::DeleteRoute(key) => format!("- route {}", key.destination),
        Action::AddRule(rule) => format!("+ rule to {}", rule.destination),
        Action::DeleteRule(rule) => format!("- rule to {}", rule.destination),
    }
}

/// An error and its causes in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        cause = error.source();
    }
    text
}
