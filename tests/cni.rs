//! The CNI plugin with the real reference plugins, in throw-away network namespaces.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::{Value, json};

const GAMBESON: &str = env!("CARGO_BIN_EXE_gambeson");
const REFERENCE_PLUGINS: &str = "/usr/lib/cni";

const IPV4: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n\
                    FLANNEL_MTU=1440\nFLANNEL_IPMASQ=true\n";
const DUAL: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n\
                    FLANNEL_IPV6_NETWORK=fd00:10:244::/48\n\
                    FLANNEL_IPV6_SUBNET=fd00:10:244:1::1/64\n\
                    FLANNEL_MTU=1420\nFLANNEL_IPMASQ=true\n";

/// A network namespace without a name, held by a process that dies with the test.
struct Netns {
    holder: Child,
}

impl Netns {
    fn new() -> Self {
        let holder = Command::new("unshare")
            .args(["--net", "setpriv", "--pdeathsig", "KILL", "sleep", "infinity"])
            .stdin(Stdio::null())
            .spawn()
            .expect("unshare and setpriv (util-linux), as root");
        let comm = format!("/proc/{}/comm", holder.id());
        let deadline = Instant::now() + Duration::from_secs(10);
        while fs::read_to_string(&comm).is_ok_and(|name| name.trim() != "sleep") {
            assert!(Instant::now() < deadline, "no network namespace within 10 s");
            std::thread::sleep(Duration::from_millis(2));
        }
        let netns = Self { holder };
        assert_ne!(
            fs::read_link(netns.path()).expect("a network namespace: run as root"),
            fs::read_link("/proc/self/ns/net").unwrap(),
        );
        netns
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.holder.id()).into()
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg(program);
        command
    }

    fn ip_json(&self, arguments: &[&str]) -> Value {
        let output = self.command("ip").arg("-j").args(arguments).output().unwrap();
        assert!(output.status.success(), "ip {arguments:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap_or(Value::Array(Vec::new()))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// A node with private folders for everything the plugins write.
struct Node {
    netns: Netns,
    folder: tempfile::TempDir,
}

impl Node {
    fn new(subnet_env: &str) -> Self {
        assert!(
            Path::new(REFERENCE_PLUGINS).join("bridge").exists(),
            "the reference CNI plugins are not in {REFERENCE_PLUGINS}: \
             apt-get install containernetworking-plugins"
        );
        let node = Self { netns: Netns::new(), folder: tempfile::tempdir().unwrap() };
        fs::write(node.path("subnet.env"), subnet_env).unwrap();
        fs::create_dir(node.path("run")).unwrap();
        for name in ["gambeson-cni", "flannel"] {
            symlink(GAMBESON, node.path(name)).unwrap();
        }
        node.nft("add table inet gambeson; add chain inet gambeson guard_out");
        node
    }

    fn nft(&self, script: &str) {
        let output = self.netns.command("nft").arg(script).output().unwrap();
        assert!(output.status.success(), "nft {script}: {output:?}");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn conf(&self) -> Value {
        json!({
            "cniVersion": "1.0.0",
            "name": "cbr0",
            "type": "gambeson-cni",
            "subnetFile": self.path("subnet.env"),
            "dataDir": self.path("data"),
            "runDir": self.path("run"),
            "ipam": { "dataDir": self.path("ipam") },
            "delegate": { "hairpinMode": true, "isDefaultGateway": true },
        })
    }

    fn run(&self, program: &Path, call: &Call<'_>, stdin: &[u8]) -> Output {
        let mut child = self
            .netns
            .command(program)
            .env("CNI_COMMAND", call.command)
            .env("CNI_CONTAINERID", call.container_id)
            .env("CNI_NETNS", call.netns)
            .env("CNI_IFNAME", call.interface)
            .env("CNI_PATH", format!("{}:{REFERENCE_PLUGINS}", self.folder.path().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // A plugin that refuses its environment does not read.
        let _ = child.stdin.take().unwrap().write_all(stdin);
        child.wait_with_output().unwrap()
    }

    fn call(&self, command: &str, pod: &Netns, conf: &Value) -> Result<Value, Value> {
        let call = Call { command, container_id: "c0ffee", interface: "eth0", netns: &pod.path() };
        outcome(&self.run(&self.path("gambeson-cni"), &call, conf.to_string().as_bytes()))
    }

    fn saved(&self) -> PathBuf {
        self.path("data/c0ffee")
    }

    /// Addresses that host-local has handed out.
    fn leases(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path("ipam/cbr0")) else { return Vec::new() };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut leases: Vec<_> =
            names.filter(|name| name != "lock" && !name.starts_with("last_reserved_ip")).collect();
        leases.sort();
        leases
    }
}

struct Call<'a> {
    command: &'a str,
    container_id: &'a str,
    interface: &'a str,
    netns: &'a Path,
}

/// Result or error, either of them valid JSON; an empty result is null.
fn outcome(output: &Output) -> Result<Value, Value> {
    let parsed = match output.stdout.as_slice() {
        [] => Value::Null,
        bytes => serde_json::from_slice(bytes).unwrap_or_else(|_| panic!("not JSON: {output:?}")),
    };
    match output.status.code() {
        Some(0) => Ok(parsed),
        Some(1) => {
            assert!(parsed["code"].is_u64() && parsed["msg"].is_string(), "{output:?}");
            assert!(parsed["cniVersion"].is_string(), "{output:?}");
            Err(parsed)
        }
        _ => panic!("{output:?}"),
    }
}

fn addresses(netns: &Netns, link: &str) -> Vec<String> {
    let links = netns.ip_json(&["addr", "show", "dev", link]);
    let mut found: Vec<String> = links[0]["addr_info"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|info| info["scope"] == "global")
        .map(|info| format!("{}/{}", info["local"].as_str().unwrap(), info["prefixlen"]))
        .collect();
    found.sort();
    found
}

fn mtu(netns: &Netns, link: &str) -> u64 {
    netns.ip_json(&["link", "show", "dev", link])[0]["mtu"].as_u64().unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// Whatever starts a pod before the agent is there gets no network for it.
#[test]
fn no_pod_gets_a_network_before_the_guard_is_in_place() {
    let (node, pod) = (Node::new(IPV4), Netns::new());
    let mut conf = node.conf();
    conf["cniVersion"] = "1.1.0".into();
    assert_eq!(node.call("STATUS", &pod, &conf), Ok(Value::Null));
    for take_away in
        ["flush ruleset", "add table inet gambeson", "add chain inet gambeson guard_in"]
    {
        node.nft(take_away);
        let error = node.call("STATUS", &pod, &conf).unwrap_err();
        assert_eq!(error["code"], 50, "{error}");
        assert!(error["msg"].as_str().unwrap().contains("guard is not in place"), "{error}");
        let error = node.call("ADD", &pod, &node.conf()).unwrap_err();
        assert_eq!(error["code"], 11, "{error}");
        assert!(error["msg"].as_str().unwrap().contains("gambeson status"), "{error}");
        assert!(!node.saved().exists() && node.leases().is_empty());
    }
    // It is waited for a little: what somebody takes away is back within a second.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(700));
            node.nft("add chain inet gambeson guard_out");
        });
        node.call("ADD", &pod, &node.conf()).unwrap();
    });
    assert_eq!(node.call("STATUS", &pod, &conf), Ok(Value::Null));
    fs::remove_file(node.path("subnet.env")).unwrap();
    let error = node.call("STATUS", &pod, &conf).unwrap_err();
    assert_eq!(error["code"], 50, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("subnet.env"), "{error}");
    let error = node.call("STATUS", &pod, &node.conf()).unwrap_err();
    assert_eq!(error["code"], 1, "STATUS in 1.0.0: {error}");
}

