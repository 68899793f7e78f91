//! What an operator asks an agent: `gambeson status`, health, readiness and metrics.

use std::time::SystemTime;

use gambeson_lab::{Lab, Node, Options, Patch};
use serde_json::{Value, json};

use crate::common::agent::{address, answers, refusal, status_json, status_when, userspace};
use crate::common::lab::{GAMBESON, both, lab_up};

/// Status code and body of a page of the agent.
pub(crate) fn get(node: Node<'_>, path: &str) -> (String, String) {
    let url = format!("http://127.0.0.1:9480{path}");
    let output = node.exec(&["curl", "-s", "-w", "\\n%{http_code}", &url]).unwrap();
    assert!(output.status.success(), "{}", both(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    let (body, code) = text.rsplit_once('\n').unwrap();
    (code.to_owned(), body.to_owned())
}

fn table(node: Node<'_>) -> String {
    let output = node.exec(&[GAMBESON, "status"]).unwrap();
    assert!(output.status.success(), "{}", both(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// A lab in which packets have flowed, and node-1 refuses a newer state of node-3.
fn lab() -> Lab {
    let lab = lab_up(Options { nodes: 3, ..userspace() });
    lab.node("node-3").unwrap().kill_agent().unwrap();
    let bad = json!({ "metadata": { "annotations": { "gambeson.io/port": "0" } } });
    lab.api().unwrap().patch_node("node-3", Patch::Merge, &bad).unwrap();
    let node = lab.node("node-1").unwrap();
    status_when(node, "refuses node-3", |status| refusal(status, "node-3").is_some());
    assert!(answers(lab.pod("pod-1-1").unwrap(), address(&lab, "pod-2-1")));
    lab
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

#[test]
fn status_has_everything_a_person_and_a_program_ask_for() {
    let lab = lab();
    let node = lab.node("node-1").unwrap();
    let document = status_json(node);
    assert_eq!(document["schema"], 1);
    assert_eq!(document["node"], "node-1");
    assert_eq!(document["implementation"], "userspace");
    assert_eq!((&document["generation"], &document["mtu"]), (&json!(0), &json!(1440)));
    let api = lab.api().unwrap().node("node-1").unwrap();
    assert_eq!(document["public_key"], api["metadata"]["annotations"]["gambeson.io/public-key"]);
    let underlay = json!({ "interface": "eth0", "mtu": 1500, "endpoints": ["192.168.240.1"] });
    assert_eq!(document["underlay"], underlay);
    assert_eq!((&document["ready"], &document["errors"]), (&json!(true), &json!([])));
    let age = unix_now() - document["guard"]["seen_whole"].as_u64().unwrap();
    assert!(age <= 2, "the guard was last seen whole {age} s ago");
    let drops = json!({ "seen_whole": document["guard"]["seen_whole"], "out_packets": 0, "out_bytes": 0, "in_packets": 0, "in_bytes": 0 });
    assert_eq!(document["guard"], drops);

    let peer = &document["peers"][0];
    for (field, value) in [
        ("name", json!("node-2")),
        ("pod_cidrs", json!(["10.244.2.0/24"])),
        ("endpoint", json!("192.168.240.2:51820")),
        ("transport", json!("wireguard-userspace")),
        ("device", json!("gambeson0")),
        ("key_generation", json!(0)),
        ("mtu", json!(1440)),
    ] {
        assert_eq!(peer[field], value, "{field} in {document}");
    }
    assert!(peer["handshake_age_seconds"].as_u64().is_some_and(|age| age < 180), "{peer}");
    for bytes in ["rx_bytes", "tx_bytes"] {
        assert!(peer[bytes].as_u64().is_some_and(|bytes| bytes > 0), "{peer}");
    }
    let refused = &document["refused"][0];
    assert_eq!((&refused["name"], &refused["kept"]), (&json!("node-3"), &json!(true)));
    let reason = refused["reason"].as_str().unwrap();
    assert!(reason.contains("annotation gambeson.io/port is \"0\""), "{reason}");

    let table = table(node);
    for part in [
        "node-1",
        "ready",
        "userspace",
        "generation 0",
        "Pod MTU         1440",
        "eth0 (MTU 1500), 192.168.240.1",
        "2 in use, 1 refused",
        "PEER",
        "POD CIDRS",
        "ENDPOINT",
        "TRANSPORT",
        "KEY",
        "HANDSHAKE",
        "RX",
        "TX",
        "MTU",
        "node-2",
        "10.244.2.0/24",
        "192.168.240.2:51820",
        "s ago",
        "node-3: annotation gambeson.io/port is \"0\"",
        "its last good state stays in use",
    ] {
        assert!(table.contains(part), "{part} is missing in\n{table}");
    }
}

#[test]
fn health_readiness_and_metrics_follow_the_state() {
    let lab = lab();
    let node = lab.node("node-1").unwrap();
    assert_eq!(get(node, "/healthz"), ("200".into(), "ok\n".into()));
    assert_eq!(get(node, "/readyz"), ("200".into(), "ok\n".into()));
    assert_eq!(get(node, "/nothing").0, "404");

    // A packet for the pod network that would leave by another way than a tunnel.
    let bypass = "ip route add 10.244.77.0/24 via 192.168.240.2 && \
                  ping -c 1 -W 0.2 -I 192.168.240.1 10.244.77.7; true";
    node.exec(&["sh", "-c", bypass]).unwrap();
    status_when(node, "counts what the guard stopped", |status| status.guard.out_packets > 0);
    let (code, metrics) = get(node, "/metrics");
    assert_eq!(code, "200");
    let value = |name: &str| -> f64 {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let Some(value) = line else { panic!("no {name} in\n{metrics}") };
        value.parse().unwrap()
    };
    assert_eq!(value("gambeson_peers"), 2.0);
    assert_eq!(value("gambeson_refused_peers"), 1.0);
    assert_eq!(value("gambeson_ready"), 1.0);
    assert!(value("gambeson_peer_handshake_age_seconds{peer=\"node-2\"}") < 180.0);
    assert!(value("gambeson_peer_receive_bytes_total{peer=\"node-2\"}") > 0.0);
    assert!(value("gambeson_peer_transmit_bytes_total{peer=\"node-2\"}") > 0.0);
    assert!(value("gambeson_guard_drops_total{direction=\"out\"}") >= 1.0);
    assert_eq!(value("gambeson_guard_drops_total{direction=\"in\"}"), 0.0);
    assert!(value("gambeson_reconcile_duration_seconds_count") >= 1.0);
    assert!(value("gambeson_reconcile_duration_seconds_sum") > 0.0);
    value("gambeson_reconcile_errors_total");
    assert!(metrics.ends_with("# EOF\n"), "{metrics}");
}

#[test]
fn an_agent_that_does_not_run_is_said() {
    let lab = lab_up(Options { start: false, nodes: 1, pods_per_node: 0, ..userspace() });
    let node = lab.node("node-1").unwrap();
    let fails = |what: &str| {
        let output = node.exec(&[GAMBESON, "status", "--json"]).unwrap();
        assert_eq!(output.status.code(), Some(1), "{what}: {}", both(&output));
        assert!(output.stdout.is_empty(), "{what}");
        let text = both(&output);
        assert!(text.contains("no agent answers on /run/gambeson/agent.sock"), "{what}: {text}");
        assert!(text.contains("start `gambeson agent`"), "{what}: {text}");
    };
    fails("never started");
    node.start_agent().unwrap();
    status_when(node, "is ready", |status| status.ready);
    node.kill_agent().unwrap();
    fails("killed");
    node.start_agent().unwrap();
    let status = status_when(node, "takes the socket over", |status| status.ready);
    assert_eq!(serde_json::to_value(status).unwrap()["peers"], Value::Array(vec![]));
    // A second agent on the same node would fight the first.
    let options = ["--kubeconfig", "/run/gambeson/kubeconfig", "--cluster-cidr", "10.244.0.0/16"];
    let second = [&["timeout", "10", GAMBESON, "agent"][..], &options].concat();
    let second = node.exec(&second).unwrap();
    assert_eq!(second.status.code(), Some(1), "{}", both(&second));
    assert!(both(&second).contains("another gambeson agent answers"), "{}", both(&second));
}
