//! Agents against an API server that fails in every way it can: what is known stays, the
//! trouble is said once, and changes are taken up when it is over.

use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use gambeson_lab::api::{Effect, Fault, LoggedRequest};
use gambeson_lab::traffic::{FlowReport, Rate, Traffic};
use gambeson_lab::{Lab, Node, Options, Patch};
use serde_json::{Value, json};

use crate::common::agent::{
    LogSince, address, answers, eventually, peers, status_when, stranger, userspace,
};
use crate::common::lab::lab_up;
use crate::common::scenario::{assert_connected, fingerprint, run};

/// How long nothing may happen for "nothing happens" to mean something: longer than the pause
/// after which the same patch may be sent again.
const QUIET: Duration = Duration::from_secs(11);

/// Every annotation of an agent on an IPv4 underlay.
const PUBLISHED: [&str; 6] =
    ["public-key", "key-generation", "endpoint", "port", "transports", "mtu"];

fn set(lab: &Lab, faults: &[Fault]) {
    lab.api().unwrap().set_faults(faults).unwrap();
}

fn client(node: Node<'_>) -> IpAddr {
    node.addresses()[0]
}

fn status_code(code: u16) -> Effect {
    Effect::Status { code, retry_after: None }
}

/// Writes that this node's agent has sent, of Nodes alone.
fn writes(lab: &Lab, node: Node<'_>) -> Vec<LoggedRequest> {
    let mut requests = lab.api().unwrap().requests().unwrap();
    requests.retain(|r| r.client == Some(client(node)) && r.is_write() && r.resource == "nodes");
    requests
}

fn has_peer(node: Node<'_>, peer: &str) {
    status_when(node, &format!("has the peer {peer}"), |status| peers(status).contains(&peer));
}

#[test]
fn all_annotations_are_one_patch_and_nothing_is_written_after_it() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    let published = eventually(node, "says that the network is up", || {
        let node = lab.api().unwrap().node("node-1").unwrap();
        let conditions = node["status"]["conditions"].as_array().unwrap().clone();
        let up = |c: &Value| c["reason"] == "GambesonIsUp" && c["status"] == "False";
        conditions.iter().any(up).then_some(node)
    });
    let written = writes(&lab, node);
    assert!(written.iter().all(|w| w.verb == "patch" && w.name.as_deref() == Some("node-1")));
    assert!(written.len() <= 2, "{written:#?}");
    let annotations: Vec<_> = written
        .iter()
        .filter_map(|write| write.body["metadata"]["annotations"].as_object())
        .collect();
    assert_eq!(annotations.len(), 1, "{written:#?}");
    for name in PUBLISHED {
        let name = format!("gambeson.io/{name}");
        assert!(annotations[0][&name].is_string(), "{name}: {written:#?}");
        assert_eq!(annotations[0][&name], published["metadata"]["annotations"][&name]);
    }

    // Passes of all kinds: questions, repairs, changes of other Nodes.
    let before = lab.api().unwrap().requests().unwrap().last().unwrap().number;
    node.exec(&["ip", "route", "delete", "10.244.2.0/24", "metric", "1"]).unwrap();
    lab.api().unwrap().create_node(&stranger(90)).unwrap();
    has_peer(node, "stranger-90");
    thread::sleep(QUIET);
    let requests = lab.api().unwrap().requests().unwrap();
    let agents: Vec<_> = lab.nodes().into_iter().map(|node| Some(client(node))).collect();
    let from_agents: Vec<_> =
        requests.iter().filter(|r| r.number > before && agents.contains(&r.client)).collect();
    assert!(from_agents.is_empty(), "{from_agents:#?}");
}

// Fault 4.
#[test]
fn an_outage_changes_nothing_and_what_changed_meanwhile_is_taken_up() {
    let lab = lab_up(userspace());
    let nodes = lab.nodes();
    let pair = (lab.pod("pod-1-1").unwrap(), lab.pod("pod-2-1").unwrap());
    lab.api().unwrap().create_node(&stranger(90)).unwrap();
    nodes.iter().for_each(|node| has_peer(*node, "stranger-90"));
    let traffic = Traffic::start(&[pair], Rate { packets_per_second: 500, payload: 100 }).unwrap();
    lab.kill_api().unwrap();
    for node in &nodes {
        let status = status_when(*node, "notices", |status| !status.errors.is_empty());
        assert!(status.errors[0].contains("cannot follow the Nodes"), "{status}");
        assert!(status.ready && status.peers.len() == 2, "{status}");
    }
    // Repairs need no API server.
    let device = || nodes[0].exec(&["ip", "link", "show", "gambeson0"]).unwrap().status.success();
    nodes[0].exec(&["ip", "route", "delete", "10.244.90.0/24", "metric", "1"]).unwrap();
    eventually(nodes[0], "repairs a route", || {
        let routes = nodes[0].exec(&["ip", "route", "show", "10.244.90.0/24"]).unwrap();
        (!routes.stdout.is_empty()).then_some(())
    });
    assert!(device());
    lab.start_api().unwrap();
    lab.api().unwrap().delete_node("stranger-90").unwrap();
    lab.api().unwrap().create_node(&stranger(91)).unwrap();
    for node in nodes {
        status_when(node, "takes the changes up", |status| {
            let others = peers(status);
            others.contains(&"stranger-91")
                && !others.contains(&"stranger-90")
                && status.errors.is_empty()
        });
    }
    let reports = traffic.finish(Duration::from_secs(2));
    assert!(reports.iter().all(FlowReport::is_perfect), "{reports:?}");
}

