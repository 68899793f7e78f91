//! `observe -> Observed`, `execute(Plan)`: the kernel of this node, without any topology.
//!
//! Nothing here decides. [`Kernel::observe`] reads what carries our names and marks,
//! [`Kernel::execute`] does what a plan says, and [`Events`] tells when to look again. All of
//! it acts in the network namespace of the calling process.

mod error;
mod events;
mod flannel;
mod generation;
pub(crate) mod link;
pub(crate) mod netlink;
pub(crate) mod nfnetlink;
mod nft;
pub(crate) mod route;
mod rule;
mod sysctl;
mod vtep;
mod wireguard;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use gambeson_keys::{KeyRing, PublicKey, Secrets};
use gambeson_mesh::desired::{Implementation, LinkKind, Ruleset, VtepTables, WireGuardDevice};
use gambeson_mesh::node::Transport;
use gambeson_mesh::observed::{ForwardDrop, Observed, ObservedLink, ObservedWireGuard};
use gambeson_mesh::plan::{self, Action, Plan, WireGuardChange};
use gambeson_mesh::session::DeviceName;
use ipnet::IpNet;
use tokio::time::timeout;

pub use error::ApplyError;
pub use events::Events;
pub(crate) use nft::GUARD_CHAIN;
pub use nft::GuardDrops;

pub use flannel::Flannel;
use netlink::Netlink;
use wireguard::Tunnels;

use crate::supervisor::Supervisors;

/// A device that takes longer for an answer deserves a closer look.
const SOON: Duration = Duration::from_secs(1);

/// Whether a device's process or the kernel answers soon, and the device has the keys, the
/// port and the peers that it should.
pub async fn is_configured(name: DeviceName, device: &WireGuardDevice, secrets: &Secrets) -> bool {
    let state = timeout(SOON, wireguard::observe(name, device.implementation, secrets)).await;
    matches!(state, Ok(Ok(Some(state))) if plan::is_configured(device, &state))
}

/// What of the kernel matters beside what carries our names and marks.
#[derive(Debug, Clone)]
pub struct Scope {
    /// The cluster networks: routes into them are looked at, whoever made them.
    pub networks: BTreeSet<IpNet>,
    /// The pod bridge.
    pub bridge: String,
    /// Whether other firewalls matter that drop what is forwarded.
    pub forward_rules: bool,
    /// Where `net/...` of `/proc/sys` can be read and written.
    pub proc_sys: PathBuf,
    /// Where the supervisors of userspace devices are, if this process is not to start any.
    pub tunnel_dir: Option<PathBuf>,
}

impl Default for Scope {
    fn default() -> Self {
        Self {
            networks: BTreeSet::new(),
            bridge: String::new(),
            forward_rules: false,
            proc_sys: PathBuf::from("/proc/sys"),
            tunnel_dir: None,
        }
    }
}

/// This node's kernel: links, addresses, WireGuard, routes, settings and firewall.
#[derive(Debug)]
pub struct Kernel {
    netlink: Netlink,
    tunnels: Tunnels,
    /// Endpoints as they were written last. Where a peer is now may differ: it roams.
    pinned: BTreeMap<(DeviceName, PublicKey), SocketAddr>,
    /// Of which preshared keys are made.
    secrets: Secrets,
    /// Indices of the links that were seen with our alias.
    known: BTreeMap<DeviceName, u32>,
    scope: Scope,
    ruleset: Option<nft::Written>,
    guard_whole: Option<SystemTime>,
    /// What other firewalls drop, at this generation of the ruleset.
    forward_drops: Option<(u32, BTreeSet<ForwardDrop>)>,
}

impl Kernel {
    /// Opens the kernel of the calling thread's network namespace. Userspace devices are
    /// served by this process's own program.
    ///
    /// # Errors
    /// [`ApplyError::Connect`].
    pub async fn connect(scope: Scope) -> Result<Self, ApplyError> {
        let program = std::env::current_exe().ok().filter(|path| path.exists());
        // After an upgrade in place the path may be gone, but not the program.
        Self::with_program(program.unwrap_or_else(|| PathBuf::from("/proc/self/exe")), scope).await
    }

    /// As [`Kernel::connect`], with another program to serve userspace devices: it is run as
    /// `PROGRAM tunnel IFACE ...`.
    ///
    /// # Errors
    /// [`ApplyError::Connect`].
    pub async fn with_program(program: PathBuf, scope: Scope) -> Result<Self, ApplyError> {
        let netlink = Netlink::connect().map_err(|source| ApplyError::Connect { source })?;
        let tunnels = match &scope.tunnel_dir {
            Some(dir) => Tunnels::Supervised(Supervisors::new(dir.clone())),
            None => Tunnels::Own(program),
        };
        Ok(Self {
            netlink,
            tunnels,
            pinned: BTreeMap::new(),
            secrets: Secrets::default(),
            known: BTreeMap::new(),
            scope,
            ruleset: None,
            guard_whole: None,
            forward_drops: None,
        })
    }

