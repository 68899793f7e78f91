//! One pass: what is known of the cluster and of this host, to what the kernel should have,
//! to the difference, to the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use gambeson_keys::{ClusterSecret, Generation, KeyRing, KeyStore, PrivateKey, Secrets};
use gambeson_mesh::NodeName;
use gambeson_mesh::changeover::{Changeover, is_announced};
use gambeson_mesh::desired::{Desired, Implementation, LinkKind, NextHop};
use gambeson_mesh::family::Family;
use gambeson_mesh::live::Liveness;
use gambeson_mesh::node::{Local, Transport, Vteps};
use gambeson_mesh::observed::{Observed, ObservedLink};
use gambeson_mesh::plan::{self, Action, Plan};
use gambeson_mesh::rotation::{Progress, Rotation};
use gambeson_mesh::session::DeviceName;
use gambeson_mesh::topology::{self, Mesh, Topology};
use gambeson_mesh::transport::{self, Paths};
use ipnet::IpNet;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tracing::{debug, info, warn};

use super::words::{self, chain, describe};
use super::{AgentError, advice, overlap, preflight};
use crate::apply::{ApplyError, Flannel, Kernel};
use crate::cluster::{NodeStore, Publication};
use crate::cni::link::Places;
use crate::cni::versions;
use crate::config::{Backend, Config};
use crate::subnet_env::SubnetEnv;
use crate::underlay::Underlay;

/// What an agent waits for until the API server has answered it.
const NO_LIST: &str = "the list of Nodes from the API server";

mod inputs;
mod rotate;

/// Carries out passes, and keeps what must not be forgotten between them.
#[derive(Debug)]
pub(super) struct Reconciler {
    config: Config,
    kernel: Kernel,
    /// Of the CNI configuration.
    places: Places,
    /// Of the CNI specification, which the node's plugins speak; asked at the first handing over.
    cni_version: Option<&'static str>,
    key_store: KeyStore,
    keys: Option<KeyRing>,
    /// As --psk-file had it last.
    secret: Option<ClusterSecret>,
    implementation: Option<Implementation>,
    topology: Topology,
    changeover: Changeover,
    liveness: Liveness,
    rotation: Rotation,
    /// When a key was last replaced because of an older tunnel program.
    upgraded: Option<Instant>,
    /// Whether the topology knows what a former agent left in the kernel.
    recovered: bool,
    /// Addresses of the VXLAN devices that a former agent, or Flannel, left in the kernel.
    found: Vteps,
    underlay: Option<Underlay>,
    pod_cidrs: Option<(String, BTreeSet<IpNet>)>,
    /// Whether a pass has gone through without anything an agent cannot start with.
    started: bool,
    /// Whether pods may be started. Once they may, they always may: guard and routes are
    /// repaired, and a CNI configuration that was read cannot be taken back.
    ready: bool,
}

/// What one pass saw and did.
#[derive(Debug, Default)]
pub(super) struct Pass {
    /// What it works on, unless it waits for something.
    pub(super) view: Option<View>,
    /// What has to happen before there is anything to do.
    pub(super) waiting: Option<String>,
    /// What was tried to change in the kernel, in a few words.
    pub(super) changes: Vec<String>,
    /// What did not work and is tried again.
    pub(super) problems: Vec<String>,
    /// What works and is probably not meant on this host.
    pub(super) advice: Vec<String>,
    /// Whether pods may be started.
    pub(super) ready: bool,
    /// How soon another is to follow, when time alone is waited for.
    pub(super) again: Option<Duration>,
}

/// The state of a pass that had everything it needs.
#[derive(Debug)]
pub(super) struct View {
    pub(super) node_uid: String,
    pub(super) local: Local,
    pub(super) underlay: Underlay,
    pub(super) mesh: Mesh,
    pub(super) desired: Desired,
    /// As it was before the changes of this pass.
    pub(super) observed: Observed,
    pub(super) rotation: Option<Progress>,
}

impl Reconciler {
    pub(super) fn new(config: Config, kernel: Kernel) -> Self {
        let key_store = KeyStore::at(&config.key_file);
        let Config { cni_conf_dir, socket, key_file, cni_conf_file, .. } = &config;
        let given = cni_conf_file.clone();
        let places = Places { given, ..Places::of_agent(cni_conf_dir, socket, key_file) };
        Self {
            config,
            kernel,
            places,
            cni_version: None,
            key_store,
            keys: None,
            secret: None,
            implementation: None,
            topology: Topology::new(),
            changeover: Changeover::default(),
            liveness: Liveness::default(),
            rotation: Rotation::default(),
            upgraded: None,
            recovered: false,
            found: Vteps::default(),
            underlay: None,
            pod_cidrs: None,
            started: false,
            ready: false,
        }
    }