/// A reboot ends pods that nobody deletes: their leases must not use up the subnet.
#[test]
fn leases_from_before_a_boot_are_forgotten() {
    let (node, pod) = (Node::new(DUAL), Netns::new());
    node.call("ADD", &pod, &node.conf()).unwrap();
    assert_eq!(node.leases().len(), 2);
    // Once in a boot, and never while the bridge may have pods.
    let other = Netns::new();
    let add = |id: &str, netns: &Netns| {
        let call =
            Call { command: "ADD", container_id: id, interface: "eth0", netns: &netns.path() };
        let conf = node.conf().to_string();
        outcome(&node.run(&node.path("gambeson-cni"), &call, conf.as_bytes())).unwrap();
    };
    add("second", &other);
    assert_eq!(node.leases().len(), 4);
    fs::remove_dir_all(node.path("run")).unwrap();
    fs::create_dir(node.path("run")).unwrap();
    add("third", &Netns::new());
    assert_eq!(node.leases().len(), 6);

    fs::remove_dir_all(node.path("run")).unwrap();
    fs::create_dir(node.path("run")).unwrap();
    assert!(node.netns.command("ip").args(["link", "delete", "cni0"]).status().unwrap().success());
    add("fourth", &Netns::new());
    assert_eq!(node.leases().len(), 2, "{:?}", node.leases());
    // The DEL of a pod that is gone comes late, and does no harm.
    node.call("DEL", &pod, &node.conf()).unwrap();
    assert_eq!(node.leases().len(), 2);
}