    /// Tells of which secrets the preshared keys in devices may be made.
    pub fn set_secrets(&mut self, secrets: &Secrets) {
        self.secrets = secrets.clone();
    }

    /// Reads everything that carries our names and marks.
    ///
    /// # Errors
    /// The operation that failed. Nothing partial is given: what was not read would look as
    /// if it did not exist.
    pub async fn observe(&mut self) -> Result<Observed, ApplyError> {
        let mut observed = Observed::default();
        let mut devices = BTreeMap::new();
        for device in DeviceName::all() {
            let Some(link) = link::find(&mut self.netlink, device.as_str()).await? else {
                self.unpin(device, None);
                continue;
            };
            devices.insert(link.index, device);
            observed.links.insert(device, self.observe_link(device, link).await?);
        }
        let routes = route::observe(&mut self.netlink, &devices, &self.scope.networks).await?;
        (observed.routes, observed.foreign_routes) = routes;
        observed.rules = rule::observe(&mut self.netlink).await?;
        observed.sysctls =
            sysctl::observe(devices.into_values(), &self.scope.bridge, &self.scope.proc_sys)?;
        observed.ruleset = self.observe_guard().await;
        observed.forward_drops = self.observe_forward_drops().await;
        Ok(observed)
    }

    /// The guard, if it is whole. One that cannot be read is written again like one that is
    /// not, which tells why, and keeps nothing else from being repaired.
    async fn observe_guard(&mut self) -> Option<Ruleset> {
        let written = self.ruleset.as_mut()?;
        match nft::is_intact(written).await {
            Ok(true) => {
                self.guard_whole = Some(SystemTime::now());
                Some(written.ruleset.clone())
            }
            Ok(false) => None,
            Err(error) => {
                tracing::debug!(%error, "the guard cannot be read");
                None
            }
        }
    }

    /// Other firewalls' drops. Where they cannot be read, the guard cannot either, which is said.
    async fn observe_forward_drops(&mut self) -> BTreeSet<ForwardDrop> {
        if !self.scope.forward_rules {
            return BTreeSet::new();
        }
        let found = async {
            let generation = nft::generation().await?;
            match self.forward_drops.take().filter(|(at, _)| *at == generation) {
                Some(known) => Ok(known),
                None => Ok((generation, nft::observe_forwarded(&self.scope.networks).await?)),
            }
        };
        match found.await {
            Ok(known) => self.forward_drops.insert(known).1.clone(),
            Err::<_, ApplyError>(error) => {
                tracing::debug!(%error, "other firewalls cannot be read");
                BTreeSet::new()
            }
        }
    }

    /// Carries out a plan in order. A failed action does not stop the next ones; what failed
    /// is given back, and is planned again after the next observation.
    pub async fn execute(&mut self, plan: &Plan, keys: &KeyRing) -> Vec<ApplyError> {
        let mut errors = Vec::new();
        for action in &plan.actions {
            if let Err(error) = self.act(action, keys).await {
                errors.push(error);
            }
        }
        errors
    }

    /// Whether an older program serves one of these userspace devices than would be started now.
    pub async fn has_outdated_tunnels(&self, observed: &Observed) -> bool {
        let userspace = |link: &ObservedLink| {
            link.is_ours() && link.kind == Some(LinkKind::WireGuard(Implementation::Userspace))
        };
        for (device, _) in observed.links.iter().filter(|(_, link)| userspace(link)) {
            if wireguard::is_outdated(&self.tunnels, *device).await {
                return true;
            }
        }
        false
    }

    /// Reads what the guard has dropped.
    ///
    /// # Errors
    /// [`ApplyError::NoCounter`] while the guard is not installed, or what `nft` failed with.
    pub async fn guard_drops(&self) -> Result<GuardDrops, ApplyError> {
        nft::drops().await
    }

    /// Removes the guard, and rules of ours in other firewalls. Gives what was there.
    ///
    /// # Errors
    /// What `nft` failed with.
    pub async fn remove_firewall(&mut self) -> Result<Vec<String>, ApplyError> {
        self.ruleset = None;
        let mut removed = nft::remove_forwarded().await?;
        removed.extend(nft::remove().await?);
        Ok(removed)
    }

