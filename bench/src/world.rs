//! Three hosts in network namespaces: one whose tunnel is measured, its peer, and a neighbour
//! who is a peer behind a slow link, or an attacker.

use std::net::{SocketAddr, UdpSocket};
use std::process::{Command, Output};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use gambeson_lab::Netns;
use tempfile::TempDir;

use crate::stranger::public_key;
use crate::{Error, Implementation};

/// The processor that the measured tunnel has to itself; everything else is on the other.
const MEASURED: &str = "0";
const OTHERS: &str = "1";
/// UDP port of every tunnel.
const PORT: u16 = 51820;

/// A host: where the wires end, and what its tunnel is called.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Host {
    name: &'static str,
    number: u8,
}

/// Whose tunnel is measured.
pub(crate) const SUBJECT: Host = Host { name: "gbench-a", number: 1 };
pub(crate) const PEER: Host = Host { name: "gbench-b", number: 2 };
pub(crate) const NEIGHBOUR: Host = Host { name: "gbench-c", number: 3 };
const HOSTS: [Host; 3] = [SUBJECT, PEER, NEIGHBOUR];

/// The hosts, until it is dropped.
pub(crate) struct World {
    keys: TempDir,
}

impl Host {
    /// Inside the tunnels.
    pub(crate) fn inside(self) -> String {
        format!("10.9.0.{}", self.number)
    }

    fn private_key(self) -> [u8; 32] {
        [self.number; 32]
    }

    pub(crate) fn public_key(self) -> [u8; 32] {
        public_key(self.private_key())
    }

    /// On the wire to the subject; the subject's own differs by wire.
    fn outside(self) -> String {
        format!("192.0.{}.2", self.number)
    }

    fn command(self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.name, program]);
        command
    }

    fn sh(self, script: &str) -> Result<String, Error> {
        output(self.command("bash").args(["-ec", script]))
    }

    /// A socket on this host.
    pub(crate) fn socket(self, address: &str) -> Result<UdpSocket, Error> {
        Ok(Netns::named(self.name).run(|| UdpSocket::bind(format!("{address}:0")))??)
    }
}

impl World {
    /// Makes the hosts, with a tunnel of this implementation each.
    pub(crate) fn new(implementation: &Implementation) -> Result<Self, Error> {
        let world = Self { keys: tempfile::tempdir()? };
        for host in HOSTS {
            output(Command::new("ip").args(["netns", "add", host.name]))?;
            host.sh("ip link set lo up")?;
        }
        for host in [PEER, NEIGHBOUR] {
            let (wire, number) = (format!("wire{}", host.number), host.number);
            SUBJECT.sh(&format!(
                "ip link add {wire} type veth peer name wire netns {}
                 ip addr add 192.0.{number}.1/24 dev {wire}; ip link set {wire} up",
                host.name
            ))?;
            let outside = host.outside();
            host.sh(&format!("ip addr add {outside}/24 dev wire; ip link set wire up"))?;
        }
        for host in HOSTS {
            world.start(implementation, host)?;
        }
        for host in [PEER, NEIGHBOUR] {
            let inside = host.inside();
            SUBJECT.sh(&format!("ping -n -q -c 5 -i 0.2 -W 1 {inside} || ping -c 1 {inside}"))?;
        }
        Ok(world)
    }

    fn start(&self, implementation: &Implementation, host: Host) -> Result<(), Error> {
        let processor = if host.number == SUBJECT.number { MEASURED } else { OTHERS };
        let device = host.name;
        let mut start = host.command("taskset");
        start.args(["-c", processor]).arg(&implementation.program).args(&implementation.arguments);
        output(start.arg(device))?;
        let key = self.keys.path().join(host.name);
        std::fs::write(&key, encode(host.private_key()))?;
        let mut script = format!(
            "wg set {device} listen-port {PORT} private-key {}
             ip addr add {}/24 dev {device}; ip link set {device} up\n",
            key.display(),
            host.inside()
        );
        let peers: &[Host] = if host.number == 1 { &[PEER, NEIGHBOUR] } else { &[SUBJECT] };
        for peer in peers {
            let outside = match peer.number {
                1 => format!("192.0.{}.1", host.number),
                _ => peer.outside(),
            };
            script += &format!(
                "wg set {device} peer {} endpoint {outside}:{PORT} allowed-ips {}/32\n",
                encode(peer.public_key()),
                peer.inside()
            );
        }
        host.sh(&script).map(drop)
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
        let socket = NEIGHBOUR.socket(&NEIGHBOUR.outside())?;
        socket.connect("192.0.3.1:51820".parse::<SocketAddr>()?)?;
        Ok(socket)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for host in HOSTS {
            // The tunnel ends with its device.
            let _ = host.sh(&format!("ip link del {}", host.name));
            let _ = output(Command::new("ip").args(["netns", "del", host.name]));
        }
    }
}

fn output(command: &mut Command) -> Result<String, Error> {
    let output: Output = command.output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(format!("{command:?}: {said}").into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn encode(key: [u8; 32]) -> String {
    STANDARD.encode(key)
}
