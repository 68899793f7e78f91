//! `events -> Local + Nodes -> Mesh -> Desired -> Plan(observed) -> kernel -> observe again`
//!
//! The only loop. Events say no more than "look again": a change of a Node, a message of
//! the kernel, a question, a timer. Each pass reads everything anew and applies the
//! difference. Whatever ends the agent, the data plane and the guard stay as they are, and
//! the next agent goes on from them.

mod advice;
mod device_watch;
mod error;
mod overlap;
mod pacer;
mod preflight;
mod reconciler;
mod removal;
mod reporter;
mod tasks;
mod words;

use std::sync::Arc;
use std::time::{Duration, Instant};

use gambeson_keys::Secrets;
use gambeson_mesh::NodeName;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, sleep_until, timeout};
use tracing::{debug, info, warn};

use device_watch::Devices;
pub use error::AgentError;
use pacer::{Cause, Pacer};
use reconciler::{Pass, Reconciler};
pub use removal::{Removal, RemovalError, remove};
use reporter::Reporter;
use tasks::Tasks;
use words::chain;

use crate::apply::{Events, Kernel, Scope};
use crate::cluster::{
    AdmissionTest, Backoff, Connector, EventWriter, NodeStore, NodeWatch, Publication, Publisher,
    Recorder,
};
use crate::config::{Config, NodeIdentity, Options, Reading};
use crate::http::{self, Reconciles};
use crate::rounds::Rounds;
use crate::status::{self, Admission, Source, Status};

/// A pass is made at least this often, in case an event was lost.
const RESYNC: Duration = Duration::from_secs(30);
/// After changes, a look at whether they hold.
const VERIFY: Duration = Duration::from_millis(100);
/// Waits after a pass that did not get everything done.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// Questions for a fresh status that may wait.
const QUESTIONS: usize = 32;
/// Kernel messages that are taken together at most.
const MESSAGES: usize = 4096;
/// A pass that takes longer is given up: every step of it is whole by itself.
const LONGEST_PASS: Duration = Duration::from_secs(30);
/// With nothing going on, the loop goes round at least this often.
const LONGEST_ROUND: Duration = Duration::from_secs(30 + 30 + 5);
/// How long a running pass may take after the agent was told to end.
const LAST_PASS: Duration = Duration::from_secs(5);