/// What the runtime does not know any more is deleted, and nothing else.
#[test]
fn gc_deletes_what_the_runtime_has_forgotten() {
    let node = Node::new(IPV4);
    let pods: Vec<_> = (0..3).map(|_| Netns::new()).collect();
    let mut conf = node.conf();
    for (id, pod) in ["a", "b", "c"].into_iter().zip(&pods) {
        let call = Call { command: "ADD", container_id: id, interface: "eth0", netns: &pod.path() };
        outcome(&node.run(&node.path("gambeson-cni"), &call, conf.to_string().as_bytes())).unwrap();
    }
    // Of another network, which has a GC of its own.
    let other = json!({ "type": "bridge", "name": "other" }).to_string();
    fs::write(node.path("data/foreign"), other).unwrap();
    conf["cniVersion"] = "1.1.0".into();
    let error = node.call("GC", &pods[0], &conf).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("cni.dev/valid-attachments"), "{error}");
    assert_eq!(node.leases().len(), 3);
    conf["cni.dev/valid-attachments"] = json!([{ "containerID": "b", "ifname": "eth0" }]);
    assert_eq!(node.call("GC", &pods[0], &conf), Ok(Value::Null));
    assert_eq!(node.leases().len(), 1);
    let left = fs::read_dir(node.path("data")).unwrap();
    let mut left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["b", "b:eth0", "foreign"]);
}

/// Several networks of one pod, as Multus attaches them.
#[test]
fn each_interface_of_a_container_is_deleted_with_its_own_state() {
    let (node, pod) = (Node::new(IPV4), Netns::new());
    let path = pod.path();
    let call = |command, interface| {
        let call = Call { command, container_id: "c0ffee", interface, netns: &path };
        let conf = node.conf().to_string();
        outcome(&node.run(&node.path("gambeson-cni"), &call, conf.as_bytes())).unwrap()
    };
    for order in [["eth0", "net1"], ["net1", "eth0"]] {
        call("ADD", order[0]);
        call("ADD", order[1]);
        assert_eq!(node.leases().len(), 2, "{order:?}");
        // One that never was changes nothing.
        call("DEL", "net2");
        call("DEL", "net1");
        assert_eq!(node.leases().len(), 1, "{order:?}");
        call("DEL", "eth0");
        assert_eq!(node.leases(), Vec::<String>::new(), "{order:?}");
        assert_eq!(fs::read_dir(node.path("data")).unwrap().count(), 0, "{order:?}");
    }
    // A former version's, or Flannel's, is under the container's name alone.
    call("ADD", "net1");
    fs::rename(node.path("data/c0ffee:net1"), node.path("data/c0ffee")).unwrap();
    call("DEL", "net1");
    assert_eq!(node.leases(), Vec::<String>::new());
    assert_eq!(fs::read_dir(node.path("data")).unwrap().count(), 0);
}

