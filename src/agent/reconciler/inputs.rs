//! `Node + options + key store + host -> Inputs`: what a pass works on, or what it waits for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;

use gambeson_keys::{Answer, ClusterSecret, Generation, KeyRing};
use gambeson_mesh::NodeName;
use gambeson_mesh::desired::{Implementation, LinkKind};
use gambeson_mesh::family::Family;
use gambeson_mesh::mac::Mac;
use gambeson_mesh::node::annotation::flannel;
use gambeson_mesh::node::{Endpoints, Local, NodeRecord, Transport, Vteps, annotation, pod_cidrs};
use gambeson_mesh::observed::Observed;
use gambeson_mesh::rotation::requested;
use ipnet::IpNet;
use tracing::info;
use zeroize::Zeroizing;

use super::{NO_LIST, Pass, Reconciler};
use crate::agent::words::chain;
use crate::agent::{AgentError, preflight};
use crate::cluster::NodeStore;
use crate::config::WireGuardMode;
use crate::subnet_env::SubnetEnv;
use crate::underlay::{self, Families, Underlay};

/// What a pass needs of the cluster and this host.
pub(super) struct Inputs {
    /// `None` while the API server has not answered this agent: what a former one left in the
    /// kernel and on disk is all there is.
    pub(super) own: Option<NodeRecord>,
    pub(super) local: Local,
    pub(super) underlay: Underlay,
}

impl Reconciler {
    /// Collects what a pass needs, or says what it waits for.
    pub(super) async fn inputs(
        &mut self,
        node: &NodeName,
        store: &NodeStore,
        pass: &mut Pass,
    ) -> Result<Result<Inputs, String>, AgentError> {
        let own = {
            let nodes = store.nodes();
            match nodes.own() {
                Some(own) => Some(own.clone()),
                None if nodes.listed() => {
                    return Ok(Err(format!(
                        "Node {node} to be registered (if it never will, give --node-name the \
                         name that `kubectl get nodes` shows)"
                    )));
                }
                None => None,
            }
        };
        let Some(own) = own else {
            let inputs = self.inputs_from_host(node, pass).await;
            return Ok(inputs.ok_or_else(|| NO_LIST.to_owned()));
        };
        let cidrs = match self.pod_cidrs(&own, pass) {
            Ok(cidrs) => cidrs,
            Err(problem) => return Ok(Err(format!("a pod CIDR of Node {node}, which {problem}"))),
        };
        let underlay = match self.underlay(pass).await {
            Ok(underlay) => underlay,
            Err(problem) => return Ok(Err(format!("an underlay interface: {problem}"))),
        };
        let underlay = underlay.reached_at(&self.published_addresses(&own, store));
        if let Err(problem) = self.read_secret() {
            if self.keys.is_none() {
                return Ok(Err(format!("the secret of --psk-file: {problem}")));
            }
            pass.problems.push(format!("{problem}; keeping the secret that this node has"));
        }
        self.ensure_key(&own, pass)?;
        let local = self.local(node, cidrs, &underlay);
        Ok(Ok(Inputs { own: Some(own), local, underlay }))
    }

    /// What there is to go on with while no Node is known: this node's key, the pod CIDRs that
    /// it had, and the peers in its devices. `None` on a node that has not been in the mesh.
    async fn inputs_from_host(&mut self, node: &NodeName, pass: &mut Pass) -> Option<Inputs> {
        if self.keys.is_none() || self.topology.recovered().peers.is_empty() {
            return None;
        }
        let env = SubnetEnv::read(&self.config.subnet_file).ok()?;
        let networks = &self.config.cluster_networks;
        let is_ours = |cidr: &IpNet| networks.iter().any(|network| network.contains(cidr));
        let cidrs: BTreeSet<_> = env.subnets.iter().map(IpNet::trunc).filter(is_ours).collect();
        let underlay = self.underlay(pass).await.ok().filter(|_| !cidrs.is_empty())?;
        let local = self.local(node, cidrs, &underlay);
        Some(Inputs { own: None, local, underlay })
    }

    /// This node's pod CIDRs, or those it had when they cannot be read any more.
    fn pod_cidrs(&mut self, own: &NodeRecord, pass: &mut Pass) -> Result<BTreeSet<IpNet>, String> {
        match (pod_cidrs(own, &self.config.cluster_networks), &self.pod_cidrs) {
            (Ok(cidrs), _) => {
                self.pod_cidrs = Some((own.uid.clone(), cidrs.clone()));
                Ok(cidrs)
            }
            (Err(problem), Some((uid, cidrs))) if *uid == own.uid => {
                pass.problems.push(format!("Node {} {problem}; keeping those it had", own.name));
                Ok(cidrs.clone())
            }
            (Err(problem), _) => Err(problem.to_string()),
        }
    }

