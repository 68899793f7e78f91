//! Nodes behind one public address that forwards a port to each, as at an edge site.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use gambeson_lab::traffic::{Rate, Traffic};
use gambeson_lab::{Environment, Lab, Netns, Options, Patch, WireguardMode};
use serde_json::json;

use crate::common::agent::eventually;
use crate::common::lab::lab_up;
use crate::common::scenario::{assert_connected, options, run};

/// Base port of each of the nodes behind the address.
const PORTS: [u16; 2] = [51820, 51900];

/// Three nodes behind routers. The hub is a NAT for the first two, which the third knows by the
/// hub's address alone.
fn behind_nat() -> (Lab, IpAddr) {
    let options = options(WireguardMode::Userspace);
    let lab = lab_up(Options { nodes: 3, routed: true, start: false, ..options });
    let hub = Environment::pod(Netns::named(format!("{}-hub", lab.options().name)));
    let [one, two, three] = ["node-1", "node-2", "node-3"].map(|name| lab.node(name).unwrap());
    let gateway = "ip -j route show default | sed -n 's/.*\"gateway\":\"\\([^\"]*\\)\".*/\\1/p'";
    let public: IpAddr = run(&three.environment(), gateway).trim().parse().unwrap();
    let [a, b] = [one, two].map(|node| node.addresses()[0]);
    let [port_a, port_b] = PORTS;
    run(
        &hub,
        &format!(
            "nft 'table ip nat {{
                chain pre {{ type nat hook prerouting priority -100;
                    ip daddr {public} udp dport {port_a} dnat to {a}
                    ip daddr {public} udp dport {port_b} dnat to {b}
                }}
                chain post {{ type nat hook postrouting priority 100;
                    ip saddr {{ {a}, {b} }} masquerade
                }}
                chain forward {{ type filter hook forward priority 0;
                    ip daddr {{ {a}, {b} }} ct status & dnat == 0 ct direction original drop
                }}
            }}'"
        ),
    );
    for (node, port) in [one, two].into_iter().zip(PORTS) {
        let conf = json!({ "Backend": { "Type": "wireguard", "ListenPort": port } });
        let file = node.host_path(Path::new("/var/lib/lab/net-conf.json"));
        std::fs::write(file, conf.to_string()).unwrap();
        let annotations = json!({
            "config.gambeson.io/endpoint": public.to_string(),
            "config.gambeson.io/persistent-keepalive": "5",
        });
        let patch = json!({ "metadata": { "annotations": annotations } });
        lab.api().unwrap().patch_node(&node.name(), Patch::Merge, &patch).unwrap();
    }
    for node in lab.nodes() {
        node.start_agent().unwrap();
        node.attach_pods().unwrap();
    }
    (lab, public)
}

#[test]
fn nodes_behind_one_public_address_are_reached_by_their_ports() {
    let (lab, public) = behind_nat();
    for (one, other) in [("node-1", "node-3"), ("node-3", "node-2"), ("node-1", "node-2")] {
        assert_connected(&lab, one, other);
    }
    let three = lab.node("node-3").unwrap();
    let shown = run(&three.environment(), "wg show gambeson0 endpoints");
    for port in PORTS {
        assert!(shown.contains(&format!("{public}:{port}")), "{shown}");
    }
    let pair = (lab.pod("pod-3-1").unwrap(), lab.pod("pod-1-1").unwrap());
    let traffic = Traffic::start(&[pair], Rate::default()).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    for report in traffic.finish(Duration::from_secs(2)) {
        assert!(report.is_perfect(), "{report:#?}");
    }

    // An endpoint that somebody moved away, with a session that ended, is set back.
    let key = run(&three.environment(), "wg show gambeson0 endpoints | grep ':51900$' | cut -f1");
    let key = key.trim();
    run(&three.environment(), &format!("wg set gambeson0 peer {key} endpoint 192.0.2.1:1"));
    eventually(three, "hears from node-2 again, or sends to where it should", || {
        let shown = run(&three.environment(), "wg show gambeson0 endpoints");
        shown.contains(&format!("{public}:51900")).then_some(())
    });
    assert_connected(&lab, "node-3", "node-2");
}
