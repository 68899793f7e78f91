//! The transports in clear: only where both nodes name them, and then seen everywhere.

use std::path::Path;

use gambeson_lab::{Family, Lab, Options, Patch, Progress, WireguardMode};
use serde_json::Value;

use crate::common::agent::{eventually, status_when};
use crate::common::lab::lab_up;
use crate::common::scenario::{accepting, assert_connected, dual, guard_drops, options, run};
use crate::leak::Watch;
use crate::status::get;

/// Checks a whole lab, and that its pairs use these transports and no other.
fn verify(options: Options, transports: &[&str]) -> Lab {
    let lab = lab_up(options);
    let result = lab.verify(&Progress::silent()).unwrap();
    assert!(result.ok, "{:#?}", result.failures);
    let mut used: Vec<_> = result.pairs.iter().map(|pair| pair.transport.as_str()).collect();
    used.retain(|transport| *transport != "local");
    used.sort_unstable();
    used.dedup();
    assert_eq!(used, transports);
    lab
}

/// Starts agents of which some refuse others, which `lab up` would wait for.
fn start_all(lab: &Lab) {
    for node in lab.nodes() {
        node.start_agent().unwrap();
        node.attach_pods().unwrap();
    }
}

fn condition(lab: &Lab, node: &str, kind: &str) -> Option<String> {
    let node = lab.api().unwrap().node(node).unwrap();
    let conditions = node["status"]["conditions"].as_array()?.clone();
    let of_kind = |condition: &&Value| condition["type"] == kind;
    Some(conditions.iter().find(of_kind)?["status"].as_str()?.to_owned())
}

#[test]
fn vxlan_carries_both_families_over_both() {
    verify(dual(accepting(&["vxlan"])), &["vxlan"]);
}

#[test]
fn vxlan_crosses_routers_over_ipv6() {
    let options = accepting(&["vxlan,host-gw"]);
    verify(Options { routed: true, underlay: Family::V6, pods: Family::V6, ..options }, &["vxlan"]);
}

#[test]
fn ipv6_pods_share_a_vxlan_over_ipv4() {
    verify(Options { pods: Family::Dual, ..accepting(&["vxlan"]) }, &["vxlan"]);
}

#[test]
fn host_gw_routes_both_families() {
    verify(dual(accepting(&["host-gw"])), &["host-gw"]);
}

#[test]
fn the_best_in_common_is_used_by_each_pair() {
    let options = accepting(&["wireguard,vxlan", "node-2=vxlan", "node-3=wireguard,host-gw,vxlan"]);
    let lab = verify(Options { nodes: 3, ..options }, &["vxlan", "wireguard-userspace"]);
    assert_eq!(condition(&lab, "node-1", "MeshEncrypted").as_deref(), Some("False"));
}

#[test]
fn what_travels_in_clear_is_said_everywhere() {
    let lab = lab_up(accepting(&["vxlan", "node-2=vxlan,wireguard"]));
    let node = lab.node("node-1").unwrap();
    let status = status_when(node, "is in the mesh", |status| status.peers.len() == 1);
    let peer = &status.peers[0];
    assert_eq!((peer.transport.as_str(), peer.device.as_str()), ("vxlan", "gambeson-vx4"));
    assert!(!peer.is_encrypted() && status.implementation.is_none(), "{status}");
    for (kind, expected) in
        [("MeshEncrypted", "False"), ("MeshReady", "True"), ("NetworkUnavailable", "False")]
    {
        eventually(node, kind, || (condition(&lab, "node-1", kind)? == expected).then_some(()));
    }
    eventually(node, "leaves an Event", || {
        let events = lab.api().unwrap().events().unwrap();
        let said = |event: &Value| {
            event["reason"] == "PlaintextPeer"
                && event["message"].as_str().is_some_and(|text| text.contains("node-2 travel"))
        };
        events.iter().any(said).then_some(())
    });
    let metrics = get(node, "/metrics").1;
    let line = "gambeson_peer_encrypted{peer=\"node-2\",transport=\"vxlan\"} 0";
    assert!(metrics.contains(line), "{metrics}");
}

/// Strict by default: what one node offers is nothing to those that do not.
#[test]
fn a_node_that_only_accepts_vxlan_is_refused_by_those_that_do_not() {
    let lab =
        lab_up(Options { nodes: 3, start: false, ..accepting(&["wireguard", "node-3=vxlan"]) });
    start_all(&lab);
    for (name, peer) in [("node-1", "node-2"), ("node-2", "node-1")] {
        let node = lab.node(name).unwrap();
        let status = status_when(node, "refuses node-3", |status| {
            status.peers.len() == 1 && status.refused.len() == 1
        });
        assert_eq!(
            (status.peers[0].name.as_str(), status.refused[0].name.as_str()),
            (peer, "node-3")
        );
        let reason = &status.refused[0].reason;
        assert!(reason.contains("accepts vxlan and this node wireguard"), "{reason}");
        assert!(!run(&node.environment(), "ip -o link").contains("vx4"), "no device for it");
    }
    let [one, three] = ["pod-1-1", "pod-3-1"].map(|pod| lab.pod(pod).unwrap());
    let watch = Watch::start(&lab);
    assert!(!watch.canary(one, three.addresses()[0]));
    assert!(!watch.canary(three, one.addresses()[0]));
    watch.assert_silent();
    assert_connected(&lab, "node-1", "node-2");
    assert_eq!(condition(&lab, "node-1", "MeshEncrypted").as_deref(), Some("True"));
}

