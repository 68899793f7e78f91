//! The result as a person reads it.

use std::collections::BTreeSet;
use std::fmt;

use super::{IpFamily, MtuResult, PairResult, Verification};
use crate::report::{BAD, GOOD, new_table};

/// Matrices with more columns than this are folded to one line per row.
const MOST_COLUMNS: usize = 9;
/// Most failures shown.
const MOST_FAILURES: usize = 20;

impl fmt::Display for Verification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let families: BTreeSet<IpFamily> = self.pairs.iter().map(|pair| pair.family).collect();
        for family in families {
            let of_family = self.pairs.iter().filter(|pair| pair.family == family).collect();
            writeln!(f, "{}\n{}", title(family), matrix(of_family))?;
        }
        writeln!(f, "{}", self.summary())?;
        for failure in self.failures.iter().take(MOST_FAILURES) {
            writeln!(f, "{BAD} {failure}")?;
        }
        if self.failures.len() > MOST_FAILURES {
            writeln!(f, "{BAD} and {} more", self.failures.len() - MOST_FAILURES)?;
        }
        if self.ok {
            write!(f, "{GOOD} all checks passed")
        } else {
            write!(f, "{BAD} {} checks do not hold", self.failures.len())
        }
    }
}

impl Verification {
    fn summary(&self) -> comfy_table::Table {
        let mut table = new_table(&["check", "result", ""]);
        let mut row = |check: &str, result: String, good: bool| {
            table.add_row([check, &result, if good { GOOD } else { BAD }]);
        };
        for (check, pairs) in
            [("pod to pod", &self.pairs), ("node to pod and back", &self.node_pairs)]
        {
            let good = pairs.iter().filter(|pair| pair.ok).count();
            let result = format!("{good} of {} by ping and TCP", pairs.len());
            row(check, result, good == pairs.len());
        }
        row("between nodes", transports(&self.pairs), !self.pairs.iter().any(is_unknown));
        for (check, mtu) in [("MTU", &self.mtu), ("MTU over IPv6", &self.mtu_v6)] {
            if let Some(mtu) = mtu {
                row(check, describe_mtu(mtu), is_exact(mtu));
            }
        }
        let text = &self.plaintext;
        let canary = match text.canary_found {
            true => format!("FOUND in {} packets on the underlay", text.packets_seen),
            false if self.nodes == 1 => "not sent: no other node".to_owned(),
            false if text.encrypted_pairs == 0 => "not sent: nothing is encrypted".to_owned(),
            false => format!("not seen in {} packets on the underlay", text.packets_seen),
        };
        row("canary", canary, !text.canary_found);
        if text.plaintext_pairs > 0 {
            let of = text.plaintext_pairs + text.encrypted_pairs;
            let result = format!("{} of {of} node pairs, as both allow", text.plaintext_pairs);
            row("in clear", result, true);
        }
        let control = if text.control_found { "found in clear" } else { "not found" };
        row("positive control", control.to_owned(), text.control_found);
        if let Some(gbps) = self.throughput_gbps {
            row("throughput", format!("{gbps:.2} Gb/s, one TCP stream"), gbps > 0.0);
        }
        table
    }
}

fn title(family: IpFamily) -> &'static str {
    match family {
        IpFamily::V4 => "round-trip times over IPv4 in µs",
        IpFamily::V6 => "round-trip times over IPv6 in µs",
    }
}

