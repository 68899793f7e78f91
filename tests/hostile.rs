//! Nodes whose annotations and pod CIDRs are wrong, forged or taken back: that Node alone is
//! refused, with its reason; its last good state stays, and everybody else is unaffected.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use gambeson::status::PeerStatus;
use gambeson_keys::PrivateKey;
use gambeson_lab::traffic::{FlowReport, Rate, Traffic};
use gambeson_lab::{Lab, Options, Patch};
use serde_json::{Map, Value, json};

use crate::common::agent::{
    address, answers, eventually, peers, refusal, status_json, status_when, stranger, userspace,
};
use crate::common::lab::lab_up;
use crate::common::scenario::run;

/// The Node that goes wrong, and those that watch it.
const BAD: &str = "node-3";
const WATCHERS: [&str; 2] = ["node-1", "node-2"];

/// Something wrong with a Node, and what node-1 and node-2 are to say of it.
struct Case {
    patch: Value,
    says: [&'static str; 2],
}

fn annotation(name: &str, value: impl Into<Value>, says: &'static str) -> Case {
    let annotations = json!({ format!("gambeson.io/{name}"): value.into() });
    Case { patch: json!({ "metadata": { "annotations": annotations } }), says: [says; 2] }
}

fn pod_cidr(cidrs: &[&str], says: &'static str) -> Case {
    let spec = json!({ "podCIDR": cidrs.first(), "podCIDRs": cidrs });
    Case { patch: json!({ "spec": spec }), says: [says; 2] }
}

fn key_of(lab: &Lab, node: &str) -> String {
    let node = lab.api().unwrap().node(node).unwrap();
    node["metadata"]["annotations"]["gambeson.io/public-key"].as_str().unwrap().to_owned()
}

// Fault 17.
fn bad_annotations(lab: &Lab) -> Vec<Case> {
    let key = |bytes: &[u8]| BASE64.encode(bytes);
    let mut one = [0; 32];
    one[0] = 1;
    let (first, second) = (key_of(lab, "node-1"), key_of(lab, "node-2"));
    let own_of_first = ["this node's own key", "the key of node node-1"];
    let own_of_second = ["the key of node node-2", "this node's own key"];
    let removed = ["public-key", "key-generation", "endpoint", "port", "transports", "mtu"]
        .map(|name| (format!("gambeson.io/{name}"), Value::Null));
    vec![
        annotation("public-key", "not base64!", "not the base64 of 32 bytes"),
        annotation("public-key", key(&[7; 31]), "not the base64 of 32 bytes"),
        annotation("public-key", key(&[7; 33]), "not the base64 of 32 bytes"),
        annotation(
            "public-key",
            "A".repeat(255 << 10),
            "is over 256 bytes long, more than any valid",
        ),
        annotation("public-key", key(&[0; 32]), "a low-order point"),
        annotation("public-key", key(&one), "a low-order point"),
        annotation("public-key", Value::Null, "annotation gambeson.io/public-key is missing"),
        annotation("public-key", "\u{1b}[31mred\n", "\\u{1b}[31mred\\n"),
        Case { says: own_of_first, ..annotation("public-key", first.clone(), "") },
        Case { says: own_of_first, ..annotation("next-public-key", first, "") },
        Case { says: own_of_second, ..annotation("public-key", second, "") },
        annotation("key-generation", "-1", "not a whole number"),
        annotation("transports", "vxlan", "no transport in common"),
        annotation("mtu", "0", "not a number of bytes"),
        Case {
            patch: json!({ "metadata": { "annotations": Map::from_iter(removed) } }),
            says: ["its annotations were removed"; 2],
        },
    ]
}

// Faults 18 and 19.
fn bad_networks() -> Vec<Case> {
    vec![
        pod_cidr(&[], "has no pod CIDR yet"),
        pod_cidr(&["0.0.0.0/0"], "0.0.0.0/0 is not a smaller part"),
        pod_cidr(&["10.244.0.0/16"], "10.244.0.0/16 is not a smaller part"),
        pod_cidr(&["192.168.240.0/24"], "192.168.240.0/24 is not a smaller part"),
        pod_cidr(&["garbage"], "is not an address and prefix length"),
        pod_cidr(&["10.244.2.0/24"], "10.244.2.0/24 overlaps 10.244.2.0/24 of node node-2"),
        pod_cidr(&["10.244.1.128/25"], "10.244.1.128/25 overlaps 10.244.1.0/24 of node node-1"),
        annotation("endpoint", "127.0.0.1", "a loopback address"),
        annotation("endpoint", "224.0.0.1", "a multicast address"),
        annotation("endpoint", "0.0.0.0", "an unspecified address"),
        annotation("endpoint", "10.244.9.9", "inside the cluster network 10.244.0.0/16"),
        annotation("endpoint", "example.org", "not an IPv4 address"),
        annotation("endpoint", Value::Null, "publishes no endpoint"),
        annotation("port", "0", "not a base port"),
        annotation("port", "65535", "not a base port"),
    ]
}

/// A mesh of three, in which the third Node's agent no longer corrects its annotations.
struct Hostile {
    lab: Lab,
    /// The third Node as its agent left it.
    good: Value,
}

impl Hostile {
    fn new() -> Self {
        let lab = lab_up(Options { nodes: 3, ..userspace() });
        lab.node(BAD).unwrap().kill_agent().unwrap();
        let good = lab.api().unwrap().node(BAD).unwrap();
        Self { lab, good }
    }

