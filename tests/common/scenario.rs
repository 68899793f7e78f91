//! What several tests of whole labs do to them and look at.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use gambeson_lab::probe::ping::Pinger;
use gambeson_lab::wait::until;
use gambeson_lab::{
    Environment, Family, Lab, Node, Options, Pod, Transports, WireguardMode, WireguardModes,
};

use crate::common::lab::lab_options;

/// How long anything may take that has no promise of its own.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Two nodes with one pod each, and agents that are told to use this WireGuard.
pub(crate) fn options(mode: WireguardMode) -> Options {
    Options { wireguard: WireguardModes::all(mode), ..lab_options() }
}

/// The same with userspace WireGuard, where agents accept these lists: of all, or node-1=vxlan.
pub(crate) fn accepting(lists: &[&str]) -> Options {
    let arguments: Vec<String> = lists.iter().map(|&text| text.to_owned()).collect();
    let transports = Transports::parse(&arguments).unwrap();
    Options { transports, ..options(WireguardMode::Userspace) }
}

/// The same with both families of underlay and pods.
pub(crate) fn dual(options: Options) -> Options {
    Options { underlay: Family::Dual, pods: Family::Dual, ..options }
}

/// Tells a node's agent which transports it accepts from now on.
pub(crate) fn accept(node: Node<'_>, list: &str) {
    node.set_transports(&Transports::list(list).unwrap()).unwrap();
}

/// Waits for something that must happen.
pub(crate) fn within<T>(limit: Duration, what: &str, condition: impl FnMut() -> Option<T>) -> T {
    until(Instant::now() + limit, condition)
        .unwrap_or_else(|| panic!("not within {limit:?}: {what}"))
}

/// Runs a shell command on a node or in a pod. It must succeed; gives what it printed.
pub(crate) fn run(environment: &Environment, command: &str) -> String {
    let output = environment
        .spawn(
            std::process::Command::new("sh")
                .args(["-ec", command])
                .stdin(std::process::Stdio::null())
                .stdout(std::process::Stdio::piped())
                .stderr(std::process::Stdio::piped()),
        )
        .unwrap()
        .wait_with_output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    let place = environment.netns().name();
    assert!(output.status.success(), "`{command}` failed in {place}: {complaint}");
    String::from_utf8(output.stdout).unwrap()
}

/// Whether every address of a pod answers another pod, now or soon.
pub(crate) fn reaches(from: Pod<'_>, to: Pod<'_>, limit: Duration) -> bool {
    let addresses = to.addresses();
    assert!(!addresses.is_empty(), "{} has no address", to.name());
    let deadline = Instant::now() + limit;
    from.netns()
        .run(|| {
            addresses.iter().all(|address| {
                Pinger::new(*address)
                    .and_then(|mut ping| ping.answers_before(deadline, &AtomicBool::new(false)))
                    .unwrap()
            })
        })
        .unwrap()
}

/// Both ways between the first pods of two nodes.
pub(crate) fn assert_connected(lab: &Lab, a: &str, b: &str) {
    for (from, to) in [(a, b), (b, a)] {
        let [from, to] = [from, to].map(|node| lab.node(node).unwrap().pods()[0]);
        assert!(reaches(from, to, PATIENCE), "{} does not reach {}", from.name(), to.name());
    }
}

/// Everything of ours in a node's kernel that should stay as it is: the device, its keys,
/// peers and addresses, routes, settings, and the rules without their counters.
pub(crate) fn fingerprint(node: Node<'_>) -> String {
    const LOOK: &str = "
        set +e
        ip -o link show gambeson0 2>&1 | cut -d: -f2-
        ip -o address show dev gambeson0 scope global 2>&1 | cut -d: -f2-
        ip route show proto 151 | sort; ip -6 route show proto 151 | sort
        ip rule show; ip -6 rule show
        for vxlan in gambeson-vx4 gambeson-vx6; do
            ip -d -o link show $vxlan 2>&1 | cut -d: -f2-
            for family in -4 -6; do ip $family neigh show nud permanent dev $vxlan 2>&1; done
            bridge fdb show dev $vxlan 2>&1 | sort
        done
        nft -s list table inet gambeson 2>&1
        cd /proc/sys/net
        cat ipv4/ip_forward ipv6/conf/all/forwarding ipv4/conf/gambeson0/rp_filter 2>&1
        cat ipv4/conf/gambeson0/forwarding ipv6/conf/gambeson0/disable_ipv6 2>&1
        cat ipv4/conf/cni0/forwarding ipv6/conf/cni0/disable_ipv6 2>&1
        for what in public-key listen-port fwmark endpoints allowed-ips persistent-keepalive \
            preshared-keys; do
            wg show gambeson0 $what 2>&1 | sort
        done";
    run(&node.environment(), LOOK)
}

/// What the guard has stopped so far: packets going out and coming in.
pub(crate) fn guard_drops(node: Node<'_>) -> (u64, u64) {
    let count = |name: &str| {
        let listing = run(&node.environment(), &format!("nft list counter inet gambeson {name}"));
        let words: Vec<&str> = listing.split_whitespace().collect();
        let at = words.iter().position(|word| *word == "packets").expect("a counter");
        words[at + 1].parse().unwrap()
    };
    (count("guard_out"), count("guard_in"))
}
