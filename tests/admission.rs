//! The policies of the chart, by a CEL evaluator: who may write what on which Node.

use std::collections::BTreeMap;
use std::time::Duration;

use gambeson::status::{Admission, Status};
use gambeson_lab::api::admission::{Policies, Review, User};
use gambeson_lab::{Lab, Options, WireguardMode};
use serde_json::{Value, json};

use crate::chart::rendered;
use crate::common::agent::{status_when, stranger};
use crate::common::lab::{GAMBESON, both, lab_up};
use crate::common::scenario::{options, run};

const HOUR: Duration = Duration::from_secs(3600);

const AGENT: &str = "system:serviceaccount:kube-system:gambeson";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// The agent of this node.
fn agent(node: &str) -> User {
    let extra = BTreeMap::from([(NODE_NAME.to_owned(), vec![node.to_owned()])]);
    User { extra, ..unbound() }
}

/// An agent whose token is that of a Secret.
fn unbound() -> User {
    User {
        username: AGENT.into(),
        groups: vec!["system:serviceaccounts".into()],
        ..User::default()
    }
}

fn user(name: &str, group: &str) -> User {
    User { username: name.into(), groups: vec![group.into()], ..User::default() }
}

fn admin() -> User {
    user("admin", "system:masters")
}

fn kubelet() -> User {
    user("system:node:node-1", "system:nodes")
}

fn break_glass() -> User {
    user("admin", "gambeson:break-glass")
}

fn node() -> Value {
    json!({
        "kind": "Node",
        "metadata": {
            "name": "node-1",
            "labels": { "kubernetes.io/os": "linux" },
            "annotations": {
                "gambeson.io/public-key": "KEY",
                "gambeson.io/key-generation": "7",
                "volumes.kubernetes.io/controller-managed-attach-detach": "true",
            },
        },
        "spec": { "podCIDRs": ["10.244.1.0/24"] },
        "status": {
            "addresses": [{ "type": "InternalIP", "address": "10.0.0.1" }],
            "conditions": [
                { "type": "Ready", "status": "True" },
                { "type": "NetworkUnavailable", "status": "True" },
            ],
        },
    })
}

/// `node` with this value at this JSON pointer; null removes it.
fn with(mut node: Value, pointer: &str, value: Value) -> Value {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    let key = key.replace("~1", "/");
    let parent = node.pointer_mut(parent).unwrap();
    match (parent, value) {
        (Value::Array(items), value) => items.push(value),
        (Value::Object(map), Value::Null) => _ = map.remove(&key),
        (Value::Object(map), value) => _ = map.insert(key, value),
        (other, _) => panic!("{other} has nothing in it"),
    }
    node
}

fn policies() -> Policies {
    Policies::from_objects(&rendered(&[])).unwrap()
}

/// What is said to an update of `node()`, on both resources, or nothing where it passes.
fn update(user: &User, old: &Value, new: &Value) -> Option<String> {
    let policies = policies();
    let judge = |resource| {
        let review = Review { user, operation: "UPDATE", resource, object: new, old: Some(old) };
        policies.judge(&review).err()
    };
    let answer = judge("nodes/status");
    assert_eq!(judge("nodes"), answer, "not the same on nodes and nodes/status");
    answer
}

const GENERATION: &str = "/metadata/annotations/gambeson.io~1key-generation";
const KEY: &str = "/metadata/annotations/gambeson.io~1public-key";
const ROTATE: &str = "/metadata/annotations/config.gambeson.io~1rotate";

