//! What a value of an option has to be.

use std::collections::BTreeSet;
use std::net::IpAddr;

use gambeson_mesh::node::{Transport, overlap};
use ipnet::IpNet;

/// Longest name of a Linux network interface in bytes (`IFNAMSIZ` less the final NUL).
const INTERFACE_NAME_MAX: usize = 15;

/// An option with a value that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{option}: {problem}; {remedy}")]
pub struct ConfigError {
    option: &'static str,
    problem: String,
    remedy: &'static str,
}

pub(super) fn invalid(option: &'static str, problem: String, remedy: &'static str) -> ConfigError {
    ConfigError { option, problem, remedy }
}

pub(super) fn parse<T: std::str::FromStr>(
    option: &'static str,
    value: &str,
    remedy: &'static str,
) -> Result<T, ConfigError> {
    value.parse().map_err(|_| invalid(option, format!("\"{value}\" cannot be used"), remedy))
}

pub(super) fn can_be_sent_to(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || broadcast)
}

pub(super) fn cluster_networks(given: &[String]) -> Result<BTreeSet<IpNet>, ConfigError> {
    const OPTION: &str = "--cluster-cidr";
    const REMEDY: &str = "give the cluster's pod networks, for example 10.244.0.0/16 or \
                          10.244.0.0/16,fd00:10:244::/48";
    let mut networks = BTreeSet::new();
    for text in given.iter().map(|t| t.trim()).filter(|t| !t.is_empty()) {
        let network: IpNet = parse(OPTION, text, REMEDY)?;
        if network.prefix_len() == 0 {
            return Err(invalid(OPTION, format!("{text} is every address"), REMEDY));
        }
        if let Some(what) = never_for_pods(&network) {
            return Err(invalid(OPTION, format!("{text} overlaps {what}"), REMEDY));
        }
        if network.trunc() != network {
            let problem = format!("{text} has host bits set, the network is {}", network.trunc());
            return Err(invalid(OPTION, problem, REMEDY));
        }
        networks.insert(network);
    }
    let v4 = networks.iter().filter(|n| matches!(n, IpNet::V4(_))).count();
    let v6 = networks.len() - v4;
    if networks.is_empty() {
        return Err(invalid(OPTION, "not given".to_owned(), REMEDY));
    }
    if v4 > 1 || v6 > 1 {
        return Err(invalid(OPTION, "more than one network of a family".to_owned(), REMEDY));
    }
    Ok(networks)
}

/// Addresses that mean something else on every host, if the network has any.
fn never_for_pods(network: &IpNet) -> Option<&'static str> {
    let reserved = [
        ("0.0.0.0/8", "the unspecified addresses (0.0.0.0/8)"),
        ("127.0.0.0/8", "the loopback network (127.0.0.0/8)"),
        ("169.254.0.0/16", "the link-local network (169.254.0.0/16)"),
        ("224.0.0.0/3", "multicast and reserved addresses (224.0.0.0/3)"),
        ("::/127", "the loopback address (::1)"),
        ("fe80::/10", "the link-local network (fe80::/10)"),
        ("ff00::/8", "multicast addresses (ff00::/8)"),
    ];
    let overlaps = |text: &str| text.parse().is_ok_and(|other| overlap(&other, network));
    reserved.into_iter().find(|(text, _)| overlaps(text)).map(|(_, what)| what)
}

pub(super) fn transports(given: &[String]) -> Result<BTreeSet<Transport>, ConfigError> {
    const OPTION: &str = "--transports";
    const REMEDY: &str = "give wireguard, host-gw, vxlan, or several of them";
    let mut transports = BTreeSet::new();
    for text in given.iter().map(|t| t.trim()).filter(|t| !t.is_empty()) {
        let unknown = || invalid(OPTION, format!("unknown transport \"{text}\""), REMEDY);
        transports.insert(Transport::parse(text).ok_or_else(unknown)?);
    }
    if transports.is_empty() {
        return Err(invalid(OPTION, "empty".to_owned(), REMEDY));
    }
    Ok(transports)
}

/// A DNS-1123 subdomain: what names a Node, a pod, a namespace and an annotation's prefix.
fn is_dns_subdomain(name: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    name.len() <= 253
        && name.split('.').all(|label| {
            let bytes = label.as_bytes();
            bytes.first().is_some_and(|b| alphanumeric(*b))
                && bytes.last().is_some_and(|b| alphanumeric(*b))
                && bytes.iter().all(|b| alphanumeric(*b) || *b == b'-')
        })
}

pub(super) fn checked_node_name(option: &'static str, name: String) -> Result<String, ConfigError> {
    if is_dns_subdomain(&name) {
        return Ok(name);
    }
    let problem = format!("\"{name}\" cannot be the name of a Kubernetes object");
    Err(invalid(option, problem, "give the name as `kubectl get nodes` shows it"))
}

pub(super) fn check_prefix(prefix: &str) -> Result<(), ConfigError> {
    // "config." is put before it, and the whole may have 253 characters.
    if is_dns_subdomain(prefix) && prefix.contains('.') && prefix.len() <= 246 {
        return Ok(());
    }
    let problem = format!("\"{prefix}\" is not a domain");
    Err(invalid("--annotation-prefix", problem, "give one such as gambeson.io"))
}

pub(crate) fn check_interface_name(option: &'static str, name: &str) -> Result<(), ConfigError> {
    let fits = (1..=INTERFACE_NAME_MAX).contains(&name.len()) && name != "." && name != "..";
    let clean = name.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'"'));
    if fits && clean {
        return Ok(());
    }
    let problem = format!("\"{name}\" cannot be the name of a network interface");
    Err(invalid(option, problem, "give up to 15 characters, for example cni0"))
}