/// What the guard lets pass for one peer it does not for another, nor from anybody else.
#[test]
fn a_device_in_clear_is_no_way_around_the_guard() {
    // node-4 allows VXLAN as well, and node-1 has something better for it.
    let options = accepting(&["wireguard,vxlan", "node-2=wireguard", "node-3=vxlan"]);
    let lab = lab_up(Options { nodes: 4, start: false, ..options });
    start_all(&lab);
    for other in ["node-2", "node-3", "node-4"] {
        assert_connected(&lab, "node-1", other);
    }
    let node = lab.node("node-1").unwrap();
    let [one, two, four] = ["pod-1-1", "pod-2-1", "pod-4-1"].map(|pod| lab.pod(pod).unwrap());
    let watch = Watch::start(&lab);
    for (to, rogue) in [
        (two, "ip route add 10.244.2.0/25 via 10.244.3.0 dev gambeson-vx4 onlink"),
        (two, "ip route replace 10.244.2.0/25 via 192.168.240.2 dev eth0"),
        (four, "ip route add 10.244.4.0/25 via 10.244.3.0 dev gambeson-vx4 onlink"),
    ] {
        run(&node.environment(), rogue);
        assert!(!watch.canary(one, to.addresses()[0]), "{rogue}");
    }
    watch.assert_silent();
    // A packet in the name of a pod of node-2, from node-3's device.
    let before = guard_drops(node).1;
    let sender = lab.node("node-3").unwrap();
    run(
        &sender.environment(),
        "ip addr add 10.244.2.99/32 dev lo; nft delete table inet gambeson
         ip route add 10.244.1.2/32 via 10.244.1.0 dev gambeson-vx4 onlink
         ping -c 1 -W 0.2 -I 10.244.2.99 10.244.1.2 || true",
    );
    assert_eq!(guard_drops(node).1, before + 1);
}

#[test]
fn host_gw_behind_a_router_says_what_helps() {
    let options = Options { routed: true, start: false, ..accepting(&["host-gw"]) };
    let lab = lab_up(options);
    lab.nodes().iter().for_each(|node| node.start_agent().unwrap());
    let node = lab.node("node-1").unwrap();
    let status = status_when(node, "refuses its peer", |status| {
        status.refused.iter().any(|refused| refused.reason.contains("router"))
    });
    let reason = &status.refused[0].reason;
    for part in ["from node-1 without a router", "add vxlan to --transports on both"] {
        assert!(reason.contains(part), "{reason}");
    }
    assert!(status.peers.is_empty());
}

/// As Flannel's users have it, with a key of our own and one that nobody knows.
#[test]
fn a_net_conf_of_flannel_is_followed() {
    let conf = serde_json::json!({
        "Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48",
        "EnableNFTables": false,
        "Backend": {
            "Type": "wireguard", "Mode": "ipv6", "ListenPort": 51900, "Userspace": true,
            "PersistentKeepaliveInterval": 25, "Colour": "green",
        },
    });
    let options = options(WireguardMode::Auto);
    let lab = lab_up(Options { start: false, ..dual(options) });
    for node in lab.nodes() {
        let file = node.host_path(Path::new("/var/lib/lab/net-conf.json"));
        std::fs::write(file, conf.to_string()).unwrap();
    }
    start_all(&lab);
    assert_connected(&lab, "node-1", "node-2");
    let node = lab.node("node-1").unwrap();
    let shown = run(&node.environment(), "wg show gambeson0 dump");
    assert!(shown.contains("[fd00:240::2]:51900") && shown.trim_end().ends_with("25"), "{shown}");
    assert_eq!(node.status().unwrap().implementation.as_deref(), Some("userspace"));
    let log = node.agent_log().unwrap();
    assert!(log.contains("Backend.Colour") && !log.contains("EnableNFTables"), "{log}");
}

/// Behind NAT other nodes send to an address that the interface does not have.
#[test]
fn the_nodes_external_address_is_published_and_its_own_is_sent_from() {
    let options = accepting(&["vxlan"]);
    let agent_arguments = vec!["--flannel-external-ip".to_owned()];
    let lab = lab_up(Options { start: false, agent_arguments, ..options });
    let node = lab.node("node-1").unwrap();
    let addresses = serde_json::json!({ "status": { "addresses": [
        { "type": "InternalIP", "address": "192.168.240.1" },
        { "type": "ExternalIP", "address": "203.0.113.7" },
    ] } });
    lab.api().unwrap().patch_status("node-1", Patch::Strategic, &addresses).unwrap();
    start_all(&lab);
    eventually(node, "publishes its external address", || {
        let published = lab.api().unwrap().node("node-1").unwrap();
        let endpoint = &published["metadata"]["annotations"]["gambeson.io/endpoint"];
        (endpoint == "203.0.113.7").then_some(())
    });
    let link = run(&node.environment(), "ip -d link show gambeson-vx4");
    assert!(link.contains("local 192.168.240.1 "), "{link}");
    let other = lab.node("node-2").unwrap();
    status_when(other, "reaches it there", |status| status.peers.len() == 1);
    let table = run(&other.environment(), "bridge fdb show dev gambeson-vx4");
    assert!(table.contains("dst 203.0.113.7"), "{table}");
}
