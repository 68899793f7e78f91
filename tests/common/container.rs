//! What a kubelet and a runtime do with a pod of the chart: containers by runc on a node of a
//! lab, from the image, with exactly the security context and the mounts that the chart says.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use gambeson_lab::{Lab, Node};
use serde_json::{Value, json};

use super::image::{config, made, unpack};
use super::lab::{both, stdout_of};
use super::scenario::within;

/// The default profile of Podman and CRI-O, which Debian has in golang-github-containers-common.
const SECCOMP: &str = "/usr/share/containers/seccomp.json";
/// How long a container may take to get ready.
const READY: Duration = Duration::from_secs(30);

/// The image's root and the objects of the chart.
pub(crate) struct Kubelet {
    folder: tempfile::TempDir,
    image: Value,
    objects: Vec<Value>,
    api_server: Child,
}

/// Where pods find the API server: the hub of a lab without a router.
const API_SERVER: &str = "192.168.240.254";
const API_PORT: &str = "443";
/// Where a pod finds its token and whom to trust.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// A running container, ended with the test.
pub(crate) struct Container {
    id: String,
    /// Where runc keeps its state.
    runs: PathBuf,
    child: Child,
    probe: Option<Vec<String>>,
    log: PathBuf,
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

impl Kubelet {
    /// On the nodes of this lab.
    pub(crate) fn new(lab: &Lab, objects: Vec<Value>) -> Self {
        assert!(Path::new(SECCOMP).exists(), "{SECCOMP} is missing: run `make setup`");
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        fs::create_dir(&root).unwrap();
        let archive = made("gambeson.tar");
        unpack(&archive, &root);
        let api_server = speak_tls(lab, folder.path());
        Self { folder, image: config(&archive), objects, api_server }
    }

    fn object(&self, kind: &str, name: &str) -> &Value {
        let is_it = |o: &&Value| o["kind"] == kind && o["metadata"]["name"] == name;
        self.objects.iter().find(is_it).unwrap_or_else(|| panic!("no {kind} {name}"))
    }

    /// Starts the pod of a DaemonSet: runs its init containers, then its container.
    pub(crate) fn start(&self, node: Node<'_>, daemon_set: &str, uid: &str) -> Container {
        let pod = &self.object("DaemonSet", daemon_set)["spec"]["template"]["spec"];
        assert_eq!(pod["hostNetwork"], true);
        for container in array(&pod["initContainers"]) {
            let mut init = self.run(node, pod, container, uid);
            let status = init.child.wait().unwrap();
            assert!(status.success(), "{}", fs::read_to_string(&init.log).unwrap());
        }
        self.run(node, pod, &pod["containers"][0], uid)
    }

    /// Runs the container of a Pod to its end, and gives whether it was content, and its log.
    pub(crate) fn complete(&self, node: Node<'_>, pod: &str) -> (bool, String) {
        let pod = &self.object("Pod", pod)["spec"];
        let mut container = self.run(node, pod, &pod["containers"][0], "once");
        let status = container.child.wait().unwrap();
        (status.success(), container.log())
    }

    fn run(&self, node: Node<'_>, pod: &Value, container: &Value, uid: &str) -> Container {
        let lab = node.folder();
        let lab = lab.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
        let id = format!("{lab}-{}-{}-{uid}", node.name(), text(&container["name"]));
        let bundle = self.folder.path().join(&id);
        fs::create_dir(&bundle).unwrap();
        let spec = self.spec(node, pod, container, uid, &bundle);
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let log = bundle.join("log");
        let file = fs::File::create(&log).unwrap();
        let runs = self.folder.path().join("runc");
        let mut command = runc(&runs);
        command.args(["run", "--bundle"]).arg(&bundle).arg(&id);
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let child = command.spawn().unwrap();
        let probe = array(&container["readinessProbe"]["exec"]["command"]);
        let probe: Vec<_> = probe.map(|word| text(word).to_owned()).collect();
        Container { id, runs, child, probe: Some(probe).filter(|p| !p.is_empty()), log }
    }