#[test]
fn what_may_be_written_passes() {
    let mesh = json!({ "type": "MeshReady", "status": "True" });
    for (what, user, new) in [
        ("its key", agent("node-1"), with(node(), KEY, "NEW".into())),
        ("a higher generation", agent("node-1"), with(node(), GENERATION, "8".into())),
        ("the same generation", agent("node-1"), node()),
        (
            "one more annotation",
            agent("node-1"),
            with(node(), "/metadata/annotations/gambeson.io~1mtu", "1440".into()),
        ),
        ("its condition", agent("node-1"), with(node(), "/status/conditions/-", mesh)),
        (
            "that the network is there",
            agent("node-1"),
            with(node(), "/status/conditions/1/status", "False".into()),
        ),
        ("a label by an admin", admin(), with(node(), "/metadata/labels/x", "y".into())),
        ("a rotation by an admin", admin(), with(node(), ROTATE, "now".into())),
        ("a repair", break_glass(), with(node(), KEY, Value::Null)),
        ("a heartbeat", kubelet(), with(node(), "/status/conditions/0/status", "False".into())),
        // It can ask for its agent's token, so that refusing it would protect nothing.
        ("an annotation by a kubelet", kubelet(), with(node(), KEY, "NEW".into())),
        ("nothing by nobody", User::default(), node()),
    ] {
        assert_eq!(update(&user, &node(), &new), None, "{what}");
    }
}

/// Where Flannel still runs, its annotations are the agent's to write as well, on its own Node.
#[test]
fn flannels_annotations_are_written_where_the_chart_says_so() {
    let values = ["flannel=vxlan", "transports={wireguard,vxlan}"];
    let with_flannel = Policies::from_objects(&rendered(&values)).unwrap();
    let old = node();
    let data = "/metadata/annotations/flannel.alpha.coreos.com~1backend-data";
    let new = with(node(), data, "null".into());
    let judge = |policies: &Policies, user: &User| {
        let resource = "nodes/status";
        let review = Review { user, operation: "UPDATE", resource, object: &new, old: Some(&old) };
        policies.judge(&review).err()
    };
    assert_eq!(judge(&with_flannel, &agent("node-1")), None);
    assert_eq!(judge(&with_flannel, &user("flannel", "system:serviceaccounts")), None);
    assert!(judge(&with_flannel, &agent("node-2")).is_some());
    assert!(judge(&policies(), &agent("node-1")).unwrap().contains("and no others"));
}

#[test]
fn what_may_not_is_refused_with_what_to_do() {
    let long = "x".repeat(513);
    for (user, new, says) in [
        (agent("node-2"), node(), "the agent of node node-2 may not write on Node node-1"),
        (unbound(), node(), "this token is bound to no node"),
        (agent(""), node(), "this token is bound to no node"),
        (agent("node-1"), with(node(), GENERATION, "6".into()), "was 7 and never goes back"),
        (agent("node-1"), with(node(), GENERATION, Value::Null), "never goes back"),
        (agent("node-1"), with(node(), GENERATION, "-1".into()), "has to be a number"),
        (agent("node-1"), with(node(), GENERATION, "".into()), "has to be a number"),
        (agent("node-1"), with(node(), KEY, long.into()), "at most 512 bytes"),
        (agent("node-1"), with(node(), ROTATE, "x".into()), "gambeson.io/* and no others"),
        (
            agent("node-1"),
            with(
                node(),
                "/metadata/annotations/volumes.kubernetes.io~1controller-managed-attach-detach",
                Value::Null,
            ),
            "gambeson.io/* and no others",
        ),
        (agent("node-1"), with(node(), "/metadata/labels/x", "y".into()), "may not change labels"),
        (agent("node-1"), with(node(), "/metadata/finalizers", json!(["x"])), "finalizers"),
        (agent("node-1"), with(node(), "/spec/podCIDRs", json!([])), "the spec of its Node"),
        (agent("node-1"), with(node(), "/spec", Value::Null), "the spec of its Node"),
        (agent("node-1"), with(node(), "/status/addresses", json!([])), "nothing else of its"),
        (agent("node-1"), with(node(), "/status/phase", "x".into()), "nothing else of its status"),
        (
            agent("node-1"),
            with(node(), "/status/conditions/0/status", "False".into()),
            "NetworkUnavailable, MeshReady, MeshEncrypted and RotationBlocked and no others",
        ),
        (agent("node-1"), with(node(), "/status/conditions", Value::Null), "and no others"),
        (admin(), with(node(), KEY, "NEW".into()), "set config.gambeson.io/rotate"),
        (admin(), with(node(), KEY, Value::Null), "--as-group=gambeson:break-glass"),
        (
            admin(),
            with(node(), "/metadata/annotations", Value::Null),
            "the agent of node node-1 alone",
        ),
        (
            user("system:serviceaccount:default:gambeson", "system:serviceaccounts"),
            with(node(), KEY, "NEW".into()),
            "the agent of node node-1 alone writes",
        ),
        (User::default(), with(node(), KEY, "NEW".into()), "the agent of node node-1 alone"),
    ] {
        let answer = update(&user, &node(), &new).unwrap_or_else(|| panic!("{says}: passes"));
        assert!(answer.contains(says), "{says}: {answer}");
        assert!(answer.contains("denied request: gambeson: "), "{answer}");
    }
}

