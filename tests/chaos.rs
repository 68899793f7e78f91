//! Damage of every kind, singly and in pairs, agents killed, hostile Nodes, in random order
//! under traffic and captures: nothing in clear by a single damage, and everything repaired.
//!
//! `GAMBESON_CHAOS_SECONDS` makes it longer, `GAMBESON_CHAOS_SEED` repeats a run.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gambeson_lab::{Family, Lab, Node, Options, Pod, WireguardMode};
use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};

use crate::common::agent::stranger;
use crate::common::lab::lab_up;
use crate::common::scenario::{PATIENCE, assert_connected, fingerprint, options, run, within};
use crate::leak::Watch;
use crate::repair::{DEVICES, ROUTES, RULES, SETTINGS};

const SECONDS: u64 = 60;
/// Of ten rounds so many are of one damage alone.
const SINGLE: u32 = 8;
/// UDP port that nobody listens on (discard).
const DISCARD: u16 = 9;
const PEERS: &str = "$(wg show gambeson0 peers | head -n 1)";

/// One thing that goes wrong on a node, and is to be made good by its agent.
#[derive(Debug, Clone)]
enum Damage {
    Shell(String),
    KillTunnel,
    KillAgent,
    /// Somebody else's, which is to be said for as long as it is there.
    Foreign {
        make: &'static str,
        says: &'static str,
        unmake: &'static str,
    },
}

const FOREIGN: [Damage; 4] = [
    Damage::Foreign {
        make: "ip route prepend 10.244.2.0/24 dev eth0",
        says: "takes the packets to the pods in 10.244.2.0/24",
        unmake: "ip route delete 10.244.2.0/24 dev eth0",
    },
    Damage::Foreign {
        make: "ip -6 route add blackhole fd00:10:244:2::/65",
        says: "takes the packets to the pods in fd00:10:244:2::/64",
        unmake: "ip -6 route delete blackhole fd00:10:244:2::/65",
    },
    Damage::Foreign {
        make: "nft add table inet wall; \
               nft add chain inet wall f '{ type filter hook forward priority 0; policy drop; }'",
        says: "inet wall f drops what pods send",
        unmake: "nft delete table inet wall",
    },
    Damage::Foreign {
        make: "ip address add 10.244.99.1/24 dev eth0",
        says: "overlaps address 10.244.99.1/24 of eth0",
        unmake: "ip address delete 10.244.99.1/24 dev eth0",
    },
];

impl Damage {
    fn all() -> Vec<Self> {
        let shell = [DEVICES, ROUTES, RULES, SETTINGS].concat();
        let wireguard = [
            format!("wg set gambeson0 peer {PEERS} remove"),
            format!("wg set gambeson0 peer {PEERS} allowed-ips 10.244.77.0/24"),
            format!("wg genpsk | wg set gambeson0 peer {PEERS} preshared-key /dev/stdin"),
            "wg set gambeson0 listen-port 51999".to_owned(),
            "wg set gambeson0 fwmark 9".to_owned(),
            "wg genkey | wg set gambeson0 private-key /dev/stdin".to_owned(),
        ];
        let shell = shell.into_iter().map(str::to_owned).chain(wireguard).map(Self::Shell);
        let ends = [Self::KillTunnel, Self::KillAgent, Self::KillAgent];
        shell.chain(ends).chain(FOREIGN).collect()
    }

    fn happen(&self, node: Node<'_>) {
        match self {
            // The second of a pair may find that the first has left nothing to damage.
            Self::Shell(command) => _ = run(&node.environment(), &format!("({command}) || true")),
            Self::KillTunnel => node.tunnels().iter().for_each(|t| t.signal(Signal::SIGKILL)),
            // As a kubelet does with one that crashed.
            Self::KillAgent => {
                node.kill_agent().unwrap();
                node.start_agent().unwrap();
            }
            Self::Foreign { make, says, unmake } => {
                let environment = node.environment();
                run(&environment, make);
                within(PATIENCE, says, || {
                    let errors = node.status().ok()?.errors;
                    errors.iter().any(|error| error.contains(says)).then_some(())
                });
                run(&environment, unmake);
            }
        }
    }
}

pub(crate) fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

/// A Node that claims what another has, or says what makes no sense.
fn hostile(rng: &mut StdRng, lab: &Lab) -> Value {
    let mut node = stranger(90);
    let victim = lab.api().unwrap().node("node-2").unwrap();
    let key = victim["metadata"]["annotations"]["gambeson.io/public-key"].clone();
    node["metadata"]["name"] = ["a-thief", "node-20", "zzz"].choose(rng).copied().unwrap().into();
    match rng.random_range(0..4) {
        0 => node["metadata"]["annotations"]["gambeson.io/public-key"] = key,
        1 => node["metadata"]["annotations"]["gambeson.io/public-key"] = "garbage".into(),
        2 => node["metadata"]["annotations"]["gambeson.io/endpoint"] = "127.0.0.1".into(),
        _ => {
            let cidr = "10.244.2.0/24";
            node["spec"] = json!({ "podCIDR": cidr, "podCIDRs": [cidr] });
        }
    }
    node
}

