//! Forwarded packets that somebody else's firewall drops by policy, as Docker's does.
//!
//! A verdict of ours in a table of our own cannot override a later drop. In the tables of
//! iptables-nft (`ip filter`, `ip6 filter`) rules of ours can, as Flannel adds them:
//!
//! ```text
//! FORWARD (policy drop) -> jump GAMBESON-FWD -> to or from the cluster networks: accept
//! ```

use std::collections::BTreeSet;
use std::fmt::Write as _;

use gambeson_mesh::observed::ForwardDrop;
use ipnet::IpNet;
use serde_json::{Value, json};

use super::{objects, query, run};
use crate::apply::ApplyError;

/// The chain of iptables-nft for forwarded packets, and its table.
const TABLE: &str = "filter";
const FORWARD: &str = "FORWARD";
/// Our chain beside it.
const OURS: &str = "GAMBESON-FWD";

/// The base chains that drop the cluster networks' forwarded packets by policy, without rules
/// of ours that accept them before.
pub(in crate::apply) async fn observe(
    networks: &BTreeSet<IpNet>,
) -> Result<BTreeSet<ForwardDrop>, ApplyError> {
    let chains = query(&["-j", "list", "chains"]).await?.unwrap_or_default();
    let mut drops = BTreeSet::new();
    for chain in objects(&chains).filter(|(kind, _)| *kind == "chain").map(|(_, chain)| chain) {
        let text = |key: &str| chain[key].as_str().unwrap_or_default().to_owned();
        let drop =
            ForwardDrop { family: text("family"), table: text("table"), chain: text("name") };
        let drops_all = text("hook") == "forward" && text("policy") == "drop";
        if drops_all && concerns(&drop, networks) && !is_accepted(&drop, networks).await? {
            drops.insert(drop);
        }
    }
    Ok(drops)
}

/// Adds the rules that accept the cluster networks' packets.
pub(in crate::apply) async fn accept(
    drop: &ForwardDrop,
    networks: &BTreeSet<IpNet>,
) -> Result<(), ApplyError> {
    let family = &drop.family;
    let mut text =
        format!("add chain {family} {TABLE} {OURS}\nflush chain {family} {TABLE} {OURS}\n");
    if !list(family, FORWARD).await?.is_some_and(|forward| jumps(&forward)) {
        let _ = writeln!(text, "insert rule {family} {TABLE} {FORWARD} counter jump {OURS}");
    }
    for (end, network) in matches(family, networks) {
        let _ = writeln!(
            text,
            "add rule {family} {TABLE} {OURS} {family} {end} {network} counter accept"
        );
    }
    run(&["-f", "-"], Some(&text), "accept forwarded packets in table filter").await.map(|_| ())
}

/// Removes our chains and what leads to them, and names them.
pub(in crate::apply) async fn remove() -> Result<Vec<String>, ApplyError> {
    remove_chain(TABLE, FORWARD, OURS).await
}

/// Removes what Flannel leaves in the firewall: its tables, or its chains of iptables-nft.
pub(in crate::apply) async fn remove_flannel() -> Result<Vec<String>, ApplyError> {
    let mut removed = remove_chain(TABLE, FORWARD, "FLANNEL-FWD").await?;
    removed.extend(remove_chain("nat", "POSTROUTING", "FLANNEL-POSTRTG").await?);
    for (family, table) in [("ip", "flannel-ipv4"), ("ip6", "flannel-ipv6")] {
        if query(&["-j", "list", "table", family, table]).await?.is_some() {
            run(&["delete", "table", family, table], None, "delete Flannel's table").await?;
            removed.push(format!("table {family} {table}"));
        }
    }
    Ok(removed)
}

/// Removes a chain from a table of iptables-nft, of both families, and what leads to it from
/// `base`. Gives what was there.
async fn remove_chain(table: &str, base: &str, chain: &str) -> Result<Vec<String>, ApplyError> {
    let mut removed = Vec::new();
    for family in ["ip", "ip6"] {
        let list = async |chain| query(&["-j", "list", "chain", family, table, chain]).await;
        if list(chain).await?.is_none() {
            continue;
        }
        let mut text = String::new();
        if let Some(listing) = list(base).await? {
            let rules = objects(&listing).filter(|(kind, _)| *kind == "rule");
            let jumps = rules.filter(|(_, rule)| jumps_to(rule, chain));
            for handle in jumps.filter_map(|(_, rule)| rule["handle"].as_u64()) {
                let _ = writeln!(text, "delete rule {family} {table} {base} handle {handle}");
            }
        }
        let _ = writeln!(text, "flush chain {family} {table} {chain}");
        let _ = writeln!(text, "delete chain {family} {table} {chain}");
        run(&["-f", "-"], Some(&text), "remove a chain of iptables").await?;
        removed.push(format!("chain {family} {table} {chain}"));
    }
    Ok(removed)
}

fn concerns(drop: &ForwardDrop, networks: &BTreeSet<IpNet>) -> bool {
    let has = |v4: bool| networks.iter().any(|network| network.addr().is_ipv4() == v4);
    match drop.family.as_str() {
        "ip" => has(true),
        "ip6" => has(false),
        "inet" => true,
        _ => false,
    }
}

/// What our rules match in a family, in order.
fn matches<'a>(
    family: &str,
    networks: &'a BTreeSet<IpNet>,
) -> impl Iterator<Item = (&'static str, &'a IpNet)> {
    let v4 = family == "ip";
    let of_family = networks.iter().filter(move |network| network.addr().is_ipv4() == v4);
    of_family.flat_map(|network| ["saddr", "daddr"].map(|end| (end, network)))
}

async fn is_accepted(drop: &ForwardDrop, networks: &BTreeSet<IpNet>) -> Result<bool, ApplyError> {
    if !drop.is_of_iptables() {
        return Ok(false);
    }
    let family = &drop.family;
    let (Some(forward), Some(ours)) = (list(family, FORWARD).await?, list(family, OURS).await?)
    else {
        return Ok(false);
    };
    let wanted: Vec<_> = matches(&drop.family, networks)
        .map(|(end, network)| {
            json!({"match": {
                "op": "==",
                "left": {"payload": {"protocol": drop.family, "field": end}},
                "right": {"prefix": {"addr": network.network(), "len": network.prefix_len()}},
            }})
        })
        .collect();
    let accept = json!({"accept": null});
    let wanted: Vec<[&Value; 2]> = wanted.iter().map(|found| [found, &accept]).collect();
    Ok(jumps(&forward) && rules(&ours) == wanted)
}

async fn list(family: &str, chain: &str) -> Result<Option<Value>, ApplyError> {
    query(&["-j", "list", "chain", family, TABLE, chain]).await
}

/// Whether a listed chain sends everything through ours.
fn jumps(listing: &Value) -> bool {
    rules(listing).iter().any(|rule| *rule == [&json!({"jump": {"target": OURS}})])
}

/// Whether a rule leads to this chain, whatever it matches.
fn jumps_to(rule: &Value, chain: &str) -> bool {
    statements(rule).contains(&&json!({"jump": {"target": chain}}))
}

/// The statements of each rule in a listed chain, counters aside.
fn rules(listing: &Value) -> Vec<Vec<&Value>> {
    let rules = objects(listing).filter(|(kind, _)| *kind == "rule");
    rules.map(|(_, rule)| statements(rule)).collect()
}

fn statements(rule: &Value) -> Vec<&Value> {
    let statements = rule["expr"].as_array().map(Vec::as_slice).unwrap_or_default();
    statements.iter().filter(|statement| statement.get("counter").is_none()).collect()
}
