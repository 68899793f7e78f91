//! Agents that cannot start say why and what helps, with an exit code of their own; those
//! that have to wait say for what.

use std::fs::{self, Permissions};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Output;

use gambeson_keys::{Answer, Generation, KeyStore};
use gambeson_lab::{CONF_DIR, ConfList, Lab, Node, Options, Patch};
use serde_json::json;

use crate::common::agent::{address, answers, eventually, peers, status_when, userspace};
use crate::common::lab::{GAMBESON, both, lab_up};

const KEY_FILE: &str = "/var/lib/gambeson/keys.json";

/// A network and an API server, and no agent yet.
fn lab() -> Lab {
    lab_up(Options { start: false, nodes: 1, pods_per_node: 0, ..userspace() })
}

/// Runs an agent that is to end by itself, behind `wrapper`.
fn agent(node: Node<'_>, wrapper: &[&str], arguments: &[&str]) -> Output {
    let name = format!("NODE_NAME={}", node.name());
    let mut command = vec!["timeout", "20", "env", &name];
    command.extend(wrapper);
    command.extend([
        GAMBESON,
        "agent",
        "--cni-conf-dir",
        "/var/lib/lab/cni/net.d",
        "--iface",
        "eth0",
    ]);
    for (option, value) in [
        ("--kubeconfig", "/run/gambeson/kubeconfig"),
        ("--cluster-cidr", "10.244.0.0/16"),
        ("--wireguard", "userspace"),
    ] {
        if !arguments.contains(&option) {
            command.extend([option, value]);
        }
    }
    command.extend(arguments);
    node.exec(&command).unwrap()
}

