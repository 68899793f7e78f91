//! The chart, and the manifests made from it, by the real helm and the schemas of Kubernetes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

use serde_json::Value;

use crate::common::lab::{both, stdout_of};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// Versions of Kubernetes that the chart supports.
const VERSIONS: [&str; 8] = ["1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37"];
/// Sets of values, together every branch of the templates.
const MATRIX: [&[&str]; 7] = [
    &[],
    &["podCidr=", "podCidrv6=fd00:10:244::/48", "mtu=1400", "iface=eth1", "wireguard=kernel"],
    &[
        "podCidrv6=fd00:10:244::/48",
        "ipMasq=false",
        "rotateEvery=90d",
        "pskSecret=gambeson-psk",
        "extraArgs={--bridge=br7}",
        "port=51900",
    ],
    &["flannel=vxlan", "transports={wireguard,vxlan}", "port=51900"],
    &["metrics.enabled=true", "metrics.serviceMonitor.enabled=true", "resourceQuota=true"],
    &["metrics.dashboard.enabled=true", "imagePullSecrets[0].name=x", "transports={vxlan,host-gw}"],
    &[
        "image.digest=sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "k8sServiceHost=10.0.0.1",
        "k8sServicePort=6443",
        "seLinuxOptions=null",
        "nodeSelector.a=b",
        "podAnnotations.a=b",
        "cni.binDir=/var/lib/rancher/k3s/data/cni",
        "priorityClassName=",
        "tunnel.privileged=true",
    ],
];

/// The folder of what `make setup` fetched.
static TOOLS: LazyLock<PathBuf> = LazyLock::new(|| {
    let script = format!("{ROOT}/deploy/setup/tools.sh");
    PathBuf::from(stdout_of(&mut Command::new(script)).trim())
});