    /// The underlay interface, or the last one while there is none.
    async fn underlay(&mut self, pass: &mut Pass) -> Result<Underlay, String> {
        let of_pods = |family| {
            let mut networks = self.config.cluster_networks.iter();
            networks.any(|network| Family::of_net(network) == family)
        };
        let only = self.config.endpoints;
        let families = match only {
            Some(family) => Families { v4: family == Family::V4, v6: family == Family::V6 },
            None => Families { v4: of_pods(Family::V4), v6: of_pods(Family::V6) },
        };
        let choice = &self.config.underlay;
        let mut found = underlay::pick(choice, families).await;
        // IPv4 pods over an IPv6 underlay, or the other way round.
        if found.is_err()
            && only.is_none()
            && let Ok(other) = underlay::pick(choice, Families::default()).await
        {
            found = Ok(other);
        }
        match (found, &self.underlay) {
            (Ok(found), before) => {
                if before.as_ref() != Some(&found) {
                    info!(
                        interface = found.name,
                        mtu = found.mtu,
                        v4 = found.endpoints.v4.map(tracing::field::display),
                        v6 = found.endpoints.v6.map(tracing::field::display),
                        "underlay"
                    );
                }
                self.underlay = Some(found.clone());
                Ok(found)
            }
            (Err(error), Some(before)) => {
                pass.problems.push(format!("{}; keeping {}", chain(&error), before.name));
                Ok(before.clone())
            }
            (Err(error), None) => Err(chain(&error)),
        }
    }

    /// Reads --psk-file, if there is to be one.
    fn read_secret(&mut self) -> Result<(), String> {
        let Some(file) = &self.config.psk_file else { return Ok(()) };
        let text = fs::read_to_string(file).map(Zeroizing::new);
        let text = text.map_err(|error| format!("cannot read {}: {error}", file.display()))?;
        let secret = ClusterSecret::parse(&text).map_err(|error| {
            format!("{} has no secret for preshared keys: {error}", file.display())
        })?;
        self.secret = Some(secret);
        Ok(())
    }

