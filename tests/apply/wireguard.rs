//! Session devices of both kinds. The kernel's run in the virtual machine (tests/kernel.rs).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use gambeson::apply::{ApplyError, Kernel, Scope};
use gambeson::exit::Exit;
use gambeson_keys::{Generation, KeyRing, PrivateKey, PublicKey};
use gambeson_mesh::desired::{
    Desired, Implementation, LinkKind, NextHop, Route, RouteKey, Sysctl, WireGuardDevice,
    WireGuardPeer,
};
use gambeson_mesh::observed::Observed;
use gambeson_mesh::plan::{Action, Plan};
use gambeson_mesh::session::DeviceName;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;

use crate::common::namespace::{device, in_namespace, sh};

const PORT: u16 = 51820;
/// More prefixes than a netlink message holds.
const MANY: u8 = 250;
/// Many more peers than a netlink message holds.
const PEERS: u16 = 300;
/// Prefixes of one peer, for many netlink messages.
const PREFIXES: u16 = 2000;

async fn kernel() -> Kernel {
    Kernel::with_program(env!("CARGO_BIN_EXE_gambeson").into(), Scope::default()).await.unwrap()
}

fn prefix(peer: u8) -> ipnet::IpNet {
    ipnet::IpNet::new([10, 244, peer, 0].into(), 24).unwrap()
}

fn peer(number: u8, prefixes: impl IntoIterator<Item = u8>) -> (PublicKey, WireGuardPeer) {
    let endpoint = SocketAddr::from(([192, 0, 2, number], PORT));
    let v6 = format!("fd00:10:244:{number:x}::/64").parse().unwrap();
    let allowed_ips: BTreeSet<_> = prefixes.into_iter().map(prefix).chain([v6]).collect();
    let peer = WireGuardPeer {
        endpoint,
        allowed_ips,
        persistent_keepalive: number.is_multiple_of(2).then_some(25),
        secret: None,
    };
    (PrivateKey::generate().public(), peer)
}

/// A node with a device, addresses, and a route to each of its peers' prefixes.
struct Node {
    keys: KeyRing,
    desired: Desired,
    device: DeviceName,
}

impl Node {
    fn new(implementation: Implementation, peers: BTreeMap<PublicKey, WireGuardPeer>) -> Self {
        let keys = KeyRing::new(Generation::FIRST, PrivateKey::generate());
        let device = device(0);
        let sysctls = [(Sysctl::RpFilter(device), "2".to_owned())].into();
        let mut desired = Desired { sysctls, ..Desired::default() };
        let session = WireGuardDevice {
            implementation,
            generation: Generation::FIRST,
            public_key: keys.publics()[&Generation::FIRST],
            listen_port: PORT,
            mtu: 1420,
            addresses: ["10.244.0.0/32", "fd00:10:244::/128"].map(|a| a.parse().unwrap()).into(),
            peers,
        };
        desired.devices.insert(device, session);
        let mut node = Self { keys, desired, device };
        node.route();
        node
    }

    fn session(&mut self) -> &mut WireGuardDevice {
        self.desired.devices.get_mut(&self.device).unwrap()
    }

    /// Routes follow the peers' prefixes.
    fn route(&mut self) {
        let device = self.device;
        let session = self.session();
        let mtu = session.mtu;
        let route = |destination: &ipnet::IpNet| {
            let source = match destination {
                ipnet::IpNet::V4(_) => "10.244.0.0",
                ipnet::IpNet::V6(_) => "fd00:10:244::",
            };
            let next_hop = NextHop::Device(device);
            Route { next_hop, mtu: Some(mtu), source: source.parse().ok() }
        };
        let networks = session.peers.values().flat_map(|peer| &peer.allowed_ips);
        let routes =
            networks.map(|n| (RouteKey { destination: *n, metric: 1 }, route(n))).collect();
        self.desired.routes = routes;
    }

    /// Plans, executes, and demands that nothing is left to do.
    async fn converge(&self, kernel: &mut Kernel) -> Observed {
        let plan = Plan::new(&self.desired, &kernel.observe().await.unwrap());
        let errors = kernel.execute(&plan, &self.keys).await;
        assert!(errors.is_empty(), "{errors:#?}");
        let observed = kernel.observe().await.unwrap();
        assert_eq!(Plan::new(&self.desired, &observed), Plan::default());
        observed
    }
}