    fn patch(&self, patch: &Value) {
        self.lab.api().unwrap().patch_node(BAD, Patch::Merge, patch).unwrap();
    }

    fn restore(&self) {
        let mut annotations = self.good["metadata"]["annotations"].clone();
        annotations["gambeson.io/next-public-key"] = Value::Null;
        self.patch(
            &json!({ "metadata": { "annotations": annotations }, "spec": self.good["spec"] }),
        );
        for name in WATCHERS {
            let node = self.lab.node(name).unwrap();
            status_when(node, "accepts it again", |status| {
                status.refused.is_empty() && status.peers.len() == 2
            });
        }
    }

    /// The bad Node as a peer of this node, without what changes by itself.
    fn as_peer(&self, name: &str) -> Option<PeerStatus> {
        let status = self.lab.node(name).unwrap().status().unwrap();
        let peer = status.peers.into_iter().find(|peer| peer.name == BAD)?;
        Some(PeerStatus { handshake_age_seconds: None, rx_bytes: 0, tx_bytes: 0, ..peer })
    }

    fn assert_refused(&self, case: &Case, kept: bool) {
        self.patch(&case.patch);
        for (name, says) in WATCHERS.iter().zip(case.says) {
            let node = self.lab.node(name).unwrap();
            let what = format!("refuses {BAD}, because it {says}");
            status_when(node, &what, |status| {
                refusal(status, BAD).is_some_and(|r| r.reason.contains(says) && r.kept == kept)
            });
        }
    }
}

#[test]
fn a_bad_node_is_refused_by_its_reason_and_nobody_else_is_affected() {
    let hostile = Hostile::new();
    let lab = &hostile.lab;
    let agents = WATCHERS.map(|name| lab.node(name).unwrap().agent());
    let healthy = (lab.pod("pod-1-1").unwrap(), lab.pod("pod-2-1").unwrap());
    let rate = Rate { packets_per_second: 200, payload: 100 };
    let traffic = Traffic::start(&[healthy], rate).unwrap();
    let good = WATCHERS.map(|name| hostile.as_peer(name));
    assert!(good.iter().all(Option::is_some));
    for case in bad_annotations(lab).into_iter().chain(bad_networks()) {
        hostile.assert_refused(&case, !case.says[0].contains("no transport in common"));
        let document = status_json(lab.node("node-1").unwrap());
        assert_eq!(document["refused"][0]["name"], BAD, "{document}");
        let reason = document["refused"][0]["reason"].as_str().unwrap();
        assert!(reason.contains(case.says[0]) && reason.len() < 400, "{reason}");
        if document["refused"][0]["kept"] == true {
            assert_eq!(WATCHERS.map(|name| hostile.as_peer(name)), good, "{}", case.patch);
            assert!(answers(healthy.0, address(lab, "pod-3-1")), "{}", case.patch);
        }
        hostile.restore();
        assert_eq!(WATCHERS.map(|name| hostile.as_peer(name)), good, "{}", case.patch);
    }
    let reports = traffic.finish(Duration::from_secs(2));
    assert!(reports.iter().all(FlowReport::is_perfect), "{reports:?}");
    assert_eq!(WATCHERS.map(|name| lab.node(name).unwrap().agent()), agents);
    // An operator finds it where operators look.
    let events = lab.api().unwrap().events().unwrap();
    let about = |event: &&Value| {
        event["reason"] == "PeerRefused" && event["involvedObject"]["name"] == "node-1"
    };
    let messages: Vec<_> = events.iter().filter(about).map(|e| e["message"].to_string()).collect();
    assert!(messages.iter().any(|m| m.contains("Peer node-3 is refused")), "{messages:?}");
    assert!(!lab.node("node-1").unwrap().agent_log().unwrap().contains('\u{1b}'));
}

/// The kernel is the memory: what an agent's devices carry keeps its place over a restart.
#[test]
fn a_bad_node_and_a_restart_cut_nobody_off() {
    let hostile = Hostile::new();
    let lab = &hostile.lab;
    let node = lab.node("node-2").unwrap();
    let pod = lab.pod("pod-2-1").unwrap();
    let device = || {
        let look = "wg show gambeson0 allowed-ips | sort; ip route show proto 151 | sort";
        run(&node.environment(), look)
    };
    let before = device();
    // The key of node-1, which has the higher name of the two once it is forged on `a-thief`,
    // a Node that claims to be older than all.
    let mut thief = stranger(9);
    thief["metadata"]["name"] = "a-thief".into();
    thief["metadata"]["creationTimestamp"] = "2001-01-01T00:00:00Z".into();
    thief["metadata"]["annotations"]["gambeson.io/public-key"] = key_of(lab, "node-1").into();
    lab.api().unwrap().create_node(&thief).unwrap();
    hostile.patch(&annotation("public-key", key_of(lab, "node-1"), "").patch);
    for restart in ["before", "after"] {
        let status = status_when(node, "refuses both thieves", |status| {
            let stolen = |name| {
                refusal(status, name).is_some_and(|r| r.reason.contains("the key of node node-1"))
            };
            stolen("a-thief") && stolen(BAD) && peers(status) == ["node-1", BAD]
        });
        assert!(refusal(&status, BAD).is_some_and(|r| r.kept), "{status}");
        assert_eq!(device(), before, "{restart}");
        assert!(answers(pod, address(lab, "pod-1-1")) && answers(pod, address(lab, "pod-3-1")));
        if restart == "before" {
            node.restart_agent().unwrap();
        }
    }
}

/// A typing error in an option that people set costs that option.
#[test]
fn a_typing_error_in_an_option_refuses_nobody() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    let typo = json!({ "metadata": { "annotations": {
        "config.gambeson.io/persistent-keepalive": "25s" } } });
    lab.api().unwrap().patch_node("node-2", Patch::Merge, &typo).unwrap();
    for restart in [true, false] {
        let status = status_when(node, "warns of it", |status| !status.warnings.is_empty());
        let warning = &status.warnings[0];
        let key = "annotation config.gambeson.io/persistent-keepalive is \"25s\"";
        assert!(warning.contains("Node node-2") && warning.contains(key), "{warning}");
        assert!(status.refused.is_empty() && status.errors.is_empty(), "{status}");
        assert_eq!(peers(&status), ["node-2"]);
        assert!(answers(lab.pod("pod-1-1").unwrap(), address(&lab, "pod-2-1")));
        if restart {
            node.restart_agent().unwrap();
        }
    }
}