    fn spec(
        &self,
        node: Node<'_>,
        pod: &Value,
        container: &Value,
        uid: &str,
        bundle: &Path,
    ) -> Value {
        let environment = self.environment(node, container, uid);
        let mut args = container["command"]
            .as_array()
            .cloned()
            .unwrap_or_else(|| self.image["Entrypoint"].as_array().unwrap().clone());
        for word in array(&container["args"]) {
            let mut word = text(word).to_owned();
            for (name, value) in &environment {
                word = word.replace(&format!("$({name})"), value);
            }
            args.push(word.into());
        }
        let env = array(&self.image["Env"]).map(|word| text(word).to_owned());
        let own = environment.iter().map(|(name, value)| format!("{name}={value}"));
        let env: Vec<String> = env.chain(own).collect();
        let security = &container["securityContext"];
        assert_eq!(security["privileged"], Value::Null);
        let (uid, gid) = (&security["runAsUser"], security["runAsGroup"].as_u64().unwrap_or(0));
        assert_eq!(security["capabilities"]["drop"], json!(["ALL"]));
        let add = array(&security["capabilities"]["add"]);
        let capabilities: Vec<_> = add.map(|name| format!("CAP_{}", text(name))).collect();
        assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault");
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": { "uid": uid, "gid": gid },
                "args": args,
                "env": env,
                "cwd": "/",
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
                },
                "noNewPrivileges": security["allowPrivilegeEscalation"] == false,
            },
            "root": {
                "path": self.folder.path().join("root"),
                "readonly": security["readOnlyRootFilesystem"],
            },
            "mounts": self.mounts(node, pod, container, bundle),
            "linux": {
                "namespaces": [
                    { "type": "pid" }, { "type": "ipc" }, { "type": "mount" },
                    // The node's, which for the pod is the host's.
                    { "type": "network", "path": node.netns().path() },
                ],
                "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"],
                "seccomp": seccomp(&capabilities),
            },
        })
    }

    fn environment(
        &self,
        node: Node<'_>,
        container: &Value,
        uid: &str,
    ) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        for variable in array(&container["env"]) {
            let field = text(&variable["valueFrom"]["fieldRef"]["fieldPath"]);
            let value = match field {
                "spec.nodeName" => node.name(),
                "status.hostIP" => node.addresses()[0].to_string(),
                "metadata.uid" => uid.to_owned(),
                "" => text(&variable["value"]).to_owned(),
                other => panic!("{other}"),
            };
            all.insert(text(&variable["name"]).to_owned(), value);
        }
        for (name, value) in [("HOST", API_SERVER), ("PORT", API_PORT)] {
            all.insert(format!("KUBERNETES_SERVICE_{name}"), value.to_owned());
        }
        all
    }

    fn mounts(&self, node: Node<'_>, pod: &Value, container: &Value, bundle: &Path) -> Value {
        let mut mounts = vec![
            json!({ "destination": "/proc", "type": "proc", "source": "proc" }),
            json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                    "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] }),
            json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs",
                    "options": ["nosuid", "noexec", "nodev", "ro"] }),
        ];
        if pod["automountServiceAccountToken"] != false {
            let user = container["securityContext"]["runAsUser"].as_u64();
            let user = user.and_then(|user| u32::try_from(user).ok());
            mounts.push(json!({
                "destination": SERVICE_ACCOUNT, "type": "bind", "options": ["bind", "ro"],
                "source": self.service_account(node, bundle, user),
            }));
        }
        for mount in array(&container["volumeMounts"]) {
            let is_it = |volume: &&Value| volume["name"] == mount["name"];
            let volume = array(&pod["volumes"]).find(is_it).unwrap();
            let source = match (&volume["hostPath"], &volume["configMap"]["name"]) {
                (Value::Null, name) => self.config_map(text(name), bundle),
                (host, _) => {
                    let path = node.host_path(Path::new(text(&host["path"])));
                    if host["type"] == "DirectoryOrCreate" {
                        fs::create_dir_all(&path).unwrap();
                    }
                    path
                }
            };
            let access = if mount["readOnly"] == true { "ro" } else { "rw" };
            mounts.push(json!({
                "destination": mount["mountPath"], "type": "bind", "source": source,
                "options": ["rbind", "rprivate", access],
            }));
        }
        mounts.into()
    }

    fn service_account(&self, node: Node<'_>, bundle: &Path, user: Option<u32>) -> PathBuf {
        let folder = bundle.join("service-account");
        fs::create_dir(&folder).unwrap();
        let token = node.host_path(Path::new("/run/gambeson/token"));
        for (from, to) in [(token, "token"), (self.folder.path().join("ca.crt"), "ca.crt")] {
            fs::copy(from, folder.join(to)).unwrap();
            // As a kubelet does where all containers run as the same user.
            std::os::unix::fs::chown(folder.join(to), user, None).unwrap();
        }
        fs::write(folder.join("namespace"), "kube-system").unwrap();
        folder
    }

    fn config_map(&self, name: &str, bundle: &Path) -> PathBuf {
        let folder = bundle.join(name);
        fs::create_dir(&folder).unwrap();
        for (file, contents) in self.object("ConfigMap", name)["data"].as_object().unwrap() {
            fs::write(folder.join(file), text(contents)).unwrap();
        }
        folder
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        let _ = self.api_server.kill();
        let _ = self.api_server.wait();
    }
}