    /// When the guard's table was last seen to be exactly what was written.
    pub fn guard_seen_whole(&self) -> Option<SystemTime> {
        self.guard_whole
    }

    /// Those of these addresses that are reached over the link with this index and no router,
    /// as the kernel itself would send to them.
    pub async fn on_link(&mut self, addresses: BTreeSet<IpAddr>, index: u32) -> BTreeSet<IpAddr> {
        let mut on_link = BTreeSet::new();
        for address in addresses {
            if route::is_on_link(&mut self.netlink, address, index).await {
                on_link.insert(address);
            }
        }
        on_link
    }

    /// What our routes lead to in clear by transports that are `accepted`, by the name of the link.
    /// Nothing, when they cannot be read.
    pub async fn in_clear(
        &mut self,
        accepted: &BTreeSet<Transport>,
    ) -> BTreeMap<String, BTreeSet<IpNet>> {
        found(route::in_clear(&mut self.netlink, accepted).await)
    }

    /// What those of Flannel's lead to that are to be taken over. Nothing, when they cannot be read.
    pub async fn flannel_in_clear(
        &mut self,
        flannel: &Flannel<'_>,
    ) -> BTreeMap<String, BTreeSet<IpNet>> {
        found(flannel::in_clear(&mut self.netlink, flannel).await)
    }

    /// Takes over what Flannel left here: its VXLAN devices and routes where these are accepted,
    /// as they are and without a pause. The rest of it goes. Says what was done.
    ///
    /// # Errors
    /// The operation that failed.
    pub async fn take_over_flannel(
        &mut self,
        flannel: &Flannel<'_>,
    ) -> Result<Vec<String>, ApplyError> {
        let mut done = flannel::take_over(&mut self.netlink, flannel).await?;
        done.extend(nft::remove_flannel().await?);
        Ok(done)
    }

    /// Removes the guard and gives our VXLAN devices and their routes back to Flannel, as they are
    /// and without a pause. Says what was done.
    ///
    /// # Errors
    /// The operation that failed.
    pub async fn hand_back_to_flannel(&mut self) -> Result<Vec<String>, ApplyError> {
        let mut done = self.remove_firewall().await?;
        done.extend(flannel::hand_back(&mut self.netlink).await?);
        Ok(done)
    }

    /// Whether a link of type `wireguard` can be made here: makes one under a temporary name
    /// and removes it.
    pub async fn kernel_wireguard_available(&self) -> bool {
        match Netlink::connect() {
            Ok(mut netlink) => link::can_add_kernel(&mut netlink).await,
            Err(error) => {
                tracing::warn!(%error, "cannot open a netlink socket");
                false
            }
        }
    }

    async fn observe_link(
        &mut self,
        device: DeviceName,
        link: link::Link,
    ) -> Result<ObservedLink, ApplyError> {
        if link.ours {
            self.known.insert(device, link.index);
        }
        let mut observed = ObservedLink {
            ours: link.ours,
            known: self.known.get(&device) == Some(&link.index),
            kind: link.kind,
            up: link.up,
            mtu: link.mtu,
            addresses: link::device_addresses(&mut self.netlink, &link).await?,
            wireguard: None,
            tables: VtepTables::default(),
        };
        match link.kind {
            // Also without our alias: its key may tell that it is ours.
            Some(LinkKind::WireGuard(implementation)) => {
                let state = wireguard::observe(device, implementation, &self.secrets).await?;
                observed.wireguard = state;
            }
            Some(LinkKind::Vxlan(_)) => {
                observed.tables = vtep::observe(&mut self.netlink, device, link.index).await?;
            }
            None => {}
        }
        if let Some(state) = &mut observed.wireguard {
            self.unpin(device, Some(state));
            for (key, peer) in &mut state.peers {
                peer.pinned_endpoint = self.pinned.get(&(device, *key)).copied();
            }
        }
        Ok(observed)
    }