/// A connection whose other end went without a word, as with a load balancer that is gone.
#[test]
fn a_connection_that_is_dead_without_a_word_is_noticed() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    let cut = "nft add table inet cut
               nft add chain inet cut out '{ type filter hook output priority 0; }'
               nft add chain inet cut in '{ type filter hook input priority 0; }'
               nft add rule inet cut out ip daddr 192.168.240.254 drop
               nft add rule inet cut in ip saddr 192.168.240.254 drop";
    run(&node.environment(), cut);
    let status = status_when(node, "notices", |status| !status.errors.is_empty());
    assert!(status.errors[0].contains("cannot follow the Nodes"), "{status}");
    lab.api().unwrap().create_node(&stranger(90)).unwrap();
    run(&node.environment(), "nft delete table inet cut");
    status_when(node, "goes on", |status| {
        peers(status).contains(&"stranger-90") && status.errors.is_empty()
    });
}

// Fault 5.
/// What a former agent left in the devices is enough to keep the mesh whole.
#[test]
fn an_agent_that_starts_during_an_outage_repairs_what_it_finds() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    let before = fingerprint(node);
    lab.kill_api().unwrap();
    node.restart_agent().unwrap();
    let status = status_when(node, "knows its peer from the device", |status| {
        status.waiting.is_some() && !status.peers.is_empty()
    });
    assert_eq!(status.peers[0].pod_cidrs, ["10.244.2.0/24".parse().unwrap()]);
    assert!(status.waiting.is_some_and(|waiting| waiting.contains("list of Nodes")));
    for damage in ["ip route flush proto 151", "ip link delete gambeson0"] {
        run(&node.environment(), damage);
        eventually(node, damage, || (fingerprint(node) == before).then_some(()));
        assert_connected(&lab, "node-1", "node-2");
    }
    lab.start_api().unwrap();
    status_when(node, "knows its peer by name", |status| {
        peers(status) == ["node-2"] && status.waiting.is_none() && status.errors.is_empty()
    });
    assert_eq!(fingerprint(node), before);
}

#[test]
fn a_list_that_would_take_the_mesh_down_is_not_believed() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    let from = client(node);
    let gone = Fault::every(Effect::Gone).on("watch").from(from);
    for (effect, says) in
        [(Effect::EmptyList, "no Node at all"), (Effect::Omit { name: "node-1".into() }, "node-1")]
    {
        let log = LogSince::now(node);
        set(&lab, &[gone.clone().times(1), Fault::every(effect).on("list").from(from)]);
        let status = status_when(node, "does not believe the list", |status| {
            status.errors.iter().any(|e| e.contains("cannot follow the Nodes") && e.contains(says))
        });
        assert_eq!(peers(&status), ["node-2"]);
        eventually(node, "asks again", || (lists(&lab, from) >= 3).then_some(()));
        let routes = node.exec(&["ip", "route", "show", "10.244.2.0/24"]).unwrap();
        assert!(String::from_utf8(routes.stdout).unwrap().contains("gambeson0"));
        assert!(answers(lab.pod("pod-1-1").unwrap(), address(&lab, "pod-2-1")));
        set(&lab, &[]);
        status_when(node, "recovers", |status| status.errors.is_empty());
        assert_eq!(log.count("cannot follow the Nodes"), 1);
        assert_eq!(log.count("peer left"), 0);
    }
}

/// A list that lacks a peer is believed at the second look, not at the first.
#[test]
fn a_peer_that_one_list_lacks_is_kept_until_a_second_look() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    let from = client(node);
    let pair = (lab.pod("pod-1-1").unwrap(), lab.pod("pod-2-1").unwrap());
    let traffic = Traffic::start(&[pair], Rate { packets_per_second: 200, payload: 100 }).unwrap();
    let log = LogSince::now(node);
    let gone = Fault::every(Effect::Gone).on("watch").from(from).times(1);
    let omit = Fault::every(Effect::Omit { name: "node-2".into() }).on("list").from(from);
    let before = lists(&lab, from);
    set(&lab, &[gone.clone(), omit.clone().times(1)]);
    eventually(node, "takes a second look", || (lists(&lab, from) >= before + 2).then_some(()));
    // What changes in the meantime is followed all the same, and what a second list lacks goes.
    set(&lab, &[gone, omit]);
    lab.api().unwrap().create_node(&stranger(90)).unwrap();
    has_peer(node, "stranger-90");
    assert_eq!(log.count("peer left"), 0);
    let reports = traffic.finish(Duration::from_secs(2));
    assert!(reports.iter().all(FlowReport::is_perfect), "{reports:?}");
    status_when(node, "believes the second list", |status| peers(status) == ["stranger-90"]);
    set(&lab, &[]);
}

