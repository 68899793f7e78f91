//! A lab as a whole: up, down, and the handles by which commands and tests reach its parts.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::api::{Store, timestamp};
use super::client::{Api, Patch};
use super::daemon::{self, AGENT_LOG, JOURNAL, KUBECONFIG, SECRET, TOKEN};
use super::error::{LabError, LogTail, file_error};
use super::layout::{NodeIndex, STATE_ROOT, hub_netns, state_dir};
use super::netns::{Environment, Netns};
use super::network;
use super::node::{Node, Pod};
use super::options::{LabName, Options};
use super::process::{self, ProcessId};
use super::progress::Progress;
use super::runtime::{BIN_DIR, CONF_DIR, ConfList};
use super::state::{Lock, PodState, State, write_atomically};
use super::teardown;
use super::wait::until;

/// Of the agents' tokens. No lab is older.
const TOKEN_LIFETIME: Duration = Duration::from_secs(365 * 86_400);
/// How long an agent may take until its node has a CNI configuration.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the first packet between two nodes may take.
const PATH_TIMEOUT: Duration = Duration::from_secs(30);

/// Set when the person at the terminal wants `lab up` to stop.
pub static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// A running lab. One that was made by [`Lab::up`] is taken down on drop, unless it is
/// [kept](Lab::keep).
#[derive(Debug)]
pub struct Lab {
    pub(super) options: Options,
    pub(super) state: Mutex<State>,
    api: OnceLock<Api>,
    /// Held while the lab comes up.
    lock: Option<Lock>,
    down_on_drop: bool,
}

impl Lab {
    /// Makes a lab. When a step fails, everything is taken down again and the error says
    /// what failed.
    pub fn up(options: Options, progress: &Progress) -> Result<Self, LabError> {
        options.validate()?;
        require_root()?;
        make_folder(&options.name)?;
        let lock = Lock::take(&options.name)?;
        let mut lab = Self::with_state(State::new(options), true);
        lab.lock = lock;
        lab.build(progress)?;
        lab.lock = None;
        Ok(lab)
    }

    /// The lab of this name, which must have come up.
    pub fn open(name: &LabName) -> Result<Self, LabError> {
        require_root()?;
        match State::load(name)? {
            Some(state) if state.finished => Ok(Self::with_state(state, false)),
            Some(_) => Err(LabError::Unfinished(name.clone())),
            None if state_dir(name).exists() => Err(LabError::Unfinished(name.clone())),
            None => Err(LabError::Missing(name.clone())),
        }
    }

    /// Takes a lab down, whatever state it is in. False when there was nothing of it.
    pub fn down(name: &LabName, progress: &Progress) -> Result<bool, LabError> {
        require_root()?;
        let lock = Lock::take(name)?;
        let found = teardown::take_down(name, progress)?;
        drop(lock);
        Ok(found)
    }

    /// Leaves the lab running when this value goes away.
    pub fn keep(mut self) {
        self.down_on_drop = false;
    }

    /// What it was made from.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// URL of the API server on the host's loopback address.
    pub fn api_url(&self) -> String {
        let port = self.state().api.as_ref().map_or(0, |api| api.port);
        format!("http://127.0.0.1:{port}")
    }

    /// A kubeconfig for the host.
    pub fn kubeconfig(&self) -> String {
        kubeconfig(&self.options.name, &self.api_url(), "{}")
    }

    /// The file with that kubeconfig, for programs that read it more than once.
    pub fn kubeconfig_path(&self) -> PathBuf {
        self.options.state_dir().join("kubeconfig")
    }

    /// Where programs in the hub, or on the router, run.
    pub fn hub(&self) -> Environment {
        Environment::pod(Netns::named(hub_netns(&self.options.name)))
    }

    /// A client of the API server.
    pub fn api(&self) -> Result<&Api, LabError> {
        if let Some(api) = self.api.get() {
            return Ok(api);
        }
        let api = Api::at(&self.api_url())?;
        Ok(self.api.get_or_init(|| api))
    }