/// Sends the canary from a pod to every address of the others until it is told to stop.
fn flood(watch: &Watch<'_>, from: Pod<'_>, to: &[IpAddr], stop: &AtomicBool) {
    let payload = watch.payload();
    let send = || {
        let sockets: Vec<_> = to
            .iter()
            .map(|address| {
                let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                (UdpSocket::bind(any).unwrap(), SocketAddr::new(*address, DISCARD))
            })
            .collect();
        while !stop.load(Ordering::Relaxed) {
            for (socket, to) in &sockets {
                // Refused while a wall is all there is.
                let _ = socket.send_to(&payload, to);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    from.netns().run(send).unwrap();
}

/// Waits until a node is as it was. What was done to it and the seed tell how to repeat it.
fn assert_repaired(node: Node<'_>, before: &str, what: &str) {
    let mut last = String::new();
    let repaired = gambeson_lab::wait::until(Instant::now() + PATIENCE, || {
        last = fingerprint(node);
        (last == before).then_some(())
    });
    let log = node.agent_log().unwrap_or_default();
    let tail: Vec<_> = log.lines().rev().take(20).collect();
    assert!(repaired.is_some(), "{what}:\n{last}\ninstead of\n{before}\n{tail:#?}");
}

/// Rounds of damage until the time is over.
struct Chaos<'a> {
    lab: &'a Lab,
    rng: StdRng,
    damages: Vec<Damage>,
    before: Vec<(Node<'a>, String)>,
}

impl Chaos<'_> {
    fn round(&mut self, count: usize) {
        let chosen: Vec<_> = self.damages.choose_multiple(&mut self.rng, count).cloned().collect();
        let index = self.rng.random_range(0..self.before.len());
        let (node, before) = &self.before[index];
        let what = format!("{} after {chosen:?}", node.name());
        eprintln!("{what}");
        if self.rng.random_ratio(1, 4) {
            let node = hostile(&mut self.rng, self.lab);
            // One of that name may be there already.
            let _ = self.lab.api().unwrap().create_node(&node);
        }
        for damage in &chosen {
            damage.happen(*node);
            std::thread::sleep(Duration::from_millis(self.rng.random_range(0..40)));
        }
        assert_repaired(*node, before, &what);
    }

    fn rounds(&mut self, count: usize, end: Instant) -> u32 {
        let mut rounds = 0;
        while Instant::now() < end {
            self.round(count);
            rounds += 1;
        }
        rounds
    }
}

#[test]
fn whatever_happens_nothing_is_in_clear_and_everything_is_repaired() {
    let seed = number("GAMBESON_CHAOS_SEED").unwrap_or_else(rand::random);
    let time = Duration::from_secs(number("GAMBESON_CHAOS_SECONDS").unwrap_or(SECONDS));
    eprintln!("GAMBESON_CHAOS_SEED={seed}");
    let pods = Family::Dual;
    let lab = lab_up(Options { nodes: 3, pods, ..options(WireguardMode::Userspace) });
    // What goes wrong names the routes to node-2, which itself is spared.
    let nodes = ["node-1", "node-3"].map(|name| lab.node(name).unwrap());
    let before = nodes.map(|node| (node, fingerprint(node))).into();
    let rng = StdRng::seed_from_u64(seed);
    let mut chaos = Chaos { lab: &lab, rng, damages: Damage::all(), before };
    // A creationTimestamp has seconds, and with the device and the agent gone at once, it alone
    // tells a thief of a key from its owner.
    std::thread::sleep(Duration::from_secs(1));
    let start = Instant::now();
    let stop = AtomicBool::new(false);
    let watch = Watch::start(&lab);
    let singles = std::thread::scope(|scope| {
        for pod in lab.pods() {
            let others = lab.pods().into_iter().filter(|other| other.name() != pod.name());
            let to: Vec<IpAddr> = others.flat_map(|other| other.addresses().to_vec()).collect();
            let (watch, stop) = (&watch, &stop);
            scope.spawn(move || flood(watch, pod, &to, stop));
        }
        // A failed round must not leave the others sending for ever.
        let singles = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            chaos.rounds(1, start + time * SINGLE / 10)
        }));
        stop.store(true, Ordering::Relaxed);
        singles.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    watch.assert_silent();
    let pairs = chaos.rounds(2, start + time);
    eprintln!("{singles} damages and {pairs} pairs of them");
    for name in ["a-thief", "node-20", "zzz"] {
        let _ = lab.api().unwrap().delete_node(name);
    }
    for node in lab.nodes() {
        within(PATIENCE, "nothing is left to say", || {
            let status = node.status().ok()?;
            (status.errors.is_empty() && status.peers.len() == 2).then_some(())
        });
        assert!(node.tunnels().len() == 1, "one tunnel each");
    }
    for (a, b) in [("node-1", "node-2"), ("node-1", "node-3"), ("node-2", "node-3")] {
        assert_connected(&lab, a, b);
    }
}
