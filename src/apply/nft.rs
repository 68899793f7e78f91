//! Table `inet gambeson`: the fail-closed guard and masquerade, through the program `nft`.
//!
//! The table is written in one transaction that keeps the guard's counters. Whether it is
//! intact is decided by comparing what `nft` lists now with what it listed right after our
//! write: so a rule that somebody changed is noticed, in whatever way it was changed.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::process::Stdio;

use gambeson_mesh::desired::Ruleset;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::{ApplyError, generation};

/// What the guard has dropped since its table was first made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GuardDrops {
    /// Packets to the cluster networks that were about to leave in clear.
    pub out_packets: u64,
    /// Their bytes.
    pub out_bytes: u64,
    /// Packets from the cluster networks that arrived in clear.
    pub in_packets: u64,
    /// Their bytes.
    pub in_bytes: u64,
}

const TABLE: &str = "inet gambeson";
const OUT: &str = "guard_out";
const IN: &str = "guard_in";
/// `masquerade` itself is a word of nft's language.
const MASQUERADE: &str = "masquerading";
/// Packets that kube-proxy has marked for masquerading are its own business.
const KUBE_MARK: &str = "0x4000";

/// A ruleset as it was written, and how `nft` listed it right afterwards.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Written {
    pub(super) ruleset: Ruleset,
    listing: Value,
    /// The namespace's ruleset generation at which the table was seen to be intact.
    generation: Option<u32>,
}

/// Writes the ruleset and remembers how it is listed.
pub(super) async fn write(ruleset: &Ruleset) -> Result<Written, ApplyError> {
    let present = list().await?;
    let text = match &present {
        Some(listing) if !fits(ruleset, listing) => {
            render_over(ruleset, Some(drops_in(listing).unwrap_or_default()))?
        }
        _ => render(ruleset)?,
    };
    run(&["-f", "-"], Some(&text), "load table inet gambeson").await?;
    let generation = generation().await;
    let listing = list().await?.ok_or(ApplyError::NoCounter { name: OUT })?;
    Ok(Written { ruleset: ruleset.clone(), listing: normalised(listing), generation })
}

/// Whether the table still is exactly what was written.
pub(super) async fn is_intact(written: &mut Written) -> Result<bool, ApplyError> {
    // Read before the table: a change in between is seen the next time.
    let generation = generation().await;
    if generation.is_some() && generation == written.generation {
        return Ok(true);
    }
    let intact = list().await?.is_some_and(|listing| normalised(listing) == written.listing);
    written.generation = generation.filter(|_| intact);
    Ok(intact)
}

/// The ruleset's generation. Without it the table is listed each time.
async fn generation() -> Option<u32> {
    let number = generation::read().await;
    number.inspect_err(|error| tracing::debug!(%error, "no nftables generation")).ok()
}

/// Reads the guard's counters.
pub(super) async fn drops() -> Result<GuardDrops, ApplyError> {
    let Some(listing) = list_counters().await? else {
        return Err(ApplyError::NoCounter { name: OUT });
    };
    drops_in(&listing)
}

/// The transaction that makes the table, or brings one that was made by it to `ruleset`,
/// with its counters untouched.
pub(super) fn render(ruleset: &Ruleset) -> Result<String, ApplyError> {
    render_over(ruleset, None)
}

/// As [`render`]; with `restored`, the table is made from nothing, whatever it holds, and its
/// counters start from these values.
fn render_over(ruleset: &Ruleset, restored: Option<GuardDrops>) -> Result<String, ApplyError> {
    let chains = chains(ruleset)?;
    let mut text = format!("add table {TABLE}\n");
    let mut counters = [(OUT, String::new()), (IN, String::new())];
    if let Some(drops) = restored {
        let _ = writeln!(text, "delete table {TABLE}\nadd table {TABLE}");
        counters[0].1 = counter_value(drops.out_packets, drops.out_bytes);
        counters[1].1 = counter_value(drops.in_packets, drops.in_bytes);
    }
    for (name, value) in counters {
        let _ = writeln!(text, "add counter {TABLE} {name}{value}");
    }
    for chain in &chains {
        let name = chain.name;
        let _ = writeln!(text, "add chain {TABLE} {name} {{ {} }}", chain.hook);
        let _ = writeln!(text, "flush chain {TABLE} {name}");
        for rule in &chain.rules {
            let _ = writeln!(text, "add rule {TABLE} {name} {rule}");
        }
    }
    Ok(text)
}