/// That an agent ended with this code and said all of this.
fn assert_ended(output: &Output, code: i32, says: &[&str]) {
    let text = both(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    let last = text.lines().rfind(|line| line.starts_with("gambeson: ")).unwrap_or_default();
    for part in says {
        assert!(last.contains(part), "\"{part}\" is not in: {text}");
    }
}

fn shell(node: Node<'_>, script: &str) -> String {
    let output = node.exec(&["sh", "-c", script]).unwrap();
    assert!(output.status.success(), "{script}: {}", both(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn cni_configuration(node: Node<'_>) -> Vec<PathBuf> {
    let folder = node.host_path(Path::new("/var/lib/lab/cni/net.d"));
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

// Fault 11.
#[test]
fn a_taken_udp_port_is_named() {
    let lab = lab();
    let node = lab.node("node-1").unwrap();
    for holder in ["0.0.0.0:51820", "[::]:51820"] {
        let socket = node.netns().run(|| UdpSocket::bind(holder)).unwrap().unwrap();
        assert_ended(&agent(node, &[], &[]), 4, &["UDP port 51820", "--port", "ss -lunp"]);
        drop(socket);
        assert!(!shell(node, "ip -o link").contains("gambeson"), "{holder}");
        assert_eq!(cni_configuration(node), Vec::<PathBuf>::new());
    }
    let socket = node.netns().run(|| UdpSocket::bind("0.0.0.0:7000")).unwrap().unwrap();
    assert_ended(&agent(node, &[], &["--port", "7000"]), 4, &["UDP port 7000"]);
    drop(socket);
    node.start_agent().unwrap();
    status_when(node, "starts once the port is free", |status| status.ready);
}

// Fault 12. Where the kernel has WireGuard, the agent has to use it.
#[test]
fn a_missing_kernel_module_is_said_with_its_remedy() {
    let lab = lab();
    let node = lab.node("node-1").unwrap();
    let has_wireguard = "ip link add probe0 type wireguard && ip link del probe0";
    let available = node.exec(&["sh", "-c", has_wireguard]).unwrap().status.success();
    let output = agent(node, &[], &["--wireguard", "kernel"]);
    if available {
        assert_eq!(output.status.code(), Some(124), "{}", both(&output));
        assert!(shell(node, "ip -d link show gambeson0").contains("wireguard"));
    } else {
        assert_ended(&output, 1, &["type wireguard", "modprobe wireguard", "userspace"]);
        assert!(!shell(node, "ip -o link").contains("gambeson"));
    }
}

/// What must be the same after a refusal.
fn fingerprint(path: &Path) -> (u32, u32, u64, Option<PathBuf>, Vec<u8>) {
    let metadata = fs::symlink_metadata(path).unwrap();
    let content = if metadata.is_dir() { Vec::new() } else { fs::read(path).unwrap() };
    let target = fs::read_link(path).ok();
    (metadata.mode(), metadata.uid(), metadata.ino(), target, content)
}

// A virtual machine whose default route leads through a NAT that no other node can reach.
#[test]
fn an_interface_that_other_nodes_do_not_know_is_said() {
    let lab = lab();
    let node = lab.node("node-1").unwrap();
    shell(
        node,
        "ip link add nat0 type veth peer name nat0p && ip link set nat0p up
        ip addr add 10.0.2.15/24 dev nat0 && ip link set nat0 up
        ip route replace default via 10.0.2.2",
    );
    let run = |arguments: &str| {
        let command = format!(
            "NODE_NAME=node-1 timeout 3 {GAMBESON} agent --kubeconfig /run/gambeson/kubeconfig \
             --cni-conf-dir /var/lib/lab/cni/net.d --cluster-cidr 10.244.0.0/16 \
             --wireguard userspace {arguments}"
        );
        both(&node.exec(&["sh", "-c", &command]).unwrap())
    };
    let log = run("");
    let warning = log.lines().find(|line| line.contains("InternalIP")).expect(&log);
    for part in ["WARN", "nat0 with 10.0.2.15", "InternalIP is 192.168.240.1", "--iface"] {
        assert!(warning.contains(part), "\"{part}\" is not in: {warning}");
    }
    for meant in ["--iface nat0", "--iface eth0"] {
        let log = run(meant);
        assert!(log.contains("ready") && !log.contains("InternalIP"), "{log}");
    }
}

// Fault 13.
#[test]
fn a_key_file_that_is_not_as_it_was_left_is_refused_and_not_touched() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 9] = [
        ("empty", |file| fs::write(file, "").unwrap()),
        ("cut short", |file| {
            let bytes = fs::read(file).unwrap();
            fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
        }),
        ("another format", |file| fs::write(file, "{\"schema\":99}").unwrap()),
        ("readable by all", |file| set_mode(file, 0o644)),
        ("readable by nobody", |file| set_mode(file, 0)),
        ("of somebody else", |file| chown(file, Some(1000), None).unwrap()),
        ("a symlink", |file| {
            let elsewhere = file.with_extension("elsewhere");
            fs::rename(file, &elsewhere).unwrap();
            symlink(elsewhere, file).unwrap();
        }),
        ("a folder", |file| {
            fs::remove_file(file).unwrap();
            fs::create_dir(file).unwrap();
        }),
        ("in a folder open to all", |file| set_mode(file.parent().unwrap(), 0o777)),
    ];
    let lab = lab();
    let node = lab.node("node-1").unwrap();
    let file = node.host_path(Path::new(KEY_FILE));
    let folder = file.parent().unwrap();
    for (what, damage) in damages {
        let _ = fs::remove_dir_all(folder);
        KeyStore::at(&file).create(Generation::FIRST, Answer::default(), None).unwrap();
        damage(&file);
        let before = fingerprint(&file);
        let output = agent(node, &[], &[]);
        eprintln!("{what}: {}", both(&output));
        assert_ended(&output, 3, &["/var/lib/gambeson"]);
        assert_eq!(fingerprint(&file), before, "{what}");
    }
    assert!(!shell(node, "ip -o link").contains("gambeson"));
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[test]
fn without_tun_or_capability_it_says_what_is_missing() {
    let lab = lab();
    let node = lab.node("node-1").unwrap();
    let hide = "mount -t tmpfs none /dev/net && exec \"$@\"";
    let output = agent(node, &["sh", "-c", hide, "sh"], &[]);
    assert_ended(&output, 5, &["/dev/net/tun", "modprobe tun", "--wireguard kernel"]);
    let drop_it = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"];
    let output = agent(node, &drop_it, &[]);
    assert_ended(&output, 6, &["CAP_NET_ADMIN", "NET_ADMIN", "root"]);
    assert!(!shell(node, "ip -o link").contains("gambeson"));
}

// Fault 10.
#[test]
fn a_device_of_somebody_else_is_left_alone() {
    let lab = lab();
    let node = lab.node("node-1").unwrap();
    shell(
        node,
        "ip link add gambeson0 type veth peer name far0 && ip addr add 192.0.2.7/32 dev gambeson0",
    );
    let before = shell(node, "ip -o addr show gambeson0; ip -o link show gambeson0");
    let output = agent(node, &[], &[]);
    assert_ended(&output, 7, &["gambeson0", "ip link delete gambeson0"]);
    assert_eq!(shell(node, "ip -o addr show gambeson0; ip -o link show gambeson0"), before);
    shell(node, "ip link delete gambeson0");
    node.start_agent().unwrap();
    status_when(node, "starts once the name is free", |status| status.ready);
}

// Fault 18.
#[test]
fn without_a_pod_cidr_it_waits_and_says_so() {
    let lab = lab();
    let node = lab.node("node-1").unwrap();
    let give = |cidrs: &[&str]| {
        let spec = json!({ "spec": { "podCIDR": cidrs.first(), "podCIDRs": cidrs } });
        lab.api().unwrap().patch_node("node-1", Patch::Merge, &spec).unwrap();
    };
    give(&[]);
    node.start_agent().unwrap();
    for (cidrs, says) in [
        (&[][..], "has no pod CIDR yet"),
        (&["0.0.0.0/0"], "pod CIDR 0.0.0.0/0 is not a smaller part"),
        (&["10.99.0.0/24"], "pod CIDR 10.99.0.0/24 is not a smaller part"),
        (&["10.244.1.7/24"], "pod CIDR \\\"10.244.1.7/24\\\" has bits set"),
    ] {
        give(cidrs);
        let says = says.replace('\\', "");
        let status = status_when(node, &says, |status| {
            status.waiting.as_ref().is_some_and(|waiting| waiting.contains(&says))
        });
        assert!(!status.ready && status.peers.is_empty(), "{status}");
        assert!(node.agent_log().unwrap().contains(&says));
    }
    // Nothing for the container runtime, and nothing that could leave in clear.
    assert_eq!(cni_configuration(node), Vec::<PathBuf>::new());
    assert!(!node.host_path(Path::new("/run/flannel/subnet.env")).exists());
    assert!(shell(node, "nft list table inet gambeson").contains("guard_out"));
    assert!(shell(node, "ip route show type unreachable").contains("10.244.0.0/16"));
    let ready = node.exec(&["curl", "-s", "http://127.0.0.1:9480/readyz"]).unwrap();
    assert!(both(&ready).contains("waiting: a pod CIDR of Node node-1"), "{}", both(&ready));

    give(&["10.244.1.0/24"]);
    status_when(node, "goes on with a pod CIDR", |status| status.ready);
    assert_eq!(cni_configuration(node).len(), 1);
    // Later it is kept: the pods that run have their addresses.
    give(&[]);
    let status = status_when(node, "says what it lost", |status| !status.errors.is_empty());
    assert!(status.errors[0].contains("keeping those it had"), "{status}");
    assert!(status.ready);
}

/// Pods go on the bridge that the guard trusts, and what an operator added stays.
#[test]
fn another_bridge_is_told_to_the_cni_plugin() {
    let lab = lab();
    let node = lab.node("node-1").unwrap();
    let file = "/var/lib/lab/cni/net.d/10-flannel.conflist";
    let own = r#"{"name":"cbr0","plugins":[{"type":"flannel","delegate":{"vlan":7}}]}"#;
    shell(node, &format!("mkdir -p /var/lib/lab/cni/net.d; echo '{own}' > {file}"));
    agent(node, &["timeout", "3"], &["--bridge", "br7"]);
    let written: serde_json::Value =
        serde_json::from_str(&shell(node, &format!("cat {file}"))).unwrap();
    let expected = json!({ "type": "gambeson-cni", "delegate": { "vlan": 7, "bridge": "br7" } });
    assert_eq!(written, json!({ "name": "cbr0", "plugins": [expected] }));
    let rules = shell(node, "nft list chain inet gambeson guard_out");
    assert!(rules.contains("\"br7\"") && !rules.contains("cni0"), "{rules}");
    // An agent with another idea of it changes nothing and says why.
    let output = agent(node, &["timeout", "3"], &["--bridge", "br8"]);
    assert!(both(&output).contains("but the agent's --bridge is br8"), "{}", both(&output));
    let after: serde_json::Value =
        serde_json::from_str(&shell(node, &format!("cat {file}"))).unwrap();
    assert_eq!(after, written);
}

/// A signal mask is inherited: whoever starts the agent may have blocked what ends it.
#[test]
fn a_blocked_signal_ends_the_agent_all_the_same() {
    let lab = lab();
    let node = lab.node("node-1").unwrap();
    let block = ["env", "--block-signal=TERM", "timeout", "--kill-after=5", "3"];
    let output = agent(node, &block, &[]);
    assert_eq!(output.status.code(), Some(124), "{}", both(&output));
    assert!(both(&output).contains("ending; devices, routes and the guard stay"));
}

#[test]
fn without_its_node_it_waits_and_says_so() {
    let lab = lab();
    let node = lab.node("node-1").unwrap();
    let mut own = lab.api().unwrap().node("node-1").unwrap();
    lab.api().unwrap().delete_node("node-1").unwrap();
    node.start_agent().unwrap();
    let status = status_when(node, "waits for its Node", |status| {
        let waiting = status.waiting.as_deref().unwrap_or_default();
        waiting.contains("Node node-1 to be registered") && waiting.contains("--node-name")
    });
    assert!(!status.ready, "{status}");
    for field in ["uid", "resourceVersion", "creationTimestamp"] {
        own["metadata"].as_object_mut().unwrap().remove(field);
    }
    lab.api().unwrap().create_node(&own).unwrap();
    status_when(node, "goes on once registered", |status| status.ready);
}

#[test]
fn an_api_server_that_is_not_there_is_waited_for() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    let (pod, other) = (lab.pod("pod-1-1").unwrap(), address(&lab, "pod-2-1"));
    lab.kill_api().unwrap();
    node.kill_agent().unwrap();
    let log = crate::common::agent::LogSince::now(node);
    node.start_agent().unwrap();
    let status = status_when(node, "says it cannot follow", |status| !status.errors.is_empty());
    assert!(status.errors[0].contains("cannot follow the Nodes"), "{status}");
    let waiting = status.waiting.clone().unwrap_or_default();
    assert!(waiting.contains("the list of Nodes from the API server"), "{status}");
    assert!(status.ready, "a former agent left all that pods need: {status}");
    // What was there works on.
    assert!(answers(pod, other));
    lab.start_api().unwrap();
    status_when(node, "goes on", |status| peers(status) == ["node-2"] && status.errors.is_empty());
    eventually(node, "says so", || (log.count("following the Nodes") == 1).then_some(()));
    assert_eq!(log.count("cannot follow the Nodes"), 1, "{}", node.agent_log().unwrap());
    assert!(answers(pod, other));
}

/// What stops packets in clear.
fn walls(node: Node<'_>) -> String {
    shell(node, "nft list ruleset; ip route show type unreachable")
}

#[test]
fn a_start_that_fails_leaves_nothing_open() {
    let lab = lab();
    let node = lab.node("node-1").unwrap();
    let key_file = node.host_path(Path::new(KEY_FILE));
    fs::create_dir_all(key_file.parent().unwrap()).unwrap();
    set_mode(key_file.parent().unwrap(), 0o700);
    let bad_socket = ["--socket", "/proc/none/agent.sock"];
    let health = node.netns().run(|| TcpListener::bind("127.0.0.1:9480")).unwrap().unwrap();
    for (what, code, arguments) in [
        ("a taken health port", 1, &[][..]),
        ("a missing kubeconfig", 1, &["--kubeconfig", "/nonexistent"]),
        ("no place for the socket", 1, &bad_socket),
        ("a corrupt key file", 3, &[]),
    ] {
        if code == 3 {
            fs::write(&key_file, "{").unwrap();
        }
        // As after a reboot.
        shell(node, "nft flush ruleset; ip route flush proto 151");
        assert_ended(&agent(node, &[], arguments), code, &[]);
        let walls = walls(node);
        assert_eq!(walls.matches(" drop").count(), 2, "{what}: {walls}");
        assert!(walls.contains("unreachable 10.244.0.0/16"), "{what}: {walls}");
    }
    drop(health);
}

#[test]
fn cluster_networks_that_this_host_uses_are_refused_before_anything_is_touched() {
    let lab = lab();
    let node = lab.node("node-1").unwrap();
    shell(node, "ip link add up0 type bridge; ip link set up0 up");
    shell(node, "ip address add 172.30.1.1/32 peer 172.30.2.0/24 dev up0");
    for (network, names) in [
        ("192.168.0.0/16", "192.168.240.1/24 of eth0"),
        ("192.168.240.128/25", "192.168.240.1/24 of eth0"),
        ("172.30.2.128/25", "the connected route 172.30.2.0/24 of up0"),
    ] {
        assert_ended(&agent(node, &[], &["--cluster-cidr", network]), 2, &[network, names]);
    }
    let server = ["--cluster-cidr", "198.51.100.0/24", "--kubeconfig", "/run/elsewhere"];
    let edit = "sed 's#server: .*#server: https://198.51.100.7:6443#' /run/gambeson/kubeconfig";
    shell(node, &format!("{edit} > /run/elsewhere"));
    let says = ["198.51.100.0/24", "the API server's address 198.51.100.7"];
    assert_ended(&agent(node, &[], &server), 2, &says);
    let touched = walls(node);
    assert!(!touched.contains("drop") && !touched.contains("unreachable"), "{touched}");
}

#[test]
fn a_network_that_the_host_gets_later_is_said_and_what_works_is_kept() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    let (pod, other) = (lab.pod("pod-1-1").unwrap(), address(&lab, "pod-2-1"));
    shell(node, "ip address add 10.244.99.1/24 dev eth0");
    let status = status_when(node, "says so", |status| !status.errors.is_empty());
    let says = "cluster network 10.244.0.0/16 overlaps address 10.244.99.1/24 of eth0";
    assert!(status.errors[0].contains(says), "{status}");
    assert!(status.ready && answers(pod, other));
    shell(node, "ip address delete 10.244.99.1/24 dev eth0");
    status_when(node, "is content again", |status| status.errors.is_empty());
}

#[test]
fn options_that_cannot_be_are_refused_before_anything_is_touched() {
    let lab = lab();
    let node = lab.node("node-1").unwrap();
    for (arguments, says) in [
        (&["--cluster-cidr", "10.244.0.1/16"][..], &["--cluster-cidr", "10.244.0.0/16"][..]),
        (&["--cluster-cidr", "0.0.0.0/0"], &["--cluster-cidr", "for example"]),
        (&["--cluster-cidr", ""], &["--cluster-cidr", "for example"]),
        (&["--transports", "pigeon"], &["--transports", "pigeon", "wireguard"]),
        (&["--port", "65535"], &["--port", "from 1 to 65529"]),
        (&["--public-ip", "127.0.0.1"], &["--public-ip", "127.0.0.1", "can reach"]),
        (&["--iface-regex", "("], &["--iface-regex", "regular expression"]),
        (&["--key-file", "keys.json"], &["--key-file", "starts with /"]),
        (&["--node-name", "No_Node"], &["--node-name", "kubectl get nodes"]),
    ] {
        assert_ended(&agent(node, &[], arguments), 2, says);
    }
    // What the argument parser itself refuses.
    for (arguments, says) in
        [(&["--wireguard", "quantum"][..], "userspace"), (&["--port", "many"], "--port")]
    {
        let output = agent(node, &[], arguments);
        assert_eq!(output.status.code(), Some(2), "{}", both(&output));
        assert!(both(&output).contains(says), "{}", both(&output));
    }
    // So it is with every command.
    for (arguments, says) in [
        (&["tunnel", "a/b"][..], "not a device name"),
        (&["tunnel", "wg0", "--log-level", "=x="], "--log-level"),
        (&["install-cni", "--bridge", "a/b"], "--bridge"),
        (&["lab", "up", "--nodes", "0"], "1 to 100 nodes"),
        (&["lab", "up", "--underlay-mtu", "5"], "1360 to 65535 bytes"),
    ] {
        let output = node.exec(&[&[GAMBESON], arguments].concat()).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", both(&output));
        assert!(both(&output).contains(says), "{}", both(&output));
    }
    let touched = shell(node, "ip -o link; nft list ruleset; ip route show type unreachable");
    assert!(!touched.contains("gambeson") && !touched.contains("10.244"), "{touched}");
    assert!(!node.host_path(Path::new(KEY_FILE)).exists());
}

/// The commands of docs/install.md that take everything off a node.
#[test]
fn the_documented_removal_leaves_nothing_in_the_kernel() {
    let guide = include_str!("../docs/install.md");
    let script = guide.split("```sh\n").find(|block| block.starts_with("cp /opt/cni")).unwrap();
    let script = script.split("```").next().unwrap();
    // Its files are the host's in a lab.
    let (copy, rest) = script.split_once('\n').unwrap();
    assert!(copy.contains("gambeson-cni /usr/local/bin/gambeson"), "{copy}");
    let (commands, files) = rest.split_once("rm -r ").unwrap();
    for file in ["gambeson-cni", "/var/lib/gambeson"] {
        assert!(files.contains(file), "{file}");
    }
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    node.stop_agent().unwrap();
    let places = format!("export GAMBESON_CNI_CONF_DIR={CONF_DIR}");
    let commands = commands.replace("gambeson uninstall", &format!("{GAMBESON} uninstall"));
    shell(node, &format!("set -e; {places}; {commands}"));
    assert!(ConfList::first_on(&node.environment()).unwrap().is_none());
    let left = shell(
        node,
        "nft list tables; ip rule; ip -6 rule; ip route show proto 151; \
         ip -6 route show proto 151; ip -o link",
    );
    for word in ["inet gambeson", "1510", "unreachable", "gambeson0"] {
        assert!(!left.contains(word), "{word} in {left}");
    }
}
