//! Asks the API server, as a dry run, to let this agent write on another Node. It has to be
//! refused: an agent that is let could turn a whole mesh against itself, and so could any other.

use std::time::Duration;

use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::backoff::Backoff;
use super::connect::{Connector, RequestError};
use super::object::NodeObject;
use super::store::NodeStore;
use crate::status::Admission;

/// Waits after an answer that is not yet what it should be: the policies may come later.
const FIRST_WAIT: Duration = Duration::from_secs(2);
const LONGEST_WAIT: Duration = Duration::from_secs(600);
/// After this time it is asked again whether it is still so.
const AGAIN: Duration = Duration::from_secs(6 * 3600);
/// How a refusal by a policy is told from one for lack of rights.
const BY_POLICY: &str = "ValidatingAdmissionPolicy";

/// Keeps the answer up to date, in a task of its own.
#[derive(Debug)]
pub struct AdmissionTest {
    connector: Connector,
    store: NodeStore,
    prefix: String,
    answer: watch::Sender<Admission>,
}

impl AdmissionTest {
    /// Asks about the Nodes of `store`, and gives the answers to `answer`.
    pub fn new(
        connector: Connector,
        store: NodeStore,
        prefix: &str,
        answer: watch::Sender<Admission>,
    ) -> Self {
        Self { connector, store, prefix: prefix.to_owned(), answer }
    }

    /// Asks for ever.
    pub async fn run(self) {
        let mut changes = self.store.changes();
        let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        loop {
            changes.mark_unchanged();
            let (other, listed) = {
                let nodes = self.store.nodes();
                (nodes.another().cloned(), nodes.listed())
            };
            let Some(other) = other else {
                if listed {
                    self.say(Admission::Alone);
                }
                if changes.changed().await.is_err() {
                    return;
                }
                continue;
            };
            match ask(&self.connector, &self.prefix, &other).await {
                Ok(answer) => self.say(answer),
                Err(error) => debug!(%error, "cannot ask about admission"),
            }
            if *self.answer.borrow() == Admission::Enforced {
                backoff.reset();
                // Only the clock: what the Nodes do changes nothing about it.
                let _ = timeout(AGAIN, self.answer.closed()).await;
            } else {
                tokio::time::sleep(backoff.wait()).await;
            }
        }
    }

    fn say(&self, answer: Admission) {
        if self.answer.send_replace(answer) == answer {
            return;
        }
        match answer {
            Admission::Missing => warn!("{}", Admission::MISSING),
            Admission::Enforced => info!("the API server keeps each agent to its own Node"),
            Admission::Alone | Admission::Unknown => {}
        }
    }
}

/// Asks once, about this Node.
pub(super) async fn ask(
    connector: &Connector,
    prefix: &str,
    other: &str,
) -> Result<Admission, RequestError> {
    let api: Api<NodeObject> = Api::all(connector.client().await?);
    let name = format!("{prefix}/admission-test");
    let patch = Patch::Merge(json!({ "metadata": { "annotations": { name: "refused" } } }));
    let params = PatchParams { dry_run: true, ..PatchParams::default() };
    match connector.in_time(api.patch_status(other, &params, &patch)).await {
        Ok(_) => Ok(Admission::Missing),
        Err(error) if error.to_string().contains(BY_POLICY) => Ok(Admission::Enforced),
        Err(error) => Err(error),
    }
}