fn counter_value(packets: u64, bytes: u64) -> String {
    format!(" {{ packets {packets} bytes {bytes} ; }}")
}

struct Chain {
    name: &'static str,
    hook: &'static str,
    rules: Vec<String>,
}

fn chains(ruleset: &Ruleset) -> Result<Vec<Chain>, ApplyError> {
    let networks = Networks::of(&ruleset.cluster_networks);
    let trusted = link_set(&ruleset.trusted_links)?;
    let untrusted =
        |key: &str| trusted.as_ref().map_or(String::new(), |s| format!("{key} != {s} "));
    let (out, inward) = (untrusted("oifname"), untrusted("iifname"));
    let mut chains = vec![
        Chain {
            name: OUT,
            // After every address translation: what is checked is what would be sent.
            hook: "type filter hook postrouting priority 300; policy accept;",
            rules: networks.each(|family, set| {
                format!("{out}{family} daddr {set} counter name \"{OUT}\" drop")
            }),
        },
        Chain {
            name: IN,
            // Before connection tracking: a spoofed packet leaves no entry.
            hook: "type filter hook prerouting priority -300; policy accept;",
            rules: networks.each(|family, set| {
                format!("{inward}{family} saddr {set} counter name \"{IN}\" drop")
            }),
        },
    ];
    if ruleset.masquerade {
        chains.push(Chain {
            name: MASQUERADE,
            hook: "type nat hook postrouting priority 100; policy accept;",
            rules: networks.each(|family, set| {
                let multicast = if family == "ip" { "224.0.0.0/4" } else { "ff00::/8" };
                format!(
                    "{out}{family} saddr {set} {family} daddr != {set} {family} daddr != \
                     {multicast} meta mark & {KUBE_MARK} != {KUBE_MARK} masquerade fully-random"
                )
            }),
        });
    }
    Ok(chains)
}

/// Cluster networks by family, as nft sets, neighbours joined: nft refuses overlaps.
struct Networks {
    v4: Vec<Ipv4Net>,
    v6: Vec<Ipv6Net>,
}

impl Networks {
    fn of(networks: &BTreeSet<IpNet>) -> Self {
        let mut split = Self { v4: Vec::new(), v6: Vec::new() };
        for network in networks {
            match network {
                IpNet::V4(v4) => split.v4.push(v4.trunc()),
                IpNet::V6(v6) => split.v6.push(v6.trunc()),
            }
        }
        Self { v4: Ipv4Net::aggregate(&split.v4), v6: Ipv6Net::aggregate(&split.v6) }
    }

    /// A rule for each family that has networks.
    fn each(&self, rule: impl Fn(&str, &str) -> String) -> Vec<String> {
        let sets = [("ip", set(&self.v4)), ("ip6", set(&self.v6))];
        sets.iter().filter_map(|(family, set)| Some(rule(family, set.as_deref()?))).collect()
    }
}

/// `{ a, b }`, or `None` for nothing, which nft does not take.
fn set(elements: &[impl ToString]) -> Option<String> {
    if elements.is_empty() {
        return None;
    }
    let texts: Vec<_> = elements.iter().map(ToString::to_string).collect();
    Some(format!("{{ {} }}", texts.join(", ")))
}

fn link_set(links: &BTreeSet<String>) -> Result<Option<String>, ApplyError> {
    let mut quoted = Vec::new();
    for name in links {
        // An asterisk would make it a pattern, a quote or newline another statement.
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '@' | ':');
        if name.is_empty() || name.len() > 15 || !name.chars().all(plain) {
            return Err(ApplyError::LinkName { name: name.clone() });
        }
        quoted.push(format!("\"{name}\""));
    }
    Ok(set(&quoted))
}