/// Has the lab's API server answer by TLS, as pods ask it.
fn speak_tls(lab: &Lab, folder: &Path) -> Child {
    let (certificate, key) = (folder.join("ca.crt"), folder.join("key.pem"));
    let mut openssl = Command::new("openssl");
    openssl
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"])
        .args(["-days", "2", "-subj", "/CN=lab", "-addext", "basicConstraints=critical,CA:FALSE"])
        .args(["-addext", &format!("subjectAltName=IP:{API_SERVER}")])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&certificate);
    stdout_of(&mut openssl);
    let both = [&key, &certificate].map(|file| fs::read(file).unwrap()).concat();
    let pem = folder.join("server.pem");
    fs::write(&pem, both).unwrap();
    let listen =
        format!("OPENSSL-LISTEN:{API_PORT},fork,reuseaddr,verify=0,cert={}", pem.display());
    let mut socat = Command::new("socat");
    socat.args([&listen, "TCP:127.0.0.1:6443"]).stdin(Stdio::null()).stderr(Stdio::null());
    lab.hub().spawn(&mut socat).unwrap()
}

/// The default profile, for a process with these capabilities.
fn seccomp(capabilities: &[String]) -> Value {
    let profile: Value = serde_json::from_slice(&fs::read(SECCOMP).unwrap()).unwrap();
    let has = |list: &Value| array(list).any(|cap| capabilities.iter().any(|own| cap == own));
    let applies = |rule: &&Value| {
        let (includes, excludes) = (&rule["includes"], &rule["excludes"]);
        let arches = &includes["arches"];
        let here = arches.is_null() || array(arches).any(|arch| arch == "amd64");
        here && (includes["caps"].is_null() || has(&includes["caps"])) && !has(&excludes["caps"])
    };
    let rules = array(&profile["syscalls"]).filter(applies).map(|rule| {
        let mut rule = json!({
            "names": rule["names"], "action": rule["action"], "args": rule["args"],
            "errnoRet": rule["errnoRet"],
        });
        let map = rule.as_object_mut().unwrap();
        map.retain(|_, value| !value.is_null());
        rule
    });
    json!({
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": rules.collect::<Vec<_>>(),
    })
}

fn runc(runs: &Path) -> Command {
    let mut command = Command::new("runc");
    command.arg("--root").arg(runs);
    command
}

impl Container {
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub(crate) fn exec(&self, command: &[&str]) -> Output {
        runc(&self.runs).args(["exec", &self.id]).args(command).output().unwrap()
    }

    /// What the readiness probe says, and whether it is well.
    pub(crate) fn probe(&self) -> (bool, String) {
        let probe = self.probe.as_ref().expect("a readiness probe");
        let probe: Vec<&str> = probe.iter().map(String::as_str).collect();
        let output = self.exec(&probe);
        (output.status.success(), both(&output))
    }

    pub(crate) fn wait_until_ready(&self) {
        let what = format!("{} is ready", self.id);
        within(READY, &what, || {
            let (ready, _) = self.probe();
            ready.then_some(())
        });
    }

    /// Ends it as a kubelet ends a pod.
    pub(crate) fn stop(mut self, signal: &str) {
        self.signal(signal);
        self.child.wait().unwrap();
    }

    fn signal(&self, signal: &str) {
        let _ = runc(&self.runs).args(["kill", &self.id, signal]).output();
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.id, self.log());
        }
        self.signal("KILL");
        let _ = self.child.wait();
        let _ = runc(&self.runs).args(["delete", "--force", &self.id]).output();
    }
}
