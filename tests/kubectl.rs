//! What a person does with a running lab: the real kubectl through `gambeson lab kubeconfig`,
//! and the commands of the lab themselves.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use gambeson_lab::{CONF_DIR, Lab, Options};
use serde_json::Value;

use crate::common::agent::{eventually, peers, status_when, stranger, userspace};
use crate::common::lab::{GAMBESON, both, lab_up, stdout_of, unique_name};

fn gambeson(arguments: &[&str]) -> Output {
    Command::new(GAMBESON).args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// The real kubectl, with the kubeconfig that the lab prints and a home of its own.
fn kubectl(lab: &Lab, arguments: &[&str]) -> String {
    let home = tempfile::tempdir().unwrap();
    let kubeconfig = gambeson(&["lab", "kubeconfig", "--name", lab.options().name.as_str()]);
    assert!(kubeconfig.status.success(), "{}", both(&kubeconfig));
    let file = home.path().join("kubeconfig");
    fs::write(&file, kubeconfig.stdout).unwrap();
    let mut command = Command::new("kubectl");
    stdout_of(command.env("HOME", home.path()).arg("--kubeconfig").arg(file).args(arguments))
}

#[test]
fn kubectl_shows_and_changes_what_agents_publish_and_follow() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    let yaml = kubectl(&lab, &["get", "nodes", "-o", "yaml"]);
    for annotation in [
        "gambeson.io/public-key: ",
        "gambeson.io/key-generation: \"0\"",
        "gambeson.io/endpoint: 192.168.240.2",
        "gambeson.io/port: \"51820\"",
        "gambeson.io/transports: wireguard",
        "gambeson.io/mtu: \"1440\"",
        "type: MeshReady",
        "type: MeshEncrypted",
    ] {
        assert_eq!(
            yaml.matches(annotation).count(),
            if annotation.contains(".2") { 1 } else { 2 },
            "{annotation} in\n{yaml}"
        );
    }
    assert!(kubectl(&lab, &["get", "nodes"]).contains("node-2   Ready"));

    // An operator's option, with a typing error, and its removal.
    let keepalive = "config.gambeson.io/persistent-keepalive";
    kubectl(&lab, &["annotate", "node", "node-2", &format!("{keepalive}=often")]);
    status_when(node, "warns of the option", |status| {
        let warned = status.warnings.iter().any(|warning| warning.contains("\"often\""));
        warned && status.refused.is_empty()
    });
    let events = eventually(node, "leaves an Event", || {
        let events = kubectl(&lab, &["get", "events", "-A"]);
        events.contains("OptionIgnored").then_some(events)
    });
    assert!(events.contains(&format!("Node node-2: annotation {keepalive} is")), "{events}");
    kubectl(&lab, &["annotate", "node", "node-2", &format!("{keepalive}-")]);
    status_when(node, "is content", |status| status.warnings.is_empty());

    // Another network, which runtimes would give to pods.
    let other = node.host_path(Path::new(CONF_DIR)).join("05-other.conflist");
    fs::write(&other, "{}").unwrap();
    status_when(node, "warns of another network", |status| {
        let warned = |warning: &String| warning.contains("05-other.conflist comes before");
        status.ready && status.warnings.iter().any(warned)
    });
    eventually(node, "leaves an Event", || {
        kubectl(&lab, &["get", "events", "-A"]).contains("NodeAdvice").then_some(())
    });
    fs::remove_file(&other).unwrap();
    status_when(node, "is content again", |status| status.warnings.is_empty());

    // What the agent publishes it corrects.
    kubectl(&lab, &["annotate", "--overwrite", "node", "node-2", "gambeson.io/mtu=600"]);
    let corrected = "--for=jsonpath={.metadata.annotations.gambeson\\.io/mtu}=1440";
    kubectl(&lab, &["wait", "--timeout=20s", "node/node-2", corrected]);

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("node.json");
    fs::write(&file, stranger(90).to_string()).unwrap();
    kubectl(&lab, &["create", "-f", file.to_str().unwrap()]);
    status_when(node, "has the new peer", |status| peers(status) == ["node-2", "stranger-90"]);
    kubectl(&lab, &["label", "node", "stranger-90", "zone=far"]);
    let far = kubectl(&lab, &["get", "nodes", "-l", "zone=far", "-o", "name"]);
    assert_eq!(far, "node/stranger-90\n");
    kubectl(&lab, &["delete", "node", "stranger-90"]);
    status_when(node, "forgets it", |status| peers(status) == ["node-2"]);
}

