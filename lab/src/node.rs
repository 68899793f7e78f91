//! Handles on the nodes and pods of a lab.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use gambeson_mesh::node::Transport;
use ipnet::IpNet;
use nix::sys::signal::Signal;
use nix::sys::socket::{getsockopt, sockopt};

use gambeson::status::Status;

use super::api::access::token;
use super::daemon::{self, AGENT_LOG, NET_CONF, SECRET, TOKEN};
use super::error::{LabError, LogTail, file_error};
use super::instance::{INTERRUPTED, Lab, end};
use super::layout::{NodeIndex, PodIndex, hub_netns};
use super::netns::{Environment, Netns};
use super::network::{hub_port, ip};
use super::probe::ping::{Echo, Pinger};
use super::process::ProcessId;
use super::state::write_atomically;
use super::wait::until;

/// Folder of the userspace devices' sockets, as seen on the node.
const WIREGUARD_SOCKETS: &str = "/run/wireguard";
/// How long an agent may take to answer.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// A node of a lab.
#[derive(Debug, Clone, Copy)]
pub struct Node<'a> {
    pub(super) lab: &'a Lab,
    pub(super) index: NodeIndex,
}

/// A pod of a lab.
#[derive(Debug, Clone, Copy)]
pub struct Pod<'a> {
    lab: &'a Lab,
    index: PodIndex,
}

impl<'a> Node<'a> {
    /// `node-1`.
    pub fn name(&self) -> String {
        self.index.name()
    }

    /// Its position, from 1.
    pub fn index(&self) -> NodeIndex {
        self.index
    }

    /// Where programs on the node run.
    pub fn environment(&self) -> Environment {
        daemon::environment(&self.lab.options, self.index)
    }

    /// Its network namespace.
    pub fn netns(&self) -> Netns {
        Netns::named(self.index.netns(&self.lab.options.name))
    }

    /// Its folder: log of the agent, and what is `/run` and `/var/lib` there.
    pub fn folder(&self) -> PathBuf {
        self.lab.options.node_dir(self.index)
    }

    /// Where a path on the node is found from outside.
    pub fn host_path(&self, path: &Path) -> PathBuf {
        self.environment().host_path(path)
    }

