//! The command line of `gambeson-lab`, which is `gambeson lab` as well.

use std::env;
use std::iter;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::{Parser, Subcommand};
use gambeson::cli::{Failure, unblock_signals};
use gambeson::exit::Exit;
use gambeson_mesh::node::Transport;
use nix::sys::signal::{SigSet, Signal};

use crate::traffic::{FlowReport, Rate, Traffic, report_table};
use crate::{
    Family, INTERRUPTED, Lab, LabError, LabName, Options, Progress, Transports, TransportsError,
    WireguardModes, paint, run_api_server,
};

/// How long the last packets may take to arrive.
const GRACE: Duration = Duration::from_secs(2);

/// Make a cluster of network namespaces on this machine, with real agents and pods.
///
/// Nodes are called node-1, node-2, ..., pods pod-1-1 (node 1, first pod), and so on.
/// Everything lives in network namespaces and in /run/gambeson-lab, and is gone after
/// `gambeson lab down`.
#[derive(Debug, Parser)]
#[command(name = "gambeson lab", bin_name = "gambeson lab", version = gambeson::VERSION, propagate_version = true)]
#[command(
    arg_required_else_help = true,
    after_help = "Examples:\n  \
    gambeson lab up --nodes 3\n  \
    gambeson lab verify\n  \
    gambeson lab exec pod-1-1 -- ping -c 3 10.244.2.2\n  \
    kubectl --kubeconfig <(gambeson lab kubeconfig) get nodes -o yaml\n  \
    gambeson lab down"
)]
struct Cli {
    /// Name of the lab; several may exist side by side
    #[arg(long, global = true, default_value = "gambeson")]
    name: LabName,
    #[command(subcommand)]
    command: LabCommand,
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    /// Make the lab, start the agents, attach the pods
    Up(UpArgs),
    /// Show nodes, agents, tunnels and pods
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check that the whole mesh works and that nothing travels in clear
    ///
    /// Every pair of pods by ping and TCP, nodes to pods and back, the MTU to the byte, a
    /// random canary that must not appear on any underlay interface, and the throughput of
    /// one pair. Exits with 8 when a check does not hold.
    Verify {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Send numbered packets both ways between two pods and count what is lost
    ///
    /// Exits with 8 unless every packet arrived once and unchanged.
    Traffic(TrafficArgs),
    /// Run a program on a node or in a pod
    Exec {
        /// node-1, pod-1-1, ...
        place: String,
        /// The program and its arguments
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Print a kubeconfig for the lab's API server
    ///
    /// The same is in /run/gambeson-lab/NAME/kubeconfig, for programs that read it more than
    /// once.
    Kubeconfig,
    /// Start a node's agent again
    Restart {
        /// node-1, ...
        node: String,
    },
    /// Tell a running agent which transports it accepts from now on
    ///
    /// Writes the node's net-conf.json. Pairs of nodes move within a few seconds, without loss
    /// where both still accept what they leave.
    Transports {
        /// node-1, ...
        node: String,
        /// wireguard, host-gw, vxlan, or several of them with commas
        list: String,
    },
    /// Switch a node off and on, then start its agent and its pods
    ///
    /// Its processes, interfaces, firewall and /run are gone in between; /etc and /var/lib stay.
    Reboot {
        /// node-1, ...
        node: String,
    },
    /// Remove the lab and everything in it
    Down,
    /// Serve the lab's Nodes
    #[command(hide = true)]
    ApiServer {
        #[arg(long)]
        port: u16,
        #[arg(long)]
        no_admission: bool,
    },
}

#[derive(Debug, clap::Args)]
struct UpArgs {
    /// Number of nodes, 1 to 100
    #[arg(long, default_value_t = 3)]
    nodes: u8,
    /// Number of pods on each node
    #[arg(long, default_value_t = 2)]
    pods_per_node: u8,
    /// WireGuard of the agents: auto, kernel or userspace, or by node: node-1=kernel,...
    #[arg(long, default_value = "auto")]
    wireguard: WireguardModes,
    /// Transports that agents accept: wireguard, host-gw, vxlan; of one node: node-1=vxlan
    #[arg(long, value_name = "[NODE=]LIST")]
    transports: Vec<String>,
    /// Number of nodes, the last ones, with a stand-in for Flannel in place of the agent
    ///
    /// The agents of the others are started with --flannel-compat.
    #[arg(long, value_name = "N", default_value_t = 0)]
    flannel_nodes: u8,
    /// Flannel's backend on these: vxlan, host-gw or wireguard
    #[arg(long, value_name = "BACKEND", default_value = "vxlan", value_parser = backend)]
    flannel_backend: Transport,
    /// MTU of the underlay in bytes, 1360 to 65535
    #[arg(long, default_value_t = 1500)]
    underlay_mtu: u32,
    /// Address families of underlay and pods: v4, v6 or dual
    #[arg(long, default_value = "v4")]
    family: Family,
    /// Each node in a subnet of its own behind a router
    #[arg(long)]
    routed: bool,
    /// An API server without the policies that keep agents to their own Nodes
    #[arg(long)]
    no_admission: bool,
}

#[derive(Debug, clap::Args)]
struct TrafficArgs {
    /// One pod
    #[arg(long, default_value = "pod-1-1")]
    from: String,
    /// The other pod
    #[arg(long, default_value = "pod-2-1")]
    to: String,
    /// Packets per second in each direction
    #[arg(long, default_value_t = 1000)]
    rate: u32,
    /// UDP payload of each in bytes
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u16).range(16..))]
    payload: u16,
    /// For how long
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    unblock_signals();
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let name = cli.name;
    match cli.command {
        LabCommand::Up(up_args) => up(name, up_args),
        LabCommand::Status { json } => {
            let status = Lab::open(&name)?.status();
            if json {
                print_json(&status)?
            } else {
                println!("{}", paint(&status.to_string()))
            }
            Ok(())
        }
        LabCommand::Verify { json } => verify(&name, json),
        LabCommand::Traffic(args) => traffic(&name, &args),
        LabCommand::Exec { place, command } => exec(&name, &place, &command),
        LabCommand::Kubeconfig => {
            print!("{}", Lab::open(&name)?.kubeconfig());
            Ok(())
        }
        LabCommand::Restart { node } => {
            let lab = Lab::open(&name)?;
            let node = lab.node(&node)?;
            node.restart_agent()?;
            let pid =
                node.agent().map_or_else(|| "ended".to_owned(), |agent| agent.pid.to_string());
            eprintln!("the agent of {} is started: {pid}", node.name());
            Ok(())
        }
        LabCommand::Transports { node, list } => {
            let list = Transports::list(&list).map_err(usage)?;
            Ok(Lab::open(&name)?.node(&node)?.set_transports(&list)?)
        }
        LabCommand::Reboot { node } => {
            let lab = Lab::open(&name)?;
            let node = lab.node(&node)?;
            let progress = Progress::on_stderr();
            progress.step(format!("rebooting {}", node.name()));
            node.reboot()?;
            node.start_agent()?;
            node.attach_pods()?;
            node.wait_for_mesh()?;
            progress.done();
            eprintln!("{} is back", node.name());
            Ok(())
        }
        LabCommand::Down => {
            let progress = Progress::on_stderr();
            let found = Lab::down(&name, &progress)?;
            progress.done();
            eprintln!("lab {name} {}", if found { "is gone" } else { "does not exist" });
            Ok(())
        }
        LabCommand::ApiServer { port, no_admission } => {
            Ok(run_api_server(&name, port, !no_admission)?)
        }
    }
}