/// Without a last good state there is nothing to keep.
#[test]
fn a_node_that_is_bad_at_first_sight_is_no_peer() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    let mut bad = stranger(9);
    bad["metadata"]["annotations"]["gambeson.io/public-key"] = "garbage".into();
    lab.api().unwrap().create_node(&bad).unwrap();
    for restart in [true, false] {
        let status = status_when(node, "meshes with the good node alone", |status| {
            let refused = refusal(status, "stranger-9");
            peers(status) == ["node-2"] && refused.is_some_and(|r| !r.kept)
        });
        assert!(status.ready, "{status}");
        if restart {
            node.restart_agent().unwrap();
        }
    }
    assert!(answers(lab.pod("pod-1-1").unwrap(), address(&lab, "pod-2-1")));
}

// Faults 17 (a generation that goes back) and 20.
#[test]
fn a_generation_never_goes_back_until_the_node_is_made_again() {
    let hostile = Hostile::new();
    let lab = &hostile.lab;
    let node = lab.node("node-1").unwrap();
    let pod = lab.pod("pod-1-1").unwrap();
    let generation = |number| {
        json!({ "metadata": { "annotations": {
        "gambeson.io/key-generation": number } } })
    };
    let known =
        |number: u64| move |peer: &PeerStatus| peer.name == BAD && peer.key_generation == number;
    hostile.patch(&generation("4"));
    status_when(node, "takes generation 4", |status| status.peers.iter().any(known(4)));
    for back in ["3", "0"] {
        hostile.patch(&generation(back));
        let says = format!("went back from 4 to {back}");
        let status = status_when(node, &says, |status| {
            refusal(status, BAD).is_some_and(|r| r.kept && r.reason.contains(&says))
        });
        assert!(status.peers.iter().any(known(4)), "{status}");
        assert!(answers(pod, address(lab, "pod-3-1")));
    }

    lab.api().unwrap().delete_node(BAD).unwrap();
    status_when(node, "forgets it", |status| {
        peers(status) == ["node-2"] && status.refused.is_empty()
    });
    let routes = String::from_utf8(node.exec(&["ip", "route"]).unwrap().stdout).unwrap();
    assert!(!routes.contains("10.244.3.0/24"), "{routes}");
    let mut again = hostile.good.clone();
    for field in ["uid", "resourceVersion", "creationTimestamp", "annotations"] {
        again["metadata"].as_object_mut().unwrap().remove(field);
    }
    lab.api().unwrap().create_node(&again).unwrap();
    status_when(node, "sees the new one", |status| {
        refusal(status, BAD).is_some_and(|r| !r.kept && r.reason.contains("not published a key"))
    });
    lab.node(BAD).unwrap().start_agent().unwrap();
    status_when(node, "takes the new one", |status| {
        status.refused.is_empty() && status.peers.iter().any(known(0))
    });
    assert!(answers(pod, address(lab, "pod-3-1")));
    assert!(answers(pod, address(lab, "pod-2-1")));
}

/// A Node deleted and made again while nobody could see it in between.
#[test]
fn a_node_made_again_with_another_key_replaces_the_former_one() {
    let hostile = Hostile::new();
    let lab = &hostile.lab;
    let node = lab.node("node-1").unwrap();
    let mut again = hostile.good.clone();
    for field in ["uid", "resourceVersion", "creationTimestamp"] {
        again["metadata"].as_object_mut().unwrap().remove(field);
    }
    let key = PrivateKey::generate().public().to_string();
    again["metadata"]["annotations"]["gambeson.io/public-key"] = key.clone().into();
    lab.api().unwrap().delete_node(BAD).unwrap();
    lab.api().unwrap().create_node(&again).unwrap();
    eventually(node, "has the new key in the device", || {
        let peers = node.exec(&["wg", "show", "gambeson0", "peers"]).unwrap();
        let peers = String::from_utf8(peers.stdout).unwrap();
        (peers.contains(&key) && peers.lines().count() == 2).then_some(())
    });
    assert!(answers(lab.pod("pod-1-1").unwrap(), address(lab, "pod-2-1")));
}