    /// Kills the API server, as a control plane may die.
    pub fn kill_api(&self) -> Result<(), LabError> {
        let Some(api) = self.state().api.clone() else { return Ok(()) };
        end(&[api.process], Signal::SIGKILL, "the API server")
    }

    /// Starts the API server again, with everything it knew.
    pub fn start_api(&self) -> Result<(), LabError> {
        let port = self.state().api.as_ref().map_or(0, |api| api.port);
        let api = daemon::start_api(&self.options, port)?;
        self.change(|state| state.api = Some(api))
    }

    /// All nodes.
    pub fn nodes(&self) -> Vec<Node<'_>> {
        self.options.node_indices().map(|index| Node { lab: self, index }).collect()
    }

    /// The node of this name.
    pub fn node(&self, name: &str) -> Result<Node<'_>, LabError> {
        let node = self.nodes().into_iter().find(|node| node.name() == name);
        node.ok_or_else(|| self.unknown("node", name, &self.node_names()))
    }

    /// All pods, by node.
    pub fn pods(&self) -> Vec<Pod<'_>> {
        self.nodes().iter().flat_map(Node::pods).collect()
    }

    /// The pod of this name.
    pub fn pod(&self, name: &str) -> Result<Pod<'_>, LabError> {
        let pod = self.pods().into_iter().find(|pod| pod.name() == name);
        pod.ok_or_else(|| self.unknown("pod", name, &self.pod_names()))
    }

    /// Where programs on the node or in the pod of this name run.
    pub fn environment(&self, name: &str) -> Result<Environment, LabError> {
        if let Ok(node) = self.node(name) {
            return Ok(node.environment());
        }
        self.pod(name).map(|pod| pod.environment()).map_err(|_| {
            let known = [self.node_names(), self.pod_names()].concat();
            self.unknown("node or pod", name, &known)
        })
    }

    fn with_state(state: State, down_on_drop: bool) -> Self {
        Self {
            options: state.options.clone(),
            state: Mutex::new(state),
            api: OnceLock::new(),
            lock: None,
            down_on_drop,
        }
    }

    fn build(&self, progress: &Progress) -> Result<(), LabError> {
        let options = &self.options;
        self.change(|_| {})?;
        step(progress, "making the network")?;
        for node in options.node_indices() {
            self.make_node_folder(node)?;
        }
        network::build(options)?;
        step(progress, "starting the API server")?;
        let secret: [u8; 16] = rand::random();
        let secret: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        write_atomically(&options.state_dir().join(SECRET), secret.as_bytes())?;
        let store = Store::open(&options.state_dir().join(JOURNAL))?;
        store.seed(options.node_indices().map(|node| node_object(options, node)))?;
        drop(store);
        for node in self.nodes() {
            node.give_token(Some(&node.name()), TOKEN_LIFETIME)?;
            node.set_transports(options.transports.of(&node.name()))?;
        }
        self.start_api()?;
        write_atomically(&self.kubeconfig_path(), self.kubeconfig().as_bytes())?;
        if options.start {
            self.start(progress)?;
        }
        progress.done();
        self.change(|state| state.finished = true)
    }

    /// Starts every agent, attaches every pod, and waits for a path between all nodes.
    fn start(&self, progress: &Progress) -> Result<(), LabError> {
        step(progress, "starting the agents")?;
        for node in self.nodes() {
            match self.options.runs_flannel(node.index()) {
                true => node.start_flannel()?,
                false => node.start_agent()?,
            }
        }
        step(progress, "attaching the pods")?;
        in_parallel(self.nodes(), |node| node.attach_pods())?;
        step(progress, "waiting for the tunnels")?;
        in_parallel(self.nodes(), |node| node.wait_for_paths(PATH_TIMEOUT))
    }

    fn make_node_folder(&self, node: NodeIndex) -> Result<(), LabError> {
        let environment = daemon::environment(&self.options, node);
        let on_host = |path: &str| environment.host_path(Path::new(path));
        for folder in
            ["/run/netns", "/run/gambeson", "/run/wireguard", "/var/lib/lab", CONF_DIR, BIN_DIR]
        {
            let folder = on_host(folder);
            fs::create_dir_all(&folder).map_err(file_error("make", &folder))?;
        }
        let url = self.options.api_url(node);
        let user = format!("{{ tokenFile: {TOKEN} }}");
        let kubeconfig = kubeconfig(&self.options.name, &url, &user);
        write_atomically(&on_host(KUBECONFIG), kubeconfig.as_bytes())?;
        // The plugin is known by its file name alone.
        let plugin = on_host(BIN_DIR).join("gambeson-cni");
        match symlink(&self.options.binary, &plugin) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            linked => linked.map_err(file_error("make", &plugin)),
        }
    }

    /// Changes the state and writes it down.
    pub(super) fn change(&self, change: impl FnOnce(&mut State)) -> Result<(), LabError> {
        let mut state = self.state();
        change(&mut state);
        state.save()
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn node_names(&self) -> Vec<String> {
        self.nodes().iter().map(Node::name).collect()
    }

    fn pod_names(&self) -> Vec<String> {
        self.pods().iter().map(Pod::name).collect()
    }

    fn unknown(&self, kind: &'static str, name: &str, known: &[String]) -> LabError {
        LabError::Unknown {
            lab: self.options.name.clone(),
            kind,
            name: name.to_owned(),
            known: known.join(", "),
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.down_on_drop {
            // There is nobody left to tell; the next `lab up` of this name says what is left.
            let _ = teardown::take_down(&self.options.name, &Progress::silent());
        }
    }
}

impl Node<'_> {
    /// Waits for the CNI configuration of the node and attaches its pods.
    pub fn attach_pods(&self) -> Result<(), LabError> {
        let configuration = self.wait_for_cni()?;
        let ready = json!({ "status": { "conditions": [
            { "type": "Ready", "status": "True", "reason": "KubeletReady",
              "message": "the node has a CNI configuration",
              "lastHeartbeatTime": timestamp(), "lastTransitionTime": timestamp() },
        ] } });
        for pod in self.pods() {
            self.attach(&configuration, pod)?;
        }
        self.lab.api()?.patch_status(&self.name(), Patch::Strategic, &ready).map(|_| ())
    }

    /// Attaches one pod with this configuration.
    pub fn attach(&self, configuration: &ConfList, pod: Pod<'_>) -> Result<(), LabError> {
        let netns = pod.environment().netns().clone();
        let attached: PodState = configuration.add(&self.environment(), &netns)?;
        self.lab.change(|state| {
            state.pods.insert(pod.name(), attached);
        })
    }

    /// As a machine that is switched off and on: processes, interfaces, the firewall and `/run`
    /// are gone, `/etc` and `/var/lib` are there. Nothing is started.
    pub fn reboot(&self) -> Result<(), LabError> {
        let pods: Vec<_> = self.pods().iter().map(|pod| pod.netns()).collect();
        let all = [&[self.netns()][..], &pods].concat();
        let identities: Vec<_> = all.iter().filter_map(Netns::identity).collect();
        if !process::kill_all(|| process::in_namespaces(&identities)) {
            return Err(LabError::Stuck("a process of the node".to_owned()));
        }
        for netns in &all {
            teardown::remove_netns(&netns.path())?;
        }
        self.lab.change(|state| {
            state.agents.remove(&self.name());
            self.pods().iter().for_each(|pod| _ = state.pods.remove(&pod.name()));
        })?;
        let run = self.host_path(Path::new("/run"));
        fs::remove_dir_all(&run).map_err(file_error("empty", &run))?;
        self.lab.make_node_folder(self.index())?;
        self.give_token(Some(&self.name()), TOKEN_LIFETIME)?;
        network::build_node(&self.lab.options, self.index())
    }

    /// Waits until there is a path to every other node.
    pub fn wait_for_mesh(&self) -> Result<(), LabError> {
        self.wait_for_paths(PATH_TIMEOUT)
    }

    fn wait_for_cni(&self) -> Result<ConfList, LabError> {
        let environment = self.environment();
        let found = until(Instant::now() + READY_TIMEOUT, || {
            if INTERRUPTED.load(Ordering::Relaxed) {
                return Some(Err(LabError::Interrupted));
            }
            match ConfList::first_on(&environment).transpose() {
                None if self.agent().is_none() => {
                    let log = self.folder().join(AGENT_LOG);
                    Some(Err(daemon::died(&format!("the agent of {}", self.name()), &log)))
                }
                found => found,
            }
        });
        found.unwrap_or_else(|| {
            Err(LabError::NotReady {
                node: self.name(),
                seconds: READY_TIMEOUT.as_secs(),
                log: LogTail::of(&self.folder().join(AGENT_LOG)),
            })
        })
    }
}