fn helm(arguments: &[&str]) -> Output {
    Command::new(TOOLS.join("helm")).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn template(values: &[&str]) -> Output {
    let chart = format!("{ROOT}/deploy/chart/gambeson");
    let mut arguments = vec!["template", "gambeson", &chart, "--namespace", "kube-system"];
    arguments.extend(values.iter().flat_map(|value| ["--set", value]));
    helm(&arguments)
}

/// The objects that the chart makes of these values.
pub(crate) fn rendered(values: &[&str]) -> Vec<Value> {
    let output = template(values);
    assert!(output.status.success(), "{values:?}: {}", both(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    let objects: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    objects.into_iter().filter(|object| !object.is_null()).collect()
}

/// The one object of this kind and name.
pub(crate) fn object(kind: &str, name: &str, values: &[&str]) -> Value {
    let is_it = |object: &&Value| object["kind"] == kind && object["metadata"]["name"] == name;
    let objects = rendered(values);
    objects.iter().find(is_it).unwrap_or_else(|| panic!("no {kind} {name}")).clone()
}

fn valid(file: &Path, version: &str) {
    let output = Command::new(TOOLS.join("python/bin/kubernetes-validate"))
        .args(["--strict", "--quiet", "-k", version])
        .arg(file)
        .output()
        .unwrap();
    assert!(output.status.success(), "{} for {version}: {}", file.display(), both(&output));
}

#[test]
fn every_version_of_kubernetes_takes_what_the_chart_makes() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("all.yaml");
    let mut all = Vec::new();
    for values in MATRIX {
        let objects = rendered(values);
        // An operator's own kind has no schema of Kubernetes.
        all.extend(objects.into_iter().filter(|object| object["kind"] != "ServiceMonitor"));
    }
    let documents: Vec<String> = all.iter().map(ToString::to_string).collect();
    fs::write(&file, documents.join("\n---\n")).unwrap();
    for version in VERSIONS {
        valid(&file, version);
    }
}

#[test]
fn lint_finds_nothing() {
    let output = helm(&["lint", "--strict", &format!("{ROOT}/deploy/chart/gambeson")]);
    assert!(output.status.success(), "{}", both(&output));
}

#[test]
fn the_manifests_are_those_of_the_chart() {
    let folder = tempfile::tempdir().unwrap();
    let script = format!("{ROOT}/deploy/chart/manifests.sh");
    stdout_of(Command::new(script).arg(folder.path()));
    let made = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
    for name in made {
        let kept = fs::read_to_string(Path::new(ROOT).join("deploy").join(&name)).unwrap();
        let fresh = fs::read_to_string(folder.path().join(&name)).unwrap();
        assert!(kept == fresh, "deploy/{} is stale: run `make manifests`", name.display());
    }
}

#[test]
fn the_version_is_the_programs() {
    let chart = fs::read_to_string(format!("{ROOT}/deploy/chart/gambeson/Chart.yaml")).unwrap();
    let expected = format!("appVersion: {}", env!("CARGO_PKG_VERSION"));
    assert!(chart.lines().any(|line| line == expected), "{expected}");
}

#[test]
fn wrong_values_are_refused_by_name() {
    for (value, says) in [
        ("podCIDR=10.0.0.0/8", "'podCIDR' not allowed"),
        ("metrics.enable=true", "'enable' not allowed"),
        ("wireguard=fast", "/wireguard"),
        ("transports={wireguard,udp}", "/transports/1"),
        ("flannel=udp", "/flannel"),
        ("flannel=vxlan", "transports: name vxlan as well"),
        ("mtu=1000", "/mtu"),
        ("port=65530", "/port"),
        ("image.digest=sha256:12", "/image/digest"),
        ("podCidr=", "podCidr: give the cluster's pod network"),
        ("metrics.serviceMonitor.enabled=true", "needs metrics.enabled"),
    ] {
        let output = template(&[value]);
        let message = both(&output);
        assert!(!output.status.success(), "{value} is taken");
        assert!(message.contains(says), "{value}: {message}");
    }
}

#[test]
fn the_agent_has_no_more_rights_than_it_needs() {
    let agent = object("DaemonSet", "gambeson", &[]);
    let pod = &agent["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let security = &container["securityContext"];
    assert_eq!(
        security["capabilities"],
        serde_json::json!({"drop": ["ALL"], "add": ["NET_ADMIN"]})
    );
    assert_eq!(security["allowPrivilegeEscalation"], false);
    assert_eq!(security["readOnlyRootFilesystem"], true);
    assert_eq!(security["privileged"], Value::Null);
    // Ports of the host network would become hostPorts.
    assert_eq!(container["ports"], Value::Null);
    assert_eq!((&pod["hostPID"], &pod["hostIPC"]), (&Value::Null, &Value::Null));

    let tunnel = &object("DaemonSet", "gambeson-tunnel", &[])["spec"]["template"]["spec"];
    assert_eq!(tunnel["automountServiceAccountToken"], false);
    assert_eq!(
        tunnel["containers"][0]["securityContext"]["capabilities"],
        security["capabilities"]
    );
    assert_eq!(tunnel["containers"][0]["securityContext"]["privileged"], Value::Null);
    let kernel = rendered(&["wireguard=kernel"]);
    assert!(kernel.iter().all(|object| object["metadata"]["name"] != "gambeson-tunnel"));

    let role = object("ClusterRole", "gambeson", &[]);
    let rule = |resource: &str, verbs: &[&str]| serde_json::json!({"apiGroups": [""], "resources": [resource], "verbs": verbs});
    let expected = [
        rule("nodes", &["get", "list", "watch"]),
        rule("nodes/status", &["patch"]),
        rule("events", &["create"]),
    ];
    assert_eq!(role["rules"].as_array().unwrap(), &expected);
}

fn paths(prefix: &str, value: &Value, all: &mut Vec<String>) {
    match value {
        Value::Object(map) if !map.is_empty() && !prefix.ends_with("resources") => {
            for (key, value) in map {
                let dot = if prefix.is_empty() { "" } else { "." };
                paths(&format!("{prefix}{dot}{key}"), value, all);
            }
        }
        _ => all.push(prefix.to_owned()),
    }
}

#[test]
fn every_value_is_documented_and_in_the_schema() {
    let values = fs::read_to_string(format!("{ROOT}/deploy/chart/gambeson/values.yaml")).unwrap();
    let values: Value = serde_saphyr::from_str(&values).unwrap();
    let guide = fs::read_to_string(format!("{ROOT}/docs/install.md")).unwrap();
    let schema = fs::read(format!("{ROOT}/deploy/chart/gambeson/values.schema.json")).unwrap();
    let schema: Value = serde_json::from_slice(&schema).unwrap();
    let mut all = Vec::new();
    paths("", &values, &mut all);
    assert!(all.len() > 30, "{all:?}");
    for path in all {
        let pointer = path.replace('.', "/properties/");
        let known = schema.pointer(&format!("/properties/{pointer}")).is_some();
        // Of these an operator's own keys are inside.
        let free = ["seLinuxOptions", "nodeSelector"].iter().any(|name| path.starts_with(name));
        assert!(known || free, "{path} is not in the schema");
        let short = path.rsplit('.').next().unwrap();
        let parent = path.split('.').next().unwrap();
        let named = guide.contains(&format!("`{path}`"))
            || guide.contains(&format!("`.{short}`"))
            || (free && guide.contains(&format!("`{parent}`")));
        assert!(named, "{path} is not in docs/install.md");
    }
}