fn lists(lab: &Lab, from: IpAddr) -> usize {
    let requests = lab.api().unwrap().requests().unwrap();
    requests.iter().filter(|r| r.verb == "list" && r.client == Some(from)).count()
}

/// Gives a stranger another endpoint.
fn move_to(lab: &Lab, stranger: u8, host: u8) {
    let endpoint = format!("198.51.100.{host}");
    let patch = json!({ "metadata": { "annotations": { "gambeson.io/endpoint": endpoint } } });
    lab.api().unwrap().patch_node(&format!("stranger-{stranger}"), Patch::Merge, &patch).unwrap();
}

// Fault 6.
#[test]
fn a_watch_that_forgets_repeats_delays_and_reorders_converges() {
    let lab = lab_up(Options { pods_per_node: 1, ..userspace() });
    let node = lab.node("node-1").unwrap();
    let (log, pod) = (LogSince::now(node), lab.pod("pod-1-1").unwrap());
    for effect in [
        Effect::Gone,
        Effect::Cut,
        Effect::Duplicate,
        Effect::Delay { milliseconds: 300 },
        Effect::Reorder,
    ] {
        let strangers = [90, 91, 92];
        for number in strangers {
            lab.api().unwrap().create_node(&stranger(number)).unwrap();
            has_peer(node, &format!("stranger-{number}"));
        }
        let fault = Fault::every(effect.clone()).on("watch").from(client(node));
        let ends = matches!(effect, Effect::Gone | Effect::Cut);
        set(&lab, &[if ends { fault.times(2) } else { fault }]);
        // In pairs, which may change places: of the same Node, and of two.
        let [a, b, c] = strangers;
        for (number, host) in [(b, 1), (c, 1), (a, 1), (a, 2), (b, 2), (c, 2)] {
            move_to(&lab, number, host);
        }
        status_when(node, &format!("has the last state of each Node after {effect:?}"), |status| {
            strangers.iter().all(|number| {
                let name = format!("stranger-{number}");
                let peer = status.peers.iter().find(|peer| peer.name == name);
                let endpoint = peer.and_then(|peer| peer.endpoint);
                endpoint.is_some_and(|endpoint| endpoint.ip().to_string() == "198.51.100.2")
            })
        });
        // A deletion before which a change came, which may now come after it.
        move_to(&lab, a, 3);
        for number in strangers {
            lab.api().unwrap().delete_node(&format!("stranger-{number}")).unwrap();
        }
        status_when(node, &format!("forgets deleted Nodes after {effect:?}"), |status| {
            peers(status) == ["node-2"]
        });
        set(&lab, &[]);
        assert!(answers(pod, address(&lab, "pod-2-1")));
    }
    assert_eq!(log.count("peer=node-2"), 0, "{}", node.agent_log().unwrap());
}

// Fault 7.
#[test]
fn refusals_are_retried_with_growing_pauses_and_said_once() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    let pod = lab.pod("pod-1-1").unwrap();
    for (number, code) in (90..).zip([401, 403, 409, 429, 500]) {
        let refuse = Fault::every(status_code(code)).from(client(node));
        let cut = Fault::every(Effect::Cut).on("watch").from(client(node)).times(1);
        let log = LogSince::now(node);
        set(&lab, &[refuse, cut]);
        let says = format!("({code})");
        let status = status_when(node, &says, |status| {
            status.errors.iter().any(|e| e.contains("cannot follow") && e.contains(&says))
        });
        assert!(status.ready && status.peers.iter().any(|peer| peer.name == "node-2"), "{status}");
        lab.api().unwrap().create_node(&stranger(number)).unwrap();
        assert!(answers(pod, address(&lab, "pod-2-1")));
        set(&lab, &[]);
        has_peer(node, &format!("stranger-{number}"));
        // An event shows that all is well: the next failure is a first one again.
        lab.api().unwrap().delete_node(&format!("stranger-{number}")).unwrap();
        status_when(node, "forgets it", |status| peers(status) == ["node-2"]);
        assert_eq!(log.count("cannot follow the Nodes"), 1, "{}", node.agent_log().unwrap());
        assert_eq!(log.count("following the Nodes"), 1, "{}", node.agent_log().unwrap());
    }
}

