//! What somebody else breaks or changes comes back within a second, and nothing else is
//! touched.

use std::process::Command;
use std::time::{Duration, Instant};

use gambeson_lab::probe::ping::{Echo, Pinger};
use gambeson_lab::wait::until;
use gambeson_lab::{Family, Lab, Node, Options, WireguardMode};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::common::lab::lab_up as up;
use crate::common::scenario::{
    PATIENCE, accepting, assert_connected, dual, fingerprint, options, run, within,
};

/// The promise.
const LIMIT: Duration = Duration::from_secs(1);
/// A machine that does something else makes a repair slower, but not faster.
const ATTEMPTS: usize = 3;

fn userspace() -> Options {
    Options { pods: Family::Dual, ..options(WireguardMode::Userspace) }
}

/// Does damage to a node until the repair was within the limit, which must be soon.
fn assert_repaired(node: Node<'_>, what: &str, damage: impl Fn()) {
    let before = fingerprint(node);
    let mut took = Vec::new();
    while took.len() < ATTEMPTS {
        damage();
        let done = Instant::now();
        let mut last = String::new();
        let back = until(done + PATIENCE, || {
            last = fingerprint(node);
            (last == before).then_some(())
        });
        assert!(back.is_some(), "{what} is not repaired:\n{last}\ninstead of\n{before}");
        took.push(done.elapsed());
        if done.elapsed() <= LIMIT {
            return;
        }
    }
    panic!("{what}: repaired only after {took:?}");
}

/// Does damage by shell commands on the first node, and looks at everything after each.
pub(crate) fn damage(options: Options, commands: &[&str]) {
    let lab = up(options);
    let node = lab.node("node-1").unwrap();
    let environment = node.environment();
    for command in commands {
        assert_repaired(node, command, || drop(run(&environment, command)));
        assert_connected(&lab, "node-1", "node-2");
    }
    assert!(node.status().unwrap().errors.is_empty());
}

pub(crate) const DEVICES: &[&str] = &[
    "ip link delete gambeson0",
    "ip link set gambeson0 down",
    "ip link set gambeson0 mtu 1300",
    "ip address flush dev gambeson0 scope global",
    "ip link set gambeson0 alias theirs",
    "ip link set gambeson0 alias ''",
];

pub(crate) const ROUTES: &[&str] = &[
    "ip route delete 10.244.2.0/24 proto 151",
    "ip -6 route delete fd00:10:244:2::/64 proto 151",
    "ip route delete unreachable 10.244.0.0/16 proto 151 metric 4294967295",
    "ip -6 route delete unreachable fd00:10:244::/48 proto 151",
    "ip route flush proto 151; ip -6 route flush proto 151",
    "ip route change 10.244.2.0/24 dev gambeson0 proto 151 metric 1 mtu 1000",
];

pub(crate) const RULES: &[&str] = &[
    "nft flush ruleset",
    "nft delete table inet gambeson",
    "nft flush chain inet gambeson guard_in",
    "nft delete rule inet gambeson guard_out handle \
     $(nft -a list chain inet gambeson guard_out | sed -n 's/.*drop # handle //p' | head -n 1)",
    "nft insert rule inet gambeson guard_out accept",
    "ip rule flush; ip rule add pref 32766 lookup main; ip rule add pref 32767 lookup default",
    "ip -6 rule delete pref 15101",
    // The second time while the agent is writing.
    "nft flush chain inet gambeson guard_out; sleep 0.02; nft flush chain inet gambeson guard_out",
];

/// Each after the last look at whether the repair before holds.
const TABLES: &[&str] = &[
    "sleep 0.3; ip neigh del 10.244.2.0 dev gambeson-vx4",
    "sleep 0.3; ip -6 neigh flush dev gambeson-vx6 nud permanent",
    "sleep 0.3; ip neigh replace 10.244.2.0 lladdr 02:00:00:00:00:01 dev gambeson-vx4 nud permanent",
    "sleep 0.3; bridge fdb del 0a:58:0a:f4:02:00 dst 192.168.240.2 dev gambeson-vx4",
    "sleep 0.3; bridge fdb replace 0a:58:0a:f4:02:00 dst 192.168.240.9 dev gambeson-vx4",
    "sleep 0.3; bridge fdb add 02:00:00:00:00:02 dst 192.168.240.9 dev gambeson-vx4",
];