#[test]
fn add_check_and_del_through_the_real_bridge() {
    let (node, pod) = (Node::new(IPV4), Netns::new());
    let mut conf = node.conf();
    let result = node.call("ADD", &pod, &conf).unwrap();
    assert_eq!(result["ips"][0]["address"], "10.244.1.2/24");
    assert_eq!(result["ips"][0]["gateway"], "10.244.1.1");
    assert_eq!(addresses(&node.netns, "cni0"), ["10.244.1.1/24"]);
    assert_eq!(addresses(&pod, "eth0"), ["10.244.1.2/24"]);
    assert_eq!((mtu(&node.netns, "cni0"), mtu(&pod, "eth0")), (1440, 1440));
    let routes = pod.ip_json(&["route"]);
    let routes: Vec<_> =
        routes.as_array().unwrap().iter().map(|r| r["dst"].as_str().unwrap()).collect();
    assert!(routes.contains(&"default") && routes.contains(&"10.244.0.0/16"), "{routes:?}");
    let ping = pod.command("ping").args(["-c1", "-W2", "10.244.1.1"]).output().unwrap();
    assert!(ping.status.success(), "{ping:?}");

    assert_eq!((mode(&node.path("data")), mode(&node.saved())), (0o700, 0o600));
    conf["prevResult"] = result;
    assert_eq!(node.call("CHECK", &pod, &conf).unwrap(), Value::Null);
    let flush = pod.command("ip").args(["addr", "flush", "dev", "eth0"]).status().unwrap();
    assert!(flush.success());
    let error = node.call("CHECK", &pod, &conf).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("\"bridge\""), "{error}");

    for _ in 0..3 {
        assert_eq!(node.call("DEL", &pod, &conf).unwrap(), Value::Null);
        assert!(!node.saved().exists());
        assert!(node.leases().is_empty());
        assert_eq!(pod.ip_json(&["link"]).as_array().unwrap().len(), 1);
    }
    let error = node.call("CHECK", &pod, &conf).unwrap_err();
    assert_eq!(error["code"], 3, "{error}");
}

#[test]
fn a_dual_stack_pod_gets_both_families() {
    let (node, pod) = (Node::new(DUAL), Netns::new());
    let mut conf = node.conf();
    let result = node.call("ADD", &pod, &conf).unwrap();
    assert_eq!(addresses(&pod, "eth0"), ["10.244.1.2/24", "fd00:10:244:1::2/64"]);
    assert_eq!(addresses(&node.netns, "cni0"), ["10.244.1.1/24", "fd00:10:244:1::1/64"]);
    assert_eq!(mtu(&pod, "eth0"), 1420);
    conf["prevResult"] = result;
    node.call("CHECK", &pod, &conf).unwrap();
    node.call("DEL", &pod, &conf).unwrap();
    assert!(node.leases().is_empty());
}

