//! The canary: what one pod says to another must not be readable on the way. The control:
//! what is said in clear must be found by the very same search.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::between::Transports;
use super::{IpFamily, PlaintextResult};
use crate::error::LabError;
use crate::instance::Lab;
use crate::layout::UNDERLAY_INTERFACE;
use crate::node::{Node, Pod};
use crate::probe::capture::{Capture, CapturePoint};
use crate::probe::ping::{Echo, Pinger};
use crate::probe::tcp::{self, EchoServer};

/// Length of canary and control in bytes. By chance it appears nowhere.
const LENGTH: usize = 32;
/// UDP port that the control is sent to (discard). Nobody has to listen.
const CONTROL_PORT: u16 = 9;
/// How long the control may take to be seen everywhere.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(3);

const CANARY: usize = 0;
const CONTROL: usize = 1;

/// Sends canary and control while every underlay interface is watched. Between nodes that say
/// that they send in clear there is nothing to look for.
pub(super) fn check(
    lab: &Lab,
    transports: &Transports,
    failures: &mut Vec<String>,
) -> Result<PlaintextResult, LabError> {
    let canary: [u8; LENGTH] = rand::random();
    let control: [u8; LENGTH] = rand::random();
    let capture = lab.capture_underlay(&[canary.to_vec(), control.to_vec()])?;
    let pairs = lab.first_pod_pairs().into_iter();
    let (plaintext, encrypted): (Vec<_>, Vec<_>) =
        pairs.partition(|(from, to)| transports.in_clear(from.node(), to.node()));
    for (from, to) in &encrypted {
        send_canary(*from, *to, &canary, failures)?;
    }
    for node in lab.nodes() {
        send_control(lab, node, &control)?;
    }
    // A capture sees an interface's packets in order: once it has seen the control, which
    // was sent last, it has seen every canary that there was.
    let nodes: Vec<String> =
        lab.nodes().iter().map(|node| node.netns().name().to_owned()).collect();
    let places: Vec<&str> = nodes.iter().map(String::as_str).collect();
    let control_found = capture.wait_for(CONTROL, &places, Instant::now() + CONTROL_TIMEOUT);
    let seen = capture.finish();
    let clear = seen.places(CANARY);
    if !clear.is_empty() {
        failures
            .push(format!("what pods said was readable on the underlay of {}", clear.join(", ")));
    }
    if !control_found {
        failures.push(
            "the search for clear text did not find what was sent in clear: it proves nothing"
                .to_owned(),
        );
    }
    Ok(PlaintextResult {
        packets_seen: seen.packets,
        canary_found: !clear.is_empty(),
        encrypted_pairs: encrypted.len(),
        plaintext_pairs: plaintext.len(),
        control_found,
    })
}

impl Lab {
    /// Looks for byte strings on every underlay interface: each node's, and all of the hub's
    /// or router's.
    pub fn capture_underlay(&self, needles: &[Vec<u8>]) -> Result<Capture, LabError> {
        let hub = self.hub().netns().clone();
        let mut points = vec![CapturePoint { netns: hub, interface: None }];
        points.extend(self.nodes().iter().map(|node| CapturePoint {
            netns: node.netns(),
            interface: Some(UNDERLAY_INTERFACE.to_owned()),
        }));
        Capture::start(&points, needles)
    }
}

/// By ICMP and by TCP; what came back proves that it was sent and received.
fn send_canary(
    from: Pod<'_>,
    to: Pod<'_>,
    canary: &[u8; LENGTH],
    failures: &mut Vec<String>,
) -> Result<(), LabError> {
    let failed = |source| LabError::Measure {
        what: format!("send the canary from {} to {}", from.name(), to.name()),
        source,
    };
    let server = to.netns().run(EchoServer::start)?.map_err(failed)?;
    for address in to.addresses() {
        let delivered = from.netns().run(|| {
            let mut pinger = Pinger::new(address)?;
            let pinged = matches!(pinger.echo_payload(canary)?, Echo::Answered(_));
            let socket = SocketAddr::new(address, server.port());
            std::io::Result::Ok(pinged && tcp::echoes(socket, canary).unwrap_or(false))
        })?;
        if !delivered.map_err(failed)? {
            failures.push(format!(
                "the canary from {} did not reach {} ({address})",
                from.name(),
                to.name()
            ));
        }
    }
    to.netns().run(|| server.stop()).map_err(LabError::from)
}

/// To another node in clear, or to the hub where there is none, over every family.
fn send_control(lab: &Lab, node: Node<'_>, control: &[u8; LENGTH]) -> Result<(), LabError> {
    let other = lab.nodes().into_iter().find(|other| other.index() != node.index());
    let targets: Vec<IpAddr> = match other {
        Some(other) => other.addresses(),
        None => lab.options().gateway_addresses(node.index()).iter().map(IpNet::addr).collect(),
    };
    let sent = node.netns().run(|| {
        targets.iter().try_for_each(|target| {
            let any: IpAddr = match IpFamily::of(*target) {
                IpFamily::V4 => std::net::Ipv4Addr::UNSPECIFIED.into(),
                IpFamily::V6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
            };
            let socket = UdpSocket::bind((any, 0))?;
            socket.send_to(control, (*target, CONTROL_PORT)).map(|_| ())
        })
    })?;
    sent.map_err(|source| LabError::Measure {
        what: format!("send the control from {}", node.name()),
        source,
    })
}