pub(crate) const SETTINGS: &[&str] = &[
    "echo 1 > /proc/sys/net/ipv4/conf/gambeson0/rp_filter",
    "echo 0 > /proc/sys/net/ipv4/ip_forward",
    "echo 0 > /proc/sys/net/ipv6/conf/all/forwarding",
    "echo 0 > /proc/sys/net/ipv4/conf/gambeson0/forwarding",
    "echo 0 > /proc/sys/net/ipv4/conf/cni0/forwarding",
    "echo 1 > /proc/sys/net/ipv6/conf/gambeson0/disable_ipv6",
];

#[test]
fn devices() {
    damage(userspace(), DEVICES);
    // Neither alias nor key: while the agent lives it knows the link itself.
    let both = "ip link set gambeson0 alias theirs
                wg genkey | wg set gambeson0 private-key /dev/stdin";
    damage(userspace(), &[both]);
}

#[test]
fn routes() {
    damage(userspace(), ROUTES);
}

#[test]
fn rules() {
    damage(userspace(), RULES);
}

#[test]
fn tables() {
    damage(dual(accepting(&["vxlan"])), TABLES);
}

#[test]
fn settings() {
    damage(userspace(), SETTINGS);
}

/// Without its alias, a new agent knows the device by the key in it.
#[test]
fn a_device_without_its_alias_is_adopted_by_its_key() {
    let lab = up(userspace());
    let node = lab.node("node-1").unwrap();
    let (before, tunnels) = (fingerprint(node), node.tunnels());
    node.kill_agent().unwrap();
    run(&node.environment(), "ip link set gambeson0 alias theirs");
    node.start_agent().unwrap();
    within(PATIENCE, "it is ours again", || (fingerprint(node) == before).then_some(()));
    assert_eq!(tunnels, node.tunnels(), "it was made anew");
    assert_connected(&lab, "node-1", "node-2");
}

/// The name is gone, the device and its process are not. What cannot be adopted is made anew.
#[test]
fn a_renamed_device_is_replaced() {
    let lab = up(userspace());
    let node = lab.node("node-1").unwrap();
    let before = fingerprint(node);
    let rename =
        "ip link set gambeson0 down; ip link set gambeson0 name stray; ip link set stray up";
    run(&node.environment(), rename);
    within(PATIENCE, "the device is there again", || (fingerprint(node) == before).then_some(()));
    assert!(!run(&node.environment(), "ip link").contains("stray"));
    assert_connected(&lab, "node-1", "node-2");
}

#[test]
fn a_killed_tunnel_comes_back_with_its_keys() {
    let lab = up(userspace());
    let node = lab.node("node-1").unwrap();
    let before = node.tunnels();
    assert_repaired(node, "a killed tunnel", || {
        node.tunnels().iter().for_each(|tunnel| tunnel.signal(Signal::SIGKILL));
    });
    assert_ne!(before, node.tunnels());
    assert_connected(&lab, "node-1", "node-2");
}

/// WireGuard says nothing of its changes: the agent looks often enough.
#[test]
fn wireguard_itself_is_repaired() {
    let lab = up(userspace());
    let node = lab.node("node-1").unwrap();
    let environment = node.environment();
    let peer = "$(wg show gambeson0 peers)";
    for change in [
        format!("wg set gambeson0 peer {peer} remove"),
        format!("wg set gambeson0 peer {peer} allowed-ips 10.244.7.0/24"),
        "wg set gambeson0 listen-port 51999".to_owned(),
        "wg set gambeson0 private-key /dev/stdin < /dev/null".to_owned(),
        "wg set gambeson0 fwmark 7".to_owned(),
        format!("wg genpsk | wg set gambeson0 peer {peer} preshared-key /dev/stdin"),
    ] {
        assert_repaired(node, &change, || drop(run(&environment, &change)));
        assert_connected(&lab, "node-1", "node-2");
    }
}

/// A process that hangs answers nobody, its device is there, and its port is taken.
#[test]
fn a_hung_tunnel_is_replaced() {
    let lab = up(userspace());
    let node = lab.node("node-1").unwrap();
    // Once more: what the first took must not make the second slower.
    for _ in 0..2 {
        let [before] = &node.tunnels()[..] else { panic!("not one tunnel") };
        before.signal(Signal::SIGSTOP);
        within(Duration::from_secs(10), "it is ended", || (!before.is_alive()).then_some(()));
        assert_connected(&lab, "node-1", "node-2");
    }
    within(PATIENCE, "no error stays", || node.status().ok()?.errors.is_empty().then_some(()));
}