#[test]
fn the_name_flannel_and_a_file_that_flannel_saved_work() {
    let (node, pod) = (Node::new(IPV4), Netns::new());
    let mut conf = node.conf();
    conf["cniVersion"] = "0.3.1".into();
    let pod_path = pod.path();
    let call =
        |command| Call { command, container_id: "c0ffee", interface: "eth0", netns: &pod_path };
    let flannel = node.path("flannel");
    let stdin = conf.to_string();
    outcome(&node.run(&flannel, &call("ADD"), stdin.as_bytes())).unwrap();
    let ipam_dir = node.path("ipam");
    let saved = format!(
        r#"{{"cniVersion":"0.3.1","hairpinMode":true,"ipMasq":false,"ipam":{{"dataDir":"{}","ranges":[[{{"subnet":"10.244.1.0/24"}}]],"routes":[{{"dst":"10.244.0.0/16"}}],"type":"host-local"}},"isDefaultGateway":true,"isGateway":true,"mtu":1440,"name":"cbr0","type":"bridge"}}"#,
        ipam_dir.display()
    );
    assert_eq!(fs::read_to_string(node.saved()).unwrap(), saved);
    // DEL works from the saved file alone, whatever became of subnet.env.
    fs::remove_file(node.path("subnet.env")).unwrap();
    outcome(&node.run(&flannel, &call("DEL"), stdin.as_bytes())).unwrap();
    assert!(node.leases().is_empty() && !node.saved().exists());
}

#[test]
fn a_failing_add_leaves_nothing_behind_and_spares_an_earlier_one() {
    let (node, pod) = (Node::new(IPV4), Netns::new());
    let stdin = node.conf().to_string();
    let nowhere = node.path("no-namespace");
    let failing =
        Call { command: "ADD", container_id: "c0ffee", interface: "eth0", netns: &nowhere };
    let plugin = node.path("gambeson-cni");
    let error = outcome(&node.run(&plugin, &failing, stdin.as_bytes())).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("no-namespace"), "{error}");
    assert!(node.leases().is_empty());
    assert_eq!(fs::read_dir(node.path("data")).unwrap().count(), 0);

    node.call("ADD", &pod, &node.conf()).unwrap();
    let saved = fs::read(node.saved()).unwrap();
    outcome(&node.run(&plugin, &failing, stdin.as_bytes())).unwrap_err();
    assert_eq!(fs::read(node.saved()).unwrap(), saved);
    assert_eq!(addresses(&pod, "eth0"), ["10.244.1.2/24"]);
    node.call("DEL", &pod, &node.conf()).unwrap();
    assert!(node.leases().is_empty());
}

#[test]
fn a_delegate_that_breaks_is_named_with_what_it_printed() {
    let (node, pod) = (Node::new(IPV4), Netns::new());
    for (script, code, message, details) in [
        (
            "echo '{\"code\":111,\"msg\":\"full\",\"details\":\"disk\"}'; exit 1",
            111,
            "full",
            "disk",
        ),
        ("echo segfault; exit 7", 100, "exit status: 7", "segfault\n"),
        ("case $CNI_COMMAND in ADD) echo; esac", 100, "not a JSON object", ""),
    ] {
        let path = node.path("broken");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let mut conf = node.conf();
        conf["delegate"]["type"] = "broken".into();
        let error = node.call("ADD", &pod, &conf).unwrap_err();
        assert_eq!(error["code"], code, "{error}");
        let text = error["msg"].as_str().unwrap();
        assert!(text.contains("\"broken\"") && text.contains(message), "{error}");
        assert_eq!(error["details"].as_str().unwrap_or_default(), details);
    }
    let mut conf = node.conf();
    conf["delegate"]["type"] = "flannel".into();
    let error = node.call("ADD", &pod, &conf).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("the plugin itself"), "{error}");
}