/// From nothing to a mesh, through changes and damage, and to nothing again.
pub(crate) fn full_round(implementation: Implementation) {
    in_namespace(async move || {
        let mut kernel = kernel().await;
        if implementation == Implementation::Kernel {
            // An agent that died while it made a device.
            sh("ip link add gmbtmp01 type wireguard && ip link set gmbtmp01 alias gambeson");
        }
        let peers = BTreeMap::from([peer(1, [1]), peer(2, [2, 20, 21]), peer(3, 30..MANY)]);
        let mut node = Node::new(implementation, peers);
        let observed = node.converge(&mut kernel).await;
        let link = &observed.links[&node.device];
        assert!(link.ours && link.up);
        assert_eq!(link.kind, Some(LinkKind::WireGuard(implementation)));
        let state = link.wireguard.as_ref().unwrap();
        assert_eq!(state.public_key, Some(node.keys.publics()[&Generation::FIRST]));
        for (key, peer) in &node.session().peers.clone() {
            let seen = &state.peers[key];
            assert_eq!(seen.endpoint, Some(peer.endpoint));
            assert_eq!(seen.pinned_endpoint, Some(peer.endpoint));
            assert_eq!(seen.handshake_age, None);
        }
        change(&mut node, &mut kernel).await;
        for damage in [
            "ip link set gambeson0 down",
            "ip link set gambeson0 mtu 1300",
            "ip addr flush dev gambeson0",
            "ip route flush proto 151; ip -6 route flush proto 151",
            "wg set gambeson0 listen-port 1234",
            "wg set gambeson0 peer $(wg show gambeson0 peers | head -n1) remove",
            "wg set gambeson0 peer $(wg show gambeson0 peers | tail -n1) allowed-ips 10.9.0.0/16",
            "wg genkey > /run/key && wg set gambeson0 private-key /run/key",
            "ip link delete gambeson0",
        ] {
            sh(damage);
            node.converge(&mut kernel).await;
        }
        // A new agent does not know yet that the ruleset is its own, and changes nothing else.
        let mut restarted = self::kernel().await;
        let plan = Plan::new(&node.desired, &restarted.observe().await.unwrap());
        assert_eq!(plan.actions, [Action::SetRuleset(node.desired.ruleset.clone())]);

        node.desired = Desired::default();
        let observed = node.converge(&mut kernel).await;
        assert!(observed.links.is_empty() && observed.routes.is_empty());
        assert_eq!(sh("ip -o link | grep -c gambeson || true").trim(), "0");
    });
}

/// More peers than a netlink message or a request holds, and one with more prefixes than
/// that: all of it is written, read back as it is, and taken away again in part.
pub(crate) fn many_peers(implementation: Implementation) {
    in_namespace(async move || {
        let mut kernel = kernel().await;
        let small = (1..=PEERS).map(|number| {
            let [high, low] = number.to_be_bytes();
            let v4 = ipnet::IpNet::new([10, 100 + high, low, 0].into(), 24).unwrap();
            let v6 = format!("fd00:{number:x}::/64").parse().unwrap();
            let endpoint = SocketAddr::from(([192, 0, 2 + high, low], PORT));
            let allowed_ips = BTreeSet::from([v4, v6]);
            let peer =
                WireGuardPeer { endpoint, allowed_ips, persistent_keepalive: None, secret: None };
            (PrivateKey::generate().public(), peer)
        });
        let (large, mut owner) = peer(0, []);
        owner.allowed_ips = (0..PREFIXES)
            .map(|n| {
                ipnet::IpNet::new([172, 16, n.to_be_bytes()[0], n.to_be_bytes()[1]].into(), 32)
            })
            .collect::<Result<_, _>>()
            .unwrap();
        let mut node = Node::new(implementation, small.chain([(large, owner)]).collect());
        // The routes are another test's.
        node.desired.routes.clear();
        node.converge(&mut kernel).await;
        let count = |expected: usize| {
            let shown = sh("wg show gambeson0 allowed-ips");
            let prefixes = shown.lines().flat_map(|line| line.split_whitespace().skip(1));
            assert_eq!(prefixes.count(), expected);
            shown.lines().count()
        };
        let (all, prefixes) = (usize::from(PEERS) + 1, usize::from(PREFIXES));
        assert_eq!(count(2 * (all - 1) + prefixes), all);

        let gone: Vec<_> = node.session().peers.keys().copied().filter(|k| *k != large).collect();
        gone.iter().step_by(2).for_each(|key| _ = node.session().peers.remove(key));
        let owner = node.session().peers.get_mut(&large).unwrap();
        owner.allowed_ips = owner.allowed_ips.iter().copied().step_by(2).collect();
        node.converge(&mut kernel).await;
        assert_eq!(count(2 * (all / 2) + prefixes / 2), all / 2 + 1);
    });
}