/// A program that hangs keeps nothing from being repaired but what it is needed for.
#[test]
fn a_hung_nft_is_said_and_the_rest_is_repaired() {
    let lab = up(userspace());
    let node = lab.node("node-1").unwrap();
    let environment = node.environment();
    let before = fingerprint(node);
    // The agent's own mounts: those of a command are its own.
    let pid = node.agent().unwrap().pid;
    let mount = |script: &str| {
        let output = Command::new("nsenter")
            .args([&format!("--mount=/proc/{pid}/ns/mnt"), "sh", "-ec", script])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    mount(
        "printf '#!/bin/sh\nexec sleep 600\n' > /run/hung-nft; chmod +x /run/hung-nft
         mount --bind /run/hung-nft $(readlink -f $(command -v nft))",
    );
    run(&environment, "nft flush chain inet gambeson guard_out; ip route flush proto 151");
    within(PATIENCE, "it is said", || {
        let errors = node.status().ok()?.errors;
        errors.iter().any(|e| e.contains("`nft` did not") && e.contains("3 s")).then_some(())
    });
    within(PATIENCE, "the routes are repaired", || {
        let routes = run(&environment, "ip route show proto 151");
        (routes.lines().count() == 2).then_some(())
    });
    mount("umount $(readlink -f $(command -v nft))");
    within(PATIENCE, "the guard is repaired", || (fingerprint(node) == before).then_some(()));
    within(PATIENCE, "no error stays", || node.status().ok()?.errors.is_empty().then_some(()));
    assert!(!run(&environment, "ps -eo args").contains("sleep 600"), "it was not ended");
}

#[test]
fn what_is_not_ours_stays() {
    let lab = up(userspace());
    let node = lab.node("node-1").unwrap();
    let environment = node.environment();
    run(
        &environment,
        "ip link add stray type bridge; ip link set stray up; ip address add 10.9.0.1/24 dev stray
         ip route add 10.98.0.0/16 dev stray
         ip route add 10.244.77.0/24 dev stray proto static
         ip route add unreachable 10.244.78.0/24 metric 7
         ip -6 route add fd00:98::/64 dev stray proto static
         ip route add 10.97.0.0/16 dev stray table 97
         nft add table inet stray; nft add chain inet stray c; nft add rule inet stray c accept",
    );
    let look = || {
        run(
            &environment,
            "ip -o address show dev stray; ip route show dev stray; ip -6 route show dev stray
             ip route show 10.244.78.0/24; ip route show table 97; nft -s list table inet stray
             ip rule show",
        )
    };
    let foreign = look();
    assert!(foreign.contains("unreachable 10.244.78.0/24") && foreign.contains("chain c"));
    for command in [DEVICES[0], ROUTES[4], RULES[1]] {
        assert_repaired(node, command, || drop(run(&environment, command)));
    }
    assert_eq!(foreign, look());
    let before = fingerprint(node);
    node.restart_agent().unwrap();
    within(PATIENCE, "the agent is at work", || {
        let status = node.status().ok()?;
        (!status.peers.is_empty()).then_some(())
    });
    assert_eq!(foreign, look());
    assert_eq!(before, fingerprint(node));
}

/// What somebody else owns and that takes our packets is said by name, and left to them.
#[test]
fn foreign_routes_in_our_way_are_named() {
    let lab = up(userspace());
    let node = lab.node("node-1").unwrap();
    let environment = node.environment();
    run(&environment, "ip link add stray type bridge; ip link set stray up");
    for (route, says) in [
        ("10.244.2.0/24 dev stray metric 0", "(dev stray, protocol 3)"),
        ("blackhole 10.244.2.0/25 metric 7", "10.244.2.0/25 metric 7 (blackhole, protocol 3)"),
        ("prohibit 10.244.2.0/24 proto 151", "(prohibit, protocol 151)"),
        ("unreachable fd00:10:244:2::9/128 proto static", "(unreachable, protocol 4)"),
    ] {
        let ip = if route.contains("::") { "ip -6" } else { "ip" };
        run(&environment, &format!("{ip} route prepend {route}"));
        within(LIMIT * 3, route, || {
            let errors = node.status().ok()?.errors;
            errors.iter().any(|e| e.contains(says) && e.contains("ip route delete")).then_some(())
        });
        run(&environment, &format!("{ip} route delete {route}"));
        within(LIMIT * 3, "the error goes with the route", || {
            node.status().ok()?.errors.is_empty().then_some(())
        });
        assert_connected(&lab, "node-1", "node-2");
    }
}

/// A FORWARD policy of DROP, as Docker sets it, does not silence pods.
#[test]
fn a_forward_policy_of_drop_is_opened_for_pods_or_said() {
    let lab = up(userspace());
    let node = lab.node("node-1").unwrap();
    let environment = node.environment();
    let rules = || {
        let rules = run(&environment, "iptables-nft -S; ip6tables-nft -S");
        rules.lines().filter(|rule| rule.contains("GAMBESON-FWD")).count()
    };
    assert_eq!(rules(), 0, "nobody drops anything");
    for breach in [
        "iptables-nft -P FORWARD DROP; ip6tables-nft -P FORWARD DROP",
        "iptables-nft -F FORWARD; ip6tables-nft -F",
        "iptables-nft -D GAMBESON-FWD 1; ip6tables-nft -D FORWARD -j GAMBESON-FWD",
    ] {
        run(&environment, breach);
        // In each family a chain, a jump and two rules.
        within(LIMIT * 3, breach, || (rules() == 8).then_some(()));
        assert_connected(&lab, "node-1", "node-2");
    }
    let outside = run(&environment, "iptables-nft -S FORWARD");
    assert!(outside.contains("-P FORWARD DROP"), "nothing else is accepted: {outside}");
    let wall = "{ type filter hook forward priority 10; policy drop; }";
    run(&environment, &format!("nft add table inet wall; nft add chain inet wall f '{wall}'"));
    within(LIMIT * 3, "it is said", || {
        let errors = node.status().ok()?.errors;
        errors.iter().any(|error| error.contains("inet wall f drops what pods send")).then_some(())
    });
    run(&environment, "nft delete table inet wall");
    within(PATIENCE, "no error stays", || node.status().ok()?.errors.is_empty().then_some(()));
    assert_connected(&lab, "node-1", "node-2");
}

/// A link with one of our names is not trusted for its name: what it carries is in clear.
#[test]
fn a_foreign_device_with_a_name_of_ours_is_not_trusted() {
    let lab = up(userspace());
    let node = lab.node("node-1").unwrap();
    let environment = node.environment();
    run(&environment, "ip link add gambeson3 type bridge; ip link set gambeson3 up");
    let trusts =
        || run(&environment, "nft list chain inet gambeson guard_out").contains("gambeson3");
    within(LIMIT, "it is not trusted", || (!trusts()).then_some(()));
    run(&environment, "ip link delete gambeson3");
    within(LIMIT, "its name is ours again", || trusts().then_some(()));
    assert_connected(&lab, "node-1", "node-2");
}

#[test]
fn a_foreign_device_with_our_name_is_refused_and_left_alone() {
    let lab = up(Options { start: false, ..userspace() });
    let node = lab.node("node-1").unwrap();
    let make = "ip link add gambeson0 type bridge && ip link set gambeson0 alias theirs";
    run(&node.environment(), make);
    let look = || run(&node.environment(), "ip -d link show gambeson0");
    let before = look();
    let program = lab.options().binary.to_str().unwrap();
    let agent = [
        "timeout",
        "20",
        program,
        "agent",
        "--node-name",
        "node-1",
        "--iface",
        "eth0",
        "--kubeconfig",
        "/run/gambeson/kubeconfig",
        "--cluster-cidr",
        "10.244.0.0/16",
        "--cni-conf-dir",
        "/var/lib/lab/cni/net.d",
        "--wireguard",
        "userspace",
    ];
    let output = node.exec(&agent).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(7), "{said}");
    assert!(said.contains("gambeson0"), "{said}");
    assert_eq!(before, look());
}