    /// Installs the guard and the fail-closed routes, whatever is there: nothing is needed but
    /// the cluster networks.
    pub(super) async fn shut(&mut self) -> Result<(), AgentError> {
        let desired = self.closed().await;
        let mut pass = Pass::default();
        self.execute(&Plan::fail_closed(&desired), &mut pass).await?;
        if self.config.flannel.is_some() {
            // Packets pass all the while: the guard knows the devices by either name.
            match self.kernel.take_over_flannel(&flannel(&self.config)).await {
                Ok(what) if what.is_empty() => {}
                Ok(what) => info!(what = what.join(", "), "took over from Flannel"),
                Err(error) => pass.problems.push(chain(&error)),
            }
        }
        for problem in pass.problems {
            warn!(error = problem, "not closed yet, will be tried again");
        }
        Ok(())
    }

    /// From the next pass on, packets may travel so.
    pub(super) fn set_backend(&mut self, backend: Backend) {
        if self.config.backend != backend {
            let transports = Transport::list(&backend.transports);
            info!(transports, "net-conf.json changed");
            self.config.backend = backend;
        }
    }

    /// Reads the keys of this node, if it has any yet.
    pub(super) fn load_keys(&mut self) -> Result<(), AgentError> {
        self.keys = self.key_store.load()?;
        self.kernel.set_secrets(&self.secrets());
        Ok(())
    }

    /// Of which preshared keys are made.
    pub(super) fn secrets(&self) -> Secrets {
        self.keys.as_ref().map(|keys| keys.secrets().clone()).unwrap_or_default()
    }

    /// Packets that the guard stopped, if it can be asked.
    pub(super) async fn guard_drops(&self) -> Result<crate::apply::GuardDrops, ApplyError> {
        self.kernel.guard_drops().await
    }

    /// When the guard was last seen whole.
    pub(super) fn guard_seen_whole(&self) -> Option<SystemTime> {
        self.kernel.guard_seen_whole()
    }

    /// What there should be while the Nodes are not known. What a former agent sends in clear
    /// goes on where this one's options allow it as well.
    async fn closed(&mut self) -> Desired {
        let local = self.local("", BTreeSet::new(), &Underlay::unknown());
        let mut desired = transport::desired(&Mesh::default(), &local, &Paths::default());
        if local.transports.iter().any(|transport| !transport.is_encrypted()) {
            desired.ruleset.plaintext = self.kernel.in_clear(&local.transports).await;
        }
        if local.flannel.is_some() {
            for (link, behind) in self.kernel.flannel_in_clear(&flannel(&self.config)).await {
                desired.ruleset.plaintext.entry(link).or_default().extend(behind);
            }
        }
        desired
    }

    /// Brings up only what stops packets: the guard and the fail-closed routes. Devices and
    /// routes to peers stay exactly as they are, for as long as the Nodes are not known.
    pub(super) async fn close(&mut self) -> Result<Pass, AgentError> {
        let mut pass = Pass { ready: self.ready, ..Pass::default() };
        let desired = self.closed().await;
        let Some(observed) = self.look(&mut pass).await? else { return Ok(pass) };
        let mut plan = Plan::new(&desired, &observed);
        plan.actions.retain(|action| match action {
            Action::SetRuleset(_) | Action::SetSysctl(..) | Action::AddRule(_) => true,
            Action::PutRoute(_, route) => route.next_hop == NextHop::Unreachable,
            _ => false,
        });
        let closed = self.execute(&plan, &mut pass).await?;
        // A former agent may have left all that pods need.
        pass.ready |= closed && SubnetEnv::read(&self.config.subnet_file).is_ok();
        Ok(pass)
    }