fn backend(name: &str) -> Result<Transport, String> {
    Transport::parse(name).ok_or_else(|| "give vxlan, host-gw or wireguard".to_owned())
}

fn usage(error: TransportsError) -> Failure {
    Failure::new(Exit::Usage, error)
}

fn up(name: LabName, args: UpArgs) -> Result<(), Failure> {
    let lab_binary = own_program()?;
    let transports = Transports::parse(&args.transports).map_err(usage)?;
    let options = Options {
        nodes: args.nodes,
        transports,
        flannel_nodes: args.flannel_nodes,
        flannel_backend: args.flannel_backend,
        pods_per_node: args.pods_per_node,
        wireguard: args.wireguard,
        underlay_mtu: args.underlay_mtu,
        underlay: args.family,
        pods: args.family,
        routed: args.routed,
        // An agent may not write Flannel's annotations there.
        admission: !args.no_admission && args.flannel_nodes == 0,
        lab_binary: lab_binary.clone(),
        ..Options::new(name, agent_program(&lab_binary)?)
    };
    watch_for_interrupts()?;
    let progress = Progress::on_stderr();
    let lab = Lab::up(options, &progress).map_err(|error| match error {
        LabError::Options(_) => Failure::new(Exit::Usage, error),
        error => error.into(),
    })?;
    let status = lab.status();
    lab.keep();
    println!("{}", paint(&status.to_string()));
    Ok(())
}