/// Runs the agent until `shutdown`, or until it cannot start. `seen` has its status after each
/// look.
///
/// # Errors
/// [`AgentError`]; the data plane and the guard stay as they are in every case.
pub async fn run(
    options: Options,
    seen: watch::Sender<Option<Status>>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), AgentError> {
    tokio::pin!(shutdown);
    let config = options.validate()?;
    preflight::net_admin()?;
    let connector = Connector::new(config.kubeconfig.clone());
    check_networks(&config, &connector).await?;
    info!(version = crate::VERSION, "starting");
    if let Some(advice) = advice::selinux() {
        warn!("{advice}");
    }
    if !config.unknown_keys.is_empty() {
        let keys = config.unknown_keys.join(", ");
        warn!(keys, "net-conf.json has keys that this version does nothing with");
    }
    // The guard comes first, and everything that can fail after it: also a start that fails
    // leaves nothing open.
    let scope = Scope {
        networks: config.cluster_networks.clone(),
        bridge: config.bridge.clone(),
        forward_rules: config.forward_rules,
        proc_sys: config.proc_sys.clone(),
        tunnel_dir: config.tunnel_dir.clone(),
    };
    let kernel = match config.tunnel_program.clone() {
        Some(program) => Kernel::with_program(program, scope).await?,
        None => Kernel::connect(scope).await?,
    };
    let mut reconciler = Reconciler::new(config.clone(), kernel);
    reconciler.shut().await?;
    reconciler.load_keys()?;
    let kernel_events = Events::subscribe()?;
    connector.client().await?;
    let socket = status::bind(&config.socket).await?;
    let healthz = match config.healthz {
        Some(address) => Some(http::bind(address).await?),
        None => None,
    };
    // Before anything is known of the cluster, and before its API server answers.
    reconciler.close().await?;
    let node = tokio::select! {
        node = find_node(&connector, &config.node, &mut reconciler) => node?,
        () = &mut shutdown => return Ok(()),
    };

    let mut tasks = Tasks::new();
    let (questions, asked) = mpsc::channel(QUESTIONS);
    let (status, last_status) = watch::channel(Status::starting(&node));
    let rounds = Rounds::new(LONGEST_ROUND);
    let source = Source::new(last_status, questions, rounds.clone());
    tasks.spawn("status socket", status::serve(socket, source.clone()));
    let reconciles = Reconciles::default();
    if let Some(listener) = healthz {
        let reconciles = reconciles.clone();
        tasks.spawn_fallible("health and metrics", async move {
            http::serve(listener, source, &reconciles).await
        });
    }
    let cluster = Cluster::start(&mut tasks, connector, &config, &node);
    let first = Reading { backend: config.backend, problem: None };
    let (read, net_conf) = watch::channel(first);
    tasks.spawn("net-conf.json", async move {
        match config.net_conf {
            Some(file) => file.run(read).await,
            // The sender lives on: nothing ever changes.
            None => std::future::pending().await,
        }
    });
    let (devices, devices_left) = watch::channel(None);
    let (device_changes, devices_changed) = watch::channel(0);
    tasks.spawn("device watch", device_watch::watch(devices_left, device_changes));
    let agent = Agent {
        reporter: Reporter::new(&node, cluster.events.clone(), config.require_admission),
        node,
        reconciler,
        cluster,
        kernel_events,
        devices,
        devices_changed,
        net_conf,
        asked,
        status,
        seen,
        reconciles,
        rounds,
        pacer: Pacer::default(),
        retry: Backoff::new(FIRST_RETRY, LONGEST_RETRY),
        next_look: Instant::now(),
    };
    let ended = agent.run(shutdown, &mut tasks).await;
    if ended.is_ok() {
        info!("ending; devices, routes and the guard stay as they are");
    }
    ended
}

/// Refuses cluster networks that would cut this node off from what it lives on.
async fn check_networks(config: &Config, connector: &Connector) -> Result<(), AgentError> {
    let networks = &config.cluster_networks;
    // What cannot be read now is looked at again in every pass; the guard does not wait for it.
    let host = overlap::with_host(networks, &config.bridge).await.unwrap_or_else(|error| {
        warn!(error = chain(&error), "cannot compare --cluster-cidr with this host's networks");
        None
    });
    let overlap = match host {
        Some(overlap) => Some(overlap),
        None => {
            let server = connector.server_address().await;
            server.and_then(|server| overlap::with_server(networks, server))
        }
    };
    overlap.map_or(Ok(()), |overlap| Err(AgentError::Overlap(overlap.to_string())))
}

/// The devices that a pass without problems leaves behind.
fn as_it_should_be(pass: &Pass, secrets: Secrets) -> Devices {
    let view = pass.view.as_ref().filter(|_| pass.problems.is_empty())?;
    Some(Arc::new((view.desired.devices.clone(), secrets)))
}

/// Waits until it is known which Node this is.
async fn find_node(
    connector: &Connector,
    identity: &NodeIdentity,
    reconciler: &mut Reconciler,
) -> Result<NodeName, AgentError> {
    let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
    let mut said: Option<String> = None;
    loop {
        let problem = match connector.node_name(identity).await {
            Ok(Some(node)) => {
                info!(node, "this Node");
                return Ok(node);
            }
            Ok(None) => "the agent's pod is not bound to a Node yet".to_owned(),
            Err(error) => chain(&error),
        };
        if said.as_ref() != Some(&problem) {
            warn!(error = problem, "cannot find this machine's Node; retrying");
            said = Some(problem);
        }
        sleep(backoff.wait()).await;
        reconciler.close().await?;
    }
}

