//! An API server that is away, wrong or slow, and agents that are killed: the data plane
//! does not notice.

use std::time::Duration;

use gambeson::lab::Lab;
use gambeson::lab::Node;
use gambeson::lab::api::{Effect, Fault};
use nix::sys::signal::Signal;
use serde_json::json;

use super::{Flows, annotate, annotation, eventually, holds, until_status, userspace, within};
use crate::common::lab::lab_up;

const MTU: &str = "gambeson.io/mtu";

fn fault(verb: &str, effect: Effect) -> Fault {
    Fault {
        verb: Some(verb.into()),
        resource: Some("nodes".into()),
        client: None,
        times: None,
        effect,
    }
}

fn both_nodes(lab: &Lab) -> [Node<'_>; 2] {
    ["node-1", "node-2"].map(|name| lab.node(name).unwrap())
}

/// Whether `node` has the keepalive that node-2's Node asks for.
fn has_keepalive(node: &Node<'_>, seconds: u16) -> bool {
    holds(node, &format!("wg show gambeson0 persistent-keepalive | grep -qw {seconds}"))
}

fn ask_for_keepalive(lab: &Lab, seconds: u16) {
    let value = json!({ "config.gambeson.io/persistent-keepalive": seconds.to_string() });
    annotate(lab, "node-2", &value);
}

#[test]
fn killed_and_ended_agents_lose_no_packet() {
    let lab = lab_up(userspace());
    let flows = Flows::fast(&lab);
    flows.more(500);
    for end in [Node::kill_agent, Node::stop_agent] {
        for node in both_nodes(&lab) {
            let tunnels = node.tunnels();
            end(&node).unwrap();
            flows.more(500);
            node.start_agent().unwrap();
            until_status(&node, "adopts what is there", |s| s.ready && s.peers.len() == 1);
            assert_eq!(node.tunnels(), tunnels, "the tunnel process is the same");
        }
    }
    flows.more(500);
    flows.must_be_perfect();
}

#[test]
fn fifty_crashes_in_a_row_lose_no_packet() {
    let lab = lab_up(userspace());
    let [node, _] = both_nodes(&lab);
    let flows = Flows::fast(&lab);
    for crash in 0..50 {
        node.kill_agent().unwrap();
        node.start_agent().unwrap();
        // Killed at another point of its start each time.
        flows.more(1 + crash * 8);
    }
    until_status(&node, "the last one works", |status| status.ready && status.peers.len() == 1);
    flows.must_be_perfect();
    assert_eq!(annotation(&lab, "node-1", "gambeson.io/key-generation").as_deref(), Some("0"));
}

#[test]
fn an_outage_of_the_api_server_changes_nothing_and_changes_are_applied_on_return() {
    let lab = lab_up(userspace());
    let flows = Flows::steady(&lab);
    lab.kill_api().unwrap();
    for node in both_nodes(&lab) {
        until_status(&node, "says so", |status| {
            status.errors.iter().any(|error| error.contains("cannot follow the Nodes"))
        });
        // An agent that starts into the outage knows no Node, and leaves all as it is.
        node.kill_agent().unwrap();
        node.start_agent().unwrap();
        until_status(&node, "is ready all the same", |status| status.ready);
    }
    flows.more(100);
    lab.start_api().unwrap();
    ask_for_keepalive(&lab, 21);
    let [node, _] = both_nodes(&lab);
    eventually(&node, "the change arrives", || has_keepalive(&node, 21));
    flows.must_be_perfect();
}

#[test]
fn an_empty_list_deletes_no_peer() {
    let lab = lab_up(userspace());
    let flows = Flows::steady(&lab);
    let gone = Fault { times: Some(2), ..fault("watch", Effect::Gone) };
    lab.api().unwrap().set_faults(&[fault("list", Effect::EmptyList), gone]).unwrap();
    for node in both_nodes(&lab) {
        until_status(&node, "says so and keeps the peer", |status| {
            let said = status.errors.iter().any(|error| error.contains("listed no Node"));
            assert_eq!(status.peers.len(), 1);
            said
        });
    }
    flows.more(100);
    lab.api().unwrap().set_faults(&[]).unwrap();
    ask_for_keepalive(&lab, 22);
    let [node, _] = both_nodes(&lab);
    eventually(&node, "believes a complete list again", || has_keepalive(&node, 22));
    flows.must_be_perfect();
}