/// Peers come, go and exchange prefixes; a prefix goes; an endpoint and the port change.
async fn change(node: &mut Node, kernel: &mut Kernel) {
    let keys: Vec<_> = node.session().peers.keys().copied().collect();
    let moved = prefix(100);
    let owner = keys.iter().find(|k| node.session().peers[k].allowed_ips.contains(&moved)).unwrap();
    let other = keys.iter().find(|key| *key != owner).unwrap();
    let peers = &mut node.session().peers;
    peers.get_mut(owner).unwrap().allowed_ips.remove(&moved);
    peers.get_mut(owner).unwrap().allowed_ips.remove(&prefix(101));
    peers.get_mut(other).unwrap().allowed_ips.insert(moved);
    peers.get_mut(other).unwrap().endpoint = "[2001:db8::7]:51822".parse().unwrap();
    let gone = keys.iter().find(|key| *key != owner && *key != other).unwrap();
    let inherited = peers.remove(gone).unwrap();
    let (key, mut heir) = peer(9, [9]);
    heir.allowed_ips.extend(inherited.allowed_ips);
    peers.insert(key, heir);
    node.session().listen_port = PORT + 4;
    node.session().mtu = 1380;
    node.route();
    let observed = node.converge(kernel).await;
    let peers = &observed.links[&node.device].wireguard.as_ref().unwrap().peers;
    assert_eq!(peers.len(), 3, "the scratch peer is gone: {peers:?}");
}

/// The port is found taken, named, and used once it is free.
pub(crate) fn taken_port(implementation: Implementation) {
    in_namespace(async move || {
        let mut kernel = kernel().await;
        let node = Node::new(implementation, BTreeMap::from([peer(1, [1])]));
        let taken = UdpSocket::bind(("0.0.0.0", PORT)).unwrap();
        let plan = Plan::new(&node.desired, &kernel.observe().await.unwrap());
        let errors = kernel.execute(&plan, &node.keys).await;
        let error = errors
            .iter()
            .find(|error| matches!(error, ApplyError::PortTaken { port: PORT, .. }))
            .unwrap_or_else(|| panic!("{errors:#?}"));
        assert_eq!(error.exit(), Some(Exit::PortTaken));
        assert!(error.to_string().contains("UDP port 51820 of gambeson0"), "{error}");
        drop(taken);
        node.converge(&mut kernel).await;
    });
}

/// A link with our name that somebody else made stays as it is.
pub(crate) fn taken_name(implementation: Implementation) {
    in_namespace(async move || {
        sh("ip tuntap add gambeson0 mode tun");
        let before = sh("ip -d link show gambeson0");
        let mut kernel = kernel().await;
        let plan = Plan::new(
            &Node::new(implementation, BTreeMap::new()).desired,
            &kernel.observe().await.unwrap(),
        );
        assert!(plan.foreign.contains(&device(0)));
        // Even when it appears between looking and acting.
        let actions = vec![Action::AddLink {
            device: device(0),
            kind: LinkKind::WireGuard(implementation),
            mtu: 1420,
        }];
        let plan = Plan { actions, ..Plan::default() };
        let keys = KeyRing::new(Generation::FIRST, PrivateKey::generate());
        let errors = kernel.execute(&plan, &keys).await;
        let [error] = errors.as_slice() else { panic!("{errors:#?}") };
        assert_eq!(error.exit(), Some(Exit::ForeignDevice), "{error}");
        assert_eq!(sh("ip -d link show gambeson0"), before);
        assert!(!sh("ip link").contains("gmbtmp"));
    });
}

#[test]
fn userspace_devices_follow_every_change() {
    full_round(Implementation::Userspace);
}

#[test]
fn hundreds_of_peers_and_thousands_of_prefixes_are_written_and_read() {
    many_peers(Implementation::Userspace);
}

#[test]
fn a_taken_port_is_named() {
    taken_port(Implementation::Userspace);
}

#[test]
fn a_taken_name_is_left_alone() {
    taken_name(Implementation::Userspace);
}

fn tunnel_pid() -> Pid {
    let stream = UnixStream::connect("/var/run/wireguard/gambeson0.sock").unwrap();
    Pid::from_raw(getsockopt(&stream, PeerCredentials).unwrap().pid())
}

#[test]
fn a_killed_tunnel_comes_back_with_the_same_keys() {
    in_namespace(async || {
        let mut kernel = kernel().await;
        let node = Node::new(Implementation::Userspace, BTreeMap::from([peer(1, [1])]));
        let before = node.converge(&mut kernel).await;
        let pid = tunnel_pid();
        kill(pid, Signal::SIGKILL).unwrap();
        let after = node.converge(&mut kernel).await;
        assert_eq!(after.links, before.links);
        assert_ne!(tunnel_pid(), pid);
    });
}

/// Lets a stopped process run on, so that it can end, when the test fails.
struct Continued(Pid);

impl Drop for Continued {
    fn drop(&mut self) {
        // It is gone when the test passes.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

#[test]
fn a_tunnel_that_hangs_is_replaced() {
    in_namespace(async || {
        let mut kernel = kernel().await;
        let node = Node::new(Implementation::Userspace, BTreeMap::from([peer(1, [1])]));
        let before = node.converge(&mut kernel).await;
        let pid = tunnel_pid();
        kill(pid, Signal::SIGSTOP).unwrap();
        let _continued = Continued(pid);
        let after = node.converge(&mut kernel).await;
        assert_eq!(after.links, before.links);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        while std::path::Path::new(&format!("/proc/{pid}/fd/0")).exists() {
            assert!(tokio::time::Instant::now() < deadline, "{pid} still runs");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
}