#[test]
fn a_node_that_is_made_again_starts_anew() {
    let policies = policies();
    let create = |user: &User, object: &Value| {
        let review = Review { user, operation: "CREATE", resource: "nodes", object, old: None };
        policies.judge(&review).err()
    };
    let fresh = with(node(), "/metadata/annotations", Value::Null);
    assert_eq!(create(&kubelet(), &fresh), None);
    assert_eq!(create(&admin(), &fresh), None);
    let refused = create(&admin(), &node()).unwrap();
    assert!(refused.contains("the agent of node node-1 alone"), "{refused}");
    assert_eq!(create(&break_glass(), &node()), None);
    // The generation of the Node that was there before binds nobody.
    let first =
        with(fresh.clone(), "/metadata/annotations", json!({"gambeson.io/key-generation": "0"}));
    assert_eq!(update(&agent("node-1"), &fresh, &first), None);
}

#[test]
fn a_garbled_generation_can_be_put_right_by_the_agent() {
    let garbled = with(node(), GENERATION, "garbage".into());
    let right = with(node(), GENERATION, "3".into());
    assert_eq!(update(&agent("node-1"), &garbled, &right), None);
}

#[test]
fn without_the_policies_anything_passes() {
    let none = Policies::from_objects(&rendered(&["admission.enabled=false"])).unwrap();
    let (user, object, old) = (agent("node-2"), node(), node());
    let review = Review {
        user: &user,
        operation: "UPDATE",
        resource: "nodes/status",
        object: &object,
        old: Some(&old),
    };
    assert_eq!(none.judge(&review), Ok(()));
}

fn small() -> Options {
    options(WireguardMode::Userspace)
}

#[test]
fn an_agent_with_another_nodes_token_is_refused_and_says_so() {
    let lab = lab_up(small());
    let node = lab.node("node-1").unwrap();
    assert_eq!(
        status_when(node, "asks", |s| s.admission != Admission::Unknown).admission,
        Admission::Enforced
    );
    let before = lab.api().unwrap().node("node-1").unwrap()["metadata"]["annotations"].clone();

    node.give_token(Some("node-2"), HOUR).unwrap();
    // A new key is something to publish.
    node.stop_agent().unwrap();
    run(&node.environment(), "rm /var/lib/gambeson/keys.json");
    node.start_agent().unwrap();
    let says = |status: &Status| {
        let about = "the agent of node node-2 may not write on Node node-1";
        status.errors.iter().any(|error| error.contains(about))
    };
    status_when(node, "is refused", says);
    let after = lab.api().unwrap().node("node-1").unwrap()["metadata"]["annotations"].clone();
    assert_eq!(after, before);
    node.give_token(None, HOUR).unwrap();
    status_when(node, "is refused", |status| {
        status.errors.iter().any(|error| error.contains("this token is bound to no node"))
    });
    // Its own token, as a kubelet renews it: nothing has to be started anew.
    node.give_token(Some("node-1"), HOUR).unwrap();
    status_when(node, "has published", |status| status.errors.is_empty());
    let after = lab.api().unwrap().node("node-1").unwrap()["metadata"]["annotations"].clone();
    assert_ne!(after, before);
}

