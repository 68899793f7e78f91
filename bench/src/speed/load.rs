//! What iperf3, ping and the kernel say.

use std::fs::read_to_string;

use serde_json::Value;

use crate::Error;

/// Of the whole machine since it started, in ticks of 10 ms.
#[derive(Debug, Clone, Copy)]
pub(super) struct Usage(u64);

/// A load that went through.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Load {
    /// Payload that arrived, Gb/s.
    pub(super) gigabits: f64,
    /// Datagrams that arrived, thousands per second; 0 for TCP.
    pub(super) kilopackets: f64,
    /// Processor time of the whole machine per GB that arrived, s.
    pub(super) cost: f64,
}

/// Round-trip times, us.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Pings {
    pub(super) median: f64,
    /// Of a hundred, one took longer.
    pub(super) slowest: f64,
}

impl Usage {
    pub(super) fn now() -> Result<Self, Error> {
        let stat = read_to_string("/proc/stat")?;
        let line = stat.lines().next().unwrap_or_default();
        let fields: Vec<u64> = line.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        // user, nice, system, (idle, iowait,) irq, softirq (proc_stat(5)).
        Ok(Self([0, 1, 2, 5, 6].iter().filter_map(|n| fields.get(*n)).sum()))
    }

    /// Seconds of processor time.
    pub(super) fn until(self, later: Self) -> f64 {
        later.0.saturating_sub(self.0) as f64 / 100.0
    }
}

impl Load {
    /// Of iperf3's JSON.
    pub(super) fn parse(said: &str, used: f64) -> Option<Self> {
        let said: Value = serde_json::from_str(said).ok()?;
        let end = &said["end"];
        let (bytes, seconds, packets) = if end["sum"]["packets"].is_number() {
            let sum = &end["sum"];
            let packets = sum["packets"].as_f64()? - sum["lost_packets"].as_f64()?;
            let payload = said["start"]["test_start"]["blksize"].as_f64()?;
            (packets * payload, sum["seconds"].as_f64()?, packets)
        } else {
            let there = &end["sum_received"];
            let back = end["sum_received_bidir_reverse"]["bytes"].as_f64().unwrap_or(0.0);
            (there["bytes"].as_f64()? + back, there["seconds"].as_f64()?, 0.0)
        };
        Some(Self {
            gigabits: bytes * 8e-9 / seconds,
            kilopackets: packets * 1e-3 / seconds,
            cost: used / (bytes * 1e-9),
        })
    }
}

impl Pings {
    /// Of the lines of ping.
    pub(super) fn parse(said: &str) -> Result<Self, Error> {
        let time = |line: &str| line.split_once("time=")?.1.split(' ').next()?.parse().ok();
        let mut times: Vec<f64> = said.lines().filter_map(time).map(|ms: f64| ms * 1e3).collect();
        times.sort_unstable_by(f64::total_cmp);
        let at = |part: usize| times.get(times.len() * part / 100).copied();
        let error = || format!("ping says: {said}");
        Ok(Self { median: at(50).ok_or_else(error)?, slowest: at(99).ok_or_else(error)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_iperf3_says_is_what_has_arrived() {
        let tcp = r#"{"end": {"sum_received": {"bytes": 2e9, "seconds": 4}}}"#;
        let load = Load::parse(tcp, 3.0).unwrap();
        assert_eq!((load.gigabits, load.kilopackets, load.cost), (4.0, 0.0, 1.5));
        let udp = r#"{"start": {"test_start": {"blksize": 1000}},
            "end": {"sum": {"packets": 5000, "lost_packets": 1000, "seconds": 2}}}"#;
        let load = Load::parse(udp, 0.0).unwrap();
        assert_eq!((load.gigabits, load.kilopackets), (0.016, 2.0));
        assert!(Load::parse("{}", 0.0).is_none());
    }

    #[test]
    fn pings_are_sorted() {
        let said = "PING x\n64 bytes: time=0.300 ms\n64 bytes: time=0.100 ms\n--- rtt 1/2/3";
        let pings = Pings::parse(said).unwrap();
        assert_eq!((pings.median, pings.slowest), (300.0, 300.0));
        assert!(Pings::parse("nothing").is_err());
    }
}
