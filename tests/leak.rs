//! Packets that must not pass: to a peer that cannot be encrypted to, by a route that leads
//! out in clear, and from outside in a pod's name.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use gambeson_lab::probe::capture::Capture;
use gambeson_lab::probe::ping::{Echo, Pinger};
use gambeson_lab::{Environment, Family, Lab, Netns, Node, Options, Patch, Pod, WireguardMode};
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::{Value, json};

use crate::common::lab::lab_up as up;
use crate::common::scenario::{PATIENCE, assert_connected, guard_drops, options, run, within};
use crate::mesh::foreign_node;

/// Length of a canary in bytes: by chance it appears nowhere.
const LENGTH: usize = 32;
/// UDP port that nobody listens on (discard).
pub(crate) const DISCARD: u16 = 9;

fn userspace() -> Options {
    options(WireguardMode::Userspace)
}

/// Looks for one canary on the whole underlay, and can prove that it would have found it.
pub(crate) struct Watch<'a> {
    lab: &'a Lab,
    canary: [u8; LENGTH],
    control: [u8; LENGTH],
    capture: Capture,
}

impl<'a> Watch<'a> {
    pub(crate) fn start(lab: &'a Lab) -> Self {
        let (canary, control) = (rand::random::<[u8; LENGTH]>(), rand::random::<[u8; LENGTH]>());
        let capture = lab.capture_underlay(&[canary.to_vec(), control.to_vec()]).unwrap();
        Self { lab, canary, control, capture }
    }

    /// What is looked for.
    pub(crate) fn payload(&self) -> [u8; LENGTH] {
        self.canary
    }

    /// Sends the canary from a pod. Gives whether it was answered.
    pub(crate) fn canary(&self, from: Pod<'_>, to: IpAddr) -> bool {
        let payload = &self.canary;
        let echo = || Pinger::new(to).and_then(|mut ping| ping.echo_payload(payload)).unwrap();
        matches!(from.netns().run(echo).unwrap(), Echo::Answered(_))
    }

    /// The canary was on no underlay interface. What every node sends in clear last, and all
    /// of that is found, shows that the search was over all packets before it.
    pub(crate) fn assert_silent(&self) {
        let nodes = self.lab.nodes();
        let others: Vec<IpAddr> = nodes.iter().map(|node| node.addresses()[0]).collect();
        for (index, node) in nodes.iter().enumerate() {
            let to = others[(index + 1) % others.len()];
            send(&node.netns(), None, SocketAddr::new(to, DISCARD), &self.control).unwrap();
        }
        let places: Vec<String> = nodes.iter().map(|node| node.netns().name().to_owned()).collect();
        let places: Vec<&str> = places.iter().map(String::as_str).collect();
        assert!(
            self.capture.wait_for(1, &places, Instant::now() + PATIENCE),
            "the search does not find what is sent in clear"
        );
        let seen = self.capture.seen();
        assert_eq!(seen.places(0), Vec::<&str>::new(), "the canary was on the underlay");
    }

    /// The canary was on the underlay, so that its absence elsewhere means something.
    pub(crate) fn assert_seen(&self, place: &str) {
        let deadline = Instant::now() + PATIENCE;
        assert!(self.capture.wait_for(0, &[place], deadline), "no canary in {place}");
    }
}

/// Sends one datagram.
fn send(
    from: &Netns,
    source: Option<IpAddr>,
    to: SocketAddr,
    payload: &[u8],
) -> std::io::Result<()> {
    from.run(|| {
        let any = if to.is_ipv4() { "0.0.0.0" } else { "::" };
        let socket = UdpSocket::bind((source.unwrap_or(any.parse().unwrap()), 0))?;
        socket.send_to(payload, to).map(|_| ())
    })
    .unwrap()
}

/// Sends datagrams from a pod until the sender is told why they do not arrive.
fn refusal(from: Pod<'_>, to: IpAddr, payload: &[u8]) -> ErrorKind {
    let error = from.netns().run(|| {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).unwrap();
        socket.connect((to, DISCARD)).unwrap();
        // Without these the kernel keeps to itself that a host cannot be reached.
        match to {
            IpAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4RecvErr, &true).unwrap(),
            IpAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvErr, &true).unwrap(),
        }
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        within(PATIENCE, &format!("{to} is refused"), || {
            if let Err(error) = socket.send(payload) {
                return Some(error);
            }
            let error = socket.recv(&mut [0; 64]).unwrap_err();
            (error.kind() != ErrorKind::WouldBlock).then_some(error)
        })
    });
    error.unwrap().kind()
}

