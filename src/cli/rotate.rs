use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::time::Duration;

use gambeson_mesh::NodeName;
use gambeson_mesh::node::DEFAULT_PREFIX;
use gambeson_mesh::rotation::REVOKE;
use k8s_openapi::jiff::Timestamp;
use tokio::time::{Instant, sleep};

use super::Failure;
use crate::cluster::{Connector, RequestError, Rotated, ask_for_rotation, rotations};
use crate::exit::Exit;

/// How often the Nodes are looked at.
const LOOK: Duration = Duration::from_millis(500);

/// Replace the keys of Nodes, without losing a packet
///
/// Sets the annotation config.gambeson.io/rotate, as `kubectl annotate` would; the agents do the
/// rest, and `gambeson status` on a node shows how far it is. A node keeps its old key for as
/// long as a peer that answers uses it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gambeson rotate node-1 --wait
  gambeson rotate --all --parallel 10
  gambeson rotate node-1 --revoke --wait")]
pub(super) struct Args {
    /// Nodes that are to have new keys
    #[arg(value_name = "NODE", required_unless_present = "all", conflicts_with = "all")]
    nodes: Vec<NodeName>,
    /// Every Node that an agent has published a key for
    #[arg(long)]
    all: bool,
    /// Ask for this many at a time, and wait for them before the next
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    parallel: Option<u32>,
    /// Wait until every Node has its new key, and show how far they are
    #[arg(long)]
    wait: bool,
    /// The old keys may be known to others: drop them at once. Packets under way may be lost
    #[arg(long)]
    revoke: bool,
    /// Longest time to wait for all of it, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    timeout: u64,
    /// Kubeconfig file; without it the service account of the pod is used
    #[arg(long, env = "KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Prefix of the Node annotations
    #[arg(long, env = "GAMBESON_ANNOTATION_PREFIX", value_name = "DOMAIN", default_value = DEFAULT_PREFIX)]
    annotation_prefix: String,
}

pub(super) fn run(args: Args) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(rotate(args))
}

async fn rotate(args: Args) -> Result<(), Failure> {
    let connector = Connector::new(args.kubeconfig);
    let mut work = Work {
        cluster: Cluster { connector, prefix: args.annotation_prefix, revoke: args.revoke },
        running: BTreeMap::new(),
    };
    let before = work.cluster.look().await?;
    let mut waiting = chosen(args.nodes, &before)?;
    if args.revoke {
        eprintln!("the old keys are dropped at once: packets under way with them may be lost");
    }
    let parallel = args.parallel.and_then(|number| usize::try_from(number).ok());
    let wait = args.wait || parallel.is_some();
    let end = Instant::now() + Duration::from_secs(args.timeout);
    loop {
        let room = parallel.unwrap_or(usize::MAX).saturating_sub(work.running.len());
        for node in waiting.drain(..room.min(waiting.len())) {
            work.begin(node).await?;
        }
        if !wait || work.running.is_empty() {
            return Ok(());
        }
        if Instant::now() >= end {
            return Err(work.too_late(waiting.len()));
        }
        sleep(LOOK).await;
        // An API server that is away for a moment stops nothing.
        match work.cluster.look().await {
            Ok(nodes) => work.go_on(&nodes),
            Err(error) => eprintln!("cannot look at the Nodes: {error}; asking again"),
        }
    }
}

/// The Nodes to begin with, every one of which has an agent.
fn chosen(
    named: Vec<NodeName>,
    nodes: &BTreeMap<NodeName, Rotated>,
) -> Result<VecDeque<NodeName>, Failure> {
    let has_key = |name: &&NodeName| nodes.get(*name).is_some_and(|node| node.generation.is_some());
    if named.is_empty() {
        return Ok(nodes.keys().filter(has_key).cloned().collect());
    }
    for name in &named {
        if !nodes.contains_key(name) {
            let message = format!("there is no Node {name}; nothing was asked for");
            return Err(Failure::new(Exit::Usage, message));
        }
        if !has_key(&name) {
            let message = format!(
                "Node {name} publishes no key, so that no agent would answer: see whether the \
                 DaemonSet gambeson has a pod there; nothing was asked for"
            );
            return Err(Failure::new(Exit::Usage, message));
        }
    }
    Ok(named.into())
}

struct Cluster {
    connector: Connector,
    prefix: String,
    revoke: bool,
}

struct Work {
    cluster: Cluster,
    running: BTreeMap<NodeName, Running>,
}

struct Running {
    since: Instant,
    /// Generation that the Node has when it is done.
    target: u64,
    said: Option<Rotated>,
}

impl Cluster {
    async fn look(&self) -> Result<BTreeMap<NodeName, Rotated>, RequestError> {
        rotations(&self.connector, &self.prefix).await
    }
}

impl Work {
    async fn begin(&mut self, node: NodeName) -> Result<(), Failure> {
        let Cluster { connector, prefix, revoke } = &self.cluster;
        let now = Timestamp::now();
        let request = if *revoke { format!("{REVOKE}-{now}") } else { now.to_string() };
        let before = ask_for_rotation(connector, prefix, &node, &request).await?;
        let generation = before.generation.unwrap_or_default();
        // One that is under way does not answer this request.
        let more = if before.under_way { 2 } else { 1 };
        println!("{node}: asked for a key to replace generation {generation}");
        let target = generation.saturating_add(more);
        self.running.insert(node, Running { since: Instant::now(), target, said: None });
        Ok(())
    }

    fn go_on(&mut self, nodes: &BTreeMap<NodeName, Rotated>) {
        self.running.retain(|name, running| {
            let Some(node) = nodes.get(name) else {
                println!("{name}: the Node is gone");
                return false;
            };
            let seconds = running.since.elapsed().as_secs_f64();
            if node.generation >= Some(running.target) && !node.under_way {
                println!("{name}: done, generation {} after {seconds:.1} s", running.target);
                return false;
            }
            if running.said.as_ref() != Some(node) {
                if let Some(why) = &node.blocked {
                    println!("{name}: blocked for now: {why}");
                } else if node.under_way {
                    println!("{name}: the next key is published, peers move");
                }
                running.said = Some(node.clone());
            }
            true
        });
    }

    fn too_late(&self, not_begun: usize) -> Failure {
        let names: Vec<_> = self.running.keys().map(String::as_str).collect();
        let more =
            if not_begun > 0 { format!(", and {not_begun} were not asked") } else { String::new() };
        let message = format!(
            "not done in time: {}{more}; what was asked for goes on by itself, see `gambeson \
             status` there",
            names.join(", ")
        );
        Failure::new(Exit::CheckFailed, message)
    }
}