/// MTU of the node's device, and of its peer's route to it.
fn mtus(lab: &Lab) -> (String, String) {
    let [one, two] = ["node-1", "node-2"].map(|name| lab.node(name).unwrap().environment());
    let device = run(&one, "cat /sys/class/net/gambeson0/mtu");
    let route = run(&two, "ip route show 10.244.1.0/24 | grep -o 'mtu [0-9]*' | cut -d' ' -f2");
    (device.trim().to_owned(), route.trim().to_owned())
}

fn annotation(lab: &Lab, name: &str) -> Value {
    let node = lab.api().unwrap().node("node-1").unwrap();
    node["metadata"]["annotations"][format!("gambeson.io/{name}")].clone()
}

/// The inner MTU follows the underlay's, on this node and on its peers.
pub(crate) fn underlay_mtu_changes(options: Options) {
    let lab = up(options);
    let node = lab.node("node-1").unwrap();
    for (underlay, inner) in [(1400, 1340), (1500, 1440)] {
        run(&node.environment(), &format!("ip link set eth0 mtu {underlay}"));
        let text = inner.to_string();
        within(PATIENCE, &format!("all follow an underlay MTU of {underlay}"), || {
            let env = run(&node.environment(), "cat /run/flannel/subnet.env");
            (mtus(&lab) == (text.clone(), text.clone())
                && annotation(&lab, "mtu") == *text
                && env.contains(&format!("FLANNEL_MTU={inner}\n")))
            .then_some(())
        });
        // Pods keep their interface's MTU; the node answers for the path. What they learn of
        // it they forget after ten minutes.
        for pod in lab.pods() {
            run(&pod.environment(), "ip route flush cache; ip -6 route flush cache");
        }
        let [one, two] = [lab.pods()[0], lab.pods()[1]];
        for (from, to) in [(one, two), (two, one)] {
            for address in to.addresses() {
                from.netns()
                    .run(|| {
                        let mut ping = Pinger::new(address).unwrap();
                        within(PATIENCE, "the largest packet passes", || {
                            let echo = ping.echo_of_size(inner).unwrap();
                            matches!(echo, Echo::Answered(_)).then_some(())
                        });
                        let larger = ping.echo_of_size(inner + 1).unwrap();
                        assert!(!matches!(larger, Echo::Answered(_)), "{} passed", inner + 1);
                    })
                    .unwrap();
            }
        }
    }
}

