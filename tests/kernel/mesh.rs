//! Whole labs on the kernel's devices.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use gambeson::exit::Exit;
use gambeson_lab::traffic::{FlowReport, Rate, Traffic};
use gambeson_lab::verify::Verification;
use gambeson_lab::wait::until;
use gambeson_lab::{Family, Lab, Node, Options, Progress, Transports};
use gambeson_mesh::node::Transport;
use serde_json::Value;

use crate::common::agent::{address, answers, eventually};
use crate::common::lab::{GAMBESON, both, chain, lab_options, lab_up};
use crate::common::scenario::accept;
use crate::migration::flannels;
use crate::rotation::request;

/// The emulated machine is some ten times slower, and busy with packets; what takes this long
/// is broken.
const PATIENCE: Duration = Duration::from_secs(120);
/// Within which damage has been repaired and seen to be: an event did it, not the resync.
/// That it takes no second is measured where the processor is real.
const REPAIRED: Duration = Duration::from_secs(10);
/// Packets of a flow on their way: fewer than any queue holds.
const WINDOW: u64 = 256;

fn with_modes(modes: &str) -> Options {
    Options { wireguard: modes.parse().unwrap(), ..lab_options() }
}

fn verified(lab: &Lab) -> Verification {
    let result =
        lab.verify(&Progress::silent()).unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert!(result.ok, "{result}");
    let (pods, mtu) = (lab.pods().len(), lab.options().pod_mtu());
    let families = if lab.options().pods == Family::Dual { 2 } else { 1 };
    assert_eq!(result.pairs.len(), pods * (pods - 1) * families);
    for found in [&result.mtu, &result.mtu_v6].into_iter().take(families) {
        let found = found.as_ref().unwrap();
        assert_eq!((found.largest_ok, found.first_refused), (Some(mtu), Some(mtu + 1)));
    }
    assert!(result.plaintext.control_found && !result.plaintext.canary_found);
    result
}

fn assert_transport(result: &Verification, from: &str, transport: &str) {
    let mut pairs = result.pairs.iter().filter(|pair| pair.from == from).peekable();
    assert!(pairs.peek().is_some(), "no pair from {from}");
    assert!(pairs.all(|pair| pair.transport == transport), "{result}");
}