    /// Its underlay addresses.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.lab.options.underlay_addresses(self.index).iter().map(IpNet::addr).collect()
    }

    /// First addresses of its pod CIDRs.
    pub fn pod_gateways(&self) -> Vec<IpAddr> {
        self.lab.options.pod_gateways(self.index)
    }

    /// Its pods.
    pub fn pods(&self) -> Vec<Pod<'a>> {
        let lab = self.lab;
        lab.options.pod_indices(self.index).map(|index| Pod { lab, index }).collect()
    }

    /// Runs a program on the node and captures its output.
    pub fn exec(&self, command: &[&str]) -> Result<Output, LabError> {
        exec(&self.environment(), command)
    }

    /// The agent, if it runs.
    pub fn agent(&self) -> Option<ProcessId> {
        let agent = self.lab.state().agents.get(&self.name()).copied();
        agent.filter(|process| process.is_alive())
    }

    /// Starts the agent.
    pub fn start_agent(&self) -> Result<(), LabError> {
        self.driven_by(daemon::start_agent(&self.lab.options, self.index)?)
    }

    /// Starts the agent with more arguments than the lab's agents have.
    pub fn start_agent_with(&self, more: &[&str]) -> Result<(), LabError> {
        let mut options = self.lab.options.clone();
        options.agent_arguments.extend(more.iter().map(|&argument| argument.to_owned()));
        self.driven_by(daemon::start_agent(&options, self.index)?)
    }

    /// Starts the stand-in for Flannel in place of the agent, which must have ended.
    pub fn start_flannel(&self) -> Result<(), LabError> {
        self.driven_by(daemon::start_flannel(&self.lab.options, self.index)?)
    }

    /// Kills the agent with SIGKILL.
    pub fn kill_agent(&self) -> Result<(), LabError> {
        self.end_agent(Signal::SIGKILL)
    }

    /// Asks the agent to end with SIGTERM, and waits until it has.
    pub fn stop_agent(&self) -> Result<(), LabError> {
        self.end_agent(Signal::SIGTERM)
    }

    /// Starts the agent again, ending one that still runs.
    pub fn restart_agent(&self) -> Result<(), LabError> {
        self.stop_agent()?;
        self.start_agent()
    }

    /// Puts a token where the agent finds its own: that of the agent of `node`, or of none.
    pub fn give_token(&self, node: Option<&str>, lifetime: Duration) -> Result<(), LabError> {
        let secret = self.lab.options.state_dir().join(SECRET);
        let secret = std::fs::read_to_string(&secret).map_err(file_error("read", secret))?;
        let token = token(&secret, node, lifetime);
        write_atomically(&self.host_path(Path::new(TOKEN)), token.as_bytes())
    }

    /// Tells the agent, which may be running, which transports it accepts from now on.
    pub fn set_transports(&self, transports: &BTreeSet<Transport>) -> Result<(), LabError> {
        let path = self.host_path(Path::new(NET_CONF));
        let conf = self.lab.options.net_conf(transports);
        write_atomically(&path, conf.as_bytes())
    }

    /// What the agent has logged so far.
    pub fn agent_log(&self) -> Result<String, LabError> {
        let path = self.folder().join(AGENT_LOG);
        std::fs::read_to_string(&path).map_err(file_error("read", path))
    }

    /// What the agent says of itself.
    pub fn status(&self) -> Result<Status, LabError> {
        let path = self.host_path(Path::new(gambeson::config::DEFAULT_SOCKET));
        let read = || {
            let mut stream = UnixStream::connect(&path)?;
            stream.set_read_timeout(Some(STATUS_TIMEOUT))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        };
        let text = read().map_err(file_error("read the agent's status from", &path))?;
        serde_json::from_str(&text).map_err(|source| LabError::State { path, source })
    }

    /// The processes that serve the node's userspace devices, as the kernel knows them from
    /// the other end of their sockets.
    pub fn tunnels(&self) -> Vec<ProcessId> {
        let folder = self.host_path(Path::new(WIREGUARD_SOCKETS));
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "sock"))
            .collect();
        paths.sort();
        paths.iter().filter_map(|path| peer_of(path)).collect()
    }

    /// Plugs the node's underlay cable in or out, at the far end.
    pub fn set_cable(&self, plugged: bool) -> Result<(), LabError> {
        let state = if plugged { "up" } else { "down" };
        let line = format!("link set {} {state}", hub_port(self.index));
        ip(Some(&hub_netns(&self.lab.options.name)), [line])
    }

    /// Waits until this node's first pod, or the node itself, has heard from every other
    /// node on every address family.
    pub(super) fn wait_for_paths(&self, timeout: Duration) -> Result<(), LabError> {
        let (from, netns) = match self.pods().first() {
            Some(pod) => (pod.name(), pod.netns()),
            None => (self.name(), self.netns()),
        };
        let others = self.lab.nodes().into_iter().filter(|node| node.index != self.index);
        let targets: Vec<(String, IpAddr)> = others
            .flat_map(|node| match node.pods().first() {
                Some(pod) => pod.addresses().into_iter().map(|ip| (pod.name(), ip)).collect(),
                None => {
                    // Without a pod there is no bridge: the device has the base addresses.
                    let cidrs = self.lab.options.pod_cidrs(node.index);
                    cidrs.iter().map(|cidr| (node.name(), cidr.network())).collect::<Vec<_>>()
                }
            })
            .collect();
        let deadline = Instant::now() + timeout;
        let missing = netns.run(|| {
            targets.iter().find(|(_, address)| {
                let heard = until(deadline, || {
                    // Anew each time: without a route there is no socket, and with the wrong
                    // one it has the wrong source address.
                    let echo = Pinger::new(*address).and_then(|mut pinger| pinger.echo());
                    let answered = matches!(echo, Ok(Echo::Answered(_)));
                    (answered || INTERRUPTED.load(Ordering::Relaxed)).then_some(answered)
                });
                heard != Some(true)
            })
        })?;
        match missing {
            None => Ok(()),
            Some(_) if INTERRUPTED.load(Ordering::Relaxed) => Err(LabError::Interrupted),
            Some((to, address)) => Err(LabError::NoPath {
                from,
                to: format!("{to} ({address})"),
                seconds: timeout.as_secs(),
                log: LogTail::of(&self.folder().join(AGENT_LOG)),
            }),
        }
    }

    fn driven_by(&self, process: ProcessId) -> Result<(), LabError> {
        self.lab.change(|state| {
            state.agents.insert(self.name(), process);
        })
    }

    fn end_agent(&self, signal: Signal) -> Result<(), LabError> {
        let agent: Vec<ProcessId> = self.agent().into_iter().collect();
        end(&agent, signal, &format!("the agent of {}", self.name()))
    }
}

impl<'a> Pod<'a> {
    /// `pod-1-1`.
    pub fn name(&self) -> String {
        self.index.name()
    }

    /// The node it is on.
    pub fn node(&self) -> Node<'a> {
        Node { lab: self.lab, index: self.index.0 }
    }

    /// Where programs in the pod run.
    pub fn environment(&self) -> Environment {
        Environment::pod(self.netns())
    }

    /// Its network namespace.
    pub fn netns(&self) -> Netns {
        Netns::named(self.index.netns(&self.lab.options.name))
    }

    /// Its addresses; none when it was never attached.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let state = self.lab.state();
        state.pods.get(&self.name()).map(|pod| pod.addresses.clone()).unwrap_or_default()
    }

    /// Runs a program in the pod and captures its output.
    pub fn exec(&self, command: &[&str]) -> Result<Output, LabError> {
        exec(&self.environment(), command)
    }
}

fn exec(environment: &Environment, command: &[&str]) -> Result<Output, LabError> {
    let (program, arguments) = command.split_first().unwrap_or((&"", &[]));
    let child = environment.spawn(
        Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped()),
    )?;
    let output = child.wait_with_output();
    output.map_err(|source| LabError::Measure { what: format!("run {program}"), source })
}

/// The process that listens on a Unix socket.
fn peer_of(path: &Path) -> Option<ProcessId> {
    let mut stream = UnixStream::connect(path).ok()?;
    let peer = getsockopt(&stream, sockopt::PeerCredentials).ok()?;
    // An empty request ends the conversation in order.
    let _ = stream.write_all(b"\n");
    ProcessId::current(peer.pid())
}