    /// One full pass, or as much of it as the Nodes known so far allow.
    pub(super) async fn pass(
        &mut self,
        node: &NodeName,
        store: &NodeStore,
        publication: &watch::Sender<Option<Publication>>,
    ) -> Result<Pass, AgentError> {
        let mut pass = Pass { ready: self.ready, ..Pass::default() };
        let inputs = match self.inputs(node, store, &mut pass).await? {
            Ok(inputs) => inputs,
            Err(waiting) => {
                let closed = self.close().await?;
                pass.problems.extend(closed.problems);
                pass.changes = closed.changes;
                pass.ready = closed.ready;
                pass.waiting = Some(waiting);
                return Ok(pass);
            }
        };
        let Some(observed) = self.look(&mut pass).await? else { return Ok(pass) };
        let implementation = self.implementation(&observed).await?;
        let mut local = Local { implementation, ..inputs.local };
        let next_hops = topology::next_hops(&local, store.nodes().records());
        local.on_link = self.kernel.on_link(next_hops, inputs.underlay.index).await;
        let mesh = match &inputs.own {
            Some(_) => self.topology.resolve(&local, store.nodes().records()),
            None => self.topology.recovered(),
        };
        let now = Instant::now();
        let pairs = self.liveness.follow(&mesh, &local, &observed, now);
        let mut crash = None;
        if let Some(own) = &inputs.own {
            let sight = (&mesh, &pairs, &observed, own);
            crash = self.rotate(&mut local, sight, now, &mut pass).await;
        }
        let announced = inputs.own.as_ref().is_some_and(|own| is_announced(&local, own));
        let changes = self.changeover.follow(&mesh, &local, &observed, announced, now);
        let looks = [self.changeover.next_look(now), self.liveness.next_look(now)];
        pass.again = looks.into_iter().flatten().chain(self.rotation.next_look(now)).min();
        let paths = Paths { changes, pairs };
        let desired = transport::desired(&mesh, &local, &paths);
        let plan = Plan::new(&desired, &observed);
        self.check_foreign(&plan, &mut pass)?;
        self.check_ports(&desired, &observed)?;
        let clean = self.execute(&plan, &mut pass).await?;
        if let Some(step) = crash {
            self.crash_at(step);
        }
        let in_place = clean || plan::is_in_place(&desired, &observed);
        self.started = true;
        self.hand_over(&local, in_place, &mut pass).await;
        self.check_networks(&mut pass).await;
        let internal = store.nodes().own_addresses().to_owned();
        pass.advice.extend(advice::on_host(&self.config, &inputs.underlay, &internal));
        match &inputs.own {
            Some(_) => publish(publication, self.publication(&local, &desired)),
            None => pass.waiting = Some(NO_LIST.to_owned()),
        }
        let node_uid = inputs.own.map(|own| own.uid).unwrap_or_default();
        let underlay = inputs.underlay;
        let rotation = self.rotation.progress().cloned();
        pass.view = Some(View { node_uid, local, underlay, mesh, desired, observed, rotation });
        Ok(pass)
    }

    /// What the Node is to say.
    fn publication(&self, local: &Local, desired: &Desired) -> Publication {
        let blocked = self.rotation.progress().filter(|progress| progress.blocked);
        Publication {
            annotations: local.annotations(),
            network_up: self.ready,
            encrypted: desired.ruleset.plaintext.is_empty(),
            rotation_blocked: blocked.map(words::blocked),
        }
    }

    /// Stands for a pass that did not end in time.
    pub(super) fn given_up(&self, limit: Duration) -> Pass {
        let problem = format!(
            "looking at the kernel and changing it took longer than {} s and was given up; see \
             what holds this node up",
            limit.as_secs()
        );
        Pass { ready: self.ready, problems: vec![problem], ..Pass::default() }
    }

    /// Reads the kernel, or says why it cannot be read for now.
    async fn look(&mut self, pass: &mut Pass) -> Result<Option<Observed>, AgentError> {
        match self.observe().await {
            Err(error) if self.is_passing(&error) => {
                pass.problems.push(chain(&error));
                Ok(None)
            }
            observed => Ok(Some(observed?)),
        }
    }

    /// Reads the kernel. At first sight, what a former agent left there is remembered.
    async fn observe(&mut self) -> Result<Observed, ApplyError> {
        let mut observed = self.kernel.observe().await?;
        let own = self.keys.as_ref().map_or_else(BTreeMap::new, KeyRing::publics);
        for link in observed.links.values_mut() {
            // Whoever changed its alias, nobody else has the key.
            let key = link.wireguard.as_ref().and_then(|wireguard| wireguard.public_key);
            link.known |= key.is_some_and(|key| own.values().any(|known| *known == key));
        }
        if !self.recovered {
            let known: Vec<_> = self.secrets().iter().map(ClusterSecret::id).collect();
            self.topology.recover(&observed, &known);
            let mac = |family| match observed.links.get(&DeviceName::Vxlan(family))?.kind {
                Some(LinkKind::Vxlan(link)) => Some(link.mac),
                _ => None,
            };
            self.found = Vteps { v4: mac(Family::V4), v6: mac(Family::V6) };
            self.recovered = true;
        }
        Ok(observed)
    }

    /// A network that this host got while the agent runs is said, and what works is kept.
    async fn check_networks(&self, pass: &mut Pass) {
        match overlap::with_host(&self.config.cluster_networks, &self.config.bridge).await {
            Ok(None) => {}
            Ok(Some(overlap)) => pass.problems.push(format!(
                "{overlap}: the guard stops this node's own packets there; the mesh stays as it \
                 is; give the host another network, or the cluster another --cluster-cidr"
            )),
            Err(error) => pass.problems.push(chain(&error)),
        }
    }