/// The output of a script on a node, which must succeed.
fn sh(node: &Node<'_>, script: &str) -> String {
    let output = node.exec(&["sh", "-c", script]).unwrap();
    assert!(output.status.success(), "`{script}` on {}: {}", node.name(), both(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn link(node: &Node<'_>) -> Value {
    let mut links: Value =
        serde_json::from_str(&sh(node, "ip -json -d link show gambeson0")).unwrap();
    links[0].take()
}

/// What `wg` and `ip` see is the kernel's, and what the agent says of it.
fn assert_kernel_device(node: &Node<'_>) {
    let link = link(node);
    assert_eq!(link["linkinfo"]["info_kind"], "wireguard", "{link}");
    assert_eq!(link["ifalias"], "gambeson", "{link}");
    assert_eq!(node.tunnels(), []);
    let status = node.status().unwrap();
    assert_eq!(status.implementation.as_deref(), Some("kernel"));
    let dump = sh(node, "wg show gambeson0 dump");
    let mut lines = dump.lines().map(|line| line.split('\t').collect::<Vec<_>>());
    let device = lines.next().unwrap();
    assert_eq!(status.public_key.as_deref(), Some(device[1]), "{dump}");
    assert_eq!(device[2], "51820");
    let peers: Vec<_> = lines.collect();
    assert_eq!(peers.len(), status.peers.len(), "{dump}");
    for (shown, peer) in peers.iter().zip(&status.peers) {
        assert_eq!(peer.endpoint.map(|endpoint| endpoint.to_string()).as_deref(), Some(shown[2]));
        let prefixes: Vec<_> = peer.pod_cidrs.iter().map(ToString::to_string).collect();
        assert_eq!(prefixes.join(","), shown[3]);
        assert!(shown[4].parse::<u64>().unwrap() > 0, "no handshake: {dump}");
    }
}

#[test]
fn everything_holds_over_ipv4_and_damage_is_repaired() {
    let lab = lab_up(with_modes("kernel"));
    let result = verified(&lab);
    for pod in ["pod-1-1", "pod-2-1"] {
        assert_transport(&result, pod, "wireguard-kernel");
    }
    lab.nodes().iter().for_each(assert_kernel_device);
    let node = lab.node("node-1").unwrap();
    for damage in [
        "ip link delete gambeson0",
        "nft flush ruleset",
        "ip route delete 10.244.2.0/24",
        "ip link set gambeson0 down",
    ] {
        repaired(&node, damage);
        let (from, to) = (lab.pod("pod-1-1").unwrap(), address(&lab, "pod-2-1"));
        eventually(node, damage, || answers(from, to).then_some(()));
    }
    lab.nodes().iter().for_each(assert_kernel_device);
}

/// From the kernel's WireGuard to direct routes, and back as soon as there is a handshake.
#[test]
fn a_pair_changes_its_transport_without_losing_a_packet() {
    let both = "wireguard,host-gw";
    let transports = Transports::parse(&[both.to_owned()]).unwrap();
    let lab = lab_up(Options { transports, ..with_modes("kernel") });
    let pair = (lab.pod("pod-1-1").unwrap(), lab.pod("pod-2-1").unwrap());
    let rate = Rate { packets_per_second: 100, ..Rate::default() };
    let traffic = Traffic::start_within(&[pair], rate, WINDOW).unwrap();
    for (list, expected) in [("host-gw", "host-gw"), (both, "wireguard-kernel")] {
        accept(lab.node("node-1").unwrap(), list);
        for node in lab.nodes() {
            eventually(node, expected, || {
                let status = node.status().ok()?;
                status.peers.iter().all(|peer| peer.transport == expected).then_some(())
            });
        }
    }
    let reports = traffic.finish(PATIENCE);
    assert!(reports.iter().all(FlowReport::is_perfect), "{reports:#?}");
}

/// Before Linux 6.2 a link is renamed only while it is down: what that loses comes back.
#[test]
fn flannels_device_is_taken_over_though_it_has_to_go_down() {
    let lab = flannels(2, Transport::Vxlan, "vxlan");
    for node in lab.nodes() {
        let mac = |text: &str| {
            let mut words = text.split_whitespace().skip_while(|word| *word != "link/ether");
            words.nth(1).unwrap().to_owned()
        };
        let before = sh(&node, "ip -o link show flannel.1");
        node.stop_agent().unwrap();
        node.start_agent().unwrap();
        eventually(node, "takes over", || {
            let status = node.status().ok()?;
            (status.ready && status.peers.len() == 1 && status.errors.is_empty()).then_some(())
        });
        let after = sh(&node, "ip -o link show gambeson-vx4");
        assert_eq!(mac(&before), mac(&after));
        let (from, to) = (lab.pod("pod-1-1").unwrap(), address(&lab, "pod-2-1"));
        eventually(node, "reaches the other", || answers(from, to).then_some(()));
    }
}

/// Everything of ours that somebody could damage, as text that is the same when it is whole.
fn picture(node: &Node<'_>) -> String {
    sh(
        node,
        "wg show gambeson0 allowed-ips; \
         ip addr show gambeson0 2>/dev/null | grep -o 'inet.*\\|mtu.*'; ip route show proto 151; nft -s list table inet gambeson 2>/dev/null; true",
    )
}

fn repaired(node: &Node<'_>, damage: &str) {
    let whole = picture(node);
    sh(node, damage);
    let start = Instant::now();
    let mut last = String::new();
    let found = until(start + REPAIRED, || {
        last = picture(node);
        (last == whole).then(|| start.elapsed())
    });
    let time = found.unwrap_or_else(|| panic!("`{damage}`: not {whole}\nbut {last}"));
    println!("`{damage}` is repaired after {} ms", time.as_millis());
}

#[test]
fn auto_takes_the_kernel_and_everything_holds_in_both_families() {
    let dual = Options { underlay: Family::Dual, pods: Family::Dual, ..with_modes("auto") };
    let lab = lab_up(dual);
    let result = verified(&lab);
    assert_transport(&result, "pod-1-1", "wireguard-kernel");
    lab.nodes().iter().for_each(assert_kernel_device);
}

#[test]
fn kernel_and_userspace_understand_each_other() {
    let modes = with_modes("node-1=kernel,node-2=userspace");
    let lab = lab_up(Options { underlay: Family::V6, pods: Family::Dual, ..modes });
    let result = verified(&lab);
    assert_transport(&result, "pod-1-1", "wireguard-kernel");
    assert_transport(&result, "pod-2-1", "wireguard-userspace");
    assert_kernel_device(&lab.node("node-1").unwrap());
    let userspace = lab.node("node-2").unwrap();
    assert_eq!(link(&userspace)["linkinfo"]["info_kind"], "tun");
    assert_eq!(userspace.tunnels().len(), 1);
}

#[test]
fn killed_agents_lose_no_packet_and_their_devices_are_adopted() {
    let lab = lab_up(with_modes("kernel"));
    let devices = || -> Vec<_> {
        let nodes = lab.nodes();
        let one = |node| (link(node)["ifindex"].clone(), sh(node, "wg show gambeson0 public-key"));
        nodes.iter().map(one).collect()
    };
    let before = devices();
    assert_no_loss(&lab, 1000, |traffic| {
        flow(traffic, 1000);
        lab.nodes().iter().for_each(|node| node.kill_agent().unwrap());
        flow(traffic, 1000);
        lab.nodes().iter().for_each(|node| node.start_agent().unwrap());
        for node in lab.nodes() {
            let ready = until(Instant::now() + PATIENCE, || {
                node.status().is_ok_and(|s| s.ready && s.peers.len() == 1).then_some(())
            });
            assert!(ready.is_some(), "{} is not ready again", node.name());
            assert!(node.agent_log().unwrap().contains("adopted=true"));
        }
        flow(traffic, 1000);
    });
    assert_eq!(devices(), before);
}

/// Sends so many packets per second each way, or as many as the emulated machine carries, which
/// must all arrive.
fn assert_no_loss(lab: &Lab, packets_per_second: u32, meanwhile: impl FnOnce(&Traffic)) {
    let pair = (lab.pod("pod-1-1").unwrap(), lab.pod("pod-2-1").unwrap());
    let rate = Rate { packets_per_second, ..Rate::default() };
    let traffic = Traffic::start_within(&[pair], rate, WINDOW).unwrap();
    let start = Instant::now();
    meanwhile(&traffic);
    let reports = traffic.finish(Duration::from_secs(10));
    println!("in {:?}: {reports:?}", start.elapsed());
    assert!(reports.iter().all(FlowReport::is_perfect), "{reports:?}");
}

/// Waits until this many more packets have arrived.
fn flow(traffic: &Traffic, packets: u64) {
    let enough = traffic.so_far().1 + packets;
    let arrived = until(Instant::now() + PATIENCE, || (traffic.so_far().1 >= enough).then_some(()));
    assert!(arrived.is_some(), "packets no longer arrive: {:?}", traffic.so_far());
}

#[test]
fn a_taken_port_ends_the_agent_with_its_exit_code() {
    let lab = lab_up(Options { nodes: 1, pods_per_node: 0, start: false, ..with_modes("kernel") });
    let node = lab.node("node-1").unwrap();
    let _holder = node.netns().run(|| UdpSocket::bind(("0.0.0.0", 51820))).unwrap().unwrap();
    let agent = format!(
        "NODE_NAME=node-1 exec {GAMBESON} agent --kubeconfig /run/gambeson/kubeconfig \
         --cluster-cidr 10.244.0.0/16 --cni-conf-dir /var/lib/lab/cni/net.d --iface eth0 --wireguard kernel"
    );
    let output = node.exec(&["timeout", "60", "sh", "-c", &agent]).unwrap();
    assert_eq!(output.status.code(), Some(Exit::PortTaken as i32), "{}", both(&output));
    assert!(both(&output).contains("UDP port 51820"), "{}", both(&output));
}

/// Keys are replaced on both nodes, one after the other and both at once.
#[test]
fn keys_are_replaced_without_losing_a_packet_by_either_implementation() {
    for (modes, all) in [("kernel", true), ("node-1=kernel,node-2=userspace", false)] {
        let lab = lab_up(with_modes(modes));
        assert_no_loss(&lab, 100, |traffic| {
            for (asked, generations) in [(&["node-1", "node-2"][..], [1, 1]), (&["node-1"], [2, 1])]
                .into_iter()
                .take(if all { 2 } else { 1 })
            {
                for name in asked {
                    request(&lab, name, &format!("{generations:?}"));
                }
                for (node, generation) in lab.nodes().into_iter().zip(generations) {
                    rotated(node, generation);
                }
                flow(traffic, 200);
            }
        });
        for node in lab.nodes() {
            assert_eq!(sh(&node, "ip -o link show | grep -c ' gambeson[0-9]'").trim(), "1");
        }
    }
}

fn rotated(node: Node<'_>, generation: u64) {
    let is_rotated = || {
        let status = node.status().ok()?;
        (status.generation == Some(generation) && status.rotation.is_none()).then_some(())
    };
    let rotated = until(Instant::now() + PATIENCE, is_rotated);
    assert!(rotated.is_some(), "{}", node.agent_log().unwrap());
}

/// WireGuard refuses handshakes that are older than the last one: a new key has none.
#[test]
fn keys_are_replaced_though_the_clock_jumps() {
    let lab = lab_up(with_modes("kernel"));
    assert_no_loss(&lab, 100, |traffic| {
        for (name, jump) in [("node-1", "-1 hour"), ("node-2", "+10 years")] {
            let node = lab.node(name).unwrap();
            sh(&node, &format!("date -s '{jump}'"));
            for node in lab.nodes() {
                node.give_token(Some(&node.name()), Duration::from_secs(3600)).unwrap();
            }
            request(&lab, name, jump);
            rotated(node, 1);
            flow(traffic, 200);
        }
    });
}