/// Tells what comes next, unless the person at the terminal wants to stop.
fn step(progress: &Progress, what: &str) -> Result<(), LabError> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        return Err(LabError::Interrupted);
    }
    progress.step(what);
    Ok(())
}

/// Ends processes with this signal, and waits until they have.
pub(super) fn end(processes: &[ProcessId], signal: Signal, name: &str) -> Result<(), LabError> {
    if process::end(processes, signal) { Ok(()) } else { Err(LabError::Stuck(name.to_owned())) }
}

/// Does the same on many things at once; the first error wins.
pub(super) fn in_parallel<T: Send, E: Send>(
    items: Vec<T>,
    work: impl Fn(T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> =
            items.into_iter().map(|item| scope.spawn(move || work(item))).collect();
        let results: Vec<_> = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect();
        results.into_iter().collect()
    })
}

fn require_root() -> Result<(), LabError> {
    if nix::unistd::geteuid().is_root() { Ok(()) } else { Err(LabError::NotRoot) }
}

fn kubeconfig(lab: &LabName, url: &str, user: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: {lab}\nclusters:\n- name: {lab}\n  \
         cluster:\n    server: {url}\ncontexts:\n- name: {lab}\n  context:\n    cluster: {lab}\n    \
         user: {lab}\nusers:\n- name: {lab}\n  user: {user}\n"
    )
}