/// Senders down, receivers across.
fn matrix(pairs: Vec<&PairResult>) -> comfy_table::Table {
    let mut names: Vec<&str> = Vec::new();
    for pair in &pairs {
        for name in [&pair.from, &pair.to] {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
    }
    names.sort_by_key(|name| natural(name));
    if names.len() > MOST_COLUMNS {
        return folded(&names, &pairs);
    }
    let mut table = new_table(&[&["from \\ to"], names.as_slice()].concat());
    for from in &names {
        let mut row = vec![(*from).to_owned()];
        row.extend(names.iter().map(|to| {
            let pair = pairs.iter().find(|pair| pair.from == *from && pair.to == *to);
            pair.map_or_else(|| "·".to_owned(), |pair| cell(pair))
        }));
        table.add_row(row);
    }
    table
}

/// One line per sender.
fn folded(names: &[&str], pairs: &[&PairResult]) -> comfy_table::Table {
    let mut table = new_table(&["from", "reached", "median", "slowest", ""]);
    for from in names {
        let own: Vec<_> = pairs.iter().filter(|pair| pair.from == *from).collect();
        let mut times: Vec<u64> = own.iter().filter_map(|pair| pair.rtt_us).collect();
        times.sort_unstable();
        let good = own.iter().filter(|pair| pair.ok).count();
        let time = |time: Option<&u64>| time.map_or_else(String::new, ToString::to_string);
        table.add_row([
            (*from).to_owned(),
            format!("{good} of {}", own.len()),
            time(times.get(times.len() / 2)),
            time(times.last()),
            if good == own.len() { GOOD } else { BAD }.to_owned(),
        ]);
    }
    table
}

fn cell(pair: &PairResult) -> String {
    match pair.rtt_us.filter(|_| pair.ok) {
        Some(time) => format!("{time} {GOOD}"),
        None => BAD.to_owned(),
    }
}

/// `pod-2-1` before `pod-10-1`.
fn natural(name: &str) -> (String, Vec<u32>) {
    let (words, numbers): (Vec<&str>, Vec<&str>) =
        name.split('-').partition(|part| part.parse::<u32>().is_err());
    (words.join("-"), numbers.iter().filter_map(|number| number.parse().ok()).collect())
}

fn is_unknown(pair: &PairResult) -> bool {
    pair.transport == "unknown"
}

fn transports(pairs: &[PairResult]) -> String {
    let names: BTreeSet<&str> = pairs
        .iter()
        .map(|pair| pair.transport.as_str())
        .filter(|transport| *transport != "local")
        .collect();
    if names.is_empty() {
        return "no pair".to_owned();
    }
    names.into_iter().collect::<Vec<_>>().join(", ")
}

fn describe_mtu(mtu: &MtuResult) -> String {
    let size = |size: Option<u32>| size.map_or_else(|| "nothing".to_owned(), |s| s.to_string());
    format!("{} passes, {} is refused", size(mtu.largest_ok), size(mtu.first_refused))
}

fn is_exact(mtu: &MtuResult) -> bool {
    mtu.pod == mtu.expected
        && mtu.largest_ok == Some(mtu.expected)
        && mtu.first_refused == Some(mtu.expected + 1)
}

#[cfg(test)]
mod tests {
    use super::super::PlaintextResult;
    use super::*;

    fn pair(from: &str, to: &str) -> PairResult {
        PairResult {
            from: from.to_owned(),
            to: to.to_owned(),
            family: IpFamily::V4,
            ok: true,
            rtt_us: Some(123),
            transport: "wireguard-userspace".to_owned(),
            error: None,
        }
    }

    fn verification(pairs: Vec<PairResult>, failures: Vec<String>) -> Verification {
        Verification {
            schema: 1,
            nodes: 2,
            pods: 2,
            pairs,
            node_pairs: Vec::new(),
            mtu: Some(MtuResult {
                pod: 1440,
                expected: 1440,
                largest_ok: Some(1440),
                first_refused: Some(1441),
            }),
            mtu_v6: None,
            plaintext: PlaintextResult {
                packets_seen: 7,
                canary_found: false,
                encrypted_pairs: 2,
                plaintext_pairs: 0,
                control_found: true,
            },
            throughput_gbps: Some(1.5),
            ok: failures.is_empty(),
            failures,
        }
    }

    #[test]
    fn a_person_reads_every_result() {
        let pairs = vec![pair("pod-1-1", "pod-2-1"), pair("pod-2-1", "pod-1-1")];
        let text = verification(pairs, Vec::new()).to_string();
        for part in ["123 ✓", "1440 passes, 1441 is refused", "not seen in 7 packets", "1.50 Gb/s"]
        {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
        assert!(text.ends_with("all checks passed"), "{text}");
    }

    #[test]
    fn a_failure_is_said_in_words() {
        let mut broken = pair("pod-1-1", "pod-2-1");
        (broken.ok, broken.rtt_us) = (false, None);
        let text = verification(vec![broken], vec!["pod-1-1 to pod-2-1: lost".into()]).to_string();
        assert!(text.contains("✗ pod-1-1 to pod-2-1: lost"), "{text}");
        assert!(text.contains("0 of 1"), "{text}");
    }

    #[test]
    fn large_labs_fold() {
        let names: Vec<String> = (1..=12).map(|i| format!("pod-{i}-1")).collect();
        let pairs = names
            .iter()
            .flat_map(|from| names.iter().map(move |to| pair(from, to)))
            .filter(|pair| pair.from != pair.to)
            .collect();
        let text = verification(pairs, Vec::new()).to_string();
        assert!(text.contains("11 of 11"), "{text}");
        assert!(text.find("pod-2-1") < text.find("pod-10-1"), "{text}");
    }
}
