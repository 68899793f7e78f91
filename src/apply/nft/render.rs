//! A ruleset as text for `nft`, the same for the same ruleset.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use gambeson_mesh::desired::Ruleset;
use gambeson_mesh::family::Family;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::Value;

use super::{GuardDrops, objects};
use crate::apply::ApplyError;

const TABLE: &str = "inet gambeson";
/// Chain and counter of packets that would leave.
pub(crate) const OUT: &str = "guard_out";
/// Chain and counter of packets that arrive.
pub(super) const IN: &str = "guard_in";
/// `masquerade` itself is a word of nft's language.
const MASQUERADE: &str = "masquerading";
/// Packets that kube-proxy has marked for masquerading are its own business.
const KUBE_MARK: &str = "0x4000";

/// The transaction that makes the table, or brings one that was made by it to `ruleset`,
/// with its counters untouched.
pub(super) fn render(ruleset: &Ruleset) -> Result<String, ApplyError> {
    transaction(ruleset, None)
}

/// The transaction that makes the table from nothing, whatever it holds, with counters that
/// start from these values.
pub(super) fn render_anew(ruleset: &Ruleset, drops: GuardDrops) -> Result<String, ApplyError> {
    transaction(ruleset, Some(drops))
}

fn transaction(ruleset: &Ruleset, restored: Option<GuardDrops>) -> Result<String, ApplyError> {
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
    // With masquerade, what still has a pod's source is what connection tracking did not take
    // for a part of any connection, and so would leave in clear under the pod's name.
    let masqueraded = |family: &str| {
        ruleset.masquerade.contains(if family == "ip" { &Family::V4 } else { &Family::V6 })
    };
    let plaintext = plaintext(&ruleset.plaintext)?;
    // What another node allows as well passes; with masquerade it has a pod's source.
    let allowed = |key: &'static str, end: &'static str| {
        plaintext.iter().flat_map(move |(link, networks)| {
            let matches = by_length(networks, end).into_iter();
            matches.map(move |matched| format!("{key} {link} {matched} accept"))
        })
    };
    let mut chains = vec![
        Chain {
            name: OUT,
            // After every address translation: what is checked is what would be sent.
            hook: "type filter hook postrouting priority 300; policy accept;",
            rules: allowed("oifname", "daddr")
                .chain(["daddr", "saddr"].iter().flat_map(|end| {
                    networks.each(|family, set| {
                        let stopped = *end == "daddr" || masqueraded(family);
                        let rule = format!("{out}{family} {end} {set} counter name \"{OUT}\" drop");
                        stopped.then_some(rule)
                    })
                }))
                .collect(),
        },
        Chain {
            name: IN,
            // Before connection tracking: a spoofed packet leaves no entry.
            hook: "type filter hook prerouting priority -300; policy accept;",
            rules: allowed("iifname", "saddr")
                .chain(networks.each(|family, set| {
                    Some(format!("{inward}{family} saddr {set} counter name \"{IN}\" drop"))
                }))
                .collect(),
        },
    ];
    if !ruleset.masquerade.is_empty() {
        chains.push(Chain {
            name: MASQUERADE,
            hook: "type nat hook postrouting priority 100; policy accept;",
            rules: networks.each(|family, set| {
                let multicast = if family == "ip" { "224.0.0.0/4" } else { "ff00::/8" };
                let rule = format!(
                    "{out}{family} saddr {set} {family} daddr != {set} {family} daddr != \
                     {multicast} meta mark & {KUBE_MARK} != {KUBE_MARK} masquerade fully-random"
                );
                masqueraded(family).then_some(rule)
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

    /// A rule for each family that has networks, if it needs one.
    fn each(&self, rule: impl Fn(&str, &str) -> Option<String>) -> Vec<String> {
        let sets = [("ip", set(&self.v4)), ("ip6", set(&self.v6))];
        sets.iter().filter_map(|(family, set)| rule(family, set.as_deref()?)).collect()
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
    let quoted: Vec<_> = links.iter().map(|name| quoted(name)).collect::<Result<_, _>>()?;
    Ok(set(&quoted))
}

fn quoted(name: &str) -> Result<String, ApplyError> {
    // An asterisk would make it a pattern, a quote or newline another statement.
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '@' | ':');
    if name.is_empty() || name.len() > 15 || !name.chars().all(plain) {
        return Err(ApplyError::LinkName { name: name.to_owned() });
    }
    Ok(format!("\"{name}\""))
}

/// Networks by quoted link.
fn plaintext(
    plaintext: &BTreeMap<String, BTreeSet<IpNet>>,
) -> Result<Vec<(String, &BTreeSet<IpNet>)>, ApplyError> {
    plaintext.iter().map(|(link, networks)| Ok((quoted(link)?, networks))).collect()
}

/// What matches packets with one end in these networks: a set of plain values for each length of
/// prefix. A set of intervals would be shorter, but is empty for some microseconds in every
/// transaction (measured with Linux 6.18), and a packet that may pass would be dropped.
fn by_length(networks: &BTreeSet<IpNet>, end: &str) -> Vec<String> {
    let mut groups: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for network in networks {
        let family = if network.addr().is_ipv4() { "ip" } else { "ip6" };
        let group = groups.entry((family, network.netmask())).or_default();
        group.push(network.network().to_string());
    }
    let matched = |((family, mask), group): (_, Vec<String>)| {
        format!("{family} {end} & {mask} {{ {} }}", group.join(", "))
    };
    groups.into_iter().map(matched).collect()
}

/// Whether a listed table has nothing beside what [`render`] makes, so that it can be brought
/// to `ruleset` without making it anew.
pub(super) fn fits(ruleset: &Ruleset, listing: &Value) -> bool {
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
                (name != MASQUERADE || !ruleset.masquerade.is_empty())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn ruleset() -> Ruleset {
        let networks = ["10.244.0.0/16", "fd00:10:244::/48"];
        let links = ["cni0", "gambeson0", "lo"];
        Ruleset {
            cluster_networks: networks.iter().map(|n| n.parse().unwrap()).collect(),
            trusted_links: links.iter().map(|&l| l.to_owned()).collect(),
            plaintext: BTreeMap::new(),
            masquerade: Family::ALL.into(),
        }
    }

    #[test]
    fn a_ruleset_is_one_transaction() {
        insta::assert_snapshot!(render(&ruleset()).unwrap());
    }

    #[test]
    fn what_is_not_asked_for_is_left_out() {
        let v4_only = Ruleset {
            cluster_networks: ["10.244.0.0/17", "10.244.128.0/17", "10.245.1.1/16"]
                .map(|n| n.parse().unwrap())
                .into(),
            trusted_links: ["lo".to_owned()].into(),
            plaintext: BTreeMap::new(),
            masquerade: BTreeSet::new(),
        };
        insta::assert_snapshot!(render(&v4_only).unwrap());
    }

    #[test]
    fn what_two_nodes_allow_in_clear_passes_before_the_rest_is_dropped() {
        let networks = ["10.244.2.0/24", "10.244.3.0/24", "192.0.2.1/32", "fd00:10:244:2::/64"];
        let networks: BTreeSet<IpNet> = networks.iter().map(|n| n.parse().unwrap()).collect();
        let plaintext = BTreeMap::from([("gambeson-vx4".to_owned(), networks)]);
        insta::assert_snapshot!(render(&Ruleset { plaintext, ..ruleset() }).unwrap());
    }

    #[test]
    fn one_family_may_be_masqueraded_and_the_other_not() {
        let masquerade = BTreeSet::from([Family::V4]);
        let text = render(&Ruleset { masquerade, ..ruleset() }).unwrap();
        assert!(text.contains("ip saddr { 10.244.0.0/16 } ip daddr"), "{text}");
        assert!(!text.contains("ip6 saddr { fd00:10:244::/48 } ip6 daddr"), "{text}");
        let leaving = |family: &str| {
            let rule = format!("{family} saddr {{ ");
            text.lines().any(|line| line.contains("guard_out") && line.contains(&rule))
        };
        assert!(leaving("ip") && !leaving("ip6"), "{text}");
    }

    #[test]
    fn a_link_name_cannot_smuggle_in_a_rule() {
        for name in ["", "eth*", "a\" accept", "a b", "a;b", "a\nb", "sixteen-letters-"] {
            let ruleset = Ruleset { trusted_links: [name.to_owned()].into(), ..ruleset() };
            let error = render(&ruleset).unwrap_err();
            assert!(error.to_string().contains("cannot be used in firewall rules"), "{error}");
            let plaintext = [(name.to_owned(), BTreeSet::new())].into();
            assert!(render(&Ruleset { plaintext, ..self::ruleset() }).is_err());
        }
    }

    #[test]
    fn made_anew_it_keeps_its_counts() {
        let drops = GuardDrops { out_packets: 1, out_bytes: 2, in_packets: 3, in_bytes: 4 };
        let text = render_anew(&ruleset(), drops).unwrap();
        assert!(text.starts_with(
            "add table inet gambeson\ndelete table inet gambeson\nadd table inet gambeson\n"
        ));
        assert!(text.contains("add counter inet gambeson guard_out { packets 1 bytes 2 ; }\n"));
        assert!(text.contains("add counter inet gambeson guard_in { packets 3 bytes 4 ; }\n"));
    }
}