/// Whether a listed table has nothing beside what [`render`] makes, so that it can be brought
/// to `ruleset` without making it anew.
fn fits(ruleset: &Ruleset, listing: &Value) -> bool {
    let expected = [
        (OUT, "filter", "postrouting", 300),
        (IN, "filter", "prerouting", -300),
        (MASQUERADE, "nat", "postrouting", 100),
    ];
    let mut objects = objects(listing);
    objects.all(|(kind, object)| {
        let name = object["name"].as_str().unwrap_or_default();
        match kind {
            "metainfo" | "rule" => true,
            "table" => object["flags"].is_null(),
            "counter" => name == OUT || name == IN,
            "chain" => {
                (name != MASQUERADE || ruleset.masquerade)
                    && object["policy"] == "accept"
                    && expected.iter().any(|(chain, r#type, hook, priority)| {
                        name == *chain
                            && object["type"] == **r#type
                            && object["hook"] == **hook
                            && object["prio"] == *priority
                    })
            }
            _ => false,
        }
    })
}

fn objects(listing: &Value) -> impl Iterator<Item = (&str, &Value)> {
    let list = listing["nftables"].as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter().filter_map(Value::as_object).flatten().map(|(kind, object)| (kind.as_str(), object))
}

fn drops_in(listing: &Value) -> Result<GuardDrops, ApplyError> {
    let value = |name: &'static str| {
        objects(listing)
            .find(|(kind, object)| *kind == "counter" && object["name"] == *name)
            .and_then(|(_, c)| Some((c["packets"].as_u64()?, c["bytes"].as_u64()?)))
            .ok_or(ApplyError::NoCounter { name })
    };
    let (out_packets, out_bytes) = value(OUT)?;
    let (in_packets, in_bytes) = value(IN)?;
    Ok(GuardDrops { out_packets, out_bytes, in_packets, in_bytes })
}

/// A listing without what changes by itself: handles, counter values and the version line.
fn normalised(mut listing: Value) -> Value {
    fn strip(value: &mut Value) {
        match value {
            Value::Object(map) => {
                for volatile in ["handle", "packets", "bytes", "metainfo"] {
                    map.remove(volatile);
                }
                map.values_mut().for_each(strip);
            }
            Value::Array(list) => list.iter_mut().for_each(strip),
            _ => {}
        }
    }
    strip(&mut listing);
    listing
}

/// The table as `nft -j` lists it, or `None` when it does not exist.
async fn list() -> Result<Option<Value>, ApplyError> {
    query(&["-j", "list", "table", "inet", "gambeson"]).await
}

async fn list_counters() -> Result<Option<Value>, ApplyError> {
    query(&["-j", "list", "counters", "table", "inet", "gambeson"]).await
}

async fn query(arguments: &[&str]) -> Result<Option<Value>, ApplyError> {
    match run(arguments, None, "list table inet gambeson").await {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|source| ApplyError::ParseNft { source }),
        Err(ApplyError::Nft { message, .. }) if message.contains("No such file or directory") => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

async fn run(
    arguments: &[&str],
    input: Option<&str>,
    operation: &'static str,
) -> Result<Vec<u8>, ApplyError> {
    let failed = |source| ApplyError::StartNft { source };
    let mut child = Command::new("nft")
        .args(arguments)
        // Its messages are compared above.
        .env("LC_ALL", "C")
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    if let (Some(text), Some(mut stdin)) = (input, child.stdin.take()) {
        // When nft ends before it has read everything, its own message says why.
        if let Err(error) = stdin.write_all(text.as_bytes()).await {
            tracing::debug!(%error, "nft did not read its input");
        }
    }
    let output = child.wait_with_output().await.map_err(failed)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    // The rest of it repeats the rule and underlines it.
    let message = String::from_utf8_lossy(&output.stderr);
    let message = message.lines().next().unwrap_or("no message").to_owned();
    Err(ApplyError::Nft { operation, message })
}