/// The agent's connections to the cluster.
struct Cluster {
    store: NodeStore,
    changes: watch::Receiver<u64>,
    publication: watch::Sender<Option<Publication>>,
    events: Recorder,
    admission: watch::Receiver<Admission>,
    health: [watch::Receiver<Option<String>>; 2],
}

impl Cluster {
    fn start(tasks: &mut Tasks, connector: Connector, config: &Config, node: &str) -> Self {
        let store = NodeStore::new(node, &config.prefix);
        let (watch_health, watching) = watch::channel(None);
        let follow = NodeWatch::new(connector.clone(), store.clone(), watch_health);
        tasks.spawn("Node watch", follow.run());
        let (publish_health, publishing) = watch::channel(None);
        let (publication, wanted) = watch::channel(None);
        let publisher = Publisher::new(
            connector.clone(),
            store.clone(),
            node,
            &config.prefix,
            wanted,
            publish_health,
        );
        tasks.spawn("publisher", publisher.run());
        let (answer, admission) = watch::channel(Admission::default());
        let test = AdmissionTest::new(connector.clone(), store.clone(), &config.prefix, answer);
        tasks.spawn("admission test", test.run());
        let (writer, events) = EventWriter::new(connector, node);
        tasks.spawn("event writer", writer.run());
        let changes = store.changes();
        let health = [watching, publishing];
        Self { store, changes, publication, events, admission, health }
    }

    /// What is wrong with the connections at the moment.
    fn troubles(&self) -> Vec<String> {
        self.health.iter().filter_map(|health| health.borrow().clone()).collect()
    }
}

struct Agent {
    node: NodeName,
    reconciler: Reconciler,
    reporter: Reporter,
    cluster: Cluster,
    kernel_events: Events,
    /// What the last pass left behind, to be watched.
    devices: watch::Sender<Devices>,
    devices_changed: watch::Receiver<u64>,
    net_conf: watch::Receiver<Reading>,
    asked: mpsc::Receiver<oneshot::Sender<()>>,
    status: watch::Sender<Status>,
    /// The same, for a program that the agent is a part of.
    seen: watch::Sender<Option<Status>>,
    reconciles: Reconciles,
    rounds: Rounds,
    pacer: Pacer,
    retry: Backoff,
    /// When to look again even if nothing happens.
    next_look: Instant,
}

/// What woke the loop.
enum Wake {
    /// A pass is due.
    Look(Cause, Option<oneshot::Sender<()>>),
    /// The agent is to end.
    Shutdown,
}

impl Agent {
    async fn run(
        mut self,
        mut shutdown: std::pin::Pin<&mut impl Future<Output = ()>>,
        tasks: &mut Tasks,
    ) -> Result<(), AgentError> {
        loop {
            let mut answers = Vec::new();
            let cause = tokio::select! {
                wake = self.wake(shutdown.as_mut(), &mut answers) => match wake {
                    Some(cause) => cause,
                    None => return Ok(()),
                },
                ended = tasks.ended() => return Err(ended),
            };
            let fresh = !answers.is_empty() || self.next_look <= Instant::now();
            self.forget_events();
            let pass = self.pass(cause, fresh);
            tokio::pin!(pass);
            tokio::select! {
                passed = &mut pass => passed?,
                () = shutdown.as_mut() => {
                    // Every step of a pass is whole by itself, so that giving up is safe.
                    let _ = timeout(LAST_PASS, pass).await;
                    return Ok(());
                }
            }
            for answer in answers {
                // Whoever asked may be gone.
                let _ = answer.send(());
            }
        }
    }

