//! Two hosts on one wire, with a tunnel between them or without.

use std::fs::read_to_string;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use super::load::{Load, Pings, Usage};
use crate::host::{Host, Start, output};
use crate::{Error, Implementation};

const NEAR: Host = Host { name: "gbench-a", number: 1 };
const FAR: Host = Host { name: "gbench-b", number: 2 };
/// Inside the tunnel: that of the wire less WireGuard over IPv4, bytes.
const MTU: u32 = 1440;
/// For a server to listen, and a load to have begun.
const SETTLE: Duration = Duration::from_millis(300);

/// The hosts, until it is dropped.
pub(super) struct Link {
    /// The far host's address, through the tunnel if there is one.
    to: String,
    server: Option<Child>,
}

impl Link {
    /// Makes the hosts, with a tunnel of this implementation on each, or none.
    pub(super) fn new(implementation: Option<&Implementation>) -> Result<Self, Error> {
        let to = implementation.map_or_else(|| outside(FAR), |_| FAR.inside());
        let mut link = Self { to, server: None };
        NEAR.add()?;
        FAR.add()?;
        NEAR.sh(&format!("ip link add wire type veth peer name wire netns {}", FAR.name))?;
        for host in [NEAR, FAR] {
            let address = outside(host);
            host.sh(&format!("ip addr add {address}/24 dev wire; ip link set wire up"))?;
        }
        for (host, peer) in [(NEAR, FAR), (FAR, NEAR)] {
            let Some(implementation) = implementation else { continue };
            host.start(&Start { implementation, processor: None, mtu: MTU })?;
            host.add_peer(peer, &outside(peer))?;
        }
        let mut server = FAR.command("iperf3");
        link.server = Some(server.arg("--server").stdout(Stdio::null()).spawn()?);
        let warm = format!("ping -n -q -c 3 -i 0.2 -W 1 {to} || ping -c 1 {to}", to = link.to);
        NEAR.sh(&warm)?;
        sleep(SETTLE);
        Ok(link)
    }

    /// Runs iperf3 for a while.
    pub(super) fn load(&self, options: &[&str], time: Duration) -> Result<Load, Error> {
        let seconds = time.as_secs().max(1).to_string();
        let before = Usage::now()?;
        let mut client = NEAR.command("iperf3");
        client.args(["--client", &self.to, "--json", "--time", &seconds]).args(options);
        let said = output(&mut client)?;
        let used = before.until(Usage::now()?);
        let load = Load::parse(&said, used).ok_or_else(|| format!("iperf3 says: {said}"));
        // The server is ready for another client only a moment after.
        sleep(SETTLE);
        Ok(load?)
    }

    /// Sends single pings.
    pub(super) fn ping(&self) -> Result<Pings, Error> {
        Pings::parse(&NEAR.sh(&format!("ping -n -c 300 -i 0.01 {}", self.to))?)
    }

    /// Sends single pings while iperf3 runs.
    pub(super) fn ping_beside(&self, options: &[&str], time: Duration) -> Result<Pings, Error> {
        std::thread::scope(|scope| {
            let load = scope.spawn(|| self.load(options, time + Duration::from_secs(1)));
            sleep(SETTLE);
            let pings = self.ping();
            load.join().map_err(|_| "the load's thread has ended")??;
            pings
        })
    }

    /// Resident memory of the near tunnel, MiB.
    pub(super) fn memory(&self) -> Result<f64, Error> {
        let pids = output(Command::new("ip").args(["netns", "pids", NEAR.name]))?;
        let resident = |pid: &str| -> Option<f64> {
            read_to_string(format!("/proc/{pid}/statm")).ok()?.split(' ').nth(1)?.parse().ok()
        };
        let pages = pids.lines().filter_map(resident).fold(0.0, f64::max);
        Ok(pages * 4096.0 / f64::from(1 << 20))
    }

    /// Makes the wire leave it to the hosts to split datagrams, as network cards without
    /// `tx-udp-segmentation` do.
    pub(super) fn split_no_datagrams(&self) -> Result<(), Error> {
        [NEAR, FAR]
            .into_iter()
            .try_for_each(|host| host.sh("ethtool -K wire tx-udp-segmentation off").map(drop))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            let _ = server.kill();
            let _ = server.wait();
        }
        NEAR.delete();
        FAR.delete();
    }
}

fn outside(host: Host) -> String {
    format!("192.0.2.{}", host.number)
}
