//! Policy routing rules of ours (protocol 151), both families.

use std::collections::BTreeSet;
use std::io;

use gambeson_mesh::desired::{ROUTE_PROTOCOL, Rule, RuleStep};
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::route::{RouteHeader, RouteProtocol};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{EAFNOSUPPORT, EEXIST, ENOENT, EOPNOTSUPP};

use super::ApplyError;
use super::netlink::{Netlink, family_of};

/// Reads our rules. A rule with our protocol number that is none that we make is left out.
pub(super) async fn observe(netlink: &mut Netlink) -> Result<BTreeSet<Rule>, ApplyError> {
    let mut rules = BTreeSet::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RuleMessage::default();
        request.header.family = family;
        let replies = match netlink.dump(RouteNetlinkMessage::GetRule(request)).await {
            Ok(replies) => replies,
            // Without the family, or without rules at all, adding one tells so.
            Err(error) if is_unsupported(&error) => continue,
            Err(source) => return Err(ApplyError::ReadRules { source }),
        };
        rules.extend(replies.iter().filter_map(|reply| match reply {
            RouteNetlinkMessage::NewRule(message) if message.header.family == family => {
                rule_of(message)
            }
            _ => None,
        }));
    }
    Ok(rules)
}

/// Adds a rule. One that is there already is success.
pub(super) async fn add(netlink: &mut Netlink, rule: Rule) -> Result<(), ApplyError> {
    let message = RouteNetlinkMessage::NewRule(message(rule));
    match netlink.change(message, NLM_F_CREATE | NLM_F_EXCL).await {
        Err(error) if error.raw_os_error() == Some(EEXIST) => Ok(()),
        result => result.map_err(|source| ApplyError::AddRule { rule, source }),
    }
}

/// Removes a rule of ours. One that is gone already is success.
pub(super) async fn delete(netlink: &mut Netlink, rule: Rule) -> Result<(), ApplyError> {
    match netlink.change(RouteNetlinkMessage::DelRule(message(rule)), 0).await {
        Err(error) if error.raw_os_error() == Some(ENOENT) => Ok(()),
        result => result.map_err(|source| ApplyError::DeleteRule { rule, source }),
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(EAFNOSUPPORT | EOPNOTSUPP))
}

fn message(rule: Rule) -> RuleMessage {
    let Rule { destination, step } = rule;
    let mut message = RuleMessage::default();
    message.header.family = family_of(destination.addr());
    message.header.dst_len = destination.prefix_len();
    message.attributes = vec![
        RuleAttribute::Destination(destination.network()),
        RuleAttribute::Priority(step.priority()),
        RuleAttribute::Protocol(RouteProtocol::Other(ROUTE_PROTOCOL)),
    ];
    match step {
        RuleStep::MoreSpecific => {
            message.header.action = RuleAction::ToTable;
            message.header.table = RouteHeader::RT_TABLE_MAIN;
            let length = u32::from(destination.prefix_len());
            message.attributes.push(RuleAttribute::SuppressPrefixLen(length));
        }
        RuleStep::Unreachable => message.header.action = RuleAction::Unreachable,
    }
    message
}

/// The rule of ours that a message describes, to the last attribute.
fn rule_of(found: &RuleMessage) -> Option<Rule> {
    let destination = found.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Destination(address) => IpNet::new(*address, found.header.dst_len).ok(),
        _ => None,
    })?;
    let rules = RuleStep::ALL.map(|step| Rule { destination, step });
    rules.into_iter().find(|rule| {
        let ours = message(*rule);
        let header = (found.header.action, found.header.src_len, found.header.flags.bits());
        header == (ours.header.action, 0, 0)
            && ours.attributes.iter().all(|attribute| found.attributes.contains(attribute))
    })
}
