use std::path::PathBuf;
use std::time::Duration;

use gambeson_mesh::node::DEFAULT_PREFIX;
use tokio::time::{Instant, sleep};

use super::Failure;
use crate::cluster::{Connector, audit};
use crate::exit::Exit;

/// How often it is asked again with --wait.
const PAUSE: Duration = Duration::from_secs(1);

/// Check, by what the API server says, that every Node is in the encrypted mesh
///
/// Every Node has to publish a key and say that all its paths are encrypted, and the API server
/// has to refuse, as a dry run, that an agent writes on another Node than its own. `helm test`
/// runs this in a pod. It changes nothing.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  kubectl -n kube-system exec ds/gambeson -c agent -- gambeson audit
  gambeson audit --kubeconfig ~/.kube/config --wait 60")]
pub(super) struct Args {
    /// Kubeconfig file; without it the service account of the pod is used
    #[arg(long, env = "KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Node that this pod runs on, which its token may write on
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    node_name: Option<String>,
    /// Prefix of the Node annotations
    #[arg(long, env = "GAMBESON_ANNOTATION_PREFIX", value_name = "DOMAIN", default_value = DEFAULT_PREFIX)]
    annotation_prefix: String,
    /// Ask again for this many seconds while something is wrong
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u64,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(check(args))
}

async fn check(args: &Args) -> Result<(), Failure> {
    let connector = Connector::new(args.kubeconfig.clone());
    let end = Instant::now() + Duration::from_secs(args.wait);
    loop {
        let answer = audit(&connector, &args.annotation_prefix, args.node_name.as_deref()).await;
        let failure = match answer {
            Ok(answer) if answer.findings.is_empty() => {
                println!(
                    "{} Nodes, each with a key of its own and encrypted paths; admission: {}",
                    answer.nodes, answer.admission
                );
                return Ok(());
            }
            Ok(answer) => {
                let findings = answer.findings.join("\n  ");
                let message =
                    format!("the mesh of {} Nodes does not hold:\n  {findings}", answer.nodes);
                Failure::new(Exit::CheckFailed, message)
            }
            Err(error) => error.into(),
        };
        if Instant::now() >= end {
            return Err(failure);
        }
        sleep(PAUSE).await;
    }
}