    async fn act(&mut self, action: &Action, keys: &KeyRing) -> Result<(), ApplyError> {
        let netlink = &mut self.netlink;
        match action {
            Action::SetRuleset(ruleset) => {
                self.ruleset = None;
                self.ruleset = Some(nft::write(ruleset).await?);
                self.guard_whole = Some(SystemTime::now());
                Ok(())
            }
            Action::AcceptForwarded(drop) => {
                nft::accept_forwarded(drop, &self.scope.networks).await
            }
            Action::SetSysctl(sysctl, value) => sysctl::write(sysctl, value, &self.scope.proc_sys),
            Action::AddLink { device, kind, mtu } => self.add_link(*device, *kind, *mtu).await,
            Action::MarkLink(device) => link::mark(netlink, *device).await,
            Action::DeleteLink(device) => self.delete_link(*device).await,
            Action::SetLinkMtu { device, mtu } => link::set_mtu(netlink, *device, *mtu).await,
            Action::SetLinkUp(device) => self.set_link_up(*device).await,
            Action::AddAddress { device, address } => {
                link::add_address(netlink, *device, *address).await
            }
            Action::DeleteAddress { device, address } => {
                link::delete_address(netlink, *device, *address).await
            }
            Action::ConfigureWireGuard { device, change } => {
                self.configure(*device, change, keys).await
            }
            Action::PutEntry { device, entry } => vtep::put(netlink, *device, *entry).await,
            Action::DeleteEntry { device, entry } => vtep::delete(netlink, *device, *entry).await,
            Action::PutRoute(key, route) => route::put(netlink, *key, route).await,
            Action::DeleteRoute(key) => route::delete(netlink, *key).await,
            Action::AddRule(rule) => rule::add(netlink, *rule).await,
            Action::DeleteRule(rule) => rule::delete(netlink, *rule).await,
        }
    }

    async fn add_link(
        &mut self,
        device: DeviceName,
        kind: LinkKind,
        mtu: u32,
    ) -> Result<(), ApplyError> {
        let netlink = &mut self.netlink;
        match kind {
            LinkKind::WireGuard(Implementation::Kernel) => {
                link::add_kernel(netlink, device, mtu).await
            }
            LinkKind::WireGuard(Implementation::Userspace) => {
                if link::find(netlink, device.as_str()).await?.is_none() {
                    wireguard::retire(&self.tunnels, device).await;
                }
                wireguard::start(&self.tunnels, device, mtu).await
            }
            LinkKind::Vxlan(link) => link::add_vxlan(netlink, device, &link, mtu).await,
        }
    }

    async fn delete_link(&mut self, device: DeviceName) -> Result<(), ApplyError> {
        let link = link::find(&mut self.netlink, device.as_str()).await?;
        link::delete(&mut self.netlink, device).await?;
        self.unpin(device, None);
        let userspace = LinkKind::WireGuard(Implementation::Userspace);
        if link.is_some_and(|link| link.kind == Some(userspace)) {
            wireguard::retire(&self.tunnels, device).await;
        }
        Ok(())
    }

    async fn set_link_up(&mut self, device: DeviceName) -> Result<(), ApplyError> {
        match link::set_up(&mut self.netlink, device).await {
            // The kernel binds the port now.
            Err(ApplyError::SetUp { source, .. })
                if source.raw_os_error() == Some(nix::libc::EADDRINUSE) =>
            {
                let port = match link::ours(&mut self.netlink, device).await?.kind {
                    Some(LinkKind::Vxlan(link)) => link.vxlan.port,
                    _ => {
                        let state =
                            wireguard::observe(device, Implementation::Kernel, &self.secrets)
                                .await?;
                        state.unwrap_or_default().listen_port
                    }
                };
                Err(ApplyError::PortTaken { device, port, source })
            }
            result => result,
        }
    }

    async fn configure(
        &mut self,
        device: DeviceName,
        change: &WireGuardChange,
        keys: &KeyRing,
    ) -> Result<(), ApplyError> {
        let link = link::ours(&mut self.netlink, device).await?;
        let Some(LinkKind::WireGuard(implementation)) = link.kind else {
            return Err(ApplyError::ForeignLink { device });
        };
        wireguard::configure(device, implementation, change, keys).await?;
        if implementation == Implementation::Kernel {
            link::adopt(&mut self.netlink, device, link.index).await?;
        }
        for (key, peer) in &change.set_peers {
            if let Some(endpoint) = peer.endpoint {
                self.pinned.insert((device, *key), endpoint);
            }
        }
        Ok(())
    }

    /// Forgets what was pinned on a device, except for the peers that it still has.
    fn unpin(&mut self, device: DeviceName, state: Option<&ObservedWireGuard>) {
        self.pinned.retain(|(pinned, key), _| {
            *pinned != device || state.is_some_and(|state| state.peers.contains_key(key))
        });
    }
}

/// What is in clear, as far as it can be read.
fn found(
    read: Result<BTreeMap<String, BTreeSet<IpNet>>, ApplyError>,
) -> BTreeMap<String, BTreeSet<IpNet>> {
    read.unwrap_or_else(|error| {
        tracing::debug!(%error, "the routes in clear cannot be read");
        BTreeMap::new()
    })
}
