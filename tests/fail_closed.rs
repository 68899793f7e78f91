//! One canary, sent without a pause between two nodes that only accept WireGuard, while agents
//! start, end, are killed and replaced, firewalls are flushed and transports change.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Output;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Scope, scope, sleep};
use std::time::Duration;

use gambeson_lab::{CONF_DIR, Lab, Netns, Node, Options};
use nix::sys::signal::Signal;

use crate::changeover::moved;
use crate::common::agent::status_when;
use crate::common::lab::{GAMBESON, both, lab_up};
use crate::common::scenario::{accept, accepting, assert_connected, dual, guard_drops, run};
use crate::leak::{DISCARD, Watch};

/// Between two rounds to all addresses.
const PAUSE: Duration = Duration::from_millis(1);

/// Three nodes, of which the last also accepts VXLAN.
fn lab() -> Lab {
    let options = accepting(&["wireguard", "node-3=wireguard,vxlan"]);
    lab_up(dual(Options { nodes: 3, ..options }))
}

/// Sends from a place to these addresses until `stop`.
fn flood<'s>(
    scope: &'s Scope<'s, '_>,
    from: Netns,
    to: Vec<IpAddr>,
    payload: [u8; 32],
    stop: &'s AtomicBool,
) {
    let socket = |address: &IpAddr| {
        let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        (UdpSocket::bind(any).unwrap(), SocketAddr::new(*address, DISCARD))
    };
    scope.spawn(move || {
        let send = || {
            let sockets: Vec<_> = to.iter().map(socket).collect();
            while !stop.load(Ordering::Relaxed) {
                for (socket, to) in &sockets {
                    // Refused while there is no way, which is the point.
                    let _ = socket.send_to(&payload, to);
                }
                sleep(PAUSE);
            }
        };
        from.run(send).unwrap();
    });
}

/// Sends the canary between pods and nodes of the first two nodes, both ways and over both
/// families, for as long as `events` takes.
fn while_flooding(lab: &Lab, watch: &Watch<'_>, events: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    let [one, two] = ["pod-1-1", "pod-2-1"].map(|pod| lab.pod(pod).unwrap());
    scope(|scope| {
        for (from, to) in [(one, two), (two, one)] {
            for place in [from.netns(), from.node().netns()] {
                flood(scope, place, to.addresses(), watch.payload(), &stop);
            }
        }
        events();
        stop.store(true, Ordering::Relaxed);
    });
}

fn uninstall(node: Node<'_>, arguments: &[&str]) -> Output {
    let command = [&[GAMBESON, "uninstall", "--cni-conf-dir", CONF_DIR], arguments];
    node.exec(&command.concat()).unwrap()
}

fn ready(node: Node<'_>) {
    status_when(node, "is in the mesh", |status| status.ready && status.peers.len() == 2);
}

#[test]
fn nothing_leaves_in_clear_whatever_happens_to_agents_and_firewalls() {
    let lab = lab();
    let [one, two] = ["node-1", "node-2"].map(|name| lab.node(name).unwrap());
    let watch = Watch::start(&lab);
    while_flooding(&lab, &watch, || {
        for node in [one, two] {
            node.restart_agent().unwrap();
            ready(node);
            node.kill_agent().unwrap();
            node.start_agent().unwrap();
            ready(node);
            run(&node.environment(), "nft flush ruleset");
            sleep(Duration::from_secs(1));
            run(&node.environment(), "nft list table inet gambeson");
            for tunnel in node.tunnels() {
                tunnel.signal(Signal::SIGKILL);
            }
            ready(node);
        }
    });
    watch.assert_silent();
    assert_connected(&lab, "node-1", "node-2");
}

#[test]
fn nothing_leaves_in_clear_while_transports_change() {
    let lab = lab();
    let [one, two, three] = ["node-1", "node-2", "node-3"].map(|name| lab.node(name).unwrap());
    let via_three = |expected: &str| {
        status_when(one, &format!("reaches node-3 by {expected}"), |status| {
            status.peers.iter().any(|peer| peer.name == "node-3" && peer.transport == expected)
        });
    };
    let watch = Watch::start(&lab);
    while_flooding(&lab, &watch, || {
        // Another pair's transport opens a device in clear, which is none for this pair.
        accept(one, "wireguard,vxlan");
        accept(three, "vxlan");
        via_three("vxlan");
        accept(three, "wireguard,vxlan");
        via_three("wireguard-userspace");
        // One end alone wants it in clear: the pair has no way left.
        accept(one, "vxlan");
        status_when(two, "refuses node-1", |status| {
            status.refused.iter().any(|refused| refused.name == "node-1")
        });
        sleep(Duration::from_secs(4));
        accept(one, "wireguard");
        moved(two, "wireguard-userspace");
    });
    watch.assert_silent();
    assert_connected(&lab, "node-1", "node-2");
}

/// `flood` sends in clear where nothing is in the way: see its control.
#[test]
fn only_uninstall_opens_the_guard_and_only_when_it_is_told_to() {
    let lab = lab();
    let node = lab.node("node-1").unwrap();
    let refused = uninstall(node, &["--allow-plaintext"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(both(&refused).contains("an agent runs on this node"), "{}", both(&refused));
    assert_connected(&lab, "node-1", "node-2");

    node.stop_agent().unwrap();
    let watch = Watch::start(&lab);
    while_flooding(&lab, &watch, || {
        let removed = uninstall(node, &[]);
        let said = both(&removed);
        assert!(removed.status.success(), "{said}");
        for part in ["- link gambeson0", "10-flannel.conflist", "keys.json stays", "guard stays"] {
            assert!(said.contains(part), "{said}");
        }
        sleep(Duration::from_millis(500));
    });
    watch.assert_silent();
    let left = "ip -br link show type tun; ip route show proto 151; ip rule; nft list tables";
    let left = run(&node.environment(), left);
    assert!(left.contains("unreachable 10.244.0.0/16"), "{left}");
    assert!(left.contains("15101:") && left.contains("table inet gambeson"), "{left}");
    assert!(!left.contains("gambeson0") && !left.contains("10.244.2.0/24"), "{left}");
    assert!(guard_drops(node) == (0, 0), "routes stop it first");

    assert!(uninstall(node, &["--allow-plaintext"]).status.success());
    let left = "ip route show proto 151; ip -6 route show proto 151; ip rule show pref 15100;
                ip -6 rule show pref 15101; nft list ruleset";
    assert_eq!(run(&node.environment(), left), "");
    assert!(both(&uninstall(node, &["--allow-plaintext"])).contains("nothing to remove"));
    // The control: now the same packets are on the underlay.
    let open = Watch::start(&lab);
    while_flooding(&lab, &open, || sleep(Duration::from_millis(200)));
    open.assert_seen(node.netns().name());
    drop(open);

    // Whoever comes back has its key and its pods.
    node.start_agent().unwrap();
    ready(node);
    assert_connected(&lab, "node-1", "node-2");
}