/// Adds a peer that nobody can encrypt to.
fn add_unusable(lab: &Lab, number: u8, key: Value) -> Vec<IpAddr> {
    let mut node = foreign_node(&format!("peer-{number}"), number);
    node["metadata"]["annotations"]["gambeson.io/public-key"] = key;
    if node["metadata"]["annotations"]["gambeson.io/public-key"].is_null() {
        let annotations = node["metadata"]["annotations"].as_object_mut().unwrap();
        annotations.remove("gambeson.io/public-key");
    }
    lab.api().unwrap().create_node(&node).unwrap();
    vec![
        format!("10.244.{number}.2").parse().unwrap(),
        format!("fd00:10:244:{number}::2").parse().unwrap(),
    ]
}

/// Packets to peers without a usable key are refused to their sender.
pub(crate) fn peers_without_a_key(options: Options) {
    let lab = up(Options { underlay: Family::Dual, pods: Family::Dual, ..options });
    let node = lab.node("node-1").unwrap();
    let pod = lab.pods()[0];
    let own = node.status().unwrap().public_key.unwrap();
    let zero = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    let keys = [Value::Null, json!("not base64"), json!(zero), json!(own)];
    let numbers = 90..;
    let peers: Vec<Vec<IpAddr>> =
        numbers.zip(&keys).map(|(number, key)| add_unusable(&lab, number, key.clone())).collect();
    within(PATIENCE, "all of them are refused", || {
        (node.status().ok()?.refused.len() == keys.len()).then_some(())
    });
    // Two limits on ICMP errors, one after the other, would let one starve the other.
    run(&node.environment(), "echo 0 > /proc/sys/net/ipv4/icmp_ratelimit");
    let watch = Watch::start(&lab);
    for address in peers.into_iter().flatten() {
        let refusal = refusal(pod, address, &watch.canary);
        let unreachable = [ErrorKind::HostUnreachable, ErrorKind::NetworkUnreachable];
        assert!(unreachable.contains(&refusal), "{address}: {refusal}");
        assert!(!watch.canary(pod, address));
    }
    watch.assert_silent();
    assert_connected(&lab, "node-1", "node-2");
    assert_eq!(guard_drops(node), (0, 0));
}

#[test]
fn a_peer_without_a_usable_key_is_not_sent_to() {
    peers_without_a_key(userspace());
}

/// A peer that withdraws its key keeps its last one, or gets nothing: never clear text.
#[test]
fn a_peer_that_withdraws_everything_is_not_sent_to_in_clear() {
    let lab = up(userspace());
    let [one, two] = [lab.pods()[0], lab.pods()[1]];
    let node = lab.node("node-1").unwrap();
    lab.node("node-2").unwrap().kill_agent().unwrap();
    let watch = Watch::start(&lab);
    let names = ["public-key", "key-generation", "endpoint", "port", "transports", "mtu"];
    let gone: serde_json::Map<String, Value> =
        names.iter().map(|name| (format!("gambeson.io/{name}"), Value::Null)).collect();
    let patch = json!({ "metadata": { "annotations": gone } });
    lab.api().unwrap().patch_node("node-2", Patch::Merge, &patch).unwrap();
    within(PATIENCE, "node-1 complains about node-2", || {
        node.status().ok()?.refused.iter().any(|peer| peer.name == "node-2").then_some(())
    });
    watch.canary(one, two.addresses()[0]);
    watch.assert_silent();
}

/// A route that leads pods' packets out in clear.
const ROGUE: [&str; 2] = [
    "ip route add 10.244.2.0/25 via 192.168.240.2 dev eth0",
    "ip -6 route add fd00:10:244:2::/65 via fd00:240::2 dev eth0",
];

/// The guard stops and counts what a foreign route leads out, of pods and of the node.
pub(crate) fn rogue_routes(options: Options) {
    let lab = up(Options { underlay: Family::Dual, pods: Family::Dual, ..options });
    let node = lab.node("node-1").unwrap();
    let environment = node.environment();
    let [one, two] = [lab.pods()[0], lab.pods()[1]];
    assert_eq!(guard_drops(node), (0, 0));
    let watch = Watch::start(&lab);
    for (family, rogue) in ROGUE.iter().enumerate() {
        run(&environment, rogue);
        let address = two.addresses()[family];
        let before = guard_drops(node).0;
        assert!(!watch.canary(one, address), "{rogue} was not in the way");
        assert_eq!(guard_drops(node).0, before + 1, "{rogue}: a pod's packet");
        // The node itself is told that it may not.
        let to = SocketAddr::new(address, DISCARD);
        let _ = send(&node.netns(), None, to, &watch.canary);
        assert_eq!(guard_drops(node).0, before + 2, "{rogue}: the node's packet");
    }
    let status = node.status().unwrap().guard;
    assert_eq!((status.out_packets, status.in_packets), (4, 0));
    watch.assert_silent();
    without_guard(&lab, node, one, two);
    for rogue in ROGUE {
        run(&environment, &rogue.replace(" add ", " delete "));
    }
    assert_connected(&lab, "node-1", "node-2");
}