fn verify(name: &LabName, json: bool) -> Result<(), Failure> {
    let verification = Lab::open(name)?.verify(&Progress::on_stderr())?;
    if json {
        print_json(&verification)?;
    } else {
        println!("{}", paint(&verification.to_string()));
    }
    if verification.ok {
        return Ok(());
    }
    let failures = verification.failures.join("\n  ");
    Err(Failure::new(Exit::CheckFailed, format!("lab {name} does not hold:\n  {failures}")))
}

/// Sends numbered packets both ways between two pods.
fn traffic(name: &LabName, args: &TrafficArgs) -> Result<(), Failure> {
    let lab = Lab::open(name)?;
    let pair = (lab.pod(&args.from)?, lab.pod(&args.to)?);
    let rate = Rate { packets_per_second: args.rate, payload: args.payload.into() };
    let progress = Progress::on_stderr();
    progress.step(format!("sending for {} s", args.seconds));
    let traffic = Traffic::start(&[pair], rate)?;
    std::thread::sleep(Duration::from_secs(args.seconds));
    let reports = traffic.finish(GRACE);
    progress.done();
    if args.json {
        print_json(&reports)?;
    } else {
        println!("{}", paint(&report_table(&reports)));
    }
    if reports.iter().all(FlowReport::is_perfect) {
        return Ok(());
    }
    Err(Failure::new(Exit::CheckFailed, "not every packet arrived once and unchanged"))
}

fn exec(name: &LabName, place: &str, command: &[String]) -> Result<(), Failure> {
    let lab = Lab::open(name)?;
    let (program, arguments) = command.split_first().map_or(("", &[][..]), |(p, a)| (p, a));
    let mut command = Command::new(program);
    command.args(arguments);
    // `gambeson` is the lab's own, wherever it was built.
    if let (Some(folder), Some(path)) = (lab.options().binary.parent(), env::var_os("PATH")) {
        let folders = iter::once(folder.to_owned()).chain(env::split_paths(&path));
        if let Ok(path) = env::join_paths(folders) {
            command.env("PATH", path);
        }
    }
    Err(lab.environment(place)?.exec(&mut command).into())
}

fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// `gambeson` from beside this program, or else from PATH.
fn agent_program(lab_binary: &Path) -> Result<PathBuf, Failure> {
    let beside = lab_binary.with_file_name("gambeson");
    let path = env::var_os("PATH").unwrap_or_default();
    let in_path = env::split_paths(&path).map(|folder| folder.join("gambeson"));
    iter::once(beside.clone()).chain(in_path).find(|program| program.is_file()).ok_or_else(|| {
        let message = format!(
            "the agents' program, gambeson, is neither beside this one ({}) nor in PATH: build it \
             with `cargo build --release -p gambeson`",
            beside.display()
        );
        Failure::new(Exit::Failure, message)
    })
}

/// The program that runs now, by a path that holds inside the lab too.
fn own_program() -> Result<PathBuf, LabError> {
    std::env::current_exe()
        .map_err(|source| LabError::Measure { what: "find this program's own path".into(), source })
}

/// Lets an interrupted `lab up` take down what it made.
fn watch_for_interrupts() -> Result<(), LabError> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGHUP);
    let failed = |what: &str, source| LabError::Measure { what: what.to_owned(), source };
    signals.thread_block().map_err(|errno| failed("block signals", errno.into()))?;
    let watch = move || {
        if signals.wait().is_ok() {
            INTERRUPTED.store(true, Ordering::Relaxed);
        }
    };
    let thread = std::thread::Builder::new().name("signals".to_owned()).spawn(watch);
    thread.map(|_| ()).map_err(|source| failed("start a thread", source))
}
