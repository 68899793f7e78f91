//! What happens to running traffic when the control plane goes away: nothing.

use std::time::{Duration, Instant};

use gambeson_lab::traffic::{FlowReport, Rate, Traffic};
use gambeson_lab::wait::until;
use gambeson_lab::{Lab, LabError, Node, Options, Patch, Progress, WireguardMode};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::common::lab::lab_up as up;
use crate::common::scenario::{
    PATIENCE, assert_connected, fingerprint, guard_drops, options, run, within,
};
use crate::leak::Watch;

/// How long the last packets may take to arrive.
const GRACE: Duration = Duration::from_secs(5);

fn userspace() -> Options {
    options(WireguardMode::Userspace)
}

/// 1,000 packets per second both ways between pods on two nodes.
fn traffic(lab: &Lab) -> Traffic {
    let pods = lab.pods();
    Traffic::start(&[(pods[0], pods[1])], Rate::default()).unwrap()
}

/// Waits until so many more packets have arrived.
fn pass_packets(traffic: &Traffic, packets: u64) {
    let enough = traffic.so_far().1 + packets;
    within(PATIENCE, &format!("{packets} packets arrive"), || {
        (traffic.so_far().1 >= enough).then_some(())
    });
}

/// Ends the traffic: every packet arrived once, and the guard stopped none.
fn assert_perfect(lab: &Lab, traffic: Traffic) {
    let reports = traffic.finish(GRACE);
    assert_eq!(reports.len(), 2);
    assert!(reports.iter().all(FlowReport::is_perfect), "{reports:#?}");
    for node in lab.nodes() {
        assert_eq!(guard_drops(node), (0, 0), "the guard of {} stopped packets", node.name());
    }
}

/// Waits until an agent that was started again is at work.
fn wait_until_ready(node: Node<'_>) {
    let ready = until(Instant::now() + PATIENCE, || {
        let status = node.status().ok()?;
        (status.ready && status.waiting.is_none() && !status.peers.is_empty()).then_some(())
    });
    let status = node.status();
    assert!(ready.is_some(), "not ready: {status:#?}\n{}", node.agent_log().unwrap());
}