/// That `value` has the form of `form`, which names each field and gives a value of its type.
fn assert_form(value: &Value, form: &Value, path: &str) {
    match (value, form) {
        (Value::Object(value), Value::Object(form)) => {
            for (name, form) in form {
                let Some(value) = value.get(name) else { panic!("no {path}.{name}: {value:?}") };
                assert_form(value, form, &format!("{path}.{name}"));
            }
        }
        (Value::Array(values), Value::Array(form)) => {
            assert!(!values.is_empty(), "{path} is empty");
            values.iter().for_each(|value| assert_form(value, &form[0], &format!("{path}[]")));
        }
        (value, form) => assert_eq!(
            std::mem::discriminant(value),
            std::mem::discriminant(form),
            "{path}: {value} instead of something like {form}"
        ),
    }
}

#[test]
fn the_documents_of_the_lab_have_their_fields() {
    let lab = lab_up(userspace());
    let name = lab.options().name.as_str();
    let document = |command: &str| -> Value {
        let output = gambeson(&["lab", command, "--json", "--name", name]);
        assert!(output.status.success(), "{}", both(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let status = r#"{"schema":1,"api":"url","nodes":[{"name":"n","netns":"n","ip":["i"],
        "agent_pid":1,"tunnel_pids":[1],"pods":[{"name":"p","netns":"n","ip":["i"]}]}]}"#;
    assert_form(&document("status"), &serde_json::from_str(status).unwrap(), "status");
    let verify = r#"{"schema":1,"nodes":3,"pods":6,
        "pairs":[{"from":"a","to":"b","ok":true,"rtt_us":1,"transport":"t"}],
        "mtu":{"pod":1440,"largest_ok":1440,"first_refused":1441},
        "plaintext":{"packets_seen":1,"canary_found":false,"control_found":true},
        "throughput_gbps":0.5,"ok":true}"#;
    let verified = document("verify");
    assert_form(&verified, &serde_json::from_str(verify).unwrap(), "verify");
    for (pointer, value) in [
        ("/schema", 1.into()),
        ("/nodes", 2.into()),
        ("/pods", 2.into()),
        ("/mtu/pod", 1440.into()),
        ("/mtu/largest_ok", 1440.into()),
        ("/mtu/first_refused", 1441.into()),
        ("/plaintext/canary_found", false.into()),
        ("/plaintext/control_found", true.into()),
        ("/ok", Value::Bool(true)),
    ] {
        assert_eq!(verified.pointer(pointer), Some(&value), "{pointer} in {verified}");
    }
    lab.node("node-2").unwrap().kill_agent().unwrap();
    assert_eq!(document("status")["nodes"][1]["agent_pid"], Value::Null);
    stdout_of(Command::new(GAMBESON).args(["lab", "restart", "node-2", "--name", name]));
    assert!(document("status")["nodes"][1]["agent_pid"].is_u64());
}

#[test]
fn exec_is_transparent_and_wrong_names_are_explained() {
    let lab = lab_up(Options { start: false, ..userspace() });
    let name = lab.options().name.as_str();
    let mut child = Command::new(GAMBESON)
        .args([
            "lab",
            "exec",
            "--name",
            name,
            "node-1",
            "--",
            "sh",
            "-c",
            "cat; echo err >&2; exit 3",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"through").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(3), &b"through"[..]));
    assert_eq!(output.stderr, b"err\n");

    let no_lab = unique_name();
    let no_lab = no_lab.as_str();
    for (arguments, code, says) in [
        (&["exec", "--name", name, "node-9", "--", "true"][..], 1, "no node or pod \"node-9\""),
        (&["exec", "--name", name, "node-1", "--", "no-such-program"], 1, "no-such-program"),
        (&["exec", "--name", name, "node-1"], 2, "COMMAND"),
        (
            &["restart", "--name", name, "node-9"],
            1,
            "has no node \"node-9\"; it has node-1, node-2",
        ),
        (&["restart", "--name", name, "pod-1-1"], 1, "has no node \"pod-1-1\""),
        (&["status", "--name", no_lab], 1, "gambeson lab up --name"),
        (&["verify", "--name", no_lab], 1, "there is no lab"),
        (&["kubeconfig", "--name", no_lab], 1, "there is no lab"),
        (&["exec", "--name", no_lab, "node-1", "--", "true"], 1, "there is no lab"),
        (&["restart", "--name", no_lab, "node-1"], 1, "there is no lab"),
        (&["down", "--name", no_lab], 0, "does not exist"),
        (&["up", "--name", "../etc"], 2, "cannot name a lab"),
        (&["up", "--name", no_lab, "--nodes", "0"], 2, "1 to 100 nodes"),
        (&["up", "--name", no_lab, "--family", "v5"], 2, "v4, v6 or dual"),
        (&["up", "--name", no_lab, "--wireguard", "node-9=kernel"], 2, "node-9"),
        (&["up", "--name", no_lab, "--underlay-mtu", "100"], 2, "1360 to 65535"),
    ] {
        let output = gambeson(&[&["lab"], arguments].concat());
        let text = both(&output);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert!(text.contains(says), "{arguments:?}: {text}");
    }
}