#[test]
fn refusals_and_hanging_requests_are_waited_out() {
    let lab = lab_up(userspace());
    let flows = Flows::steady(&lab);
    let [node, _] = both_nodes(&lab);
    for code in [401, 403, 409, 429, 500, 503] {
        let status = Effect::Status { code, retry_after: None };
        let faults = ["patch", "list", "watch"].map(|verb| Fault {
            client: Some(node.addresses()[0]),
            times: Some(2),
            ..fault(verb, status.clone())
        });
        let cut = Fault { times: Some(1), ..fault("watch", Effect::Cut) };
        lab.api().unwrap().set_faults(&[&[cut][..], &faults].concat()).unwrap();
        // Somebody else writes our annotation: the agent takes it back, as soon as it may.
        annotate(&lab, "node-1", &json!({ MTU: code.to_string() }));
        eventually(&node, &format!("published after {code}"), || {
            annotation(&lab, "node-1", MTU).as_deref() == Some("1440")
        });
    }
    let hang = Fault { times: Some(1), ..fault("list", Effect::Hang) };
    let gone = Fault { times: Some(2), ..fault("watch", Effect::Gone) };
    lab.api().unwrap().set_faults(&[hang, gone]).unwrap();
    ask_for_keepalive(&lab, 23);
    within(Duration::from_secs(40), &node, "after a request that hung", || {
        has_keepalive(&node, 23)
    });
    flows.must_be_perfect();
}

#[test]
fn duplicate_late_and_reordered_events_end_in_the_same_state() {
    let lab = lab_up(userspace());
    let [node, _] = both_nodes(&lab);
    for effect in [Effect::Duplicate, Effect::Reorder, Effect::Delay { milliseconds: 300 }] {
        lab.api().unwrap().set_faults(&[fault("watch", effect.clone())]).unwrap();
        for seconds in 30..40 {
            ask_for_keepalive(&lab, seconds);
        }
        lab.api().unwrap().set_faults(&[]).unwrap();
        ask_for_keepalive(&lab, 50);
        eventually(&node, &format!("{effect:?}"), || has_keepalive(&node, 50));
        ask_for_keepalive(&lab, 25);
        eventually(&node, &format!("after {effect:?}"), || has_keepalive(&node, 25));
    }
}

#[test]
fn nothing_is_written_in_the_steady_state() {
    let lab = lab_up(userspace());
    let [node, other] = both_nodes(&lab);
    until_status(&node, "meshed", |status| status.ready && status.peers.len() == 1);
    let version =
        |name: &str| lab.api().unwrap().node(name).unwrap()["metadata"]["resourceVersion"].clone();
    let up = |name: &str| {
        let node = lab.api().unwrap().node(name).unwrap();
        let conditions = node["status"]["conditions"].as_array().unwrap().clone();
        conditions.iter().any(|c| c["reason"] == "GambesonIsUp" && c["status"] == "False")
    };
    eventually(&node, "the condition", || up("node-1") && up("node-2"));
    let before = [version("node-1"), version("node-2")];
    // Events of the kernel make both agents look, and a restart makes one compare anew.
    for n in 0..20 {
        let address = format!("ip address add 192.0.2.{n}/32 dev lo");
        assert!(holds(&node, &address) && holds(&other, &address));
    }
    node.restart_agent().unwrap();
    until_status(&node, "restarted", |status| status.ready && status.peers.len() == 1);
    assert_eq!([version("node-1"), version("node-2")], before);
}

/// SIGSTOP and SIGCONT stand in for a machine that is too busy to run the agent.
#[test]
fn an_agent_that_slept_catches_up() {
    let lab = lab_up(userspace());
    let [node, _] = both_nodes(&lab);
    let agent = node.agent().unwrap();
    agent.signal(Signal::SIGSTOP);
    for seconds in 60..80 {
        ask_for_keepalive(&lab, seconds);
    }
    agent.signal(Signal::SIGCONT);
    eventually(&node, "the newest state", || has_keepalive(&node, 79));
}