#[test]
fn the_mtu_follows_the_underlay() {
    underlay_mtu_changes(userspace());
}

/// A node gets another address: its annotation and its peers follow.
pub(crate) fn node_address_changes(options: Options) {
    let lab = up(options);
    let node = lab.node("node-1").unwrap();
    run(
        &node.environment(),
        "ip address delete 192.168.240.1/24 dev eth0; ip address add 192.168.240.101/24 dev eth0
         ip route replace default via 192.168.240.254",
    );
    within(PATIENCE, "the new address is published", || {
        (annotation(&lab, "endpoint") == "192.168.240.101").then_some(())
    });
    let two = lab.node("node-2").unwrap().environment();
    within(PATIENCE, "the peer sends there", || {
        let endpoints = run(&two, "wg show gambeson0 endpoints");
        endpoints.trim_end().ends_with("\t192.168.240.101:51820").then_some(())
    });
    assert_connected(&lab, "node-1", "node-2");
}

#[test]
fn peers_follow_a_new_node_address() {
    node_address_changes(userspace());
}

/// IPv6 goes away on a node's underlay: it is reached over IPv4 from then on.
pub(crate) fn underlay_family_off(options: Options) {
    let lab = up(Options { underlay: Family::Dual, pods: Family::Dual, ..options });
    let node = lab.node("node-1").unwrap();
    assert!(annotation(&lab, "endpoint-v6").is_string());
    run(&node.environment(), "echo 1 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6");
    within(PATIENCE, "the IPv6 endpoint is withdrawn", || {
        annotation(&lab, "endpoint-v6").is_null().then_some(())
    });
    assert_connected(&lab, "node-1", "node-2");
    assert_eq!(annotation(&lab, "endpoint"), "192.168.240.1");
}

#[test]
fn an_underlay_without_ipv6_any_more_is_used_over_ipv4() {
    underlay_family_off(userspace());
}

/// A host without any IPv6 has the same mesh over IPv4, devices made anew included.
#[test]
fn a_host_without_ipv6_works() {
    let lab = up(options(WireguardMode::Userspace));
    let node = lab.node("node-1").unwrap();
    let off = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6
               echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6";
    run(&node.environment(), off);
    assert_repaired(node, DEVICES[0], || drop(run(&node.environment(), DEVICES[0])));
    assert_connected(&lab, "node-1", "node-2");
    node.restart_agent().unwrap();
    let mut last = None;
    let at_work = until(Instant::now() + PATIENCE, || {
        let status = last.insert(node.status().ok()?);
        (!status.peers.is_empty() && status.errors.is_empty()).then_some(())
    });
    assert!(at_work.is_some(), "{last:#?}");
    assert_connected(&lab, "node-1", "node-2");
}