/// Ends both agents under traffic and starts them again, twice.
pub(crate) fn agents_end_under_traffic(
    options: Options,
    end: impl Fn(&Node<'_>) -> Result<(), LabError>,
) {
    let lab = up(options);
    let before: Vec<String> = lab.nodes().into_iter().map(fingerprint).collect();
    let tunnels: Vec<_> = lab.nodes().iter().flat_map(Node::tunnels).collect();
    let traffic = traffic(&lab);
    pass_packets(&traffic, 1000);
    for _ in 0..2 {
        for node in lab.nodes() {
            end(&node).unwrap();
            assert!(node.agent().is_none());
        }
        pass_packets(&traffic, 2000);
        let alone: Vec<String> = lab.nodes().into_iter().map(fingerprint).collect();
        assert_eq!(before, alone, "an agent took something with it");
        for node in lab.nodes() {
            node.start_agent().unwrap();
        }
        lab.nodes().into_iter().for_each(wait_until_ready);
        pass_packets(&traffic, 1000);
    }
    assert_perfect(&lab, traffic);
    let after: Vec<String> = lab.nodes().into_iter().map(fingerprint).collect();
    assert_eq!(before, after);
    let adopted: Vec<_> = lab.nodes().iter().flat_map(Node::tunnels).collect();
    assert_eq!(tunnels, adopted, "the tunnels were not adopted");
}

#[test]
fn killed_agents_lose_nothing() {
    agents_end_under_traffic(userspace(), |node| node.kill_agent());
}

#[test]
fn stopped_agents_lose_nothing() {
    agents_end_under_traffic(userspace(), |node| node.stop_agent());
}

/// An agent that is killed over and over, each time a little later in its start.
pub(crate) fn crashes_in_a_row(options: Options, crashes: u32) {
    let lab = up(options);
    let node = lab.node("node-1").unwrap();
    let before = fingerprint(node);
    let traffic = traffic(&lab);
    pass_packets(&traffic, 500);
    for crash in 0..crashes {
        node.kill_agent().unwrap();
        node.start_agent().unwrap();
        // Two flows of 1,000 packets a second: 20 ms more each time.
        pass_packets(&traffic, u64::from(crash) * 40);
    }
    wait_until_ready(node);
    pass_packets(&traffic, 500);
    assert_perfect(&lab, traffic);
    assert_eq!(before, fingerprint(node));
}

#[test]
fn ten_crashes_in_a_row_lose_nothing() {
    crashes_in_a_row(userspace(), 10);
}

/// The API server goes away, an agent with it, and both come back.
pub(crate) fn api_outage(options: Options) {
    let lab = up(options);
    let node = lab.node("node-1").unwrap();
    let before = fingerprint(node);
    let traffic = traffic(&lab);
    pass_packets(&traffic, 500);
    lab.kill_api().unwrap();
    pass_packets(&traffic, 2000);
    assert_eq!(before, fingerprint(node), "an outage changed the data plane");
    // An agent that starts without an API server knows no Node.
    node.kill_agent().unwrap();
    node.start_agent().unwrap();
    within(PATIENCE, "the agent says what it waits for", || {
        node.status().ok()?.waiting.filter(|waiting| waiting.contains("API server"))
    });
    pass_packets(&traffic, 4000);
    assert_eq!(before, fingerprint(node), "an agent without an API server changed the data plane");
    lab.start_api().unwrap();
    let patch = json!({ "metadata": { "annotations": {
        "config.gambeson.io/persistent-keepalive": "77",
    } } });
    lab.api().unwrap().patch_node("node-2", Patch::Merge, &patch).unwrap();
    within(PATIENCE, "node-1 follows a change after the outage", || {
        let keepalive = run(&node.environment(), "wg show gambeson0 persistent-keepalive");
        keepalive.trim_end().ends_with("\t77").then_some(())
    });
    assert_perfect(&lab, traffic);
}

#[test]
fn an_api_outage_loses_nothing() {
    api_outage(userspace());
}

/// Without agents, and at last without a tunnel, nothing leaves in clear.
pub(crate) fn closed_without_agents(options: Options) {
    let lab = up(options);
    let node = lab.node("node-1").unwrap();
    let before = fingerprint(node);
    let watch = Watch::start(&lab);
    for node in lab.nodes() {
        node.kill_agent().unwrap();
    }
    assert_eq!(before, fingerprint(node));
    let [one, two] = [lab.pods()[0], lab.pods()[1]];
    assert!(watch.canary(one, two.addresses()[0]), "the tunnels died with the agents");
    // The device goes with its process or by hand; packets must not take the default route.
    node.tunnels().iter().for_each(|tunnel| tunnel.signal(Signal::SIGKILL));
    let gone = "ip link delete gambeson0 2>/dev/null; ! ip link show gambeson0 2>/dev/null";
    within(PATIENCE, "the device goes", || {
        node.exec(&["sh", "-c", gone]).unwrap().status.success().then_some(())
    });
    for address in two.addresses() {
        assert!(!watch.canary(one, address), "answered without a tunnel");
    }
    // Each line of defence holds by itself: first the routes alone, then the guard alone, then
    // the rules alone.
    let environment = node.environment();
    let no_rules = "for ip in 'ip -4' 'ip -6'; do for pref in 15100 15101; do
                    $ip rule delete pref $pref || true; done; done";
    let no_routes = "ip route flush proto 151; ip -6 route flush proto 151";
    run(&environment, &format!("nft flush ruleset; {no_rules}"));
    assert!(!watch.canary(one, two.addresses()[0]));
    watch.assert_silent();
    for node in lab.nodes() {
        node.start_agent().unwrap();
    }
    assert_connected(&lab, "node-1", "node-2");
    assert_eq!(before, fingerprint(node));
    node.kill_agent().unwrap();
    node.tunnels().iter().for_each(|tunnel| tunnel.signal(Signal::SIGKILL));
    within(PATIENCE, "the device goes", || {
        node.exec(&["sh", "-c", gone]).unwrap().status.success().then_some(())
    });
    let rules = run(&environment, "ip rule show; ip -6 rule show");
    assert_eq!(rules.matches(" unreachable").count(), two.addresses().len(), "{rules}");
    run(&environment, &format!("{no_routes}; {no_rules}"));
    let watch = Watch::start(&lab);
    for address in two.addresses() {
        assert!(!watch.canary(one, address), "answered without a tunnel");
    }
    watch.assert_silent();
    assert!(guard_drops(node).0 > 0, "the guard saw nothing");
    node.start_agent().unwrap();
    assert_connected(&lab, "node-1", "node-2");
    node.kill_agent().unwrap();
    run(&environment, &format!("nft flush ruleset; {no_routes}"));
    let watch = Watch::start(&lab);
    for address in two.addresses() {
        assert!(!watch.canary(one, address), "answered without a route");
    }
    watch.assert_silent();
}

#[test]
fn nothing_leaves_in_clear_without_agents_and_tunnels() {
    closed_without_agents(userspace());
}

/// The lab of a test that panics goes away with it.
#[test]
fn a_lab_goes_down_when_its_test_fails() {
    let options = userspace();
    let name = options.name.clone();
    let failed = std::thread::spawn(move || {
        let _lab = up(options);
        panic!("on purpose");
    });
    assert!(failed.join().is_err());
    assert!(!Lab::down(&name, &Progress::silent()).unwrap(), "the lab was left behind");
}