/// Guard and routes taken away at once, again and again, under traffic: a third wall stands.
#[test]
fn two_walls_taken_away_at_once_leave_a_third() {
    let lab = up(Options { underlay: Family::Dual, pods: Family::Dual, ..userspace() });
    let node = lab.node("node-1").unwrap();
    let [one, two] = [lab.pods()[0], lab.pods()[1]];
    let addresses = two.addresses();
    let breach = "nft flush ruleset; ip route flush proto 151; ip -6 route flush proto 151";
    let watch = Watch::start(&lab);
    let flood = |watch: &Watch<'_>| {
        let end = Instant::now() + Duration::from_millis(400);
        let socket = |address: &IpAddr| {
            let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            (UdpSocket::bind(any).unwrap(), SocketAddr::new(*address, DISCARD))
        };
        let canary = watch.canary;
        one.netns()
            .run(|| {
                let sockets: Vec<_> = addresses.iter().map(socket).collect();
                while Instant::now() < end {
                    for (socket, to) in &sockets {
                        // Refused while there is no route, which is the point.
                        let _ = socket.send_to(&canary, to);
                    }
                }
            })
            .unwrap();
    };
    for _ in 0..5 {
        std::thread::scope(|scope| {
            scope.spawn(|| flood(&watch));
            std::thread::sleep(Duration::from_millis(50));
            run(&node.environment(), breach);
        });
    }
    watch.assert_silent();
    assert_connected(&lab, "node-1", "node-2");
    // The control: without the third wall too, the same leaves in clear.
    node.kill_agent().unwrap();
    let rules = "ip rule delete pref 15100; ip rule delete pref 15101";
    run(&node.environment(), &format!("{breach}; {rules}"));
    let open = Watch::start(&lab);
    flood(&open);
    open.assert_seen(node.netns().name());
}

/// The control: without the guard the same packets leave in clear. A new agent closes again.
fn without_guard(lab: &Lab, node: Node<'_>, one: Pod<'_>, two: Pod<'_>) {
    node.kill_agent().unwrap();
    run(&node.environment(), "nft delete table inet gambeson");
    let open = Watch::start(lab);
    for address in two.addresses() {
        open.canary(one, address);
    }
    open.assert_seen(node.netns().name());
    drop(open);
    node.start_agent().unwrap();
    within(PATIENCE, "the guard is back", || {
        let list = ["nft", "list", "table", "inet", "gambeson"];
        node.exec(&list).unwrap().status.success().then_some(())
    });
    let closed = Watch::start(lab);
    for address in two.addresses() {
        closed.canary(one, address);
    }
    closed.assert_silent();
}

#[test]
fn the_guard_stops_what_a_foreign_route_leads_out() {
    rogue_routes(userspace());
}

/// The guard stops and counts clear packets in the name of a pod.
pub(crate) fn spoofed_packets(options: Options) {
    let lab = up(Options { underlay: Family::Dual, pods: Family::Dual, ..options });
    let node = lab.node("node-1").unwrap();
    let pod = lab.pods()[0];
    let hub = Netns::named(format!("{}-hub", lab.options().name));
    let outside = Environment::pod(hub.clone());
    run(
        &outside,
        "ip address add 10.244.2.77/32 dev lo; ip route add 10.244.1.0/24 via 192.168.240.1",
    );
    run(
        &outside,
        "ip address add fd00:10:244:2::77/128 dev lo nodad; \
         ip route add fd00:10:244:1::/64 via fd00:240::1",
    );
    let sources: [IpAddr; 2] =
        ["10.244.2.77".parse().unwrap(), "fd00:10:244:2::77".parse().unwrap()];
    let receivers: Vec<UdpSocket> = pod
        .addresses()
        .iter()
        .map(|address| pod.netns().run(|| UdpSocket::bind((*address, 0)).unwrap()).unwrap())
        .collect();
    let spoof = |family: usize, text: &[u8]| {
        let to = receivers[family].local_addr().unwrap();
        send(&hub, Some(sources[family]), to, text).unwrap();
    };
    let received = |family: usize, wait: u64| {
        let receiver = &receivers[family];
        receiver.set_read_timeout(Some(Duration::from_millis(wait))).unwrap();
        let mut text = [0; 64];
        receiver.recv(&mut text).ok().map(|length| text[..length].to_vec())
    };
    for family in 0..sources.len() {
        let before = guard_drops(node).1;
        spoof(family, b"stopped");
        within(PATIENCE, "the guard counts it", || {
            (guard_drops(node).1 == before + 1).then_some(())
        });
        assert_eq!(received(family, 1), None);
    }
    // The control: without the guard it arrives.
    node.kill_agent().unwrap();
    run(&node.environment(), "nft delete table inet gambeson");
    for family in 0..sources.len() {
        spoof(family, b"control");
        assert_eq!(received(family, 5000).as_deref(), Some(&b"control"[..]));
    }
}

#[test]
fn the_guard_stops_clear_packets_in_a_pods_name() {
    spoofed_packets(userspace());
}