#[test]
fn a_missing_subnet_env_says_which_file_who_writes_it_and_where_to_look() {
    let (node, pod) = (Node::new(IPV4), Netns::new());
    fs::remove_file(node.path("subnet.env")).unwrap();
    let error = node.call("ADD", &pod, &node.conf()).unwrap_err();
    assert_eq!(error["code"], 11);
    let message = error["msg"].as_str().unwrap();
    for part in [node.path("subnet.env").to_str().unwrap(), "Gambeson agent", "log"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(!node.path("data").exists());
}

#[test]
fn hostile_calls_get_a_cni_error() {
    let node = Node::new(IPV4);
    let plugin = node.path("gambeson-cni");
    let conf = node.conf().to_string();
    let outside = node.path("outside");
    fs::write(&outside, "{}").unwrap();
    for command in ["ADD", "CHECK", "DEL", "gc", "add", ""] {
        for container_id in ["../outside", "/etc/passwd", "..", "", "a b"] {
            let call = Call { command, container_id, interface: "eth0", netns: &outside };
            let output = node.run(&plugin, &call, conf.as_bytes());
            if command.is_empty() {
                assert!(output.status.success() && output.stdout.is_empty());
            } else {
                assert_eq!(outcome(&output).unwrap_err()["code"], 4);
            }
        }
    }
    assert!(outside.exists());
    let deep = "[".repeat(1 << 20);
    let huge = format!("{}{conf}", " ".repeat(9 << 20));
    for stdin in ["", "{", "null", "[]", "\"\\ud800\"", "{\"name\":\"n\"}{}", &deep, &huge] {
        for command in ["ADD", "CHECK", "DEL"] {
            let call = Call { command, container_id: "c", interface: "eth0", netns: &outside };
            let error = outcome(&node.run(&plugin, &call, stdin.as_bytes())).unwrap_err();
            assert_eq!(error["code"], 6, "{error}");
        }
    }
}

#[test]
fn any_standard_input_gets_an_answer() {
    let node = Node::new(IPV4);
    let plugin = node.path("gambeson-cni");
    let nowhere = node.path("no-namespace");
    let conf = node.conf().to_string().into_bytes();
    let config = ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() };
    proptest!(config, |(
        noise in prop::collection::vec(any::<u8>(), 0..64), at in 0..conf.len(), cut: bool,
    )| {
        let mut stdin = conf[..at].to_vec();
        stdin.extend(noise);
        if !cut {
            stdin.extend(&conf[at..]);
        }
        for command in ["ADD", "DEL"] {
            let call = Call { command, container_id: "c", interface: "eth0", netns: &nowhere };
            let _ = outcome(&node.run(&plugin, &call, &stdin));
        }
    });
}

#[test]
fn install_cni_gives_a_plugin_that_attaches_pods() {
    let (node, pod) = (Node::new(IPV4), Netns::new());
    let (bin, conf_dir) = (node.path("opt/cni/bin"), node.path("etc/cni/net.d"));
    let install = |more: &[&str]| {
        let output = Command::new(GAMBESON)
            .arg("install-cni")
            .args([Path::new("--cni-bin-dir"), &bin, Path::new("--cni-conf-dir"), &conf_dir])
            .args(more)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    install(&["--binary-only"]);
    assert!(!conf_dir.exists());
    install(&[]);
    assert!(install(&[]).contains("is up to date"));
    let plugin = bin.join("gambeson-cni");
    assert_eq!(mode(&plugin), 0o755);
    assert_eq!(fs::read(&plugin).unwrap(), fs::read(GAMBESON).unwrap());

    let conflist = fs::read(conf_dir.join("10-flannel.conflist")).unwrap();
    let mut conflist: Value = serde_json::from_slice(&conflist).unwrap();
    let mut conf = node.conf();
    for key in ["cniVersion", "name"] {
        conf[key] = conflist[key].take();
    }
    conf["delegate"] = conflist["plugins"][0]["delegate"].take();
    for (command, program) in [("ADD", &plugin), ("DEL", &bin.join("flannel"))] {
        let call = Call { command, container_id: "c0ffee", interface: "eth0", netns: &pod.path() };
        outcome(&node.run(program, &call, conf.to_string().as_bytes())).unwrap();
    }

    fs::remove_file(bin.join("flannel")).unwrap();
    fs::write(bin.join("flannel"), "another program").unwrap();
    assert!(install(&[]).contains("another program"));
    assert_eq!(fs::read_to_string(bin.join("flannel")).unwrap(), "another program");
}