#[test]
fn an_expired_token_is_replaced_by_the_renewed_one() {
    let lab = lab_up(small());
    let node = lab.node("node-1").unwrap();
    let short = Duration::from_secs(3);
    node.give_token(Some("node-1"), short).unwrap();
    node.restart_agent().unwrap();
    status_when(node, "is well", |status| status.errors.is_empty() && status.peers.len() == 1);
    std::thread::sleep(short);
    // A watch that goes on needs no token, a new one does.
    lab.kill_api().unwrap();
    lab.start_api().unwrap();
    status_when(node, "is refused", |status| {
        status.errors.iter().any(|error| error.contains("Unauthorized"))
    });
    node.give_token(Some("node-1"), HOUR).unwrap();
    status_when(node, "is well again", |status| status.errors.is_empty());
}

#[test]
fn missing_policies_are_said_and_decide_where_they_are_required() {
    let lab = lab_up(Options { admission: false, ..small() });
    let node = lab.node("node-1").unwrap();
    let status = status_when(node, "has asked", |status| status.admission == Admission::Missing);
    assert!(status.warnings.iter().any(|w| w.contains("deploy/gambeson.yaml")), "{status:#?}");
    assert_eq!(status.unready(), None);
    let annotations = &lab.api().unwrap().node("node-2").unwrap()["metadata"]["annotations"];
    assert_eq!(annotations["gambeson.io/admission-test"], Value::Null);

    let required = ["--require-admission".to_owned()].to_vec();
    let lab = lab_up(Options { admission: false, agent_arguments: required.clone(), ..small() });
    let node = lab.node("node-1").unwrap();
    status_when(node, "has asked", |status| {
        status.unready().is_some_and(|why| why.contains("--require-admission: the API server lets"))
    });
    let check = node.exec(&[GAMBESON, "status", "--check", "ready"]).unwrap();
    assert_eq!(check.status.code(), Some(8), "{}", both(&check));

    let lab = lab_up(Options { nodes: 1, agent_arguments: required, ..small() });
    let node = lab.node("node-1").unwrap();
    status_when(node, "is ready alone", |status| {
        status.admission == Admission::Alone && status.unready().is_none()
    });
    lab.api().unwrap().create_node(&stranger(90)).unwrap();
    status_when(node, "is ready", |status| {
        status.admission == Admission::Enforced && status.unready().is_none()
    });
}

/// What `helm test` runs in a pod.
#[test]
fn an_audit_finds_what_is_not_in_the_mesh() {
    let audit = |lab: &Lab, wait: &str| {
        let kubeconfig = "/run/gambeson/kubeconfig";
        let command = format!(
            "NODE_NAME=node-1 exec {GAMBESON} audit --kubeconfig {kubeconfig} --wait {wait}"
        );
        lab.node("node-1").unwrap().exec(&["sh", "-c", &command]).unwrap()
    };
    let lab = lab_up(small());
    let well = audit(&lab, "20");
    assert!(well.status.success(), "{}", both(&well));
    assert!(both(&well).contains("2 Nodes") && both(&well).contains("admission: enforced"));
    lab.api().unwrap().create_node(&stranger(90)).unwrap();
    let bad = audit(&lab, "0");
    assert_eq!(bad.status.code(), Some(8), "{}", both(&bad));
    assert!(both(&bad).contains("Node stranger-90 has the condition MeshReady=(none)"));

    let lab = lab_up(Options { admission: false, ..small() });
    let open = audit(&lab, "3");
    assert_eq!(open.status.code(), Some(8), "{}", both(&open));
    assert!(both(&open).contains("deploy/gambeson.yaml"), "{}", both(&open));
}