/// A Node as a kubelet and a cloud provider would have made it.
fn node_object(options: &Options, node: NodeIndex) -> Value {
    let cidrs: Vec<String> = options.pod_cidrs(node).iter().map(ToString::to_string).collect();
    let mut addresses: Vec<Value> = options
        .underlay_addresses(node)
        .iter()
        .map(|address| json!({ "type": "InternalIP", "address": address.addr() }))
        .collect();
    addresses.push(json!({ "type": "Hostname", "address": node.name() }));
    json!({
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {
            "name": node.name(),
            "labels": { "kubernetes.io/hostname": node.name(), "kubernetes.io/os": "linux" },
        },
        "spec": { "podCIDR": cidrs.first(), "podCIDRs": cidrs },
        "status": {
            "addresses": addresses,
            "conditions": [
                { "type": "Ready", "status": "False", "reason": "KubeletNotReady",
                  "message": "no CNI configuration yet",
                  "lastHeartbeatTime": timestamp(), "lastTransitionTime": timestamp() },
                { "type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated",
                  "message": "nobody has set up the pod network yet",
                  "lastHeartbeatTime": timestamp(), "lastTransitionTime": timestamp() },
            ],
            "nodeInfo": { "kubeletVersion": "v1.33.0", "osImage": "Gambeson lab" },
        },
    })
}

/// Makes the folder of a new lab.
fn make_folder(name: &LabName) -> Result<(), LabError> {
    let folder = state_dir(name);
    loop {
        fs::create_dir_all(STATE_ROOT).map_err(file_error("make", STATE_ROOT))?;
        match fs::create_dir(&folder) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(LabError::Exists(name.clone()));
            }
            // Another lab, the last one then, took the folder of all labs with it just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(file_error("make", &folder)(error)),
        }
    }
}