// Fault 7.
#[test]
fn a_refused_publication_is_retried_with_growing_pauses_and_said_once() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    // In turns, because the same patch is not sent twice within ten seconds.
    let spoil = ["mtu", "next-public-key"].map(|name| format!("gambeson.io/{name}"));
    for (code, spoilt) in [401, 403, 409, 429, 500].into_iter().zip(spoil.iter().cycle()) {
        let good = lab.api().unwrap().node("node-1").unwrap()["metadata"]["annotations"].clone();
        let log = LogSince::now(node);
        set(&lab, &[Fault::every(status_code(code)).on("patch").from(client(node))]);
        let before = writes(&lab, node).len();
        let spoil = json!({ "metadata": { "annotations": { spoilt: "spoilt" } } });
        lab.api().unwrap().patch_node("node-1", Patch::Merge, &spoil).unwrap();
        let says = format!("({code})");
        let status = status_when(node, &says, |s| s.errors.iter().any(|e| e.contains(&says)));
        assert!(status.ready && peers(&status) == ["node-2"], "{status}");
        eventually(node, "tries again", || (writes(&lab, node).len() >= before + 3).then_some(()));
        set(&lab, &[]);
        eventually(node, "corrects its Node", || {
            let node = lab.api().unwrap().node("node-1").unwrap();
            (node["metadata"]["annotations"] == good).then_some(())
        });
        status_when(node, "is content", |status| status.errors.is_empty());
        assert_eq!(log.count("WARN"), 1, "{}", node.agent_log().unwrap());
        let attempts = writes(&lab, node).split_off(before);
        assert!(attempts.len() <= 8, "{attempts:#?}");
        // A reader must never see half of a change, whatever part of it was new.
        for name in PUBLISHED {
            let name = format!("gambeson.io/{name}");
            let written = attempts.iter().map(|write| &write.body["metadata"]["annotations"]);
            written.for_each(|written| assert_eq!(written[&name], good[&name]));
        }
    }
}

// Fault 7.
#[test]
fn a_server_that_never_answers_is_given_up_on() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    let hang = Fault::every(Effect::Hang).from(client(node));
    let cut = Fault::every(Effect::Cut).on("watch").from(client(node)).times(1);
    set(&lab, &[cut, hang]);
    let status = status_when(node, "gives up", |status| {
        status.errors.iter().any(|error| error.contains("no answer within 10.0 s"))
    });
    assert!(status.ready && peers(&status) == ["node-2"], "{status}");
    assert!(answers(lab.pod("pod-1-1").unwrap(), address(&lab, "pod-2-1")));
    set(&lab, &[]);
    lab.api().unwrap().create_node(&stranger(90)).unwrap();
    has_peer(node, "stranger-90");
}

#[test]
fn retry_after_is_heeded_by_every_request() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    has_peer(node, "node-2");
    // Of a patch, and the watch has to keep still as well.
    let busy = Effect::Status { code: 429, retry_after: Some(4) };
    let cut = Fault::every(Effect::Cut).on("watch").from(client(node)).times(1);
    set(&lab, &[Fault::every(busy).on("patch").from(client(node)), cut]);
    let spoil = json!({ "metadata": { "annotations": { "gambeson.io/mtu": "1" } } });
    lab.api().unwrap().patch_node("node-1", Patch::Merge, &spoil).unwrap();
    let asked = || {
        let requests = lab.api().unwrap().requests().unwrap();
        requests.into_iter().filter(|r| r.client == Some(client(node))).count()
    };
    status_when(node, "is told to wait", |s| s.errors.iter().any(|e| e.contains("(429)")));
    // What was under way when the answer came may still arrive.
    std::thread::sleep(Duration::from_millis(500));
    let before = asked();
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(asked(), before);
    set(&lab, &[]);
    status_when(node, "goes on", |status| status.errors.is_empty());
}

#[test]
fn three_conditions_say_that_the_network_is_up_and_are_kept_so() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    let conditions = || {
        let node = lab.api().unwrap().node("node-1").unwrap();
        let all = node["status"]["conditions"].as_array().unwrap().clone();
        let status = |kind: &str| {
            all.iter().find(|c| c["type"] == kind).map(|c| c["status"].as_str().unwrap().to_owned())
        };
        ["NetworkUnavailable", "MeshReady", "MeshEncrypted"].map(status)
    };
    let up = || {
        let expected = ["False", "True", "True"].map(|status| Some(status.to_owned()));
        (conditions() == expected).then_some(())
    };
    eventually(node, "says so", up);
    let wrong = json!({ "status": { "conditions": [
        { "type": "MeshEncrypted", "status": "False", "reason": "Somebody" }
    ]}});
    lab.api().unwrap().patch_status("node-1", Patch::Strategic, &wrong).unwrap();
    eventually(node, "says so again", up);
}