    /// Waits until the next pass is due. Gathers the questions it will answer.
    async fn wake(
        &mut self,
        mut shutdown: std::pin::Pin<&mut impl Future<Output = ()>>,
        answers: &mut Vec<oneshot::Sender<()>>,
    ) -> Option<Cause> {
        let mut pending: Option<(Cause, Instant)> = None;
        loop {
            let due = pending.map(|(_, due)| due);
            let wake = tokio::select! {
                biased;
                () = shutdown.as_mut() => Wake::Shutdown,
                () = sleep_until(due.unwrap_or(self.next_look).into()) => match pending {
                    Some((cause, _)) => return Some(cause),
                    None => return Some(Cause::Wanted),
                },
                changed = self.cluster.changes.changed() => {
                    debug_assert!(changed.is_ok(), "the store is ours");
                    Wake::Look(Cause::Wanted, None)
                }
                changed = self.cluster.admission.changed() => {
                    debug_assert!(changed.is_ok(), "the test never ends");
                    Wake::Look(Cause::Wanted, None)
                }
                changed = self.devices_changed.changed() => {
                    debug_assert!(changed.is_ok(), "the watch never ends");
                    Wake::Look(Cause::Wanted, None)
                }
                changed = self.net_conf.changed() => {
                    debug_assert!(changed.is_ok(), "the task never ends");
                    Wake::Look(Cause::Wanted, None)
                }
                Some(answer) = self.asked.recv() => Wake::Look(Cause::Wanted, Some(answer)),
                event = self.kernel_events.changed(), if pending.is_none() => {
                    if let Err(error) = event {
                        debug!(error = chain(&error), "kernel events");
                        sleep(VERIFY).await;
                    }
                    Wake::Look(Cause::Kernel, None)
                }
            };
            match wake {
                Wake::Shutdown => return None,
                Wake::Look(cause, answer) => {
                    answers.extend(answer);
                    let due = self.pacer.due(cause, Instant::now());
                    pending = Some(match pending {
                        Some((before, earlier)) => (before.max(cause), earlier.min(due)),
                        None => (cause, due),
                    });
                }
            }
        }
    }

    /// Takes what the kernel has said up to now: the coming pass sees all of it.
    fn forget_events(&mut self) {
        for _ in 0..MESSAGES {
            if futures::FutureExt::now_or_never(self.kernel_events.changed()).is_none() {
                break;
            }
        }
    }

    async fn pass(&mut self, cause: Cause, fresh: bool) -> Result<(), AgentError> {
        let started = Instant::now();
        self.cluster.changes.mark_unchanged();
        let Reading { backend, problem } = self.net_conf.borrow_and_update().clone();
        self.reconciler.set_backend(backend);
        let Cluster { store, publication, .. } = &self.cluster;
        let pass = self.reconciler.pass(&self.node, store, publication);
        let pass = match timeout(LONGEST_PASS, pass).await {
            Ok(pass) => pass?,
            Err(_) => self.reconciler.given_up(LONGEST_PASS),
        };
        if fresh && let Ok(drops) = self.reconciler.guard_drops().await {
            self.reporter.set_drops(&drops);
        }
        self.reporter.set_guard_seen_whole(self.reconciler.guard_seen_whole());
        self.reporter.set_admission(*self.cluster.admission.borrow_and_update());
        let now = Instant::now();
        let mut troubles = self.cluster.troubles();
        troubles.extend(problem);
        let report = self.reporter.report(&pass, &troubles, now);
        self.seen.send_replace(Some(report.clone()));
        self.status.send_replace(report);
        self.rounds.went_round();
        self.reconciles.record(now.duration_since(started), pass.problems.len());
        self.devices.send_replace(as_it_should_be(&pass, self.reconciler.secrets()));
        self.pacer.ended(cause, started, now, !pass.changes.is_empty());
        self.next_look = now + self.pause(&pass);
        Ok(())
    }

    /// How long nothing has to happen until the next pass.
    fn pause(&mut self, pass: &Pass) -> Duration {
        if !pass.problems.is_empty() {
            return self.retry.wait();
        }
        self.retry.reset();
        let pause = if pass.changes.is_empty() { RESYNC } else { VERIFY };
        pass.again.map_or(pause, |again| again.min(pause))
    }
}