    /// A device that is not ours ends an agent that starts; later it is said and tried again.
    fn check_foreign(&self, plan: &Plan, pass: &mut Pass) -> Result<(), AgentError> {
        for device in &plan.foreign {
            let error = AgentError::ForeignDevice(*device);
            if !self.started {
                return Err(error);
            }
            pass.problems.push(error.to_string());
        }
        pass.problems.extend(words::obstacles(plan));
        Ok(())
    }

    /// At start, says which port is taken before a device is made for it.
    fn check_ports(&self, desired: &Desired, observed: &Observed) -> Result<(), AgentError> {
        if self.started {
            return Ok(());
        }
        desired
            .devices
            .iter()
            .filter(|(name, _)| !observed.links.get(name).is_some_and(ObservedLink::is_ours))
            .try_for_each(|(_, device)| preflight::udp_port(device.listen_port))
    }

    /// Whether the agent goes on after this error, in the hope that another pass succeeds. An
    /// agent that starts ends instead, where only a person can help.
    fn is_passing(&self, error: &ApplyError) -> bool {
        self.started || error.exit().is_none()
    }

    /// Carries out a plan. Gives back whether all of it worked.
    async fn execute(&mut self, plan: &Plan, pass: &mut Pass) -> Result<bool, AgentError> {
        if plan.is_empty() {
            return Ok(true);
        }
        for action in &plan.actions {
            debug!(?action, "change");
        }
        // Only actions that install a key look at the ring, and there are none before there
        // is one; execute takes it all the same.
        let none;
        let keys = match &self.keys {
            Some(keys) => keys,
            None => {
                none = KeyRing::new(Generation::FIRST, PrivateKey::generate());
                &none
            }
        };
        let errors = self.kernel.execute(plan, keys).await;
        pass.changes = plan.actions.iter().map(describe).collect();
        let clean = errors.is_empty();
        let several = errors.len() > 1;
        for error in errors {
            if !self.is_passing(&error) {
                return Err(error.into());
            }
            // A link that is not there failed to be made, which has been said.
            if !(several && matches!(error, ApplyError::LinkGone { .. })) {
                pass.problems.push(chain(&error));
            }
        }
        Ok(clean)
    }

    /// Tells the CNI plugin and the container runtime, once packets cannot leave in clear.
    async fn hand_over(&mut self, local: &Local, in_place: bool, pass: &mut Pass) {
        if !in_place && !self.ready {
            return;
        }
        let version = self.cni_version().await;
        let handed = self.write_subnet_env(local).and_then(|()| {
            let places = &self.places;
            let changed = places.hand_over(&self.config.bridge, version);
            if changed.map_err(|error| chain(&error))? {
                info!(folder = %places.conf_dir.display(), "wrote the CNI configuration");
            }
            Ok(())
        });
        match handed {
            Ok(()) => self.ready = true,
            Err(problem) => pass.problems.push(problem),
        }
        pass.ready = self.ready;
    }

    /// Programs are run for it, once: not before the mesh is there.
    async fn cni_version(&mut self) -> &'static str {
        if let Some(version) = self.cni_version {
            return version;
        }
        let plugins = self.config.cni_bin_dir.clone();
        let asked = spawn_blocking(move || versions::spoken_in(&plugins)).await;
        *self.cni_version.insert(asked.unwrap_or(versions::OLDEST))
    }

    fn write_subnet_env(&self, local: &Local) -> Result<(), String> {
        let networks: Vec<IpNet> = local.cluster_networks.iter().copied().collect();
        let subnets: Vec<IpNet> = local.pod_cidrs.iter().copied().collect();
        let masquerades = !local.masquerade.is_empty();
        let env = SubnetEnv::new(&networks, &subnets, local.inner_mtu(), masquerades)
            .map_err(|error| chain(&error))?;
        let file = &self.config.subnet_file;
        if env.write(file).map_err(|error| chain(&error))? {
            info!(file = %file.display(), mtu = env.mtu, "wrote the subnet");
        }
        Ok(())
    }
}

/// What is to be taken over from Flannel.
fn flannel(config: &Config) -> Flannel<'_> {
    let Backend { transports, vxlan } = &config.backend;
    Flannel { vni: vxlan.vni, accepted: transports, networks: &config.cluster_networks }
}

fn publish(publication: &watch::Sender<Option<Publication>>, wanted: Publication) {
    publication.send_if_modified(|current| {
        let changed = current.as_ref() != Some(&wanted);
        if changed {
            *current = Some(wanted);
        }
        changed
    });
}
