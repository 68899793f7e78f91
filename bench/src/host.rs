//! A host: a network namespace with a tunnel of the implementation that is measured.

use std::net::UdpSocket;
use std::process::{Command, Output};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use gambeson_lab::Netns;

use crate::stranger::public_key;
use crate::{Error, Implementation};

/// UDP port of every tunnel.
const PORT: u16 = 51820;

/// A host, whose namespace and tunnel have its name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Host {
    pub(crate) name: &'static str,
    pub(crate) number: u8,
}

/// How to start a tunnel.
pub(crate) struct Start<'a> {
    pub(crate) implementation: &'a Implementation,
    /// The processor that it may run on; all if none is given.
    pub(crate) processor: Option<&'a str>,
    /// Bytes.
    pub(crate) mtu: u32,
}

impl Host {
    /// Makes the namespace.
    pub(crate) fn add(self) -> Result<(), Error> {
        output(Command::new("ip").args(["netns", "add", self.name]))?;
        self.sh("ip link set lo up").map(drop)
    }

    /// Removes the namespace, and with its device the tunnel. Some do not end with it.
    pub(crate) fn delete(self) {
        let name = self.name;
        let _ = self.sh(&format!("ip link del {name}; sleep 0.2"));
        let kill = format!("ip netns pids {name} | xargs --no-run-if-empty kill");
        let _ = output(Command::new("bash").args(["-c", &kill]));
        let _ = output(Command::new("ip").args(["netns", "del", self.name]));
    }

    /// Inside the tunnels.
    pub(crate) fn inside(self) -> String {
        format!("10.9.0.{}", self.number)
    }

    pub(crate) fn public_key(self) -> [u8; 32] {
        public_key(self.private_key())
    }

    fn private_key(self) -> [u8; 32] {
        [self.number; 32]
    }

    /// A program on this host.
    pub(crate) fn command(self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.name, program]);
        command
    }

    /// What a script on this host prints.
    pub(crate) fn sh(self, script: &str) -> Result<String, Error> {
        output(self.command("bash").args(["-ec", script]))
    }

    /// A socket on this host.
    pub(crate) fn socket(self, address: &str) -> Result<UdpSocket, Error> {
        Ok(Netns::named(self.name).run(|| UdpSocket::bind(format!("{address}:0")))??)
    }

    /// Starts a tunnel.
    pub(crate) fn start(self, start: &Start<'_>) -> Result<(), Error> {
        let Start { implementation, processor, mtu } = start;
        let mut command = match processor {
            Some(processor) => {
                let mut command = self.command("taskset");
                command.args(["-c", processor]).arg(&implementation.program);
                command
            }
            None => self.command(&implementation.program.to_string_lossy()),
        };
        output(command.args(&implementation.arguments).arg(self.name))?;
        let (device, key, inside) = (self.name, encode(self.private_key()), self.inside());
        self.sh(&format!(
            "wg set {device} listen-port {PORT} private-key <(echo {key})
             ip addr add {inside}/24 dev {device}; ip link set {device} mtu {mtu} up"
        ))
        .map(drop)
    }

    /// Tells the tunnel of a peer.
    pub(crate) fn add_peer(self, peer: Host, endpoint: &str) -> Result<(), Error> {
        let (device, key, inside) = (self.name, encode(peer.public_key()), peer.inside());
        self.sh(&format!(
            "wg set {device} peer {key} endpoint {endpoint}:{PORT} allowed-ips {inside}/32"
        ))
        .map(drop)
    }
}

/// What a command prints, or what it says when it fails.
pub(crate) fn output(command: &mut Command) -> Result<String, Error> {
    let Output { status, stdout, stderr } = command.output()?;
    if !status.success() {
        let said = String::from_utf8_lossy(&stderr);
        return Err(format!("{command:?}: {said}").into());
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}

fn encode(key: [u8; 32]) -> String {
    STANDARD.encode(key)
}
