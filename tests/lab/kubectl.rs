//! The real kubectl against the lab's API server.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use gambeson_lab::{Lab, Options};
use tempfile::TempDir;

use crate::common::lab::{both, lab_options, lab_up, stdout_of};

/// kubectl with a home of its own, so that it finds no cache and leaves none.
struct Kubectl {
    home: TempDir,
}

impl Kubectl {
    fn of(lab: &Lab) -> Self {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("kubeconfig"), lab.kubeconfig()).unwrap();
        Self { home }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("kubectl");
        command
            .env("HOME", self.home.path())
            .arg("--kubeconfig")
            .arg(self.home.path().join("kubeconfig"))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> String {
        stdout_of(&mut self.command(arguments))
    }

    fn fail(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().expect("kubectl; install kubernetes-client");
        assert!(!output.status.success(), "{arguments:?} succeeded: {}", both(&output));
        both(&output)
    }
}

fn lab() -> Lab {
    lab_up(Options { start: false, pods_per_node: 0, ..lab_options() })
}

#[test]
fn get_shows_nodes_as_a_table_and_as_yaml() {
    let lab = lab();
    let kubectl = Kubectl::of(&lab);
    let table = kubectl.run(&["get", "nodes"]);
    assert!(table.starts_with("NAME"), "{table}");
    assert!(table.contains("STATUS"), "{table}");
    assert!(table.contains("node-1   NotReady"), "{table}");
    let wide = kubectl.run(&["get", "nodes", "-o", "wide"]);
    assert!(wide.contains("192.168.240.2"), "{wide}");
    let yaml = kubectl.run(&["get", "node", "node-2", "-o", "yaml"]);
    assert!(yaml.contains("podCIDR: 10.244.2.0/24"), "{yaml}");
    let cidrs = kubectl.run(&["get", "nodes", "-o", "jsonpath={.items[*].spec.podCIDR}"]);
    assert_eq!(cidrs, "10.244.1.0/24 10.244.2.0/24");
    let missing = kubectl.fail(&["get", "node", "node-9"]);
    assert!(missing.contains("nodes \"node-9\" not found"), "{missing}");
    assert!(kubectl.fail(&["get", "bananas"]).contains("doesn't have a resource type"));
}

#[test]
fn annotate_label_and_patch_change_a_node() {
    let lab = lab();
    let kubectl = Kubectl::of(&lab);
    kubectl.run(&["annotate", "node", "node-1", "config.gambeson.io/rotate=now"]);
    let refused = kubectl.fail(&["annotate", "node", "node-1", "config.gambeson.io/rotate=later"]);
    assert!(refused.contains("already has a value"), "{refused}");
    kubectl.run(&["annotate", "--overwrite", "node", "node-1", "config.gambeson.io/rotate=later"]);
    kubectl.run(&["label", "node", "node-1", "zone=a"]);
    let node = lab.api().unwrap().node("node-1").unwrap();
    assert_eq!(node["metadata"]["annotations"]["config.gambeson.io/rotate"], "later");
    assert_eq!(kubectl.run(&["get", "nodes", "-l", "zone=a", "-o", "name"]), "node/node-1\n");
    kubectl.run(&["annotate", "node", "node-1", "config.gambeson.io/rotate-"]);
    for (kind, patch) in [
        ("merge", r#"{"metadata":{"labels":{"zone":"b"}}}"#),
        ("strategic", r#"{"spec":{"taints":[{"key":"a","effect":"NoSchedule"}]}}"#),
        ("json", r#"[{"op":"add","path":"/spec/unschedulable","value":true}]"#),
    ] {
        kubectl.run(&["patch", "node", "node-1", "--type", kind, "-p", patch]);
    }
    let node = lab.api().unwrap().node("node-1").unwrap();
    assert!(node["metadata"].get("annotations").is_none(), "{node}");
    assert_eq!(node["metadata"]["labels"]["zone"], "b");
    assert_eq!(node["spec"]["taints"][0]["key"], "a");
    assert!(kubectl.run(&["get", "nodes"]).contains("SchedulingDisabled"));
}

#[test]
fn create_and_delete_a_node() {
    let lab = lab();
    let kubectl = Kubectl::of(&lab);
    let file = kubectl.home.path().join("node.yaml");
    let yaml = "apiVersion: v1\nkind: Node\nmetadata:\n  name: node-7\nspec:\n  podCIDR: 10.244.7.0/24\n  \
                podCIDRs: [10.244.7.0/24]\n";
    fs::write(&file, yaml).unwrap();
    let file = file.to_str().unwrap();
    assert_eq!(kubectl.run(&["create", "-f", file]), "node/node-7 created\n");
    assert!(kubectl.fail(&["create", "-f", file]).contains("AlreadyExists"));
    fs::write(file, yaml.replace("10.244.7", "10.244.8")).unwrap();
    kubectl.run(&["replace", "-f", file]);
    let uid = lab.api().unwrap().node("node-7").unwrap()["metadata"]["uid"].clone();
    assert!(kubectl.run(&["delete", "node", "node-7"]).contains("deleted"));
    kubectl.run(&["create", "-f", file]);
    let again = lab.api().unwrap().node("node-7").unwrap();
    assert_ne!(again["metadata"]["uid"], uid);
    assert_eq!(again["spec"]["podCIDR"], "10.244.8.0/24");
}

#[test]
fn watch_prints_changes_as_they_happen() {
    let lab = lab();
    let kubectl = Kubectl::of(&lab);
    let mut child = kubectl
        .command(&["get", "nodes", "-w", "-L", "zone"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("kubectl; install kubernetes-client");
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    for start in ["NAME", "node-1", "node-2"] {
        let line = lines.next().unwrap();
        assert!(line.starts_with(start), "{line}");
    }
    kubectl.run(&["label", "node", "node-2", "zone=north"]);
    let line = lines.next().unwrap();
    assert!(line.starts_with("node-2") && line.ends_with("north"), "{line}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn events_are_kept_and_shown() {
    let lab = lab();
    let kubectl = Kubectl::of(&lab);
    let file = kubectl.home.path().join("event.json");
    let event = r#"{"apiVersion":"events.k8s.io/v1","kind":"Event",
        "metadata":{"generateName":"node-1.","namespace":"default"},
        "type":"Warning","reason":"PeerRefused","note":"node-2: bad key","action":"Refuse",
        "regarding":{"kind":"Node","name":"node-1"},"reportingController":"gambeson"}"#;
    fs::write(&file, event).unwrap();
    kubectl.run(&["create", "-f", file.to_str().unwrap()]);
    let table = kubectl.run(&["get", "events", "-A"]);
    for part in ["Warning", "PeerRefused", "node/node-1", "node-2: bad key"] {
        assert!(table.contains(part), "{part} is missing in\n{table}");
    }
}