    /// Makes this node's first key once its Node tells from which generation on.
    fn ensure_key(&mut self, own: &NodeRecord, pass: &mut Pass) -> Result<(), AgentError> {
        let published = own
            .annotations
            .get(annotation::KEY_GENERATION)
            .and_then(|text| text.parse().ok())
            .map(Generation::new);
        match (&self.keys, published) {
            (None, _) => {
                let request = requested(own).map(str::to_owned);
                let answer = Answer { request, revoke: false };
                // The store is gone, but peers remember the generation: it never goes back.
                let first = published.and_then(Generation::next).unwrap_or(Generation::FIRST);
                let keys = self.key_store.create(first, answer, self.secret.clone())?;
                info!(
                    generation = first.number(),
                    file = %self.key_store.path().display(),
                    "made a key"
                );
                self.kernel.set_secrets(keys.secrets());
                self.keys = Some(keys);
            }
            (Some(keys), Some(published)) if published > keys.newest() => {
                pass.problems.push(format!(
                    "the key file {} has generation {}, but Node {} publishes {published}, so \
                     peers ignore the older key; restore the newer file, or remove it to give \
                     this node a new key",
                    self.key_store.path().display(),
                    keys.newest(),
                    own.name,
                ));
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn local(
        &self,
        node: &str,
        pod_cidrs: BTreeSet<IpNet>,
        underlay: &Underlay,
    ) -> Local {
        let config = &self.config;
        Local {
            name: node.to_owned(),
            prefix: config.prefix.clone(),
            vxlan: config.backend.vxlan,
            vteps: self.vteps(&pod_cidrs, underlay.endpoints),
            flannel: config.flannel,
            on_link: BTreeSet::new(),
            pod_cidrs,
            cluster_networks: config.cluster_networks.clone(),
            keys: self.keys.as_ref().map_or_else(BTreeMap::new, KeyRing::publics),
            secrets: self.keys.as_ref().map_or_else(BTreeMap::new, KeyRing::secret_ids),
            known_secrets: self.secrets().iter().map(ClusterSecret::id).collect(),
            promoted: false,
            endpoints: underlay.endpoints,
            addresses: underlay.addresses,
            port: config.port,
            persistent_keepalive: config.persistent_keepalive,
            underlay: underlay.name.clone(),
            underlay_index: underlay.index,
            underlay_mtu: config.mtu.map_or(underlay.mtu, |mtu| mtu.min(underlay.mtu)),
            implementation: self.implementation.unwrap_or(Implementation::Kernel),
            transports: config.backend.transports.clone(),
            bridge: config.bridge.clone(),
            masquerade: config.masquerade.clone(),
        }
    }

    /// Addresses to publish in place of the interface's, the first of each family.
    fn published_addresses(&self, own: &NodeRecord, store: &NodeStore) -> Vec<IpAddr> {
        let overwrites = [flannel::PUBLIC_IP_OVERWRITE, flannel::PUBLIC_IPV6_OVERWRITE];
        let overwrites = overwrites.iter().filter(|_| self.config.flannel.is_some());
        let set = overwrites.filter_map(|name| own.annotations.get(*name)?.parse().ok());
        let external = store.nodes().own_external_addresses().to_vec();
        set.chain(external.into_iter().filter(|_| self.config.external_ip)).collect()
    }

    /// Addresses of the VXLAN devices: those that were there when the agent started, by which
    /// other nodes know them, and otherwise the same at every boot.
    fn vteps(&self, pod_cidrs: &BTreeSet<IpNet>, endpoints: Endpoints) -> Vteps {
        let default = Local::default_vteps(pod_cidrs, endpoints);
        let kept = |default: Option<Mac>, found: Option<Mac>| default.and(found.or(default));
        Vteps { v4: kept(default.v4, self.found.v4), v6: kept(default.v6, self.found.v6) }
    }

    /// Kernel or userspace, decided once: what runs already is kept. A node that does not accept
    /// WireGuard has nothing to decide.
    pub(super) async fn implementation(
        &mut self,
        observed: &Observed,
    ) -> Result<Implementation, AgentError> {
        if let Some(decided) = self.implementation {
            return Ok(decided);
        }
        if !self.config.backend.transports.contains(&Transport::Wireguard) {
            return Ok(Implementation::Kernel);
        }
        let running = observed.links.values().filter(|link| link.is_ours()).find_map(|link| {
            match link.kind {
                Some(LinkKind::WireGuard(implementation)) => Some(implementation),
                _ => None,
            }
        });
        let decided = match (self.config.wireguard, running) {
            (WireGuardMode::Auto, Some(running)) => running,
            (WireGuardMode::Userspace, _) => Implementation::Userspace,
            (WireGuardMode::Kernel, Some(Implementation::Kernel)) => Implementation::Kernel,
            (mode, _) => match (self.kernel.kernel_wireguard_available().await, mode) {
                (true, _) => Implementation::Kernel,
                (false, WireGuardMode::Kernel) => return Err(AgentError::NoKernelWireGuard),
                (false, _) => Implementation::Userspace,
            },
        };
        if decided == Implementation::Userspace {
            preflight::userspace(self.config.allow_userspace_in_fips)?;
            // A supervisor sees for itself.
            let own = self.config.tunnel_dir.is_none();
            if own && running != Some(Implementation::Userspace) {
                preflight::tun()?;
            }
        }
        info!(implementation = ?decided, adopted = running == Some(decided), "WireGuard");
        self.implementation = Some(decided);
        Ok(decided)
    }
}

impl Underlay {
    /// The same, published at the first of these addresses of each family.
    fn reached_at(self, external: &[IpAddr]) -> Self {
        let v4 =
            external.iter().find_map(|ip| if let IpAddr::V4(v4) = ip { Some(*v4) } else { None });
        let v6 =
            external.iter().find_map(|ip| if let IpAddr::V6(v6) = ip { Some(*v6) } else { None });
        let Endpoints { v4: own_v4, v6: own_v6 } = self.endpoints;
        Self { endpoints: Endpoints { v4: v4.or(own_v4), v6: v6.or(own_v6) }, ..self }
    }

    /// Stands in where only the guard is built, which does not depend on it.
    pub(super) fn unknown() -> Self {
        let (endpoints, addresses) = (Endpoints::default(), Endpoints::default());
        Self { name: String::new(), index: 0, mtu: 0, endpoints, addresses }
    }
}
