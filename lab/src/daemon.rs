//! The lab's long-running processes: the API server and the agents.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use super::api::access::Access;
use super::api::{Server, Store};
use super::error::{LabError, LogTail, file_error};
use super::layout::{API_PORT, NodeIndex, UNDERLAY_INTERFACE, hub_netns, state_dir};
use super::netns::{Environment, Netns};
use super::options::{LabName, Options};
use super::process::ProcessId;
use super::runtime::CONF_DIR;
use super::state::ApiState;

/// The API server's journal, log and the agents' kubeconfig.
pub(super) const JOURNAL: &str = "api.journal";
/// What the tokens of its agents are made with.
pub(super) const SECRET: &str = "api.secret";
const API_LOG: &str = "api.log";
pub(super) const AGENT_LOG: &str = "agent.log";
/// Where an agent finds its kubeconfig.
pub(super) const KUBECONFIG: &str = "/run/gambeson/kubeconfig";
/// Where that finds its token.
pub(super) const TOKEN: &str = "/run/gambeson/token";
/// Where an agent finds its net-conf.json, which can be written anew while it runs.
pub(super) const NET_CONF: &str = "/var/lib/lab/net-conf.json";
/// What the CNI plugin reads.
const SUBNET_ENV: &str = "/run/flannel/subnet.env";

/// Arguments that start the API server of this lab, and tell its process from all others.
pub(super) fn api_arguments(name: &LabName) -> [String; 3] {
    ["api-server", "--name", name.as_str()].map(str::to_owned)
}

/// Starts the API server and waits until it listens. Port 0 lets the system choose.
pub(super) fn start_api(options: &Options, port: u16) -> Result<ApiState, LabError> {
    let log = options.state_dir().join(API_LOG);
    let mut command = Command::new(&options.lab_binary);
    command
        .args(api_arguments(&options.name))
        .args(["--port", &port.to_string()])
        .args((!options.admission).then_some("--no-admission"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(open_log(&log)?)
        .process_group(0);
    let mut child = command.spawn().map_err(file_error("run", &options.lab_binary))?;
    let stdout = child.stdout.take();
    let process = adopt(child, "the API server", &log)?;
    let mut line = String::new();
    if let Some(stdout) = stdout {
        // End of file says that it ended; its log says why.
        let _ = BufReader::new(stdout).read_line(&mut line);
    }
    match line.trim().parse() {
        Ok(port) => Ok(ApiState { port, process }),
        Err(_) => Err(died("the API server", &log)),
    }
}

/// The API server's own side: listens on the host's loopback address and in the hub, says on
/// which port, and serves until it is killed.
pub fn run_api_server(name: &LabName, port: u16, admission: bool) -> Result<(), LabError> {
    let folder = state_dir(name);
    let listen = |address: SocketAddr| {
        TcpListener::bind(address)
            .map_err(|source| LabError::Measure { what: format!("listen on {address}"), source })
    };
    let host = listen(SocketAddr::from(([127, 0, 0, 1], port)))?;
    let hub = Netns::named(hub_netns(name))
        .run(|| listen(SocketAddr::from((Ipv6Addr::UNSPECIFIED, API_PORT))))??;
    let port = host.local_addr().map_err(file_error("ask the address of", "a socket"))?.port();
    let secret =
        fs::read_to_string(folder.join(SECRET)).map_err(file_error("read", folder.join(SECRET)))?;
    let access = Access::new(secret, admission)?;
    let server = Server::new(Store::open(&folder.join(JOURNAL))?, access);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(LabError::Runtime)?;
    runtime.block_on(async {
        println!("{port}");
        server.serve(vec![host, hub]).await
    })?;
    Ok(())
}

/// Starts a node's agent.
pub(super) fn start_agent(options: &Options, node: NodeIndex) -> Result<ProcessId, LabError> {
    let networks: Vec<String> = options.cluster_cidrs().iter().map(ToString::to_string).collect();
    let mut command = Command::new(&options.binary);
    command
        .args(["agent", "--kubeconfig", KUBECONFIG, "--cluster-cidr", &networks.join(",")])
        .args(["--cni-conf-dir", CONF_DIR, "--iface", UNDERLAY_INTERFACE])
        // As Flannel's own manifest has it.
        .arg("--ip-masq")
        .args(["--wireguard", options.wireguard.of(&node.name()).as_str()])
        .args(["--net-config-path", NET_CONF])
        .args((options.flannel_nodes > 0).then_some("--flannel-compat"))
        .args(&options.agent_arguments)
        .env("NODE_NAME", node.name())
        .env_remove("KUBECONFIG");
    start_on(options, node, command, "the agent")
}

/// Starts the stand-in for flanneld on a node.
pub(super) fn start_flannel(options: &Options, node: NodeIndex) -> Result<ProcessId, LabError> {
    let mut command = Command::new(options.lab_binary.with_file_name("flannel-stand-in"));
    command
        .args(["--api", &options.api_url(node), "--node", &node.name()])
        .args(["--iface", UNDERLAY_INTERFACE, "--net-config-path", NET_CONF])
        .args(["--subnet-file", SUBNET_ENV, "--cni-conf-dir", CONF_DIR])
        .arg("--tunnel-program")
        .arg(&options.binary);
    start_on(options, node, command, "Flannel")
}

/// Starts what drives a node, with its output in the node's log.
fn start_on(
    options: &Options,
    node: NodeIndex,
    mut command: Command,
    what: &str,
) -> Result<ProcessId, LabError> {
    let log = options.node_dir(node).join(AGENT_LOG);
    command
        .stdin(Stdio::null())
        .stdout(open_log(&log)?)
        .stderr(open_log(&log)?)
        .current_dir("/")
        .process_group(0);
    let child = environment(options, node).spawn(&mut command)?;
    adopt(child, &format!("{what} of {}", node.name()), &log)
}

/// A node as programs on it see it.
pub(super) fn environment(options: &Options, node: NodeIndex) -> Environment {
    Environment::node(Netns::named(node.netns(&options.name)), options.node_dir(node))
}

/// The error for a process that ended too early.
pub(super) fn died(name: &str, log: &Path) -> LabError {
    LabError::Daemon { name: name.to_owned(), log: LogTail::of(log) }
}

/// Gives the child a thread that waits for its end, so that it leaves no zombie in a process
/// that outlives it.
fn adopt(mut child: Child, name: &str, log: &Path) -> Result<ProcessId, LabError> {
    let process = i32::try_from(child.id()).ok().and_then(ProcessId::current);
    let reaper = thread::Builder::new().name(format!("reap-{}", child.id()));
    reaper.spawn(move || child.wait()).map_err(|source| LabError::Measure {
        what: format!("start a thread for {name}"),
        source,
    })?;
    process.ok_or_else(|| died(name, log))
}

fn open_log(path: &Path) -> Result<File, LabError> {
    let open = File::options().create(true).append(true).open(path);
    open.map_err(|source: io::Error| file_error("open", path)(source))
}
