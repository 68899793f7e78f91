//! Three hosts in network namespaces: one whose tunnel is measured, its peer, and a neighbour
//! who is a peer behind a slow link, or an attacker.

use std::net::{SocketAddr, UdpSocket};

use crate::host::{Host, Start};
use crate::{Error, Implementation};

/// The processor that the measured tunnel has to itself; everything else is on the other.
const MEASURED: &str = "0";
const OTHERS: &str = "1";

/// Whose tunnel is measured.
pub(crate) const SUBJECT: Host = Host { name: "gbench-a", number: 1 };
pub(crate) const PEER: Host = Host { name: "gbench-b", number: 2 };
pub(crate) const NEIGHBOUR: Host = Host { name: "gbench-c", number: 3 };
const HOSTS: [Host; 3] = [SUBJECT, PEER, NEIGHBOUR];

/// The hosts, until it is dropped.
pub(crate) struct World;

impl World {
    /// Makes the hosts, with a tunnel of this implementation each.
    pub(crate) fn new(implementation: &Implementation) -> Result<Self, Error> {
        let world = Self;
        HOSTS.into_iter().try_for_each(Host::add)?;
        for host in [PEER, NEIGHBOUR] {
            let (wire, number) = (format!("wire{}", host.number), host.number);
            SUBJECT.sh(&format!(
                "ip link add {wire} type veth peer name wire netns {}
                 ip addr add 192.0.{number}.1/24 dev {wire}; ip link set {wire} up",
                host.name
            ))?;
            let outside = outside(host);
            host.sh(&format!("ip addr add {outside}/24 dev wire; ip link set wire up"))?;
        }
        for host in HOSTS {
            start(implementation, host)?;
        }
        for host in [PEER, NEIGHBOUR] {
            let inside = host.inside();
            SUBJECT.sh(&format!("ping -n -q -c 5 -i 0.2 -W 1 {inside} || ping -c 1 {inside}"))?;
        }
        Ok(world)
    }

    /// Makes the way to the neighbour a slow one, with a long queue.
    pub(crate) fn slow_down(&self) -> Result<(), Error> {
        SUBJECT.sh("tc qdisc add dev wire3 root tbf rate 10mbit burst 32k limit 64m").map(drop)
    }

    /// Sends the neighbour more than the way to it carries, for some seconds.
    pub(crate) fn flood_neighbour(&self, seconds: u64) -> Result<(), Error> {
        let inside = NEIGHBOUR.inside();
        let script = format!(
            "taskset -c {OTHERS} timeout {seconds} \
             socat -u -b1300 OPEN:/dev/zero UDP4-SENDTO:{inside}:9 || true"
        );
        SUBJECT.sh(&script).map(drop)
    }

    /// The attacker's socket, connected to the subject's tunnel.
    pub(crate) fn attacker(&self) -> Result<UdpSocket, Error> {
        let socket = NEIGHBOUR.socket(&outside(NEIGHBOUR))?;
        socket.connect("192.0.3.1:51820".parse::<SocketAddr>()?)?;
        Ok(socket)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        HOSTS.into_iter().for_each(Host::delete);
    }
}

fn start(implementation: &Implementation, host: Host) -> Result<(), Error> {
    let is_subject = host.number == SUBJECT.number;
    let processor = Some(if is_subject { MEASURED } else { OTHERS });
    host.start(&Start { implementation, processor, mtu: 1420 })?;
    let peers: &[Host] = if is_subject { &[PEER, NEIGHBOUR] } else { &[SUBJECT] };
    for peer in peers {
        let endpoint = match peer.number {
            1 => format!("192.0.{}.1", host.number),
            _ => outside(*peer),
        };
        host.add_peer(*peer, &endpoint)?;
    }
    Ok(())
}

/// A host's address on the wire to the subject; the subject's own differs by wire.
fn outside(host: Host) -> String {
    format!("192.0.{}.2", host.number)
}
